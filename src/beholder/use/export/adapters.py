"""The adapters of a run as a PEFT folder beside their base."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from beholder.model.native import NativeModel
from beholder.model.placement import Part
from beholder.model.vlm import VisionLanguageModel
from beholder.use.export.weights import Places

ADAPTER = "adapter"
"""Folder of the adapters, below that of the base."""


def write_adapters(model: VisionLanguageModel | NativeModel, folder: Path, places: Places) -> None:
    """The adapters of all parts as one PEFT folder for the exported class."""
    from beholder.model.adapters import KEY_PREFIX, adapter_config, adapter_tensors

    parts: list[tuple[str, Part]] = [(n, p) for n, p in model.parts().items() if p.adapters]
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    for name, part in parts:
        for key, tensor in adapter_tensors(part).items():
            tensors[KEY_PREFIX + places.name(name, key.removeprefix(KEY_PREFIX))] = tensor.contiguous()
        targets += [places.name(name, part.prefix + site.name) for site in part.adapters]
    config = adapter_config(parts[0][1]) | {"target_modules": sorted(targets), "task_type": None}
    config["base_model_name_or_path"] = None
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
