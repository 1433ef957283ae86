"""The plan's sizes are the loaded model's, its formulae count what PyTorch counts, and what it cannot know it says."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console
from tests.conftest import TinyParts
from torch.utils.flop_counter import FlopCounterMode

from beholder.config import STAGES, ConnectorConfig, LlmConfig, LoraConfig, RunConfig, StudentConfig, VisionConfig
from beholder.config.file import dump_config, parse_config
from beholder.data import build_data, build_encoder, open_records
from beholder.model.adapters import adapter_parameters, attach
from beholder.model.build import build_vlm
from beholder.model.connector import build_connector
from beholder.model.language import load_language, load_tokenizer
from beholder.model.native import NativeModel, empty_native, load_native
from beholder.model.plan import TrainPlan, apply_train_plan, plan_of
from beholder.model.student import make_student
from beholder.model.vision import load_vision
from beholder.model.weights import DTYPES
from beholder.prepare import estimate as room
from beholder.prepare.check import check
from beholder.prepare.estimate import (
    LanguageShape,
    VisionShape,
    connector_shape,
    estimate,
    eyes_flops,
    language_shape,
    learning,
    matmul_rate,
    vision_shape,
)
from beholder.prepare.tiny import colour_set, colour_source, tiny_llm, tiny_native, tiny_tokenizer, tiny_vision
from beholder.runs import to_json
from beholder.stages import run_stage
from beholder.store.features import FeatureStore
from beholder.types import Status, UserError

CPU = torch.device("cpu")


def saved_bytes(run: Any, own: set[int]) -> tuple[int, torch.Tensor]:
    """Bytes that autograd keeps for the backward pass of ``run()``, storages in ``own`` (weights) left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = run()
    return sum(s.nbytes() for address, s in kept.items() if address not in own), out


def storages(module: torch.nn.Module) -> set[int]:
    return {p.untyped_storage()._cdata for p in module.parameters()}


# -- sizes


@pytest.mark.parametrize("llm, vision", [
    ("qwen3", "siglip"), ("smollm2", "repvit"), ("llama", "clip"), ("qwen3", "dinov2"),
])  # fmt: skip
def test_shapes_and_trainable_table_are_those_of_the_loaded_model(tmp_path, tiny_config, llm, vision):
    name, weights = tiny_vision(tmp_path / "vision", vision)
    cfg = tiny_config(tmp_path, **{
        "model.llm.name_or_path": str(tiny_llm(tmp_path / "llm", llm)), "model.vision.name_or_path": name,
        "model.vision.weights": weights,
    })  # fmt: skip

    found = estimate(cfg, measure=False)
    model, _ = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    table = apply_train_plan(model, TrainPlan())

    assert found.trainable.to_json() == table.to_json()
    assert found.vision and found.language and found.connector
    assert (found.vision.num_patches, found.vision.d_vision) == (model.geometry.num_patches, model.geometry.d_vision)
    assert (found.language.hidden, found.language.vocab) == (model.language.d_text, model.language.vocab)
    assert found.connector.num_tokens == model.num_visual_tokens
    assert found.gaps == []


def test_no_weight_file_is_needed(tmp_path, tiny_config, tiny_parts):
    for part, source in (("llm", tiny_parts.llm), ("vision", Path(tiny_parts.vision))):
        shutil.copytree(source, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
    whole = tiny_config(tmp_path)
    without = tiny_config(tmp_path, **{
        "model.llm.name_or_path": str(tmp_path / "llm"), "model.vision.name_or_path": str(tmp_path / "vision"),
    })  # fmt: skip

    assert estimate(without, measure=False).to_json() == estimate(whole, measure=False).to_json()


@pytest.mark.parametrize("part", ["llm", "vision"])
def test_adapters_instead_of_a_model_are_no_gap(tmp_path, tiny_config, part):
    (tmp_path / "adapter_config.json").write_text("{}")
    cfg = tiny_config(tmp_path, **{f"model.{part}.name_or_path": str(tmp_path)})

    with pytest.raises(UserError, match=rf"model\.{part}\.name_or_path .* is a PEFT adapter"):
        estimate(cfg, measure=False)


def test_the_reference_pair_is_planned_offline_from_its_config_files(tmp_path, tiny_config):
    from transformers import Qwen3Config, SiglipVisionConfig

    Qwen3Config(
        hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=151936, tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "qwen")  # fmt: skip
    SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    ).save_pretrained(tmp_path / "siglip")  # fmt: skip
    cfg = tiny_config(tmp_path, **{
        "model.llm.name_or_path": "Qwen/Qwen3-8B-Base", "model.vision.name_or_path": "google/siglip-so400m-patch14-384",
        "model.connector.num_visual_tokens": 64, "model.connector.resampler.num_heads": 8,
    })  # fmt: skip

    files = {
        f"{part}_config": tmp_path / name / "config.json" for part, name in (("llm", "qwen"), ("vision", "siglip"))
    }
    found = estimate(cfg, **files, measure=False)

    assert found.language and found.vision
    assert found.language.params == 8_190_735_360  # Qwen3-8B's published 8.2 B
    assert (found.vision.num_patches, found.vision.d_vision) == (729, 1152)
    # so400m: 2 x 400 M weights x 729 patches, and the attention of 27 layers
    assert found.vision.flops_per_image == pytest.approx(2 * 4.0e8 * 729 + 27 * 4 * 729**2 * 1152, rel=0.05)
    assert any("tokenizer" in gap for gap in found.gaps)  # it is not among the config files, and that is said


def test_a_hub_name_that_is_not_at_hand_is_a_gap_that_names_the_way_out(tmp_path, tiny_config):
    found = estimate(tiny_config(tmp_path, **{"model.llm.name_or_path": "nobody/no-such-model"}), measure=False)

    assert found.language is None and found.vision is not None
    (gap,) = found.gaps
    assert "nobody/no-such-model" in gap and "--llm-config FILE" in gap
    assert found.steps == 4 and not found.memory


def test_a_file_the_user_names_must_be_a_models_config(tmp_path, tiny_config):
    (tmp_path / "text.json").write_text("no json")
    (tmp_path / "other.json").write_text("{}")
    for name, match in (
        ("nowhere.json", "No such file"),
        ("text.json", "not a readable"),
        ("other.json", "model_type"),
    ):
        with pytest.raises(UserError, match=match):
            estimate(tiny_config(tmp_path), llm_config=tmp_path / name, measure=False)


def test_a_named_config_with_more_labels_or_layers_than_any_model_is_refused_before_it_is_read(tmp_path, tiny_config):
    file = tmp_path / "big.json"
    for entry in ("num_labels", "num_hidden_layers"):
        file.write_text(json.dumps({"model_type": "qwen3", entry: 10**9}))
        with pytest.raises(UserError, match=rf"big\.json says {entry} 1000000000; no model has more"):
            estimate(tiny_config(tmp_path), llm_config=file, measure=False)


def test_settings_that_can_never_work_raise(tmp_path, tiny_config):
    with pytest.raises(UserError, match="heads"):
        estimate(tiny_config(tmp_path, **{"model.connector.resampler.num_heads": 7}), measure=False)


# -- what the language model cannot take


def gpt2(folder: Path, positions: int = 128) -> Path:
    """A tiny GPT-2, whose positions are a table."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = tiny_tokenizer(folder, "smollm2")
    GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=positions, vocab_size=len(tokenizer))
    ).save_pretrained(folder)
    return folder


def test_samples_longer_than_the_table_of_positions_are_refused_by_plan_check_and_run(tmp_path, tiny_config):
    sets = {"model.llm.name_or_path": str(gpt2(tmp_path / "gpt2"))}
    long = tiny_config(tmp_path, **sets)
    (tmp_path / "long.yaml").write_text(dump_config(long))
    message = r"prompting\.max_seq_len is 1536, but .*gpt2 has a table of 128 positions.*max_seq_len: 128 or lower"

    for look in (
        lambda: estimate(long, measure=False), lambda: check(tmp_path / "long.yaml"), lambda: run_stage(long),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            look()
    assert not list((tmp_path / "run").glob("checkpoints/*"))

    short = tiny_config(tmp_path / "short", **sets, **{"prompting.max_seq_len": 128})
    (tmp_path / "short.yaml").write_text(dump_config(short))
    assert estimate(short, measure=False).language is not None
    assert check(tmp_path / "short.yaml").accepted == 72
    assert run_stage(short).status == Status.SUCCEEDED


def test_a_packed_row_longer_than_a_stored_mask_is_refused(tmp_path, tiny_config):
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    tokenizer = tiny_tokenizer(tmp_path / "neo", "smollm2")
    GPTNeoForCausalLM(
        GPTNeoConfig(
            hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=128, vocab_size=len(tokenizer),
        )
    ).save_pretrained(tmp_path / "neo")  # fmt: skip
    sets = {
        "model.llm.name_or_path": str(tmp_path / "neo"), "model.llm.attn_implementation": "eager",
        "prompting.max_seq_len": 128, "train.packing": True,
    }  # fmt: skip

    with pytest.raises(UserError, match=r"train\.pack_len is 256, but .*neo has a mask for rows of 128 positions"):
        estimate(tiny_config(tmp_path, **sets, **{"train.pack_len": 256}), measure=False)
    estimate(tiny_config(tmp_path, **sets), measure=False)


def test_a_plan_from_two_config_files_asks_the_hub_nothing(tmp_path, tiny_config, tiny_parts, monkeypatch):
    asked: list[Any] = []

    def no_network(host: Any, *_: Any, **__: Any) -> Any:
        asked.append(host)
        raise OSError("no network here")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    monkeypatch.setattr("time.sleep", lambda _: None)  # between the tries that must not be made
    names = {"model.llm.name_or_path": "nobody/no-such-llm", "model.vision.name_or_path": "nobody/no-such-tower"}
    files = {"llm_config": tiny_parts.llm / "config.json", "vision_config": Path(tiny_parts.vision) / "config.json"}
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(files["llm_config"], alone / "config.json")

    found = estimate(tiny_config(tmp_path, **names), **files, measure=False)
    without_tokenizer = estimate(
        tiny_config(tmp_path, **names), **files | {"llm_config": alone / "config.json"}, measure=False
    )

    assert asked == [] and found.gaps == [], "the tokenizer beside the config file is used"
    assert any("its tokenizer is not there" in gap for gap in without_tokenizer.gaps)
    estimate(tiny_config(tmp_path, **names), vision_config=files["vision_config"], measure=False)
    assert asked, "without a file the hub is asked, and this test would see it"


# -- formulae


def small_language(tmp_path: Path, family: str, precision: str) -> tuple[Any, LanguageShape]:
    folder = tiny_llm(
        tmp_path / "llm", family, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    cfg = LlmConfig(name_or_path=str(folder), precision=precision)  # pyright: ignore[reportArgumentType]
    return load_language(cfg, CPU)[0], language_shape(cfg)


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm2"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_kept_for_backward_are_what_autograd_keeps(tmp_path, family, precision):
    language, shape = small_language(tmp_path, family, precision)
    rows, length = 2, 96
    embeds = torch.randn(rows, length, 128, dtype=language.dtype).requires_grad_()
    positions = torch.arange(length).expand(rows, -1)

    measured, _ = saved_bytes(lambda: language.hidden(embeds, positions), storages(language))

    # Measured 1.04 for all of them; the rest are small intermediates, which versions may keep differently.
    estimated = shape.activation_bytes(rows * length, 4 if precision == "fp32" else 2, length)
    assert measured == pytest.approx(estimated, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_language_model_flops_are_what_the_counter_counts(tmp_path, family):
    language, shape = small_language(tmp_path, family, "fp32")
    rows, length, targets = 2, 128, 20
    embeds = torch.randn(rows, length, 128).requires_grad_()
    positions = torch.arange(length).expand(rows, -1)

    with FlopCounterMode(display=False) as body:
        language.hidden(embeds, positions).sum().backward()
    with FlopCounterMode(display=False) as head:
        language.head(torch.randn(targets, 128, requires_grad=True)).sum().backward()

    assert body.get_total_flops() == pytest.approx(shape.flops(rows * length, length), rel=0.03)
    assert head.get_total_flops() == pytest.approx(shape.head_flops(targets), rel=0.01)


@pytest.mark.parametrize("kind", ["perceiver", "mean_pool", "grid", "pixel_shuffle", "none"])
def test_connector_bytes_and_flops_are_those_of_the_real_one(kind):
    perceiver = kind == "perceiver"
    cfg = ConnectorConfig.model_validate({
        "num_visual_tokens": 4 if perceiver else None, "vision_ln": True,
        "resampler": {"kind": kind, "num_heads": 4} if perceiver else {"kind": kind},
    })  # fmt: skip
    shape = connector_shape(cfg, VisionShape(0, 16, 32, 0.0), 64)
    real = build_connector(cfg, num_patches=16, d_vision=32, d_text=64, embed_rms=0.1, seed=0)
    images = 5

    measured, _ = saved_bytes(lambda: real(torch.randn(images, 16, 32)), storages(real))
    with FlopCounterMode(display=False) as counter:
        real(torch.randn(images, 16, 32)).sum().backward()

    assert shape.params == sum(p.numel() for p in real.parameters())
    # Which attention kernel runs, and so what it keeps, differs between the CPU and the meta device.
    assert measured / images == pytest.approx(shape.activation_bytes_per_image, rel=0.25)
    assert counter.get_total_flops() / images == pytest.approx(shape.flops_per_image, rel=0.1)


def test_checkpointing_trades_memory_for_one_more_forward():
    shape = LanguageShape(30, 576, 9, 3, 64, 1536, 49152, 134_515_008, 106_000_000, False)

    assert shape.activation_bytes(1000, 2, 100, checkpointing=True) < shape.activation_bytes(1000, 2, 100) / 5
    assert shape.flops(1000, 100, checkpointing=True) / shape.flops(1000, 100) == pytest.approx(1.5, abs=0.05)


def test_the_towers_flops_are_what_the_counter_counts(tmp_path):
    for family in ("siglip", "clip", "dinov2", "repvit"):
        name, weights = tiny_vision(tmp_path / family, family)
        cfg = VisionConfig(name_or_path=name, weights=weights, precision="fp32")
        tower = load_vision(cfg, CPU)
        g = tower.geometry
        with FlopCounterMode(display=False) as counter:
            tower(torch.zeros(1, 3, g.height, g.width, dtype=torch.uint8))

        assert counter.get_total_flops() == pytest.approx(vision_shape(cfg).flops_per_image, rel=0.1), family


# -- data, steps, time


def test_lengths_images_steps_and_store_are_those_of_the_real_data(tmp_path, tiny_config):
    cfg: RunConfig = tiny_config(tmp_path, **{"train.train_steps": None, "train.num_epochs": 3, "train.packing": False})
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    data = build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens)
    encoded = [data.encoder.encode(data.train.example_at(p)) for p in range(len(data.train))]
    stream = data.stream(None, cfg, rank=0, world_size=1)

    found = estimate(cfg, measure=False)

    assert found.sequence["tokens_mean"] == pytest.approx(sum(len(e.ids) for e in encoded) / len(encoded), rel=0.1)
    assert found.steps == stream.steps_for(3)
    assert (found.data["records"], found.data["train_samples"], found.data["held_out_samples"]) == (72, 60, 12)
    assert found.store_bytes == 72 * model.geometry.num_patches * model.geometry.d_vision * 2
    width = max(int(b.input_ids.shape[1]) for step in stream.steps(0, 10) for b in step)
    assert found.sequence["row_length"] <= width * 1.05


def test_packed_rows_hold_what_the_collator_puts_into_them(tmp_path, tiny_config):
    cfg: RunConfig = tiny_config(tmp_path, **{"train.pack_len": 256, "train.micro_batch_size": 16})
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    stream = build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens).stream(None, cfg, rank=0, world_size=1)
    batches = [b for step in stream.steps(0, 8) for b in step]
    positions = sum(b.input_ids.numel() for b in batches) / len(batches)

    found = estimate(cfg, measure=False).sequence

    assert found["rows_of_a_micro_batch"] * found["row_length"] == pytest.approx(positions, rel=0.25)


def test_missing_records_are_a_gap_and_steps_stay_unknown(tmp_path, tiny_config):
    cfg = tiny_config(tmp_path, **{"data.json_path": str(tmp_path / "none.jsonl"), "train.train_steps": None})

    found = estimate(cfg, measure=False)

    assert found.steps is None and found.store_bytes is None and found.language is not None
    assert any("none.jsonl" in gap for gap in found.gaps)
    assert any("target length" in gap for gap in found.gaps)
    assert found.memory["total"] > room.RUNTIME_BYTES


def several_images(tmp_path, tiny_config, images, **sets):
    """A config of stage multi, for each of ``images`` a source of records with so many, mixed 3 to 1."""
    data, image = colour_set(tmp_path / "pictures", 8)
    name = json.loads(data.read_text(encoding="utf-8").splitlines()[0])["images"][0]
    sources = []
    for n, weight in zip(images, (3, 1), strict=False):
        turns = [{"role": "user", "content": "<image>" * n + "alike?"}, {"role": "assistant", "content": "yes"}]
        path = tmp_path / f"{n}.jsonl"
        lines = [json.dumps({"id": f"{n}-{k}", "images": [name] * n, "messages": turns}) for k in range(40)]
        path.write_text("\n".join(lines), encoding="utf-8")
        sources.append({"json_path": str(path), "image_root": str(image), "weight": weight})
    return tiny_config(tmp_path, **({
        "stage": "multi", "model.lora.enable": True, "data.json_path": None, "data.image_root": None,
        "data.sources": sources, "train.train_steps": 8,
    } | sets))  # fmt: skip


def test_samples_of_several_images_are_planned_in_the_mixtures_proportions(tmp_path, tiny_config):
    cfg = several_images(tmp_path, tiny_config, (3, 1))
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    encoder = build_encoder(cfg, tokenizer, model.num_visual_tokens)
    records = open_records(cfg, cfg.data.train_sources)
    lengths = {len(e.images): len(encoder.encode(e).ids) for e in (records[0], records[40])}

    found = estimate(cfg, measure=False)

    assert found.images_per_sample == pytest.approx(2.5, abs=0.1) and found.data["images"] == 40 * 3 + 40
    assert found.sequence["tokens_mean"] == pytest.approx(0.75 * lengths[3] + 0.25 * lengths[1], rel=0.06)
    assert found.sequence["tokens_longest"] >= lengths[3]
    one = estimate(several_images(tmp_path / "one", tiny_config, (1, 1)), measure=False)
    assert found.memory["total"] > one.memory["total"]


def test_a_stage_of_several_images_without_its_data_is_planned_for_the_most_it_may_show(tmp_path, tiny_config):
    cfg = several_images(tmp_path, tiny_config, (3, 1))
    for source in cfg.data.train_sources:
        Path(source.json_path).unlink()

    found = estimate(cfg, measure=False)

    assert found.images_per_sample == 6 and any("images of a sample: 6 assumed" in gap for gap in found.gaps)


def test_a_gate_on_what_no_run_measures_is_refused_by_plan_and_run(tmp_path, tiny_config):
    gates = {
        "gates.a.measure": "slots.spred", "gates.a.at_most": 0.1, "gates.b.measure": "learner.lm", "gates.b.at_most": 1
    }  # fmt: skip
    cfg = tiny_config(tmp_path, **gates)

    for start in (lambda: estimate(cfg, measure=False), lambda: run_stage(cfg)):
        with pytest.raises(UserError) as told:
            start()
        assert "gates.a: nothing is measured as slots.spred; nearest: slots.spread" in str(told.value)
        assert "gates.b: only beholder audit --learner lm measures learner.lm" in str(told.value)
    assert not Path(cfg.run_dir).exists()


def test_an_instruction_tuning_is_planned_with_its_adapters(tmp_path, tiny_config):
    sets = {"stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.connector.load_checkpoint": "x",
            "prompting.max_images_per_sample": 1}  # fmt: skip
    cfg: RunConfig = tiny_config(tmp_path, **sets)
    model, _ = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    real = apply_train_plan(model, plan_of(cfg.model, STAGES["instruct"]))

    found = estimate(cfg, measure=False)
    frozen = estimate(tiny_config(tmp_path, **sets, **{"model.connector.trainable": False}), measure=False)

    assert {r.part: (r.params, r.trainable) for r in found.trainable.rows} == {
        r.part: (r.params, r.trainable) for r in real.rows
    }
    adapters = next(r.params for r in real.rows if r.part == "lora")
    assert found.memory["adapters_gradients_and_AdamW"] == 16 * adapters
    assert found.flops_per_step["adapters"] == 6 * adapters * cfg.effective_batch * found.sequence["tokens_mean"]
    assert frozen.memory["connector_gradients_and_AdamW"] < found.memory["connector_gradients_and_AdamW"] / 3
    assert "captions" not in " ".join(found.gaps)


def test_what_learns_in_the_tower_is_counted_and_is_what_the_loaded_model_has(tmp_path, tiny_config):
    sets = {
        "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.lora.llm_layers": "last-1",
        "model.lora.vit_layers": "last-1", "model.vision.unfreeze": ["encoder.layers.0"],
    }  # fmt: skip
    cfg = tiny_config(tmp_path, **sets)

    found = estimate(cfg, measure=False)
    model, _ = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    table = apply_train_plan(model, plan_of(cfg.model, STAGES["instruct"]))

    assert {r.part: (r.params, r.trainable, r.dtype) for r in found.trainable.rows} == {
        r.part: (r.params, r.trainable, r.dtype) for r in table.rows
    }
    assert {"lora", "vision_lora"} < {r.part for r in table.rows}
    rows = {r.part: r.trainable for r in table.rows}
    assert found.memory["tower_gradients_and_AdamW"] == 16 * (rows["vision"] + rows["vision_lora"])
    assert any("backward pass is not among the activations" in gap for gap in found.gaps)


def test_what_learns_below_the_blocks_needs_the_gradients_of_all_of_them(tmp_path, tiny_config):
    def above(*names: str) -> float:
        cfg = tiny_config(tmp_path, **{"stage": "instruct", "model.lora.enable": True, "model.vision.unfreeze": names})
        found = estimate(cfg, measure=False).vision
        assert found is not None
        return found.share_above

    assert above() == 0 and above("last-1") == pytest.approx(0.5)
    assert above("embeddings") == above("last-1", "embeddings") == above("first-1") == 1


def test_more_layers_than_there_are_is_said_in_the_plan(tmp_path, tiny_config):
    cfg = tiny_config(tmp_path, **{"stage": "instruct", "model.lora.enable": True, "model.lora.vit_layers": "last-9"})

    with pytest.raises(UserError, match=r"model\.lora\.vit_layers is last-9, but .* has 2 blocks"):
        estimate(cfg, measure=False)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_keep_the_bytes_and_cost_the_flops_that_are_counted(tmp_path, precision):
    language, plain = small_language(tmp_path, "qwen3", precision)
    lora = LoraConfig(enable=True, r=4, alpha=8, dropout=0.0)
    cfg = LlmConfig(name_or_path=str(tmp_path / "llm"), precision=precision)  # pyright: ignore[reportArgumentType]
    shape, size = learning(language_shape(cfg), None, lora)[0], 4 if precision == "fp32" else 2
    rows, length = 2, 96
    embeds = torch.randn(rows, length, 128, dtype=language.dtype).requires_grad_()
    positions = torch.arange(length).expand(rows, -1)

    def kept() -> float:
        return saved_bytes(lambda: language.hidden(embeds, positions), storages(language))[0]

    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            language.hidden(embeds, positions).sum().backward()
        return counter.get_total_flops()

    bytes_before, flops_before = kept(), flops()
    attach(language.part, lora, seed=0)
    for weight in adapter_parameters(language.part).values():
        weight.requires_grad_(True)

    assert shape.adapter_params == sum(s.params for s in language.part.adapters)
    estimated = [s.activation_bytes(rows * length, size, length) for s in (plain, shape)]
    assert kept() - bytes_before == pytest.approx(estimated[1] - estimated[0], rel=0.25)
    if precision == "fp32":  # the counter does not know addmm_, which adds into the 16-bit output
        assert flops() - flops_before == pytest.approx(6 * shape.adapter_params * rows * length, rel=0.03)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("like", ["llama", "gpt2"])
def test_a_students_bytes_and_flops_are_what_is_counted(tmp_path, precision, like):
    tiny_tokenizer(tmp_path, "smollm2")
    llm = LlmConfig(name_or_path=str(tmp_path))
    student = StudentConfig(like=like, hidden=128, layers=3, heads=4, intermediate=384)
    shape = language_shape(llm, None, student)
    language = load_language(llm, CPU, make_student(student, llm, load_tokenizer(llm), 0, held=False))[0]
    language.model.requires_grad_(True)
    language.compute_dtype = DTYPES[precision]
    rows, length, targets = 2, 96, 20
    positions, embeds = torch.arange(length).expand(rows, -1), torch.randn(rows, length, 128).requires_grad_()
    assert shape.params == shape.learning_params == sum(p.numel() for p in language.model.parameters())

    measured, _ = saved_bytes(lambda: language.hidden(embeds, positions), storages(language))
    with FlopCounterMode(display=False) as body:
        language.hidden(embeds, positions).sum().backward()
    with FlopCounterMode(display=False) as head:
        language.head(torch.randn(targets, 128, requires_grad=True)).sum().backward()

    size = DTYPES[precision].itemsize
    estimated = shape.activation_bytes(rows * length, size, length)
    estimated += 0 if precision == "fp32" else size * shape.layer_params  # their casts, counted with the weights
    print("BYTES", like, precision, measured / estimated)
    assert measured == pytest.approx(estimated, rel=0.4)
    assert body.get_total_flops() == pytest.approx(shape.flops(rows * length, length), rel=0.05)
    assert head.get_total_flops() == pytest.approx(shape.head_flops(targets), rel=0.01)


def test_what_does_not_fit_is_said(tmp_path, tiny_config):
    found = estimate(tiny_config(tmp_path, **{"features.max_gb": 1e-5, "prompting.max_seq_len": 80}), measure=False)

    assert any("features.max_gb" in gap and "at every step" in gap for gap in found.gaps)
    assert any("max_seq_len is 80" in gap for gap in found.gaps)
    assert found.store_bytes == pytest.approx(1e4)
    assert found.flops_per_step["vision_tower"] > 0
    stored = estimate(tiny_config(tmp_path), measure=False)
    assert stored.flops_per_step["vision_tower"] == 0


def test_memory_and_flops_grow_with_what_they_depend_on(tmp_path, tiny_config):
    base = estimate(tiny_config(tmp_path), measure=False)
    larger = estimate(tiny_config(tmp_path, **{"train.micro_batch_size": 16}), measure=False)
    half = estimate(tiny_config(tmp_path, **{"model.llm.precision": "bf16"}), measure=False)

    assert larger.memory["language_model_activations"] > 3 * base.memory["language_model_activations"]
    assert half.memory["language_model_weights"] == base.memory["language_model_weights"] / 2
    assert base.memory["total"] == pytest.approx(sum(v for k, v in base.memory.items() if k != "total"))


def test_the_plan_prints_and_is_json(tmp_path, tiny_config, monkeypatch):
    monkeypatch.setattr(room, "matmul_rate", lambda device, dtype: 1e9)
    found = estimate(tiny_config(tmp_path, **{"model.vision.name_or_path": "timm/repvit_m0_9"}))
    out = io.StringIO()

    found.print(Console(file=out, width=140))
    record = json.loads(to_json(found.to_json()))

    for text in ("connector", "trainable", "tokens of one sample", "optimizer steps", "feature store", "AdamW",
                 "matrix rate, measured", "training"):  # fmt: skip
        assert text in out.getvalue(), text
    assert record["seconds"]["training"] == pytest.approx(4 * record["seconds"]["step"])
    assert record["seconds"]["step"] == pytest.approx(
        sum(record["flops_per_step"].values()) / 1e9 / room.EFFICIENCY["cpu"]
    )
    assert record["trainable"][1]["part"] == "connector" and record["steps"] == 4


def test_the_step_benchmark_runs_and_its_losses_agree(tmp_path):
    """The reference in plain torch and our step agree on tiny parts; the speeds are for `make bench`."""
    path = Path(__file__).parents[2] / "benchmarks" / "align_step.py"
    spec = importlib.util.spec_from_file_location("align_step", path)
    assert spec and spec.loader
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["align_step"] = benchmark
    spec.loader.exec_module(benchmark)

    benchmark.main(["--shape", "tiny", "--rounds", "2", "--no-memory", "--json", str(tmp_path / "out.json")])

    result = json.loads((tmp_path / "out.json").read_text())
    assert result["losses_agree"] and list(result["variants"]) == [
        "reference, fp32", "+ store", "+ head", "+ packing", "+ bf16 = ours", "reference, bf16",
    ]  # fmt: skip
    assert result["variants"]["+ packing"]["gradient_off"] < 1e-3


def test_the_measured_rate_is_a_plausible_number_of_flops():
    assert 1e8 < matmul_rate(CPU, torch.float32, seconds=0.05) < 1e14


def test_a_student_is_planned_as_it_will_be_and_refused_where_it_cannot_be(tiny_config, tmp_path):
    small = {"like": "llama", "hidden": 32, "layers": 2, "heads": 4, "intermediate": 64}
    made = {"model.llm.precision": "bf16", "model.student": small, "stage": "instruct"}
    cfg = tiny_config(tmp_path, **made)

    planned = estimate(cfg, measure=False)

    model, _ = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    table = apply_train_plan(model, plan_of(cfg.model, cfg.stage_record))
    assert planned.trainable.rows == table.rows
    learns = next(r.trainable for r in table.rows if r.part == "language")
    assert planned.memory["language_model_weights"] == 4 * learns
    assert planned.memory["language_model_gradients_and_AdamW"] == 12 * learns
    for wrong, message in (({"cut": [7]}, "model.student.cut names 7"), (small | {"max_params": 9}, "max_params 9")):
        with pytest.raises(UserError, match=message):
            estimate(tiny_config(tmp_path, **made | {"model.student": wrong}), measure=False)


# -- native models


def native_config(folder: Path, name: str, *more: str) -> RunConfig:
    source = colour_source(folder / "data", "jsonl", 48, dialogues=True)
    raw: dict[str, Any] = {
        "run_name": "native", "output_dir": str(folder / "run"), "device": "cpu", "stage": "instruct",
        "model": {"native": {"name_or_path": name, "precision": "fp32"},
                  "lora": {"enable": True, "r": 4, "vit_layers": "first-1"}},
        "data": {"json_path": source.json_path, "image_root": source.image_root, "eval_size": 10},
        "train": {"train_steps": 4, "micro_batch_size": 4, "precision": "fp32"},
    }  # fmt: skip
    return parse_config(to_json(raw), "native", more)


@pytest.mark.parametrize("family", ["qwen3_vl", "llava", "idefics3", "gemma3"])
def test_a_native_model_is_planned_as_it_is_when_it_is_loaded(tmp_path: Path, family: Any) -> None:
    name = str(tiny_native(tmp_path / "native", family))
    cfg = native_config(tmp_path, name)
    lighter = shutil.copytree(name, tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))

    found = estimate(cfg, measure=False)

    assert found.gaps == [
        "the feature store will be off: its tower has adapters, so what its eyes say of an image changes while they "
        "learn",
        "what a tower that learns keeps for its backward pass is not among the activations",
    ]
    again = estimate(native_config(tmp_path, str(lighter)), measure=False).to_json()
    assert again == found.to_json(), "no weights are needed"
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=CPU, seed=0)
    loaded = [row for row in apply_train_plan(model, plan_of(cfg.model, cfg.stage_record)).rows if row.params]
    assert sorted(map(str, found.trainable.rows)) == sorted(map(str, loaded))
    assert isinstance(model, NativeModel)
    data = build_data(cfg, tokenizer, model.geometry, None)
    encoded = [data.encoder.encode(e) for e in data.train.first(30)]
    places = [len(e.reserved(k)) for e in encoded for k in range(len(e.image_spans))]
    # Not the same records: a sample of all of them.
    assert found.sequence["visual_tokens_per_image"] == pytest.approx(sum(places) / len(places), rel=0.15)
    assert found.sequence["tokens_mean"] == pytest.approx(sum(len(e.ids) for e in encoded) / len(encoded), rel=0.15)
    assert found.steps == 4 and found.memory["total"] > 0 and found.flops_per_step["vision_tower"] > 0
    assert found.store_bytes is None and "connector_activations" not in found.memory
    assert found.exports_as is not None and type(model.whole).__name__ in found.exports_as
    console = Console(file=io.StringIO(), width=80)
    found.print(console)

    frozen = parse_config(dump_config(cfg), "native", ["model.lora.vit_layers=none"])
    kept = estimate(frozen, measure=False).store_bytes
    store = FeatureStore(
        tmp_path / "store", tower_fingerprint="", pipeline_fingerprint="", shape=model.kept_like[0],
        dtype=model.kept_like[1], max_bytes=10**9, ragged=True,
    )  # fmt: skip
    refs = list(dict.fromkeys([*data.train_refs(0, len(data.train)), *data.eval_refs()]))

    def encode(images: list[Any]) -> list[torch.Tensor]:
        return [kept for image in images if (kept := model.keep(image).features) is not None]

    store.fill(refs, encode, data.pipeline, batch_size=8)
    assert kept == pytest.approx(store.bytes_used, rel=0.15)


@pytest.mark.parametrize(
    "family", ["qwen3_vl", "qwen2_5_vl", "llava", "llava_onevision", "idefics3", "internvl", "gemma3"]
)
def test_the_eyes_of_a_native_model_cost_what_pytorch_counts(tmp_path: Path, family: Any) -> None:
    cfg = LlmConfig(name_or_path=str(tiny_native(tmp_path / "native", family)), precision="fp32")
    model, _ = load_native(cfg, CPU)
    picture = Image.new("RGB", (120, 64), "red")
    positions, pixels = model.geometry.takes((64, 120))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.patches([model.geometry.process(picture)])

    # Windows of Qwen2.5's attention are smaller than the image; SDPA over padded tiles is counted whole.
    assert eyes_flops(empty_native(cfg), pixels, positions) == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_what_is_not_known_of_a_native_model_is_said_and_what_can_never_be_is_an_error(
    tmp_path: Path, tiny_parts: TinyParts
) -> None:
    name = tiny_native(tmp_path / "native")
    (bare := tmp_path / "bare").mkdir()
    shutil.copy(name / "config.json", bare / "config.json")

    found = estimate(native_config(tmp_path, str(bare)), measure=False)  # no processor

    assert found.trainable.trainable > 0 and not found.sequence
    assert any("its processor cannot be loaded" in gap for gap in found.gaps)
    cfg = native_config(tmp_path, str(name))
    for image in Path(cfg.data.image_root or "").glob("*.png"):
        image.unlink()
    lost = estimate(cfg, measure=False)
    assert any("640 x 480 pixels assumed" in gap for gap in lost.gaps) and lost.sequence["tokens_mean"] > 0
    with pytest.raises(UserError, match=r"which is not known.*known are qwen3_vl"):
        estimate(native_config(tmp_path, str(tiny_parts.llm)), measure=False)
    elsewhere = native_config(tmp_path, "somebody/native")
    assert estimate(elsewhere, llm_config=bare / "config.json", measure=False).trainable == found.trainable
    named = estimate(elsewhere, llm_config=name / "config.json", measure=False)
    assert named.to_json() == estimate(native_config(tmp_path, str(name)), measure=False).to_json()
    with pytest.raises(UserError, match="--vision-config is about a tower of its own"):
        estimate(elsewhere, vision_config=bare / "config.json", measure=False)
