"""A small but whole run: real tiny parts, real data, the real loop and checkpoints; for tests and their subprocesses.

`train` is what a stage does around the loop, without evaluation. two_processes.py runs it under torchrun,
kill_resume.py kills it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beholder.config import ModelConfig, SourceConfig, TrainConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import Layout, SampleBuilder, TrainStream
from beholder.data.images import ImagePipeline
from beholder.data.mixture import Mixture
from beholder.data.sources import Records, open_sources
from beholder.model.build import build_vlm
from beholder.model.plan import param_groups
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.tiny import colour_set, tiny_llm, tiny_vision
from beholder.runs import RunDir
from beholder.train.checkpoint import MANIFEST, latest_checkpoint, save_checkpoint
from beholder.train.distributed import Dist
from beholder.train.engine import Callback, FitResult, LoopState, fit
from beholder.train.objectives import Objective, next_token
from beholder.train.optim import build_optimizer, optimizer_tensors
from beholder.train.reporter import Reporter
from beholder.train.restore import load_for_resume
from beholder.types import FeatureReader


@dataclass(frozen=True)
class Tiny:
    """Parts on disk."""

    llm: Path
    vision: str
    records: Path
    images: Path

    @staticmethod
    def make(folder: Path, num_records: int = 24) -> Tiny:
        llm = tiny_llm(folder / "llm")
        vision, _ = tiny_vision(folder / "vision")
        # varied: captions of 8 to 45 tokens, so that batches are ragged.
        records, images = colour_set(folder / "data", num_records, captions="varied")
        return Tiny(llm, vision, records, images)

    @staticmethod
    def at(folder: Path) -> Tiny:
        return Tiny(
            folder / "llm", str(folder / "vision"), folder / "data" / "records.jsonl", folder / "data" / "images"
        )

    def model(
        self, *, dropout: float = 0.0, precision: str = "fp32", seed: int = 7, lora: dict[str, Any] | None = None,
        **connector: Any,
    ) -> VisionLanguageModel:  # fmt: skip
        cfg = ModelConfig.model_validate({
            "llm": {"name_or_path": str(self.llm), "precision": precision},
            "vision": {"name_or_path": self.vision, "precision": precision},
            "connector": {
                "num_visual_tokens": 4, "vision_ln": True, "resampler": {"depth": 1, "num_heads": 4, "dim": 32},
                "projector": {"hidden": 48, "dropout": dropout}, **connector,
            },
            "lora": {"enable": lora is not None, **(lora or {})},
        })  # fmt: skip
        return build_vlm(cfg, compute_precision=precision, device=torch.device("cpu"), seed=seed)[0]

    def open(self) -> Records:
        source = SourceConfig(dataset="jsonl", json_path=str(self.records), image_root=str(self.images))
        return open_sources([source], image_token="<image>", max_images=2, on_reject="error")

    def stream(
        self, model: VisionLanguageModel, cfg: TrainConfig, *, dist: Dist | None = None, num_workers: int = 0,
        seed: int = 3, on_bad_image: Any = "error", features: FeatureReader | None = None,
        multi_image_fraction: float = 0.3,
    ) -> TrainStream:  # fmt: skip
        from transformers import AutoTokenizer

        encoder = ChatEncoder(
            AutoTokenizer.from_pretrained(self.llm), num_visual_tokens=model.num_visual_tokens, max_seq_len=256,
            template="caption", instruction="Describe.", instruction_multi="Describe each.",
        )  # fmt: skip
        records = self.open()
        builder = SampleBuilder(encoder, ImagePipeline(model.geometry, 50.0), features, on_bad_image=on_bad_image)
        dist = dist or Dist()
        return TrainStream(
            Mixture(records, np.arange(len(records)), seed=seed, multi_image_fraction=multi_image_fraction), builder,
            Layout(packing=cfg.packing, pack_len=cfg.pack_len or 256, pad_to_multiple_of=8),
            micro_batch_size=cfg.micro_batch_size, gradient_accum=cfg.gradient_accum, rank=dist.rank,
            world_size=dist.world_size, num_workers=num_workers, timeout_s=cfg.timeout_s,
        )  # fmt: skip


def settings(**changes: Any) -> TrainConfig:
    base = {
        "micro_batch_size": 4,
        "precision": "fp32",
        "lr": {"connector": 3e-3},
        "save_every": 1000,
        "log_every": 1000,
    }
    return TrainConfig.model_validate({**base, **changes})


@dataclass
class Outcome:
    result: FitResult
    model: VisionLanguageModel
    optimizer: torch.optim.Optimizer
    stream: TrainStream
    saved: list[int] = field(default_factory=list)


def optimizer_for(model: VisionLanguageModel, cfg: TrainConfig) -> torch.optim.Optimizer:
    groups = param_groups(model, cfg.lr.model_dump(), cfg.weight_decay.model_dump())
    return build_optimizer(groups, cfg.betas)


def train(
    tiny: Tiny,
    run: RunDir,
    cfg: TrainConfig,
    *,
    total_steps: int,
    model: VisionLanguageModel | None = None,
    dist: Dist | None = None,
    resume: bool = True,
    objective: Objective = next_token,
    callbacks: Sequence[Callback] = (),
    seed: int = 11,
    on_save: Callable[[int], None] = lambda step: None,
    dropout: float = 0.0,
    **stream_options: Any,
) -> Outcome:
    """What a stage does around `fit`: lock, resume from the latest checkpoint, train, save."""
    dist = dist or Dist()
    run.create()
    model = model or tiny.model(dropout=dropout)
    optimizer = optimizer_for(model, cfg)
    stream = tiny.stream(model, cfg, dist=dist, **stream_options)
    state, start = LoopState(), 0
    latest = latest_checkpoint(run.checkpoints, warn=lambda message: None) if resume else None
    if latest is not None:
        restored = load_for_resume(latest, model, optimizer)
        start, state = restored.step, LoopState.from_dict(restored.trainer["loop"])
    if dist.is_main:
        run.trim_metrics(start)
    saved: list[int] = []

    def save(step: int) -> None:
        on_save(step)
        saved.append(step)
        save_checkpoint(
            run.checkpoints, step, model.trained_state(),
            optimizer_state=optimizer_tensors(optimizer),
            trainer={"loop": state.as_dict(), "config": {}, "data_cursor": step * stream.samples_per_step},
            keep=cfg.keep_checkpoints,
        )  # fmt: skip

    reporter = Reporter(
        total_steps=total_steps, steps_per_epoch=6, samples_per_step=stream.samples_per_step, live=False, enabled=False
    )
    result = fit(
        model, objective, stream, cfg=cfg, total_steps=total_steps, optimizer=optimizer, run=run, seed=seed, save=save,
        dist=dist, start_step=start, state=state, callbacks=callbacks, reporter=reporter,
    )  # fmt: skip
    return Outcome(result, model, optimizer, stream, saved)


EXACT = ("step", "epoch", "loss", "grad_norm", "lr.connector", "tokens", "positions", "samples", "images")
"""Fields of a metrics line that must not depend on where a run was interrupted. Times do."""


def exact_log(run: RunDir) -> list[dict[str, Any]]:
    return [{k: r[k] for k in EXACT} for r in run.metrics() if "loss" in r]


def fill_disk(monkeypatch: Any, num_bytes: int) -> None:
    """Let this process write ``num_bytes`` more through os.write (standard output aside); then the disk is full."""
    left = [num_bytes]
    real = os.write

    def write(fd: int, data: Any) -> int:
        if fd <= 2:
            return real(fd, data)
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = real(fd, bytes(data)[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)


def vouch_for(checkpoint: Path, name: str, content: str) -> None:
    """Put other content into a file of a checkpoint and into its manifest, as somebody does who edits one by hand."""
    raw = content.encode("latin-1")
    (checkpoint / name).write_bytes(raw)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
