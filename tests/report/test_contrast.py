"""Contrast pairs, four cells and blindness: on both pages, and in the verdicts."""

from __future__ import annotations

import re
from collections.abc import Callable

from tests.report.conftest import gate, measurement, text_of

from beholder.evidence import Evidence
from beholder.report import render_html, render_markdown
from beholder.report.verdicts import LOOKING, fails, looks

MakeEvidence = Callable[..., Evidence]


def contrasted(e: Evidence, yes_no: float = 0.94) -> Evidence:
    more = [
        measurement("pairs.right.correct", 0.983, half=0.01, n=3471, caveat="pairs of 835 samples, 83 questions"),
        measurement("pairs.right.none", 0.0, n=3471), measurement("pairs.prior", 0.096, n=3471),
        measurement("pairs.right.correct", 1.0, n=1191, by="question", stratum="color"),
        measurement("pairs.right.correct", yes_no, half=0.02, n=802, by="question", stratum="yes/no"),
        measurement("pairs.prior", 0.17, n=802, by="question", stratum="yes/no"),
        measurement("cells.loss.own.correct", 0.02, "nats/token", 0.01, n=128),
        measurement("cells.loss.own.shuffled", 1.5, "nats/token", 0.1, n=128),
        measurement("cells.loss.other.correct", 4.0, "nats/token", 0.1, n=128),
        measurement("cells.accuracy.own.correct", 0.99, n=128),
        measurement("cells.delta.question", 3.98, "nats/token", 0.1, n=128),
        measurement("cells.delta.image", 1.48, "nats/token", 0.1, n=128),
        measurement("blind.share", 0.58, "ratio", 0.05), measurement("blind.share_told", 0.41, "ratio", 0.05),
        measurement("blind.gain", 0.40, half=0.03), measurement("blind.leak", 0.30, half=0.03),
        measurement("blind.base", 0.28, half=0.03),
    ]  # fmt: skip
    return e.model_copy(update={"measurements": [*e.measurements, *more], "curves": [], "histograms": []})


def words_of(markdown: str) -> str:
    return markdown.replace("\\", "").replace("\u00a0", " ")


def test_both_pages_show_pairs_cells_and_blindness_with_guessing_beside(make_instruct_evidence: MakeEvidence):
    e = contrasted(make_instruct_evidence())

    page, markdown = text_of(render_html(e)).replace("\u00a0", " "), words_of(render_markdown(e))

    assert re.search(r"\| all questions \| 98\.3 % \(97\.3–99\.3 %\) \| 0 % \| 9\.6 % \| 3,471 \|", markdown)
    assert markdown.index("| yes/no | 94.0 %") < markdown.index("| color | 100 %"), "seldom right first"
    assert "| its own question | 0.0200 nats/token" in markdown and "| another’s question | 4.00 nats/token" in markdown
    for text in (
        "The question is read: another’s question raises the loss of the own answer by 3.98 nats/token",
        "Blind share: without the image it is right 58.0 % (53.0–63.0 %) as often as with it; 41.0 % (36.0–46.0 %)",
        "Gain: +40.0 points", "Leak: +30.0 points",
    ):  # fmt: skip
        assert text in page and text in markdown, text
    assert "no guessing reaches more than 25 %" in page and "Pairs of 835 samples, 83 questions" in page


def test_the_verdicts_tell_the_pairs_and_where_they_are_least_often_right(make_instruct_evidence: MakeEvidence):
    e = contrasted(make_instruct_evidence())

    why = looks(e).why.replace("\u00a0", " ")
    assert "98.3 % (97.3–99.3 %) of the contrast pairs both right, where guessing gives 9.6 %." in why
    assert "Least for “yes/no”: 94.0 %" in fails(e).why.replace("\u00a0", " ")


def test_every_probe_of_looking_is_among_what_the_verdict_heeds():
    assert set(LOOKING) == {"answer.gain.", "slots.", "pairs.", "cells.", "blind.", "learner."}


def test_a_failed_gate_on_pairs_takes_the_yes_away(make_instruct_evidence: MakeEvidence):
    e = contrasted(make_instruct_evidence())
    failed = gate("pairs_right", 0.1, "> 0.25", False, measure="pairs.right.correct", unit="share")

    assert looks(e).tone == "good"
    worse = looks(e.model_copy(update={"gates": [*e.gates, failed]}))

    assert worse.tone == "weak" and "pairs_right" in worse.why


def test_a_run_without_them_shows_nothing_of_them(make_evidence: MakeEvidence):
    e = make_evidence().model_copy(update={"curves": [], "histograms": []})

    assert "ontrast pairs" not in text_of(render_html(e)) and "Four cells" not in render_markdown(e)
