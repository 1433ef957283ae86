"""A trained run opened for use: its model with what it has learned, and how it takes samples. And which model a
teacher is, without loading it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from beholder.config import RunConfig, TeacherConfig
from beholder.config.file import check_consent, load_config
from beholder.data import build_encoder
from beholder.data.build import build_pipeline
from beholder.data.chat import ChatEncoder
from beholder.data.images import ImagePipeline, NativePipeline
from beholder.model.build import Vlm, build_vlm
from beholder.model.weights import loading
from beholder.runs import sha256_file
from beholder.train import checkpoint, restore
from beholder.types import ImageInput, UserError


def identity(teacher: TeacherConfig) -> str:
    """sha256 that stands for a teacher's weights, without loading them: of a run, its checkpoint's manifest, which
    lists the hash of everything in it; of a native model in a folder, its files; of one from a hub, its commit. Raises
    `UserError` for one that is not there."""
    if teacher.run is not None:
        try:
            return sha256_file(checkpoint.resolve_checkpoint(teacher.run) / checkpoint.MANIFEST)
        except UserError as e:
            raise UserError(f"distill.teachers: the run {teacher.run}: {e}") from e
    assert teacher.native is not None
    folder = Path(teacher.native)
    if folder.is_dir():
        stamps = [(p, s.st_size, s.st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file() and (s := p.stat())]
        found = _hashed(tuple(stamps))
    else:
        found = f"{teacher.native}@{_commit(teacher.native, teacher.revision)}"
    return hashlib.sha256(f"{teacher.precision} {found}".encode()).hexdigest()


@lru_cache(maxsize=8)
def _hashed(stamps: tuple[tuple[Path, int, int], ...]) -> str:
    """Over whole files; asked for more than once in a run."""
    return " ".join(f"{path.name} {sha256_file(path)}" for path, *_ in stamps)


def _commit(name: str, revision: str | None) -> str:
    """Of a hub's model, as its configuration tells; one that is given needs no hub."""
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    from transformers import PretrainedConfig

    what = f"distill.teachers: native {name!r}"
    with loading(what, "Give a folder, or in revision the 40 digits of its commit, which need no network."):
        found, _ = PretrainedConfig.get_config_dict(name, revision=revision)
    commit = found.get("_commit_hash")
    if not isinstance(commit, str):
        raise UserError(f"{what}: its commit is not known; give the 40 digits of it in revision")
    return commit


@dataclass(frozen=True)
class TrainedRun:
    """A vision-language model as a run left it."""

    cfg: RunConfig
    model: Vlm
    tokenizer: Any
    encoder: ChatEncoder
    """As in training, but for the length: how long a training sample may be does not bound a conversation."""
    pipeline: ImagePipeline | NativePipeline
    step: int
    checkpoint: Path

    @property
    def folder(self) -> Path:
        """The run's own."""
        return checkpoint.run_of(self.checkpoint.resolve())

    def sizes(self, inputs: Iterable[ImageInput]) -> list[tuple[int, int]] | None:
        """What `encoder` lays the places of these images out by, where that is not one number."""
        return None if self.encoder.images is None else [size for image in inputs if (size := image.size) is not None]


def open_trained(run: str | Path, device: torch.device, overrides: Sequence[str] = ()) -> TrainedRun:
    """The model of a run folder (its best checkpoint, else its latest verified one) or of one of its
    ``checkpoints/step_<n>`` folders.

    ``overrides``: settings such as ``model.vision.weights=FILE``, for parts that lie elsewhere now; connector and
    adapters still refuse parts that they were not trained on.
    """
    where = checkpoint.resolve_checkpoint(run)
    folder = checkpoint.run_of(where.resolve())
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml beside its checkpoints; give a folder that `beholder run` wrote")
    cfg = load_config(folder / "config.yaml", overrides)
    check_consent(cfg, overrides)
    model, tokenizer = build_vlm(
        cfg.model, compute_precision=cfg.train.precision, device=device, seed=cfg.seed, base=restore.read_base(where)
    )
    restore.load_trained(where, model)
    trainer = restore.read_trainer(where)
    trained_with = trainer.get("fingerprints", {}).get("encoder")
    pipeline = build_pipeline(cfg, model.geometry)
    encoder = build_encoder(cfg, tokenizer, model.num_visual_tokens, pipeline)
    encoder.check_table(model.language.vocab)
    own = encoder.fingerprint
    if trained_with not in (None, own) and not any(o.startswith("prompting.") for o in overrides):
        raise UserError(
            f"{where}: the tokenizer or its chat template is not what the run was trained with, so its prompts are "
            "others. Put the original files back (model.llm.name_or_path, prompting.chat_template), or say how to "
            "prompt with --set prompting.…"
        )
    unbounded = cfg.prompting.model_copy(update={"max_seq_len": 10**9})
    return TrainedRun(
        cfg=cfg,
        model=model,
        tokenizer=tokenizer,
        encoder=build_encoder(
            cfg.model_copy(update={"prompting": unbounded}), tokenizer, model.num_visual_tokens, pipeline
        ),
        pipeline=pipeline,
        step=int(trainer["step"]),
        checkpoint=where,
    )
