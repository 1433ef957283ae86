"""Four cells: whose question is asked, whose image is shown, and what the own answer loses by it."""

from __future__ import annotations

import pytest
from tests.probes.test_answers import question

from beholder.evidence.catalogue import CATALOGUE, quantity
from beholder.probes import cells
from beholder.probes.loss import SampleLoss
from beholder.types import Example, ImageRef, ImageSlot, Turn


def key(ref: ImageRef) -> str:
    return ref.path


def mixed(num: int = 12) -> list[Example]:
    asked = (("what colour is it?", "red"), ("what shape is it?", "circle"), ("is it red?", "yes"))
    return [question(f"q{k}", *asked[k % 3]) for k in range(num)]


def text(example: Example, turn: int = -2) -> str:
    return "".join(p for p in example.turns[turn].parts if isinstance(p, str))


def test_nobody_keeps_the_own_question_or_image_and_everybody_the_own_answer():
    examples = mixed()

    shown = cells.four(examples, key, seed=1)

    for (asks, sees), own in shown.items():
        for e, was in zip(own, examples, strict=True):
            assert e.id == was.id and e.turns[-1] == was.turns[-1]
            assert (text(e) == text(was)) == (asks == "own")
            assert (e.images == was.images) == (sees == "correct")
            assert [p for p in e.turns[-2].parts if isinstance(p, ImageSlot)] == [ImageSlot(0)]
    again, other = cells.four(examples, key, seed=1), cells.four(examples, key, seed=2)
    assert shown == again and shown != other


def test_questions_are_exchanged_among_those_with_as_many_images_and_places_only():
    def several(id: str, asked: str, places: int) -> Example:
        slots = tuple(ImageSlot(k) for k in range(places))
        images = tuple(ImageRef("root", f"{id}{k}") for k in range(places))
        return Example(id, images, (Turn("user", (*slots, asked)), Turn("assistant", ("x",))))

    first = Turn("user", (ImageSlot(0), "look")), Turn("assistant", ("yes",))
    later = [
        Example(f"l{k}", (ImageRef("root", f"l{k}"),), (*first, Turn("user", (word,)), Turn("assistant", ("x",))))
        for k, word in enumerate(("how many?", "what else?"))
    ]
    examples = [
        several("a", "same colour?", 2), several("b", "how many?", 2), several("c", "which one?", 3), *later,
        Example("t", (), (Turn("user", ("and now?",)), Turn("assistant", ("x",)))),
        question("alone", "what is it?", "x"),
    ]  # fmt: skip

    assert cells.swappable(examples) == [0, 1, 3, 4]  # c, t and alone have nobody to exchange with
    swapped = cells.swap_questions([examples[i] for i in (0, 1, 3, 4)], seed=0)
    assert [text(e) for e in swapped] == ["how many?", "same colour?", "what else?", "how many?"]
    assert [p.index for p in swapped[0].turns[0].parts if isinstance(p, ImageSlot)] == [0, 1]
    assert swapped[2].turns[:2] == first, "the turns before are the sample's own"


def test_the_same_question_apart_from_case_and_spacing_is_no_other_question():
    assert cells.swappable([question("a", "What is  it?", "x"), question("b", "what is it?", "y")]) == []


def loss(id: str, nll: float, right: bool, turns: tuple[int, ...] = (2,)) -> SampleLoss:
    n = sum(turns)
    return SampleLoss(id, nll, n, n if right else 0, (0.0,) * (n - turns[-1]) + (nll / turns[-1],) * turns[-1], turns)


def test_a_model_that_ignores_the_question_has_no_rise_by_another_question_and_one_by_another_image():
    nll = {("own", "correct"): 0.1, ("own", "shuffled"): 3.0, ("other", "correct"): 0.1, ("other", "shuffled"): 3.0}
    losses = {c: [loss(f"{k}", nll[c], nll[c] < 1) for k in range(30)] for c in cells.CELLS}

    m = {x.name: x for x in cells.score(losses, [1] * 30)}

    assert m["cells.delta.question"].value == 0 and m["cells.delta.question"].ci95 == (0, 0)
    assert m["cells.delta.image"].value == pytest.approx(2.9 / 2)
    assert m["cells.accuracy.other.correct"].value == 1 and m["cells.accuracy.own.shuffled"].value == 0
    assert all(quantity(name)[0] in CATALOGUE for name in m)


def test_only_the_last_answer_counts_and_cut_ones_are_left_out_of_every_cell():
    def row(turns: tuple[int, ...]) -> list[SampleLoss]:
        return [loss("a", 1.0, True, (3, 2)), loss("b", 3.0, True), loss("c", 9.0, True, turns)]

    losses = dict(zip(cells.CELLS, (row((2,)), row((2,)), row((1,)), row((2,))), strict=True))

    m = {x.name: x for x in cells.score(losses, [2, 1, 1])}

    own = m["cells.loss.own.correct"]
    assert own.n == 2 and own.value == pytest.approx((1 + 3) / 4)
    assert m["cells.accuracy.own.correct"].n == 1, "of a sample with two answers it is not known which was right"
