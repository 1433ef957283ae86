"""What is measured between steps: the rows of the panel that come due, a function of the step alone, so that a resume
repeats them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from beholder.probes import loss
from beholder.stages.guard import overall, read_monitors, standing_stop
from beholder.stages.keep import candidate
from beholder.stages.measured import Measured
from beholder.stages.panel import PANEL
from beholder.stages.session import Session
from beholder.train.engine import Asked, Record


class Watch:
    """Called by the loop after every step; the last step is measured by `keep.settle` and `measure`."""

    def __init__(self, session: Session, total_steps: int) -> None:
        self.session, self.total = session, total_steps
        self.per_epoch = len(session.data.train) / session.cfg.effective_batch

    def on_step(self, step: int, record: Record) -> Asked:
        """A candidate for the best that was measured must have its checkpoint; a guardrail that is passed ends it."""
        session, cfg = self.session, self.session.cfg
        if step == self.total:
            return Asked()
        due = {row.name for row in PANEL.values() if any(self._due(every, step) for every in row.every(cfg))}
        saved = cfg.eval.run_golden_every == "save"  # as a candidate is
        compared = any(PANEL[name].candidate for name in due)
        quick = bool(cfg.train.quick_eval_size and cfg.train.quick_eval_steps) and not compared
        quick = quick and step % cfg.train.quick_eval_steps == 0
        if compared:
            due |= {"losses"} | ({"golden"} if saved else set())
        m = Measured(step, session.eval_losses() if compared else [])
        for row in PANEL.values():
            if row.name in due and row.needs(session):
                already = len(m.measurements)
                row.make(session, m)
                new = m.measurements[already:]
                if row.name == "losses":
                    self._told("eval", m, range(len(m.losses)))
                elif new:
                    self._log(step, {x.key: x.value for x in new})
        read = read_monitors(session, step) if compared or quick else []
        if compared:
            found = candidate(session, m, write=saved, monitors=overall(read))
            self._log(step, {"candidate": found.model_dump(mode="json")})
        elif quick:
            indices = session.held_out.quick_sample
            with session.phase("evaluation"):
                quick = session.together.losses(session.held_out.at(indices))
            self._told("quick_eval", Measured(step, quick), indices)
        stop = standing_stop(session, self.total) if read else None
        return Asked(keep=compared, stop="" if stop is None else stop.sentence)

    def _told(self, name: str, m: Measured, indices: Sequence[int]) -> None:
        """Loss and share of exactly right targets, overall and by length or kind of question."""
        measured = m.measurements or loss.summarize(m.losses, "eval", seed=0)
        total = next(x.value for x in measured if x.name == "eval.loss" and x.stratum is None)
        by_length = {str(x.stratum): x.value for x in measured if x.name == "eval.loss" and x.by == "length"}
        exact = loss.exact_shares(m.losses, self.session.held_out.groups(indices)["question"])
        overall = exact.pop(None)
        kinds = [(str(k), share) for k, share in exact.items()] if len(exact) > 1 else []
        more = [*by_length.items(), ("exact", overall), *kinds]
        self.session.reporter.eval(total, step=m.step, more=more)
        self._log(m.step, {
            f"{name}_loss": total, "eval_examples": len(m.losses), f"{name}_exact": overall,
            **{f"{name}_loss_{stratum}": value for stratum, value in by_length.items()},
            **{f"{name}_exact/{kind}": share for kind, share in kinds},
        })  # fmt: skip

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if self.session.dist.is_main:
            self.session.run.log({"step": step, **values})

    def _due(self, every: str | int, step: int) -> bool:
        if every == "save":
            every = self.session.cfg.train.save_every
        if isinstance(every, int):
            return step % every == 0
        return every == "epoch" and math.floor(step / self.per_epoch) > math.floor((step - 1) / self.per_epoch)
