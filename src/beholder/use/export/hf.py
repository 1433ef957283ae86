"""What transformers opens: settings, weights and processor, as a class of its own or as ours."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beholder.model.connector import PixelShuffle
from beholder.model.learned import narrowed
from beholder.model.native import NativeModel
from beholder.model.placement import without_adapters
from beholder.model.standard import IDEFICS3 as IDEFICS3_CLASS
from beholder.model.standard import OWN as OWN_CLASS
from beholder.model.standard import ExportClass, export_class
from beholder.model.vlm import VisionLanguageModel
from beholder.model.weights import check_finite
from beholder.train.trained import TrainedRun
from beholder.types import UserError
from beholder.use.export.adapters import ADAPTER, write_adapters
from beholder.use.export.template import IMAGE_TOKEN, chat_template, native_template
from beholder.use.export.weights import IDEFICS3, LLAVA, NATIVE, OWN, connector_state
from beholder.use.exported import CODE

PLACES = {OWN_CLASS: OWN, IDEFICS3_CLASS: IDEFICS3}
"""By exported class; the others are LLaVA's."""


def write(run: TrainedRun, folder: Path, *, beside: bool, max_shard_size: str) -> ExportClass:
    """All files but the proof; what class they are of."""
    from transformers import GenerationConfig

    model = run.model
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=256, eos_token_id=run.encoder.eos_ids, bos_token_id=run.tokenizer.bos_token_id,
        pad_token_id=run.tokenizer.eos_token_id if run.tokenizer.pad_token_id is None else run.tokenizer.pad_token_id,
    )  # fmt: skip
    if isinstance(model, NativeModel):
        _write_native(run, model, folder, generation, max_shard_size)
        written = ExportClass(type(model.whole).__name__)
        places = NATIVE
    else:
        written = _write_joined(run, model, folder, generation, max_shard_size)
        places = PLACES.get(written.name, LLAVA)
    if beside:
        write_adapters(model, folder / ADAPTER, places)
    return written


def joined_class(run: TrainedRun, model: VisionLanguageModel) -> ExportClass:
    """What a run that was joined of parts is exported as."""
    assert model.vision is not None
    return export_class(
        run.cfg.model.connector, run.cfg.model.vision, model.vision.backbone, model.language.model,
        model.geometry.num_patches,
    )  # fmt: skip


def _write_native(run: TrainedRun, model: NativeModel, folder: Path, generation: Any, max_shard_size: str) -> None:
    whole = model.whole
    state = without_adapters(
        whole, [part.prefix + site.name for part in model.parts().values() for site in part.adapters]
    )
    state = narrowed(state, [part] if (part := model.connector.part) is not None else [])
    check_finite(whole, "the model to export")
    blank, whole.generation_config = whole.generation_config, generation
    implementation = whole.config._attn_implementation
    try:
        whole.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)
    finally:
        whole.generation_config = blank
    assert whole.config._attn_implementation == implementation
    processor = copy.deepcopy(model.geometry.processor)
    processor.chat_template = native_template(run)
    processor.save_pretrained(folder)
    _scrub(folder, {})


def _write_joined(
    run: TrainedRun, model: VisionLanguageModel, folder: Path, generation: Any, max_shard_size: str
) -> ExportClass:
    assert model.vision is not None
    written = joined_class(run, model)
    tokenizer, token_id, token = _with_image_token(run)
    make = {IDEFICS3_CLASS: _idefics3, OWN_CLASS: _own}.get(written.name, _llava)
    exported = make(run, model, written, token_id)
    rows = model.language.vocab
    if token_id >= rows:
        exported.resize_token_embeddings(token_id + 1, mean_resizing=False)
        for table in (exported.get_input_embeddings(), exported.get_output_embeddings()):
            with torch.no_grad():
                table.weight[rows:] = 0
                if getattr(table, "bias", None) is not None:
                    table.bias[rows:] = 0
        generation.suppress_tokens = list(range(rows, token_id + 1))
    check_finite(exported, "the model to export")
    exported.generation_config = generation
    exported.save_pretrained(folder, max_shard_size=max_shard_size)
    if written.prevents:
        shutil.copy(CODE / "modeling_beholder.py", folder)
    _write_processor(run, model, folder, tokenizer, token, by_text=written.name == IDEFICS3_CLASS)
    own = "modeling_beholder."
    auto = {"AutoConfig": f"{own}BeholderConfig", "AutoModel": own + written.name,
            "AutoModelForImageTextToText": own + written.name}  # fmt: skip
    _scrub(folder, {"config.json": {"auto_map": auto}} if written.prevents else {})
    return written


def _with_image_token(run: TrainedRun) -> tuple[Any, int, str]:
    """The tokenizer with a token for images, its id and spelling; what it reads otherwise stays."""
    from transformers import AddedToken

    tokenizer = copy.deepcopy(run.tokenizer)
    vocabulary = tokenizer.get_vocab()
    added = tokenizer.get_added_vocab()
    token = next((t for t in ("<|image_pad|>", IMAGE_TOKEN) if t in added), None)
    if token is None:
        token = IMAGE_TOKEN
        if token in vocabulary:
            raise UserError(f"the tokenizer reads {token} as ordinary text, so it cannot mark images")
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
    return tokenizer, int(tokenizer.convert_tokens_to_ids(token)), token


def _filled(make: Any, state: dict[str, Tensor]) -> Any:
    """What ``make`` gives, without having drawn its weights, with these."""
    with torch.device("meta"):
        exported = make()
    state = {k: v.detach().clone() for k, v in state.items()}
    missing, unexpected = exported.load_state_dict(state, strict=False, assign=True)
    tied = {name for name, p in exported.named_parameters(remove_duplicate=False) if p.is_meta}
    exported.tie_weights()
    left = [n for n, p in exported.named_parameters() if p.is_meta]
    assert not unexpected and not left and set(missing) <= tied, (missing, unexpected, left)
    for parameter in exported.parameters():
        parameter.requires_grad_(False)
    return exported.eval()


def _text_config(model: VisionLanguageModel) -> Any:
    config = model.language.model.config
    if not type(model.language.model).__module__.startswith("transformers."):
        raise UserError(
            f"{model.language.name} brings code of its own (model.llm.trust_remote_code), so an export could not be "
            "loaded with transformers alone"
        )
    config = type(config)(**_plain(config.to_dict()))
    return config


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration without where it came from."""
    gone = (
        "_name_or_path",
        "transformers_version",
        "architectures",
        "quantization_config",
        "auto_map",
        "dtype",
        "torch_dtype",
    )
    return {k: v for k, v in settings.items() if k not in gone and not k.startswith("_attn")}


def _llava(run: TrainedRun, model: VisionLanguageModel, written: ExportClass, token_id: int) -> Any:
    import transformers

    assert model.vision is not None
    cfg = run.cfg.model
    backbone: Any = model.vision.backbone
    text = _text_config(model)
    vision = type(backbone.config)(**_plain(backbone.config.to_dict()))
    if hasattr(backbone, "use_head"):
        vision.vision_use_head = False
    clip = type(backbone).__name__ == "CLIPVisionModel"
    ours = connector_state(model)
    names = {"projector.fc1": "linear_1", "projector.fc2": "linear_2", "vision_ln": "projector_layernorm"}
    state = {
        f"model.multi_modal_projector.{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in ours.items()
    }
    state |= LLAVA.state(model)
    common: dict[str, Any] = {
        "vision_config": vision, "text_config": text, "image_token_index": token_id,
        "vision_feature_layer": cfg.vision.feature_layer, "projector_hidden_act": "gelu",
        "image_seq_length": model.num_visual_tokens,
    }  # fmt: skip
    if written.name.startswith("Vip"):
        assert model.connector.vision_ln is not None
        config = transformers.VipLlavaConfig(**common, projector_layernorm_eps=model.connector.vision_ln.eps)
        return _filled(lambda: transformers.VipLlavaForConditionalGeneration(config), state)
    config = transformers.LlavaConfig(
        **common, vision_feature_select_strategy="default" if clip else "full", multimodal_projector_bias=True
    )
    return _filled(lambda: transformers.LlavaForConditionalGeneration(config), state)


def _idefics3(run: TrainedRun, model: VisionLanguageModel, written: ExportClass, token_id: int) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3VisionConfig

    assert model.vision is not None
    backbone: Any = model.vision.backbone
    told, known = _plain(backbone.config.to_dict()), Idefics3VisionConfig().to_dict()
    vision = Idefics3VisionConfig(**{k: v for k, v in told.items() if k in known and k != "model_type"})
    text, resampler = _text_config(model), model.connector.resampler
    config = Idefics3Config(
        vision_config=vision, text_config=text, image_token_id=token_id, tie_word_embeddings=text.tie_word_embeddings,
        scale_factor=resampler.factor if isinstance(resampler, PixelShuffle) else 1,
    )  # fmt: skip
    projection = connector_state(model)["projector.fc.weight"]
    state = {"model.connector.modality_projection.proj.weight": projection} | IDEFICS3.state(model)
    return _filled(lambda: Idefics3ForConditionalGeneration(config), state)


def _own(run: TrainedRun, model: VisionLanguageModel, written: ExportClass, token_id: int) -> Any:
    from beholder.use.exported.modeling_beholder import BeholderConfig, BeholderForConditionalGeneration

    assert model.vision is not None
    cfg, tower = run.cfg.model, model.vision
    backbone: Any = tower.backbone
    assert tower.layout is not None
    patches = {"axes": tower.layout.axes, "first": tower.layout.first, "count": tower.layout.num_patches}
    settings: dict[str, Any] = {"layer": cfg.vision.feature_layer, "patches": patches}
    if cfg.vision.name_or_path.startswith("timm/"):
        settings["timm"] = cfg.vision.name_or_path.removeprefix("timm/").partition(".")[0]
    elif not type(backbone).__module__.startswith("transformers."):
        raise UserError(
            f"{tower.name} brings code of its own (model.vision.trust_remote_code), so an export could not be loaded "
            "with transformers alone"
        )
    else:
        config = _plain(backbone.config.to_dict()) | {"model_type": backbone.config.model_type}
        settings |= {"class": type(backbone).__name__, "config": config, "interpolate": tower.interpolates}
    r, c = cfg.connector.resampler, model.connector
    connector: dict[str, Any] = {k: v for k, v in c.info().items()} | {
        "d_resampler": c.resampler.d_out, "depth": r.depth, "num_heads": r.num_heads,
        "hidden": cfg.connector.projector.hidden or c.d_out, "bias": cfg.connector.projector.bias,
    }  # fmt: skip
    text = _text_config(model)
    made = BeholderConfig(
        text_config=text.to_dict() | {"model_type": text.model_type}, vision=settings, connector=connector,
        image_token_id=token_id,
    )  # fmt: skip
    state = {f"connector.{k}": v for k, v in connector_state(model).items()}
    state |= OWN.state(model)
    return _filled(lambda: BeholderForConditionalGeneration(made), state)


def _write_processor(
    run: TrainedRun, model: VisionLanguageModel, folder: Path, tokenizer: Any, token: str, *, by_text: bool
) -> None:
    from beholder.use.exported.processing_beholder import BeholderImageProcessor, BeholderProcessor

    g = model.geometry
    images = BeholderImageProcessor(
        height=g.height, width=g.width, resize=g.resize, resize_to=g.resize_to, resample=g.resample,
        image_mean=list(g.mean), image_std=list(g.std), max_megapixels=run.cfg.data.max_megapixels,
    )  # fmt: skip
    processor = BeholderProcessor(
        images, tokenizer, chat_template=chat_template(run, token), image_token=token,
        num_visual_tokens=model.num_visual_tokens, before=run.encoder.im_start_ids, after=run.encoder.im_end_ids,
        by_text=by_text,
    )  # fmt: skip
    processor.save_pretrained(folder)
    shutil.copy(CODE / "processing_beholder.py", folder)
    own = {"AutoProcessor": "processing_beholder.BeholderProcessor",
           "AutoImageProcessor": "processing_beholder.BeholderImageProcessor"}  # fmt: skip
    _scrub(folder, {"processor_config.json": {"auto_map": own}, "tokenizer_config.json": {"auto_map": {}}})
    told = json.loads((folder / "processor_config.json").read_text("utf-8"))
    told["image_processor"]["auto_map"] = {"AutoImageProcessor": own["AutoImageProcessor"]}
    (folder / "processor_config.json").write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", "utf-8")


def _scrub(folder: Path, more: dict[str, dict[str, Any]]) -> None:
    """Settings files with ``more`` in them, and without the places that parts were loaded from."""
    for path in sorted(folder.rglob("*.json")):
        if path.name in ("tokenizer.json", "vocab.json") or path.name.endswith(".index.json"):
            continue
        told = json.loads(path.read_text("utf-8"))
        if not isinstance(told, dict):
            continue
        for key, value in more.get(path.name, {}).items():
            told.pop(key, None)
            if value:
                told[key] = value
        path.write_text(json.dumps(_placeless(told), indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _placeless(value: Any) -> Any:
    if isinstance(value, dict):
        gone = ("_name_or_path", "name_or_path", "tokenizer_file", "is_local", "local_files_only")
        return {k: _placeless(v) for k, v in value.items() if k not in gone}
    return [_placeless(v) for v in value] if isinstance(value, list) else value
