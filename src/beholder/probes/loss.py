"""Teacher-forced loss: per sample and turn, summed over strata, and compared between the right and the wrong image.

A loss is summed per sample in fp64 and divided once, so it does not depend on the batch size, on packing or on how
samples are shared among processes. Results are aligned by index: ``losses[i]`` belongs to ``examples[i]``. How a batch
is laid out is the caller's business (`data.collate`), what the model computes is `model.vlm`'s, and which strata there
are is `strata`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np
import torch

from beholder.evidence import Condition, Measurement
from beholder.probes import Measurable, joined, measurement, measuring, ratio_of_sums
from beholder.types import Batch, TokenLosses, UserError


class LossModel(Measurable, Protocol):
    def __call__(self, batch: Batch, /) -> TokenLosses: ...


ORDERED = ("short", "medium", "long", "first turn", "later turns")
"""Strata with an order of their own (`data.splits`, `probes.strata`); the others are told by name."""


@dataclass(frozen=True, slots=True)
class SampleLoss:
    """Sums over the supervised tokens of one sample; plain numbers, so processes can exchange them as JSON."""

    id: str
    nll: float
    """Nats, summed."""
    tokens: int
    correct: int
    """Tokens that were the arg-max."""
    token_nll: tuple[float, ...]
    """Nats of each supervised token, in order."""
    turns: tuple[int, ...]
    """Supervised tokens of each assistant turn, in order; sums to ``tokens``. A turn that was cut off is absent."""

    def __post_init__(self) -> None:
        # JSON has no tuples: ``SampleLoss(**row)`` gives the equal record back.
        object.__setattr__(self, "token_nll", tuple(self.token_nll))
        object.__setattr__(self, "turns", tuple(self.turns))

    @property
    def exact(self) -> bool:
        """Every supervised token, end token included, was the arg-max: of a single answer, what greedy decoding would
        write word for word."""
        return self.correct == self.tokens

    @property
    def turn_nll(self) -> list[float]:
        """Nats of each assistant turn, summed."""
        return [math.fsum(self.token_nll[a:b]) for a, b in pairwise(accumulate(self.turns, initial=0))]


Groups = Mapping[str, Sequence[Sequence[str | None]]]
"""Grouping (``by``) -> per sample -> per assistant turn: the stratum it is in, or None for none."""


def exact_shares(losses: Sequence[SampleLoss], groups: Sequence[Sequence[str | None]] = ()) -> dict[str | None, float]:
    """Share of samples whose every supervised token, end token included, was the arg-max; by group, None: all.

    For a sample with one answer that is the share greedy decoding would write exactly. ``groups``: one grouping of
    `Groups`; samples with several turns count in the overall share alone.
    """
    exact = [x.exact for x in losses]
    by: dict[str | None, list[bool]] = {None: exact}
    for right, turns in zip(exact, groups, strict=False):  # no groups: only the overall share
        if len(turns) == 1 and turns[0] is not None:
            by.setdefault(turns[0], []).append(right)
    return {k: sum(v) / max(len(v), 1) for k, v in by.items()}


def sample_losses(model: LossModel, batches: Iterable[Batch]) -> list[SampleLoss]:
    """Loss sums of every sample, in the order the samples come.

    Equal for every batch size and layout up to the rounding of the model's own forward pass (fp32: about 1e-6
    relative), because nothing is averaged here. Raises FloatingPointError naming the samples whose loss is not finite.
    """
    losses: list[SampleLoss] = []
    with measuring(model):
        for batch in batches:
            n = len(batch.ids)
            if n == 0:  # every sample of it was rejected
                continue
            out = model(batch)
            assert out.correct is not None, "measured without gradients"
            sample, token_nll = out.sample.cpu(), out.nll.detach().cpu().double()
            nll = torch.zeros(n, dtype=torch.float64).index_add_(0, sample, token_nll)
            tokens = torch.bincount(sample, minlength=n)
            correct = torch.bincount(sample[out.correct.cpu()], minlength=n)
            bad = [batch.ids[k] for k in range(n) if not math.isfinite(float(nll[k]))]
            if bad:
                raise FloatingPointError(f"the evaluation loss is not finite for samples {', '.join(map(repr, bad))}")
            own = token_nll[torch.argsort(sample, stable=True)].split(tokens.tolist())  # row order within each sample
            turns = _turn_lengths(batch)
            for k, id in enumerate(batch.ids):
                assert sum(turns[k]) == int(tokens[k]), f"{id}: turns of {turns[k]} tokens, losses of {int(tokens[k])}"
                losses.append(
                    SampleLoss(
                        id, float(nll[k]), int(tokens[k]), int(correct[k]), tuple(own[k].tolist()), tuple(turns[k])
                    )
                )
    return losses


def _turn_lengths(batch: Batch) -> list[list[int]]:
    """Supervised tokens of each assistant turn of each sample, in row order.

    A turn starts where the position before, in the same row, is not supervised or belongs to another sample: between
    two turns stands the user's, which nobody has to predict.
    """
    supervise, sample = batch.supervise.cpu(), batch.sample_index.cpu()
    goes_on = torch.zeros_like(supervise)
    goes_on[:, 1:] = supervise[:, :-1] & (sample[:, :-1] == sample[:, 1:])
    starts = supervise & ~goes_on
    lengths = torch.bincount(starts.reshape(-1).cumsum(0)[supervise.reshape(-1)] - 1)
    turns: list[list[int]] = [[] for _ in batch.ids]
    for owner, length in zip(sample[starts].tolist(), lengths.tolist(), strict=True):
        turns[owner].append(length)
    return turns


# ---------------------------------------------------------------------------------------------------------------
# Summary


def summarize(losses: Sequence[SampleLoss], name: str, seed: int = 0) -> list[Measurement]:
    """``<name>.loss`` (Σnll/Σtokens), ``.perplexity``, ``.token_accuracy`` and ``.tokens`` of the samples.

    Long targets count as much as they are long. Intervals are 95 % bootstrap intervals over samples (1,000 resamples,
    seeded). Raises UserError when there is nothing to average.
    """
    return _summary(
        np.array([x.nll for x in losses]), np.array([x.tokens for x in losses], dtype=np.float64),
        np.array([x.correct for x in losses], dtype=np.float64), name, seed,
    )  # fmt: skip


def summarize_groups(losses: Sequence[SampleLoss], groups: Groups, name: str, seed: int = 0) -> list[Measurement]:
    """`summarize` for every stratum of every grouping that has more than one.

    What is summed are the turns in the stratum. ``n`` counts samples with such a turn, and the interval resamples
    samples: turns of one conversation share an image, so they are not independent. Token accuracy is absent where a
    sample is only partly in the stratum.
    """
    out: list[Measurement] = []
    for by, stratum, members in _strata(losses, groups):
        nll, tokens = _turn_sums(losses, members)
        whole = all(len(turns) == len(losses[i].turns) for i, turns in members)
        correct = np.array([losses[i].correct for i, _ in members], dtype=np.float64) if whole else None
        out += _summary(nll, tokens, correct, name, seed, by, stratum, _about(members))
    return out


def _summary(
    nll: np.ndarray,
    tokens: np.ndarray,
    correct: np.ndarray | None,
    name: str,
    seed: int,
    by: str | None = None,
    stratum: str | None = None,
    about: str | None = None,
) -> list[Measurement]:
    if tokens.sum() == 0:
        raise UserError(f"{name}: no sample was left to measure; look at the reject log for what was skipped")
    add = partial(measurement, n=len(tokens), by=by, stratum=stratum)
    mean, ci = ratio_of_sums(nll, tokens, seed)
    # By whatever name it goes, it is a loss: a band is one of an earlier state.
    out = [add(f"{name}.loss", mean, ci, unit="nats/token", better="lower", caveat=about)]
    if mean < 700:  # exp overflows a double past 709; such a perplexity says nothing
        ends = None if ci is None or ci[1] > 700 else (math.exp(ci[0]), math.exp(ci[1]))
        told = "per token of this tokenizer; not comparable across tokenizers"
        out.append(add(f"{name}.perplexity", math.exp(mean), ends, caveat=told))
    if correct is not None:
        told = "teacher-forced: each token is predicted after the right ones"
        out.append(add(f"{name}.token_accuracy", *ratio_of_sums(correct, tokens, seed), caveat=told))
    return [*out, add(f"{name}.tokens", float(tokens.sum()))]


Members = Sequence[tuple[int, Sequence[int]]]
"""Samples of a stratum by index, each with the numbers of its turns in it."""


def _strata(losses: Sequence[SampleLoss], groups: Groups) -> Iterator[tuple[str, str, Members]]:
    """(by, stratum, members) in a fixed order; groupings in which all turns fall into one stratum say nothing."""
    for by, per_sample in groups.items():
        assert len(per_sample) == len(losses), f"{by}: strata of {len(per_sample)} samples, losses of {len(losses)}"
        found: dict[str, list[tuple[int, list[int]]]] = {}
        for i, (loss, strata) in enumerate(zip(losses, per_sample, strict=True)):
            assert len(strata) >= len(loss.turns), f"{loss.id}: {len(strata)} strata for {len(loss.turns)} turns"
            own: dict[str, list[int]] = {}
            for turn, stratum in zip(range(len(loss.turns)), strata, strict=False):  # turns that were cut off
                if stratum is not None:
                    own.setdefault(stratum, []).append(turn)
            for stratum, turns in own.items():
                found.setdefault(stratum, []).append((i, turns))
        if len(found) > 1:
            for stratum in sorted(found, key=lambda s: (ORDERED.index(s) if s in ORDERED else len(ORDERED), s)):
                yield by, stratum, found[stratum]


def _turn_sums(losses: Sequence[SampleLoss], members: Members) -> tuple[np.ndarray, np.ndarray]:
    """nll and tokens of each member's turns, fp64 [members]."""
    nll, tokens = np.empty(len(members)), np.empty(len(members))
    for row, (i, turns) in enumerate(members):
        own = losses[i].turn_nll
        nll[row], tokens[row] = sum(own[t] for t in turns), sum(losses[i].turns[t] for t in turns)
    return nll, tokens


def _about(members: Members) -> str | None:
    """What ``n`` does not say when samples have several turns in a stratum."""
    turns = sum(len(t) for _, t in members)
    return None if turns == len(members) else f"{turns} turns of {len(members)} samples; the interval is over samples"


# ---------------------------------------------------------------------------------------------------------------
# The same targets twice


def paired_gain(before: Sequence[SampleLoss], after: Sequence[SampleLoss], name: str, seed: int = 0) -> Measurement:
    """Nats per token that the second loss is lower than the first on the same targets: Σ(before - after)/Σtokens.

    A target that was cut at the maximum length in one of the two is compared over the tokens that both have. The
    interval is paired: a resample picks the same samples for both.
    """
    assert len(before) == len(after), f"{name}: {len(before)} losses before, {len(after)} after"
    both = [min(b.tokens, a.tokens) for b, a in zip(before, after, strict=True)]
    gain = np.array(
        [math.fsum(b.token_nll[:k]) - math.fsum(a.token_nll[:k]) for b, a, k in zip(before, after, both, strict=True)]
    )
    tokens = np.array(both, dtype=np.float64)
    if tokens.sum() == 0:
        raise UserError(f"{name}: no sample was left to measure; look at the reject log for what was skipped")
    told = "paired: the same targets, before minus after"
    return measurement(name, *ratio_of_sums(gain, tokens, seed), n=len(both), caveat=told)


def compare_conditions(
    losses: Mapping[Condition, Sequence[SampleLoss]],
    groups: Groups | None = None,
    name: str = "ablation",
    seed: int = 0,
) -> list[Measurement]:
    """``<name>.loss.<condition>`` of each, and ``<name>.delta.…`` and ``<name>.ratio.…`` of the others to ``correct``.

    Overall, then for every stratum of ``groups`` as in `summarize_groups`. Paired: the i-th loss of every condition is
    of the same sample, and a resample picks the same samples for all. A loss of exactly 0 has no ratio.
    """
    first = next(iter(losses.values()))
    for condition, own in losses.items():
        assert len(own) == len(first), f"{name}: {len(first)} losses under {next(iter(losses))}, {len(own)} {condition}"
        for a, b in zip(first, own, strict=True):
            assert (a.id, a.turns) == (b.id, b.turns), (
                f"{a.id} supervises {a.turns}, under {condition} {b.id} {b.turns}"
            )
    everyone: Members = [(i, range(len(loss.turns))) for i, loss in enumerate(first)]
    if not sum(loss.tokens for loss in first):
        raise UserError(f"{name}: no sample was left to measure; look at the reject log for what was skipped")
    out = _compare(losses, everyone, name, seed, None, None)
    for by, stratum, members in _strata(first, groups or {}):
        out += _compare(losses, members, name, seed, by, stratum)
    return out


def _compare(
    losses: Mapping[Condition, Sequence[SampleLoss]],
    members: Members,
    name: str,
    seed: int,
    by: str | None,
    stratum: str | None,
) -> list[Measurement]:
    n, about = len(members), None if stratum is None else _about(members)
    sums = {condition: _turn_sums(own, members) for condition, own in losses.items()}
    out: list[Measurement] = []

    def add(what: str, top: np.ndarray, bottom: np.ndarray, caveat: str | None) -> None:
        value = ratio_of_sums(top, bottom, seed)
        out.append(measurement(f"{name}.{what}", *value, n=n, by=by, stratum=stratum, caveat=caveat))

    for condition, (nll, tokens) in sums.items():
        add(f"loss.{condition}", nll, tokens, about)
    if "correct" not in sums:
        return out
    right, tokens = sums.pop("correct")
    for condition, (wrong, _) in sums.items():
        told = joined("paired: the same samples with the wrong and the right image", about)
        add(f"delta.{condition}", wrong - right, tokens, told)
        if right.sum() > 0:  # the delta says what there is to say
            told = joined(
                "loss with the wrong image over loss with the right one; 1 means the image is not used", about
            )
            add(f"ratio.{condition}", wrong, right, told)
    return out
