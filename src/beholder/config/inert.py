"""Which settings have no effect beside which others: "a setting that has no effect in this stage is an error".

Rules only. `validate` turns a broken one into a message, `dump_config` leaves such settings out.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from beholder.config.data import SourceConfig
from beholder.config.run import RunConfig
from beholder.config.tree import SettingPath


@dataclass(frozen=True)
class Rule:
    """``settings`` (space-separated) do nothing when ``applies``, because of the settings ``because``."""

    settings: str
    applies: Callable[[RunConfig], bool]
    why: str
    because: str


def _never_captioned(c: RunConfig) -> bool:
    return c.golden_size == 0 or c.eval.run_golden_every == "never"


# fmt: off
INERT: tuple[Rule, ...] = (
    Rule(
        "model.lora.enable",
        lambda c: c.stage == "align", "stage align trains no adapters", "stage",
    ),
    Rule(
        "model.lora.r model.lora.alpha model.lora.dropout model.lora.strength model.lora.bias "
        "model.lora.target_modules train.lr.lora train.weight_decay.lora",
        lambda c: c.stage_name != "instruct" or not c.model.lora.enable,
        "there are no adapters (stage align, or model.lora.enable: false)", "stage model.lora.enable",
    ),
    Rule(
        "train.lr.connector train.weight_decay.connector",
        lambda c: not c.model.connector.trainable,
        "model.connector.trainable is false", "model.connector.trainable",
    ),
    Rule(
        "model.connector.resampler.depth model.connector.resampler.num_heads model.connector.resampler.dim "
        "model.connector.resampler.latent_std",
        lambda c: c.model.connector.resampler.kind != "perceiver",
        "only the perceiver resampler has it", "model.connector.resampler.kind",
    ),
    Rule(
        "model.connector.projector.hidden model.connector.projector.dropout",
        lambda c: c.model.connector.projector.kind == "linear",
        "a linear projector has none", "model.connector.projector.kind",
    ),
    Rule(
        "model.vision.weights",
        lambda c: not c.model.vision.name_or_path.startswith("timm/"),
        "it belongs to timm/<name> towers; a Hugging Face folder holds its own weights", "model.vision.name_or_path",
    ),
    Rule(
        "data.eval_ratio",
        lambda c: c.data.split == "none",
        "nothing is split off (split_mode none, or eval_sources)", "data.split_mode data.eval_sources",
    ),
    Rule(
        "data.eval_size",  # with eval_sources it says how many of them are used
        lambda c: c.data.split == "none" and not c.data.eval_sources,
        "nothing is split off (split_mode none)", "data.split_mode",
    ),
    Rule(
        "data.eval_ratio",
        lambda c: c.data.split == "stratified_len",
        "split_mode stratified_len goes by eval_size", "data.split_mode",
    ),
    Rule(
        "data.image_root",
        lambda c: not c.data.sources and c.data.dataset in ("webdataset", "parquet"),
        "webdataset and parquet carry their images", "data.dataset",
    ),
    Rule(
        "data.dataset",
        lambda c: bool(c.data.sources), "each of data.sources has its own", "data.sources",
    ),
    Rule(
        "data.prefetch_factor data.persistent_workers",
        lambda c: c.data.num_workers == 0, "data.num_workers is 0", "data.num_workers",
    ),
    Rule(
        "features.dir features.max_gb",
        lambda c: not c.features.enabled, "features.enabled is false", "features.enabled",
    ),
    Rule(
        "prompting.instruction prompting.instruction_multi",
        lambda c: c.template == "chat",
        "the chat template uses the records' own text", "stage prompting.template model.lora.enable",
    ),
    Rule(
        "prompting.chat_template prompting.system prompting.thinking",
        lambda c: c.template != "chat",
        "only the chat template has it", "stage prompting.template",
    ),
    Rule(
        "eval.qa_samples",
        lambda c: c.stage_name == "instruct",
        "stage instruct is asked the data's own questions (eval.caption_samples)", "stage model.lora.enable",
    ),
    Rule(
        "eval.retention_path",
        lambda c: c.stage_name != "instruct" or not c.model.lora.enable,
        "a frozen language model is compared bit by bit", "stage model.lora.enable",
    ),
    Rule(
        "eval.answer_tokens",
        lambda c: c.eval.caption_samples == 0, "eval.caption_samples is 0", "eval.caption_samples",
    ),
    Rule(
        "prompting.instruction_multi",
        lambda c: c.prompting.max_images_per_sample == 1,
        "prompting.max_images_per_sample is 1", "prompting.max_images_per_sample",
    ),
    Rule(
        "train.num_epochs",
        lambda c: c.train.train_steps is not None, "train.train_steps decides", "train.train_steps",
    ),
    Rule(
        "train.pack_len",
        lambda c: not c.train.packing, "train.packing is false", "train.packing",
    ),
    Rule(
        "train.min_lr_ratio",
        lambda c: c.train.lr_scheduler == "constant", "the schedule is constant", "train.lr_scheduler",
    ),
    Rule(
        "train.quick_eval_size",
        lambda c: c.train.quick_eval_steps == 0,
        "train.quick_eval_steps is 0 or not given", "train.quick_eval_steps",
    ),
    Rule(
        "train.quick_eval_steps",
        lambda c: c.train.quick_eval_size == 0,
        "train.quick_eval_size is 0 or not given", "train.quick_eval_size",
    ),
    Rule(
        "eval.golden_set_path eval.golden_seed eval.golden_batch_size eval.golden_generate.temperature "
        "eval.golden_generate.top_p eval.golden_generate.max_new_tokens eval.golden_generate.repetition_penalty",
        _never_captioned,
        "the fixed set is never captioned (eval.golden_size 0, or run_golden_every never)",
        "eval.golden_size eval.run_golden_every",
    ),
    Rule(
        "eval.run_golden_every",
        lambda c: c.golden_size == 0, "eval.golden_size is 0", "eval.golden_size",
    ),
    Rule(
        "eval.golden_size",
        lambda c: c.eval.golden_size is not None and c.golden_size > 0 and c.eval.run_golden_every == "never",
        "eval.run_golden_every is never", "eval.run_golden_every",
    ),
    Rule(
        "eval.clip_model",
        lambda c: c.eval.caption_samples == 0, "eval.caption_samples is 0", "eval.caption_samples",
    ),
    Rule(
        "eval.object_list",
        lambda c: c.eval.caption_samples == 0 and c.eval.qa_samples == 0,
        "no captions are written and no questions asked", "eval.caption_samples eval.qa_samples",
    ),
    Rule(
        "eval.golden_generate.top_p",
        lambda c: c.eval.golden_generate.temperature == 0,
        "temperature 0 is greedy", "eval.golden_generate.temperature",
    ),
)
# fmt: on
"""Which settings do nothing when. A reader of a config must be able to trust that what is written there counts."""


@dataclass(frozen=True)
class Inert:
    path: SettingPath
    why: str
    because: tuple[str, ...]
    """The settings that make it so."""


def inert_settings(cfg: RunConfig) -> list[Inert]:
    """Every setting of this config that has no effect, given or not."""
    found = [
        Inert(tuple(path.split(".")), rule.why, tuple(rule.because.split()))
        for rule in INERT
        if rule.applies(cfg)
        for path in rule.settings.split()
    ]
    for group in ("sources", "eval_sources"):
        for i, source in enumerate(getattr(cfg.data, group)):
            kinds = {"annotations_path": ("vqa",), "image_pattern": ("vqa", "gqa")}
            for name in [n for n, of in kinds.items() if isinstance(source, SourceConfig) and source.dataset not in of]:
                why = f"only {' and '.join(kinds[name])} files have it"
                found.append(Inert(("data", group, i, name), why, (f"data.{group}.{i}.dataset",)))
            if isinstance(source, SourceConfig) and source.dataset in ("webdataset", "parquet"):
                why = "webdataset and parquet carry their images"
                found.append(Inert(("data", group, i, "image_root"), why, (f"data.{group}.{i}.dataset",)))
    return found


def without_inert(cfg: RunConfig) -> RunConfig:
    """The same run, with every setting that has no effect back at its default."""
    raw = cfg.model_dump(mode="json")
    for inert in inert_settings(cfg):
        drop(raw, inert.path)
    return RunConfig.model_validate_json(json.dumps(raw))


def drop(data: Any, path: SettingPath) -> None:
    for step in path[:-1]:
        if isinstance(data, dict) and step not in data:
            return
        if isinstance(data, list) and not (isinstance(step, int) and step < len(data)):
            return
        if not isinstance(data, dict | list):
            return
        data = data[step]  # type: ignore[index]
    if isinstance(data, dict):
        data.pop(path[-1], None)
