"""What the page shows of a run, as plain data: words, verdicts and groupings are those of the report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from beholder.evidence import Curve, Evidence
from beholder.evidence.catalogue import called
from beholder.report import content, plots, verdicts
from beholder.report.render import LOSSES, SMALL, exact_curves
from beholder.report.words import count, duration, metric_name
from beholder.runs import writer_is_alive
from beholder.types import Status, printable
from beholder.watching.so_far import SoFar

TOLD: dict[Status, str] = {
    Status.RUNNING: "training", Status.SUCCEEDED: "finished", Status.FAILED: "failed",
    Status.STOPPED_BY_GUARDRAIL: "stopped by its guardrail", Status.CANCELLED: "stopped before its end",
}  # fmt: skip
QUIET_S = 600
"""A run that has said nothing for so long is told to be quiet."""


def state(look: SoFar) -> dict[str, Any]:
    """Everything but the golden set."""
    if not look.exists:
        name = printable(look.run.path.name)
        told = f"There is no folder {name} yet. This page shows the run as soon as it starts."
        return {"run": name, "there": False, "told": told}
    e = look.as_evidence()
    status = look.status
    ended = status not in (None, Status.RUNNING)
    rows = verdicts.gate_rows(e)
    return _clean(
        {
            "run": e.run_name, "there": True, "stage": e.stage, "status": status.value if status else "starting",
            "told": _told(look, status), "ended": ended, "facts": _facts(look), "progress": _progress(look, ended),
            "warnings": _warnings(look, e, ended), "judged": look.ended_with is not None,
            "verdicts": _verdicts(e) if look.ended_with is not None else [],
            "gates": [_gate(row, ended) for row in rows], "guardrails": _guardrails(look),
            "plots": _plots(look, e), "measured": _measured(e), "report": (look.run.path / "report.html").is_file(),
        }
    )  # fmt: skip


def album(look: SoFar) -> dict[str, Any]:
    """The golden set by step; pictures by their place, once each."""
    found = content.album(look.as_evidence().model_copy(update={"samples": look.samples()}))
    return _clean(
        {
            "steps": found.steps, "told": found.told, "left_out": found.left_out,
            "cards": [
                {
                    "id": card.sample.id, "question": card.sample.question, "reference": card.sample.reference,
                    "images": card.sample.images,
                    "shown": [
                        None if (p := s.prediction) is None else {"text": p.text, "state": s.state, "new": s.changed}
                        for s in card.shown
                    ],
                }
                for card in found.cards
            ],
        }
    )  # fmt: skip


def _clean(value: Any) -> Any:
    """With every text visible: control characters and what turns text around are written out."""
    match value:
        case str():
            return value if value.startswith("data:image/") else printable(value)
        case dict():
            return {key: _clean(v) for key, v in value.items()}
        case list() | tuple():
            return [_clean(v) for v in value]
        case _:
            return value


def _told(look: SoFar, status: Status | None) -> str:
    if status is None:
        return "starting"
    if status is not Status.RUNNING:
        return TOLD[status]
    if writer_is_alive(look.run.path) is False:
        return "ended without saying so: its process is gone; beholder run … --resume auto goes on"
    if not look.metrics.trained:
        return "getting ready"
    total = look.total_steps
    if total is not None and look.metrics.step >= total:
        return "trained, now being measured"
    return TOLD[status]


def _progress(look: SoFar, ended: bool) -> dict[str, Any]:
    step, total = look.metrics.step, look.total_steps
    eta = look.metrics.trained.get("eta_s")
    words = "" if ended or not isinstance(eta, int | float) or eta <= 0 else f"about {duration(eta)} left in training"
    return {"step": step, "total": total, "eta": words}


def _facts(look: SoFar) -> list[list[str]]:
    """(label, value) of what runs now."""
    row, out = look.metrics.trained, []
    for label, key, form in (
        ("training loss", "loss", "{:.4g}"), ("samples a second", "samples_per_s", "{:.3g}"),
        ("seconds a step", "step_time_s", "{:.3g}"), ("memory at most", "peak_memory_mb", "{:,.0f} MB"),
        ("waiting for data", "data_wait_share", "{:.1%}"), ("passes over the data", "epoch", "{:.3g}"),
    ):  # fmt: skip
        value = row.get(key)
        if isinstance(value, int | float):
            out.append([label, form.format(value)])
    best = look.facts.get("best_step")
    if isinstance(best, int):
        out.append(["best checkpoint", f"step {count(best)}"])
    return out


def _warnings(look: SoFar, e: Evidence, ended: bool) -> list[str]:
    out = content.warnings(e) if look.ended_with is not None else []
    error = look.facts.get("error")
    if isinstance(error, str) and ended:
        out.append(error)
    stopped = look.facts.get("stopped")
    if look.ended_with is None and look.status is Status.STOPPED_BY_GUARDRAIL and isinstance(stopped, str):
        out.append(f"Stopped by its guardrail {stopped}.")
    if look.metrics.damaged:
        out.append(f"metrics.jsonl has {count(look.metrics.damaged)} damaged lines, which are left out here.")
    if not ended and look.status is Status.RUNNING and (quiet := _quiet_s(look)) > QUIET_S:
        out.append(f"Nothing was logged for {duration(quiet)}.")
    return out + list(look.notes.values())


def _quiet_s(look: SoFar) -> float:
    try:
        return time.time() - look.run.metrics_path.stat().st_mtime
    except OSError:
        return 0.0


def _verdicts(e: Evidence) -> list[dict[str, str]]:
    return [
        {"question": v.question, "tone": v.tone, "answer": v.answer, "why": v.why, "rule": v.rule}
        for v in verdicts.verdicts(e)
    ]


def _gate(row: verdicts.GateRow, ended: bool) -> dict[str, str]:
    """As the report has it. Before the end, what could not be judged is not judged yet."""
    state = row.state if ended or row.state != "unknown" else "waits"
    number = row.number.replace("not measured", "not measured yet") if not ended else row.number
    number = number.replace(", no interval", " so far; its interval comes at the end") if not ended else number
    return {
        "name": row.gate.name, "state": state, "what": row.what, "number": f"{number} {row.unit}".strip(),
        "bound": row.bound, "interval": row.interval, "where": row.where, "why": row.gate.why,
    }  # fmt: skip


def _guardrails(look: SoFar) -> dict[str, Any]:
    cfg = look.cfg
    rules = [] if cfg is None else [(name, rule) for name, rule in cfg.guards.items() if rule.enable]
    stop = look.would_stop()
    last = look.metrics.readings[-1] if look.metrics.readings else None
    values = {} if last is None else last["monitors"]
    return {
        "read": None if last is None else last["step"],
        "broken": None if stop is None else stop.sentence,
        "rules": [
            {
                "name": name, "what": called(rule.measure or ""), "why": rule.why,
                "number": f"{values[rule.measure]:.4g}" if rule.measure in values else "",
            }
            for name, rule in rules
        ],
    }  # fmt: skip


def _measured(e: Evidence) -> list[list[str]]:
    """(label, number, small print) as at the top of the report."""
    return [list(row) for row in content.key_numbers(e)]


# ---------------------------------------------------------------------------------------------------------------
# Curves


def _plots(look: SoFar, e: Evidence) -> list[dict[str, Any]]:
    """The report's drawings, as points: loss, answers, then one for each other curve."""
    curves = {c.name: c for c in look.curves() or e.curves if c.x}
    rows: list[tuple[str, str, list[tuple[str, Curve]], list[tuple[str, float]]]] = []
    loss = [(label, curves[n]) for n, label in LOSSES if n in curves]
    if loss:
        bands = [(metric_name(e, m.name), m.value) for m in content.bands(e)]
        rows.append(("Loss", "large", loss, bands))
    exact = exact_curves(e.model_copy(update={"curves": list(curves.values())}))
    if exact:
        rows.append(("Answers exactly right", "large", exact, []))
    large = {c.name for _, c in (*loss, *exact)}
    for name, curve in curves.items():
        if name not in large and not name.startswith("quick_eval.exact/"):
            title = SMALL.get(name, called(name))
            rows.append((title, "small", [(title, curve)], []))
    return [_plot(*row) for row in rows]


def _plot(
    title: str, size: str, lines: Sequence[tuple[str, Curve]], bands: Sequence[tuple[str, float]]
) -> dict[str, Any]:
    values = [y for _, c in lines for y in c.y]
    log = not title.startswith("Answers") and min(values) > 0 and max(values) / min(values) >= plots.LOG_FROM
    return {
        "title": title, "size": size, "unit": lines[0][1].unit, "log": log,
        "bands": [[label, value] for label, value in bands if value > 0 or not log],
        "lines": [
            {
                "label": label, "x": _short(c.x), "y": _short(c.y),
                "mean": _short(plots.smooth(c.y, log)) if len(c.x) > 40 and not c.name.startswith("lr.") else [],
            }
            for label, c in lines
        ],
    }  # fmt: skip


def _short(values: Sequence[float]) -> list[float]:
    return [float(f"{v:.5g}") for v in values]
