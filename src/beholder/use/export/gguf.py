"""What llama.cpp opens: the language model as ``model.gguf``, tower and projector as ``mmproj.gguf``.

Names of keys and tensors are the ``gguf`` package's and, of the tower, those of llama.cpp's tools/mtmd/clip-impl.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from torch import Tensor

from beholder.model.standard import GGUF_LANGUAGE, gguf_prevents, vision_layers
from beholder.model.vlm import VisionLanguageModel
from beholder.train.trained import TrainedRun
from beholder.types import UserError
from beholder.use.export.template import marked_template
from beholder.use.export.vocabulary import write_vocabulary
from beholder.use.export.weights import connector_state, language_state, tower_state

Stored = Literal["f32", "f16", "bf16"]
"""How matrices are kept; vectors, positions and the first convolution stay f32 (the convolution f16 beside f16)."""
MODEL, MMPROJ = "model.gguf", "mmproj.gguf"
PROJECTOR = "janus_pro"
"""llama.cpp's name of a SigLIP tower with an MLP (`model.standard.gguf_prevents`)."""
MARKER = "<__media__>"
"""What stands for an image in a prompt of llama.cpp's."""

_DTYPES: dict[Stored, tuple[torch.dtype, gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_TOWER = {
    "layer_norm1": "ln1", "layer_norm2": "ln2", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.out_proj": "attn_out", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down",
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a file: what is written of it, and as what."""

    name: str
    data: np.ndarray
    """Of bf16, which numpy has not, its bits as int16."""
    kind: gguf.GGMLQuantizationType


def check_gguf(run: TrainedRun) -> VisionLanguageModel:
    """The model of a run that llama.cpp can read. Raises `UserError` with what is in the way."""
    model = run.model
    if not isinstance(model, VisionLanguageModel):
        raise UserError(
            f"{run.checkpoint}: a run with a native model (model.native) is not written as GGUF; export it with --to "
            "hf, which llama.cpp's own convert_hf_to_gguf.py takes"
        )
    assert model.vision is not None
    why = gguf_prevents(
        run.cfg.model.connector, run.cfg.model.vision, model.vision.backbone, model.language.model,
        model.geometry.num_patches,
    )  # fmt: skip
    if why:
        raise UserError(f"{run.checkpoint} cannot be exported to GGUF: {why}. beholder export --to hf takes it")
    return model


def default_stored(model: VisionLanguageModel) -> Stored:
    """As the language model's matrices are kept in memory."""
    dtype = model.language.model.get_input_embeddings().weight.dtype
    return next(stored for stored, (own, *_) in _DTYPES.items() if own == dtype)


def pictures_note(model: VisionLanguageModel) -> list[str]:
    """Where llama.cpp prepares pictures otherwise than the run does: of this projector it resizes bicubically, as
    Pillow does, and keeps the shape, with a grey margin."""
    g = model.geometry
    fits = "stretches" if g.resize == "stretch" else "crops"
    notes = [f"llama.cpp puts a grey margin around pictures that are not square, where the run {fits} them"]
    if g.resample != "bicubic":
        notes.append(f"llama.cpp resizes bicubically, the run {g.resample}")
    if g.resize == "shortest_edge" and g.resize_to != g.height:
        notes.append(f"llama.cpp shows all of a picture, the run crops {g.resize_to} pixels to {g.height}")
    return notes


def write_gguf(run: TrainedRun, model: VisionLanguageModel, folder: Path, stored: Stored) -> dict[str, dict[str, Any]]:
    """Both files, into ``folder``; their keys, by file."""
    keys: dict[str, dict[str, Any]] = {}
    for name, fill, tensors in (
        (MODEL, _language_keys, language_tensors), (MMPROJ, _tower_keys, tower_tensors),
    ):  # fmt: skip
        arch = "clip" if name == MMPROJ else GGUF_LANGUAGE[type(model.language.model).__name__]
        writer = gguf.GGUFWriter(folder / name, arch)
        writer.add_name(run.cfg.run_name)
        writer.add_file_type(_DTYPES[stored][2])
        fill(writer, run, model)
        # twice: what a file holds stands before what it is, and all of it at once would be the model once more
        for t in tensors(run, model, stored):
            writer.add_tensor_info(t.name, t.data.shape, t.data.dtype, t.data.nbytes, t.kind)
        keys[name] = {key: value.value for part in writer.kv_data for key, value in part.items()}
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for t in tensors(run, model, stored):
            writer.write_tensor_data(t.data)
        writer.close()
    return keys


# ---------------------------------------------------------------------------------------------------------------
# Keys


def _language_keys(writer: gguf.GGUFWriter, run: TrainedRun, model: VisionLanguageModel) -> None:
    config: Any = model.language.model.config
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    width = _head_width(config)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rows = model.language.vocab
    writer.add_vocab_size(rows)
    write_vocabulary(writer, run.tokenizer, rows, run.encoder.eos_ids)
    writer.add_chat_template(marked_template(run))


def _tower_keys(writer: gguf.GGUFWriter, run: TrainedRun, model: VisionLanguageModel) -> None:
    assert model.vision is not None
    config: Any = model.vision.backbone.config
    g = model.geometry
    writer.add_type(gguf.GGUFType.MMPROJ)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(PROJECTOR)
    writer.add_vision_image_size(config.image_size)
    writer.add_vision_patch_size(config.patch_size)
    writer.add_vision_embedding_length(config.hidden_size)
    writer.add_vision_feed_forward_length(config.intermediate_size)
    writer.add_vision_block_count(vision_layers(run.cfg.model.vision.feature_layer, config.num_hidden_layers))
    writer.add_vision_head_count(config.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(config.layer_norm_eps)
    writer.add_vision_projection_dim(model.connector.d_out)
    writer.add_vision_image_mean(list(g.mean))
    writer.add_vision_image_std(list(g.std))
    writer.add_vision_use_gelu(True)


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


# ---------------------------------------------------------------------------------------------------------------
# Tensors


def language_tensors(run: TrainedRun, model: VisionLanguageModel, stored: Stored) -> Iterator[StoredTensor]:
    """The language model under llama.cpp's names. Of a Llama, rows of queries and keys lie in pairs: its rotary
    positions turn neighbours, transformers' turn halves."""
    language: Any = model.language.model
    config = language.config
    arch = GGUF_LANGUAGE[type(language).__name__]
    names = gguf.get_tensor_name_map(
        next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    for key, tensor in language_state(model).items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        if arch == "llama":
            for matrix, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
                if f".{matrix}." in key:
                    tensor = tensor.view(heads, 2, -1, tensor.shape[-1]).transpose(1, 2).reshape(tensor.shape)
        yield _stored(name, tensor, stored)
    if config.rope_parameters.get("rope_type") == "llama3":
        yield _stored("rope_freqs.weight", _llama3_factors(config), stored)


def _llama3_factors(config: Any) -> Tensor:
    """By what llama.cpp divides each rotary frequency: transformers' plain one over its scaled one."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    width = _head_width(config)
    exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / config.rope_parameters["rope_theta"] ** exponents / scaled


def tower_tensors(run: TrainedRun, model: VisionLanguageModel, stored: Stored) -> Iterator[StoredTensor]:
    """Tower and projector under llama.cpp's names; of the tower only what its features have been through."""
    assert model.vision is not None
    layer = run.cfg.model.vision.feature_layer
    state = tower_state(model)
    names = {"embeddings.patch_embedding": "v.patch_embd", "embeddings.position_embedding": "v.position_embd"}
    if layer == -1:
        names["post_layernorm"] = "v.post_ln"
    config: Any = model.vision.backbone.config
    for i in range(vision_layers(layer, config.num_hidden_layers)):
        names |= {f"encoder.layers.{i}.{ours}": f"v.blk.{i}.{theirs}" for ours, theirs in _TOWER.items()}
    for key, tensor in state.items():
        module, _, last = key.rpartition(".")
        if module in names:
            yield _stored(f"{names[module]}.{last}", tensor, stored)
    for key, tensor in connector_state(model).items():
        module, _, last = key.rpartition(".")
        yield _stored(f"mm.{('projector.fc1', 'projector.fc2').index(module)}.{last}", tensor, stored)


def _stored(name: str, tensor: Tensor, stored: Stored) -> StoredTensor:
    if tensor.dim() < 2 or name == "v.position_embd.weight":
        stored = "f32"
    elif name == "v.patch_embd.weight" and stored == "bf16":
        stored = "f32"  # llama.cpp has no convolution of bf16
    dtype, kind, _ = _DTYPES[stored]
    kept = tensor.detach().to(dtype).contiguous().cpu()
    if not bool(torch.isfinite(kept).all()):
        raise UserError(
            f"{name} has numbers that {stored} cannot hold or that are none (largest {float(tensor.abs().max()):.3g}); "
            "export it as f32 or bf16"
        )
    data = kept.view(torch.int16).numpy() if dtype == torch.bfloat16 else kept.numpy()
    return StoredTensor(name, data, kind)
