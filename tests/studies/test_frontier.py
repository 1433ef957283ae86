"""The frontier's properties, over any points."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.studies.frontier import Axis, Point, Value, dominates, frontier

AXES = (Axis("fit", "lower"), Axis("kept", "higher"), Axis("made_up", "lower"))
# Few different values, so that ties and equal points are common.
NUMBER = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0])
VALUE = st.builds(lambda v, down, up: Value(v, (v - down, v + up)), NUMBER, NUMBER, NUMBER) | st.builds(Value, NUMBER)
ROW = st.fixed_dictionaries({"fit": VALUE, "kept": VALUE}, optional={"made_up": VALUE})
POINTS = st.lists(ROW, max_size=12).map(lambda rows: [Point(f"run {i}", row) for i, row in enumerate(rows)])


@given(POINTS)
def test_no_point_of_the_frontier_is_dominated_and_every_other_is_by_one_of_it(points: list[Point]) -> None:
    found = frontier(points, AXES)
    placed = [p for p in points if not p.lacks(AXES)]

    assert not any(dominates(q, p, AXES) for p in found.best for q in placed)
    for p in (*found.near, *found.beaten):
        assert found.by[p.name] and all(dominates(q, p, AXES) for q in found.best if q.name in found.by[p.name])
    assert bool(found.best) == bool(placed)


@given(POINTS)
def test_every_point_is_in_one_place(points: list[Point]) -> None:
    found = frontier(points, AXES)
    names = [p.name for group in (found.best, found.near, found.beaten, found.unplaced) for p in group]
    assert sorted(names) == sorted(p.name for p in points)
    assert {p.name for p in found.unplaced} == {p.name for p in points if "made_up" not in p.values}
    assert set(found.by) == {p.name for p in (*found.near, *found.beaten)}


@given(POINTS, st.integers())
def test_the_order_of_the_points_says_nothing(points: list[Point], seed: int) -> None:
    shuffled = random.Random(seed).sample(points, len(points))
    one, two = frontier(points, AXES), frontier(shuffled, AXES)
    for group in ("best", "near", "beaten", "unplaced"):
        assert {p.name for p in getattr(one, group)} == {p.name for p in getattr(two, group)}


@given(POINTS)
def test_adding_a_dominated_point_changes_nothing_of_the_frontier(points: list[Point]) -> None:
    found = frontier(points, AXES)
    if not found.best:
        return
    worse = Point("worse", {
        a.measure: Value(found.best[0].values[a.measure].value + (1 if a.better == "lower" else -1)) for a in AXES
    })  # fmt: skip
    again = frontier([*points, worse], AXES)
    assert [p.name for p in again.best] == [p.name for p in found.best] and "worse" in again.by


@given(POINTS)
def test_without_intervals_nothing_is_near_and_beyond_intervals_is_stronger_than_by_value(points: list[Point]) -> None:
    bare = [Point(p.name, {k: Value(v.value) for k, v in p.values.items()}) for p in points]
    assert frontier(bare, AXES).near == []
    placed = [p for p in points if not p.lacks(AXES)]
    assert all(dominates(a, b, AXES) for a in placed for b in placed if dominates(a, b, AXES, surely=True))


@given(POINTS)
def test_turning_an_axis_over_with_its_values_changes_nothing(points: list[Point]) -> None:
    def turned(v: Value) -> Value:
        return Value(-v.value, None if v.ci95 is None else (-v.ci95[1], -v.ci95[0]))

    mirrored = [Point(p.name, {**p.values, "fit": turned(p.values["fit"])}) for p in points]
    other = frontier(mirrored, (Axis("fit", "higher"), *AXES[1:]))
    assert [p.name for p in other.best] == [p.name for p in frontier(points, AXES).best]


def test_known_points_fall_where_they_belong() -> None:
    def point(name: str, fit: float, kept: float, width: float = 0.0) -> Point:
        return Point(name, {"fit": Value(fit, (fit - width, fit + width)), "kept": Value(kept)})

    points = [
        point("A0", 2.0, 1.0), point("A1", 1.0, 0.98), point("C2", 0.5, 0.95), point("D3", 0.6, 0.90, 0.2),
        point("D2", 0.9, 0.90), point("same", 0.5, 0.95), Point("gone", {"fit": Value(0.1)}),
    ]  # fmt: skip
    found = frontier(points, (Axis("fit", "lower"), Axis("kept", "higher")))
    assert [p.name for p in found.best] == ["C2", "same", "A1", "A0"]
    assert [p.name for p in found.near] == ["D3"] and [p.name for p in found.beaten] == ["D2"]
    assert found.by["D2"] == ["C2", "same"] and [p.name for p in found.unplaced] == ["gone"]


def test_no_axis_and_two_of_a_name_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one axis"):
        frontier([], ())
    with pytest.raises(ValueError, match="the same name"):
        frontier([Point("a", {}), Point("a", {})], AXES)
