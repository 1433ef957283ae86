"""Where adapters would go, before any weight is loaded: the parts on the meta device, the list of layers, counted."""

from collections.abc import Mapping
from typing import Any

import torch

from beholder.config import LoraConfig, ModelConfig, VisionConfig
from beholder.model import vision as vision_door
from beholder.model.language import empty_language, source_of
from beholder.model.native import empty_native
from beholder.model.placement import AdapterSite, Part, language_part, resolve_targets, selectors, tower_part
from beholder.model.weights import loading


def empty_parts(cfg: ModelConfig) -> dict[str, Part]:
    """Language model and tower without weights, from their configuration files. Raises `UserError` where one is not
    found."""
    if cfg.native is not None:
        return empty_native(cfg.llm)
    language = language_part(empty_language(cfg.llm), cfg.llm.name_or_path)
    return {"vision": tower_part(_empty_tower(cfg.vision), cfg.vision.name_or_path), "language": language}


def planned_sites(parts: Mapping[str, Part], lora: LoraConfig) -> dict[str, list[AdapterSite]]:
    """By part, every layer that would get an adapter. Raises `UserError` as `placement.resolve_targets` does."""
    return {name: resolve_targets(parts[name], where, lora.r) for name, where in selectors(lora, parts).items()}


def _empty_tower(cfg: VisionConfig) -> Any:
    if cfg.name_or_path.startswith("timm/"):
        import timm

        name = vision_door.timm_name(cfg)
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, num_classes=0)
    from transformers import AutoConfig

    with loading(f"sizes of model.vision {cfg.name_or_path!r}", "Its config.json must be that of a vision tower."):
        name, where = source_of(cfg)
        config = AutoConfig.from_pretrained(name, **where)
    part = getattr(config, "vision_config", None) or config
    with torch.device("meta"):
        kind = vision_door.hf_class(part, cfg.name_or_path)
        auto = hasattr(kind, "from_config")
        model = kind.from_config(part, trust_remote_code=cfg.trust_remote_code) if auto else kind(part)
    vision_door._drop_pooling(model)
    return model
