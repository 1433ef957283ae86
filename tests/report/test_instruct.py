"""What the report of an instruction tuning adds: answers by kind of question, language kept, adapters, checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.report.conftest import YES_NO_GUESSED, gate, kind, measurement, pope, text_of
from tests.report.test_render import HOSTILE, Page

from beholder.evidence import AdapterRow, Candidate, Curve, Evidence, Measurement, Prediction
from beholder.evidence.catalogue import called
from beholder.report import render_html, render_markdown
from beholder.report.answers import all_answers, answer_kinds, by_condition, conditions_of, shown_without_looking
from beholder.report.compare import compare_runs
from beholder.report.content import candidate_rows, footprint, key_numbers, retention_bars
from beholder.report.content import warnings as told_warnings
from beholder.report.render import exact_curves, exact_plot, small_plots
from beholder.report.verdicts import fails, gate_rows, looks, promotes
from beholder.report.words import fmt, fmt_ci
from beholder.types import printable

MakeEvidence = Callable[..., Evidence]
SNAPSHOTS = Path(__file__).parent / "snapshots"


def without_drawings(e: Evidence) -> Evidence:
    """For tests about the text alone: drawing is what takes time."""
    return e.model_copy(update={"curves": [], "histograms": []})


def page_of(e: Evidence) -> str:
    return render_html(without_drawings(e))


def plain(markdown: str) -> str:
    """Markdown as it reads: without its escapes and with ordinary spaces."""
    return markdown.replace("\\", "").replace("\u00a0", " ").replace("&gt;", ">")


def other_answers(e: Evidence, *answered: Measurement) -> Evidence:
    """The evidence with these instead of what it measured of the answers."""
    rest = [m for m in e.measurements if not m.name.startswith(("answer.", "pope."))]
    return e.model_copy(update={"measurements": [*rest, *answered]})


# ---------------------------------------------------------------------------------------------------------------
# Stage 1


@pytest.mark.parametrize("form", ["md", "txt"])
def test_the_report_of_an_alignment_reads_as_before(make_evidence: MakeEvidence, form: str):
    e = make_evidence()

    shown = render_markdown(e) if form == "md" else re.sub(r"(?<=[.:?]) ", "\n", text_of(page_of(e))) + "\n"

    assert shown == (SNAPSHOTS / f"align.{form}").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Does it look? Answers by kind of question


def test_a_model_that_needs_the_image_for_every_kind_of_question_looks(make_instruct_evidence: MakeEvidence):
    e = make_instruct_evidence()

    assert {k.standing for kinds in answer_kinds(e).values() for k in kinds} == {"looks"}
    assert (looks(e).tone, fails(e).tone, promotes(e).tone) == ("good", "good", "good")
    assert "Its answers: 97.4\u00a0% right; with no image 36.9\u00a0%; +60.5 points gained" in looks(e).why
    assert "right without looking" not in text_of(page_of(e))


def test_a_liar_jumps_out_of_every_form_although_its_loss_and_its_average_look_fine(
    make_instruct_evidence: MakeEvidence,
):
    e = make_instruct_evidence(yes_no=YES_NO_GUESSED)
    html, markdown = page_of(e), plain(render_markdown(e))

    first = next(iter(answer_kinds(e)["question"]))
    assert (first.stratum, first.standing) == ("yes/no questions", "liar")
    assert (looks(e).tone, looks(e).answer) == ("weak", "On average, not everywhere.")
    assert (fails(e).tone, fails(e).answer) == ("bad", "1 kind of question answered without looking.")
    told = "Right without looking: “yes/no questions” (83.0 % right, +0.0 points over another’s image, n 389)."
    assert told in looks(e).why.replace("\u00a0", " ") and told in fails(e).why.replace("\u00a0", " ")
    assert len(re.findall(r'<tr class="[^"]*\bliar"', html)) == 2  # as a kind of question and as a kind of answer
    assert html.index("✗ right without looking") < html.index("<td>shape</td><td")
    assert "| yes/no questions | question | ❌ right without looking | 83.0 % (80.0–86.0 %)" in markdown


def test_a_gain_over_no_image_alone_is_not_sight(make_instruct_evidence: MakeEvidence):
    # Never asked without an image in training, it breaks down there; another image it answers just as "well".
    e = other_answers(make_instruct_evidence(), *kind(None, 0.83, 0.83, 0.02, 400))

    answers = all_answers(e)

    assert answers is not None and answers.standing == "liar"
    assert answers.least is not None and answers.least.name == "answer.gain.shuffled"
    assert (looks(e).tone, looks(e).answer) == ("bad", "No: its answers do not need the image.")


@pytest.mark.parametrize(
    ("own", "none", "n", "half", "standing"),
    [
        (0.83, 0.80, 400, 0.04, "liar"),
        (0.30, 0.29, 400, 0.04, "blind"),  # wrong mostly: nobody takes it for sight, but the image adds nothing either
        (0.83, 0.60, 19, 0.10, "few"),
        (0.83, 0.60, 400, 0.0, "few"),  # no interval
        (0.83, 0.60, 20, 0.10, "looks"),
    ],
)
def test_a_kind_of_question_is_judged_by_the_interval_of_its_gain(
    make_instruct_evidence: MakeEvidence, own: float, none: float, n: int, half: float, standing: str
):
    found = kind("a", own, none, none, n, by="question", half=half)
    if not half:
        found = [m.model_copy(update={"ci95": None}) for m in found]
    e = other_answers(make_instruct_evidence(), *kind(None, 0.9, 0.4, 0.4, 900), *found)

    [judged] = answer_kinds(e)["question"]

    assert judged.standing == standing
    assert [k.stratum for k in shown_without_looking(e)] == (["a"] if standing in ("liar", "blind") else [])
    assert looks(e).tone == ("weak" if standing in ("liar", "blind") else "good")


def test_liars_come_first_and_kinds_too_small_to_judge_last(make_instruct_evidence: MakeEvidence):
    found = [
        *kind("tiny", 1.0, 0.0, 0.0, 5, by="question"), *kind("good", 0.9, 0.2, 0.1, 100, by="question"),
        *kind("worse", 0.5, 0.3, 0.3, 100, by="question"), *kind("liar", 0.6, 0.6, 0.6, 100, by="question"),
        *kind("great liar", 0.9, 0.9, 0.9, 100, by="question"),
    ]  # fmt: skip

    kinds = answer_kinds(other_answers(make_instruct_evidence(), *found))["question"]

    assert [k.stratum for k in kinds] == ["great liar", "liar", "worse", "good", "tiny"]


def test_gates_about_the_gain_are_about_looking(make_instruct_evidence: MakeEvidence):
    failed = gate(
        "my_bound", 0.05, "≥ 0.1", passed=False, measure="answer.gain.none", unit="share", end="value", stratum="yes/no"
    )
    e = make_instruct_evidence(gates=[failed])

    verdict = looks(e)

    assert (verdict.tone, verdict.answer) == ("weak", "Yes, it looks, but not as declared.")
    assert "my_bound (+5.0, must be ≥ 10 points)" in verdict.why
    [row] = gate_rows(e)
    assert (row.number, row.unit, row.bound) == ("+5.0", "points", "≥ 10 points")
    assert row.what == "answers right, gain over no image"


def test_a_gain_reads_in_points_with_its_sign_and_never_in_per_cent():
    m = measurement("answer.gain.none", -0.012, "share", 0.034)

    assert fmt(m) == "\u22121.2 points"
    assert fmt_ci(m) == "\u22124.6 … +2.2"
    assert fmt(measurement("answer.gain.none", 0.561)) == "+56.1 points"
    assert fmt(measurement("answer.accuracy.none", 0.561)) == "56.1\u00a0%"


def test_no_image_is_none_and_an_empty_image_is_zero(make_evidence: MakeEvidence, make_instruct_evidence: MakeEvidence):
    chat, align = plain(render_markdown(make_instruct_evidence())), plain(render_markdown(make_evidence()))

    assert "| loss, an empty image |" in chat and "| loss, no image |" in align
    assert "| its own image | another image | no image | gain over no image |" in chat
    assert "| step 140 | step 280 | another image | no image |" in chat
    assert "empty image" not in align
    assert called("ablation.delta.zero", "caption") == "loss difference, no image"


def test_yes_no_scores_stand_in_one_order_and_a_score_that_does_not_exist_leaves_a_gap(
    make_instruct_evidence: MakeEvidence,
):
    never_yes = [m for m in pope("none", 0.5, 0.0) if m.name != "pope.precision.none"]
    e = other_answers(make_instruct_evidence(), *pope("correct", 0.9, 0.5), *never_yes)

    table = by_condition(e, "yes/no")

    assert [c for c, _ in table] == ["correct", "none"]
    names = ["accuracy", "precision", "recall", "F1", "says yes"]
    assert [[what for what, _ in values] for _, values in table] == [names, names]
    assert [m is None for _, m in table[1][1]] == [False, True, False, False, False]
    assert "| no image | 50.0 % (48.5–51.5 %) |  | 51.0 %" in plain(render_markdown(e))
    assert "Questions answered with yes or no (POPE)" in text_of(page_of(e))


def test_how_instructions_are_followed_stands_beside_what_is_said_without_the_image(
    make_instruct_evidence: MakeEvidence,
):
    e = make_instruct_evidence()
    scores = {"score": 0.81, "relevance": 0.7, "completeness": 0.77, "coherence": 1.0}
    followed = [
        measurement(f"instruct.{name}.{c}", v / k, "score 0-1", 0.01, n=1000, caveat="by words, not by meaning")
        for k, c in ((1, "correct"), (2, "none")) for name, v in scores.items()
    ]  # fmt: skip
    gain = measurement("instruct.gain.none", 0.405, "score 0-1", 0.02, better="higher", n=1000)
    e = e.model_copy(update={"measurements": [*e.measurements, *followed, gain]})

    table = by_condition(e, "instructions")
    page, markdown = text_of(page_of(e)), plain(render_markdown(e))

    assert [c for c, _ in table] == ["correct", "none"]
    assert [what for what, _ in table[0][1]] == [*scores, "gain"]
    assert "Following the instruction: 0.4 relevance, 0.3 completeness, 0.3 coherence" in page
    assert "by words, not by meaning" in page and "read the score beside the one without the image" in page
    assert "| instruction following | score | relevance | completeness | coherence | gain |" in markdown
    assert markdown.count("0.405") >= 2 and "0.810" in markdown


def test_answers_without_any_gain_measured_are_shown_and_not_judged(make_instruct_evidence: MakeEvidence):
    e = other_answers(make_instruct_evidence(), measurement("answer.accuracy.correct", 0.9, half=0.02))

    answers = all_answers(e)

    assert answers is not None and answers.standing == "unknown"
    assert conditions_of(e) == (["correct"], [])
    assert looks(e).tone == "weak" and "A gain from the image was not shown." in looks(e).why
    assert "90.0 %" in plain(text_of(page_of(e)))


def test_gains_without_the_accuracies_they_come_from_are_judged_all_the_same(make_instruct_evidence: MakeEvidence):
    gains = [m for m in kind(None, 0.8, 0.8, 0.8, 100) if m.name.startswith("answer.gain.")]
    e = other_answers(make_instruct_evidence(), *gains)

    answers = all_answers(e)

    assert answers is not None and answers.standing == "blind"  # how often it is right is not known
    assert "✗ the image adds nothing" in text_of(page_of(e))
    assert looks(e).tone == "bad"


# ---------------------------------------------------------------------------------------------------------------
# Language kept


@pytest.mark.parametrize(("bound", "ratio", "tone"), [("≤ 1.02", 1.03, "weak"), ("≤ 1.05", 1.03, "good")])
def test_language_is_forgotten_beyond_what_the_run_declared(
    make_instruct_evidence: MakeEvidence, bound: str, ratio: float, tone: str
):
    e = make_instruct_evidence()
    kept = measurement("retention.loss_ratio", ratio, "ratio", 0.003, n=40)
    found = [kept if m.name == kept.name else m for m in e.measurements]
    judged = gate("retained", ratio, bound, tone == "good", measure=kept.name, unit="ratio", end="value")

    verdict = fails(make_instruct_evidence(measurements=found, gates=[judged]))

    assert verdict.tone == tone
    assert (verdict.answer == "Language forgotten.") == (tone == "weak")
    assert ("on plain text its loss is 1.030× that of the base" in verdict.why) == (tone == "weak")


def test_the_two_losses_on_text_stand_beside_each_other_on_one_scale(make_instruct_evidence: MakeEvidence):
    e = make_instruct_evidence()

    base, adapted = retention_bars(e)

    assert (base.label, adapted.label, adapted.share) == ("base, adapters off", "adapters on", 1.0)
    assert base.share == pytest.approx(3.412 / 3.441)
    text = text_of(page_of(e)).replace("\u00a0", " ")
    for part in (
        "divergence from the base (KL) 0.0312 nats/token",
        "0.188 logits",
        "next tokens of plain text changed by merging",
    ):
        assert part in text, part
        assert part.split(" 0")[0] in plain(render_markdown(e))


# ---------------------------------------------------------------------------------------------------------------
# Adapters and checkpoints


def test_the_footprint_accounts_for_every_adapted_layer_and_parameter(make_instruct_evidence: MakeEvidence):
    e = make_instruct_evidence()
    text = text_of(page_of(e)).replace("\u00a0", " ")

    rows = footprint(e.adapters)

    assert sum(r.count for r in rows) == len(e.adapters) == 210
    assert sum(r.total for r in rows) == sum(a.params for a in e.adapters)
    by_name = {r.name: r for r in rows}
    assert (by_name["q_proj"].count, by_name["q_proj"].shapes, by_name["q_proj"].rank) == (30, "576 → 576", "16")
    assert "210 layers of the language model, 4,884,480 parameters, 3.6 % of the language model’s 134,515,008." in text
    assert all(a.name in text for a in e.adapters)  # the full list, folded away
    assert "| q_proj | 30 | 576 → 576 | 16 | 18,432 | 552,960 |" in plain(render_markdown(e))


def test_layers_of_one_name_that_differ_say_so():
    rows = footprint(
        [
            AdapterRow(name="a.0.up", d_in=4, d_out=8, rank=2, params=24),
            AdapterRow(name="a.1.up", d_in=4, d_out=6, rank=8, params=80),
        ]
    )

    assert [(r.shapes, r.rank, r.params, r.total) for r in rows] == [("4 → 8, 4 → 6", "2–8", "24–80", 104)]


def test_the_best_checkpoint_is_marked_and_a_refused_one_says_why(make_instruct_evidence: MakeEvidence):
    e = make_instruct_evidence()
    html, markdown = page_of(e), plain(render_markdown(e))

    rows = candidate_rows(e)

    assert [(r.step, r.state) for r in rows] == [(140, "fit"), (280, "best"), (420, "refused")]
    assert "it looks less than before" in rows[2].verdict
    assert text_of(html).count("★") == 1
    for shown in (text_of(html), markdown):
        assert "measured: step 280 of 420, the best" in shown
        assert "A later stage starts from step 280, the best of 3 checkpoints." in shown
    assert "| ★ 280 | 0.0310 | +1.80 | 4.0 % | the best |" in markdown
    assert told_warnings(e) == []


def test_a_run_without_a_fit_checkpoint_says_so_on_top(make_instruct_evidence: MakeEvidence):
    refused = Candidate(step=420, eval_loss=0.02, refused="another sample's image does not make it worse")

    e = make_instruct_evidence(candidates=[refused], step=420)

    [warning] = told_warnings(e)
    assert warning.startswith("No checkpoint was fit to be the best")
    assert "measured: step 420 of 420" in render_markdown(e) and ", the best" not in render_markdown(e)


# ---------------------------------------------------------------------------------------------------------------
# Over time, samples, first screen


def test_accuracy_over_time_is_one_plot_in_per_cent_and_no_small_one(make_instruct_evidence: MakeEvidence):
    e = make_instruct_evidence()
    shape = Curve(name="quick_eval.exact/shape", unit="share", x=[70, 140], y=[0.02, 1.0])
    e = make_instruct_evidence(curves=[*e.curves, shape])

    plot = exact_plot(e)

    assert [label for label, _ in exact_curves(e)] == ["quick subset", "all held-out", "shape (quick)"]
    assert plot is not None and plot.note == ""  # shares are never on a logarithmic axis
    assert "% of answers" in plot.svg and ">100</text>" in plot.svg
    assert not [name for name, _ in small_plots(e) if "exact" in name]
    assert [name for name, _ in small_plots(e)].count("Learning rate of the adapters") == 1
    assert "step 70 31.0 %" in plain(render_markdown(e)) and "step 420 97.0 %" in plain(render_markdown(e))


def test_the_question_stands_above_the_answer_and_its_reference(make_instruct_evidence: MakeEvidence):
    e = make_instruct_evidence()
    html = page_of(e)
    card = html[html.index("test-q0</bdi> ·") : html.index("test-q1</bdi> ·")]

    places = [card.index(text) for text in ("what color is the triangle?", ">blue<", "reference", ">teal<", "no image")]

    assert places == sorted(places)
    assert "| id | question | reference | step 140 | step 280 |" in plain(render_markdown(e))


def test_the_first_screen_tells_accuracy_beside_the_blind_one(make_instruct_evidence: MakeEvidence):
    numbers = {label: (value, small) for label, value, small in key_numbers(make_instruct_evidence())}

    value, small = numbers["answers right"]
    assert value == "97.4\u00a0%" and "no image 36.9\u00a0%" in small
    assert numbers["gain over no image"][0] == "+60.5 points"
    assert {"yes/no questions, F1", "text loss over the base's", "adapters off, on text"} <= set(numbers)
    assert not [label for label in numbers if "caption" in label]


def test_the_page_speaks_of_answers_and_not_of_captions(make_instruct_evidence: MakeEvidence):
    text = text_of(render_html(make_instruct_evidence()))

    assert "Length of the answers" in text
    assert "caption" not in re.sub(r"\S*caption\.\S*", "", text).lower()


def test_the_page_of_an_instruction_tuning_is_self_contained_too(make_instruct_evidence: MakeEvidence):
    html = render_html(make_instruct_evidence())
    page = Page(html)

    assert page.tags().isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base"})
    assert not re.search(r"url\((?!#)", html)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def with_text(make: MakeEvidence, text: str) -> Evidence:
    """The example with ``text`` wherever instruction tuning lets other people's text in."""
    e = make()
    named = [*kind(text, 0.8, 0.8, 0.8, 50, by="question"), *kind("b", 0.8, 0.1, 0.1, 50, by="question")]
    sample = e.samples[0].model_copy(
        update={"question": text, "predictions": [Prediction(step=280, text=text), *e.samples[0].predictions[2:]]}
    )
    caveat = measurement("retention.loss", 3.4, "nats/token", caveat=text)
    return without_drawings(
        make(
            samples=[sample],
            measurements=[*kind(None, 0.8, 0.4, 0.4, 100), *named, *pope("correct", 0.9, 0.5), caveat],
            adapters=[AdapterRow(name=f"a.{text}", d_in=1, d_out=1, rank=1, params=2)],
            candidates=[Candidate(step=1, eval_loss=1.0, refused=text)],
        )
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_questions_kinds_modules_and_reasons_stay_text(make_instruct_evidence: MakeEvidence, text: str):
    expected = Page(render_html(with_text(make_instruct_evidence, "plain")))
    html = render_html(with_text(make_instruct_evidence, text))
    markdown = render_markdown(with_text(make_instruct_evidence, text)).split("## Config")[0]
    page = Page(html)

    assert [t for t, _ in page.elements] == [t for t, _ in expected.elements]
    assert [sorted(a) for _, a in page.elements] == [sorted(a) for _, a in expected.elements]
    assert printable(text).split("\n")[0] in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)
    assert not re.search(r"(?<!\\)[<`]", markdown.replace("> **", ""))
    assert not re.search(r"(?<!\\)\]\(", markdown)


# ---------------------------------------------------------------------------------------------------------------
# Names, side by side


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("answer.accuracy.correct", "answers right, its own image"),
        ("answer.gain.none", "answers right, gain over no image"),
        ("answer.exact.shuffled", "answers exactly right, another image"),
        ("pope.f1.none", "yes/no questions: F1, no image"),
        ("retention.kl", "divergence from the base (KL)"),
        ("merge.changed_pct", "next tokens of plain text changed by merging"),
    ],
)
def test_measurements_of_answers_have_names_for_people_in_any_stage(name: str, told: str):
    assert called(name) == called(name, "answer") == told


def test_runs_of_two_stages_are_compared_with_a_warning_and_gains_in_points(
    make_evidence: MakeEvidence, make_instruct_evidence: MakeEvidence, tmp_path: Path
):
    guessed = make_instruct_evidence(yes_no=YES_NO_GUESSED, run_name="liar")
    folders: list[Any] = []
    for e in (make_instruct_evidence(run_name="sees"), guessed, make_evidence(run_name="aligned")):
        folders.append(tmp_path / f"{e.run_name}.json")
        folders[-1].write_text(e.to_json(), encoding="utf-8")

    c = compare_runs(folders[:2])
    mixed = compare_runs(folders)

    row = next(m for m in c.measurements if m.key == "answer.gain.none/yes/no")
    assert (row.unit, row.told, row.mark(1)) == ("points", "answers right, gain over no image", "▼")
    assert "| +28.5 (+25.5 … +31.5) | +0.4 (−2.6 … +3.4) ▼ |" in c.to_markdown()
    assert "FAILED: +0.4 points in yes/no" in c.to_markdown().replace("\\", "")
    assert "measured: step 280 of 420, the best" in c.to_markdown() and "step 280 of 420" in c.to_html()
    assert not [w for w in c.warnings if "stages" in w]
    assert [
        w for w in mixed.warnings if w.startswith("The stages differ (sees: instruct, liar: instruct, aligned: align)")
    ]
