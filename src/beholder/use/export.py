"""A trained run as a Hugging Face folder that needs nothing of this package: ``beholder export RUN --to hf``.

1 write what the run has learned, merged or beside its base, into a folder next to the one that was asked for
2 load that folder in a process of its own, with transformers alone, and ask it held-out samples
3 compare ids, logits and answers with the run's own; only if they are equal, the folder gets its name

Which class it becomes is `model.standard`'s to say. What lies in ``exported/`` is copied into the folder as it stands.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beholder.config import GREEDY
from beholder.data.build import open_records
from beholder.data.chat import EncodeError
from beholder.data.chat_template import TEMPLATE_DATE
from beholder.data.collate import Layout, collate
from beholder.data.images import as_input, read_bytes
from beholder.data.splits import load_split
from beholder.model.learned import narrowed
from beholder.model.native import NativeModel
from beholder.model.placement import Part, without_adapters
from beholder.model.standard import ExportClass, export_class
from beholder.model.vlm import VisionLanguageModel
from beholder.model.weights import check_finite, quiet_transformers
from beholder.runs import stop_signals, writing
from beholder.train.trained import TrainedRun, open_trained
from beholder.types import Encoded, Example, ImageInput, ImageSlot, Turn, UserError

Format = Literal["hf"]
ADAPTER = "adapter"
"""Folder of the adapters, below that of the base."""
IMAGE_TOKEN = "<image>"
NUM_SAMPLES = 4
NEW_TOKENS = 24
"""Of a golden answer."""
ROUNDING = 1e-5
"""Of the largest logit: a library may add in another order in another process. What was seen is 0 throughout."""
CODE = Path(__file__).parent / "exported"


@dataclass(frozen=True)
class Exported:
    """What was written, and what loading it again gave."""

    folder: str
    exported_class: str
    prevents: str
    """Why it is no class of transformers' own; empty where it is one."""
    adapter: str | None
    """Folder of the adapters below it; None where they are merged, or there are none."""
    files: dict[str, int]
    """Bytes by name."""
    samples: int
    """Held-out samples it was asked, in a process of its own."""
    max_logit_difference: float
    """Between the run and what was loaded, both in fp32, over all positions of the samples."""
    answers: list[str]
    """To these samples, the same from both."""

    def print(self, console: Console) -> None:
        console.print(
            f"{self.folder}: {self.exported_class}, {sum(self.files.values()) / 1e6:,.1f} MB", highlight=False
        )
        if self.prevents:
            console.print(f"  no class of transformers' own: {self.prevents}", highlight=False)
        if self.adapter:
            console.print(f"  adapters beside their base, in {self.adapter}/", highlight=False)
        console.print(
            f"  loaded in a fresh process: {self.samples} held-out samples, largest difference of logits "
            f"{self.max_logit_difference:g}, same answers",
            highlight=False,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class AskedSample:
    """A held-out sample, as both sides take it."""

    example: Example
    messages: list[dict[str, Any]]
    images: list[bytes]


@stop_signals()
def export(
    run: str | Path,
    out: str | Path,
    *,
    to: Format = "hf",
    adapter: bool = False,
    samples: int = NUM_SAMPLES,
    max_shard_size: str = "5GB",
    overrides: Sequence[str] = (),
) -> Exported:
    """Write ``run`` (its best checkpoint, else its latest) to ``out`` as a Hugging Face folder, and prove it.

    ``to``: the one format there is. ``adapter``: leave the adapters beside their base as a PEFT folder instead of
    merging them. Raises `UserError` for an ``out`` that holds something, a run without adapters where they are asked
    for, parts that bring code of their own, and where what was loaded does not compute what the run computes; nothing
    is left behind then.
    """
    out = Path(out)
    with writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not empty; name a new folder for the export")
    if os.path.ismount(out):
        raise UserError(f"{out} is where a disk is mounted, which nothing can take the place of; name a folder in it")
    if samples < 1:
        raise UserError(f"samples is {samples}, expected 1 or more: an export that nothing was compared on is no proof")
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", max_shard_size):
        raise UserError(f"the largest file of weights is {max_shard_size!r:.40}, expected a size such as 500MB or 5GB")
    assert to == "hf", to
    opened = open_trained(run, torch.device("cpu"), overrides)
    if adapter and not opened.model.adapters:
        raise UserError(f"{run} has no adapters, so there is nothing to put beside its base; leave --adapter out")
    chosen = askable(opened, samples, held_out(opened))
    with writing(out):
        place = Path(os.path.realpath(out))
        missing = [parent for parent in place.parents if not parent.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.", suffix=".tmp", dir=place.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        with ExitStack() as stack, quiet_transformers():
            if not adapter:
                stack.enter_context(opened.model.adapters_merged())
            with writing(out):
                try:
                    written = _write(opened, folder, beside=adapter, max_shard_size=max_shard_size)
                except SafetensorError as error:  # what the disk says, wrapped
                    number = re.search(r"os error (\d+)", str(error))
                    raise OSError(int(number[1]) if number else 0, str(error)) from error
            difference, answers = _prove(opened, folder, written, chosen, beside=adapter)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        with writing(out):
            if place.is_dir():
                place.rmdir()
            os.replace(folder, place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # something else lies there by now
            for parent in missing:
                parent.rmdir()
        raise
    return Exported(
        str(out), written.name, written.prevents, ADAPTER if adapter else None, files, len(chosen), difference, answers
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---------------------------------------------------------------------------------------------------------------
# Which samples


def askable(run: TrainedRun, count: int, among: Iterable[Example]) -> list[AskedSample]:
    """The first samples of ``among`` with an image that can be asked. Raises `UserError` for none."""
    found: list[AskedSample] = []
    for example in among:
        if not example.images:
            continue
        example = run.encoder.apply_template(example)
        turns = asked_turns(example)
        if not turns or any(IMAGE_TOKEN in p for t in turns for p in t.parts if isinstance(p, str)):
            continue
        try:
            images = [read_bytes(ref) for ref in example.images]
            native = isinstance(run.model, NativeModel)
            inputs = [as_input(run.pipeline(ref)) for ref in example.images] if native else []
            run.encoder.encode_prompt(example, run.sizes(inputs))
        except EncodeError:
            continue
        found.append(AskedSample(example, [_message(t, native, len(images), run) for t in turns], images))
        if len(found) == count:
            return found
    if not found:
        raise UserError(
            f"{run.checkpoint}: no held-out sample with an image can be asked, so nothing could be compared"
        )
    return found


def asked_turns(example: Example) -> tuple[Turn, ...]:
    """What is said before the answer."""
    return example.turns[:-1] if example.answer_text else example.turns


def held_out(run: TrainedRun) -> Iterator[Example]:
    """The run's held-out samples in a fixed random order; of a run without a split file, its records."""
    data = run.cfg.data
    records = open_records(run.cfg, data.eval_sources or data.train_sources)
    splits = sorted((run.folder / "splits").glob("split_*.json"))
    if data.eval_sources or not splits:
        indices = np.arange(len(records))
    else:
        indices = load_split(splits[-1], records).eval
    order = np.random.default_rng(0).permutation(len(indices))
    return (records[int(indices[i])] for i in order)


def _message(turn: Turn, native: bool, num_images: int, run: TrainedRun) -> dict[str, Any]:
    """A turn as an exported processor takes it: text with a marker where each image goes; a native one wants parts."""
    if not native:
        label = run.encoder.image_label if num_images > 1 else ""
        text = ""
        for part in turn.parts:
            if isinstance(part, ImageSlot):
                own = label.format(k=part.index + 1)
                text += ("" if text.rstrip().endswith(own.rstrip()) else own) + IMAGE_TOKEN
            else:
                text += part
        return {"role": turn.role, "content": text}
    parts = [
        {"type": "image"} if isinstance(p, ImageSlot) else {"type": "text", "text": p} for p in turn.parts if p != ""
    ]
    return {"role": turn.role, "content": parts}


# ---------------------------------------------------------------------------------------------------------------
# Writing


def _write(run: TrainedRun, folder: Path, *, beside: bool, max_shard_size: str) -> ExportClass:
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
        names = {"language": "", "vision": ""}
    else:
        written = _write_joined(run, model, folder, generation, max_shard_size)
        own = written.prevents
        names = {
            "language": "language_model." if own else "",
            "vision": "vision_tower.backbone." if own else "model.vision_tower.",
        }
    if beside:
        _write_adapters(model, folder / ADAPTER, names, standard=not written.prevents)
    return written


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
    written = export_class(
        run.cfg.model.connector, run.cfg.model.vision, model.vision.backbone, model.language.model,
        model.geometry.num_patches,
    )  # fmt: skip
    tokenizer, token_id, token = _with_image_token(run)
    exported = (_own if written.prevents else _llava)(run, model, written, token_id)
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
    _write_processor(run, model, folder, tokenizer, token)
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


def _language_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    part = model.language.part
    return without_adapters(model.language.model, [site.name for site in part.adapters])


def _tower_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    assert model.vision is not None
    part = model.vision.part
    return without_adapters(model.vision.backbone, [site.name for site in part.adapters])


def _connector_state(model: VisionLanguageModel) -> dict[str, Tensor]:
    return dict(model.connector.state_dict())


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
    ours = _connector_state(model)
    names = {"projector.fc1": "linear_1", "projector.fc2": "linear_2", "vision_ln": "projector_layernorm"}
    state = {
        f"model.multi_modal_projector.{names[k.rpartition('.')[0]]}.{k.rpartition('.')[2]}": v for k, v in ours.items()
    }
    state |= {f"model.vision_tower.{k}": v for k, v in _tower_state(model).items()}
    for name, tensor in _language_state(model).items():
        inner = name.startswith("model.")
        state[f"model.language_model.{name.removeprefix('model.')}" if inner else name] = tensor
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
        "hidden": cfg.connector.projector.hidden or c.d_out,
    }  # fmt: skip
    text = _text_config(model)
    made = BeholderConfig(
        text_config=text.to_dict() | {"model_type": text.model_type}, vision=settings, connector=connector,
        image_token_id=token_id,
    )  # fmt: skip
    state = {f"connector.{k}": v for k, v in _connector_state(model).items()}
    state |= {f"vision_tower.backbone.{k}": v for k, v in _tower_state(model).items()}
    state |= {f"language_model.{k}": v for k, v in _language_state(model).items()}
    return _filled(lambda: BeholderForConditionalGeneration(made), state)


def _write_processor(run: TrainedRun, model: VisionLanguageModel, folder: Path, tokenizer: Any, token: str) -> None:
    from beholder.use.exported.processing_beholder import BeholderImageProcessor, BeholderProcessor

    g = model.geometry
    images = BeholderImageProcessor(
        height=g.height, width=g.width, resize=g.resize, resize_to=g.resize_to, resample=g.resample,
        image_mean=list(g.mean), image_std=list(g.std), max_megapixels=run.cfg.data.max_megapixels,
    )  # fmt: skip
    processor = BeholderProcessor(
        images, tokenizer, chat_template=chat_template(run, token), image_token=token,
        num_visual_tokens=model.num_visual_tokens, before=run.encoder.im_start_ids, after=run.encoder.im_end_ids,
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


# ---------------------------------------------------------------------------------------------------------------
# The chat template

_FLATTEN = """\
{%- set seen = namespace(images=0, all=0, messages=[]) -%}
{%- for m in messages -%}
{%- if m.content is not string and m.content is not none -%}
{%- for p in m.content if p.type == 'image' -%}{%- set seen.all = seen.all + 1 -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
{%- if m.content is string -%}
{%- set seen.messages = seen.messages + [m] -%}
{%- else -%}
{%- set own = namespace(text='', front=true, images=0) -%}
{%- for p in m.content or [] -%}
{%- if p.type == 'image' -%}
{%- set seen.images = seen.images + 1 -%}
{%- set label = LABEL.replace('{k}', seen.images | string) if seen.all > 1 else '' -%}
{%- if label and not own.text.rstrip().endswith(label.rstrip()) -%}{%- set own.text = own.text + label -%}{%- endif -%}
{%- set own.text = own.text + IMAGE -%}
{%- if own.front -%}{%- set own.text = own.text + '\\n' -%}{%- endif -%}
{%- else -%}
{%- set said = p.text[1:] if own.front and own.text and p.text.startswith('\\n') else p.text -%}
{%- set own.text = own.text + said -%}
{%- if said -%}{%- set own.front = false -%}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- set seen.messages = seen.messages + [{'role': m.role, 'content': own.text}] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = seen.messages -%}
"""
"""Messages in parts become texts, with a marker where each image goes: on a line of its own before the first word, as
in training, else where it stands."""

_PLAIN = """\
{{- BOS -}}
{%- for m in messages -%}
{%- if not loop.first and messages[loop.index0 - 1].role == 'assistant' -%}{{- '\\n' -}}{%- endif -%}
{%- if m.role == 'assistant' -%}
{{- m.content + EOS -}}
{%- else -%}
{%- set bare = m.content.replace(IMAGE, '').strip() -%}
{{- m.content -}}
{%- if not bare -%}{{- INSTRUCTIONS[0 if m.content.count(IMAGE) == 1 else 1] -}}{%- endif -%}
{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
"""
"""What the templates caption and conversation write; images without a word get the instruction."""


def chat_template(run: TrainedRun, token: str) -> str:
    """The run's layout of a conversation as a Jinja template, with ``token`` where an image goes."""
    encoder = run.encoder

    def say(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    label = f"LABEL = {say(encoder.image_label)}"
    head = f"{{%- set {label} -%}}\n{{%- set IMAGE = {say(token)} -%}}\n{_FLATTEN}"
    if token != IMAGE_TOKEN:
        head += (
            "{%- set seen.messages = [] -%}\n{%- for m in messages -%}\n"
            f"{{%- set text = m.content.replace({say(IMAGE_TOKEN)}, IMAGE) -%}}"
            "{%- set seen.messages = seen.messages + [dict(m, content=text)] -%}\n"
            "{%- endfor -%}\n{%- set messages = seen.messages -%}\n"
        )
    if encoder.template != "chat":
        tokens = [run.tokenizer.convert_ids_to_tokens(i) for i in encoder.bos_ids]
        values = {
            "BOS": "".join(tokens), "EOS": run.tokenizer.convert_ids_to_tokens(encoder.eos_ids[0]),
        }  # fmt: skip
        sets = "".join(f"{{%- set {k} = {say(v)} -%}}\n" for k, v in values.items())
        instructions = f"[{say(encoder.instruction)}, {say(encoder.instruction_multi)}]"
        return f"{head}{sets}{{%- set INSTRUCTIONS = {instructions} -%}}\n{_PLAIN}"
    return (head + _settled(run, parts=False)).rstrip("\n") + encoder.chat_text[0]


def native_template(run: TrainedRun) -> str:
    """The chat template of a run with a native model, which places images itself."""
    return _settled(run, parts=True).rstrip("\n") + run.encoder.chat_text[0]


def _settled(run: TrainedRun, *, parts: bool) -> str:
    """What the run gives its chat template besides the messages: where one asks for nothing else, as in training."""
    text, thinking = run.encoder.chat_text
    head, system = "", run.encoder.system
    if system is not None:
        content = json.dumps([{"type": "text", "text": system}] if parts else system, ensure_ascii=False)
        head += (
            "{%- if not messages or messages[0].role != 'system' -%}"
            f"{{%- set messages = [{{'role': 'system', 'content': {content}}}] + messages -%}}{{%- endif -%}}\n"
        )
    if "enable_thinking" in text:
        value = str(thinking).lower()
        head += f"{{%- if enable_thinking is not defined -%}}{{%- set enable_thinking = {value} -%}}{{%- endif -%}}\n"
    if "date_string" in text:
        date = json.dumps(TEMPLATE_DATE.strftime("%d %b %Y"))
        head += f"{{%- if date_string is not defined -%}}{{%- set date_string = {date} -%}}{{%- endif -%}}\n"
    return head


# ---------------------------------------------------------------------------------------------------------------
# Adapters beside


def _write_adapters(
    model: VisionLanguageModel | NativeModel, folder: Path, names: dict[str, str], *, standard: bool
) -> None:
    """The adapters of all parts as one PEFT folder for the exported class."""
    from beholder.model.adapters import KEY_PREFIX, adapter_config, adapter_tensors

    parts: list[tuple[str, Part]] = [(n, p) for n, p in model.parts().items() if p.adapters]
    tensors: dict[str, Tensor] = {}
    targets: list[str] = []
    native = isinstance(model, NativeModel)

    def place(part: str, name: str) -> str:
        if native:
            return name
        if part == "language" and standard:
            return f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name
        return names[part] + name

    for name, part in parts:
        for key, tensor in adapter_tensors(part).items():
            tensors[KEY_PREFIX + place(name, key.removeprefix(KEY_PREFIX))] = tensor.contiguous()
        targets += [place(name, part.prefix + site.name) for site in part.adapters]
    config = adapter_config(parts[0][1]) | {"target_modules": sorted(targets), "task_type": None}
    config["base_model_name_or_path"] = None
    folder.mkdir()
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


# ---------------------------------------------------------------------------------------------------------------
# Proof


def _prove(
    run: TrainedRun, folder: Path, written: ExportClass, samples: Sequence[AskedSample], *, beside: bool
) -> tuple[float, list[str]]:
    """(largest difference of logits, answers) of what a process of its own makes of the folder. Raises `UserError`
    where anything differs."""
    native = isinstance(run.model, NativeModel)
    theirs, told = ask_fresh(
        folder, written.name, samples, processor_code=not native, model_code=bool(written.prevents), beside=beside,
        special=run.tokenizer.bos_token is None, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    return _compare(run, samples, theirs, told)


@stop_signals()
def ask_fresh(
    folder: Path, name: str, samples: Sequence[AskedSample], *, processor_code: bool, model_code: bool, beside: bool,
    special: bool, max_new_tokens: int, logits: bool = True,
) -> tuple[dict[str, Tensor], list[list[int]]]:  # fmt: skip
    """(``ids.K`` and, if asked for, ``logits.K`` of every prompt; ids of every answer): what a process without Beholder
    makes of an exported ``folder`` of class ``name``. Raises `UserError` where it cannot."""
    with tempfile.TemporaryDirectory(prefix="beholder-export-") as scratch:
        job = Path(scratch)
        asked: dict[str, Any] = {
            "folder": str(folder.resolve()), "class": name, "threads": torch.get_num_threads(),
            "processor_code": processor_code, "model_code": model_code, "adapter": ADAPTER if beside else None,
            "max_new_tokens": max_new_tokens, "logits": logits, "samples": [],
        }  # fmt: skip
        with writing(job):
            for k, sample in enumerate(samples):
                names = [f"{k}.{i}" for i in range(len(sample.images))]
                for image_name, image in zip(names, sample.images, strict=True):
                    (job / image_name).write_bytes(image)
                asked["samples"].append({"messages": sample.messages, "images": names, "special": special})
            (job / "job.json").write_text(json.dumps(asked), "utf-8")
        _load_fresh(job)
        told = json.loads((job / "answers.json").read_text("utf-8"))
        return load_file(str(job / "logits.safetensors")), told["ids"]


def _load_fresh(job: Path) -> None:
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")}
    env |= {"HF_MODULES_CACHE": str(job / "modules"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-I", str(CODE / "fresh_check.py"), str(job)], env=env, cwd=job, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise UserError(f"the export cannot be loaded in a process of its own:\n{last}")


def prompt_of(run: TrainedRun, sample: AskedSample) -> tuple[Encoded, list[ImageInput]]:
    """A sample as the run's own model takes it, without its answer."""
    inputs = [as_input(run.pipeline(ref)) for ref in sample.example.images]
    return run.encoder.encode_prompt(sample.example, run.sizes(inputs)), inputs


def same_prompt(run: TrainedRun, encoded: Encoded, ids: Tensor) -> bool:
    """Whether an exported processor gives the run's ids; what stands where an image goes is each one's own."""
    ours = torch.from_numpy(encoded.ids).clone()
    reserved = torch.zeros(len(ours), dtype=torch.bool)
    if run.encoder.images is None:
        for start, stop in encoded.image_spans:
            reserved[start:stop] = True
    return len(ours) == len(ids) and torch.equal(ours[~reserved], ids[~reserved])


@torch.no_grad()
def _compare(
    run: TrainedRun, samples: Sequence[AskedSample], theirs: dict[str, Tensor], answers: list[list[int]]
) -> tuple[float, list[str]]:
    in_fp32(run.model)
    worst, texts = 0.0, []
    for k, sample in enumerate(samples):
        where = f"sample {sample.example.id!r}"
        encoded, inputs = prompt_of(run, sample)
        if not same_prompt(run, encoded, theirs[f"ids.{k}"]):
            raise UserError(
                f"{where}: the exported processor lays the prompt out as other ids ({len(theirs[f'ids.{k}'])}, the "
                f"run {len(encoded.ids)}), so nothing was kept. The run's chat template starts an answer otherwise "
                "than it was trained, or the tokenizer reads text before and after an image as one; such runs cannot "
                "be exported"
            )
        ours = _logits(run, encoded, inputs)
        shown = theirs[f"logits.{k}"][:, : ours.shape[1]]
        difference = float((ours - shown).abs().max())
        worst = max(worst, difference)
        allowed = ROUNDING * float(ours.abs().max())
        if not difference <= allowed:
            raise UserError(
                f"{where}: the logits of what was exported differ from the run's by {difference:.3g} (both in fp32, "
                f"allowed {allowed:.3g}), so nothing was kept"
            )
        how = GREEDY.model_copy(update={"max_new_tokens": NEW_TOKENS})
        own = run.model.generate([encoded], [inputs], how, eos_ids=run.encoder.eos_ids)[0]
        text, other = run.encoder.decode(own), run.encoder.decode(answers[k])
        if text != other:
            raise UserError(f"{where}: the run answers {text!r}, what was exported {other!r}, so nothing was kept")
        texts.append(text)
    return worst, texts


def _logits(run: TrainedRun, encoded: Any, inputs: list[ImageInput]) -> Tensor:
    """Of every position of a prompt, ``[t, v]``, through the same forward as in training, with torch's own attention:
    ours for CPUs sums in another order."""
    language = run.model.language
    batch = collate(
        [("export", encoded, inputs)], Layout(packing=False, pack_len=len(encoded.ids), pad_to_multiple_of=1)
    )
    segmented, language.segmented = language.segmented, False
    try:
        hidden = run.model.hidden_states(batch)
    finally:
        language.segmented = segmented
    return language.head(hidden[0]).float()


def in_fp32(model: VisionLanguageModel | NativeModel) -> None:
    """All of it in fp32, for good. What is no weight and was rounded with them (rotary frequencies) is computed anew,
    as it is wherever the folder is loaded."""
    model.float()
    for (
        parameter
    ) in model.parameters():  # products of a single row look at how memory is aligned; files do not align it
        parameter.data = parameter.data.clone()
    language = model.language.model
    model.language.compute_dtype = None
    for part in model.parts().values():
        for widened in part.widened.values():  # these cast to what is around them
            for hook in widened.hooks:
                hook.remove()
    for module in language.modules():
        own = dict(module.named_buffers(recurse=False))
        if own and not any(True for _ in module.parameters(recurse=False)) and not module.state_dict():
            language._init_weights(module)
    if isinstance(model, NativeModel):
        model.geometry.dtype = torch.float32
    elif model.vision is not None:
        model.compute_dtype = model.vision.dtype = torch.float32
