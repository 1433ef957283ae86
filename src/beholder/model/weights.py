"""Strict loading checks and hashing of weights, shared by `vision`, `language` and `plan`.

``from_pretrained`` keeps quiet about missing, extra and NaN weights, so the refusals live here. `from_pretrained` here
reads no pickle; `loading` makes one sentence of what a library raises over files that it cannot load.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor, nn

from beholder.types import UserError

DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def first_line(error: Exception) -> str:
    """The first line of somebody else's error, or its kind where it has no words."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def loading(what: str, wanted: str, folder: str | Path | None = None) -> Iterator[None]:
    """Quietly; an error over the files becomes `UserError`: ``what``, the error's first line, what is ``wanted``.

    ``folder``: where they lie, if it is one; its JSON files are looked at first (`check_files`). Whatever the libraries
    raise then is about the files, whose values they use unseen: an AttributeError says as little as a KeyError.
    """
    try:
        with quiet_transformers():
            if folder is not None:
                check_files(Path(folder))
            yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{what} cannot be loaded: {_why(e)} {wanted}") from e


def _why(error: Exception) -> str:
    if isinstance(error, StrictDataclassError):  # names the field in its first line, and in the next what is wrong
        return " ".join(str(error).split())
    bare = isinstance(error, AttributeError | AssertionError | LookupError | TypeError | ArithmeticError)
    return f"{type(error).__name__}: {first_line(error)}." if bare else first_line(error)


SETTINGS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
"""Files of a model's folder that hold one JSON object."""


def check_files(folder: Path) -> None:
    """Refuse a folder whose settings are no JSON objects, or absurd, and one that Git LFS has left a pointer in."""
    for file in sorted(folder.glob("*")) if folder.is_dir() else ():
        spare = file.suffix == ".model" and (folder / "tokenizer.json").is_file()
        if file.suffix in (".json", ".jinja", ".txt", ".model") and not spare:
            check_no_pointer(file)
        if file.name in SETTINGS:
            check_settings(file)


def check_settings(file: Path) -> None:
    """Refuse what is no JSON object, or absurd."""
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} cannot be loaded: it is no JSON ({first_line(e)}). Get the file again") from e
    if not isinstance(content, dict):
        raise UserError(f"{file} cannot be loaded: it holds {content!r:.40}, expected a JSON object. Get it again")
    _check_stated(file, content)


def check_no_pointer(file: Path) -> None:
    """Refuse a file that Git LFS has not fetched: a few lines of text stand for it."""
    try:
        with file.open("rb") as opened:
            head = opened.read(40)
    except OSError:  # told by who loads it
        return
    if head.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{file} cannot be loaded: it is a pointer of Git LFS and not the file itself. Run git lfs pull in its "
            "folder, or download it again"
        )


def from_pretrained(cls: Any, name: str, *, gguf_file: str | None = None, **how: Any) -> tuple[Any, dict[str, Any]]:
    """(model, loading info) of transformers' ``cls.from_pretrained``, from safetensors or the GGUF file named.

    Weights of another shape are noted in the info for `check_loading_info`. Raises `UserError` where the weights are
    a pickle, where a file of the checkpoint points at one, or outside of its folder, and for adapters.
    """
    how |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    revision = how.get("revision")
    if _found(name, "adapter_config.json", revision) is not None:  # names a base anywhere, and may be a pickle
        raise adapter_refusal(name)
    if gguf_file is not None:
        return cls.from_pretrained(name, gguf_file=gguf_file, **how)
    if "config" not in how:
        from transformers import AutoConfig

        kind = getattr(cls, "config_class", None) or AutoConfig
        code = how.get("trust_remote_code", False)
        how["config"] = kind.from_pretrained(name, revision=revision, trust_remote_code=code)
    check_depth(name, revision, how["config"])
    sketch = _sketch(cls, how["config"]) if Path(name).is_dir() else None
    if sketch is not None:
        check_size(name, weight_shapes(name, revision, how["config"]), sketch, spare=100_000_000)
    try:
        return cls.from_pretrained(name, use_safetensors=True, **how)
    except OSError as e:
        if "safetensors" not in str(e):
            raise
        raise UserError(f"{name}: {_no_safetensors(Path(name))}") from e


def _sketch(cls: Any, config: Any) -> nn.Module | None:
    """The model on the meta device; None where its code is not transformers' own, or it cannot be made, which is then
    told by who makes it."""
    if not type(config).__module__.startswith("transformers."):
        return None
    try:
        with torch.device("meta"):
            config = copy.deepcopy(config)
            return cls.from_config(config) if hasattr(cls, "from_config") else cls(config)
    except Exception:
        return None


def _no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return f"has no model.safetensors. {convert()}"
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return "has no weights, that is no model.safetensors; get the files again, or save_pretrained the model again."
    return f"has no model.safetensors, only {listed(pickles, 3)}. {convert(pickles[0])}"


def convert(file: str = "pytorch_model.bin") -> str:
    """Why a pickle is not read, and how to make a safetensors file of it."""
    name = Path(file).name
    target = name.replace("pytorch_model", "model").rpartition(".")[0] + ".safetensors"
    code = (
        "import torch, safetensors.torch as s; s.save_file({k: v.clone() for k, v in "
        f"torch.load('{name}', weights_only=True).items()}}, '{target}', {{'format': 'pt'}})"
    )
    return (
        "Weights are read from safetensors only; a pickle (.bin, .pt, .pth) can run code when read. Convert a file "
        f'once, in its folder: python -c "{code}"'
    )


def adapter_refusal(name: str, what: str = "the model") -> UserError:
    return UserError(
        f"{what} {name!r} is a PEFT adapter (adapter_config.json), not a model. Merge it into its base first and give "
        f"that folder: AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER), "
        "its tokenizer beside it"
    )


def _found(name: str, file: str, revision: str | None) -> str | None:
    """Where a file of the checkpoint lies, or None."""
    from transformers.utils.hub import cached_file

    return cached_file(
        name, file, revision=revision,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip


_INDEX = ".safetensors.index.json"


MOST_LAYERS = 512
"""As many layers are built whatever the files hold: `check_loading_info` names what they lack."""
_DEPTHS = ("depth", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "num_hidden_layers")


_MOST = dict.fromkeys(_DEPTHS, 8 * MOST_LAYERS) | {"num_labels": 1_000_000}
"""More than any model has, of what transformers makes a list of as soon as it reads the number."""


def _check_stated(file: Path, content: dict[str, Any]) -> None:
    parts: list[Any] = [content]
    while parts:
        part = parts.pop()
        if not isinstance(part, dict):
            continue
        parts += part.values()
        for field, most in _MOST.items():
            if isinstance(value := part.get(field), int) and value > most:
                raise UserError(
                    f"{file.parent}: {file.name} says {field} {value}; no model has more than {most}, and its files of "
                    "weights do not either. Download them again, or give the matching config."
                )


def check_depth(name: str, revision: str | None, config: Any) -> None:
    """Refuse a configuration with many more layers than the files have, before anything of that size is built: ten
    million layers would take hours. Nothing is said where there are no files."""
    shapes = weight_shapes(name, revision, config)
    numbers = [int(part) for key in shapes for part in key.split(".") if part.isdecimal() and len(part) < 10]
    allowed = max(MOST_LAYERS, 1 + max(numbers, default=0))
    for part in _configs(config) if shapes else ():
        for field in _DEPTHS:
            value = getattr(part, field, None)
            if isinstance(value, int) and value > allowed:
                raise UserError(
                    f"{name}: config.json says {field} {value} ({type(part).__name__}), but its files of weights have "
                    f"{1 + max(numbers, default=-1)} layers at most. The files and config.json must belong together; "
                    "download them again, or give the matching config."
                )


def check_stated(name: str, config: Any) -> None:
    """Refuse a configuration with more layers than any model has, wherever it came from and whether or not its weights
    are here: a plan builds it without them."""
    for part in _configs(config):
        for field in _DEPTHS:
            if isinstance(value := getattr(part, field, None), int) and value > _MOST[field]:
                raise UserError(
                    f"{name}: config.json says {field} {value} ({type(part).__name__}); no model has more than "
                    f"{_MOST[field]}. Give the matching config."
                )


def check_size(name: str, shapes: Mapping[str, tuple[int, ...]], model: nn.Module, spare: int = 0) -> None:
    """Refuse files that hold much less than ``model``, which is on the meta device, needs: its weights would be made up
    first, however large they are, and then found missing. ``spare``: as many more may be missing."""
    output: Any = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    table = None if output is None else model.get_input_embeddings().weight  # pyright: ignore[reportCallIssue]
    untied = None if output is None or output.weight is table else output.weight  # as yet; files may have them once
    own = {key: p for key, p in model.named_parameters() if p is not untied}
    need, there = sum(p.numel() for p in own.values()), sum(math.prod(shape) for shape in shapes.values())
    if not shapes or need <= 1.1 * there + spare:
        return
    known = set(shapes.values())
    odd = sorted((k for k, p in own.items() if tuple(p.shape) not in known), key=lambda k: -own[k].numel())
    raise UserError(
        f"{name}: config.json describes {need:,} weights, but its files hold {there:,}"
        + (f"; they have none like {', '.join(f'{k} {list(own[k].shape)}' for k in odd[:3])}" if odd else "")
        + ". The files and config.json must belong together; download them again, or give the matching config."
    )


def weight_shapes(name: str, revision: str | None, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights in a checkpoint's safetensors files, from their headers alone. Raises `UserError` as
    `from_pretrained` does for files that it would not read."""
    named = _check_weight_files(name, revision, config)
    shapes: dict[str, tuple[int, ...]] = {}
    whole = _found(name, "model.safetensors", revision) is not None  # and then no index is followed
    for file in sorted(named or {"model.safetensors"}):
        path = None if file.endswith(_INDEX) else _found(name, file, revision)
        if path is not None:
            shapes |= _shapes_in(Path(path))
        elif named and Path(name).is_dir() and not whole and not file.endswith(_INDEX):
            raise UserError(
                f"{name}: its index or config.json names {file!r} as a file of weights, which is not there; get the "
                "file, or get all of the model's files again"
            )
    return shapes


def _shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Raises ValueError with its name for a file that is damaged, OSError for one that is not there."""
    check_no_pointer(path)
    stat = path.stat()
    return _shapes_at(path, (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=256)
def _shapes_at(path: Path, _stamp: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Asked for several times while a model loads. Not to be changed."""
    try:
        with safe_open(path, framework="pt") as opened:
            return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
    except Exception as e:
        raise ValueError(f"{path.name} is damaged or cut off ({first_line(e)}); get it again.") from e


def _check_weight_files(name: str, revision: str | None, config: Any) -> set[str]:
    """The files that configuration and index name: only safetensors files of the checkpoint's own folder, whatever its
    configuration, index and links say. transformers follows all three to any file, and unpickles what does not end in
    .safetensors.

    ``config`` is the one the model is made with, so that what is checked is what is followed."""
    named = _named_weights(config)
    for file in named:
        _check_name(name, "config.json", file, (".safetensors", _INDEX))
    for index in sorted({"model" + _INDEX, *(f for f in named if f.endswith(_INDEX))}):
        path = _found(name, index, revision)
        if path is None:
            continue
        content = json.loads(Path(path).read_text("utf-8"))
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise ValueError(f"{index} has no weight_map that gives the file of every weight.")
        for shard in sorted(set(shards.values())):
            _check_name(name, index, shard, (".safetensors",))
            named.add(shard)
    if Path(name).is_dir():
        _check_links(Path(name), named)
    return named


def _named_weights(config: Any) -> set[str]:
    """The files of weights that a configuration, or one inside it, names."""
    named = set[str]()
    for part in _configs(config):
        file = getattr(part, "transformers_weights", None)
        if file is not None and not isinstance(file, str):
            raise ValueError(f"transformers_weights in config.json is {file!r:.60}; expected the name of a file.")
        named |= {file} if file is not None else set()
    return named


def _configs(config: Any) -> list[Any]:
    """A configuration, and those inside it."""
    from transformers import PreTrainedConfig

    found, parts = list[Any](), [config, config.get_text_config()]
    while parts:
        part = parts.pop()
        found.append(part)
        parts += [value for value in vars(part).values() if isinstance(value, PreTrainedConfig)]
    return found


def _check_name(name: str, source: str, file: str, endings: tuple[str, ...]) -> None:
    path = PurePosixPath(file.replace("\\", "/"))
    if not file.endswith(endings) or path.is_absolute() or ".." in path.parts:
        raise UserError(
            f"{name}: {source} names {file!r} as a file of weights; expected a .safetensors file in the same folder. "
            f"{convert()}"
        )


def _check_links(folder: Path, named: Iterable[str]) -> None:
    """Refuse files of weights that are links to somewhere else than the folder or the hub's cache, whose snapshots are
    links to its blobs."""
    root = folder.resolve()
    roots = [root, Path(HF_HUB_CACHE).resolve()]
    if root.parent.name == "snapshots":  # of a cache that was copied elsewhere
        roots.append(root.parents[1])
    own = {f.name for f in folder.iterdir() if f.name.endswith((".safetensors", _INDEX))}
    for file in sorted({*own, *named}):
        target = (folder / file).resolve()
        if not any(target.is_relative_to(allowed) for allowed in roots):
            raise UserError(
                f"{folder}: {file} is a link that leads out of the folder, to {target}; expected the file itself. "
                "Copy it into the folder"
            )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no loading report from transformers; what matters in the report becomes an error here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def listed(names: Iterable[str], most: int = 8) -> str:
    """``a, b, c and 12 more``: enough names to see the pattern, never thousands."""
    names = sorted(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def check_loading_info(
    info: Mapping[str, Any], model: nn.Module, source: str, other_parts: tuple[str, ...] | None = ()
) -> None:
    """Refuse a checkpoint that does not fit ``model`` key by key.

    ``info`` is what ``from_pretrained(output_loading_info=True)`` returned. ``other_parts`` are key prefixes of the
    checkpoint that belong to something this model is not part of (a classifier). None: the checkpoint holds whole
    other models (a text tower), so a key counts only when it begins as one of this model's own does.
    """
    present = set(model.state_dict())
    missing = [k for k in info["missing_keys"] if k in present]
    mismatched = [f"{k[0]} (file {list(k[1])}, model {list(k[2])})" for k in info["mismatched_keys"] if k[0] in present]
    unexpected = [k for k in info["unexpected_keys"] if not _dead_buffer(k, model)]
    if other_parts is None:
        own = {k.partition(".")[0] for k in present} | {"vision_model", "vision_tower"}
        unexpected = [k for k in unexpected if k.partition(".")[0] in own]
    elif other_parts:
        unexpected = [k for k in unexpected if not k.startswith(other_parts)]
    problems = [
        f"{what}: {listed(keys)}"
        for what, keys in (
            ("weights the model needs and the files lack", missing),
            ("weights the files hold and the model has no place for", unexpected),
            ("weights of another shape", mismatched),
            ("errors while reading", [str(m) for m in info.get("error_msgs", ())]),
        )
        if keys
    ]
    if problems:
        raise UserError(
            f"{source} does not fit {type(model).__name__}: " + "; ".join(problems) + ". The files and config.json "
            "must belong together; download them again, or give the matching config."
        )


def _dead_buffer(key: str, model: nn.Module) -> bool:
    """Whether ``key`` is a constant that old versions of transformers wrote among the weights: a buffer that the model
    computes itself now, or the causal mask (``attn.bias``, ``attn.masked_bias``) or frequencies of an attention module
    that has no weights of its own, only layers that have. A bias that is lost belongs to such a layer, and is told."""
    prefix = getattr(model, "base_model_prefix", "")  # left out in the oldest files
    buffers = {name for name, _ in model.named_buffers()}
    if not buffers.isdisjoint((key, f"{prefix}.{key}")):
        return True
    path, _, last = key.rpartition(".")
    if last not in ("bias", "masked_bias", "inv_freq"):
        return False
    path = path.removesuffix(".rotary_emb") if last == "inv_freq" else path
    modules = dict(model.named_modules())
    module = modules.get(path) or modules.get(f"{prefix}.{path}")
    return module is not None and any(module.children()) and not any(True for _ in module.parameters(recurse=False))


def check_finite(model: nn.Module, source: str) -> None:
    """Refuse NaN and infinite weights: they load without a word and make every later number NaN."""
    bad = [
        name for name, t in model.state_dict().items() if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]
    if bad:
        raise UserError(
            f"{source} has NaN or infinite weights in {listed(bad)}. The file is damaged, or was written by a run that "
            "diverged; get it again."
        )


def computed_in(module: nn.Module) -> str:
    """Types of the buffers that a model computes itself and no file holds (rotary frequencies); empty: it has none."""
    kept = module.state_dict().keys()
    found = {str(b.dtype) for name, b in module.named_buffers() if name not in kept and b.is_floating_point()}
    return " ".join(sorted(name.removeprefix("torch.") for name in found))


def freeze(module: nn.Module) -> None:
    """No gradients, eval mode."""
    module.requires_grad_(False)
    module.eval()


def _hash_one(tensor: Tensor) -> bytes:
    digest = hashlib.sha256()
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.digest()


def hash_tensors(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """sha256 over names, dtypes, shapes and bytes; the order of the mapping and the device do not matter.

    Tensors are hashed by several threads (hashlib lets go of the interpreter lock), 1.5 GB/s a core.
    """
    names = sorted(tensors)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(_hash_one, [tensors[n] for n in names]))
    total = hashlib.sha256(header.encode())
    for name, digest in zip(names, digests, strict=True):
        t = tensors[name]
        total.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode() + digest)
    return total.hexdigest()


def hash_state(state: Mapping[str, Tensor], header: str = "") -> str:
    """`hash_tensors` of a module's state; tied weights are read once, under the first of their names."""
    seen: dict[tuple[int, tuple[int, ...], tuple[int, ...]], str] = {}
    tensors: dict[str, Tensor] = {}
    for name, t in state.items():
        key = (t.data_ptr(), tuple(t.shape), tuple(t.stride()))
        if t.numel() and key in seen:
            continue
        seen[key] = name
        tensors[name] = t
    return hash_tensors(tensors, header)


def sketch_module(module: nn.Module, per_tensor: int = 4096) -> str:
    """sha256 over evenly spaced weights rounded to bf16: tells models apart in a second, at any size and precision.

    For "was this connector trained on these parts?"; `hash_state` is the one that proves bit-identity.
    """
    tensors = {}
    for name, t in module.state_dict().items():
        if t.is_floating_point() and t.numel():
            flat = t.reshape(-1)
            tensors[name] = flat[:: max(1, flat.numel() // per_tensor)].to(torch.bfloat16)
    return hash_tensors(tensors)
