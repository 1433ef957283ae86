"""What is measured around the probes themselves: the shape of the loss curve, the seed's flat names, the bands."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from tests.conftest import MakeConfig

from beholder.evidence import load_evidence
from beholder.stages import run_stage
from beholder.stages.panel import late_share
from beholder.stages.remeasure import evaluate_run
from beholder.types import UserError


def test_a_loss_that_fell_early_and_stayed_has_almost_no_late_share() -> None:
    assert late_share([5 * math.exp(-step / 10) for step in range(200)]) == pytest.approx(0, abs=1e-4)


def test_a_loss_that_still_falls_in_a_straight_line_has_a_late_share_of_a_quarter() -> None:
    share = late_share([10 - 0.01 * step for step in range(1000)])

    assert share == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("losses", [[3.0] * 100, [2.0 + 0.01 * step for step in range(100)]])
def test_a_loss_that_did_not_fall_counts_as_all_late(losses: list[float]) -> None:
    assert late_share(losses) == 1.0


def test_a_loss_that_rose_at_the_end_has_no_late_share() -> None:
    assert late_share([5.0] * 10 + [1.0] * 80 + [2.0] * 10) == 0.0


def test_too_few_steps_say_nothing_about_a_curve() -> None:
    assert late_share([3.0, 2.0, 1.0]) is None and late_share([]) is None


def test_the_seeds_flat_names_are_in_the_metrics(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path, **{"data.split_mode": "stratified_len", "data.eval_size": 12}))

    flat = json.loads((tmp_path / "run" / "metrics.json").read_text())
    evidence = load_evidence(tmp_path / "run")
    for stratum in ("short", "medium", "long"):
        m = evidence.get("eval.loss", stratum)
        assert m is not None and flat[f"eval_loss_{stratum}"] == m.value and m.by == "length"
    assert flat["eval_loss"] == flat["eval.loss"]
    assert flat["eval_examples_total"] == 12 and flat["eval_truncated_pct"] == 0
    tokens = [evidence.get("eval.tokens", s) for s in (None, "short", "medium", "long")]
    assert all(m is not None for m in tokens)
    assert flat["eval_label_tokens_total"] == sum(m.value for m in tokens[1:] if m is not None)
    for seed_name, name in (("delta_shuffle", "shuffled"), ("delta_zero", "zero"), ("delta_noise", "noise")):
        assert flat[seed_name] == flat[f"ablation.delta.{name}"]


def test_bands_and_gains_are_what_they_say(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))

    e = load_evidence(tmp_path / "run")
    value = {m.name: m.value for m in e.measurements if m.stratum is None}
    baseline = e.get_baseline("eval.loss")
    assert baseline is not None and value["band.untrained"] == baseline.value
    assert value["learn.delta"] == pytest.approx(value["band.untrained"] - value["eval.loss"], rel=1e-6)
    assert value["learn.delta_text"] == pytest.approx(value["band.text_only"] - value["eval.loss"], rel=1e-6)
    assert value["band.uniform"] > 1
    # Random weights know nothing: without an image they are about as good as guessing evenly.
    assert value["band.text_only"] == pytest.approx(value["band.uniform"], rel=0.2)


def test_evaluate_judges_by_other_bounds_without_training(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))
    trained = (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"')

    lenient = evaluate_run(str(tmp_path / "run"), ["gates.learned.above=-100", "gates.looks_clearly.enable=false"])
    strict = evaluate_run(str(tmp_path / "run"), ["gates.learned.above=100"])

    gates = {g.name: g for g in (lenient.evidence.gates if lenient.evidence else [])}
    assert gates["learned"].passed and "looks_clearly" not in gates
    assert strict.evidence is not None and "learned" in {g.name for g in strict.evidence.failed_gates}
    assert (tmp_path / "run" / "metrics.jsonl").read_text().count('"loss"') == trained
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "succeeded"


def test_a_damaged_baseline_is_named(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))
    (tmp_path / "run" / "baseline.json").write_text('{"measurements": []}')

    with pytest.raises(UserError, match="damaged"):
        evaluate_run(str(tmp_path / "run"))
