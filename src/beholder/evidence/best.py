"""Which of a run's checkpoints is its best: the lowest held-out loss among those that look and do not babble (S2-7).

A pure function of what was measured at each of them; measuring stands in `stages`, the named pointer in
`train.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from beholder.config import BestRule
from beholder.evidence.guardrails import Limit
from beholder.evidence.record import Candidate

USUAL = BestRule()


def choose(
    candidates: Sequence[Candidate], on_disk: Collection[int] | None = None, rule: BestRule = USUAL,
    limits: Sequence[Limit] = (),
) -> list[Candidate]:  # fmt: skip
    """The candidates in order of their steps, each with why it may not be the best, and at most one marked best.

    ``on_disk``: steps whose checkpoint is still there, of which the best is taken; None: all. What a candidate must
    keep is measured by all of them, pruned or not; ``limits`` are the guardrails' (S4-3). Of equal losses the later
    one. A candidate whose image reliance, golden outputs or monitors were not measured is not refused for it: a run may
    be configured without them, and its gates say so.
    """
    steps = sorted({c.step: c for c in candidates}.values(), key=lambda c: c.step)
    most = max((c.delta_shuffled for c in steps if c.delta_shuffled is not None), default=0.0)
    judged = [c.model_copy(update={"refused": _refusal(c, most, rule, limits), "best": False}) for c in steps]
    allowed = [c for c in judged if not c.refused and (on_disk is None or c.step in on_disk)]
    if not allowed:
        return judged
    best = min(allowed, key=lambda c: (c.eval_loss, -c.step))
    return [c.model_copy(update={"best": c.step == best.step}) for c in judged]


def best_of(
    candidates: Sequence[Candidate], on_disk: Collection[int] | None = None, rule: BestRule = USUAL,
    limits: Sequence[Limit] = (),
) -> Candidate | None:  # fmt: skip
    """The one that `choose` marks, or None when all are refused."""
    return next((c for c in choose(candidates, on_disk, rule, limits) if c.best), None)


def _refusal(c: Candidate, most: float, rule: BestRule, limits: Sequence[Limit]) -> str:
    if c.delta_shuffled is not None and c.delta_shuffled <= 0:
        return f"another sample's image does not make it worse ({c.delta_shuffled:+.3g} nats/token)"
    if c.delta_shuffled is not None and c.delta_shuffled < rule.kept * most:
        return f"it looks less than before ({c.delta_shuffled:+.3g} of at most {most:+.3g} nats/token)"
    if c.collapse is not None and c.collapse > rule.max_collapse:
        return f"{c.collapse:.0%} of its golden outputs are empty, looping or all alike"
    for limit in limits:
        if (value := c.monitors.get(limit.measure)) is not None and limit.broken_by(value):
            side, bound = ("below", limit.least) if limit.least is not None else ("above", limit.most)
            return f"{limit.measure} is {value:.4g}, {side} {bound:.4g} ({limit.words})"
    return ""
