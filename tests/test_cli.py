"""The command line as a person meets it: exit codes, messages, signals. Each call is a process of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
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
from beholder.types import UserError

COMMANDS = (
    "quickstart", "run", "prepare", "check", "preview", "plan", "generate", "evaluate", "ablate", "audit",
    "golden show", "golden diff", "sweep", "compare", "report", "doctor", "schema",
)  # fmt: skip


def beholder(*args: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "beholder", *args], capture_output=True, text=True, timeout=300, **kwargs
    )  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = CliRunner().invoke(app, [*command.split(), "--help"])

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

    for ended in (again, straight):  # sixty steps of random parts are no sight, and the run says so
        assert ended.returncode == 3, ended.stderr
        assert "GATES FAILED" in ended.stdout and "--promote-anyway" in ended.stdout
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run folder that the commands below only read."""
    from tests.conftest import make_config

    from beholder.stages import run_stage

    folder = tmp_path_factory.mktemp("trained")
    run_stage(make_config(request.getfixturevalue("tiny_parts"), folder))
    return folder / "run"


def invoke(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_ablate_tells_the_loss_with_wrong_images_and_leaves_the_evidence_alone(trained: Path) -> None:
    before = (trained / "evidence.json").read_bytes()

    told = json.loads("{" + invoke("ablate", str(trained), "--num-samples", "6", "--words", "--json").split("{", 1)[1])

    by_name = {(m["name"], m["stratum"]): m for m in told["measurements"]}
    for condition in ("shuffled", "zero", "noise"):
        delta = by_name[f"ablation.delta.{condition}", None]
        right, wrong = (by_name[f"ablation.loss.{c}", None]["value"] for c in ("correct", condition))
        assert delta["n"] == 6 and delta["value"] == pytest.approx(wrong - right)
    assert (trained / "evidence.json").read_bytes() == before
    rows = [json.loads(line) for line in (trained / "qual" / "step_4_ablation6.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 6 and all(len(r["token_nll"]) == r["tokens"] for r in rows)


def test_ablate_as_a_table(trained: Path) -> None:
    output = invoke("ablate", str(trained), "--condition", "zero")

    assert "no image" in output and "another image" not in output


def test_a_condition_that_does_not_exist_is_named(trained: Path) -> None:
    with pytest.raises(UserError, match=r"upside_down.*expected shuffled or zero or noise"):
        invoke("ablate", str(trained), "--condition", "upside_down")


def test_golden_captions_and_their_change(trained: Path) -> None:
    shown = json.loads(invoke("golden", "show", str(trained), "--step", "first", "--json"))
    change = json.loads(invoke("golden", "diff", str(trained), "2", "last", "--json"))

    assert [row["id"] for row in shown] == [row["id"] for row in change["rows"]]
    assert [row["pred_text"] for row in shown] == [row["before"] for row in change["rows"]]
    assert "exact matches" in invoke("golden", "diff", str(trained), "2", "4")
    assert "captions, step 4" in re.sub(r"\s+", " ", invoke("golden", "show", str(trained)))
    with pytest.raises(UserError, match="3"):
        invoke("golden", "diff", str(trained), "3", "4")


def test_audit_needs_no_run(trained: Path) -> None:
    output = invoke("audit", str(trained / "config.yaml"), "--num-turns", "8", "--json")

    names = {m["name"] for m in json.loads("{" + output.split("{", 1)[1])["measurements"]}
    assert "audit.answerable.alone" in names


def test_compare_lays_runs_side_by_side(trained: Path, tmp_path: Path) -> None:
    page = tmp_path / "compare.html"

    other = tmp_path / "other"
    shutil.copytree(trained, other)

    output = invoke("compare", str(trained), str(other), "--out", str(page))

    assert "eval.loss" in output or "loss" in output
    assert "<html" in page.read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"\.html or \.md"):
        invoke("compare", str(trained), str(other), "--out", "compare.pdf")


def test_a_run_on_a_sweep_config_says_which_command_it_needs(trained: Path) -> None:
    with pytest.raises(UserError, match="beholder sweep"):
        invoke("run", str(trained / "config.yaml"), "--set", "sweep={grid: {train.lr.connector: [1.0e-4]}}")
