"""Which samples are held out: drawn by the seed, balanced over target lengths, persisted, never shared with training.

What a sample must be like to be used at all is decided in `hygiene`; the order of training is `mixture`'s.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from beholder.data.images import SameContent
from beholder.data.mixture import permute
from beholder.data.sources import Records
from beholder.runs import atomic_write
from beholder.types import ImageRef, UserError

DEFAULT_EVAL_RATIO = 0.02
_FORMAT = 1

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

SameImage = Literal["content", "place"]
"""What makes two images the same one: their bytes, wherever they lie, or where they lie."""


@dataclass(frozen=True)
class Split:
    """Indices into the example set, ascending, train and held-out disjoint also by image."""

    train: np.ndarray
    """int64"""
    eval: np.ndarray
    """int64"""
    bucket: dict[int, str]
    """Target-length bucket of every index in ``train`` and ``eval``."""
    label_len: dict[int, int]
    """Target tokens of every index in ``train`` and ``eval``."""
    overlap: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """int64: left out of both, because an image of theirs is held out."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What the split was made with."""

    @property
    def notes(self) -> list[str]:
        """What is not as it was asked for: a sentence for each bucket that has too few samples to give its share."""
        if self.settings["mode"] != "stratified_len":
            return []
        len_buckets, counts = self.settings["len_buckets"], self.eval_counts
        wanted = quotas([len(self.eval)] * len(counts), len(self.eval))
        return [
            f"bucket {name} ({bounds}): {counts[name]} held-out samples instead of {want}, more there are not; "
            "the others come from the next bucket"
            for name, bounds, want in zip(counts, bucket_bounds(len_buckets), wanted, strict=True)
            if counts[name] < want
        ]

    @property
    def eval_counts(self) -> dict[str, int]:
        """Held-out samples per bucket."""
        counts = Counter(self.bucket[int(i)] for i in self.eval)
        return {name: counts[name] for name in bucket_names(self.settings["len_buckets"])}


# ---------------------------------------------------------------------------------------------------------------
# Buckets


def bucket_names(len_buckets: Sequence[int]) -> list[str]:
    """``[0, 10, 20, 9999]`` → short, medium, long. Other numbers of buckets are named by their bounds."""
    named = {1: ["all"], 2: ["short", "long"], 3: ["short", "medium", "long"]}
    count = len(len_buckets) - 1
    assert count >= 1, len_buckets
    return named.get(count) or [f"len_{a + 1}_{b}" for a, b in itertools.pairwise(len_buckets)]


def bucket_bounds(len_buckets: Sequence[int]) -> list[str]:
    """``[0, 10, 20, 9999]`` → up to 10 tokens, 11 to 20 tokens, 21 tokens or more."""
    inner = list(len_buckets[1:-1])
    if not inner:
        return ["any length"]
    between = [f"{a + 1} to {b} tokens" for a, b in itertools.pairwise(inner)]
    return [f"up to {inner[0]} tokens", *between, f"{inner[-1] + 1} tokens or more"]


def buckets_of(lengths: np.ndarray | Sequence[int], len_buckets: Sequence[int]) -> list[str]:
    """Bucket of each target length: (0, 10], (10, 20], (20, …]. The outer buckets take what lies beyond the bounds."""
    names = bucket_names(len_buckets)
    place = np.searchsorted(np.asarray(len_buckets[1:-1]), np.asarray(lengths), side="left")
    return [names[p] for p in place]


def quotas(available: Sequence[int], size: int) -> list[int]:
    """How many samples each bucket gives: 33/33/34; what a bucket lacks comes from the next ones, then the first.

    Sums to ``size``, which must not exceed what is available.
    """
    assert 0 <= size <= sum(available), (size, available)
    take = [size // len(available)] * len(available)
    take[-1] += size - sum(take)  # the seed's 666 / 666 / 668
    carry = 0
    for b in [*range(len(available)), *range(len(available))]:
        wanted = take[b] + carry
        take[b] = min(wanted, available[b])
        carry = wanted - take[b]
    assert carry == 0 and sum(take) == size, (take, available)
    return take


def balanced_sample(
    indices: np.ndarray, buckets: Sequence[str], names: Sequence[str], size: int, seed: int, salt: str = "balanced"
) -> np.ndarray:
    """``min(size, len(indices))`` of ``indices`` by the rule of `quotas`, drawn by the seed. int64, ascending.

    ``buckets``: the bucket of each index; ``names``: all buckets from short to long.
    """
    label = np.asarray(buckets, dtype=object)
    groups = [_shuffled(indices[label == name], seed, f"{salt}/{name}") for name in names]
    take = quotas([len(g) for g in groups], min(size, len(indices)))
    return np.sort(np.concatenate([g[:n] for g, n in zip(groups, take, strict=True)]))


def _shuffled(indices: np.ndarray, seed: int, salt: str) -> np.ndarray:
    if not len(indices):
        return indices
    return indices[permute(len(indices), seed, 0, f"split/{salt}", np.arange(len(indices)))]


# ---------------------------------------------------------------------------------------------------------------
# Making a split


def make_split(
    examples: Records,
    accepted: np.ndarray,
    target_tokens: np.ndarray,
    *,
    mode: Literal["ratio", "stratified_len", "none"],
    eval_size: int | None,
    eval_ratio: float | None,
    len_buckets: Sequence[int],
    max_samples: int | None,
    seed: int,
    same_image: SameImage = "content",
    progress: Progress | None = None,
) -> Split:
    """Draws at most ``max_samples`` of the ``accepted`` indices and holds some of them out. A pure function.

    ratio: ``eval_size`` samples, or ``eval_ratio`` of them (default 2 %), at random. stratified_len: ``eval_size``
    balanced over the length buckets (`quotas`). none: nothing held out. ``target_tokens``: int [len(examples)].
    A training sample that shows a held-out image (``same_image``) leaves training and is listed in `Split.overlap`.

    Raises `UserError` when a length bucket of stratified_len is empty and when no training sample would be left. A
    bucket that is merely short is filled from the next (`Split.notes`).
    """
    accepted = np.sort(np.asarray(accepted, dtype=np.int64))
    pool = accepted if max_samples is None else np.sort(_shuffled(accepted, seed, "pool")[:max_samples])
    labels = buckets_of(target_tokens[pool], len_buckets)
    names = bucket_names(len_buckets)
    if mode == "none":
        size = 0
    elif eval_size is not None:
        size = eval_size
    else:
        size = max(1, round((DEFAULT_EVAL_RATIO if eval_ratio is None else eval_ratio) * len(pool))) if len(pool) else 0
    if size >= len(pool) and mode != "none":
        raise UserError(
            f"{size} held-out samples leave nothing to train on: {len(pool)} samples are usable"
            f"{'' if max_samples is None else f' (data.max_samples is {max_samples})'}; "
            "lower data.eval_size or data.eval_ratio, or give more data"
        )

    match mode:
        case "none":
            held_out = np.zeros(0, dtype=np.int64)
        case "ratio":
            held_out = np.sort(_shuffled(pool, seed, "eval")[:size])
        case "stratified_len":
            _require_filled(labels, target_tokens[pool], len_buckets)
            held_out = balanced_sample(pool, labels, names, size, seed, "eval")
    train = np.setdiff1d(pool, held_out, assume_unique=True)
    overlap = shared_images(examples, train, examples, held_out, same_image, progress)
    train = np.setdiff1d(train, overlap, assume_unique=True)
    if not len(train) and len(pool):
        raise UserError(
            f"all {len(overlap)} training samples show an image of the {len(held_out)} held-out samples, so none may "
            "be trained on; hold out fewer samples, or give held-out records of their own (data.eval_sources)"
        )
    kept = set(train.tolist()) | set(held_out.tolist())
    return Split(
        train=train,
        eval=held_out,
        bucket={int(i): label for i, label in zip(pool, labels, strict=True) if int(i) in kept},
        label_len={int(i): int(target_tokens[i]) for i in pool if int(i) in kept},
        overlap=overlap,
        settings={
            "mode": mode, "eval_size": eval_size, "eval_ratio": eval_ratio, "len_buckets": list(len_buckets),
            "max_samples": max_samples, "seed": seed, "same_image": same_image,
        },
    )  # fmt: skip


def _require_filled(labels: Sequence[str], lengths: np.ndarray, len_buckets: Sequence[int]) -> None:
    """A bucket with nothing in it would be a stratum that every report promises and none can show."""
    empty = [
        f"{name} ({bounds})"
        for name, bounds in zip(bucket_names(len_buckets), bucket_bounds(len_buckets), strict=True)
        if name not in set(labels)
    ]
    if empty and len(lengths):
        raise UserError(
            f"no usable sample falls into the length bucket {' or '.join(empty)}: the targets have {lengths.min()} to "
            f"{lengths.max()} tokens, half of them at most {int(np.median(lengths))}; set data.len_buckets (now "
            f"{list(len_buckets)}) to bounds that divide these lengths, or data.split_mode: ratio"
        )


def shared_images(
    train_examples: Records,
    train: Sequence[int] | np.ndarray,
    eval_examples: Records,
    held_out: Sequence[int] | np.ndarray,
    same_image: SameImage = "content",
    progress: Progress | None = None,
) -> np.ndarray:
    """int64: the indices in ``train`` that show an image of the ``held_out`` samples (of the same set or another).

    content: also a copy, a hard link or a tar member with the same bytes. The same picture saved anew (another
    size, format or quality) has other bytes and is not found. place: only the same path, member or cell.
    """
    held = {ref for _, refs in eval_examples.images_of(_ints(held_out)) for ref in refs}
    if not held:
        return np.zeros(0, dtype=np.int64)
    places = {_place(ref) for ref in held}
    copies: Container[ImageRef] = SameContent(held) if same_image == "content" else ()
    total = len(train)
    shared: list[int] = []
    for done, (i, refs) in enumerate(train_examples.images_of(_ints(train)), 1):
        if any(_place(ref) in places or ref in copies for ref in refs):
            shared.append(i)
        if progress and done % 5000 == 0:
            progress("held-out images", done, total)
    if progress:
        progress("held-out images", total, total)
    return np.array(shared, dtype=np.int64)


def _place(ref: ImageRef) -> object:
    return (ref.kind, ref.root, ref.path, ref.offset, ref.item)


def _ints(indices: Sequence[int] | np.ndarray) -> list[int]:
    return np.asarray(indices, dtype=np.int64).tolist()


# ---------------------------------------------------------------------------------------------------------------
# Persistence


def save_split(path: str | Path, split: Split, examples: Records) -> None:
    """Writes the split as JSON, atomically: held-out items with id, bucket, length and image; the rest as indices."""

    def item(i: int) -> dict[str, Any]:
        example = examples[i]
        paths = [ref.path for ref in example.images]
        return {"index": i, "id": example.id, "bucket": split.bucket[i], "label_len": split.label_len[i],
                "image_path": paths[0] if len(paths) == 1 else paths}  # fmt: skip

    train = split.train.tolist()
    body = {
        "format": _FORMAT,
        "data_fingerprint": examples.fingerprint,
        "settings": split.settings,
        "counts": {"train": len(train), "eval": len(split.eval), "overlap": len(split.overlap), **split.eval_counts},
        "eval": [item(int(i)) for i in split.eval],
        "train": {"index": train, "label_len": [split.label_len[i] for i in train]},
        "overlap": split.overlap.tolist(),
    }
    body["sha256"] = _digest(body)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(body, ensure_ascii=False, separators=(",", ":")).replace('},{"index', '},\n{"index'))


def load_split(path: str | Path, examples: Records, expect: Mapping[str, Any] | None = None) -> Split:
    """Reads a split back, identical to the one that was saved.

    Raises `UserError` when the file is damaged, was made from other data, or was made with other settings than
    ``expect`` (keys as in `Split.settings`): results on another split are not comparable, so nothing is re-drawn
    silently.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
        stated = body.pop("sha256")
        if body["format"] != _FORMAT or stated != _digest(body):
            raise ValueError("its checksum does not match its content")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a readable split file ({e}); remove it to draw the split anew") from None
    if body["data_fingerprint"] != examples.fingerprint:
        raise UserError(
            f"{path}: the split was drawn from other data (fingerprint {body['data_fingerprint'][:12]}, now "
            f"{examples.fingerprint[:12]}): a record or a data setting changed since; use a new run_name or "
            "output_dir, or remove the file to draw the split anew"
        )
    # A setting that the file does not know came later; which samples it holds is not in doubt.
    known, wanted = body["settings"], {k: list(v) if isinstance(v, tuple) else v for k, v in (expect or {}).items()}
    changed = [f"{k}: {known[k]!r} → {v!r}" for k, v in wanted.items() if k in known and known[k] != v]
    if changed:
        raise UserError(
            f"{path}: the split was drawn with other settings ({'; '.join(changed)}); restore them, or use a new "
            "run_name or output_dir"
        )
    names = buckets_of(body["train"]["label_len"], body["settings"]["len_buckets"])
    bucket = dict(zip(body["train"]["index"], names, strict=True))
    label_len = dict(zip(body["train"]["index"], body["train"]["label_len"], strict=True))
    for item in body["eval"]:
        bucket[item["index"]] = item["bucket"]
        label_len[item["index"]] = item["label_len"]
    return Split(
        train=np.array(body["train"]["index"], dtype=np.int64),
        eval=np.array([item["index"] for item in body["eval"]], dtype=np.int64),
        bucket=bucket,
        label_len=label_len,
        overlap=np.array(body["overlap"], dtype=np.int64),
        settings=body["settings"],
    )


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
