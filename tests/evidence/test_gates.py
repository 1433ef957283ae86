"""Gates are a pure function of bounds and measurements: what was not shown does not pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.config import STAGES, GateConfig
from beholder.evidence import Measurement
from beholder.evidence.gates import bounds, judge, told


def measured(name: str, value: float, **more: Any) -> Measurement:
    fields = {"unit": "ratio", "better": "higher", "n": 100, **more}
    return Measurement.model_validate({"name": name, "value": value, **fields})


def one(gate: GateConfig, *measurements: Measurement) -> Any:
    (result,) = judge({"it": gate}, measurements)
    return result


def test_what_was_not_measured_does_not_pass() -> None:
    result = one(GateConfig(measure="a.b", at_most=1))

    assert not result.passed and result.value is None
    assert "not measured" in told(result)


def test_an_interval_that_does_not_exist_does_not_pass() -> None:
    result = one(GateConfig(measure="a", above=0, end="low"), measured("a", 5.0, n=1))

    assert not result.passed and "too few" in result.note


@pytest.mark.parametrize(
    ("bounds", "value", "passes"),
    [
        ({"above": 0}, 0.0, False),
        ({"above": 0}, 1e-9, True),
        ({"at_least": 0}, 0.0, True),
        ({"at_least": 0}, -1e-9, False),
        ({"at_most": 1}, 1.0, True),
        ({"at_most": 1}, 1.1, False),
        ({"above": 0, "at_most": 1}, 0.5, True),
        ({"above": 0, "at_most": 1}, 2.0, False),
        ({"above": 0, "at_most": 1}, -2.0, False),
    ],
)
def test_bounds(bounds: dict[str, float], value: float, passes: bool) -> None:
    assert one(GateConfig(measure="a", **bounds), measured("a", value)).passed is passes


def test_the_unfavourable_end_of_the_interval_is_judged() -> None:
    m = measured("a", 1.2, ci95=(0.9, 1.5))

    assert one(GateConfig(measure="a", above=1), m).passed
    assert not one(GateConfig(measure="a", above=1, end="low"), m).passed
    assert not one(GateConfig(measure="a", at_most=1.3, end="high"), m).passed


def test_an_average_does_not_hide_a_group() -> None:
    overall = measured("a", 1.7, ci95=(1.6, 1.8))
    blind = measured("a", 1.0, ci95=(0.99, 1.01), stratum="yes/no", by="answer")
    sighted = measured("a", 9.0, ci95=(8.0, 10.0), stratum="what color", by="question")

    assert one(GateConfig(measure="a", above=1.05, end="low"), overall, blind, sighted).passed
    result = one(GateConfig(measure="a", above=1.05, end="low", strata=True), overall, blind, sighted)
    assert not result.passed and result.stratum == "yes/no" and result.value == 0.99


def test_groups_too_small_to_judge_are_named() -> None:
    overall = measured("a", 2.0, ci95=(1.9, 2.1))
    tiny = measured("a", 0.1, n=3, ci95=(0.0, 0.2), stratum="odd", by="question")

    other = measured("a", 2.0, ci95=(1.9, 2.1), stratum="even", by="question")
    gate = GateConfig(measure="a", above=1, end="low", strata=True)

    result = one(gate, overall, tiny, other)

    assert result.passed and "odd (n=3)" in result.note
    assert not one(gate, overall, tiny).passed  # no group was judged, and the average may hide one


def test_a_gate_that_is_switched_off_is_not_judged() -> None:
    assert judge({"it": GateConfig(measure="a", at_most=1, enable=False)}, [measured("a", 5)]) == []


@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=6),
    bound=st.floats(-10, 10),
)
def test_with_groups_it_passes_exactly_when_each_number_passes(values: list[float], bound: float) -> None:
    ms = [measured("a", v, stratum=None if k == 0 else f"g{k}", by=None if k == 0 else "b")
          for k, v in enumerate(values)]  # fmt: skip

    result = one(GateConfig(measure="a", at_least=bound, strata=True), *ms)

    assert result.passed == all(v >= bound for v in values)
    assert result.value is not None and math.isclose(result.value, min(values), abs_tol=1e-9)


def test_every_gate_of_the_stage_has_a_measure_a_bound_and_a_reason() -> None:
    for name, gate in STAGES["align"].gates.items():
        assert gate.measure and gate.bound and gate.why, name


def test_a_gate_on_one_group_judges_that_group_and_no_other() -> None:
    ms = [measured("a", 0.9), measured("a", 0.2, stratum="colour", by="question"), measured("a", 0.95, stratum="shape")]

    shape, colour = (one(GateConfig(measure="a", at_least=0.5, stratum=name), *ms) for name in ("shape", "colour"))

    assert shape.passed and shape.stratum == "shape" and shape.value == 0.95
    assert not colour.passed and colour.value == 0.2


def test_a_gate_on_a_group_that_was_not_measured_does_not_pass_and_names_those_that_were() -> None:
    result = one(GateConfig(measure="a", at_least=0, stratum="color"), measured("a", 1.0, stratum="colour"))

    assert not result.passed and "not measured; groups: colour" in told(result)


def test_a_gate_on_a_group_too_small_to_judge_does_not_pass() -> None:
    ms = [measured("a", 0.9), measured("a", 1.0, n=3, stratum="shape")]

    result = one(GateConfig(measure="a", at_least=0.5, stratum="shape"), *ms)

    assert not result.passed and "3 samples are fewer than min_n 20" in told(result)


@pytest.mark.parametrize(
    "edges", [{"above": 0.25}, {"at_least": -1e-07, "at_most": 12}, {"above": 0, "at_least": 0.1, "at_most": 0.9}]
)
def test_a_bound_is_read_back_as_it_was_declared(edges: dict[str, float]) -> None:
    signs = {"above": ">", "at_least": "≥", "at_most": "≤"}

    assert bounds(GateConfig(**edges).bound) == [(signs[name], value) for name, value in edges.items()]
