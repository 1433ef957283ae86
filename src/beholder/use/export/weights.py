"""The weights of a joined model by the names of its parts, as they are used: adapters merged or left out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from beholder.model.placement import without_adapters
from beholder.model.vlm import VisionLanguageModel


@dataclass(frozen=True)
class Places:
    """Where the parts of a joined model stand in an exported class: what comes before the names of their weights."""

    vision: str
    decoder: str
    """In place of the language model's own ``model.``."""
    head: str = ""
    """Before what of the language model is not below its ``model.``."""

    def name(self, part: str, name: str) -> str:
        """The name in the exported class of what is ``name`` in ``part``, vision or language."""
        if part == "vision":
            return self.vision + name
        inner = name.removeprefix("model.")
        return self.head + name if inner == name else self.decoder + inner

    def state(self, model: VisionLanguageModel) -> dict[str, Tensor]:
        """The weights of tower and language model."""
        parts = {"vision": tower_state(model), "language": language_state(model)}
        return {self.name(part, k): v for part, state in parts.items() for k, v in state.items()}


OWN = Places("vision_tower.backbone.", "language_model.model.", "language_model.")
LLAVA = Places("model.vision_tower.", "model.language_model.")
IDEFICS3 = Places("model.vision_model.", "model.text_model.")
NATIVE = Places("", "model.")
"""A whole model's parts are named as it names them."""


def language_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    part = model.language.part
    return without_adapters(model.language.model, [site.name for site in part.adapters])


def tower_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    assert model.vision is not None
    part = model.vision.part
    return without_adapters(model.vision.backbone, [site.name for site in part.adapters])


def connector_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    return dict(model.connector.state_dict())
