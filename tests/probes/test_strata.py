from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.probes import strata
from beholder.types import Example, ImageRef, ImageSlot, Turn


def talk(id: str, *rounds: tuple[str, str]) -> Example:
    turns: list[Turn] = []
    for k, (question, answer) in enumerate(rounds):
        turns.append(Turn("user", (ImageSlot(0), "\n", question) if k == 0 else (question,)))
        turns.append(Turn("assistant", (answer,)))
    return Example(id, (ImageRef("root", id),), tuple(turns))


def test_every_turn_gets_its_length_turn_question_and_answer_stratum():
    examples = [talk(str(k), ("What colour is it?", "Red."), ("Is it big?", "no")) for k in range(20)]
    examples.append(talk("odd", ("How many?", "Two")))

    groups = strata.groups_of(examples, ["short"] * 20 + ["long"])

    assert groups["length"][0] == ["short", "short"] and groups["length"][20] == ["long"]
    assert groups["turn"][0] == ["first turn", "later turns"] and groups["turn"][20] == ["first turn"]
    assert groups["question"][0] == ["what colour", "is it"]
    assert groups["question"][20] == ["other questions"]  # one is too few for a group of its own
    assert groups["answer"][0] == ["other answers", "yes/no"] and groups["answer"][20] == ["number"]


def test_a_data_sets_own_kinds_go_before_the_words():
    colour = [replace(talk(f"c{k}", ("is it red", "yes")), question_type="color") for k in range(20)]
    yes_no = [replace(talk(f"y{k}", ("is it red", "yes")), question_type="yes/no") for k in range(20)]
    rare = [replace(talk("r", ("what is it", "a")), question_type="rare", answer_type="other")]

    groups = strata.groups_of([*colour, *yes_no, *rare], ["short"] * 41)

    assert groups["question"] == [["color"]] * 20 + [["yes/no questions"]] * 20 + [["other questions"]]
    assert groups["answer"] == [["yes/no"]] * 40 + [["other answers"]]


def test_what_a_data_set_says_of_the_question_is_about_the_last_answer():
    examples = [
        replace(talk(str(k), ("what is it", "a dog"), ("and here", "3")), question_type="count", answer_type="digit")
        for k in range(20)
    ]

    groups = strata.groups_of(examples, ["digit"] * 20)

    assert groups["question"] == [["what is", "count"]] * 20
    assert groups["answer"] == [["other answers", "digit answers"]] * 20  # "digit" is a length bucket here


def test_a_question_that_few_samples_ask_often_is_rare():
    """Twenty turns of one sample share an image: they are no group that could be judged."""
    examples = [talk("chatty", *[("Is it big?", "no")] * 20), *(talk(str(k), ("What is it?", "a")) for k in range(20))]

    groups = strata.groups_of(examples, ["short"] * 21)

    assert groups["question"] == [["other questions"] * 20, *[["what is"]] * 20]


@pytest.mark.parametrize(
    ("question", "head"),
    [
        ("What colour is the dog?", "what colour"),
        ("  WHAT, colour?", "what colour"),
        ("¿Qué color tiene?", "qué color"),
        ("Why?", "why"),
        ("- (a) what's it", "a what's"),
        ("Short", "short …"),  # not to be taken for the length bucket
        ("First turn", "first turn …"),
        ("Number", "number …"),
        ("", None),
        ("?!", None),
    ],
)
def test_a_question_is_known_by_its_first_two_words(question: str, head: str | None):
    groups = strata.groups_of([talk(str(k), (question, "a")) for k in range(20)], ["short"] * 20)

    assert groups["question"] == [[head]] * 20


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("yes", "yes/no"), ("No.", "yes/no"), ("Yes, there is a dog.", "yes/no"),
        ("No people are visible", "other answers"),
        ("Yesterday", "other answers"), ("3", "number"), ("12.5 %", "number"), ("-4", "number"), ("10:30", "number"),
        ("Two.", "number"), ("twenty-one", "number"), ("two dogs", "other answers"), ("3 dogs", "other answers"),
        ("A blue rectangle.", "other answers"), ("", "other answers"), ("...", "other answers"),
    ],
)  # fmt: skip
def test_answers_have_the_types_of_vqa(answer: str, kind: str):
    assert strata.answer_type(answer) == kind


def test_what_the_user_says_in_several_turns_is_one_question_and_the_system_says_none():
    turns = (
        Turn("system", ("Be brief.",)), Turn("user", (ImageSlot(0),)), Turn("user", ("what shape",)),
        Turn("assistant", ("a dot",)), Turn("assistant", ("really",)),
    )  # fmt: skip

    assert [q.strip() for q in strata.questions(Example("a", (ImageRef("r", "p"),), turns))] == ["what shape", ""]


TEXT = st.sampled_from(
    [
        "short",
        "long",
        "first turn",
        "later turns",
        "yes/no",
        "number",
        "other answers",
        "other questions",
        "what is",
        "",
    ]
)


@given(st.lists(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), max_size=30), st.data(), TEXT, TEXT)
@settings(deadline=None)  # a busy machine is no failure
def test_groupings_cover_every_turn_and_share_no_name(
    talks: list[list[tuple[str, str]]], data: st.DataObject, question_type: str, answer_type: str
):
    examples = [talk(str(k), *rounds) for k, rounds in enumerate(talks * 5)]  # heads often enough to have a group
    examples[::3] = [replace(e, question_type=question_type, answer_type=answer_type) for e in examples[::3]]
    buckets = data.draw(st.lists(st.sampled_from(["short", "long"]), min_size=len(examples), max_size=len(examples)))

    groups = strata.groups_of(examples, buckets)

    names: set[str] = set()
    for per_sample in groups.values():
        assert [len(turns) for turns in per_sample] == [len(e.turns) // 2 for e in examples]
        own = {s for turns in per_sample for s in turns if s is not None}
        assert names.isdisjoint(own)
        names |= own
    per_sample = [set(turns) - {None, "other questions"} for turns in groups["question"]]
    for head in set().union(*per_sample):
        assert sum(head in own for own in per_sample) >= strata.MIN_SAMPLES


def test_the_parts_of_a_grouping_are_its_strata_by_name_and_a_single_one_says_nothing():
    found = [(by, name, k.tolist()) for by, name, k in strata.parts(["b", None, "a", "b"], "question")]

    assert found == [("question", "a", [2]), ("question", "b", [0, 3])]
    assert list(strata.parts(["a", None, "a"], "question")) == [] == list(strata.parts([], "question"))
