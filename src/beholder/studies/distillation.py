"""Does a teacher help? (``beholder distill``): plan, keep what the teachers say, run what is missing, conclude.

    plan      config -> arms: taught (``kd``), at the same steps without a teacher (``alone``), one's own
    keep      of every taught run what its teachers say of its samples, as ``beholder teacher-cache`` in a process of
              its own; nothing where they are asked online
    run       as a sweep does (`studies.runner`). When ``kd`` and ``alone`` of the first seed have finished, it is known
              how many steps without a teacher take the time of the taught ones and of what is kept: those of the arm
              ``longer``, planned then and written down (``longer.json``), so that a resume decides the same
    collect   the runs' evidence.json -> distillation.json, .csv, .html, .md

The folder is the config's own run folder, laid out as a sweep's; what was kept, and for which run: ``caches``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from beholder.config import DistillationConfig, DistillConfig, PointSetting, RunConfig, TeacherConfig, TrainConfig
from beholder.config.distill import PRESETS
from beholder.config.file import load_config
from beholder.evidence import Evidence, Measurement, held_out_hashes, load_evidence
from beholder.runs import atomic_write, now
from beholder.store.teachers import KEPT_FOR, seconds_a_token
from beholder.studies.distillation_page import print_distillation, render_distillation
from beholder.studies.distillation_record import (
    ACCURACY,
    ALONE,
    COLUMNS,
    KD,
    LONGER,
    ONLY_KEPT,
    PAGE,
    RECORD,
    TABLE,
    DistillationRecord,
    DistillationRow,
    Longer,
    TeacherFacts,
    conclude,
    distillation_csv,
)
from beholder.studies.points import (
    Point,
    Points,
    facts_of,
    is_finished,
    resolve,
    warnings_of,
    wrong_settings,
)
from beholder.studies.runner import exit_code, run_points, tell, tell_end
from beholder.terminal import Terminal
from beholder.train import checkpoint
from beholder.train.promoted import check_promoted
from beholder.train.trained import identity
from beholder.types import UserError

STEPS = "longer.json"
NO_TEACHER: dict[str, PointSetting] = {"distill.alpha": 0.0, "distill.alpha_end": None, "distill.preset": None}
"""What makes a config one without a teacher."""


@dataclass(frozen=True)
class Study:
    """A distillation study before it is run, or as far as it has got."""

    points: Points
    base: RunConfig
    longer: Longer | None = None
    """None: not known yet, or not wanted."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DistillationResult:
    """How the study ended. The command line leaves with `exit_code`."""

    folder: Path
    record: DistillationRecord
    signal: int | None = None
    """The signal that stopped it; the same command continues."""

    @property
    def exit_code(self) -> int:
        """0: every run has a result. 1: some failed. 128 + signal: interrupted."""
        return exit_code(self.signal, [r.status for r in self.record.rows])

    def print(self, console: Console) -> None:
        print_distillation(self.record, console)
        tell_end(console, self.folder, PAGE, self.signal)


def run_distillation(
    config: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None, promote_anyway: bool = False
) -> DistillationResult:
    """Run what is missing of a distillation study, then write and return its record; ``console`` hears how it comes
    along.

    Finished runs are not run again, what is kept of teachers is not asked again, an interrupted run goes on from its
    last checkpoint, one that fails is named and the others go on. Ctrl-C (or SIGTERM) lets the running ones finish
    their step and save. Raises `UserError` for whatever is known to be impossible before anything runs.
    """
    console = console or Terminal()
    study = plan_distillation(config, overrides)
    for cfg in {r.cfg.model.connector.load_checkpoint: r.cfg for r in study.points.runs}.values():
        if (told := check_promoted(cfg, promote_anyway)) is not None:
            tell(console, study.points.kind, f"WARNING: {told}")
    waiting = [r.cfg.learnt_from for r in study.points.runs if not is_finished(r)]
    for teacher in {t.run: t for own in waiting if own.taught for t in own.teachers if t.run is not None}.values():
        identity(teacher)
    for note in study.notes:
        tell(console, study.points.kind, f"note: {note}")

    def later() -> list[Point]:
        if study.base.distillation is None or not study.base.distillation.longer or has(points.runs, LONGER):
            return []
        known = plan_distillation(config, overrides)
        if known.longer is None:
            return []
        note_longer(known.longer, points.folder)
        return [r for r in known.points.runs if r.point == LONGER]

    points = replace(study.points, later=later)
    if study.longer is not None:  # of runs that had finished before
        note_longer(study.longer, points.folder)

    def write(stopped: int | None, failed: Mapping[str, str]) -> DistillationResult:
        known = replace(
            study,
            points=points,
            longer=study.longer or (known_longer(points.folder) if has(points.runs, LONGER) else None),
        )
        record = collect(known, failed, interrupted=stopped is not None)
        write_record(record, points.folder)
        return DistillationResult(points.folder, record, stopped)

    return run_points(points, console, promote_anyway, write)


def has(runs: Sequence[Point], arm: str) -> bool:
    return any(r.point == arm for r in runs)


# ---------------------------------------------------------------------------------------------------------------
# Plan


def plan_distillation(config: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Every run of the study that can be planned, with its resolved config, and what must be kept of teachers before
    it. Nothing is written or loaded.

    Raises `UserError` for a config without ``distillation:`` or in which no teacher has a say, for settings that no arm
    can have, and with everything that is wrong with any arm.
    """
    base = load_config(config, overrides)
    own = base.distillation
    if own is None:
        raise UserError(
            f"{config}: has no distillation: section; add one, an empty one ({{}}) has the usual arms and seeds, or "
            "use beholder run"
        )
    if base.distill is None or not base.distill.taught:
        why = "stage: distill, distill.teachers" if base.distill is None else "distill.alpha is 0"
        raise UserError(
            f"{config}: no teacher has a say ({why}), and what a distillation study asks is whether one helps; name it "
            "in distill.teachers, with distill.alpha above 0"
        )
    wrong = [w for name, given in own.arms.items() for w in wrong_settings(f"distillation.arms.{name}", given, "arms")]
    if wrong:
        raise UserError("\n".join(wrong))
    sets: dict[str, dict[str, PointSetting]] = {KD: {}, ALONE: NO_TEACHER}
    sets |= {name: arm_settings(given) for name, given in own.arms.items()}
    folder = Path(base.run_dir)
    runs = resolve(config, overrides, base, own, sets)
    longer = longer_steps(folder, runs)
    if own.longer and longer is not None:
        last = {LONGER: arm_settings({**NO_TEACHER, "train.train_steps": longer.steps})}
        runs += resolve(config, overrides, base, own, last)
    runs = with_caches(folder, by_seed(runs, own.seeds))  # a study that is cut short has every arm once
    points = Points("distillation", folder, base.run_name, own, base.device, runs)
    return Study(points, base, longer if own.longer else None, tuple(_notes(base, own)))


def by_seed(runs: Sequence[Point], seeds: Sequence[int]) -> list[Point]:
    """In the order of the seeds, and of the arms as they are given; also where some were planned later."""
    order = {seed: k for k, seed in enumerate(seeds)}
    return sorted(runs, key=lambda r: order.get(r.cfg.seed, 0))


def arm_settings(given: Mapping[str, PointSetting]) -> dict[str, PointSetting]:
    """What an arm sets, and what follows from it: the base config says what its own preset, form, way of asking and
    length need, and that must not stand beside another one."""
    under: dict[str, PointSetting] = {}
    if (preset := PRESETS.get(str(given.get("distill.preset")))) is not None:
        under |= {"distill.alpha_end": None, "distill.temperature_end": None}
        under |= {f"distill.{name}": value for name, value in preset.items()}
    cleared = ONLY_KEPT if given.get("distill.online") is True else ("k", "draws") if "distill.form" in given else ()
    under |= {f"distill.{name}": DistillConfig.model_fields[name].default for name in cleared}
    if given.get("train.train_steps") is not None:
        under["train.num_epochs"] = TrainConfig.model_fields["num_epochs"].default
    return {**under, **given}


def teaching(cfg: RunConfig) -> Any:
    """``kept``, ``online`` or ``none``: how the teachers of a run are asked."""
    own = cfg.learnt_from
    return "none" if not own.taught else "online" if own.online else "kept"


def kl_of(cfg: DistillConfig) -> str:
    """Which divergence `teacher.kl` is: with the rest of the ids as one it is smaller than over all of them."""
    if cfg.online or cfg.form == "full":
        return "all ids"
    return f"the {cfg.k} likeliest ids and the rest" if cfg.form == "topk" else f"{cfg.draws} ids drawn"


def with_caches(folder: Path, runs: Sequence[Point]) -> list[Point]:
    """The runs, each behind what must be kept for it; what no run waits for any more is left out.

    A run without a teacher waits as well: how far it is from the teachers is measured with what is kept about the
    held-out samples, which are the same for all.
    """
    caches: dict[str, Point] = {}
    for run in runs:
        if teaching(run.cfg) == "kept":
            name = f"caches/{run.name}"
            files = folder / "configs" / f"{name}.yaml", folder / "logs" / f"{name}.log"
            cfg = run.cfg.model_copy(update={"output_dir": str(folder / name)})
            caches[run.name] = Point(name, name, {}, cfg, folder / name, *files, command="teacher-cache")
    found: list[Point] = []
    for run in runs:
        waits = caches.get(run.name)
        if waits is None and teaching(run.cfg) == "none":
            waits = next((caches[r.name] for r in runs if r.point == KD and r.cfg.seed == run.cfg.seed
                          and r.name in caches), None)  # fmt: skip
        if waits is None or is_finished(run):
            found.append(run)
            continue
        found += [] if waits in found else [waits]
        found.append(replace(run, waits_for=(waits.name,)))
    return found


def longer_steps(folder: Path, runs: Sequence[Point]) -> Longer | None:
    """Steps without a teacher that take the time of a taught run and of what is kept for it: what was written down of
    one of these, else from the first seed's evidence; None before that is there, and where a time is not known."""
    known = known_longer(folder)
    if known is not None and known.alike in {r.hash for r in runs if r.point == KD}:
        return known
    kd, alone = (next(r for r in runs if r.point == name) for name in (KD, ALONE))
    if not (is_finished(kd) and is_finished(alone)):
        return None
    taught, plain = (load_evidence(r.folder).cost for r in (kd, alone))
    cache = cache_cost(folder, kd)
    if not taught.step_s or not plain.step_s or cache is None:
        return None
    kd_s = taught.steps * taught.step_s
    # A step with a teacher costs no less than one without; what looks so is a machine that was busy.
    steps = max(plain.steps, round((kd_s + cache) / plain.step_s))
    return Longer(steps=steps, alike=kd.hash, cache_s=cache, kd_s=kd_s, step_s=plain.step_s)


def note_longer(longer: Longer, folder: Path) -> None:
    atomic_write(folder / STEPS, json.dumps(longer.model_dump(mode="json"), indent=1) + "\n")


def known_longer(folder: Path) -> Longer | None:
    try:
        return Longer.model_validate_json((folder / STEPS).read_bytes())
    except (OSError, ValidationError):
        return None


def cache_cost(folder: Path, run: Point) -> float | None:
    """Seconds that what is kept about the run's training samples has cost: its tokens times what one has cost in that
    teacher's folder, as if it had been made for this run alone. 0 where nothing is read; None where it is not known."""
    if teaching(run.cfg) != "kept":
        return 0.0
    try:
        kept = json.loads((folder / "caches" / run.name / KEPT_FOR).read_bytes())
        costs = [(int(k["train_tokens"]), seconds_a_token(Path(k["folder"]))) for k in kept]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    if any(each is None for _, each in costs):
        return None
    return sum(tokens * (each or 0.0) for tokens, each in costs)


def _notes(base: RunConfig, own: DistillationConfig) -> Iterator[str]:
    """What will not be known at the end, said before anything runs."""
    if len(own.seeds) < 2:
        yield "without repeats (distillation.seeds) no difference has an interval, and nothing can be told"
    if base.eval.caption_samples == 0:
        yield "no answers are written (eval.caption_samples is 0), so only losses are compared"
    if not own.longer:
        yield "nothing is compared at equal time (distillation.longer is false)"
    if (own.parallel or 1) > 1:
        yield "runs that go on at a time slow each other down: times, and what is as long, are of such runs"


# ---------------------------------------------------------------------------------------------------------------
# Collect


def collect(study: Study, failed: Mapping[str, str] | None = None, *, interrupted: bool = False) -> DistillationRecord:
    """What the finished runs' evidence says, put together and judged."""
    failed, own, folder = failed or {}, study.points.study, study.points.folder
    runs = by_seed([r for r in study.points.runs if r.command == "run"], own.seeds)
    evidence = {r.name: load_evidence(r.folder) for r in runs if is_finished(r)}
    rows = []
    for run in runs:
        known = facts_of(run, failed, interrupted=interrupted)
        known["arm"] = known.pop("point")
        known |= {"teaching": teaching(run.cfg), "kl_of": kl_of(run.cfg.learnt_from)}
        if run.name in evidence:
            known |= _measured(evidence[run.name])
            known["cache_s"] = cache_cost(folder, run) if teaching(run.cfg) == "kept" else None
        rows.append(DistillationRow(**known))
    first = next(iter(evidence.items()), None)
    ours = None if first is None else (folder / first[0], first[1])
    record = DistillationRecord(
        name=study.points.name,
        created=now(),
        seeds=list(own.seeds),
        rows=rows,
        teachers=tuple(teacher_facts(t, ours) for t in study.base.learnt_from.teachers),
        longer=study.longer,
        notes=study.notes,
        warnings=tuple(_warnings(study, evidence, rows, failed)),
    )
    return conclude(record)


def _measured(e: Evidence) -> dict[str, Any]:
    return {
        **_figures(e), "steps": e.cost.steps, "epochs": e.cost.epochs, "step_s": e.cost.step_s,
        "peak_memory_mb": e.cost.peak_memory_mb, "device": e.cost.device,
        "params": _params(e), "learns": sum(r.trainable for r in e.trainable),
        "gates_failed": tuple(g.name for g in e.failed_gates),
        "stopped": "" if e.stopped is None else e.stopped.sentence,
    }  # fmt: skip


def _figures(e: Evidence) -> dict[str, Any]:
    kinds: list[Measurement] = [
        m for m in e.measurements if m.name == ACCURACY and m.stratum is not None and m.by in ("question", "answer")
    ]
    return {
        "measured": {name: m for name in COLUMNS if (m := e.get(name)) is not None}, "by_kind": tuple(kinds)
    }  # fmt: skip


def _params(e: Evidence) -> int:
    return sum(r.params for r in e.trainable)


def teacher_facts(teacher: TeacherConfig, student: tuple[Path, Evidence] | None) -> TeacherFacts:
    """Of a Beholder run what its evidence says, and whether that was measured on the student's samples."""
    if teacher.run is None:
        return TeacherFacts(name=teacher.name, note="not a run of Beholder, so it has no figures of its own")
    try:
        folder = checkpoint.run_of(checkpoint.resolve_checkpoint(teacher.run))
        e = load_evidence(folder)
    except UserError as problem:
        return TeacherFacts(name=teacher.name, note=f"its figures cannot be read: {problem}")
    return facts_of_run(teacher.name, folder, e, student)


def facts_of_run(name: str, folder: Path, e: Evidence, student: tuple[Path, Evidence] | None) -> TeacherFacts:
    note = ""
    if student is not None:
        theirs, ours = held_out_hashes([(folder, e), student])
        if theirs is None or ours is None:
            note = "it is not known whether its figures are of the same held-out samples"
        elif theirs != ours:
            note = "its figures are of other held-out samples than the students', so they do not compare"
    return TeacherFacts(name=name, params=_params(e), note=note, **_figures(e))


def _warnings(
    study: Study, evidence: Mapping[str, Evidence], rows: Sequence[DistillationRow], failed: Mapping[str, str]
) -> Iterator[str]:
    yield from (f"{name} failed: {why}" for name, why in failed.items() if name not in {r.name for r in rows})
    yield from warnings_of(study.points, evidence, rows)
    own = study.base.distillation
    if own is not None and own.longer and study.longer is None and not has(study.points.runs, LONGER):
        yield (
            "The arm longer is not planned yet: its steps follow from kd and alone of the first seed, and from what is "
            "known of the time that keeping the teachers' words has taken."
        )
    yield from (f"{r.name} was stopped by its guardrail {r.stopped}" for r in rows if r.stopped)
    if len(devices := sorted({r.device for r in rows if r.device})) > 1:
        yield f"The runs' times are of different devices: {', '.join(devices)}."
    if lost := [r.name for r in rows if r.status == "finished" and r.teaching == "kept" and r.cache_s is None]:
        yield f"What keeping the teachers' words has cost is not known, so {', '.join(lost)} have no total time."


def write_record(record: DistillationRecord, folder: Path) -> None:
    """``distillation.json``, ``.csv``, ``.html`` and ``.md``, each whole or not at all."""
    atomic_write(folder / RECORD, json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / TABLE, distillation_csv(record))
    render_distillation(record, folder)
