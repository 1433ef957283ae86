"""The one place where model settings become parts and parts a model."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from beholder.config import ModelConfig
from beholder.model.connector import build_connector
from beholder.model.language import load_language, load_tokenizer
from beholder.model.learned import apply_base, learn_whole, unfreeze
from beholder.model.native import NativeModel, load_native
from beholder.model.placement import selectors
from beholder.model.student import check_budget, make_student
from beholder.model.vision import check_reached, load_vision
from beholder.model.vlm import VisionLanguageModel
from beholder.model.weights import DTYPES
from beholder.types import TrainedPart, UserError

Vlm = VisionLanguageModel | NativeModel
"""A model that sees: joined here from its parts, or whole as it came. What stages and probes ask of one, both have."""


def build_vlm(
    cfg: ModelConfig, *, compute_precision: str, device: torch.device, seed: int,
    base: Mapping[str, TrainedPart] = MappingProxyType({}),
) -> tuple[Vlm, Any]:  # fmt: skip
    """(model, tokenizer) from the settings: tower and language model strictly loaded and frozen, a fresh connector and,
    with ``lora.enable``, fresh adapters, which change nothing before they have learned. ``student``: a language model
    that is made. ``native``: a whole model in place of the three.

    The connector's and the adapters' weights come from ``seed`` alone, so every rank starts from the same ones. Raises
    `UserError` for whatever does not fit together. ``base``: what earlier runs have learned and is part of the base now
    (`train.restore.read_base`), in this order; ``connector`` there says that a native model's has learned. A checkpoint
    named in ``connector.load_checkpoint`` is loaded by the caller.
    """
    if cfg.native is not None:
        model, tokenizer = load_native(cfg.llm, device)
        if cfg.connector.trainable or "connector" in base:
            model.free_connector()
    else:
        model, tokenizer = _joined(cfg, compute_precision, device, seed, held="language" in base)
    parts = model.parts()
    apply_base(parts, base)  # after the checks of the language model, which are about its files
    if cfg.vision.unfreeze:
        unfreeze(parts["vision"], cfg.vision.unfreeze)
    if cfg.lora.enable:
        from beholder.model import adapters

        for name, selector in selectors(cfg.lora, parts).items():
            adapters.attach(parts[name], cfg.lora, seed, selector)
    check_reached(parts["vision"])
    return model, tokenizer


def _joined(
    cfg: ModelConfig, compute_precision: str, device: torch.device, seed: int, *, held: bool
) -> tuple[VisionLanguageModel, Any]:
    """``held``: a checkpoint holds the language model's own weights."""
    if held and cfg.student is None:
        raise UserError(
            "the checkpoint to go on from holds a language model of its own (model.student), and this config has none; "
            "give the same model.student section, with learns: none to keep it as it is"
        )
    vision = load_vision(cfg.vision, device)
    made = None
    if cfg.student is not None:
        made = make_student(cfg.student, cfg.llm, load_tokenizer(cfg.llm), seed, held=held)
    language, tokenizer = load_language(cfg.llm, device, made)
    if cfg.student is not None:
        language.compute_dtype = DTYPES[compute_precision]
        learn_whole(language.part, cfg.student.learns)
    g = vision.geometry
    connector = build_connector(
        cfg.connector, num_patches=g.num_patches, d_vision=g.d_vision, d_text=language.d_text,
        embed_rms=language.embed_rms, seed=seed,
    ).to(device)  # fmt: skip
    connector.requires_grad_(cfg.connector.trainable)
    parts = {"vision": vision, "connector": connector, "language": language}
    counted = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    check_budget(cfg.student and cfg.student.max_params, counted)
    return VisionLanguageModel(vision, connector, language, DTYPES[compute_precision]), tokenizer
