"""What the monitors have said of a run so far, written into its log, and what its guardrails make of it (S4-3).

The log is the only memory: whatever is decided follows from its lines, so that a resume decides the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from beholder.evidence import GuardrailStop, Measurement
from beholder.evidence.guardrails import Limit, Reading, judge, limits, readings
from beholder.runs import RunDir, to_json
from beholder.stages.measured import Measured
from beholder.stages.panel import watched
from beholder.stages.session import Session
from beholder.types import UserError


def read_monitors(session: Session, step: int) -> list[Measurement]:
    """What the monitors say of the weights after ``step`` steps, logged; nothing where none is switched on."""
    if not session.monitors.any:
        return []
    m = Measured(step, [])
    for row in watched(session.cfg):
        if row.needs(session):
            row.make(session, m)
    if session.dist.is_main:
        values = {x.key: x.value for x in m.measurements}
        session.run.log({"step": step, "monitors": values, "monitor_data": session.monitors.fingerprint})
    told = [x for x in m.measurements if x.stratum is None and x.name in session.cfg.eval.watched]
    session.reporter.line("monitors", f"step={step} " + " ".join(f"{x.name}={x.value:.4f}" for x in told))
    return m.measurements


def overall(measured: list[Measurement]) -> dict[str, float]:
    """The numbers over all samples, by name."""
    return {x.name: x.value for x in measured if x.stratum is None}


def open_history(session: Session, *, fresh: bool) -> list[Measurement]:
    """The first reading: of the start, and of the run that is named as baseline."""
    if not session.monitors.any:
        return []
    if (warning := session.monitors.never_said()) is not None:
        session.reporter.line("monitors", f"WARNING: {warning}")
        session.gap(f"Irrelevant images: {warning}.")
    if not fresh:
        return []
    if (other := session.cfg.eval.baseline_run) is not None:
        session.dist.on_main(lambda: session.run.log({**first_reading(other), "baseline_run": other}))
        check_history(session)  # before anything is measured to be compared with it
    return read_monitors(session, 0)


def first_reading(folder: str) -> dict[str, Any]:
    """The first reading of another run: what a reading consists of, and nothing else that its line may say."""
    run = RunDir(folder)
    rows = run.numbered_metrics()
    first = [(n, r) for n, r in rows if "monitors" in r and r.get("step") == 0 and "baseline_run" not in r]
    if not first:
        raise UserError(
            f"eval.baseline_run {folder}: its log has no reading of step 0; expected the folder of a run whose "
            "monitors (eval.irrelevant, eval.ood, …) were on"
        )
    number, row = first[-1]
    reading = {"step": 0, "monitors": row["monitors"], "monitor_data": row.get("monitor_data", {})}
    if (wrong := _no_reading(reading)) is not None:
        raise UserError(
            f"eval.baseline_run: {run.metrics_path}:{number}: {wrong}. The log is damaged; name another run's folder, "
            "or leave eval.baseline_run out to compare with this run's own step 0"
        )
    return reading


def _no_reading(row: Mapping[str, Any]) -> str | None:
    """Why a line of another run's log is no reading; None where it is one."""
    values, known = row["monitors"], row["monitor_data"]
    if not isinstance(values, dict) or not isinstance(known, dict):
        name = "monitor_data" if isinstance(values, dict) else "monitors"
        return f"{name} is {type(row[name]).__name__}; expected an object"
    for name, value in values.items():
        if not _is_finite(value):
            return f"monitors: {name[:80]!r} is {repr(value)[:40]}; expected a finite number"
    try:
        to_json(row).encode()
    except (ValueError, RecursionError) as e:  # half a surrogate pair; nested without end
        return f"it cannot be written again ({str(e)[:200]})"
    return None


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        return False


def measured_otherwise(session: Session) -> str | None:
    """What reading of the history was taken otherwise than the next one will be, and in what; None when none was."""

    def look() -> str | None:
        now = session.monitors.fingerprint
        for row in (r for r in session.run.metrics() if "monitors" in r):
            known = row.get("monitor_data", {})
            changed = [x for name in now if name in known for x in differences(known[name], now[name])]
            if changed:
                where = row.get("baseline_run", f"step {row['step']} of this run")
                return (
                    f"{where} was measured otherwise, so its readings do not compare with new ones: "
                    f"{'; '.join(dict.fromkeys(changed))}"
                )
        return None

    return session.dist.on_main(look)


def differences(then: Any, now: Mapping[str, Any]) -> list[str]:
    """In what two of a monitor's fingerprints (`MonitorSets.fingerprint`) differ: ``eval.irrelevant.phrase: "a" →
    "b"``."""
    if not isinstance(then, dict):  # the images' sha256 alone, as logs had it before
        then = {**now, **{name: then for name in now if name.startswith("images of ")}}
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return [f"{name}: {_shown(then.get(name))} → {_shown(now.get(name))}" for name in names]


def _shown(value: Any) -> str:
    """A setting as a config writes it; of a sha256, its beginning."""
    return value[:12] if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else to_json(value)


def check_history(session: Session) -> None:
    """Before training goes on: raises `UserError` where the readings so far were taken otherwise."""
    if (changed := measured_otherwise(session)) is not None:
        raise UserError(f"{changed}. Put it back, or start a new run")


def check_baseline(session: Session) -> None:
    """Before training: raises `UserError` where a guardrail that compares with the baseline has none."""
    session.dist.on_main(lambda: _check_baseline(session))


def _check_baseline(session: Session) -> None:
    base = next((r.values for r in history(session) if r.step == 0), {})
    without = [n for n, rule in session.cfg.guards.items() if rule.compares and rule.measure not in base]
    if without:
        names = ", ".join(f"guardrails.{name}" for name in without)
        raise UserError(
            f"{names}: compared with the baseline, and there is no reading of step 0 for it: the run went on from a "
            "checkpoint of another folder, was started without this monitor, or eval.baseline_run had it not. Switch "
            "it off (enable: false), give below or above instead, or start a new run"
        )


def history(session: Session, before: int | None = None) -> list[Reading]:
    """The readings so far; ``before``: of earlier steps."""
    return readings(session.run.metrics(), before)


def standing_stop(session: Session, total: int) -> GuardrailStop | None:
    """Why the run must not go on, by what was read so far; the same on every process. At its last step it is over."""
    if not session.cfg.guards:
        return None

    def look() -> dict[str, Any] | None:
        found = judge(history(session, total), session.cfg.guards)
        return None if found is None else found.model_dump(mode="json")

    found = session.dist.on_main(look)
    return None if found is None else GuardrailStop.model_validate(found)


def best_limits(session: Session) -> list[Limit]:
    """What the best checkpoint must keep."""
    return limits(history(session), session.cfg.guards) if session.cfg.guards else []
