"""Config + points + seeds -> one resolved config a run, all on one split and one golden set; and what is done of it.

Nothing is run here, and planning writes nothing.
"""

from __future__ import annotations

import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from beholder.config import PointSetting, RunConfig, StudyConfig, SweepConfig, decided_by, settings
from beholder.config.file import ConfigError, config_hash, diff_configs, load_config
from beholder.evidence import Evidence, held_out_hashes
from beholder.runs import to_json
from beholder.studies.record import Value, titles, word
from beholder.types import Status, UserError


@dataclass(frozen=True, slots=True)
class Point:
    """One run before it is run."""

    name: str
    point: str
    settings: dict[str, PointSetting]
    cfg: RunConfig
    folder: Path
    config_file: Path
    log: Path
    command: str = "run"
    """What of beholder is done with its config; anything else is a preparation: it leaves no evidence, only one of them
    is under way at a time, and it is done anew as long as a run waits for it."""
    waits_for: tuple[str, ...] = ()
    """Names of others of the study that must have ended well, beside those that its config names."""

    @property
    def hash(self) -> str:
        return config_hash(self.cfg)


@dataclass(frozen=True, slots=True)
class Points:
    """All runs of a study."""

    kind: Literal["sweep", "footprint", "distillation"]
    folder: Path
    name: str
    study: StudyConfig
    device: str
    runs: list[Point]
    later: Callable[[], list[Point]] = list
    """Asked whenever a run has finished: runs that could not be planned before."""


def points_of(config: str | Path, overrides: Sequence[str] = ()) -> Points:
    """Every run of the sweep with its resolved config. Nothing is written.

    Raises `UserError` for a config without ``sweep:``, for a grid that varies what the runs are measured on, and with
    everything that is wrong with any combination.
    """
    base = load_config(config, overrides)
    sweep = base.sweep
    if sweep is None:
        raise UserError(
            f"{config}: has no sweep: section, so there is nothing to vary; add one, for example\n"
            "  sweep:\n    grid:\n      train.lr.connector: [5e-5, 1e-4, 2e-4]\nor use beholder run"
        )
    _refuse(sweep, base)
    runs = resolve(config, overrides, base, sweep, {name: dict(sets) for name, sets in _points(sweep).items()})
    return Points("sweep", Path(base.run_dir), base.run_name, sweep, base.device, runs)


def resolve(
    config: str | Path, overrides: Sequence[str], base: RunConfig, study: StudyConfig,
    points: Mapping[str, Mapping[str, PointSetting]], after: Mapping[str, str] | None = None,
    once: frozenset[str] = frozenset(),
) -> list[Point]:  # fmt: skip
    """A run of every point and seed: the base config with the point's settings, in a folder below the study's.

    ``after``: point -> point whose run of the same seed it starts from. ``once``: points that are run with the first
    seed alone. Raises `UserError` with everything that is wrong with any of them, and for runs of which each would wait
    for another.
    """
    folder, after = Path(base.run_dir), after or {}
    first = study.seeds[0] if study.seeds else None
    runs: list[Point] = []
    wrong: list[str] = []
    for (point, sets), seed in itertools.product(points.items(), study.seeds or (None,)):
        if point in once and seed != first:
            continue
        name = run_name(point, seed)
        given = {
            **sets,
            "seed": base.seed if seed is None else seed,
            "data.split_seed": base.measure_seed,
            "run_name": name,
            "output_dir": str(folder / name),
        }
        if point in after:
            origin = run_name(after[point], first if after[point] in once else seed)
            given["model.connector.load_checkpoint"] = str(folder / origin)
        if (known := base.eval.baseline_run) is not None and lies_in(known, folder / name):
            given["eval.baseline_run"] = None  # it is the baseline: its own step 0
        if base.eval.golden_set_path is None and base.golden_size and base.eval.run_golden_every != "never":
            given["eval.golden_set_path"] = str(folder / "golden.jsonl")
        lines = [*overrides, *(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items())]
        try:
            cfg = load_config(config, lines)
            cfg = cfg.model_copy(update=dict.fromkeys(cfg.studies))
        except ConfigError as e:
            wrong.append(f"{name}: {e}")
            continue
        files = folder / "configs" / f"{name}.yaml", folder / "logs" / f"{name}.log"
        runs.append(Point(name, point, dict(sets), cfg, folder / name, *files))
    if wrong:
        raise UserError("these points cannot be run:\n" + "\n".join(wrong))
    _check_order(runs)
    return runs


def run_name(point: str, seed: int | None) -> str:
    return point if seed is None else f"{point}_s{seed}"


def needs(run: Point, runs: Sequence[Point]) -> list[Point]:
    """What of the study it waits for: runs that it starts from, or whose first reading is its baseline."""
    named = [p for p in (run.cfg.model.connector.load_checkpoint, run.cfg.eval.baseline_run) if p is not None]
    return [r for r in runs if r.name in run.waits_for or any(lies_in(p, r.folder) for p in named)]


def lies_in(path: str | Path, folder: Path) -> bool:
    """Whether it is the folder or, as a run's checkpoint, in it."""
    return Path(path).resolve().is_relative_to(folder.resolve())


def _check_order(runs: Sequence[Point]) -> None:
    """`UserError` where each of some runs would wait for another of them."""
    waits = {run.name: [r.name for r in needs(run, runs)] for run in runs}
    done: set[str] = set()
    while ready := [name for name in waits if name not in done and done.issuperset(waits[name])]:
        done.update(ready)
    if left := {name: next(n for n in w if n not in done) for name, w in waits.items() if name not in done}:
        course = [next(iter(left))]
        while course[-1] not in course[:-1]:
            course.append(left[course[-1]])
        course = course[course.index(course[-1]) :]
        raise UserError(
            f"runs {' → '.join(course)} wait for each other: each starts from the next one's run "
            "(model.connector.load_checkpoint, after) or is judged by it (eval.baseline_run); name another one there"
        )


def alters_measuring(key: str) -> bool:
    """Whether a setting says on which samples, in which tokens or by which rule a run is measured: no point of a study
    may set it."""
    decided = decided_by(RunConfig, key)
    return bool(decided & {"held_out", "measuring", "run"}) and "data" not in decided


def wrong_settings(where: str, given: Iterable[str], whose: str) -> Iterator[str]:
    """What of the settings of a point of one's own there is not, or may not be said there."""
    known = [s.path for s in settings(RunConfig)]
    for key in given:
        if key not in known and not key.startswith("guardrails."):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            yield f"{where}: no setting {key!r}{f'; nearest: {near[0]}' if near else ''}"
        elif key == "seed" or alters_measuring(key):
            yield f"{where} sets {key}; {whose} {ALIKE}"


ALIKE = "must be measured on the same samples by the same rule"
"""Why not."""


def _refuse(sweep: SweepConfig, base: RunConfig) -> None:
    wrong = []
    if "seed" in sweep.grid:
        wrong.append("sweep.grid varies seed; list the seeds in sweep.seeds, so that they count as repeats")
    for key in sweep.grid:
        if alters_measuring(key):
            wrong.append(f"sweep.grid varies {key}; runs of a sweep {ALIKE}")
    missing = {"shuffled", "zero"} - set(base.ablation.conditions)
    if missing:
        wrong.append(
            f"ablation.conditions leaves out {', '.join(sorted(missing))}, which the score needs; add what is missing"
        )
    if wrong:
        raise UserError("this sweep cannot be run:\n  " + "\n  ".join(wrong))


def _points(sweep: SweepConfig) -> dict[str, dict[str, Value]]:
    """Name -> settings of every combination; the last setting of the grid varies fastest."""
    heads = titles(list(sweep.grid))
    labels = {key: _labels(values) for key, values in sweep.grid.items()}
    points = {}
    for choice in itertools.product(*(range(len(v)) for v in sweep.grid.values())):
        picked = list(zip(sweep.grid, choice, strict=True))
        name = "_".join(heads[key] + labels[key][i] for key, i in picked)
        points[name] = {key: sweep.grid[key][i] for key, i in picked}
    return points


def _labels(values: Sequence[Value]) -> list[str]:
    """A path-safe word for each value, all different."""
    words = [re.sub(r"[^A-Za-z0-9_.+-]+", "-", word(v)) for v in values]
    if len(set(words)) < len(words) or not all(words):
        return [f"{word}-{k}" for k, word in enumerate(words, 1)]
    return words


def check_folders(points: Points) -> None:
    """`UserError` naming the settings for every run folder that holds a run of other settings."""
    wrong = []
    for run in points.runs:
        record = read_json(run.folder / "run.json")
        if record is None or record.get("config_hash") == run.hash:
            continue
        try:
            changed = diff_configs(load_config(run.folder / "config.yaml"), run.cfg)
            told = [f"{path}: {to_json(old)} there, {to_json(new)} here" for path, old, new in changed]
        except UserError as e:
            told = [f"its config.yaml cannot be read: {str(e).splitlines()[-1].strip()}"]
        wrong.append(f"{run.folder}:\n    " + "\n    ".join(told or ["written by another version of beholder"]))
    if wrong:
        raise UserError(
            f"these folders hold runs of other settings than this {points.kind}'s:\n  "
            + "\n  ".join(wrong)
            + f"\nPut the settings back to continue that {points.kind}, or set another run_name or output_dir for a "
            "new one."
        )


def is_finished(run: Point) -> bool:
    """Whether the run ended with these settings, by itself or by a guardrail, and left its evidence; no preparation
    has."""
    if run.command != "run":
        return False
    record = read_json(run.folder / "run.json")
    return (
        record is not None
        and record.get("status") in (Status.SUCCEEDED, Status.STOPPED_BY_GUARDRAIL)
        and record.get("config_hash") == run.hash
        and (run.folder / "evidence.json").is_file()
    )


def facts_of(run: Point, failed: Mapping[str, str], *, interrupted: bool) -> dict[str, Any]:
    """What a study's record says of each of its runs, measured or not. ``failed``: name -> reason of those that did;
    ``interrupted``: the study was told to stop."""
    if is_finished(run):
        status = "finished"
    elif run.name in failed:
        status = "failed"
    else:
        status = "interrupted" if interrupted and (run.folder / "run.json").exists() else "waiting"
    return {
        "name": run.name, "point": run.point, "settings": run.settings, "seed": run.cfg.seed,
        "folder": run.folder.name, "config_hash": run.hash, "status": status,
        "reason": failed[run.name] if status == "failed" else "",
    }  # fmt: skip


class Told(Protocol):
    """What a study's record knows of a run, as `facts_of` says it."""

    @property
    def name(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def reason(self) -> str: ...


def warnings_of(points: Points, evidence: Mapping[str, Evidence], rows: Sequence[Told]) -> Iterator[str]:
    """What every study warns of: runs that failed or are still to be made, and runs that do not compare."""
    yield from (f"{row.name} failed: {row.reason}" for row in rows if row.status == "failed")
    if unfinished := [r.name for r in rows if r.status in ("interrupted", "waiting")]:
        yield f"The {points.kind} is not finished: {', '.join(unfinished)}. The same command continues."
    hashes = held_out_hashes([(points.folder / name, e) for name, e in evidence.items()])
    if len(set(hashes)) > 1 or len({e.data.eval for e in evidence.values()}) > 1:
        which = "the grid" if points.kind == "sweep" else "a point"
        yield f"The runs were not measured on the same held-out samples: a setting of {which} changes which they are."


def read_json(path: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, RecursionError):
        record = json.loads(path.read_bytes())
        if isinstance(record, dict):
            return record
    return None
