"""Tiny random models of many causal LM families, of transformers' own classes, saved the way real checkpoints are."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from beholder.model.weights import quiet_transformers
from beholder.prepare.tiny import tiny_tokenizer

WIDE = {"hidden_size": 64}
DEEP = {"num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED: dict[str, Any] = {**WIDE, **DEEP, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
GPT2: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAIRSEQ: dict[str, Any] = {**WIDE, **DEEP, "max_position_embeddings": 128}
EXPERTS = {"num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **WIDE, **DEEP, "intermediate_size": 96, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "n_group": 2,
    "topk_group": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1, **EXPERTS,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What a row of the table is made from and what must come out."""

    settings: dict[str, Any] = field(default_factory=lambda: GROUPED)
    """Fields of its config."""
    config: str | None = None
    """Name of its config class, where it is not the family's name with ``Config``."""
    model: str | None = None
    """Name of its model class, where it is not the family's name with ``ForCausalLM``."""
    kernel: str = "sdpa"
    """Attention it is used with: eager where the family has no other on a CPU, which the refusal of sdpa must say."""
    packs: bool | None = True
    """Whether restarting positions keep packed samples apart; None: not with every version of transformers."""
    positions: int | None = None
    """Rows of its table of positions."""
    fused: bool = False
    """Whether PEFT takes layers that are named like experts (gate_proj, …) for the fused ones."""
    refused: str | None = None
    """What the sentence says that refuses the family with every kernel."""


FAMILIES: dict[str, Family] = {
    "Llama": Family(), "Mistral": Family(GROUPED | {"sliding_window": 3}),
    "Mixtral": Family(GROUPED | {"num_local_experts": 4, **EXPERTS}),
    "Qwen2": Family(),
    "Qwen2Moe": Family(
        GROUPED | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **EXPERTS}
    ),
    "Qwen3": Family(), "Qwen3Moe": Family(GROUPED | {"num_experts": 4, "moe_intermediate_size": 32, **EXPERTS}),
    "Gemma": Family(), "Gemma2": Family(GROUPED | {"final_logit_softcapping": 3.0}, kernel="eager"),
    "Gemma3": Family(GROUPED | {"sliding_window": 3}, config="Gemma3TextConfig"),
    "Phi": Family(), "Phi3": Family(GROUPED | {"sliding_window": 3}), "SmolLM3": Family(),
    "GPT2": Family(GPT2, model="GPT2LMHeadModel", positions=128),
    "GPTBigCode": Family(GPT2, positions=128),
    "GPTJ": Family(GPT2 | {"rotary_dim": 8}, kernel="eager", positions=128),
    "GPTNeo": Family(
        {**WIDE, "num_layers": 2, "num_heads": 4, "intermediate_size": 96, "max_position_embeddings": 128,
         "attention_types": [[["global", "local"], 1]], "window_size": 3},
        kernel="eager", positions=128,
    ),
    "GPTNeoX": Family({**WIDE, **DEEP, "intermediate_size": 96}),
    "CodeGen": Family(GPT2 | {"rotary_dim": 8}, kernel="eager", positions=128),
    "OPT": Family(FAIRSEQ | {"ffn_dim": 96, "word_embed_proj_dim": 64}, positions=128),
    "XGLM": Family(
        {"d_model": 64, "ffn_dim": 96, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 400},
        kernel="eager", packs=False,
    ),
    "BioGpt": Family(FAIRSEQ | {"intermediate_size": 96}, positions=128),
    "Bloom": Family({**WIDE, "n_layer": 2, "n_head": 4}, kernel="eager", packs=False),
    "Mpt": Family(
        {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}, kernel="eager", packs=False, positions=128
    ),
    "Falcon": Family({**WIDE, **DEEP}, packs=False), "StableLm": Family(), "Starcoder2": Family(),
    "Olmo": Family(), "Olmo2": Family(), "Cohere": Family(GROUPED | {"logit_scale": 0.06}),
    "Cohere2": Family(GROUPED | {"sliding_window": 3}),
    "Granite": Family(GROUPED | {"logits_scaling": 8.0, "embedding_multiplier": 12.0}),
    "GraniteMoe": Family(GROUPED | {"num_local_experts": 4, **EXPERTS}),
    "GptOss": Family(GROUPED | {"num_local_experts": 4, **EXPERTS}, kernel="eager", packs=False),
    "DeepseekV3": Family(LATENT, fused=True), "Glm4": Family(), "Nemotron": Family(), "Persimmon": Family(),
    "Llama4": Family(
        GROUPED | {"num_local_experts": 2, "attention_chunk_size": 4}, config="Llama4TextConfig", packs=None
    ),
    "Qwen3Next": Family(
        GROUPED | {
            "num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, **EXPERTS,
            "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
            "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
        },
        packs=False, fused=True,
    ),
    "Mamba": Family({**WIDE, "num_hidden_layers": 2, "state_size": 8}, kernel="eager", packs=False),
    "Bamba": Family(
        GROUPED | {
            "mamba_n_heads": 4, "mamba_d_head": "auto", "mamba_d_state": 8, "mamba_n_groups": 1,
            "attn_layer_indices": [1],
        },
        refused="cannot be run from embeddings",
    ),
    "Rwkv": Family(
        {**WIDE, "num_hidden_layers": 2, "attention_hidden_size": 64, "context_length": 128}, kernel="eager",
        refused="what it writes is not what it is trained on",
    ),
}  # fmt: skip


def saved(folder: Path, name: str, **changes: Any) -> Path:
    """A tiny random model of the family with a byte tokenizer; ``changes`` are fields of its config."""
    family = FAMILIES[name]
    tokenizer = tiny_tokenizer(folder)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "initializer_range": 0.12, "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **family.settings, **changes,
    }  # fmt: skip
    config = getattr(transformers, family.config or f"{name}Config")(**settings)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = getattr(transformers, family.model or f"{name}ForCausalLM")(config)
        # transformers draws some at a scale at which a layer does next to nothing, and zeros hide what is left out.
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=float(parameter.detach().mean()), std=0.1)
        model.save_pretrained(folder)
    return folder
