"""The catalogue and what really is measured: the same names, units and directions, and no row for nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest

from beholder.config import RETAINED, SHARES, STAGES, STRENGTH_LINE, WATCHED
from beholder.evidence import Measurement
from beholder.evidence.catalogue import ALL_CONDITIONS, CATALOGUE, called, quantity, unit_of
from beholder.probes.hallucination import load_objects, score_chair
from beholder.studies.frontier import KEPT
from beholder.use.score import Kind, score_files

SOURCES = Path(__file__).parents[2] / "src" / "beholder"


def test_the_config_knows_which_monitors_are_shares() -> None:
    assert {name for name in (*WATCHED, *RETAINED) if quantity(name)[0].unit == "share"} == SHARES


def strangers(measured: Iterable[Measurement]) -> list[str]:
    """Measurements without a row, or whose unit or direction is not the one of their row."""
    found = ((m, *quantity(m.name)) for m in measured)
    return [
        f"{m.name}: {m.unit}, better {m.better}"
        for m, row, condition in found
        if row not in CATALOGUE or (m.unit, m.better) != (row.unit, row.direction(condition))
    ]


@pytest.mark.parametrize(
    ("kind", "said", "right"),
    [
        ("vqa", ["a dog", "two"], [["a dog"] * 10, ["three"] * 10]),
        ("pope", ["yes", "no"], ["yes", "yes"]),
        ("caption", ["a red dog", "two cats"], ["a red dog", "three cats"]),
        ("instructions", ["a red dog", "two cats"], ["a red dog", "three cats"]),
    ],
)
def test_scores_of_answer_files_have_their_rows(kind: Kind, said: list[str], right: list[object], tmp_path: Path):
    files = tmp_path / "said.json", tmp_path / "right.json"
    for file, field, values in zip(files, ("answer", "answers"), (said, right), strict=True):
        file.write_text(json.dumps([{"id": k, "instruction": "What is it?", field: v} for k, v in enumerate(values)]))

    measured = score_files(kind, *files).measurements

    assert measured and strangers(measured) == []


def test_named_objects_have_their_rows():
    rows = [SimpleNamespace(reference="a cat", prediction=text) for text in ("a cat", "a dog")]

    measured = score_chair({"correct": rows, "zero": rows}, load_objects()).measurements

    assert len(measured) == 4 and strangers(measured) == []


def test_every_row_is_named_where_something_is_measured():
    text = " ".join(
        f.read_text(encoding="utf-8")
        for f in SOURCES.rglob("*.py")
        if f.relative_to(SOURCES).parts[0] not in ("evidence", "report", "config", "studies")
    )
    words = set(re.findall(r"[a-z_0-9]+", text))

    for row in CATALOGUE:
        if row.stem in STRENGTH_LINE.values():
            continue  # made and called by what stands there
        if row.stem == KEPT.measure:
            continue  # a study makes it, of two runs
        parts = row.stem.replace("bleu1", "bleu").split(".")
        assert {re.sub(r"(?<=bleu)\d", "", part) for part in parts} <= words, row.pattern


def test_what_the_stages_gates_judge_is_in_the_catalogue():
    assert {
        g.measure for g in STAGES["instruct"].gates.values() if quantity(str(g.measure))[0] not in CATALOGUE
    } == set()


def test_no_two_rows_share_a_name_or_a_place_among_the_key_numbers():
    names = Counter(row.stem for row in CATALOGUE)
    headlines = [row.headline for row in CATALOGUE if row.headline is not None]

    assert max(names.values()) == 1
    for places in ([h.caption for h in headlines], [h.answer for h in headlines]):
        taken = sorted(p for p in places if p)
        assert taken == list(range(1, len(taken) + 1))


def test_a_condition_is_told_where_the_words_have_a_place_for_it():
    for row in CATALOGUE:
        told = {row.called(c, "caption") for c in ALL_CONDITIONS}
        assert len(told) == (len(ALL_CONDITIONS) if "<image>" in row.words else 1)
        assert not any("<" in words for words in (*told, row.called("", "answer")))


@pytest.mark.parametrize("name", ["my.own.metric", "caption.mine.correct", "eval", "pope", ""])
def test_a_name_without_a_row_is_called_by_itself(name: str):
    assert called(name) == called(name, "answer") == name
    assert unit_of(name, "share") == "share"
    assert quantity("caption.mine.correct")[0].section == "written"
