"""Tiny random models through the real config path, and batches made by the real encoder and collation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from beholder.config import ConnectorConfig, LlmConfig, LoraConfig, ModelConfig, ResamplerConfig, VisionConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import Layout, collate
from beholder.model.build import build_vlm
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.tiny import tiny_llm, tiny_vision
from beholder.types import Batch, Encoded, Example, ImageInput, ImageRef, ImageSlot, Turn

CPU = torch.device("cpu")
PAIRS = [("qwen3", "siglip"), ("smollm2", "repvit"), ("llama", "clip"), ("qwen3", "dinov2")]
CAPTIONS = ["a red square", "x", "two blue circles on a grey ground, far apart", "été — 猫", "a big green triangle"]


@dataclass
class Parts:
    """Folders of tiny parts, made on first use and shared by the session."""

    folder: Path

    def llm(self, family: str = "qwen3") -> str:
        path = self.folder / f"llm_{family}"
        return str(path if path.exists() else tiny_llm(path, family))  # type: ignore[arg-type]

    def vision(self, family: str = "siglip") -> tuple[str, str | None]:
        path = self.folder / f"vision_{family}"
        if not hasattr(self, f"_{family}"):
            setattr(self, f"_{family}", tiny_vision(path, family))  # type: ignore[arg-type]
        return getattr(self, f"_{family}")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return Parts(tmp_path_factory.mktemp("model_parts"))


@dataclass
class Built:
    """A model with its encoder; pictures are noise, captions are given."""

    model: VisionLanguageModel
    encoder: ChatEncoder
    tokenizer: Any

    def picture(self, seed: int) -> ImageInput:
        g = self.model.geometry
        draw = torch.Generator().manual_seed(seed)
        return ImageInput(pixels=torch.randint(0, 256, (3, g.height, g.width), dtype=torch.uint8, generator=draw))

    def example(self, name: str, caption: str, num_images: int = 1) -> Example:
        refs = tuple(ImageRef("nowhere", f"{name}{k}.png") for k in range(num_images))
        slots = tuple(ImageSlot(k) for k in range(num_images))
        user = () if num_images == 1 else (Turn("user", slots),)
        return self.encoder.apply_template(Example(name, refs, (*user, Turn("assistant", (caption,)))))

    def samples(
        self, captions: Sequence[str] = CAPTIONS, num_images: int = 1
    ) -> list[tuple[str, Encoded, list[ImageInput]]]:
        out = []
        for i, caption in enumerate(captions):
            encoded = self.encoder.encode(self.example(f"s{i}", caption, num_images))
            out.append((f"s{i}", encoded, [self.picture(10 * i + k) for k in range(num_images)]))
        return out

    def batch(self, captions: Sequence[str] = CAPTIONS, num_images: int = 1, packing: bool = False) -> Batch:
        return collate(self.samples(captions, num_images), Layout(packing, 4096, 8))

    def connector_gradients(self, batch: Batch) -> dict[str, torch.Tensor]:
        named = {n: p for n, p in self.model.connector.named_parameters() if p.requires_grad}
        out = self.model(batch)
        return dict(zip(named, torch.autograd.grad(out.nll.sum(), list(named.values())), strict=True))


Build = Callable[..., Built]


@pytest.fixture(scope="session")
def build(parts: Parts) -> Build:
    """``build(llm="qwen3", vision="siglip", precision="fp32", attention="sdpa", **connector settings)``."""

    def make(
        llm: str = "qwen3", vision: str = "siglip", *, precision: str = "fp32", attention: str = "sdpa", seed: int = 3,
        gradient_checkpointing: bool = False, lora: LoraConfig | None = None, **connector: Any,
    ) -> Built:  # fmt: skip
        name, weights = parts.vision(vision)
        settings: dict[str, Any] = {
            "num_visual_tokens": 4, "vision_ln": True, "resampler": ResamplerConfig(depth=1, num_heads=4)
        } | connector  # fmt: skip
        cfg = ModelConfig(
            llm=LlmConfig(
                name_or_path=parts.llm(llm), precision=precision, attn_implementation=attention,  # type: ignore[arg-type]
                gradient_checkpointing=gradient_checkpointing,
            ),
            vision=VisionConfig(name_or_path=name, weights=weights, precision=precision),  # type: ignore[arg-type]
            connector=ConnectorConfig(**settings),
            lora=lora or LoraConfig(),
        )  # fmt: skip
        model, tokenizer = build_vlm(cfg, compute_precision=precision, device=CPU, seed=seed)
        encoder = ChatEncoder(
            tokenizer, num_visual_tokens=model.num_visual_tokens, max_seq_len=1024, template="caption",
            instruction="Describe the image.", instruction_multi="Describe each image in order.",
        )  # fmt: skip
        return Built(model, encoder, tokenizer)

    return make


@pytest.fixture(scope="session")
def tiny(build: Build) -> Built:
    """Qwen3 + SigLIP in fp32. Shared: a test must not change its weights."""
    return build()
