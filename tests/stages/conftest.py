"""What several stages start from: questions about the colour set, and a finished alignment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import TinyParts, make_config

from beholder.config import RunConfig
from beholder.prepare.tiny import COLOURS, SHAPES
from beholder.stages import run_stage


def settings(questions: Path, aligned: Path) -> dict[str, object]:
    return {
        "stage": "instruct", "model.lora.enable": True, "model.lora.r": 4, "model.lora.dropout": 0.1,
        "model.connector.load_checkpoint": str(aligned), "data.json_path": str(questions),
        "prompting.max_images_per_sample": 1, "train.lr.lora": 1e-2, "eval.answer_tokens": 6,
        "eval.caption_samples": 12,
    }  # fmt: skip


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


@pytest.fixture(scope="module")
def teacher(tiny_parts: TinyParts, questions: Path, aligned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of stage instruct."""
    folder = tmp_path_factory.mktemp("teacher")
    run_stage(make_config(tiny_parts, folder, **settings(questions, aligned)), promote_anyway=True)
    return folder / "run"


@pytest.fixture
def student(tiny_parts: TinyParts, questions: Path, aligned: Path, teacher: Path, tmp_path: Path):
    """``student("name", **settings)``: a run of stage distill from the alignment, taught by the instruct run."""

    def make(name: str = "student", **sets: object) -> RunConfig:
        own = settings(questions, aligned) | {
            "stage": "distill", "distill.teachers": [{"run": str(teacher)}],
            "model.lora.dropout": 0.0, "train.train_steps": 3,
            "eval.caption_samples": 0, "eval.answer_tokens": 64, "eval.golden_size": 0, "eval.audit_turns": 0,
        }  # fmt: skip
        if not sets.get("distill.online"):
            own["distill.dir"] = str(tmp_path / "cache")
            own |= {"distill.k": 8} if sets.get("distill.form", "topk") == "topk" else {}
        return make_config(tiny_parts, tmp_path / name, **(own | sets))

    return make
