"""The whole model: images through tower and connector into the language model's embeddings, loss and answers out.

Losses come back per token, so that training, evaluation and the ablation share this forward. No loop, no optimizer and
no data file is known here.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from beholder.config import GenerateConfig
from beholder.model.connector import Connector
from beholder.model.fusion import check_images, scatter_images, spans_to_positions, supervised_positions
from beholder.model.language import LanguageModel
from beholder.model.losses import head_nll
from beholder.model.placement import AdapterSite
from beholder.model.vision import VisionTower
from beholder.model.weights import sketch_module
from beholder.types import Batch, Encoded, ImageInput, TokenLosses, TrainedPart, UserError


class VisionLanguageModel(nn.Module):
    """Tower, connector and language model. ``vision`` becomes None after `drop_vision`; features then come stored.

    The connector keeps fp32 weights and is computed under autocast in ``compute_precision``; the frozen parts compute
    in the precision they are stored in, so no weight of theirs is ever cast. Adapters have fp32 weights too.
    """

    def __init__(
        self, vision: VisionTower, connector: Connector, language: LanguageModel, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.vision: VisionTower | None = vision
        self.connector, self.language = connector, language
        self.geometry, self.compute_dtype = vision.geometry, compute_dtype
        self._info = {
            **connector.info(),
            "vision": {"name": vision.name, "fingerprint": sketch_module(vision.backbone)},
            "language": {"name": language.name, "fingerprint": sketch_module(language.model)},
        }
        assert not language.adapters, "adapters are attached afterwards: the fingerprint is the base's"
        self.train(False)

    @property
    def num_visual_tokens(self) -> int:
        return self.connector.num_tokens

    @property
    def device(self) -> torch.device:
        return self.language.device

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Only parts that learn change mode; frozen ones stay in eval (they see to it themselves)."""
        super().train(mode)
        self.connector.train(mode and any(p.requires_grad for p in self.connector.parameters()))
        return self

    @property
    def adapters(self) -> list[AdapterSite]:
        """The adapters on the language model; none without LoRA."""
        return self.language.adapters

    def adapters_off(self) -> AbstractContextManager[None]:
        """Inside, the language model is the base, bit for bit (the connector stays what it is)."""
        if not self.adapters:
            return nullcontext()
        from beholder.model import adapters

        return adapters.adapters_off(self.language)

    def drop_vision(self) -> None:
        """Free the tower's memory when every image comes with stored features."""
        self.vision = None

    def connector_info(self) -> dict[str, Any]:
        """What a checkpoint of the connector must say about itself to be refused for the right reason."""
        return dict(self._info)

    def trained_state(self) -> dict[str, TrainedPart]:
        """What was learned (`learned`): the connector, and the adapters where there are some."""
        return learned(self.language, TrainedPart(self.connector.state_dict(), self.connector_info()))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def patches(self, images: Sequence[ImageInput]) -> Float[Tensor, "m p dv"]:
        """Tower features of each image: the stored ones where given, else from pixels, in the order of ``images``."""
        g = self.geometry
        if not images:
            return torch.zeros(0, g.num_patches, g.d_vision, dtype=torch.bfloat16, device=self.device)
        raw = [i for i, image in enumerate(images) if image.features is None]
        rows: list[Tensor | None] = [image.features for image in images]
        if raw:
            if self.vision is None:
                raise UserError(
                    f"{len(raw)} of {len(images)} images have no stored features and the vision tower was released"
                )
            pixels = [images[i].pixels for i in raw]
            assert all(p is not None for p in pixels), "an image has neither features nor pixels"
            fresh = self.vision(torch.stack([p for p in pixels if p is not None]).to(self.device))
            if len(raw) == len(images):
                return fresh
            for i, feature in zip(raw, fresh, strict=True):
                rows[i] = feature
        stored = [r.to(self.device, non_blocking=True) for r in rows if r is not None]
        wrong = next((r for r in stored if r.shape != (g.num_patches, g.d_vision)), None)
        if wrong is not None:
            raise UserError(
                f"stored features have shape {list(wrong.shape)}, the tower gives [{g.num_patches}, {g.d_vision}]: the "
                "feature store belongs to another tower"
            )
        common = stored[0].dtype if len({r.dtype for r in stored}) == 1 else torch.float32
        return torch.stack([r.to(common) for r in stored])

    def visual_tokens(self, images: Sequence[ImageInput]) -> Float[Tensor, "m n dh"]:
        """What the language model is given for each image: ``[M, N, Dh]``, carrying the connector's graph."""
        patches = self.patches(images)
        with self._autocast():
            return self.connector(patches)

    def embed(self, batch: Batch) -> Float[Tensor, "b t dh"]:
        """Text embeddings with every reserved image position overwritten: the k-th run of a sample by its k-th
        image."""
        check_images(batch, self.num_visual_tokens)
        text = self.language.embed(batch.input_ids)
        return scatter_images(text, batch.image_positions, self.visual_tokens(batch.images).flatten(0, 1))

    def forward(self, batch: Batch) -> TokenLosses:
        """Loss of every supervised token. The token at position t is predicted from t - 1 of the same sample.

        The language-model head runs on those positions alone. Raises `UserError` for packed rows when the language
        model was found not to keep packed samples apart.
        """
        return token_losses(
            self.language, batch, lambda here: self.language.hidden(self.embed(here), here.position_ids)
        )

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Encoded],
        images: Sequence[Sequence[ImageInput]],
        how: GenerateConfig,
        *,
        eos_ids: list[int],
        seed: int = 0,
        streamer: Any = None,
    ) -> list[list[int]]:
        """New token ids for each prompt with its images, up to and with the end token; the prompt is not repeated.

        One batch. Raises `UserError` when a prompt has another number of image places than images.
        """
        assert len(prompts) == len(images)
        if not prompts:
            return []
        for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            if len(prompt.image_spans) != len(own):
                raise UserError(f"prompt {i + 1} has {len(prompt.image_spans)} image places but {len(own)} images")
        tokens = self.visual_tokens([image for own in images for image in own])
        embeds, used = [], 0
        for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            ids = torch.from_numpy(prompt.ids).to(self.device)[None]
            places = spans_to_positions(list(prompt.image_spans), self.num_visual_tokens, f"prompt {i + 1}")
            mine = tokens[used : used + len(own)]
            used += len(own)
            embeds.append(scatter_images(self.language.embed(ids), places.to(self.device), mine.flatten(0, 1))[0])
        return self.language.generate(embeds, how, eos_ids=eos_ids, seed=seed, streamer=streamer)

    @torch.no_grad()
    def text_logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of plain text through the same frozen path, for the proof that the language model is untouched."""
        return text_logits(self.language, ids)


def token_losses(language: LanguageModel, batch: Batch, hidden: Callable[[Batch], Tensor]) -> TokenLosses:
    """Loss of every supervised token; ``hidden`` gives the final hidden states ``[B, T, Dh]`` of the batch on the
    model's device. Raises as `VisionLanguageModel.forward` does."""
    if language.packing_error and batch.input_ids.shape[0] < len(batch.ids):
        raise UserError(language.packing_error)
    # Found where the batch lies: on a GPU these index searches would wait for the device.
    where, before = supervised_positions(batch.supervise, batch.position_ids)
    targets, owner = batch.input_ids.reshape(-1)[where], batch.sample_index.reshape(-1)[where]
    here = language.device
    states = hidden(batch.to(here))
    picked = states.reshape(-1, states.shape[-1]).index_select(0, before.to(here, non_blocking=True))
    nll, correct = head_nll(language.head, picked, targets.to(here, non_blocking=True), language.vocab)
    return TokenLosses(nll, owner.to(here, non_blocking=True), correct)


def text_logits(language: LanguageModel, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
    """Logits of plain text."""
    ids = ids.to(language.device)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    hidden = language.hidden(language.embed(ids), positions)
    return language.head(hidden.reshape(-1, hidden.shape[-1])).view(*ids.shape, -1)


def learned(language: LanguageModel, connector: TrainedPart) -> dict[str, TrainedPart]:
    """What was learned, by part, as a checkpoint keeps it: ``connector``, ``adapter`` where there are some, and
    ``merged_1``, … for what is part of the base's weights. `train.restore.load_trained` is the way back."""
    state = {"connector": connector}
    if language.adapters:
        from beholder.model import adapters

        state["adapter"] = TrainedPart(adapters.adapter_tensors(language), adapters.adapter_config(language))
    return state | {f"merged_{k}": part for k, part in enumerate(language.merged, 1)}
