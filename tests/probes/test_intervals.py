from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.probes import bootstrap, wilson


def test_bootstrap_covers_the_true_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    hits = 0
    for k in range(200):
        sample = rng.normal(3.0, 1.0, size=60)
        ci = bootstrap(lambda i, s=sample: s[i].mean(1), 60, seed=k, resamples=400)
        assert ci is not None
        hits += ci[0] <= 3.0 <= ci[1]

    # Binomial(200, 0.95) has a standard deviation of 3.1; the percentile bootstrap at n = 60 covers about 94 %.
    assert 178 <= hits <= 200


def test_bootstrap_is_the_same_for_the_same_seed_and_does_not_depend_on_its_chunks():
    values = np.random.default_rng(1).random(5000)  # large enough to be done in several chunks

    first, again = (bootstrap(lambda i: values[i].mean(1), 5000, seed=7) for _ in range(2))
    other = bootstrap(lambda i: values[i].mean(1), 5000, seed=8)

    assert first == again != other


def test_bootstrap_gives_no_interval_for_one_sample_or_for_a_statistic_that_is_mostly_undefined():
    zeros = np.zeros(10)

    assert bootstrap(lambda i: zeros[i].sum(1), 1) is None
    assert bootstrap(lambda i: zeros[i].sum(1) / zeros[i].sum(1), 10) is None


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_published_intervals(successes: int, n: int, low: float, high: float):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_share_and_stays_in_the_unit_interval(case: tuple[int, int]):
    successes, n = case
    low, high = wilson(successes, n)

    assert 0 <= low <= successes / n <= high <= 1
