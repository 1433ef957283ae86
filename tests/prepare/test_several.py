"""Questions about several pictures: right, and of no help to whoever does not look."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest

from beholder.prepare.several import EVEN, KINDS, NUM_IMAGES, Asked, conversations, questions, record
from beholder.types import UserError

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
CAPTIONS = {n: f"A {c} {s}." for n, (c, s) in enumerate(list(product(COLORS, SHAPES)) * 6)}
# What is rare stays no rarer in the questions.
CAPTIONS |= {1000 + n: "A red circle." for n in range(100)}


@pytest.fixture(scope="module")
def asked() -> list[Asked]:
    return list(questions(CAPTIONS, 6000, seed=5))


def facts(asked: Asked) -> list[tuple[str, str]]:
    found = [CAPTIONS[n].removeprefix("A ").removesuffix(".").split() for n in asked.images]
    return [(color, shape) for color, shape in found]


def test_every_answer_is_what_the_pictures_show(asked: list[Asked]) -> None:
    for a in asked:
        shown, words = facts(a), a.question.rstrip("?").split()
        named = [s for s in (*COLORS, *SHAPES) if s in words]
        has = [all(value in pair for value in named) for pair in shown]
        numbers = [int(w) for w in words if w.isdecimal()]
        match a.kind:
            case "which image":
                right = str(has.index(True) + 1)
                assert has.count(True) == 1
            case "how many":
                right = str(has.count(True))
            case "same color":
                i, j = numbers
                right = "yes" if shown[i - 1][0] == shown[j - 1][0] else "no"
            case _:
                right = shown[numbers[0] - 1][a.kind == "shape in image"]
        assert a.answer == right, a
        assert len(set(a.images)) == len(a.images)


def test_kinds_numbers_places_and_answers_are_balanced(asked: list[Asked]) -> None:
    assert Counter(a.kind for a in asked) == dict.fromkeys(KINDS, 1200)
    for kind, n in product(KINDS, NUM_IMAGES):
        own = [a for a in asked if a.kind == kind and len(a.images) == n]
        assert len(own) == 400
        answers = Counter(a.answer for a in own)
        assert max(answers.values()) < 1.6 * len(own) / len(answers), (kind, n, answers)
        if own[0].decides is not None:
            places = Counter(a.decides for a in own)
            assert sorted(places) == list(range(1, n + 1)) and max(places.values()) < 1.35 * len(own) / n


def test_looking_at_one_place_only_is_no_better_than_chance_at_colors(asked: list[Asked]) -> None:
    own = [a for a in asked if a.kind == "color in image" and len(a.images) == 4]

    for place in (0, -1):
        right = sum(facts(a)[place][0] == a.answer for a in own) / len(own)
        assert abs(right - (1 / 4 + 3 / 4 / 8)) < 0.07, "it decides in a quarter of the questions"


def test_the_same_seed_asks_the_same_and_the_record_has_a_marker_an_image(asked: list[Asked]) -> None:
    assert list(questions(CAPTIONS, 50, seed=5)) == asked[:50] != list(questions(CAPTIONS, 50, seed=6))
    made = record(asked[0])
    assert made["messages"][0]["content"].count("<image>") == len(asked[0].images) == 2
    assert made["question_type"] == asked[0].kind


def test_test_questions_ask_of_every_place_of_the_same_pictures_and_stay_balanced() -> None:
    asked = list(questions(CAPTIONS, 30 * EVEN, seed=0, every_place=True))

    test_every_answer_is_what_the_pictures_show(asked)
    assert Counter((a.kind, len(a.images)) for a in asked) == dict.fromkeys(product(KINDS, NUM_IMAGES), 30 * 12)
    groups: dict[tuple[object, ...], list[Asked]] = {}
    for a in asked:
        if a.kind.endswith("in image"):
            groups.setdefault((a.images, a.question.replace(f"image {a.decides}", "image k")), []).append(a)
    assert all(
        [a.decides for a in own] == list(range(1, len(images) + 1)) * (len(own) // len(images))
        for (images, _), own in groups.items()
    )
    # What a swap is worth: nearly all groups of colours have two answers that differ, most of shapes.
    differ = [len({a.answer for a in own}) > 1 for own in groups.values()]
    assert sum(differ) / len(differ) > 0.7
    for n in NUM_IMAGES:
        colors = Counter(a.answer for a in asked if a.kind == "color in image" and len(a.images) == n)
        assert sorted(colors) == list(COLORS) and max(colors.values()) < 1.6 * 360 / 8


def test_no_answer_of_a_conversation_tells_another() -> None:
    talks = list(conversations(CAPTIONS, 6000, seed=1))

    test_every_answer_is_what_the_pictures_show([a for talk in talks for a in talk])
    assert {len(talk) for talk in talks} == {2, 3} and all(len({a.images for a in talk}) == 1 for talk in talks)
    for talk in talks:
        about: dict[str, list[set[int]]] = {"color": [], "shape": []}
        for a in talk:
            words = a.question.rstrip("?").split()
            named = {int(w) for w in words if w.isdecimal()} or set(range(1, len(a.images) + 1))
            of_shapes = a.kind == "shape in image" or (a.kind in ("how many", "which image") and words[-1] in SHAPES)
            about["shape" if of_shapes else "color"].append(named)
        assert len(about["shape"]) == 1 and about["color"]
        assert sum(map(len, about["color"])) == len(set().union(*about["color"])), "each picture's colour is asked once"
    # What is drawn apart is apart: yes and no to the colours are as frequent whatever the count of shapes was.
    yes: dict[str, list[bool]] = {}
    for talk in talks:
        same = next((a for a in talk if a.kind == "same color"), None)
        many = next((a for a in talk if a.kind == "how many" and a.question.rstrip("?").split()[-1] in SHAPES), None)
        if same and many:
            yes.setdefault(many.answer, []).append(same.answer == "yes")
    assert len(yes) == 5 and all(abs(sum(v) / len(v) - 0.5) < 0.15 for v in yes.values() if len(v) > 50)
    made = record(*talks[0])
    assert [m["role"] for m in made["messages"]] == ["user", "assistant"] * len(talks[0])
    assert "<image>" not in made["messages"][2]["content"]


def test_few_pictures_are_enough_or_named_too_few() -> None:
    few = {
        n: f"A {c} {s}." for n, (c, s) in enumerate([("red", "circle"), ("blue", "circle"), ("red", "triangle")] * 3)
    }

    assert len(list(questions(few, 60, seed=0))) == len(list(conversations(few, 60, seed=0))) == 60
    for make in (questions, conversations):
        with pytest.raises(UserError, match="1 pictures are too few for questions about 2 of them"):
            list(make({0: "A red circle."}, 3, seed=0))
