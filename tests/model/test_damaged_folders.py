"""A downloaded folder may hold anything: it loads, or an error says which file of it is wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from beholder.config import LlmConfig, VisionConfig
from beholder.model.language import empty_language, load_language
from beholder.model.native import empty_native, load_native
from beholder.model.vision import empty_tower, load_vision
from beholder.prepare.tiny import tiny_native
from beholder.types import UserError

from .conftest import CPU, Parts

Door = Callable[[str], object]
LOAD: dict[str, Door] = {
    "llm": lambda name: load_language(LlmConfig(name_or_path=name, precision="fp32"), CPU),
    "vision": lambda name: load_vision(VisionConfig(name_or_path=name, precision="fp32"), CPU),
    "native": lambda name: load_native(LlmConfig(name_or_path=name, precision="fp32"), CPU),
}
PLAN: dict[str, Door] = {
    "llm": lambda name: empty_language(LlmConfig(name_or_path=name, precision="fp32")),
    "vision": lambda name: empty_tower(VisionConfig(name_or_path=name, precision="fp32")),
    "native": lambda name: empty_native(LlmConfig(name_or_path=name, precision="fp32")),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def folder_of(parts: Parts, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a part's folder that a test may damage."""

    def copied(part: str) -> Path:
        if part == "native" and not (parts.folder / "native").exists():
            tiny_native(parts.folder / "native")
        source = {"llm": parts.llm, "vision": lambda: parts.vision("siglip")[0]}.get(part)
        shutil.copytree(parts.folder / "native" if source is None else source(), tmp_path / part)
        return tmp_path / part

    return copied


def change(folder: Path, file: str, entry: str, value: Any) -> None:
    """Put ``value`` at the dotted ``entry`` of a JSON file, in place of all of it where that is empty."""
    path = folder / file
    whole = json.loads(path.read_text()) if path.exists() else {}
    inner, *last = whole, *entry.split(".")
    for key in last[:-1]:
        inner = inner[key]
    inner[last[-1]] = value
    path.write_text(json.dumps(whole if entry else value))


@pytest.mark.parametrize(
    ("part", "file", "entry", "value"),
    [
        ("llm", "config.json", "dtype", "evil"),
        ("llm", "config.json", "quantization_config", 3),
        ("llm", "config.json", "vocab_size", 3),
        ("llm", "config.json", "vocab_size", 10**8),
        ("llm", "config.json", "num_labels", 10**9),
        ("llm", "config.json", "", []),
        ("llm", "tokenizer_config.json", "", []),
        ("llm", "tokenizer_config.json", "tokenizer_class", 3),
        ("llm", "tokenizer_config.json", "model_max_length", "x"),
        ("llm", "special_tokens_map.json", "", []),
        ("llm", "special_tokens_map.json", "unk_token", {}),
        ("llm", "generation_config.json", "", 3),
        ("vision", "config.json", "dtype", "evil"),
        ("vision", "config.json", "quantization_config", 3),
        ("vision", "config.json", "model_type", "bert"),
        ("vision", "config.json", "vision_config.intermediate_size", 10**8),
        ("vision", "preprocessor_config.json", "", []),
        ("native", "config.json", "text_config.vocab_size", 3),
        ("native", "preprocessor_config.json", "size.shortest_edge", 10**9),
        ("native", "processor_config.json", "", 3),
    ],
)
def test_a_value_that_no_model_has_is_told_with_its_file(
    folder_of: Callable[[str], Path], part: str, file: str, entry: str, value: Any
) -> None:
    folder = folder_of(part)
    change(folder, file, entry, value)

    with pytest.raises(UserError) as told:
        LOAD[part](str(folder))
    assert str(folder) in str(told.value) and file in str(told.value), told.value


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("llm", "dtype", "evil"), ("llm", "id2label", 3), ("vision", "quantization_config", 3),
        ("vision", "vision_config.hidden_act", "x"), ("vision", "vision_config.hidden_size", -1),
        ("vision", "model_type", "bert"), ("native", "text_config.vocab_size", 3),
    ],
)  # fmt: skip
def test_a_plan_is_told_what_the_run_would_be(
    folder_of: Callable[[str], Path], part: str, entry: str, value: Any
) -> None:
    folder = folder_of(part)
    change(folder, "config.json", entry, value)

    with pytest.raises(UserError, match=r"config\.json") as told:
        PLAN[part](str(folder))
    assert str(folder) in str(told.value)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xff\xff\xff"
    path.write_bytes(data)


@pytest.mark.parametrize("part", ["llm", "vision", "native"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut, "is damaged or cut off"),
        (header, "is damaged or cut off"),
        (lambda path: path.write_bytes(b""), "is damaged or cut off"),
        (lambda path: path.write_text(POINTER), "pointer of Git LFS.*git lfs pull"),
    ],
    ids=["cut", "header", "empty", "pointer"],
)
def test_a_damaged_file_of_weights_is_named(
    folder_of: Callable[[str], Path], part: str, damage: Callable[[Path], object], said: str
) -> None:
    folder = folder_of(part)
    damage(folder / "model.safetensors")

    with pytest.raises(UserError, match=rf"model\.safetensors.*{said}") as told:
        LOAD[part](str(folder))
    assert str(folder) in str(told.value)


def split(folder: Path) -> None:
    """Two shards and their index in place of the one file."""
    weights = load_file(folder / "model.safetensors")
    where = {key: f"part-{k % 2}.safetensors" for k, key in enumerate(weights)}
    for shard in set(where.values()):
        own = {k: v for k, v in weights.items() if where[k] == shard}
        save_file(own, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


@pytest.mark.parametrize("part", ["llm", "vision", "native"])
def test_a_missing_or_damaged_shard_is_named(folder_of: Callable[[str], Path], part: str) -> None:
    folder = folder_of(part)
    split(folder)
    shard = folder / "part-1.safetensors"
    LOAD[part](str(folder))

    cut(shard)
    with pytest.raises(UserError, match=r"part-1\.safetensors is damaged or cut off"):
        LOAD[part](str(folder))
    shard.write_text(POINTER)
    with pytest.raises(UserError, match=r"part-1\.safetensors.*pointer of Git LFS"):
        LOAD[part](str(folder))
    shard.unlink()
    with pytest.raises(UserError, match=r"names 'part-1\.safetensors' as a file of weights, which is not there"):
        LOAD[part](str(folder))


def test_an_index_beside_the_whole_file_is_not_followed(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("llm")
    whole = (folder / "model.safetensors").read_bytes()
    split(folder)
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "part-1.safetensors").unlink()

    LOAD["llm"](str(folder))


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_a_pointer_in_place_of_a_text_file_is_named(folder_of: Callable[[str], Path], file: str) -> None:
    folder = folder_of("llm")
    (folder / file).write_text(POINTER)

    with pytest.raises(UserError, match=rf"{file} cannot be loaded: it is a pointer of Git LFS"):
        LOAD["llm"](str(folder))


# ---------------------------------------------------------------------------------------------------------------
# Everything, slowly

FILES = {
    "config.json": "dtype torch_dtype quantization_config model_type architectures auto_map rope_scaling "
    "rope_parameters vision_config text_config tie_word_embeddings transformers_weights attn_implementation id2label "
    "num_labels is_encoder_decoder sliding_window",
    "tokenizer_config.json": "tokenizer_class chat_template added_tokens_decoder extra_special_tokens eos_token "
    "model_max_length auto_map padding_side additional_special_tokens",
    "special_tokens_map.json": "eos_token pad_token bos_token unk_token additional_special_tokens",
    "generation_config.json": "eos_token_id temperature max_length pad_token_id cache_implementation do_sample",
    "preprocessor_config.json": "size crop_size do_center_crop image_mean image_std resample rescale_factor "
    "image_processor_type do_resize max_num_patches",
    "processor_config.json": "image_processor processor_class",
}
"""Files of a folder, and entries that are tried whether or not they are there."""
READ = {
    "llm": ["config.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json"],
    "vision": ["config.json", "preprocessor_config.json", "processor_config.json"],
    "native": list(FILES),
}
VALUES: list[Any] = [3, "x", [], {}, None, -1, 10**9]


def _entries(content: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        yield prefix + key
        if isinstance(value, dict) and prefix.count(".") < 2:
            yield from _entries(value, f"{prefix}{key}.")


@pytest.mark.slow
@pytest.mark.parametrize(("part", "file"), [(part, file) for part, files in READ.items() for file in files])
def test_whatever_a_folder_holds_it_loads_or_is_told(
    folder_of: Callable[[str], Path], part: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folder_of(part)
    path = folder / file
    before = path.read_bytes() if path.exists() else None
    there = _entries(json.loads(before)) if before else ()
    doors = [LOAD[part], PLAN[part]] if file == "config.json" else [LOAD[part]]
    told = crashed = loaded = 0
    for entry in ["", *dict.fromkeys([*there, *FILES[file].split()])]:
        for value in VALUES:
            if before is not None:
                path.write_bytes(before)
            else:
                path.unlink(missing_ok=True)
            change(folder, file, entry, value)
            for door in doors:
                try:
                    door(str(folder))
                    loaded += 1
                except UserError as e:
                    assert str(folder) in str(e), f"{file} {entry} = {value!r}: {e}"
                    told += 1
                except Exception as e:
                    crashed += 1
                    print(f"{file} {entry} = {value!r}: {type(e).__name__}: {e}")
    assert not crashed, capsys.readouterr().out
    assert told and loaded + told > 20
