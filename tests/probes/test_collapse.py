from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.probes import collapse
from beholder.probes.caption_metrics import tokenize
from beholder.probes.collapse import Symptom, loops, near_identical, references_shown, symptoms
from beholder.probes.wrong_images import shuffle_images
from beholder.types import Example, ImageRef, ImageSlot, Turn

COLOURS = ("red", "green", "blue", "teal", "black", "gray", "brown", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
EASY_VQA = [f"A {COLOURS[k % 8]} {SHAPES[k // 8 % 3]}." for k in range(96)]
"""Captions like those of the quickstart's data: 24 different ones, each 4 times."""
TEXTS = st.lists(
    st.text(st.sampled_from("ab a. !猫é"), max_size=24) | st.sampled_from(EASY_VQA), min_size=1, max_size=40
)


def by_name(found: list[Symptom]) -> dict[str, Symptom]:
    return {s.name: s for s in found}


def varied(n: int, seed: int = 0) -> list[str]:
    """Captions of 5 to 20 words that have little in common."""
    rng = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnrst"]
    return [" ".join(rng.choices(words, k=rng.randint(5, 20))) for _ in range(n)]


# ---------------------------------------------------------------------------------------------------------------
# Health


@given(TEXTS)
def test_writing_exactly_the_references_has_no_symptom_whatever_they_are(references: list[str]):
    found = symptoms(references, references)

    assert [(s.name, s.count, s.n) for s in found] == [
        (name, 0, len(references)) for name in ("empty", "loop", "template")
    ]
    assert collapse.findings(found, limit=0.0) == []


def test_a_healthy_varied_model_with_some_wrong_words_has_none():
    references = varied(200)
    outputs = [" ".join(reversed(r.split()[1:])) for r in references]

    found = symptoms(outputs, references, varied(200, seed=1), other_references=[*references[1:], references[0]])

    assert {s.name: s.count for s in found} == {"empty": 0, "loop": 0, "template": 0, "image_independent": 0}
    assert collapse.findings(found, limit=0.0) == []


def test_references_that_are_all_alike_are_not_blamed_on_the_model():
    found = by_name(symptoms(["a cat on a mat"] * 50, ["A cat on a mat."] * 50))

    assert found["template"].count == 0


@given(TEXTS, st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(texts: list[str], rng: random.Random):
    references = list(reversed(texts))
    order = list(range(len(texts)))
    rng.shuffle(order)

    found = symptoms(texts, references)
    again = symptoms([texts[i] for i in order], [references[i] for i in order])

    assert [(s.name, s.count) for s in found] == [(s.name, s.count) for s in again]


@given(TEXTS, st.integers(0, 3))
def test_a_symptom_names_as_many_outputs_as_it_counts(texts: list[str], shift: int):
    references = texts[shift:] + texts[:shift]

    for s in symptoms(texts, references, references, ids=[f"s{i}" for i in range(len(texts))]):
        assert s.count == len(s.indices) == len(set(s.indices)) <= s.n <= len(texts)
        assert s.ids == tuple(f"s{i}" for i in s.indices)
        assert s.ci95[0] <= s.share <= s.ci95[1]
        assert (s.example == "") == (s.count == 0) or s.name == "empty"


# ---------------------------------------------------------------------------------------------------------------
# Empty


def test_outputs_without_a_word_are_found_by_id():
    found = by_name(symptoms(["", "a cat", " \n", "...", "x"], ["a dog", "", "a", "b", "c"], ids=list("vwxyz")))

    assert found["empty"].ids == ("v", "x", "y")
    assert found["empty"].share == 0.6


def test_an_empty_output_is_right_where_the_reference_is_empty():
    assert by_name(symptoms(["", ""], ["", "a"]))["empty"].indices == (1,)


# ---------------------------------------------------------------------------------------------------------------
# Loops


@pytest.mark.parametrize(
    "text",
    [
        "a a a a",
        "the cat and the cat and the cat",
        "a photo of the cat and the cat and the cat.",
        "a man is holding a man is holding a man is",
        "A cat, a cat, a cat, a cat",
        "it is 0 0 0 0",
        "a cat!!!!!!!!!!!!",
        "a cat ! ! ! ! ! ! ! !",
        "hahahahahahahahaha",
        "猫が猫が猫が猫が猫が猫が猫が猫が",
        "aaaaaaaaaaaaaaa",
        "word " * 500,
    ],
)
def test_a_repetition_to_the_end_is_a_loop(text: str):
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "very very good",
        "very very very very good",  # it got out of it
        "bye bye",
        "no no no",
        "New York, New York",
        "a red circle and a red circle",
        "the cat and the cat",
        "a dog runs home a dog runs home",  # twice only
        "a red circle and a red circle and",
        "a cat!!!!!!!",
        "a pair of men's cut resistant gloves with a cut resistant cut",
        "loading...",
        "the price is 1,000,000",
        "ha ha ha, said the man with the hat",
        "a dog on a mat on a rug on a floor",
    ],
)
def test_ordinary_repetition_is_not_a_loop(text: str):
    assert not loops(text)


@given(
    st.lists(st.sampled_from(["cat", "dog", "and", "the"]), min_size=1, max_size=6),
    st.integers(4, 9),
    st.integers(0, 5),
    st.sampled_from(["", "a photo of ", "x y "]),
)
def test_any_words_said_four_times_to_the_end_are_a_loop_even_cut_off(
    unit: list[str], times: int, cut: int, start: str
):
    words = unit * times + unit[: cut % len(unit)]

    assert loops(start + " ".join(words))


@given(st.lists(st.sampled_from([f"w{k}" for k in range(30)]), unique=True))
def test_words_that_are_all_different_are_never_a_loop(words: list[str]):
    assert not loops(" ".join(words))


def test_a_reference_that_repeats_itself_excuses_the_output_that_does():
    found = by_name(symptoms(["tick tick tick tick", "a a a a"], ["tick tick tick tick tick", "a clock"]))

    assert found["loop"].indices == (1,)


# ---------------------------------------------------------------------------------------------------------------
# One template


def test_one_caption_for_everything_is_a_template_above_the_share_of_its_reference():
    found = by_name(symptoms(["A blue rectangle."] * 96, EASY_VQA))

    assert found["template"].count == 92  # the 4 most alike references are not held against it
    assert found["template"].example == "A blue rectangle."


def test_a_group_of_outputs_counts_even_when_a_larger_group_is_right():
    references = ["a cat"] * 55 + varied(45)

    found = by_name(symptoms(["a cat"] * 55 + ["a dog"] * 45, references))

    assert found["template"].indices == tuple(range(56, 100))


def test_near_identical_outputs_are_one_template():
    outputs = [f"a close up of a {COLOURS[k % 8]} thing on a table" for k in range(80)]  # 1 of 10 words differs

    assert by_name(symptoms(outputs, varied(80)))["template"].count == 79


@pytest.mark.parametrize(
    ("a", "b", "near"),
    [
        ("one two three four five", "one two three four six", True),  # 1 of 5
        ("one two three four", "one two three six", False),  # 1 of 4
        ("one two three four five", "one two three four", True),  # left out: 1 of 5
        ("one two three four", "four three two one", True),  # order does not count
        ("a a a a b", "a a b b c", False),  # how often a word occurs counts
        ("One two.", "one two", True),
        ("one two three four five six seven eight nine ten", "one two three four five six seven eight x y", True),
        ("one two three four five six seven eight nine", "one two three four five six seven x y", False),
        ("", "", False),
    ],
)
def test_near_identical_is_at_most_one_word_in_five_changed(a: str, b: str, near: bool):
    assert (len(near_identical([a, b])) == 2) is near


@given(TEXTS)
def test_the_near_identical_group_is_what_comparing_all_pairs_by_hand_gives(texts: list[str]):
    def near(a: str, b: str) -> bool:
        x, y = sorted(tokenize(a)), sorted(tokenize(b))
        common = 0
        for word in set(x):
            common += min(x.count(word), y.count(word))
        longer = max(len(x), len(y))
        return bool(x) and bool(y) and 5 * (longer - common) <= longer

    sizes = [sum(near(a, b) for b in texts) for a in texts]

    assert len(near_identical(texts)) == max(sizes)


def test_a_chain_of_small_changes_is_not_one_group():
    words = [f"w{k}" for k in range(100)]
    chain = [" ".join(words[k : k + 10]) for k in range(60)]  # neighbours share 9 of 10 words, ends share none

    assert len(near_identical(chain)) == 5


def test_two_thousand_different_outputs_are_compared_in_seconds():
    references = varied(2000)
    outputs = varied(2000, seed=1)

    start = time.perf_counter()
    found = by_name(symptoms(outputs, references))

    assert found["template"].n == 2000
    assert time.perf_counter() - start < 20  # 1.5 s on one shared core


def test_of_very_many_outputs_a_random_part_is_compared_and_told():
    n = collapse.MAX_COMPARED + 1000
    found = by_name(symptoms(["a cat"] * n, varied(n)))

    template = found["template"]
    assert (template.n, template.count) == (collapse.MAX_COMPARED, collapse.MAX_COMPARED - 1)
    assert f"{collapse.MAX_COMPARED} of {n}" in template.note
    assert max(template.indices) > collapse.MAX_COMPARED  # not merely the first ones
    assert found["empty"].n == n


# ---------------------------------------------------------------------------------------------------------------
# Independent of the image


def test_the_same_answer_for_two_images_is_image_independent_where_the_references_differ():
    references = ["yes"] * 20 + ["no"] * 20
    shown = ["no"] * 10 + ["yes"] * 20 + ["no"] * 10

    found = by_name(symptoms(["Yes."] * 40, references, ["yes"] * 40, other_references=shown))

    assert found["image_independent"].indices == tuple(range(10)) + tuple(range(20, 30))
    assert found["image_independent"].n == 20
    assert found["image_independent"].share == 1.0  # although always "yes" is right half of the time


def test_captions_that_differ_by_the_one_word_the_image_decides_do_look():
    references = [f"a photo of a {c} bird in a tree" for c in COLOURS * 4]
    others = references[1:] + references[:1]

    found = by_name(symptoms(references, references, others, other_references=others))

    assert found["image_independent"].count == 0


def test_pairs_whose_right_answer_is_unknown_are_left_out_and_few_pairs_say_nothing():
    outputs, references = ["x"] * 30, varied(30)
    unknown: list[str | None] = [None] * 18 + varied(12, seed=1)

    found = by_name(symptoms(outputs, references, outputs, other_references=unknown))
    few = by_name(symptoms(outputs, references, outputs, other_references=[None] * 25 + varied(5, seed=1)))

    assert found["image_independent"].indices == tuple(range(18, 30))
    assert "12 of 30" in found["image_independent"].note
    assert "image_independent" not in few


def test_without_the_other_references_every_pair_is_compared_and_that_is_told():
    found = by_name(symptoms(["a cat"] * 20, varied(20), ["a cat"] * 20))

    assert (found["image_independent"].count, found["image_independent"].n) == (20, 20)
    assert "not told" in found["image_independent"].note


def test_outputs_that_are_empty_for_both_images_are_the_business_of_empty():
    found = by_name(symptoms([""] * 20, varied(20), [""] * 20))

    assert found["empty"].count == 20
    assert "image_independent" not in found
    assert found["template"].count == 0


def example(id: str, image: str, question: str, answer: str) -> Example:
    turns = (Turn("user", (ImageSlot(0), question)), Turn("assistant", (answer,)))
    return Example(id, (ImageRef("/data", image),), turns)


def test_what_another_image_shows_is_known_only_for_the_same_question():
    examples = [
        example("0", "red.png", "What colour?", "red"),
        example("1", "blue.png", "What colour?", "blue"),
        example("2", "blue.png", "Is it round?", "yes"),
        example("3", "square.png", "Is it round?", "no"),
    ]
    shown = [Example(e.id, examples[k].images, e.turns) for e, k in zip(examples, (1, 3, 3, 0), strict=True)]

    assert references_shown(examples, shown) == ["blue", None, "no", None]


def test_of_several_references_of_an_image_the_own_one_counts():
    examples = [
        example("0", "a.png", "Say it:", "a cat"),
        example("1", "b.png", "Say it:", "a dog"),
        example("2", "b.png", "Say it:", "A cat."),
    ]
    shown = [Example("0", examples[1].images, examples[0].turns), *examples[1:]]

    assert references_shown(examples, shown)[0] == "A cat."


def test_the_reference_of_a_conversation_is_its_last_answer():
    def talk(id: str, image: str, answer: str) -> Example:
        first = example(id, image, "What colour?", "red")
        return Example(id, first.images, (*first.turns, Turn("user", ("Is it round?",)), Turn("assistant", (answer,))))

    examples = [talk("0", "a.png", "no"), talk("1", "b.png", "yes")]
    shown = [Example(e.id, o.images, e.turns) for e, o in zip(examples, reversed(examples), strict=True)]

    assert references_shown(examples, shown) == ["yes", "no"]


def test_the_references_of_a_real_shuffle_are_those_of_the_images_it_gave():
    examples = [example(str(k), f"{k}.png", "Say it:", f"picture {k}") for k in range(30)]

    shown = shuffle_images(examples, lambda ref: ref.path, 0)
    references = references_shown(examples, shown)

    assert references == [f"picture {Path(e.images[0].path).stem}" for e in shown]
    assert all(r != e.target_text for r, e in zip(references, examples, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Kinds of runs that collapsed


def test_a_run_that_never_looked_is_caught():
    """A connector that passes nothing on: one caption for every image, right for 1 in 24."""
    one = ["A gray rectangle."] * 96

    found = symptoms(one, EASY_VQA, one, other_references=[*EASY_VQA[1:], EASY_VQA[0]])
    worst = collapse.measurements(found)[-1]

    assert worst.name == "collapse.worst"
    assert worst.value == 1.0
    assert len(collapse.findings(found, limit=0.5)) == 2


def test_answers_to_yes_no_questions_that_ignore_the_image_are_caught_at_half_of_them_right():
    """The fine-tuned run whose yes/no accuracy was 83 % with its own image, a zero image and shuffled images."""
    rng = random.Random(0)
    references = [rng.choice(["yes", "no"]) for _ in range(400)]
    other_references = rng.sample(references, 400)
    answers = [rng.choice(["yes", "no"]) for _ in range(400)]  # by the question alone

    found = symptoms(answers, references, answers, other_references=other_references)

    assert by_name(found)["template"].share < 0.5
    assert by_name(found)["image_independent"].share == 1.0


def test_outputs_lost_by_slicing_off_a_prompt_that_is_not_there_are_caught():
    """The seed's empty predictions."""
    found = symptoms(["", "", "", "on a table"] * 16, EASY_VQA[:64])

    assert collapse.findings(found, limit=0.5)[0].startswith("Empty outputs: 48 of 64 outputs (75%")


# ---------------------------------------------------------------------------------------------------------------
# Telling


def test_measurements_have_shares_intervals_and_the_worst_one_by_name():
    found = symptoms(["a a a a"] * 30 + EASY_VQA[:66], EASY_VQA, ids=[f"t{i}" for i in range(96)])
    rows = {m.name: m for m in collapse.measurements(found)}

    assert list(rows) == ["collapse.empty", "collapse.loop", "collapse.template", "collapse.worst"]
    assert rows["collapse.loop"].value == 30 / 96
    assert rows["collapse.worst"].value == rows["collapse.loop"].value == max(m.value for m in rows.values())
    assert rows["collapse.worst"].ci95 == rows["collapse.loop"].ci95
    assert rows["collapse.worst"].caveat == "loop"
    assert all(m.better == "lower" and m.unit == "share" and m.n == 96 for m in rows.values())


def test_no_symptom_is_told_as_none_of_those_that_were_looked_for():
    worst = collapse.measurements(symptoms(EASY_VQA, EASY_VQA))[-1]

    assert worst.value == 0.0
    assert worst.caveat == "none of empty, loop, template was seen"


def test_a_finding_has_number_samples_cause_and_advice_and_only_above_the_limit():
    found = symptoms(["a a a a"] * 30 + [""] * 6 + EASY_VQA[:60], EASY_VQA, ids=[f"t{i}" for i in range(96)])

    lines = collapse.findings(found, limit=0.1)

    assert [line.split(":")[0] for line in lines] == ["Loops", "One template"]
    assert "30 of 96 outputs (31%, 95 % interval 23% to 41%)" in lines[0]
    assert 'such as "a a a a" (samples t0, t1, t2, …). Usual causes: ' in lines[0]
    assert collapse.findings(found, limit=0.3) == lines[:1]


def test_sequences_that_do_not_belong_together_are_our_own_error():
    with pytest.raises(AssertionError, match="2 texts for 3 outputs"):
        symptoms(["a", "b", "c"], ["a", "b"])
    with pytest.raises(AssertionError, match="no outputs"):
        symptoms([], [])
