"""When a run stops itself: a pure function of what was recorded, with the stage-4 plan's bounds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.config import GUARDRAILS, GuardrailConfig
from beholder.evidence import Candidate, GuardrailStop
from beholder.evidence.best import choose
from beholder.evidence.guardrails import Reading, judge, limits, readings

PASS, HALL, GAP, SANE = "irrelevant.pass", "ood.hallucination", "gap.generalisation", "sane.captions"


def course(measure: str, *values: float | None) -> list[Reading]:
    """One reading an evaluation, the first of step 0."""
    return [Reading(10 * k, {} if v is None else {measure: v}) for k, v in enumerate(values)]


def stop(measure: str, *values: float | None, **more: Any) -> GuardrailStop | None:
    name = next(n for n, rule in GUARDRAILS.items() if rule.measure == measure)
    return judge(course(measure, *values), {name: GUARDRAILS[name].model_copy(update=more)})


def test_a_pass_rate_that_falls_by_more_than_a_fifth_of_its_baseline_stops_at_once() -> None:
    found = stop(PASS, 1.0, 0.95, 0.79)

    assert found is not None and (found.name, found.step, found.value) == ("irrelevant_pass", 20, 0.79)
    assert found.bound == pytest.approx(0.8) and found.baseline == 1.0
    assert found.sentence == (
        "irrelevant_pass: irrelevant.pass is 0.79 after step 20, more than 20% below its baseline of 1 (less than 0.8)"
    )
    assert stop(PASS, 1.0, 0.95, 0.81) is None
    assert stop(PASS, 0.9, 0.721) is None and stop(PASS, 0.9, 0.719) is not None, "of the baseline: 0.72"


def test_a_pass_rate_below_80_per_cent_stops_when_it_is_so_twice_in_a_row() -> None:
    assert stop(PASS, 0.9, 0.79, 0.81, 0.79, 0.81) is None
    found = stop(PASS, 0.9, 0.79, 0.78, 0.3)
    assert found is not None and found.step == 20 and found.told == "below 0.8 2 evaluations in a row"
    assert stop(PASS, 0.7, 0.79) is None, "the baseline is no evaluation of the run"


def test_a_bound_that_the_start_does_not_keep_is_no_sign_of_harm_and_being_worse_than_the_start_is() -> None:
    assert stop(PASS, 0.0, 0.0, 0.0, 0.0) is None, "it was never taught to say so"
    assert stop(SANE, 0.5, 0.55, 0.5, enable=True) is None
    found = stop(SANE, 0.5, 0.45, 0.4, enable=True)
    assert found is not None and found.bound == 0.5
    assert found.told == "below its baseline of 0.5, which is below 0.8, 2 evaluations in a row"
    rule = {"mine": GuardrailConfig(measure=HALL, above=0.3, times=1)}
    assert judge(course(HALL, 0.4, 0.4), rule) is None and judge(course(HALL, 0.4, 0.41), rule) is not None


def test_a_share_of_a_baseline_below_0_is_below_it() -> None:
    """The held-out samples may be the easier ones: then the gap at the start is negative."""
    rule = {"mine": GuardrailConfig(measure=GAP, falls=0.2, best_falls=0.1)}

    assert judge(course(GAP, -0.5, -0.5, -0.59), rule) is None
    found = judge(course(GAP, -0.5, -0.61), rule)
    assert found is not None and found.bound == pytest.approx(-0.6) and found.step == 10
    (limit,) = limits(course(GAP, -0.5), rule)
    assert limit.least == pytest.approx(-0.55) and not limit.broken_by(-0.5) and limit.broken_by(-0.56)


def test_hallucination_that_rises_by_more_than_15_points_stops() -> None:
    assert stop(HALL, 0.10, 0.25) is None
    found = stop(HALL, 0.10, 0.2, 0.26)
    assert found is not None and found.step == 20 and found.bound == pytest.approx(0.25)


def test_a_gap_stops_when_it_is_wider_than_its_best_and_still_worsening_over_two_evaluations() -> None:
    found = stop(GAP, 0.01, 0.05, 0.08)
    assert found is not None and found.step == 20 and found.bound == pytest.approx(0.07)
    assert stop(GAP, 0.01, 0.05, 0.09, 0.0) is not None, "judged as it went"
    assert stop(GAP, 0.01, 0.2, 0.19, 0.2, 0.19) is None, "wide, and no longer worsening"
    assert stop(GAP, 0.01, 0.03, 0.05, 0.069) is None, "worsening, and not wide"
    assert stop(GAP, 0.10, 0.01, 0.05, 0.08) is not None, "over the best, not over the first"


def test_captions_that_are_not_sane_stop_when_it_is_so_twice() -> None:
    assert stop(SANE, 1.0, 0.2, 0.9, 0.2) is None
    assert stop(SANE, 1.0, 0.2, 0.2) is not None


def test_what_was_not_measured_or_is_switched_off_stops_nothing() -> None:
    assert stop(HALL, None, 0.9) is None, "no baseline"
    assert stop(PASS, 1.0, None, None) is None
    assert stop(HALL, 0.1, 0.9, enable=False) is None
    assert stop(PASS, 1.0, 0.1, falls=None) is None and stop(PASS, 1.0, 0.1, 0.1, falls=None) is not None


def test_the_first_reading_and_the_first_rule_decide() -> None:
    history = [
        Reading(0, {PASS: 1.0, HALL: 0.0}), Reading(1, {PASS: 0.1, HALL: 0.9}), Reading(2, {PASS: 1.0, HALL: 0.0}),
    ]  # fmt: skip

    found = judge(history, GUARDRAILS)
    assert found is not None and (found.step, found.name) == (1, "irrelevant_pass")
    turned = judge(history, dict(reversed(GUARDRAILS.items())))
    assert turned is not None and (turned.step, turned.name) == (1, "hallucination")


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=12), st.integers(0, 11))
def test_a_run_that_is_resumed_anywhere_stops_where_the_straight_one_did(values: Any, cut: int) -> None:
    """Judging after every evaluation, with any of them repeated after a kill, is judging the whole history once."""
    history = [Reading(k, dict(zip((PASS, HALL, GAP, SANE), row, strict=True))) for k, row in enumerate(values)]
    whole = judge(history, GUARDRAILS)

    step_by_step = next((s for k in range(len(history)) if (s := judge(history[: k + 1], GUARDRAILS))), None)
    rows = [{"step": r.step, "monitors": dict(r.values)} for r in history]
    resumed = judge(readings([*rows[: cut + 1], *rows[cut:]]), GUARDRAILS)

    assert whole == step_by_step == resumed


def test_a_log_gives_one_reading_a_step_and_another_runs_baseline_goes_before_the_own() -> None:
    own, other = {"step": 0, "monitors": {HALL: 0.5}}, {"step": 0, "monitors": {HALL: 0.1}, "baseline_run": "a0"}
    late = {"step": 8, "monitors": {HALL: 0.2}}
    for rows in ([own, other, {"step": 1, "loss": 2.0}, late], [other, own, late]):
        assert readings(rows) == [Reading(0, {HALL: 0.1}), Reading(8, {HALL: 0.2})]
    assert [r.step for r in readings([own, late], before=8)] == [0], "a run cannot be stopped at its last step"


def test_the_best_checkpoint_keeps_what_the_guardrails_ask_of_it() -> None:
    history = [Reading(0, {PASS: 1.0, HALL: 0.2})]
    rules = limits(history, GUARDRAILS)

    found = choose([
        Candidate(step=1, eval_loss=3.0, monitors={PASS: 0.95, HALL: 0.25}),
        Candidate(step=2, eval_loss=2.0, monitors={PASS: 0.91, HALL: 0.29}),
        Candidate(step=3, eval_loss=1.0, monitors={PASS: 0.89, HALL: 0.0}),
        Candidate(step=4, eval_loss=0.5, monitors={PASS: 1.0, HALL: 0.31}),
    ], limits=rules)  # fmt: skip

    assert [c.step for c in found if c.best] == [2]
    assert found[2].refused == "irrelevant.pass is 0.89, below 0.9 (baseline 1 − 10%)"
    assert found[3].refused == "ood.hallucination is 0.31, above 0.3 (baseline 0.2 + 0.1)"
    off = {n: rule.model_copy(update={"enable": False}) for n, rule in GUARDRAILS.items()}
    assert limits(history, off) == [] and limits(course(PASS, None, 0.3), GUARDRAILS) == []


def test_a_rule_of_ones_own_may_bound_from_above_and_after_one_evaluation() -> None:
    rule = GuardrailConfig(measure="ood.blind", above=0.5, times=1)
    assert judge(course("ood.blind", 0.4, 0.5), {"mine": rule}) is None
    found = judge(course("ood.blind", 0.4, 0.6), {"mine": rule})
    assert found is not None and found.told == "above 0.5"
