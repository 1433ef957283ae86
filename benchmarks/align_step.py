"""Our alignment step against a step in the seed's shape, on the same models, samples and optimizer, interleaved.

    python benchmarks/align_step.py                                     # SmolLM2-135M + SigLIP-B/16-224, CPU, ~5 min
    python benchmarks/align_step.py --llm PATH/SmolLM2-135M-Instruct.Q4_1.gguf   # real language-model weights
    python benchmarks/align_step.py --shape qwen3-8b --batch 4          # Qwen3-8B + SigLIP so400m/384 on a GPU

The reference is written below in plain torch: every step sends every image through the tower, pads the batch to its
longest sample, and computes logits over the whole vocabulary at every position, with transformers' own attention. Its
pixels are decoded for free; our step pays for reading the feature store and for laying out the batch. Measures are
switched on one after another, so their factors multiply to the whole; each variant trains a connector of its own from
the same start, and losses and gradient norms must agree at every step. Peak memory comes from one fresh process per
variant. Weights are random unless given.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table

from beholder.config import ConnectorConfig, LlmConfig
from beholder.data.collate import Layout, collate
from beholder.data.images import ImagePipeline
from beholder.model import attention
from beholder.model.connector import Connector, build_connector
from beholder.model.language import LanguageModel, load_language
from beholder.model.vision import VisionTower
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.estimate import LanguageShape, VisionShape, connector_shape, matmul_rate
from beholder.store.features import FeatureStore
from beholder.train.objectives import next_token
from beholder.types import Encoded, ImageGeometry, ImageInput, ImageRef

PROMPT = 12
"""Text tokens before the target: marker tokens and "Describe the image in one sentence."."""
SEED_STEP_S = 0.803
"""The seed's own step: Qwen3-8B + SigLIP so400m/384, batch 4, on a DGX Spark."""
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (2e-2, 5e-2)}
"""Allowed relative differences of loss and gradient norm from the first variant's. fp32 with the store: features
rounded to 8 bits. bf16: activations of 30 layers rounded to 8 bits; ours may be twice as far off as the reference is
with the same rounding, where that is more (real weights on random text: 12 % of the gradient norm for both)."""
EXACT = (2e-5, 2e-4)
"""Allowed from "+ store" on in fp32, where nothing is rounded differently: head on fewer positions, other rows."""


@dataclass(frozen=True)
class Shape:
    language: dict[str, Any]
    kind: str
    vision: dict[str, Any]
    batch: int


SHAPES = {
    "smollm2": Shape(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192},
        "llama", {"image_size": 224, "patch_size": 16}, 16),
    "qwen3-8b": Shape(
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
         "max_position_embeddings": 32768},
        "qwen3", {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
                  "image_size": 384, "patch_size": 14}, 4),
    "tiny": Shape(
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True},
        "llama", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "image_size": 32, "patch_size": 4}, 4),
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    name: str
    precision: str
    store: bool = False
    head: bool = False
    packing: bool = False


def variants(precisions: list[str]) -> list[Variant]:
    """Reference first; then store, head, packing and, where fp32 is measured too, bf16; then the bf16 reference."""
    first = precisions[0]
    steps = [
        Variant(f"reference, {first}", first),
        Variant("+ store", first, store=True),
        Variant("+ head", first, store=True, head=True),
        Variant("+ packing", first, store=True, head=True, packing=True),
    ]
    if precisions[1:]:
        steps += [Variant("+ bf16 = ours", "bf16", True, True, True), Variant("reference, bf16", "bf16")]
    return steps


# ---------------------------------------------------------------------------------------------------------------
# Parts and samples


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass
class Parts:
    towers: dict[str, VisionTower]
    languages: dict[str, LanguageModel]
    connector: Connector

    @property
    def tower(self) -> VisionTower:
        return next(iter(self.towers.values()))

    @property
    def language(self) -> LanguageModel:
        return next(iter(self.languages.values()))


def make_tower(shape: Shape, dtype: torch.dtype, device: torch.device) -> VisionTower:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(**shape.vision, vision_use_head=False)
    with device:
        backbone: Any = SiglipVisionModel(config)
    backbone = backbone.to(dtype)
    size, half = shape.vision["image_size"], (0.5, 0.5, 0.5)
    side = size // shape.vision["patch_size"]
    geometry = ImageGeometry(size, size, side * side, config.hidden_size, half, half)

    def features(backbone: torch.nn.Module, pixels: torch.Tensor, _: int) -> torch.Tensor:
        return backbone(pixel_values=pixels).last_hidden_state

    return VisionTower(backbone, features, geometry, {"benchmark": "random"}, dtype, "random SigLIP").to(device)


def make_language(shape: Shape, dtype: torch.dtype, device: torch.device, path: str | None) -> LanguageModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    if path:
        precision = next(name for name, d in DTYPES.items() if d == dtype)
        return load_language(LlmConfig(name_or_path=path, precision=precision), device)[0]  # pyright: ignore
    config = AutoConfig.for_model(shape.kind, **shape.language)
    with device:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        finally:
            torch.set_default_dtype(before)
    return LanguageModel(model, f"random {shape.kind}")


def make_parts(args: argparse.Namespace, precisions: list[str], device: torch.device, with_tower: bool = True) -> Parts:
    shape = SHAPES[args.shape]
    towers, languages = {}, {}
    for precision in precisions:
        torch.manual_seed(args.seed)  # the same numbers, rounded, for every precision
        if precision == precisions[0] or args.llm:
            languages[precision] = make_language(shape, DTYPES[precision], device, args.llm)
        else:
            other = copy.deepcopy(languages[precisions[0]].model).to(DTYPES[precision])
            languages[precision] = LanguageModel(other, "copy")
        if with_tower:
            torch.manual_seed(args.seed)
            towers[precision] = make_tower(shape, DTYPES[precision], device)
    side = shape.vision["image_size"] // shape.vision["patch_size"]
    language = languages[precisions[0]]
    connector = build_connector(
        ConnectorConfig(num_visual_tokens=args.visual_tokens, resampler={"num_heads": 8}),  # pyright: ignore
        num_patches=side * side, d_vision=shape.vision.get("hidden_size", 768), d_text=language.d_text,
        embed_rms=language.embed_rms, seed=args.seed,
    ).to(device)  # fmt: skip
    return Parts(towers, languages, connector)


def target_lengths(num: int, seed: int) -> np.ndarray:
    """Caption lengths in tokens as LLaVA-Pretrain's: the seed measured a mean of 12.6 to 13.1, heavily short and medium
    with a thin tail; its hygiene keeps 5 to 60. A log-normal with median 11.5 and sigma 0.48, cut to that."""
    lengths = np.random.default_rng(seed).lognormal(math.log(11.5), 0.48, num).round()
    return np.clip(lengths, 5, 60).astype(np.int64)


def make_samples(args: argparse.Namespace, folder: Path, vocab: int, num: int) -> list[tuple[str, Encoded, ImageRef]]:
    rng = np.random.default_rng(args.seed)
    n, samples = args.visual_tokens, []
    for i, target in enumerate(target_lengths(num, args.seed)):
        length = PROMPT + n + int(target) + 1
        supervise = np.zeros(length, dtype=bool)
        supervise[PROMPT + n :] = True
        ids = rng.integers(0, vocab, length, dtype=np.int64)
        name = f"{i}.png"
        if not (folder / name).exists():
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((256, 256)).save(folder / name)
        samples.append((f"sample {i}", Encoded(ids, supervise, ((1, 1 + n),)), ImageRef(str(folder), name)))
    return samples


Sample = tuple[str, Encoded, ImageRef]


# ---------------------------------------------------------------------------------------------------------------
# The reference: plain torch, in the seed's shape


def reference_loss(
    tower: VisionTower | None, connector: Connector, language: LanguageModel, samples: list[Sample],
    pixels: torch.Tensor | None, stored: torch.Tensor | None, autocast: bool,
) -> torch.Tensor:  # fmt: skip
    """Mean cross-entropy of a padded batch. Either pixels and the tower, or stored features."""
    device, model = language.device, language.model
    longest = max(len(encoded.ids) for _, encoded, _ in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.int64)
    labels = torch.full((len(samples), longest), -100)
    mask = torch.zeros(len(samples), longest, dtype=torch.int64)
    for row, (_, encoded, _) in enumerate(samples):
        tokens = torch.from_numpy(encoded.ids)
        ids[row, : len(tokens)] = tokens
        labels[row, : len(tokens)] = torch.where(torch.from_numpy(encoded.supervise), tokens, -100)
        mask[row, : len(tokens)] = 1
    ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)

    if stored is not None:
        patches = stored
    else:
        assert tower is not None and pixels is not None
        backbone: Any = tower.backbone
        with torch.no_grad():
            normalised = (pixels.to(device).float() / 255 - 0.5) / 0.5
            patches = backbone(pixel_values=normalised.to(tower.dtype)).last_hidden_state
    with torch.autocast(device.type, torch.bfloat16) if autocast else nullcontext():
        visual = connector(patches)
    start, stop = samples[0][1].image_spans[0]
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :start], visual.to(embeds.dtype), embeds[:, stop:]], dim=1)
    logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


# ---------------------------------------------------------------------------------------------------------------
# One step of a variant


class Runner:
    """A variant with its own connector and optimizer; `step` is one optimizer step on a list of samples."""

    def __init__(self, variant: Variant, parts: Parts, store: FeatureStore, pipeline: ImagePipeline, pack_len: int):
        self.variant, self.store, self.pipeline = variant, store, pipeline
        language = parts.languages[variant.precision]
        # What `load_language` chooses on a CPU belongs to packing: attention inside each sample of a row.
        segments = variant.packing and language.device.type == "cpu"
        self.attention = attention.NAME if segments else "sdpa"
        language.model.set_attn_implementation(self.attention)
        self.language = LanguageModel(language.model, language.name)
        self.tower = None if variant.store else parts.towers[variant.precision]
        self.connector = copy.deepcopy(parts.connector).train()
        self.optimizer = torch.optim.AdamW(self.connector.parameters(), lr=1e-4)
        self.layout = Layout(packing=variant.packing, pack_len=pack_len, pad_to_multiple_of=8)
        tower = parts.towers[variant.precision]
        self.model = VisionLanguageModel(tower, self.connector, self.language, DTYPES[variant.precision])
        self.model.train()
        if variant.store:
            self.model.drop_vision()

    def prepare(self, samples: list[Sample]) -> torch.Tensor | None:
        """The reference's pixels, decoded outside of the measurement."""
        return None if self.variant.store else torch.stack([self.pipeline(ref) for _, _, ref in samples])

    def step(self, samples: list[Sample], pixels: torch.Tensor | None) -> tuple[float, float]:
        """One optimizer step; the mean loss in nats per supervised token, and the connector's gradient norm."""
        v = self.variant
        self.language.model.set_attn_implementation(self.attention)  # variants share the weights
        features: list[torch.Tensor] = []
        if v.store:
            for _, _, ref in samples:
                read = self.store.read(ref)
                assert read is not None, f"{ref} is not in the store"
                features.append(read)
        if v.head:
            inputs = [(i, e, [ImageInput(features=f)]) for (i, e, _), f in zip(samples, features, strict=True)]
            terms = next_token(self.model, collate(inputs, self.layout))
            loss = terms.total / terms.tokens
        else:
            stored = torch.stack(features).to(self.language.device) if v.store else None
            loss = reference_loss(
                self.tower, self.connector, self.language, samples, pixels, stored, v.precision == "bf16"
            )
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.connector.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), float(norm)


def fill_store(args: argparse.Namespace, folder: Path, parts: Parts, samples: list[Sample]) -> FeatureStore:
    g = parts.tower.geometry
    store = FeatureStore(
        folder, tower_fingerprint="benchmark", pipeline_fingerprint="benchmark", shape=(g.num_patches, g.d_vision),
        max_bytes=10**11,
    )  # fmt: skip
    tower, device = parts.tower, parts.language.device
    report = store.fill(
        [ref for _, _, ref in samples], lambda pixels: tower(pixels.to(device)), ImagePipeline(g, 1.0), batch_size=8
    )
    assert report.computed + report.reused == len(samples)
    return store


# ---------------------------------------------------------------------------------------------------------------
# Peak memory, one process a variant


def measure_memory(args: argparse.Namespace, variant: Variant) -> dict[str, float]:
    """Bytes after loading and at the peak of two steps, in a process that loads only what the variant needs."""
    command = [
        sys.executable, __file__, "--memory-of", json.dumps(variant.__dict__), "--shape", args.shape, "--batch",
        str(args.batch), "--visual-tokens", str(args.visual_tokens), "--seed", str(args.seed), "--pack-len",
        str(args.pack_len), "--device", args.device,
    ]  # fmt: skip
    if args.threads:
        command += ["--threads", str(args.threads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(out.stdout.strip().splitlines()[-1])


def memory_of(args: argparse.Namespace, device: torch.device) -> None:
    variant = Variant(**json.loads(args.memory_of))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = make_parts(args, [variant.precision], device)
        samples = make_samples(args, folder, parts.language.vocab, 2 * args.batch)
        pipeline = ImagePipeline(parts.tower.geometry, 1.0)
        store = fill_store(args, folder / "store", parts, samples)
        runner = Runner(variant, parts, store, pipeline, args.pack_len)
        if variant.store:
            parts.towers.clear()
        batches = [samples[: args.batch], samples[args.batch :]]
        pixels = [runner.prepare(batch) for batch in batches]
        _settle()
        loaded = _used(device)
        _reset_peak(device)
        for batch, prepared in zip(batches, pixels, strict=True):
            runner.step(batch, prepared)
        print(json.dumps({"loaded": loaded, "peak": _peak(device)}))


def _settle() -> None:
    """Give freed memory back to the system, so that loading does not count as training."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _used(device: torch.device) -> float:
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident size starts anew


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    if os.path.exists("/proc/self/status"):
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return 1024.0 * float(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)


# ---------------------------------------------------------------------------------------------------------------


def language_numbers(language: LanguageModel) -> LanguageShape:
    c = language.config
    heads = c.num_attention_heads
    return LanguageShape(
        c.num_hidden_layers, language.d_text, heads, c.num_key_value_heads,
        getattr(c, "head_dim", None) or c.hidden_size // heads, c.intermediate_size, language.vocab,
        sum(p.numel() for p in language.parameters()),
        sum(p.numel() for n, p in language.named_parameters() if ".layers." in n), False,
    )  # fmt: skip


def our_flops(args: argparse.Namespace, parts: Parts, runner: Runner, batches: list[list[Sample]]) -> float:
    """Useful FLOPs of an average step of ours: attention within samples only, no padding, no recomputation."""
    shape = language_numbers(parts.language)
    c = runner.connector
    per_image = connector_shape(
        ConnectorConfig(num_visual_tokens=args.visual_tokens), VisionShape(0, c.num_patches, c.d_in, 0.0), c.d_out
    ).flops_per_image
    total = 0.0
    for batch in batches:
        for _, encoded, _ in batch:
            total += shape.flops(len(encoded.ids), len(encoded.ids)) + shape.head_flops(encoded.num_targets) + per_image
    return total / len(batches)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--llm", help="language model with real weights of that shape: a folder or a .gguf file")
    parser.add_argument("--batch", type=int, help="samples a step; default 16, for qwen3-8b 4")
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of every variant")
    parser.add_argument("--visual-tokens", type=int, default=64)
    parser.add_argument("--pack-len", type=int, default=1536)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precisions", default=None, help="fp32,bf16 (default on a CPU) or bf16 (default on a GPU)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-memory", action="store_true", help="leave out the two extra processes")
    parser.add_argument("--goal", type=float, default=None, help="exit with an error below this ratio")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.batch = args.batch or SHAPES[args.shape].batch
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    attention.register()
    if args.memory_of:
        memory_of(args, device)
        return
    precisions: list[str] = str(args.precisions or ("bf16" if device.type == "cuda" else "fp32,bf16")).split(",")
    console = Console(width=120)
    started = time.perf_counter()
    parts = make_parts(args, precisions, device)
    plan = variants(precisions)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        samples = make_samples(args, folder, parts.language.vocab, args.batch * (args.rounds + 1))
        batches = [samples[i : i + args.batch] for i in range(0, len(samples), args.batch)]
        pipeline = ImagePipeline(parts.tower.geometry, 1.0)
        store = fill_store(args, folder / "store", parts, samples)
        runners = [Runner(v, parts, store, pipeline, args.pack_len) for v in plan]
        seconds: dict[str, list[float]] = {v.name: [] for v in plan}
        losses: dict[str, list[float]] = {v.name: [] for v in plan}
        norms: dict[str, list[float]] = {v.name: [] for v in plan}
        shuffled = random.Random(args.seed)
        for number, batch in enumerate(batches):  # the first is for warming up
            for runner in shuffled.sample(runners, len(runners)):
                took, (loss, norm) = _timed(runner, batch, device)
                losses[runner.variant.name].append(loss)
                norms[runner.variant.name].append(norm)
                if number:
                    seconds[runner.variant.name].append(took)
        ours = next(r for r in reversed(runners) if r.variant.packing)
        flops = our_flops(args, parts, ours, batches[1:])
    rate = matmul_rate(device, DTYPES[precisions[-1]])
    result = report(console, args, plan, seconds, losses, norms, flops, rate, ours.variant)
    del parts, runners, ours
    if not args.no_memory:
        table = Table("peak memory", "loaded", "peak of a step", "above loaded")
        for variant in (v for v in plan if v.packing == v.store):
            if variant.packing and variant.precision != precisions[-1]:
                continue
            memory = result.setdefault("memory", {})[variant.name] = measure_memory(args, variant)
            table.add_row(
                variant.name, *(f"{x / 1e9:.2f} GB" for x in (memory["loaded"], memory["peak"])),
                f"{(memory['peak'] - memory['loaded']) / 1e9:.2f} GB",
            )  # fmt: skip
        console.print(table)
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    if not result["losses_agree"]:
        raise SystemExit("the losses do not agree: see the table")
    if args.goal and result["ratio"] < args.goal:
        raise SystemExit(f"ratio {result['ratio']:.2f} is below the goal {args.goal}")


def _timed(runner: Runner, batch: list[Sample], device: torch.device) -> tuple[float, tuple[float, float]]:
    pixels = runner.prepare(batch)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    found = runner.step(batch, pixels)
    wait()
    return time.perf_counter() - start, found


def report(
    console: Console, args: argparse.Namespace, plan: list[Variant], seconds: dict[str, list[float]],
    losses: dict[str, list[float]], norms: dict[str, list[float]], flops: float, rate: float, ours: Variant,
) -> dict[str, Any]:  # fmt: skip
    """Print the table and give its numbers. Ratios are medians over rounds of ratios within a round."""
    first = plan[0].name

    def ratio(a: str, b: str) -> float:
        return float(np.median([x / y for x, y in zip(seconds[a], seconds[b], strict=True)]))

    def off(a: str, b: str) -> tuple[float, float]:
        """Largest relative difference of the losses and of the gradient norms."""
        pairs = (zip(x[a], x[b], strict=True) for x in (losses, norms))
        loss, norm = (max(abs(p / q - 1) for p, q in pair) for pair in pairs)
        return loss, norm

    table = Table("variant", "s / step", "samples / s", "this measure", "in all", "loss off", "gradient off")
    agree, previous, rows = True, first, {}
    for v in plan:
        away, allowed = off(v.name, first), TOLERANCE[v.precision]
        if v.precision == "bf16" and plan[-1].name == "reference, bf16":
            allowed = tuple(max(x, 2 * y) for x, y in zip(allowed, off(plan[-1].name, first), strict=True))
        ok = all(x <= y for x, y in zip(away, allowed, strict=True))
        if v.head and v.precision == plan[0].precision == "fp32":
            ok &= all(x <= y for x, y in zip(off(v.name, "+ store"), EXACT, strict=True))
        agree &= ok
        middle = float(np.median(seconds[v.name]))
        measure = "" if v == plan[0] or not v.store else f"x {ratio(previous, v.name):.2f}"
        speed, whole = args.batch / middle, ratio(first, v.name)
        rows[v.name] = {
            "s": middle,
            "samples_per_s": speed,
            "ratio": whole,
            "loss_off": away[0],
            "gradient_off": away[1],
            "loss_off_store": off(v.name, "+ store")[0],
            "losses": losses[v.name],
        }
        table.add_row(
            v.name, f"{middle:.3f}", f"{speed:.2f}", measure, f"x {whole:.2f}",
            f"{away[0]:.1e}", f"{away[1]:.1e}" + ("" if ok else " TOO FAR"),
        )  # fmt: skip
        previous = v.name
    console.print(
        f"{args.shape}, batch {args.batch}, {args.visual_tokens} visual tokens, {args.device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {len(seconds[first])} rounds"
    )
    console.print(table)
    console.print(f"loss of {first}: {losses[first][0]:.4f} at the first step, {losses[first][-1]:.4f} at the last")
    share = flops / rows[ours.name]["s"] / rate
    result = {
        "shape": args.shape, "batch": args.batch, "variants": rows, "losses_agree": agree,
        "ratio": ratio(first, ours.name),
        "flops_per_step": flops, "matmul_flops_per_s": rate, "share_of_matrix_rate": share,
    }  # fmt: skip
    console.print(f"ours against {first}: x {result['ratio']:.2f} samples/s")
    if plan[-1].name == "reference, bf16":
        result["ratio_same_precision"] = ratio("reference, bf16", ours.name)
        console.print(f"ours against reference, bf16: x {result['ratio_same_precision']:.2f} samples/s")
    console.print(
        f"matrix rate measured {rate / 1e12:.2f} TFLOP/s, our step uses {share:.0%} of it "
        f"({flops / 1e12:.2f} useful TFLOP a step)"
    )
    if args.shape == "qwen3-8b" and args.batch == 4:
        here = rows[ours.name]["s"]
        console.print(f"the seed's step at batch 4: {SEED_STEP_S} s on a DGX Spark; ours here {here:.3f} s")
    return result


if __name__ == "__main__":
    main()
