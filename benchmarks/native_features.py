"""What it saves to keep what a native model's eyes say of an image (`features.enabled`): steps that see the pixels, and
steps that read what was kept.

    python benchmarks/native_features.py --threads 1

A Qwen3-VL with random weights (131 M, 21 M of them its eyes', three layers of deepstack), LoRA r 16 on the language
model: samples of one image of 256 x 256 pixels (256 visual tokens) and a short answer. Seconds of processor time of a
step by what it goes to, the least of several rounds, and the bytes that an image takes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from beholder.config import LlmConfig, LoraConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import PADDED, SampleBuilder
from beholder.data.images import NativePipeline
from beholder.model import adapters
from beholder.model.native import NativeModel, load_native
from beholder.model.plan import TrainPlan, apply_train_plan
from beholder.model.weights import DTYPES
from beholder.prepare.tiny import tiny_native
from beholder.store.features import FeatureStore
from beholder.types import Example, FeatureReader, ImageRef, ImageSlot, Turn


def prepared(folder: Path, precision: str) -> tuple[NativeModel, Any]:
    tiny_native(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    raw["text_config"] |= {
        "hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32_000, "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [12, 10, 10]},
    }  # fmt: skip
    raw["vision_config"] |= {
        "hidden_size": 320, "intermediate_size": 1280, "depth": 8, "num_heads": 5, "out_hidden_size": 768,
        "num_position_embeddings": 1024, "deepstack_visual_indexes": [1, 3, 5], "initializer_range": 0.02,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(**raw)
    whole: Any = transformers.Qwen3VLForConditionalGeneration(config)
    whole.to(DTYPES[precision]).save_pretrained(folder)
    sizes = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    sizes["size"] = {"shortest_edge": 256, "longest_edge": 256 * 256}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes), encoding="utf-8")
    (folder / "processor_config.json").unlink(missing_ok=True)
    cfg = LlmConfig.model_validate({"name_or_path": str(folder), "precision": precision})
    model, tokenizer = load_native(cfg, torch.device("cpu"))
    adapters.attach(model.language.part, LoraConfig(enable=True, r=16, dropout=0.0), 0)
    apply_train_plan(model, TrainPlan(connector="frozen", language="lora"))
    return model, tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        measure(Path(name), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    model, tokenizer = prepared(folder / "native", args.precision)
    pipeline = NativePipeline(model.geometry, 50)
    encoder = ChatEncoder(
        tokenizer, num_visual_tokens=None, max_seq_len=4096, template="chat", instruction="", instruction_multi="",
        images=model.geometry, chat_template=model.geometry.chat_template, size_of=pipeline.size,
    )  # fmt: skip
    refs = [ImageRef(str(folder), f"{k}.png") for k in range(args.samples)]
    for k, ref in enumerate(refs):
        pixels = np.random.default_rng(k).integers(0, 256, (256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / ref.path)
    turns = (Turn("user", (ImageSlot(0), "\nWhat is it?")), Turn("assistant", ("It is a picture of noise.",)))
    examples = [Example(str(k), (ref,), turns) for k, ref in enumerate(refs)]
    shape, dtype = model.kept_like
    store = FeatureStore(
        folder / "store", tower_fingerprint="", pipeline_fingerprint="", shape=shape, dtype=dtype, max_bytes=10**9,
        ragged=True,
    )  # fmt: skip

    def encode(images: list[Any]) -> list[torch.Tensor]:
        return [kept for image in images if (kept := model.keep(image).features) is not None]

    def step(features: FeatureReader | None) -> tuple[float, float]:
        """Seconds of the loader, and of the model forward and backward."""
        began = time.process_time()
        builder = SampleBuilder(encoder, pipeline, features, on_bad_image="error")
        batch = builder.batch(examples, PADDED)
        loaded = time.process_time()
        model(batch).nll.sum().backward()
        done = time.process_time()
        for weight in model.parameters():
            weight.grad = None
        return loaded - began, done - loaded

    began = time.process_time()
    store.fill(refs, encode, pipeline, batch_size=args.samples, num_threads=1)
    filled = time.process_time() - began
    rounds = [(step(None), step(store)) for _ in range(args.rounds)]
    seen, kept = (tuple(min(r[which][part] for r in rounds) for part in (0, 1)) for which in (0, 1))
    eyes, whole = (sum(p.numel() for p in m.parameters()) for m in (model.vision, model.whole))
    with torch.no_grad():
        pixels, stored = (
            model(SampleBuilder(encoder, pipeline, s, on_bad_image="error").batch(examples, PADDED)).nll
            for s in (None, store)
        )
    print(f"{eyes / 1e6:.0f} of {whole / 1e6:.0f} M weights are the eyes'; {args.samples} samples, {args.precision}")
    for called, (loader, model_s) in (("pixels", seen), ("kept", kept)):
        print(f"{called:8}loader {loader:.3f} s, model {model_s:.3f} s, together {loader + model_s:.3f} s")
    print(f"a step is {sum(seen) / sum(kept):.2f} times faster; filling took {filled:.3f} s for these images once")
    print(f"an image takes {store.bytes_used / len(refs) / 1e3:.0f} kB; the same losses: {torch.equal(pixels, stored)}")


if __name__ == "__main__":
    main()
