"""What a report shows, as rows and small records: the same for the page and for its Markdown twin.

Pure functions of the `Evidence`; how the rows look is the business of `template.html` and `report.markdown`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from beholder.evidence import (
    AdapterRow,
    Condition,
    Cost,
    Evidence,
    Measurement,
    Prediction,
    Sample,
    WordReliance,
    WordStat,
)
from beholder.evidence.catalogue import ALL_CONDITIONS, heading, headlines, quantity, shown
from beholder.report import plots
from beholder.report.answers import all_answers
from beholder.report.verdicts import GROUPED, Group, groups
from beholder.report.words import (
    NBSP,
    condition_names,
    count,
    duration,
    fmt,
    fmt_ci,
    listed,
    metric_name,
    number,
    plural,
    reliance_level,
    signed,
    written,
)
from beholder.types import Status

MAX_STEPS = 12
"""Steps one can flip through; of more, evenly spread ones with the first and the last."""

MAX_WORD_ROWS = 14
"""Words at either end of the table of words."""

State = Literal["right", "wrong", "unknown"]


def warnings(e: Evidence) -> list[str]:
    """What a reader must not overlook, before any number."""
    out: list[str] = []
    if e.stopped is not None:
        why = f" It protects from this: {e.stopped.why}." if e.stopped.why else ""
        out.append(
            f"Stopped by its guardrail {e.stopped.sentence}.{why} The numbers are those of the checkpoint after step "
            f"{e.step}."
        )
    elif e.status != Status.SUCCEEDED:
        ended = e.status.value.replace("_", " ")
        out.append(f"This run ended as “{ended}”. The numbers describe the last state it had.")
    out += [gap for gap in e.gaps if "--promote-anyway" in gap]  # it builds on a run that did not pass
    if changed := [row.part for row in e.trainable if row.intact is False]:
        out.append(f"Frozen weights changed: {', '.join(changed)}. Every other number is suspect.")
    if e.text_only is not None and not e.text_only.equal:
        off = ", even with its adapters off" if e.adapters else ""
        out.append(f"The language model answers text differently than before{off}: its logits are not bit-equal.")
    if e.candidates and not any(c.best for c in e.candidates):
        out.append("No checkpoint was fit to be the best: the last one was measured. “Can I promote it?” says why.")
    if e.data.label_zero_pct:
        out.append(f"{e.data.label_zero_pct:.2g} % of the training samples had no supervised token.")
    if (empty := e.get("caption.empty.correct")) is not None and empty.value >= 0.05:
        out.append(f"{fmt(empty)} of the {written(e)}s are empty.")
    return out


def key_numbers(e: Evidence) -> list[tuple[str, str, str]]:
    """(label, number, small print) of the row under the verdicts."""
    out: list[tuple[str, str, str]] = []
    for place, row, m in headlines(e, written(e)):
        parts = [fmt_ci(m), f"n{NBSP}{count(m.n)}"]
        if place.beside and (other := e.get(f"{row.stem}.{place.beside[0]}")) is not None:
            parts.append(f"{place.beside[1]} {fmt(other)}")
        out.append((place.label or metric_name(e, m.name), fmt(m), " · ".join(filter(None, parts))))
    if frozen := [row.intact for row in e.trainable if row.intact is not None]:
        out.append(("frozen weights", "unchanged" if all(frozen) else "CHANGED", f"sha256 of {len(frozen)} parts"))
    if (t := e.text_only) is not None:
        label = "adapters off, on text" if e.adapters else "on text alone"
        out.append((label, "bit-equal" if t.equal else "CHANGED", f"{count(t.logits)} logits"))
    return out


# ---------------------------------------------------------------------------------------------------------------
# Did it learn?


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar: a value per condition, per point in time, or per phase."""

    label: str
    kind: str
    """CSS class, the condition's colour."""
    share: float
    """Length, 0 to 1."""
    text: str
    interval: str = ""


def progress_bars(e: Evidence) -> list[Bar]:
    """Held-out loss before and after training."""
    before, after = e.get_baseline("eval.loss"), e.get("eval.loss")
    level = None if before is None and after is None else e.get("band.text_only")
    return _bars(
        ("before training", "before", before), ("after training", "correct", after),
        (metric_name(e, "band.text_only"), "chance", level),
    )  # fmt: skip


def _bars(*rows: tuple[str, str, Measurement | None]) -> list[Bar]:
    """A bar for each (label, kind, measurement) that there is, as shares of the largest."""
    found = [(label, kind, m) for label, kind, m in rows if m is not None]
    top = max((m.value for _, _, m in found), default=0.0) or 1.0
    return [Bar(label, kind, m.value / top, fmt(m, unit=False), fmt_ci(m)) for label, kind, m in found]


def bands(e: Evidence) -> list[Measurement]:
    """The levels a loss is read against, highest first."""
    return sorted(shown(e, "bands"), key=lambda m: -m.value)


def eval_rows(e: Evidence) -> list[tuple[Measurement, Measurement | None]]:
    """(after, before) of every held-out measurement, all samples first, then by target length.

    Other groupings have many groups; their losses stand beside their image reliance under "Where does it fail?".
    """
    held_out = [m for m in e.measurements if quantity(m.name)[0].section == "held-out" and m.by in (None, "length")]
    rows = sorted(held_out, key=lambda m: m.stratum is not None)
    return [(m, e.get_baseline(m.name, m.stratum)) for m in rows]


def monitor_rows(e: Evidence) -> list[tuple[Measurement, Measurement | None]]:
    """(after, before) of what the run was watched with: all images of a monitor, then by kind of image."""
    found = [m for m in e.measurements if quantity(m.name)[0].section == "monitors"]
    return [(m, e.get_baseline(m.name, m.stratum)) for m in found]


# ---------------------------------------------------------------------------------------------------------------
# Does it look?


def condition_bars(e: Evidence, prefix: str) -> list[Bar]:
    """The same measurement with the right image and the wrong ones; shares also beside the chance level."""
    found = [(c, m) for c in ALL_CONDITIONS if (m := e.get(f"{prefix}.{c}")) is not None]
    if not found:
        return []
    top = 1.0 if found[0][1].unit == "share" else max(m.value for _, m in found) or 1.0
    names = condition_names(e)
    bars = [Bar(names[c], c, max(0.0, m.value) / top, fmt(m, unit=False), fmt_ci(m)) for c, m in found]
    if (m := e.get(f"{prefix}.chance")) is not None:
        bars.append(Bar("blind guessing", "chance", m.value / top, fmt(m)))
    return bars


def delta_lanes(e: Evidence) -> plots.Lanes | None:
    """How much each wrong image raises the loss, paired by sample, with its interval."""
    found = [(c, m) for c in ALL_CONDITIONS if (m := e.get(f"ablation.delta.{c}")) is not None]
    rows = [(condition_names(e)[c], c, m) for c, m in found]
    axis = "loss with the wrong image minus loss with its own, nats/token; 0: the image does not matter"
    return plots.lanes(rows, reference=0.0, axis=axis) if rows else None


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """One score of what the model wrote."""

    name: str
    better: str
    """An arrow, up when more is better."""
    caveat: str | None
    values: list[Measurement | None]
    """One for each condition of the table."""
    chance: Measurement | None


def answer_table(e: Evidence) -> tuple[list[Condition], list[AnswerRow]]:
    """Captions, named objects, answers to questions and CLIPScore, under each condition any of them was measured."""
    found = shown(e, "written")
    conditions: list[Condition] = [c for c in ALL_CONDITIONS if any(m.name.endswith(f".{c}") for m in found)]
    arrows = {"higher": "↑", "lower": "↓", "none": ""}
    out: list[AnswerRow] = []
    seen: set[str] = set()
    for m in found:
        stem, _, condition = m.name.rpartition(".")
        if condition == "correct" or (e.get(f"{stem}.correct") is None and stem not in seen):
            seen.add(stem)
            values = [e.get(f"{stem}.{c}") for c in conditions]
            chance = e.get(f"{stem}.chance")
            name = metric_name(e, m.name if condition == "correct" else stem)
            out.append(AnswerRow(name, arrows[m.better], m.caveat, values, chance))
    return conditions, out


@dataclass(frozen=True, slots=True)
class MarkedWord:
    """A word of a reference and its mark by what it loses without the image."""

    space: str
    """What separates it from the word before."""
    text: str
    level: int
    delta: float
    told: str


def marked(words: Sequence[WordReliance]) -> list[MarkedWord]:
    """The words of a reference with their marks; with their spaces they join to the reference."""
    out: list[MarkedWord] = []
    for w in words:
        text, delta = w.text.lstrip(), w.without - w.with_image
        told = f"{signed(delta)} nats without the image ({w.with_image:.2f} with it, {w.without:.2f} without)"
        out.append(MarkedWord(w.text[: len(w.text) - len(text)], text, reliance_level(delta), delta, told))
    return out


def word_tables(e: Evidence) -> list[tuple[str, list[tuple[WordStat, float]]]]:
    """Words that need the image most and least, each with its bar's length (0 to 1); no word is in both."""
    ranked = sorted(e.words, key=lambda w: -w.delta)
    half = min(MAX_WORD_ROWS, (len(ranked) + 1) // 2)
    top = max((abs(w.delta) for w in ranked), default=0.0) or 1.0
    sides = (("need the image most", ranked[:half]), ("need it least", ranked[half:][-MAX_WORD_ROWS:][::-1]))
    return [(title, [(w, max(0.0, w.delta) / top) for w in side]) for title, side in sides if side]


# ---------------------------------------------------------------------------------------------------------------
# Where does it fail?


@dataclass(frozen=True, slots=True)
class Grouping:
    """The groups of one grouping, those that look least first."""

    by: str
    groups: list[Group]
    lanes: plots.Lanes | None
    columns: dict[str, str]
    """Headings of what any group has: which of ``ratio delta loss match answers``."""


def groupings(e: Evidence) -> list[Grouping]:
    """Image reliance, loss and scores by group, with all samples as the last lane to compare with."""
    out: list[Grouping] = []
    for by, members in groups(e).items():
        columns = {c: heading(name) for c, name in GROUPED.items() if any(c in g.told for g in members)}
        key = "ratio" if "ratio" in columns else "delta"
        rows = [(g.stratum, g.standing, g.told[key]) for g in members if key in g.told]
        if rows and (m := e.get(GROUPED[key])) is not None:
            rows.append(("all samples", "all", m))
        axis = {
            "ratio": "loss with another image over loss with its own; 1×: answered without looking",
            "delta": "loss with another image minus loss with its own, nats/token; 0: answered without looking",
        }[key]
        lanes = plots.lanes(rows, reference=1.0 if key == "ratio" else 0.0, axis=axis) if rows else None
        out.append(Grouping(by, members, lanes, columns))
    return out


def standings(e: Evidence) -> dict[str, str]:
    """What the marks of groups mean. Beside answers that are judged by themselves they are about the loss alone."""
    loss_alone = all_answers(e) is not None
    return {
        "blind": "its loss does not need it" if loss_alone else "answered without looking",
        "weak": "barely", "few": "too few to judge", "looks": "its loss needs it" if loss_alone else "looks",
        "unknown": "",
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shown:
    """What the model wrote for a sample at one step."""

    step: int
    prediction: Prediction | None
    """None when the sample was not captioned at that step."""
    state: State
    changed: bool
    """Whether it differs from what it wrote at the shown step before."""


@dataclass(frozen=True, slots=True)
class Card:
    """A held-out sample: its captions over the steps and those under other conditions."""

    sample: Sample
    shown: list[Shown]
    """One for each of `Album.steps`."""
    others: list[Prediction]
    words: list[MarkedWord]

    @property
    def final(self) -> Prediction | None:
        """The last caption with its own image."""
        return next((s.prediction for s in reversed(self.shown) if s.prediction is not None), None)

    @property
    def state(self) -> State:
        return _state(self.final)

    def right_at(self) -> list[int]:
        """Places among the steps at which the caption was exactly right."""
        return [k for k, s in enumerate(self.shown) if s.state == "right"]


@dataclass(frozen=True, slots=True)
class Album:
    """The samples and the steps at which they were captioned."""

    steps: list[int]
    cards: list[Card]
    told: list[str]
    """A sentence for each step: how many were right, how many changed."""
    left_out: int
    """Steps that were recorded and are not shown."""

    @property
    def judged(self) -> bool:
        """Whether any caption was compared with its reference."""
        return any(s.state != "unknown" for c in self.cards for s in c.shown)


def album(e: Evidence) -> Album:
    """The picture grid: every sample at every shown step."""
    every = sorted({p.step for s in e.samples for p in s.predictions if p.condition == "correct"})
    steps = every
    if len(every) > MAX_STEPS:
        steps = [every[round(k * (len(every) - 1) / (MAX_STEPS - 1))] for k in range(MAX_STEPS)]
    cards = [_card(s, steps) for s in e.samples]
    told: list[str] = []
    for k, step in enumerate(steps):
        here = [c.shown[k] for c in cards if c.shown[k].prediction is not None]
        judged = [s for s in here if s.state != "unknown"]
        parts = [f"after step {count(step)}"]
        if judged:
            parts.append(f"exactly right: {sum(s.state == 'right' for s in judged)} of {len(judged)}")
        if k:
            parts.append(f"changed since step {count(steps[k - 1])}: {sum(s.changed for s in here)} of {len(here)}")
        told.append(" · ".join(parts))
    return Album(steps, cards, told, len(every) - len(steps))


def _card(sample: Sample, steps: Sequence[int]) -> Card:
    own = {p.step: p for p in sample.predictions if p.condition == "correct"}
    shown: list[Shown] = []
    earlier: Prediction | None = None
    for step in steps:
        p = own.get(step)
        shown.append(Shown(step, p, _state(p), p is not None and earlier is not None and p.text != earlier.text))
        earlier = p or earlier
    return Card(sample, shown, [p for p in sample.predictions if p.condition != "correct"], marked(sample.words))


def _state(p: Prediction | None) -> State:
    return "unknown" if p is None or p.exact is None else "right" if p.exact else "wrong"


def data_warning(e: Evidence) -> str:
    """What is odd about the records without making them rejects; empty when nothing is."""
    if not (n := e.data.absent_images):
        return ""
    what = "record names an image that it does" if n == 1 else "records name an image that they do"
    return f"{count(n)} {what} not have (“image 5” of three)."


# ---------------------------------------------------------------------------------------------------------------
# What instruction tuning adds


def retention_bars(e: Evidence) -> list[Bar]:
    """Loss on plain text of the base and of the adapted model, as shares of the larger one."""
    base, adapted = e.get("retention.loss_base"), e.get("retention.loss")
    return _bars(("base, adapters off", "before", base), ("adapters on", "cost", adapted))


@dataclass(frozen=True, slots=True)
class Footprint:
    """The adapted layers that share a name."""

    name: str
    count: int
    shapes: str
    """In → out, such as ``576 → 1,536``; several where they differ."""
    rank: str
    params: str
    """Of one layer."""
    total: int


def footprint(adapters: Sequence[AdapterRow]) -> list[Footprint]:
    """The adapted layers by the last part of their names, in the order in which they come; the tower's say so."""
    by_name: dict[str, list[AdapterRow]] = {}
    for row in adapters:
        where = "" if row.part == "language" else f"{row.part}: "
        by_name.setdefault(where + row.name.rpartition(".")[2], []).append(row)
    return [
        Footprint(
            name=name,
            count=len(rows),
            shapes=listed(list(dict.fromkeys(f"{count(r.d_in)} → {count(r.d_out)}" for r in rows)), 2),
            rank=_span([r.rank for r in rows]),
            params=_span([r.params for r in rows]),
            total=sum(r.params for r in rows),
        )
        for name, rows in by_name.items()
    ]


def _span(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return count(low) if low == high else f"{count(low)}–{count(high)}"


def footprint_told(e: Evidence) -> str:
    """How many layers have adapters and how large they are beside what they are on."""
    told: list[str] = []
    for part, called in (("language", "language model"), ("vision", "vision tower")):
        rows = [r for r in e.adapters if r.part == part]
        total, base = sum(r.params for r in rows), next((r.params for r in e.trainable if r.part == part), 0)
        share = f", {100 * total / base:.2g}{NBSP}% of the {called}’s {count(base)}" if base else ""
        told += [f"{plural(len(rows), 'layer')} of the {called}, {count(total)} parameters{share}."] if rows else []
    weaker = f" Used at {e.adapter_strength:g} of the strength they were trained at." if e.adapter_strength < 1 else ""
    return " ".join(told) + weaker


@dataclass(frozen=True, slots=True)
class CandidateRow:
    """A measured checkpoint as the page shows it."""

    step: int
    loss: str
    delta: str
    collapse: str
    state: Literal["best", "refused", "fit"]
    verdict: str


def candidate_rows(e: Evidence) -> list[CandidateRow]:
    """The checkpoints the best one was chosen from, in the order of their steps."""
    out: list[CandidateRow] = []
    for c in sorted(e.candidates, key=lambda c: c.step):
        state: Literal["best", "refused", "fit"] = "best" if c.best else "refused" if c.refused else "fit"
        told = {"best": "the best", "refused": c.refused, "fit": "higher held-out loss"}[state]
        delta = "" if c.delta_shuffled is None else signed(c.delta_shuffled)
        collapse = "" if c.collapse is None else number(c.collapse, "share")
        out.append(CandidateRow(c.step, number(c.eval_loss, "nats/token"), delta, collapse, state, told))
    return out


def measured_step(e: Evidence) -> str:
    """Which checkpoint the numbers are about, where a run chose among several; else empty."""
    if not e.candidates or e.step is None:
        return ""
    best = any(c.best and c.step == e.step for c in e.candidates)
    return f"measured: step {count(e.step)} of {count(e.cost.steps)}{', the best' if best else ''}"


# ---------------------------------------------------------------------------------------------------------------
# What did it cost?


def phase_bars(c: Cost) -> list[Bar]:
    """Where the time went, longest first, as shares of the whole."""
    total = max(c.wall_s or 0.0, sum(c.phases_s.values()))
    if not c.phases_s or total <= 0:
        return []
    parts = dict(c.phases_s)
    rest = total - sum(parts.values())
    if rest > 0.01 * total:
        parts["everything else"] = rest
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    return [Bar(name, "cost", max(0.0, s) / total, duration(s), f"{100 * s / total:.0f}{NBSP}%") for name, s in ordered]


def cost_rows(c: Cost) -> list[tuple[str, str]]:
    """(what, how much), only what was measured."""
    waited = None if c.data_wait_share is None else 100 * c.data_wait_share
    rows: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("optimizer steps", c.steps, count),
        ("epochs", c.epochs, "{:.3g}".format),
        ("training samples seen", c.samples, count),
        ("images seen", c.images, count),
        ("tokens processed", c.tokens, count),
        ("supervised tokens", c.target_tokens, count),
        ("time in all", c.wall_s, duration),
        ("time in training steps", c.train_s, duration),
        ("time of a step", c.step_s, "{:.3g} s".format),
        ("samples/s", c.samples_per_s, "{:.3g}".format),
        ("images/s", c.images_per_s, "{:.3g}".format),
        ("tokens/s", c.tokens_per_s, "{:,.0f}".format),
        ("waiting for data", waited, "{:.1f} %".format),
        ("peak memory", c.peak_memory_mb, "{:,.0f} MB".format),
        ("feature store", c.feature_store_mb, "{:,.0f} MB".format),
        ("device", c.device or None, str),
        ("processes", c.processes, str),
    ]
    return [(what, form(value)) for what, value, form in rows if value is not None]


# ---------------------------------------------------------------------------------------------------------------
# Can I promote it?


def promotion(e: Evidence) -> list[str]:
    """What the gates' outcome means for whoever ran this, in sentences."""
    if not e.gates:
        return [
            "No gate was judged, so a later stage that starts from this run refuses to, unless it is told "
            "--promote-anyway. Measuring the run again judges the gates of its config."
        ]
    if e.promotable:
        return [
            "beholder run ended with exit code 0, and a later stage that starts from this run accepts it. Had a gate "
            "failed, the exit code would have been 3 and a later stage would have asked for --promote-anyway."
        ]
    if not e.failed_gates:
        return ["Every gate passed, but the run did not succeed; a later stage asks for --promote-anyway."]
    return [
        "When a gate fails, beholder run ends with exit code 3. The run itself is complete and its checkpoint whole, "
        "but its evidence does not show what a later stage relies on, so a stage that starts from it refuses to.",
        "Mend the cause (“Where does it fail?” names it where it is known) and run again; or, when a bound does not "
        "fit this data, declare another one under gates: in the config. Only when you know why a gate is wrong about "
        "this run, give the later stage --promote-anyway; its report will say so.",
    ]
