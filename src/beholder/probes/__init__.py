"""Measurements of a model: each probe takes a model, functions and samples, and knows nothing about the loop.

Here live only what all probes share: intervals, the making of a measurement, and the context in which a model is
measured. Baseline and result always come from the same function on the same samples, and a probe that cannot measure
raises instead of guessing. A new probe: a file here, a row in `stages.panel`, its names in `evidence.catalogue`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np

from beholder.evidence import Measurement
from beholder.evidence.catalogue import Better, quantity

Z95 = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""

NUM_RESAMPLES = 1000


class Measurable(Protocol):
    """What every probe needs of a model."""

    training: bool

    def train(self, mode: bool = True) -> object: ...


@contextmanager
def measuring(model: Measurable) -> Iterator[None]:
    """Eval mode (no connector dropout) and no graph inside; the model's mode is put back afterwards."""
    import torch  # here, because files are scored with the intervals of this module and without torch

    was_training = model.training
    model.train(False)
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], n: int, seed: int = 0, resamples: int = NUM_RESAMPLES
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (Efron 1979) over samples.

    ``statistic`` takes int64 [R, n] sample indices and gives R values; paired quantities stay paired because one
    index row picks the same samples for all of them. None when n < 2, or when more than 5 % of the resamples give
    no finite value: then an interval would be a guess.
    """
    if n < 2:
        return None
    rng = np.random.default_rng(seed)
    chunk = max(1, min(resamples, 4_000_000 // n))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        values = np.concatenate(
            [statistic(rng.integers(n, size=(min(chunk, resamples - k), n))) for k in range(0, resamples, chunk)]
        )
    finite = values[np.isfinite(values)]
    if len(finite) < 0.95 * resamples:
        return None
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)


def ratio_of_sums(top: np.ndarray, bottom: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Σtop / Σbottom over samples (fp64 [n] each) and its bootstrap interval: long samples weigh as they are long.

    With several turns of one sample summed before, they stay together in every resample: they share an image.
    """
    value = float(top.sum() / bottom.sum())
    return value, bootstrap(lambda k: top[k].sum(1) / bottom[k].sum(1), len(top), seed)


def measurement(
    name: str,
    value: float,
    ci95: tuple[float, float] | None = None,
    *,
    n: int,
    unit: str | None = None,
    better: Better | None = None,
    stratum: str | None = None,
    by: str | None = None,
    caveat: str | None = None,
) -> Measurement:
    """A `Measurement`, in the unit and direction of its row in the catalogue unless they are given.

    Raises FloatingPointError naming it when its value is not a finite number.
    """
    if not math.isfinite(value):
        where = "" if stratum is None else f" for {stratum}"
        raise FloatingPointError(
            f"{name}{where} is {value} over {n} samples: a loss or score that it sums is not a finite number"
        )
    row, condition = quantity(name)
    return Measurement(
        name=name, value=value, unit=unit or row.unit, better=better or row.direction(condition), n=n, ci95=ci95,
        stratum=stratum, by=by, caveat=caveat,
    )  # fmt: skip


def share(name: str, hits: int, n: int, **more: Any) -> Measurement:
    """The share ``hits / n`` with its Wilson interval; ``more`` as of `measurement`."""
    return measurement(name, hits / n, wilson(hits, n), n=n, **more)


def mean(values: np.ndarray, seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """Mean over samples and its bootstrap interval."""
    return float(values.mean()), bootstrap(lambda k: values[k].mean(1), len(values), seed)


T = TypeVar("T")


def drawn(items: Sequence[T], most: int, rng: np.random.Generator) -> list[T]:
    """At most so many of them, in their order; ``rng`` draws only where there are more."""
    if len(items) <= most:
        return list(items)
    return [items[k] for k in np.sort(rng.choice(len(items), most, replace=False))]


def joined(*parts: str | None) -> str | None:
    """A caveat of several, those that are there."""
    return "; ".join(filter(None, parts)) or None


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927): sensible at 0 %, at 100 % and for small n."""
    assert 0 <= successes <= n and n > 0
    p, z2 = successes / n, Z95 * Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At p = 0 and p = 1 the exact ends are 0 and 1; rounding would leave 1e-17 past them.
    return (0.0 if successes == 0 else max(0.0, centre - half), 1.0 if successes == n else min(1.0, centre + half))
