"""The five questions a report answers, each as a verdict with the rule that leads from the numbers to it.

Pure functions of the `Evidence`. A verdict is never kinder than its intervals, what was not measured is not answered,
nor kinder than the gates that the run declared about it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from beholder.config import usual_gate
from beholder.evidence import CONDITIONS, Evidence, GateResult, Measurement
from beholder.evidence.catalogue import CATALOGUE, unit_of
from beholder.evidence.gates import at_end, bounds
from beholder.report.answers import JUDGED_FROM as FEWEST
from beholder.report.answers import AnswerKind, all_answers, by_stratum, shown_without_looking
from beholder.report.contrast import pair_rows
from beholder.report.slots import marked
from beholder.report.words import (
    SPELLED_UNITS,
    bound,
    condition_names,
    count,
    duration,
    fmt,
    fmt_ci,
    interval,
    listed,
    metric_name,
    number,
    plural,
    signed,
    with_ci,
)
from beholder.types import Status

Tone = Literal["good", "weak", "bad", "unknown", "plain"]

JUDGED_FROM = usual_gate("looks_everywhere").min_n
"""Groups with fewer samples are shown but not judged: their intervals say little."""


GROUPED = {
    "ratio": "ablation.ratio.shuffled", "delta": "ablation.delta.shuffled", "loss": "eval.loss",
    "match": "caption.exact_match.correct", "answers": "qa.accuracy.correct",
}  # fmt: skip
"""What is told of a `Group`: loss with another sample's image over, and minus, the loss with the own one, …"""


@dataclass(frozen=True, slots=True)
class Clearly:
    """Where a ratio stops being a trifle, such as that of the loss with another sample's image over the own one's."""

    bound: str
    """``> 1.05``, as `GateResult.bound`."""
    end: Literal["value", "low", "high"]

    @classmethod
    def of(cls, e: Evidence, gate: str) -> Clearly:
        """What the run declared as its gate of that name about a ratio; else what runs declare by default."""
        usual = usual_gate(gate)
        declared = next((g for g in e.gates if g.name == gate and g.measure == usual.measure), usual)
        return cls(declared.bound, declared.end)

    def met(self, m: Measurement) -> bool:
        """False as well where there is no interval whose end could be judged."""
        judged, compare = at_end(m, self.end), {">": operator.gt, "≥": operator.ge, "≤": operator.le}
        return judged is not None and all(compare[sign](judged, edge) for sign, edge in bounds(self.bound))

    def __str__(self) -> str:
        return {"value": "", "low": "lower end ", "high": "upper end "}[self.end] + bound(self.bound, "ratio")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One of the answers at the top of the page."""

    key: str
    """Anchor of its section."""
    question: str
    tone: Tone
    answer: str
    why: str
    rule: str
    """How the answer follows from the numbers."""


@dataclass(frozen=True, slots=True)
class Group:
    """What was measured on one stratum, and whether its answers depend on the image."""

    by: str
    stratum: str
    told: Mapping[str, Measurement]
    """What there is of `GROUPED`, in its order."""
    clearly: Clearly

    @property
    def n(self) -> int:
        return next((self.told[c].n for c in ("delta", *self.told) if c in self.told), 0)

    @property
    def name(self) -> str:
        return self.stratum if self.by in ("length", "turn", "") else f"“{self.stratum}”"

    @property
    def standing(self) -> Literal["blind", "weak", "looks", "few", "unknown"]:
        """``blind``: no rise with another image was shown; ``weak``: a small one; ``few``: too few samples to say."""
        delta, ratio = self.told.get("delta"), self.told.get("ratio")
        if delta is None:
            return "unknown"
        if delta.n < JUDGED_FROM or delta.ci95 is None:
            return "few"
        if delta.ci95[0] <= 0:
            return "blind"
        return "weak" if ratio is not None and ratio.ci95 is not None and not self.clearly.met(ratio) else "looks"

    @property
    def reliance(self) -> Measurement | None:
        return self.told.get("ratio") or self.told.get("delta")

    @property
    def worst_first(self) -> tuple[int, float]:
        """Sort key: least image reliance first; without one the highest loss, then the fewest right answers."""
        if self.standing == "few":
            return 3, -self.n
        if self.reliance is not None:
            return 0, self.reliance.value if self.reliance.ci95 is None else self.reliance.ci95[0]
        if "loss" in self.told:
            return 1, -self.told["loss"].value
        shown = self.told.get("match") or self.told.get("answers")
        return 2, shown.value if shown is not None else 0.0


def verdicts(e: Evidence) -> list[Verdict]:
    """The five answers, in the order of the page."""
    return [learned(e), looks(e), fails(e), costs(e), promotes(e)]


def _by_its_gates(e: Evidence, verdict: Verdict, *about: str, measures: tuple[str, ...] = ()) -> Verdict:
    """The verdict, no longer good when a gate about it was declared and did not pass.

    ``about`` says how its name begins, ``measures`` how the name of its measurement does.
    """
    failed = [_gate_row(e, g) for g in e.failed_gates if g.name.startswith(about) or g.measure.startswith(measures)]
    if verdict.tone != "good" or not failed:
        return verdict
    answer = f"{verdict.answer.removesuffix('.')}, but not as declared."
    told = "; ".join(f"{row.gate.name} ({row.number}, must be {row.bound})" for row in failed)
    return replace(verdict, tone="weak", answer=answer, why=f"{verdict.why} Not passed: {told}.")


# ---------------------------------------------------------------------------------------------------------------
# Did it learn?


def learned(e: Evidence) -> Verdict:
    """Did the held-out loss fall, beyond the uncertainty of the measurements?"""
    fall = e.get("learn.delta")
    rule = (
        "Yes when the paired 95 % interval of the fall of the held-out loss lies above 0"
        if fall is not None
        else "Yes when the 95 % interval of the held-out loss after training lies wholly below the one before"
    ) + ", and no gate about learning failed."
    say = partial(Verdict, "learn", "Did it learn?", rule=rule)
    before, after = e.get_baseline("eval.loss"), e.get("eval.loss")
    if after is None:
        return say("unknown", "Not measured.", "There is no held-out loss in this run.")
    if before is None and fall is None:
        why = f"Held-out loss is {fmt(after)}, but it was not measured before training. Read the curve below."
        return say("unknown", "No baseline.", why)
    start = "" if before is None else f"{fmt(before, unit=False)} → "
    why = f"Held-out loss {start}{fmt(after)} on {plural(after.n, 'sample')} it never trained on."
    if fall is not None:
        why += f" Paired fall {with_ci(fall)}."
        shown, some = fall.ci95 is not None and fall.ci95[0] > 0, fall.value > 0
    else:
        assert before is not None
        shown = before.ci95 is not None and after.ci95 is not None and after.ci95[1] < before.ci95[0]
        some = after.value < before.value
    if not shown:
        doubt = " The interval reaches 0." if fall is not None else " The two intervals overlap."
        return say("weak", "Not shown.", why + doubt) if some else say("bad", "No.", why)
    over = e.get("learn.delta_text")
    if over is not None and not (over.ci95 is not None and over.ci95[0] > 0):
        why += " But it is not below what the language model alone reaches without any image."
        return say("weak", "Yes, but only the text.", why)
    even = e.get("band.uniform")
    if even is not None and after.value >= even.value:
        why += f" But guessing evenly over the vocabulary costs no more: {fmt(even)}."
        return say("weak", "Yes, but it still guesses.", why)
    return _by_its_gates(e, say("good", "Yes, it learned.", why), "learned", "better_than_text")


# ---------------------------------------------------------------------------------------------------------------
# Does it look?


def looks(e: Evidence) -> Verdict:
    """Does the loss rise when a wrong image is shown, beyond the uncertainty, by how much, and everywhere?"""
    clearly = Clearly.of(e, "looks_clearly")
    rule = (
        "Yes when another sample's image raises the loss (paired 95 % interval of the difference above 0), the ratio "
        f"is clear ({clearly}), every other wrong image raises it too, so it is in every group of at least "
        f"{JUDGED_FROM} samples (ratio: {Clearly.of(e, 'looks_everywhere')}), and no gate about looking failed; barely "
        "when only the first holds."
    )
    answers = all_answers(e)
    if answers is not None:
        rule += (
            " Its answers must be right more often with the image than without it and than with another sample's "
            f"(paired 95 % interval of the gain above 0), overall and for every kind of question of at least {FEWEST} "
            "samples."
        )
    names = condition_names(e)
    say = partial(Verdict, "look", "Does it look at the image?", rule=rule)
    delta, ratio = e.get("ablation.delta.shuffled"), e.get("ablation.ratio.shuffled")
    if delta is None:
        return say("unknown", "Not measured.", "The loss with other images was not measured.")
    times = "" if ratio is None else f" ({fmt(ratio)} the loss{'' if ratio.ci95 is None else ', ' + fmt_ci(ratio)})"
    why = f"Shown another sample's image, its loss changes by {signed(delta.value)} nats/token{times}."
    others = [(c, m) for c in CONDITIONS[2:] if (m := e.get(f"ablation.delta.{c}")) is not None]
    if others:
        why += f" {'; '.join(f'{names[c]} {signed(m.value)}' for c, m in others).capitalize()}."
    blind, level = e.get("caption.exact_match.zero"), e.get("caption.exact_match.chance")
    own = e.get("caption.exact_match.correct")
    if answers is not None:
        why += f" Its answers: {_compared(answers)}."
        why += f" {pairs[0].told}.".replace("  ", " ") if (pairs := pair_rows(e)) else ""
    elif own is not None and blind is not None and level is not None:
        why += f" Captions exactly right: {fmt(own)}; with no image {fmt(blind)}, where guessing gives {fmt(level)}."
    if delta.ci95 is None or delta.ci95[0] <= 0:
        return say("bad", "No, it does not look.", why + " A low loss is not sight.")
    if answers is not None and answers.standing in ("liar", "blind"):
        why += " They are no more often right for seeing the image: being right is not sight either."
        return say("bad", "No: its answers do not need the image.", why)
    if ratio is not None and (ratio.ci95 is None or not clearly.met(ratio)):
        return say("weak", "Barely.", why)
    idle = [names[c] for c, m in others if m.ci95 is None or m.ci95[0] <= 0]
    if idle:
        return say("weak", "Not against everything.", f"{why} Its loss was not shown to rise with: {listed(idle)}.")
    where = [g for g in all_groups(e) if g.standing in ("blind", "weak")]
    guessed = shown_without_looking(e)
    if where or guessed:
        why += f" Not, or barely, for: {_told(where)}." if where else ""
        why += f" {_guessed(guessed)}" if guessed else ""
        return say("weak", "On average, not everywhere.", why)
    if places := marked(e.measurements, e.gates):
        why += f" Weak places: {listed([s.told for s in places], 3)}."
        return say("weak", "Yes, but not in every place.", why)
    if answers is not None and answers.standing in ("few", "unknown"):
        return say("weak", "Its loss does; its answers are too few.", f"{why} A gain from the image was not shown.")
    return _by_its_gates(e, say("good", "Yes, it looks.", why), "looks_", "describes", measures=LOOKING)


LOOKING = (
    "answer.gain.",
    *sorted({
        row.pattern.partition(".")[0] + "." for row in CATALOGUE if row.section in ("slots", "pairs", "cells", "blind")
    }),
)  # fmt: skip
"""How the names of measurements begin that gates about looking judge, beside the loss."""


def _compared(answers: AnswerKind) -> str:
    """``97.1 % right; 41.0 % with no image, +56.1 points over it (+52.0 … +60.1)``."""
    own, blind, gain = answers.right.get("correct"), answers.right.get("none"), answers.gains.get("none")
    parts = own and f"{fmt(own)} right", blind and f"with no image {fmt(blind)}"
    return "; ".join(filter(None, [*parts, gain and f"{fmt(gain)} gained{interval(gain)}"]))


def _guessed(kinds: list[AnswerKind]) -> str:
    """A sentence that names the kinds of question answered no better with the image than without."""
    liars = listed([k.told for k in kinds if k.standing == "liar"], 3)
    rest = listed([k.told for k in kinds if k.standing != "liar"], 3)
    told = liars and f"Right without looking: {liars}.", rest and f"Answered no better with the image: {rest}."
    return " ".join(filter(None, told))


# ---------------------------------------------------------------------------------------------------------------
# Where does it fail?


def groups(e: Evidence) -> dict[str, list[Group]]:
    """Strata by grouping, those that look least first; a grouping of one stratum says nothing and is left out."""
    clearly = Clearly.of(e, "looks_everywhere")
    out: dict[str, list[Group]] = {}
    for (by, stratum), values in by_stratum(e, GROUPED.values()).items():
        if stratum:
            told = {column: values[name] for column, name in GROUPED.items() if name in values}
            out.setdefault(by, []).append(Group(by, stratum, told, clearly))
    return {by: sorted(members, key=lambda g: g.worst_first) for by, members in out.items() if len(members) > 1}


def all_groups(e: Evidence) -> Iterator[Group]:
    """Every stratum of every grouping."""
    for members in groups(e).values():
        yield from members


def fails(e: Evidence) -> Verdict:
    """Which groups are answered without looking, and what the audit and the collapse check found."""
    rule = (
        "Bad when the audit or the collapse check found something, or another sample's image is not shown to raise the "
        f"loss of a group of at least {JUDGED_FROM} samples (interval reaches 0). Weak when what it writes is not "
        "shown to be right more often than guessing (its interval reaches that). Good only while no gate about it "
        "failed. Nothing found is not a proof."
    )
    answers, ratio = all_answers(e), e.get("retention.loss_ratio")
    if answers is not None:
        rule += (
            f" Bad as well when a kind of question (of {FEWEST} samples or more) is answered no better with the image."
        )
    kept = Clearly.of(e, "retained")
    if ratio is not None:
        rule += f" Weak when the loss on plain text, adapters on over off, is not {kept}."
    guesses = [own for m in e.measurements if m.name.endswith(".chance") and (own := _no_better_than(e, m)) is not None]
    say = partial(Verdict, "fail", "Where does it fail?", rule=rule)
    members = list(all_groups(e))
    blind = [g for g in members if g.standing == "blind"]
    weak = [g for g in members if g.standing == "weak"]
    guessed = shown_without_looking(e)
    why = [_guessed(guessed)] if guessed else []
    why += [f"Answered without looking: {_told(blind)}."] if blind else []
    why += [f"Barely looked at: {_told(weak)}."] if weak else []
    if e.findings:
        why.insert(0, f"{_short(e.findings[0])}{f' And {len(e.findings) - 1} more.' if len(e.findings) > 1 else ''}")
    forgot = [] if ratio is None or kept.met(ratio) else ["language forgotten"]
    if ratio is not None and forgot:
        why.append(f"It forgets language: on plain text its loss is {fmt(ratio)} that of the base.")
    no_better = ["no better than guessing"] if guesses else []
    if guesses:
        why.append(f"Not shown to be right more often than guessing: {'; '.join(guesses)}.")
    if e.findings or blind or guessed:
        parts = [plural(len(e.findings), "finding")] if e.findings else []
        parts += [plural(len(guessed), "kind") + " of question answered without looking"] if guessed else []
        parts += [plural(len(blind), "group") + " not looked at"] if blind else []
        return say("bad", ", ".join([*parts, *forgot, *no_better]).capitalize() + ".", " ".join(why))
    judged = [g for g in members if g.standing in ("weak", "looks")]
    if judged:
        weakest = min(judged, key=lambda g: g.worst_first)
        why.append(f"The group that needs the image least: {_told([weakest])}.")
    if (worst := e.get("collapse.worst")) is not None:
        why.append(f"Worst collapse symptom: {fmt(worst)} of the outputs.")
    if len(pairs := pair_rows(e)) > 1:
        why.append(f"Least for “{pairs[1].kind}”: {pairs[1].told}.")
    own = None if answers is None else answers.right.get("correct")
    if own is not None:
        why.append(f"Answers not right: {number(1 - own.value, 'share')}.")
    elif (match := e.get("caption.exact_match.correct")) is not None:
        why.append(f"Captions not exactly right: {number(1 - match.value, 'share')}.")
    if weak or forgot or guesses:
        parts = [plural(len(weak), "weak group")] if weak else []
        return say("weak", ", ".join([*parts, *forgot, *no_better]).capitalize() + ".", " ".join(why))
    if not judged and worst is None:
        why.insert(0, "Neither groups of samples nor collapse were measured.")
        return say("unknown", "Not measured.", " ".join(why))
    found = say("good", "Nothing stands out.", " ".join(why))
    about = ("answer.accuracy.", "answer.exact.", "pope.", "retention.", "merge.")
    return _by_its_gates(e, found, "looks_everywhere", "no_collapse", "no_leak", measures=about)


def _no_better_than(e: Evidence, chance: Measurement) -> str | None:
    """Both numbers, where the one with the own image is not shown to be above what guessing gives; else None.

    Where every reference is another, guessing one is right once, which says nothing.
    """
    own = e.get(chance.name.removesuffix("chance") + "correct")
    if chance.stratum is not None or own is None or own.ci95 is None or own.n < JUDGED_FROM:
        return None
    if own.ci95[0] > chance.value or chance.value * chance.n < 1.5:
        return None
    return f"{metric_name(e, own.name)} {with_ci(own)}, where guessing gives {fmt(chance)}"


def _told(members: list[Group]) -> str:
    return listed([f"{g.name} ({fmt(g.reliance) if g.reliance else ''}, n {count(g.n)})" for g in members], 3)


# ---------------------------------------------------------------------------------------------------------------
# What did it cost?


def costs(e: Evidence) -> Verdict:
    """Time, speed and memory; a fact, so without a judgement except for a training that waited for its data."""
    c, rule = e.cost, "Wall-clock time of the whole run, everything included. Waiting for data is a fault from 10 % on."
    waited = c.data_wait_share or 0.0
    why = [plural(c.steps, "optimizer step")]
    why += [] if c.samples is None else [f"{count(c.samples)} samples"]
    why += [] if c.samples_per_s is None else [f"{c.samples_per_s:.3g} samples/s"]
    why += [] if c.peak_memory_mb is None else [f"{c.peak_memory_mb:,.0f} MB at most"]
    why += [f"on {c.device}"] if c.device else []
    told = ", ".join(why) + "."
    told += f" Training waited for its data {number(waited, 'share')} of the time." if waited >= 0.1 else ""
    answer = "Not measured." if c.wall_s is None else f"{duration(c.wall_s)}."
    tone: Tone = "unknown" if c.wall_s is None else "weak" if waited >= 0.1 else "plain"
    return Verdict("cost", "What did it cost?", tone, answer, told, rule)


# ---------------------------------------------------------------------------------------------------------------
# Can I promote it?


@dataclass(frozen=True, slots=True)
class GateRow:
    """A gate as the page shows it."""

    gate: GateResult
    state: Literal["failed", "unknown", "passed"]
    """``unknown``: there was nothing to judge, which does not pass either."""
    what: str
    """The measurement in words."""
    number: str
    """What was judged; ``not measured`` or ``nothing to measure`` when there is none."""
    unit: str
    """Its unit where that is a word."""
    interval: str
    """The interval whose end was judged, in words."""
    bound: str
    where: str
    """The group that was worst, when it was worse than all samples together."""


def gate_rows(e: Evidence) -> list[GateRow]:
    """Every gate, failed ones first, then those that could not be judged."""
    order = {"failed": 0, "unknown": 1, "passed": 2}
    return sorted((_gate_row(e, g) for g in e.gates), key=lambda row: order[row.state])


def _gate_row(e: Evidence, g: GateResult) -> GateRow:
    m = e.get(g.measure, g.stratum)
    read_in = unit_of(g.measure, g.unit or ("" if m is None else m.unit))
    state: Literal["failed", "unknown", "passed"] = "passed" if g.passed else "unknown" if g.value is None else "failed"
    if g.value is None:
        shown = (g.note if g.passed else "not measured") if m is None else f"{fmt(m)}, no interval"
    else:
        shown = number(g.value, read_in)
    unit = read_in if g.value is not None and read_in in SPELLED_UNITS else ""
    interval = "" if m is None else fmt_ci(m)
    if interval and g.end != "value":
        interval = f"{'lower' if g.end == 'low' else 'upper'} end of {interval}"
    what = metric_name(e, g.measure)
    return GateRow(g, state, what, shown, unit, interval, bound(g.bound, read_in), g.stratum or "")


def promotes(e: Evidence) -> Verdict:
    """May a later stage build on this run?"""
    rule = "Yes when the run succeeded and every gate passed. A gate whose measurement is missing has not passed."
    say = partial(Verdict, "promote", "Can I promote it?", rule=rule)
    rows = gate_rows(e)
    failed = [r.gate.name for r in rows if r.state == "failed"]
    unknown = [r.gate.name for r in rows if r.state == "unknown"]
    total = plural(len(rows), "gate")
    counted = [f"{len(failed)} of {total} failed"] if failed else []
    counted += [f"{len(unknown)}{'' if failed else f' of {total}'} could not be judged"] if unknown else []
    why = " ".join(
        ([f"Failed: {listed(failed, 6)}."] if failed else [])
        + ([f"Not judged: {listed(unknown, 6)}."] if unknown else [])
    )
    if e.status != Status.SUCCEEDED:
        told = f"The run ended as “{e.status.value.replace('_', ' ')}”."
        return say("bad", "No: it did not succeed.", " ".join(filter(None, (told, why))))
    if not rows:
        return say("unknown", "Not judged.", "No gate was declared when this run was measured.")
    if counted:
        return say("bad", f"No: {' and '.join(counted)}.", why)
    best = next((c for c in e.candidates if c.best), None)
    start = "A later stage may start from it."
    if best is not None:
        among = f"the best of {len(e.candidates)} checkpoints" if len(e.candidates) > 1 else "its best checkpoint"
        start = f"A later stage starts from step {count(best.step)}, {among}."
    return say("good", f"Yes: {'the gate' if len(rows) == 1 else f'all {total}'} passed.", start)


def _short(text: str, limit: int = 180) -> str:
    return text if len(text) <= limit else text[: limit - 1].rsplit(" ", 1)[0] + " …"
