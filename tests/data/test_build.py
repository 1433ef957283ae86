"""`build_data`: what is held out is decided by content and by its own seed, and told where it differs from the wish."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beholder.config import RunConfig
from beholder.data import Data, build_data
from beholder.data.images import content_hash
from beholder.prepare.tiny import colour_source
from beholder.types import Example, ImageGeometry, UserError

GEOMETRY = ImageGeometry(32, 32, 4, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def open_data(tiny_config: Callable[..., RunConfig], tiny_parts: Any, tmp_path: Path) -> Callable[..., Data]:
    def make(progress: Any = None, split_file: Path | None = None, **sets: Any) -> Data:
        cfg = tiny_config(tmp_path, **sets)
        return build_data(cfg, tiny_parts.tokenizer, GEOMETRY, 4, split_file=split_file, progress=progress)

    return make


def content(examples: list[Example]) -> set[str]:
    return {content_hash(ref) for example in examples for ref in example.images}


def trained_on(data: Data) -> list[Example]:
    return [data.records[int(i)] for i in data.train.indices]


@pytest.fixture
def sources(tiny_parts: Any, tmp_path: Path) -> dict[str, dict[str, str]]:
    """The tiny records, and the same with copies of the images under other names in another folder."""
    copies = tmp_path / "copies"
    copies.mkdir()
    with (tmp_path / "copies.jsonl").open("w", encoding="utf-8") as file:
        for line in tiny_parts.records.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            key = "images" if "images" in record else "image"
            name = record[key][0] if isinstance(record[key], list) else record[key]
            copy = hashlib.sha256(name.encode()).hexdigest()[:12] + ".jpg"
            shutil.copy(tiny_parts.images / name, copies / copy)
            file.write(json.dumps({**record, "id": f"again-{record.get('id')}", key: [copy]}) + "\n")
    return {
        "first": {"dataset": "jsonl", "json_path": str(tiny_parts.records), "image_root": str(tiny_parts.images)},
        "again": {"dataset": "jsonl", "json_path": str(tmp_path / "copies.jsonl"), "image_root": str(copies)},
    }


FROM_SOURCES: dict[str, Any] = {"data__json_path": None, "data__image_root": None}


def test_no_image_is_on_both_sides_under_another_name(open_data: Any, sources: Any) -> None:
    data = open_data(**FROM_SOURCES, data__sources=[sources["first"], sources["again"]], data__eval_size=6)

    train, held_out = trained_on(data), data.eval_examples
    assert len(held_out) == 6 and train
    assert not content(train) & content(held_out)
    assert data.counts.rejects["held_out_image"] >= 6, "at least the other copy of each"
    assert len(train) + len(held_out) + data.counts.rejects["held_out_image"] == 144


def test_images_of_eval_sources_leave_training_by_content(open_data: Any, sources: Any, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text("".join((tmp_path / "copies.jsonl").read_text().splitlines(keepends=True)[:5]))
    eval_source = {**sources["again"], "json_path": str(few)}

    data = open_data(
        **FROM_SOURCES, data__sources=[sources["first"]], data__eval_sources=[eval_source], data__eval_size=None
    )

    assert len(data.eval_examples) == 5
    assert not content(trained_on(data)) & content(data.eval_examples)
    rejected = [r for r in data.rejects if r.reason == "held_out_image"]
    assert len(rejected) == 72 - len(trained_on(data)) >= 5


def test_when_every_image_is_held_out_the_error_says_so(open_data: Any, sources: Any) -> None:
    with pytest.raises(UserError, match=r"all 72 training samples show an image of data\.eval_sources"):
        open_data(
            **FROM_SOURCES,
            data__sources=[sources["first"]],
            data__eval_sources=[sources["again"]],
            data__eval_size=None,
        )


def test_without_a_look_at_images_they_are_told_apart_by_place_and_that_is_told(open_data: Any, sources: Any) -> None:
    both = {"data__sources": [sources["first"], sources["again"]], "data__eval_size": 6}

    looked = open_data(**FROM_SOURCES, **both)
    blind = open_data(**FROM_SOURCES, **both, data__verify_images="none")

    assert looked.counts.split_notes == []
    assert "verify_images is none" in blind.counts.split_notes[0]
    assert content(trained_on(blind)) & content(blind.eval_examples)


def test_eval_size_beyond_the_eval_sources_is_an_error_with_both_numbers(open_data: Any, sources: Any) -> None:
    with pytest.raises(UserError, match=r"eval_size is 73, but data\.eval_sources hold 72 usable samples"):
        open_data(
            **FROM_SOURCES,
            data__sources=[sources["first"]],
            data__eval_sources=[sources["again"]],
            data__eval_size=73,
        )


def test_the_split_seed_and_not_the_seed_decides_what_is_held_out(open_data: Any) -> None:
    def ids(data: Data) -> list[str]:
        return [e.id for e in data.eval_examples]

    def order(data: Data) -> list[str]:
        return [data.train.example_at(p).id for p in range(20)]

    a = open_data(seed=1, data__split_seed=9, data__max_samples=60)
    b = open_data(seed=2, data__split_seed=9, data__max_samples=60)
    c = open_data(seed=1, data__split_seed=8, data__max_samples=60)

    assert ids(a) == ids(b) != ids(c)
    assert sorted(e.id for e in trained_on(a)) == sorted(e.id for e in trained_on(b))
    assert order(a) != order(b)


def test_a_short_bucket_is_told_and_an_empty_one_is_an_error(open_data: Any, tmp_path: Path) -> None:
    lengths = sorted(open_data().hygiene.target_tokens.tolist())
    middle, longest = lengths[36], lengths[-1]
    few = lengths.count(longest)
    stratified = {"data__split_mode": "stratified_len", "data__eval_size": 3 * (few + 1)}

    short = open_data(**stratified, data__len_buckets=[0, middle, longest - 1, 9999])

    (note,) = short.counts.split_notes
    assert f"bucket long ({longest} tokens or more): {few} held-out samples instead of {few + 1}" in note
    assert len(short.eval_examples) == 3 * (few + 1)
    with pytest.raises(
        UserError, match=rf"bucket long \({longest + 1} tokens or more\): the targets have {lengths[0]} "
    ):
        open_data(**stratified, data__len_buckets=[0, middle, longest, 9999])


def test_a_saved_split_is_read_and_one_drawn_by_another_rule_is_refused(open_data: Any, tmp_path: Path) -> None:
    file = tmp_path / "split.json"
    first = open_data(split_file=file)

    assert open_data(split_file=file).split.eval.tolist() == first.split.eval.tolist()
    with pytest.raises(UserError, match=r"same_image: 'content' → 'place'"):
        open_data(split_file=file, data__verify_images="none")


def test_progress_reaches_its_total_in_the_content_pass(open_data: Any) -> None:
    ticks: list[tuple[str, int, int]] = []

    open_data(progress=lambda *tick: ticks.append(tick))

    for phase in ("images", "duplicates", "held-out images"):
        assert (
            [done for what, done, total in ticks if what == phase][-1] == [t for w, _, t in ticks if w == phase][-1] > 0
        )


def test_instruction_data_is_opened_by_its_stages_rules_and_inserted_markers_are_counted(
    open_data: Any, tmp_path: Path
) -> None:
    source = colour_source(tmp_path / "talk", "llava_instruct", 24)
    conversations = json.loads(Path(source.json_path).read_text())
    for record in conversations[:10]:
        record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
    conversations[20]["conversations"].pop(0)
    Path(source.json_path).write_text(json.dumps(conversations))

    data = open_data(
        stage="instruct", model__lora={"enable": True}, prompting__max_images_per_sample=1,
        data__dataset="llava_instruct", data__json_path=source.json_path, data__image_root=source.image_root,
        data__len_buckets=[0, 64, 128, 999999], data__split_mode="stratified_len", data__eval_size=6,
        data__hygiene={},
    )  # fmt: skip

    assert data.counts.inserted_markers == 10
    assert data.counts.rejects["starts_with_assistant"] == 1
    assert data.counts.eval_buckets == dict.fromkeys(("short", "medium", "long"), 2)
    for example, bucket, length in zip(data.eval_examples, data.eval_buckets, data.eval_label_len, strict=True):
        said = "\n".join(t.text for t in example.turns if t.role == "assistant")
        assert length == len(said), "a byte a token: all the assistant says"
        assert bucket == ("short" if length <= 64 else "medium" if length <= 128 else "long")
