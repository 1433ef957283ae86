"""Nothing that data, files or models say has power over the terminal, whatever command prints it."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from tests.conftest import MakeConfig, TinyParts

from beholder.cli import main
from beholder.config.file import dump_config
from beholder.terminal import Terminal
from beholder.types import printable

EVIL = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202egnp.exe\u2066\u200b\U000e0041[/red][bold]\n[gate] passed\r"
SHOWN = "\\u001b[2J\\u001b]0;owned"


def powerful(text: str) -> set[str]:
    """The characters in it that could act on a terminal."""
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in "\n\t\u200d"}


# ---------------------------------------------------------------------------------------------------------------
# The function and the door


@given(st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "L", "So", "Mn"])))
def test_printable_leaves_nothing_that_acts_and_no_json_changes(text: str) -> None:
    assert not powerful(printable(text))
    assert printable(text) == "".join(map(printable, text))
    assert not set(printable(text, one_line=True)) & set("\n\t")
    if not any(unicodedata.category(c) == "Cs" for c in text):  # JSON's reader joins two halves
        assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == text


def test_whatever_a_terminal_prints_is_harmless_and_its_own_colours_stay() -> None:
    out = io.StringIO()
    console = Terminal(file=out, width=60, force_terminal=True, color_system="standard")
    table = Table("id")
    table.add_row(Text(EVIL, style="red"))

    console.print(table)
    console.print(EVIL, markup=False, style="green")
    console.rule(Text(EVIL))
    with console.status("waiting"):
        console.print(Text(EVIL))

    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "")
    assert not powerful(own)
    assert own.replace("\n", "").count("owned") == 4
    assert "\x1b[32m" in out.getvalue() and "\x1b[2J" not in out.getvalue()


# ---------------------------------------------------------------------------------------------------------------
# Commands

Say = Callable[..., str]


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs ``beholder …`` here; what it printed, standard error included."""

    def run(*args: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["beholder", *map(str, args)])
        with pytest.raises(SystemExit) as ended:
            main()
        printed = "".join(capsys.readouterr())
        assert (ended.value.code or 0) == code, printed
        return printed

    return run


@pytest.fixture
def hostile(tiny_parts: TinyParts, tmp_path: Path) -> Path:
    """Records whose ids, captions, sources, questions and some of whose file names would act on a terminal."""
    records = [orjson.loads(line) for line in tiny_parts.records.read_bytes().splitlines()]
    for k, record in enumerate(records):
        record.update(id=f"{EVIL}{k}", caption=record["caption"] + EVIL, source=EVIL)
    records[-1]["images"] = [f"gone{EVIL}.png"]
    records[-2]["messages"] = [{"role": EVIL, "content": EVIL}]
    file = tmp_path / "records.jsonl"
    file.write_bytes(b"".join(orjson.dumps(record) + b"\n" for record in records))
    return file


def test_no_command_lets_data_act_on_the_terminal(
    say: Say, hostile: Path, tiny_parts: TinyParts, tiny_config: MakeConfig, tmp_path: Path
) -> None:
    config = tmp_path / "c.yaml"
    sets = {
        "data.json_path": str(hostile), "data.on_bad_image": "skip", "data.hygiene.max_tokens": 500,
        "eval.golden_size": 8, "ablation.num_samples": 8,
    }  # fmt: skip
    cfg = tiny_config(tmp_path, **sets)
    config.write_text(dump_config(cfg))
    questions = tmp_path / "questions.jsonl"
    questions.write_bytes(orjson.dumps({"id": EVIL, "image": f"gone{EVIL}.png", "prompt": EVIL}))
    answers = tmp_path / "answers.jsonl"
    answers.write_bytes(orjson.dumps({"id": EVIL, "answer": EVIL, "question_type": EVIL}))
    run = cfg.run_dir

    printed = {
        "check": say("check", hostile, "--image-root", tiny_parts.images),
        "check --json": say("check", hostile, "--image-root", tiny_parts.images, "--json"),
        "preview": say("preview", config, "--out", tmp_path / "preview"),
        "run": say("run", config, code=3),
        "golden show": say("golden", "show", run),
        "golden show --json": say("golden", "show", run, "--json"),
        "golden diff": say("golden", "diff", run, "first", "last"),
        "report": say("report", run),
        "compare": say("compare", run, shutil.copytree(run, tmp_path / "other")),
        "ablate": say("ablate", run),
        "score": say("score", "vqa", "--predictions", answers, "--references", answers),
        "score, wrong": say("score", "vqa", "--predictions", questions, "--references", answers, code=2),
        "generate --from": say("generate", run, "--from", questions, "--out", tmp_path / "out.jsonl", code=2),
        "no such file": say("check", tmp_path / f"{EVIL}.jsonl", code=2),
    }
    assert {name: powerful(text) for name, text in printed.items() if powerful(text)} == {}
    lines = {name for name, text in printed.items() if re.search(r"^\[gate\] passed", text, re.M)}
    assert lines == {"preview", "no such file"}  # shown line by line with a mark at each end; what a person typed
    told = ("check", "check --json", "preview", "run", "golden show", "golden show --json", "score", "generate --from")
    assert [name for name in told if SHOWN not in printed[name].replace("\n", "")] == []
    assert json.loads(printed["golden show --json"])[0]["id"].startswith(EVIL)
