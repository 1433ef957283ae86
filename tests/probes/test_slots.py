"""Every place by itself, images moved through every place, images swapped: what is asked, and what is made of it.

Whoever answers here is a function of the pictures in order and of the words, so each way of not looking is exact; a
model that has learned is asked in tests/stages/test_slots.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from beholder.config.stages import SLOT_GATES
from beholder.evidence import GateResult, Measurement
from beholder.evidence.gates import judge
from beholder.probes import slots, wilson
from beholder.probes.loss import SampleLoss
from beholder.types import Batch, Example, ImageInput, ImageRef, ImageSlot, Turn

COLOURS = ("red", "green", "blue", "white")
Answerer = Callable[[list[str], str], str]
"""(colours in order, question) → answer"""


def example(id: str, shown: Sequence[str], question: str, answer: str) -> Example:
    images = tuple(ImageRef(colour, f"{id.partition('-')[0]}-{k}") for k, colour in enumerate(shown))
    slots = [part for k in range(len(shown)) for part in (ImageSlot(k), "\n")]
    return Example(id, images, (Turn("user", (*slots, question)), Turn("assistant", (answer,))))


def samples(groups: int = 60) -> list[Example]:
    """Colours of every place of the same pictures, and the place of a colour."""
    rng, out = random.Random(3), []
    for g in range(groups):
        shown = rng.sample(COLOURS, 2 + g % 3)
        for k, colour in enumerate(shown, 1):
            out.append(example(f"{g}-c{k}", shown, f"what color is image {k}?", colour))
            out.append(example(f"{g}-w{k}", shown, f"which image is {colour}?", str(k)))
    return out


def honest(shown: list[str], question: str) -> str:
    if number := re.search(r"image (\d)", question):
        return shown[int(number[1]) - 1]
    colour = question.rstrip("?").rpartition(" ")[2]
    return str(shown.index(colour) + 1) if colour in shown else "?"


def last_only(shown: list[str], question: str) -> str:
    return honest([shown[-1]] * len(shown), question)


def bag(shown: list[str], question: str) -> str:
    return honest(sorted(shown), question)


def _asked(e: Example) -> tuple[list[str], str]:
    return [ref.root for ref in e.images], e.turns[0].text.rpartition("\n")[2]


def measure_of(answer: Answerer) -> slots.Measure:
    def measure(examples: Sequence[Example], change: slots.Change | None = None, /) -> list[SampleLoss]:
        assert change is None, "only images of the data stand in for others here"
        out = []
        for e in examples:
            right = answer(*_asked(e)) == e.answer_text
            out.append(SampleLoss(e.id, 0.1 if right else 3.0, 1, int(right), (0.1 if right else 3.0,), (1,)))
        return out

    return measure


def content(ref: ImageRef) -> str:
    return f"{ref.root}/{ref.path}"


def shown(e: Example) -> slots.Pictures:
    return slots.pictures(e, content)


def evidence(
    answer: Answerer, given: Sequence[Example] | None = None
) -> tuple[dict[tuple[str, str | None], Measurement], dict[str, GateResult]]:
    measure, given = measure_of(answer), samples() if given is None else given
    own = measure(given)
    replaced = slots.replaced(measure, given, ("shuffled", "neighbour"), {}, content_key=content)
    measured = slots.compare_slots(given, own, replaced, content_key=content)
    found = moved_by(given, {}, size=10**6, answer=answer)
    gates = {
        n: g for n, g in SLOT_GATES.items() if not any((g.measure or "").startswith(x) for x in found.inapplicable)
    }
    measured += found.measurements
    return {(m.name, m.stratum): m for m in measured}, {g.name: g for g in judge(gates, measured)}


def test_who_looks_everywhere_passes() -> None:
    found, gates = evidence(honest)

    assert all(g.passed for g in gates.values())
    assert found["slots.accuracy", None].value == found["slots.follows", None].value == 1
    assert found["slots.swap_renamed", None].value == 1 and found["slots.spread", None].value == 0
    for n in (2, 3, 4):
        for k in range(1, n + 1):
            assert found["slots.gain.shuffled", f"image {k} of {n}"].n == 20 * 2 * n
            # one image of n decides, and of "which image is red" all that are not red say something
            assert found["slots.gain.shuffled", f"image {k} of {n}"].value > 0.3 / n


def test_who_looks_at_the_last_image_only_fails_by_name() -> None:
    found, gates = evidence(last_only)

    assert [name for name, g in gates.items() if not g.passed] == [
        "every_slot_counts",
        "slot_spread",
        "no_last_image_bias",
        "minds_the_order",
        "follows_the_swap",
    ]
    assert found["slots.delta.shuffled", "image 1 of 3"].value == pytest.approx(0)
    assert found["slots.delta.shuffled", "image 2 of 3"].value == pytest.approx(0)
    assert abs(found["slots.delta.shuffled", "image 3 of 3"].value) > 0.05
    assert found["slots.accuracy", "image 3 of 3"].value == 0.5 and found["slots.last_bias", None].value > 0.4


def test_who_ignores_the_order_fails_to_follow() -> None:
    found, gates = evidence(bag)

    assert {"minds_the_order", "follows_the_swap"} <= {name for name, g in gates.items() if not g.passed}
    assert found["slots.follows", None].value < 0.5 and found["slots.follows", "3 images"].value < 0.5
    assert found["slots.order", None].value == 0


def test_who_ignores_the_order_fails_where_no_sample_tells_what_is_right_after_a_swap() -> None:
    """One question a set of pictures, about one place: no other sample asks what a swap would make of it."""
    rng, given = random.Random(5), []
    for g in range(60):
        seen = rng.sample(COLOURS, 3)
        k = rng.randrange(3)
        given.append(example(f"{g}-c", seen, f"what color is image {k + 1}?", seen[k]))

    found, gates = evidence(honest, given)
    assert ("slots.follows", None) not in found and "follows_the_swap" not in gates
    assert gates["minds_the_order"].passed and found["slots.order", None].n == 60
    found, gates = evidence(bag, given)
    assert not gates["minds_the_order"].passed and found["slots.order", None].value == 0


def test_swapped_images_under_the_same_words_are_what_another_sample_asks() -> None:
    given = samples(12)
    siblings = slots.siblings_of(given, content)
    for e in given:
        swap = slots.find_swap(e, siblings, content)
        asked = e.turns[0].text.rpartition("\n")[2]
        assert swap.kept is not None and swap.follows
        assert swap.kept.turns[0] == e.turns[0] and swap.kept.answer_text != e.answer_text
        assert honest([r.root for r in swap.kept.images], asked) == swap.kept.answer_text
        renamed = swap.renamed.turns[0].text.rpartition("\n")[2]
        assert honest([r.root for r in swap.renamed.images], renamed) == swap.renamed.answer_text


def test_a_swap_whose_answer_no_sample_tells_is_not_guessed_and_answers_to_both_are_compared() -> None:
    alone = example("0", ("red", "blue", "green"), "do image 1 and image 3 show the same color?", "no")
    swap = slots.find_swap(alone, slots.siblings_of([alone], content), content)
    assert swap.kept is None and not swap.follows
    assert swap.words_renamed.images == alone.images != swap.words_kept.images
    assert swap.words_kept.turns == alone.turns != swap.words_renamed.turns

    which = example("1", ("red", "blue"), "besides image 2, which image is red?", "1")
    swap = slots.find_swap(which, {}, content)
    assert slots.alike(swap, "2", "1") and not slots.alike(swap, "1", "1")


def test_samples_that_disagree_about_the_answer_tell_none() -> None:
    pictures = ("red", "blue")
    given = [
        example("0", pictures, "what color is image 1?", "red"),
        example("0", pictures, "what color is image 2?", "blue"),
        example("0", pictures, "what color is image 2?", "navy"),
    ]  # fmt: skip

    assert slots.find_swap(given[0], slots.siblings_of(given, content), content).kept is None


@pytest.mark.parametrize(
    ("question", "answer", "costs", "place"),
    [
        ("what color is image 2?", "red", None, 2),
        ("which image is red?", "3", [5.0, 0.0, 0.0], 3),
        ("how many are red?", "2", [2.0, 0.1, 0.1], 1),
        ("how many are red?", "2", [2.0, 1.5, 0.1], None),
        ("how many are red?", "2", [0.05, 0.0, 0.0], None),
        ("how many are red?", "2", None, None),
        ("are image 1 and image 2 alike?", "no", [0.0, 0.1, 3.0], 3),
    ],
)
def test_the_image_that_decides_is_named_or_clearly_costs_most(
    question: str, answer: str, costs: list[float] | None, place: int | None
) -> None:
    assert slots.deciding_place(example("0", COLOURS[:3], question, answer), costs) == place


@pytest.mark.parametrize(
    ("question", "answer", "movable"),
    [
        ("what color is image 2?", "red", True),
        ("what happens before image 2?", "red", False),
        ("what came first?", "red", False),
        ("what is in image 7?", "red", False),
        ("what do you see?", "a long story of all that can be seen in them", False),
    ],
)
def test_images_are_moved_only_where_the_right_answer_stays_known(question: str, answer: str, movable: bool) -> None:
    assert slots.is_movable(example("0", COLOURS[:3], question, answer)) == movable
    assert not slots.is_movable(example("0", COLOURS[:1], question, answer))


def test_images_whose_neighbours_speak_of_them_are_not_moved() -> None:
    e = example("0", COLOURS[:2], "Where was image 2 taken?", "Rome")
    told = (ImageSlot(0), " was taken in Paris. ", ImageSlot(1), " was taken in Rome. Where was image 2 taken?")

    assert slots.is_movable(e)
    assert not slots.is_movable(replace(e, turns=(Turn("user", told), e.turns[1])))


def test_too_few_samples_are_named_and_not_judged() -> None:
    right = SampleLoss("a", 0.1, 1, 1, (0.1,), (1,))
    measured, gaps = slots.score_rotations(
        [((str(k), ""), 1, [right, right]) for k in range(30)] + [((str(k), "", ""), 2, [right] * 3) for k in range(5)]
    )

    assert gaps == [
        "Spread over places: fewer than 20 samples whose deciding image is known, not judged: 3 images (5)."
    ]
    for name in ("slots.spread", "slots.last_bias"):
        assert {m.stratum: m.n for m in measured if m.name == name} == {None: 30, "2 images": 30}
    assert any(m.name == "slots.accuracy" and m.stratum == "image 2 of 3" for m in measured)


def test_the_spread_says_what_chance_alone_would_give() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        losses = [SampleLoss("a", 1.0, 1, int(rng.random() < 0.8), (1.0,), (1,)) for _ in range(4)]
        rows.append(((str(i),), 1, losses))
    spread = next(m for m in slots.score_rotations(rows)[0] if m.name == "slots.spread" and m.stratum is None)

    assert spread.caveat is not None and spread.ci95 is not None
    by_chance = float(spread.caveat.rpartition(" by ")[2].removesuffix(" points")) / 100
    assert 0.05 < by_chance < 0.25 and spread.ci95[0] < by_chance < spread.ci95[1]


@pytest.mark.parametrize("num", [1, 19, 20])
def test_too_few_swaps_or_samples_of_a_place_pass_no_gate(num: int) -> None:
    right = SampleLoss("a", 0.1, 1, 1, (0.1,), (1,))
    own = [((f"{k}", "b"), True) for k in range(num)]
    measured = slots.score_swaps(own, own)
    measured += slots.score_rotations([(key, 1, [right, right]) for key, _ in own])[0]

    gates = {g.name: g for g in judge(SLOT_GATES, measured)}

    for name in ("slot_spread", "no_last_image_bias", "follows_the_swap"):
        assert gates[name].passed == (num >= 20) and (num >= 20 or "not measured" in gates[name].note)


def test_samples_of_the_same_pictures_are_one_draw() -> None:
    """Every sample asked ten times over says no more than asked once."""
    rng = np.random.default_rng(1)
    keys = [(f"{k}", "b") for k in range(40)]
    rows = [
        (key, 1, [SampleLoss("a", float(rng.random()), 1, int(rng.random() < 0.7), (1.0,), (1,)) for _ in range(2)])
        for key in keys
    ]
    hits = [(key, bool(rng.random() < 0.7)) for key in keys]
    given = [example(f"{k}", ("red", "blue"), "what color is image 1?", "red") for k in range(40)]
    own, wrong = ([losses[k] for *_, losses in rows] for k in (0, 1))

    def measured(times: int) -> dict[tuple[str, str | None], Measurement]:
        found = slots.score_rotations(rows * times)[0] + slots.score_swaps(hits * times, hits * times)
        replaced = {"shuffled": [[x, x] for x in wrong] * times}
        found += slots.compare_slots(given * times, own * times, replaced, content_key=content)
        return {(m.name, m.stratum): m for m in found}

    once, often = measured(1), measured(10)

    assert once.keys() == often.keys()
    for name, m in often.items():
        assert m.n == 10 * once[name].n and m.value == pytest.approx(once[name].value)
        assert m.ci95 is not None and (was := once[name].ci95) is not None
        assert m.ci95[1] - m.ci95[0] > 0.9 * (was[1] - was[0]), name
    alike = [(keys[0], True)] * 30 + [(keys[1], True)] * 30
    assert slots.score_swaps(alike, [])[0].ci95 == pytest.approx(wilson(2, 2))


def moved_by(
    given: Sequence[Example], costs: dict[int, list[float]], size: int = 200, answer: Answerer = honest
) -> slots.Found:
    return slots.move(
        dict(enumerate(given)), measure_of(answer)(given), costs, measure_of(answer),
        lambda examples, _: [answer(*_asked(e)) for e in examples],
        size=size, choose=lambda among, n: list(among)[:n], fits=lambda _: True, content_key=content,
    )  # fmt: skip


def test_a_setting_waives_no_gate_on_moved_images() -> None:
    """Which image decides "how many are red?" only its cost tells: too few costs are a gap, all of them a reason."""
    given = [example(f"{k}", ("red", "blue"), "how many are red?", "one") for k in range(30)]
    unclear = {k: [1.0, 1.0] for k in range(30)}

    few = moved_by(given, {k: unclear[k] for k in range(8)})
    assert "slots.spread" not in few.inapplicable and "slots.last_bias" not in few.inapplicable
    assert any("raise eval.slot_samples" in gap and "of 22 it was not measured" in gap for gap in few.gaps)
    assert {g.note for g in judge(SLOT_GATES, few.measurements)} == {"not measured"}

    whole = moved_by(given, unclear)
    assert {"slots.spread", "slots.last_bias"} <= whole.inapplicable.keys()
    assert not any("eval.slot_samples" in gap for gap in whole.gaps)
    assert "slots.spread" in moved_by(given[:19], {}).inapplicable  # no setting makes 20 of 19

    assert any("raise eval.moved_samples (6)" in gap for gap in moved_by(samples(), {}, size=6).gaps)


def batch() -> Batch:
    """Two samples of two and of one image, two positions an image."""
    ids = torch.arange(24).reshape(2, 12)
    return Batch(
        input_ids=ids, position_ids=torch.arange(12).expand(2, 12), supervise=torch.zeros(2, 12, dtype=torch.bool),
        sample_index=torch.tensor([[0] * 12, [1] * 12]), image_positions=torch.tensor([1, 2, 5, 6, 13, 14]),
        image_lengths=torch.tensor([2, 2, 2]), image_sample=torch.tensor([0, 0, 1]),
        images=[ImageInput(pixels=torch.zeros(1)) for _ in range(3)],
        ids=["a", "b"],
    )  # fmt: skip


def test_an_image_is_replaced_in_its_place_alone() -> None:
    given, blank = batch(), ImageInput(features=torch.ones(1))

    second = slots.image_in_slot(1, [blank])(given)

    assert [image is blank for image in second.images] == [False, True, False]
    assert [image is blank for image in slots.image_in_slot(0, [blank])(given).images] == [True, False, True]
    assert not any(image is blank for image in given.images)


def test_as_much_text_keeps_every_length_and_every_other_position() -> None:
    given = batch()

    text = slots.text_in_slot(1, [77, 78, 79])(given)

    assert text.input_ids.shape == given.input_ids.shape
    assert text.input_ids[0, 5:7].tolist() == [77, 78]
    changed = (text.input_ids != given.input_ids).nonzero().tolist()
    assert changed == [[0, 5], [0, 6]] and given.input_ids[0, 5] == 5
    assert text.image_positions.tolist() == [1, 2, 13, 14] and text.image_lengths.tolist() == [2, 2]
    assert text.image_sample.tolist() == [0, 1]
    assert [any(i is o for o in given.images) for i in text.images] == [True, True]
    longer = slots.text_in_slot(0, [7])(given)
    assert longer.input_ids.reshape(-1)[[1, 2, 13, 14]].tolist() == [7] * 4 and len(longer.images) == 1
