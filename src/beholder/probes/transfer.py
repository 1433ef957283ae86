"""Does looking transfer from a teacher to its student, or only the words (E-6).

A student may learn what its teacher says of pictures without learning to look at them. So the same samples are shown to
both with their own image and with a wrong one (another sample's, an empty one or none), and what the wrong image costs
the student stands beside what it costs the teacher. Pure functions of arrays: who measured the losses is not asked.

- **Reliance** of each: delta and ratio as `loss.compare_conditions` has them.
- **Share**: what the wrong image costs the student over what it costs the teacher, in nats of the same texts, so that
  tokenizers may differ. 1: it looks as much as its teacher. 0: it learned the words. Absent where the teacher itself is
  not shown to look.
- **Agreement**: correlation over samples of the two costs: whether it looks where its teacher does.

Intervals resample samples, the same ones for teacher and student.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from beholder.evidence import Measurement
from beholder.probes import bootstrap, measurement, ratio_of_sums


@dataclass(frozen=True, slots=True)
class Losses:
    """What one model loses on the same samples with their own and with a wrong image."""

    own: np.ndarray
    """fp64 [S]: nats summed over the supervised tokens of each sample, shown its own image."""
    wrong: np.ndarray
    """fp64 [S]: the same, shown the wrong one."""
    tokens: np.ndarray
    """[S]: supervised tokens of each sample, by this model's tokenizer."""
    unit: str = "nats/token"

    def __post_init__(self) -> None:
        shapes = {np.shape(x) for x in (self.own, self.wrong, self.tokens)}
        assert len(shapes) == 1 and len(next(iter(shapes))) == 1, f"expected three arrays of [samples], got {shapes}"
        if not all(np.isfinite(x).all() for x in (self.own, self.wrong)):
            raise FloatingPointError("a loss that image reliance is told from is not a finite number")

    @property
    def cost(self) -> np.ndarray:
        """fp64 [S]: what the wrong image costs each sample."""
        return np.asarray(self.wrong, dtype=np.float64) - self.own


@dataclass(frozen=True)
class Transfer:
    """What was measured, and in words what could not be."""

    measurements: list[Measurement] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    def get(self, name: str) -> Measurement | None:
        return next((m for m in self.measurements if m.name == f"transfer.{name}"), None)


def looking(teacher: Losses, student: Losses, seed: int = 0) -> Transfer:
    """``transfer.<teacher|student>.<delta|ratio>``, ``transfer.share`` and ``transfer.agreement``.

    The i-th entry of both is of the same sample, with the same images.
    """
    n = len(teacher.own)
    assert n == len(student.own), f"{n} samples of the teacher, {len(student.own)} of the student"
    assert teacher.unit == student.unit, f"the teacher's losses are {teacher.unit}, the student's {student.unit}"
    out = Transfer()

    def add(name: str, value: tuple[float, tuple[float, float] | None], caveat: str, **more: Any) -> Measurement:
        made = measurement(f"transfer.{name}", *value, n=n, caveat=caveat, **more)
        out.measurements.append(made)
        return made

    deltas: list[Measurement] = []
    for who, x in (("teacher", teacher), ("student", student)):
        told = "paired: the same samples with the wrong and the right image"
        unit = {} if x.unit == "nats/token" else {"unit": x.unit}
        deltas.append(add(f"{who}.delta", ratio_of_sums(x.cost, x.tokens, seed), told, **unit))
        if x.own.sum() > 0:
            told = "loss with the wrong image over loss with the right one; 1 means the image is not used"
            add(f"{who}.ratio", ratio_of_sums(x.wrong, x.own, seed), told)
    low = deltas[0].ci95
    if low is None or low[0] <= 0:
        out.gaps.append(
            "Share of the teacher's image reliance: not measured, a wrong image is not shown to cost the teacher "
            f"anything ({deltas[0].value:.3g} {deltas[0].unit}), so there is nothing to have a share of."
        )
    else:
        told = "what a wrong image costs the student over what it costs the teacher, on the same samples"
        add("share", ratio_of_sums(student.cost, teacher.cost, seed), told)
    costs = np.stack([teacher.cost / np.maximum(teacher.tokens, 1), student.cost / np.maximum(student.tokens, 1)])
    flat = [who for who, own in zip(("teacher", "student"), costs, strict=True) if np.ptp(own) == 0]
    if n < 3 or flat:
        why = f"the wrong image costs the {flat[0]} the same in every sample" if flat else f"only {n} samples"
        out.gaps.append(f"Agreement of teacher and student on where to look: not measured, {why}.")
    else:
        everything = np.arange(n)[None]
        interval = bootstrap(lambda k: _correlation(costs[0][k], costs[1][k]), n, seed)
        told = "correlation over samples of what the wrong image costs each, nats per token"
        add("agreement", (float(_correlation(costs[0][everything], costs[1][everything])[0]), interval), told)
    return out


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Pearson's, of every row: [R, n], [R, n] -> [R]."""
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
