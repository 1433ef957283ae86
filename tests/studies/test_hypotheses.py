"""The rules on H1-H4, on made-up studies whose answer is plain: supported, contradicted, and too little measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from beholder.evidence.guardrails import Limit, Reading
from beholder.studies.frontier import KEPT, SEEN, TASK, Choice, Estimate
from beholder.studies.hypotheses import BLIND, Seen, drift_harms, judge, more_harms, narrow, placement_over_rate

ERROR = 0.001


def at(error: float = ERROR, **values: float) -> dict[str, Estimate]:
    names = {"loss": TASK.measure, "text": KEPT.measure, "sees": SEEN.measure, "blind": BLIND}
    return {names[k]: Estimate(v, v - 0.1, v + 0.1, error) for k, v in values.items()}


def matrix(text: Mapping[int, float], sees: Mapping[int, float], error: float = ERROR) -> list[Seen]:
    """A 3 x 3 study whose loss on plain text goes by the language model's layers, its hallucination by the tower's."""
    return [
        Seen(f"{i}{j}", i, j, at(error, loss=1.0 - 0.1 * i, text=text[i], sees=sees[j], blind=0.0))
        for i in (0, 2, 4)
        for j in (0, 2, 4)
    ]


FLAT = {0: 1.0, 2: 1.0, 4: 1.0}


@pytest.mark.parametrize(
    ("text", "sees", "error", "said"),
    [
        ({0: 1.0, 2: 1.01, 4: 1.2}, {0: 0.1, 2: 0.1, 4: 0.4}, ERROR, "supported"),
        ({0: 1.0, 2: 1.01, 4: 1.2}, {0: 0.1, 2: 0.1, 4: 0.1}, ERROR, "contradicted"),  # language alone is not both
        (FLAT, {0: 0.1, 2: 0.1, 4: 0.1}, ERROR, "contradicted"),
        ({0: 1.0, 2: 1.2, 4: 1.0}, {0: 0.1, 2: 0.4, 4: 0.1}, ERROR, "contradicted"),  # more is better
        ({0: 1.0, 2: 1.01, 4: 1.2}, {0: 0.1, 2: 0.1, 4: 0.12}, 0.1, "cannot be told"),  # too much noise
        (FLAT, {0: 0.1, 2: 0.1, 4: 0.1}, 0.1, "cannot be told"),  # a change that matters is not excluded
    ],
)  # fmt: skip
def test_h1_more_layers_cost_language_and_seeing(
    text: dict[int, float], sees: dict[int, float], error: float, said: str
) -> None:
    verdict, why = more_harms(matrix(text, sees, error))

    assert verdict == said, why


def test_h1_compares_with_the_least_number_that_learns_not_with_none() -> None:
    worse_than_none = matrix({0: 1.0, 2: 1.5, 4: 1.5}, {0: 0.0, 2: 0.5, 4: 0.5})

    assert more_harms(worse_than_none)[0] == "contradicted"


def test_h1_counts_a_guardrails_stop_as_worse_although_the_state_before_it_was_measured() -> None:
    points = matrix({0: 1.0, 2: 1.0, 4: 1.2}, {0: 0.1, 2: 0.1, 4: 0.1})
    stopped = [
        Seen(p.name, p.llm, p.vision, p.at, frozenset([SEEN.measure]) if p.vision == 4 else frozenset()) for p in points
    ]

    assert more_harms(points)[0] == "contradicted"
    verdict, why = more_harms(stopped)
    assert verdict == "supported" and "stopped by its guardrail" in why


def test_h1_says_when_nothing_was_compared() -> None:
    verdict, why = more_harms([Seen("A0", 0, 0, at(loss=1.0)), Seen("first", None, None, at(loss=1.0, text=1.1))])

    assert verdict == "cannot be told" and "not compared" in why


@pytest.mark.parametrize(
    ("winner", "near", "said"),
    [
        ("22", (), "supported"), ("42", (), "contradicted"), ("24", (), "contradicted"),
        ("00", (), "contradicted"), ("22", ("02", "24"), "cannot be told"), ("22", ("00", "44"), "cannot be told"),
        (None, (), "cannot be told"), ("first", (), "cannot be told"),
    ],
)  # fmt: skip
def test_h2_the_best_number_lies_between_none_and_the_most_for_each_tower(
    winner: str | None, near: tuple[str, ...], said: str
) -> None:
    points = [*matrix(FLAT, FLAT), Seen("first", None, None, at(loss=0.1))]

    assert narrow(points, Choice(winner, near))[0] == said


def test_h2_needs_three_numbers_of_each_tower() -> None:
    points = [p for p in matrix(FLAT, FLAT) if p.vision != 4]

    verdict, why = narrow(points, Choice("20"))
    assert verdict == "cannot be told" and "three are needed" in why


@pytest.mark.parametrize(
    ("by_layers", "by_rate", "said"),
    [(0.3, 0.05, "supported"), (0.05, 0.3, "contradicted"), (0.1, 0.1, "cannot be told")],
)
def test_h3_the_range_over_layers_against_that_over_learning_rates(by_layers: float, by_rate: float, said: str) -> None:
    points = [
        Seen("A1", 2, 0, at(loss=1.0)), Seen("A2", 4, 0, at(loss=1.0 - by_layers)), Seen("A0", 0, 0, at(loss=9.0)),
        Seen("slow", None, None, at(loss=1.0 + by_rate), rate_of="A1"),
    ]  # fmt: skip

    verdict, why = placement_over_rate(points)
    assert verdict == said, why


def test_h3_cannot_be_told_without_a_point_that_differs_in_its_rate_alone() -> None:
    assert placement_over_rate(matrix(FLAT, FLAT)) == (
        "cannot be told", "No point differs from another in its learning rates alone.",
    )  # fmt: skip


LIMIT = Limit(SEEN.measure, most=0.2, words="at most 0.2")


def course(*values: float) -> list[Reading]:
    return [Reading(10 * k, {SEEN.measure: v}) for k, v in enumerate(values)]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([course(0.1, 0.3, 0.4), course(0.1, 0.15, 0.3, 0.5)], "supported"),
        ([course(0.1, 0.3, 0.1), course(0.1, 0.3, 0.4, 0.15)], "contradicted"),
        ([course(0.1, 0.3, 0.4), course(0.1, 0.3, 0.1)], "cannot be told"),
        ([course(0.1, 0.3, 0.4), course(0.1, 0.1, 0.1)], "cannot be told"),  # only one left it
        ([course(0.1, 0.3), course(0.1, 0.3)], "cannot be told"),  # stopped at once: nothing came after
        ([course(0.9, 0.1, 0.1), course(0.9, 0.1, 0.1)], "cannot be told"),  # before training is no drift
        ([], "cannot be told"),
    ],
)
def test_h4_going_on_after_a_limit_was_left(runs: Sequence[Sequence[Reading]], said: str) -> None:
    verdict, why = drift_harms([Seen("C2", 2, 4, {}, runs=runs)], [LIMIT])

    assert verdict == said, why


def test_every_hypothesis_has_its_claim_and_a_reason() -> None:
    verdicts = judge(matrix(FLAT, FLAT), Choice("22"), [LIMIT])

    assert [v.name for v in verdicts] == ["H1", "H2", "H3", "H4"]
    assert all(v.claim and v.why.endswith(".") for v in verdicts)
