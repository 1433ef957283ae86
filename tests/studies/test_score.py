"""The ranking of a sweep, as properties and on the seed's own table."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.studies.score import COLLAPSED, Entry, flags, pooled_spread, rank, score

numbers = st.floats(-10, 10).map(lambda x: round(x, 4))
entries = st.lists(
    st.builds(
        Entry,
        name=st.uuids().map(str),
        point=st.sampled_from("abcde"),
        score=numbers,
        flags=st.sampled_from([(), (), (), (COLLAPSED,), ("gate learned",)]),
    ),
    max_size=14,
    unique_by=lambda e: e.name,
)

# LR, vision_ln, eval loss, shuffle delta, zero delta of the seed's sweep (stage1.1_hardening_spec.txt).
SEED = [
    ("lr5e-5_ln0", 3.6957, 0.8309, 1.8127),
    ("lr5e-5_ln1", 3.7513, 0.6908, 1.7659),
    ("lr1e-4_ln0", 3.7193, 0.7759, 1.7908),
    ("lr1e-4_ln1", 3.6753, 0.7978, 1.7479),
    ("lr2e-4_ln0", 3.9106, 0.0084, 1.4253),
    ("lr2e-4_ln1", 3.7383, 0.6472, 1.7506),
]


def test_the_seeds_table_gives_the_seeds_winner_and_marks_its_collapsed_run() -> None:
    median = statistics.median(row[2] for row in SEED)
    rows = [
        Entry(
            name, name, score(loss, shuffle, zero, 0.1),
            flags(d_shuffle=shuffle, d_shuffle_low=None, grid_median=median, collapsed_below=0.1),
        )
        for name, loss, shuffle, zero in SEED
    ]  # fmt: skip

    ranking = rank(rows)

    assert ranking.winner == "lr1e-4_ln1"
    assert ranking.places[0].mean == pytest.approx(3.6753 - 0.1 * (0.7978 + 1.7479))
    assert [p.point for p in ranking.places if p.flags] == ["lr2e-4_ln0"]
    assert ranking.spread is None and not ranking.tested and ranking.ties == ()
    assert "no repeats: the spread is unknown, a difference of 0.01" in ranking.verdict


@given(loss=numbers, shuffle=numbers, zero=numbers, weight=st.floats(0, 1), more=st.floats(0.1, 5))
def test_a_higher_loss_and_a_smaller_delta_never_improve_the_score(
    loss: float, shuffle: float, zero: float, weight: float, more: float
) -> None:
    here = score(loss, shuffle, zero, weight)

    assert score(loss + more, shuffle, zero, weight) > here
    assert score(loss, shuffle - more, zero, weight) >= here
    assert score(loss, shuffle, zero - more, weight) >= here
    assert score(loss, shuffle, zero, 0) == loss


@given(entries, st.integers(0, 99))
def test_a_ranking_does_not_depend_on_the_order_of_the_rows(rows: list[Entry], seed: int) -> None:
    mixed = random.Random(seed).sample(rows, len(rows))

    assert rank(mixed) == rank(rows)


@given(entries)
def test_the_winner_has_the_lowest_mean_among_points_without_a_flag(rows: list[Entry]) -> None:
    ranking = rank(rows)

    points = {r.point for r in rows}
    clean = {p for p in points if not any(r.flags for r in rows if r.point == p)}
    means = {p: statistics.fmean(r.score for r in rows if r.point == p) for p in points}
    assert {p.point for p in ranking.places} == points
    assert {p.point for p in ranking.places if p.flags} == points - clean
    if not clean:
        assert ranking.winner is None
        return
    assert ranking.winner in clean and means[ranking.winner] == min(means[p] for p in clean)
    order = [p.mean for p in ranking.places if not p.flags]
    assert order == sorted(order)
    assert [bool(p.flags) for p in ranking.places] == sorted(bool(p.flags) for p in ranking.places)


@given(entries)
def test_a_tie_is_exactly_a_difference_within_two_standard_errors(rows: list[Entry]) -> None:
    ranking = rank(rows)

    groups = {p.point: [r.score for r in rows if r.point == p.point] for p in ranking.places if not p.flags}
    freedom = sum(len(g) - 1 for g in groups.values())
    assert ranking.repeats == freedom
    if freedom == 0:
        assert ranking.spread is None and ranking.ties == () and not ranking.tested
        assert not any(p.tied for p in ranking.places)
        return
    variance = sum(statistics.variance(g) * (len(g) - 1) for g in groups.values() if len(g) > 1) / freedom
    assert ranking.spread == pytest.approx(math.sqrt(variance), abs=1e-9)
    assert ranking.winner is not None
    best = groups[ranking.winner]
    for point, group in groups.items():
        if point == ranking.winner:
            continue
        margin = 2 * math.sqrt(variance * (1 / len(best) + 1 / len(group)))
        difference = statistics.fmean(group) - statistics.fmean(best)
        if abs(difference - margin) > 1e-7:  # not on the edge, where rounding decides
            assert (point in ranking.ties) == (difference < margin), point


def test_repeats_that_scatter_more_than_the_points_differ_make_a_tie() -> None:
    apart = {"a": [1.00, 1.02], "b": [2.00, 2.02]}
    close = {"a": [1.00, 1.40], "b": [1.10, 1.50]}

    won, tied = (
        rank([Entry(f"{p}{i}", p, s) for p, scores in case.items() for i, s in enumerate(scores)])
        for case in (apart, close)
    )

    assert won.winner == "a" and won.ties == () and "a wins" in won.verdict
    assert won.spread == pytest.approx(0.01 * math.sqrt(2))
    assert tied.winner == "a" and tied.ties == ("b",) and tied.verdict.startswith("A tie: a ")


def test_equal_repeats_of_equal_points_are_a_tie() -> None:
    ranking = rank([Entry(f"{p}{i}", p, 0.1) for p in "ab" for i in range(3)])

    assert ranking.ties == ("b",)


def test_one_flagged_repeat_disqualifies_its_point() -> None:
    ranking = rank([Entry("a1", "a", 0.1), Entry("a2", "a", 0.1, ("gate learned",)), Entry("b1", "b", 0.9)])

    assert ranking.winner == "b" and "only one that may be used" in ranking.verdict


def test_no_run_and_only_flagged_runs_have_no_winner() -> None:
    assert rank([]).winner is None
    ranking = rank([Entry("a", "a", 1.0, (COLLAPSED,)), Entry("b", "b", 2.0, ("gate learned",))])
    assert ranking.winner is None and "every run is marked" in ranking.verdict and "a: collapsed" in ranking.verdict


@pytest.mark.parametrize(
    ("delta", "low", "collapsed"),
    [
        (0.5, 0.4, False),
        (0.5, 0.0, True),
        (0.5, -0.1, True),
        (0.04, 0.03, True),
        (0.06, 0.05, False),
        (-0.1, None, True),
    ],
)  # fmt: skip
def test_collapsed_is_an_uncertain_delta_or_one_far_below_the_grids_median(
    delta: float, low: float | None, collapsed: bool
) -> None:
    found = flags(d_shuffle=delta, d_shuffle_low=low, grid_median=0.5, collapsed_below=0.1, failed_gates=["learned"])

    assert found == ((COLLAPSED,) if collapsed else ()) + ("gate learned",)


def test_a_grid_that_is_all_collapsed_does_not_excuse_a_run() -> None:
    assert flags(d_shuffle=-0.2, d_shuffle_low=-0.3, grid_median=-0.5, collapsed_below=0.1) == (COLLAPSED,)


@given(st.lists(st.lists(numbers, max_size=5), max_size=5))
def test_the_pooled_spread_of_one_group_is_its_standard_deviation(groups: list[list[float]]) -> None:
    spread, freedom = pooled_spread(groups)

    assert freedom == sum(max(len(g) - 1, 0) for g in groups)
    assert (spread is None) == (freedom == 0)
    if len([g for g in groups if len(g) > 1]) == 1:
        only = next(g for g in groups if len(g) > 1)
        assert spread == pytest.approx(statistics.stdev(only), abs=1e-9)
