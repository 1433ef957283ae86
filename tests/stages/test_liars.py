"""An honest run passes its gates; whoever does not look at the image fails them, whatever its loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from beholder.config import RunConfig
from beholder.config.file import load_config, parse_config
from beholder.evidence import Evidence
from beholder.model.vision import VisionTower
from beholder.prepare.tiny import colour_set, tiny_llm, tiny_vision
from beholder.stages import run_stage

ROOT = Path(__file__).resolve().parents[2]
LOOKS = {"looks_shuffled", "looks_zero", "looks_noise", "looks_clearly", "looks_everywhere"}
Recipe = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """``recipe(name, **{"train.lr.connector": 0})``: a run that learns to name colours and shapes, in seconds."""
    folder = tmp_path_factory.mktemp("liars")
    records, images = colour_set(folder / "data", 320)
    lines = records.read_text(encoding="utf-8").splitlines()
    for name, part in (("train", lines[:240]), ("test", lines[240:])):
        (folder / f"{name}.jsonl").write_text("\n".join(part) + "\n", encoding="utf-8")
    # A larger initial scale than a model's own: random weights must tell their inputs apart to be of any use.
    llm, (vision, _) = tiny_llm(folder / "llm", initializer_range=0.3), tiny_vision(folder / "vision")

    def make(name: str, **sets: object) -> RunConfig:
        base = {
            "run_name": name, "output_dir": str(folder / name), "device": "cpu",
            "model": {
                "llm": {"name_or_path": str(llm), "precision": "fp32"},
                "vision": {"name_or_path": str(vision), "precision": "fp32"},
                "connector": {"num_visual_tokens": 8, "resampler": {"num_heads": 4, "dim": 64}},
            },
            "data": {
                "sources": [{"json_path": str(folder / "train.jsonl"), "image_root": str(images)}],
                "eval_sources": [{"json_path": str(folder / "test.jsonl"), "image_root": str(images)}],
            },
            "features": {"dir": str(folder / "features")},
            "train": {
                "train_steps": 200, "micro_batch_size": 16, "precision": "fp32", "lr": {"connector": 3e-3},
                "save_every": 1000, "log_every": 100, "num_threads": 1, "full_eval_every": "end",
            },
            "eval": {
                "golden_size": 0, "caption_samples": 32, "qa_samples": 0, "audit_turns": 32, "batch_size": 64,
            },
            "ablation": {"num_samples": 80},
        }  # fmt: skip
        return parse_config(yaml.safe_dump(base), name, [f"{k}={json.dumps(v)}" for k, v in sets.items()])

    return make


def failed(evidence: Evidence | None) -> set[str]:
    assert evidence is not None
    assert {g.name for g in evidence.gates} >= LOOKS
    return {g.name for g in evidence.failed_gates}


def test_an_honest_run_passes_every_gate(recipe: Recipe) -> None:
    # No connector makes a frozen language model of random weights write; what `describes` says of one that does is
    # tested where captions are scored.
    evidence = run_stage(recipe("honest", **{"gates.describes.enable": False})).evidence

    assert failed(evidence) == set() and evidence is not None and evidence.promotable


def test_an_untrained_connector_fails(recipe: Recipe) -> None:
    evidence = run_stage(recipe("untrained", **{"train.lr.connector": 0.0, "train.train_steps": 20})).evidence

    assert failed(evidence) >= {"learned", "settled", "looks_shuffled", "looks_clearly", "looks_everywhere"}


def test_a_connector_fed_with_constant_features_fails(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: VisionTower, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), self.geometry.num_patches, self.geometry.d_vision)

    monkeypatch.setattr(VisionTower, "forward", broken)
    evidence = run_stage(recipe("constant", **{"features.enabled": False, "train.train_steps": 60})).evidence

    assert failed(evidence) >= LOOKS
    assert evidence is not None
    delta, learned = evidence.get("ablation.delta.shuffled"), evidence.get("learn.delta")
    assert delta is not None and delta.value == pytest.approx(0, abs=1e-6)
    # It learned all the same: how the captions go, not what is in the picture. That is what the gates are for.
    assert learned is not None and learned.ci95 is not None and learned.ci95[0] > 1
    assert "learned" not in failed(evidence)


def test_a_run_with_shuffled_images_fails(recipe: Recipe) -> None:
    cfg = recipe("swapped")
    source = cfg.data.train_sources[0]
    records = [json.loads(line) for line in Path(source.json_path).read_text(encoding="utf-8").splitlines()]
    images = [r["images"] for r in records]
    random.Random(0).shuffle(images)
    wrong = Path(source.json_path).with_name("swapped.jsonl")
    lines = [json.dumps({**r, "images": other}) for r, other in zip(records, images, strict=True)]
    wrong.write_text("\n".join(lines) + "\n", encoding="utf-8")

    evidence = run_stage(
        recipe("swapped", **{"data.sources": [{"json_path": str(wrong), "image_root": source.image_root}]})
    ).evidence

    assert failed(evidence) >= {"looks_shuffled", "looks_clearly", "looks_everywhere"}
    assert "learned" not in failed(evidence)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_that_reads_earlier_turns_fails_and_the_audit_names_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted liar, on real parts: all questions about an image in one conversation.

    Its loss falls from 1.5 to 0.3 and another image makes it worse on average, so an average would pass it. But its
    yes/no answers come from what was said before: the group's ratio has 1 in its interval.
    """
    from beholder.prepare.packages import prepare

    prepare("quickstart", tmp_path / "data" / "quickstart")
    monkeypatch.chdir(tmp_path)
    cfg = load_config(ROOT / "configs" / "quickstart" / "liar.yaml")

    evidence = run_stage(cfg).evidence

    assert evidence is not None
    loss, start = evidence.get("eval.loss"), evidence.get_baseline("eval.loss")
    assert loss is not None and start is not None and loss.value < start.value / 3
    assert not failed(evidence) & {"learned", "looks_shuffled", "looks_clearly"}  # the average would pass it
    gate = next(g for g in evidence.gates if g.name == "looks_everywhere")
    assert not gate.passed and gate.stratum is not None
    assert any(finding.startswith("Leakage") for finding in evidence.findings), evidence.findings
