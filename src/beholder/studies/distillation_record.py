"""What is known of a distillation study (``distillation.json``, ``.csv``): runs, arms, differences by seed, verdicts.

Everything that is said follows from the rows (`conclude`), so an old record can be judged again.

Arms are compared seed by seed: all runs are measured on the same held-out samples, and those of one seed begin with the
same weights and see the same order, so their difference has neither in it. Its 95 % interval is Student's over the
seeds. A teacher helps where the whole interval is on the better side, does not help where all of it is not, and else it
cannot be told.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from beholder.config import DistillConfig
from beholder.evidence import Measurement, Record
from beholder.studies.record import read_record

RECORD, TABLE, PAGE, TWIN = "distillation.json", "distillation.csv", "distillation.html", "distillation.md"

KD, ALONE, LONGER = "kd", "alone", "longer"
Unit = Literal["share", "points", "number"]
Basis = Literal["equal steps", "equal time"]
Said = Literal["helps", "does not help", "cannot be told"]


class Column(NamedTuple):
    words: str
    unit: Unit
    higher: bool
    """Whether more is better."""
    judged: bool = True
    """Whether a teacher is there for it; being like the teacher is not the aim."""
    within: bool = False
    """Whether it cannot leave 0 to 1."""


COLUMNS = {
    "answer.accuracy.correct": Column("answers right", "share", True, within=True),
    "eval.loss": Column("held-out loss", "number", False),
    "answer.gain.none": Column("gain over no image", "points", True),
    "pairs.right.correct": Column("contrast pairs right", "share", True, within=True),
    "teacher.kl": Column("KL to its teacher", "number", False, False),
    "transfer.share": Column("looking that came over", "share", True),
    "instruct.score.correct": Column("instruction score", "number", True, within=True),
}
"""What is kept of a run, and of its teacher."""
ACCURACY, LOSS, DISTANCE = "answer.accuracy.correct", "eval.loss", "teacher.kl"
JUDGED = (ACCURACY, LOSS)
"""What verdicts are about."""

ONLY_KEPT = ("form", "k", "draws", "dir", "max_gb")
"""Settings of `DistillConfig` that do nothing where teachers are asked online."""


# ---------------------------------------------------------------------------------------------------------------
# The record


class DistillationRow(Record):
    """One run."""

    name: str
    arm: str
    seed: int
    folder: str
    """Below the study's folder."""
    config_hash: str
    settings: dict[str, Any]
    status: Literal["finished", "failed", "interrupted", "waiting"]
    """waiting: not run yet."""
    reason: str = ""
    """failed: what it said."""
    teaching: Literal["kept", "online", "none"]
    """How its teachers are asked."""
    kl_of: str = ""
    """What its distance from the teacher is told by; those of two ways do not compare."""
    measured: dict[str, Measurement] = Field(default_factory=dict)
    """Over all samples, by name."""
    by_kind: tuple[Measurement, ...] = ()
    """Answers right by kind of question and of answer."""
    steps: int | None = None
    epochs: float | None = None
    step_s: float | None = None
    cache_s: float | None = None
    """Seconds that what is kept of its teachers about its training samples has cost; None: nothing is read, or what it
    cost is not known."""
    peak_memory_mb: float | None = None
    device: str = ""
    params: int = 0
    learns: int = 0
    """Parameters that learn."""
    gates_failed: tuple[str, ...] = ()
    stopped: str = ""
    """What a guardrail said that ended it early."""

    @property
    def total_s(self) -> float | None:
        """Of its steps and of what is kept of its teachers."""
        if self.steps is None or self.step_s is None or (self.teaching == "kept" and self.cache_s is None):
            return None
        return self.steps * self.step_s + (self.cache_s or 0.0)


class TeacherFacts(Record):
    """What a teacher's own run says of it."""

    name: str
    params: int | None = None
    measured: dict[str, Measurement] = Field(default_factory=dict)
    by_kind: tuple[Measurement, ...] = ()
    note: str = ""
    """Why its figures are missing, or do not compare."""


class Longer(Record):
    """How the steps of the arm `LONGER` were found, from runs of the first seed."""

    steps: int
    alike: str
    """config_hash of the taught run that it is as long as."""
    cache_s: float
    kd_s: float
    """Seconds of its steps."""
    step_s: float
    """Of a step without a teacher."""


class Mean(Record):
    """Over an arm's seeds."""

    value: float
    low: float | None = None
    high: float | None = None
    """95 % interval over seeds; None with one."""
    n: int = 1


class Arm(Record):
    """What its runs say together."""

    name: str
    what: str
    """In words."""
    runs: tuple[str, ...] = ()
    """Finished ones."""
    at: dict[str, Mean] = Field(default_factory=dict)
    by_kind: dict[str, Mean] = Field(default_factory=dict)
    """Answers right; by ``question: shape``."""
    steps: float | None = None
    step_s: float | None = None
    cache_s: float | None = None
    total_s: float | None = None
    """Means over its runs."""


class Difference(Record):
    """An arm minus another one of the same seed."""

    arm: str
    against: str
    basis: Basis
    measure: str
    kind: str = ""
    """Kind of question; empty: all."""
    by_seed: dict[int, float]
    mean: Mean
    said: Said | None
    """None: of a measurement that is not judged."""


class Verdict(Record):
    measure: str
    basis: Basis
    said: Said
    why: str


class BreakEven(Record):
    """An arm that reads what is kept against one that asks the same teachers online."""

    kept: str
    online: str
    faster: float
    """So many times, a step."""
    faster_in_all: float
    """The same over the whole run, what is kept counted."""
    epochs: float | None
    """After so many what is kept has paid for itself; None: never."""


class DistillationRecord(Record):
    """``distillation.json``: all that table, pages and verdicts are made from."""

    schema_version: Literal[1] = 1
    name: str
    created: str
    seeds: list[int]
    rows: list[DistillationRow]
    """In the order they are run."""
    teachers: tuple[TeacherFacts, ...] = ()
    longer: Longer | None = None
    arms: tuple[Arm, ...] = ()
    differences: tuple[Difference, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    break_even: tuple[BreakEven, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm | None:
        return next((a for a in self.arms if a.name == name), None)

    def verdict(self, measure: str, basis: Basis) -> Verdict:
        return next(v for v in self.verdicts if (v.measure, v.basis) == (measure, basis))

    @classmethod
    def load(cls, path: str | Path) -> DistillationRecord:
        """Read ``distillation.json``, given as the file or as the study's folder."""
        return read_record(cls, Path(path), RECORD, "distill", "a distillation study")


# ---------------------------------------------------------------------------------------------------------------
# What follows


def conclude(record: DistillationRecord) -> DistillationRecord:
    """The record with what its rows say. Pure."""
    runs: dict[str, list[DistillationRow]] = {}
    for row in record.rows:
        runs.setdefault(row.arm, []).append(row)
    done = {name: [r for r in rows if r.status == "finished"] for name, rows in runs.items()}
    first = [name for name in (KD, ALONE, LONGER) if name in runs]
    names = [*first, *(name for name in runs if name not in first)]
    differences = _differences(done)
    return record.model_copy(update={
        "arms": tuple(_arm(name, runs[name][0], done[name]) for name in names),
        "differences": tuple(differences),
        "verdicts": tuple(
            _verdict(measure, basis, record, differences) for basis in ("equal steps", "equal time")
            for measure in JUDGED
        ),
        "break_even": tuple(_break_even(done)),
    })  # fmt: skip


def _arm(name: str, any_run: DistillationRow, rows: Sequence[DistillationRow]) -> Arm:
    found = {m: [r.measured[m].value for r in rows if m in r.measured] for m in COLUMNS}
    kinds: dict[str, list[float]] = {}
    for row in rows:
        for kind, m in kinds_of(row.by_kind).items():
            kinds.setdefault(kind, []).append(m.value)
    return Arm(
        name=name, what=_words(name, any_run), runs=tuple(r.name for r in rows),
        at={m: mean_of(values, within=COLUMNS[m].within) for m, values in found.items() if values},
        by_kind={kind: mean_of(values, within=True) for kind, values in kinds.items()},
        steps=_mean([r.steps for r in rows]), step_s=_mean([r.step_s for r in rows]),
        cache_s=_mean([r.cache_s for r in rows]), total_s=_mean([r.total_s for r in rows]),
    )  # fmt: skip


def kinds_of(measurements: Sequence[Measurement]) -> dict[str, Measurement]:
    """By ``question: shape`` or ``answer: number``."""
    return {f"{m.by}: {m.stratum}": m for m in measurements}


def _words(name: str, run: DistillationRow) -> str:
    known = {
        KD: {"kept": "taught, from what is kept of its teachers", "online": "taught, its teachers asked online"},
        ALONE: {"none": "without a teacher, at the same steps"},
        LONGER: {"none": "without a teacher, for as long as the teacher costs"},
    }
    told = known.get(name, {}).get(run.teaching)
    if told is not None:
        return told
    asked = {"distill.online", *(f"distill.{x}" for x in ONLY_KEPT)} if run.teaching == "online" else set()
    own = {key.removeprefix("distill."): v for key, v in run.settings.items() if key not in asked and v is not None}
    words = ["its teachers asked online"] if run.teaching == "online" else []
    words += [f"{key} {str(v).lower() if isinstance(v, bool) else v}" for key, v in own.items()]
    return ", ".join(words)


def _mean(values: Sequence[float | None]) -> float | None:
    """None unless every one is known."""
    known = [v for v in values if v is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _differences(done: Mapping[str, Sequence[DistillationRow]]) -> list[Difference]:
    """Of every arm over the one without a teacher, where both make the same steps, and of `KD` over the one that has
    its time."""
    pairs: list[tuple[str, str, Basis]] = [(KD, LONGER, "equal time")]
    for arm in done:
        if arm not in (ALONE, LONGER):
            pairs.append((arm, ALONE, "equal steps"))
    found = []
    for arm, against, basis in pairs:
        other = {r.seed: r for r in done.get(against, ())}
        both = [(r, other[r.seed]) for r in done.get(arm, ()) if r.seed in other]
        if basis == "equal steps":  # an arm may set others, a guardrail may have stopped a run
            both = [(a, b) for a, b in both if a.steps == b.steps]
        for measure, column in COLUMNS.items():
            values = {
                a.seed: a.measured[measure].value - b.measured[measure].value
                for a, b in both if measure in a.measured and measure in b.measured
                and (measure != DISTANCE or a.kl_of == b.kl_of)
            }  # fmt: skip
            found += _difference(arm, against, basis, measure, "", values, column)
        kinds = [(a.seed, kinds_of(a.by_kind), kinds_of(b.by_kind)) for a, b in both]
        for kind in dict.fromkeys(kind for _, mine, _ in kinds for kind in mine):
            values = {
                seed: mine[kind].value - theirs[kind].value
                for seed, mine, theirs in kinds if kind in mine and kind in theirs
            }  # fmt: skip
            found += _difference(arm, against, basis, ACCURACY, kind, values, COLUMNS[ACCURACY])
    return found


def _difference(
    arm: str, against: str, basis: Basis, measure: str, kind: str, values: Mapping[int, float], column: Column
) -> list[Difference]:
    if not values:
        return []
    mean = mean_of(list(values.values()))
    return [
        Difference(
            arm=arm, against=against, basis=basis, measure=measure, kind=kind, by_seed=dict(values), mean=mean,
            said=judge(mean, higher=column.higher) if column.judged else None,
        )
    ]  # fmt: skip


def judge(difference: Mean, *, higher: bool) -> Said:
    """What a difference of taught minus not taught says."""
    if difference.low is None or difference.high is None:
        return "cannot be told"
    low, high = (difference.low, difference.high) if higher else (-difference.high, -difference.low)
    return "helps" if low > 0 else "does not help" if high <= 0 else "cannot be told"


def _verdict(measure: str, basis: Basis, record: DistillationRecord, differences: Sequence[Difference]) -> Verdict:
    against = ALONE if basis == "equal steps" else LONGER
    found = next(
        (d for d in differences if (d.arm, d.basis, d.measure, d.kind) == (KD, basis, measure, "")), None
    )  # fmt: skip
    if found is None:
        planned = any(r.arm == against for r in record.rows)
        why = f"no seed has a finished run of both {KD} and {against} that measured it" if planned else (
            f"the arm {against} was not run"
        )  # fmt: skip
        return Verdict(measure=measure, basis=basis, said="cannot be told", why=why)
    words, mean = COLUMNS[measure].words, found.mean
    assert found.said is not None
    if mean.low is None:
        why = f"{words} {difference_text(measure, mean)}, of one seed; {KD} minus {against} needs two for an interval"
    else:
        side = {
            "helps": "the whole interval is on the better side", "cannot be told": "0 is in the interval",
            "does not help": "none of the interval is on the better side",
        }[found.said]  # fmt: skip
        why = f"{words} {difference_text(measure, mean)} over {mean.n} seeds, {KD} minus {against}; {side}"
    return Verdict(measure=measure, basis=basis, said=found.said, why=why)


def _break_even(done: Mapping[str, Sequence[DistillationRow]]) -> list[BreakEven]:
    """Pairs of arms that differ in how their teachers are asked alone."""
    asking = {f"distill.{name}" for name in ("online", *ONLY_KEPT)}
    found = []
    for kept_name, kept in done.items():
        for online_name, online in done.items():
            if not kept or not online or (kept[0].teaching, online[0].teaching) != ("kept", "online"):
                continue
            rest = [{k: v for k, v in rows[0].settings.items() if k not in asking} for rows in (kept, online)]
            steps, epochs = _mean([r.steps for r in kept]), _mean([r.epochs for r in kept])
            cache, fast, slow = (
                _mean([r.cache_s for r in kept]), _mean([r.step_s for r in kept]), _mean([r.step_s for r in online]),
            )  # fmt: skip
            if rest[0] != rest[1] or not steps or not epochs or cache is None or not fast or not slow:
                continue
            found.append(
                BreakEven(
                    kept=kept_name, online=online_name, faster=slow / fast,
                    faster_in_all=slow * steps / (fast * steps + cache),
                    epochs=cache / ((slow - fast) * steps / epochs) if slow > fast else None,
                )
            )  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------
# Intervals

_T975 = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010, 2.1788, 2.1604, 2.1448,
    2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860, 2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484,
    2.0452, 2.0423,
)  # fmt: skip
"""Student's t below which 97.5 % lie, for 1 to 30 degrees of freedom."""
_Z975 = 1.959964


def t975(freedom: int) -> float:
    """Beyond the table by its expansion around the normal one, right to four decimals."""
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z, f = _Z975, freedom
    return z + (z**3 + z) / (4 * f) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)


def mean_of(values: Sequence[float], *, within: bool = False) -> Mean:
    """With Student's 95 % interval where there are two or more. ``within``: of values from 0 to 1, on the scale of the
    mean's log-odds (delta method, as survey statistics has it for proportions), so that it cannot leave 0 to 1."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Mean(value=mean)
    half = t975(n - 1) * statistics.stdev(values) / math.sqrt(n)
    if not within or not 0 < mean < 1 or not half:  # a mean of 0 or 1 has values that are all the same
        return Mean(value=mean, low=mean - half, high=mean + half, n=n)
    middle, reach = math.log(mean / (1 - mean)), half / (mean * (1 - mean))
    low, high = (0.5 + 0.5 * math.tanh((middle + side) / 2) for side in (-reach, reach))
    return Mean(value=mean, low=low, high=high, n=n)


# ---------------------------------------------------------------------------------------------------------------
# In words


@dataclass(frozen=True, slots=True)
class _Scale:
    times: float
    after: str
    digits: int


_SCALES: dict[Unit, _Scale] = {
    "share": _Scale(100, " %", 1), "points": _Scale(100, " points", 1), "number": _Scale(1, "", 4)
}  # fmt: skip


def _number(value: float, scale: _Scale, sign: str = "") -> str:
    text = f"{value * scale.times:{sign}.{scale.digits}f}"
    return ("0" if float(text) == 0 and not sign else text).replace("-", "\u2212")


def mean_text(measure: str, mean: Mean | None) -> str:
    """``88.2 % (87.1 … 89.3)``; a dash for what was not measured."""
    if mean is None:
        return "–"
    scale = _SCALES[COLUMNS[measure].unit]
    ends = "" if mean.low is None or mean.high is None else (
        f" ({_number(mean.low, scale)} … {_number(mean.high, scale)})"
    )  # fmt: skip
    return f"{_number(mean.value, scale, '+' if COLUMNS[measure].unit == 'points' else '')}{scale.after}{ends}"


def difference_text(measure: str, mean: Mean) -> str:
    """``+2.1 points (+0.8 … +3.4)``."""
    scale = _SCALES["points" if COLUMNS[measure].unit == "share" else COLUMNS[measure].unit]
    ends = "" if mean.low is None or mean.high is None else (
        f" ({_number(mean.low, scale, '+')} … {_number(mean.high, scale, '+')})"
    )  # fmt: skip
    return f"{_number(mean.value, scale, '+')}{scale.after}{ends}"


def answer(record: DistillationRecord) -> str:
    """The verdicts on answers in a line; on loss where no answers were scored."""
    measure = ACCURACY if any(ACCURACY in a.at for a in record.arms) else LOSS
    steps, later = (record.verdict(measure, basis).said for basis in ("equal steps", "equal time"))
    words = {"helps": "the teacher helps", "does not help": "it does not help", "cannot be told": "it cannot be told"}
    by = f"(by {COLUMNS[measure].words})"
    if steps == later:
        return f"At equal steps and at equal time {words[steps]} {by}"
    return f"At equal steps {words[steps]}, at equal time {words[later]} {by}"


def sizes(record: DistillationRecord) -> str:
    """``a 37M student of a 162M teacher``; empty before any run has finished."""
    params = next((r.params for r in record.rows if r.params), 0)
    if not params:
        return ""
    known = [compact(t.params) for t in record.teachers if t.params]
    missing = len(record.teachers) - len(known)
    teachers = [f"{_article(size)} {size} teacher" for size in known]
    teachers += ["a teacher of unknown size"] * missing
    return f"{_article(compact(params))} {compact(params)} student of {' and '.join(teachers) or 'no teacher'}"


def compact(n: int) -> str:
    """``37M``, ``1.2M``, ``648K``."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.{0 if n >= 10 * size else 1}f}{letter}"
    return str(n)


def _article(number: str) -> str:
    return "an" if number.startswith(("8", "11K", "11M", "11B", "18K", "18M", "18B")) else "a"


# ---------------------------------------------------------------------------------------------------------------
# distillation.csv


def distillation_csv(record: DistillationRecord) -> str:
    """A row per run in their order; an empty cell is a number that was not measured. Full precision."""
    kinds = list(dict.fromkeys(k for r in record.rows for k in kinds_of(r.by_kind)))
    head = ["name", "arm", "seed", *(x for m in COLUMNS for x in (m, f"{m}.low", f"{m}.high"))]
    head += [f"{ACCURACY} {kind}" for kind in kinds]
    head += ["params", "learns", "steps", "epochs", "step_s", "cache_s", "total_s", "peak_memory_mb", "gates_failed",
             "stopped", "status", "config_hash"]  # fmt: skip
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    for r in record.rows:
        cells: list[Any] = [r.name, r.arm, r.seed]
        for measure in COLUMNS:
            m = r.measured.get(measure)
            cells += [None, None, None] if m is None else [m.value, *(m.ci95 or (None, None))]
        mine = kinds_of(r.by_kind)
        cells += [mine[kind].value if kind in mine else None for kind in kinds]
        cells += [r.params or None, r.learns or None, r.steps, r.epochs, r.step_s, r.cache_s, r.total_s,
                  r.peak_memory_mb, "; ".join(r.gates_failed), r.stopped, r.status, r.config_hash]  # fmt: skip
        writer.writerow(cells)
    return out.getvalue()


assert set(ONLY_KEPT) <= DistillConfig.model_fields.keys()
