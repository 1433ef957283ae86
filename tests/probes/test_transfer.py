"""Whether a student looks as its teacher does, on planted pairs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from beholder.evidence.catalogue import CATALOGUE, quantity
from beholder.probes.transfer import Losses, Transfer, looking

N = 400


def planted(seed: int = 0) -> Losses:
    """A teacher that looks: a wrong image costs about 0.8 nats per token, more in some samples than in others."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, 12, N).astype(np.float64)
    own = tokens * rng.uniform(0.1, 0.4, N)
    return Losses(own, own + tokens * rng.exponential(0.8, N), tokens)


def value(found: Transfer, name: str) -> float:
    measured = found.get(name)
    assert measured is not None, (name, found.gaps)
    return measured.value


def interval(found: Transfer, name: str) -> tuple[float, float]:
    measured = found.get(name)
    assert measured is not None and measured.ci95 is not None
    return measured.ci95


def test_a_copy_has_all_of_its_teachers_reliance_and_agrees_with_it() -> None:
    teacher = planted()

    found = looking(teacher, teacher)

    assert value(found, "share") == pytest.approx(1) and interval(found, "share") == pytest.approx((1, 1))
    assert value(found, "agreement") == pytest.approx(1)
    assert value(found, "teacher.delta") == value(found, "student.delta") == pytest.approx(0.8, abs=0.1)
    assert value(found, "student.ratio") > 2 and not found.gaps


def test_a_blind_student_that_learned_the_words_has_none_of_it() -> None:
    teacher, rng = planted(), np.random.default_rng(1)
    # as low a loss as the teacher's, whatever it is shown
    student = Losses(teacher.own, teacher.own + rng.normal(0, 0.05, N), teacher.tokens)

    found = looking(teacher, student)

    low, high = interval(found, "share")
    assert abs(value(found, "share")) < 0.01 and low < 0 < high
    low, high = interval(found, "agreement")
    assert low < 0 < high
    assert value(found, "student.ratio") == pytest.approx(1, abs=0.01)


def test_half_the_reliance_is_half_in_whatever_tokens_the_student_counts() -> None:
    teacher = planted()
    student = Losses(2 * teacher.own, 2 * teacher.own + teacher.cost / 2, 3 * teacher.tokens)

    found = looking(teacher, student)

    assert value(found, "share") == pytest.approx(0.5)
    assert value(found, "student.delta") == pytest.approx(value(found, "teacher.delta") / 6)
    assert value(found, "agreement") == pytest.approx(1)


def test_a_student_that_looks_elsewhere_has_the_share_and_not_the_agreement() -> None:
    teacher, rng = planted(), np.random.default_rng(2)
    costs = teacher.tokens * rng.permutation(teacher.cost / teacher.tokens)
    student = Losses(teacher.own, teacher.own + costs, teacher.tokens)

    found = looking(teacher, student)

    assert value(found, "share") == pytest.approx(1, abs=0.15)
    low, high = interval(found, "agreement")
    assert low < 0 < high and abs(value(found, "agreement")) < 0.2


def test_the_interval_of_the_share_is_paired() -> None:
    teacher, rng = planted(), np.random.default_rng(3)
    near = Losses(teacher.own, teacher.own + teacher.cost * rng.normal(0.7, 0.05, N), teacher.tokens)
    order = rng.permutation(N)
    apart = Losses(near.own[order], near.wrong[order], near.tokens[order])

    widths = [np.ptp(interval(looking(teacher, student), "share")) for student in (near, apart)]

    assert widths[0] < widths[1] / 4


def test_of_a_teacher_that_does_not_look_there_is_no_share() -> None:
    teacher, rng = planted(), np.random.default_rng(4)
    blind = Losses(teacher.own, teacher.own + rng.normal(0, 0.1, N), teacher.tokens)

    found = looking(blind, teacher)

    assert found.get("share") is None and found.get("student.delta") is not None
    assert any("not shown to cost the teacher anything" in gap for gap in found.gaps)


def test_what_cannot_be_told_is_named() -> None:
    assert looking(planted(), planted()).get("agreement") is not None
    teacher = planted()
    constant = Losses(teacher.own, teacher.own, teacher.tokens)
    assert any("costs the student the same in every sample" in gap for gap in looking(teacher, constant).gaps)
    with pytest.raises(FloatingPointError, match="not a finite number"):
        Losses(np.array([np.nan]), np.array([1.0]), np.array([1.0]))


def test_they_have_their_rows_in_the_catalogue() -> None:
    made = looking(planted(), planted()).measurements

    assert len(made) == 6
    for m in made:
        row, condition = quantity(m.name)
        assert row in CATALOGUE and (m.unit, m.better) == (row.unit, row.direction(condition)), m.name
