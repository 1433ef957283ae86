"""Settings of the model: language model, vision tower, connector, adapters."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from beholder.config.section import Filled, Inert, Positive, Section, Tiny, Written, decides, given_twice

# ---------------------------------------------------------------------------------------------------------------
# model


NO_ADAPTERS = Inert(
    lambda cfg, _: not cfg.has_adapters, "there are no adapters (stage align, or model.lora.enable: false)",
    "stage model.lora.enable",
)  # fmt: skip
FROZEN_LANGUAGE = Inert(
    lambda cfg, _: not cfg.language_learns, "the language model's own weights do not learn (model.student)",
    "model.student",
)  # fmt: skip
FROZEN_CONNECTOR = Inert(
    lambda cfg, _: not cfg.model.connector.trainable, "model.connector.trainable is false", "model.connector.trainable"
)
FROZEN_TOWER = Inert(
    lambda cfg, _: not cfg.tower_may_learn, "the vision tower is frozen (model.vision.unfreeze, model.lora.vit_layers)",
    "model.vision.unfreeze model.lora.vit_layers",
)  # fmt: skip
_NOT_PERCEIVER = Inert(lambda _, own: own.kind != "perceiver", "only the perceiver resampler has it", ".kind")
_LINEAR = Inert(lambda _, own: own.kind == "linear", "a linear projector has none", ".kind")
_NOT_LINEAR = Inert(lambda _, own: own.kind != "linear", "only the linear projector can go without", ".kind")
_NATIVE = Inert(
    lambda cfg, _: cfg.model.native is not None,
    "model.native names a whole vision-language model, which has its own language model, tower and connector",
    "model.native model.native.name_or_path",
)  # fmt: skip
_STUDENT = Inert(
    lambda cfg, _: cfg.model.student is not None,
    "a student's language model is stored in fp32 and computed in train.precision", "model.student",
)  # fmt: skip
_NOT_MADE = Inert(
    lambda _, own: own.like is None, "a language model that is cut has the sizes of the whole one", ".like"
)
_NOT_TIMM = Inert(
    lambda _, own: not own.name_or_path.startswith("timm/"),
    "it belongs to timm/<name> towers; a Hugging Face folder holds its own weights", ".name_or_path",
)  # fmt: skip


Layers = (
    Annotated[
        str, Field(pattern=r"^(all|none|(last|first)-[0-9]{1,4})$"),
        Written("all, none, last-K, first-K"),
    ]
    | tuple[Annotated[int, Field(ge=0, le=9_999)], ...]
)  # fmt: skip
"""Which layers of a model: by where they stand, or by their numbers from 0."""


def names_modules(pattern: str) -> bool:
    """Whether a pattern is the end of a module's name, or ``all-linear``; else it is a regular expression."""
    return pattern == "all-linear" or re.fullmatch(r"[\w.]+", pattern) is not None


def no_layers(layers: Layers) -> bool:
    return not layers or layers in ("none", "last-0", "first-0")


def _few(layers: Layers | None) -> Layers | None:
    """As much of it as a tiny part has."""
    if layers is None:
        return None
    if isinstance(layers, str):
        return re.sub(r"-[1-9]\d*", "-1", layers)
    return tuple(k for k in layers if k == 0) or ("last-1" if layers else layers)


def _whole_layers(modules: tuple[str, ...]) -> tuple[str, ...]:
    """An expression may speak of layers that a tiny part does not have."""
    return modules if all(map(names_modules, modules)) else ("all-linear",)


Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


class NativeConfig(Section):
    name_or_path: Annotated[Filled, decides("place", "weights", "held_out")]
    """Hub name or local folder of a whole Hugging Face vision-language model, with its processor."""
    revision: Annotated[Filled | None, Tiny()] = None
    """Hub commit or tag."""
    attn_implementation: Annotated[Attention, Tiny(value="sdpa")] = "sdpa"
    """Attention kernel of its language model and its tower."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Storage and compute type of its frozen weights."""
    gradient_checkpointing: Annotated[bool, decides("speed")] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class LlmConfig(Section):
    name_or_path: Annotated[Filled, decides("place", "weights", "held_out")]
    """Hub name, local folder, or a ``.gguf`` file of a causal language model."""
    revision: Annotated[Filled | None, Tiny()] = None
    """Hub commit or tag."""
    attn_implementation: Annotated[Attention, Tiny(value="sdpa")] = "sdpa"
    """Attention kernel. Packing is proven for sdpa and eager on CPU; each kernel is checked again at start-up."""
    precision: Annotated[Literal["bf16", "fp32", "fp16"], _STUDENT] = "bf16"
    """Storage and compute type of the frozen weights."""
    gradient_checkpointing: Annotated[bool, decides("speed")] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    use_cache: Literal[False] = False
    """Key/value cache while training; generation always uses one."""
    trust_remote_code: Annotated[bool, Tiny(value=False)] = False
    """Run Python code that comes with the checkpoint. Off unless you say so."""


class VisionConfig(Section):
    name_or_path: Annotated[Filled, decides("place", "weights")]
    """Hub name or local folder of a Hugging Face vision tower, or ``timm/<name>``."""
    revision: Annotated[Filled | None, Tiny()] = None
    """Hub commit or tag."""
    weights: Annotated[Filled | None, decides("place", "weights"), _NOT_TIMM] = None
    """``timm/…`` only: a local ``.safetensors`` file to load strictly, instead of timm's own download."""
    freeze: Literal[True] = True
    """What nobody lets learn (``unfreeze``, ``model.lora.vit_layers``) stays bit-identical."""
    unfreeze: Annotated[tuple[Filled, ...], Tiny(make=lambda names: ("first-1",) if names else ())] = ()
    """Blocks, stages or other modules of the tower whose weights learn themselves, in fp32: names (``stages.3``,
    ``blocks.11``), ``last-K`` or ``first-K`` blocks. Batch statistics stay as they are."""
    feature_layer: Annotated[int, Field(ge=-1024, le=1024)] = -1
    """Hidden layer whose patch tokens are used: -1 is the tower's final output, -2 the layer before."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Compute type of the tower."""
    trust_remote_code: Annotated[bool, Tiny(value=False)] = False
    """Run Python code that comes with the checkpoint. Off unless you say so."""


class ResamplerConfig(Section):
    kind: Literal["perceiver", "mean_pool", "grid", "pixel_shuffle", "none"] = "perceiver"
    """perceiver: learned latents attend to the patches. mean_pool: one token. grid: average-pooled square.
    pixel_shuffle: neighbouring patches stacked into channels. none: every patch is a token."""
    num_latents: Annotated[Positive | None, Field(le=65_536), Tiny()] = None
    """Visual tokens per image; must equal ``connector.num_visual_tokens`` when both are given."""
    depth: Annotated[Positive, Field(le=1024), _NOT_PERCEIVER] = 2
    """perceiver: number of cross-attention blocks."""
    num_heads: Annotated[Positive, Field(le=65_536), _NOT_PERCEIVER, Tiny(value=4)] = 8
    """perceiver: attention heads."""
    dim: Annotated[Positive | None, Field(le=1_048_576), _NOT_PERCEIVER, Tiny(value=64)] = None
    """perceiver: width Dr; default the tower's width."""
    latent_std: Annotated[float, Field(gt=0, le=1_000), _NOT_PERCEIVER] = 1.0
    """perceiver: standard deviation the latents are drawn with. See `model.connector.Perceiver` for why it is 1."""


class ProjectorConfig(Section):
    kind: Literal["mlp", "linear"] = "mlp"
    """mlp: Linear, GELU, Linear. linear: one matrix."""
    hidden: Annotated[Positive | None, Field(le=1_048_576), _LINEAR, Tiny()] = None
    """mlp: hidden width; default the language model's width."""
    dropout: Annotated[float, Field(ge=0, lt=1), _LINEAR] = 0.0
    """mlp: dropout after the activation; 0 to 0.1 is usual."""
    bias: Annotated[bool, _NOT_LINEAR] = True
    """linear: an offset beside the matrix. Idefics3 has none."""


class ConnectorConfig(Section):
    load_checkpoint: Annotated[Filled | None, decides("start"), Tiny()] = None
    """A run or checkpoint folder that this run starts from: its connector, and its adapters as ``model.lora.adapters``
    says."""
    trainable: bool = True
    """Whether it learns. Of a native model it is what lies between its tower and its language model (projector,
    mergers), and stays as it came unless you say true."""
    num_visual_tokens: Annotated[Positive | None, Field(le=65_536), _NATIVE] = None
    """N, the language-model positions one image takes. Default 64 for the perceiver; fixed by the other kinds."""
    vision_ln: Annotated[bool, _NATIVE] = False
    """LayerNorm on the patch features. Must match the checkpoint that is loaded."""
    resampler: Annotated[ResamplerConfig, _NATIVE] = ResamplerConfig()
    projector: Annotated[ProjectorConfig, _NATIVE] = ProjectorConfig()
    output_norm: Annotated[Literal["rms", "none"], _NATIVE] = "rms"
    """rms: visual tokens start at the RMS of the language model's embedding table, with a learned gain."""

    def impossible(self) -> list[str]:
        r = self.resampler
        wrong: list[str] = []
        if r.num_latents and self.num_visual_tokens and r.num_latents != self.num_visual_tokens:
            wrong.append(
                f"num_visual_tokens is {self.num_visual_tokens} but resampler.num_latents is {r.num_latents}; "
                "they are the same number, give one of them or make them equal"
            )
        if r.kind == "mean_pool" and (self.num_visual_tokens or r.num_latents or 1) != 1:
            wrong.append("resampler.kind mean_pool gives 1 visual token; remove num_visual_tokens or set it to 1")
        return wrong

    @property
    def tokens_asked(self) -> int | None:
        """N as the user asked for it, or None when the resampler kind decides."""
        n = self.num_visual_tokens or self.resampler.num_latents
        return n if n or self.resampler.kind != "perceiver" else 64


MAX_RANK = 65_536


class LoraConfig(Section):
    enable: Annotated[
        bool,
        Inert(
            lambda cfg, _: cfg.stage is not None and not cfg.stage_record.adapters,
            "the stage trains no adapters",
            "stage",
        ),
    ] = False
    """Train low-rank adapters: on the language model, and on the vision tower where ``vit_layers`` says so (from stage
    2 on)."""
    adapters: Annotated[
        Literal["continue", "merge", "fresh"],
        Inert(
            lambda cfg, _: cfg.model.connector.load_checkpoint is None, "the run starts from no other run",
            "model.connector.load_checkpoint",
        ),
    ] = "continue"  # fmt: skip
    """What becomes of the adapters of the run that ``connector.load_checkpoint`` names. continue: they go on learning,
    so rank, alpha and sites must be theirs. merge: they become part of the base's weights, at the strength that they
    are used with, and new ones start. fresh: they are dropped, and new ones start."""
    r: Annotated[Positive, Field(le=MAX_RANK), NO_ADAPTERS] = 16
    """Rank of the two matrices of an adapter."""
    alpha: Annotated[Positive, Field(le=1_048_576), NO_ADAPTERS] = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1), NO_ADAPTERS] = 0.05
    """Dropout on the adapter's input while training."""
    strength: Annotated[float, Field(gt=0, le=1), NO_ADAPTERS] = 1.0
    """Outside training (evaluations, checkpoints as others load them, chat) adapters are scaled by this too: a model
    on the line from the language model's own weights (0) to the trained ones (1). Below 1 it keeps more of the language
    (WiSE-FT, Wortsman et al. 2022)."""
    bias: Annotated[Literal["none"], NO_ADAPTERS] = "none"
    target_modules: Annotated[tuple[Filled, ...], NO_ADAPTERS, Tiny(make=_whole_layers)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Modules of the language model that get an adapter: ``all-linear``, the last part of a module's name (``q_proj``),
    several parts (``self_attn.q_proj``), or a regular expression that matches the whole name or its last parts. Each
    must match something, and nothing outside the language model's layers; the resolved list is printed and counted. A
    regular expression that names modules of the vision tower alone is the tower's, in all its blocks unless
    ``vit_layers`` says which."""
    llm_layers: Annotated[Layers, NO_ADAPTERS, Tiny(make=_few)] = "all"
    """Layers of the language model that get them: all, none, ``last-2``, ``first-2``, or a list of numbers from 0."""
    vit_layers: Annotated[Layers | None, NO_ADAPTERS, Tiny(make=_few)] = None
    """Blocks of the vision tower that get adapters as well, said like ``llm_layers``; default none, unless an
    expression in ``target_modules`` names modules of the tower. ``beholder plan`` counts them."""
    vit_target_modules: Annotated[
        tuple[Filled, ...], NO_ADAPTERS, Tiny(value=("all-linear",)),
        Inert(
            lambda _, own: own.vit_layers is None or no_layers(own.vit_layers), "the tower gets no adapters",
            ".vit_layers",
        ),
    ] = ("all-linear",)  # fmt: skip
    """Modules of these blocks that do: as in ``target_modules``. ``all-linear`` are linear layers, ``qkv`` among them,
    and 1 x 1 convolutions; other convolutions, depth-wise ones among them, are named."""

    @property
    def may_reach_tower(self) -> bool:
        """Whether the tower gets adapters, or may: what an expression names, only the model knows."""
        if self.vit_layers is None:
            return not all(map(names_modules, self.target_modules))
        return not no_layers(self.vit_layers)

    def impossible(self) -> list[str]:
        if self.enable and no_layers(self.llm_layers) and not self.may_reach_tower:
            return [
                "enable is true, but llm_layers and vit_layers choose no layer, so there would be no adapters; choose "
                "some, or set enable: false"
            ]
        return given_twice("llm_layers", self.llm_layers) + given_twice("vit_layers", self.vit_layers)


class StudentConfig(Section):
    """A language model that is made for the run, not read from files as it is, and may learn whole."""

    like: Literal["llama", "gpt2"] | None = None
    """Made with random weights, which ``seed`` draws, in this shape; of ``model.llm`` it has the tokenizer alone."""
    cut: Annotated[Layers | None, Tiny(make=_few)] = None
    """In place of ``like``: these layers of ``model.llm``, with its own embeddings, last norm and head; said like
    ``model.lora.llm_layers``."""
    hidden: Annotated[Positive | None, Field(le=1_048_576), _NOT_MADE, Tiny(make=lambda n: n and 64)] = None
    """Width."""
    layers: Annotated[Positive | None, Field(le=512), _NOT_MADE, Tiny(at_most=2)] = None
    heads: Annotated[Positive | None, Field(le=65_536), _NOT_MADE, Tiny(make=lambda n: n and 4)] = None
    """Attention heads, each ``hidden / heads`` wide."""
    kv_heads: Annotated[Positive | None, Field(le=65_536), _NOT_MADE, Tiny(make=lambda n: n and 2)] = None
    """llama: heads of keys and values, each shared by as many queries'; default as many as ``heads``."""
    intermediate: Annotated[Positive | None, Field(le=1_048_576), _NOT_MADE, Tiny(make=lambda n: n and 128)] = None
    """Width inside the MLP; default 4 times ``hidden``, for llama (whose MLP has three matrices) 8/3 of it."""
    tie_embeddings: Annotated[bool, _NOT_MADE] = True
    """The head is the table of embeddings."""
    vocab: Annotated[Positive | None, Field(le=16_777_216), _NOT_MADE, Tiny()] = None
    """Rows of the table; default as many as the tokenizer has ids."""
    positions: Annotated[Positive, Field(le=16_777_216), _NOT_MADE] = 2048
    """The longest sequence it is made for. gpt2: rows of its table of positions, which have weights."""
    learns: Literal["all", "layers", "none"] = "all"
    """all: its layers, its embeddings and its head. layers: not the embeddings and the head. none: nothing of it, as
    stage align and ``model.lora`` have it. It has no dropout."""
    max_params: Annotated[int | None, Field(gt=0, le=10**12), Tiny()] = None
    """Weights that tower, connector and language model may have together; more is an error. ``beholder plan`` counts
    them."""

    def impossible(self) -> list[str]:
        if (self.like is None) == (self.cut is None):
            both = "both are given" if self.like else "neither is given"
            return [f"a student is made like a family (like) or cut from model.llm (cut), and {both}; give one of them"]
        if self.cut is not None:
            if no_layers(self.cut):
                return ["cut chooses no layer, so there would be no language model; name some, such as [0, 15, 29]"]
            return given_twice("cut", self.cut)
        missing = [name for name in ("hidden", "layers", "heads") if getattr(self, name) is None]
        if missing or self.hidden is None or self.heads is None:
            return [f"like {self.like} needs its sizes: {', '.join(missing)} {'are' if missing[1:] else 'is'} missing"]
        wrong: list[str] = []
        if self.hidden % self.heads:
            wrong.append(
                f"heads is {self.heads}, which does not divide hidden {self.hidden}: each head is hidden / heads wide; "
                f"nearest: {' or '.join(map(str, _divisors_near(self.hidden, self.heads)))}"
            )
        elif self.like == "llama" and self.hidden // self.heads % 2:
            wrong.append(
                f"heads of {self.hidden // self.heads} (hidden {self.hidden} / heads {self.heads}) cannot be rotated "
                "by position, which takes pairs of numbers; choose hidden / heads even"
            )
        if self.like == "gpt2" and self.kv_heads not in (None, self.heads):
            wrong.append(f"kv_heads is {self.kv_heads}, but gpt2 has keys and values for each head; leave it out")
        elif self.kv_heads is not None and self.heads % self.kv_heads:
            wrong.append(
                f"kv_heads is {self.kv_heads}, which does not divide heads {self.heads}; nearest: "
                f"{' or '.join(map(str, _divisors_near(self.heads, self.kv_heads)))}"
            )
        return wrong


def _divisors_near(number: int, wanted: int) -> list[int]:
    """The nearest divisor below and the nearest above."""
    divisors = [d for d in range(1, number + 1) if number % d == 0] if number <= 1_048_576 else [number]
    below, above = [d for d in divisors if d <= wanted], [d for d in divisors if d >= wanted]
    return sorted({*below[-1:], *above[:1]})


class ModelConfig(Section):
    llm: Annotated[LlmConfig, _NATIVE]
    vision: Annotated[VisionConfig, _NATIVE]
    connector: ConnectorConfig = ConnectorConfig()
    lora: LoraConfig = LoraConfig()
    native: NativeConfig | None = None
    """A whole vision-language model in place of ``llm``, ``vision`` and ``connector``."""
    student: StudentConfig | None = None
    """A language model made for the run in place of ``llm`` as it is."""

    def impossible(self) -> list[str]:
        if self.student is None:
            return []
        if self.native is not None:
            return [
                "student is a language model to be joined with a tower, but native names a whole model; remove one of "
                "the two"
            ]
        if self.lora.enable and self.student.learns != "none":
            return [
                f"lora.enable is true and student.learns is {self.student.learns}: adapters go on weights that stay as "
                "they are. Set lora.enable: false, or student.learns: none"
            ]
        return []

    @property
    def language_learns(self) -> bool:
        """Whether weights of the language model learn themselves, not adapters on them."""
        return self.student is not None and self.student.learns != "none"

    @model_validator(mode="before")
    @classmethod
    def _parts_of_native(cls, given: Any) -> Any:
        return _tuples(with_native_parts(given))

    @property
    def starts_from_nothing(self) -> bool:
        """Its connector has learned nothing yet."""
        return self.native is None and self.connector.load_checkpoint is None


def with_native_parts(given: Any) -> Any:
    """A ``model`` section as it was written, with a native model's parts under their usual names, so that who asks for
    one need not know which kind it is."""
    if not isinstance(given, dict) or not isinstance(native := given.get("native"), dict):
        return given
    own = {"name_or_path": "-"} | {k: native[k] for k in ("name_or_path", "revision", "precision") if k in native}
    more = {k: native[k] for k in ("attn_implementation", "gradient_checkpointing") if k in native}
    connector = given.get("connector") or {}
    return given | {
        "llm": given.get("llm") or own | more,
        "vision": given.get("vision") or own,
        "connector": {"trainable": False, **connector} if isinstance(connector, dict) else connector,
    }


def _tuples(value: Any) -> Any:
    """What came as JSON is checked as Python from here on, where a list is no tuple."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
