"""Whether a student looks as its teacher does, on planted pairs whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from beholder.evidence.catalogue import CATALOGUE, quantity
from beholder.probes.transfer import Losses, Transfer, gain_by_token, looking

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


def test_right_answers_do_as_well_as_losses() -> None:
    rng = np.random.default_rng(5)
    seen, blind = (rng.random(N) < 0.9).astype(float), (rng.random(N) < 0.3).astype(float)
    teacher, student = Losses.of_rights(seen, blind), Losses.of_rights((seen + blind) / 2, blind)

    found = looking(teacher, student)

    assert value(found, "teacher.delta") == pytest.approx(seen.mean() - blind.mean())
    assert value(found, "share") == pytest.approx(0.5)
    measured = found.get("teacher.delta")
    assert measured is not None and measured.unit == "share"


def test_what_cannot_be_told_is_named() -> None:
    assert looking(planted(), planted()).get("agreement") is not None
    teacher = planted()
    constant = Losses(teacher.own, teacher.own, teacher.tokens)
    assert any("costs the student the same in every sample" in gap for gap in looking(teacher, constant).gaps)
    with pytest.raises(FloatingPointError, match="not a finite number"):
        Losses(np.array([np.nan]), np.array([1.0]), np.array([1.0]))


# ---------------------------------------------------------------------------------------------------------------
# Tokens


def tokens(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(what a wrong image costs the teacher, how far the student is, its sample): half of the tokens need the image,
    and the student is farther off there."""
    rng = np.random.default_rng(seed)
    sample = np.repeat(np.arange(100), 8)
    needs = np.arange(800) % 2 == 0
    cost = np.where(needs, rng.uniform(1, 3, 800), rng.uniform(-0.1, 0.1, 800))
    return cost, np.where(needs, 2.0, 0.5) * rng.uniform(0.8, 1.2, 800), sample


def test_distillation_of_words_alone_gains_nothing_where_the_image_is_needed() -> None:
    cost, before, sample = tokens()
    after = np.where(cost > 0.5, before, before / 2)

    found = gain_by_token(cost, before, after, sample)

    assert value(found, "gain.image") == 0 and value(found, "closed.words") == pytest.approx(0.5)
    assert interval(found, "gain.difference")[1] < 0


def test_distillation_of_looking_closes_as_much_of_the_distance_there() -> None:
    cost, before, sample = tokens()

    found = gain_by_token(cost, before, before / 2, sample)

    assert value(found, "closed.image") == pytest.approx(0.5) == value(found, "closed.words")
    assert value(found, "gain.image") == pytest.approx(4 * value(found, "gain.words"), rel=0.1)
    assert interval(found, "gain.difference")[0] > 0


def test_noise_gains_nothing_in_either_half() -> None:
    cost, before, sample = tokens()
    after = before + np.random.default_rng(6).normal(0, 0.3, len(before))

    found = gain_by_token(cost, before, after, sample)

    for name in ("gain.image", "gain.words", "gain.difference"):
        low, high = interval(found, name)
        assert low < 0 < high, name


def test_tokens_that_all_lose_the_same_are_not_split() -> None:
    _, before, sample = tokens()

    found = gain_by_token(np.zeros(800), before, before / 2, sample)

    assert not found.measurements and "all lose the same" in found.gaps[0]


def test_they_have_their_rows_in_the_catalogue() -> None:
    cost, before, sample = tokens()
    made = [*looking(planted(), planted()).measurements, *gain_by_token(cost, before, before / 2, sample).measurements]

    assert len(made) == 11
    for m in made:
        row, condition = quantity(m.name)
        assert row in CATALOGUE and (m.unit, m.better) == (row.unit, row.direction(condition)), m.name
