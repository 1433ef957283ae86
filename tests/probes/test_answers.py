from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from beholder.config import GREEDY
from beholder.data.chat import ChatEncoder
from beholder.evidence import Condition, Measurement
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import strata, written
from beholder.probes.answers import pope, says_yes, score
from beholder.probes.written import Written
from beholder.probes.wrong_images import without_images
from beholder.types import Example, ImageRef, ImageSlot, Part, Turn


def question(id: str, text: str, answer: str, kind: str = "", answers: tuple[str, ...] = ()) -> Example:
    turns = (Turn("user", (ImageSlot(0), "\n", text)), Turn("assistant", (answer,)))
    return Example(id, (ImageRef("root", id),), turns, question_type=kind, answers=answers)


def said(examples: Sequence[Example], texts: Sequence[str], condition: Condition = "correct") -> list[Written]:
    return [Written(e.id, e.answer_text, t, condition, 1) for e, t in zip(examples, texts, strict=True)]


def last(examples: Sequence[Example]) -> dict[str, list[str | None]]:
    groups = strata.groups_of(examples, ["all"] * len(examples))
    return {by: [turns[-1] for turns in per_sample] for by, per_sample in groups.items()}


def keyed(rows: Sequence[Measurement]) -> dict[str, Measurement]:
    return {m.key: m for m in rows}


def easy(num: int = 40) -> list[Example]:
    """Half shape questions, half yes/no, as easy-VQA names them; yes and no as often."""
    shapes = [question(f"s{k}", "what shape is it", ("circle", "square")[k % 2], "shape") for k in range(num // 2)]
    return shapes + [
        question(f"y{k}", "is it red", ("yes", "no")[k % 2], "yes/no") for k in range(num // 2)
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Accuracy and gain


def test_a_model_that_is_right_without_looking_has_accuracy_and_no_gain():
    examples = easy()
    right = [e.answer_text for e in examples]
    blind = ["circle"] * 20 + right[20:]  # it knows the answers to its yes/no questions without the image

    m = keyed(
        score(examples, {"correct": said(examples, right), "none": said(examples, blind, "none")}, last(examples))
    )

    assert m["answer.accuracy.correct"].value == 1 and m["answer.accuracy.correct"].n == 40
    assert m["answer.gain.none"].value == pytest.approx(10 / 40)
    shape, yes_no = m["answer.gain.none/shape"], m["answer.gain.none/yes/no questions"]
    assert (shape.value, shape.n, shape.by) == (0.5, 20, "question")
    assert shape.ci95 is not None and 0.2 < shape.ci95[0] < 0.5 < shape.ci95[1] < 0.8
    assert (yes_no.value, yes_no.ci95) == (0, (0, 0))
    assert m["answer.gain.none/yes/no"].by == "answer" and m["answer.gain.none/yes/no"].value == 0
    assert m["answer.accuracy.none"].better == "none" and m["answer.accuracy.correct"].better == "higher"


def test_the_gain_is_paired_by_question():
    """Unpaired, 50 % against 40 % on 20 questions says nothing; paired, no question got worse and two got better."""
    examples = easy(40)[:20]
    right = [e.answer_text for e in examples]
    own = [t if k < 10 else "x" for k, t in enumerate(right)]
    other = [t if k < 8 else "x" for k, t in enumerate(right)]

    m = keyed(score(examples, {"correct": said(examples, own), "shuffled": said(examples, other, "shuffled")}, {}))

    gain = m["answer.gain.shuffled"]
    assert gain.value == pytest.approx(0.1)
    assert gain.ci95 is not None and gain.ci95[0] >= 0
    assert "paired" in (gain.caveat or "")


def test_ten_answers_are_scored_by_the_official_rule_and_one_by_equality():
    people = question("a", "what is it", "cat", answers=("cat",) * 2 + ("dog",) * 8)
    single = question("b", "what is it", "Cat.")

    ten = keyed(score([people], {"correct": said([people], ["a cat"])}, {}))["answer.accuracy.correct"]
    one = keyed(score([single], {"correct": said([single], ["a cat"])}, {}))["answer.accuracy.correct"]

    assert ten.value == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert "official VQA accuracy over 10 answers" in (ten.caveat or "")
    assert one.value == 1 and "one reference" in (one.caveat or "")


def test_exact_is_stricter_than_accuracy():
    examples = [question("a", "what", "two dogs")]

    m = keyed(score(examples, {"correct": said(examples, ["The 2 dogs"])}, {}))

    assert (m["answer.accuracy.correct"].value, m["answer.exact.correct"].value) == (1, 0)


def test_few_questions_are_told():
    examples = easy(10)

    m = keyed(score(examples, {"correct": said(examples, ["x"] * 10)}, last(examples)))

    assert "only 10 questions" in (m["answer.accuracy.correct"].caveat or "")


def test_answers_to_other_questions_are_refused():
    examples = easy(4)

    with pytest.raises(AssertionError, match="answers to other questions"):
        score(examples, {"correct": said(examples[::-1], ["x"] * 4)}, {})


# ---------------------------------------------------------------------------------------------------------------
# Yes and no


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("yes", True), ("Yes, there is.", True), (" \"Yes\"", True), ("no", False), ("No.", False), ("NO dogs", False),
        ("There is no dog.", None), ("not really", None), ("nope", None), ("yesterday", None), ("", None),
        ("...", None),
    ],
)  # fmt: skip
def test_the_first_word_says_yes_or_no(text: str, yes: bool | None):
    assert says_yes(text) is yes


def test_pope_scores_are_those_counted_by_hand():
    #         TP     TP     FN    FN(neither) FP   TN    TN    wrong no (neither)
    texts = ["yes", "Yes.", "no", "maybe", "yes", "no", "No", "a dog"]
    wanted = [True] * 4 + [False] * 4

    m = keyed(pope(texts, wanted, "correct"))

    assert m["pope.accuracy.correct"].value == 4 / 8
    assert (m["pope.precision.correct"].value, m["pope.precision.correct"].n) == (2 / 3, 3)
    assert (m["pope.recall.correct"].value, m["pope.recall.correct"].n) == (2 / 4, 4)
    assert m["pope.f1.correct"].value == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert m["pope.yes_rate.correct"].value == 3 / 8
    assert "2 answers begin with neither" in (m["pope.accuracy.correct"].caveat or "")


def test_what_cannot_be_divided_is_absent():
    never = keyed(pope(["no", "no"], [True, False]))
    nothing_there = keyed(pope(["no", "no"], [False, False]))

    assert "pope.precision" not in never and never["pope.recall"].value == never["pope.f1"].value == 0
    assert "pope.recall" not in nothing_there and "pope.f1" not in nothing_there
    assert nothing_there["pope.accuracy"].value == 1


def test_pope_is_about_the_yes_no_questions_alone():
    examples = easy()
    always_yes = ["circle"] * 20 + ["yes"] * 20

    m = keyed(score(examples, {"correct": said(examples, always_yes)}, {}))
    without = score(examples[:20], {"correct": said(examples[:20], ["circle"] * 20)}, {})

    assert (m["pope.accuracy.correct"].n, m["pope.accuracy.correct"].value) == (20, 0.5)
    assert m["pope.yes_rate.correct"].value == m["pope.recall.correct"].value == 1
    assert not [row for row in without if row.name.startswith("pope.")]


# ---------------------------------------------------------------------------------------------------------------
# Without the image


@pytest.mark.parametrize(
    ("parts", "left"),
    [
        ((ImageSlot(0), "\nwhat is it"), ("what is it",)),
        ((ImageSlot(0), "\n", "what is it"), ("what is it",)),
        (("what is it\n", ImageSlot(0)), ("what is it",)),
        (("left ", ImageSlot(0), " right"), ("left ", " right")),
        ((ImageSlot(0),), ()),
    ],
)
def test_without_images_takes_the_place_and_its_line_break_out(parts: tuple[Part, ...], left: tuple[str, ...]):
    example = Example("a", (ImageRef("r", "p"),), (Turn("user", parts), Turn("assistant", ("red",))))

    blind = without_images(example)

    assert blind.images == () and blind.turns[0].parts == left
    assert blind.answer_text == "red"


def test_the_blind_answer_is_the_language_models_to_the_words_alone(bench: Any, sighted: VisionLanguageModel):
    encoder = ChatEncoder(
        bench.tokenizer, num_visual_tokens=4, max_seq_len=256, template="chat", instruction="", instruction_multi=""
    )
    turns = (Turn("user", (ImageSlot(0), "\nWhat colour is it?")), Turn("assistant", ("red",)))
    examples = [replace(e, turns=turns) for e in bench.held_out[:3]]
    settings = GREEDY.model_copy(update={"max_new_tokens": 5})

    blind = written.write(sighted, encoder, bench.builder, examples, settings, "none")

    prompt = encoder.encode_prompt(without_images(examples[0]))
    words = sighted.language.embed(torch.from_numpy(prompt.ids)[None])[0]
    alone = sighted.language.generate([words], settings, eos_ids=encoder.eos_ids)
    assert prompt.image_spans == ()
    assert [r.id for r in blind] == [e.id for e in examples]
    assert {r.condition for r in blind} == {"none"} and {r.reference for r in blind} == {"red"}
    assert {r.prediction for r in blind} == {encoder.decode(alone[0])}  # the same words, so the same answer
