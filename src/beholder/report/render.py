"""Evidence to the page: one self-contained HTML file that answers five questions in order.

Everything shown comes from the `Evidence` record. Text in it (captions, sample ids, names) is other people's data: the
template escapes all of it, control characters are made visible, and the page forbids scripts and network access.
What is shown is decided in `report.verdicts` and `report.content`; `report.markdown` writes the same as Markdown.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from beholder.evidence import Curve, Evidence, catalogue, load_evidence
from beholder.report import answers, content, contrast, plots, slots, verdicts, words
from beholder.report.markdown import render_markdown
from beholder.report.page import page
from beholder.runs import atomic_write

__all__ = ["render", "render_html", "render_markdown"]


LOSSES = (("train.loss", "training"), ("eval.loss", "held-out"), ("quick_eval.loss", "held-out, quick subset"))
"""The curves of the large drawing, and what they are called there."""
SMALL = {
    "lr.connector": "Learning rate of the connector", "lr.lora": "Learning rate of the adapters",
    "lr.vision": "Learning rate of what learns in the tower", "grad_norm": "Gradient norm before clipping",
}  # fmt: skip


class Pages(NamedTuple):
    """The files that `render` wrote."""

    html: Path
    markdown: Path

    def print(self, console: Console) -> None:
        for path in self:
            console.print(str(path), markup=False, soft_wrap=True)

    def to_json(self) -> dict[str, str]:
        return {name: str(path) for name, path in self._asdict().items()}


def render(evidence: Evidence | str | Path, folder: str | Path) -> Pages:
    """Write ``report.html`` and ``report.md`` into ``folder`` and give their paths.

    ``evidence`` is the record, an ``evidence.json``, or the run folder that holds one. Each file appears whole or not
    at all. Raises UserError when the evidence cannot be read.
    """
    record = evidence if isinstance(evidence, Evidence) else load_evidence(evidence)
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    pages = Pages(target / "report.html", target / "report.md")
    for path, text in zip(pages, (render_html(record), render_markdown(record)), strict=True):
        atomic_write(path, text)
    return pages


def render_html(e: Evidence) -> str:
    """One self-contained page: inline CSS, SVG and pictures, no script, nothing fetched."""
    condition_names, titles = words.condition_names(e), {"caption.length": f"Length of the {words.written(e)}s"}
    return page(
        "template.html",
        e=e,
        verdicts={v.key: v for v in verdicts.verdicts(e)},
        gates=verdicts.gate_rows(e),
        album=content.album(e),
        loss_plot=loss_plot(e),
        small_plots=small_plots(e),
        histograms=[
            (titles.get(h.name, h.name), plots.histogram(h, title=f"Histogram of {h.name}", labels=condition_names))
            for h in e.histograms if h.bins and h.series
        ],
        exact_plot=exact_plot(e),
        answers=content.answer_table(e),
        kinds=answers.answer_kinds(e),
        overall=answers.all_answers(e),
        pope=answers.by_condition(e, "yes/no"),
        followed=answers.by_condition(e, "instructions"),
        contrast=contrast,
        provenance=words.flatten(e.provenance),
        content=content, words=words, talk=answers, slots=slots, written=words.written(e),
        shown=partial(catalogue.shown, e), grouping_name=catalogue.grouping_name,
        fmt=words.fmt, fmt_ci=words.fmt_ci, count=words.count, metric_name=partial(words.metric_name, e),
        condition_names=condition_names,
    )  # fmt: skip


def loss_plot(e: Evidence) -> plots.Plot | None:
    """Training and held-out loss over steps, beside the bands; the baseline is the held-out curve at step 0."""
    lines = [(label, c) for name, label in LOSSES if (c := _curve(e, name)) is not None]
    levels = [(words.metric_name(e, m.name), m.value) for m in content.bands(e)]
    return plots.curves(lines, title="Loss over optimizer steps", bands=levels) if lines else None


def exact_curves(e: Evidence) -> list[tuple[str, Curve]]:
    """Shares of exactly right answers over steps: overall, then ``quick_eval.exact/<kind>`` of kinds of question."""
    whole = (("quick_eval.exact", "quick subset"), ("eval.exact", "all held-out"))
    lines = [(label, c) for name, label in whole if (c := _curve(e, name)) is not None]
    kinds = sorted((c for c in e.curves if c.x and c.name.startswith("quick_eval.exact/")), key=lambda c: c.name)
    lines += [(f"{c.name.partition('/')[2]} (quick)", c) for c in kinds]
    return lines[: plots.MAX_LINES]


def exact_plot(e: Evidence) -> plots.Plot | None:
    """Answers exactly right over steps, in per cent."""
    shares = [(label, c, {"y": [100 * y for y in c.y], "unit": "% of answers"}) for label, c in exact_curves(e)]
    lines = [(label, c.model_copy(update=in_percent)) for label, c, in_percent in shares]
    title = "Answers exactly right over optimizer steps"
    return plots.curves(lines, title=title, height=3.0, log=False) if lines else None


def small_plots(e: Evidence) -> list[tuple[str, plots.Plot]]:
    """Every other curve, small: learning rate, gradient norm, speed, …"""
    large = {"train.loss", "eval.loss", "quick_eval.loss", *(c.name for _, c in exact_curves(e))}
    rest = [c for c in e.curves if c.x and c.name not in large]
    named = [(SMALL.get(c.name, catalogue.called(c.name)), c) for c in rest]
    return [(n, plots.curves([(n, c)], title=f"{n} over steps", width=6.6, height=2.4)) for n, c in named]


def _curve(e: Evidence, name: str) -> Curve | None:
    curve = next((c for c in e.curves if c.name == name and c.x), None)
    before = e.get_baseline(name)
    if curve is not None and name == "eval.loss" and before is not None and curve.x[0] > 0:
        curve = curve.model_copy(update={"x": [0.0, *curve.x], "y": [before.value, *curve.y]})
    return curve
