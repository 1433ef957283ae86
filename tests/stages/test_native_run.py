"""A whole vision-language model from its files to a report and a chat: tiny, random, of the real class (Qwen3-VL)."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tests.evidence.test_catalogue import strangers
from tests.stages.dying import dying_at

from beholder.config import GREEDY, LlmConfig, LoraConfig, RunConfig
from beholder.config.file import ConfigError, dump_config, parse_config
from beholder.data import build_data
from beholder.data.collate import SampleBuilder
from beholder.data.images import ImageError, NativePipeline
from beholder.evidence import Evidence, load_evidence
from beholder.model import adapters
from beholder.model.native import FAMILIES, load_native
from beholder.prepare.preview import preview_config
from beholder.prepare.tiny import NativeFamily, colour_source, tiny_native
from beholder.probes.written import write
from beholder.runs import RunDir, sha256_file
from beholder.stages import run_stage
from beholder.stages.held_out import HeldOut
from beholder.stages.monitor_sets import MonitorSets
from beholder.stages.monitors import Cropped
from beholder.train.distributed import Dist
from beholder.types import Example, ImageInput, ImageRef, ImageSlot, Status, Turn, UserError
from beholder.use.vlm import load

FILES = ("adapter_model.safetensors", "connector.safetensors", "optimizer.safetensors")


class Setting:
    def __init__(self, folder: Path, family: NativeFamily = "qwen3_vl") -> None:
        self.native = tiny_native(folder / "native", family)
        source = colour_source(folder / "data", "jsonl", 48, dialogues=True)
        assert source.image_root is not None
        self.records, self.images = source.json_path, Path(source.image_root)

    def config(self, folder: Path, *more: str) -> RunConfig:
        raw: dict[str, Any] = {
            "run_name": "native", "output_dir": str(folder / "run"), "device": "cpu", "stage": "instruct",
            "model": {
                "native": {"name_or_path": str(self.native), "precision": "fp32"},
                "lora": {"enable": True, "r": 4, "dropout": 0.1},
            },
            "data": {"json_path": self.records, "image_root": str(self.images), "eval_size": 10},
            "train": {
                "train_steps": 4, "micro_batch_size": 4, "precision": "fp32", "save_every": 2, "log_every": 1,
                "num_threads": 1, "lr": {"lora": 1e-2},
            },
            "eval": {
                "golden_size": 2, "golden_generate": {"max_new_tokens": 4}, "caption_samples": 4, "answer_tokens": 4,
                "audit_turns": 6, "jitter_samples": 4,
            },
            "ablation": {"num_samples": 6},
        }  # fmt: skip
        return parse_config(yaml.safe_dump(raw), "native", more)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def finished(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert run_stage(setting.config(folder)).status == Status.SUCCEEDED
    return folder / "run"


@pytest.fixture(scope="module")
def evidence(finished: Path) -> Evidence:
    return load_evidence(finished)


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def test_it_learns_with_adapters_alone_and_its_base_is_bit_identical(finished: Path, evidence: Evidence) -> None:
    rows = {r.part: r for r in evidence.trainable}

    assert rows["lora"].trainable == rows["lora"].params == sum(a.params for a in evidence.adapters) > 0
    for frozen in ("vision", "language"):
        assert rows[frozen].params > 0 and rows[frozen].trainable == 0 and rows[frozen].intact is True
    assert evidence.text_only is not None and evidence.text_only.equal  # adapters off = base
    assert all(a.name.startswith("model.language_model.layers.") for a in evidence.adapters)
    steps = losses_of(finished)
    assert len(steps) == 4 and steps[-1][1] < steps[0][1]


def test_everything_a_stage_measures_is_measured(evidence: Evidence) -> None:
    names = {m.name for m in evidence.measurements}

    assert not strangers(evidence.measurements)
    assert {
        "learn.delta", "ablation.delta.shuffled", "ablation.delta.zero", "ablation.delta.noise",
        "answer.accuracy.correct", "answer.accuracy.shuffled", "answer.accuracy.none", "retention.kl",
        "merge.tokens_changed_pct", "audit.trained.answerable.alone", "collapse.worst", "cells.delta.question",
        "jitter.consistency",
    } <= names  # fmt: skip
    assert not any("Feature store" in gap for gap in evidence.gaps)


def test_the_report_says_what_it_is(finished: Path, evidence: Evidence) -> None:
    assert "native" in (finished / "report.html").read_text(encoding="utf-8")
    assert evidence.summary["Vision"].startswith("its own tower and connector")
    assert parse_config(dump_config(parse_config(evidence.config_yaml))) == parse_config(evidence.config_yaml)


@pytest.mark.slow
def test_with_what_is_kept_of_images_it_is_the_run_without_bit_for_bit(
    setting: Setting, finished: Path, evidence: Evidence, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Training, losses and what is written; with two loader processes as without."""
    assert run_stage(setting.config(tmp_path / "not", "features.enabled=false")).status == Status.SUCCEEDED
    capsys.readouterr()
    assert run_stage(setting.config(tmp_path / "two", "data.num_workers=2")).status == Status.SUCCEEDED

    assert "[features] 0 computed, 26 reused" in capsys.readouterr().out  # the finished run computed them
    for folder in ("not", "two"):
        run = tmp_path / folder / "run"
        assert losses_of(run) == losses_of(finished)
        other = load_evidence(run)
        assert {m.name: m.value for m in other.measurements} == {m.name: m.value for m in evidence.measurements}
        for name in FILES:
            assert sha256_file(run / "checkpoints" / "step_4" / name) == (
                sha256_file(finished / "checkpoints" / "step_4" / name)
            ), name


def test_resumed_it_is_the_straight_run_bit_for_bit(setting: Setting, finished: Path, tmp_path: Path) -> None:
    with dying_at(3):
        run_stage(setting.config(tmp_path))
    run = tmp_path / "run"
    assert [p.name for p in (run / "checkpoints").glob("step_*")] == ["step_2"]

    assert run_stage(setting.config(tmp_path)).status == Status.SUCCEEDED

    assert losses_of(run) == losses_of(finished)
    for name in FILES:
        assert sha256_file(run / "checkpoints" / "step_4" / name) == (
            sha256_file(finished / "checkpoints" / "step_4" / name)
        ), name


# peft 0.21 asks transformers 5.23 in words that the latter is about to drop.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_its_checkpoint_is_peft_s_and_computes_the_same_there(setting: Setting, finished: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    vlm = load(finished, device="cpu")
    base = AutoModelForImageTextToText.from_pretrained(str(setting.native), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(vlm.checkpoint))
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(vlm.model.text_logits(ids), theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert not load_file(vlm.checkpoint / "connector.safetensors")
    vlm.save_merged(tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(vlm.model.text_logits(ids), merged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "merged" / "processor_config.json").exists()


def test_a_class_that_does_not_keep_packed_samples_apart_is_padded_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma 3: in a packed row transformers' masks let the positions of an image of a later sample see others."""
    setting = Setting(tmp_path, "gemma3")
    cfg = setting.config(tmp_path, "train.train_steps=1", "eval.jitter_samples=0")
    assert cfg.train.packing and cfg.model.native is not None
    model, _ = load_native(cfg.model.llm, torch.device("cpu"))
    apart = model.language.packing_error is None  # so with transformers 5.15

    assert run_stage(cfg).status == Status.SUCCEEDED

    assert ("[packing] off, one sample a row" in capsys.readouterr().out) is not apart
    evidence = load_evidence(tmp_path / "run")
    assert any(gap.startswith("Packing: off") for gap in evidence.gaps) is not apart


def test_it_chats_in_pieces_as_in_one_about_images_of_any_size(setting: Setting, finished: Path) -> None:
    vlm = load(finished, device="cpu")
    small, wide = Image.new("RGB", (40, 40), "red"), Image.new("RGB", (200, 60), "red")
    said = vlm.chat("What colour is it?", wide, max_new_tokens=6)

    assert said == "".join(vlm.stream("What colour is it?", wide, max_new_tokens=6)).strip()
    assert vlm.num_tokens("What colour is it?", wide) > vlm.num_tokens("What colour is it?", small)
    file = min(setting.images.glob("*.png"))
    with Image.open(file) as image:
        assert vlm.chat("Which?", str(file), max_new_tokens=4) == vlm.chat("Which?", image.copy(), max_new_tokens=4)
    assert isinstance(vlm.chat("No picture at all?", max_new_tokens=4), str)


def test_a_prompt_is_laid_out_for_the_part_of_an_image_that_is_shown(finished: Path, tmp_path: Path) -> None:
    vlm = load(finished, device="cpu")
    Image.new("RGB", (120, 120), "red").save(tmp_path / "a.png")
    ref = ImageRef(str(tmp_path), "a.png")
    assert isinstance(vlm.pipeline, NativePipeline)
    view = Cropped(vlm.pipeline, (0.0, 0.0))
    part = view(ref)
    assert isinstance(part, ImageInput) and part.size == (113, 113)  # fewer patches than the whole has
    example = Example("a", (ref,), (Turn("user", (ImageSlot(0), "What colour?")),), file="test")
    builder = SampleBuilder(vlm.encoder, view, None, on_bad_image="error")
    four = GREEDY.model_copy(update={"max_new_tokens": 4})

    (said,) = write(vlm.model, vlm.encoder, builder, [example], four)

    with Image.open(tmp_path / "a.png") as image:
        assert said.prediction.strip() == vlm.chat("What colour?", image.crop((0, 0, 113, 113)), max_new_tokens=4)


@pytest.mark.parametrize("where", ["held out", "trained on"])
def test_a_broken_image_stops_the_run_or_is_a_named_reject(finished: Path, tmp_path: Path, where: str) -> None:
    vlm, source = load(finished, device="cpu"), colour_source(tmp_path / "data", "jsonl", 24, dialogues=True)
    assert isinstance(vlm.pipeline, NativePipeline)
    cfg = vlm.cfg.model_copy(
        update={"data": vlm.cfg.data.model_copy(update={
            "json_path": source.json_path, "image_root": source.image_root, "eval_size": 6, "on_bad_image": "error",
        })}
    )  # fmt: skip
    skipping = cfg.model_copy(update={"data": cfg.data.model_copy(update={"on_bad_image": "skip"})})
    data = build_data(cfg, vlm.tokenizer, vlm.pipeline.processor, None)
    broken = data.eval_examples[0] if where == "held out" else data.train.example_at(0)
    for ref in broken.images:
        Path(ref.root, ref.path).write_bytes(b"no picture")

    with pytest.raises(ImageError, match=r"needed by .*not_an_image"):
        data.without_unusable(skip_bad_images=False)

    left = data.without_unusable(skip_bad_images=True)
    assert (broken.id in {r.id for r in left.rejects}) == (where == "held out")
    monitors = [
        MonitorSets(c, data, HeldOut(c, RunDir(tmp_path), Dist(device=vlm.model.device), data)) for c in (cfg, skipping)
    ]
    with pytest.raises(ImageError, match="needed by"):
        monitors[0].fits(broken)
    assert not monitors[1].fits(broken)
    four = GREEDY.model_copy(update={"max_new_tokens": 4})
    good = next(e for e in data.eval_examples if not {r.path for r in e.images} & {r.path for r in broken.images})
    for bad in ("skip", "error"):
        builder = SampleBuilder(data.encoder, data.pipeline, None, on_bad_image=bad)
        if bad == "skip":
            assert [w.id for w in write(vlm.model, data.encoder, builder, [broken, good], four)] == [good.id]
        else:
            with pytest.raises(ImageError, match="needed by"):
                write(vlm.model, data.encoder, builder, [broken, good], four)


def test_adapters_on_its_tower_alone_are_merged_too(setting: Setting, finished: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    vlm = load(finished, device="cpu")
    model, _ = load_native(LlmConfig(name_or_path=str(setting.native), precision="fp32"), torch.device("cpu"))
    with pytest.raises(UserError, match="no adapters to merge; its model is the base"):
        replace(vlm, model=model).save_merged(tmp_path / "nothing")
    part = model.parts()["vision"]
    adapters.attach(part, LoraConfig(enable=True, r=2, vit_layers="last-1"), 0)
    with torch.no_grad():
        for weight in adapters.adapter_parameters(part).values():
            weight += 0.1

    replace(vlm, model=model).save_merged(tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    image = vlm.pipeline.from_pil(Image.new("RGB", (64, 64), "red"))
    assert isinstance(image, ImageInput) and image.inputs is not None
    with torch.no_grad():
        own = model.patches([image])
        theirs = torch.cat(list(merged.model.get_image_features(**image.inputs, return_dict=True).pooler_output))
        base = vlm.model.patches([image])
    torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(own, base, rtol=1e-2)


def test_a_run_on_another_base_is_refused(setting: Setting, finished: Path, tmp_path: Path) -> None:
    other = tiny_native(tmp_path / "other", seed=1)

    with pytest.raises(UserError, match=r"native\.fingerprint"):
        load(finished, device="cpu", overrides=[f"model.native.name_or_path={other}"])


def test_moved_files_are_found_again(setting: Setting, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(setting.native, tmp_path / "moved")

    assert load(finished, device="cpu", overrides=[f"model.native.name_or_path={tmp_path / 'moved'}"]).step == 4


def test_preview_needs_the_processor_alone(setting: Setting, tmp_path: Path) -> None:
    shutil.copytree(setting.native, tmp_path / "native", ignore=shutil.ignore_patterns("model.safetensors"))
    shown = preview_config(setting.config(tmp_path, f"model.native.name_or_path={tmp_path / 'native'}"), 1, tmp_path)

    assert any(segment.kind == "image" for segment in shown.items[0].segments)
    assert (tmp_path / "sample_0_image_1.png").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ("model.llm.name_or_path=x", "model.llm.name_or_path: has no effect here: model.native names a whole"),
        ("model.connector.num_visual_tokens=4", "model.connector.num_visual_tokens: has no effect here"),
        ("prompting.im_start=x", "prompting.im_start: has no effect here: model.native does it in its own way"),
        ("stage=align", "model.native has a connector already, which stage align would train"),
        ("prompting.template=conversation", "model.native reads conversations in its own chat template"),
        ("data.augment=random_crop", "model.native lays a sample out by its image's own size"),
        ("model.lora.enable=false", "nothing would be trained: model.lora.enable and model.connector.trainable"),
        ("model.native.trust_remote_code=true", "no such setting in model.native"),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(setting: Setting, tmp_path: Path, more: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        setting.config(tmp_path, more)


def test_a_class_that_takes_one_image_a_sample_refuses_a_run_of_several(tmp_path: Path) -> None:
    cfg = Setting(tmp_path, "llava_onevision").config(tmp_path, "stage=multi")

    with pytest.raises(UserError, match="max_images_per_sample is 6, but this class of native model takes 1 image"):
        run_stage(cfg)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"qwen3_vl"}))
def test_every_class_is_trained_watched_measured_resumed_and_talked_to(tmp_path: Path, family: NativeFamily) -> None:
    setting = Setting(tmp_path, family)
    (tmp_path / "unlike").mkdir()
    rows = []
    for k in range(4):
        Image.new("RGB", (40 + 8 * k, 40), (60 * k, 10, 90)).save(tmp_path / "unlike" / f"{k}.png")
        rows.append({"image": f"{k}.png", "shows": [f"shade {k}"], "kind": "shades"})
    (tmp_path / "unlike" / "ood.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    watched = str(tmp_path / "unlike" / "ood.jsonl")
    sets = (
        f"eval.ood.path={watched}", f"eval.irrelevant.path={watched}", "eval.gap_samples=4", "eval.strengths=[0.5]",
        "eval.retention_every=eval", "eval.caption_samples=2", "model.lora.vit_layers=first-1", "train.lr.vision=1e-2",
        "train.full_eval_every=2", "guardrails.caption_sanity.enable=false", "guardrails.hallucination.enable=false",
    )  # fmt: skip
    straight = setting.config(tmp_path / "straight", *sets)
    assert run_stage(straight).status == Status.SUCCEEDED
    with dying_at(3):
        run_stage(setting.config(tmp_path / "killed", *sets))
    assert run_stage(setting.config(tmp_path / "killed", *sets)).status == Status.SUCCEEDED

    one, two = tmp_path / "straight" / "run", tmp_path / "killed" / "run"
    assert losses_of(one) == losses_of(two)
    for name in (*FILES, "vision_adapter.safetensors"):
        found = [sha256_file(run / "checkpoints" / "step_4" / name) for run in (one, two)]
        assert found[0] == found[1], name
    e = load_evidence(one)
    assert not strangers(e.measurements)
    assert {
        "irrelevant.pass", "ood.hallucination", "ood.blind", "sane.captions", "gap.generalisation",
        "jitter.consistency", "retention.kl", "ablation.delta.shuffled", "strength.loss",
        "cross.ood.plain", "cells.delta.question",
    } <= {m.name for m in e.measurements}  # fmt: skip
    assert all(row.intact for row in e.trainable if row.part in ("vision", "language"))
    assert any(gap.startswith("Feature store: switched off, because its tower has adapters") for gap in e.gaps)
    readings = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in readings if "monitors" in r] == [0, 2, 4]
    assert (one / "report.html").stat().st_size > 10_000
    vlm = load(one, device="cpu")
    assert isinstance(vlm.chat("Which?", Image.new("RGB", (70, 50), "red"), max_new_tokens=3), str)
