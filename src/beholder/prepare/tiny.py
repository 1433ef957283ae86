"""Tiny random parts and a tiny picture set, so that any recipe runs end to end on a CPU in seconds.

The parts are the real classes (Qwen3, Llama, SigLIP, CLIP, DINOv2, RepViT) with small numbers, saved to disk the way
real checkpoints are, and loaded through the same doors. The pictures show one coloured shape each, and only the picture
says which: a model that does not look cannot get the caption right. No training code lives here.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw

from beholder.config import MONITORED, DatasetKind, DistillConfig, RunConfig, SourceConfig, settings
from beholder.config.file import dump_config, parse_config, without_inert
from beholder.config.tree import get_at
from beholder.model.weights import quiet_transformers
from beholder.train.distributed import init_distributed

LlmFamily = Literal["qwen3", "llama", "smollm2"]
NativeFamily = Literal[
    "qwen3_vl", "qwen2_5_vl", "llava", "llava_onevision", "idefics3", "smolvlm", "internvl", "gemma3"
]
VisionFamily = Literal["siglip", "clip", "dinov2", "repvit"]

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VISION_CONTROL = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

CHATML_PARTS = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML as native models have it: messages in parts, the template places images. IMAGE: what it writes for one."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30), "green": (30, 160, 50), "blue": (30, 60, 220), "yellow": (240, 220, 40),
    "pink": (250, 120, 190), "brown": (120, 70, 30), "cyan": (60, 210, 220), "violet": (130, 50, 180),
}  # fmt: skip
SHAPES = {"square": "box", "disc": "dot", "triangle": "tri"}
"""Name of each shape, and the short one that short captions use."""
GROUNDS: dict[str, tuple[int, int, int]] = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (0, 0, 0)}


# ---------------------------------------------------------------------------------------------------------------
# Parts


def tiny_tokenizer(
    folder: Path | str,
    family: LlmFamily = "qwen3",
    *,
    more: Sequence[str] = (),
    named: Mapping[str, str] | None = None,
    chat_template: str = CHATML,
    eos: str | None = None,
) -> Any:
    """A byte vocabulary with ChatML control tokens, saved in ``folder``: byte-level BPE without merges, so any text
    round-trips and one ASCII character is one token.

    qwen3 also has the native vision tokens; llama puts ``<s>`` before every text, as the Llama tokenizers do; smollm2
    has neither. ``more``: further control tokens; ``named``: such that are attributes of the tokenizer as well. Returns
    the `PreTrainedTokenizerFast`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    control = (
        *CONTROL,
        *(VISION_CONTROL if family == "qwen3" else ()),
        *(("<s>",) if family == "llama" else ()),
        *more,
        *(named or {}).values(),
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(control))
    special: dict[str, str] = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    if family == "qwen3":  # the base models end at <|endoftext|>
        special["eos_token"] = "<|endoftext|>"
    special |= {} if eos is None else {"eos_token": eos}
    if family == "llama":
        bos = inner.token_to_id("<s>")
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
        )
        special["bos_token"] = "<s>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        clean_up_tokenization_spaces=False,
        additional_special_tokens=list(control),
        **special,
        **({"extra_special_tokens": dict(named)} if named else {}),
    )
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def tiny_llm(folder: Path | str, family: LlmFamily = "qwen3", *, seed: int = 0, **overrides: Any) -> Path:
    """A random causal language model with its tokenizer in ``folder``: width 64, 2 layers, 4 heads on 2 key heads.

    The head is tied for smollm2; qwen3 and llama have one of their own, and qwen3 more rows than its tokenizer has
    tokens. ``overrides`` are fields of the transformers config. Weights depend on ``seed`` and the config alone.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    folder = Path(folder)
    tokenizer = tiny_tokenizer(folder, family)
    settings: dict[str, Any] = {
        "vocab_size": 320 if family == "qwen3" else len(tokenizer), "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 4096, "tie_word_embeddings": family == "smollm2",
        # 1/sqrt(64), about the scale of trained matrices: at transformers' 0.02 the layers of so narrow a model do next
        # to nothing. With 0.3 a connector learns the colour set in a hundred steps (tests/prepare/test_tiny.py).
        "initializer_range": 0.12,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | overrides  # fmt: skip
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        if family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**settings))
        else:
            model = LlamaForCausalLM(LlamaConfig(**settings))
        model.save_pretrained(folder)
    return folder


def tiny_vision(
    folder: Path | str, family: VisionFamily = "siglip", *, seed: int = 0, **overrides: Any
) -> tuple[str, str | None]:
    """A random vision tower saved in ``folder``; ``(name_or_path, weights)`` as `VisionConfig` takes them.

    siglip: a whole SigLIP checkpoint (text half too, as on the hub), 32 x 32 pixels, 16 patches. clip: the same with a
    class token. dinov2: trained at 42 but used at 28 pixels after a centre crop, 4 patches. repvit:
    ``timm/repvit_m0_9`` and its safetensors file, 224 x 224 pixels, 49 positions of a feature map. ``overrides`` are
    fields of the vision config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        if family == "repvit":
            import timm
            from safetensors.torch import save_file

            model = timm.create_model("repvit_m0_9", pretrained=False, num_classes=0, **overrides)
            path = folder / "model.safetensors"
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
            return "timm/repvit_m0_9", str(path)
        _tiny_hf_vision(family, overrides).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPROCESSORS[family], indent=2))
    return str(folder), None


def _tiny_hf_vision(family: VisionFamily, overrides: dict[str, Any]) -> Any:
    from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

    size: dict[str, Any] = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text: dict[str, Any] = {
        **size, "intermediate_size": 96, "vocab_size": 64, "max_position_embeddings": 16, "projection_size": 48,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    if family == "dinov2":
        own: dict[str, Any] = {"mlp_ratio": 2, "image_size": 42, "patch_size": 14, "initializer_range": 0.1}
        return Dinov2Model(Dinov2Config(**(size | own | overrides)))
    own = {"intermediate_size": 96, "image_size": 32, "patch_size": 8}
    vision = size | own | overrides
    if family == "clip":
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"projection_dim": 48}, projection_dim=48))
    return SiglipModel(SiglipConfig(text_config=text, vision_config=vision))


_EVERY: dict[str, Any] = {
    "do_resize": True, "size": {"shortest_edge": 32}, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True,
}  # fmt: skip
_PREPROCESSORS: dict[str, dict[str, Any]] = {
    "siglip": _EVERY | {
        "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor",
        "size": {"height": 32, "width": 32}, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    },
    "clip": _EVERY | {
        "image_processor_type": "CLIPImageProcessor", "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_center_crop": True, "crop_size": {"height": 32, "width": 32},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "dinov2": _EVERY | {
        "image_processor_type": "BitImageProcessor", "do_convert_rgb": True,
        "do_center_crop": True, "crop_size": {"height": 28, "width": 28},
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    },
}  # fmt: skip
"""The preprocessor files of the real checkpoints with small sizes; written as they are, since transformers' own image
processor classes differ with torchvision present or absent."""


def tiny_native(folder: Path | str, family: NativeFamily = "qwen3_vl", *, seed: int = 0) -> Path:
    """A random whole vision-language model with its processor in ``folder``, as its class is on the hub: a language
    model of width 64 with 4 layers, a tower of 3 blocks. The Qwens take images of any size, as 2 x 2 to 8 x 8 visual
    tokens; LLaVA and Gemma 3 32 x 32 pixels; Idefics3, SmolVLM, InternVL and LLaVA-OneVision 32 x 32 in up to 2 x 2
    tiles.
    """
    import transformers

    folder = Path(folder)
    processor = _tiny_processor(folder, family)
    name, settings = _tiny_native(family, processor.tokenizer)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**settings)
        model = getattr(transformers, f"{name}ForConditionalGeneration")(config)
        for key, weight in model.named_parameters():
            if "projection_weight" in key:  # Gemma's begins as zeros, with which no picture would be seen
                torch.nn.init.normal_(weight, 0, 0.12)
        model.save_pretrained(folder)
    return folder


def _tiny_native(family: NativeFamily, tokenizer: Any) -> tuple[str, dict[str, Any]]:
    """(class, its configuration) of a tiny native model."""
    text: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096,
        "initializer_range": 0.12, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    eyes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.12, "patch_size": 8}

    def at(token: str) -> int:
        return tokenizer.convert_tokens_to_ids(token)

    match family:
        case "qwen3_vl" | "qwen2_5_vl":
            rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]}
            eyes |= {
                "depth": 3, "num_heads": 2, "out_hidden_size": 64, "spatial_merge_size": 2, "temporal_patch_size": 2,
            }  # fmt: skip
            if family == "qwen3_vl":
                eyes |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
            else:
                eyes |= {"window_size": 32, "fullatt_block_indexes": [1]}
            return "Qwen3VL" if family == "qwen3_vl" else "Qwen2_5_VL", {
                "text_config": text | {"rope_parameters": rope, "tie_word_embeddings": True}, "vision_config": eyes,
                "image_token_id": at("<|image_pad|>"), "video_token_id": at("<|video_pad|>"),
                "vision_start_token_id": at("<|vision_start|>"), "vision_end_token_id": at("<|vision_end|>"),
                "tie_word_embeddings": True,
            }  # fmt: skip
        case "llava":
            eyes |= {"model_type": "clip_vision_model", "num_hidden_layers": 3, "num_attention_heads": 2}
            return "Llava", {
                "text_config": text | {"model_type": "llama"}, "image_token_index": at("<image>"),
                "vision_config": eyes | {"image_size": 32, "projection_dim": 32}, "image_seq_length": 16,
                "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            }  # fmt: skip
        case "llava_onevision":
            eyes |= {"model_type": "siglip_vision_model", "num_hidden_layers": 3, "num_attention_heads": 2}
            return "LlavaOnevision", {
                "text_config": text | {"model_type": "qwen2"}, "image_token_index": at("<image>"),
                "video_token_index": at("<video>"), "vision_feature_layer": -1,
                "vision_config": eyes | {"image_size": 32, "vision_use_head": False},
                "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
                "image_grid_pinpoints": _PINPOINTS,
            }  # fmt: skip
        case "gemma3":
            eyes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
            return "Gemma3", {
                "text_config": text | {"sliding_window": 24, "query_pre_attn_scalar": 16}, "vision_config": eyes,
                "mm_tokens_per_image": 4, "image_token_index": at("<image_soft_token>"),
                "boi_token_index": at("<start_of_image>"), "eoi_token_index": at("<end_of_image>"),
            }  # fmt: skip
        case "internvl":
            eyes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": [32, 32], "patch_size": [8, 8]}
            return "InternVL", {
                "text_config": text | {"model_type": "qwen2"}, "vision_config": eyes, "image_seq_length": 4,
                "image_token_id": at("<IMG_CONTEXT>"),
            }  # fmt: skip
        case "idefics3" | "smolvlm":
            eyes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 32}
            return "Idefics3" if family == "idefics3" else "SmolVLM", {
                "text_config": text | {"model_type": "llama"}, "vision_config": eyes, "scale_factor": 2,
                "image_token_id": at("<image>"), "pad_token_id": tokenizer.pad_token_id,
            }  # fmt: skip


def _tiny_processor(folder: Path, family: NativeFamily) -> Any:
    from transformers import AutoProcessor

    qwen = family in ("qwen3_vl", "qwen2_5_vl")
    place = "'<|vision_start|><|image_pad|><|vision_end|>'" if qwen else "'<image>'"
    more = ["<|video_pad|>"] if qwen else ["<image>"]
    named: dict[str, str] = {}
    if family == "llava_onevision":
        more = ["<image>", "<video>"]
    if family == "internvl":
        more, place = [], "'<IMG_CONTEXT>\n'"
        named = {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }  # fmt: skip
    if family == "gemma3":
        more, place = [], "'<start_of_image>'"
        named = {
            "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
        }  # fmt: skip
    if family in ("idefics3", "smolvlm"):
        tiles = [f"<row_{r + 1}_col_{c + 1}>" for r in range(6) for c in range(6)]
        more += ["<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *tiles]
    template = CHATML_PARTS.replace("IMAGE", place)
    base: LlmFamily = "qwen3" if qwen else "smollm2"
    tiny_tokenizer(folder, base, more=more, named=named, chat_template=template, eos="<|im_end|>")
    images, own, video = _NATIVE_PROCESSORS[family]
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
    (folder / "processor_config.json").write_text(json.dumps(own, indent=2))
    if video:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return AutoProcessor.from_pretrained(str(folder))


_HALF: dict[str, Any] = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_QWEN: dict[str, Any] = _HALF | {
    "image_processor_type": "Qwen2VLImageProcessor", "patch_size": 8, "merge_size": 2, "temporal_patch_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128},
}  # fmt: skip
_TILES: dict[str, Any] = _HALF | {
    "size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, "do_image_splitting": True,
    "do_resize": True, "do_rescale": True, "do_normalize": True, "do_pad": True, "do_convert_rgb": True, "resample": 1,
}  # fmt: skip
_PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]
_NATIVE_PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "qwen3_vl": (
        _QWEN, {"processor_class": "Qwen3VLProcessor"},
        {"video_processor_type": "Qwen3VLVideoProcessor", "patch_size": 8, "merge_size": 2},
    ),
    "qwen2_5_vl": (
        _QWEN, {"processor_class": "Qwen2_5_VLProcessor"},
        {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 8, "merge_size": 2},
    ),
    "llava": (
        _PREPROCESSORS["clip"],
        {
            "processor_class": "LlavaProcessor", "patch_size": 8, "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1, "image_token": "<image>",
        },
        {},
    ),
    "llava_onevision": (
        _HALF | {
            "image_processor_type": "LlavaOnevisionImageProcessor", "do_resize": True, "do_rescale": True,
            "do_normalize": True, "do_pad": True, "do_convert_rgb": True, "resample": 3,
            "size": {"height": 32, "width": 32}, "image_grid_pinpoints": _PINPOINTS,
        },
        {
            "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": 16, "image_token": "<image>",
            "video_token": "<video>", "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_9",
        },
        {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": {"height": 32, "width": 32}},
    ),
    "idefics3": (
        _TILES | {"image_processor_type": "Idefics3ImageProcessor"},
        {"processor_class": "Idefics3Processor", "image_seq_len": 4},
        {},
    ),
    "smolvlm": (
        _TILES | {"image_processor_type": "SmolVLMImageProcessor"},
        {"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
        {"video_processor_type": "SmolVLMVideoProcessor", "size": {"longest_edge": 32}},
    ),
    "gemma3": (
        _EVERY | _HALF | {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}},
        {"processor_class": "Gemma3Processor", "image_seq_length": 4},
        {},
    ),
    "internvl": (
        _EVERY | _HALF | {
            "image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 32, "width": 32},
            "crop_to_patches": True, "min_patches": 1, "max_patches": 4, "do_convert_rgb": True,
        },
        {"processor_class": "InternVLProcessor", "image_seq_length": 4},
        {"video_processor_type": "InternVLVideoProcessor", "size": {"height": 32, "width": 32}},
    ),
}  # fmt: skip
"""Of each family: preprocessor_config.json, processor_config.json and, where it has one, the video processor's."""


# ---------------------------------------------------------------------------------------------------------------
# Data


def colour_set(
    folder: Path | str,
    num: int,
    *,
    seed: int = 0,
    captions: Literal["caption", "varied", "conversations"] = "caption",
    num_images: int = 1,
) -> tuple[Path, Path]:
    """``num`` records about pictures of one shape in one of 8 colours; ``(records.jsonl, image_root)``.

    caption: "a red square on white" (always white). varied: the ground is white, grey or black, and the caption is
    short, medium or long accordingly, so that length buckets fill. conversations: as caption, in LLaVA's two-turn form.
    With ``num_images`` above 1 the caption reads "Image 1: red disc. Image 2: …". All 24 combinations appear equally
    often; place and size of the shape vary, so no two pictures are equal. Captions have at most 60 bytes.
    """
    records = _records(num, seed, varied=captions == "varied", num_images=num_images)
    rows = [_two_turns(r) if captions == "conversations" else _captioned(r) for r in records]
    return _write(Path(folder) / "records.jsonl", rows), _draw(records, Path(folder) / "images")


def colour_source(
    folder: Path | str, kind: DatasetKind, num: int, *, seed: int = 0, name: str | None = None, dialogues: bool = False,
    most_images: int = 1,
) -> SourceConfig:  # fmt: skip
    """The varied colour set on disk as the given kind of data set, and the source setting that reads it.

    llava_instruct and sharegpt: two or three questions about each picture, answered in words, sentences or several
    sentences, so that length buckets fill. vqa and gqa: one question about each, for its colour, its shape, or whether
    it shows what it does not always show; vqa with ten answers, of which two may be wrong. ``dialogues``: jsonl holds
    such conversations instead of captions. ``most_images`` above 1: a question about one of 1 to 4 pictures a record,
    by its number; parquet as Mantis-Instruct has them (question files have one picture all the same).
    """
    folder = Path(folder)
    if kind == "auto":
        kind = "jsonl"
    if kind == "jsonl" and not dialogues:
        path, root = colour_set(folder, num, seed=seed, captions="varied")
        return SourceConfig(dataset=kind, json_path=str(path), image_root=str(root), name=name)
    folder.mkdir(parents=True, exist_ok=True)
    several = most_images > 1 and kind in ("jsonl", "parquet", "llava_pretrain", "llava_instruct", "sharegpt")
    records = _records(num, seed, varied=True, num_images=min(most_images, 4) if several else 1)
    if several:
        return _several_source(folder, kind, records, name)
    if kind == "webdataset":
        for shard, half in enumerate((records[::2], records[1::2])):
            with tarfile.open(folder / f"shard-{shard:06d}.tar", "w") as tar:
                for record in half:
                    for suffix, data in (("png", _png(record["pictures"][0])), ("txt", record["caption"].encode())):
                        member = tarfile.TarInfo(f"{record['id']}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return SourceConfig(dataset=kind, json_path=str(folder / "shard-*.tar"), name=name)
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({
            "id": [r["id"] for r in records],
            "image": [{"bytes": _png(r["pictures"][0]), "path": r["images"][0]} for r in records],
            "caption": [r["caption"] for r in records],
        })  # fmt: skip
        pq.write_table(table, folder / "records.parquet")
        return SourceConfig(dataset=kind, json_path=str(folder / "records.parquet"), name=name)
    root = _draw(records, folder / "images")
    beside: dict[str, Any] = {}
    match kind:
        case "llava_pretrain":
            data: Any = [_two_turns(r) for r in records]
        case "jsonl" | "llava_instruct" | "sharegpt":
            data = [_dialogue(r, system=kind == "sharegpt" and i % 2 == 1) for i, r in enumerate(records)]
        case "vqa":
            data, annotations = _vqa_files(records)
            annotations_path = _write(folder / "annotations.json", annotations, lines=False)
            beside = {"annotations_path": str(annotations_path), "image_pattern": "{image_id}.png"}
        case _:
            assert kind == "gqa", kind
            data, beside = _gqa_file(records), {"image_pattern": "{image_id}.png"}
    path = _write(folder / "records.json", data, lines=kind == "jsonl")
    return SourceConfig(dataset=kind, json_path=str(path), image_root=str(root), name=name, **beside)


def _several_source(
    folder: Path, kind: DatasetKind, records: Sequence[dict[str, Any]], name: str | None
) -> SourceConfig:
    """A question about one of the pictures of each record, which has 1, 2, 3, 4 and again 1 of them; the answer's place
    goes through all of them. As Mantis-Instruct's parquet, LLaVA-Interleave's JSON or JSON lines."""
    asked = []
    for i, record in enumerate(records):
        n = i % len(record["images"]) + 1
        k = i // len(record["images"]) % n
        about = f"in image {k + 1}" if n > 1 else "here"
        colour, shape = record["shown"][k]
        question, answer = f"What colour is the shape {about}?", colour
        if i // 2 % 2:
            question, answer = f"Which shape is {about}?", shape
        answer = {  # of three lengths, as in `_dialogue`
            "white": answer,
            "grey": f"What the picture in question shows in front of a grey wall is best called {answer}.",
            "black": f"The wall of the picture in question is black all over, and what stands in front of it, in the "
            f"middle or thereabouts, is best called {answer}.",
        }[record["ground"]]
        asked.append((record, n, "<image>\n" * n + question, answer))
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.table({
            "id": [r["id"] for r, *_ in asked],
            "images": [
                [{"bytes": _png(p), "path": None} for p in r["pictures"][:n]] for r, n, *_ in asked
            ],
            "conversation": [
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}] for *_, q, a in asked
            ],
            "source": ["colours"] * len(asked),
        })  # fmt: skip
        pq.write_table(table, folder / "records.parquet")
        return SourceConfig(dataset=kind, json_path=str(folder / "records.parquet"), name=name)
    root = _draw(records, folder / "images")
    data: list[dict[str, Any]] = []
    for record, n, question, answer in asked:
        images = record["images"][:n]
        if kind == "jsonl":
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            data.append({"id": record["id"], "images": images, "messages": turns})
        else:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            data.append({"id": record["id"], "image": images if n > 1 else images[0], "conversations": turns})
    path = _write(folder / "records.json", data, lines=kind == "jsonl")
    return SourceConfig(dataset=kind, json_path=str(path), image_root=str(root), name=name)


def _draw(records: Sequence[dict[str, Any]], root: Path) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for record in records:
        for name, image in zip(record["images"], record["pictures"], strict=True):
            image.save(root / name)
    return root


def _write(path: Path, data: Any, lines: bool = True) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in data) if lines else json.dumps(data), encoding="utf-8")
    return path


def _records(num: int, seed: int, *, varied: bool, num_images: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    kinds = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    # Whole rounds of all kinds, each in a random order: every prefix is as balanced as it can be.
    rounds = -(-num * num_images // len(kinds))
    order = iter([kinds[i] for _ in range(rounds) for i in rng.permutation(len(kinds))])
    records: list[dict[str, Any]] = []
    for i in range(num):
        shown = [next(order) for _ in range(num_images)]
        ground = list(GROUNDS)[int(rng.integers(3))] if varied else "white"
        if num_images > 1:
            caption = " ".join(f"Image {k + 1}: {colour} {shape}." for k, (colour, shape) in enumerate(shown))
        else:
            caption = _caption(shown[0], ground, varied)
        records.append({
            "id": f"colour-{seed}-{i:05d}", "caption": caption,
            "images": [f"{seed}-{i:05d}-{k}.png" for k in range(num_images)],
            "shown": shown, "ground": ground,
            "pictures": [_picture(colour, shape, ground, rng) for colour, shape in shown],
        })  # fmt: skip
    return records


def _caption(shown: tuple[str, str], ground: str, varied: bool) -> str:
    colour, shape = shown
    if not varied:
        return f"a {colour} {shape} on {ground}"
    # At most 10, 11 to 20, and more bytes: the seed's len_buckets.
    return {
        "white": f"{colour} {SHAPES[shape]}",
        "grey": f"the {colour} {shape}",
        "black": f"a picture of a {colour} {shape} on a black wall",
    }[ground]


def _picture(colour: str, shape: str, ground: str, rng: np.random.Generator, side: int = 40) -> Image.Image:
    image = Image.new("RGB", (side, side), GROUNDS[ground])
    size = int(rng.integers(16, 29))
    x, y = (int(v) for v in rng.integers(2, side - size - 1, size=2))
    box = (x, y, x + size, y + size)
    draw = ImageDraw.Draw(image)
    match shape:
        case "square":
            draw.rectangle(box, fill=COLOURS[colour])
        case "disc":
            draw.ellipse(box, fill=COLOURS[colour])
        case _:
            draw.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=COLOURS[colour])
    # A barely visible speck makes every picture's bytes its own.
    speck = tuple(int(v) for v in rng.integers(0, 256, size=3))
    image.putpixel((int(rng.integers(side)), 0), (speck[0], speck[1], speck[2]))
    return image


def _captioned(record: dict[str, Any]) -> dict[str, Any]:
    return {"id": record["id"], "images": record["images"], "caption": record["caption"], "source": "colours"}


def _two_turns(record: dict[str, Any]) -> dict[str, Any]:
    images = record["images"]
    human = "<image>\n" * len(images) + "Provide a brief description of the given image."
    return {
        "id": record["id"],
        "image": images[0] if len(images) == 1 else images,
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": record["caption"]}],
    }


def _dialogue(record: dict[str, Any], *, system: bool) -> dict[str, Any]:
    """Questions about the one picture of a record, in LLaVA's form.

    By the picture's ground the answers together have at most 64, 65 to 128, or more bytes: the seed's len_buckets.
    """
    (colour, shape), ground = record["shown"][0], record["ground"]
    asked = {
        "white": [("What colour is it?", colour), ("Which shape is it?", shape)],
        "grey": [
            ("What colour is it?", f"The shape in the picture is {colour}."),
            ("Which shape is it?", f"It is a {shape} in front of a grey wall."),
        ],
        "black": [
            ("What colour is it?", f"The shape in this picture has one colour, and it is {colour}."),
            ("Which shape is it?", f"What the picture shows is a {shape}."),
            ("Describe the picture.", f"A {colour} {shape} in front of a wall that is black all over."),
        ],
    }[ground]
    turns = [{"from": "system", "value": "You answer questions about pictures."}] if system else []
    for k, (question, answer) in enumerate(asked):
        turns.append({"from": "human", "value": question if k else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": answer})
    return {"id": record["id"], "image": record["images"][0], "conversations": turns}


def _question(record: dict[str, Any], i: int) -> tuple[str, str, str, str]:
    """(question, answer, its kind, kind of answer); colour, shape and yes/no in turn, as often yes as no."""
    colour, shape = record["shown"][0]
    match i % 4:
        case 0:
            return "What colour is it?", colour, "what colour", "other"
        case 2:
            return "Which shape is it?", shape, "which shape", "other"
        case k:
            other = list(SHAPES)[(list(SHAPES).index(shape) + 1) % len(SHAPES)]
            return f"Is it a {shape if k == 1 else other}?", "yes" if k == 1 else "no", "is it a", "yes/no"


def _vqa_files(records: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A question file and its annotation file, as VQA-v2 has them."""
    asked, annotated = [], []
    for i, record in enumerate(records):
        question, answer, kind, answer_type = _question(record, i)
        image_id = record["images"][0].removesuffix(".png")
        asked.append({"image_id": image_id, "question": question, "question_id": i})
        said = [answer] * 8 + ["a shape" if answer_type == "other" else answer] * 2
        annotated.append({
            "question_id": i, "image_id": image_id, "question_type": kind, "answer_type": answer_type,
            "multiple_choice_answer": answer,
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(said, 1)],
        })  # fmt: skip
    return {"data_subtype": "train2014", "questions": asked}, {"data_subtype": "train2014", "annotations": annotated}


def _gqa_file(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    questions: dict[str, Any] = {}
    for i, record in enumerate(records):
        question, answer, _, answer_type = _question(record, i)
        types = {"semantic": "attr", "structural": "verify" if answer_type == "yes/no" else "query"}
        image_id = record["images"][0].removesuffix(".png")
        questions[f"{i:08d}"] = {"question": question, "answer": answer, "imageId": image_id, "types": types}
    return questions


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Any recipe, tiny


def smoke_config(cfg: RunConfig, folder: Path | str, *, num_records: int = 64, steps: int = 4) -> RunConfig:
    """The recipe ``cfg`` on tiny parts and data made in ``folder``: same stage, kinds and switches, a few CPU steps.

    What changes: the parts' names, sizes and counts (records, steps, batches, evaluation and golden samples, new
    tokens), kernels and workers that a CPU run of seconds cannot use. The run folder is ``folder/run``.
    """
    folder = Path(folder)
    raw = cfg.model_dump()
    for setting in settings(RunConfig):
        *sections, name = setting.path.split(".")
        own = get_at(raw, tuple(sections))
        if setting.tiny is not None and own is not None:
            own[name] = setting.tiny.of(own[name])
    raw["model"] |= _smoke_parts(cfg, raw["model"], folder)
    if cfg.distill is not None:
        raw["distill"] |= _smoke_teachers(cfg.distill, Path(raw["model"]["llm"]["name_or_path"]), folder)
    half = max(1, steps // 2)
    raw["train"] |= {
        "train_steps": min(steps, cfg.train.train_steps or steps), "save_every": min(cfg.train.save_every, half),
        "full_eval_every": _sooner(cfg.train.full_eval_every, half),
    }  # fmt: skip
    raw["eval"] |= {
        "golden_size": min(cfg.golden_size, 3),
        "golden_set_path": str(folder / "golden.jsonl") if cfg.eval.golden_set_path and cfg.golden_size else None,
        "run_golden_every": _sooner(cfg.eval.run_golden_every, half),
    }  # fmt: skip
    # A smoke run has no images for monitors, and no gate of it is judged.
    raw["gates"] = {n: g for n, g in raw["gates"].items() if not str(g["measure"]).startswith(tuple(MONITORED))}
    raw["ablation"]["run_every"] = _sooner(cfg.ablation.run_every, half)
    raw["features"]["dir"] = str(folder / "features")
    raw["data"] |= _smoke_data(cfg, folder / "data", num_records)
    raw["output_dir"] = str(folder / "run")
    return without_inert(RunConfig.model_validate(raw))


def _smoke_parts(cfg: RunConfig, raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The tiny parts of a recipe's model, saved in ``folder``, as its ``model`` section names them."""
    if cfg.model.native is not None:
        native = tiny_native(folder / "native", _native_family(cfg.model.native.name_or_path))
        return {"native": raw["native"] | {"name_or_path": str(native)}, "llm": None, "vision": None}
    # A teacher's tokenizer has a few tokens more (`_smoke_teachers`).
    family = "smollm2" if cfg.distill else _llm_family(cfg.model.llm.name_or_path)
    llm = tiny_llm(folder / "llm", family, **({"vocab_size": 320} if cfg.distill else {}))
    vision, weights = tiny_vision(folder / "vision", _vision_family(cfg.model.vision.name_or_path))
    tokens = cfg.model.connector.tokens_asked
    few = min(tokens, 8) if cfg.model.connector.resampler.kind == "perceiver" and tokens is not None else None
    return {
        "llm": raw["llm"] | {"name_or_path": str(llm)},
        "vision": raw["vision"] | {"name_or_path": vision, "weights": weights},
        "connector": raw["connector"] | {"num_visual_tokens": few},
    }


def _smoke_teachers(cfg: DistillConfig, llm: Path, folder: Path) -> dict[str, Any]:
    """Tiny native teachers, asked while the student learns: what is kept of teachers would have to be made first. The
    student in ``llm`` gets their tokenizer."""
    from transformers import AutoTokenizer

    teachers = []
    for k, teacher in enumerate(cfg.teachers):
        native = tiny_native(folder / f"teacher{k}", "llava", seed=k)
        teachers.append({"native": str(native), "precision": "fp32", "weight": teacher.weight})
        AutoTokenizer.from_pretrained(str(native)).save_pretrained(str(llm))
    return {"teachers": tuple(teachers), "online": True}


def _sooner(every: str | int, steps: int) -> str | int:
    return every if isinstance(every, str) else steps


def _smoke_data(cfg: RunConfig, folder: Path, num_records: int) -> dict[str, Any]:
    data = cfg.data

    def shrink(sources: Sequence[SourceConfig], group: str) -> tuple[SourceConfig, ...]:
        made = []
        for i, source in enumerate(sources):
            own = colour_source(
                folder / f"{group}{i}", source.dataset, num_records, seed=len(group) * 100 + i,
                dialogues=cfg.stage_record.dialogues, most_images=cfg.max_images if cfg.stage_record.dialogues else 1,
            )  # fmt: skip
            made.append(own.model_copy(update={"name": source.name, "cap": source.cap, "weight": source.weight}))
        return tuple(made)

    update: dict[str, Any] = {"eval_sources": shrink(data.eval_sources, "eval")}
    if data.sources:
        update["sources"] = shrink(data.sources, "train")
    else:
        one = shrink(data.train_sources, "train")[0]
        if one.image_pattern:  # which json_path has no place for
            update |= {"sources": (one,), "json_path": None, "image_root": None}
        else:
            update |= {"json_path": one.json_path, "image_root": one.image_root}
    update |= {
        "max_samples": num_records if data.max_samples else None,
        "eval_size": min(data.eval_size, num_records // 4) if data.eval_size else None,
        # The recipe's share of so few records may be none at all.
        "eval_ratio": None if data.eval_size or data.split == "none" else max(data.eval_ratio or 0.0, 0.2),
        "hygiene": data.hygiene.model_copy(update={
            # Byte tokens: a caption has 8 to 60 of them, a conversation up to 180, whatever bounds the recipe has.
            "min_tokens": min(cfg.hygiene.min_tokens, cfg.stage_record.hygiene.min_tokens),
            "max_tokens": None if cfg.hygiene.max_tokens is None else max(cfg.hygiene.max_tokens, 200),
            # The same 72 captions come back every 72 pictures, by design.
            "duplicates": "report",
        }),
    }  # fmt: skip
    return update


def _llm_family(name: str) -> LlmFamily:
    low = name.lower()
    return "qwen3" if "qwen" in low else "smollm2" if "smollm" in low else "llama"


def _native_family(name: str) -> NativeFamily:
    low = name.lower().replace("-", "").replace("_", "").replace(".", "")
    marks: tuple[tuple[str, NativeFamily], ...] = (
        ("qwen25", "qwen2_5_vl"), ("idefics", "idefics3"), ("smolvlm", "smolvlm"), ("internvl", "internvl"),
        ("gemma", "gemma3"), ("onevision", "llava_onevision"), ("llavaov", "llava_onevision"), ("llava", "llava"),
    )  # fmt: skip
    for mark, family in marks:
        if mark in low:
            return family
    return "qwen3_vl"


def _vision_family(name: str) -> VisionFamily:
    low = name.lower()
    if low.startswith("timm/"):
        return "repvit"
    return "dinov2" if "dino" in low else "clip" if "clip" in low and "siglip" not in low else "siglip"


def make_smoke(cfg: RunConfig, parent: Path) -> RunConfig:
    """`smoke_config` in a new folder ``parent/smoke_<run_name>_…``, made once however many processes share the job."""
    import tempfile

    dist = init_distributed(cfg.device)

    def make() -> str:
        parent.mkdir(parents=True, exist_ok=True)
        small = smoke_config(cfg, Path(tempfile.mkdtemp(prefix=f"smoke_{cfg.run_name}_", dir=parent)))
        title = f"{cfg.run_name[:150]} (smoke: tiny random parts)"  # of its report
        return dump_config(small.model_copy(update={"run_name": title}))

    return parse_config(dist.on_main(make), "smoke")
