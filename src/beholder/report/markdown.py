"""Evidence to Markdown: the same answers in the same order as the page, without pictures and drawings."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from beholder.evidence import Evidence, Measurement
from beholder.evidence.catalogue import Section, grouping_name, shown
from beholder.report import answers, content, contrast, slots
from beholder.report.verdicts import Verdict, gate_rows, verdicts
from beholder.report.words import condition_names, count, flatten, fmt, fmt_ci, interval, metric_name, signed, with_ci
from beholder.types import printable

MARKS = {"good": "✅", "weak": "⚠️", "bad": "❌", "unknown": "❔", "plain": "▫️"}


def render_markdown(e: Evidence) -> str:
    """The report as Markdown text."""
    said = {v.key: v for v in verdicts(e)}
    lines = [f"# {escaped(e.run_name)}: stage {escaped(e.stage)}, {e.status.value}", ""]
    facts = [f"{escaped(k)}: {escaped(v)}" for k, v in e.summary.items()]
    facts += [escaped(text)] if (text := content.measured_step(e)) else []
    lines += [" · ".join([*facts, escaped(e.created)]), ""]
    lines += [f"> **{escaped(w)}**\n" for w in content.warnings(e)]
    lines += [
        f"- {MARKS[v.tone]} **{v.question}** {escaped(v.answer)} {escaped(v.why)}"
        for v in (said["promote"], *(v for v in said.values() if v.key != "promote"))
    ]
    lines.append("")
    sign = {"failed": "❌", "unknown": "❔", "passed": "✓"}
    told = [
        f"{sign[r.state]} {escaped(r.gate.name)}{f' for {escaped(r.where)}' if r.where else ''} "
        f"{escaped(r.number)}, must be {escaped(r.bound)}"
        for r in gate_rows(e)
    ]
    lines += [f"Gates: {' · '.join(told)}", ""] if told else []
    lines += [f"- ❌ finding: {escaped(text)}" for text in e.findings]
    lines += [""] if e.findings else []
    lines += table(["number", "value", ""], [list(row) for row in content.key_numbers(e)])
    lines += _learn(e, said["learn"])
    lines += _look(e, said["look"])
    lines += _fail(e, said["fail"])
    lines += [*_heading(said["cost"]), *table(["", ""], [list(row) for row in content.cost_rows(e.cost)])]
    phases = content.phase_bars(e.cost)
    lines += table(["time spent on", "", "of all"], [[b.label, b.text, b.interval] for b in phases])
    lines += _promote(e, said["promote"])
    lines += _record(e)
    return "\n".join(lines)


def _heading(v: Verdict) -> list[str]:
    return [f"## {MARKS[v.tone]} {v.question} {escaped(v.answer)}", "", escaped(v.why), "", f"_{escaped(v.rule)}_", ""]


def _learn(e: Evidence, v: Verdict) -> list[str]:
    rows = [
        [metric_name(e, m.name), m.stratum or "all", with_ci(b), with_ci(m), count(m.n)]
        for m, b in content.eval_rows(e)
    ]
    lines = [*_heading(v), *table(["held-out", "samples", "before", "after", "n"], rows)]
    compared = [[metric_name(e, m.name), fmt(m), fmt_ci(m), count(m.n), m.caveat or ""] for m in shown(e, "compared")]
    lines += table(["compared", "value", "95 %", "n", "note"], compared)
    lines += table(["reference band", "held-out loss", "n", "note"], _noted(e, content.bands(e)))
    for c in e.curves:
        if c.name == "quick_eval.exact" and c.x:
            points = [f"step {x:,.0f} {100 * y:.1f} %" for x, y in zip(c.x, c.y, strict=True)]
            every = max(1, -(-len(points) // 12))  # a dozen tell the course; the last one is always told
            told = points[::-1][::every][::-1]
            lines += [f"Answers exactly right on the quick subset: {', '.join(told)}.", ""]
    return lines


def looking(e: Evidence) -> list[str]:
    """Tables of what other images, and none, change: losses, places of several images, answers, contrast pairs, and
    what it writes."""
    ablation = [[metric_name(e, m.name), fmt(m), fmt_ci(m), count(m.n)] for m in shown(e, "losses", "ablation")]
    lines = [*table(["image ablation", "value", "95 %", "n"], ablation), *_slots(e), *_answers(e), *_contrast(e)]
    conditions, scores = content.answer_table(e)
    rows = [
        [f"{r.name} {r.better}".strip(), *map(with_ci, r.values), "" if r.chance is None else fmt(r.chance)]
        for r in scores
    ]
    names = condition_names(e)
    lines += table(["what it writes", *(names[c] for c in conditions), "guessing"], rows)
    if (level := e.get("caption.exact_match.chance")) is not None:
        lines += [f"Always writing the most frequent reference would be exactly right {fmt(level)} of the time.", ""]
    return lines


def _look(e: Evidence, v: Verdict) -> list[str]:
    lines = [*_heading(v), *looking(e)]
    for title, words in content.word_tables(e):
        found = [[w.word, signed(w.delta), fmt_ci(w), count(w.n)] for w, _ in words]
        lines += table([f"words that {title}", "nats lost without it", "95 %", "n"], found)
    told = [c for c in content.album(e).cards if c.words]
    if told:
        lines += ["Word by word (nats lost without the image, where 0.5 or more):", ""]
        lines += [f"- {_marked(c.words)}" for c in told[:24]] + [""]
    return lines


def _slots(e: Evidence) -> list[str]:
    """Places of several images: how often right when what decides stands there, and what another image there costs."""
    rows = slots.grid(e.measurements, e.gates)
    if not rows:
        return []
    marks = {"blind": "❌ does not count: ", "weak": "❌ weak: ", "few": "too few to judge: ", "looks": ""}

    def cell(s: slots.Slot) -> str:
        right = "" if s.right is None else f"{with_ci(s.right)}, n = {count(s.right.n)}"
        cost = "" if s.cost is None else f"{signed(s.cost.value)} nats/token{interval(s.cost)}, n = {count(s.cost.n)}"
        return marks[s.standing] + "; ".join(filter(None, [right, cost]))

    most = max(map(len, rows))
    head = ["right, and what another image costs", *(f"image {k}" for k in range(1, most + 1))]
    lines = table(head, [[f"{len(r)} images", *map(cell, r), *[""] * (most - len(r))] for r in rows])
    told = [[metric_name(e, m.name), fmt(m), fmt_ci(m), count(m.n)] for m in slots.summary(e)]
    lines += table(["over all places", "value", "95 %", "n"], told)
    kinds, costs = slots.replacements(e)
    names = condition_names(e)
    head = ["nats/token more, and answers still right, with", *(names[c] for c in kinds), "n"]
    told = [
        [name, *("; ".join(with_ci(m) for m in cell if m is not None) for cell in own), count(n)]
        for name, n, own in costs
    ]
    return lines + table(head, told)


_BY_CONDITION: tuple[tuple[str, Section], ...] = (
    ("instruction following", "instructions"),
    ("yes/no questions (POPE)", "yes/no"),
)


def _answers(e: Evidence) -> list[str]:
    """Answers by kind of question, with and without the image, how well they follow, and those to yes/no questions."""
    names, (right_with, over) = condition_names(e), answers.conditions_of(e)
    marks = {"liar": "❌ right without looking", "blind": "❌ the image adds nothing", "few": "too few to judge"}
    marks |= {"looks": "✓ looks", "unknown": ""}
    overall = answers.all_answers(e)
    rows = [] if overall is None else [("all questions", "", overall)]
    rows += [(k.stratum, grouping_name(by), k) for by, kinds in answers.answer_kinds(e).items() for k in kinds]
    cells = [
        [
            label, by, marks[k.standing], *(with_ci(k.right.get(c)) for c in right_with),
            *(with_ci(k.gains.get(c)) for c in over), count(k.n),
        ]
        for label, by, k in rows
    ]  # fmt: skip
    head = ["answers right", "by", "", *(names[c] for c in right_with), *(f"gain over {names[c]}" for c in over), "n"]
    lines = table(head, cells)
    for title, section in _BY_CONDITION:
        if found := answers.by_condition(e, section):
            scored = [[names[c], *(with_ci(m) for _, m in values)] for c, values in found]
            lines += table([title, *(what for what, _ in found[0][1])], scored)
    return lines


def _contrast(e: Evidence) -> list[str]:
    """Contrast pairs, four cells, and what is right without the image."""
    names, pairs = condition_names(e), contrast.pair_rows(e)
    paired = list(pairs[0].right) if pairs else []
    rows = [
        [r.kind or "all questions", *(with_ci(r.right.get(c)) for c in paired), with_ci(r.prior), count(r.n)]
        for r in pairs
    ]
    lines = table(["contrast pairs both right", *(names[c] for c in paired), "guessing", "pairs"], rows)
    cells = contrast.cell_rows(e)
    rows = [
        [r.question, *(with_ci(m) for k in (0, 1) for m in (r.loss[k], r.accuracy[k]))]
        for r in cells
    ]  # fmt: skip
    lines += table(["own answer, asked …", "own image: loss", "predicted", "another image: loss", "predicted"], rows)
    told = [contrast.cells_told(e)] if cells else []
    told += contrast.blind_lines(e)
    return [*lines, *(f"- {escaped(text)}" for text in told), *([""] if told else [])]


def _marked(words: Sequence[content.MarkedWord]) -> str:
    def one(w: content.MarkedWord) -> str:
        return f"**{escaped(w.text)}** ({signed(w.delta)})" if abs(w.delta) >= 0.5 and w.text else escaped(w.text)

    return "".join(f"{' ' if w.space else ''}{one(w)}" for w in words)


def failing(e: Evidence) -> list[str]:
    """Findings, and tables of groups of samples, of what the run was watched with, of symptoms and of plain text."""
    lines = [f"> **{escaped(text)}**\n" for text in e.findings]
    standing = content.standings(e)
    for g in content.groupings(e):
        rows: list[list[str]] = []
        for group in g.groups:
            cells = [with_ci(group.told.get(c)) for c in g.columns]
            rows.append([group.stratum, standing[group.standing], *cells, count(group.n)])
        head = [f"by {grouping_name(g.by)}", "", *g.columns.values(), "n"]
        lines += table(head, rows)
    watched = [
        [f"{metric_name(e, m.name)}{f', {m.stratum}' if m.stratum else ''}", "" if b is None else fmt(b), with_ci(m),
         count(m.n), m.caveat or ""]
        for m, b in content.monitor_rows(e)
    ]  # fmt: skip
    lines += table(["watched at every evaluation", "before training", "now", "n", "note"], watched)
    lines += table(["symptom", "value", "n", "note"], _noted(e, shown(e, "symptoms")))
    return lines + table(["on plain text", "value", "n", "note"], _noted(e, shown(e, "kept")))


def _fail(e: Evidence, v: Verdict) -> list[str]:
    lines = [*_heading(v), *failing(e)]
    album = content.album(e)
    if not album.cards:
        return lines
    lines += ["### Samples it never trained on", "", *(f"- {escaped(text)}" for text in album.told), ""]
    names = condition_names(e)
    others = [c for c in names if c != "correct" and any(p.condition == c for k in album.cards for p in k.others)]
    sign = {"right": "✓ ", "wrong": "✗ ", "unknown": ""}
    asked = any(card.sample.question for card in album.cards)
    sample_rows: list[list[str]] = []
    for card in album.cards:
        own = [f"{sign[s.state]}{'' if s.prediction is None else s.prediction.text}" for s in card.shown]
        rest = [next((p.text for p in card.others if p.condition == c), "") for c in others]
        asked_here = [card.sample.question] if asked else []
        sample_rows.append([card.sample.id, *asked_here, card.sample.reference, *own, *rest])
    steps = [f"step {s}" for s in album.steps]
    head = ["id", *(["question"] if asked else []), "reference", *steps, *(names[c] for c in others)]
    return lines + table(head, sample_rows)


def judged(e: Evidence) -> list[str]:
    """Table of the gates, those that failed first."""
    state = {"failed": "❌ FAILED", "unknown": "❔ not judged", "passed": "✓ passed"}
    rows = [
        [
            state[r.state], r.gate.name, r.gate.why, f"{r.what}{f', {r.where}' if r.where else ''}",
            f"{r.number} {r.unit}{f' ({r.interval})' if r.interval else ''}", r.bound, r.gate.note,
        ]
        for r in gate_rows(e)
    ]  # fmt: skip
    return table(["", "gate", "protects", "measure", "number", "must be", "note"], rows)


def _promote(e: Evidence, v: Verdict) -> list[str]:
    lines = [*_heading(v), *judged(e)]
    for text in content.promotion(e):
        lines += [escaped(text), ""]
    tried = [
        [f"{'★ ' if r.state == 'best' else ''}{count(r.step)}", r.loss, r.delta, r.collapse, r.verdict]
        for r in content.candidate_rows(e)
    ]
    lines += table(["checkpoint of step", "held-out loss", "another image costs", "worst collapse", ""], tried)
    gaps = [f"- {escaped(g)}" for g in e.gaps] or ["None: everything asked for was measured."]
    return [*lines, "### Gaps", "", *gaps, ""]


def learned(e: Evidence) -> list[str]:
    """Table of the parts and of what learned in them, and whether the rest stayed what it was."""
    proof = {True: "bit-identical", False: "CHANGED", None: ""}
    rows = [[r.part, count(r.params), count(r.trainable), r.dtype, proof[r.intact]] for r in e.trainable]
    lines = table(["part", "parameters", "trained", "type", "frozen weights"], rows)
    if (t := e.text_only) is not None:
        word = "bit-equal before and after" if t.equal else f"NOT equal (largest difference {t.max_abs_difference})"
        off = ", with its adapters off" if e.adapters else ""
        lines += [f"On text alone{off}: {count(t.logits)} logits of {t.prompts} prompts are {word}.", ""]
    return lines


def data(e: Evidence) -> list[str]:
    """How many samples there were, of which sources, and tables of what was rejected and accepted."""
    d = e.data
    counted = f"{count(d.records)} records, {count(d.train)} for training, {count(d.eval)} held out."
    lines = [f"{counted} {escaped(d.eval_origin)}", ""]
    lines += [f"⚠️ {escaped(text)}", ""] if (text := content.data_warning(e)) else []
    lines += table(["rejected because", "records"], [[k, count(v)] for k, v in d.rejects.items()])
    return lines + table(["source", "samples"], [[k, count(v)] for k, v in d.sources.items()])


def _record(e: Evidence) -> list[str]:
    lines = ["## What was trainable", "", *learned(e)]
    if e.adapters:
        lines += ["## Where the adapters are", "", escaped(content.footprint_told(e)), ""]
        found = content.footprint(e.adapters)
        rows = [[f.name, count(f.count), f.shapes, f.rank, f.params, count(f.total)] for f in found]
        lines += table(["module", "layers", "in → out", "rank", "parameters each", "in all"], rows)
    lines += ["## Data", "", *data(e)]
    lines += ["## Provenance", "", *table(["", ""], [list(row) for row in flatten(e.provenance)])]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", e.config_yaml)), 3)
    return [*lines, "## Config", "", f"{fence}yaml", printable(e.config_yaml).rstrip(), fence, ""]


def _noted(e: Evidence, measured: Sequence[Measurement]) -> list[list[str]]:
    return [[metric_name(e, m.name), with_ci(m), count(m.n), m.caveat or ""] for m in measured]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table and an empty one; none without rows. Head and cells are other people's text."""
    if not rows:
        return []
    first, *body = ["| " + " | ".join(escaped(cell) for cell in row) + " |" for row in (head, *rows)]
    return [first, "|" + " --- |" * len(head), *body, ""]


def escaped(text: str) -> str:
    """Text as text: HTML and Markdown characters escaped, addresses no links, on one line."""
    one_line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_\[\]|#!~$]|:(?=//)|(?<=[wW]{3})\.)", r"\\\1", html.escape(one_line, quote=False))
