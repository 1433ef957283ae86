"""Which class of transformers' own computes what a joined model computes, and which setting stands in the way of one.

Only classes whose arithmetic is ours to the last bit are named; `use.export` compares logits all the same.
"""

from dataclasses import dataclass

from torch import nn

from beholder.config import ConnectorConfig, VisionConfig

OWN = "BeholderForConditionalGeneration"
"""The class of the file that an export brings along where there is no other."""

PLAIN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "SmolLM3ForCausalLM")
"""Language models that are a decoder named ``model`` and a plain ``lm_head``, which is what LLaVA takes apart."""


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
    """The class for these parts, which may be empty ones: nothing of their weights is looked at."""
    kind, layer = type(tower).__name__, vision.feature_layer
    d_text = language.get_input_embeddings().weight.shape[1]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    hidden = connector.projector.hidden or d_text
    config = tower.config if kind in ("CLIPVisionModel", "SiglipVisionModel") else None
    checks = [
        (
            config is not None,
            f"model.vision.name_or_path is a {kind}; LLaVA's classes are exact for CLIP and SigLIP",
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
            connector.output_norm == "none",
            f"model.connector.output_norm is {connector.output_norm}; none is LLaVA's",
        ),
        (
            hidden == d_text,
            f"model.connector.projector.hidden is {hidden}; LLaVA's is the language model's width, {d_text}",
        ),
        (
            kind != "SiglipVisionModel" or layer != -1,
            "model.vision.feature_layer is -1, which of SigLIP is taken after its last norm; LLaVA takes a layer's "
            "output, such as -2",
        ),
        (
            not connector.vision_ln or kind == "CLIPVisionModel",
            "model.connector.vision_ln is true; only VipLLaVA has it, which drops a class token that SigLIP has not",
        ),
        (
            config is None or num_patches == (config.image_size // config.patch_size) ** 2,  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
            "model.vision.name_or_path prepares pictures of another size than its positions were trained for, which "
            "LLaVA does not",
        ),
        (
            type(language).__name__ in PLAIN,
            f"model.llm.name_or_path is a {type(language).__name__}; LLaVA's class is exact for {', '.join(PLAIN)}",
        ),
    ]  # fmt: skip
    why = next((why for holds, why in checks if not holds), "")
    if why:
        return ExportClass(OWN, why)
    return ExportClass(f"{'VipLlava' if connector.vision_ln else 'Llava'}ForConditionalGeneration")
