from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beholder.probes import captions, golden
from beholder.probes.captions import CaptionRecord
from beholder.types import Example, UserError


class Listed:
    """Examples in memory, as the `ExampleSet` that the golden set takes."""

    fingerprint = "list"

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def target_texts(self, indices: Sequence[int] | None = None) -> list[str]:
        return [self.examples[i].target_text for i in (range(len(self)) if indices is None else indices)]


def make(path: Path, bench: Any, candidates: Sequence[int] = range(0, 48, 2), size: int = 7, seed: int = 123):
    buckets = {i: ("short", "medium", "long")[i % 3] for i in range(48)}
    return golden.golden_set(
        path, Listed(bench.held_out), candidates=candidates, bucket_of=buckets, label_len=list(range(48)), size=size,
        seed=seed,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Choosing


@given(
    st.dictionaries(st.integers(0, 300), st.sampled_from(["short", "medium", "long"]), max_size=80),
    st.integers(0, 64),
    st.integers(0, 3),
)
def test_the_choice_is_balanced_deterministic_and_of_the_size_asked_for(buckets: dict[int, str], size: int, seed: int):
    chosen = golden.choose(list(buckets), buckets, size, seed)

    assert len(chosen) == len(set(chosen)) == min(size, len(buckets))
    assert set(chosen) <= set(buckets)
    assert chosen == golden.choose(list(reversed(buckets)), buckets, size, seed)
    have, got = Counter(buckets.values()), Counter(buckets[i] for i in chosen)
    most = max(got.values(), default=0)
    for bucket, available in have.items():  # a bucket has fewer than the others only when it has no more
        assert got[bucket] >= most - 1 or got[bucket] == available


def test_sixty_four_of_three_buckets_are_21_21_22():
    buckets = {i: ("short", "medium", "long")[i % 3] for i in range(600)}

    counts = Counter(buckets[i] for i in golden.choose(range(600), buckets, 64, 123))

    assert sorted(counts.values()) == [21, 21, 22]


def test_another_seed_chooses_others():
    buckets = dict.fromkeys(range(200), "all")

    assert golden.choose(range(200), buckets, 32, 1) != golden.choose(range(200), buckets, 32, 2)


# ---------------------------------------------------------------------------------------------------------------
# Persisting


def test_the_set_is_chosen_once_and_read_back_for_ever(bench: Any, tmp_path: Path):
    path = tmp_path / "deep" / "golden.jsonl"

    first = make(path, bench)
    stored = path.read_bytes()
    again = make(path, bench, size=20, seed=999)  # the file wins over the settings

    assert first == again
    assert path.read_bytes() == stored
    assert {i for i, _ in first} <= set(range(0, 48, 2))
    index, item = first[0]
    assert (item.id, item.gt_text, item.label_len) == (
        bench.held_out[index].id,
        bench.held_out[index].target_text,
        index,
    )
    assert set(json.loads(stored.splitlines()[0])) == {"id", "bucket", "gt_text", "image_relpath", "label_len"}


def test_a_sample_that_is_trained_on_now_is_refused(bench: Any, tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    chosen = make(path, bench)
    leaked = chosen[2][0]

    with pytest.raises(UserError, match=rf"1 of 7 golden samples.*{bench.held_out[leaked].id}.*golden_set_path"):
        make(path, bench, candidates=[i for i in range(0, 48, 2) if i != leaked])


def test_a_sample_whose_text_changed_is_refused(bench: Any, tmp_path: Path):
    path = tmp_path / "golden.jsonl"
    make(path, bench)
    path.write_text(path.read_text().replace(" on white", " on black"))

    with pytest.raises(UserError, match="7 of 7 golden samples"):
        make(path, bench)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", r"golden\.jsonl:2: not valid JSON"),
        ('{"id": "a"}', r"golden\.jsonl:2: expected the fields .*gt_text \(str\).*got id \(str\)"),
        ("[1]", r"golden\.jsonl:2: .*got list"),
        (
            '{"id": "a", "bucket": "b", "gt_text": "c", "image_relpath": "d", "label_len": "e"}',
            r"label_len \(int\).*got.*label_len \(str\)",
        ),
    ],
)
def test_a_malformed_file_names_its_line(tmp_path: Path, line: str, match: str):
    path = tmp_path / "golden.jsonl"
    golden.save(path, [golden.GoldenItem("a", "b", "c", "d", 1)])
    path.write_text(path.read_text() + line + "\n")

    with pytest.raises(UserError, match=match):
        golden.load(path)


# ---------------------------------------------------------------------------------------------------------------
# Captions of a step


def test_the_captions_of_a_step_are_written_with_the_seeds_fields_and_read_back(bench: Any, tmp_path: Path):
    chosen = make(tmp_path / "golden.jsonl", bench)
    records = captions.caption(bench.model, bench.encoder, bench.builder, [bench.held_out[i] for i, _ in chosen])
    path = golden.captions_path(tmp_path / "qual", step=40, size=len(chosen))

    rows = golden.join([item for _, item in chosen], records)
    golden.save(path, rows)

    assert path.name == "step_40_golden7.jsonl"
    assert golden.load_captions(path) == rows
    line = json.loads(path.read_bytes().splitlines()[0])
    assert list(line) == [
        "id", "bucket", "gt_text", "pred_text", "image_relpath", "label_len", "pred_tokens_len", "hash",
    ]  # fmt: skip
    assert line["hash"] == hashlib.sha256(line["pred_text"].encode()).hexdigest()[:16]


def test_the_difference_of_two_steps_is_the_captions_that_changed():
    items = [golden.GoldenItem(id, "short", "gt", "p.png", 3) for id in "abc"]

    def step(*texts: str) -> list[golden.GoldenCaption]:
        records = [CaptionRecord(i, "gt", t, "correct", 1) for i, t in zip("abc", texts, strict=True)]
        return golden.join(items, records)

    changed = golden.diff(step("x", "y", "z"), step("x", "Y", "z"))

    assert [(a.id, a.pred_text, b.pred_text) for a, b in changed] == [("b", "y", "Y")]
    with pytest.raises(UserError, match="different golden sets"):
        golden.diff(step("x", "y", "z"), step("x", "y", "z")[:2])
