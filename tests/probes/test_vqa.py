from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.probes.vqa import normalize_answer, vqa_accuracy

OFFICIAL = Path(__file__).parent / "data" / "vqa_official.jsonl.gz"
"""What the official code gave for ten thousand pairs; made by benchmarks/vqa_agreement.py."""


def test_accuracy_is_the_official_scorers_on_ten_thousand_odd_pairs():
    rows = [json.loads(line) for line in gzip.decompress(OFFICIAL.read_bytes()).splitlines()]

    wrong: list[tuple[str, list[str], float, float]] = []
    for said, counted, official in rows:
        answers = [a for a, n in zip(counted[::2], counted[1::2], strict=True) for _ in range(n)]
        ours = vqa_accuracy(said, answers)
        if abs(ours - official) > 1e-11:  # the official number came through per cent with 12 digits after the point
            wrong.append((said, answers, official, ours))

    assert len(rows) == 10_000
    assert wrong == []
    assert 0.2 < sum(x == 1 for *_, x in rows) / len(rows) < 0.8  # neither all right nor all wrong


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("A dog.", "dog"), ("the Theatre", "theatre"), ("a the an", ""), ("two cats", "2 cats"), ("None", "0"),
        ("eleven", "eleven"), ("dont", "don't"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"), ("Im", "im"),  # odd rows of the official table
        ("black/white", "black white"), ("black / white", "black white"), ("t-shirt", "t shirt"),
        ("1,000", "1000"), ("1,000 red-ish", "1000 redish"), ("2, 3", "2 3"), ("3.5", "3.5"), ("5.", "5"), (".5", ".5"),
        ("u.s.a.", "usa"), ("12:30 p.m.", "12:30 pm"), ("what?!", "what"), ("it's", "it's"),
        ("line\none\ttab", "line 1 tab"),
    ],
)  # fmt: skip
def test_answers_are_normalised_as_the_official_code_does(text: str, normal: str):
    assert normalize_answer(text) == normal


def test_more_than_32_periods_are_left_where_they_are():
    assert normalize_answer("." * 40 + "x") == "." * 8 + "x"


def test_three_others_who_say_the_same_are_enough_and_everybody_is_left_out_once():
    answers = ["red"] * 3 + ["blue"] * 7

    assert vqa_accuracy("blue", answers) == 1
    assert vqa_accuracy("red", answers) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("green", answers) == 0


def test_nothing_is_normalised_where_all_ten_people_say_the_same():
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("yes.", ["yes"] * 10) == 0
    assert vqa_accuracy("yes.", ["yes"] * 9 + ["no"]) == 1


def test_a_single_answer_is_compared_normalised():
    assert vqa_accuracy("Red.", ["red"]) == 1
    assert vqa_accuracy("dark red", ["red"]) == 0


@given(st.integers(1, 12), st.sampled_from(["red", "two", "don't"]))
def test_what_everybody_says_is_right_however_many_they_are(n: int, answer: str):
    assert vqa_accuracy(answer, [answer] * n) == 1


@given(st.text(max_size=12), st.lists(st.text(max_size=12), min_size=1, max_size=10))
def test_accuracy_is_a_share_and_does_not_depend_on_the_order_of_people(said: str, answers: list[str]):
    share = vqa_accuracy(said, answers)

    assert 0 <= share <= 1
    assert share == pytest.approx(vqa_accuracy(said, answers[::-1]))  # a sum in another order


def test_a_question_without_answers_is_a_mistake_of_ours():
    with pytest.raises(AssertionError, match="at least one reference"):
        vqa_accuracy("red", [])
