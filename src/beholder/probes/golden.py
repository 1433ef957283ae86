"""The golden set: a few held-out samples, chosen once, captioned again and again during training.

The set is a JSONL file that outlives the run, so that captions of different steps and runs can be laid side by side.
Choosing, persisting, decoding and comparing live here; when to decode is decided by the stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from beholder.probes.captions import CaptionRecord
from beholder.runs import atomic_write
from beholder.types import Example, ExampleSet, UserError


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One line of the golden set file."""

    id: str
    bucket: str
    gt_text: str
    image_relpath: str
    label_len: int
    """Target tokens."""


@dataclass(frozen=True, slots=True)
class GoldenCaption:
    """One line of ``qual/step_{n}_golden{m}.jsonl``."""

    id: str
    bucket: str
    gt_text: str
    pred_text: str
    image_relpath: str
    label_len: int
    pred_tokens_len: int
    hash: str
    """First 16 hex digits of sha256 over ``pred_text``: a quick diff between steps."""


def choose(candidates: Sequence[int], bucket_of: Mapping[int, str], size: int, seed: int) -> list[int]:
    """``size`` of the candidates (dataset indices), balanced over their buckets, as a pure function of the arguments.

    Every bucket gets the same number, the earlier ones one more where it does not divide; a bucket with too few gives
    its share to the others. Fewer than ``size`` candidates: all of them. Buckets are ordered by name.
    """
    order = sorted(set(candidates))
    rng = np.random.default_rng(seed)
    pools: dict[str, list[int]] = {}
    for index in order:
        pools.setdefault(bucket_of.get(index, ""), []).append(index)
    shuffled = {name: [pool[k] for k in rng.permutation(len(pool))] for name, pool in sorted(pools.items())}
    taken: dict[str, int] = dict.fromkeys(shuffled, 0)
    for _ in range(min(size, len(order))):  # one at a time to the bucket that has the fewest and has any left
        name = min((n for n in shuffled if taken[n] < len(shuffled[n])), key=lambda n: (taken[n], n))
        taken[name] += 1
    return sorted(index for name, pool in shuffled.items() for index in pool[: taken[name]])


def golden_set(
    path: Path,
    examples: ExampleSet,
    *,
    candidates: Sequence[int],
    bucket_of: Mapping[int, str],
    label_len: Mapping[int, int] | np.ndarray | Sequence[int],
    size: int,
    seed: int,
) -> list[tuple[int, GoldenItem]]:
    """The golden set as (dataset index, item): read from ``path`` if it is there, else chosen and written there.

    ``candidates`` are the held-out indices. Raises UserError when the file is malformed, or when one of its samples
    is not among the candidates or reads differently now: the set would then test on training data or on other data.
    """
    if path.exists():
        return _match(path, load(path), examples, candidates)
    chosen = choose(candidates, bucket_of, size, seed)
    items = [(index, describe(examples[index], bucket_of.get(index, ""), int(label_len[index]))) for index in chosen]
    save(path, [item for _, item in items])
    return items


def save(path: Path, rows: Sequence[GoldenItem | GoldenCaption]) -> None:
    """Write JSONL in one step: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, b"".join(orjson.dumps(asdict(row)) + b"\n" for row in rows))


def load(path: Path) -> list[GoldenItem]:
    """Read a golden set file. Raises UserError naming file and line."""
    return [GoldenItem(**row) for row in _rows(path, GoldenItem)]


def load_captions(path: Path) -> list[GoldenCaption]:
    """Read the captions of one step. Raises UserError naming file and line."""
    return [GoldenCaption(**row) for row in _rows(path, GoldenCaption)]


def captions_path(qual: Path, step: int, size: int) -> Path:
    """``qual/step_{n}_golden{m}.jsonl``."""
    return qual / f"step_{step}_golden{size}.jsonl"


def join(items: Sequence[GoldenItem], records: Sequence[CaptionRecord]) -> list[GoldenCaption]:
    """The items with what the model wrote for them, in the items' order; an item without a record is left out."""
    by_id = {r.id: r for r in records}
    unknown = set(by_id) - {i.id for i in items}
    assert not unknown, f"captions of samples that are not in the golden set: {unknown}"
    return [
        GoldenCaption(
            id=item.id, bucket=item.bucket, gt_text=item.gt_text, pred_text=record.prediction,
            image_relpath=item.image_relpath, label_len=item.label_len, pred_tokens_len=record.tokens_len,
            hash=hashlib.sha256(record.prediction.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        )
        for item in items
        if (record := by_id.get(item.id)) is not None
    ]  # fmt: skip


def diff(before: Sequence[GoldenCaption], after: Sequence[GoldenCaption]) -> list[tuple[GoldenCaption, GoldenCaption]]:
    """The samples whose caption changed between two steps. Raises UserError when the sets differ."""
    if [c.id for c in before] != [c.id for c in after]:
        raise UserError("the two files caption different golden sets; compare steps of the same set")
    return [(a, b) for a, b in zip(before, after, strict=True) if a.hash != b.hash]


def describe(example: Example, bucket: str, label_len: int) -> GoldenItem:
    """The example as a line of the golden set file."""
    return GoldenItem(
        id=example.id, bucket=bucket, gt_text=example.target_text,
        image_relpath=", ".join(ref.path for ref in example.images), label_len=label_len,
    )  # fmt: skip


def _match(
    path: Path, items: Sequence[GoldenItem], examples: ExampleSet, candidates: Sequence[int]
) -> list[tuple[int, GoldenItem]]:
    by_key: dict[tuple[str, str, str], int] = {}
    for index in sorted(set(candidates), reverse=True):  # of equal records the first one counts
        example = examples[index]
        by_key[example.id, example.target_text, ", ".join(ref.path for ref in example.images)] = index
    missing = [i.id for i in items if (i.id, i.gt_text, i.image_relpath) not in by_key]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise UserError(
            f"{path}: {len(missing)} of {len(items)} golden samples are not among the held-out samples of this run "
            f"({shown}): another split, other data, or they are trained on now. Use the seed and split of the run that "
            "made the file, or give another eval.golden_set_path"
        )
    return [(by_key[i.id, i.gt_text, i.image_relpath], i) for i in items]


def _rows(path: Path, kind: type[GoldenItem] | type[GoldenCaption]) -> Iterator[dict[str, Any]]:
    expected = {f.name: int if f.type == "int" else str for f in fields(kind)}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not valid JSON ({e}); delete the file to have it made again") from e
        got = {key: type(value) for key, value in row.items()} if isinstance(row, dict) else None
        if got != expected:
            raise UserError(
                f"{path}:{number}: expected the fields {_named(expected)}, "
                f"got {type(row).__name__ if got is None else _named(got)}; delete the file to have it made again"
            )
        yield row


def _named(fields: Mapping[str, type]) -> str:
    return ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
