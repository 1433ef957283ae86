"""Is this machine's GPU right, and how fast is it: equality checks, a run of both stages, the seed's step at full size.

    python benchmarks/gpu.py --out outputs/gpu          # a GPU of 40 GB or more; at most 8 minutes
    python benchmarks/gpu.py --dry --out outputs/dry    # the same code on tiny shapes, on a CPU, in under two minutes

1. `CHECKS`, which `make test-gpu` runs too: packed = unpacked for each attention that is there, store = no store,
   resume, fp16's loss scale, bf16.
2. The smoke form of the align and the instruct recipe, end to end, the second from the first one's checkpoint.
3. Qwen3-8B-Base and SigLIP so400m/384 (``configs/shapes/``, random weights made on the device): steps of the real loop
   at batch 4 and 16, beside the seed's 0.803 s.
4. A whole model of Qwen3-VL-4B's shape with adapters on its language model's last 2 layers and its tower's last 4
   blocks (C2 of the footprint plan), on samples of 512 tokens with one image.

Each part is a row of ``gpu.md`` and ``gpu.json``, written after every part; what fails or finds no time is a row too.
The exit code is 1 when something failed.

No network is touched. Of packages it needs torch, transformers, peft (with accelerate), timm (with torchvision),
safetensors, tokenizers, numpy, pillow, jaxtyping and what the rooms of `beholder` import: pydantic (with pydantic-core,
annotated-types and typing-inspection), orjson, PyYAML, jinja2, rich, filelock, psutil, pyarrow, matplotlib, packaging;
neither resvg-py nor gguf, typer, beartype or pytest. What a machine without a registry lacks of them travels as wheels;
with the versions of requirements.lock, for a machine with Python 3.12:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux_2_17_x86_64 -d wheels \
        pydantic==2.14.3 pydantic-core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 orjson==3.13.0
    pip install --no-index --no-deps --target site wheels/*.whl                             # there
    PYTHONPATH=src:site python benchmarks/gpu.py --out outputs/gpu
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from align_step import PROMPT, SEED_STEP_S, Shape, make_language, make_tower, target_lengths
from beholder.config import ConnectorConfig, LlmConfig, LoraConfig, RunConfig, VisionConfig
from beholder.config.file import load_config
from beholder.data import build_data
from beholder.data.collate import Layout, Sample, collate, collate_window
from beholder.data.images import ImagePipeline
from beholder.model import adapters
from beholder.model.build import build_vlm
from beholder.model.connector import build_connector
from beholder.model.language import LanguageModel
from beholder.model.native import FAMILIES, NativeModel
from beholder.model.placement import selectors
from beholder.model.plan import TrainPlan, apply_train_plan, param_groups, plan_of
from beholder.model.processor import NativeProcessor
from beholder.model.vlm import VisionLanguageModel
from beholder.model.weights import freeze
from beholder.prepare import tiny
from beholder.prepare.doctor import matmul_rate
from beholder.prepare.estimate import (
    LanguageShape,
    VisionShape,
    connector_shape,
    language_shape,
    learning,
    vision_shape,
)
from beholder.runs import RunDir, version_of
from beholder.stages import run_stage
from beholder.store.features import FeatureStore
from beholder.train.checkpoint import latest_checkpoint, save_checkpoint
from beholder.train.engine import LoopState, Record, fit, peak_memory_mb
from beholder.train.objectives import next_token
from beholder.train.optim import build_optimizer, optimizer_tensors
from beholder.train.reporter import Reporter
from beholder.train.restore import load_for_resume
from beholder.types import Batch, Encoded, ImageInput

ROOT = Path(__file__).resolve().parents[1]
LLM, TOWER, NATIVE = (
    ROOT / "configs" / "shapes" / f
    for f in ("qwen3_8b_base.json", "siglip_so400m_patch14_384.json", "qwen3_vl_4b.json")
)
TINY_LLM = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
TINY_TOWER = {
    "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
TINY_NATIVE = {
    "text_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
    },
    "vision_config": {
        "depth": 6, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 64,
        "deepstack_visual_indexes": [1, 2],
    },
    "image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503,
}  # fmt: skip
"""What ``--dry`` makes of the three shapes."""
VISUAL_TOKENS = 64
SUPERVISED = 0.5
"""Share of an instruction sample's tokens that are supervised; LLaVA-Instruct's, about (`instruct_step.py`)."""


class Missing(Exception):
    """A part of the machine that a check is about is not there; says which."""


class OverBudget(BaseException):
    """The time of a part is up. No `Exception`: nothing on the way may take it for an error of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises `OverBudget` after so many seconds, between two steps of the interpreter."""

    def over(number: int, frame: FrameType | None) -> None:
        raise OverBudget(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------
# 1. Equality, on tiny parts


@dataclass(frozen=True)
class Bench:
    """Where a check works: a folder of its own, the tiny parts that all share, the device."""

    folder: Path
    parts: Path
    device: torch.device

    def config(self, **sets: Any) -> RunConfig:
        """A run on the tiny parts; settings by dotted path."""
        if not self.parts.exists():
            tiny.tiny_llm(self.parts / "llm")
            tiny.tiny_vision(self.parts / "vision")
        asked = sets.get("stage") == "instruct"
        source = tiny.colour_source(self.parts / ("asked" if asked else "told"), "jsonl", 48, dialogues=asked)
        raw: dict[str, Any] = {
            "run_name": "check", "output_dir": str(self.folder / "run"), "device": self.device.type,
            "model": {
                "llm": {"name_or_path": str(self.parts / "llm"), "precision": "fp32"},
                "vision": {"name_or_path": str(self.parts / "vision"), "precision": "fp32"},
                "connector": {"num_visual_tokens": 4, "resampler": {"depth": 1, "num_heads": 4}},
            },
            "data": {"json_path": source.json_path, "image_root": source.image_root, "eval_size": 8},
            "features": {"dir": str(self.folder / "features")},
            "prompting": {"max_images_per_sample": 1},
            "train": {
                "train_steps": 6, "micro_batch_size": 4, "precision": "fp32", "lr": {"connector": 3e-3},
                "save_every": 1000,
            },
        }  # fmt: skip
        for name, value in sets.items():
            *sections, last = name.split(".")
            inner = raw
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return RunConfig.model_validate(raw)


@dataclass
class Trained:
    losses: list[float]
    weights: dict[str, torch.Tensor]
    """What learned, on the CPU."""
    state: LoopState


@dataclass
class Log:
    """What `fit` tells after every step; asks it to stop after ``stop_at``, as a scheduler does."""

    stop_at: int | None = None
    records: list[Record] = field(default_factory=list)

    def on_step(self, step: int, record: Record) -> None:
        self.records.append(record)
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)


def trained(
    bench: Bench, cfg: RunConfig, *, stored: bool = False, stop_at: int | None = None, scale: float | None = None
) -> Trained:
    """A few steps of the real loop on ``cfg``'s parts and data; goes on from the run folder's latest checkpoint."""
    model, tokenizer = build_vlm(
        cfg.model, compute_precision=cfg.train.precision, device=bench.device, seed=cfg.seed
    )  # fmt: skip
    assert isinstance(model, VisionLanguageModel)
    apply_train_plan(model, plan_of(cfg.model, cfg.stage_record))
    data = build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens)
    store = None
    if stored:
        assert model.vision is not None and isinstance(data.pipeline, ImagePipeline)
        tower, g = model.vision, model.geometry
        store = FeatureStore(
            bench.folder / "features", tower_fingerprint=tower.fingerprint(),
            pipeline_fingerprint=data.pipeline.fingerprint, shape=(g.num_patches, g.d_vision),
            max_bytes=10**8,
        )  # fmt: skip
        refs = data.train_refs(0, len(data.train))
        store.fill(refs, lambda pixels: tower(pixels.to(bench.device)), data.pipeline, batch_size=5)
        model.drop_vision()
    optimizer = build_optimizer(
        param_groups(model, cfg.train.lr.model_dump(), cfg.train.weight_decay.model_dump()), cfg.train.betas
    )
    run, start, state = RunDir(cfg.run_dir).create(), 0, LoopState()
    if scale is not None:
        state.loss_scale = scale
    if (latest := latest_checkpoint(run.checkpoints)) is not None:
        restored = load_for_resume(latest, model, optimizer)
        start, state = restored.step, LoopState.from_dict(restored.trainer["loop"])
    steps, log = int(cfg.train.train_steps or 0), Log(stop_at)
    try:
        fit(
            model, next_token, data.stream(store, cfg, rank=0, world_size=1), cfg=cfg.train, total_steps=steps,
            optimizer=optimizer, run=run, seed=cfg.seed, start_step=start, state=state, callbacks=[log],
            save=lambda step: None if stop_at is None else _save(run, step, model, optimizer, state, cfg),
            reporter=Reporter(total_steps=steps, steps_per_epoch=1, samples_per_step=1, live=False, enabled=False),
        )  # fmt: skip
    finally:
        if store is not None:
            store.close()
    weights = {name: t for part in model.trained_state().values() for name, t in part.tensors.items()}
    losses = [float(r["loss"]) for r in log.records]
    return Trained(losses, {k: v.detach().float().cpu().clone() for k, v in weights.items()}, state)


def _save(
    run: RunDir, step: int, model: VisionLanguageModel, optimizer: torch.optim.Optimizer, state: LoopState,
    cfg: RunConfig,
) -> None:  # fmt: skip
    save_checkpoint(
        run.checkpoints, step, model.trained_state(), optimizer_state=optimizer_tensors(optimizer),
        trainer={
            "config": cfg.model_dump(mode="json"), "data_cursor": step * cfg.effective_batch, "loop": state.as_dict(),
        },
        keep=2,
    )  # fmt: skip


def apart(a: Sequence[float], b: Sequence[float]) -> float:
    """Largest relative difference."""
    assert len(a) == len(b) and len(a) > 0, (len(a), len(b))
    return max(abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True))


def weights_apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest distance of a tensor relative to its size."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / b[k].norm().clamp_min(1e-12)) for k in a)


def expect(found: float, allowed: float, what: str) -> str:
    said = f"{what} {found:.1e} (allowed {allowed:.0e})"
    if not found <= allowed:
        raise AssertionError(said)
    return said


def packed_is_unpacked(bench: Bench, attention: str) -> str:
    """Loss and connector gradients of the same samples, in rows that they share and in rows of their own."""
    dtype = "bf16" if attention.startswith("flash") else "fp32"
    if attention.startswith("flash"):
        package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attention]
        if importlib.util.find_spec(package) is None or bench.device.type != "cuda":
            raise Missing(f"no {package} package" if bench.device.type == "cuda" else "needs a GPU")
    if attention == "flex_attention" and bench.device.type != "cuda":
        raise Missing("needs a GPU")
    cfg = bench.config(**{"model.llm.attn_implementation": attention, "model.llm.precision": dtype,
                          "train.precision": dtype})  # fmt: skip
    model, tokenizer = build_vlm(cfg.model, compute_precision=dtype, device=bench.device, seed=0)
    if model.language.packing_error:
        raise AssertionError(model.language.packing_error)
    apply_train_plan(model, TrainPlan())
    data = build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens)
    builder = data.builder(None, train=False, cfg=cfg)
    samples = [builder.build(data.train.example_at(p)) for p in range(16)]
    seen: list[tuple[float, dict[str, torch.Tensor]]] = []
    for packing in (False, True):
        batch = collate(samples, Layout(packing, 256, 8))
        assert packing == (batch.input_ids.shape[0] < len(samples))
        model.train()
        terms = next_token(model, batch)
        loss = terms.total / terms.tokens
        loss.backward()
        gradients = {n: p.grad.float().cpu() for n, p in model.connector.named_parameters() if p.grad is not None}
        seen.append((float(loss.detach()), gradients))
        model.connector.zero_grad(set_to_none=True)
    (loss, gradients), (packed, of_packed) = seen
    # fp32: only the order of sums differs. bf16 keeps 8 bits of every activation.
    allowed = (2e-5, 2e-3) if dtype == "fp32" else (1e-2, 1e-1)
    return f"{dtype}: {expect(apart([packed], [loss]), allowed[0], 'loss apart by')}, " + expect(
        weights_apart(of_packed, gradients), allowed[1], "gradients by"
    )


def store_is_no_store(bench: Bench) -> str:
    """Training on features from disk is training through the tower: features are bf16 in both."""
    cfg = bench.config(**{"model.vision.precision": "bf16"})
    with_store, without = trained(bench, cfg, stored=True), trained(bench, cfg)
    # Kernels may round otherwise in batches of another size, and six steps at a large rate carry it on.
    return expect(apart(with_store.losses, without.losses), 1e-3, "losses apart by")


def resume_is_straight(bench: Bench) -> str:
    """Stopped by a signal after step 3 and gone on, with dropout in the adapters: the weights of the straight run."""
    lora = {"stage": "instruct", "model.lora": {"enable": True, "dropout": 0.1}}
    straight = trained(bench, bench.config(**lora))
    cfg = bench.config(**lora, output_dir=str(bench.folder / "resumed"))
    first = trained(bench, cfg, stop_at=3)
    second = trained(bench, cfg, stop_at=1000)
    assert len(first.losses) + len(second.losses) == len(straight.losses), "the second call did not go on"
    if all(torch.equal(second.weights[k], straight.weights[k]) for k in straight.weights):
        return "bit for bit"
    # Sums whose order a GPU does not fix (atomics) differ between two runs of anything.
    again = trained(bench, bench.config(**lora, output_dir=str(bench.folder / "again")))
    noise = weights_apart(again.weights, straight.weights)
    said = expect(weights_apart(second.weights, straight.weights), max(2 * noise, 1e-6), "not bit for bit: weights by")
    return f"{said}; two straight runs are apart by {noise:.1e}"


def fp16_scales(bench: Bench) -> str:
    """fp16 learns what fp32 learns, and a loss scale that overflows comes down without costing a step."""
    exact = trained(bench, bench.config())
    fp16 = {"train.precision": "fp16", "model.llm.precision": "fp16"}
    usual = trained(bench, bench.config(**fp16))
    high = trained(bench, bench.config(**fp16), scale=2.0**40)
    if not high.state.loss_scale < 2.0**40:
        raise AssertionError(f"a scale of 2**40 did not overflow; it is {high.state.loss_scale:g}")
    said = expect(apart(usual.losses, exact.losses), 1e-2, "losses apart from fp32 by")
    return f"{said}; scale 2**40 came down to {high.state.loss_scale:g}, " + expect(
        apart(high.losses, usual.losses), 1e-2, "losses apart by"
    )


def bf16_learns(bench: Bench) -> str:
    """bf16 weights, features and products learn what fp32 learns."""
    exact = trained(bench, bench.config())
    bf16 = {f"{part}.precision": "bf16" for part in ("train", "model.llm", "model.vision")}
    found = trained(bench, bench.config(**bf16))
    assert abs(exact.losses[-1] - exact.losses[0]) > 0.02, "nothing was learned, so agreement would say nothing"
    return expect(apart(found.losses, exact.losses), 3e-2, "losses apart from fp32 by")


CHECKS: dict[str, Callable[[Bench], str]] = {
    **{
        f"packed = unpacked, {name}": lambda bench, name=name: packed_is_unpacked(bench, name)
        for name in ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
    },
    "store = no store": store_is_no_store,
    "resumed = straight": resume_is_straight,
    "fp16 = fp32, with its loss scale": fp16_scales,
    "bf16 = fp32": bf16_learns,
}
"""Each gives what it measured, or raises `AssertionError`, or `Missing` where the machine lacks what it is about."""


# ---------------------------------------------------------------------------------------------------------------
# 2. Both stages, end to end


def smoke(folder: Path, device: torch.device) -> Iterator[tuple[str, Callable[[], str]]]:
    """The two recipes in their smoke form, the second on the first one's checkpoint."""
    align, instruct = folder / "align", folder / "instruct"
    same = {"model.connector.vision_ln": "true", "model.connector.load_checkpoint": str(align / "run")}

    def stage(recipe: str, place: Path, sets: dict[str, str]) -> str:
        cfg = load_config(ROOT / "configs" / recipe, [f"{name}={value}" for name, value in sets.items()])
        small = tiny.smoke_config(cfg, place).model_copy(update={"device": device.type})
        wanted = cfg.model.connector.load_checkpoint
        connector = small.model.connector.model_copy(update={"load_checkpoint": wanted})
        small = small.model_copy(update={"model": small.model.model_copy(update={"connector": connector})})
        outcome = run_stage(small, promote_anyway=True)  # tiny random parts cannot pass gates
        assert outcome.evidence is not None, "no evidence"
        last = next(r for r in reversed(list(RunDir(small.run_dir).metrics())) if "loss" in r)
        return f"{outcome.status}, {outcome.step} steps, last loss {last['loss']:.3f}, report written"

    yield "align", lambda: stage("stage1_align.yaml", align, {})
    yield "instruct", lambda: stage("stage2_sft_single.yaml", instruct, same)


# ---------------------------------------------------------------------------------------------------------------
# 3. The seed's pair at full size


class Pair:
    """Qwen3-8B-Base and SigLIP so400m/384 with random weights on the device, 64 visual tokens."""

    def __init__(self, folder: Path, device: torch.device, dry: bool) -> None:
        self.device, self.dry, self.adapted = device, dry, False
        llm, tower = (
            json.loads(file.read_text()) | (small if dry else {})
            for file, small in ((LLM, TINY_LLM), (TOWER, TINY_TOWER))
        )
        folder.mkdir(parents=True, exist_ok=True)
        self.llm_config, tower_config = folder / "llm.json", folder / "tower.json"
        self.llm_config.write_text(json.dumps(llm))
        tower_config.write_text(json.dumps(tower))
        self.vision_shape: VisionShape = vision_shape(VisionConfig(name_or_path="-"), tower_config)
        plain = language_shape(LlmConfig(name_or_path="-"), self.llm_config)
        adapted, _ = learning(plain, None, LoraConfig(enable=True))
        assert adapted is not None
        self.shapes: dict[bool, LanguageShape] = {False: plain, True: adapted}
        about = ("architectures", "model_type")
        shape = Shape(
            {k: v for k, v in llm.items() if k not in about}, llm["model_type"],
            {k: v for k, v in tower.items() if k not in about}, 4,
        )  # fmt: skip
        torch.manual_seed(0)
        self.tower = make_tower(shape, torch.bfloat16, device)
        self.language = make_language(shape, torch.bfloat16, device, None)
        self.language.check_head()
        self.language.check_packing()
        heads = {"num_heads": 4 if dry else 8}
        settings = ConnectorConfig.model_validate({"num_visual_tokens": VISUAL_TOKENS, "resampler": heads})
        g = self.tower.geometry
        self.connector_flops = connector_shape(
            settings, VisionShape(0, g.num_patches, g.d_vision, 0.0), self.language.d_text
        ).flops_per_image
        connector = build_connector(
            settings, num_patches=g.num_patches, d_vision=g.d_vision, d_text=self.language.d_text,
            embed_rms=self.language.embed_rms, seed=0,
        ).to(device)  # fmt: skip
        self.model = VisionLanguageModel(self.tower, connector, self.language, torch.bfloat16)
        apply_train_plan(self.model, TrainPlan())

    def adapt(self) -> None:
        if not self.adapted:
            adapters.attach(self.language.part, LoraConfig(enable=True), 0)
            apply_train_plan(self.model, TrainPlan(language="lora"))
            self.adapted = True

    def samples(self, batch: int, tokens: int | None, pixels: bool) -> list[Sample]:
        """Random ids and features (or pixels); ``tokens`` None: captions of LLaVA-Pretrain's lengths."""
        rng, g = np.random.default_rng(0), self.tower.geometry
        if tokens is None:
            lengths = [(PROMPT + VISUAL_TOKENS + int(n) + 1, int(n) + 1) for n in target_lengths(batch, 0)]
        else:
            lengths = [(tokens, int(SUPERVISED * tokens))] * batch
        out: list[Sample] = []
        for i, (length, targets) in enumerate(lengths):
            supervise = np.zeros(length, dtype=bool)
            supervise[-targets:] = True
            ids = rng.integers(0, self.language.vocab, length, dtype=np.int64)
            if pixels:
                shown = ImageInput(pixels=torch.randint(0, 256, (3, g.height, g.width), dtype=torch.uint8))
            else:
                shown = ImageInput(features=torch.randn(g.num_patches, g.d_vision).bfloat16())
            out.append((f"sample {i}", Encoded(ids, supervise, ((1, 1 + VISUAL_TOKENS),)), [shown]))
        return out

    def flops(self, samples: Sequence[Sample], tower: bool) -> float:
        """Useful ones: attention inside samples, no padding, no recomputation, the head where it is supervised."""
        shape = self.shapes[self.adapted]
        each = self.connector_flops + (self.vision_shape.flops_per_image if tower else 0.0)
        return sum(
            shape.flops(len(e.ids), len(e.ids)) + 6.0 * shape.adapter_params * len(e.ids)
            + shape.head_flops(e.num_targets) + each
            for _, e, _ in samples
        )  # fmt: skip


class Native:
    """A model of Qwen3-VL-4B's shape with random weights on the device, adapters as at point C2 of the footprint
    plan."""

    def __init__(self, folder: Path, device: torch.device, dry: bool) -> None:
        from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

        self.device, self.dry, self.side = device, dry, 64 if dry else 448
        shape = TINY_NATIVE if dry else json.loads(NATIVE.read_text())
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                whole: Any = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**shape))
        finally:
            torch.set_default_dtype(before)
        freeze(whole)
        tiny.tiny_native(folder, "qwen3_vl")  # its processor; of the tokenizer nothing is asked but that it is there
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        settings |= {"patch_size": 16, "size": {"shortest_edge": 32**2, "longest_edge": 1024**2}}
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        processor = NativeProcessor(AutoProcessor.from_pretrained(str(folder)), shape["image_token_id"], torch.bfloat16)
        self.language = LanguageModel(whole, "random Qwen3-VL", whole=True)
        self.model = NativeModel(whole, FAMILIES["qwen3_vl"], self.language, processor)
        lora = LoraConfig(
            enable=True, target_modules=("all-linear",), vit_target_modules=("all-linear",), llm_layers="last-2",
            vit_layers="last-4",
        )  # fmt: skip
        parts = self.model.parts()
        for name, selector in selectors(lora, parts).items():
            adapters.attach(parts[name], lora, 0, selector)
        apply_train_plan(self.model, TrainPlan(vision="pieces", connector="frozen", language="lora"))

    def samples(self, batch: int, tokens: int | None, pixels: bool) -> list[Sample]:
        """Random ids around the image's places; the image's inputs come from its processor."""
        assert tokens is not None and pixels
        rng, out = np.random.default_rng(0), []
        noise = Image.fromarray(rng.integers(0, 256, (self.side, self.side, 3), dtype=np.uint8))
        shown = self.model.geometry.process(noise)
        assert shown.size is not None
        seen = (self.side // 32) ** 2
        for i in range(batch):
            ids = rng.integers(0, min(400, self.language.vocab), tokens, dtype=np.int64)
            ids[1 : 1 + seen] = self.model.geometry.token_id
            supervise = np.zeros(tokens, dtype=bool)
            supervise[-int(SUPERVISED * (tokens - seen)) :] = True
            out.append((f"sample {i}", Encoded(ids, supervise, ((1, 1 + seen),), False, (shown.size,)), [shown]))
        return out

    @torch.no_grad()
    def flops(self, samples: Sequence[Sample], tower: bool) -> float:
        """From one sample's forward pass, all being alike: that again for the gradients on their way down to the
        tower's last 4 blocks, below which none go; what adapters and their gradients cost is left out."""
        batch = collate(samples[:1], Layout(True, len(samples[0][1].ids), 8))
        with FlopCounterMode(display=False) as whole:
            self.model(batch)
        with FlopCounterMode(display=False) as eyes:
            self.model.patches(batch.images)
        below = 1 - 4 / len(self.model.vision.part.blocks)
        return len(samples) * (2.0 * whole.get_total_flops() - below * eyes.get_total_flops())


@dataclass(frozen=True)
class Same:
    """The same micro-batches at every step, as `fit` takes them."""

    batches: list[Batch]
    samples_per_step: int

    @property
    def mixture(self) -> range:
        return range(self.samples_per_step)

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        for _ in range(start, stop):
            yield self.batches


@dataclass(frozen=True)
class Case:
    """What is timed."""

    stage: str
    batch: int
    tokens: int | None
    """Of every sample; None: captions."""
    tower: bool = False
    """Every image goes through the tower at every step; else its features come as from the store."""
    attention: str = "sdpa"

    @property
    def name(self) -> str:
        long = "captions" if self.tokens is None else f"{self.tokens:,} tokens"
        extra = ", tower at every step" * self.tower + f", {self.attention}" * (self.attention != "sdpa")
        return f"{self.stage}, batch {self.batch}, {long}{extra}"


def cases(dry: bool) -> list[Case]:
    """Align first: adapters are put on once."""
    lengths = (128, 256) if dry else (512, 2048)
    align = [Case("align", 4, None, tower=True), *(Case("align", b, t) for t in (None, *lengths) for b in (4, 16))]
    instruct = [Case("instruct", b, t) for t in lengths for b in (4, 16)]
    others = [n for n in ("flash_attention_2", "flash_attention_3", "flex_attention") if not dry and _is_there(n)]
    return [*align, *instruct, *(Case("instruct", 4, lengths[-1], attention=name) for name in others)]


def native_cases(dry: bool) -> list[Case]:
    """As many positions as the plan's samples have, on the point that it expects to be best."""
    return [Case("Qwen3-VL-4B, C2", b, 128 if dry else 512, tower=True) for b in (4, 16)]


def _is_there(attention: str) -> bool:
    package = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}.get(attention, "torch")
    return importlib.util.find_spec(package) is not None


def time_case(
    pair: Pair | Native, case: Case, folder: Path, rate: float, seconds: float
) -> tuple[str, dict[str, float]]:
    """Steps of the real loop; the batch in one piece, or, where that does not fit, in halves, quarters, …"""
    if isinstance(pair, Pair):
        if case.stage == "instruct":
            pair.adapt()
        pair.language.model.set_attn_implementation(case.attention)
    if case.attention != "sdpa":
        pair.language.packing_error = None
        pair.language.check_packing()
    samples = pair.samples(case.batch, case.tokens, case.tower)
    micro = case.batch
    while True:
        try:
            records = _steps(pair, samples, micro, folder, seconds)
            break
        except torch.cuda.OutOfMemoryError:
            for p in pair.model.parameters():
                p.grad = None
            if micro == 1:
                raise
            micro //= 2
        gc.collect()  # outside of the handler, which holds the frames and so the memory
        torch.cuda.empty_cache()
    step_s = statistics.median(float(r["step_time_s"]) for r in records)
    flops = pair.flops(samples, case.tower)
    numbers = {
        "step_s": step_s,
        "samples_per_s": case.batch / step_s,
        "supervised_tokens_per_s": sum(e.num_targets for _, e, _ in samples) / step_s,
        "tokens_per_s": sum(len(e.ids) for _, e, _ in samples) / step_s,
        "matrix_share": flops / step_s / rate,
        "peak_gb": peak_memory_mb(pair.device) / 1e3,
        "micro_batch": float(micro),
        "steps": float(len(records)),
    }
    if (case.stage, case.batch, case.tokens) == ("align", 4, None) and not pair.dry:
        numbers["seed_step_ratio"] = SEED_STEP_S / step_s
    said = "" if micro == case.batch else f"in {case.batch // micro} micro-batches: {case.batch} at once do not fit"
    return said, numbers


def _steps(pair: Pair | Native, samples: list[Sample], micro: int, folder: Path, seconds: float) -> list[Record]:
    """Records of timed steps, after one that warms up; as many as fit into the time, 2 to 10."""
    longest = max(len(e.ids) for _, e, _ in samples)
    batches = collate_window(samples, Layout(True, max(2048, longest), 8), micro)
    cfg = {"micro_batch_size": micro, "gradient_accum": len(samples) // micro, "precision": "bf16"}
    train = RunConfig.model_validate({
        "run_name": "-", "model": {"llm": {"name_or_path": "-"}, "vision": {"name_or_path": "-"}},
        "data": {"json_path": "-"}, "train": cfg,
    }).train  # fmt: skip
    optimizer = build_optimizer(
        param_groups(pair.model, train.lr.model_dump(), train.weight_decay.model_dump()), train.betas
    )

    def run(steps: int) -> list[Record]:
        log, place = Log(), RunDir(tempfile.mkdtemp(dir=folder)).create()
        fit(
            pair.model, next_token, Same(batches, len(samples)), cfg=train, total_steps=steps, optimizer=optimizer,
            run=place, seed=0, save=lambda step: None, callbacks=[log],
            reporter=Reporter(total_steps=steps, steps_per_epoch=1, samples_per_step=1, live=False, enabled=False),
        )  # fmt: skip
        return log.records

    run(1)
    if pair.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pair.device)
    first = run(1)
    more = int(min(9, max(1, seconds / float(first[0]["step_time_s"]))))
    return [*first, *run(more)]


def tower_rate(pair: Pair, rate: float) -> tuple[str, dict[str, float]]:
    """Images a second through the tower alone: what filling the feature store costs."""
    g, many = pair.tower.geometry, 32
    pixels = torch.randint(0, 256, (many, 3, g.height, g.width), dtype=torch.uint8, device=pair.device)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        with torch.no_grad():
            float(pair.tower(pixels).float().sum())  # waits for the device
        seconds.append(time.perf_counter() - started)
    best = min(seconds[1:])
    share = many * pair.vision_shape.flops_per_image / best / rate
    return f"{many} images at once", {"step_s": best, "samples_per_s": many / best, "matrix_share": share}


# ---------------------------------------------------------------------------------------------------------------
# Rows


@dataclass
class Row:
    part: str
    what: str
    result: str
    """ok, FAILED, not here, no time."""
    detail: str = ""
    seconds: float = 0.0
    numbers: dict[str, float] = field(default_factory=dict)


class Sheet:
    """The rows so far, on disk after each."""

    def __init__(self, out: Path, device: torch.device, minutes: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.began, self.total_s = out, time.perf_counter(), minutes * 60
        self.rows: list[Row] = []
        names = ("torch", "transformers", "peft", "timm", "numpy")
        self.machine = {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU",
            "python": platform.python_version(), "cuda": str(torch.version.cuda),
            **{name: str(version_of(name)) for name in names}, "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip

    @property
    def left_s(self) -> float:
        return self.total_s - (time.perf_counter() - self.began)

    def row(self, part: str, what: str, work: Callable[[], str | tuple[str, dict[str, float]]], most_s: float) -> bool:
        """Do the work and write down how it went; one failure is a row and not the end."""
        started, row = time.perf_counter(), Row(part, what, "ok")
        most_s = min(most_s, self.left_s)
        try:
            if most_s < 1:
                raise OverBudget("the time of the whole is up")
            with at_most(most_s):
                said = work()
            row.detail, row.numbers = said if isinstance(said, tuple) else (said, {})
        except OverBudget as e:
            row.result, row.detail = "no time", str(e)
        except Missing as e:
            row.result, row.detail = "not here", str(e)
        except Exception as e:  # whatever it is, the rest goes on
            row.result, row.detail = "FAILED", f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
        row.seconds = time.perf_counter() - started
        self.rows.append(row)
        print(f"[{row.result}] {part}: {what} ({row.seconds:.1f} s) {row.detail}", flush=True)
        self.write()
        return row.result == "ok"

    def write(self) -> None:
        record = {"machine": self.machine, "seed_step_s": SEED_STEP_S, "seconds": time.perf_counter() - self.began,
                  "rows": [asdict(r) for r in self.rows]}  # fmt: skip
        (self.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.out / "gpu.md").write_text(self.markdown())

    def markdown(self) -> str:
        columns: dict[str, Callable[[float], str]] = {
            "step_s": lambda v: f"{v:.3f}", "samples_per_s": lambda v: f"{v:.2f}",
            "supervised_tokens_per_s": lambda v: f"{v:,.0f}", "matrix_share": lambda v: f"{v:.0%}",
            "peak_gb": lambda v: f"{v:.1f}", "seed_step_ratio": lambda v: f"× {v:.2f}",
        }  # fmt: skip
        heads = ("part", "what", "result", "s/step", "samples/s", "supervised tokens/s", "of the matrix rate",
                 "peak GB", f"against the seed's {SEED_STEP_S} s", "detail")  # fmt: skip
        lines = [", ".join(f"{k} {v}" for k, v in self.machine.items()), ""]
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * 3}{'--:|' * len(columns)}---|"]
        for r in self.rows:
            cells = [show(r.numbers[name]) if name in r.numbers else "" for name, show in columns.items()]
            lines.append(f"| {' | '.join([r.part, r.what, r.result, *cells, r.detail.replace('|', '/')])} |")
        return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="folder of gpu.md and gpu.json")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="what finds no time within them is told as such")
    parser.add_argument(
        "--only", choices=("checks", "stages", "native", "speed"), action="append", help="a part; repeatable"
    )
    args = parser.parse_args(argv)
    if not args.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU here; --dry runs the same code on a CPU")
    device = torch.device("cpu" if args.dry else "cuda")
    parts, sheet = args.only or ["checks", "stages", "native", "speed"], Sheet(args.out, device, args.minutes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k, (what, check) in enumerate(CHECKS.items() if "checks" in parts else ()):
            bench = Bench(folder / f"check{k}", folder / "parts", device)
            sheet.row("equality", what, lambda check=check, bench=bench: check(bench), 60)
        for what, stage in smoke(folder, device) if "stages" in parts else ():
            sheet.row("both stages", what, stage, 60)
        if "native" in parts:
            native(sheet, folder, device, args.dry)
        if "speed" in parts:
            speed(sheet, folder, device, args.dry)
    print(f"\n{sheet.markdown()}\n{args.out / 'gpu.md'}, {args.out / 'gpu.json'}")
    return int(any(r.result == "FAILED" for r in sheet.rows))


def native(sheet: Sheet, folder: Path, device: torch.device, dry: bool) -> None:
    made: dict[str, Any] = {}

    def load() -> str:
        made["native"] = Native(folder / "native", device, dry)
        return f"{sum(p.numel() for p in made['native'].model.parameters()) / 1e9:.2f} B weights on the device"

    if not sheet.row("native", "the model", load, 60):
        return
    rate = matmul_rate(device, torch.bfloat16)
    for case in native_cases(dry):
        longest = 0.5 if dry else 8.0
        sheet.row(
            "native",
            case.name,
            lambda c=case, s=longest: time_case(made["native"], c, folder, rate, s),
            8 * longest + 4,
        )
    made.clear()
    gc.collect()
    if device.type == "cuda":
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def speed(sheet: Sheet, folder: Path, device: torch.device, dry: bool) -> None:
    made: dict[str, Any] = {}

    def measure() -> tuple[str, dict[str, float]]:
        made["rate"] = matmul_rate(device, torch.bfloat16)
        return f"{made['rate'] / 1e12:.4g} TFLOP/s in bf16", {}

    def load() -> str:
        made["pair"] = Pair(folder / "shapes", device, dry)
        error = made["pair"].language.packing_error
        if error:
            raise AssertionError(error)
        return f"{sum(p.numel() for p in made['pair'].model.parameters()) / 1e9:.2f} B weights on the device"

    if not (sheet.row("speed", "matrix rate", measure, 20) and sheet.row("speed", "the pair", load, 90)):
        return
    pair, rate = made["pair"], made["rate"]
    sheet.row("speed", "tower alone", lambda: tower_rate(pair, rate), 30)
    todo = cases(dry)
    for k, case in enumerate(todo):
        # What is left, shared by what is left to do; half of it for timed steps, the rest for warming up and retries.
        share = max(2.0, sheet.left_s / (len(todo) - k))
        longest = min(share / 2, 0.5 if dry else 8.0)
        sheet.row("speed", case.name, lambda c=case, s=longest: time_case(pair, c, folder, rate, s), 2 * share)
        if device.type == "cuda":
            with suppress(RuntimeError):  # after a fault of the device nothing works any more; the rows say so
                torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
