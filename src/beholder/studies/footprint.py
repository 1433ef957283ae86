"""How many layers of each tower should learn? (``beholder footprint``, stage 4): plan, run what is missing, conclude.

    plan      config -> points (`studies.matrix`), each with its settings; layers that do not exist, and starts that may
              not be built upon, are told before anything runs
    layers    where a control chooses layers by similarity, they are measured once, on the start (``similarity.json``)
    run       as a sweep does (`studies.runner`)
    collect   the runs' evidence.json -> footprint.json, .csv, .html, .md

The folder is the config's own run folder, laid out as a sweep's.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console

from beholder.config import (
    WATCHED,
    FootprintConfig,
    LoraConfig,
    PointSetting,
    RunConfig,
    no_layers,
)
from beholder.config.file import load_config
from beholder.config.parts import MAX_RANK
from beholder.config.tree import show
from beholder.config.wording import annotation_at, expected, nearest
from beholder.evidence import Evidence, load_evidence
from beholder.evidence.guardrails import readings
from beholder.probes.similarity import most_changing
from beholder.runs import RunDir, atomic_write, now
from beholder.studies.footprint_page import print_footprint, render_footprint
from beholder.studies.footprint_record import (
    COLUMNS,
    MEASURED,
    PAGE,
    RECORD,
    TABLE,
    FootprintPoint,
    FootprintRecord,
    FootprintRow,
    bounds,
    conclude,
    footprint_csv,
    line_of,
)
from beholder.studies.matrix import ALPHA, BASELINE, LLM, RANK, START, TARGETS, VISION, Planned, every_point, plan
from beholder.studies.points import (
    Point,
    Points,
    facts_of,
    is_finished,
    lies_in,
    resolve,
    run_name,
    warnings_of,
    wrong_settings,
)
from beholder.studies.runner import exit_code, run_points, tell, tell_end
from beholder.terminal import Terminal
from beholder.train import checkpoint, restore
from beholder.train.promoted import check_promoted
from beholder.types import UserError

SIMILARITY = "similarity.json"


@dataclass(frozen=True)
class Study:
    """A footprint study before it is run."""

    points: Points
    planned: dict[str, Planned]
    start: str
    adapters: dict[str, int] = field(default_factory=dict)
    """Adapter parameters by point; empty where the parts' sizes are not at hand."""
    notes: tuple[str, ...] = ()
    pending: int = 0
    """So many layers are still to be chosen by similarity: the points that need them are not among the runs yet."""


@dataclass(frozen=True, slots=True)
class FootprintResult:
    """How the study ended. The command line leaves with `exit_code`."""

    folder: Path
    record: FootprintRecord
    signal: int | None = None
    """The signal that stopped it; the same command continues."""

    @property
    def exit_code(self) -> int:
        """0: every run has a result. 1: some failed. 128 + signal: interrupted."""
        return exit_code(self.signal, [r.status for r in self.record.rows])

    def print(self, console: Console) -> None:
        print_footprint(self.record, console)
        tell_end(console, self.folder, PAGE, self.signal)


def run_footprint(
    config: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None, promote_anyway: bool = False
) -> FootprintResult:
    """Run what is missing of a footprint study, then write and return its record; ``console`` hears how it comes along.

    Finished runs, those a guardrail stopped among them, are not run again, an interrupted one goes on from its last
    checkpoint, one that fails is named and the others go on. Ctrl-C (or SIGTERM) lets the running ones finish their
    step and save. Raises `UserError` for whatever is known to be impossible before anything runs.
    """
    console = console or Terminal()
    study = plan_footprint(config, overrides)
    starts = {r.cfg.model.connector.load_checkpoint: r.cfg for r in study.points.runs}
    own = [r.folder for r in study.points.runs]
    for cfg in (cfg for at, cfg in starts.items() if at is not None and not any(lies_in(at, f) for f in own)):
        if (told := check_promoted(cfg, promote_anyway)) is not None:
            tell(console, "footprint", f"WARNING: {told}")
    for note in study.notes:
        tell(console, "footprint", f"note: {note}")
    if study.pending:
        tell(console, "footprint", f"choosing layers by similarity on {study.start}")
        measure_similarity(study)
        study = plan_footprint(config, overrides)

    def write(stopped: int | None, failed: Mapping[str, str]) -> FootprintResult:
        record = collect(study, failed, interrupted=stopped is not None)
        write_record(record, study.points.folder)
        return FootprintResult(study.points.folder, record, stopped)

    return run_points(study.points, console, promote_anyway, write)


# ---------------------------------------------------------------------------------------------------------------
# Plan


def plan_footprint(config: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Every run of the study with its resolved config. Nothing is written or loaded; layers are counted on models
    without weights.

    Raises `UserError` for a config without ``footprint:`` or without a run to start from, for more layers than there
    are, for settings that no point can have, and with everything that is wrong with any point.
    """
    base = load_config(config, overrides)
    own = base.footprint
    if own is None:
        raise UserError(
            f"{config}: has no footprint: section; add one, an empty one ({{}}) has the usual points, or use beholder "
            "run"
        )
    start = base.model.connector.load_checkpoint
    if start is None:
        raise UserError(
            "model.connector.load_checkpoint is not given: every point of a footprint study goes on from a stage-3 "
            "(or stage-2) run; name it there"
        )
    if not base.has_adapters:
        raise UserError(
            "model.lora.enable is false: what a footprint study varies is where adapters go; set it to true"
        )
    _check_settings(own)
    connector = base.model.connector.trainable
    planned = {p.name: p for p in plan(own, connector_learns=connector)}
    if not planned:
        raise UserError(
            "no point is left to run: footprint.leave_out takes out all that footprint.select names, A0 included; name "
            "another point in select, or leave fewer out"
        )
    layers = _known_layers(Path(base.run_dir), start, own)
    pending = max((p.similar for p in planned.values() if p.similar), default=0) if layers is None else 0
    sets = {p.name: dict(p.settings) for p in planned.values() if not (p.similar and layers is None)}
    for name, values in sets.items():
        if number := planned[name].similar:
            values[LLM] = most_changing(layers or (), number)
    adapters, notes = _count(base, own, planned, sets)
    baseline = Path(base.run_dir) / run_name(BASELINE, own.seeds[0] if own.seeds else None)
    compares = any(rule.compares for rule in base.guards.values())
    for name, values in sets.items():  # another start than A0's: it is judged by A0 all the same
        moved = START in values or planned[name].after is not None
        if moved and compares and BASELINE in sets and base.eval.baseline_run is None:
            values["eval.baseline_run"] = str(baseline)
    after = {p.name: p.after for p in planned.values() if p.after is not None and p.name in sets}
    # Where nothing learns, repeats would be the same and look like certainty.
    once: frozenset[str] = frozenset(() if connector else (BASELINE,))
    runs = resolve(config, overrides, base, own, sets, after, once)
    order = {seed: k for k, seed in enumerate(own.seeds)}
    _check_runs(runs)
    runs.sort(key=lambda r: order.get(r.cfg.seed, 0))  # a study that is cut short has every point once
    points = Points("footprint", Path(base.run_dir), base.run_name, own, base.device, runs)
    return Study(points, planned, start, adapters, (*notes, *_unmonitored(base, planned)), pending)


def _check_settings(own: FootprintConfig) -> None:
    """Settings of the user's own points that there are not."""
    wrong: list[str] = []
    for name, point in own.points.items():
        undone = {key: value for key, value in point.set.items() if (key, value) in UNDONE}
        for key, value in undone.items():
            told = "null" if value is None else "false"
            wrong.append(f"footprint.points.{name} sets {key}: {told}; {UNDONE[key, value]}")
        wrong += wrong_settings(f"footprint.points.{name}", [k for k in point.set if k not in undone], "points")
        if point.after is not None and START in point.set:
            wrong.append(f"footprint.points.{name} sets {START} and is after {point.after}; it starts from one run")
    if wrong:
        raise UserError("\n".join(wrong))


UNDONE: dict[tuple[str, PointSetting], str] = {
    (START, None): "every point goes on from a run: leave it out for the study's start, or name another run",
    ("model.lora.enable", False): (
        f"where adapters go is what a footprint study varies, and {BASELINE} is the point where nothing learns; leave "
        "it out"
    ),
}
"""What makes a point none of the study, and what to do instead."""


def _check_runs(runs: Sequence[Point]) -> None:
    """Refuse what is no point of the study, by whichever of its settings: as the base config is."""
    for run in runs:
        if run.cfg.model.connector.load_checkpoint is None:
            raise UserError(f"{run.point} starts from no run ({START} is null); {UNDONE[START, None]}")
        if not run.cfg.has_adapters:
            told = f"stage: {run.cfg.stage}, model.lora.enable: {str(run.cfg.model.lora.enable).lower()}"
            raise UserError(f"{run.point} has no adapters ({told}); {UNDONE['model.lora.enable', False]}")


def _count(
    base: RunConfig, own: FootprintConfig, planned: Mapping[str, Planned], sets: dict[str, dict[str, PointSetting]]
) -> tuple[dict[str, int], list[str]]:
    """Adapter parameters of every point; the ranks of those that must equal another are put into ``sets``."""
    from beholder.model.placement import tower_expressions  # seconds of torch, after a wrong config was told
    from beholder.model.sites import empty_parts, planned_sites

    equal = [name for name in sets if planned[name].equal_to is not None]
    try:
        parts = empty_parts(base.model)
    except UserError as e:
        if equal:
            raise UserError(
                f"the sizes of the parts are not known ({e}), so {', '.join(equal)} cannot be given as many adapter "
                "parameters as another point; leave them out (footprint.leave_out: [controls])"
            ) from e
        return {}, [f"layers and adapter parameters were not counted: {e}"]
    if theirs := tower_expressions(base.model.lora, parts):
        raise UserError(
            f"model.lora.target_modules {theirs[0]!r} names modules of the vision tower alone, and a footprint study "
            "varies which of its blocks learn; name them in model.lora.vit_target_modules instead"
        )

    def count(values: Mapping[str, PointSetting]) -> int:
        lora = lora_of(base, values)
        return sum(s.params for sites in planned_sites(parts, lora).values() for s in sites)

    every = every_point(own, connector_learns=base.model.connector.trainable)
    found: dict[str, int] = {}
    wrong: dict[str, list[str]] = {}
    for name, values in sets.items():
        try:
            if (like := planned[name].equal_to) is not None:
                lora, wanted = lora_of(base, values), count(every[like].settings)
                if not (own_number := count(values)):
                    raise UserError("none of its modules gets an adapter; name at least one")
                rank = max(1, round(wanted * lora.r / own_number))
                if rank != lora.r:
                    if rank > MAX_RANK:
                        raise UserError(
                            f"to have as many adapter parameters as {like} ({wanted:,}) it would need the rank "
                            f"{rank:,}, and a rank is at most {MAX_RANK:,}; lower model.lora.r, or leave it out "
                            f"(footprint.leave_out: [{name}])"
                        )
                    values[RANK] = rank
                    values.setdefault(ALPHA, max(1, round(lora.alpha * rank / lora.r)))
            found[name] = count(values)
        except UserError as e:
            why = str(e)
            if planned[name].kind == "control" and TARGETS in values:
                why = why.replace(TARGETS, f"footprint.{name}")  # where its modules were written
            wrong.setdefault(why, []).append(name)
    if wrong:
        lines = [f"{', '.join(names)}: {why}" for why, names in wrong.items()]
        raise UserError("these points cannot be placed:\n  " + "\n  ".join(lines))
    return found, []


def lora_of(base: RunConfig, values: Mapping[str, PointSetting]) -> LoraConfig:
    """``model.lora`` with what a point sets of it. Raises `UserError` for what it cannot be."""
    before = "model.lora."
    changed = {k.removeprefix(before): v for k, v in values.items() if k.startswith(before)}
    try:
        return LoraConfig.model_validate({**base.model.lora.model_dump(), **changed})
    except ValidationError as e:
        raise UserError("; ".join(dict.fromkeys(_in_words(e, changed)))) from None


def _in_words(wrong: ValidationError, given: Mapping[str, PointSetting]) -> Iterator[str]:
    """As a config says what is wrong with a setting of it."""
    for error in wrong.errors(include_url=False, include_context=False):
        if error["type"] == "value_error":
            yield f"model.lora: {error['msg'].removeprefix('Value error, ')}"
        elif (annotation := annotation_at(("model", "lora", name := str(error["loc"][0])))) is None:
            yield f"model.lora.{name}: no such setting; {nearest(('model', 'lora', name))}"
        else:
            yield f"model.lora.{name}: got {show(given.get(name))}; expected {expected(annotation)}"


def _unmonitored(base: RunConfig, planned: Mapping[str, Planned]) -> Iterator[str]:
    """What will not be known at the end, said before anything runs."""
    if BASELINE not in planned:
        yield (
            f"{BASELINE} is left out (footprint.leave_out), so no point's loss on plain text, and nothing of what it "
            "says of images, is compared with the start's: a point that has forgotten much may win"
        )
    empty = {m: setting for m in WATCHED if (setting := base.eval.off(m)) is not None}
    if empty:
        by_setting: dict[str, list[str]] = {}
        for measure, setting in empty.items():
            by_setting.setdefault(setting, []).append(COLUMNS.get(measure, measure))
        told = "; ".join(f"{', '.join(names)} ({setting} is not given)" for setting, names in by_setting.items())
        yield f"these columns will be empty: {told}"
    if not base.guards:
        yield "no guardrail is on, so nothing stops a run early; guardrails need monitors"
    if not base.footprint or len(base.footprint.seeds) < 2:
        yield "without repeats (footprint.seeds) only intervals over samples tell points apart"
    if not base.eval.strengths:
        yield "no line from the base to the trained model will be drawn (eval.strengths is not given)"


# ---------------------------------------------------------------------------------------------------------------
# Layers by similarity


def measure_similarity(study: Study) -> None:
    """How much each layer of the start changes what passes through it: ``beholder layers`` in a process of its own."""
    folder, own = study.points.folder, study.points.study
    assert isinstance(own, FootprintConfig)
    run, step = _start_of(study.start)
    command = ["-m", "beholder", "layers", run, "--step", str(step), "--json"]
    command += ["--num-samples", str(own.similarity_samples)]
    done = subprocess.run([sys.executable, *command], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.strip()]
        why = told[-1] if told else f"exit code {done.returncode}"
        raise UserError(
            f"beholder layers {run} --step {step} failed: {why}. Without it no layers can be chosen by similarity; "
            "footprint.leave_out: [similar] does without"
        )
    found = json.loads(done.stdout)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / SIMILARITY, json.dumps({**found, "asked": own.similarity_samples}, indent=1) + "\n")


def _known_layers(folder: Path, start: str, own: FootprintConfig) -> list[float] | None:
    """What was measured of this very start before."""
    try:
        found = json.loads((folder / SIMILARITY).read_bytes())
        if (found["folder"], found["step"], found["asked"]) == (*_start_of(start), own.similarity_samples):
            return [float(x) for x in found["similarity"]]
    except (OSError, ValueError, LookupError, TypeError):
        pass
    return None


def _start_of(start: str) -> tuple[str, int]:
    """Run folder and step that ``model.connector.load_checkpoint`` means."""
    where = checkpoint.resolve_checkpoint(start)
    return str(checkpoint.run_of(where)), restore.read_trainer(where)["step"]


# ---------------------------------------------------------------------------------------------------------------
# Collect


def collect(study: Study, failed: Mapping[str, str] | None = None, *, interrupted: bool = False) -> FootprintRecord:
    """What the finished runs' evidence says, put together and judged."""
    failed, own = failed or {}, study.points.study
    assert isinstance(own, FootprintConfig)
    runs = study.points.runs
    evidence = {r.name: load_evidence(r.folder) for r in runs if is_finished(r)}
    rows = []
    for run in runs:
        known = facts_of(run, failed, interrupted=interrupted)
        if run.name in evidence:
            known |= _measured(evidence[run.name], run.cfg, run.folder)
        rows.append(FootprintRow(**known))
    by_point = {r.point: r.settings for r in runs}
    connector = {r.point for r in runs if r.cfg.model.connector.trainable}
    points = [
        FootprintPoint(
            name=name, kind=p.kind, where=where(by_point[name], p, connector_learns=name in connector),
            llm=p.llm if p.kind == "matrix" else None, vision=p.vision if p.kind == "matrix" else None,
            planned=study.adapters.get(name), equal_to=p.equal_to, rate_of=_rate_of(name, by_point),
        )
        for name, p in study.planned.items() if name in by_point
    ]  # fmt: skip
    record = FootprintRecord(
        name=study.points.name,
        created=now(),
        start=study.start,
        seeds=list(own.seeds),
        keep=bounds(own),
        rows=rows,
        points=points,
        notes=study.notes,
        warnings=tuple(_warnings(study.points, evidence, rows)),
    )
    return conclude(record)


def _measured(e: Evidence, cfg: RunConfig, folder: Path) -> dict[str, Any]:
    rates = cfg.train.lr
    rate = {"lora": rates.lora, "vision_lora": rates.vision, "vision": rates.vision, "connector": rates.connector}
    return {
        "measured": {name: m for name in MEASURED if (m := e.get(name)) is not None},
        "line": line_of(e.measurements), "strength": e.adapter_strength,
        "readings": tuple(readings(RunDir(folder).metrics())),
        "learns": sum(r.trainable for r in e.trainable if rate.get(r.part, 1.0) > 0),
        "stopped": "" if e.stopped is None else e.stopped.sentence,
        "stopped_by": "" if e.stopped is None else e.stopped.measure,
        "gates_failed": tuple(g.name for g in e.failed_gates),
        "steps": e.cost.steps, "wall_s": e.cost.wall_s, "step_s": e.cost.step_s,
        "peak_memory_mb": e.cost.peak_memory_mb, "device": e.cost.device,
    }  # fmt: skip


def where(values: Mapping[str, PointSetting], p: Planned, *, connector_learns: bool = False) -> str:
    """``language model last-2, vision tower last-4``, and what else the point sets."""
    told = []
    for key, words in ((LLM, "language model"), (VISION, "vision tower")):
        layers: Any = values.get(key)
        if layers is not None and p.name != BASELINE and not no_layers(layers):
            told.append(f"the {words}'s {_layers(layers)}")
    told += ["the connector"] if connector_learns else []
    text = " and ".join(told) or ("nothing" if p.name == BASELINE else "as the config says")
    if TARGETS in values:
        names: Any = values[TARGETS]
        text += f", {'/'.join(names)} alone"
    hidden = {LLM, VISION, TARGETS, START, ALPHA, "eval.baseline_run"}
    more = [f"{k.rpartition('.')[2]} {v}" for k, v in values.items() if k not in hidden and not k.startswith("gates.")]
    if p.name != BASELINE and more:
        text += f", {', '.join(more)}"
    if p.kind == "restart":
        text += ", from the stage-2 run"
    return text + (f", after {p.after}" if p.after else "")


def _layers(layers: str | Sequence[int]) -> str:
    if isinstance(layers, str):
        end, _, number = layers.partition("-")
        return f"{end} {number}".strip() + (" layers" if end == "all" else "")
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}"


def _rate_of(name: str, settings: Mapping[str, Mapping[str, PointSetting]]) -> str | None:
    """The point that this one differs from in learning rates alone."""
    rates = {k for k in settings[name] if k.startswith("train.lr.")}
    if not rates or name == BASELINE:
        return None
    rest = {k: v for k, v in settings[name].items() if k not in rates}
    return next((other for other, values in settings.items() if other != name and dict(values) == rest), None)


def _warnings(points: Points, evidence: Mapping[str, Evidence], rows: Sequence[FootprintRow]) -> Iterator[str]:
    yield from warnings_of(points, evidence, rows)
    if len(devices := sorted({r.device for r in rows if r.device})) > 1:
        yield f"The runs' times are of different devices: {', '.join(devices)}."


def write_record(record: FootprintRecord, folder: Path) -> None:
    """``footprint.json``, ``.csv``, ``.html`` and ``.md``, each whole or not at all."""
    atomic_write(folder / RECORD, json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / TABLE, footprint_csv(record))
    render_footprint(record, folder)
