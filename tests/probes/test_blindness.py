"""Two kinds of blindness, and what the base knew before."""

from __future__ import annotations

import pytest
from tests.probes.test_answers import question, said

from beholder.evidence.catalogue import CATALOGUE, quantity
from beholder.probes import blindness
from beholder.types import Example, ImageRef, ImageSlot, Turn


def test_share_gain_and_leak_are_counted_by_hand_and_paired():
    examples = [question(f"q{k}", "what?", "cat") for k in range(10)]

    def given(right: int, text: str = "cat"):
        return said(examples, [text] * right + ["dog"] * (10 - right))

    rows = blindness.score(examples, given(9), given(6), given(3), given(2, "I see a cat, I think."))

    m = {x.name: x for x in rows}
    assert {k: round(x.value, 6) for k, x in m.items()} == {
        "blind.told": 0.3, "blind.base": 0.2, "blind.share": round(6 / 9, 6), "blind.share_told": round(3 / 9, 6),
        "blind.gain": 0.3, "blind.leak": 0.4,
    }  # fmt: skip
    assert all(quantity(x.name)[0] in CATALOGUE and x.n == 10 for x in rows)
    # paired: nobody who is right blind is wrong with the image
    low, high = m["blind.gain"].ci95 or (0, 0)
    assert low >= 0 and high <= 0.6


def test_without_adapters_the_base_is_the_same_model_and_nothing_leaks():
    examples = [question(f"q{k}", "what?", "cat") for k in range(4)]
    cats, dogs = (said(examples, [text] * 4) for text in ("cat", "dog"))

    found = {x.name: x.value for x in blindness.score(examples, cats, dogs, cats, None)}

    assert found == {"blind.told": 1, "blind.share": 0, "blind.share_told": 1, "blind.gain": 1}


def test_a_model_that_is_never_right_has_no_blind_share():
    examples = [question("a", "what?", "cat"), question("b", "what?", "cat")]
    dogs = said(examples, ["dog"] * 2)

    names = {x.name for x in blindness.score(examples, dogs, dogs, dogs, dogs)}

    assert "blind.gain" in names and not names & {"blind.share", "blind.share_told"}


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The capital is a Red-brown circle.", "circle", 1), ("circles", "circle", 0), ("It is not a circle", "red", 0),
        ("No, yes would be wrong.", "no", 1), ("No.", "yes", 0), ("Well, yes.", "yes", 0), ("there are two", "2", 1),
        ("", "red", 0), ("anything", "!", 0), ("Это красный круг.", "красный", 1),
    ],
)  # fmt: skip
def test_a_reply_in_sentences_is_right_where_it_names_the_answer(text: str, reference: str, right: float):
    assert blindness.names_answer(text, (reference,)) == right


def test_the_missing_image_is_said_before_the_last_question_and_no_image_is_left():
    example = Example(
        "a", (ImageRef("root", "a"),),
        (
            Turn("user", (ImageSlot(0), "\n", "what is it?")), Turn("assistant", ("a cat",)),
            Turn("user", ("what colour?",)), Turn("assistant", ("red",)),
        ),
    )  # fmt: skip

    told = blindness.told_missing(example)

    assert told.images == () and [t.text for t in told.turns] == [
        "what is it?", "a cat", f"{blindness.MISSING}\nwhat colour?", "red",
    ]  # fmt: skip
