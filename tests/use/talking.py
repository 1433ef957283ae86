"""A run folder of stage instruct without the training: random connector and adapters, saved as a run saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tests.conftest import TinyParts, make_config

from beholder.config import GenerateConfig
from beholder.config.file import dump_config
from beholder.model.adapters import adapter_tensors, load_adapter_tensors
from beholder.model.build import build_vlm
from beholder.model.vlm import VisionLanguageModel
from beholder.train import checkpoint

CHATTY = {
    "stage": "instruct", "model.lora": {"enable": True, "r": 4}, "prompting.max_images_per_sample": 1,
    "prompting.max_seq_len": 128,
}  # fmt: skip


def briefly(max_new_tokens: int) -> GenerateConfig:
    return GenerateConfig(temperature=0.0, max_new_tokens=max_new_tokens)


def untrained_run(parts: TinyParts, folder: Path, **sets: Any) -> Path:
    """The run folder; ``sets`` are settings beside `CHATTY`, by dotted path."""
    cfg = make_config(parts, folder, **(CHATTY | sets))
    run = Path(cfg.run_dir)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(cfg))
    model, _ = build_vlm(cfg.model, compute_precision="fp32", device=torch.device("cpu"), seed=cfg.seed)
    for step in (1, 2):
        _disturb(model, step)
        checkpoint.save_checkpoint(
            run / "checkpoints", step, model.trained_state(), optimizer_state={},
            trainer={"config": cfg.model_dump(mode="json")}, keep=3,
        )  # fmt: skip
    return run


@torch.no_grad()
def _disturb(model: VisionLanguageModel, seed: int) -> None:
    """Adapters start at zero effect; these do something, each step something else."""
    draw = torch.Generator().manual_seed(seed)
    for weight in model.connector.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=draw))
    parts = model.parts()
    for part in (parts[name] for name in ("language", "vision") if parts[name].adapters):
        noise = {name: 0.1 * torch.randn(t.shape, generator=draw) for name, t in adapter_tensors(part).items()}
        load_adapter_tensors(part, noise)
