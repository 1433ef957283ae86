"""Which class of transformers' own computes what a joined model computes, which setting stands in the way of one, and
which in the way of llama.cpp.

Only classes whose arithmetic is ours to the last bit are named; `use.export` compares logits all the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from beholder.config import ConnectorConfig, VisionConfig

OWN = "BeholderForConditionalGeneration"
"""The class of the file that an export brings along where there is no other."""

IDEFICS3 = "Idefics3ForConditionalGeneration"

PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
"""Language models that are a decoder named ``model`` and a plain ``lm_head``, which is what transformers' classes take
apart."""

Check = tuple[bool, str]
"""Whether something is as a class asks for, and what to say where it is not."""


@dataclass(frozen=True, slots=True)
class ExportClass:
    """What a model is exported as."""

    name: str
    prevents: str = ""
    """Why it is no class of transformers' own: one setting, what it is, and what it would have to be."""

    def __str__(self) -> str:
        return f"{self.name} ({self.prevents})" if self.prevents else self.name


def export_class(
    connector: ConnectorConfig, vision: VisionConfig, tower: nn.Module, language: nn.Module, num_patches: int
) -> ExportClass:
    """The class for these parts, which may be empty ones: nothing of their weights is looked at. Where there is none,
    it says what stands in the way of the class that fewest settings keep it from; an output norm last, as it can be
    folded away."""
    if connector.output_norm != "none":
        without = connector.model_copy(update={"output_norm": "none"})
        folded = export_class(without, vision, tower, language, num_patches)
        norm = (
            f"model.connector.output_norm is {connector.output_norm}, which scales each token by itself; {folded.name} "
            "has none. `beholder export --fold-norm` makes that scale constant and measures what it costs"
        )
        return folded if folded.prevents else ExportClass(OWN, norm)
    kind = type(tower).__name__
    known = kind in ("CLIPVisionModel", "SiglipVisionModel")
    config: Any = tower.config if known else None
    d_text = language.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    side = 0 if config is None else config.image_size // config.patch_size
    size_and_language: list[Check] = [
        (
            config is None or num_patches == side**2,
            "model.vision.name_or_path prepares pictures of another size than its positions were trained for, which "
            "transformers' classes do not",
        ),
        (
            type(language).__name__ in PLAIN,
            f"model.llm.name_or_path is a {type(language).__name__}; transformers' classes are exact for "
            f"{', '.join(PLAIN)}",
        ),
    ]
    vip = "VipLlava" if connector.vision_ln else "Llava"
    candidates: dict[str, Sequence[Check]] = {
        f"{vip}ForConditionalGeneration": [*_llava(connector, vision, kind, d_text), *size_and_language],
        IDEFICS3: [*_idefics3(connector, vision, kind, side if side**2 == num_patches else 0), *size_and_language],
    }
    failing = {name: [why for holds, why in checks if not holds] for name, checks in candidates.items()}
    nearest = min(failing, key=lambda name: len(failing[name]))
    return ExportClass(OWN, failing[nearest][0]) if failing[nearest] else ExportClass(nearest)


def _llava(connector: ConnectorConfig, vision: VisionConfig, kind: str, d_text: int) -> list[Check]:
    hidden = connector.projector.hidden or d_text
    return [
        (
            kind in ("CLIPVisionModel", "SiglipVisionModel"),
            f"model.vision.name_or_path is a {kind}; LLaVA's classes are exact for CLIP and SigLIP, Idefics3 for "
            "SigLIP",
        ),
        (
            connector.resampler.kind == "none",
            f"model.connector.resampler.kind is {connector.resampler.kind}; none is LLaVA's",
        ),
        (
            connector.projector.kind == "mlp",
            f"model.connector.projector.kind is {connector.projector.kind}; mlp is LLaVA's",
        ),
        (
            hidden == d_text,
            f"model.connector.projector.hidden is {hidden}; LLaVA's is the language model's width, {d_text}",
        ),
        (
            kind != "SiglipVisionModel" or vision.feature_layer != -1,
            "model.vision.feature_layer is -1, which of SigLIP is taken after its last norm; LLaVA takes a layer's "
            "output, such as -2",
        ),
        (
            not connector.vision_ln or kind == "CLIPVisionModel",
            "model.connector.vision_ln is true; only VipLLaVA has it, which drops a class token that SigLIP has not",
        ),
    ]  # fmt: skip


def _idefics3(connector: ConnectorConfig, vision: VisionConfig, kind: str, side: int) -> list[Check]:
    """Without a resampler it stacks 1 x 1 patches. ``side``: of the grid; 0 where that is not what it should be."""
    siglip = kind == "SiglipVisionModel"
    return [
        (siglip, f"model.vision.name_or_path is a {kind}; Idefics3's tower is SigLIP's"),
        (
            connector.resampler.kind in ("pixel_shuffle", "none"),
            f"model.connector.resampler.kind is {connector.resampler.kind}; pixel_shuffle is Idefics3's",
        ),
        (
            connector.projector.kind == "linear",
            f"model.connector.projector.kind is {connector.projector.kind}; linear is Idefics3's",
        ),
        (
            connector.projector.kind != "linear" or not connector.projector.bias,
            "model.connector.projector.bias is true; Idefics3's projection has none",
        ),
        (not connector.vision_ln, "model.connector.vision_ln is true; Idefics3 has none"),
        (
            vision.feature_layer == -1,
            f"model.vision.feature_layer is {vision.feature_layer}; Idefics3 takes the tower's final output, -1",
        ),
        (
            not siglip or not side or keeps_positions(side),
            f"model.vision.name_or_path has {side} x {side} patches; Idefics3 finds a patch's position by dividing, "
            "and at this number rounding puts some of them elsewhere",
        ),
    ]  # fmt: skip


@cache
def keeps_positions(side: int) -> bool:
    """Whether Idefics3 gives the patches of a picture of ``side x side`` of them, all that it was trained with, the
    positions 0, 1, …. It looks up ``k * (1 / side)`` in fp32 among bounds that are rounded too, so of 25, 29 or 31
    patches a side some land on their neighbour's; of 14, 16, 24, 26, 27 and 32 none does. Asked is the class itself.
    """
    from transformers import Idefics3VisionConfig
    from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionEmbeddings

    numbers = torch.arange(side * side, dtype=torch.float32)
    with torch.device("meta"):
        settings = Idefics3VisionConfig(hidden_size=1, num_channels=1, image_size=side, patch_size=1)
        table = Idefics3VisionEmbeddings(settings)
    table.to_empty(device="cpu")
    with torch.no_grad():
        for weight in table.parameters():
            weight.zero_()
        table.position_embedding.weight.copy_(numbers.unsqueeze(1))
        found = table(torch.zeros(1, 1, side, side), torch.ones(1, side, side, dtype=torch.bool))
    return torch.equal(found.flatten(), numbers)


GGUF_LANGUAGE = {
    "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}  # fmt: skip
"""llama.cpp's name of the architecture, of the classes that a test has compared with it."""


def gguf_prevents(
    connector: ConnectorConfig, vision: VisionConfig, tower: nn.Module, language: nn.Module, num_patches: int
) -> str:
    """Why these parts cannot be files of llama.cpp's: the first setting in the way, what it is and what it would have
    to be; empty where they can. The parts may be empty ones.

    llama.cpp's projector ``janus_pro`` is a SigLIP tower, a linear layer, the tower's own GELU and a linear layer, with
    no text of its own around an image (ggml-org/llama.cpp, tools/mtmd/models/siglip.cpp).
    """
    kind, text = type(tower).__name__, getattr(language, "config", None)
    eyes = getattr(tower, "config", None) if kind == "SiglipVisionModel" else None
    layers = 0 if eyes is None else vision_layers(vision.feature_layer, eyes.num_hidden_layers)
    where = "model.llm.name_or_path: its configuration has"
    rope = getattr(text, "rope_parameters", None) or {}
    arch = GGUF_LANGUAGE.get(type(language).__name__)
    checks = [
        (
            kind != "CLIPVisionModel",
            "model.vision.name_or_path is a CLIPVisionModel, of which llama.cpp's projector mlp gives the class token "
            "for the last patch and other positions to the rest (ggml-org/llama.cpp#25814); a SiglipVisionModel is "
            "read right",
        ),
        (
            eyes is not None,
            f"model.vision.name_or_path is a {kind}; llama.cpp's projector of this kind reads a SiglipVisionModel",
        ),
        (
            eyes is None or eyes.hidden_act == "gelu_pytorch_tanh",
            f"model.vision.name_or_path has the activation {getattr(eyes, 'hidden_act', '')}; llama.cpp has "
            "gelu_pytorch_tanh for a SigLIP",
        ),
        (
            eyes is None or 0 < layers <= eyes.num_hidden_layers,
            f"model.vision.feature_layer is {vision.feature_layer}; llama.cpp runs at least one layer of the tower",
        ),
        (
            eyes is None or num_patches == (eyes.image_size // eyes.patch_size) ** 2,
            "model.vision.name_or_path prepares pictures of another size than its positions were trained for",
        ),
        (
            not connector.vision_ln,
            "model.connector.vision_ln is true; llama.cpp's projector has no norm before it",
        ),
        (
            connector.resampler.kind == "none",
            f"model.connector.resampler.kind is {connector.resampler.kind}; llama.cpp's projector has none",
        ),
        (
            connector.projector.kind == "mlp",
            f"model.connector.projector.kind is {connector.projector.kind}; llama.cpp's is mlp",
        ),
        (
            arch is not None,
            f"model.llm.name_or_path is a {type(language).__name__}; compared with llama.cpp are "
            f"{', '.join(GGUF_LANGUAGE)}",
        ),
        (
            getattr(text, "hidden_act", "silu") == "silu",
            f"{where} the activation {getattr(text, 'hidden_act', '')}; llama.cpp has silu for it",
        ),
        (
            rope.get("rope_type", "default") in ("default", *(["llama3"] if arch == "llama" else [])),
            f"{where} rotary positions of type {rope.get('rope_type')}; written are default and, for Llama, llama3",
        ),
        (
            rope.get("partial_rotary_factor", 1.0) == 1.0,
            f"{where} rotary positions on a part of each head, which llama.cpp has not for it",
        ),
        (
            not getattr(text, "attention_bias", False) and not getattr(text, "mlp_bias", False),
            f"{where} attention_bias or mlp_bias, which are not written",
        ),
        (
            all(t == "full_attention" for t in getattr(text, "layer_types", None) or [])
            and (arch != "llama" or getattr(text, "sliding_window", None) is None),
            f"{where} sliding-window attention, which is not written",
        ),
        (
            connector.output_norm == "none",
            f"model.connector.output_norm is {connector.output_norm}, which scales each token by itself; llama.cpp's "
            "projector has none. `beholder export --fold-norm` makes that scale constant and measures what it costs",
        ),
    ]  # fmt: skip
    return next((why for holds, why in checks if not holds), "")


def vision_layers(layer: int, count: int) -> int:
    """How many of a Hugging Face tower's ``count`` layers the features of ``model.vision.feature_layer`` have been
    through."""
    return count if layer == -1 else layer if layer >= 0 else count + 1 + layer
