"""A trained run, ready to look at images: ``load(RUN).generate(image, prompt)``.

The same encoder, decoder and preprocessing as in training serve here. Nothing is measured or written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from beholder.config import RunConfig
from beholder.configfile import load_config
from beholder.data import build_encoder
from beholder.data.chat import ChatEncoder
from beholder.data.images import ImagePipeline
from beholder.model.vlm import VisionLanguageModel, build_vlm
from beholder.train import checkpoint
from beholder.train.distributed import pick_device
from beholder.types import Example, ImageInput, ImageRef, ImageSlot, Turn, UserError

ImageLike = str | Path | Image.Image


@dataclass(frozen=True)
class Vlm:
    """A vision-language model as a run left it."""

    cfg: RunConfig
    model: VisionLanguageModel
    tokenizer: Any
    encoder: ChatEncoder
    pipeline: ImagePipeline
    step: int

    def generate(
        self,
        image: ImageLike | Sequence[ImageLike],
        prompt: str | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 0.9,
        max_new_tokens: int = 64,
        seed: int = 0,
    ) -> str:
        """What the model says about one or several images.

        ``prompt`` stands after the images and is literal text: a ``<image>`` typed in it stays text. None: the
        instruction the run was trained with. ``temperature`` 0 is greedy.
        """
        images = [image] if isinstance(image, str | Path | Image.Image) else list(image)
        if not images:
            raise UserError("give at least one image")
        limit = self.cfg.prompting.max_images_per_sample
        if len(images) > limit:
            raise UserError(f"{len(images)} images given, but the run was trained with at most {limit} a sample")
        inputs = [ImageInput(pixels=self._pixels(i)) for i in images]
        encoded = self.encoder.encode_prompt(self._example(len(images), prompt))
        ids = self.model.generate(
            [encoded],
            [inputs],
            eos_ids=self.encoder.eos_ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )[0]
        return self.encoder.decode(ids)

    def _pixels(self, image: ImageLike) -> torch.Tensor:
        return self.pipeline.from_pil(image) if isinstance(image, Image.Image) else self.pipeline.from_file(str(image))

    def _example(self, num_images: int, prompt: str | None) -> Example:
        """Images and the asked-for text; without a text the encoder's template writes the instruction."""
        refs = tuple(ImageRef(root="", path=f"image {k + 1}") for k in range(num_images))
        if prompt is None:
            return Example("generate", refs, ())
        slots = [part for k in range(num_images) for part in (ImageSlot(k), "\n")]
        return Example("generate", refs, (Turn("user", (*slots, prompt)),))


def load(run: str | Path, *, device: str = "auto", overrides: Sequence[str] = ()) -> Vlm:
    """The model of a run folder (its latest verified checkpoint) or of one of its ``checkpoints/step_<n>`` folders.

    ``overrides``: settings such as ``model.vision.weights=FILE``, for parts that lie elsewhere now; the connector
    still refuses parts that it was not trained on.
    """
    where = checkpoint.resolve_checkpoint(run)
    folder = where.resolve().parent.parent
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} has no config.yaml beside its checkpoints; give a folder that `beholder run` wrote")
    cfg = load_config(folder / "config.yaml", overrides)
    model, tokenizer = build_vlm(
        cfg.model, compute_precision=cfg.train.precision, device=pick_device(device), seed=cfg.seed
    )
    checkpoint.load_connector(where, model.connector, model.connector_info())
    return Vlm(
        cfg=cfg,
        model=model,
        tokenizer=tokenizer,
        encoder=build_encoder(cfg, tokenizer, model.num_visual_tokens),
        pipeline=ImagePipeline(model.geometry, cfg.data.max_megapixels),
        step=int(checkpoint.read_trainer(where)["step"]),
    )
