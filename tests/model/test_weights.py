"""The one door for weights: safetensors only, damaged files named, wherever a library would read something else."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beholder.config import LlmConfig
from beholder.model.language import load_language
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
