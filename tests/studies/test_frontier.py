"""The frontier and the choice, as properties and on small tables whose answer is plain."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.evidence import Measurement
from beholder.studies.frontier import (
    KEPT,
    SEEN,
    TASK,
    Contender,
    Estimate,
    choose,
    coordinates,
    dominates,
    estimates,
    frontier,
    limits,
    measured_axes,
    told_apart,
)

places = st.tuples(*[st.integers(0, 6).map(float)] * 3)
tables = st.dictionaries(st.uuids().map(str), places, max_size=12)


@given(tables)
def test_no_point_on_the_frontier_is_dominated_and_every_other_one_is(points: dict[str, tuple[float, ...]]) -> None:
    edge = frontier(points)

    for name, at in points.items():
        better = [o for o in points.values() if all(a <= b for a, b in zip(o, at, strict=True)) and o != at]
        assert (name in edge) == (not better)
    assert bool(edge) == bool(points)


@given(tables, st.data())
def test_a_dominated_point_more_changes_nothing(points: dict[str, tuple[float, ...]], data: st.DataObject) -> None:
    edge = frontier(points)
    if not edge:
        return
    best = points[data.draw(st.sampled_from(sorted(edge)))]
    worse = data.draw(st.tuples(*[st.integers(0, 3).map(float)] * 3).filter(any))

    assert frontier({**points, "more": tuple(a + b for a, b in zip(best, worse, strict=True))}) == edge


@given(tables, st.randoms())
def test_the_order_does_not_matter(points: dict[str, tuple[float, ...]], rng: random.Random) -> None:
    names = list(points)
    rng.shuffle(names)

    assert frontier({name: points[name] for name in names}) == frontier(points)


@given(tables)
def test_ties_are_kept(points: dict[str, tuple[float, ...]]) -> None:
    edge = frontier(points)

    assert frontier({**points, **{f"{name}'": at for name, at in points.items()}}) == edge | {f"{n}'" for n in edge}


def test_an_equal_point_dominates_nothing() -> None:
    assert not dominates((1.0, 2.0), (1.0, 2.0)) and dominates((1.0, 1.0), (1.0, 2.0))


# ---------------------------------------------------------------------------------------------------------------
# Estimates


def measured(value: float, half: float = 0.02, name: str = "eval.loss") -> Measurement:
    return Measurement(
        name=name, value=value, unit="nats/token", better="lower", n=100, ci95=(value - half, value + half)
    )


def at(value: float, half: float = 0.0, error: float | None = None) -> Estimate:
    return Estimate(value, value - half, value + half, error)


def test_an_estimate_is_the_mean_over_repeats_and_its_error_comes_from_the_spread_of_all_points() -> None:
    found = estimates({"a": [measured(1.0), measured(1.2)], "b": [measured(2.0)], "c": []})

    spread = 0.02**0.5  # of the one pair that differs by its seed alone: 0.2 / sqrt(2)
    assert found["a"].value == pytest.approx(1.1) and (found["a"].low, found["a"].high) == pytest.approx((1.08, 1.12))
    assert found["a"].error == pytest.approx(spread / 2**0.5) and found["b"].error == pytest.approx(spread)
    assert "c" not in found


def test_without_repeats_intervals_decide_and_with_them_the_spread_over_seeds() -> None:
    assert not told_apart(at(1.0, 0.1), at(1.15, 0.1)) and told_apart(at(1.0, 0.1), at(1.25, 0.1))
    assert told_apart(at(1.0, 0.1, 0.01), at(1.15, 0.1, 0.01))  # the samples move both alike
    assert not told_apart(at(1.0, 0.0, 0.1), at(1.15, 0.0, 0.1))


def test_an_axis_that_one_point_alone_has_is_none_and_points_that_lack_one_are_not_placed() -> None:
    known = {"a": {TASK.measure: at(1.0), KEPT.measure: at(1.1), SEEN.measure: at(0.2)},
             "b": {TASK.measure: at(0.9), KEPT.measure: at(1.2)}, "c": {TASK.measure: at(0.8)}}  # fmt: skip

    axes = measured_axes(known)

    assert [a.measure for a in axes] == [TASK.measure, KEPT.measure]
    assert coordinates(known, axes) == {"a": (1.0, 1.1), "b": (0.9, 1.2)}


# ---------------------------------------------------------------------------------------------------------------
# The choice


def contender(name: str, loss: float, params: int = 10, *, stopped: str = "", **more: float) -> Contender:
    known = {TASK.measure: at(loss, 0.01)} | {k.replace("__", "."): at(v) for k, v in more.items()}
    return Contender(name, params, known, stopped)


BOUNDS = limits(
    {KEPT.measure: at(1.0), SEEN.measure: at(0.10), "irrelevant.pass": at(0.9)}, max_text_ratio=1.05,
    max_hallucination_rise=0.1, max_irrelevant_fall=0.1,
)  # fmt: skip


def test_the_lowest_loss_among_those_that_keep_the_bounds_wins() -> None:
    choice = choose(
        [
            contender("A0", 1.0, 0), contender("A1", 0.8), contender("forgets", 0.5, retention__over_start=1.06),
            contender("sees things", 0.5, ood__hallucination=0.21),
            contender("says all fits", 0.5, irrelevant__pass=0.8),
            contender("stopped", 0.5, stopped="stopped by its guardrail x"),
        ],
        BOUNDS,
    )  # fmt: skip

    assert choice.winner == "A1" and choice.near == () and choice.smallest == "A1"
    assert list(choice.refused) == ["forgets", "sees things", "says all fits", "stopped"]
    assert choice.refused["forgets"] == "retention.over_start is 1.06, at most 1.05 times A0's"
    assert choice.refused["sees things"] == "ood.hallucination is 0.21, at most the baseline's 0.1 + 0.1"
    assert choice.refused["says all fits"] == "irrelevant.pass is 0.8, at least the baseline's 0.9 − 10%"


@given(
    st.lists(st.tuples(st.floats(0, 2).map(lambda x: round(x, 3)), st.integers(0, 99)), min_size=1, max_size=8),
    st.randoms(),
)
def test_near_winners_cannot_be_told_from_the_winner_and_all_others_can(
    rows: list[tuple[float, int]], rng: random.Random
) -> None:
    contenders = [contender(str(k), loss, params) for k, (loss, params) in enumerate(rows)]
    choice = choose(contenders, [])
    by_name = {c.name: c for c in contenders}

    best = by_name[choice.winner or ""].at[TASK.measure]
    assert best.value == min(loss for loss, _ in rows)
    for c in contenders:
        if c.name != choice.winner:
            assert (c.name in choice.near) == (not told_apart(best, c.at[TASK.measure]))
    group = [by_name[n] for n in (choice.winner or "", *choice.near)]
    assert by_name[choice.smallest or ""].params == min(c.params for c in group)
    rng.shuffle(contenders)
    assert choose(contenders, []) == choice


def test_where_nothing_keeps_the_bounds_nothing_is_chosen() -> None:
    choice = choose([contender("A1", 0.8, retention__over_start=2.0), Contender("A2", 1, {})], BOUNDS)

    assert choice.winner is None and choice.refused["A2"] == "its held-out loss was not measured"
