"""What every test may lean on: tiny real parts, a tiny picture set, and run-time checking of tensor shapes.

`beholder.model` is imported under jaxtyping and beartype, so a wrong shape or dtype in an annotated function fails a
test.
"""
# ruff: noqa: E402  (the environment and the import hook have to be in place before anything else is imported)

from __future__ import annotations

import functools
import os
import signal

# One thread per process, in what the tests start as well: the workers of pytest-xdist share the cores already.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network must fail here as it would elsewhere
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
# A shell's background job ignores Ctrl-C and hands that on to what tests start and then interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from jaxtyping import install_import_hook

install_import_hook("beholder.model", "beartype.beartype")

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch
import yaml
from hypothesis import HealthCheck, settings

from beholder.config import RunConfig
from beholder.config.file import parse_config
from beholder.prepare.tiny import colour_source, tiny_llm, tiny_vision

torch.set_num_threads(1)

# How long an example takes depends on what runs beside it: a busy machine is no failure.
settings.register_profile("any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """A worker per core that this process may use: xdist counts the machine's where psutil is installed. At most 4, as
    each comes to hold 2.5 GB; ``-n 16`` asks for more."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True, scope="session")
def beholder_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEHOLDER_CACHE", str(folder))
        yield folder


@dataclass(frozen=True)
class TinyParts:
    """Folders of a tiny Qwen3 with its tokenizer and of a tiny SigLIP. Read-only: shared by the whole session."""

    llm: Path
    vision: str
    records: Path
    """72 records of the colour set, captions of three lengths."""
    images: Path

    @property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.llm))


@pytest.fixture(scope="session")
def tiny_parts(tmp_path_factory: pytest.TempPathFactory) -> TinyParts:
    folder = tmp_path_factory.mktemp("parts")
    source = colour_source(folder / "data", "jsonl", 72)
    vision, _ = tiny_vision(folder / "vision")
    assert source.image_root is not None
    return TinyParts(tiny_llm(folder / "llm"), vision, Path(source.json_path), Path(source.image_root))


MakeConfig = Callable[..., RunConfig]


def make_config(tiny_parts: TinyParts, folder: Path, **sets: Any) -> RunConfig:
    """A run on the tiny parts, its run folder below ``folder``.

    Settings are given by dotted path and read like ``--set``; a value may be anything YAML can say.
    """
    base = {
        "run_name": "tiny", "output_dir": str(folder / "run"), "device": "cpu",
        "model": {
            "llm": {"name_or_path": str(tiny_parts.llm), "precision": "fp32"},
            "vision": {"name_or_path": tiny_parts.vision, "precision": "fp32"},
            "connector": {"num_visual_tokens": 4, "resampler": {"depth": 1, "num_heads": 4}},
        },
        "data": {"json_path": str(tiny_parts.records), "image_root": str(tiny_parts.images), "eval_size": 12},
        "features": {"dir": str(folder / "features")},
        "train": {
            "train_steps": 4, "micro_batch_size": 4, "precision": "fp32", "lr": {"connector": 1e-3},
            "save_every": 2, "log_every": 1, "num_threads": 1,
        },
        "eval": {"golden_size": 3, "golden_generate": {"max_new_tokens": 6}, "caption_samples": 4},
        "ablation": {"num_samples": 8},
    }  # fmt: skip
    overrides = [f"{key.replace('__', '.')}={orjson.dumps(value).decode()}" for key, value in sets.items()]
    return parse_config(yaml.safe_dump(base), "tiny_config", overrides)


@pytest.fixture
def tiny_config(tiny_parts: TinyParts) -> MakeConfig:
    """``tiny_config(folder, **{"train.train_steps": 3})``, see `make_config`."""
    return functools.partial(make_config, tiny_parts)
