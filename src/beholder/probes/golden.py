"""The golden set: a few held-out samples, chosen once, captioned again and again during training.

The set is a JSONL file that outlives the run, so that captions of different steps and runs can be laid side by side.
Choosing, persisting and joining the set live here, and reading what a run wrote: `golden_history.show_step` and
`golden_history.diff_steps` are what ``beholder golden show`` and ``beholder golden diff`` print. When to decode is
decided by the stage.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from beholder.probes.categories import category
from beholder.probes.strata import questions
from beholder.runs import atomic_write
from beholder.types import Example, UserError

if TYPE_CHECKING:  # reading what a run wrote needs no model
    from beholder.probes.written import Written


MAX_TOLD = 20
"""Samples that an error names."""


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One line of the golden set file."""

    id: str
    bucket: str
    gt_text: str
    """`Example.answer_text`."""
    image_relpath: str
    label_len: int
    """Target tokens of the whole sample."""
    category: str = ""
    """`categories.category` of the question; empty in a set of captions."""
    prompt_text: str = ""
    """What the user asked last; empty in a set of captions."""


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
    category: str = ""
    prompt_text: str = ""


OPTIONAL = ("category", "prompt_text")
"""Fields that only sets of questions have."""


def choose(buckets: Sequence[str], size: int, seed: int, categories: Sequence[str] | None = None) -> list[int]:
    """``size`` of the samples as indices into ``buckets``, balanced over them, as a pure function of the arguments.

    Every bucket gets the same number, the earlier ones one more where it does not divide; a bucket with too few gives
    its share to the others. Fewer than ``size`` samples: all of them. Buckets are ordered by name. With ``categories``
    (one a sample) the size is shared out over these first in the same way, then over the buckets within each.
    """
    if categories is not None:
        assert len(categories) == len(buckets), f"{len(categories)} categories, {len(buckets)} buckets"
        found: list[int] = []
        for pool, share in _shares(_pools(categories), size):
            found += [pool[k] for k in choose([buckets[i] for i in pool], share, seed)]
        return sorted(found)
    rng = np.random.default_rng(seed)
    pools = {name: [pool[k] for k in rng.permutation(len(pool))] for name, pool in _pools(buckets).items()}
    return sorted(index for pool, share in _shares(pools, size) for index in pool[:share])


def _pools(names: Sequence[str]) -> dict[str, list[int]]:
    pools: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        pools.setdefault(name, []).append(index)
    return dict(sorted(pools.items()))


def _shares(pools: Mapping[str, list[int]], size: int) -> list[tuple[list[int], int]]:
    """How many of each pool: one at a time to the pool that has given the fewest and has any left."""
    taken: dict[str, int] = dict.fromkeys(pools, 0)
    for _ in range(min(size, sum(map(len, pools.values())))):
        name = min((n for n in pools if taken[n] < len(pools[n])), key=lambda n: (taken[n], n))
        taken[name] += 1
    return [(pool, taken[name]) for name, pool in pools.items()]


def golden_set(
    path: Path,
    examples: Sequence[Example],
    *,
    buckets: Sequence[str],
    label_len: Sequence[int],
    size: int,
    seed: int,
    by_category: bool = False,
) -> list[tuple[int, GoldenItem]]:
    """The golden set as (index into ``examples``, item): read from ``path`` if it is there, else chosen and stored.

    ``examples`` are the held-out samples; ``buckets`` and ``label_len`` (target tokens) are aligned with them.
    ``by_category``: the samples are questions; the set is balanced over what they ask for (`categories`) before length,
    and says so. Raises UserError when the file is malformed or empty, or when one of its samples is not among them or
    reads differently now: the set would then test on training data or on other data.
    """
    assert len(examples) == len(buckets) == len(label_len), (len(examples), len(buckets), len(label_len))
    assert size > 0 and examples, "a golden set needs a size and held-out samples"
    if path.exists():
        return _match(path, load(path), examples)
    kinds = [category(asked(e)) for e in examples] if by_category else None
    chosen = choose(buckets, size, seed, kinds)
    items = [
        (index, describe(examples[index], buckets[index], int(label_len[index]), chats=by_category)) for index in chosen
    ]
    save(path, [item for _, item in items])
    return items


def save(path: Path, rows: Sequence[GoldenItem | GoldenCaption]) -> None:
    """Write JSONL in one step: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{k: v for k, v in asdict(row).items() if v != "" or k not in OPTIONAL} for row in rows]
    atomic_write(path, b"".join(orjson.dumps(row) + b"\n" for row in plain))


def load(path: Path) -> list[GoldenItem]:
    """Read a golden set file. Raises UserError naming file and line, and for a file without any sample."""
    items = [GoldenItem(**row) for row in _rows(path, GoldenItem)]
    if not items:
        raise UserError(
            f"{path}: no golden sample in it, expected one JSON object a line; delete the file to have it made again, "
            "or give another eval.golden_set_path"
        )
    return items


def load_captions(path: Path) -> list[GoldenCaption]:
    """Read the captions of one step. Raises UserError naming file and line."""
    return [GoldenCaption(**row) for row in _rows(path, GoldenCaption)]


def captions_path(qual: Path, step: int, size: int) -> Path:
    """``qual/step_{n}_golden{m}.jsonl``."""
    return qual / f"step_{step}_golden{size}.jsonl"


def join(items: Sequence[GoldenItem], records: Sequence[Written]) -> list[GoldenCaption]:
    """The items with what the model wrote for them, in the items' order; an item without a record is left out."""
    waiting: dict[str, deque[Written]] = {}
    for record in records:
        waiting.setdefault(record.id, deque()).append(record)
    rows = [
        GoldenCaption(
            pred_text=record.prediction, pred_tokens_len=record.tokens_len,
            hash=hashlib.sha256(record.prediction.encode("utf-8", "surrogatepass")).hexdigest()[:16], **asdict(item),
        )
        for item in items
        if (queue := waiting.get(item.id)) and (record := queue.popleft())
    ]  # fmt: skip
    unknown = sorted(id for id, queue in waiting.items() if queue)
    assert not unknown, f"captions of samples that are not in the golden set: {unknown}"
    return rows


def describe(example: Example, bucket: str, label_len: int, *, chats: bool = False) -> GoldenItem:
    """The example as a line of the golden set file; ``chats``: with its question and the kind of it."""
    question = asked(example) if chats else ""
    return GoldenItem(
        id=example.id, bucket=bucket, gt_text=example.answer_text,
        image_relpath=", ".join(ref.path for ref in example.images), label_len=label_len,
        category=category(question) if chats else "", prompt_text=question,
    )  # fmt: skip


def asked(example: Example) -> str:
    """What the user said before the last answer, without images."""
    return (questions(example) or [""])[-1].strip()


def _match(path: Path, items: Sequence[GoldenItem], examples: Sequence[Example]) -> list[tuple[int, GoldenItem]]:
    by_key: dict[tuple[str, str, str], list[int]] = {}
    by_id: dict[str, list[tuple[str, str]]] = {}
    for index, example in enumerate(examples):
        now = describe(example, "", 0)
        by_key.setdefault(key(now), []).append(index)
        by_id.setdefault(now.id, []).append((now.gt_text, now.image_relpath))
    found: list[tuple[int, GoldenItem]] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    lost: list[str] = []
    for item in items:
        places = by_key.get(key(item))
        if places is None:
            lost.append(f"{item.id!r} ({_why(item, by_id.get(item.id, []))})")
            continue
        found.append((places[min(seen[key(item)], len(places) - 1)], item))  # equal records in their order
        seen[key(item)] += 1
    if lost:
        more = f" and {len(lost) - MAX_TOLD} more" if len(lost) > MAX_TOLD else ""
        raise UserError(
            f"{path}: {len(lost)} of {len(items)} golden samples do not match the held-out samples of this run: "
            f"{', '.join(lost[:MAX_TOLD])}{more}. An absent one may be trained on now. Use the data, seed and split of "
            "the run that made the file, or give another eval.golden_set_path"
        )
    return found


def key(item: GoldenItem | GoldenCaption) -> tuple[str, str, str]:
    """What a sample of the set is found again by, in the held-out samples and in the answers of every step."""
    return item.id, item.gt_text, item.image_relpath


def _why(item: GoldenItem, same_id: Sequence[tuple[str, str]]) -> str:
    """How the item differs from the nearest held-out sample of its id, given as (text, image)."""
    if not same_id:
        return "absent"
    text, image = max(same_id, key=lambda pair: (pair[0] == item.gt_text) + (pair[1] == item.image_relpath))
    return " and ".join(["other text"] * (text != item.gt_text) + ["other image"] * (image != item.image_relpath))


def _rows(path: Path, kind: type[GoldenItem] | type[GoldenCaption]) -> Iterator[dict[str, Any]]:
    expected = {f.name: int if f.type == "int" else str for f in fields(kind)}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); expected a JSONL file") from e
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not valid JSON ({e}); delete the file to have it made again") from e
        got = {key: type(value) for key, value in row.items()} if isinstance(row, dict) else None
        if got is None or got | {name: str for name in OPTIONAL if name not in got} != expected:
            raise UserError(
                f"{path}:{number}: expected the fields {_named(expected)}, "
                f"got {type(row).__name__ if got is None else _named(got)}; delete the file to have it made again"
            )
        yield row


def _named(fields: Mapping[str, type]) -> str:
    return ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
