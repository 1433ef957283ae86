"""What the report says of the evidence: the failing verdicts, gates, groups, words, steps, intervals."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.report.conftest import gate, group, measurement, text_of

from beholder.evidence import Cost, Curve, DataFacts, Evidence, Measurement, Prediction, WordReliance, WordStat
from beholder.evidence.catalogue import called
from beholder.evidence.gates import verdict as told_in_a_line
from beholder.report import content, plots, render_html, render_markdown
from beholder.report.content import (
    MAX_STEPS,
    MAX_WORD_ROWS,
    album,
    answer_table,
    groupings,
    marked,
    phase_bars,
    word_tables,
)
from beholder.report.content import warnings as told_warnings
from beholder.report.verdicts import fails, gate_rows, groups, learned, looks, promotes, verdicts
from beholder.report.words import RELIANCE_LEVELS, bound, reliance_level
from beholder.types import Status

MakeEvidence = Callable[..., Evidence]

FAILED = gate("looks_everywhere", 0.977, "> 1.02", passed=False, measure="ablation.ratio.shuffled", unit="ratio")
MISSING = gate("better_than_text", None, passed=False, measure="learn.delta_text_2", unit="")


def without(e: Evidence, *prefixes: str) -> list[Measurement]:
    return [m for m in e.measurements if not m.name.startswith(prefixes)]


def without_drawings(e: Evidence) -> Evidence:
    """For tests about the text alone: drawing is what takes time."""
    return e.model_copy(update={"curves": [], "histograms": []})


def read(e: Evidence) -> str:
    """The words a reader of the page sees, separated by single spaces."""
    return text_of(render_html(without_drawings(e)))


# ---------------------------------------------------------------------------------------------------------------
# Can I promote it?


@pytest.mark.parametrize("status", list(Status))
@pytest.mark.parametrize("gates", [[], [gate("a", 1.0)], [gate("a", 1.0), FAILED], [MISSING], [FAILED, MISSING]])
def test_the_verdict_on_promotion_is_yes_exactly_when_the_evidence_is_promotable(
    make_evidence: MakeEvidence, status: Status, gates: list[Any]
):
    e = make_evidence(status=status, gates=gates)

    verdict = promotes(e)

    assert (verdict.tone == "good") == verdict.answer.startswith("Yes") == e.promotable
    assert verdict.tone == "unknown" if status == Status.SUCCEEDED and not gates else verdict.tone in ("good", "bad")


def test_failed_gates_stand_on_the_first_screen_before_the_passed_ones_with_number_bound_and_reason(
    make_evidence: MakeEvidence,
):
    worst = FAILED.model_copy(update={"stratum": "what shape", "note": "worst of 4 groups and all together"})
    e = make_evidence(gates=[gate("passed_one", 0.03, "≤ 0.5", unit="share"), MISSING, worst])

    text = read(e)
    first_screen = text[: text.index("What it says about images")]

    for part in (
        "No: 1 of 3 gates failed and 1 could not be judged.", "looks_everywhere · worst: what shape",
        "0.977× must be > 1.02×", "why looks_everywhere", "lower end of 34.0–46.0×", "not measured must be > 0",
        "3.0 % ≤ 50 %",
    ):  # fmt: skip
        assert part in first_screen, part
    names = ["looks_everywhere", "better_than_text", "passed_one"]
    assert sorted(names, key=first_screen.index) == names
    assert [row.gate.name for row in gate_rows(e)] == names
    assert "worst of 4 groups" in text and "FAILED" in text
    markdown = render_markdown(e).replace("\\", "").replace("\u00a0", " ")
    assert told_in_a_line(e).startswith("1 of 3 gates failed and 1 could not be judged: ")
    assert "Gates: ❌ looks_everywhere for what shape 0.977×, must be > 1.02×" in markdown.replace("&gt;", ">")
    assert "✓ passed_one 3.0 %, must be ≤ 50 %" in markdown


@pytest.mark.parametrize("gates", [[], [gate("a", 1.0)], [FAILED]])
def test_the_exit_code_and_the_way_to_promote_anyway_are_explained(make_evidence: MakeEvidence, gates: list[Any]):
    e = make_evidence(gates=gates)
    for text in (read(e), render_markdown(e)):
        assert "promote-anyway" in text
        assert not gates or "exit code" in text


def test_a_run_that_builds_on_an_unpromotable_one_says_so_on_top(make_evidence: MakeEvidence):
    note = "Started from outputs/a with --promote-anyway: 1 of 13 gates failed."
    e = make_evidence(gaps=[note, "CLIPScore: not measured."])

    assert told_warnings(e) == [note]


# ---------------------------------------------------------------------------------------------------------------
# Did it learn? Does it look?


@pytest.mark.parametrize(
    ("fall", "over_text", "tone"),
    [
        ((4.6, (4.5, 4.7)), (3.0, (2.9, 3.1)), "good"),
        ((4.6, (4.5, 4.7)), None, "good"),
        ((4.6, (4.5, 4.7)), (0.01, (-0.02, 0.04)), "weak"),  # the language model alone does as well
        ((0.2, (-0.1, 0.5)), None, "weak"),
        ((0.2, None), None, "weak"),
        ((-0.2, (-0.5, 0.1)), None, "bad"),
    ],
)
def test_learning_is_judged_by_the_paired_fall_and_against_the_language_model_alone(
    make_evidence: MakeEvidence, fall: Any, over_text: Any, tone: str
):
    e = make_evidence()
    found = [*without(e, "learn."), measurement("learn.delta", fall[0], "nats/token", ci95=fall[1])]
    found += [measurement("learn.delta_text", over_text[0], "nats/token", ci95=over_text[1])] if over_text else []

    assert learned(make_evidence(measurements=found)).tone == tone


def test_a_loss_that_guessing_evenly_also_reaches_is_not_called_learned(make_evidence: MakeEvidence) -> None:
    e = make_evidence()
    loss = next(m.value for m in e.measurements if m.name == "eval.loss" and m.by is None)
    above, below = (measurement("band.uniform", loss + more, "nats/token") for more in (0.1, -0.1))
    kept = without(e, "band.uniform")

    assert learned(make_evidence(measurements=[*kept, above])).answer == "Yes, it learned."
    told = learned(make_evidence(measurements=[*kept, below]))
    assert (told.tone, told.answer) == ("weak", "Yes, but it still guesses.")


CLEAR = gate("looks_clearly", 1.1, measure="ablation.ratio.shuffled", unit="ratio")
EVERYWHERE = CLEAR.model_copy(update={"name": "looks_everywhere"})


@pytest.mark.parametrize(
    ("bound", "tone"), [(None, "good"), ("> 1.05", "good"), ("> 1.2", "weak"), ("≥ 1.5 and ≤ 3", "weak")]
)
def test_how_clearly_it_must_look_is_what_the_run_declared(make_evidence: MakeEvidence, bound: str | None, tone: str):
    found = [
        measurement("ablation.delta.shuffled", 0.5, "nats/token", 0.1),
        measurement("ablation.ratio.shuffled", 1.2, "ratio", 0.1),
    ]
    gates = [] if bound is None else [CLEAR.model_copy(update={"bound": bound})]

    verdict = looks(make_evidence(measurements=found, gates=gates))

    assert verdict.tone == tone
    assert f"lower end {(bound or '> 1.05').split(' and')[0]}×" in verdict.rule


@pytest.mark.parametrize(("bound", "standing"), [(None, "looks"), ("> 1.02", "looks"), ("> 1.05", "weak")])
def test_how_clearly_a_group_must_look_is_what_the_run_declared(
    make_evidence: MakeEvidence, bound: str | None, standing: str
):
    found = [*group("turn", "first turn", 1.08, 0.05), *group("turn", "later turns", 3.0, 0.1)]
    gates = [] if bound is None else [EVERYWHERE.model_copy(update={"bound": bound})]

    assert groups(make_evidence(measurements=found, gates=gates))["turn"][0].standing == standing


@pytest.mark.parametrize(
    ("name", "worse"),
    [
        ("learned", "learn"), ("better_than_text", "learn"), ("looks_zero", "look"), ("looks_clearly", "look"),
        ("describes", "look"), ("no_collapse", "fail"), ("frozen", ""),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [-0.1, None])
def test_no_answer_is_kinder_than_a_failed_gate_about_it(
    make_evidence: MakeEvidence, name: str, worse: str, value: float | None
):
    e = make_evidence(gates=[gate(name, value, passed=False)])

    found = {v.key: v for v in verdicts(e) if v.key in ("learn", "look", "fail")}

    assert {key for key, v in found.items() if v.tone != "good"} == ({worse} - {""})
    if worse:
        assert found[worse].tone == "weak" and found[worse].answer.endswith(", but not as declared.")
        assert f"Not passed: {name} (" in found[worse].why
    assert all(v.tone == "good" for v in verdicts(make_evidence(gates=[gate(name, 1.0)])) if v.key in found)


@pytest.mark.parametrize(
    ("right", "level", "told"),
    [(0.006, 0.017, True), (0.1, 0.08, True), (0.9, 0.017, False), (0.0, 1 / 400, False)],
)
def test_what_is_not_better_than_guessing_is_told_where_it_fails(
    make_evidence: MakeEvidence, right: float, level: float, told: bool
):
    """Of 400 captions; where every reference is another (1 in 400), an exact match has no level to be judged by."""
    e = make_evidence()
    rest = [m for m in e.measurements if not m.name.startswith("caption.exact_match.")]
    own = measurement("caption.exact_match.correct", right, half=0.03, better="higher")
    guess = measurement("caption.exact_match.chance", level)

    verdict = fails(e.model_copy(update={"measurements": [*rest, own, guess]}))

    assert (verdict.tone, verdict.answer) == (
        ("weak", "No better than guessing.") if told else ("good", "Nothing stands out.")
    )
    percent = f"{100 * level:.1f}"
    assert (f"exact match {100 * right:.1f}" in verdict.why and f"guessing gives {percent}" in verdict.why) == told


def test_made_up_questions_answered_no_better_than_by_guessing_are_told_too(make_evidence: MakeEvidence):
    e = make_evidence()
    rest = [m for m in e.measurements if m.name != "qa.accuracy.correct"]
    poor = measurement("qa.accuracy.correct", 0.25, half=0.05, better="higher", n=200)

    verdict = fails(e.model_copy(update={"measurements": [*rest, poor]}))

    assert verdict.tone == "weak" and "answers right 25.0" in verdict.why and "guessing gives 24.0" in verdict.why


def test_a_gain_over_another_image_is_a_row_of_the_table_of_what_was_written(make_evidence: MakeEvidence):
    e = make_evidence()
    gain = measurement("caption.gain.shuffled", 6.5, "score 0-10", 0.4, better="higher")
    e = e.model_copy(update={"measurements": [*e.measurements, gain]})

    conditions, rows = content.answer_table(e)

    (row,) = [r for r in rows if r.name == "CIDEr-D gain over"]
    assert row.values[conditions.index("shuffled")] == gain and row.values[conditions.index("correct")] is None
    assert "CIDEr-D gain over" in render_html(e) and "CIDEr-D gain over" in render_markdown(e)


def test_an_average_does_not_hide_a_group_answered_without_looking(make_evidence: MakeEvidence):
    e = make_evidence()
    blind = [*e.measurements, *group("answer", "yes/no", 0.998, 0.02, n=812), *group("answer", "other", 40.0, 5.0)]
    verdict = looks(make_evidence(measurements=blind))

    assert looks(e).tone == "good"
    assert (verdict.tone, verdict.answer) == ("weak", "On average, not everywhere.")
    assert "yes/no" in verdict.why and "n 812" in verdict.why


def test_a_wrong_image_that_changes_nothing_is_named(make_evidence: MakeEvidence):
    e = make_evidence()
    found = [*without(e, "ablation.delta.noise"), measurement("ablation.delta.noise", 0.01, "nats/token", 0.05)]

    verdict = looks(make_evidence(measurements=found))

    assert verdict.tone == "weak"
    assert verdict.why.endswith("not shown to rise with: noise.")


def test_scores_are_shown_for_the_conditions_they_were_measured_under(make_evidence: MakeEvidence):
    e = make_evidence()

    conditions, rows = answer_table(e)

    assert conditions == ["correct", "shuffled", "zero"]  # noise was only in the ablation
    by_name = {row.name: row for row in rows}
    chair = by_name["captions naming an absent object (CHAIR-s)"]
    assert (chair.better, [m and m.value for m in chair.values]) == ("↓", [0.02, None, 0.7])
    answers = by_name["answers right"]
    assert answers.chance is not None and answers.chance.value == 0.24
    assert "guessing 24.0 %" in read(e)


def test_the_bands_are_named_in_the_plot_and_never_written_over_each_other():
    curve = Curve(name="train.loss", unit="nats/token", x=[1, 2, 3], y=[4.4, 1.0, 0.5])
    bands = [("untrained connector", 4.40), ("language model, no image", 4.41), ("uniform guessing", 10.8)]

    svg = str(plots.curves([("training", curve)], title="t", bands=bands).svg)

    assert svg.count("stroke-dasharray") >= 3
    found = re.findall(r'<text [^>]* y="([\d.]+)"[^>]*>([a-z ,]+) ([\d.]+)</text>', svg)
    places = {name: float(y) for y, name, _ in found}
    assert {(name, level) for _, name, level in found} == {
        ("untrained connector", "4.40"), ("language model, no image", "4.41"), ("uniform guessing", "10.8")
    }  # fmt: skip
    assert places["untrained connector"] > places["language model, no image"] > places["uniform guessing"]  # y is down
    assert all(abs(a - b) >= 11 for a, b in itertools.combinations(places.values(), 2))  # the font is 11 high


# ---------------------------------------------------------------------------------------------------------------
# Words


@pytest.mark.parametrize(
    ("delta", "level"),
    [(-2.0, -1), (-0.1, 0), (0.0, 0), (0.0999, 0), (0.1, 1), (0.5, 2), (1.49, 2), (1.5, 3), (3.0, 4), (99.0, 4)],
)
def test_a_word_is_marked_by_what_it_loses_without_the_image(delta: float, level: int):
    assert reliance_level(delta) == level
    assert level in dict(RELIANCE_LEVELS)


def test_marked_words_join_to_the_reference_and_are_told_apart_without_colour(make_evidence: MakeEvidence):
    e = make_evidence()
    sample = e.samples[0]
    html = render_html(without_drawings(e))

    words = marked(sample.words)

    assert "".join(w.space + w.text for w in words) == sample.reference
    assert [w.level for w in words] == [0, 4, 2, -1]
    assert 'title="+4.20 nats without the image (0.02 with it, 4.22 without)">red</span>' in html
    widths = [float(w) for w in re.findall(r"\.w[1-4] \{[^}]*border-bottom-width: ([\d.]+)px", html)]
    assert widths == sorted(set(widths)) and len(widths) == 4  # the underline alone orders them
    assert re.search(r"\.w-1 \{[^}]*dotted", html)
    assert "**red** (+4.20)" in render_markdown(e)
    for _, label in RELIANCE_LEVELS:
        assert label in text_of(html)


@given(st.lists(st.floats(-5, 5), max_size=60))
def test_the_tables_of_words_are_ordered_and_hold_no_word_twice(deltas: list[float]):
    words = [WordStat(word=f"w{k}", n=5, delta=d) for k, d in enumerate(deltas)]
    e = Evidence(
        run_name="r", stage="align", status=Status.SUCCEEDED, created="", trainable=[], measurements=[],
        data=DataFacts(records=1, train=1, eval=1), cost=Cost(steps=1), config_yaml="", words=words,
    )  # fmt: skip

    sides = [[w for w, _ in rows] for _, rows in word_tables(e)]

    shown = [w.word for side in sides for w in side]
    assert len(shown) == len(set(shown)) == min(len(words), 2 * MAX_WORD_ROWS)
    for side, sign in zip(sides, (-1, 1), strict=False):
        assert [w.delta for w in side] == sorted((w.delta for w in side), key=lambda d: sign * d)
    if len(sides) == 2:
        assert min(w.delta for w in sides[0]) >= max(w.delta for w in sides[1])


# ---------------------------------------------------------------------------------------------------------------
# Where does it fail?


def test_groups_come_worst_first_and_small_ones_are_not_judged(make_evidence: MakeEvidence):
    found = [
        *group("question", "fine", 40.0, 6.0), *group("question", "weak", 1.05, 0.04),
        *group("question", "blind", 1.0, 0.02), *group("question", "tiny", 0.9, 0.4, n=7),
        *group("turn", "the only one", 2.0, 0.1),
    ]  # fmt: skip
    e = make_evidence(measurements=found)

    assert [(g.stratum, g.standing) for g in groups(e)["question"]] == [
        ("blind", "blind"), ("weak", "weak"), ("fine", "looks"), ("tiny", "few"),
    ]  # fmt: skip
    assert "turn" not in groups(e)  # one group is not a comparison
    [shown] = groupings(e)
    assert shown.lanes is not None
    assert [lane.label for lane in shown.lanes.rows] == ["blind", "weak", "fine", "tiny"]
    verdict = fails(e)
    assert (verdict.tone, verdict.answer) == ("bad", "1 group not looked at.")
    assert "“blind”" in verdict.why and "tiny" not in verdict.why


def test_groups_without_an_ablation_are_ordered_by_what_there_is(make_evidence: MakeEvidence):
    found = [
        measurement("qa.accuracy.correct", v, by="question", stratum=s) for s, v in (("shape", 0.9), ("colour", 0.1))
    ]
    e = make_evidence(measurements=found)

    assert [g.stratum for g in groups(e)["question"]] == ["colour", "shape"]
    assert groupings(e)[0].lanes is None
    assert read(e).index("colour ") < read(e).index("shape ")


def test_kinds_of_made_up_questions_are_a_table_of_their_own(make_evidence: MakeEvidence):
    e = make_evidence()
    kinds = [measurement("qa.accuracy.correct", v, by="kind", stratum=s) for s, v in (("colour", 0.9), ("shape", 0.4))]
    e = make_evidence(measurements=[*e.measurements, *kinds])

    text, markdown = read(e), render_markdown(e)

    assert {g.by: [x.stratum for x in g.groups] for g in groupings(e)}["kind"] == ["shape", "colour"]
    assert [g.stratum for g in groups(e)["question"]] == ["what shape", "what colour"]
    assert "By kind of made-up question: the group that does worst comes first" in text
    assert "By question: the group that looks least comes first" in text
    assert "| by kind of made-up question |" in markdown and "| by question |" in markdown
    assert looks(e).tone == fails(e).tone == "good", "answers alone do not say whether it looked"


def test_findings_are_counted_on_the_first_screen_and_told_whole(make_evidence: MakeEvidence):
    findings = [
        "Leakage: later turns can be answered from earlier turns' text (0.84 nats/token). " + "x " * 200,
        "Two.",
    ]
    e = make_evidence(findings=findings)

    text = read(e)

    assert fails(e).tone == "bad" and fails(e).answer == "2 findings."
    assert "2 findings of the leakage audit" in text[: text.index("Did it learn?")]
    section = text.rindex("Where does it fail? 2 findings.")
    for finding in findings:
        assert " ".join(finding.split()) in text[section:]
        assert " ".join(finding.split()) in render_markdown(e).replace("\\", "")


def test_nothing_measured_is_not_nothing_found(make_evidence: MakeEvidence):
    assert fails(make_evidence()).tone == "good"
    assert fails(make_evidence(measurements=[])).tone == "unknown"


# ---------------------------------------------------------------------------------------------------------------
# Flipping through the steps


class Tree(HTMLParser):
    """Every element as (tag, attributes, parent)."""

    VOID = ("input", "img", "meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.nodes: list[tuple[str, dict[str, str | None], int]] = []
        self.open = [-1]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.nodes.append((tag, dict(attrs), self.open[-1]))
        if tag not in self.VOID:
            self.open.append(len(self.nodes) - 1)

    def handle_endtag(self, tag: str) -> None:
        while self.nodes[self.open[-1]][0] != tag:
            self.open.pop()
        self.open.pop()

    def classes(self, index: int) -> list[str]:
        return (self.nodes[index][1].get("class") or "").split()


def test_a_person_can_flip_through_the_steps_without_a_script(make_evidence: MakeEvidence):
    e = make_evidence()
    html = render_html(without_drawings(e))
    tree = Tree(html)
    radios = [k for k, (tag, attrs, _) in enumerate(tree.nodes) if tag == "input" and attrs["type"] == "radio"]
    parent = tree.nodes[radios[0]][2]
    [grid] = [k for k, n in enumerate(tree.nodes) if n[2] == parent and "samples" in tree.classes(k)]
    labels = {a["for"] for tag, a, p in tree.nodes if tag == "label" and p == parent}

    assert [album(e).steps, len(radios)] == [[40, 240], 2]
    assert {tree.nodes[k][1]["name"] for k in radios} == {"step"}  # one group: the arrow keys walk through it
    assert ["checked" in tree.nodes[k][1] for k in radios] == [False, True]
    for place, k in enumerate(radios):
        name = tree.nodes[k][1]["id"]
        assert tree.nodes[k][2] == parent and k < grid and name in labels  # a later sibling, as the style needs it
        assert f"#{name}:checked ~ .samples .at{place}" in html
        shown = [i for i in range(len(tree.nodes)) if f"at{place}" in tree.classes(i) and "at" in tree.classes(i)]
        assert len(shown) == len(e.samples) + 1  # a caption on every card and the sentence over the grid
        assert ("last" in tree.classes(shown[0])) == (place == 1)  # the one that is printed
    assert html.index("A red shape shape") < html.index("A red circle.", html.index("A red shape shape"))
    assert "exactly right: 11 of 12 · changed since step 40: 12 of 12" in text_of(html)


def test_many_steps_are_thinned_with_the_first_and_the_last(make_evidence: MakeEvidence):
    e = make_evidence()
    many = [Prediction(step=10 * k, text=f"caption {k}") for k in range(100)]
    own = e.samples[0].model_copy(update={"predictions": many})
    late = e.samples[1].model_copy(update={"predictions": many[-1:]})

    shown = album(make_evidence(samples=[own, late]))

    assert (len(shown.steps), shown.steps[0], shown.steps[-1], shown.left_out) == (MAX_STEPS, 0, 990, 100 - MAX_STEPS)
    assert [s.prediction is None for s in shown.cards[1].shown] == [True] * (MAX_STEPS - 1) + [False]
    assert not shown.judged
    assert "(not captioned at this step)" in read(make_evidence(samples=[own, late]))


def test_samples_without_any_caption_render(make_evidence: MakeEvidence):
    bare = [s.model_copy(update={"predictions": [], "words": []}) for s in make_evidence().samples]
    e = make_evidence(samples=bare)

    assert read(e).count("(no caption)") == 6 + len(bare)
    assert "### Samples" in render_markdown(e)


# ---------------------------------------------------------------------------------------------------------------
# Intervals on an axis


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(
    st.lists(st.tuples(finite, st.floats(0, 1e5), st.floats(0, 1e5)), min_size=1, max_size=8),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["ratio", "nats/token", "share"]),
)
@example([(2.225073858507e-311, 0.0, 0.0)], 1.0, "ratio")
def test_intervals_lie_on_their_axis_around_their_value(
    rows: list[tuple[float, float, float]], reference: float, unit: str
):
    drawn = plots.lanes(
        [("l", "k", measurement("m", v, unit, ci95=(v - low, v + high))) for v, low, high in rows],
        reference=reference, axis="",
    )  # fmt: skip

    tolerance = 1e-6
    assert 0 <= drawn.reference <= 100
    assert all(0 <= at <= 100 for at, _ in drawn.ticks) and len(drawn.ticks) <= 9
    assert drawn.reference in [at for at, _ in drawn.ticks]
    for lane in drawn.rows:
        assert -tolerance <= lane.left <= lane.dot + tolerance
        assert lane.dot <= lane.left + lane.width + tolerance <= 100 + 2 * tolerance
    order = sorted(range(len(rows)), key=lambda k: rows[k][0])
    assert all(a <= b + tolerance for a, b in itertools.pairwise(drawn.rows[k].dot for k in order))


def test_ratios_far_apart_get_a_logarithmic_axis_that_names_one():
    near = plots.lanes([("a", "", measurement("m", 1.1, "ratio", 0.05))], reference=1.0, axis="")
    far = plots.lanes([("a", "", measurement("m", 800.0, "ratio", 300.0))], reference=1.0, axis="")

    assert (near.log, far.log) == (False, True)
    assert all("1×" in [text for _, text in lanes.ticks] for lanes in (near, far))


# ---------------------------------------------------------------------------------------------------------------
# Cost, names, old records


def test_phases_add_up_to_the_whole_time(make_evidence: MakeEvidence):
    bars = phase_bars(make_evidence().cost)

    assert [b.label for b in bars] == ["everything else", "evaluation", "features"]
    assert sum(b.share for b in bars) == pytest.approx(1)
    assert phase_bars(Cost(steps=1)) == []


@pytest.mark.parametrize(
    ("text", "unit", "shown"),
    [
        ("> 1.05", "ratio", "> 1.05×"), ("≤ 0.5", "share", "≤ 50\u00a0%"), ("> 0", "nats/token", "> 0"),
        ("≥ 0.1 and ≤ 1e-05", "%", "≥ 0.1\u00a0% and ≤ 1e-05\u00a0%"), ("≤ 0", "parts", "≤ 0"),
    ],
)  # fmt: skip
def test_a_bound_reads_in_the_unit_of_its_measurement(text: str, unit: str, shown: str):
    assert bound(text, unit) == shown


def test_measurements_have_names_for_people():
    assert called("qa.accuracy.zero") == "answers right"
    assert called("chair.i.correct") == "named objects that are absent (CHAIR-i)"
    assert called("caption.cider_d.noise") == "CIDEr-D"
    assert called("ablation.ratio.noise") == "loss ratio, noise"
    assert called("my.own.metric") == "my.own.metric"


def test_a_record_from_before_gates_words_and_strata_still_renders(make_evidence: MakeEvidence):
    e = make_evidence()
    record = json.loads(e.to_json())
    for key in ("gates", "findings", "words"):
        del record[key]
    record["measurements"] = [m for m in record["measurements"] if m["stratum"] is None and "noise" not in m["name"]]
    for m in record["measurements"] + record["baseline"]:
        del m["by"]
    for sample in record["samples"]:
        del sample["words"]
    old = Evidence.from_json(json.dumps(record))

    html, markdown = read(old), render_markdown(old)

    assert promotes(old).tone == "unknown"
    for text in (html, markdown):
        assert "Not judged." in text and "No gate was" in text
    assert [v.key for v in verdicts(old)] == ["learn", "look", "fail", "cost", "promote"]


def test_pieces_of_a_word_that_is_only_space_keep_the_text_whole():
    words = [WordReliance(text=t, with_image=0.0, without=1.0) for t in ("", " ", "\n\n", "a ", " b")]

    assert "".join(w.space + w.text for w in marked(words)) == " \n\na  b"
