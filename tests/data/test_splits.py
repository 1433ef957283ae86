"""Splits are deterministic, balanced by the seed's rule, disjoint also by image, and come back from disk unchanged."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.data.images import SameContent
from beholder.data.splits import (
    Split,
    balanced_sample,
    bucket_bounds,
    bucket_names,
    buckets_of,
    load_split,
    make_split,
    quotas,
    save_split,
    shared_images,
)
from beholder.types import Example, ImageRef, Turn, UserError

BUCKETS = (0, 10, 20, 9999)


class Listed:
    """The part of `Records` that is needed here, in memory."""

    def __init__(self, examples: Sequence[Example], fingerprint: str = "f" * 64) -> None:
        self.examples = list(examples)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def images_of(self, indices: Sequence[int] | None = None) -> Iterator[tuple[int, tuple[ImageRef, ...]]]:
        return ((i, self.examples[i].images) for i in (range(len(self)) if indices is None else indices))

    def target_texts(self, indices: Sequence[int] | None = None) -> list[str]:
        return [self.examples[i].target_text for i in (range(len(self)) if indices is None else indices)]


def pictures(count: int, images: Sequence[int] | None = None, hostile: bool = False) -> Listed:
    """Example i shows picture ``images[i]`` (default: one of its own)."""
    names = images if images is not None else range(count)
    make_id = (lambda i: f'{i}"}},{{"index":9\n\u202e') if hostile else str
    return Listed([Example(make_id(i), (ImageRef("r", f"{n}.png"),), (Turn("assistant", ("x",)),)) for i, n in
                   zip(range(count), names, strict=True)])  # fmt: skip


def split(examples: Listed, lengths: np.ndarray, **overrides: Any) -> Split:
    given: dict[str, Any] = {
        "mode": "stratified_len", "eval_size": None, "eval_ratio": None, "len_buckets": BUCKETS, "max_samples": None,
        "seed": 42, "accepted": np.arange(len(examples)), "same_image": "place",
    } | overrides  # fmt: skip
    return make_split(examples, given.pop("accepted"), lengths, **given)


def skewed(count: int) -> np.ndarray:
    """Mostly short and medium, as LLaVA-Pretrain's."""
    return np.random.default_rng(0).gamma(3.0, 4.4, count).astype(np.int32) + 1


# ---------------------------------------------------------------------------------------------------------------
# Buckets and quotas


def test_bucket_bounds_are_the_seeds() -> None:
    assert buckets_of([0, 1, 10, 11, 20, 21, 9999, 20_000], BUCKETS) == [
        "short", "short", "short", "medium", "medium", "long", "long", "long",
    ]  # fmt: skip
    assert buckets_of([3, 64, 65], (0, 64, 128)) == ["short", "short", "long"]
    assert buckets_of([1, 6, 11, 16, 99], (0, 5, 10, 15, 20)) == [
        "len_1_5", "len_6_10", "len_11_15", "len_16_20", "len_16_20",
    ]  # fmt: skip


@pytest.mark.parametrize(("available", "size", "expected"), [
    ((9000, 9000, 9000), 2000, [666, 666, 668]),  # the seed's own run
    ((99, 99, 99), 64, [21, 21, 22]),
    ((5, 100, 100), 60, [5, 35, 20]),  # what short lacks comes from medium
    ((100, 5, 100), 60, [20, 5, 35]),  # what medium lacks comes from long
    ((100, 100, 5), 60, [35, 20, 5]),  # what long lacks comes from short
    ((5, 5, 100), 60, [5, 5, 50]), ((0, 0, 60), 60, [0, 0, 60]), ((60, 0, 0), 60, [60, 0, 0]),
    ((1, 1, 1), 3, [1, 1, 1]), ((7, 7, 7), 0, [0, 0, 0]),
])  # fmt: skip
def test_a_bucket_that_is_too_small_is_filled_from_the_next(
    available: tuple[int, ...], size: int, expected: list[int]
) -> None:
    assert quotas(available, size) == expected


@given(available=st.lists(st.integers(0, 50), min_size=1, max_size=6), share=st.floats(0, 1))
def test_quotas_sum_up_and_never_ask_for_more_than_there_is(available: list[int], share: float) -> None:
    size = int(share * sum(available))

    take = quotas(available, size)

    assert sum(take) == size
    assert all(0 <= t <= a for t, a in zip(take, available, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Splits


def test_stratified_split_is_balanced_disjoint_and_complete() -> None:
    lengths = skewed(3000)
    made = split(pictures(3000), lengths, eval_size=200)

    assert made.eval_counts == {"short": 66, "medium": 66, "long": 68}
    assert sorted([*made.train, *made.eval]) == list(range(3000))
    assert len(made.overlap) == 0
    assert [made.bucket[i] for i in range(3000)] == buckets_of(lengths, BUCKETS)
    assert [made.label_len[i] for i in range(3000)] == lengths.tolist()
    assert made.train.tolist() == sorted(made.train) and made.eval.tolist() == sorted(made.eval)


def test_stratified_split_fills_a_small_bucket_from_the_next() -> None:
    lengths = np.array([5] * 8 + [15] * 100 + [30] * 100)

    made = split(pictures(208), lengths, eval_size=60)

    assert made.eval_counts == {"short": 8, "medium": 32, "long": 20}


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(3, 120), seed=st.integers(0, 999), mode=st.sampled_from(["ratio", "stratified_len"]),
    size=st.integers(1, 40), cap=st.one_of(st.none(), st.integers(2, 120)), data=st.data(),
)  # fmt: skip
def test_any_split_is_pure_disjoint_by_image_and_loses_nothing(
    count: int, seed: int, mode: str, size: int, cap: int | None, data: st.DataObject
) -> None:
    lengths = np.array(data.draw(st.lists(st.integers(0, 40), min_size=count, max_size=count)))
    shown = data.draw(st.lists(st.integers(0, 2 * count), min_size=count, max_size=count))
    accepted = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=2))))
    arguments: dict[str, Any] = {
        "mode": mode,
        "eval_size": size,
        "max_samples": cap,
        "seed": seed,
        "accepted": accepted,
    }
    pool = len(accepted) if cap is None else min(cap, len(accepted))
    try:
        made = split(pictures(count, shown), lengths, **arguments)
    except UserError:
        filled = len(set(buckets_of(lengths[accepted], BUCKETS))) == 3
        assert pool <= size or len(set(shown)) < count or (mode == "stratified_len" and (cap is not None or not filled))
        return
    again = split(pictures(count, shown), lengths, **arguments | {"accepted": accepted[::-1]})

    train, held_out, overlap = set(made.train.tolist()), set(made.eval.tolist()), set(made.overlap.tolist())
    assert len(made.eval) == size and train
    assert len(train | held_out | overlap) == len(train) + len(held_out) + len(overlap) == pool
    assert train | held_out | overlap <= set(accepted.tolist())
    assert not {shown[i] for i in train} & {shown[i] for i in held_out}
    assert all(shown[i] in {shown[j] for j in held_out} for i in overlap)
    assert set(made.bucket) == set(made.label_len) == train | held_out
    for name in ("train", "eval", "overlap"):
        assert np.array_equal(getattr(made, name), getattr(again, name))


def test_ratio_takes_two_percent_by_default_and_the_seed_decides() -> None:
    lengths = skewed(500)

    made = split(pictures(500), lengths, mode="ratio")
    other = split(pictures(500), lengths, mode="ratio", seed=43)
    tenth = split(pictures(500), lengths, mode="ratio", eval_ratio=0.1)

    assert len(made.eval) == 10 and len(tenth.eval) == 50
    assert made.eval.tolist() != other.eval.tolist()
    assert set(made.eval) < set(tenth.eval), "a larger share holds out the same samples and more"


def test_max_samples_draws_across_the_whole_file() -> None:
    made = split(pictures(1000), skewed(1000), mode="none", max_samples=100)

    assert len(made.train) == 100 and len(made.eval) == 0
    assert made.train.min() < 100 and made.train.max() > 900


def test_rejected_records_are_in_neither_part() -> None:
    accepted = np.arange(0, 300, 3)

    made = split(pictures(300), skewed(300), accepted=accepted, eval_size=20)

    assert set(made.train) | set(made.eval) == set(accepted)


def test_training_samples_that_show_a_held_out_image_are_left_out_and_listed() -> None:
    shown = [i // 4 for i in range(400)]  # four captions of each picture

    made = split(pictures(400, shown), skewed(400), mode="ratio", eval_size=10)

    held_out = {shown[i] for i in made.eval}
    assert not held_out & {shown[i] for i in made.train}
    assert sorted(made.overlap) == [i for i in range(400) if shown[i] in held_out and i not in set(made.eval)]


def test_overlap_with_another_set_is_found_by_place() -> None:
    assert shared_images(pictures(100), range(100), pictures(3, [7, 500, 8]), [0, 1, 2], "place").tolist() == [7, 8]


@pytest.mark.parametrize("size", [50, 51, 9999])
def test_a_held_out_set_that_leaves_nothing_to_train_on_is_an_error(size: int) -> None:
    with pytest.raises(UserError, match=rf"{size} held-out samples leave nothing.*50 samples are usable.*eval_size"):
        split(pictures(200), skewed(200), eval_size=size, max_samples=50)


def test_an_empty_bucket_is_an_error_that_names_it_its_bounds_and_the_lengths() -> None:
    lengths = np.array([12] * 60 + [18] * 40)

    with pytest.raises(
        UserError, match=r"bucket short \(up to 10 tokens\) or long \(21 tokens or more\).*12 to 18 tok"
    ):
        split(pictures(100), lengths, eval_size=30)

    assert len(split(pictures(100), lengths, mode="ratio", eval_size=30).eval) == 30


def test_a_short_bucket_is_told_with_both_numbers_and_a_full_one_is_not() -> None:
    short = split(pictures(208), np.array([5] * 8 + [15] * 100 + [30] * 100), eval_size=60)
    full = split(pictures(300), np.array([5] * 100 + [15] * 100 + [30] * 100), eval_size=60)

    assert len(short.notes) == 1
    assert "bucket short (up to 10 tokens): 8 held-out samples instead of 20" in short.notes[0]
    assert full.notes == []


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5, unique=True), st.integers(1, 70))
def test_bounds_in_words_hold_exactly_the_lengths_of_their_bucket(inner: list[int], length: int) -> None:
    len_buckets = [0, *sorted(inner), 9999]
    words = dict(zip(bucket_names(len_buckets), bucket_bounds(len_buckets), strict=True))

    numbers = [int(w) for w in words[buckets_of([length], len_buckets)[0]].split() if w.isdigit()]

    text = words[buckets_of([length], len_buckets)[0]]
    low = numbers[0] if not text.startswith("up to") else 0
    high = numbers[-1] if not text.endswith("or more") else 10**9
    assert low <= length <= high


def test_one_picture_for_all_samples_is_an_error_that_says_so() -> None:
    with pytest.raises(UserError, match="show an image of the"):
        split(pictures(20, [0] * 20), skewed(20), mode="ratio", eval_size=2)


def test_a_sample_of_the_held_out_is_balanced_and_part_of_the_whole() -> None:
    made = split(pictures(3000), skewed(3000), eval_size=300)
    buckets = [made.bucket[int(i)] for i in made.eval]

    def sample(size: int, seed: int) -> list[int]:
        return balanced_sample(made.eval, buckets, bucket_names(made.settings["len_buckets"]), size, seed).tolist()

    assert set(sample(60, 1)) < set(made.eval.tolist())
    assert Counter(made.bucket[i] for i in sample(60, 1)) == {"short": 20, "medium": 20, "long": 20}
    assert sample(60, 1) == sample(60, 1) != sample(60, 2)
    assert sample(9999, 1) == made.eval.tolist()


# ---------------------------------------------------------------------------------------------------------------
# The same image under another name


def shown(*refs: ImageRef) -> Listed:
    return Listed([Example(str(i), (ref,), (Turn("assistant", ("x",)),)) for i, ref in enumerate(refs)])


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, ImageRef]:
    """One picture in every guise a data set may hold it in, and pictures that merely look like it from outside."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    picture, other = bytes(range(200)), bytes(reversed(range(200)))  # of one size
    root = tmp_path / "images"
    (root / "deep").mkdir(parents=True)
    files = {"held.jpg": picture, "copy.png": picture, "deep/copy.jpg": picture, "other.jpg": other, "empty.jpg": b""}
    for name, data in files.items():
        (root / name).write_bytes(data)
    os.link(root / "held.jpg", root / "hard.jpg")
    (root / "soft.jpg").symlink_to(root / "copy.png")
    (root / "longer.jpg").write_bytes(picture + b"!")
    refs = {name: ImageRef(str(root), name) for name in (*files, "hard.jpg", "soft.jpg", "longer.jpg", "absent.jpg")}

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for name, data in (("a.jpg", other), ("b.jpg", picture)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with tarfile.open(tmp_path / "shard.tar") as tar:
        for member in tar:
            shard = str(tmp_path / "shard.tar")
            refs[f"tar {member.name}"] = ImageRef(shard, member.name, "tar", member.offset_data, member.size)

    pq.write_table(pa.table({"image": [other, picture]}), tmp_path / "rows.parquet")
    for row, name in enumerate(("other", "same")):
        refs[f"parquet {name}"] = ImageRef(str(tmp_path / "rows.parquet"), name, "parquet", row, column="image")
    return refs


SAME = {"held.jpg", "copy.png", "deep/copy.jpg", "hard.jpg", "soft.jpg", "tar b.jpg", "parquet same"}


@pytest.mark.parametrize("held", sorted(SAME))
def test_every_guise_of_a_held_out_image_is_found_and_nothing_else(copies: dict[str, ImageRef], held: str) -> None:
    train = shown(*copies.values())

    found = shared_images(train, range(len(train)), shown(copies[held]), [0])

    assert {list(copies)[i] for i in found} == SAME


def test_by_place_only_the_same_file_is_found(copies: dict[str, ImageRef]) -> None:
    train = shown(*copies.values())

    found = shared_images(train, range(len(train)), shown(copies["held.jpg"]), [0], "place")

    assert [list(copies)[i] for i in found] == ["held.jpg"]


def test_a_split_keeps_copies_apart_and_lists_them(tmp_path: Path) -> None:
    for i in range(100):
        (tmp_path / f"{i}.png").write_bytes(f"content {i % 50:03}".encode())
    examples = shown(*(ImageRef(str(tmp_path), f"{i}.png") for i in range(100)))

    by_place = split(examples, skewed(100), mode="ratio", eval_size=5)
    by_content = split(examples, skewed(100), mode="ratio", eval_size=5, same_image="content")

    assert by_place.eval.tolist() == by_content.eval.tolist() and len(by_place.overlap) == 0
    assert sorted(by_content.overlap) == sorted((i + 50) % 100 for i in by_content.eval)
    assert by_content.settings["same_image"] == "content"


def test_only_images_of_a_held_out_size_are_read(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"{i}.png").write_bytes(b"x" * (i + 1))
    refs = [ImageRef(str(tmp_path), f"{i}.png") for i in range(300)]

    same = SameContent(refs[:3])
    found = [ref in same for ref in refs]

    assert found == [True] * 3 + [False] * 297
    assert same.hashed == 6, "the three held out, and the three that are as large"


@pytest.mark.slow
def test_fifty_thousand_files_are_told_apart_in_seconds(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for i, size in enumerate(rng.integers(2_000, 60_000, 50_000).tolist()):
        with open(tmp_path / f"{i}.jpg", "wb") as file:
            file.truncate(size)  # sparse: sizes as of real pictures without their bytes on the disk
    examples = shown(*(ImageRef(str(tmp_path), f"{i}.jpg") for i in range(50_000)))

    start = time.perf_counter()
    found = shared_images(examples, range(2_000, 50_000), examples, range(2_000))

    assert time.perf_counter() - start < 30  # measured 2 s on two cores
    sizes = [os.stat(tmp_path / f"{i}.jpg").st_size for i in range(50_000)]
    held = set(sizes[:2_000])
    assert found.tolist() == [i for i in range(2_000, 50_000) if sizes[i] in held], "equal sizes of zeros are equal"


# ---------------------------------------------------------------------------------------------------------------
# Persistence


def test_a_split_comes_back_from_disk_unchanged(tmp_path: Path) -> None:
    examples = pictures(400, [i // 2 for i in range(400)], hostile=True)
    made = split(examples, skewed(400), eval_size=30)
    path = tmp_path / "splits" / "split_seed42_eval30.json"

    save_split(path, made, examples)
    loaded = load_split(path, examples, made.settings)

    for name in ("train", "eval", "overlap"):
        assert np.array_equal(getattr(loaded, name), getattr(made, name))
        assert getattr(loaded, name).dtype == np.int64
    assert (loaded.bucket, loaded.label_len, loaded.settings) == (made.bucket, made.label_len, made.settings)
    assert loaded.eval_counts == made.eval_counts
    item = json.loads(path.read_text(encoding="utf-8"))["eval"][0]
    first = int(made.eval[0])
    assert item == {"index": first, "id": examples[first].id, "bucket": made.bucket[first],
                    "label_len": made.label_len[first], "image_path": f"{first // 2}.png"}  # fmt: skip


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_split(tmp_path / name, split(pictures(100), skewed(100), eval_size=9), pictures(100))

    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_split_of_other_data_or_other_settings_is_refused(tmp_path: Path) -> None:
    examples = pictures(100)
    made = split(examples, skewed(100), eval_size=9)
    save_split(tmp_path / "s.json", made, examples)

    with pytest.raises(UserError, match=r"s\.json: the split was drawn from other data \(fingerprint ffff"):
        load_split(tmp_path / "s.json", Listed(examples.examples, "e" * 64))
    with pytest.raises(UserError, match=r"other settings \(eval_size: 9 → 10; seed: 42 → 1\)"):
        load_split(tmp_path / "s.json", examples, made.settings | {"eval_size": 10, "seed": 1})
    assert load_split(tmp_path / "s.json", examples, {"len_buckets": BUCKETS}).eval.tolist() == made.eval.tolist()


@pytest.mark.parametrize("damage", ["truncate", "edit", "empty", "list"])
def test_a_damaged_split_file_is_named_not_used(tmp_path: Path, damage: str) -> None:
    examples, path = pictures(100), tmp_path / "s.json"
    save_split(path, split(examples, skewed(100), eval_size=9), examples)
    text = path.read_text()
    edited = {
        "truncate": text[:-40],
        "edit": text.replace('"label_len":', '"label_len":1', 1),
        "empty": "",
        "list": "[]",
    }
    path.write_text(edited[damage])

    with pytest.raises(UserError, match=r"s\.json: not a readable split file .* remove it"):
        load_split(path, examples)
