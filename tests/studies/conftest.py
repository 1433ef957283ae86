"""A tiny config with a sweep, as a file that subprocesses read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.conftest import MakeConfig

from beholder.config.file import dump_config

WriteSweep = Callable[..., Path]

GRID = {"train.lr.connector": [1e-3, 1e-2], "model.connector.vision_ln": [False, True]}


@pytest.fixture
def write_sweep(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> WriteSweep:
    """``write_sweep(folder, grid=…, seeds=…, **{"train.train_steps": 3})``: the path of a config whose sweep folder is
    ``folder/sweep``."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[2] / "src")]))

    def write(folder: Path, *, grid: dict[str, Any] | None = None, seeds: tuple[int, ...] = (), **sets: Any) -> Path:
        few = {
            "train.train_steps": 2, "eval.caption_samples": 2, "eval.golden_size": 2,
            "eval.golden_generate.max_new_tokens": 2, "eval.qa_samples": 0, "eval.audit_turns": 0,
        }  # fmt: skip
        cfg = tiny_config(folder, **(few | sets))
        dumped = re.sub(r"\b(\d)e-", r"\1.0e-", dump_config(cfg))  # PyYAML alone takes 5e-05 for text
        raw = yaml.safe_load(dumped) | {
            "run_name": "sweep", "output_dir": str(folder / "sweep"),
            "sweep": {"grid": GRID if grid is None else grid, "seeds": list(seeds), "parallel": 2},
        }  # fmt: skip
        file = folder / "sweep.yaml"
        file.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
        return file

    return write
