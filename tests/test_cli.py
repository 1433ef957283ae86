"""The command line as a person meets it: exit codes, messages, signals. Each call is a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.conftest import MakeConfig, TinyParts
from typer.testing import CliRunner

from beholder.cli import app
from beholder.configfile import dump_config
from beholder.runs import sha256_file

COMMANDS = ("quickstart", "run", "check", "preview", "plan", "generate", "evaluate", "report", "doctor", "schema")


def beholder(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beholder", *args], capture_output=True, text=True, timeout=300, **kwargs
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])

    assert result.exit_code == 0
    assert f"beholder {command}" in re.sub(r"\s+", " ", result.output), "no example"


def test_help_does_not_load_torch() -> None:
    code = "import sys; from typer.testing import CliRunner; from beholder.cli import app; " \
           "CliRunner().invoke(app, ['--help']); sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_wrong_input_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    text = "run_name: x\nmodel:\n  llm: {name_or_path: a}\n  vison: {name_or_path: b}\ndata: {json_path: d}\n"
    config.write_text(text)

    result = beholder("run", str(config))

    assert result.returncode == 2
    assert "c.yaml:4:3" in result.stderr and "vision" in result.stderr
    assert "Traceback" not in result.stderr


def test_ctrl_c_saves_exits_130_and_the_same_command_goes_on_to_the_same_bits(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    configs = {}
    for name in ("straight", "stopped"):
        cfg = tiny_config(
            tmp_path / name,
            **{"train.train_steps": 60, "train.save_every": 50, "eval.run_golden_every": "never", "data.eval_size": 8,
               "eval.caption_samples": 2},
        )  # fmt: skip
        configs[name] = tmp_path / f"{name}.yaml"
        configs[name].write_text(dump_config(cfg))
    metrics = tmp_path / "stopped" / "run" / "metrics.jsonl"

    process = subprocess.Popen(
        [sys.executable, "-m", "beholder", "run", str(configs["stopped"])],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output
    assert "The same command continues" in output
    assert json.loads((tmp_path / "stopped" / "run" / "run.json").read_text())["status"] == "cancelled"
    steps = [p.name for p in (tmp_path / "stopped" / "run" / "checkpoints").glob("step_*")]
    assert steps and "step_60" not in steps

    again = beholder("run", str(configs["stopped"]))
    straight = beholder("run", str(configs["straight"]))

    assert again.returncode == 0, again.stderr
    assert straight.returncode == 0, straight.stderr
    assert "[resume] from" in again.stdout
    files = [tmp_path / n / "run" / "checkpoints" / "step_60" / "connector.safetensors" for n in configs]
    assert sha256_file(files[0]) == sha256_file(files[1])


def test_check_counts_and_rejects_by_name(tiny_parts: TinyParts, tmp_path: Path) -> None:
    records = tmp_path / "records.jsonl"
    bad = '{"id": "empty", "images": ["x.png"], "caption": ""}\n{broken\n'
    records.write_text(tiny_parts.records.read_text() + bad)

    result = beholder("check", str(records), "--image-root", str(tiny_parts.images), "--json",
                      "--rejects", str(tmp_path / "rejects.jsonl"), "--tokenizer", str(tiny_parts.llm))  # fmt: skip

    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["records"] == 74
    reasons = {json.loads(line)["reason"] for line in (tmp_path / "rejects.jsonl").read_text().splitlines()}
    assert {"bad_json", "empty_caption"} <= reasons


def test_report_is_rendered_again_from_the_evidence_alone(tiny_config: MakeConfig, tmp_path: Path) -> None:
    from beholder.stages import run_stage

    run_stage(tiny_config(tmp_path))
    run = tmp_path / "run"
    page = (run / "report.html").read_text()
    for path in list(run.rglob("*")):
        if path.is_file() and path.name != "evidence.json":
            path.unlink()

    result = CliRunner().invoke(app, ["report", str(run)])

    assert result.exit_code == 0, result.output
    assert (run / "report.html").read_text() == page
