"""Contrast pairs: who answers from the question is right about none, and no prior about more than a quarter."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from tests.probes.test_answers import keyed, last, question, said

from beholder.evidence import Measurement
from beholder.probes import pairs
from beholder.types import Example, ImageRef, ImageSlot, Turn

COLOURS = ("red", "blue")


def key(ref: ImageRef) -> str:
    return ref.path


def asked_often(num: int = 40, text: str = "what colour is it?", kind: str = "colour") -> list[Example]:
    return [question(f"{kind}{k}", text, COLOURS[k % 2], kind) for k in range(num)]


def scored(examples: Sequence[Example], **texts: Sequence[str]) -> dict[str, Measurement]:
    by = {c: said(examples, t, c) for c, t in texts.items()}  # type: ignore[arg-type]
    found = pairs.find(examples, key)
    return keyed(pairs.score(examples, found, by, last(examples)["question"], content_key=key))  # type: ignore[arg-type]


def test_the_answer_of_the_question_alone_is_right_about_no_pair_though_half_its_answers_are_right():
    examples = asked_often()

    m = scored(examples, correct=[e.answer_text for e in examples], none=["red"] * 40)

    assert m["pairs.single.none"].value == 0.5
    assert m["pairs.right.none"].value == 0 and m["pairs.right.correct"].value == 1
    assert m["pairs.right.correct"].n == 20 * 20, "every red one against every blue one"
    # 40 samples make at most 20 pairs that have none in common: so much is known, not 400 pairs' worth
    low, high = m["pairs.right.correct"].ci95 or (0, 0)
    assert high == 1 and 0.8 < low < 0.9
    assert (m["pairs.right.none"].ci95 or (1, 1))[1] == pytest.approx(1 - low)


def test_drawing_from_the_right_answers_reaches_the_prior_and_never_a_quarter():
    examples = [question(f"q{k}", "which?", "a" if k % 4 else "b") for k in range(80)]
    rng = random.Random(0)
    found, reached = pairs.find(examples, key), []
    for _ in range(300):
        guesses = [rng.choice(examples).answer_text for _ in examples]
        right = np.array([g == e.answer_text for g, e in zip(guesses, examples, strict=True)])
        reached.append((right[found.left] & right[found.right]).mean())

    prior = scored(examples, correct=["a"] * 80)["pairs.prior"].value

    assert prior == pytest.approx(0.75 * 0.25)
    assert np.mean(reached) == pytest.approx(prior, abs=0.01)
    even = scored(asked_often(), correct=["red"] * 40)["pairs.prior"].value
    assert prior < even == 0.25


def test_samples_are_paired_by_question_and_number_of_images_apart_from_case_and_spacing():
    one = question("a", "What  colour is it?", "red")
    same = question("b", "what colour\nis it?", "blue")
    other_question = question("c", "what shape is it?", "circle")
    equal_answer = question("d", "what colour is it?", "Red.")
    two_images = Example(
        "e", (ImageRef("root", "e1"), ImageRef("root", "e2")),
        (Turn("user", (ImageSlot(0), ImageSlot(1), "\n", "what colour is it?")), Turn("assistant", ("blue",))),
    )  # fmt: skip
    same_image = Example("f", one.images, (Turn("user", (ImageSlot(0), "\n", "what colour is it?")), same.turns[1]))
    blind = Example("g", (), (Turn("user", ("what colour is it?",)), Turn("assistant", ("green",))))
    told = Example(
        "h",
        (ImageRef("root", "h"),),
        (Turn("user", (ImageSlot(0), "is it red?")), Turn("assistant", ("no",)), *same.turns),
    )
    examples = [one, same, other_question, equal_answer, two_images, same_image, blind, told]

    found = pairs.find(examples, key)

    ids = {tuple(sorted((examples[i].id, examples[j].id))) for i, j in zip(found.left, found.right, strict=True)}
    # f contradicts a about one picture, so they are no pair; h was asked after another answer
    assert ids == {("a", "b"), ("b", "d"), ("d", "f")}


def test_samples_whose_people_gave_an_answer_in_common_are_no_pair():
    some = question("a", "what is it?", "cat", answers=("cat", "kitten", "cat"))
    others = question("b", "what is it?", "dog", answers=("dog", "kitten", "dog"))
    apart = question("c", "what is it?", "cow", answers=("cow", "A cow.", "bull"))

    found = pairs.find([some, others, apart], key)

    assert list(zip(found.left.tolist(), found.right.tolist(), strict=True)) == [(0, 2), (1, 2)]


def test_a_question_that_very_many_ask_makes_no_more_pairs_than_that_and_says_so():
    examples = asked_often(1000)

    m = scored(examples, correct=[e.answer_text for e in examples])["pairs.right.correct"]

    assert m.n <= pairs.MAX_ASKED**2 / 4
    assert f"only {pairs.MAX_ASKED} samples are paired" in (m.caveat or "")
    first, again, other = (pairs.find(examples, key, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.left, again.left) and not np.array_equal(first.members, other.members)


def test_the_interval_knows_that_pairs_share_samples_and_samples_share_images():
    """10 of 40 wrong: 300 of 400 pairs right. As independent pairs ± 4 points; their samples give ± 14 and more."""
    examples = asked_often()
    answers = [e.answer_text if k % 8 > 1 else "x" for k, e in enumerate(examples)]

    m = scored(examples, correct=answers)["pairs.right.correct"]

    assert m.value == pytest.approx(0.75**2) and m.ci95 is not None
    assert 0.2 < m.ci95[1] - m.ci95[0] < 0.6
    # the same samples about half as many pictures know less
    shared = [
        Example(e.id, (ImageRef("root", f"{k % 2}{k % 8 // 2}{k // 16}"),), e.turns, question_type=e.question_type)
        for k, e in enumerate(examples)
    ]
    less = scored(shared, correct=answers)["pairs.right.correct"]
    assert less.ci95 is not None and less.ci95[1] - less.ci95[0] > m.ci95[1] - m.ci95[0]


def test_kinds_of_question_are_told_apart_and_small_ones_left_out():
    examples = [
        *asked_often(), *asked_often(40, "is it red?", "is"), *asked_often(6, "who is it?", "who"),
    ]  # fmt: skip

    m = scored(examples, correct=[e.answer_text if e.question_type == "colour" else "red" for e in examples])

    assert m["pairs.right.correct/colour"].value == 1 and m["pairs.right.correct/is"].value == 0
    assert m["pairs.right.correct/is"].by == "question"
    assert not any(k.endswith("who") for k in m)
    assert m["pairs.right.correct"].n == 400 + 400 + 9


def test_too_few_samples_are_said():
    assert pairs.why_not(pairs.find(asked_often(), key)) is None
    assert "19 of the held-out samples" in (pairs.why_not(pairs.find(asked_often(19), key)) or "")
    none = pairs.find([question("a", "what?", "x")], key)
    assert len(none) == 0 and "none of the held-out" in (pairs.why_not(none) or "")
