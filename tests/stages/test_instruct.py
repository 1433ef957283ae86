"""Stage instruct from a stage-1 run to evidence, in this process, on tiny real parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import MakeConfig, TinyParts
from tests.evidence.test_catalogue import strangers
from tests.stages.conftest import settings
from tests.stages.dying import dying_at
from tests.stages.torchrun import on_two_processes

from beholder.config import RunConfig
from beholder.config.file import dump_config
from beholder.evidence import Evidence, load_evidence
from beholder.model.build import build_vlm
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.stages.remeasure import evaluate_run
from beholder.train import checkpoint, restore
from beholder.types import Status, UserError
from beholder.use.vlm import load

FILES = ("adapter_model.safetensors", "connector.safetensors", "optimizer.safetensors")


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


def test_everything_that_is_measured_is_in_the_catalogue(evidence: Evidence) -> None:
    assert strangers([*evidence.baseline, *evidence.measurements]) == []


def test_both_parts_of_what_learns_really_moved(finished: Path) -> None:
    early, late = (finished / "checkpoints" / f"step_{n}" for n in (2, 4))

    for name in FILES[:2]:
        before, after = load_file(early / name), load_file(late / name)
        assert before.keys() == after.keys() and all((before[k] != after[k]).any() for k in before), name


def test_evidence_tells_answers_with_and_without_the_image_in_every_condition(evidence: Evidence) -> None:
    for name in (
        "answer.accuracy.correct", "answer.accuracy.shuffled", "answer.accuracy.none", "answer.gain.none",
        "answer.gain.shuffled", "instruct.score.correct", "instruct.relevance.none", "instruct.completeness.shuffled",
        "instruct.coherence.correct", "instruct.gain.none", "pope.yes_rate.correct", "retention.loss",
        "retention.loss_base", "retention.loss_ratio", "retention.kl", "merge.max_logit_diff",
        "merge.changed_pct", "merge.tokens_changed_pct", "ablation.delta.shuffled",
        "ablation.delta.zero", "ablation.delta.noise", "learn.delta", "audit.trained.leak",
    ):  # fmt: skip
        assert evidence.get(name) is not None, name
    assert [c.step for c in evidence.candidates] == [2, 4], "what is saved may be the best"
    assert {g.name for g in evidence.gates} >= {"retained", "answers_look", "merges", "text_unchanged", "frozen"}
    assert evidence.samples[0].question and evidence.samples[0].reference
    assert {p.condition for p in evidence.samples[0].predictions} >= {"correct", "none"}


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
    _interrupt(instruct(tmp_path))
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_2"]

    outcome = run_stage(instruct(tmp_path), promote_anyway=True)

    assert outcome.status == Status.SUCCEEDED
    assert losses_of(run) == losses_of(finished)
    assert hashes(run, 4) == hashes(finished, 4)


def _interrupt(cfg: RunConfig) -> None:
    """The run dies after its third step."""
    with dying_at(3):
        run_stage(cfg, promote_anyway=True)


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


def test_layers_are_not_kept_of_images_that_augmentation_changes(instruct: MakeConfig, tmp_path: Path) -> None:
    """No sample's key would come twice: the store would fill to its cap and never be read."""
    run_stage(instruct(tmp_path, **{
        "model.connector.trainable": False, "model.lora.llm_layers": "last-1", "model.lora.dropout": 0.0,
        "features.layers": True, "data.augment": "random_crop", "train.train_steps": 2, "eval.golden_size": 0,
        "eval.caption_samples": 0, "eval.audit_turns": 0, "eval.answer_tokens": 64,
    }), promote_anyway=True)  # fmt: skip

    gaps = load_evidence(tmp_path / "run").gaps
    assert any(g.startswith("Layers: what goes into them was not kept, because data.augment changes") for g in gaps)


@pytest.mark.parametrize(
    "steps", [pytest.param(6, id="one pass"), pytest.param(40, id="several passes", marks=pytest.mark.slow)]
)
def test_a_run_that_keeps_what_goes_into_its_layers_is_the_plain_one(
    instruct: MakeConfig, tmp_path: Path, steps: int
) -> None:
    """Bit for bit in the first pass. Later a sample comes with other neighbours than when its row was kept, and sums
    over matrices of another height may round otherwise."""
    runs = {}
    for kept in (False, True):
        run_stage(instruct(tmp_path / str(kept), **{
            "model.connector.trainable": False, "model.lora.llm_layers": "last-1", "features.layers": kept,
            "train.train_steps": steps, "train.save_every": 1000, "train.full_eval_every": "end",
            "eval.golden_size": 0, "eval.caption_samples": 4, "eval.audit_turns": 0,
        }), promote_anyway=True)  # fmt: skip
        run = tmp_path / str(kept) / "run"
        runs[kept] = (losses_of(run), hashes(run, steps), load_evidence(run).cost)

    plain, kept = runs[False], runs[True]
    if steps == 6:
        assert plain[2].epochs < 1 and kept[0] == plain[0] and kept[1] == plain[1]
    else:
        assert plain[2].epochs > 2 and [x for _, x in kept[0]] == pytest.approx([x for _, x in plain[0]], rel=1e-5)


def test_a_run_at_less_strength_trains_the_same_weights_and_uses_less_of_them(
    instruct: MakeConfig, finished: Path, tmp_path: Path
) -> None:
    cfg = instruct(tmp_path, **{"model.lora.strength": 0.5})
    _interrupt(cfg)
    run_stage(cfg, promote_anyway=True)

    run = tmp_path / "run"
    assert losses_of(run) == losses_of(finished) and hashes(run, 4) == hashes(finished, 4)
    weaker, full = load_evidence(run), load_evidence(finished)
    kl = [e.get("retention.kl") for e in (weaker, full)]
    assert kl[0] is not None and kl[1] is not None and 0 < kl[0].value < kl[1].value
    assert (weaker.adapter_strength, full.adapter_strength) == (0.5, 1.0)
    written = json.loads((run / "checkpoints" / "step_4" / "adapter_config.json").read_text())
    assert written["lora_alpha"] == 16  # of 32
    assert "Used at 0.5 of the strength" in (run / "report.html").read_text(encoding="utf-8")
    assert load(str(run)).model.language.train(False).part.adapted[0].scaling["default"] == 16 / 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # peft asks transformers by the old name
def test_the_adapter_folder_is_what_peft_loads_on_the_base(
    finished: Path, instruct: MakeConfig, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    cfg = instruct(tmp_path)
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=torch.device("cpu"), seed=cfg.seed)
    where = checkpoint.resolve_checkpoint(finished)
    restore.load_adapters(where, model.parts())
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_run_the_stage_of_one(instruct: MakeConfig, tmp_path: Path) -> None:
    """Same samples, same losses up to the order of sums, the same best checkpoint, and one evidence."""
    sets = {"model.lora.dropout": 0.0, "train.full_eval_every": 2, "ablation.run_every": "end"}
    one, two = instruct(tmp_path / "one", **sets), instruct(tmp_path / "two", **sets)
    config = tmp_path / "two.yaml"
    config.write_text(dump_config(two), encoding="utf-8")
    run_stage(one, promote_anyway=True)

    done = on_two_processes("run", config, "--promote-anyway")

    assert "exitcode  : 3" in done.stderr, done.stdout + done.stderr  # four steps on random parts pass no gates
    a, b = (load_evidence(tmp_path / name / "run") for name in ("one", "two"))
    for (step, alone), (same, shared) in zip(
        losses_of(tmp_path / "one/run"), losses_of(tmp_path / "two/run"), strict=True
    ):
        assert step == same and shared == pytest.approx(alone, rel=1e-4)  # sums in another order, then AdamW's division
    assert [c.step for c in b.candidates] == [c.step for c in a.candidates] and b.step == a.step
    for name in ("eval.loss", "retention.loss", "ablation.delta.shuffled"):
        (x, y) = (e.get(name) for e in (a, b))
        assert x is not None and y is not None and y.n == x.n and y.value == pytest.approx(x.value, rel=1e-3, abs=1e-4)
    assert [s.id for s in b.samples] == [s.id for s in a.samples]


@pytest.mark.parametrize("more", [
    {"stage": "instruct"}, {"stage": "align", "prompting.template": "chat", "data.hygiene.min_tokens": 1},
], ids=["instruct", "align"])  # fmt: skip
def test_a_run_without_adapters_has_the_learner_and_its_blind_answers_all_the_same(
    instruct: MakeConfig, tmp_path: Path, more: dict[str, object]
) -> None:
    evidence = run_stage(
        instruct(
            tmp_path,
            **more,
            **{"model.lora": {"enable": False}, "train.lr": {"connector": 1e-3}, "eval.audit_turns": 0},
        ),
        promote_anyway=True,
    ).evidence

    assert evidence is not None and evidence.adapters == []
    for name in ("learner.accuracy", "blind.told", "blind.gain", "cells.delta.question"):
        assert evidence.get(name) is not None, name
    assert evidence.get("blind.base") is None and evidence.get("blind.leak") is None
    assert any(gap.startswith("What the base answers blind: not measured, there are no ad") for gap in evidence.gaps)


@pytest.mark.slow
def test_what_the_run_it_started_from_could_do_is_compared_on_the_same_questions(
    instruct: MakeConfig, finished: Path, evidence: Evidence, tmp_path: Path
) -> None:
    """At that run's own strength, whatever this one's is; the same weights keep everything."""
    gate = {"gates.one_kept": {"measure": "answer.kept", "at_least": -0.01}}
    assert evidence.get("answer.kept") is None, "an alignment answers no questions"
    idle = {"train.train_steps": 1, "train.lr.connector": 0.0, "train.lr.lora": 0.0, "eval.audit_turns": 0}
    start = {"model.connector.load_checkpoint": str(finished)}

    same = run_stage(instruct(tmp_path / "same", **idle, **start, **gate), promote_anyway=True).evidence
    weaker = {"model.lora.strength": 0.01}
    less = run_stage(instruct(tmp_path / "less", **idle, **start, **weaker), promote_anyway=True).evidence
    fresh = {"model.lora.adapters": "fresh"}
    anew = run_stage(instruct(tmp_path / "anew", **idle, **start, **fresh, **gate), promote_anyway=True).evidence

    assert same is not None and less is not None and anew is not None
    kept = same.get("answer.kept")
    assert kept is not None and (kept.value, kept.n) == (0, 12) and "paired" in (kept.caveat or "")
    assert next(g for g in same.gates if g.name == "one_kept").passed
    before = {r: json.loads((tmp_path / r / "run/baseline.json").read_text()) for r in ("same", "less")}
    assert [x["nll"] for x in before["less"]["start"]] == pytest.approx([x["nll"] for x in before["same"]["start"]])
    assert before["less"]["start"] != before["less"]["untrained"]
    assert any("were dropped (model.lora.adapters: fresh)" in gap for gap in anew.gaps)
    assert not next(g for g in anew.gates if g.name == "one_kept").passed, "a setting waives no gate"


def test_long_answers_are_judged_by_their_loss_and_the_gates_on_answers_step_back(
    instruct: MakeConfig, questions: Path, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    records = [json.loads(line) for line in questions.read_text(encoding="utf-8").splitlines()]
    for record in records:
        answer = record["messages"][1]
        answer["content"] = f"I think that what you see there is {answer['content']}."
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")

    evidence = run_stage(
        instruct(tmp_path, **{"data.json_path": str(path), "data.image_root": str(tiny_parts.images)}),
        promote_anyway=True,
    ).evidence

    assert evidence is not None and evidence.get("answer.accuracy.correct") is None
    assert evidence.get("instruct.score.correct") is not None, "how they follow is told of sentences too"
    assert not {g.name for g in evidence.gates} & {"answers_look", "answers_look_closely"}
    assert any(gap.startswith("Gate answers_look: not judged") for gap in evidence.gaps)
    for what in ("Contrast pairs", "Two kinds of blindness"):
        assert any(gap.startswith(f"{what}: not measured, no held-out answer is short") for gap in evidence.gaps)
    assert evidence.get("ablation.delta.shuffled") is not None


def test_a_frozen_connector_stays_as_it_was_loaded_and_resumes(
    instruct: MakeConfig, aligned: Path, tmp_path: Path
) -> None:
    cfg = instruct(tmp_path, **{"model.connector.trainable": False, "train.train_steps": 2})

    evidence = run_stage(cfg, promote_anyway=True).evidence

    assert evidence is not None
    row = next(r for r in evidence.trainable if r.part == "connector")
    assert row.trainable == 0 and row.intact is True
    before = load_file(checkpoint.resolve_checkpoint(aligned) / "connector.safetensors")
    after = load_file(tmp_path / "run" / "checkpoints" / "step_2" / "connector.safetensors")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert evaluate_run(str(tmp_path / "run")).step == 2


# ---------------------------------------------------------------------------------------------------------------
# Afterwards


def edited(run: Path, folder: Path, old: str, new: str) -> Path:
    copy = folder / "copy"
    shutil.copytree(run, copy)
    config = (copy / "config.yaml").read_text(encoding="utf-8")
    assert old in config
    (copy / "config.yaml").write_text(config.replace(old, new, 1), encoding="utf-8")
    return copy


def test_a_run_whose_template_is_another_now_is_refused_unless_the_call_says_how_to_prompt(
    finished: Path, tmp_path: Path
) -> None:
    copy = edited(finished, tmp_path, "  system: null\n", "  system: Be brief.\n")

    with pytest.raises(UserError, match="not what the run was trained with"):
        load(copy, device="cpu")

    assert load(copy, device="cpu", overrides=["prompting.system=Be brief."]).step == 4


def test_a_run_folder_is_no_consent_to_run_code(finished: Path, tmp_path: Path) -> None:
    copy = edited(finished, tmp_path, "trust_remote_code: false", "trust_remote_code: true")

    for use in (lambda: load(copy, device="cpu"), lambda: evaluate_run(str(copy))):
        with pytest.raises(UserError, match="runs code that comes with the model"):
            use()


def test_the_merged_folder_loads_without_peft_and_says_the_same(finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    vlm = load(finished, device="cpu")
    ids = torch.tensor([vlm.tokenizer("what color is it?")["input_ids"]])

    vlm.save_merged(tmp_path / "merged")

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        theirs = plain(input_ids=ids, use_cache=False).logits
    # fp32: one rounding of each weight by the merge, sums in another order.
    torch.testing.assert_close(vlm.model.text_logits(ids), theirs, rtol=1e-4, atol=1e-4)
