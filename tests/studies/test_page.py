"""A sweep's page: best first, flagged runs marked, numbers where they belong, nothing that can act."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.studies.test_score import SEED

from beholder.evidence import Measurement
from beholder.report.plots import round_steps_around
from beholder.studies.page import render_html, render_markdown, render_sweep
from beholder.studies.record import Row, SweepRecord, summary_csv
from beholder.studies.score import Entry, flags, rank, score
from beholder.types import UserError


def measured(value: float, half: float = 0.02, **more: object) -> Measurement:
    fields = {"name": "eval.loss", "unit": "nats/token", "better": "lower", "n": 256} | more
    return Measurement.model_validate({**fields, "value": value, "ci95": (value - half, value + half)})


def record(seeds: Sequence[int] = (), spread: float = 0.0, **changes: object) -> SweepRecord:
    """The seed's table as a sweep; with ``seeds``, each run again with its score ``spread`` apart."""
    rows = []
    for name, loss, shuffle, zero in SEED:
        lr, ln = re.fullmatch(r"lr(.*)_ln(.)", name).groups()  # type: ignore[union-attr]
        for k, seed in enumerate(seeds or (42,)):
            here = loss + spread * k
            rows.append(
                Row(
                    name=f"{name}_s{seed}" if seeds else name, point=name, seed=seed, folder=name, config_hash="0" * 64,
                    settings={"train.lr.connector": float(lr), "model.connector.vision_ln": ln == "1"},
                    status="finished", eval_loss=measured(here), d_shuffle=measured(shuffle), d_zero=measured(zero),
                    buckets=(measured(here - 0.1, stratum="short", by="length"), measured(here + 0.1, stratum="long")),
                    score=score(here, shuffle, zero, 0.1), steps=2000, wall_s=1600.0,
                    flags=flags(d_shuffle=shuffle, d_shuffle_low=shuffle - 0.02, grid_median=0.73, collapsed_below=0.1),
                )
            )  # fmt: skip
    fields = {
        "name": "p11", "created": "2026-11-21T07:00:00+00:00", "seeds": list(seeds), "ablation_weight": 0.1,
        "grid": {"train.lr.connector": [5e-5, 1e-4, 2e-4], "model.connector.vision_ln": [False, True]},
        "collapsed_below": 0.1, "rows": rows,
        "ranking": rank([Entry(r.name, r.point, r.score, r.flags) for r in rows if r.score is not None]),
    }  # fmt: skip
    return SweepRecord(**(fields | changes))  # type: ignore[arg-type]


def text_rows(html: str) -> list[str]:
    """The rows of the page's first table as text."""
    table = html[html.index('<table id="runs">') : html.index("</table>")]
    return [" ".join(re.sub(r"<[^>]+>", " ", "<tr" + row).split()) for row in table.split("<tr")[2:]]


def test_the_record_survives_its_file(tmp_path: Path) -> None:
    sweep = record(seeds=(1, 2), spread=0.01)
    (tmp_path / "sweep.json").write_text(sweep.model_dump_json())

    assert SweepRecord.load(tmp_path) == sweep
    assert SweepRecord.load(tmp_path).rows[0].settings == {
        "train.lr.connector": 5e-5, "model.connector.vision_ln": False,
    }  # fmt: skip


@pytest.mark.parametrize(("text", "message"), [("{", "not the record of a sweep"), ("{}", "name: Field required")])
def test_a_damaged_record_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.json").write_text(text)

    with pytest.raises(UserError, match=message):
        render_sweep(tmp_path, tmp_path)
    with pytest.raises(UserError, match=r"beholder sweep CONFIG writes it"):
        SweepRecord.load(tmp_path / "nothing")


def test_the_best_run_comes_first_and_the_flagged_one_last_and_marked() -> None:
    html, markdown = render_html(record()), render_markdown(record())

    rows = text_rows(html)
    assert rows[0].startswith("1 lr1e-4_ln1 best 1e-4 on 3.4207 3.6753 3.6553 … 3.6953")
    assert rows[-1].startswith("6 lr2e-4_ln0 do not use: collapsed 2e-4 off 3.7672 3.9106")
    assert sum("do not use" in r for r in rows) == 1
    assert "lr1e-4_ln1 is lowest, untested" in html and "the spread is unknown" in html
    lines = [line for line in markdown.splitlines() if line.startswith("| ")][2:]
    assert "lr1e-4\\_ln1" in lines[0] and "| 3.4207 |" in lines[0] and lines[-1].endswith("| collapsed |")


def test_every_run_is_drawn_and_flagged_ones_otherwise() -> None:
    html = render_html(record())

    svg = html[html.index("<svg") : html.index("</svg>")]
    assert svg.count("<circle") == 5 and svg.count('class="cross"') == 1
    assert sorted(re.findall(r'class="label"[^>]*>(\d+)<', svg)) == list("123456")
    assert html.count('class="seg shuffled"') == 6 and html.count('class="bar flagged-bar"') == 1
    for title in ("loss with the own one", "held-out loss, nats per token", "Δshuffle, nats per token"):
        assert title in html


def test_repeats_show_the_spread_and_a_tie_names_both() -> None:
    close, apart = render_html(record(seeds=(1, 2), spread=0.05)), render_html(record(seeds=(1, 2), spread=0.001))

    assert "A tie: lr1e-4_ln1, lr5e-5_ln0" in close and 'class="tie"' in close and 'class="best">best' not in close
    assert "lr1e-4_ln1 wins" in apart and 'class="best">best' in apart and 'class="tie"' not in apart
    assert "Points over their repeats" in close and "Points over their repeats" not in render_html(record())


def test_a_failed_run_and_an_empty_sweep_still_have_a_page() -> None:
    whole = record()
    failed = whole.rows[0].model_copy(
        update={"status": "failed", "reason": "<b>x</b>", "score": None, "eval_loss": None, "d_shuffle": None,
                "d_zero": None, "buckets": (), "flags": (), "steps": None, "wall_s": None}
    )  # fmt: skip
    html = render_html(whole.model_copy(update={"rows": [*whole.rows[1:], failed], "warnings": ("<b>x</b> failed",)}))
    none = render_html(whole.model_copy(update={"rows": [failed], "ranking": rank([])}))

    assert "failed" in text_rows(html)[-1] and "<b>x</b>" not in html
    assert "No winner" in none and "<svg" not in none


def test_a_single_length_bucket_is_not_told_twice() -> None:
    whole = record()
    one = [r.model_copy(update={"buckets": r.buckets[:1]}) for r in whole.rows]

    assert "loss, short" in render_html(whole)
    assert "loss, short" not in render_html(whole.model_copy(update={"rows": one}))


def test_the_csv_has_every_number_at_full_precision() -> None:
    head, first, *_ = summary_csv(record()).splitlines()

    assert head == (
        "name,train.lr.connector,model.connector.vision_ln,seed,eval_loss_end,eval_loss_short,eval_loss_long,d_shuffle,"
        "d_shuffle_low,d_shuffle_high,d_zero,d_noise,score,flags,steps,wall_s,status,config_hash"
    )
    cells = dict(zip(head.split(","), first.split(","), strict=True))
    assert cells["d_noise"] == "" and float(cells["score"]) == score(3.6957, 0.8309, 1.8127, 0.1)
    assert float(cells["d_shuffle_low"]) == 0.8309 - 0.02


@given(st.floats(-1e4, 1e4), st.floats(1e-6, 1e4))
def test_ticks_are_equally_spaced_round_and_enclose(low: float, width: float) -> None:
    ticks = round_steps_around(low, low + width)

    slack = 1e-6 * max(abs(low), width, 1)
    assert ticks[0] <= low + slack and ticks[-1] >= low + width - slack
    assert 2 <= len(ticks) <= 9
    gaps = [b - a for a, b in pairwise(ticks)]
    assert max(gaps) - min(gaps) <= slack


def test_a_page_has_no_script_and_no_network() -> None:
    html = render_html(record(name="</title><script>alert(1)</script>"))

    assert "<script" not in html and "http" not in html.replace("http-equiv", "") and "default-src 'none'" in html
