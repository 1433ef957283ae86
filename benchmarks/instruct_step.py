"""Our instruction-tuning step (connector + LoRA) against one in the seed's shape, interleaved, on tiny parts.

    python benchmarks/instruct_step.py                        # 2,000 samples, 5 rounds of 16
    python benchmarks/instruct_step.py --quick                # 200 samples, 3 rounds of 8
    python benchmarks/instruct_step.py --shape smollm2 --samples 100 --rounds 3   # SmolLM2-135M + SigLIP-B/16 in size

Samples have LLaVA-Instruct's form and mix (37 % conversations of 2 to 5 turns, 15 % detailed descriptions, 48 %
reasoning; lengths are drawn as `LENGTHS` states, words are made up) and pass the real data path: JSON file, dataset
llava_instruct, hygiene, chat template, max_seq_len 2048. All of them are read, laid out and counted; time is taken on
one optimizer step a round. Weights are random, LoRA is on all seven projections, dropout is off.

The reference is plain torch, transformers and peft: every step sends every image through the tower, a micro-batch is
one sample (the seed's micro_batch_size 1, gradient_accum 16) or four, padded to the longest, logits over the whole
vocabulary at every position, PEFT's own layers. Its token ids and decoded pixels are ready before the clock starts;
ours reads, encodes and lays out inside it. Each variant trains its own copy from the same start; loss and gradient norm
must agree at every timed step, and before that at one in fp32, or the benchmark fails.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from rich.table import Table

from beholder.config import RunConfig
from beholder.data import Data, build_data
from beholder.data.collate import Layout, Sample, collate_window
from beholder.data.images import ImagePipeline
from beholder.model import adapters, placement
from beholder.model.build import build_vlm
from beholder.model.plan import TrainPlan, apply_train_plan, param_groups
from beholder.model.vision import VisionTower
from beholder.model.vlm import VisionLanguageModel
from beholder.model.weights import DTYPES, quiet_transformers
from beholder.prepare import tiny
from beholder.store.features import FeatureStore
from beholder.train.objectives import next_token
from beholder.train.optim import build_optimizer, trainable_parameters
from beholder.types import FeatureReader, ImageInput

MAX_SEQ_LEN, VISUAL_TOKENS = 2048, 64
"""The seed's, as are the 16 samples of a step, LoRA's rank 16 and alpha 32 and the learning rates."""
TOLERANCE = {"fp32": (1e-3, 1e-2), "bf16": (2e-2, 5e-2)}
"""Allowed relative differences of loss and gradient norm from the first variant's. fp32: the feature store keeps 8
bits. bf16: activations keep 8 bits, and each variant trains on what it computed itself."""
EXACT = (2e-5, 2e-4)
"""Allowed in fp32 among our own layouts, which read the same features: only the order of sums differs."""

LENGTHS = {
    # kind: share, exchanges, words of a question (low, high), words of an answer (median, sigma, low, high)
    "conversation": (0.37, (2, 5), (5, 14), (16, 0.6, 1, 60)),
    "detail": (0.15, (1, 1), (8, 14), (100, 0.25, 40, 220)),
    "reasoning": (0.48, (1, 1), (9, 22), (105, 0.30, 30, 260)),
}
"""Word counts of the three kinds of LLaVA-Instruct-150K: answers log-normal, cut to the range. Our description of that
set, not a measurement of it."""


@dataclass(frozen=True)
class Shape:
    language: dict[str, Any]
    vision: dict[str, Any]


SHAPES = {
    "tiny": Shape(
        {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 32_768, "initializer_range": 0.06},
        {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6,
         "image_size": 224, "patch_size": 16}),
    "smollm2": Shape(
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49_152, "initializer_range": 0.04,
         "tie_word_embeddings": True},
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
         "image_size": 224, "patch_size": 16}),
}  # fmt: skip
REAL_SHARES = (428e6, 729, 6.95e9, 151_936 * 4096)
"""The seed's pair, SigLIP so400m/384 and Qwen3-8B: weights of the tower, its patches, weights of the decoder's layers,
of the head."""


@dataclass(frozen=True)
class Variant:
    name: str
    ours: bool
    micro_batch: int | None
    """Samples in one forward and backward pass; None: all of the step's. Packed: the rows that these fill."""
    packing: bool = False


REFERENCE = Variant("seed's shape, one by one", False, 1)
PADDED_REFERENCE = Variant("seed's shape, four padded", False, 4)
OURS_SINGLE = Variant("ours, one by one", True, 1)
OURS_PADDED = Variant("ours, all padded", True, None)
OURS = Variant("ours, packed to 2048", True, 1, packing=True)
VARIANTS = (REFERENCE, PADDED_REFERENCE, OURS_SINGLE, OURS_PADDED, OURS)


# ---------------------------------------------------------------------------------------------------------------
# Samples


class Words:
    """Made-up words, drawn as often as Zipf's law says."""

    def __init__(self, seed: int, num: int = 6000) -> None:
        self.rng = np.random.default_rng(seed)
        starts, vowels, ends = list("bcdfghklmnprstvw"), list("aeiou"), ["", "n", "r", "s", "t", "l"]
        known: dict[str, None] = {}
        while len(known) < num:  # the frequent words come first and are short
            syllables = 1 + int(self.rng.integers(0, 2 + 2 * len(known) // num))
            parts = [str(self.rng.choice(starts)) + str(self.rng.choice(vowels)) for _ in range(syllables)]
            known["".join(parts) + str(self.rng.choice(ends))] = None
        self.known = np.array(list(known))
        weights = 1 / (np.arange(num) + 3.0)
        self.weights = weights / weights.sum()

    def text(self, count: int, end: str) -> str:
        words = [str(w) for w in self.rng.choice(self.known, count, p=self.weights)]
        for i in range(11, count - 1, 12):
            words[i] += "."
        return (" ".join(words) + end).capitalize()


def write_records(folder: Path, num: int, num_pictures: int, words: Words) -> Path:
    """A LLaVA-Instruct JSON file of ``num`` records on ``num_pictures`` photographs of noise; gives its path."""
    rng = words.rng
    folder.mkdir(parents=True)
    for i in range(num_pictures):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        coarse.resize((640, 480), Image.Resampling.BICUBIC).save(folder / f"{i:012d}.jpg", quality=90)
    records = []
    for i in range(num):
        kind = str(rng.choice(list(LENGTHS), p=[share for share, *_ in LENGTHS.values()]))
        _, exchanges, asked, (median, sigma, low, high) = LENGTHS[kind]
        turns: list[dict[str, str]] = []
        for k in range(int(rng.integers(exchanges[0], exchanges[1] + 1))):
            question = words.text(int(rng.integers(asked[0], asked[1] + 1)), "?")
            if k == 0:  # the set has the marker before or after the first question
                question = f"<image>\n{question}" if rng.random() < 0.5 else f"{question}\n<image>"
            answer = words.text(int(np.clip(rng.lognormal(np.log(median), sigma), low, high)), ".")
            turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        picture = f"{int(rng.integers(num_pictures)):012d}.jpg"
        records.append({"id": f"{i:012d}", "image": picture, "conversations": turns})
    path = folder / "instruct.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def train_tokenizer(folder: Path, records: Path, words: Words) -> None:
    """A byte-level BPE vocabulary learned from the records, with `tiny.tiny_tokenizer`'s control tokens and ChatML;
    the byte vocabulary of that one would make a token of every letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = [*tiny.CONTROL, *tiny.VISION_CONTROL]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=control, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    said = (turn["value"] for record in json.loads(records.read_text()) for turn in record["conversations"])
    inner.train_from_iterator(said, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, additional_special_tokens=control,
        eos_token="<|endoftext|>", pad_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.chat_template = tiny.CHATML
    tokenizer.save_pretrained(str(folder))


def write_config(args: argparse.Namespace, folder: Path) -> RunConfig:
    """Parts and records in ``folder``, and the seed's stage-2 settings on them."""
    shape, words = SHAPES[args.shape], Words(args.seed)
    train = write_records(folder / "train", args.samples, 64, words)
    held_out = write_records(folder / "held_out", 8, 4, words)
    llm = tiny.tiny_llm(folder / "llm", "qwen3", seed=args.seed, **shape.language)
    train_tokenizer(llm, train, words)
    vision, _ = tiny.tiny_vision(folder / "vision", "siglip", seed=args.seed, **shape.vision)
    side = shape.vision["image_size"]
    settings = Path(vision) / "preprocessor_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"size": {"height": side, "width": side}}))
    source = {"dataset": "llava_instruct"}
    return RunConfig.model_validate({
        "run_name": "instruct_step", "seed": args.seed, "stage": "instruct", "device": "cpu",
        "model": {
            "llm": {"name_or_path": str(llm), "precision": args.precision},
            "vision": {"name_or_path": vision, "precision": args.precision},
            "connector": {"num_visual_tokens": VISUAL_TOKENS, "resampler": {"num_heads": 6}},
            "lora": {"enable": True, "dropout": 0.0},
        },
        "data": {
            "sources": ({**source, "json_path": str(train), "image_root": str(folder / "train")},),
            "eval_sources": ({**source, "json_path": str(held_out), "image_root": str(folder / "held_out")},),
            "len_buckets": (0, 64, 128, 999_999),
        },
        "features": {"dir": str(folder / "features")},
        "prompting": {"max_images_per_sample": 1, "max_seq_len": MAX_SEQ_LEN},
        "train": {"precision": args.precision, "micro_batch_size": 1, "gradient_accum": args.batch},
    })  # fmt: skip


def fresh_model(cfg: RunConfig) -> VisionLanguageModel:
    model, _ = build_vlm(cfg.model, compute_precision=cfg.train.precision, device=torch.device("cpu"), seed=cfg.seed)
    assert isinstance(model, VisionLanguageModel)
    return model


def fill_store(cfg: RunConfig, folder: Path, data: Data, tower: VisionTower) -> FeatureStore:
    assert isinstance(data.pipeline, ImagePipeline)
    g = data.pipeline.geometry
    store = FeatureStore(
        folder, tower_fingerprint=tower.fingerprint(), pipeline_fingerprint=data.pipeline.fingerprint,
        shape=(g.num_patches, g.d_vision), max_bytes=10**10,
    )  # fmt: skip
    store.fill(data.train_refs(0, len(data.train)), tower, data.pipeline, batch_size=16)
    return store


# ---------------------------------------------------------------------------------------------------------------
# The reference: plain torch, transformers and peft, in the seed's shape


class Reference:
    """A step on lists of (encoded sample, decoded picture): tower, padded micro-batches, all logits, PEFT's layers."""

    def __init__(self, cfg: RunConfig, variant: Variant, start: VisionLanguageModel, data: Data) -> None:
        from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
        from transformers import AutoModelForCausalLM

        self.variant, self.data = variant, data
        self.dtype = DTYPES[cfg.model.llm.precision]
        with quiet_transformers():
            base: Any = AutoModelForCausalLM.from_pretrained(
                cfg.model.llm.name_or_path, dtype=self.dtype, attn_implementation="sdpa"
            )
            settings = LoraConfig(
                r=cfg.model.lora.r, lora_alpha=cfg.model.lora.alpha, lora_dropout=cfg.model.lora.dropout,
                bias="none", task_type="CAUSAL_LM", target_modules=list(cfg.model.lora.target_modules),
            )  # fmt: skip
            self.model: Any = get_peft_model(base, settings)
        kept = set_peft_model_state_dict(self.model, adapters.adapter_tensors(start.language.part))
        assert not kept.unexpected_keys, kept.unexpected_keys
        self.model.train()
        other = fresh_model(cfg)
        assert other.vision is not None
        self.tower: Any = other.vision.backbone
        self.connector = other.connector.train()
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = [*self.connector.parameters(), *learned]
        decays = [p for p in self.connector.parameters() if p.ndim >= 2]
        rest = [p for p in self.connector.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW([
            {"params": decays, "lr": 1e-4, "weight_decay": 0.01},
            {"params": rest, "lr": 1e-4, "weight_decay": 0.0},
            {"params": learned, "lr": 5e-5, "weight_decay": 0.0},
        ])  # fmt: skip
        self.builder = data.builder(None, train=False, cfg=cfg)

    def prepare(self, start: int, stop: int) -> list[Sample]:
        """Ids and pixels of the training positions, outside of the measurement."""
        return [self.builder.build(self.data.train.example_at(p)) for p in range(start, stop)]

    def step(self, samples: list[Sample]) -> tuple[float, float]:
        """(mean loss in nats per supervised token of the effective batch, gradient norm) of one optimizer step."""
        tokens = sum(int(encoded.supervise.sum()) for _, encoded, _ in samples)
        total = 0.0
        size = self.variant.micro_batch or len(samples)
        for i in range(0, len(samples), size):
            loss = self.loss_sum(samples[i : i + size]) / tokens
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, float(norm)

    def loss_sum(self, samples: Sequence[Sample]) -> torch.Tensor:
        longest = max(len(encoded.ids) for _, encoded, _ in samples)
        ids = torch.zeros(len(samples), longest, dtype=torch.int64)
        labels = torch.full((len(samples), longest), -100)
        mask = torch.zeros(len(samples), longest, dtype=torch.int64)
        for row, (_, encoded, _) in enumerate(samples):
            tokens = torch.from_numpy(encoded.ids)
            ids[row, : len(tokens)] = tokens
            labels[row, : len(tokens)] = torch.where(torch.from_numpy(encoded.supervise), tokens, -100)
            mask[row, : len(tokens)] = 1
        pixels = torch.stack([images[0].pixels for _, _, images in samples])  # pyright: ignore[reportArgumentType]
        with torch.no_grad():
            normalised = (pixels.float() / 255 - 0.5) / 0.5
            patches = self.tower(pixel_values=normalised.to(self.dtype)).last_hidden_state
            embeds = self.model.get_input_embeddings()(ids)
        with torch.autocast("cpu", torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext():
            visual = self.connector(patches)
        embeds = embeds.clone()
        for row, (_, encoded, _) in enumerate(samples):
            start, stop = encoded.image_spans[0]
            embeds[row, start:stop] = visual[row].to(embeds.dtype)
        logits = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )


# ---------------------------------------------------------------------------------------------------------------
# Ours: the step that `beholder run` makes


class Ours:
    """A step on training positions: stored features, our layouts, head on supervised positions, our adapter layer."""

    def __init__(
        self, cfg: RunConfig, variant: Variant, start: VisionLanguageModel, data: Data, store: FeatureReader
    ) -> None:
        self.variant = variant
        self.model = fresh_model(cfg)
        adapters.load_adapter_tensors(self.model.language.part, adapters.adapter_tensors(start.language.part))
        apply_train_plan(self.model, TrainPlan(language="lora"))
        self.model.drop_vision()
        t = cfg.train
        self.optimizer = build_optimizer(
            param_groups(self.model, t.lr.model_dump(), t.weight_decay.model_dump()), t.betas
        )
        self.trained = trainable_parameters(self.optimizer)
        micro = variant.micro_batch or cfg.effective_batch
        batching = {"micro_batch_size": micro, "gradient_accum": cfg.effective_batch // micro}
        own = cfg.model_copy(update={"train": t.model_copy(update=batching)})
        layout = Layout(variant.packing, MAX_SEQ_LEN, cfg.prompting.pad_to_multiple_of)
        self.stream = replace(data, layout=layout).stream(store, own, rank=0, world_size=1)

    def prepare(self, start: int, stop: int) -> tuple[int, int]:
        """Nothing: reading, encoding and laying out are measured."""
        return start, stop

    def step(self, positions: tuple[int, int]) -> tuple[float, float]:
        """As `Reference.step`."""
        start, stop = positions
        size = self.stream.samples_per_step
        assert start % size == 0 and stop - start == size, positions
        (batches,) = self.stream.steps(start // size, stop // size)
        tokens = sum(batch.num_targets for batch in batches)
        total = 0.0
        for batch in batches:
            loss = next_token(self.model, batch).total / tokens
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, float(norm)


Runner = Reference | Ours


def make_runners(cfg: RunConfig, data: Data, store: FeatureReader) -> dict[Variant, Runner]:
    """Every variant at one start. Fresh adapters add nothing; theirs are drawn so that a wrong one would show."""
    start = fresh_model(cfg)
    draw = torch.Generator().manual_seed(cfg.seed)
    with torch.no_grad():
        for name, weight in adapters.adapter_parameters(start.language.part).items():
            if "lora_B" in name:
                weight.normal_(0, 0.01, generator=draw)
    return {v: Ours(cfg, v, start, data, store) if v.ours else Reference(cfg, v, start, data) for v in VARIANTS}


# ---------------------------------------------------------------------------------------------------------------
# Measuring


def efficiency(data: Data, cfg: RunConfig) -> dict[Variant, float]:
    """Share of positions that hold a token, over whole steps of all training samples in the run's order."""
    size = cfg.effective_batch
    whole = len(data.train) // size * size
    samples: list[Sample] = []
    for p in range(whole):
        example = data.train.example_at(p)
        samples.append((example.id, data.encoder.encode(example), [ImageInput() for _ in example.images]))
    shares: dict[Variant, float] = {}
    for v in VARIANTS:
        layout = Layout(v.packing, MAX_SEQ_LEN, cfg.prompting.pad_to_multiple_of if v.ours else 1)
        micro = v.micro_batch or size
        window = size if v.packing else micro
        batches = [b for i in range(0, whole, window) for b in collate_window(samples[i : i + window], layout, micro)]
        shares[v] = sum(b.num_tokens for b in batches) / sum(b.input_ids.numel() for b in batches)
    return shares


@dataclass
class Round:
    tokens: int
    """Positions of the step's samples, image positions included, padding not."""
    seconds: dict[Variant, float]
    """On the clock."""
    work: dict[Variant, float]
    """Seconds of processor time, over all threads: what other load on the machine disturbs less."""
    losses: dict[Variant, float]
    norms: dict[Variant, float]
    memory: dict[Variant, float]
    """Bytes that the step added to what was resident before it, at its peak."""


def measure(runners: dict[Variant, Runner], data: Data, rounds: Iterable[int], size: int, seed: int) -> list[Round]:
    """Step ``r`` of the run by every variant, in an order of its own each round."""
    shuffled, done = random.Random(seed), []
    for r in rounds:
        start, stop = r * size, (r + 1) * size
        tokens = sum(len(data.encoder.encode(data.train.example_at(p)).ids) for p in range(start, stop))
        done.append(Round(tokens, {}, {}, {}, {}, {}))
        for v in shuffled.sample(VARIANTS, len(VARIANTS)):
            runner: Any = runners[v]
            prepared = runner.prepare(start, stop)
            settle()
            before = resident("VmRSS")
            reset_peak()
            began, worked = time.perf_counter(), time.process_time()
            done[-1].losses[v], done[-1].norms[v] = runner.step(prepared)
            done[-1].seconds[v] = time.perf_counter() - began
            done[-1].work[v] = time.process_time() - worked
            done[-1].memory[v] = resident("VmHWM") - before
    return done


def off(rounds: Sequence[Round], v: Variant, other: Variant) -> tuple[float, float]:
    """Largest relative differences of loss and gradient norm between two variants."""
    return (
        max(abs(r.losses[v] / r.losses[other] - 1) for r in rounds),
        max(abs(r.norms[v] / r.norms[other] - 1) for r in rounds),
    )


def agreement(rounds: Sequence[Round], precision: str) -> dict[Variant, bool]:
    agree = {}
    for v in VARIANTS:
        agree[v] = _within(off(rounds, v, REFERENCE), TOLERANCE[precision])
        if v.ours and precision == "fp32":
            agree[v] &= _within(off(rounds, v, OURS_SINGLE), EXACT)
    return agree


def _within(away: tuple[float, float], allowed: tuple[float, float]) -> bool:
    return all(x <= y for x, y in zip(away, allowed, strict=True))


def settle() -> None:
    """Give freed memory back to the system, so that one variant's does not hide another's peak."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def reset_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of the resident size starts anew


def resident(what: str) -> float:
    """VmRSS, the resident size now, or VmHWM, its peak; in bytes, NaN where the system does not tell."""
    if not os.path.exists("/proc/self/clear_refs"):
        return float("nan")
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(what))
    return 1024.0 * float(line.split()[1])


# ---------------------------------------------------------------------------------------------------------------
# Telling


def shares_of_work(tower: float, patches: int, decoder: float, head: float, tokens: float) -> str:
    """What a sample costs the seed's shape in matrix products: the tower forward, the rest forward and for gradients of
    activations."""
    parts = {"tower": 2 * tower * patches, "decoder": 4 * decoder * tokens, "head": 4 * head * tokens}
    return ", ".join(f"{name} {cost / sum(parts.values()):.0%}" for name, cost in parts.items())


def own_shares(model: VisionLanguageModel, tokens: float) -> str:
    assert model.vision is not None
    base = placement.base_state(model.language.part)
    decoder = sum(w.numel() for name, w in base.items() if ".layers." in name)
    tower = sum(p.numel() for p in model.vision.parameters())
    head = model.language.vocab * model.language.d_text
    return shares_of_work(tower, model.geometry.num_patches, decoder, head, tokens)


def ratios(rounds: Sequence[Round], slow: Variant, fast: Variant) -> list[float]:
    return [r.seconds[slow] / r.seconds[fast] for r in rounds]


def work_ratio(rounds: Sequence[Round], slow: Variant, fast: Variant) -> float:
    return float(np.median([r.work[slow] / r.work[fast] for r in rounds]))


def spread(values: Sequence[float]) -> str:
    return f"x {np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def report(
    console: Console, rounds: list[Round], exact: list[Round], used: dict[Variant, float], precision: str
) -> dict[str, Any]:
    """Print the table and give its numbers. Ratios are medians over rounds of ratios within a round."""
    fine, exactly = agreement(rounds, precision), agreement(exact, "fp32")
    table = Table(
        "variant", "used", "tokens / s", "on the clock", "processor", "peak of a step", "loss off", "off in fp32"
    )
    rows: dict[str, Any] = {}
    for v in VARIANTS:
        speed = float(np.median([r.tokens / r.seconds[v] for r in rounds]))
        whole, memory = ratios(rounds, REFERENCE, v), max(r.memory[v] for r in rounds)
        away, away_exact = off(rounds, v, REFERENCE), off(exact, v, REFERENCE)
        rows[v.name] = {
            "positions_used": used[v], "tokens_per_s": speed, "ratio": float(np.median(whole)), "ratios": whole,
            "seconds": [r.seconds[v] for r in rounds], "ratio_processor": work_ratio(rounds, REFERENCE, v),
            "peak_bytes": memory, "loss_off": away[0],
            "gradient_off": away[1], "loss_off_fp32": away_exact[0], "gradient_off_fp32": away_exact[1],
            "agrees": fine[v] and exactly[v],
        }  # fmt: skip
        table.add_row(
            v.name, f"{used[v]:.1%}", f"{speed:,.0f}", spread(whole),
            f"x {work_ratio(rounds, REFERENCE, v):.2f}", f"+{memory / 1e9:.2f} GB",
            f"{away[0]:.0e}" + ("" if fine[v] else " TOO FAR"),
            f"{away_exact[0]:.0e}, {away_exact[1]:.0e}" + ("" if exactly[v] else " TOO FAR"),
        )  # fmt: skip
    console.print(table)
    console.print(
        "used: share of positions that hold a token, all samples. On the clock: tokens/s against the first row, "
        "median (least to most) over rounds; processor: the same by processor time. Off: largest difference from "
        f"the first row (fp32: of loss, of gradient norm); loss {rounds[0].losses[REFERENCE]:.3f} at first"
    )
    found = {f"{OURS.name} against {v.name}": ratios(rounds, v, OURS) for v in VARIANTS if v != OURS}
    for v, (name, values) in zip(VARIANTS, found.items(), strict=False):
        console.print(f"{name}: {spread(values)} tokens/s, x {work_ratio(rounds, v, OURS):.2f} by processor time")
    return {
        "variants": rows, "ratios": found, "agree": all(fine.values()) and all(exactly.values()),
        "ratio": min(float(np.median(ratios(rounds, v, OURS))) for v in VARIANTS if not v.ours),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of every variant, at least 3")
    parser.add_argument("--batch", type=int, default=16, help="samples of an optimizer step, a multiple of 4")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="bf16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="200 samples, 3 rounds of 8")
    parser.add_argument("--goal", type=float, help="exit with an error when either ratio to the seed's shape is below")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    args = parser.parse_args(argv)
    if args.quick:
        args.samples, args.rounds, args.batch = 200, 3, 8
    if args.rounds < 3 or args.batch % 4 or args.samples < (args.rounds + 1) * args.batch:
        parser.error("give at least 3 rounds, a batch of whole fours, and samples for one step more than rounds")
    if args.threads:
        torch.set_num_threads(args.threads)
    console, started = Console(width=120, highlight=False), time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        cfg = write_config(args, Path(name))
        model, tokenizer = build_vlm(
            cfg.model, compute_precision=args.precision, device=torch.device("cpu"), seed=args.seed
        )
        assert isinstance(model, VisionLanguageModel) and model.vision is not None
        data = build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens)
        store = fill_store(cfg, Path(name) / "store", data, model.vision)
        lengths = [len(data.encoder.encode(data.train.example_at(p)).ids) for p in range(len(data.train))]
        targets = data.counts.target_tokens
        console.print(
            f"{args.shape}, {args.precision}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
            f"{len(data.train):,} of {data.counts.records:,} samples, {np.mean(lengths):.0f} tokens each "
            f"({min(lengths)} to {max(lengths)}; {targets['mean']:.0f} supervised), {VISUAL_TOKENS} of them visual; "
            f"{args.rounds} rounds of one step of {args.batch}"
        )
        tokens = float(np.mean(lengths))
        console.print(f"matrix products of the seed's shape here: {own_shares(model, tokens)}")
        console.print(f"of the seed's own pair at this length:    {shares_of_work(*REAL_SHARES, tokens)}")
        used = efficiency(data, cfg)
        console.print("positions used: " + ", ".join(f"{v.name} {share:.1%}" for v, share in used.items()))
        del model

        precise = _in_precision(cfg, "fp32")
        exact = measure(make_runners(precise, data, store), data, [0], args.batch, args.seed)
        runners = make_runners(cfg, data, store)
        measure(runners, data, [0], args.batch, args.seed)  # first calls allocate and choose kernels
        rounds = measure(runners, data, range(1, args.rounds + 1), args.batch, args.seed)
    result = report(console, rounds, exact, used, args.precision)
    result |= {"shape": args.shape, "precision": args.precision, "threads": torch.get_num_threads(), "lengths": lengths}
    console.print(f"{time.perf_counter() - started:.0f} s in all")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))
    if not result["agree"]:
        raise SystemExit("losses or gradients do not agree: see the table")
    if args.goal and result["ratio"] < args.goal:
        raise SystemExit(f"ratio {result['ratio']:.2f} is below the goal {args.goal}")


def _in_precision(cfg: RunConfig, precision: str) -> RunConfig:
    model = cfg.model.model_copy(update={
        "llm": cfg.model.llm.model_copy(update={"precision": precision}),
        "vision": cfg.model.vision.model_copy(update={"precision": precision}),
    })  # fmt: skip
    return cfg.model_copy(update={"model": model, "train": cfg.train.model_copy(update={"precision": precision})})


if __name__ == "__main__":
    main()
