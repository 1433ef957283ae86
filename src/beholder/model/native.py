"""The door to whole vision-language models of Hugging Face (Qwen3-VL and others): one class that is to callers what
`model.vlm.VisionLanguageModel` is.

What a family computes is left to its own code: image features (with Qwen3-VL's deepstack), M-RoPE positions, the
generation. Ours are the layout of samples (packed rows, losses on supervised positions alone), the adapters and what is
proven at load time: the same logits as the model's own forward, whether packed or alone, and the same writing. A family
is a row of `FAMILIES`; what is not there is refused by name.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from beholder.config import GenerateConfig, LlmConfig
from beholder.model.families import check_no_adapter, check_soft_cap, kernel_at_hand, running
from beholder.model.fusion import scatter_images
from beholder.model.language import LanguageModel
from beholder.model.learned import unfreeze
from beholder.model.placement import Part, language_part, tower_part
from beholder.model.processor import PROBES, NativeProcessor, load_processor
from beholder.model.vlm import Seeing, check_places
from beholder.model.weights import (
    DTYPES,
    check_depth,
    check_finite,
    check_loading_info,
    check_size,
    check_stated,
    freeze,
    from_pretrained,
    hash_state,
    loading,
    sketch_module,
    weight_shapes,
)
from beholder.types import Batch, Encoded, ImageInput, UserError

FIELD = "model.native.name_or_path"
WANTED = (
    "Offline, give a folder that holds its files. If they are there, its config.json or a file of weights is damaged "
    "or of something else: get them again. Give a whole Hugging Face vision-language model (hub name or folder)."
)


@dataclass(frozen=True)
class Family:
    """What tells one class of native models from another."""

    eyes: tuple[str, ...]
    """Modules below the core that images go through: tower, and connector where that is a module of its own."""
    grids: bool = False
    """Positions are three-dimensional (M-RoPE), by ``image_grid_thw``."""
    apart: bool = False
    """Images go through the tower one by one: their inputs differ in shape."""
    zero: float = 0.0
    """What an empty image's normalised pixels are."""
    most_images: int | None = None
    """Of a sample; None: no bound. A class that lays several images out in another way than one by one takes one."""
    both_ways: bool = False
    """Positions of one image attend to each other forwards as well, by the class's own masks."""
    deep: str | None = None
    """Below the core, the list of modules that make what the decoder's first layers add (deepstack)."""
    connector: tuple[str, ...] = ("multi_modal_projector",)
    """Below the core, modules between tower and decoder, or lists of such."""

    def between(self, core: nn.Module) -> tuple[str, ...]:
        """Names below the core of the modules that are its connector."""
        found: list[str] = []
        for name in self.connector:
            module = core.get_submodule(name)
            if isinstance(module, nn.ModuleList):  # which is never called itself
                found += [f"{name}.{k}" for k in range(len(module))]
            else:
                found.append(name)
        return tuple(found)


FAMILIES: dict[str, Family] = {
    "qwen3_vl": Family(
        ("visual",), grids=True, deep="visual.deepstack_merger_list",
        connector=("visual.merger", "visual.deepstack_merger_list"),
    ),
    "qwen2_5_vl": Family(("visual",), grids=True, connector=("visual.merger",)),
    "llava": Family(("vision_tower", "multi_modal_projector")),
    # Of several images in a sample it sees one tile each, of one alone as many as its grid has.
    "llava_onevision": Family(("vision_tower", "multi_modal_projector"), apart=True, most_images=1),
    "gemma3": Family(("vision_tower", "multi_modal_projector"), both_ways=True),
    "internvl": Family(("vision_tower", "multi_modal_projector")),
    # Tiles that are all zero are taken for padding and left out, so an empty one is a little more.
    "idefics3": Family(("vision_model", "connector"), apart=True, zero=1e-4, connector=("connector",)),
    "smolvlm": Family(("vision_model", "connector"), apart=True, zero=1e-4, connector=("connector",)),
}  # fmt: skip
"""Known classes by the ``model_type`` of their config.json."""


UNKNOWN = {
    "paligemma": "it has no conversations: its processor writes the images, one prompt and one answer, and the whole "
    "prompt is attended to both ways",
}
"""Why a class is not among them."""


CONNECTOR_LEARNS = "its connector learns (model.connector.trainable), so what its eyes say of an image changes"
EYES_LEARN = "its tower has adapters, so what its eyes say of an image changes while they learn"
"""Why nothing is kept of images then."""


class Eyes(nn.Module):
    """The modules of a native model that images go through, frozen and in eval mode; its tower is a part that adapters
    can go on."""

    def __init__(self, core: nn.Module, family: Family, name: str) -> None:
        super().__init__()
        for eye in family.eyes:
            self.add_module(eye, core.get_submodule(eye))
        self.part = _tower_of(core, family, name)
        freeze(self)

    def train(self, mode: bool = True) -> "Eyes":
        """Stays in eval mode. Only its adapters follow ``mode``."""
        super().train(False)
        self.part.learn(mode)
        return self

    @property
    def learns(self) -> bool:
        """Whether anything in it learns now."""
        return any(p.requires_grad for p in self.parameters())


class Aligner(nn.ModuleDict):
    """The connector of a native model, where it learns or has learned: modules that are among its eyes as well. Empty
    where it is as it came."""

    def __init__(self) -> None:
        super().__init__()
        self.within: tuple[str, ...] = ()
        """Their names below the core, and so below the eyes."""
        self.part: Part | None = None

    def take(self, part: Part, names: Sequence[str]) -> None:
        """Be these modules of ``part``, their weights in fp32."""
        unfreeze(part, names, "model.connector.trainable")
        self.part, self.within = part, tuple(names)
        for name in names:
            self[name.replace(".", "_")] = part.module.get_submodule(name)
        freeze(self)

    def train(self, mode: bool = True) -> "Aligner":
        """Stays in eval mode, as the eyes."""
        super().train(False)
        return self


def _tower_of(core: nn.Module, family: Family, name: str) -> Part:
    tower = family.eyes[0]
    return tower_part(core.get_submodule(tower), name, f"model.{tower}.")


class NativeModel(Seeing):
    """A whole vision-language model with frozen weights, with or without adapters on its decoder and its tower.

    Its connector is part of its eyes and stays frozen with them, so ``connector`` holds nothing, until
    `free_connector` lets it learn. ``geometry`` is its processor, and ``num_visual_tokens`` None: that says image by
    image how many there are.
    """

    def __init__(self, whole: Any, family: Family, language: LanguageModel, processor: NativeProcessor) -> None:
        super().__init__()
        self.family = family
        self.__dict__["whole"] = whole  # its parts are children of this module; itself it would count twice
        self.vision = Eyes(whole.model, family, language.name)
        self.vision.part.try_out = self._see
        self.connector = Aligner()
        self.language = language
        self.geometry = processor
        self.num_visual_tokens = None
        self._form: tuple[Any, tuple[int, ...], list[bool]] = (None, (), [])
        """What its own code gives of images: the class of it, of visual tokens the shape of one image or tile, where
        they are one tensor and no list, and whether what each layer adds is one tensor or a list of one each."""
        self._told: dict[int, Sequence[Tensor]] = {}
        """By thread, what its own code is told."""
        self._hand_over()
        self._info = {
            "native": {
                "name": language.name, "class": type(whole).__name__, "fingerprint": sketch_module(whole),
            }
        }  # fmt: skip
        assert not self.adapters, "adapters are attached afterwards: the fingerprint is the base's"
        self.train(False)

    whole: Any

    def parts(self) -> dict[str, Part]:
        """Tower and decoder. What lies between them (projector, mergers) is ``connector``; the head stays as it is."""
        return {"vision": self.vision.part, "language": self.language.part}

    def free_connector(self) -> None:
        """Make what lies between tower and decoder a part of its own, whose weights are fp32, may learn, and are in
        checkpoints."""
        core = self.whole.model
        part = Part("connector", self.language.name, core, (), "model.")
        self.connector.take(part, self.family.between(core))

    # -- what can be computed once an image

    @torch.no_grad()
    def check_kept(self) -> str | None:
        """Why nothing can be kept of an image, or None where what the eyes say of it is always the same."""
        if self.vision.part.adapters:
            return EYES_LEARN
        if any(p.requires_grad for p in self.connector.parameters()):
            return CONNECTOR_LEARNS
        if self.family.apart:
            return None
        images = [self._sample(size, 1, seed=4)[1] for size in PROBES]
        together, alone = self._said(images), torch.cat([self._said([image]) for image in images])
        exact = together.dtype == torch.float32
        if _distance(together.float(), alone.float()) <= (1e-4 if exact else 3e-2):
            return None
        return "what its eyes say of an image depends on which others are shown with it"

    @property
    def kept_like(self) -> tuple[tuple[int, int], torch.dtype]:
        """Shape and type of what is kept of each position of an image: ``(1 + L, Dh)``."""
        said = self._see()
        return (said.shape[1], said.shape[2]), said.dtype

    def keep(self, image: ImageInput) -> ImageInput:
        """An image as the feature store keeps it: with what the eyes say of it, ``[S, 1 + L, Dh]``."""
        assert image.inputs is not None, "an image of a native model comes as its processor's inputs"
        return ImageInput(features=self._said([image]).detach().cpu())

    def kept_fingerprint(self) -> str:
        """sha256 over what decides what `keep` gives, besides the image and its inputs: all weights but the language
        model's, settings, precision and attention kernel."""
        core, language = self.whole.model, self.language.part.prefix.removeprefix("model.")
        state = {n: t for n, t in core.state_dict().items() if not n.startswith(language)}
        tower = self.vision.part.module
        settings = self.whole.config.to_dict()
        facts = {
            "class": type(self.whole).__name__, "dtype": str(self.language.dtype),
            "kernel": getattr(getattr(tower, "config", None), "_attn_implementation", None),
            "settings": {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")},
        }  # fmt: skip
        return hash_state(state, json.dumps(facts, sort_keys=True, default=str))

    def check_layers_kept(self) -> str | None:
        """Why what goes into the language model's layers cannot be kept."""
        return "a native model's layers are given more than what comes from below (its own positions, deepstack)"

    # -------------------------------------------------------------------------------------------------------------

    def hidden_states(self, batch: Batch) -> Float[Tensor, "b t dh"]:
        images = self._shown(batch.images, batch.image_sizes)
        return self._hidden(batch, images, self._positions(batch, images))

    def _shown(self, images: Sequence[ImageInput], sizes: Sequence[tuple[int, int]]) -> list[ImageInput]:
        """Each image with its processor's inputs, of one that was kept those that are no pixels; an empty one's are as
        large as its place was laid out for."""
        if len(images) != len(sizes):
            raise UserError(
                f"the batch holds {len(images)} images but its prompts reserve room for {len(sizes)}. Truncation or a "
                "lost image is the usual cause."
            )
        made: list[ImageInput] = []
        for image, size in zip(images, sizes, strict=True):
            if image.blank is not None:
                kind, seed = image.blank
                image = ImageInput(inputs=self.geometry.blank(size, self.family.zero if kind == "zero" else seed))
            elif image.features is not None:
                image = replace(image, inputs=self.geometry.beside(size))
            assert image.inputs is not None, "an image of a native model comes as its processor's inputs"
            made.append(image)
        return made

    def patches(self, images: Sequence[ImageInput]) -> Float[Tensor, "s dh"]:
        """Visual tokens of images that come with their inputs, one image after another."""
        return torch.cat([self._said([image])[:, 0] for image in images])

    def _see(self) -> Tensor:
        """All that the eyes say of an empty image."""
        return self._said([ImageInput(inputs=self.geometry.blank((64, 64), 0.1))])

    def _together(self, inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The inputs of several images as the model takes them."""
        made: dict[str, Tensor] = {}
        for k in inputs[0] if inputs else ():
            values = [own[k] for own in inputs]
            if (
                self.family.apart and values[0].dim() > 2
            ):  # fewer tiles are filled up with empty ones, as the processor does
                most = max(v.shape[1] for v in values)
                values = [torch.cat([v, v.new_zeros(1, most - v.shape[1], *v.shape[2:])], 1) for v in values]
            made[k] = torch.cat(values).to(self.device)
        return made

    def _said(self, images: Sequence[ImageInput]) -> Float[Tensor, "s n dh"]:
        """What the eyes say of images, seen together: for each of their positions, one image after another, the visual
        token, and what the first layers add (deepstack)."""
        learns = torch.is_grad_enabled() and self.vision.learns
        inputs = [image.inputs for image in images if image.inputs is not None]
        with torch.set_grad_enabled(learns), torch.autocast(self.device.type, enabled=False):
            out = self.whole.model.get_image_features(**self._together(inputs), return_dict=True)
        deep = getattr(out, "deepstack_features", None) or ()
        tokens = out.pooler_output
        each = tuple(tokens.shape[1:]) if isinstance(tokens, Tensor) else ()
        self._form = type(out), each, [isinstance(layer, Tensor) for layer in deep]
        return torch.stack([_flat(tokens), *map(_flat, deep)], 1)

    def _features(self, images: Sequence[ImageInput], lengths: Sequence[int]) -> list[Float[Tensor, "s n dh"]]:
        """What the eyes say of each image, or have said where it was kept. ``lengths``: the positions reserved for
        each; raises `UserError` for other counts."""
        made = [image.features for image in images]
        raw = [i for i, features in enumerate(made) if features is None]
        # On a CPU nothing is gained by seeing them together, and so its bits are those of what was kept.
        apart = self.family.apart or self.device.type == "cpu"
        for group in [[i] for i in raw] if apart else [raw] if raw else []:
            said = self._said([images[i] for i in group])
            _check_count(len(said), sum(lengths[i] for i in group))
            for i, own in zip(group, said.split([lengths[i] for i in group]), strict=True):
                made[i] = own
        found = [own.to(self.device, non_blocking=True) for own in made if own is not None]
        for own, length in zip(found, lengths, strict=True):
            _check_count(len(own), length)
        return found

    def _positions(self, batch: Batch, images: Sequence[ImageInput]) -> dict[str, Tensor]:
        """``position_ids`` ``[4, B, T]`` of a family with M-RoPE: the first row restarts at each sample and decides
        what attends to what, the others are the model's own for each sample by itself. Else nothing."""
        if not self.family.grids:
            return {}
        rows = batch.position_ids.expand(4, *batch.position_ids.shape).clone()
        flat, where = rows.view(4, -1), batch.sample_index.reshape(-1)
        seen = torch.zeros_like(where)
        seen[batch.image_positions] = 1
        for i in batch.image_sample.unique().tolist():
            at = (where == i).nonzero().squeeze(1)
            owners = zip(images, batch.image_sample.tolist(), strict=True)
            grids = [image.inputs["image_grid_thw"] for image, s in owners if s == i and image.inputs is not None]
            flat[1:, at] = self._rope(batch.input_ids.reshape(-1)[at], seen[at], torch.cat(grids))
        return {"position_ids": rows}

    def _rope(self, ids: Int[Tensor, "t"], seen: Int[Tensor, "t"], grids: Int[Tensor, "m 3"]) -> Int[Tensor, "3 t"]:
        positions, _ = self.whole.model.get_rope_index(
            ids[None], mm_token_type_ids=seen[None].int(), image_grid_thw=grids
        )
        return positions[:, 0]

    def _hidden(
        self, batch: Batch, images: Sequence[ImageInput], beside: Mapping[str, Tensor]
    ) -> Float[Tensor, "b t dh"]:
        """Final hidden states of a batch, wherever it lies, whose images are ``images``."""
        lengths = batch.image_lengths.tolist()
        batch = replace(batch, images=[]).to(self.device)
        embeds = self.language.embed(batch.input_ids)
        extra: dict[str, Any] = {k: v.to(self.device) for k, v in beside.items()}
        if images:
            tokens, *deep = torch.cat(self._features(images, lengths)).unbind(1)
            embeds = scatter_images(embeds, batch.image_positions, tokens)
            mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool, device=self.device)
            mask[batch.image_positions] = True
            if self.family.both_ways:
                extra["attention_mask"] = self.whole.create_masks_for_generate(
                    config=self.whole.config, inputs_embeds=embeds.to(self.language.dtype), attention_mask=None,
                    past_key_values=None, position_ids=batch.position_ids, **self._seen(mask.view_as(batch.input_ids)),
                )  # fmt: skip
            if deep:
                order = batch.image_positions.argsort()  # a mask takes positions as they lie, rows one after another
                extra |= {
                    "visual_pos_masks": mask.view_as(batch.input_ids),
                    "deepstack_visual_embeds": [layer[order] for layer in deep],
                }
        return self.language.hidden(embeds, batch.position_ids, extra)

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
        """New token ids for each prompt with its images, as `VisionLanguageModel.generate`; written by the model's own
        ``generate``, from ids and what its eyes say."""
        if not prompts:
            return []
        check_places(prompts, images)
        shown = self._shown([x for own in images for x in own], [s for p in prompts for s in p.image_sizes])
        said = self._features(shown, [len(p.reserved(k)) for p in prompts for k in range(len(p.image_spans))])
        longest = max(len(p.ids) for p in prompts)
        ids = torch.full((len(prompts), longest), eos_ids[0], dtype=torch.int64)
        mask, seen = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            left = longest - len(prompt.ids)
            ids[row, left:], mask[row, left:] = torch.from_numpy(prompt.ids), 1
            for k in range(len(prompt.image_spans)):
                seen[row, left + torch.from_numpy(prompt.reserved(k))] = 1
        given = {"input_ids": ids, "attention_mask": mask} | self._seen(seen)
        inputs = self._together([_without_pixels(image.inputs) for image in shown if image.inputs is not None])
        with self._having_seen(said):
            return self.language.write(
                {k: v.to(self.device) for k, v in given.items()} | inputs, longest, how,
                eos_ids=eos_ids, seed=seed, streamer=None if streamer is None else _WithoutPrompt(streamer),
            )  # fmt: skip

    @contextmanager
    def _having_seen(self, said: Sequence[Tensor]) -> Iterator[None]:
        """Inside, and in this thread, the model's own code is told this of the images it is shown."""
        self._told[get_ident()] = said
        try:
            yield
        finally:
            del self._told[get_ident()]

    def _hand_over(self) -> None:
        """Let the model's own code ask for image features where `_having_seen` can answer."""
        core, own = self.whole.model, self.whole.model.get_image_features

        @wraps(own)
        def asked(*args: Any, **kwargs: Any) -> Any:
            said = self._told.get(get_ident())
            return own(*args, **kwargs) if said is None else self._as_theirs(said)

        core.get_image_features = asked

    def _as_theirs(self, said: Sequence[Tensor]) -> Any:
        """What the eyes say of images in the form that the model's own code gives it."""
        kind, each, layers = self._form
        tokens = [one[:, 0] for one in said]
        deep = [[one[:, 1 + k] for one in said] for k in range(len(layers))]
        added = [torch.cat(parts) if one else parts for parts, one in zip(deep, layers, strict=True)]
        found: dict[str, Any] = {"pooler_output": torch.cat(tokens).view(-1, *each) if each else tokens}
        found |= {"deepstack_features": added} if added else {}
        known = {f.name for f in fields(kind)}
        made = kind(**{k: v for k, v in found.items() if k in known})
        for name in found.keys() - known:  # transformers 5.15 sets Idefics3's on an output that has no such field
            setattr(made, name, found[name])
        return made

    def _seen(self, seen: Tensor) -> dict[str, Tensor]:
        """What tells the model's own forward which positions are an image's, where it asks."""
        if self.family.both_ways:
            return {"token_type_ids": seen.int()}
        return {"mm_token_type_ids": seen.int()} if self.family.grids else {}

    # -------------------------------------------------------------------------------------------------------------
    # Proofs at load time

    @torch.no_grad()
    def check(self) -> None:
        """Refuse a model whose hidden states, or whose writing, are not what its own forward computes on the same
        images and text; find out whether samples may share a row (``language.packing_error``)."""
        one, two = self._sample(PROBES[0], 5, seed=1), self._sample(PROBES[1], 9, seed=2)
        other = self._sample(PROBES[0], 5, seed=3)
        exact = self.language.dtype == torch.float32
        theirs = [self._own_logits(x) for x in (one, two)]
        ours = [self._logits([x])[0] for x in (one, two)]
        if (error := max(map(_distance, ours, theirs))) > (1e-4 if exact else 3e-2):
            raise self._misfit("logits", error)
        packed, swapped = self._logits([one, two]), self._logits([other, two])
        leak, drift = _distance(packed[1], swapped[1]), max(map(_distance, packed, ours))
        self.language.packing_error = None
        if not (leak <= 1e-3 and drift <= (1e-4 if exact else 5e-2)):
            self.language.packing_error = (
                f"{self.language.name} with attention {self.language.attention}: packed samples are not independent "
                f"(swapping the first changes the second by {leak:.1e}, packing by {drift:.1e} of its size). Set "
                "train.packing: false, or another model.native.attn_implementation."
            )
        greedy = GenerateConfig(temperature=0.0, top_p=1.0, max_new_tokens=1)
        written = self.generate([one[0], two[0]], [[one[1]], [two[1]]], greedy, eos_ids=[0], seed=0)
        for new, logits in zip(written, ours, strict=True):
            best = logits[-1].topk(2).values
            close = float(best[0] - logits[-1][new[0]]) <= (1e-3 if exact else 0.1) * float(best[0].abs() + 1)
            if not close:
                raise self._misfit("its writing", float(best[0] - logits[-1][new[0]]))

    def _misfit(self, what: str, error: float) -> UserError:
        if not math.isfinite(error):
            return UserError(
                f"{FIELD} {self.language.name!r} ({type(self.whole).__name__}): {what} are NaN or infinite on a "
                f"made-up image and text, in {str(self.language.dtype).removeprefix('torch.')}. Its weights or "
                "the settings in its config.json are damaged; get them again, or give them more range "
                "(model.native.precision: fp32)"
            )
        return UserError(
            f"{self.language.name} ({type(self.whole).__name__}): {what} of ours differ from its own by {error:.1e} of "
            f"their size; this version of transformers does something that is not supported. Known classes: "
            f"{', '.join(FAMILIES)}"
        )

    def _sample(self, size: tuple[int, int], words: int, seed: int) -> tuple[Encoded, ImageInput]:
        """A made-up prompt: an image of noise between a few ordinary tokens."""
        import numpy as np

        rng = np.random.default_rng(seed)
        noise = Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        tokenizer = self.geometry.processor.tokenizer
        special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
        plain = [i for i in range(min(len(tokenizer), self.language.vocab)) if i not in special]
        place = tokenizer(self.geometry.place(size), add_special_tokens=False)["input_ids"]
        before, after = (rng.choice(plain, words).tolist() for _ in range(2))
        ids = np.array([*before, *place, *after], dtype=np.int64)
        where = np.flatnonzero(ids == self.geometry.token_id)
        supervise = np.zeros(len(ids), dtype=bool)
        supervise[-1] = True
        spans = ((int(where[0]), int(where[-1]) + 1),)
        solid = spans[0][1] - spans[0][0] == len(where)
        encoded = Encoded(ids, supervise, spans, False, (size,), None if solid else (where,))
        return encoded, self.geometry.process(noise)

    def _logits(self, samples: Sequence[tuple[Encoded, ImageInput]]) -> list[Tensor]:
        """Our logits of samples in one row."""
        lengths = [len(encoded.ids) for encoded, _ in samples]
        starts = [sum(lengths[:i]) for i in range(len(samples))]
        where = [start + torch.from_numpy(e.reserved(0)) for start, (e, _) in zip(starts, samples, strict=True)]
        batch = Batch(
            input_ids=torch.cat([torch.from_numpy(e.ids) for e, _ in samples])[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            supervise=torch.cat([torch.from_numpy(e.supervise) for e, _ in samples])[None],
            sample_index=torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None],
            image_positions=torch.cat(where), image_lengths=torch.tensor([len(w) for w in where]),
            image_sample=torch.arange(len(samples)), images=[image for _, image in samples],
            ids=[str(i) for i in range(len(samples))], image_sizes=[e.image_sizes[0] for e, _ in samples],
        )  # fmt: skip
        hidden = self.hidden_states(batch)
        return [part.float() for part in self.language.head(hidden[0]).split(lengths)]

    def _own_logits(self, sample: tuple[Encoded, ImageInput]) -> Tensor:
        encoded, image = sample
        assert image.inputs is not None
        ids = torch.from_numpy(encoded.ids)[None]
        seen = torch.zeros_like(ids)
        seen[0, torch.from_numpy(encoded.reserved(0))] = 1
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self._seen(seen)}
        out = self.whole(
            **{k: v.to(self.device) for k, v in given.items()}, **self._together([image.inputs]), use_cache=False
        )
        return out.logits[0].float()


def _check_count(made: int, reserved: int) -> None:
    if made != reserved:
        raise UserError(
            f"images produced {made} visual tokens but their prompts reserve {reserved} positions. Truncation inside "
            "an image, a lost image, or features that were kept of another model is the usual cause."
        )


def _without_pixels(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A processor's inputs with something in place of pixels that nobody looks at."""
    return {k: v for k, v in inputs.items() if not v.is_floating_point()} | {"pixel_values": torch.zeros(1)}


def _flat(features: Any) -> Tensor:
    """``[S, Dh]`` of a tensor of equal images, or of a tensor each."""
    parts = [features] if isinstance(features, Tensor) else list(features)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])


def _distance(ours: Tensor, theirs: Tensor) -> float:
    error = torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs).clamp_min(1e-6)
    return float(error) if bool(torch.isfinite(error)) else float("inf")


class _WithoutPrompt:
    """Passes on what is written: transformers shows a streamer the prompt's ids first."""

    def __init__(self, streamer: Any) -> None:
        self._streamer, self._begun = streamer, False

    def put(self, ids: Tensor) -> None:
        self._streamer.put(ids if self._begun else ids[..., :0])
        self._begun = True

    def end(self) -> None:
        self._streamer.end()


class UnknownClass(UserError):
    """A native model that is of no class of `FAMILIES`."""


def known_family(config: Any, name: str) -> Family:
    """The row of the model's class. Raises `UnknownClass` with those that are known."""
    kind = getattr(config, "model_type", None)
    if kind not in FAMILIES:
        why = f" ({UNKNOWN[kind]})" if kind in UNKNOWN else ""
        raise UnknownClass(
            f"{FIELD} {name!r} is of the class {kind!r}, which is not known{why}; known are {', '.join(FAMILIES)}. A "
            "language model and a tower of their own go into model.llm and model.vision"
        )
    return FAMILIES[kind]


def _config_of(cfg: LlmConfig, file: Path | None = None) -> tuple[Any, Family]:
    """The configuration of a native model, from ``file`` where one is given, and what is known of its class."""
    from transformers import AutoConfig

    check_no_adapter(cfg.name_or_path, FIELD)
    with loading(f"{FIELD} {cfg.name_or_path!r}", WANTED, None if file else cfg.name_or_path):
        config = AutoConfig.from_pretrained(
            file or cfg.name_or_path, revision=None if file else cfg.revision, trust_remote_code=False
        )
        check_stated(cfg.name_or_path, config)
    return config, known_family(config, cfg.name_or_path)


def processor_of(cfg: LlmConfig, file: Path | None = None) -> NativeProcessor:
    """The processor of a native model alone, or that beside the config.json in ``file``. Raises `UserError` as
    `load_native` does."""
    config, family = _config_of(cfg, file)
    if file is not None:
        cfg = cfg.model_copy(update={"name_or_path": str(file.parent), "revision": None})
    return load_processor(cfg, config, DTYPES[cfg.precision], family.most_images)


@dataclass(frozen=True)
class Empty:
    """A native model without weights."""

    whole: Any
    parts: dict[str, Part]
    eyes: tuple[nn.Module, ...]
    """All that images go through: the tower, and the connector where that is a module of its own."""
    most_images: int | None
    """Of a sample."""
    between: tuple[nn.Module, ...]
    """Its connector."""
    said: tuple[int, int]
    """Shape of what the eyes say of an image at each of its positions (`NativeModel.keep`)."""


def empty_native(cfg: LlmConfig, file: Path | None = None) -> Empty:
    """A native model without weights, from the config.json in ``file`` where one is given. Raises `UserError` as
    `load_native` does."""
    from transformers import AutoModelForImageTextToText

    config, family = _config_of(cfg, file)
    with loading(f"{FIELD} {cfg.name_or_path!r}", WANTED):
        if file is None and Path(cfg.name_or_path).is_dir():  # else a plan would download the weights
            check_depth(cfg.name_or_path, cfg.revision, config)
        with torch.device("meta"):
            whole: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    parts = {
        "vision": _tower_of(whole.model, family, cfg.name_or_path),
        "language": language_part(whole, cfg.name_or_path, whole=True),
    }
    eyes = tuple(whole.model.get_submodule(eye) for eye in family.eyes)
    layers = len(whole.model.get_submodule(family.deep)) if family.deep else 0
    said = 1 + layers, whole.get_input_embeddings().weight.shape[1]
    between = tuple(whole.model.get_submodule(name) for name in family.between(whole.model))
    return Empty(whole, parts, eyes, family.most_images, between, said)


def load_native(cfg: LlmConfig, device: torch.device) -> tuple[NativeModel, Any]:
    """(model, tokenizer): a whole vision-language model with its processor, strictly loaded from safetensors, frozen
    and proven (`NativeModel.check`).

    ``cfg`` are the settings of ``model.native`` as `ModelConfig` fills them in for its language model. Raises
    `UserError` for a class that is not known, files that do not fit, NaN weights, and what a proof finds.
    """
    from transformers import AutoModelForImageTextToText, GenerationConfig

    name, dtype = cfg.name_or_path, DTYPES[cfg.precision]
    config, family = _config_of(cfg)
    with kernel_at_hand(cfg, "model.native"), loading(f"{FIELD} {name!r}", WANTED):
        check_depth(name, cfg.revision, config)
        with torch.device("meta"):
            sketch: Any = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
        check_size(name, weight_shapes(name, cfg.revision, config), sketch)
        whole, info = from_pretrained(
            AutoModelForImageTextToText, name, config=config, revision=cfg.revision, trust_remote_code=False,
            dtype=dtype, attn_implementation=cfg.attn_implementation,
        )  # fmt: skip
    check_soft_cap(whole.config, cfg, "model.native")
    check_loading_info(info, whole, name)
    check_finite(whole, name)
    whole = whole.to(device=device)  # not dtype, which would round rotary frequencies
    whole.generation_config = GenerationConfig()  # the checkpoint's own would fill what a caller leaves unset
    freeze(whole)
    processor = load_processor(cfg, whole.config, dtype, family.most_images)
    with running(name, whole, "the model"):
        model = NativeModel(
            whole, family, LanguageModel(whole, name, cfg.gradient_checkpointing, whole=True), processor
        )
        model.check()
    return model, processor.processor.tokenizer
