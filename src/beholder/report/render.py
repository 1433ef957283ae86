"""Evidence to HTML and Markdown: the two verdicts, the tables, the sample cards, the words for numbers.

Everything shown comes from the `Evidence` record. Text in it (captions, sample ids, names) is other people's data: the
template escapes all of it, control characters are made visible, and the page forbids scripts and network access.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from beholder.evidence import Condition, Cost, Curve, Evidence, Measurement, Prediction, Sample, Status, load_evidence
from beholder.report import plots
from beholder.report.words import (
    CONDITION_NAMES,
    METRIC_NAMES,
    NBSP,
    count,
    duration,
    flatten,
    fmt,
    fmt_ci,
    metric_name,
    visible,
)
from beholder.runs import atomic_write

Tone = Literal["good", "weak", "bad", "unknown"]

CLEARLY = 1.05
"""The loss with another sample's image must be this many times the loss with the own one (lower end of the interval)
for "it looks" without a qualification. Healthy alignments reach 1.2 and far more; a collapsed one reached 1.002."""

CONDITIONS: tuple[Condition, ...] = ("correct", "shuffled", "zero")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of the two answers at the top of the page."""

    question: str
    tone: Tone
    answer: str
    why: str
    rule: str
    """How the answer follows from the numbers."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar: a value per condition, or per point in time."""

    label: str
    kind: str
    """CSS class, the condition's colour."""
    share: float
    """Length, 0 to 1."""
    text: str
    interval: str = ""


def render(evidence: Evidence | str | Path, folder: str | Path) -> tuple[Path, Path]:
    """Write ``report.html`` and ``report.md`` into ``folder`` and give their paths.

    ``evidence`` is the record, an ``evidence.json``, or the run folder that holds one. Each file appears whole or not
    at all. Raises UserError when the evidence cannot be read.
    """
    record = evidence if isinstance(evidence, Evidence) else load_evidence(evidence)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    paths = target / "report.html", target / "report.md"
    for path, text in zip(paths, (render_html(record), render_markdown(record)), strict=True):
        atomic_write(path, text)
    return paths


def render_html(e: Evidence) -> str:
    """One self-contained page: inline CSS, SVG and pictures, no script, nothing fetched."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, finalize=_finalize,
    )  # fmt: skip
    return env.get_template("template.html").render(
        e=e,
        verdicts=[learned(e), looks(e)],
        warnings=warnings(e),
        key_numbers=key_numbers(e),
        loss_bars=condition_bars(e, "ablation.loss"),
        match_bars=condition_bars(e, "caption.exact_match"),
        progress_bars=progress_bars(e),
        loss_plot=loss_plot(e),
        loss_sketch=loss_plot(e, width=6.2, height=1.7),
        small_plots=small_plots(e),
        histograms=[
            (h, plots.histogram(h, title=f"Histogram of {h.name}", labels=CONDITION_NAMES))
            for h in e.histograms
            if h.bins and h.series
        ],
        eval_rows=eval_rows(e),
        caption_rows=caption_rows(e),
        ablation_rows=[m for m in e.measurements if re.match(r"ablation\.(delta|ratio)\.", m.name)],
        cards=[card(s) for s in e.samples],
        cost_rows=cost_rows(e.cost),
        provenance=flatten(e.provenance),
        fmt=fmt, fmt_ci=fmt_ci, count=count, condition_names=CONDITION_NAMES, visible=visible, duration=duration,
        metric_name=metric_name,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# The two verdicts, and what must not be overlooked


def learned(e: Evidence) -> Verdict:
    """Did the held-out loss fall, beyond the uncertainty of both measurements?"""
    question = "Did it learn?"
    rule = "Yes when the 95 % interval of the held-out loss after training lies wholly below the one before."
    before, after = e.get_baseline("eval.loss"), e.get("eval.loss")
    if after is None:
        return Verdict(question, "unknown", "Not measured.", "There is no held-out loss in this run.", rule)
    if before is None:
        why = f"Held-out loss is {fmt(after)}, but it was not measured before training. Read the curve below."
        return Verdict(question, "unknown", "No baseline.", why, rule)
    why = f"Held-out loss {fmt(before, unit=False)} → {fmt(after)} on {count(after.n)} samples it never trained on."
    if before.ci95 is not None and after.ci95 is not None and after.ci95[1] < before.ci95[0]:
        return Verdict(question, "good", "Yes, it learned.", why, rule)
    if after.value < before.value:
        return Verdict(question, "weak", "Not shown.", why + " The two intervals overlap.", rule)
    return Verdict(question, "bad", "No.", why, rule)


def looks(e: Evidence) -> Verdict:
    """Does the loss rise when another sample's image is shown, beyond the uncertainty, and by how much?"""
    question = "Does it look at the image?"
    rule = (
        "Yes when another sample's image raises the loss (paired 95 % interval of the difference above 0) and the "
        f"ratio's interval lies above {CLEARLY}; barely when only the first holds."
    )
    delta, ratio = e.get("ablation.delta.shuffled"), e.get("ablation.ratio.shuffled")
    if delta is None:
        return Verdict(question, "unknown", "Not measured.", "The loss with other images was not measured.", rule)
    times = "" if ratio is None else f" ({fmt(ratio)} the loss{'' if ratio.ci95 is None else ', ' + fmt_ci(ratio)})"
    why = f"Shown another sample's image, its loss changes by {delta.value:+.3g} nats/token{times}."
    blind, level = e.get("caption.exact_match.zero"), e.get("caption.exact_match.chance")
    own = e.get("caption.exact_match.correct")
    if own is not None and blind is not None and level is not None:
        why += f" Captions exactly right: {fmt(own)}; with no image {fmt(blind)}, where guessing gives {fmt(level)}."
    rises = delta.ci95 is not None and delta.ci95[0] > 0
    clearly = ratio is None or (ratio.ci95 is not None and ratio.ci95[0] > CLEARLY)
    if rises and clearly:
        return Verdict(question, "good", "Yes, it looks.", why, rule)
    if rises:
        return Verdict(question, "weak", "Barely.", why, rule)
    return Verdict(question, "bad", "No, it does not look.", why + " A low loss is not sight.", rule)


def warnings(e: Evidence) -> list[str]:
    """What a reader must not overlook, before any number."""
    out: list[str] = []
    if e.status != Status.SUCCEEDED:
        out.append(f"This run ended as “{e.status.value}”. The numbers describe the last state it had.")
    changed = [row.part for row in e.trainable if row.intact is False]
    if changed:
        out.append(f"Frozen weights changed: {', '.join(changed)}. Every other number is suspect.")
    if e.text_only is not None and not e.text_only.equal:
        out.append("The language model answers text differently than before: its logits are not bit-equal.")
    if e.data.label_zero_pct:
        out.append(f"{e.data.label_zero_pct:.2g} % of the training samples had no supervised token.")
    empty = e.get("caption.empty.correct")
    if empty is not None and empty.value >= 0.05:
        out.append(f"{fmt(empty)} of the captions are empty.")
    return out


# ---------------------------------------------------------------------------------------------------------------
# Parts of the page


def key_numbers(e: Evidence) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the row under the verdicts."""
    out: list[tuple[str, str, str]] = []
    wanted = ("caption.exact_match.correct", "caption.cider_d.correct", "eval.token_accuracy", "eval.perplexity")
    for name in wanted:
        if (m := e.get(name)) is not None:
            small = " · ".join(part for part in (fmt_ci(m), f"n{NBSP}{count(m.n)}") if part)
            out.append((metric_name(name), fmt(m), small))
    frozen = [row.intact for row in e.trainable if row.intact is not None]
    if frozen:
        out.append(("frozen weights", "unchanged" if all(frozen) else "CHANGED", f"sha256 of {len(frozen)} parts"))
    if e.text_only is not None:
        t = e.text_only
        out.append(("on text alone", "bit-equal" if t.equal else "CHANGED", f"{count(t.logits)} logits"))
    return out


def condition_bars(e: Evidence, prefix: str) -> list[Bar]:
    """The same measurement with the right, the wrong and no image; exact match also beside the chance level."""
    found = [(c, m) for c in CONDITIONS if (m := e.get(f"{prefix}.{c}")) is not None]
    if not found:
        return []
    top = 1.0 if found[0][1].unit == "share" else max(m.value for _, m in found) or 1.0
    bars = [Bar(CONDITION_NAMES[c], c, max(0.0, m.value) / top, fmt(m, unit=False), fmt_ci(m)) for c, m in found]
    if (m := e.get(f"{prefix}.chance")) is not None:
        bars.append(Bar("blind guessing", "chance", m.value / top, fmt(m)))
    return bars


def progress_bars(e: Evidence) -> list[Bar]:
    """Held-out loss before and after training."""
    pair = [
        ("before training", "before", e.get_baseline("eval.loss")),
        ("after training", "correct", e.get("eval.loss")),
    ]
    found = [(label, kind, m) for label, kind, m in pair if m is not None]
    top = max((m.value for _, _, m in found), default=0.0) or 1.0
    return [Bar(label, kind, m.value / top, fmt(m, unit=False), fmt_ci(m)) for label, kind, m in found]


def loss_plot(e: Evidence, width: float = 13.6, height: float = 3.9) -> plots.Plot | None:
    """Training and held-out loss over steps; the baseline is the held-out curve's point at step 0."""
    names = (("train.loss", "training"), ("eval.loss", "held-out"), ("quick_eval.loss", "held-out, quick subset"))
    lines = [(label, c) for name, label in names if (c := _curve(e, name)) is not None]
    return plots.curves(lines, title="Loss over optimizer steps", width=width, height=height) if lines else None


def small_plots(e: Evidence) -> list[tuple[str, plots.Plot]]:
    """Every other curve, small: learning rate, gradient norm, speed, …"""
    rest = [c for c in e.curves if c.x and c.name not in ("train.loss", "eval.loss", "quick_eval.loss")]
    names = {"lr.connector": "Learning rate of the connector", "grad_norm": "Gradient norm before clipping"}
    return [
        (
            name := names.get(c.name, c.name),
            plots.curves([(name, c)], title=f"{name} over steps", width=6.6, height=2.4),
        )
        for c in rest
    ]


def _curve(e: Evidence, name: str) -> Curve | None:
    curve = next((c for c in e.curves if c.name == name and c.x), None)
    before = e.get_baseline(name)
    if curve is not None and name == "eval.loss" and before is not None and curve.x[0] > 0:
        curve = curve.model_copy(update={"x": [0.0, *curve.x], "y": [before.value, *curve.y]})
    return curve


def eval_rows(e: Evidence) -> list[tuple[Measurement, Measurement | None]]:
    """(after, before) of every held-out measurement, all samples first."""
    rows = [m for m in e.measurements if m.name.startswith("eval.")]
    rows.sort(key=lambda m: m.stratum is not None)
    return [(m, e.get_baseline(m.name, m.stratum)) for m in rows]


def caption_rows(e: Evidence) -> list[tuple[str, list[Measurement | None]]]:
    """(metric, its measurement under each condition)."""
    out: list[tuple[str, list[Measurement | None]]] = []
    for m in e.measurements:
        parts = m.name.split(".")
        if parts[0] == "caption" and len(parts) == 3 and parts[2] == "correct":
            out.append((METRIC_NAMES.get(parts[1], parts[1]), [e.get(f"caption.{parts[1]}.{c}") for c in CONDITIONS]))
    return out


def card(sample: Sample) -> dict[str, Any]:
    """A sample with its final caption apart from the earlier ones and from those under other conditions."""
    own = sorted((p for p in sample.predictions if p.condition == "correct"), key=lambda p: p.step)
    others = [p for p in sample.predictions if p.condition != "correct"]
    final: Prediction | None = own[-1] if own else None
    state = "unknown" if final is None or final.exact is None else "right" if final.exact else "wrong"
    return {"sample": sample, "final": final, "earlier": own[:-1], "others": others, "state": state}


def _maybe(n: int | None) -> str | None:
    return None if n is None else count(n)


def cost_rows(c: Cost) -> list[tuple[str, str]]:
    """(what, how much), only what was measured."""
    rows: list[tuple[str, str | None]] = [
        ("optimizer steps", count(c.steps)),
        ("epochs", None if c.epochs is None else f"{c.epochs:.3g}"),
        ("training samples seen", _maybe(c.samples)),
        ("images seen", _maybe(c.images)),
        ("tokens processed", _maybe(c.tokens)),
        ("supervised tokens", _maybe(c.target_tokens)),
        ("time in all", None if c.wall_s is None else duration(c.wall_s)),
        ("time in training steps", None if c.train_s is None else duration(c.train_s)),
        *((f"time: {name}", duration(seconds)) for name, seconds in c.phases_s.items()),
        ("time of a step", None if c.step_s is None else f"{c.step_s:.3g} s"),
        ("samples/s", None if c.samples_per_s is None else f"{c.samples_per_s:.3g}"),
        ("images/s", None if c.images_per_s is None else f"{c.images_per_s:.3g}"),
        ("tokens/s", None if c.tokens_per_s is None else f"{c.tokens_per_s:,.0f}"),
        ("waiting for data", None if c.data_wait_share is None else f"{100 * c.data_wait_share:.1f} %"),
        ("peak memory", None if c.peak_memory_mb is None else f"{c.peak_memory_mb:,.0f} MB"),
        ("feature store", None if c.feature_store_mb is None else f"{c.feature_store_mb:,.0f} MB"),
        ("device", c.device or None),
        ("processes", str(c.processes)),
    ]
    return [(what, text) for what, text in rows if text is not None]


def _finalize(value: Any) -> Any:
    # Every text that the template prints passes here; Markup (our own SVG) is a str subclass and passes unchanged.
    return visible(value) if type(value) is str else value


# ---------------------------------------------------------------------------------------------------------------
# Markdown


def render_markdown(e: Evidence) -> str:
    """The same in Markdown, without pictures."""
    mark = {"good": "✅", "weak": "⚠️", "bad": "❌", "unknown": "❔"}
    lines = [f"# {_md(e.run_name)}: stage {_md(e.stage)}, {e.status.value}", ""]
    facts = [f"{_md(k)}: {_md(v)}" for k, v in e.summary.items()]
    lines += [" · ".join([*facts, _md(e.created)]), ""]
    lines += [f"> **{_md(w)}**\n" for w in warnings(e)]
    for v in (learned(e), looks(e)):
        lines += [f"## {mark[v.tone]} {v.question} {v.answer}", "", v.why, "", f"_{v.rule}_", ""]

    rows = [
        [metric_name(m.name), m.stratum or "all", "" if b is None else fmt(b), fmt(m), fmt_ci(m), count(m.n)]
        for m, b in eval_rows(e)
    ]
    lines += _table(["held-out", "samples", "before", "after", "95 %", "n"], rows)
    ablation = [m for m in e.measurements if m.name.startswith("ablation.")]
    lines += _table(
        ["image ablation", "value", "95 %", "n"],
        [[metric_name(m.name), fmt(m), fmt_ci(m), count(m.n)] for m in ablation],
    )
    names = [CONDITION_NAMES[c] for c in CONDITIONS]
    caption_table = [
        [name, *("" if m is None else f"{fmt(m)} ({fmt_ci(m)})" if m.ci95 else fmt(m) for m in row)]
        for name, row in caption_rows(e)
    ]
    lines += _table(["captions", *names], caption_table)
    if (level := e.get("caption.exact_match.chance")) is not None:
        lines += [f"Always writing the most frequent reference would be exactly right {fmt(level)} of the time.", ""]

    lines += ["## Samples", ""] if e.samples else []
    sample_rows: list[list[str]] = []
    for item in map(card, e.samples):
        final: Prediction | None = item["final"]
        others: list[Prediction] = item["others"]
        sign = {"right": "✓", "wrong": "✗", "unknown": ""}[item["state"]]
        blind = next((p.text for p in others if p.condition == "zero"), "")
        sample_rows.append(
            [item["sample"].id, item["sample"].reference, f"{sign} {'' if final is None else final.text}", blind]
        )
    lines += _table(["id", "reference", "caption", "with no image"], sample_rows)

    lines += ["## What was trainable", ""]
    proof = {True: "bit-identical", False: "CHANGED", None: ""}
    lines += _table(
        ["part", "parameters", "trained", "type", "frozen weights"],
        [[r.part, count(r.params), count(r.trainable), r.dtype, proof[r.intact]] for r in e.trainable],
    )
    if e.text_only is not None:
        t = e.text_only
        word = "bit-equal before and after" if t.equal else f"NOT equal (largest difference {t.max_abs_difference})"
        lines += [f"On text alone: {count(t.logits)} logits of {t.prompts} prompts are {word}.", ""]

    lines += ["## Data", ""]
    d = e.data
    lines += [
        f"{count(d.records)} records, {count(d.train)} for training, {count(d.eval)} held out. {_md(d.eval_origin)}",
        "",
    ]
    lines += _table(["rejected because", "records"], [[k, count(v)] for k, v in d.rejects.items()])
    lines += _table(["source", "samples"], [[k, count(v)] for k, v in d.sources.items()])
    lines += ["## Cost", "", *_table(["", ""], [list(row) for row in cost_rows(e.cost)])]
    lines += ["## Provenance", "", *_table(["", ""], [list(row) for row in flatten(e.provenance)])]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", e.config_yaml)), 3)
    lines += ["## Config", "", f"{fence}yaml", visible(e.config_yaml).rstrip(), fence, ""]
    lines += ["## Gaps", "", *([f"- {_md(gap)}" for gap in e.gaps] or ["None: everything asked for was measured."]), ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    body = ["| " + " | ".join(_md(cell) for cell in row) + " |" for row in rows]
    return ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *body, ""]


def _md(text: str) -> str:
    """Text as text: HTML and Markdown characters escaped, on one line."""
    one_line = " ".join(visible(text).split())
    return re.sub(r"([\\`*_\[\]|#!~$])", r"\\\1", html.escape(one_line, quote=False))
