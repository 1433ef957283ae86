"""Checkpoints with adapters: PEFT's own format, exact resume, and refusals that name the cause. Real tiny Qwen3."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import Tiny, exact_log, settings, train, vouch_for
from torch import Tensor

from beholder.model.adapters import adapter_tensors
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.tiny import tiny_llm
from beholder.runs import RunDir
from beholder.train.checkpoint import MANIFEST, problem, save_checkpoint
from beholder.train.optim import build_optimizer, optimizer_tensors
from beholder.train.restore import adapters_in, load_adapters, load_connector, load_for_resume, read_base, start_base
from beholder.types import UserError

LORA = {"r": 4, "alpha": 8, "dropout": 0.2}
RATES = {"lr": {"connector": 3e-3, "lora": 3e-3}}


def trained(tiny: Tiny, folder: Path, steps: int = 2, **model: Any) -> tuple[VisionLanguageModel, Path]:
    """A model with adapters after a few steps, and its checkpoint."""
    run = RunDir(folder)
    outcome = train(tiny, run, settings(**RATES), total_steps=steps, model=tiny.model(**{"lora": LORA, **model}))
    outcome.model.eval()
    return outcome.model, run.checkpoints / f"step_{steps}"


def weights(model: VisionLanguageModel) -> dict[str, Tensor]:
    adapters = {k: t.clone() for k, t in adapter_tensors(model.language.part).items()}
    return adapters | {k: t.clone() for k, t in model.connector.state_dict().items()}


def identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rewritten(folder: Path, model: VisionLanguageModel, **changes: Any) -> Path:
    """A checkpoint of the model with other entries in its adapter config."""
    parts = model.trained_state()
    parts["adapter"] = replace(parts["adapter"], facts={**parts["adapter"].facts, **changes})
    return save_checkpoint(folder, 1, parts, optimizer_state={}, trainer={}, keep=2)


def test_adapter_files_lie_flat_in_the_folder_and_are_in_the_manifest(tiny: Tiny, tmp_path: Path) -> None:
    _, path = trained(tiny, tmp_path)

    files = json.loads((path / MANIFEST).read_text())["files"]
    assert {"adapter_model.safetensors", "adapter_config.json"} < set(files) and adapters_in(path) == ["adapter"]
    assert {p.name for p in path.iterdir()} == {*files, MANIFEST}
    assert problem(path) is None
    (path / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in str(problem(path))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_peft_loads_the_step_folder_on_the_plain_base_and_gives_the_same_logits_bit_for_bit(
    tiny: Tiny, tmp_path: Path, strength: float
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model, path = trained(tiny, tmp_path, lora=LORA | {"strength": strength})
    ids = torch.arange(24).reshape(2, 12) + 30

    base = AutoModelForCausalLM.from_pretrained(str(tiny.llm), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(path)).eval()

    # The same attention on both sides; ours is another kernel, which rounds otherwise.
    model.language.model.set_attn_implementation("sdpa")
    with torch.no_grad():
        on = theirs(input_ids=ids).logits
        assert torch.equal(model.language.model(input_ids=ids).logits, on)
        with theirs.disable_adapter():
            assert not torch.equal(theirs(input_ids=ids).logits, on), "the adapters do nothing"


def test_adapters_reload_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    model, path = trained(tiny, tmp_path)
    fresh = tiny.model(lora=LORA, seed=99)

    load_adapters(path, fresh.parts())
    load_connector(path, fresh.connector, fresh.connector_info())

    assert identical(weights(fresh), weights(model))


def test_straight_run_equals_stopped_and_resumed_run_bit_for_bit_with_adapter_dropout(
    tiny: Tiny, tmp_path: Path
) -> None:
    cfg = settings(micro_batch_size=2, gradient_accum=2, save_every=2, keep_checkpoints=2, **RATES)
    straight = train(tiny, RunDir(tmp_path / "a"), cfg, total_steps=5, model=tiny.model(lora=LORA, dropout=0.1))
    run = RunDir(tmp_path / "b")
    torch.manual_seed(1234)  # nothing may depend on the generator's past

    class Stop(Exception):
        pass

    class StopAfter:
        def on_step(self, step: int, record: dict[str, Any]) -> None:
            if step == 3:
                raise Stop

    with pytest.raises(Stop):
        train(tiny, run, cfg, total_steps=5, model=tiny.model(lora=LORA, dropout=0.1), callbacks=[StopAfter()])
    resumed = train(tiny, run, cfg, total_steps=5, model=tiny.model(lora=LORA, dropout=0.1))

    assert resumed.result.steps_run == 3
    assert exact_log(run) == exact_log(RunDir(tmp_path / "a"))
    assert identical(weights(resumed.model), weights(straight.model))
    assert identical(optimizer_tensors(resumed.optimizer), optimizer_tensors(straight.optimizer))


def test_adapter_dropout_is_drawn_anew_in_every_step_from_the_runs_seed(tiny: Tiny, tmp_path: Path) -> None:
    """Learning rate 0 over a fixed seed: only the dropout can move the loss. B is 0 at first, so A alone would not."""
    _, path = trained(tiny, tmp_path / "run")
    still = settings(lr={"connector": 0.0, "lora": 0.0}, weight_decay={"connector": 0.0, "lora": 0.0})

    def loss(seed: int, name: str) -> float:
        fresh = tiny.model(lora=LORA | {"dropout": 0.5})
        load_adapters(path, fresh.parts())
        last = train(tiny, RunDir(tmp_path / name), still, total_steps=1, model=fresh, seed=seed).result.last
        assert last is not None
        return last["loss"]

    assert loss(1, "a") == loss(1, "b") != loss(2, "c")


def test_another_rank_alpha_or_kind_of_adapter_is_refused_with_its_field(tiny: Tiny, tmp_path: Path) -> None:
    model, path = trained(tiny, tmp_path / "run", 1)
    odd = rewritten(tmp_path / "odd", model, use_rslora=True)

    for lora, says in (
        (LORA | {"r": 8}, "model.lora.r: checkpoint 4, config 8"),
        (LORA | {"alpha": 16}, r"model.lora.alpha \* strength: checkpoint 8, config 16"),
        (LORA | {"target_modules": ["q_proj"]}, "the file has adapters on .*mlp.down_proj .*model.lora.target_modules"),
    ):
        with pytest.raises(UserError, match=says):
            load_adapters(path, tiny.model(lora=lora).parts())
    with pytest.raises(UserError, match="use_rslora: checkpoint true, config false"):
        load_adapters(odd, model.parts())
    load_adapters(path, tiny.model(lora=LORA | {"dropout": 0.0}).parts())  # changes nothing that is loaded


@pytest.mark.parametrize(("content", "says"), [
    ("{}", "lacks peft_type, r, lora_alpha, use_rslora, use_dora, rank_pattern, alpha_pattern, bias"),
    ("[1]", r"holds \[1\], expected a JSON object"),
    ("x{", r"is not a JSON file \(JSONDecodeError"),
])  # fmt: skip
def test_an_adapter_config_that_tells_too_little_is_refused(
    tiny: Tiny, tmp_path: Path, content: str, says: str
) -> None:
    model, path = trained(tiny, tmp_path, 1)
    vouch_for(path, "adapter_config.json", content)

    with pytest.raises(UserError, match=rf"adapter_config\.json {says}"):
        load_adapters(path, model.parts())


def test_adapters_of_another_base_are_refused_with_both_names(tiny: Tiny, tmp_path: Path) -> None:
    _, path = trained(tiny, tmp_path / "run", 1)
    other = Tiny(tiny_llm(tmp_path / "wide", hidden_size=96), tiny.vision, tiny.records, tiny.images)

    with pytest.raises(UserError, match=r"(?s)llm; this config: .*wide\).*model.llm.name_or_path: adapters of another"):
        load_adapters(path, other.model(lora=LORA).parts())


def test_a_checkpoint_with_adapters_does_not_load_without_them_nor_the_reverse(tiny: Tiny, tmp_path: Path) -> None:
    model, with_adapters = trained(tiny, tmp_path / "instruct", 1)
    plain = train(tiny, RunDir(tmp_path / "align"), settings(), total_steps=1).model
    without = RunDir(tmp_path / "align").checkpoints / "step_1"
    before = weights(model)

    def optimizer(of: VisionLanguageModel) -> torch.optim.Optimizer:
        named = [(n, p) for n, p in of.named_parameters() if p.requires_grad]
        return build_optimizer([{"name": "all", "params": named, "lr": 0.1, "weight_decay": 0.0}], (0.9, 0.99))

    with pytest.raises(UserError, match="has adapters on the language model, but this config has none"):
        load_for_resume(with_adapters, plain, optimizer(plain))
    with pytest.raises(
        UserError, match=r"model\.lora\.enable: true.*has none.*model\.connector\.load_checkpoint instead"
    ):
        load_for_resume(without, model, optimizer(model))
    assert identical(weights(model), before), "something was loaded"
    load_adapters(without, plain.parts())  # nothing on both sides


def test_stage_2_starts_from_a_stage_1_checkpoint_with_its_connector_alone(tiny: Tiny, tmp_path: Path) -> None:
    aligned = train(tiny, RunDir(tmp_path), settings(), total_steps=1).model
    model = tiny.model(lora=LORA, seed=99)
    fresh = {k: t.clone() for k, t in adapter_tensors(model.language.part).items()}

    load_connector(tmp_path, model.connector, model.connector_info())

    assert identical(dict(model.connector.state_dict()), dict(aligned.connector.state_dict()))
    assert identical(adapter_tensors(model.language.part), fresh)
    other = tiny.model(lora=LORA, vision_ln=False)
    with pytest.raises(UserError, match=r"model\.connector\.vision_ln: checkpoint true, config false"):
        load_connector(tmp_path, other.connector, other.connector_info())


def test_a_manifest_with_half_an_adapter_is_damaged(tiny: Tiny, tmp_path: Path) -> None:
    _, path = trained(tiny, tmp_path, 1)
    manifest = json.loads((path / MANIFEST).read_text())
    del manifest["files"]["adapter_config.json"]
    (path / MANIFEST).write_text(json.dumps(manifest))

    assert problem(path) == "its manifest does not list adapter_config.json"


@pytest.mark.parametrize(
    "names",
    [
        ("merged_1", "merged_3"),
        ("merged_01", "merged_1", "merged_٣"),
        ("merged_99999",),
        ("merged_1", "vision_merged_2"),
    ],
)
def test_earlier_adapters_are_numbered_without_a_gap(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {f"{name}.safetensors": {} for name in names}}))

    with pytest.raises(UserError, match=r"has the earlier adapters .*merged_.*, expected (vision_)?merged_1"):
        read_base(tmp_path)


def test_an_alpha_that_is_not_its_runs_is_refused_whether_the_adapters_continue_or_are_merged(
    tiny: Tiny, tmp_path: Path
) -> None:
    model, path = trained(tiny, tmp_path, 1)
    config = json.loads((path / "adapter_config.json").read_text())
    trainer = json.loads((path / "trainer.json").read_text())
    trainer["config"] = {"model": {"lora": {"r": 4, "alpha": 16, "strength": 0.5}}}
    vouch_for(path, "trainer.json", json.dumps(trainer))
    assert "merged_1" in start_base(path, "merge")  # 8 = 16 * 0.5

    for odd in ({"lora_alpha": 1e9}, {"lora_alpha": 1e-300}, {"r": 2}):
        vouch_for(path, "adapter_config.json", json.dumps(config | odd))
        for start in (
            lambda: start_base(path, "merge"), lambda: load_adapters(path, model.parts(), start=True),
        ):  # fmt: skip
            with pytest.raises(UserError, match=r"adapter_config.json says (lora_alpha|r) .* expected (8|4)"):
                start()
