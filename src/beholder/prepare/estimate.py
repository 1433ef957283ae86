"""What a run will need, before anything large is loaded: trainable table, token budget, memory, disk, steps and time.

Sizes come from configuration files alone (models are built on the meta device, without memory), lengths from a sample
of the records, and the speed from a matrix product measured on the device. What cannot be known is listed in
`Estimate.gaps`, never guessed silently. Nothing here trains, loads weights or decodes images.

The formulae, per sample of T positions with K supervised tokens and I images, for a frozen language model of L layers,
width h, q query heads, k key/value heads of size d, MLP width m, vocabulary V, and B weights in its layers:

- language model, FLOPs: forward 2·B·T + 4·L·q·d·T·R, backward to its inputs the same product plus 2 times the
  attention; R is the length attention is computed over: the sample's on a CPU (`model.attention`), the row's elsewhere.
  No weight gradients: it is frozen. One more forward with gradient checkpointing.
- adapters with A weights: 6·A·T, forward, backward to their inputs and to their weights. 16 bytes a weight for weight,
  gradient and AdamW moments, and s bytes a position for every different input of an adapted layer, which the frozen
  layer alone would not keep.
- a language model that learns itself (`model.student`): 2·B·T more for the weights' gradients and 2·h·V·K for those of
  its head, 12 bytes a weight that learns for gradient and AdamW moments, and as for adapters the inputs of its layers.
- head: 4·h·V·K, forward and backward, on the supervised positions only.
- connector: counted by running it forward and backward on the meta device.
- tower: counted the same way, forward; once per image with the feature store, at every step without. Where it learns,
  twice that again for the share of its weights that lies at or above the lowest block that learns, at every step.
- eyes of a native model, whose images differ, as often as a tower, per image of P patches in tiles of Q, with C weights
  of convolutions, B of linear layers in its blocks and M of others: 2·(C + B)·P + 2·M·(its positions) + 4·L·w·P·Q.
- bytes kept for the backward pass, per position and layer, with s bytes a number: two fp32 inputs of norms (8·h),
  three MLP tensors (3·s·m), and of attention either queries, keys, values and the softmax over R positions in fp32 and
  in s bytes (s·(q+2k)·d + q·R·(4+s), CPU) or what a fused kernel keeps with repeated heads (4·s·q·d). Families that
  normalise queries and keys keep them in fp32 too (4·(q+k)·d). With checkpointing: one layer's, plus s·h a layer.
- teachers: forward alone, 2·B·T + 4·L·q·d·T² + 2·h·V·K and their towers'; once a sample where what they say is kept,
  at every step where they are asked online. Kept: rows of `store.teachers.TOKENS` supervised tokens and their index.
- logits: at most `model.losses.MAX_LOGITS` at once, as computed, in fp32, and as gradient.
- connector, gradients and AdamW moments: 16 bytes a weight (4 when it stays as it is), plus a copy in the compute type
  under autocast.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from beholder.config import (
    ConnectorConfig,
    LlmConfig,
    LoraConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    VisionConfig,
)
from beholder.config.file import load_config
from beholder.data import build_encoder, open_records
from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.collate import WINDOW
from beholder.data.images import ImageError, NativePipeline
from beholder.data.mixture import BLOCK, Mixture
from beholder.data.sources import missing_files
from beholder.evidence.gates import unmeasurable
from beholder.model import vision as vision_door
from beholder.model.connector import build_connector
from beholder.model.families import NO_LIMITS, Limits, check_limits, check_no_adapter, limits_of
from beholder.model.language import empty_language, load_tokenizer, source_of
from beholder.model.learned import learning_modules
from beholder.model.losses import MAX_LOGITS
from beholder.model.native import (
    CONNECTOR_LEARNS,
    EYES_LEARN,
    Empty,
    UnknownClass,
    empty_native,
    processor_of,
)
from beholder.model.patch_layout import Declared, UnknownLayout, expected_layout
from beholder.model.placement import (
    Part,
    choose,
    choose_modules,
    inside,
    language_part,
    lowest_of,
    resolve_targets,
    selectors,
    tower_part,
)
from beholder.model.plan import TrainableRow, TrainableTable
from beholder.model.standard import export_class, gguf_prevents
from beholder.model.student import check_budget, empty_student
from beholder.model.weights import DTYPES, check_settings, check_stated, loading
from beholder.prepare.doctor import matmul_rate
from beholder.store.features import bytes_of as bytes_of_tokens
from beholder.store.teachers import TOKENS, bytes_of
from beholder.train import checkpoint
from beholder.train.distributed import pick_device
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError
from beholder.use.export.vocabulary import tokenizer_prevents

RUNTIME_BYTES = 800 * 10**6
"""Interpreter, torch, transformers and their buffers: resident size of a process that has not loaded a model yet."""
EFFICIENCY = {"cpu": 0.4, "cuda": 0.4, "mps": 0.4}
"""Share of the measured matrix rate that a whole step reaches; see benchmarks/README.md."""
NATIVE_RECORDS = 256
"""Whose images are looked at for their sizes."""
USUAL_SIZE = (480, 640)
"""(height, width) of most of COCO's images."""
TYPICAL_TARGET_TOKENS = 13.0
"""LLaVA-Pretrain's mean, used only where the records or the tokenizer cannot be read, and named as a gap then."""


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """Sizes of a causal language model, as its configuration gives them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    params: int
    layer_params: int
    """Weights inside the decoder layers: neither embeddings nor head."""
    qk_norm: bool
    limits: Limits = NO_LIMITS
    adapter_params: int = 0
    adapter_inputs: int = 0
    """Width of all different inputs of layers that are adapted, or learn themselves, added up over the model."""
    learning_params: int = 0
    """Weights that learn themselves."""
    part: Part | None = field(default=None, repr=False, compare=False)
    """The model itself, without weights."""

    def flops(self, tokens: float, attended: float, checkpointing: bool = False) -> float:
        """Forward and backward to the inputs; ``attended`` is R of the module's formulae."""
        product = 2.0 * self.layer_params * tokens
        attention = 4.0 * self.layers * self.heads * self.head_dim * tokens * attended
        times = 2 + bool(checkpointing) + bool(self.learning_params)
        return product * times + attention * (4 if checkpointing else 3)

    def forward_flops(self, tokens: float, targets: float) -> float:
        """Of a model that is only asked about a sample, its head at the supervised positions."""
        attention = 4.0 * self.layers * self.heads * self.head_dim * tokens * tokens
        return 2.0 * self.layer_params * tokens + attention + 2.0 * self.hidden * self.vocab * targets

    def head_flops(self, targets: float) -> float:
        learns = self.learning_params == self.params
        return (6.0 if learns else 4.0) * self.hidden * self.vocab * targets

    def activation_bytes(
        self, tokens: float, bytes_per_number: int, attended: float | None, checkpointing: bool = False
    ) -> float:
        """Kept for the backward pass, see the module's formulae; ``attended`` None: a fused kernel keeps no softmax."""
        s, width = bytes_per_number, self.heads * self.head_dim
        layer = 8.0 * self.hidden + 3 * s * self.intermediate
        if attended is None:
            layer += 4 * s * width
        else:
            layer += s * (width + 2 * self.kv_heads * self.head_dim)
            layer += self.heads * attended * (4 if s == 4 else 4 + s)
        if self.qk_norm:
            layer += 4 * (self.heads + self.kv_heads) * self.head_dim
        layer += s * self.adapter_inputs / self.layers
        if checkpointing:
            return tokens * (layer + self.layers * s * self.hidden)
        return tokens * layer * self.layers


@dataclass(frozen=True, slots=True)
class VisionShape:
    params: int
    num_patches: int
    d_vision: int
    flops_per_image: float
    part: Part | None = field(default=None, repr=False, compare=False)
    """The tower itself, without weights."""
    adapter_params: int = 0
    unfrozen_params: int = 0
    kept_bytes: float = 0.0
    """Of an image in the feature store."""
    share_above: float = 0.0
    """Of the weights of its blocks, those of the lowest block that learns and of all above it: what a backward pass
    goes through."""

    @property
    def learning_params(self) -> int:
        return self.adapter_params + self.unfrozen_params


@dataclass(frozen=True, slots=True)
class ConnectorShape:
    params: int
    num_tokens: int
    flops_per_image: float
    """Forward and backward."""
    activation_bytes_per_image: int
    """Kept for the backward pass, in fp32."""


@dataclass(slots=True)
class Estimate:
    """What `plan` found out. Sizes in bytes, times in seconds; absent (None) where a gap says why."""

    run_name: str
    stage: str
    device: str
    trainable: TrainableTable
    language: LanguageShape | None = None
    vision: VisionShape | None = None
    connector: ConnectorShape | None = None
    sequence: dict[str, float] = field(default_factory=dict)
    """Tokens of one sample: visual, prompt, target (mean and largest), total; and how rows are laid out."""
    data: dict[str, float] = field(default_factory=dict)
    images_per_sample: float = 1.0
    """Of training samples; under ``data.sources[].weight`` in the mixture's proportions."""
    memory: dict[str, float] = field(default_factory=dict)
    """Bytes by purpose at the peak of a training step; ``total`` is their sum."""
    store_bytes: float | None = None
    teacher_bytes: float | None = None
    """What `beholder teacher-cache` will keep of all teachers, with its index."""
    steps: int | None = None
    flops_per_step: dict[str, float] = field(default_factory=dict)
    matmul_flops_per_s: float | None = None
    """Measured on the device in the compute type."""
    seconds: dict[str, float] = field(default_factory=dict)
    """``step``, ``features`` (filling the store), ``teachers`` (asking them once), ``training``, ``total``; evaluation
    not included."""
    exports_as: str | None = None
    """Class that `beholder export` makes of it, with the setting that stands in the way of one of transformers' own."""
    exports_to_gguf: str | None = None
    """Whether ``beholder export --to gguf`` takes it, with the setting that stands in the way."""
    gaps: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self) | {"trainable": self.trainable.to_json()}

    def print(self, console: Console) -> None:
        """The plan for a person."""
        table = Table("part", "parameters", "trainable", "dtype", title=f"{self.run_name}: stage {self.stage}")
        for row in self.trainable.rows:
            table.add_row(row.part, f"{row.params:,}", f"{row.trainable:,}", row.dtype)
        table.add_row("total", f"{self.trainable.params:,}", f"{self.trainable.trainable:,}", "")
        console.print(table)
        for title, lines in self._sections():
            if lines:
                console.print(f"[bold]{title}[/bold]")
                for name, text in lines:
                    console.print(f"  {name:<42}{text}", highlight=False)
        if self.exports_as:
            console.print(f"exports as {self.exports_as}", highlight=False, markup=False)
        if self.exports_to_gguf:
            console.print(f"exports to GGUF: {self.exports_to_gguf}", highlight=False, markup=False)
        for gap in self.gaps:
            console.print(f"[yellow]not known:[/yellow] {gap}", highlight=False)

    def _sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        sequence = [(k.replace("_", " "), f"{v:,.1f}".removesuffix(".0")) for k, v in self.sequence.items()]
        data = [(k.replace("_", " "), f"{v:,.2f}".removesuffix(".00")) for k, v in self.data.items()]
        if self.steps is not None:
            data.append(("optimizer steps", f"{self.steps:,}"))
        if self.store_bytes is not None:
            data.append(("feature store", _size(self.store_bytes)))
        if self.teacher_bytes is not None:
            data.append(("kept of the teachers", _size(self.teacher_bytes)))
        memory = [(k.replace("_", " "), _size(v)) for k, v in self.memory.items()]
        times = [(k, _duration(v)) for k, v in self.seconds.items()]
        if self.matmul_flops_per_s:
            times.insert(0, ("matrix rate, measured", f"{self.matmul_flops_per_s / 1e12:.2f} TFLOP/s on {self.device}"))
        return [
            ("tokens of one sample", sequence), ("data", data), ("memory at the peak of a step (estimate)", memory),
            ("time (estimate, evaluation not included)", times),
        ]  # fmt: skip


def _check_named_file(option: str, path: Path) -> None:
    """A file the user names must be a model's config.json; only what nobody named may be a gap."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{option} {path}: not a readable JSON file ({e}); give a model's config.json") from e
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{option} {path}: it has no model_type, so it is not a model's config.json")
    check_settings(path)


def estimate(
    cfg: RunConfig, *, llm_config: Path | None = None, vision_config: Path | None = None, measure: bool = True
) -> Estimate:
    """The plan of a run, from configuration files, the records and a half-second measurement.

    ``llm_config``, ``vision_config``: a model's ``config.json``, for names that are neither local nor cached while
    offline; a tokenizer and a ``preprocessor_config.json`` beside them are used too, and nothing is asked of the hub
    about a model whose file is given. A native model's is given as ``llm_config``. ``measure`` False leaves the times
    out. Raises `UserError` only for settings that can never work; what cannot be found out is a gap.
    """
    if vision_config is not None and cfg.model.native is not None:
        raise UserError(
            "--vision-config is about a tower of its own, and model.native names a whole model; give its config.json "
            "as --llm-config"
        )
    for option, path in (("--llm-config", llm_config), ("--vision-config", vision_config)):
        if path is not None:
            _check_named_file(option, path)
    if wrong := unmeasurable(cfg.gates):
        raise UserError("; ".join(wrong))
    if cfg.model.native is not None:
        return _estimate_native(cfg, llm_config, measure)
    for part, model in (("llm", cfg.model.llm), ("vision", cfg.model.vision)):
        check_no_adapter(model.name_or_path, f"model.{part}.name_or_path")
    gaps: list[str] = []
    device = torch.device(pick_device("auto").type if cfg.device == "auto" else cfg.device)
    language = _try(gaps, lambda: language_shape(cfg.model.llm, llm_config, cfg.model.student))
    if language:
        check_limits(language.limits, cfg)
    elif gaps and gaps[-1].startswith("model.student"):
        raise UserError(gaps[-1])  # not a file that is elsewhere: a student that cannot be made
    vision = _try(gaps, lambda: vision_shape(cfg.model.vision, vision_config))
    lora = cfg.model.lora if cfg.has_adapters else None
    exports_as = prevents = None
    if language and vision and language.part and vision.part:
        tower, lm = vision.part.module, language.part.module
        exports_as = str(export_class(cfg.model.connector, cfg.model.vision, tower, lm, vision.num_patches))
        prevents = gguf_prevents(cfg.model.connector, cfg.model.vision, tower, lm, vision.num_patches)
    language, vision = learning(language, vision, lora, cfg.model.vision)
    connector = None
    if language and vision:
        connector = connector_shape(cfg.model.connector, vision, language.hidden)
        parts = {"vision": vision, "connector": connector, "language": language}
        check_budget(cfg.model.student and cfg.model.student.max_params, {k: s.params for k, s in parts.items()})
    table = _table(cfg, language, vision, connector)
    result = Estimate(cfg.run_name, cfg.stage_name, str(device), table, language, vision, connector, gaps=gaps)
    result.exports_as = exports_as
    examples = _sample_records(cfg, result)
    if language and vision and connector:
        tokenizer = _try(gaps, lambda: load_tokenizer(cfg.model.llm, beside=llm_config))
        if prevents == "" and tokenizer is not None:
            prevents = tokenizer_prevents(tokenizer)
        targets = _estimate_sequence(cfg, Written(tokenizer, connector.num_tokens), examples, result)
        _plan_memory(cfg, result, language, vision, connector)
        teachers = _plan_teachers(cfg, result, language, targets)
        _plan_time(cfg, result, language, vision, connector, teachers, device if measure else None)
    if prevents is not None:
        result.exports_to_gguf = f"no, because {prevents}" if prevents else "yes"
    return result


def _estimate_native(cfg: RunConfig, config_file: Path | None, measure: bool) -> Estimate:
    """The plan of a run on a whole vision-language model: how many positions an image takes, its processor says of the
    images of a sample of the records."""
    gaps: list[str] = []
    device = torch.device(pick_device("auto").type if cfg.device == "auto" else cfg.device)
    empty = _try(gaps, lambda: empty_native(cfg.model.llm, config_file))
    language, vision = None, None
    if empty is not None:
        shape = _shape_of(empty.whole, empty.parts["language"], 0)
        check_limits(shape.limits, cfg)
        between = _weights(*empty.between) if cfg.model.connector.trainable else 0  # counted by itself then
        eyes = replace(VisionShape(_weights(*empty.eyes) - between, 0, 0, 0.0), part=empty.parts["vision"])
        language, vision = learning(shape, eyes, cfg.model.lora if cfg.has_adapters else None)
    connector = None
    if empty is not None and cfg.model.connector.trainable:
        connector = ConnectorShape(_weights(*empty.between), 0, 0.0, 0)
    table = _table(cfg, language, vision, connector)
    result = Estimate(cfg.run_name, cfg.stage_name, str(device), table, language, vision, connector, gaps=gaps)
    result.exports_as = "its own class" if empty is None else f"{type(empty.whole).__name__}, its own class"
    result.exports_to_gguf = "no, because model.native is set; llama.cpp's own converter takes what --to hf writes"
    examples = _sample_records(cfg, result, NATIVE_RECORDS)
    if empty is None or language is None or vision is None:
        return result
    processor = _try(gaps, lambda: processor_of(cfg.model.llm, config_file))
    if processor is None:
        return result
    pipeline = NativePipeline(processor, cfg.data.max_megapixels)
    sizes = _sizes(examples, pipeline, gaps)
    taken = [processor.takes(size) for size in sizes]
    flops = [eyes_flops(empty, pixels, positions) for positions, pixels in taken]
    kept = [bytes_of_tokens(positions, empty.said, DTYPES[cfg.model.llm.precision]) for positions, _ in taken]
    vision = result.vision = replace(vision, flops_per_image=sum(flops) / len(flops), kept_bytes=sum(kept) / len(kept))
    if connector:
        vision = result.vision = replace(vision, kept_bytes=0.0)
    if cfg.features.enabled and (vision.learning_params or connector):
        gaps.append(f"the feature store will be off: {EYES_LEARN if vision.learning_params else CONNECTOR_LEARNS}")
    mean = sum(positions for positions, _ in taken) / len(taken)
    if connector:
        # Forward it is among the eyes' work; of its linear layers what goes in and out is kept in fp32.
        maps = [m for own in empty.between for m in own.modules() if isinstance(m, torch.nn.Linear)]
        widths = sum(m.in_features + m.out_features for m in maps)
        connector = result.connector = replace(
            connector, num_tokens=round(mean), flops_per_image=4.0 * connector.params * mean,
            activation_bytes_per_image=round(4 * widths * mean),
        )  # fmt: skip
    written = Written(processor.processor.tokenizer, mean, pipeline, sizes[len(sizes) // 2])
    _estimate_sequence(cfg, written, examples, result)
    _plan_memory(cfg, result, language, vision, connector)
    _plan_time(cfg, result, language, vision, connector, None, device if measure else None)
    return result


def _sizes(examples: Sequence[Example], pipeline: NativePipeline, gaps: list[str]) -> list[tuple[int, int]]:
    """(height, width) of the images of these records, smallest first."""
    sizes: list[tuple[int, int]] = []
    lost: list[str] = []
    for ref in dict.fromkeys(ref for e in examples for ref in e.images):
        try:
            sizes.append(pipeline.size(ref))
        except ImageError as e:
            lost.append(str(e))
    if lost:
        gaps.append(f"size of {len(lost)} of {len(lost) + len(sizes)} sampled images: {lost[0]}")
    if not sizes:
        gaps.append(f"size of an image: {USUAL_SIZE[1]} x {USUAL_SIZE[0]} pixels assumed (COCO's)")
    return sorted(sizes, key=lambda size: size[0] * size[1]) or [USUAL_SIZE]


def eyes_flops(empty: Empty, pixels: tuple[int, ...], positions: int) -> float:
    """Forward, of one image whose processor gives ``pixels`` of that shape and ``positions`` in the text."""
    tower = empty.parts["vision"]
    own: Any = empty.whole.config.vision_config
    side = own.patch_size[0] if isinstance(own.patch_size, list | tuple) else own.patch_size
    if len(pixels) == 2:  # patches of one image, one after another
        tile = patches = pixels[0]
    else:
        tile = (pixels[-2] // side) * (pixels[-1] // side)
        patches = tile * math.prod(pixels[:-3])
    dense = others = 0
    for eye in empty.eyes:
        for name, module in eye.named_modules():
            if isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
                dense += module.weight.numel()
            elif isinstance(module, torch.nn.Linear):
                inner = eye is tower.module and inside(name, tower.blocks)
                dense, others = dense + inner * module.weight.numel(), others + (not inner) * module.weight.numel()
    attention = 4.0 * len(tower.blocks) * own.hidden_size * patches * tile
    return 2.0 * dense * patches + 2.0 * others * positions + attention


# ---------------------------------------------------------------------------------------------------------------
# Shapes


def language_shape(
    cfg: LlmConfig, config_file: Path | None = None, student: StudentConfig | None = None
) -> LanguageShape:
    """Sizes of the language model, or of a student made in its place, without weights. Raises `UserError` where no
    configuration is found, and for attention that the family does not have."""
    if student is None:
        model = empty_language(cfg, _config("llm", cfg, config_file))
    else:
        whole = None if student.cut is None else _config("llm", cfg, config_file)
        model = empty_student(student, cfg, config=whole, beside=config_file)
    if getattr(model.config.get_text_config(), "num_attention_heads", None) is None:
        raise UserError(
            f"sizes of model.llm {cfg.name_or_path!r}: {type(model).__name__} has no attention heads, and the formulae "
            "are those of attention, so memory and time cannot be estimated"
        )
    learns = sum(
        p.numel() for name, p in model.named_parameters() if inside(name, learning_modules(model, student.learns))
    ) if student else 0  # fmt: skip
    return _shape_of(model, language_part(model, cfg.name_or_path), learns)


def _shape_of(model: Any, part: Part, learns: int) -> LanguageShape:
    """Sizes of a language model, or of that in a whole vision-language model; ``learns``: its weights that do."""
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    blocks = choose(part, "all", "model.lora.llm_layers")
    table = model.get_input_embeddings().weight
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size
    return LanguageShape(
        part=part,
        layers=text.num_hidden_layers,
        hidden=table.shape[1],
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate=inner,
        vocab=table.shape[0],
        params=_weights(part.module, model.get_output_embeddings()),
        layer_params=sum(p.numel() for name, p in part.module.named_parameters() if inside(name, blocks)),
        qk_norm=any("q_norm" in name for name, _ in part.module.named_parameters()),
        limits=limits_of(part.module),
        learning_params=learns,
        adapter_inputs=text.num_hidden_layers * (3 * text.hidden_size + inner) if learns else 0,
    )


def learning(
    language: LanguageShape | None,
    vision: VisionShape | None,
    lora: LoraConfig | None,
    tower: VisionConfig | None = None,
) -> tuple[LanguageShape | None, VisionShape | None]:
    """The shapes with what learns of them, and no longer with the models themselves. Raises `UserError` as
    `model.placement.resolve_targets` and `choose_modules` do."""
    parts = {s.part.name: s.part for s in (vision, language) if s is not None and s.part is not None}
    if language is None:
        return None, vision and replace(vision, part=None)
    wanted = selectors(lora, parts) if lora else {}
    sites = {name: resolve_targets(parts[name], s, lora.r) for name, s in wanted.items() if lora}
    # Queries, keys and values read one tensor, gate and up another: the same width below the same module. What leads
    # out of a module reads its own.
    own = sites.get("language", [])
    inputs = {(*_parent_and_role(s.name), s.d_in) for s in own}
    language = replace(
        language, part=None,
        adapter_params=sum(s.params for s in own),
        adapter_inputs=sum(width for *_, width in inputs) or language.adapter_inputs,
    )  # fmt: skip
    if vision is None or vision.part is None:
        return language, vision
    part, names = vision.part, tower.unfreeze if tower else ()
    unfrozen = choose_modules(part, names, "model.vision.unfreeze") if names else ()
    weights = {n: p.numel() for n, p in part.module.named_parameters()}
    learned = [*(s.name for s in sites.get("vision", [])), *unfrozen]
    lowest = lowest_of(part, learned)
    # Without a lowest one something learns below or beside the blocks.
    above = part.blocks[part.blocks.index(lowest) if lowest else 0 :] if learned else ()
    in_blocks = sum(size for n, size in weights.items() if inside(n, part.blocks))
    return language, replace(
        vision,
        part=None,
        adapter_params=sum(s.params for s in sites.get("vision", [])),
        unfrozen_params=sum(size for n, size in weights.items() if inside(n, unfrozen)),
        share_above=sum(size for n, size in weights.items() if inside(n, above)) / max(in_blocks, 1),
    )


def _parent_and_role(name: str) -> tuple[str, str]:
    parent, _, last = name.rpartition(".")
    return parent, last if last in ("o_proj", "down_proj", "out_proj", "dense", "fc2", "c_proj") else ""


def vision_shape(cfg: VisionConfig, config_file: Path | None = None) -> VisionShape:
    """Sizes of the tower and the cost of one image. Raises `UserError` where no configuration can be found."""
    if cfg.name_or_path.startswith("timm/"):
        return _timm_shape(cfg)
    config = _config("vision", cfg, config_file)
    part = getattr(config, "vision_config", None) or config
    model = vision_door.empty_tower(cfg, part)
    trained_at = getattr(part, "image_size", None)
    trained_at = trained_at[0] if isinstance(trained_at, list | tuple) else trained_at
    folder = str(config_file.parent) if config_file else cfg.name_or_path
    try:
        processor = vision_door._preprocessor(folder, {"revision": None if config_file else cfg.revision})
        height, width = vision_door._hf_size(processor, folder)[:2]
    except (UserError, OSError):
        if config_file is None or trained_at is None:
            raise
        height = width = trained_at  # a config.json alone: the size the positions were trained at
    extra = {}
    if height != trained_at and "interpolate_pos_encoding" in model.forward.__code__.co_varnames:
        extra["interpolate_pos_encoding"] = True
    pixels = torch.empty(1, 3, height, width, device="meta")
    out, flops = _count(lambda: model(pixel_values=pixels, **extra).last_hidden_state)
    return _vision_shape(model, out, flops, height, width, vision_door.hf_declared(part, height, width), folder)


def _vision_shape(
    model: torch.nn.Module, out: torch.Tensor, flops: float, height: int, width: int, declared: Declared, name: str
) -> VisionShape:
    try:
        layout, _ = expected_layout(out, height, width, declared)
    except UnknownLayout as e:
        raise UserError(f"{name} ({type(model).__name__}): {e}") from e
    patches, width = layout.num_patches, layout.take(out, 1).shape[2]
    return VisionShape(
        _weights(model), patches, width, flops, tower_part(model, name), kept_bytes=2.0 * patches * width
    )


def _timm_shape(cfg: VisionConfig) -> VisionShape:
    from timm.data.config import resolve_model_data_config

    name, model = vision_door.timm_name(cfg), vision_door.empty_tower(cfg)
    pixels = torch.empty(1, *resolve_model_data_config(model)["input_size"], device="meta")
    out, flops = _count(lambda: vision_door.timm_outputs(cfg.feature_layer)(model, pixels))
    declared = vision_door.timm_declared(model, cfg.feature_layer)
    return _vision_shape(model, out, flops, pixels.shape[2], pixels.shape[3], declared, name)


@torch.no_grad()
def _count(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What a forward pass gives, and its FLOPs."""
    with FlopCounterMode(display=False) as counter:
        out = run()
    return out, float(counter.get_total_flops())


def _weights(*models: torch.nn.Module) -> int:
    return sum(p.numel() for p in {id(p): p for model in models for p in model.parameters()}.values())


def connector_shape(cfg: ConnectorConfig, vision: VisionShape, d_text: int) -> ConnectorShape:
    """Sizes and costs of the connector, by running it on the meta device."""
    connector = build_connector(
        cfg, num_patches=vision.num_patches, d_vision=vision.d_vision, d_text=d_text, embed_rms=1.0, seed=0,
        device="meta",
    )  # fmt: skip
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that an address is not used twice
        return tensor

    own = {p.untyped_storage()._cdata for p in connector.parameters()}
    counter = FlopCounterMode(display=False)
    with counter:
        patches = torch.empty(1, vision.num_patches, vision.d_vision, device="meta")
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = connector(patches)
        if out.requires_grad:
            torch.autograd.grad(out.sum(), [p for p in connector.parameters() if p.requires_grad])
    saved = sum(storage.nbytes() for address, storage in kept.items() if address not in own)
    return ConnectorShape(_weights(connector), connector.num_tokens, float(counter.get_total_flops()), saved)


def _config(what: str, cfg: LlmConfig | VisionConfig, file: Path | None) -> Any:
    """A model's configuration: from ``file``, a folder, a .gguf file's header, the local hub cache, or the hub."""
    from transformers import AutoConfig

    if file is not None:
        with loading(f"--{what}-config {file}", "Give a model's config.json."):
            return AutoConfig.from_pretrained(file, trust_remote_code=cfg.trust_remote_code)
    name, where = source_of(cfg)
    wanted = f"Offline, give its config.json: --{what}-config FILE"
    with loading(f"sizes of model.{what} {cfg.name_or_path!r}", wanted, None if "gguf_file" in where else name):
        config = AutoConfig.from_pretrained(name, **where)
        check_stated(name, config)
        return config


def _table(
    cfg: RunConfig, language: LanguageShape | None, vision: VisionShape | None, connector: ConnectorShape | None
) -> TrainableTable:
    rows = []
    if vision:
        own = _torch_name(cfg.model.vision.precision)
        types = " ".join(sorted({own, "float32"} if vision.unfrozen_params else {own}))
        rows.append(TrainableRow("vision", vision.params, vision.unfrozen_params, types))
    if connector:
        learns = connector.params if cfg.model.connector.trainable else 0
        rows.append(TrainableRow("connector", connector.params, learns, "float32"))
    if language:
        stored, learns = _torch_name(_precisions(cfg)[0]), language.learning_params
        rows.append(TrainableRow("language", language.params, learns, stored))
        if adapters := language.adapter_params:
            rows.append(TrainableRow("lora", adapters, adapters, "float32"))
    if vision and (adapters := vision.adapter_params):
        rows.append(TrainableRow("vision_lora", adapters, adapters, "float32"))
    return TrainableTable(tuple(rows))


def _precisions(cfg: RunConfig) -> tuple[str, str]:
    """What the language model is stored in, and computed in."""
    own = cfg.model.llm.precision
    return (own, own) if cfg.model.student is None else ("fp32", cfg.train.precision)


def _torch_name(precision: str) -> str:
    return str(DTYPES[precision]).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------------
# Data and tokens


@dataclass(frozen=True)
class Written:
    """What samples are written as tokens with."""

    tokenizer: Any
    """None: it cannot be had."""
    visual: float
    """Positions of an image, on average."""
    pipeline: NativePipeline | None = None
    """A native model's."""
    usual: tuple[int, int] | None = None
    """(height, width) of an image, where that decides its positions."""

    def encoder(self, cfg: RunConfig) -> ChatEncoder:
        return build_encoder(cfg, self.tokenizer, None if self.pipeline else int(self.visual), self.pipeline)


def _estimate_sequence(cfg: RunConfig, written: Written, examples: Sequence[Example], result: Estimate) -> np.ndarray:
    """Token budget of a sample, and how samples become rows. Gives the target lengths of samples."""
    gaps, num_visual = result.gaps, written.visual
    targets, kept = _target_lengths(cfg, examples, written.tokenizer, gaps)
    assert result.language is not None
    table_rows = result.language.vocab
    known = written.tokenizer is not None
    prompt = _try(gaps, lambda: _prompt_tokens(cfg, written, table_rows)) if known else None
    whole: np.ndarray = np.array([])
    more = num_visual
    if prompt is None:
        prompt = round(num_visual) + 3 + round(len(cfg.prompting.instruction) / 4)
        gaps.append(f"prompt length: {prompt} tokens assumed (4 characters a token)")
    else:
        whole = _sample_lengths(cfg, kept, written, gaps)
        if cfg.max_images > 1:  # the words around an image, too
            more = _prompt_tokens(cfg, written, table_rows, images=2) - prompt
    limit = cfg.prompting.max_seq_len
    most = int(targets.max()) if cfg.hygiene.max_tokens is None else cfg.hygiene.max_tokens
    images = cfg.max_images if result.images_per_sample > 1 else 1
    longest = prompt + (images - 1) * more + most + 1
    if not whole.size:
        whole = prompt + (result.images_per_sample - 1) * more + targets + 1
    elif cfg.stage_record.dialogues:  # their questions are their own, and so is how many images they are about
        prompt, longest = round(float(whole.mean() - targets.mean()) - 1), int(whole.max())
    mean = min(float(whole.mean()), limit)
    micro, samples = cfg.train.micro_batch_size, float(cfg.train.micro_batch_size)
    pack_len = cfg.train.pack_len or limit
    if cfg.train.packing:
        # First-fit-decreasing leaves about half a sample free in each row.
        window = max(micro, min(cfg.effective_batch, WINDOW))
        per_row = max(1.0, min(pack_len / mean - 0.5, float(window)))
        rows = float(max(1, math.ceil(window / per_row) * micro // window))  # as `collate_window` does
        row_length = min(float(pack_len), per_row * mean + 0.5 * mean)
        samples = min(rows * per_row, float(window))
    else:
        draws = np.random.default_rng(0).choice(np.minimum(whole, limit), size=(256, micro))
        rows, row_length = float(micro), float(draws.max(1).mean())
    result.sequence = {
        "visual_tokens_per_image": num_visual, "prompt_tokens": prompt, "target_tokens_mean": float(targets.mean()),
        "target_tokens_limit": most, "tokens_mean": mean, "tokens_longest": min(longest, limit),
        "tokens_limit": limit, "rows_of_a_micro_batch": rows, "row_length": row_length,
        "samples_of_a_micro_batch": samples,
    }  # fmt: skip
    if longest > limit:
        gaps.append(
            f"samples that do not fit: prompting.max_seq_len is {limit}, a sample may need {longest} "
            f"(prompting.too_long: {cfg.prompting.too_long})"
        )
    return targets


def _sample_records(cfg: RunConfig, result: Estimate, num: int = 1000) -> list[Example]:
    """Up to ``num`` records spread over the files; fills ``result.data`` and ``result.steps``."""
    result.steps = cfg.train.train_steps
    if missing := missing_files(cfg.data.train_sources):
        result.gaps.append(f"number and length of the records, hence steps: {'; '.join(missing)}")
        if cfg.stage_record.most_images is None and cfg.max_images > 1:
            result.images_per_sample = float(cfg.max_images)
            result.gaps.append(f"images of a sample: {cfg.max_images} assumed (prompting.max_images_per_sample)")
        return []
    records = _try(result.gaps, lambda: open_records(cfg, cfg.data.train_sources))
    if records is None or not len(records):
        return []
    total, d = len(records), cfg.data
    used = min(total, d.max_samples or total)
    held_out = d.eval_size or round(used * (0.02 if d.eval_ratio is None else d.eval_ratio))
    train = used if d.split == "none" else max(0, used - held_out)
    spread = np.unique(np.linspace(0, total - 1, min(num, total)).astype(np.int64))
    examples = [records[int(i)] for i in spread]
    stored = used * _mean_images(examples)
    if weights := [s.weight for s in d.train_sources if s.weight is not None]:
        drawn = Mixture(records, np.arange(total), seed=cfg.seed, weights=weights)
        examples = [drawn.example_at(p) for p in range(BLOCK)]  # its proportions hold in a whole block
    result.images_per_sample = _mean_images(examples)
    result.data = {
        "records": total, "structural_rejects": len(records.rejects), "train_samples": train,
        "held_out_samples": used - train, "images_per_sample": result.images_per_sample,
        "images": stored,
    }  # fmt: skip
    if result.steps is None:
        result.steps = max(1, math.ceil(train * cfg.train.num_epochs / cfg.effective_batch))
    return examples


def _mean_images(examples: Sequence[Example]) -> float:
    return sum(len(e.images) for e in examples) / len(examples)


def _target_lengths(
    cfg: RunConfig, examples: Sequence[Example], tokenizer: Any, gaps: list[str]
) -> tuple[np.ndarray, list[Example]]:
    """Target tokens of the sampled records that hygiene would let pass, and these records."""
    if examples and tokenizer is not None:
        encoded = tokenizer([e.target_text for e in examples], add_special_tokens=False)["input_ids"]
        lengths = np.array([len(ids) for ids in encoded])
        h = cfg.hygiene
        most = lengths.max() if h.max_tokens is None else h.max_tokens
        passes = (lengths >= h.min_tokens) & (lengths <= most)
        if passes.any():
            return lengths[passes], [e for e, ok in zip(examples, passes, strict=True) if ok]
        gaps.append(f"of {len(lengths)} sampled captions none has {h.told_limits} target tokens")
    gaps.append(f"target length: {TYPICAL_TARGET_TOKENS:g} tokens assumed (LLaVA-Pretrain's mean)")
    return np.array([TYPICAL_TARGET_TOKENS]), []


def _sample_lengths(
    cfg: RunConfig, examples: Sequence[Example], written: Written, gaps: list[str]
) -> np.ndarray:  # fmt: skip
    """Tokens of each of these records, by the run's own encoder, as if every length fitted."""
    unlimited = cfg.prompting.model_copy(update={"max_seq_len": 2**31})
    encoder = written.encoder(cfg.model_copy(update={"prompting": unlimited}))
    lengths: list[int] = []
    refused: list[str] = []
    for e in examples:
        try:
            lengths.append(len(encoder.encode(e).ids))
        except (EncodeError, ImageError) as wrong:
            refused.append(str(wrong))
    if refused:
        gaps.append(f"{len(refused)} of {len(examples)} sampled records cannot be laid out as tokens: {refused[0]}")
    return np.array(lengths)


def _prompt_tokens(cfg: RunConfig, written: Written, rows: int, images: int = 1) -> int:
    """Positions before the target of a sample, by the run's own encoder."""
    encoder = written.encoder(cfg)
    encoder.check_table(rows)
    shown = [part for k in range(images) for part in (ImageSlot(k), "\n")]
    question = Turn("user", (*shown, cfg.prompting.instruction))
    example = Example("plan", (ImageRef(".", "-"),) * images, (question, Turn("assistant", ("-",))))
    try:
        sizes = None if written.usual is None else [written.usual] * images
        return len(encoder.encode_prompt(encoder.apply_template(example), sizes).ids)
    except EncodeError as e:
        raise UserError(f"prompt length: {e}") from e


# ---------------------------------------------------------------------------------------------------------------
# Memory and time


def _plan_memory(
    cfg: RunConfig, result: Estimate, language: LanguageShape, vision: VisionShape, connector: ConnectorShape | None
) -> None:
    stored, s = (DTYPES[precision].itemsize for precision in _precisions(cfg))
    seq = result.sequence
    positions = seq["rows_of_a_micro_batch"] * seq["row_length"]
    images = seq["samples_of_a_micro_batch"] * result.images_per_sample
    logits = min(seq["samples_of_a_micro_batch"] * (seq["target_tokens_mean"] + 1) * language.vocab, MAX_LOGITS)
    autocast = 0 if cfg.train.precision == "fp32" else 2
    result.memory = {
        # under autocast with a copy of what is multiplied
        "language_model_weights": language.params * (stored if s == stored else stored + s),
        **({"language_model_gradients_and_AdamW": 12 * n} if (n := language.learning_params) else {}),
        "vision_tower_weights": vision.params * DTYPES[cfg.model.vision.precision].itemsize,
        **(
            {
                "connector_gradients_and_AdamW": connector.params
                * ((16 if cfg.model.connector.trainable else 4) + autocast),
            }
            if connector
            else {}
        ),
        **({"adapters_gradients_and_AdamW": 16 * language.adapter_params} if language.adapter_params else {}),
        **({"tower_gradients_and_AdamW": 16 * vision.learning_params} if vision.learning_params else {}),
        "language_model_activations": language.activation_bytes(
            positions,
            s,
            _attended(cfg, result) if result.device == "cpu" else None,
            cfg.model.llm.gradient_checkpointing,
        ),
        **({"connector_activations": images * connector.activation_bytes_per_image} if connector else {}),
        "logits": logits * (s + 4 + 4),
        "runtime": RUNTIME_BYTES,
    }
    result.memory["total"] = sum(result.memory.values())
    if vision.learning_params:
        result.gaps.append("what a tower that learns keeps for its backward pass is not among the activations")
    elif vision.kept_bytes and "images" in result.data:
        stored = result.data["images"] * vision.kept_bytes
        if cfg.features.enabled and cfg.data.augment == "none":
            result.store_bytes = min(stored, cfg.features.max_gb * 1e9)
            if stored > cfg.features.max_gb * 1e9:
                result.gaps.append(
                    f"all features take {_size(stored)}, features.max_gb allows {cfg.features.max_gb:g} GB: "
                    f"{1 - cfg.features.max_gb * 1e9 / stored:.0%} of the images go through the tower at every step"
                )


def _plan_teachers(cfg: RunConfig, result: Estimate, language: LanguageShape, targets: np.ndarray) -> float | None:
    """What is kept of the teachers, or what they take in memory while they are asked online. Gives the FLOPs of asking
    all of them about one sample; None where that is not known, or nobody is asked."""
    own = cfg.distill
    if own is None or not own.taught:
        return None
    found = {t.name: _try(result.gaps, partial(_teacher, t, result)) for t in own.teachers}
    if own.online:
        total = result.memory.pop("total")
        weights = {f"teacher {name}": known[1] for name, known in found.items() if known}
        result.memory |= {**weights, "total": total + sum(weights.values())}
    elif (samples := _asked(cfg, result)) is not None:
        rows = samples * float(np.ceil((targets + 1) / TOKENS).mean())
        each = bytes_of(math.ceil(rows), own, language.vocab)
        result.teacher_bytes = float(each * len(own.teachers))
        if each > own.max_gb * 1e9:
            result.gaps.append(
                f"what is kept of a teacher takes {_size(each)}, distill.max_gb allows {own.max_gb:g} GB: beholder "
                "teacher-cache will refuse it; raise it, lower distill.k, or use form sampled"
            )
    return None if None in found.values() else sum(flops for flops, _ in found.values())


def _asked(cfg: RunConfig, result: Estimate) -> float | None:
    """Samples that teachers are asked about once; None where the records are not known."""
    if not result.data or result.steps is None:
        return None
    return min(result.data["train_samples"], result.steps * cfg.effective_batch) + result.data["held_out_samples"]


def _teacher(teacher: TeacherConfig, result: Estimate) -> tuple[float, float]:
    """FLOPs of asking a teacher about one sample, and bytes of its weights. Raises `UserError` for one that is not
    there, or that is no run of Beholder."""
    what = f"time and memory of the teacher {teacher.name}"
    if teacher.run is None:
        raise UserError(f"{what}: it is a native model, and these are not planned yet")
    with _asked_for(what):
        folder = checkpoint.run_of(checkpoint.resolve_checkpoint(teacher.run))
        model = load_config(folder / "config.yaml").model
        if model.native is not None:
            raise UserError("it is of a native model, and these are not planned yet")
        language, vision = language_shape(model.llm, None, model.student), vision_shape(model.vision)
        connector = connector_shape(model.connector, vision, language.hidden)
    seq, images = result.sequence, result.images_per_sample
    tokens = seq["tokens_mean"] + images * (connector.num_tokens - seq["visual_tokens_per_image"])
    flops = language.forward_flops(tokens, seq["target_tokens_mean"] + 1)
    flops += images * (vision.flops_per_image + connector.flops_per_image / 3)
    stored = language.params * DTYPES[model.llm.precision if model.student is None else "fp32"].itemsize
    return flops, stored + vision.params * DTYPES[model.vision.precision].itemsize + 4.0 * connector.params


@contextmanager
def _asked_for(what: str) -> Iterator[None]:
    """Says of what a `UserError` is."""
    try:
        yield
    except UserError as e:
        raise UserError(f"{what}: {e}") from e


def _attended(cfg: RunConfig, result: Estimate) -> float:
    """R of the module's formulae."""
    own = result.device == "cpu" and cfg.model.native is None
    return result.sequence["tokens_mean" if own else "row_length"]


def _plan_time(
    cfg: RunConfig, result: Estimate, language: LanguageShape, vision: VisionShape, connector: ConnectorShape | None,
    teachers: float | None, device: torch.device | None,
) -> None:  # fmt: skip
    seq, samples = result.sequence, cfg.effective_batch
    images = samples * result.images_per_sample
    stored = 0.0
    if result.store_bytes is not None:
        stored = result.store_bytes / (result.data["images"] * vision.kept_bytes)
    positions = seq["rows_of_a_micro_batch"] * seq["row_length"] * samples / seq["samples_of_a_micro_batch"]
    tokens = samples * seq["tokens_mean"]
    result.flops_per_step = {
        "language_model": language.flops(positions, _attended(cfg, result), cfg.model.llm.gradient_checkpointing),
        **({"adapters": 6.0 * language.adapter_params * tokens} if language.adapter_params else {}),
        "head": language.head_flops(samples * (seq["target_tokens_mean"] + 1)),
        **({"connector": images * connector.flops_per_image} if connector else {}),
        "vision_tower": images * vision.flops_per_image * (1 - stored + 2 * vision.share_above),
        **({"teachers": samples * teachers} if teachers and cfg.learnt_from.online else {}),
    }
    if device is None:
        return
    rate = matmul_rate(device, DTYPES[_precisions(cfg)[1]])
    result.matmul_flops_per_s = rate
    usable = rate * EFFICIENCY[device.type]
    step = sum(result.flops_per_step.values()) / usable
    result.seconds = {"step": step}
    if stored:
        result.seconds["features"] = result.data["images"] * stored * vision.flops_per_image / usable
    if teachers and not cfg.learnt_from.online and (asked := _asked(cfg, result)) is not None:
        result.seconds["teachers"] = asked * teachers / usable
    if result.steps is not None:
        result.seconds["training"] = result.steps * step
        result.seconds["total"] = sum(result.seconds.get(x, 0.0) for x in ("training", "features", "teachers"))


def _try(gaps: list[str], find: Any) -> Any:
    """What ``find`` gives, or None with the reason among the gaps. A class that can never be used is no gap."""
    try:
        return find()
    except UnknownClass:
        raise
    except UserError as e:
        gaps.append(str(e))
        return None


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
