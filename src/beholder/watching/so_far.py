"""What the folder of a run says up to now, read as it grows: a run that goes on, one that ended, none yet.

Files are read where they have changed, ``metrics.jsonl`` from where it was left, and what is kept of it is bounded. No
file outside the folder is opened but the golden pictures, through the data's own reader. Nothing is written or locked.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from stat import S_ISREG
from typing import Any

import orjson

from beholder.config import RunConfig
from beholder.config.file import load_config
from beholder.data.images import ImageError, decode, read_bytes
from beholder.evidence import (
    Candidate,
    Cost,
    Curve,
    DataFacts,
    Evidence,
    GuardrailStop,
    Measurement,
    Prediction,
    Sample,
    guardrails,
    thin,
    thumbnail,
)
from beholder.evidence.catalogue import LOGGED, LOGGED_KINDS, logged_curves, quantity
from beholder.evidence.gates import judge
from beholder.probes import golden, golden_history
from beholder.probes.caption_metrics import exact_match
from beholder.runs import RunDir
from beholder.types import ImageRef, Status, UserError

MAX_CHUNK = 8_000_000
"""Bytes of ``metrics.jsonl`` that one look reads; a long log that is opened late takes several."""
MAX_LINE = 1_000_000
MAX_POINTS = 2000
"""That are kept of a curve; of more, neighbours are joined to their means."""
SENT_POINTS = 240
MAX_CURVES = 40
MAX_FILE = 64_000_000
"""Of any other file of the run; a larger one is not read."""
NUM_PICTURES = 24
"""Golden samples that are shown."""
MAX_IMAGES = 16
"""Of a golden sample."""
MAX_TEXT = 10_000
"""Characters of a text; the rest is left out."""
MAX_READINGS = 5000
"""Of the monitors; guardrails judge them."""


class Series:
    """The points of a curve in bounded memory: equal groups of neighbours as means, and the last point as it is."""

    def __init__(self) -> None:
        self.last: tuple[float, float] | None = None
        self._groups: list[tuple[float, float, int]] = []
        self._size = 1

    def add(self, x: float, y: float) -> None:
        if self._groups and self._groups[-1][2] < self._size:
            gx, gy, n = self._groups[-1]
            self._groups[-1] = (gx + x, gy + y, n + 1)
        else:
            self._groups.append((x, y, 1))
        self.last = (x, y)
        if len(self._groups) > MAX_POINTS:
            pairs = zip(self._groups[::2], self._groups[1::2], strict=False)
            odd = self._groups[-1:] if len(self._groups) % 2 else []
            self._groups = [(a[0] + b[0], a[1] + b[1], a[2] + b[2]) for a, b in pairs] + odd
            self._size *= 2

    def curve(self, name: str, unit: str, first: Sequence[tuple[float, float]] = ()) -> Curve:
        points = [*first, *((x / n, y / n) for x, y, n in self._groups)]
        if self.last is not None and self._size > 1 and points[-1] != self.last:
            points.append(self.last)
        return thin(name, unit, points, SENT_POINTS)


class Metrics:
    """``metrics.jsonl`` as far as it was read: curves, and the last record of every kind."""

    def __init__(self) -> None:
        self._file: tuple[int, int] | None = None
        self._offset = 0
        self._reset()

    def _reset(self) -> None:
        self._offset = 0
        self.damaged = 0
        """Whole lines that are no JSON object."""
        self.series: dict[str, Series] = {}
        self.monitors: dict[str, Series] = {}
        self.trained: Mapping[str, Any] = {}
        """The last optimizer step."""
        self.evaluated: Mapping[str, Any] = {}
        """The last evaluation of all held-out samples."""
        self.readings: list[Mapping[str, Any]] = []
        """What the monitors said."""
        self.candidates: dict[int, Candidate] = {}
        self.step = 0

    def read(self, path: Path) -> bool:
        """Take in what is new; whether anything was. A file that is gone or was written anew starts over."""
        try:
            if not path.is_file():  # a pipe would wait for who writes into it
                raise FileNotFoundError
            with open(path, "rb") as file:
                stat = os.fstat(file.fileno())
                now = (stat.st_dev, stat.st_ino)
                changed = False
                if self._file != now or stat.st_size < self._offset:  # a resumed run drops lines by writing anew
                    changed = self._file is not None
                    self._reset()
                    self._file = now
                file.seek(self._offset)
                data = file.read(MAX_CHUNK)
        except OSError:
            gone = self._file is not None
            self._file = None
            self._reset()
            return gone
        whole = data.rfind(b"\n") + 1  # the rest is still being written, or was torn
        if not whole and len(data) > MAX_LINE:
            whole = len(data)
        self._offset += whole
        for line in data[:whole].split(b"\n"):
            if line.strip():
                self._take(line)
        return changed or whole > 0

    def _take(self, line: bytes) -> None:
        try:
            row = orjson.loads(line)
            if not isinstance(row, dict):
                raise ValueError
        except ValueError:
            self.damaged += 1
            return
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            return
        self.step = max(self.step, step)
        for key, value in row.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                continue
            if key in _KEYS or key.startswith(LOGGED_KINDS):
                self._add(self.series, key, step, value)
        if "step_time_s" in row:
            self.trained = row
        if "eval_loss" in row:
            self.evaluated = row
        if isinstance(found := row.get("candidate"), dict):
            with suppress(ValueError):
                self.candidates[step] = Candidate.model_validate(found)
        if isinstance(found := row.get("monitors"), dict):
            values = {str(k): float(v) for k, v in found.items() if isinstance(v, int | float) and math.isfinite(v)}
            if len(self.readings) < MAX_READINGS:
                self.readings.append({k: row[k] for k in ("step", "baseline_run") if k in row} | {"monitors": values})
            for name, value in values.items():
                self._add(self.monitors, name, step, value)

    def _add(self, among: dict[str, Series], key: str, step: int, value: float) -> None:
        if key in among or len(among) < MAX_CURVES:
            among.setdefault(key, Series()).add(step, value)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} …"


_KEYS = frozenset(key for _, _, key in LOGGED)


@dataclass
class Golden:
    """The golden set: what was written of it by step, and its pictures."""

    files: dict[Path, tuple[int, int]] = field(default_factory=dict)
    rows: dict[int, list[golden.GoldenCaption]] = field(default_factory=dict)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    """By what the golden set calls a sample's images."""


class SoFar:
    """A run's folder, looked at again and again. Not for several threads at a time."""

    def __init__(self, folder: str | Path) -> None:
        self.run = RunDir(folder)
        self.metrics = Metrics()
        self.golden = Golden()
        self.facts: dict[str, Any] = {}
        """``run.json``."""
        self.cfg: RunConfig | None = None
        self.evidence: Evidence | None = None
        """The run's own, once it has written one."""
        self.baseline: list[Measurement] = []
        self.notes: dict[str, str] = {}
        """What could not be read, by file."""
        self.changed = 0
        """Looks that found something new."""
        self._seen: dict[str, tuple[int, int, int]] = {}
        self._there: bool | None = None

    @property
    def exists(self) -> bool:
        return bool(self._there)

    def look(self) -> None:
        """Read what has changed."""
        there = self.run.path.is_dir()
        new = there != self._there
        if not there and self._there:  # removed: what comes next is another run
            fresh = SoFar(self.run.path)
            fresh.changed = self.changed
            self.__dict__.update(fresh.__dict__)
        self._there = there
        if there:
            new |= self.metrics.read(self.run.metrics_path) if self._inside(self.run.metrics_path) else False
            for name, take in (
                ("run.json", self._take_facts), ("config.yaml", self._take_config),
                ("baseline.json", self._take_baseline), ("evidence.json", self._take_evidence),
            ):  # fmt: skip
                new |= self._again(name, take)
            new |= self._look_at_golden()
        self.changed += new

    # -- one file each

    def _inside(self, path: Path) -> bool:
        """Whether it lies in the run's folder once every symlink is resolved."""
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.run.path))

    def _again(self, name: str, take: Any) -> bool:
        path = self.run.path / name
        try:
            if not self._inside(path):
                raise UserError("it is a link to somewhere else, so it is not read")
            stat = path.stat()
            stamp = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            if self._seen.get(name) == stamp:
                return False
            self._seen[name] = stamp
            if not S_ISREG(stat.st_mode):  # to open a pipe is to wait for who writes into it
                raise UserError("it is no file, so it is not read")
            if stat.st_size > MAX_FILE:
                raise UserError(f"it has {stat.st_size:,} bytes, so it is not read")
            take(path)
            self.notes.pop(name, None)
            return True
        except FileNotFoundError:
            if self._seen.pop(name, None) is None:
                return False
            take(None)
            self.notes.pop(name, None)
            return True
        except (OSError, UserError, ValueError, RecursionError) as error:
            note = f"{name}: {error}"
            new = self.notes.get(name) != note
            self.notes[name] = note
            return new

    def _take_facts(self, path: Path | None) -> None:
        self.facts = {} if path is None else self.run.read_json(path.name)

    def _take_config(self, path: Path | None) -> None:
        self.cfg = None if path is None else load_config(path)

    def _take_baseline(self, path: Path | None) -> None:
        rows = [] if path is None else self.run.read_json(path.name).get("measurements", [])
        if not isinstance(rows, list):
            raise UserError(f"measurements holds {type(rows).__name__}, not a list")
        self.baseline = [Measurement.model_validate(row) for row in rows]

    def _take_evidence(self, path: Path | None) -> None:
        self.evidence = None if path is None else Evidence.from_json(path.read_bytes())

    # -- the golden set

    def _look_at_golden(self) -> bool:
        try:
            files = golden_history.read_run(self.run.path).files
        except (UserError, OSError):
            files = {}
        new = False
        for step in set(self.golden.rows) - set(files):
            del self.golden.rows[step]
            new = True
        for step, path in files.items():
            try:
                stat = path.stat()
                stamp = (stat.st_ino, stat.st_mtime_ns)
                fit = S_ISREG(stat.st_mode) and stat.st_size <= MAX_FILE
                if self.golden.files.get(path) == stamp or not fit or not self._inside(path):
                    continue
                self.golden.files[path] = stamp
                self.golden.rows[step] = golden.load_captions(path)[:NUM_PICTURES]
                self.notes.pop(path.name, None)
            except (UserError, OSError) as error:
                self.notes[path.name] = f"{path.name}: {error}"
            new = True
        return new

    def _pictures(self, name: str) -> list[str]:
        """Small pictures of a golden sample, from the folders that the run's config names for its data."""
        if self.cfg is None:
            return []
        if name not in self.golden.pictures:
            data = self.cfg.data
            roots = dict.fromkeys(s.image_root for s in (*data.eval_sources, *data.train_sources) if s.image_root)
            found: list[str] = []
            for part in name.split(", ", MAX_IMAGES)[:MAX_IMAGES]:
                for root in roots:
                    with suppress(ImageError, OSError):
                        raw = read_bytes(ImageRef(root, part, more_roots=tuple(data.more_image_roots)))
                        found.append(thumbnail(decode(raw, part, data.max_megapixels), 132))
                        break
            self.golden.pictures[name] = found
        return self.golden.pictures[name]

    def samples(self) -> list[Sample]:
        """The golden set with what was written of it at every step; of an ended run, what its evidence has."""
        if self.ended_with is not None and self.ended_with.samples:
            return list(self.ended_with.samples)
        found: dict[tuple[str, str, str], Sample] = {}
        for step in sorted(self.golden.rows):
            for row in self.golden.rows[step]:
                key = golden.key(row)
                if key not in found:
                    if len(found) == NUM_PICTURES:
                        continue
                    found[key] = Sample(
                        id=_cut(row.id), images=self._pictures(row.image_relpath), reference=_cut(row.gt_text),
                        predictions=[], question=_cut(row.prompt_text), bucket=_cut(row.bucket),
                    )  # fmt: skip
                exact = exact_match(row.pred_text, row.gt_text)
                found[key].predictions.append(Prediction(step=step, text=_cut(row.pred_text), exact=exact))
        return list(found.values())

    # -- all of it

    @property
    def status(self) -> Status | None:
        """As the run's own record has it; None while there is none."""
        with suppress(ValueError):
            return Status(self.facts.get("status"))
        return None

    @property
    def ended_with(self) -> Evidence | None:
        """The evidence of a run that has ended; that of one which goes on again is of before."""
        return None if self.status in (None, Status.RUNNING) else self.evidence

    @property
    def total_steps(self) -> int | None:
        """Of the whole training, as far as it can be told before its end."""
        if self.cfg is None:
            return None
        if self.cfg.train.train_steps is not None:
            return self.cfg.train.train_steps
        epoch, step = self.metrics.trained.get("epoch"), self.metrics.trained.get("step")
        if not isinstance(epoch, int | float) or not isinstance(step, int) or epoch <= 0:
            return None
        return max(step, round(self.cfg.train.num_epochs * step / epoch))

    def curves(self) -> list[Curve]:
        """What was logged over the steps, with the baseline at step 0 where there is one."""
        m = self.metrics
        before = next((x.value for x in self.baseline if x.name == "eval.loss" and x.stratum is None), None)
        start = {} if before is None else {"eval_loss": [(0.0, before)]}
        found = [
            m.series.get(key, Series()).curve(name, unit, start.get(key, ()))
            for name, unit, key in logged_curves(m.series) if key in m.series or key in start
        ]  # fmt: skip
        return found + [series.curve(name, quantity(name)[0].unit) for name, series in m.monitors.items()]

    def measured(self) -> list[Measurement]:
        """The last values that the run logged of what its gates judge. They have no interval: that comes at the end."""
        m = self.metrics
        found: dict[str, Measurement] = {}

        def add(name: str, value: Any, n: int = 1) -> None:
            if isinstance(value, int | float) and math.isfinite(value):
                row = quantity(name)[0]
                found[name] = Measurement(name=name, value=value, unit=row.unit, better=row.better, n=max(1, n))

        n = m.evaluated.get("eval_examples")
        add("eval.loss", m.evaluated.get("eval_loss"), n if isinstance(n, int) else 1)
        if m.candidates:
            last = m.candidates[max(m.candidates)]
            add("ablation.delta.shuffled", last.delta_shuffled)
            add("collapse.worst", last.collapse)
        for name, value in (m.readings[-1]["monitors"] if m.readings else {}).items():
            add(name, value)
        return list(found.values())

    def would_stop(self) -> GuardrailStop | None:
        """What the guardrails say of the readings so far, by their own rule."""
        return (
            None if self.cfg is None else guardrails.judge(guardrails.readings(self.metrics.readings), self.cfg.guards)
        )

    def as_evidence(self) -> Evidence:
        """The run's evidence, or what there is of it yet, for the functions of `report`."""
        if self.ended_with is not None:
            return self.ended_with
        measured = self.measured()
        gates = judge(self.cfg.gates, measured) if self.cfg is not None else []
        return Evidence(
            run_name=str(self.facts.get("run_name") or self.run.path.name), stage=str(self.facts.get("stage") or ""),
            status=self.status or Status.RUNNING, created=str(self.facts.get("created") or ""), trainable=[],
            data=DataFacts(records=0, train=0, eval=0), baseline=self.baseline, measurements=measured, gates=gates,
            curves=self.curves(), samples=self.samples(), candidates=list(self.metrics.candidates.values()),
            step=self.metrics.step, cost=Cost(steps=self.metrics.step), config_yaml="",
        )  # fmt: skip
