from __future__ import annotations

from typing import get_args

import pytest

from beholder.probes.categories import Category, category


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("Describe the following image.", "describe"),
        ("Can you describe the main features of this image for me?", "describe"),
        ("Write a terse but informative summary of the picture.", "describe"),
        ("Explain the visual content of the image in great detail.", "describe"),
        ("What is happening in the image?", "describe"),
        ("What do you see?", "describe"),
        ("Describe the man's clothes.", "describe"),
        ("What does the sign say?", "OCR"),
        ("What is written on the bus?", "OCR"),
        ("What word is on the shirt?", "OCR"),
        ("What brand is the laptop?", "OCR"),
        ("How many dogs are there?", "count"),
        ("What is the number of chairs next to the table?", "count"),
        ("What color is the bus on the left?", "colour"),
        ("What colour are the stairs?\nAnswer the question using a single word or phrase.", "colour"),
        ("Where is the cat sitting?", "spatial"),
        ("What is behind the sofa?", "spatial"),
        ("Is the man on the left of the car?", "spatial"),
        ("Why is the woman holding an umbrella?", "reasoning"),
        ("What might be the purpose of the gathering?", "reasoning"),
        ("How does the man keep his balance?", "reasoning"),
        ("what shape is in the image", "other"),
        ("is there a circle?", "other"),
        ("Is he right?", "spatial"),  # a known weakness of patterns
        ("", "other"),
        ("WHAT COLOUR IS IT?", "colour"),
    ],
)
def test_a_question_is_of_the_first_kind_that_fits(question: str, kind: str):
    assert category(question) == kind


def test_the_form_of_the_answer_is_not_what_is_asked_for():
    assert category("Is the ball big? Answer in one word.") == "other"
    assert category("What is the word on the wall? Answer in one word.") == "OCR"


def test_every_kind_can_be_reached():
    asked = (
        "Describe the image.", "How many?", "What colour?", "Where?", "What is written there?", "Why?", "Is it a dog?",
    )  # fmt: skip

    assert tuple(category(q) for q in asked) == get_args(Category)
