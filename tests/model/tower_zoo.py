"""Tiny random towers of the real classes of transformers, and the smallest model of each of timm's families."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from beholder.model.weights import quiet_transformers

VIT: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
"""What most plain transformers call their sizes."""

GRID: dict[str, Any] = {"image_size": 64, "patch_size": 16}
"""64 x 64 pixels in 4 x 4 patches."""

PYRAMID: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 48]}

ATTENDING = PYRAMID | {"image_size": 64, "num_attention_heads": [1, 1, 2, 4], "mlp_ratios": [2, 2, 2, 2]}

SWIN: dict[str, Any] = {
    "image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1, 2], "num_heads": [1, 2, 2], "window_size": 4,
}  # fmt: skip

TEXT: dict[str, Any] = {
    "vocab_size": 64, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 96,
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One Hugging Face family: ``model`` is the class, ``numbers`` those of its config."""

    model: str
    numbers: dict[str, Any]
    pixels: int = 64
    patches: int | None = 16
    """Patch tokens of one image; None where the family must be refused."""
    refused: str = ""
    """What the refusal says."""
    config_only: bool = False
    """The class cannot be made here; its config stands alone."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the preprocessing file, where it isn't the usual."""


HF: dict[str, Family] = {
    # One patch embedding, no class token
    "siglip": Family("SiglipVisionModel", VIT | GRID),
    "siglip whole": Family("SiglipModel", {"vision_config": VIT | GRID, "text_config": TEXT}),
    "siglip2 naflex": Family(
        "Siglip2VisionModel", VIT | {"patch_size": 16, "num_patches": 16}, patches=None,
        refused="fixed-resolution", settings={"max_num_patches": 256},
    ),
    "vit-mae": Family(
        "ViTMAEModel", VIT | GRID | {"mask_ratio": 0.75}, patches=None,
        refused=r"random masking.*timm/vit_base_patch16_224\.mae",
    ),
    "ijepa": Family("IJepaModel", VIT | GRID),
    "aimv2": Family("Aimv2VisionModel", VIT | GRID),
    "idefics3": Family("Idefics3VisionTransformer", VIT | GRID),
    "sam": Family(
        "SamVisionModel",
        VIT | GRID | {"output_channels": 24, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 96,
                      "num_pos_feats": 12, "initializer_range": 0.1},
    ),
    "vitdet": Family("VitDetModel", VIT | GRID | {"pretrain_image_size": 64}),
    # A class token
    "clip": Family("CLIPVisionModel", VIT | GRID | {"projection_dim": 48}),
    "metaclip2": Family("MetaClip2VisionModel", VIT | GRID | {"projection_dim": 48}),
    "clipseg": Family("CLIPSegVisionModel", VIT | GRID),
    "chinese-clip": Family("ChineseCLIPVisionModel", VIT | GRID | {"projection_dim": 48}),
    "altclip": Family("AltCLIPVisionModel", VIT | GRID | {"projection_dim": 48}),
    "blip": Family("BlipVisionModel", VIT | GRID),
    "owlvit": Family("OwlViTVisionModel", VIT | GRID),
    "mlcd": Family("MLCDVisionModel", VIT | GRID | {"num_key_value_groups": 1}),
    "vit": Family("ViTModel", VIT | GRID),
    "vit-msn": Family("ViTMSNModel", VIT | GRID),
    "beit": Family("BeitModel", VIT | GRID | {"use_relative_position_bias": True}),
    "data2vec": Family("Data2VecVisionModel", VIT | GRID | {"use_relative_position_bias": True}),
    "dinov2": Family("Dinov2Model", VIT | GRID | {"mlp_ratio": 2}),
    "pixio": Family("PixioModel", VIT | GRID | {"mlp_ratio": 2}),
    "internvl": Family(
        "InternVLVisionModel", VIT | {"image_size": [64, 64], "patch_size": [16, 16]}
    ),
    "llama4": Family(
        "Llama4VisionModel",
        VIT | GRID | {"vision_output_dim": 48, "projector_input_dim": 48, "projector_output_dim": 48,
                      "pixel_shuffle_ratio": 0.5, "intermediate_size": 192}, patches=4,
    ),
    # Several
    "deit distilled": Family("DeiTModel", VIT | GRID),
    "yolos": Family("YolosModel", VIT | {"image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 5}),
    "dinov2 with registers": Family(
        "Dinov2WithRegistersModel", VIT | GRID | {"mlp_ratio": 2, "num_register_tokens": 4}
    ),
    "dinov3 vit": Family("DINOv3ViTModel", VIT | GRID | {"num_register_tokens": 4}),
    # Feature maps and pyramids
    "resnet": Family("ResNetModel", PYRAMID | {"embedding_size": 16, "layer_type": "basic"}, patches=4),
    "regnet": Family("RegNetModel", PYRAMID | {"embedding_size": 16, "groups_width": 8}, patches=4),
    "bit": Family("BitModel", PYRAMID | {"embedding_size": 16, "num_groups": 4}, patches=4),
    "convnext": Family("ConvNextModel", PYRAMID, patches=4),
    "convnextv2": Family("ConvNextV2Model", PYRAMID, patches=4),
    "dinov3 convnext": Family("DINOv3ConvNextModel", PYRAMID | {"image_size": 64}, patches=4),
    "efficientnet": Family(
        "EfficientNetModel",
        {"image_size": 64, "width_coefficient": 0.5, "depth_coefficient": 0.3, "hidden_dim": 640}, patches=4,
    ),
    "mobilenet v1": Family("MobileNetV1Model", {"depth_multiplier": 0.25}, patches=4),
    "mobilenet v2": Family("MobileNetV2Model", {"depth_multiplier": 0.25}, patches=4),
    "mobilevit": Family(
        "MobileViTModel",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 48], "num_attention_heads": 2,
         "image_size": 64}, patches=4,
    ),
    "mobilevitv2": Family("MobileViTV2Model", {"image_size": 64, "width_multiplier": 0.25}, patches=4),
    "hgnet v2": Family("HGNetV2Backbone", {}, patches=None, refused="no attribute 'last_hidden_state'.*timm/hgnetv2"),
    "swiftformer": Family(
        "SwiftFormerModel", {"embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1], "image_size": 64}, patches=4,
    ),
    "textnet": Family("TextNetModel", {}, patches=4),
    "poolformer": Family("PoolFormerModel", PYRAMID, patches=4),
    "swin": Family("SwinModel", SWIN),
    "swinv2": Family("Swinv2Model", SWIN),
    "donut swin": Family("DonutSwinModel", SWIN),
    "focalnet": Family(
        "FocalNetModel",
        {"image_size": 64, "embed_dim": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}, patches=4,
    ),
    "hiera": Family(
        "HieraModel",
        {"image_size": [64, 64], "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [1, 2, 4], "num_query_pool": 2,
         "masked_unit_size": [4, 4], "masked_unit_attention": [True, True, False]},
    ),
    "pvt": Family("PvtModel", ATTENDING, patches=4),
    "pvtv2": Family("PvtV2Model", ATTENDING, patches=4),
    "segformer": Family("SegformerModel", ATTENDING, patches=4),
    "glpn": Family("GLPNModel", ATTENDING, patches=4),
    "cvt": Family("CvtModel", {"embed_dim": [16, 24, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 3]}),
    "levit": Family(
        "LevitModel",
        {"image_size": 128, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]}, pixels=128, patches=4,
    ),
    "dinat": Family(
        "DinatModel", {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "kernel_size": 3},
        patches=None, refused="requires the natten library", config_only=True,
    ),
    # Other ways of asking
    "pixtral": Family("PixtralVisionModel", VIT | GRID),
    "qwen2-vl": Family(
        "models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        {"depth": 2, "embed_dim": 48, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2, "patch_size": 16},
        patches=None, refused="no tower that takes pictures alone",
    ),
    "bert": Family("BertModel", TEXT, patches=None, refused="cannot be run on plain"),
}  # fmt: skip


def build(family: Family, folder: Path, seed: int = 0) -> None:
    """Saves a random tower as its own class does, with a preprocessing file beside it."""
    import transformers

    model: Any = transformers
    for part in family.model.split("."):
        model = getattr(model, part)
    config = model.config_class(**family.numbers)
    if family.config_only:
        config.save_pretrained(folder)
        save_file({}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        with torch.random.fork_rng(devices=[]), quiet_transformers():
            torch.manual_seed(seed)
            built = model(config)
            shake(built, family.pixels)
            built.save_pretrained(folder)
    preprocessing = {
        "size": {"height": family.pixels, "width": family.pixels}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "resample": 3, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255,
    } | family.settings  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing))


TIMM: dict[str, int] = {
    # Tokens: plain, with a class token, with two, with one that nothing declares (VOLO, CoaT), pyramids
    "test_vit": 100, "test_vit_relpos": 100, "vit_tiny_patch16_224": 196, "vit_tiny_r_s16_p8_224": 49,
    "deit_tiny_patch16_224": 196, "deit_tiny_distilled_patch16_224": 196, "eva02_tiny_patch14_224": 256,
    "cait_xxs24_224": 196, "convit_tiny": 196, "xcit_nano_12_p8_224": 784, "vitamin_small_224": 196,
    "tnt_s_legacy_patch16_224": 196, "resmlp_12_224": 196, "volo_d1_224": 196, "coat_lite_tiny": 49,
    "levit_128s": 16, "efficientformer_l1": 49, "mvitv2_tiny": 49, "twins_svt_small": 49, "hiera_tiny_224": 49,
    # Maps with the channels last
    "swin_tiny_patch4_window7_224": 49, "swinv2_tiny_window8_256": 64, "test_mambaout": 25, "sequencer2d_s": 256,
    # Maps
    "lambda_resnet26t": 64, "gernet_s": 49, "test_convnext": 25, "cpubone_nano": 49, "csatv2": 64,
    "darknet17": 64, "cspnext_tiny": 49, "densenet121": 49, "dla34": 49, "dpn68": 49,
    "edgenext_xx_small": 64, "efficientformerv2_s0": 49, "tinynet_d": 25, "efficientvit_b0": 49, "efficientvit_m0": 16,
    "fasternet_t0": 49, "fastvit_t8": 64, "focalnet_tiny_srf": 49, "gcvit_xxtiny": 49, "ghostnet_050": 49,
    "hardcorenas_a": 49, "hgnetv2_b2": 49, "iformer_t": 49, "inception_next_atto": 49, "inception_v3": 64,
    "lcnetv2_small": 49, "lowformer_e1": 49, "test_coatnet": 25, "poolformer_s24": 49, "lcnet_035": 49,
    "mobilevit_xxs": 64, "nest_tiny": 196, "pvt_v2_b0": 49, "regnetx_016": 49, "repghostnet_080": 49, "repvit_m1": 49,
    "resnest14d": 49, "resnet18": 49, "resnetv2_18": 49, "rexnet_100": 49, "legacy_seresnet18": 49, "shvit_s1": 16,
    "skresnet18": 49, "starnet_s1": 49, "swiftformer_xs": 49, "swinv2_cr_tiny_224": 49, "tiny_vit_5m_224": 49,
    "visformer_tiny": 49, "vovnet39a": 49,
}  # fmt: skip
"""The smallest model of a family, and its patches at its own size."""

TIMM_REFUSED: dict[str, tuple[str, int]] = {
    "pit_ti_224": ("one token for the whole picture", 49),
    "coat_tiny": ("gives a list", 49),
    "crossvit_tiny_240": ("gives a list", 196),
    "efficientvim_m1": ("gives a list", 16),
}
"""What the refusal says, and the patches of the inner map that it names instead."""


@torch.no_grad()
def shake(model: torch.nn.Module, pixels: int, matrices: bool = True) -> None:
    """Weights and statistics of the size that trained ones have. Many start as zeros, ones or next to nothing (layer
    scales, class tokens, the last norm of a block), and would hide what a layer does; batch norms that have seen
    nothing let a picture fade away. ``matrices=False`` leaves those as drawn."""
    for name, p in model.named_parameters():
        if p.ndim <= 1:
            about = 0.0 if name.endswith("bias") else 1.0 if p.mean() > 0.5 else 0.1
            p.copy_(about + 0.1 * (about or 1.0) * torch.randn_like(p))
        elif matrices:
            fan_in = p[0].numel() if p.shape[0] > 1 else 4
            p.copy_(torch.randn_like(p) * fan_in**-0.5)
        if name.endswith("attention_biases"):  # the first is for the token itself; LeViT has no other places
            p[:, 0] += 6
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    if norms:
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model(torch.randn(4, 3, pixels, pixels))
    model.eval()
