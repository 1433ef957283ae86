"""What a teacher says of each supervised token of a sample, computed once and kept on disk: form, keys, reading,
writing.

The rows themselves are `rows`' business, what a distribution becomes is `model.divergence`'s. A row holds `TOKENS`
tokens of one sample. A sample is found by what it says and shows (text, bytes of its images, ids of its supervised
tokens), so that one whose record or picture has changed is missed; another teacher, template, tokenizer or form is
another sub-folder.

Bytes of a supervised token, ids of two bytes where the vocabulary has at most 65,536 and of four otherwise: ``topk``
k x (id + 2) and 4 for each temperature; ``sampled`` draws x id and 4; ``full`` 2 x vocabulary. The index adds about 20.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from beholder.config import DistillConfig
from beholder.runs import atomic_write, cache_dir, to_json, writing
from beholder.store.hashes import ImageHashes
from beholder.store.rows import RowStore, RowWriter, row_key
from beholder.types import Example, ImageSlot, UserError

TOKENS = 4
"""Of a row: a short answer with its end token leaves little of one empty."""
INDEX = 80
"""Bytes of the row store's index for a row, about."""
KEPT_FOR = "teachers.json"
"""In a run's folder: what is kept for it, as it was looked over last."""
_COSTS = "costs.jsonl"
"""In a teacher's: what rows have cost, a line for every call that made some."""
_VERSION = 2  # 1: rotary frequencies were rounded to the teacher's precision
_NAMED = 5
"""Samples spelled out in a message."""
_SAID = {
    "teacher": "the teacher (its weights)",
    "template": "the teacher's template",
    "tokenizer": "the student's tokenizer",
    "vocabulary": "distill.vocabulary",
    "vocab": "the size of the student's vocabulary",
    "form": "distill.form",
    "number": "distill.k or distill.draws",
    "temperatures": "distill.temperature",
    "version": "the version of Beholder that wrote it",
}


@dataclass(frozen=True)
class TeacherKey:
    """What decides, beside the sample, what the rows say."""

    name: str
    """For messages: the same teacher may lie elsewhere."""
    teacher: str
    """sha256 that stands for its weights (`train.trained.identity`)."""
    template: str
    tokenizer: str
    """sha256 of the student's: ids are its own."""
    vocab: int
    """Of the student's head."""

    def meta(self, cfg: DistillConfig) -> dict[str, Any]:
        return {
            "kind": "teachers", "version": _VERSION, "teacher": self.teacher, "template": self.template,
            "tokenizer": self.tokenizer, "vocabulary": cfg.vocabulary, "vocab": self.vocab, "form": cfg.form,
            "number": {"topk": cfg.k, "sampled": cfg.draws, "full": self.vocab}[cfg.form],
            "temperatures": [] if cfg.form == "full" else list(cfg.kept_temperatures),  # the whole serves every one
        }  # fmt: skip


def teachers_dir(cfg: DistillConfig) -> Path:
    """``distill.dir``, else ``$BEHOLDER_CACHE/teachers``, else the user's cache folder."""
    return Path(cfg.dir).expanduser() if cfg.dir else cache_dir() / "teachers"


def token_type(cfg: DistillConfig, vocab: int) -> np.dtype[Any]:
    """How one token is written down, little-endian."""
    number = "<u2" if vocab <= 2**16 else "<u4"
    match cfg.form:
        case "topk":
            return np.dtype(
                [("ids", number, cfg.k), ("log_p", "<f2", cfg.k), ("tail", "<f4", len(cfg.kept_temperatures))]
            )
        case "sampled":
            return np.dtype([("ids", number, cfg.draws), ("entropy", "<f4", 1)])
        case "full":
            return np.dtype([("log_p", "<f2", vocab)])


def rows_of(lengths: Iterable[int]) -> int:
    """Rows of samples with so many supervised tokens each: the last one of a sample may be partly empty."""
    return sum(-(-n // TOKENS) for n in lengths)


def bytes_of(rows: int, cfg: DistillConfig, vocab: int) -> int:
    """That so many rows of one teacher take on the disk, their index with them, about."""
    return rows * (TOKENS * token_type(cfg, vocab).itemsize + INDEX)


class TeacherCache:
    """Rows of one teacher; a `types.TeacherReader`. May be forked and pickled into loader workers. ``with``: closed at
    the end.

    Raises `UserError` where the folder cannot be used, and for a ``k`` larger than the vocabulary.
    """

    def __init__(self, cfg: DistillConfig, key: TeacherKey) -> None:
        if cfg.form == "topk" and cfg.k > key.vocab:
            raise UserError(f"distill.k is {cfg.k}, but the student's vocabulary has {key.vocab} tokens; lower it")
        self.key = key
        self.type = token_type(cfg, key.vocab)
        self.meta = key.meta(cfg)
        self.rows = RowStore(
            teachers_dir(cfg), self.meta, row_bytes=TOKENS * self.type.itemsize, max_bytes=int(cfg.max_gb * 1e9),
            name="teacher cache",
            remedy="Give a writable folder with room in distill.dir (or BEHOLDER_CACHE), or raise distill.max_gb",
        )  # fmt: skip
        about = self.rows.folder / "about.json"
        if not about.is_file():
            atomic_write(about, to_json({"teacher": key.name, "bytes_per_token": self.type.itemsize}, indent=2) + "\n")
        self._hashes = ImageHashes(self.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close this process's files; the next call opens them again."""
        self.rows.close()
        self._hashes.close()

    # -- keys

    def sample_key(self, example: Example, targets: np.ndarray) -> bytes:
        """Of what the sample says and shows. Raises `ImageError` for an image that cannot be read."""
        said = [[t.role, [p.index if isinstance(p, ImageSlot) else p for p in t.parts]] for t in example.turns]
        shown = [self._hashes.of(ref).hex() for ref in example.images]
        digest = hashlib.sha256(json.dumps([said, shown]).encode())
        digest.update(np.ascontiguousarray(targets, dtype="<i8").tobytes())
        return digest.digest()

    @staticmethod
    def _row_keys(sample: bytes, num_tokens: int) -> list[bytes]:
        return [row_key(sample, k) for k in range(-(-num_tokens // TOKENS))]

    def has(self, example: Example, targets: np.ndarray) -> bool:
        """Whether all rows of the sample are there, as they were written: a row that is damaged is forgotten, so that
        it is made anew, and not found while a student learns."""
        return self._read(example, targets) is not None

    def _read(self, example: Example, targets: np.ndarray) -> np.ndarray | None:
        """What is kept of the sample's tokens; None where a row of them is not there, or damaged."""
        tokens = np.zeros(-(-len(targets) // TOKENS) * TOKENS, self.type)
        rows = tokens.view(np.uint8).reshape(-1, self.rows.row_bytes)
        keys = self._row_keys(self.sample_key(example, targets), len(targets))
        # Every row, not up to the first that is missing: a damaged one stays in the way of its successor.
        there = [self.rows.read_into(key, row.data) for key, row in zip(keys, rows, strict=True)]
        return tokens[: len(targets)] if all(there) else None

    def remember(self) -> None:
        """Keep the images' hashes for the next time."""
        self._hashes.save()

    # -- reading

    def taught(self, examples: Sequence[Example], targets: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        found: list[np.ndarray] = [np.zeros(0, self.type)]
        lost: list[str] = []
        for example, own in zip(examples, targets, strict=True):
            tokens = self._read(example, own)
            if tokens is None:
                lost.append(example.id)
            else:
                found.append(tokens)
        if lost:
            raise self.missing(lost)
        tokens = np.concatenate(found)
        return {name: _tensor(tokens[name]) for name in self.type.names or ()}

    def missing(self, lost: Sequence[str]) -> UserError:
        """What is told of samples without rows, and of other caches in the same folder, which may be what was meant."""
        some = ", ".join(map(repr, lost[:_NAMED])) + (", …" if len(lost) > _NAMED else "")
        return UserError(
            f"teacher cache {self.rows.root}: {len(lost):,} samples have no rows of the teacher {self.key.name} "
            f"({some}). {self._others()}Make them with: beholder teacher-cache CONFIG"
        )

    def _others(self) -> str:
        """Why rows are missing: damaged; or in what the nearest other sub-folder differs from this one, where this one
        has nothing."""
        if damaged := self.rows.corrupt_rows:
            return f"{damaged:,} rows were damaged on the disk, and are forgotten. "
        if len(self.rows):
            return "Others have: the data, or how it is laid out, has changed since. "
        told: list[tuple[int, str]] = []
        for path in sorted(self.rows.root.glob("*/meta.json")):
            if path.parent == self.rows.folder:
                continue
            try:
                other = json.loads(path.read_text(encoding="utf-8"))
                name = json.loads((path.parent / "about.json").read_text(encoding="utf-8"))["teacher"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
            if not isinstance(other, dict) or other.get("kind") != "teachers":
                continue
            differs = [k for k in self.meta if other.get(k) != self.meta[k]]
            words = "; ".join(f"{_SAID.get(k, k)}{_both(other.get(k), self.meta[k])}" for k in differs)
            told.append((len(differs), f"What is kept there of {str(name)[:200]} differs in {words}. "))
        return min(told)[1] if told else "Nothing is kept there yet. "

    # -- writing

    def writer(self) -> Any:
        """What `put` takes; killed at any instant, what was put before stays right."""
        return self.rows.writer()

    def put(
        self, writer: RowWriter, samples: Sequence[tuple[Example, np.ndarray]],
        said: Sequence[Mapping[str, torch.Tensor]],
    ) -> None:  # fmt: skip
        """Keep what the teacher says of the samples' tokens. Raises `UserError` where the cap leaves no room."""
        items: list[tuple[bytes, memoryview]] = []
        for (example, targets), columns in zip(samples, said, strict=True):
            n = len(targets)
            tokens = np.zeros(-(-n // TOKENS) * TOKENS, self.type)
            for name in self.type.names or ():
                value = columns[name].detach().cpu().numpy()
                tokens[name][:n] = value.reshape(n, *self.type[name].shape)
            rows = tokens.view(np.uint8).reshape(-1, self.rows.row_bytes)
            keys = self._row_keys(self.sample_key(example, targets), n)
            items += [(key, row.data) for key, row in zip(keys, rows, strict=True)]
        if writer.put(items) < len(items):
            raise UserError(
                f"teacher cache {self.rows.root}: distill.max_gb = {self.rows.max_bytes / 1e9:g} GB is full; raise it, "
                "lower distill.k, or use form sampled. What is stored stays"
            )

    def note_cost(self, tokens: int, seconds: float) -> None:
        """One line more of what rows have cost, for `seconds_a_token`."""
        path = self.rows.folder / _COSTS
        with writing(path), open(path, "ab") as file:
            file.write(json.dumps({"tokens": tokens, "seconds": seconds}).encode() + b"\n")


def seconds_a_token(folder: Path) -> float | None:
    """What a supervised token in a teacher's folder has cost on the average of all calls that made some; None where
    none is known. A call that was killed has left no line, so neither its tokens nor its seconds count."""
    tokens, seconds = 0, 0.0
    try:
        lines = (folder / _COSTS).read_bytes().splitlines()
    except OSError:
        return None
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):  # half a line: a full disk
            made = json.loads(line)
            each, took = int(made["tokens"]), float(made["seconds"])
            if each > 0 and 0 <= took < math.inf:
                tokens, seconds = tokens + each, seconds + took
    return seconds / tokens if tokens else None


def _tensor(column: np.ndarray) -> torch.Tensor:
    """A column as torch has types for it."""
    kind = {"u": np.int32, "f": column.dtype.newbyteorder("=")}[column.dtype.kind]
    return torch.from_numpy(np.ascontiguousarray(column.astype(kind)))


def _both(other: object, own: object) -> str:
    """Two values that a person can read."""
    return "" if isinstance(own, str) and len(own) == 64 else f" ({other} there, {own} here)"
