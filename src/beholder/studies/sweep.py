"""A grid of short runs: each a process of its own, resumable, and one summary (``beholder sweep``).

    points      config + grid + seeds -> one resolved config a run, all on one split and one golden set
    run       what is not finished yet, as ``python -m beholder run FILE``, as many at once as there are devices
    collect   the runs' evidence.json -> sweep.json, summary.csv, sweep.html, sweep.md

The sweep folder is the config's own run folder (``output_dir``):

    configs/<name>.yaml   the resolved config of a run       <name>/        its run folder
    logs/<name>.log       what it printed                    golden.jsonl   the fixed set all runs caption
    sweep.json            everything known of the sweep; the pages are rendered from it

What the runs are called: `studies.record`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from beholder.config import SweepConfig
from beholder.evidence import Evidence, load_evidence
from beholder.runs import atomic_write, now
from beholder.studies.page import print_record, render_sweep
from beholder.studies.points import Points, facts_of, is_finished, points_of, warnings_of
from beholder.studies.record import MEASURED, RECORD, SUMMARY, Row, SweepRecord, summary_csv
from beholder.studies.runner import exit_code, run_points, tell_end
from beholder.studies.score import Entry, flags, rank, score
from beholder.terminal import Terminal


@dataclass(frozen=True, slots=True)
class SweepResult:
    """How the sweep ended. The command line leaves with `exit_code`."""

    folder: Path
    record: SweepRecord
    signal: int | None = None
    """The signal that stopped it; the same command continues."""

    @property
    def exit_code(self) -> int:
        """0: every run has a result. 1: some failed. 128 + signal: interrupted."""
        return exit_code(self.signal, [r.status for r in self.record.rows])

    def print(self, console: Console) -> None:
        print_record(self.record, console)
        tell_end(console, self.folder, "sweep.html", self.signal)


def run_sweep(
    config: str | Path, overrides: Sequence[str] = (), *, console: Console | None = None, promote_anyway: bool = False
) -> SweepResult:
    """Run what is missing of a sweep, then write and return its summary; ``console`` hears how the runs come along.

    A run that finished with the same settings is not run again, an interrupted one goes on from its last checkpoint,
    one that fails is named and the others go on (the same command tries it again). Ctrl-C (or SIGTERM) lets the running
    ones finish their step and save. ``promote_anyway``: a run may start from a checkpoint that failed its gates.
    Raises `UserError` for a config that cannot be swept, for run folders of other settings, and when another process
    sweeps the same folder.
    """
    points = points_of(config, overrides)

    def write(stopped: int | None, failed: Mapping[str, str]) -> SweepResult:
        record = collect(points, failed, interrupted=stopped is not None)
        write_summary(record, points.folder)
        return SweepResult(points.folder, record, stopped)

    return run_points(points, console or Terminal(), promote_anyway, write)


# ---------------------------------------------------------------------------------------------------------------
# Collect


def collect(points: Points, failed: Mapping[str, str] | None = None, *, interrupted: bool = False) -> SweepRecord:
    """What the finished runs' evidence says, scored, flagged and ranked."""
    failed, sweep = failed or {}, points.study
    assert isinstance(sweep, SweepConfig)
    evidence = {r.name: load_evidence(r.folder) for r in points.runs if is_finished(r)}
    deltas = [m.value for e in evidence.values() if (m := e.get(MEASURED["d_shuffle"]))]
    median = statistics.median(deltas) if deltas else 0.0
    rows = []
    for run in points.runs:
        known = facts_of(run, failed, interrupted=interrupted)
        if run.name in evidence:
            known |= _measured(evidence[run.name], sweep, median)
        rows.append(Row(**known))
    broken = {r.point for r in rows if r.status == "failed"}
    entries = [
        Entry(r.name, r.point, r.score, (*r.flags, *(["a repeat failed"] if r.point in broken else [])))
        for r in rows
        if r.score is not None
    ]
    return SweepRecord(
        name=points.name,
        created=now(),
        grid={key: list(values) for key, values in sweep.grid.items()},
        seeds=list(sweep.seeds),
        ablation_weight=sweep.ablation_weight,
        collapsed_below=sweep.collapsed_below,
        rows=rows,
        ranking=rank(entries),
        warnings=tuple(_warnings(points, evidence, rows)),
    )


def _measured(e: Evidence, sweep: SweepConfig, median: float) -> dict[str, Any]:
    found = {field: e.get(name) for field, name in MEASURED.items()}
    loss, shuffle, zero = found["eval_loss"], found["d_shuffle"], found["d_zero"]
    failed = tuple(g.name for g in e.failed_gates)
    by_length = [m for m in e.measurements if m.stratum is not None and m.by in (None, "length")]
    buckets = tuple(m for m in by_length if m.name == MEASURED["eval_loss"])
    facts: dict[str, Any] = {**found, "buckets": buckets, "gates_failed": failed}
    facts |= {"steps": e.cost.steps, "wall_s": e.cost.wall_s}
    if loss is not None and shuffle is not None and zero is not None:
        facts["score"] = score(loss.value, shuffle.value, zero.value, sweep.ablation_weight)
        facts["flags"] = flags(
            d_shuffle=shuffle.value, d_shuffle_low=shuffle.ci95[0] if shuffle.ci95 else None, grid_median=median,
            collapsed_below=sweep.collapsed_below, failed_gates=failed,
        )  # fmt: skip
    return facts


def _warnings(points: Points, evidence: Mapping[str, Evidence], rows: Sequence[Row]) -> Iterator[str]:
    yield from warnings_of(points, evidence, rows)
    for row in rows:
        if row.status == "finished" and row.score is None:
            yield f"{row.name} has no score: the held-out loss or one of its loss differences was not measured"


def write_summary(record: SweepRecord, folder: Path) -> None:
    """``sweep.json``, ``summary.csv``, ``sweep.html`` and ``sweep.md``, each whole or not at all."""
    atomic_write(folder / RECORD, json.dumps(record.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n")
    atomic_write(folder / SUMMARY, summary_csv(record))
    render_sweep(record, folder)
