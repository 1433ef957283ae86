from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.evidence import Condition
from beholder.probes.hallucination import ChairSums, chair, load_objects, parse_objects, plural, score_chair
from beholder.types import UserError

VECTORS = json.loads((Path(__file__).parent / "data" / "chair_vectors.json").read_text("utf-8"))
"""Objects and CHAIR by the official code; the field ``how`` says at which commit and how."""

COCO = load_objects()
SMALL = parse_objects("dog: puppy, hound\ncat: kitten\nhot dog:\nball: tennis ball\norange\n-: dog house", "small")


@dataclass(frozen=True)
class Row:
    reference: str
    prediction: str


# ---------------------------------------------------------------------------------------------------------------
# Finding objects


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("A puppy and two kittens.", ["dog", "cat"]),
        ("a dog, a dog and the dog's ball", ["dog", "dog", "dog", "ball"]),
        ("a hot dog", ["hot dog"]),
        ("HOT-DOGS and tennis balls", ["hot dog", "ball"]),
        ("a dog house beside a dog", ["dog"]),
        ("a dog/cat photo", ["dog", "cat"]),
        ("a dog-shaped balloon, dogged, catalogue, category", []),
        ("an orange cat with oranges and an orange", ["cat", "orange", "orange"]),
        ("", []),
    ],
)
def test_objects_are_found_by_synonym_plural_and_longest_phrase(text: str, names: list[str]):
    assert SMALL.find(text) == names


@pytest.mark.parametrize(
    ("one", "many"),
    [
        ("dog", "dogs"), ("bus", "buses"), ("baby", "babies"), ("toy", "toys"), ("wine glass", "wine glasses"),
        ("knife", "knives"), ("policeman", "policemen"), ("businesswoman", "businesswomen"), ("human", "humans"),
        ("person", "people"), ("mouse", "mice"), ("sheep", "sheep"), ("bench", "benches"), ("potato", "potatoes"),
        ("hair dryer", "hair dryers"),
    ],
)  # fmt: skip
def test_plurals(one: str, many: str):
    assert plural(one) == many


@given(st.lists(st.sampled_from(sorted(COCO.forms)), max_size=4))
def test_every_spelling_of_the_list_is_found_as_its_object(forms: list[str]):
    text = ", then ".join(forms)  # words that no phrase of the list has, so mentions cannot merge

    assert COCO.find(text) == [COCO.forms[f] for f in forms if COCO.forms[f] != "-"]


def test_the_default_list_has_cocos_80_objects():
    assert len(COCO.names) == 80
    assert {"person", "traffic light", "hair drier", "toothbrush", "tv"} <= set(COCO.names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dog: puppy\ncat, kitten\n", r"mine: line 2: 'cat, kitten' is not 'name: synonym, synonym'"),
        (": puppy", r"line 1"),
        ("dog: puppy\n\n# cats\ncat: puppy", r"line 4: .*'puppy' belongs to 'dog' already \(line 1\)"),
        ("dog: a\ndog: b", r"line 2: .*'dog' has a line already \(line 1\)"),
        ("dog: a,, b", r"line 1: .*empty synonym"),
        ("dog: ?!", r"line 1: .*'\?!' has no word"),
        ("# nothing\n-: train track", r"mine: there is no object in it"),
    ],
)
def test_a_list_that_cannot_be_meant_is_refused_with_its_line(text: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_objects(text, "mine")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    (tmp_path / "bad.txt").write_bytes(b"dog\xff")
    (tmp_path / "good.txt").write_bytes(b"\xef\xbb\xbfdog: puppy\r\ncat\r\n")

    with pytest.raises(UserError, match=r"none\.txt.*No such file"):
        load_objects(tmp_path / "none.txt")
    with pytest.raises(UserError, match=r"bad\.txt.*not UTF-8"):
        load_objects(tmp_path / "bad.txt")
    assert load_objects(tmp_path / "good.txt").names == ("dog", "cat")


# ---------------------------------------------------------------------------------------------------------------
# CHAIR

DIFFERENT = {
    # The official singularize makes "bu" of "bus"; "surfer" is not in its list.
    "a bus and a truck and a car and a bus", "a bus on the street", "a bus behind a car", "a bus and a taxi",
    "a surfer carries a surfboard",
    # Spellings it has no synonym for, or reads as two objects.
    "a hotdog with mustard", "scissors in a mug", "a hair dryer by the sink", "a fire-hydrant and a teddy-bear",
    "a kitchen with a stove, a fridge and a microwave oven",
    # A colour it takes for the fruit.
    "an orange cat", "an orange tabby sleeps on the couch",
}  # fmt: skip
"""Captions of the vectors in which the official code finds other objects."""


def test_objects_of_captions_are_those_of_the_official_code():
    differs: set[str] = set()
    for row in VECTORS["rows"]:
        if COCO.find(row["prediction"]) != row["said"]:
            differs.add(row["prediction"])
        known = [r for r in row["references"] if r not in DIFFERENT]
        found = {name for r in known for name in COCO.find(r)}
        assert found <= set(row["there"]), row
        if known == row["references"]:
            assert found == set(row["there"]), row

    assert differs == DIFFERENT & {row["prediction"] for row in VECTORS["rows"]}
    assert len(VECTORS["rows"]) == 54


def test_chair_is_that_of_the_official_code_where_the_objects_are():
    rows = [r for r in VECTORS["rows"] if not DIFFERENT.intersection([r["prediction"], *r["references"]])]
    official = [len(r["invented"]) for r in rows], [len(r["said"]) for r in rows]

    sums = chair([r["prediction"] for r in rows], [r["references"] for r in rows], COCO)

    assert len(rows) >= 40
    assert sums.invented.tolist() == official[0] and sums.mentions.tolist() == official[1]
    assert np.mean(sums.invented > 0) == np.mean([k > 0 for k in official[0]])
    assert sums.i == sum(official[0]) / sum(official[1])


def test_corpus_chair_is_that_of_the_official_code():
    """Its own counts of every caption, summed by us."""
    invented = np.array([len(r["invented"]) for r in VECTORS["rows"]])
    mentions = np.array([len(r["said"]) for r in VECTORS["rows"]])

    sums = ChairSums(mentions, invented, np.ones(len(mentions), dtype=bool))

    assert np.mean(sums.invented > 0) == pytest.approx(VECTORS["chair_s"], abs=1e-12)
    assert sums.i == pytest.approx(VECTORS["chair_i"], abs=1e-12)


def test_an_object_of_any_reference_is_not_invented():
    sums = chair(["a dog and a cat", "a ball"], [["a puppy", "a kitten"], ["nothing"]], SMALL)

    assert sums.invented.tolist() == [0, 1]
    assert sums.grounded.tolist() == [True, False]


def test_measurements_carry_intervals_and_say_what_they_are_shares_of():
    rows = [Row("a dog", "a dog"), Row("a dog", "a cat and a dog"), Row("a cat", "a tree"), Row("a ball", "a cat")]
    by: dict[Condition, list[Row]] = {"correct": rows, "zero": [Row(r.reference, "a cat") for r in rows]}

    found = score_chair(by, SMALL)
    m = {x.name: x for x in found.measurements}

    assert found.gaps == []
    assert m["chair.s.correct"].value == 2 / 4 and m["chair.i.correct"].value == 2 / 4
    assert m["chair.s.zero"].value == m["chair.i.zero"].value == 3 / 4
    assert m["chair.s.correct"].better == "lower" and m["chair.s.zero"].better == "none"
    for x in m.values():
        assert x.ci95 is not None and x.ci95[0] <= x.value <= x.ci95[1]
    assert "4 of 4 references name one" in (m["chair.i.correct"].caveat or "")
    assert score_chair(by, SMALL) == found


def test_captions_or_references_that_name_nothing_give_no_number_but_a_reason():
    by: dict[Condition, list[Row]] = {
        "correct": [Row("a dog", "a tree"), Row("a cat", "")],
        "zero": [Row("a tree", "a dog"), Row("", "a dog")],
        "noise": [],
    }

    found = score_chair(by, SMALL)

    assert found.measurements == []
    silent, ungrounded, empty = found.gaps
    assert "none of the 2 captions mention an object of small" in silent
    assert "none of the 2 references name an object" in ungrounded
    assert "noise" in empty and "no captions" in empty
