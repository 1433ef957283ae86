"""A tiny real model on a set whose answer is only in the image: once it has learned to look, once it is blind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from beholder.config import ConnectorConfig, LlmConfig, ModelConfig, ResamplerConfig, SourceConfig, VisionConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import Layout, SampleBuilder, eval_batches
from beholder.data.images import ImagePipeline
from beholder.data.sources import open_sources
from beholder.model.build import build_vlm
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.tiny import colour_set, tiny_llm, tiny_vision
from beholder.types import Batch, Example

PADDED = Layout(packing=False, pack_len=512, pad_to_multiple_of=8)
STEPS = 150
PACKED = Layout(packing=True, pack_len=160, pad_to_multiple_of=8)


@dataclass
class Bench:
    model: VisionLanguageModel
    tokenizer: Any
    encoder: ChatEncoder
    builder: SampleBuilder
    train: list[Example]
    held_out: list[Example]
    padded: Layout = PADDED
    packed: Layout = PACKED

    def batches(self, layout: Layout = PACKED, size: int = 16) -> Callable[[Sequence[Example]], Iterator[Batch]]:
        return lambda examples: eval_batches(examples, self.builder, layout, size)


def examples_of(records: Path, root: Path) -> list[Example]:
    source = SourceConfig(dataset="jsonl", json_path=str(records), image_root=str(root))
    return list(open_sources([source], image_token="<image>", max_images=2, on_reject="error"))


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Qwen3 + SigLIP, fresh connector, fp32; 120 pictures to learn from and 48 held out."""
    folder = tmp_path_factory.mktemp("probes")
    torch.set_num_threads(1)
    cfg = ModelConfig(
        llm=LlmConfig(name_or_path=str(tiny_llm(folder / "llm")), precision="fp32"),
        vision=VisionConfig(name_or_path=tiny_vision(folder / "vision")[0], precision="fp32"),
        connector=ConnectorConfig(num_visual_tokens=4, resampler=ResamplerConfig(depth=1, num_heads=4)),
    )
    model, tokenizer = build_vlm(cfg, compute_precision="fp32", device=torch.device("cpu"), seed=1)
    encoder = ChatEncoder(
        tokenizer, num_visual_tokens=4, max_seq_len=256, template="caption", instruction="Say it:",
        instruction_multi="Say each:",
    )  # fmt: skip
    builder = SampleBuilder(encoder, ImagePipeline(model.geometry, 1.0), None, on_bad_image="error")
    return Bench(
        model, tokenizer, encoder, builder,
        train=examples_of(*colour_set(folder / "train", 120, seed=1)),
        held_out=examples_of(*colour_set(folder / "held_out", 48, seed=2)),
    )  # fmt: skip


@pytest.fixture(scope="session")
def sighted(bench: Bench) -> VisionLanguageModel:
    """The model after a short training of connector and language model: random weights cannot be aligned, these can."""
    model = copy.deepcopy(bench.model)
    learned = [*model.connector.parameters(), *model.language.parameters()]
    for parameter in learned:
        parameter.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(learned, lr=3e-3)
        model.train()
        for step in range(STEPS):
            k = 24 * step % len(bench.train)
            batch = bench.builder.batch(bench.train[k : k + 24], PACKED)
            loss = model(batch).nll.sum() / batch.num_targets
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()
    return model.train(False)


@pytest.fixture(scope="session")
def blind(sighted: VisionLanguageModel) -> VisionLanguageModel:
    """It writes captions, but its connector gives the same tokens whatever the image: a low loss without sight."""
    model = copy.deepcopy(sighted)
    tokens = torch.randn(1, 4, model.language.d_text, generator=torch.Generator().manual_seed(3))
    model.connector.register_forward_hook(lambda module, args, out: tokens.expand_as(out))
    return model
