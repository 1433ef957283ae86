"""Runs side by side, from the evidence they left: which settings differ, what was measured, which gates they passed.

Nothing is measured here. What cannot be compared is said: other training data, other held-out samples, another
tokenizer. A difference between two runs is shown with the intervals over samples; whether it is more than the spread
over seeds is a question for ``beholder sweep`` with ``sweep.seeds``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, computed_field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.config import RunConfig, decided_by
from beholder.config.file import diff_configs, flatten, parse_config
from beholder.evidence import Evidence, GateResult, Measurement, Record, held_out_hashes, load_evidence
from beholder.evidence.catalogue import called, unit_of
from beholder.report.content import measured_step
from beholder.report.markdown import escaped, table
from beholder.report.page import page
from beholder.report.words import fmt, fmt_ci, interval, number, written
from beholder.runs import atomic_write
from beholder.types import UserError, printable


class Run(Record):
    """One side of a comparison."""

    name: str
    """Name of the run, or its folder where two runs have the same name."""
    folder: str
    status: str
    created: str
    held_out: str | None
    """Of `held_out_hashes`."""
    evidence: Evidence = Field(exclude=True)


class Setting(Record):
    path: str
    values: tuple[Any, ...]
    """A value per run; None where the run has no such setting."""


class MeasurementRow(Record):
    key: str
    """``eval.loss`` or ``eval.loss/short``."""
    told: str
    """The measurement's name for people, where it has one."""
    unit: str
    better: Literal["lower", "higher", "none"]
    values: tuple[Measurement | None, ...]
    comparable: bool = Field(exclude=True)
    """Whether the runs were measured on the same samples, in the same tokens."""

    @computed_field
    @property
    def against_first(self) -> list[str]:
        """`mark` of each run."""
        return [self.mark(i) for i in range(len(self.values))]

    def mark(self, i: int) -> str:
        """How run ``i`` compares to the first: ▲ better, ▼ worse, ≈ the intervals overlap; empty when that is unknown.

        Two intervals that overlap may still belong to different values; apart they do not belong to the same one.
        """
        first, other = self.values[0], self.values[i]
        if i == 0 or not self.comparable or first is None or other is None or self.better == "none":
            return ""
        if first.ci95 is None or other.ci95 is None:
            return ""
        if first.ci95[0] <= other.ci95[1] and other.ci95[0] <= first.ci95[1]:
            return "≈"
        return "▲" if (other.value > first.value) == (self.better == "higher") else "▼"


class GateRow(Record):
    name: str
    bound: str
    """The bound, or each run's own where they differ."""
    results: tuple[GateResult | None, ...]


class Comparison(Record):
    """What `compare_runs` found, and its four forms."""

    runs: tuple[Run, ...]
    warnings: tuple[str, ...]
    """Why numbers may not be comparable; empty when nothing speaks against it."""
    settings: tuple[Setting, ...]
    gates: tuple[GateRow, ...]
    measurements: tuple[MeasurementRow, ...]
    """Those of at least two runs."""
    only_in: dict[str, tuple[str, ...]]
    """Measurements that a single run has, by run."""

    @property
    def names(self) -> list[str]:
        return [r.name for r in self.runs]

    def to_json(self) -> dict[str, Any]:
        """Everything but the evidence itself, as plain data."""
        return self.model_dump(mode="json")

    def to_html(self) -> str:
        """A page of its own: no script, no network, light and dark."""
        return page(
            "compare.html", c=self, measured=measured, value=_text, gate=_gate_text, fmt=fmt, fmt_ci=fmt_ci,
            mark=MeasurementRow.mark,
        )  # fmt: skip

    def to_markdown(self) -> str:
        out = [f"# {len(self.runs)} runs side by side", ""]
        out += [f"- **{escaped(r.name)}**: {r.status}, {r.created}{measured(r)}, `{r.folder}`" for r in self.runs]
        for warning in self.warnings:
            out += ["", f"> **{escaped(warning)}**"]
        for title, headings, rows in self._tables():
            out += ["", f"## {title}", "", *(table(headings, rows) or ["None.", ""])[:-1]]
        return "\n".join(out) + "\n"

    def write(self, out: Path) -> None:
        """To a page or to Markdown, as ``out`` ends in .html or .md."""
        atomic_write(out, self.to_html() if out.suffix == ".html" else self.to_markdown())

    def print(self, console: Console) -> None:
        """The same to a terminal."""
        for warning in self.warnings:
            console.print(Text("warning: " + printable(warning), style="bold red"), soft_wrap=True)
        for title, headings, rows in self._tables():
            shown = Table(title=title, title_justify="left")
            for k, heading in enumerate(headings):
                right = title == MEASUREMENTS and k > 1
                shown.add_column(Text(printable(heading)), overflow="fold", justify="right" if right else "left")
            for row in rows:
                shown.add_row(*(Text(printable(v)) for v in row))
            console.print(shown)
            console.print()

    def _tables(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        settings = [[s.path, *map(_text, s.values)] for s in self.settings]
        yield "What differs in the settings", ["setting", *self.names], settings
        if self.gates:
            rows = [[g.name, g.bound, *map(_gate_text, g.results)] for g in self.gates]
            yield "Gates", ["gate", "bound", *self.names], rows
        rows = [[m.key, m.unit, *(_with_ci(m, i) for i in range(len(m.values)))] for m in self.measurements]
        yield MEASUREMENTS, ["measurement", "unit", *self.names], rows
        if self.only_in:
            rows = [[name, ", ".join(keys)] for name, keys in self.only_in.items()]
            yield "Measured in some runs only", ["run", "measurements"], rows


MEASUREMENTS = "Measurements (▲ better, ▼ worse than the first beyond both 95 % intervals, ≈ they overlap)"


def compare_runs(folders: Sequence[str | Path]) -> Comparison:
    """Put finished runs side by side. Each is a run folder or an ``evidence.json``.

    Raises `UserError` for fewer than two, for the same one twice, and for a folder without evidence.
    """
    if len(folders) < 2:
        raise UserError(f"got {len(folders)} run{'s' * (len(folders) != 1)} to compare; give two run folders or more")
    resolved = [Path(f).resolve() for f in folders]
    twice = next((f for i, f in enumerate(folders) if resolved[i] in resolved[:i]), None)
    if twice is not None:
        raise UserError(f"{twice} is named twice; give different runs")
    loaded = [(Path(f), load_evidence(f)) for f in folders]
    taken = [e.run_name for _, e in loaded]
    runs = tuple(
        Run(
            name=e.run_name if taken.count(e.run_name) == 1 else str(f),
            folder=str(f), status=e.status.value, created=e.created, evidence=e,
            held_out=which,
        )
        for (f, e), which in zip(loaded, held_out_hashes(loaded), strict=True)
    )  # fmt: skip
    settings, unread = _settings(runs)
    apart = _other_samples(runs, settings)
    rows = _measurements(runs, comparable=not apart)
    return Comparison(
        runs=runs,
        settings=tuple(s for s in settings if decided_by(RunConfig, s.path) != {"run"}),
        measurements=tuple(r for r in rows if sum(v is not None for v in r.values) > 1),
        gates=_gates(runs),
        only_in=_only_in(runs, rows),
        warnings=(*unread, *apart, *_other_training(runs)),
    )


def _settings(runs: Sequence[Run]) -> tuple[list[Setting], list[str]]:
    """Settings that are not the same in all runs; and a warning for each config this version cannot read."""
    configs: list[RunConfig] = []
    unread: list[str] = []
    for run in runs:
        try:
            configs.append(parse_config(run.evidence.config_yaml, f"{run.name}: config"))
        except UserError as e:
            first = str(e).splitlines()[-1].strip()
            unread.append(f"{run.name}: its config is not one this version reads ({first}); settings are as written")
    if unread:  # without defaults, so a default of one run may stand against nothing in another
        flats = [flatten(_as_written(r.evidence.config_yaml)) for r in runs]
        paths = dict.fromkeys(p for flat in flats for p in flat)
    else:
        flats = [flatten(c.model_dump(mode="json")) for c in configs]
        paths = dict.fromkeys(p for a, b in pairwise(configs) for p, _, _ in diff_configs(a, b))
    rows = [Setting(path=p, values=tuple(flat.get(p) for flat in flats)) for p in paths]
    return [r for r in rows if any(v != r.values[0] for v in r.values)], unread


def _as_written(text: str) -> dict[str, Any]:
    """The settings of a config that is not one; none where it is no YAML at all."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _measurements(runs: Sequence[Run], *, comparable: bool) -> list[MeasurementRow]:
    found = [{(m.key, m.by): m for m in r.evidence.measurements} for r in runs]
    write = {written(r.evidence) for r in runs}
    rows = []
    for key in dict.fromkeys(k for f in found for k in f):
        values = tuple(f.get(key) for f in found)
        one = next(v for v in values if v is not None)
        name = called(one.name, "answer" if write == {"answer"} else "caption")
        told = "" if name == one.name else name
        rows.append(
            MeasurementRow(
                key=one.key, told=told, unit=unit_of(one.name, one.unit), better=one.better, values=values,
                comparable=comparable,
            )
        )  # fmt: skip
    return rows


def _only_in(runs: Sequence[Run], rows: Sequence[MeasurementRow]) -> dict[str, tuple[str, ...]]:
    single = [r for r in rows if sum(v is not None for v in r.values) == 1]
    found = {run.name: tuple(r.key for r in single if r.values[i] is not None) for i, run in enumerate(runs)}
    return {name: keys for name, keys in found.items() if keys}


def _gates(runs: Sequence[Run]) -> tuple[GateRow, ...]:
    found = [{g.name: g for g in r.evidence.gates} for r in runs]
    rows = []
    for name in dict.fromkeys(n for f in found for n in f):
        results = tuple(f.get(name) for f in found)
        bounds = dict.fromkeys(r.bound for r in results if r is not None)
        rows.append(GateRow(name=name, bound=" or ".join(bounds), results=results))
    return tuple(rows)


def measured(run: Run) -> str:
    """``, measured: step 280 of 420, the best``, for a run that chose among its checkpoints; else nothing."""
    told = measured_step(run.evidence)
    return f", {told}" if told else ""


def _other_samples(runs: Sequence[Run], settings: Sequence[Setting]) -> list[str]:
    """Why the numbers are not about the same thing; empty when nothing says so."""
    found = []
    if why := _other_held_out(runs, {s.path for s in settings}):
        found.append(f"The held-out samples differ ({why}): their numbers are not comparable.")
    language = next((s for s in settings if s.path == "model.llm.name_or_path"), None)
    if language is not None and len({Path(str(v)).name for v in language.values}) > 1:
        found.append(
            "The language models differ. Where their tokenizers do, losses in nats per token are not comparable: the "
            "same text is another number of tokens."
        )
    return found


def _other_training(runs: Sequence[Run]) -> Iterator[str]:
    if len({r.evidence.stage for r in runs}) > 1:
        stages = ", ".join(f"{r.name}: {r.evidence.stage}" for r in runs)
        yield f"The stages differ ({stages}): they learned different things, from different text."
    unfinished = [f"{r.name} ({r.status.replace('_', ' ')})" for r in runs if r.status != "succeeded"]
    if unfinished:
        yield f"Not finished: {', '.join(unfinished)}. Their numbers are those of an unfinished training."
    if len({r.evidence.data.fingerprint for r in runs}) > 1:
        yield "The training data differ (another fingerprint): a difference may come from the data."


def _other_held_out(runs: Sequence[Run], differ: set[str]) -> str:
    """How one sees that the runs were measured on different samples; empty when nothing says so."""
    hashes = {r.held_out for r in runs}
    if None not in hashes:
        return "not the same ids, texts and pictures" if len(hashes) > 1 else ""
    if len({r.evidence.data.eval for r in runs}) > 1:
        return "there are " + ", ".join(f"{r.evidence.data.eval:,} in {r.name}" for r in runs)
    if None in hashes and len(hashes) > 1:
        return "some were split off the training records, some have files of their own, or a split file is missing"
    if len({tuple(sorted(r.evidence.data.eval_buckets.items())) for r in runs}) > 1:
        return "other numbers of them in the length buckets"
    # The same count. With files of their own, settings say whether it is the same choice among the same records.
    found = sorted(p for p in differ if _decides_held_out(p)) + ["the split's seed"] * _other_seeds(runs)
    return f"{', '.join(found)} differ{'s' * (len(found) == 1)}" if found else ""


def _decides_held_out(path: str) -> bool:
    """Whether it is a setting that chooses among the same records; the seed is compared as it works out."""
    decided = decided_by(RunConfig, path)
    return "held_out" in decided and "place" not in decided and path != "data.split_seed"


def _other_seeds(runs: Sequence[Run]) -> bool:
    """Whether what decides the split is not the same number in all runs."""
    found = set()
    for run in runs:
        with suppress(UserError):
            found.add(parse_config(run.evidence.config_yaml, run.name).measure_seed)
    return len(found) > 1


def _text(value: Any) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _gate_text(result: GateResult | None) -> str:
    if result is None:
        return "–"
    value = "not measured" if result.value is None else f"{result.value:.4g} {result.unit}".rstrip()
    if result.value is not None and unit_of(result.measure, result.unit) == "points":
        value = f"{number(result.value, 'points')} points"
    worst = f" in {result.stratum}" if result.stratum else ""
    return f"{'passed' if result.passed else 'FAILED'}: {value}{worst}"


def _with_ci(row: MeasurementRow, i: int) -> str:
    m = row.values[i]
    return "–" if m is None else f"{fmt(m, unit=False)}{interval(m)} {row.mark(i)}".rstrip()
