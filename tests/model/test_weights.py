"""The one door for weights: safetensors only, damaged files named, wherever a library would read something else."""

from __future__ import annotations

import json
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from beholder.config import LlmConfig, VisionConfig
from beholder.model.language import load_language
from beholder.model.vision import load_vision
from beholder.model.weights import from_pretrained, loading
from beholder.types import UserError

from .conftest import CPU, Parts


def copied(parts: Parts, tmp_path: Path) -> Path:
    shutil.copytree(parts.llm("qwen3"), tmp_path / "llm")
    return tmp_path / "llm"


@pytest.mark.parametrize("how", ["bin", "index"])
def test_a_language_model_is_not_read_from_a_pickle(parts: Parts, tmp_path: Path, how: str) -> None:
    folder = copied(parts, tmp_path)
    cfg = LlmConfig(name_or_path=str(folder), precision="fp32")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if how == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "part.bin")}
        torch.save(weights, folder / "part.bin")
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"Weights are read from safetensors only") as e:
        load_language(cfg, CPU)

    if how == "bin":  # the advice works, in a shell
        command = str(e.value).partition("in its folder: ")[2]
        subprocess.run(command.replace("python", shlex.quote(sys.executable), 1), shell=True, check=True, cwd=folder)
        table = load_language(cfg, CPU)[0].model.get_input_embeddings().weight
        assert torch.equal(table, weights["model.embed_tokens.weight"])


def test_a_folder_without_weights_says_so(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights, that is no model\.safetensors"):
        load_language(LlmConfig(name_or_path=str(folder)), CPU)


@pytest.mark.parametrize("kept", [0, 4, 200, 0.5, 0.999])
def test_a_language_models_damaged_weights_are_named(parts: Parts, tmp_path: Path, kept: float) -> None:
    folder = copied(parts, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    with pytest.raises(UserError, match=rf"name_or_path '{folder}' cannot be loaded: .*[Gg]ive a Hugging Face"):
        load_language(LlmConfig(name_or_path=str(folder)), CPU)


def test_a_damaged_index_is_named(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    for text in ("{", '{"weight_map": [', '{"weight_map": {"a": 3}}', '{"weight_map": ' + "[" * 100_000):
        (folder / "model.safetensors").unlink(missing_ok=True)
        (folder / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match="cannot be loaded"):
            load_language(LlmConfig(name_or_path=str(folder)), CPU)


def embeddings(folder: Path) -> torch.Tensor:
    language, _ = load_language(LlmConfig(name_or_path=str(folder), precision="fp32"), CPU)
    return language.model.get_input_embeddings().weight


def configured(folder: Path, more: str) -> None:
    """``more``: JSON text of further entries of ``config.json``, so that escapes stay as they are."""
    config = (folder / "config.json").read_text().rstrip().removesuffix("}")
    (folder / "config.json").write_text(f"{config}, {more}}}")


@pytest.mark.parametrize(
    "how",
    ["named index", "named index, pickle", "nested index", "escaped index", "escaped config", "renamed key",
     "config of another file", "link", "link of a shard", "link of a named file"],
)  # fmt: skip
def test_no_weights_from_outside_of_the_folder_and_no_pickle(parts: Parts, tmp_path: Path, how: str) -> None:
    folder = copied(parts, tmp_path)
    (folder / "model.safetensors").rename(tmp_path / "w.safetensors")
    keys = load_file(tmp_path / "w.safetensors")
    torch.save(keys, folder / "w.bin")

    def index(name: str, target: str) -> str:
        (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, target)}))
        return name

    outside, expected = "../w.safetensors", r"names '\.\./w\.safetensors'"
    if how.startswith("named index"):
        target = "w.bin" if how.endswith("pickle") else outside
        configured(folder, f'"transformers_weights": "{index("x.safetensors.index.json", target)}"')
        expected = rf"x\.safetensors\.index\.json names '{target}' as a file of weights"
    elif how == "nested index":
        index("y.safetensors.index.json", outside)
        configured(folder, f'"transformers_weights": "{index("x.safetensors.index.json", "y.safetensors.index.json")}"')
        expected = r"names 'y\.safetensors\.index\.json' as a file of weights"
    elif how == "escaped index":
        file = folder / index("model.safetensors.index.json", outside)
        file.write_text(file.read_text().replace("weight_map", r"weight_ma\u0070"))
    elif how == "escaped config":
        configured(folder, rf'"transformers_weigh\u0074s": "{index("x.safetensors.index.json", outside)}"')
    elif how == "renamed key":
        more = f'"attribute_map": {{"transformers_weights": "other"}}, "other": "{outside}"'
        configured(folder, more)
    elif how == "config of another file":
        (folder / "config.json").rename(folder / "config.4.0.0.json")
        configured_as = json.loads((folder / "config.4.0.0.json").read_text())
        index("x.safetensors.index.json", outside)
        (folder / "config.4.0.0.json").write_text(
            json.dumps(configured_as | {"transformers_weights": "x.safetensors.index.json"})
        )
        (folder / "config.json").write_text(
            json.dumps({"model_type": "qwen3", "configuration_files": ["config.4.0.0.json"]})
        )
    else:
        link = {"link": "model.safetensors"}.get(how, "part.safetensors")
        (folder / link).symlink_to(tmp_path / "w.safetensors")
        if how == "link of a shard":
            index("model.safetensors.index.json", link)
        elif how == "link of a named file":
            configured(folder, f'"transformers_weights": "{link}"')
        expected = rf"{link} is a link that leads out of the folder, to {tmp_path / 'w.safetensors'}"
    with pytest.raises(UserError, match=expected):
        load_language(LlmConfig(name_or_path=str(folder), precision="fp32"), CPU)


@pytest.mark.parametrize("where", ["the folder", "a copied cache", "the hub's cache"])
def test_links_within_a_checkpoint_are_followed(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    folder = copied(parts, tmp_path)
    blob = {"the folder": folder / "blobs", "the hub's cache": tmp_path / "hub"}.get(where, tmp_path / "m" / "blobs")
    blob.mkdir(parents=True)
    if where == "a copied cache":
        (tmp_path / "m" / "snapshots").mkdir()
        folder = folder.rename(tmp_path / "m" / "snapshots" / "abc")
    elif where == "the hub's cache":
        monkeypatch.setattr("beholder.model.weights.HF_HUB_CACHE", str(blob))
    (folder / "model.safetensors").rename(blob / "0123")
    (folder / "model.safetensors").symlink_to(blob / "0123")
    assert torch.equal(embeddings(folder), embeddings(Path(parts.llm("qwen3"))))


def test_a_named_index_of_own_files_is_followed(parts: Parts, tmp_path: Path) -> None:
    folder = copied(parts, tmp_path)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    keys = load_file(folder / "part.safetensors")
    (folder / "x.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, "part.safetensors")})
    )
    configured(folder, '"transformers_weights": "x.safetensors.index.json"')
    assert torch.equal(embeddings(folder), embeddings(Path(parts.llm("qwen3"))))


@pytest.mark.parametrize(
    ("entry", "said"),
    [('"hidden_size": "many"', r"'hidden_size'.*many"), ('"transformers_weights": 3', "transformers_weights .* is 3")],
)
def test_a_value_of_another_type_is_named(parts: Parts, tmp_path: Path, entry: str, said: str) -> None:
    folder = copied(parts, tmp_path)
    configured(folder, entry)
    with pytest.raises(UserError, match=rf"cannot be loaded: .*{said}"):
        load_language(LlmConfig(name_or_path=str(folder)), CPU)


def test_a_pickle_that_a_library_reads_after_all_ends_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"the model cannot be loaded: .*Get it"), loading("the model", "Get it."):
        pickle.loads(b"no pickle")


def test_the_adapters_of_a_model_are_not_loaded_beside_it(parts: Parts, tmp_path: Path) -> None:
    """A CLIP judge or a model of the hub goes through the same door: adapters name a base, and may be a pickle."""
    folder = copied(parts, tmp_path)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is a PEFT adapter"):
        from_pretrained(AutoModelForCausalLM, str(folder))


def test_a_tower_that_is_a_folder_of_adapters_is_refused_as_one(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"model\.vision\.name_or_path .* is a PEFT adapter"):
        load_vision(VisionConfig(name_or_path=str(tmp_path)), CPU)


def test_timm_weights_that_are_a_folder_are_called_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"model\.vision\.weights: '{tmp_path}' is a folder; expected a \.safetensors"):
        load_vision(VisionConfig(name_or_path="timm/repvit_m0_9", weights=str(tmp_path)), CPU)
