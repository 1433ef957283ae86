"""Runs side by side: what differs, what cannot be compared, and that each form of the comparison says so."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from beholder.config.file import dump_config, parse_config
from beholder.evidence import Evidence, GateResult, Measurement
from beholder.report.compare import Comparison, compare_runs
from beholder.types import Status, UserError

CONFIG = """
run_name: a
model:
  llm: {name_or_path: parts/llm}
  vision: {name_or_path: parts/vision}
data: {json_path: train.jsonl, image_root: images, eval_size: 400}
train: {train_steps: 100}
"""


def config(*sets: str) -> str:
    return dump_config(parse_config(CONFIG, "config", sets))


def loss(value: float, half: float = 0.01, **more: Any) -> Measurement:
    fields: dict[str, Any] = {"unit": "nats/token", "better": "lower", "n": 400, "ci95": (value - half, value + half)}
    return Measurement(name="eval.loss", value=value, **(fields | more))


def gate(passed: bool, value: float | None, bound: str = "> 1.05", **more: Any) -> GateResult:
    fields: dict[str, Any] = {
        "name": "looks_clearly", "why": "it looks", "end": "low", "measure": "ablation.ratio.shuffled",
    }  # fmt: skip
    return GateResult(passed=passed, value=value, bound=bound, **(fields | more))


Write = Callable[..., Path]


@pytest.fixture
def write(make_evidence: Callable[..., Evidence], tmp_path: Path) -> Write:
    """``write(name, held_out=ids, field=value, …)``: a run folder with that evidence."""

    def make(name: str, *, held_out: list[str] | None = None, **changes: Any) -> Path:
        folder = tmp_path / name
        (folder / "splits").mkdir(parents=True)
        evidence = make_evidence(
            **({"run_name": name, "config_yaml": config(f"run_name={name}"), "gates": []} | changes)
        )
        (folder / "evidence.json").write_text(evidence.to_json(), encoding="utf-8")
        split = {"eval": [{"id": i} for i in held_out or []]}
        (folder / "splits" / "split_seed42_eval400.json").write_text(json.dumps(split))
        return folder

    return make


def forms(c: Comparison) -> dict[str, str]:
    """What every form shows, as plain text."""
    console = Console(file=io.StringIO(), width=400)
    c.print(console)
    assert isinstance(console.file, io.StringIO)
    html = re.sub(r"<style>.*?</style>", "", c.to_html(), flags=re.S)
    return {
        "html": re.sub(r"<[^>]+>", "", html).replace("&gt;", ">"),
        "markdown": c.to_markdown().replace("\\", "").replace("&gt;", ">"),
        "terminal": console.file.getvalue(),
        "json": json.dumps(c.to_json(), ensure_ascii=False),
    }


def test_the_same_run_twice_under_two_names_differs_in_nothing(write: Write) -> None:
    c = compare_runs([write("a", held_out=["1"]), write("b", held_out=["1"])])

    assert c.names == ["a", "b"] and c.settings == () and c.warnings == () and c.only_in == {}
    for row in c.measurements:
        assert row.values[0] == row.values[1]
        assert row.mark(0) == "" and row.mark(1) in ("", "≈")


def test_settings_measurements_and_gates_stand_side_by_side_in_every_form(write: Write) -> None:
    first = write(
        "a",
        held_out=["1"],
        measurements=[loss(0.50), loss(0.25, stratum="short", by="length")],
        gates=[gate(True, 1.31)],
    )
    second = write(
        "b", held_out=["1"], config_yaml=config("run_name=b", "train.lr.connector=0.002", "train.train_steps=200"),
        measurements=[loss(0.30), Measurement(name="chair.s.correct", value=0.123, unit="share", better="lower", n=9)],
        gates=[gate(False, None)],
    )  # fmt: skip

    c = compare_runs([first, second])

    assert {s.path: s.values for s in c.settings} == {
        "train.lr.connector": (1e-4, 0.002), "train.train_steps": (100, 200),
    }  # fmt: skip
    assert [m.key for m in c.measurements] == ["eval.loss"] and c.measurements[0].mark(1) == "▲"
    assert c.only_in == {"a": ("eval.loss/short",), "b": ("chair.s.correct",)}
    assert [r and r.passed for r in c.gates[0].results] == [True, False]
    for form, text in forms(c).items():
        for shown in ("train.lr.connector", "0.002", "200", "looks_clearly", "> 1.05", "1.31", "eval.loss",
                      "eval.loss/short", "chair.s.correct", "▲"):  # fmt: skip
            assert shown in text, (form, shown)
        if form != "json":
            assert "0.300" in text and "passed: 1.31" in text and "FAILED: not measured" in text, form


@pytest.mark.parametrize(
    ("value", "half", "mark"), [(0.30, 0.01, "▲"), (0.70, 0.01, "▼"), (0.505, 0.01, "≈"), (0.9, None, "")]
)
def test_a_mark_needs_intervals_that_are_apart(write: Write, value: float, half: float | None, mark: str) -> None:
    other = loss(value, half) if half else loss(value, ci95=None)

    c = compare_runs([write("a", measurements=[loss(0.5)]), write("b", measurements=[other])])

    assert c.measurements[0].mark(1) == mark


def test_a_higher_score_is_better_where_higher_is_better(write: Write) -> None:
    rows = [Measurement(name="x", value=v, unit="score", better="higher", n=9, ci95=(v, v)) for v in (0.1, 0.2)]

    c = compare_runs([write("a", measurements=rows[:1]), write("b", measurements=rows[1:])])

    assert c.measurements[0].mark(1) == "▲"


def changed(e: Callable[..., Evidence], **data: Any) -> Any:
    return e().data.model_copy(update=data)


def test_other_data_other_held_out_samples_and_unfinished_runs_are_warned_of(
    write: Write, make_evidence: Callable[..., Evidence]
) -> None:
    c = compare_runs([
        write("a", held_out=["1", "2"], measurements=[loss(0.5)]),
        write(
            "b", held_out=["1", "3"], data=changed(make_evidence, fingerprint="f" * 64), status=Status.CANCELLED,
            measurements=[loss(0.1)],
        ),
    ])  # fmt: skip

    told = " ".join(c.warnings)
    assert "held-out samples differ (not the same ids, texts and pictures)" in told
    assert "training data differ" in told and "Not finished: b (cancelled)" in told
    assert c.measurements[0].mark(1) == "", "numbers of other samples are neither better nor worse"
    for form, text in forms(c).items():
        assert "not comparable" in text, form


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (("seed=7",), "the split's seed"),
        (("data.split_seed=7",), "the split's seed"),
        (("data.hygiene.min_tokens=3",), "data.hygiene.min_tokens"),
        (("train.train_steps=7",), None),
        (("seed=7", "data.split_seed=42"), None),
    ],
)
def test_without_a_list_of_held_out_samples_the_settings_say_whether_they_are_the_same(
    write: Write, sets: tuple[str, ...], why: str | None
) -> None:
    c = compare_runs([write("a"), write("b", config_yaml=config("run_name=b", *sets))])

    found = [w for w in c.warnings if "held-out samples differ" in w]
    assert found == [] if why is None else why in found[0]


@pytest.mark.parametrize(
    ("hashes", "listed", "differ"),
    [
        (("a" * 64, "b" * 64), (["1"], ["1"]), True),  # the same ids, other pictures
        (("a" * 64, "a" * 64), (["1"], ["2"]), False),
        (("a" * 64, ""), (["1"], ["1"]), False),  # an older record: its split file is all there is
        (("a" * 64, ""), (["1"], ["2"]), True),
    ],
)
def test_the_evidences_own_hash_of_its_held_out_samples_decides_when_all_have_one(
    write: Write, make_evidence: Callable[..., Evidence], hashes: Any, listed: Any, differ: bool
) -> None:
    runs = [
        write(name, held_out=ids, data=changed(make_evidence, held_out_sha256=which))
        for name, which, ids in zip("ab", hashes, listed, strict=True)
    ]

    assert any("held-out samples differ" in w for w in compare_runs(runs).warnings) == differ


def test_repeats_on_one_split_are_comparable(write: Write) -> None:
    runs = [
        write(n, config_yaml=config(f"run_name={n}", f"seed={s}", "data.split_seed=1")) for n, s in (("a", 1), ("b", 2))
    ]

    assert compare_runs(runs).warnings == ()


def test_other_tokenizers_are_warned_of(write: Write) -> None:
    c = compare_runs([write("a"), write("b", config_yaml=config("run_name=b", "model.llm.name_or_path=other/llm2"))])

    assert any("nats per token are not comparable" in w for w in c.warnings)


def test_another_number_of_held_out_samples_is_told_with_the_numbers(
    write: Write, make_evidence: Callable[..., Evidence]
) -> None:
    c = compare_runs([write("a"), write("b", data=changed(make_evidence, eval=64))])

    assert "there are 1,000 in a, 64 in b" in c.warnings[0]


def test_runs_of_one_name_go_by_their_folders(write: Write) -> None:
    first, second = write("x", run_name="same"), write("y", run_name="same")

    assert compare_runs([first, second]).names == [str(first), str(second)]


def test_a_config_of_another_version_is_compared_as_written(write: Write) -> None:
    c = compare_runs([write("a"), write("b", config_yaml="run_name: b\nold_setting: 5\n")])

    assert "b: its config is not one this version reads" in c.warnings[0]
    assert ("old_setting", (None, 5)) in [(s.path, s.values) for s in c.settings]


def test_three_runs_differ_where_any_two_do(write: Write) -> None:
    runs = [
        write("a"),
        write("b", config_yaml=config("run_name=b", "train.train_steps=7")),
        write("c", config_yaml=config("run_name=c", "train.log_every=3")),
    ]

    c = compare_runs(runs)

    assert {s.path: s.values for s in c.settings} == {
        "train.train_steps": (100, 7, 100), "train.log_every": (20, 20, 3),
    }  # fmt: skip


def test_a_gate_with_another_bound_shows_both(write: Write) -> None:
    c = compare_runs([write("a", gates=[gate(True, 2.0)]), write("b", gates=[gate(True, 2.0, "> 1.2")]), write("c")])

    assert c.gates[0].bound == "> 1.05 or > 1.2" and c.gates[0].results[2] is None


def test_text_of_others_cannot_act_on_a_page(write: Write) -> None:
    hostile = "<script>alert(1)</script>\u202e|"
    c = compare_runs([write("a", run_name=hostile), write("b")])

    html = c.to_html()
    assert "<script" not in html and "\u202e" not in html and "default-src 'none'" in html
    assert "<script" not in c.to_markdown().replace("\\<", "")


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "got 0 runs"), (["a"], "got 1 run to"), (["a", "a"], "named twice"), (["a", "nothing"], "no such file")],
)
def test_what_cannot_be_compared_is_refused(write: Write, tmp_path: Path, names: list[str], message: str) -> None:
    write("a")

    with pytest.raises(UserError, match=message):
        compare_runs([tmp_path / n for n in names])
