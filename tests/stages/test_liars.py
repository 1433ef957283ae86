"""An honest run passes its gates; whoever does not look at the image fails them, whatever its loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from beholder.config import RunConfig
from beholder.config.file import load_config, parse_config
from beholder.evidence import Evidence
from beholder.model.vision import VisionTower
from beholder.prepare.tiny import COLOURS, colour_set, tiny_llm, tiny_vision
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
        base: dict[str, Any] = {
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
        if "stage" in sets:
            del base["eval"]["qa_samples"]  # only captions are made into questions
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


@pytest.fixture
def asking(recipe: Recipe) -> Recipe:
    """As `recipe`, of stage instruct: what colour it is, and whether that is a warm one, from an empty connector on."""
    cfg = recipe("folder")
    for source in (*cfg.data.train_sources, *cfg.data.eval_sources):
        lines: list[str] = []
        for k, line in enumerate(Path(source.json_path).read_text(encoding="utf-8").splitlines()):
            record = json.loads(line)
            colour = next(word for word in record["caption"].split() if word in COLOURS)
            warm = "yes" if colour in ("red", "yellow", "pink", "brown") else "no"
            asked, answer = (("what color is it?", colour), ("is it a warm color?", warm))[k % 2]
            turns = [{"role": "user", "content": f"<image>\n{asked}"}, {"role": "assistant", "content": answer}]
            kind = ("color", "yes/no")[k % 2]
            lines.append(json.dumps(
                {"id": record["id"], "images": record["images"], "messages": turns, "question_type": kind}
            ))  # fmt: skip
        _questions_of(source.json_path).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def make(name: str, **sets: object) -> RunConfig:
        own = {"stage": "instruct", "model.lora.enable": True, "train.lr.lora": 3e-3, "eval.answer_tokens": 6}
        for part, sources in (("sources", cfg.data.train_sources), ("eval_sources", cfg.data.eval_sources)):
            own[f"data.{part}"] = [
                {"json_path": str(_questions_of(s.json_path)), "image_root": s.image_root} for s in sources
            ]
        own |= {"eval.caption_samples": 80, "train.train_steps": 80, "eval.audit_turns": 0}
        return recipe(name, **(own | sets))

    return make


def _questions_of(records: str) -> Path:
    return Path(records).with_name(f"{Path(records).stem}_questions.jsonl")


def _value(evidence: Evidence | None, name: str) -> float:
    assert evidence is not None
    found = evidence.get(name)
    assert found is not None, name
    return found.value


def test_a_model_that_answers_from_the_questions_wording_is_right_about_no_pair_and_fails_by_name(
    asking: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: VisionTower, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), self.geometry.num_patches, self.geometry.d_vision)

    monkeypatch.setattr(VisionTower, "forward", broken)
    evidence = run_stage(asking("wording", **{"features.enabled": False})).evidence

    assert "learned" not in failed(evidence) and _value(evidence, "answer.accuracy.correct") > 0.2
    assert _value(evidence, "pairs.right.correct") == 0
    assert "pairs_right" in failed(evidence)
    # it reads the question and nothing else
    assert _value(evidence, "cells.delta.question") > 1 and abs(_value(evidence, "cells.delta.image")) < 1e-3


@pytest.mark.slow
def test_an_honest_model_is_right_about_the_pairs_of_every_question(asking: Recipe) -> None:
    evidence = run_stage(asking("honest_answers", **{"train.train_steps": 140})).evidence

    assert not failed(evidence) & {"pairs_right", "answers_look", "answers_look_closely", *LOOKS}
    assert evidence is not None
    for kind in ("color", "yes/no questions"):
        own = evidence.get("pairs.right.correct", kind)
        assert own is not None and own.ci95 is not None and own.ci95[0] > 0.25
    assert _value(evidence, "pairs.right.none") == 0 and _value(evidence, "pairs.prior") < 0.25
    assert _value(evidence, "cells.delta.question") > 1 and _value(evidence, "cells.delta.image") > 0.3
    assert _value(evidence, "blind.share") < 0.7 and _value(evidence, "blind.gain") > 0.3


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
