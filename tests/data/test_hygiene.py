"""Hygiene: every record is accepted or named with a reason; lengths, duplicates and caps are what they say."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beholder.config import HygieneLimits, SourceConfig
from beholder.data import hygiene, index
from beholder.data.hygiene import HygieneReport, apply_hygiene, count_tokens, find_duplicates, length_histogram
from beholder.data.sources import Records, open_sources
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import UserError

ANY_LENGTH = HygieneLimits(min_tokens=0, max_tokens=10**6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One ASCII character is one token."""
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def records_of(folder: Path, captions: list[str], *, source: list[str] | None = None, **config: Any) -> Records:
    for i in range(len(captions)):
        if not (folder / f"{i}.png").exists():
            Image.new("RGB", (4, 4), (i, 0, 0)).save(folder / f"{i}.png")
    lines = [
        {"id": f"r{i}", "images": [f"{i}.png"], "caption": c, "source": source[i] if source else None}
        for i, c in enumerate(captions)
    ]
    path = folder / "a.jsonl"
    path.write_bytes(b"\n".join(orjson.dumps(line) for line in lines))
    return open_sources(
        [SourceConfig(json_path=str(path), **config)], image_token="<image>", max_images=2, on_reject="error"
    )


def reasons(report: HygieneReport) -> dict[str, str]:
    return {r.id: r.reason for r in report.rejects}


# ---------------------------------------------------------------------------------------------------------------
# Captions


def test_captions_are_rejected_for_the_first_reason_that_applies(tmp_path: Path, tokenizer: Any) -> None:
    captions = ["", " \n", "tiny", "x" * 61, "a stock  photo of a cat", "a fine caption", "a fine caption", "exact"]
    cfg = HygieneLimits(duplicates="reject_exact")

    report = apply_hygiene(records_of(tmp_path, captions), tokenizer, cfg)

    assert reasons(report) == {
        "r0": "empty_caption", "r1": "empty_caption", "r2": "too_short", "r3": "too_long", "r4": "spam",
        "r6": "duplicate_exact",
    }  # fmt: skip
    assert report.accepted.tolist() == [5, 7]
    assert report.target_tokens.tolist() == [len(c) for c in captions]
    assert report.counts == {"records": 8, "accepted": 2, **Counter(reasons(report).values())}


def test_rejects_name_file_row_and_the_limit(tmp_path: Path, tokenizer: Any) -> None:
    (reject,) = apply_hygiene(records_of(tmp_path, ["a good caption", "no"]), tokenizer, HygieneLimits()).rejects

    assert (reject.id, reject.row, reject.file) == ("r1", 1, str(tmp_path / "a.jsonl"))
    assert reject.detail == "2 tokens, hygiene.min_tokens is 5: 'no'"


@pytest.mark.parametrize(("tokens", "kept"), [(4, False), (5, True), (60, True), (61, False)])
def test_both_length_limits_are_inclusive(tmp_path: Path, tokenizer: Any, tokens: int, kept: bool) -> None:
    report = apply_hygiene(records_of(tmp_path, ["x" * tokens]), tokenizer, HygieneLimits())

    assert len(report.accepted) == kept


@pytest.mark.parametrize(
    ("text", "spam"),
    [
        ("Free DOWNLOAD now", True), ("click\there", True), ("a Stock-photo", False), ("watermark.", True),
        ("watermarked", False), ("unwatermark", False), ("downloadable", False), ("clicking to", False),
        ("photo stock", False), ("royalty free", True), ("downloadable, download", True),
    ],
)  # fmt: skip
def test_spam_phrases_match_whole_words_in_any_case(tmp_path: Path, text: str, spam: bool) -> None:
    report = apply_hygiene(records_of(tmp_path, [text]), None, ANY_LENGTH)

    assert (reasons(report) == {"r0": "spam"}) == spam


def test_without_spam_phrases_nothing_is_spam(tmp_path: Path) -> None:
    cfg = HygieneLimits(spam=("", " "))

    assert not apply_hygiene(records_of(tmp_path, ["click here"]), None, cfg).rejects


def test_without_a_tokenizer_lengths_are_words_and_limits_do_not_apply(tmp_path: Path) -> None:
    report = apply_hygiene(records_of(tmp_path, ["one", "one two three " * 50]), None, HygieneLimits())

    assert report.unit == "words"
    assert report.target_tokens.tolist() == [1, 150]
    assert len(report.accepted) == 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text() | st.sampled_from(["<|im_end|>", "<|endoftext|> x", "a <image>"]), max_size=8))
def test_token_counts_are_those_of_the_tokenizer_with_control_tokens_as_text(tokenizer: Any, texts: list[str]) -> None:
    expected = [len(tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"]) for t in texts]

    assert count_tokens(texts, tokenizer).tolist() == expected
    assert expected == [len(t.encode("utf-8")) for t in texts]  # the byte vocabulary is an oracle of its own


def test_counting_neither_obeys_nor_changes_padding_and_truncation_of_the_tokenizer(tmp_path: Path) -> None:
    own = tiny_tokenizer(tmp_path / "t")
    own.backend_tokenizer.enable_truncation(3)
    own.backend_tokenizer.enable_padding(length=10)
    before = own.backend_tokenizer.to_str()

    assert count_tokens(["x", "xxxxxx"], own).tolist() == [1, 6]
    assert own.backend_tokenizer.to_str() == before


def test_large_counts_are_cached_by_tokenizer_and_texts(
    tmp_path: Path, tokenizer: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hygiene, "_CACHE_FROM", 3)
    texts = ["a", "bb", "ccc"]
    count_tokens(texts, tokenizer)
    (entry,) = own_cache.iterdir()
    stored = {"tokens": np.array([7, 7, 7], np.int32)}
    index.cache_save(entry.stem, stored, None)

    assert count_tokens(texts, tokenizer).tolist() == [7, 7, 7]  # read, not counted
    assert count_tokens(["a", "bb", "cccc"], tokenizer).tolist() == [1, 2, 4]
    assert count_tokens(texts, tiny_tokenizer(tmp_path / "other", "llama")).tolist() == [1, 2, 3]


def test_the_histogram_counts_every_record_once() -> None:
    lengths = np.array([0, 1, 4, 5, 9, 10, 12, 700], np.int32)

    bins = length_histogram(lengths)

    assert sum(n for _, _, n in bins) == len(lengths)
    assert bins[0] == (0, 0, 1) and bins[1] == (1, 4, 2) and bins[-1] == (500, 700, 1)
    assert all(n == ((lengths >= low) & (lengths <= high)).sum() for low, high, n in bins)
    assert length_histogram(lengths[:0]) == []


# ---------------------------------------------------------------------------------------------------------------
# Images


@pytest.fixture
def with_bad_images(tmp_path: Path) -> Records:
    records = records_of(tmp_path, [f"caption number {i}" for i in range(8)])
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"")
    (tmp_path / "3.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    Image.effect_noise((60, 60), 90).save(tmp_path / "4.png")
    (tmp_path / "4.png").write_bytes((tmp_path / "4.png").read_bytes()[:900])
    (tmp_path / "5.png").write_bytes(b"not an image")
    (tmp_path / "6.png").unlink()
    (tmp_path / "6.png").symlink_to("/etc/hostname")
    Image.new("1", (9000, 9000)).save(tmp_path / "7.png")
    return records


EXISTS = {"r1": "missing_image", "r2": "empty_image", "r3": "not_a_file", "r6": "outside_root"}
DECODE = {**EXISTS, "r4": "truncated_image", "r5": "not_an_image", "r7": "too_many_pixels"}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("verify", "expected"), [("none", {}), ("exists", EXISTS), ("decode", DECODE)])
def test_bad_images_are_counted_rejects_under_policy_skip(
    with_bad_images: Records, verify: Any, expected: dict[str, str]
) -> None:
    report = apply_hygiene(with_bad_images, None, ANY_LENGTH, verify_images=verify, on_bad_image="skip")

    assert reasons(report) == expected
    assert len(report.accepted) + len(expected) == 8
    assert (report.image_facts is None) == (verify != "decode")


@pytest.mark.timeout(30)
def test_bad_images_stop_with_their_names_under_policy_error(with_bad_images: Records) -> None:
    with pytest.raises(UserError) as caught:
        apply_hygiene(with_bad_images, None, ANY_LENGTH, verify_images="decode")

    message = str(caught.value)
    for part in ("7 of 8 records", "record 1 (id 'r1')", "missing_image", "on_bad_image: skip", "and 2 more"):
        assert part in message


def test_an_image_that_two_records_share_is_judged_for_both(tmp_path: Path) -> None:
    lines = [{"id": str(i), "images": ["gone.png", "x.png"], "caption": f"c {i}"} for i in range(3)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(orjson.dumps(line) for line in lines))
    source = SourceConfig(json_path=str(tmp_path / "a.jsonl"))
    records = open_sources([source], image_token="<image>", max_images=2, on_reject="error")

    for verify in ("exists", "decode"):
        report = apply_hygiene(records, None, ANY_LENGTH, verify_images=verify, on_bad_image="skip")
        assert reasons(report) == dict.fromkeys("012", "missing_image")


def test_a_duplicate_of_a_record_with_a_bad_image_is_kept(tmp_path: Path) -> None:
    records = records_of(tmp_path, ["the same caption"] * 3)
    (tmp_path / "0.png").unlink()
    cfg = HygieneLimits(duplicates="reject_exact")

    report = apply_hygiene(records, None, cfg, on_bad_image="skip")

    assert reasons(report) == {"r0": "missing_image", "r2": "duplicate_exact"}


# ---------------------------------------------------------------------------------------------------------------
# Duplicates

BASE = "a small brown dog runs over the wet green grass of a wide park"


def test_near_duplicates_differ_in_case_punctuation_order_and_a_word() -> None:
    texts = [
        BASE,
        BASE.upper() + "!",
        "of a wide park: the wet green grass, over a small brown dog runs",
        BASE + " today",  # 12 of 13 words
        BASE.replace("dog", "cat").replace("park", "lawn"),  # 10 of 14
        "two red cars stand on a street",
    ]

    exact, near = find_duplicates(texts, 0.9)

    assert exact == {}
    assert near == {1: 0, 2: 0, 3: 0}


def test_every_named_original_is_a_kept_text() -> None:
    texts = [BASE, BASE + " today", BASE + " today", BASE + " TODAY", " " + BASE]

    assert find_duplicates(texts, 0.9) == ({2: 0, 4: 0}, {1: 0, 3: 0})


def test_texts_without_words_repeat_only_themselves() -> None:
    for threshold in (0.0, 0.5, 1.0):
        assert find_duplicates(["🙂", "🙃", "…", "🙂", "!"], threshold) == ({3: 0}, {})


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.6, 0.8, 0.9, 1.0]))
def test_duplicates_are_those_of_a_search_over_all_pairs(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    words = [f"w{i}" for i in range(40)]
    texts: list[str] = []
    for _ in range(60):
        if texts and rng.random() < 0.5:  # an edited copy
            edited = texts[int(rng.integers(len(texts)))].split()
            edited[int(rng.integers(len(edited)))] = words[int(rng.integers(40))]
            texts.append(" ".join(edited))
        else:
            texts.append(" ".join(rng.choice(words, int(rng.integers(8, 16)))))
    kept: list[int] = []
    expected: set[int] = set()
    for i, text in enumerate(texts):
        own = set(text.split())
        similar = [len(own & (o := set(texts[k].split()))) / len(own | o) >= threshold - 1e-12 for k in kept]
        (expected.add if any(similar) else kept.append)(i)

    exact, near = find_duplicates(texts, threshold)
    found = exact.keys() | near.keys()

    # Never a false one; at most a rare miss, which may then keep a copy of its own from being found.
    missed, wrong = expected - found, found - expected
    assert len(missed) <= 2 and (not wrong or missed)
    assert all(first not in found for first in (exact | near).values())


def test_a_large_group_of_similar_captions_does_not_take_quadratic_time() -> None:
    common = " ".join(f"c{i}" for i in range(30))
    texts = [f"{common} x{i}" for i in range(5000)]  # Jaccard 30/32 between any two

    _, near = find_duplicates(texts, 0.9)

    assert len(near) == 4999 and set(near.values()) == {0}


def test_duplicates_are_reported_without_being_rejected_by_default(tmp_path: Path) -> None:
    records = records_of(tmp_path, [BASE, BASE, BASE + " today"])

    modes: list[tuple[Any, int]] = [("report", 0), ("reject_exact", 1), ("reject_near", 2)]
    for mode, rejected in modes:
        report = apply_hygiene(records, None, HygieneLimits(duplicates=mode))
        assert report.duplicates == {"exact": 1, "near": 1}
        assert len(report.rejects) == rejected


# ---------------------------------------------------------------------------------------------------------------
# Caps and the whole


def test_caps_count_accepted_samples_and_keep_the_first(tmp_path: Path) -> None:
    captions = ["click here", "one", "two", "three", "four", "five"]
    records = records_of(tmp_path, captions, source=["a", "a", "a", "a", "b", "b"])

    report = apply_hygiene(records, None, HygieneLimits(source_cap=2))

    assert report.accepted.tolist() == [1, 2, 4, 5]
    assert reasons(report) == {"r0": "spam", "r3": "source_cap"}


def test_the_cap_of_a_config_entry_counts_that_entry_only(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    for name in "xy":
        records_of(tmp_path / name, ["one", "two", "three"])
    entries = [
        SourceConfig(json_path=str(tmp_path / n / "a.jsonl"), name="n", cap=c) for n, c in (("x", 1), ("y", None))
    ]
    records = open_sources(entries, image_token="<image>", max_images=2, on_reject="error")

    assert apply_hygiene(records, None, ANY_LENGTH).accepted.tolist() == [0, 3, 4, 5]
    assert apply_hygiene(records, None, HygieneLimits(source_cap=3)).accepted.tolist() == [0, 3, 4]


SAMPLE_CAPTIONS = ["", "a", "download", BASE, BASE + ".", "a red square", "a b c d e"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(SAMPLE_CAPTIONS), min_size=1, max_size=25),
    st.sampled_from(["report", "reject_exact", "reject_near"]),
    st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_no_record_is_lost_and_none_is_counted_twice(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, captions: list[str], duplicates: Any, cap: int | None
) -> None:
    records = records_of(tmp_path_factory.mktemp("d"), captions)
    cfg = HygieneLimits(duplicates=duplicates, source_cap=cap)

    report = apply_hygiene(records, tokenizer, cfg, verify_images="none")

    rows = sorted([*(records[int(i)].row for i in report.accepted), *(r.row for r in report.rejects)])
    assert rows == list(range(len(captions)))
    assert sum(n for k, n in report.counts.items() if k != "records") == report.counts["records"] == len(rows)
    assert report.accepted.tolist() == sorted(report.accepted.tolist())


def test_progress_reaches_its_total_in_every_phase(tmp_path: Path, tokenizer: Any) -> None:
    seen: dict[str, tuple[int, int]] = {}

    apply_hygiene(
        records_of(tmp_path, ["a fine caption", "another fine one"]), tokenizer, HygieneLimits(),
        progress=lambda what, done, total: seen.__setitem__(what, (done, total)),
    )  # fmt: skip

    assert seen == {"lengths": (2, 2), "images": (2, 2), "duplicates": (2, 2)}
