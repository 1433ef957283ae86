"""A vision-language model as Beholder trains one: a vision tower, a connector and a causal language model.

This file is all that transformers needs beside itself (and timm, for a tower of timm's):
``AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)``.
"""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel


class BeholderConfig(PreTrainedConfig):
    """``text_config``: of the language model. ``vision``: the tower: ``class`` and ``config`` of transformers, or
    ``timm``; ``layer`` taken; where its ``patches`` are. ``connector``: its kinds and sizes."""

    model_type = "beholder"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(
        self,
        text_config: Any = None,
        vision: dict[str, Any] | None = None,
        connector: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        if text_config is None:  # transformers makes an empty one to compare with
            text_config = {"model_type": "llama"}
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config, self.vision, self.connector = text_config, vision or {}, connector or {}
        self.image_token_id = image_token_id
        kwargs["tie_word_embeddings"] = bool(getattr(text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)


# ---------------------------------------------------------------------------------------------------------------
# The tower


class VisionTower(nn.Module):
    """Normalised pixels ``[m, 3, h, w]`` → patches ``[m, P, Dv]``."""

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        if "timm" in settings:
            import timm

            self.backbone: Any = timm.create_model(settings["timm"], pretrained=False, num_classes=0)
        else:
            config = AutoConfig.for_model(**settings["config"])
            self.backbone = getattr(transformers, settings["class"])._from_config(config)
            if getattr(self.backbone, "use_head", False):  # never used here, and not in the file
                self.backbone.use_head = False
                del self.backbone.head
            if settings["class"].startswith(("ViT", "DeiT")):
                self.backbone.pooler = None

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        layer, patches = self.settings["layer"], self.settings["patches"]
        if "timm" in self.settings:
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            if layer == -1:
                out = self.backbone.forward_features(pixels)
            else:
                out = self.backbone.forward_intermediates(
                    pixels, indices=[layer], intermediates_only=True, output_fmt="NCHW"
                )[0]
        else:
            extra = {"interpolate_pos_encoding": True} if self.settings["interpolate"] else {}
            if layer == -1:
                out = self.backbone(pixel_values=pixels, **extra).last_hidden_state
            else:
                out = self.backbone(pixel_values=pixels, output_hidden_states=True, **extra).hidden_states[layer]
        if patches["axes"] == "nchw":
            return out.flatten(2).transpose(1, 2)
        if patches["axes"] == "nhwc":
            return out.flatten(1, 2)
        if out.shape[0] == 1 and len(pixels) > 1:  # all images in one row
            out = out.reshape(len(pixels), -1, out.shape[2])
        return out[:, patches["first"] : patches["first"] + patches["count"]]


# ---------------------------------------------------------------------------------------------------------------
# The connector


class CrossAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_latents, self.norm_patches = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, latents: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        m, n, d = latents.shape
        latents = self.norm_latents(latents)
        both = self.kv(torch.cat([self.norm_patches(patches), latents], dim=1))
        k, v = both.view(m, -1, 2, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        q = self.q(latents).view(m, n, self.num_heads, -1).transpose(1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(m, n, d))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Perceiver(nn.Module):
    """Learned latents read the patches."""

    def __init__(self, d_in: int, num_tokens: int, depth: int, num_heads: int, dim: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(num_tokens, dim))
        self.input = nn.Identity() if d_in == dim else nn.Linear(d_in, dim)
        self.attention = nn.ModuleList(CrossAttention(dim, num_heads) for _ in range(depth))
        self.feed_forward = nn.ModuleList(FeedForward(dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        patches = self.input(patches)
        latents = self.latents.expand(patches.shape[0], -1, -1)
        for attention, feed_forward in zip(self.attention, self.feed_forward, strict=True):
            latents = latents + attention(latents, patches)
            latents = latents + feed_forward(latents)
        return self.norm(latents)


class Pool(nn.Module):
    """Resamplers without weights."""

    def __init__(self, kind: str, num_patches: int, num_tokens: int) -> None:
        super().__init__()
        self.kind, self.side, self.side_out = kind, int(num_patches**0.5 + 0.5), int(num_tokens**0.5 + 0.5)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        m, _, d = patches.shape
        match self.kind:
            case "mean_pool":
                return patches.mean(1, keepdim=True)
            case "grid":
                grid = patches.transpose(1, 2).reshape(m, d, self.side, self.side)
                return F.adaptive_avg_pool2d(grid, self.side_out).flatten(2).transpose(1, 2)
            case "pixel_shuffle":
                t, f = self.side_out, self.side // self.side_out
                blocks = patches.view(m, t, f, t, f, d).permute(0, 1, 3, 2, 4, 5)
                return blocks.reshape(m, t * t, f * f * d)
            case _:
                return patches


class Mlp(nn.Module):
    def __init__(self, d_in: int, hidden: int, d_out: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_in, hidden), nn.Linear(hidden, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Linear(nn.Module):
    def __init__(self, d_in: int, d_out: int, bias: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(d_in, d_out, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)


class OutputNorm(nn.Module):
    """RMSNorm to the size that rows of the language model's table have."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=1e-10)


class Connector(nn.Module):
    """Patches ``[m, P, Dv]`` → visual tokens ``[m, N, Dh]``, in fp32."""

    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        self.vision_ln = nn.LayerNorm(c["d_vision"]) if c["vision_ln"] else None
        if c["resampler"] == "perceiver":
            self.resampler: nn.Module = Perceiver(
                c["d_vision"], c["num_visual_tokens"], c["depth"], c["num_heads"], c["d_resampler"]
            )
        else:
            self.resampler = Pool(c["resampler"], c["num_patches"], c["num_visual_tokens"])
        if c["projector"] == "mlp":
            self.projector: nn.Module = Mlp(c["d_resampler"], c["hidden"], c["d_text"])
        else:
            self.projector = Linear(c["d_resampler"], c["d_text"], c.get("bias", True))
        self.output_norm = OutputNorm(c["d_text"]) if c["output_norm"] == "rms" else None

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        with torch.autocast(patches.device.type, enabled=False):
            x = patches.float()
            if self.vision_ln is not None:
                x = self.vision_ln(x)
            x = self.projector(self.resampler(x))
            return x if self.output_norm is None else self.output_norm(x)


# ---------------------------------------------------------------------------------------------------------------
# The whole


class BeholderForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Images at the positions of ``image_token_id``, one run of positions an image, in their order."""

    config_class = BeholderConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # pyright: ignore[reportAssignmentType] (as transformers' own classes)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["connector"]  # noqa: RUF012

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.vision_tower = VisionTower(config.vision)
        self.connector = Connector(config.connector)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Weights come from files; nothing is drawn."""

    def get_input_embeddings(self) -> Any:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: Any) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> Any:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Visual tokens ``[m, N, Dh]`` of normalised pixels ``[m, 3, h, w]``."""
        weight = next(self.vision_tower.parameters())
        return self.connector(self.vision_tower(pixel_values.to(weight.dtype)))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, one of the two")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            if input_ids is None:
                raise ValueError("with pixel_values, give input_ids, which say where the images go")
            assert inputs_embeds is not None
            tokens = self.get_image_features(pixel_values)
            places = input_ids == self.config.image_token_id
            if int(places.sum()) != tokens.shape[0] * tokens.shape[1]:
                raise ValueError(
                    f"{tokens.shape[0]} images give {tokens.shape[0] * tokens.shape[1]} visual tokens, but input_ids "
                    f"have {int(places.sum())} places for them"
                )
            inputs_embeds = inputs_embeds.masked_scatter(
                places.unsqueeze(-1), tokens.to(inputs_embeds.device, inputs_embeds.dtype)
            )
        if labels is not None:
            kwargs["labels"] = labels
        return self.language_model(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip
