"""What several stages start from: questions about the colour set, and a finished alignment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import TinyParts, make_config

from beholder.prepare.tiny import COLOURS, SHAPES
from beholder.stages import run_stage


@pytest.fixture(scope="module")
def questions(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A question about each picture of the colour set: what shape, what colour, or a yes/no question."""
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    lines = []
    for i, line in enumerate(tiny_parts.records.read_text(encoding="utf-8").splitlines()):
        record = json.loads(line)
        words = record["caption"].split()
        colour = next(w for w in words if w in COLOURS)
        shape = next(w for w in words if w in SHAPES or w in SHAPES.values())
        asked, answer, kind = [
            ("what shape is it?", shape, "shape"), ("what color is it?", colour, "color"),
            ("is it red?", "yes" if colour == "red" else "no", "yes/no"),
        ][i % 3]  # fmt: skip
        turns = [{"role": "user", "content": f"<image>\n{asked}"}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({
            "id": record["id"], "images": record["images"], "messages": turns, "question_type": kind,
        }))  # fmt: skip
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def aligned(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage align. Four steps on random parts pass no gates."""
    folder = tmp_path_factory.mktemp("aligned")
    run_stage(make_config(tiny_parts, folder))
    return folder / "run"
