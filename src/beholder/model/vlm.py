"""The whole model: images through tower and connector into the language model's embeddings, loss and answers out.

Losses come back per token, so that training, evaluation and the ablation share this forward. No loop, no optimizer and
no data file is known here.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from beholder.config import GenerateConfig
from beholder.model.connector import Connector
from beholder.model.fusion import check_images, scatter_images, spans_to_positions, supervised_positions
from beholder.model.language import LanguageModel
from beholder.model.learned import learned_state
from beholder.model.losses import head_nll
from beholder.model.placement import AdapterSite, Part
from beholder.model.vision import VisionTower
from beholder.model.weights import hash_tensors, sketch_module
from beholder.types import (
    Batch,
    Encoded,
    ImageInput,
    LayerKeeper,
    Supervised,
    TokenLosses,
    TrainedPart,
    UserError,
)


def _sample_keys(batch: Batch) -> list[bytes]:
    """sha256 of each sample of a batch on the CPU: its tokens, and what it is shown."""
    keys: list[bytes] = []
    flat, ids = batch.sample_index.reshape(-1), batch.input_ids.reshape(-1)
    for k in range(len(batch.ids)):
        digest = hashlib.sha256(ids[flat == k].numpy().tobytes())
        for owner, image in zip(batch.image_sample.tolist(), batch.images, strict=True):
            shown = image.features if image.features is not None else image.pixels
            if owner == k and shown is not None:
                digest.update(f"{shown.dtype}{tuple(shown.shape)}".encode())
                digest.update(shown.contiguous().view(torch.uint8).numpy().tobytes())
        keys.append(digest.digest())
    return keys


def check_places(prompts: Sequence[Encoded], images: Sequence[Sequence[ImageInput]]) -> None:
    """Refuse a prompt with another number of image places than images."""
    for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        if len(prompt.image_spans) != len(own):
            raise UserError(f"prompt {i + 1} has {len(prompt.image_spans)} image places but {len(own)} images")


class Seeing(nn.Module):
    """What every model that sees has, joined here from its parts or whole as it came (`model.native`): parts that can
    learn in pieces, what they have learned, and losses on supervised positions alone."""

    language: LanguageModel
    connector: Any
    _info: dict[str, Any]

    def parts(self) -> dict[str, Part]:
        """What can learn in pieces, by name."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.language.device

    @property
    def adapters(self) -> list[AdapterSite]:
        """The adapters on all parts, those on the tower first; none without LoRA."""
        return [site for part in self.parts().values() for site in part.adapters]

    def adapters_off(self) -> AbstractContextManager[None]:
        """Inside, language model and tower are their base, bit for bit (the connector, and what of the tower learns
        itself, stay what they are)."""
        return self._all_adapters("adapters_off")

    def adapters_merged(self) -> AbstractContextManager[None]:
        """Inside, the adapters are part of the weights, as `adapters.merged` has it."""
        return self._all_adapters("merged")

    def at_strength(self, strength: float) -> AbstractContextManager[None]:
        """Inside, the adapters are used at that share of what they learned, as `adapters.at_strength` has it."""
        return self._all_adapters("at_strength", strength)

    @contextmanager
    def _all_adapters(self, how: Literal["adapters_off", "at_strength", "merged"], *more: float) -> Iterator[None]:
        with ExitStack() as stack:
            if self.adapters:
                from beholder.model import adapters

                for part in self.parts().values():
                    stack.enter_context(getattr(adapters, how)(part, *more))
            yield

    def connector_info(self) -> dict[str, Any]:
        """What a checkpoint of the connector must say about itself to be refused for the right reason."""
        return dict(self._info)

    @property
    def language_learns(self) -> bool:
        """Whether its language model's own weights learn, so that there is no base beside it (`model.student`)."""
        return bool(self.language.part.unfrozen)

    def trained_state(self) -> dict[str, TrainedPart]:
        """What was learned, by part, as a checkpoint keeps it: ``connector``, and of each part `learned_state`.
        `train.restore.load_trained` is the way back."""
        state = {"connector": TrainedPart(self.connector.state_dict(), self.connector_info())}
        for part in self.parts().values():
            state |= learned_state(part)
        return state

    def hidden_states(self, batch: Batch) -> Float[Tensor, "b t dh"]:
        """Final hidden states of a batch, wherever it lies."""
        raise NotImplementedError

    def supervised(self, batch: Batch) -> Supervised:
        """What predicts the supervised tokens, before the head. The token at position t is predicted from t - 1 of the
        same sample. Raises `UserError` for packed rows when the language model was found not to keep packed samples
        apart."""
        language, here = self.language, self.device
        if language.packing_error and batch.input_ids.shape[0] < len(batch.ids):
            raise UserError(language.packing_error)
        # Found where the batch lies: on a GPU these index searches would wait for the device.
        where, before = supervised_positions(batch.supervise, batch.position_ids)
        targets, owner = batch.input_ids.reshape(-1)[where], batch.sample_index.reshape(-1)[where]
        states = self.hidden_states(batch)
        picked = states.reshape(-1, states.shape[-1]).index_select(0, before.to(here, non_blocking=True))
        return Supervised(picked, targets.to(here, non_blocking=True), owner.to(here, non_blocking=True))

    def forward(self, batch: Batch) -> TokenLosses:
        """Loss of every supervised token; the language-model head runs on those positions alone (`supervised`)."""
        found, language = self.supervised(batch), self.language
        nll, correct = head_nll(
            language.head, found.hidden, found.targets, language.vocab, trained=language.head_learns
        )
        return TokenLosses(nll, found.sample, correct)

    @torch.no_grad()
    def text_logits(self, ids: Int[Tensor, "b t"]) -> Float[Tensor, "b t v"]:
        """Logits of plain text through the same frozen path, for the proof that the language model is untouched."""
        ids = ids.to(self.device)
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        hidden = self.language.hidden(self.language.embed(ids), positions)
        return self.language.head(hidden.reshape(-1, hidden.shape[-1])).view(*ids.shape, -1)


class VisionLanguageModel(Seeing):
    """Tower, connector and language model. ``vision`` becomes None after `drop_vision`; features then come stored.

    The connector keeps fp32 weights and is computed under autocast in ``compute_precision``, as is a language model
    that was made for the run; the other parts compute in the precision they are stored in, so no weight of theirs is
    ever cast. Adapters have fp32 weights too.
    """

    def __init__(
        self, vision: VisionTower, connector: Connector, language: LanguageModel, compute_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.vision: VisionTower | None = vision
        self.language = language
        self.connector: Connector = connector
        self.geometry, self.compute_dtype = vision.geometry, compute_dtype
        self.layer_keeper: LayerKeeper | None = None
        """Keeps what goes into the language model's lowest layer that learns, while it trains. Only where nothing
        before it does (`check_layers_kept`)."""
        self._info = {
            **connector.info(),
            "vision": {"name": vision.name, "fingerprint": sketch_module(vision.backbone)},
            "language": {"name": language.name},
        }
        language.part.initial = sketch_module(language.model)
        assert not self.adapters, "adapters are attached afterwards: the fingerprint is the base's"
        self.train(False)

    @property
    def num_visual_tokens(self) -> int:
        return self.connector.num_tokens

    def connector_info(self) -> dict[str, Any]:
        own = self._info["language"] | {"fingerprint": self.language.part.initial}
        return {**super().connector_info(), "language": own}

    def train(self, mode: bool = True) -> "VisionLanguageModel":
        """Only parts that learn change mode; frozen ones stay in eval (they see to it themselves)."""
        super().train(mode)
        self.connector.train(mode and any(p.requires_grad for p in self.connector.parameters()))
        return self

    def parts(self) -> dict[str, Part]:
        """What can learn in pieces, by name; the tower only while it is here."""
        parts = {"language": self.language.part}
        return parts if self.vision is None else {"vision": self.vision.part} | parts

    def drop_vision(self) -> None:
        """Free the tower's memory when every image comes with stored features."""
        part = None if self.vision is None else self.vision.part
        assert part is None or not (part.adapters or part.merged or part.changed), "the tower has learned something"
        self.vision = None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def patches(self, images: Sequence[ImageInput]) -> Float[Tensor, "m p dv"]:
        """Tower features of each image, in the order of ``images``: from what is stored where given (`keep`), else from
        pixels."""
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
        if self.vision is not None and self.vision.lowest is not None:
            where = [i for i, image in enumerate(images) if image.features is not None]
            kept = torch.stack([f for image in images if (f := image.features) is not None])
            for i, feature in zip(where, self.vision.finish(kept.to(self.device, self.vision.dtype)), strict=True):
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

    def keep(self, image: ImageInput) -> ImageInput:
        """An image as the feature store keeps it: with the tower's features, of a tower that learns with what goes into
        its lowest block that does; as it is where nothing can be kept."""
        if self.vision is None or image.pixels is None or (self.vision.learns and self.vision.lowest is None):
            return image
        kept = self.vision.keep(image.pixels[None].to(self.device))[0]
        narrow = torch.bfloat16 if self.vision.lowest is None else self.vision.dtype
        return ImageInput(features=kept.detach().to("cpu", narrow))

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

    def hidden_states(self, batch: Batch) -> Float[Tensor, "b t dh"]:
        if self.layer_keeper is not None and self.training:
            return self._hidden_from_kept(batch, self.layer_keeper)
        there = batch.to(self.device)
        return self.language.hidden(self.embed(there), there.position_ids)

    def check_layers_kept(self) -> str | None:
        """Why what goes into the language model's layers cannot be kept from one pass to the next, or None."""
        if any(p.requires_grad for p in self.connector.parameters()) or (
            self.vision is not None and self.vision.learns
        ):
            return "connector or tower learn, so what its layers are given changes"
        return self.language.check_kept()

    def below_fingerprint(self) -> str:
        """sha256 over all weights that decide, with a sample, what goes into the lowest layer that learns."""
        tower = self.vision.fingerprint() if self.vision is not None else ""
        return hash_tensors(
            {n: p.detach() for n, p in self.connector.state_dict().items()},
            f"{self.language.below_fingerprint()} {tower} {self.compute_dtype}",
        )

    def _hidden_from_kept(self, batch: Batch, keeper: LayerKeeper) -> Float[Tensor, "b t dh"]:
        """Final hidden states from what is kept of the samples; what is not is computed, all of the batch, and kept."""
        flat, where = batch.sample_index.reshape(-1), []
        rows: list[Tensor | None] = []
        keys = _sample_keys(batch)
        for k, key in enumerate(keys):
            where.append((flat == k).nonzero()[:, 0])
            rows.append(keeper.read(key, len(where[k])))
        there = batch.to(self.device)
        shape = (*batch.input_ids.shape, self.language.d_text)
        kept = torch.zeros(shape, dtype=self.language.dtype)
        if any(row is None for row in rows):
            with torch.no_grad():
                fresh = self.language.keep(self.embed(there), there.position_ids).cpu().flatten(0, 1)
            for k, row in enumerate(rows):
                if row is None:
                    rows[k] = fresh[where[k]]
                    keeper.put(keys[k], fresh[where[k]])
        for place, row in zip(where, rows, strict=True):
            assert row is not None
            kept.view(-1, shape[-1])[place] = row
        return self.language.finish(kept.to(self.device), there.position_ids)

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
        if not prompts:
            return []
        check_places(prompts, images)
        tokens = self.visual_tokens([image for own in images for image in own])
        embeds, used = [], 0
        for i, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
            ids = torch.from_numpy(prompt.ids).to(self.device)[None]
            places = spans_to_positions(list(prompt.image_spans), self.num_visual_tokens, f"prompt {i + 1}")
            mine = tokens[used : used + len(own)]
            used += len(own)
            embeds.append(scatter_images(self.language.embed(ids), places.to(self.device), mine.flatten(0, 1))[0])
        return self.language.generate(embeds, how, eos_ids=eos_ids, seed=seed, streamer=streamer)
