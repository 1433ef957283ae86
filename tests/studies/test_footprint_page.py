"""A footprint study's page: the answer first, every point drawn with its interval, what was stopped and why."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from beholder.evidence import Measurement
from beholder.evidence.guardrails import Reading
from beholder.studies.footprint_page import _trail, render_footprint, render_html, render_markdown
from beholder.studies.footprint_record import (
    FootprintPoint,
    FootprintRecord,
    FootprintRow,
    LinePoint,
    answer,
    conclude,
    explanation,
    footprint_csv,
)
from beholder.studies.frontier import KEPT, SEEN, TASK
from beholder.types import UserError

# point, layers, blocks, parameters, held-out loss, text ratio, hallucination, irrelevant told
TABLE = [
    ("A0", 0, 0, 0, 0.900, 1.000, 0.10, 0.95), ("A1", 2, 0, 340_000, 0.620, 1.004, 0.11, 0.94),
    ("A2", 4, 0, 680_000, 0.600, 1.062, 0.16, 0.90), ("B2", 0, 4, 260_000, 0.780, 1.000, 0.12, 0.95),
    ("B3", 0, 6, 390_000, 0.760, 1.000, 0.27, 0.93), ("C2", 2, 4, 600_000, 0.540, 1.006, 0.14, 0.93),
    ("C3", 2, 6, 730_000, 0.535, 1.007, 0.16, 0.92),
]  # fmt: skip


def measured(name: str, value: float, half: float) -> Measurement:
    return Measurement(name=name, value=value, unit="x", better="lower", n=250, ci95=(value - half, value + half))


def record(seeds: tuple[int, ...] = (1, 2), spread: float = 0.01, **changes: Any) -> FootprintRecord:
    """The table as a study; each seed's losses ``spread`` apart."""
    rows, points = [], []
    for name, llm, vision, params, loss, text, sees, told in TABLE:
        points.append(
            FootprintPoint(
                name=name, kind="matrix", where=f"the language model's last {llm} and the vision tower's last {vision}",
                llm=llm, vision=vision, planned=params,
            )
        )  # fmt: skip
        for k, seed in enumerate(seeds if name != "A0" else seeds[:1]):
            stopped = name == "B3" and k == 0
            rows.append(
                FootprintRow(
                    name=f"{name}_s{seed}", point=name, seed=seed, folder=f"{name}_s{seed}", config_hash="0" * 64,
                    settings={}, status="finished", learns=params, steps=300, wall_s=400.0, step_s=1.25,
                    stopped="hallucination: ood.hallucination is 0.27 after step 60, more than 0.15 above" * stopped,
                    stopped_by="ood.hallucination" * stopped, device="cpu",
                    measured={
                        "eval.loss": measured("eval.loss", loss + k * spread, 0.03),
                        "retention.loss": measured("retention.loss", 3.0 * text, 0.4),
                        "retention.loss_ratio": measured("retention.loss_ratio", text, 0.002),
                        "ood.hallucination": measured("ood.hallucination", sees, 0.04),
                        "irrelevant.pass": measured("irrelevant.pass", told, 0.03),
                    },
                    line=() if name == "A0" else tuple(
                        LinePoint(strength=s, values={
                            "eval.loss": 0.9 + (loss - 0.9) * s**0.5, "retention.loss_ratio": 1 + (text - 1) * s**2,
                            "ood.hallucination": 0.1 + (sees - 0.1) * s**2,
                        }) for s in (0.25, 0.5, 0.75)
                    ),
                    readings=(Reading(0, {"ood.hallucination": 0.1}), Reading(60, {"ood.hallucination": sees})),
                )
            )  # fmt: skip
    fields = {
        "name": "footprint", "created": "2026-11-27T07:00:00+00:00", "start": "outputs/stage3", "seeds": list(seeds),
        "keep": {"max_text_ratio": 1.05, "max_hallucination_rise": 0.1, "max_irrelevant_fall": 0.1}, "rows": rows,
        "points": points,
    }  # fmt: skip
    return conclude(FootprintRecord(**(fields | changes)))


def text_rows(html: str) -> list[str]:
    table = html[html.index('<table id="points">') : html.index("</table>")]
    return [" ".join(re.sub(r"<[^>]+>", " ", "<tr" + row).split()) for row in table.split("<tr")[2:]]


def test_the_answer_names_the_layers_those_that_cannot_be_told_from_it_and_the_least() -> None:
    study = record()

    best = "Train the language model's last 2 and the vision tower's last 6 (C3)"
    assert (
        answer(study)
        == f"{best}, or, with fewer parameters, the language model's last 2 and the vision tower's last 4 (C2)"
    )
    assert answer(record(seeds=(1,))) == best  # there C2 is only not known to be worse
    why = explanation(study)
    assert "C2 cannot be told from it. Of these C2 trains least" in why and "600,000 parameters" in why
    assert "Not to be taken: A2, B3." in why
    html = render_html(study)
    assert html.index(answer(study).replace("'", "&#39;")) < html.index("<svg") < html.index("<table")


def test_only_points_with_a_result_are_compared() -> None:
    whole = record(seeds=(1,))
    alone = conclude(whole.model_copy(update={"rows": [r for r in whole.rows if r.point == "A0"]}))
    some = conclude(whole.model_copy(update={"rows": [r for r in whole.rows if r.point in ("A0", "A1")]}))

    assert answer(alone) == "Nothing is compared yet: A0 alone has a result"
    assert "A0 has a held-out loss of 0.9 nats" in explanation(alone) and "not compared: A1, A2" in explanation(alone)
    assert not re.search("lowest|told apart", explanation(alone))
    assert answer(some).startswith("Train the language model's last 2")
    assert "every other one that has a result. Without a result, and so not compared: A2" in explanation(some)
    assert "not compared" not in explanation(whole)


def test_the_record_survives_its_file_and_is_judged_the_same_again(tmp_path: Path) -> None:
    study = record()
    (tmp_path / "footprint.json").write_text(study.model_dump_json())

    loaded = FootprintRecord.load(tmp_path)

    assert loaded == study and conclude(loaded) == study
    html, markdown = render_footprint(tmp_path, tmp_path)
    assert html.read_text() == render_html(study) and markdown.read_text() == render_markdown(study)


@pytest.mark.parametrize(("text", "message"), [("{", "not the record of a footprint"), ("{}", "name: Field required")])
def test_a_damaged_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "footprint.json").write_text(text)

    with pytest.raises(UserError, match=message):
        FootprintRecord.load(tmp_path)
    with pytest.raises(UserError, match="beholder footprint CONFIG writes it"):
        FootprintRecord.load(tmp_path / "nothing")


def test_every_point_is_drawn_with_its_name_interval_line_and_place_on_the_frontier() -> None:
    study = record()
    drawings = re.findall(r"<svg.*?</svg>", render_html(study), flags=re.DOTALL)

    assert len(drawings) == 2  # language, and seeing
    for svg in drawings:
        assert sorted(re.findall(r'class="label"[^>]*>([^<]+)<', svg)) == [row[0] for row in TABLE]
        assert svg.count('class="ci"') == 2 * len(TABLE) and svg.count('class="trail"') == len(TABLE) - 1
        assert svg.count('class="cross"') == 2 and svg.count('class="axis"') == 1
        assert svg.count('class="ring"') == sum(p.on_frontier for p in study.points)
    assert {p.name for p in study.points if p.on_frontier} == {"A0", "A1", "B2", "B3", "C2", "C3"}


def test_points_come_best_first_and_what_may_not_be_taken_says_why() -> None:
    rows = text_rows(render_html(record()))

    assert [r.split()[0] for r in rows] == ["C3", "C2", "A1", "B2", "A0", "A2", "B3"]
    assert "best" in rows[0] and "cannot be told from the best" in rows[1] and "learns least of these" in rows[1]
    assert "16.0 % 12.0 % … 20.0 %" in rows[0]  # a share, where the held-out loss has four decimals
    assert "retention.over_start is 1.06, at most 1.05 times A0&#39;s" in rows[5]
    assert "stopped by its guardrail hallucination: ood.hallucination is 0.27 after step 60" in rows[6]


def grown(*, after: Sequence[float], readings: tuple[Reading, ...] = ()) -> FootprintRecord:
    """The study with points that each go on from the one before and multiply its loss on plain text."""
    study, text = record(seeds=(1,)), 3.0
    rows, points = list(study.rows), list(study.points)
    for k, times in enumerate(after, 1):
        text *= times
        known = {
            "eval.loss": measured("eval.loss", 0.3 - 0.01 * k, 0.03),
            "retention.loss": measured("retention.loss", text, 0.4),
            "retention.loss_ratio": measured("retention.loss_ratio", times, 0.002),
        }
        line = (LinePoint(strength=0.5, values={"eval.loss": 0.4, "retention.loss_ratio": 1 + (times - 1) / 4}),)
        rows.append(rows[1].model_copy(update={
            "name": f"grow_{k}", "point": f"grow_{k}", "measured": known, "line": line, "readings": readings,
        }))  # fmt: skip
        points.append(FootprintPoint(name=f"grow_{k}", kind="own", where="more"))
    return conclude(study.model_copy(update={"rows": rows, "points": points}))


def test_what_is_lost_of_language_adds_up_over_points_that_go_on_from_each_other() -> None:
    study = grown(after=(1.04, 1.04, 1.04))
    at = {p.name: p.at["retention.over_start"] for p in study.points}

    assert [at[f"grow_{k}"].value for k in (1, 2, 3)] == pytest.approx([1.04, 1.0816, 1.124864])
    assert at["grow_3"].low == pytest.approx(1.124864 * 1.038 / 1.04)
    assert "grow_1" not in study.choice.refused and study.choice.winner == "grow_1"
    assert study.choice.refused["grow_3"] == "retention.over_start is 1.12, at most 1.05 times A0's"
    trail = _trail(study, study.point("grow_3"), KEPT)
    assert trail == [pytest.approx((1.04**2 * 1.01, 0.4)), pytest.approx((1.124864, 0.27))]
    rows = {r["name"]: r for r in csv.DictReader(io.StringIO(footprint_csv(study)))}
    assert float(rows["grow_3"]["retention.over_start"]) == pytest.approx(1.124864)
    for page in (render_html(study), render_markdown(study)):
        assert "text loss, × A0" in page and "guardrails in a run compare with its own base" in page


def test_h4_reads_what_is_lost_against_the_start_too() -> None:
    readings = tuple(
        Reading(k, {"retention.loss": 3.0 * v, "retention.loss_ratio": 1.0}) for k, v in ((10, 1.1), (20, 1.2))
    )

    verdict = next(v for v in grown(after=(1.0, 1.0), readings=readings).verdicts if v.name == "H4")

    assert verdict.said == "supported" and "loss on plain text +0.1 after step 10" in verdict.why


def test_a_guardrail_on_plain_text_is_a_loss_of_language() -> None:
    study = record()
    rows = [
        r.model_copy(
            update={"stopped_by": "retention.loss_ratio_styled", "stopped": "text: x"} if r.point == "A2" else {}
        )
        for r in study.rows
    ]

    why = next(v.why for v in conclude(study.model_copy(update={"rows": rows})).verdicts if v.name == "H1")

    assert "loss on plain text A1 → A2 (stopped by its guardrail)" in why


def test_where_the_baseline_was_not_measured_language_does_not_count_and_the_answer_says_so() -> None:
    study = record()
    rows = [r for r in study.rows if r.point != "A0"]
    study = conclude(study.model_copy(update={"rows": rows}))

    assert "retention.over_start" not in study.axes and not study.limits
    assert "A0's loss on plain text was not measured" in explanation(study)


def test_a_point_used_below_full_strength_lies_on_its_line_where_it_is() -> None:
    study = record(seeds=(1,))
    rows = [r.model_copy(update={"strength": 0.5} if r.point == "C2" else {}) for r in study.rows]
    study = conclude(study.model_copy(update={"rows": rows}))
    c2, c3 = study.point("C2"), study.point("C3")

    trail = _trail(study, c2, SEEN)

    assert len(trail) == 4 and trail[2] == (c2.at[SEEN.measure].value, c2.at[TASK.measure].value)
    assert [y for _, y in trail] == pytest.approx([0.9, 0.9 - 0.36 * 0.5, 0.54, 0.9 - 0.36 * 0.75**0.5])
    assert _trail(study, c3, SEEN)[-1] == (c3.at[SEEN.measure].value, c3.at[TASK.measure].value)  # 1: at its end


def test_verdicts_stops_and_costs_are_told_in_both() -> None:
    study = record()
    html, markdown = render_html(study), render_markdown(study)

    for v in study.verdicts:
        assert f"**{v.name} {v.said}**" in markdown and html.count(f"<b>{v.name}</b>") == 1
    assert "B3_s1" in html and "- B3\\_s1: hallucination: ood.hallucination is 0.27" in markdown
    assert html.count('<td class="n">1.250</td>') == len(study.rows)


def test_without_repeats_the_page_says_what_intervals_over_samples_can_tell() -> None:
    study = record(seeds=(1,))

    assert "Without repeats" in explanation(study) and "intervals over held-out samples are apart" in render_html(study)
    assert set(study.choice.near) == {"C2"}  # 0.03 either way


def test_a_study_that_has_only_begun_has_a_page() -> None:
    whole = record()
    waiting = [
        FootprintRow(name=r.name, point=r.point, seed=r.seed, folder=r.folder, config_hash=r.config_hash, settings={},
                     status="failed" if k == 0 else "waiting", reason="<b>x</b>" if k == 0 else "")
        for k, r in enumerate(whole.rows)
    ]  # fmt: skip
    html = render_html(conclude(whole.model_copy(update={"rows": waiting})))

    assert "Nothing is measured yet" in html and "<svg" not in html and "<b>x</b>" not in html
    assert "waiting" in html and html.count("cannot be told") >= 4


def test_the_csv_has_every_run_at_full_precision() -> None:
    study = record()
    rows = list(csv.DictReader(io.StringIO(footprint_csv(study))))

    assert [r["name"] for r in rows] == [r.name for r in study.rows]
    c2 = next(r for r in rows if r["name"] == "C2_s2")
    assert float(c2["eval.loss"]) == 0.540 + 0.01 and float(c2["eval.loss.low"]) == 0.55 - 0.03
    assert (c2["role"], c2["on_frontier"], c2["answer.accuracy.correct"]) == ("near", "True", "")


def test_a_page_has_no_script_and_no_network() -> None:
    html = render_html(record(name="</title><script>alert(1)</script>"))

    assert "<script" not in html and "http" not in html.replace("http-equiv", "") and "default-src 'none'" in html
