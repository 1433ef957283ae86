"""What is known of a sweep, ``sweep.json`` and ``summary.csv``, and what its runs are called.

A run is named after what the grid sets: the last part of the setting and its value, ``lr5e-5_vision_ln0`` for
``train.lr.connector: 5e-5`` and ``model.connector.vision_ln: false``. A setting per group of parameters (``…connector``
or ``…lora`` below a learning rate or a weight decay) goes by the part before. Where two settings would then be called
the same, both have their full dotted name. Values: 0 and 1 for false and true, 5e-5 for 0.00005, text without the
characters that a path cannot have. Repeats end in ``_s<seed>``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import ValidationError

from beholder.evidence import Measurement, Record
from beholder.runs import atomic_write
from beholder.studies.score import Ranking
from beholder.types import UserError

R = TypeVar("R", bound=Record)

MEASURED = {
    "eval_loss": "eval.loss", "d_shuffle": "ablation.delta.shuffled", "d_zero": "ablation.delta.zero",
    "d_noise": "ablation.delta.noise",
}  # fmt: skip
"""What is kept of a run, under which name."""
DELTAS = ("Δshuffle", "Δzero", "Δnoise")
"""What `Row.deltas` are called."""

SUMMARY, RECORD = "summary.csv", "sweep.json"

Value = bool | int | float | str


class Row(Record):
    """One run of the sweep."""

    name: str
    point: str
    """Its combination of settings: the name without the seed."""
    settings: dict[str, bool | int | float | str]
    seed: int
    folder: str
    """Below the sweep's folder."""
    config_hash: str
    status: Literal["finished", "failed", "interrupted", "waiting"]
    """waiting: not run yet."""
    reason: str = ""
    """failed: what it said."""
    eval_loss: Measurement | None = None
    """On all held-out samples, at the end."""
    buckets: tuple[Measurement, ...] = ()
    """The same by target length."""
    d_shuffle: Measurement | None = None
    d_zero: Measurement | None = None
    d_noise: Measurement | None = None
    """Loss with the wrong image minus loss with the own one."""
    score: float | None = None
    flags: tuple[str, ...] = ()
    """Why it must not be used."""
    gates_failed: tuple[str, ...] = ()
    steps: int | None = None
    wall_s: float | None = None
    """Seconds from start to end; None where the run was interrupted and continued."""

    @property
    def deltas(self) -> tuple[Measurement | None, ...]:
        return self.d_shuffle, self.d_zero, self.d_noise


class SweepRecord(Record):
    """``sweep.json``: all that the table, the pages and the verdict are made from."""

    schema_version: Literal[1] = 1
    name: str
    created: str
    grid: dict[str, list[bool | int | float | str]]
    seeds: list[int]
    ablation_weight: float
    collapsed_below: float
    rows: list[Row]
    """In the order of the grid."""
    ranking: Ranking
    warnings: tuple[str, ...] = ()

    def by_rank(self) -> list[Row]:
        """Best first: usable points, flagged ones, then runs without a score."""
        place = {p.point: k for k, p in enumerate(self.ranking.places)}
        last = len(place)
        return sorted(
            self.rows,
            key=lambda r: (last if r.score is None else place[r.point], r.score if r.score is not None else 0.0),
        )

    @classmethod
    def load(cls, path: str | Path) -> SweepRecord:
        """Read ``sweep.json``, given as the file or as the sweep's folder."""
        return read_record(cls, Path(path), RECORD, "sweep", "a sweep")


def read_record(kind: type[R], path: Path, name: str, command: str, what: str) -> R:
    """The record of a study, given as its file or as the study's folder, in which it is called ``name``. Raises
    `UserError` where there is none, or another one."""
    file = path / name if path.is_dir() else path
    try:
        return kind.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; beholder {command} CONFIG writes it") from None
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"])) or "(top)"
        raise UserError(f"{file}: not the record of {what}: {where}: {first['msg']}") from e


def write_pages(folder: str | Path, pages: Mapping[str, str]) -> tuple[Path, ...]:
    """A study's pages by the names of their files, each whole or not at all; gives their paths."""
    paths = tuple(Path(folder) / name for name in pages)
    for path, text in zip(paths, pages.values(), strict=True):
        atomic_write(path, text)
    return paths


# ---------------------------------------------------------------------------------------------------------------
# Names


def titles(keys: Sequence[str]) -> dict[str, str]:
    """Dotted setting -> what it is called in the names of runs."""

    def short(key: str) -> str:
        parts = key.split(".")
        group = parts[-1] in ("connector", "lora", "vision") and len(parts) > 1 and parts[-2] in ("lr", "weight_decay")
        return parts[-2] if group else parts[-1]

    found = {key: short(key) for key in keys}
    taken = list(found.values())
    return {key: title if taken.count(title) == 1 else key for key, title in found.items()}


def word(value: Value) -> str:
    """A value as it stands in the names of runs: ``0``, ``5e-5``, the last part of a path."""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, str):
        return Path(value).name
    if isinstance(value, float) and value and abs(value) < 1e-3:
        sign, digits, exponent = Decimal(repr(value)).normalize().as_tuple()
        assert isinstance(exponent, int)
        text = "".join(map(str, digits))
        fraction = f".{text[1:]}" if text[1:] else ""
        return f"{'-' * sign}{text[0]}{fraction}e{exponent + len(digits) - 1}"
    return repr(value)


# ---------------------------------------------------------------------------------------------------------------
# summary.csv


def summary_csv(record: SweepRecord) -> str:
    """A row per run in the order of the grid; an empty cell is a number that was not measured. Full precision."""
    buckets = list(dict.fromkeys(m.stratum for r in record.rows for m in r.buckets if m.stratum))
    head = [
        "name", *record.grid, "seed", "eval_loss_end", *(f"eval_loss_{b}" for b in buckets), "d_shuffle",
        "d_shuffle_low", "d_shuffle_high", "d_zero", "d_noise", "score", "flags", "steps", "wall_s", "status",
        "config_hash",
    ]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for r in record.rows:
        by_bucket = {m.stratum: m.value for m in r.buckets}
        low, high = r.d_shuffle.ci95 if r.d_shuffle and r.d_shuffle.ci95 else (None, None)
        writer.writerow([
            r.name, *(r.settings[key] for key in record.grid), r.seed, value_of(r.eval_loss),
            *(by_bucket.get(b) for b in buckets), value_of(r.d_shuffle), low, high, value_of(r.d_zero),
            value_of(r.d_noise), r.score, "; ".join(r.flags), r.steps, r.wall_s, r.status, r.config_hash,
        ])  # fmt: skip
    return out.getvalue()


def value_of(m: Measurement | None) -> float | None:
    """Its number; None when it was not measured."""
    return None if m is None else m.value
