"""Stage instruct from a stage-1 run to evidence, in this process, on tiny real parts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import MakeConfig, TinyParts

from beholder.config import RunConfig
from beholder.evidence import Evidence, Status, load_evidence
from beholder.model.vlm import build_vlm
from beholder.remeasure import evaluate_run
from beholder.runs import sha256_file
from beholder.smoke import COLOURS, SHAPES
from beholder.stages import run_stage
from beholder.train import checkpoint
from beholder.types import UserError

FILES = ("adapter_model.safetensors", "connector.safetensors", "optimizer.safetensors")


@pytest.fixture(scope="module")
def questions(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question about each picture of the colour set: what shape, what colour, or a yes/no question."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = []
    for i, line in enumerate(tiny_parts.records.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        words = record["caption"].split()
        colour = next(w for w in words if w in COLOURS)
        shape = next(w for w in words if w in SHAPES or w in SHAPES.values())
        asked, answer, kind = [
            ("what shape is it?", shape, "shape"), ("what color is it?", colour, "color"),
            ("is it red?", "yes" if colour == "red" else "no", "yes/no"),
        ][i % 3]  # fmt: skip
        turns = [{"role": "user", "content": f"<image>\n{asked}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({
            "id": record["id"], "images": record["images"], "messages": turns, "question_type": kind,
        }))  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def aligned(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage align. Four steps on random parts pass no gates."""
    from tests.conftest import make_config

    folder = tmp_path_factory.mktemp("aligned")
    run_stage(make_config(tiny_parts, folder))
    return folder / "run"


def settings(questions: Path, aligned: Path) -> dict[str, object]:
    return {
        "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.lora.dropout": 0.1,
        "model.connector.load_checkpoint": str(aligned), "data.json_path": str(questions),
        "prompting.max_images_per_sample": 1, "train.lr.lora": 1e-2, "eval.answer_tokens": 6,
        "eval.caption_samples": 12,
    }  # fmt: skip


@pytest.fixture
def instruct(tiny_config: MakeConfig, questions: Path, aligned: Path) -> MakeConfig:
    """``instruct(folder, **{"train.train_steps": 3})``: stage instruct on tiny parts, from the finished alignment."""

    def make(folder: Path, **sets: object) -> RunConfig:
        return tiny_config(folder, **(settings(questions, aligned) | sets))

    return make


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def hashes(run: Path, step: int) -> dict[str, str]:
    return {name: sha256_file(run / "checkpoints" / f"step_{step}" / name) for name in FILES}


@pytest.fixture(scope="module")
def finished(tiny_parts: TinyParts, questions: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import make_config

    folder = tmp_path_factory.mktemp("instruct")
    run_stage(make_config(tiny_parts, folder, **settings(questions, aligned)), promote_anyway=True)
    return folder / "run"


@pytest.fixture(scope="module")
def evidence(finished: Path) -> Evidence:
    return load_evidence(finished)


def test_connector_and_adapters_learn_and_everything_else_is_bit_identical(evidence: Evidence) -> None:
    rows = {r.part: r for r in evidence.trainable}

    assert rows["connector"].trainable == rows["connector"].params > 0
    assert rows["lora"].trainable == rows["lora"].params > 0
    for frozen in ("vision", "language"):
        assert rows[frozen].trainable == 0 and rows[frozen].intact is True
    assert evidence.text_only is not None and evidence.text_only.equal  # adapters off = base
    assert sum(a.params for a in evidence.adapters) == rows["lora"].params
    assert {a.name.rpartition(".")[2] for a in evidence.adapters} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_both_parts_of_what_learns_really_moved(finished: Path) -> None:
    early, late = (finished / "checkpoints" / f"step_{n}" for n in (2, 4))

    for name in FILES[:2]:
        before, after = load_file(early / name), load_file(late / name)
        assert before.keys() == after.keys() and all((before[k] != after[k]).any() for k in before), name


def test_evidence_tells_answers_with_and_without_the_image_in_every_condition(evidence: Evidence) -> None:
    for name in (
        "answer.accuracy.correct", "answer.accuracy.shuffled", "answer.accuracy.none", "answer.gain.none",
        "answer.gain.shuffled", "pope.yes_rate.correct", "retention.loss", "retention.loss_base",
        "retention.loss_ratio", "retention.kl", "merge.max_logit_diff",
        "merge.changed_pct", "merge.answers_changed_pct", "ablation.delta.shuffled",
        "ablation.delta.zero", "ablation.delta.noise", "learn.delta", "audit.trained.leak",
    ):  # fmt: skip
        assert evidence.get(name) is not None, name
    assert {g.name for g in evidence.gates} >= {"retained", "answers_look", "merges", "text_unchanged", "frozen"}
    assert evidence.samples[0].question and evidence.samples[0].reference
    assert {p.condition for p in evidence.samples[0].predictions} >= {"correct"}


def test_stage_2_starts_from_the_connector_of_stage_1_and_not_from_scratch(
    instruct: MakeConfig, aligned: Path, tmp_path: Path
) -> None:
    run_stage(instruct(tmp_path, **{"train.train_steps": 1, "train.lr.connector": 0.0, "train.lr.lora": 0.0}),
              promote_anyway=True)  # fmt: skip

    before = load_file(checkpoint.resolve_checkpoint(aligned) / "connector.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step_1" / "connector.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_an_alignment_that_failed_its_gates_is_refused_and_said_when_promoted_anyway(
    instruct: MakeConfig, evidence: Evidence, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--promote-anyway"):
        run_stage(instruct(tmp_path))

    assert any("--promote-anyway" in gap for gap in evidence.gaps)


def test_resumed_with_dropout_in_the_adapters_equals_the_straight_run(
    instruct: MakeConfig, finished: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beholder.stages.Watch.on_step", _die_after_3)
        with pytest.raises(RuntimeError, match="planted"):
            run_stage(instruct(tmp_path), promote_anyway=True)
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_2"]

    outcome = run_stage(instruct(tmp_path), promote_anyway=True)

    assert outcome.status == Status.SUCCEEDED
    assert losses_of(run) == losses_of(finished)
    assert hashes(run, 4) == hashes(finished, 4)


def _die_after_3(watch: object, step: int, record: object) -> None:
    if step == 3:
        raise RuntimeError("planted")


def test_the_best_checkpoint_is_kept_named_measured_and_used_although_later_ones_are_worse(
    instruct: MakeConfig, questions: Path, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    files = {"train": records[:40], "test": records[40:]}
    for record in files["train"]:  # what is held out gets worse with every step that learns this
        record["messages"][1]["content"] = "zzzz"
    for name, part in files.items():
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in part), encoding="utf-8")
    images = str(tiny_parts.images)
    cfg = instruct(tmp_path, **{
        "data.json_path": str(tmp_path / "train"), "data.image_root": images, "data.eval_size": None,
        "data.eval_sources": [{"json_path": str(tmp_path / "test"), "image_root": images}],
        "train.train_steps": 8, "train.save_every": 1, "train.keep_checkpoints": 2, "train.full_eval_every": 1,
        "train.lr_scheduler": "constant", "train.lr.lora": 3e-2, "ablation.conditions": ["zero"],
        "eval.golden_size": 0,
    })  # fmt: skip

    run_stage(cfg, promote_anyway=True)

    run = tmp_path / "run"
    told = load_evidence(run)
    best = min(told.candidates, key=lambda c: (c.eval_loss, -c.step))
    assert best.best and best.step < 7
    assert told.step == best.step and told.cost.steps == 8
    loss = told.get("eval.loss")
    assert loss is not None and loss.value == pytest.approx(best.eval_loss, rel=1e-6)
    kept = {p.name for p in (run / "checkpoints").glob("step_*")}
    assert kept == {f"step_{best.step}", "step_7", "step_8"}
    assert checkpoint.resolve_checkpoint(run).name == f"step_{best.step}"
    again = evaluate_run(str(run))
    assert again.step == best.step and again.evidence is not None
    assert again.evidence.get("eval.loss") == loss


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks transformers by the old name
def test_the_adapter_folder_is_what_peft_loads_on_the_base(
    finished: Path, instruct: MakeConfig, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cfg = instruct(tmp_path)
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=torch.device("cpu"), seed=cfg.seed)
    where = checkpoint.resolve_checkpoint(finished)
    checkpoint.load_adapter(where, model.language)
    ids = torch.tensor([tokenizer("what color is it?")["input_ids"]])
    base = AutoModelForCausalLM.from_pretrained(cfg.model.llm.name_or_path, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, str(where)).eval()

    with torch.no_grad():
        theirs = adapted(input_ids=ids, use_cache=False).logits

    # Same weights and operations; our attention kernel orders its sums otherwise (1e-6 on fp32 logits of order 1).
    torch.testing.assert_close(model.text_logits(ids), theirs, rtol=1e-4, atol=1e-4)


def test_a_checkpoint_of_other_parts_is_refused_by_name(instruct: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.connector\.vision_ln"):
        run_stage(instruct(tmp_path, **{"model.connector.vision_ln": True}), promote_anyway=True)


def test_the_adapters_start_from_the_seed_alone(instruct: MakeConfig, tmp_path: Path) -> None:
    cfg = instruct(tmp_path)

    first, second = (
        build_vlm(cfg.model, compute_precision="fp32", device=torch.device("cpu"), seed=cfg.seed)[0] for _ in range(2)
    )

    one, two = (dict(m.named_parameters()) for m in (first, second))
    assert all(torch.equal(one[k], two[k]) for k in one)
