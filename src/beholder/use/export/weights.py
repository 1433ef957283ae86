"""The weights of a joined model by the names of its parts, as they are used: adapters merged or left out."""

from __future__ import annotations

from torch import Tensor

from beholder.model.placement import without_adapters
from beholder.model.vlm import VisionLanguageModel


def language_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    part = model.language.part
    return without_adapters(model.language.model, [site.name for site in part.adapters])


def tower_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    assert model.vision is not None
    part = model.vision.part
    return without_adapters(model.vision.backbone, [site.name for site in part.adapters])


def connector_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    return dict(model.connector.state_dict())
