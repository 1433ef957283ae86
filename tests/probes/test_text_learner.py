"""What the words give away, to a learner that is trained on them."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.probes.test_answers import keyed, question

from beholder.data.images import content_hash
from beholder.data.sources import guess_source, open_sources
from beholder.evidence import Measurement
from beholder.evidence.catalogue import CATALOGUE, quantity
from beholder.probes import text_learner
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError

PLACES = ("kitchen", "garden", "street", "office")


def leaking(num: int = 240) -> list[Example]:
    """The animal gives the colour away, whatever else is asked; where it is does not."""
    colour = {"parrot": "green", "raven": "black", "swan": "white"}
    rng = random.Random(0)
    out: list[Example] = []
    for k in range(num):
        animal = rng.choice(sorted(colour))
        text = f"what colour is the {animal} in the {rng.choice(PLACES)} number {k}?"
        out.append(question(f"q{k}", text, colour[animal], "colour"))
    return out


def fair(num: int = 240) -> list[Example]:
    rng = random.Random(1)
    return [
        question(f"f{k}", f"what shape is in the {rng.choice(PLACES)}?", rng.choice(("circle", "square")), "shape")
        for k in range(num)
    ]


def test_the_words_that_give_the_answers_away_are_named():
    found = text_learner.learn([*leaking(), *fair()])

    m = keyed(found.measurements)
    assert m["learner.accuracy/colour"].value == 1 and m["learner.accuracy/colour"].by == "question"
    # the very question is never asked twice, so what is usual for it says nothing
    assert m["learner.majority/colour"].value < 0.6
    shape = m["learner.accuracy/shape"]
    assert 0.35 < shape.value < 0.65 and shape.ci95 is not None and shape.ci95[0] < 0.5
    told = {w.gram: w.answer for w in found.words}
    assert {told.get(a) for a in ("parrot", "raven", "swan")} <= {"green", "black", "white", None} and len(told) > 2
    assert any(told.get(a) == c for a, c in (("parrot", "green"), ("raven", "black"), ("swan", "white")))
    assert not set(told) & {*PLACES, "number"}
    assert len(found.findings) == 1 and "'colour' 100.0%" in found.findings[0] and "→" in found.findings[0]
    assert "'shape'" not in found.findings[0]
    assert all(quantity(x.name)[0] in CATALOGUE for x in found.measurements)


def test_a_fair_data_set_gives_nothing_away_and_no_finding():
    found = text_learner.learn(fair())

    assert found.findings == [] and found.measurements[0].value < 0.65


def test_nothing_is_learned_from_questions_about_the_same_images():
    """Each picture has an answer of its own and is asked about four times in words of its own: learned within a picture
    it would be perfect, and it is worth nothing for another."""
    examples: list[Example] = []
    rng = random.Random(2)
    for image in range(60):
        answer = rng.choice(("circle", "square"))
        for k in range(4):
            asked = Turn("user", (ImageSlot(0), f"what is w{image} at {k}?")), Turn("assistant", (answer,))
            examples.append(Example(f"{image}-{k}", (ImageRef("root", f"{image}"),), asked))

    m = text_learner.learn(examples).measurements[0]

    assert m.n == 240 and m.value < 0.7
    assert m.ci95 is not None and m.ci95[1] - m.ci95[0] > 0.2, "60 pictures, not 240 questions"


def test_earlier_turns_are_read_and_told_apart():
    examples: list[Example] = []
    rng = random.Random(3)
    for k in range(200):
        colour = rng.choice(("red", "blue"))
        turns = (
            Turn("user", (ImageSlot(0), "describe it")),
            Turn("assistant", (f"There is a {colour} thing on a table in a very long sentence.",)),
            Turn("user", ("what colour is it?",)), Turn("assistant", (colour,)),
        )  # fmt: skip
        examples.append(Example(f"q{k}", (ImageRef("root", f"{k}"),), turns))

    found = text_learner.learn(examples)

    assert found.measurements[0].value == 1 and found.measurements[0].n == 200
    assert any(w.gram.startswith(text_learner.EARLIER) and w.answer in w.gram for w in found.words)
    assert "200 of 400 answers are longer" in found.gaps[0]


def test_too_few_are_an_error_and_the_same_seed_gives_the_same():
    with pytest.raises(UserError, match="only 5 samples have a question with a short answer"):
        text_learner.learn(fair(5))
    one, again = text_learner.learn(leaking(60), seed=4), text_learner.learn(leaking(60), seed=4)
    assert one.measurements == again.measurements and one.words == again.words


def test_copies_of_a_picture_in_rows_of_their_own_are_the_same_picture(tmp_path: Path):
    """Five rows a picture, each with the picture's bytes, as question sets in parquet have them."""
    rows = [(image, k, random.Random(image).choice(("circle", "square"))) for image in range(60) for k in range(5)]
    path = tmp_path / "rows.parquet"
    pq.write_table(
        pa.table({
            "id": [f"{image}-{k}" for image, k, _ in rows],
            "images": [[{"bytes": b"picture %d" % image, "path": f"{image}-{k}.png"}] for image, k, _ in rows],
            "conversation": [
                [{"role": "user", "content": f"<image> what is w{image} at {k}?"}, {"role": "assistant", "content": a}]
                for image, k, a in rows
            ],
        }),
        path,
    )  # fmt: skip
    records = open_sources([guess_source(str(path))], image_token="<image>", max_images=1, on_reject="collect")
    examples = [records[i] for i in range(len(records))]
    assert len(examples) == 300

    owners, lost = text_learner.owners_of(examples)
    m = text_learner.learn(examples).measurements[0]

    assert len(set(owners)) == 60 and lost == 0
    assert m.n == 300 and m.value < 0.7, "learned within a picture it would be perfect"


def test_pictures_that_cannot_be_read_are_told_apart_by_their_places_and_that_is_said():
    found = text_learner.learn(fair())

    assert "240 images could not be read" in found.gaps[0] and found.measurements[0].n == 240
    assert text_learner.learn(fair(), content_key=lambda ref: ref.path).gaps == []


def test_the_gain_over_the_words_has_an_interval_of_both() -> None:
    def share(name: str, value: float, low: float, high: float) -> Measurement:
        return Measurement(name=name, value=value, unit="share", better="higher", n=100, ci95=(low, high))

    right, learner = share("answer.accuracy.correct", 0.9, 0.84, 0.95), share("learner.accuracy", 0.5, 0.42, 0.58)
    gain = text_learner.gain_over(right, learner)

    assert gain.value == pytest.approx(0.4) and gain.ci95 is not None and gain.n == 100
    assert gain.ci95 == pytest.approx((0.4 - 0.1, 0.4 + (0.05**2 + 0.08**2) ** 0.5))


def test_only_files_that_may_be_the_same_are_read(tmp_path: Path) -> None:
    for name, content in {"a": b"one", "b": b"one", "c": b"two", "d": b"longer"}.items():
        (tmp_path / name).write_bytes(content)
    refs = [ImageRef(str(tmp_path), name) for name in "abcd"]
    read: list[str] = []

    def key(ref: ImageRef) -> str:
        read.append(ref.path)
        return content_hash(ref)

    asked = [Example(f"{k}", (ref,), (Turn("user", ("?",)), Turn("assistant", ("x",)))) for k, ref in enumerate(refs)]
    owners, lost = text_learner.owners_of([*asked, *asked], key)

    assert read == ["a", "b", "c"] and lost == 0
    assert owners[:4] == owners[4:] and owners[0] == owners[1] and len(set(owners)) == 3
    (tmp_path / "d").unlink()
    assert text_learner.owners_of(asked, key)[1] == 1
