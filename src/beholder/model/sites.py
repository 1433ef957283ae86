"""Where adapters would go, before any weight is loaded: the parts on the meta device, the list of layers, counted."""

from collections.abc import Mapping

from beholder.config import LoraConfig, ModelConfig
from beholder.model.native import empty_native
from beholder.model.placement import AdapterSite, Part, language_part, resolve_targets, selectors, tower_part
from beholder.model.student import empty_of
from beholder.model.vision import empty_tower


def empty_parts(cfg: ModelConfig) -> dict[str, Part]:
    """Language model and tower without weights, from their configuration files. Raises `UserError` where one is not
    found."""
    if cfg.native is not None:
        return empty_native(cfg.llm).parts
    language = language_part(empty_of(cfg), cfg.llm.name_or_path)
    return {"vision": tower_part(empty_tower(cfg.vision), cfg.vision.name_or_path), "language": language}


def planned_sites(parts: Mapping[str, Part], lora: LoraConfig) -> dict[str, list[AdapterSite]]:
    """By part, every layer that would get an adapter. Raises `UserError` as `placement.resolve_targets` does."""
    return {name: resolve_targets(parts[name], where, lora.r) for name, where in selectors(lora, parts).items()}
