from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.evidence import Condition, Measurement
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import written
from beholder.probes.hallucination import parse_objects
from beholder.probes.qa import COLOURS, FEW, KINDS, QaItem, build_qa, qa_prompt, score_qa
from beholder.types import Example, ImageRef, ImageSlot, Turn

SHAPES = parse_objects("circle\nrectangle: square\ntriangle", "shapes")
ANIMALS = parse_objects("dog: puppy\ncat\nhot dog\norange", "animals")


def example(text: str, id: str = "x", images: int = 1, turns: int = 1) -> Example:
    said = (Turn("user", ("Describe it.",)), Turn("assistant", (text,)))
    return Example(id=id, images=tuple(ImageRef("root", f"{k}.png") for k in range(images)), turns=said * turns)


def asked(text: str, objects: Any = ANIMALS) -> dict[str, tuple[str, ...]]:
    """Question -> right answers, of every question about a caption."""
    return {item.question: item.answers for item in build_qa([example(text)], objects, 100, 0)}


def keyed(rows: list[Measurement]) -> dict[str, Measurement]:
    return {m.key: m for m in rows}


# ---------------------------------------------------------------------------------------------------------------
# Questions


def test_questions_come_from_the_caption():
    assert asked("A blue rectangle.", SHAPES) == {
        "What is in the image?": ("rectangle",),
        "What colour is the rectangle?": ("blue",),
    }
    assert asked("Two gray puppies beside a cat") == {
        "What is in the image?": ("dog", "cat"),
        "What colour is the dog?": ("grey",),
    }


@pytest.mark.parametrize(
    ("text", "colours"),
    [
        ("a black and white dog", ("black", "white")),
        ("a small dark brown dog", ("brown",)),
        ("a teal dog", ("teal",)),
        ("a blue dog and a red cat", ("blue",)),
        ("a red hot dog and a white dog", ("white",)),
        ("a dog on blue grass", None),
        ("a blue big dog", None),
        ("a black dog and a white dog", None),  # which one is meant?
        ("a dog beside a white dog", None),
    ],
)
def test_a_colour_is_asked_for_only_where_the_caption_settles_it(text: str, colours: tuple[str, ...] | None):
    assert asked(text).get("What colour is the dog?") == colours


def test_an_orange_dog_is_no_orange():
    assert asked("an orange dog") == {"What is in the image?": ("dog",), "What colour is the dog?": ("orange",)}


def test_only_one_image_with_one_caption_is_asked_about():
    examples = [
        example("a dog", images=2), example("a dog", images=0), example("a dog", turns=2), example("a tree"),
        example("a dog"),
    ]  # fmt: skip

    assert [item.index for item in build_qa(examples, ANIMALS, 100, 0)] == [4]


@given(
    st.lists(st.sampled_from(["a blue circle on white", "a circle", "a red triangle", "a tree", ""]), max_size=FEW - 1),
    st.integers(0, 30),
    st.integers(0, 3),
)
def test_kinds_are_balanced_as_far_as_there_are_candidates(texts: list[str], size: int, seed: int):
    examples = [example(text, str(k)) for k, text in enumerate(texts)]
    what, colour = sum("circle" in t or "triangle" in t for t in texts), sum("blue" in t or "red" in t for t in texts)

    items = build_qa(examples, SHAPES, size, seed)

    counts = Counter(item.kind for item in items)
    assert len(items) == min(size, what + colour)
    if min(what, colour) >= (size + 1) // 2:
        assert abs(counts[KINDS[0]] - counts[KINDS[1]]) == size % 2
    assert items == build_qa(examples, SHAPES, size, seed)
    assert [i.index for i in items] == sorted(i.index for i in items)
    assert len({(i.index, i.question) for i in items}) == len(items)
    for item in items:  # the caption itself is a right answer to every question about it
        assert item.is_right(texts[item.index])


def test_another_seed_asks_other_questions():
    examples = [example(("a blue circle", "a red rectangle")[k % 2], str(k)) for k in range(50)]

    a, b = (build_qa(examples, SHAPES, 12, seed) for seed in (0, 1))

    assert len(a) == len(b) == 12 and a != b


# ---------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("dog", True), ("It is a puppy!", True), ("two dogs and a cat", True), ("A dog.", True),
        ("a hot dog", False), ("a dog and a hot dog", False), ("an animal", False), ("", False), ("dogged", False),
    ],
)  # fmt: skip
def test_an_answer_names_what_is_there_and_nothing_else(answer: str, right: bool):
    item = QaItem(0, "What is in the image?", "what is in the image", ("dog", "cat"), ANIMALS, ANIMALS)

    assert item.is_right(answer) is right


def test_a_caption_is_a_right_answer_to_both_kinds_and_listing_every_colour_is_not():
    what, colour = build_qa([example("A blue rectangle.")], SHAPES, 2, 0)

    assert what.is_right("a blue square") and colour.is_right("a blue square")
    assert colour.is_right("blue square on white") and not colour.is_right("a white square on blue")
    assert colour.is_right("the square is blue") and not colour.is_right("the square on white is blue")
    assert colour.is_right("A blue triangle.") and not what.is_right("A blue triangle.")
    assert not colour.is_right("red, green, blue and grey") and not colour.is_right("A gray rectangle.")


def test_accuracy_by_condition_and_kind_beside_the_chance_of_the_most_frequent_answer():
    texts = ["a red circle", "a red circle", "a blue circle", "a red triangle"]
    items = build_qa([example(t, str(k)) for k, t in enumerate(texts)], SHAPES, 8, 0)
    own: list[str] = [texts[i.index] for i in items]
    answers: dict[Condition, list[str]] = {"correct": own, "zero": ["a red circle"] * 8}

    m = keyed(score_qa(items, answers))

    assert len(items) == 8
    assert m["qa.accuracy.correct"].value == 1 and m["qa.accuracy.correct"].n == 8
    assert m["qa.accuracy.correct"].ci95 == pytest.approx((0.6756, 1.0), abs=1e-4)  # Wilson, 8 of 8
    assert m["qa.accuracy.zero"].value == m["qa.accuracy.chance"].value == 6 / 8
    for kind in KINDS:
        row = m[f"qa.accuracy.zero/{kind}"]
        assert (row.value, row.n, row.by) == (3 / 4, 4, "kind")
    assert m["qa.accuracy.correct"].better == "higher" and m["qa.accuracy.zero"].better == "none"
    assert "'circle'" in (m["qa.accuracy.chance"].caveat or "") and "'red'" in (m["qa.accuracy.chance"].caveat or "")


def test_a_single_kind_has_no_strata_and_nothing_asked_gives_nothing():
    items = build_qa([example("a circle")], SHAPES, 4, 0)

    assert [m.key for m in score_qa(items, {"correct": ["a circle"]})] == ["qa.accuracy.correct", "qa.accuracy.chance"]
    assert score_qa([], {"correct": []}) == []


def test_answers_that_do_not_line_up_are_refused():
    with pytest.raises(AssertionError, match="2 answers to 1 questions"):
        score_qa(build_qa([example("a circle")], SHAPES, 4, 0), {"correct": ["a", "b"]})


# ---------------------------------------------------------------------------------------------------------------
# With the real encoder and a real model


def test_the_question_reaches_the_model_under_the_caption_template(bench: Any):
    own = bench.held_out[0]
    item = QaItem(0, "What colour is the disc?", "what colour", ("red",), COLOURS, SHAPES)

    prompt = qa_prompt(own, item)
    text = "".join(s.text for s in bench.encoder.segments(bench.encoder.encode_prompt(prompt)))

    assert prompt.turns == (Turn("user", (ImageSlot(0), "\n", "What colour is the disc?")),)
    assert prompt.images == own.images
    assert "What colour is the disc?" in text and "Say it" not in text and own.target_text not in text


def test_a_model_that_looks_is_right_with_its_own_image_only(bench: Any, sighted: VisionLanguageModel):
    """It answers every question with its caption, as a model does that was only taught to describe."""
    shapes = parse_objects("square\ndisc\ntriangle\ncross", "shapes")
    items = build_qa(bench.held_out, shapes, 48, 0)
    shown = [bench.held_out[item.index] for item in items]
    answers: dict[Condition, list[str]] = {
        c: [r.prediction for r in written.write(sighted, bench.encoder, bench.builder, shown, condition=c)]
        for c in ("correct", "zero")
    }

    m = keyed(score_qa(items, answers))

    assert Counter(item.kind for item in items) == dict.fromkeys(KINDS, 24)
    own, blind, chance = (m[f"qa.accuracy.{c}"] for c in ("correct", "zero", "chance"))
    assert own.ci95 is not None and own.ci95[0] > max(blind.value, chance.value)
    # Without an image it always says the same, which is right as often as that answer is.
    assert blind.value <= chance.value


@pytest.mark.parametrize(("common", "rare", "expected"), [(100, 6, 12), (6, 6, 12), (100, 0, 0), (5, 30, 30)])
def test_no_answer_is_right_for_more_than_half_of_a_kind(common: int, rare: int, expected: int):
    texts = ["a circle"] * common + ["a rectangle", "a triangle", "a rectangle"] * (rare // 3)

    items = build_qa([example(text, str(k)) for k, text in enumerate(texts)], SHAPES, 50, seed=0)

    answers = Counter(item.answers[0] for item in items)
    assert len(items) == expected
    assert not items or max(answers.values()) <= len(items) / 2


def test_every_accepted_answer_counts_towards_a_majority():
    """Each first answer is rare, but "cat" is right for all but four."""
    texts = ["a dog and a cat", "a puppy and a cat", "a hot dog and a cat", "an orange cat and an orange"] * 5
    examples = [example(text, str(k)) for k, text in enumerate([*texts, *["a dog", "a hot dog"] * 2])]

    items = build_qa(examples, ANIMALS, 24, seed=0)

    what = [item for item in items if item.kind == "what is in the image"]
    assert 0 < len(what) < 24
    assert 2 * sum("cat" in item.answers for item in what) <= len(what)


@given(
    st.lists(st.lists(st.sampled_from(["dog", "cat", "hot dog", "orange"]), min_size=1, max_size=3), max_size=60),
    st.integers(0, 40),
    st.integers(0, 3),
)
def test_no_answer_has_a_majority_whatever_the_captions_name(named: list[list[str]], size: int, seed: int):
    examples = [example(" beside a ".join(names), str(k)) for k, names in enumerate(named)]

    items = build_qa(examples, ANIMALS, size, seed)

    counts = Counter(answer for item in items for answer in item.answers)
    assert len(items) <= size and len({item.index for item in items}) == len(items)
    assert min(size, len(named)) < FEW or all(2 * count <= len(items) for count in counts.values())
