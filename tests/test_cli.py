"""The command line as a person meets it: exit codes, messages, signals. Each call is a process of its own."""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from tests.conftest import MakeConfig, TinyParts
from tests.use.talking import untrained_run
from typer.testing import CliRunner

from beholder import cli, types
from beholder.cli import app
from beholder.cli.common import exit_for
from beholder.config.file import dump_config, load_scaled
from beholder.runs import sha256_file
from beholder.stages import Outcome
from beholder.types import Status, UserError

COMMANDS = (
    "quickstart", "run", "prepare", "check", "preview", "plan", "generate", "chat", "score", "evaluate", "ablate",
    "export", "audit", "golden show", "golden diff", "sweep", "distill", "compare", "report", "doctor",
    "doctor teacher", "doctor distillation", "doctor batch", "doctor inference", "schema",
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


def test_what_the_help_says_is_behind_a_command_is_there() -> None:
    for command in COMMANDS:
        *group, name = command.split()
        groups = {g.name: g.typer_instance for g in app.registered_groups}
        commands = (groups[group[0]] if group else app).registered_commands
        own = [c.callback for c in commands if c.callback and (c.name or c.callback.__name__) == name]
        callback = own[0] if own else groups[name].registered_callback.callback
        told = re.findall(r"(?:Python:|;)\s+(beholder(?:\.\w+)+)", inspect.getdoc(callback) or "")

        assert told, f"{command}: its help names no function"
        for name in told:
            assert callable(pkgutil.resolve_name(name)), name


def test_the_choices_of_the_command_line_are_those_of_the_functions_behind() -> None:
    from beholder import config
    from beholder.prepare import packages
    from beholder.stages import learnable
    from beholder.use import export, score

    def choices(function: Any, parameter: str) -> tuple[str, ...]:
        hint = typing.get_type_hints(function)[parameter]
        told = [hint, *typing.get_args(hint)]
        return next(typing.get_args(h) for h in told if typing.get_origin(h) is typing.Literal)

    settings = config.RunConfig
    assert choices(cli.before.check, "dataset") == typing.get_args(config.DatasetKind)
    assert choices(cli.before.check, "shape") == typing.get_args(types.ShapeName)
    assert choices(cli.use.generate, "device") == choices(settings, "device")
    assert choices(cli.use.export, "to") == choices(export.export, "to")
    assert choices(cli.use.score, "kind") == typing.get_args(score.Kind)
    assert choices(cli.before.prepare, "name") == (*choices(packages.prepare, "name"), "unified")
    for parameter in ("part", "learner"):
        assert choices(cli.before.audit, parameter) == choices(learnable.audit_subject, parameter)


# ---------------------------------------------------------------------------------------------------------------
# What is loaded

HEAVY = ("torch", "torchvision", "transformers", "timm", "peft")


def loaded_by(*args: str) -> set[str]:
    """The heavy libraries that a command has imported when it ends."""
    code = (
        "import atexit, sys; from beholder.cli import main\n"
        f"atexit.register(lambda: print('LOADED', *(m for m in {HEAVY} if m in sys.modules), file=sys.stderr))\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rsplit("LOADED", 1)[1].split())


def test_help_loads_no_heavy_library() -> None:
    assert loaded_by("--help") == loaded_by("check", "--help") == set()


def test_files_are_checked_and_scored_without_a_heavy_library(
    tiny_parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"question_id": 1, "answer": "yes"}\n')

    for options in ((), ("--decode",)):
        assert loaded_by("check", str(tiny_parts.records), "--image-root", str(tiny_parts.images), *options) == set()
    for kind in ("vqa", "pope"):
        assert loaded_by("score", kind, "--predictions", str(answers), "--references", str(answers)) == set()


def test_counting_tokens_loads_the_tokenizer_and_no_tower(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "c.yaml"
    config.write_text(dump_config(tiny_config(tmp_path)))

    # transformers brings torch, and torchvision with the class that says how many positions there are.
    assert loaded_by("check", str(config)) <= {"transformers", "torch", "torchvision"}


@pytest.mark.parametrize(("tower", "adapters"), [("siglip", False), ("siglip", True), ("repvit", False)])
def test_a_run_loads_the_library_of_its_tower_and_peft_for_adapters_alone(
    tiny_parts: TinyParts, tmp_path: Path, tower: Literal["siglip", "repvit"], adapters: bool
) -> None:
    from beholder.prepare.tiny import tiny_vision

    name, weights = tiny_vision(tmp_path / "vision", tower)
    sets: dict[str, Any] = {"model.vision.name_or_path": name} | ({"model.vision.weights": weights} if weights else {})
    sets |= {} if adapters else {"stage": "align", "model.lora": {"enable": False}}
    run = untrained_run(tiny_parts, tmp_path, **sets)
    asked = ("--image", str(min(tiny_parts.images.glob("*.png"))), "--max-new-tokens", "2", "--device", "cpu")

    loaded = loaded_by("generate", str(run), *asked, *(("--prompt", "What?") if adapters else ()))

    assert ("timm" in loaded, "peft" in loaded) == (tower == "repvit", adapters)


def test_what_a_config_switches_off_is_one_note_and_no_traceback(tiny_config: MakeConfig, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    text = dump_config(tiny_config(tmp_path))
    config.write_text(text.replace("  golden_size: 3\n", "  golden_size: 0\n"))
    assert "max_new_tokens: 6" in text and config.read_text() != text

    result = beholder("check", str(config), env={**os.environ, "BEHOLDER_CACHE": str(tmp_path / "cache")})

    assert result.returncode == 0, result.stderr
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "eval.golden_generate.max_new_tokens: has no effect here: the fixed set" in notes[0]
    assert "ConfigNote" not in result.stderr


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


def test_check_names_the_layout_first_and_fails_over_a_file_that_gives_nothing(tmp_path: Path) -> None:
    def write(name: str, value: object) -> str:
        (tmp_path / name).write_text(json.dumps(value))
        return str(tmp_path / name)

    (tmp_path / "a.png").write_bytes(b"x")
    good = {"image": "a.png", "text": "a red tile", "messages": [{"role": "assistant", "content": "x"}]}
    boxes = [{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]
    objects = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": boxes}

    told = CliRunner().invoke(app, ["check", write("a.json", {"data": [good]}), "--as", "caption"])
    assert told.exit_code == 0 and told.output.startswith("read as JSON object with one array of caption (1)")
    for path, why in (
        (write("b.json", {"data": [good]}), "two_shapes"),
        (
            write("c.json", {"data": [{"imge": "a.png", "captoin": "x"}]}),
            "nearest: image for imge, caption for captoin",
        ),
        (write("d.json", objects), "the annotation has no caption"),
    ):
        done = beholder("check", path, env={**os.environ, "COLUMNS": "1000"})
        assert done.returncode == 2 and why in done.stdout, done.stdout
        assert f"{path}: nothing was accepted" in done.stderr and "--as" in done.stderr


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

    done = CliRunner().invoke(app, ["ablate", str(trained), "--num-samples", "6", "--words", "--json"])

    told = json.loads(done.stdout)  # progress is told beside it
    assert "[data]" in done.stderr

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
    with pytest.raises(UserError, match="--condition none: expected one of shuffled, zero, noise"):
        invoke("ablate", str(trained), "--condition", "none")


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
    done = CliRunner().invoke(app, ["audit", str(trained / "config.yaml"), "--num-turns", "8", "--json"])

    names = {m["name"] for m in json.loads(done.stdout)["measurements"]}
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


# ---------------------------------------------------------------------------------------------------------------
# Stage 2


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A run of stage instruct as its training would leave it, with random weights."""

    return untrained_run(request.getfixturevalue("tiny_parts"), tmp_path_factory.mktemp("chatty"))


def test_a_scale_sets_what_it_names_and_has_a_run_folder_of_its_own(tiny_config: MakeConfig, tmp_path: Path) -> None:
    scales = {"tiny": {"data.max_samples": 40, "train.train_steps": None, "train.num_epochs": 2}}
    config = tmp_path / "c.yaml"
    config.write_text(dump_config(tiny_config(tmp_path, scales=scales)))
    folder = tmp_path / "run"

    tiny, settings = load_scaled(config, "tiny")
    assert (tiny.data.max_samples, tiny.train.train_steps, tiny.train.num_epochs) == (40, None, 2)
    assert tiny.run_dir == f"{folder}_tiny"
    assert settings[0] == "data.max_samples=40"

    assert load_scaled(config, "tiny", ["data.max_samples=30"])[0].data.max_samples == 30, "--set comes after the scale"
    assert load_scaled(config, "tiny", [f"output_dir={tmp_path / 'mine'}"])[0].run_dir == str(tmp_path / "mine")
    assert load_scaled(config, "full")[0].run_dir == str(folder)
    with pytest.raises(UserError, match=r"--scale 'huge'.*tiny"):
        load_scaled(config, "huge")


def test_run_takes_a_scale(tiny_config: MakeConfig, tmp_path: Path) -> None:
    scales = {"two": {"train.train_steps": 2, "eval.caption_samples": 0, "eval.golden_size": 0}}
    config = tmp_path / "c.yaml"
    config.write_text(dump_config(tiny_config(tmp_path, scales=scales)))

    result = CliRunner().invoke(app, ["run", str(config), "--scale", "two"], catch_exceptions=False)

    assert result.exit_code == 3, result.output  # two steps of random parts pass no gate
    assert "scale two: train.train_steps=2" in result.output
    assert (tmp_path / "run_two" / "checkpoints" / "step_2").is_dir() and not (tmp_path / "run").exists()


def test_generate_answers_one_question_or_a_file_of_them(chatty: Path, tiny_parts: TinyParts, tmp_path: Path) -> None:
    image = min(tiny_parts.images.glob("*.png"))
    questions, out = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text(json.dumps({"id": "q1", "image": image.name, "prompt": "What?"}) + "\n")
    many = [
        "generate",
        str(chatty),
        "--from",
        str(questions),
        "--image-root",
        str(tiny_parts.images),
        "--out",
        str(out),
    ]

    one = invoke("generate", str(chatty), "--image", str(image), "--prompt", "What?", "--max-new-tokens", "8")
    first, again = (invoke(*many, "--max-new-tokens", "8") for _ in range(2))

    (answer,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert (answer["id"], answer["answer"]) == ("q1", one.rstrip("\n"))
    assert "1 questions answered, 0 were before" in first and "0 questions answered, 1 were before" in again


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give --image FILE, or many questions with --from"),
        (["--from", "q.jsonl"], "--from needs --out"),
        (["--from", "q.jsonl", "--out", "a.jsonl", "--image", "a.png"], "remove --image"),
        (["--from", "q.jsonl", "--out", "a.jsonl", "--temperature", "1"], "greedily"),
        (["--image", "a.png", "--out", "a.jsonl"], "belong to --from"),
        (["--from", "nowhere.jsonl", "--out", "a.jsonl"], r"nowhere\.jsonl: cannot be read"),
    ],
)
def test_generate_says_which_options_belong_together(args: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        invoke("generate", "outputs/not_looked_at", *args)


def test_check_wants_the_options_of_a_file_for_a_file(trained: Path) -> None:
    with pytest.raises(UserError, match="DATA is a config file"):
        invoke("check", str(trained / "config.yaml"), "--annotations", "a.json")


def test_chat_through_a_pipe_prints_the_answers(chatty: Path, tiny_parts: TinyParts) -> None:
    from beholder.types import printable
    from beholder.use.vlm import load

    image = min(tiny_parts.images.glob("*.png"))

    result = beholder("chat", str(chatty), "--image", str(image), "--max-new-tokens", "8", input="What?\n/quit\n")

    assert result.returncode == 0, result.stderr
    assert result.stdout == printable(load(chatty, device="cpu").chat("What?", image, max_new_tokens=8)) + "\n"


def test_a_wrong_line_of_a_scripted_chat_is_exit_code_2(chatty: Path) -> None:
    result = beholder("chat", str(chatty), input="/picture a.png\n")

    assert result.returncode == 2
    assert "/picture is no command" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow  # a whole answer and a half, at the pace of a terminal
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are a POSIX thing")
def test_at_a_terminal_ctrl_c_stops_an_answer_and_ctrl_d_leaves(chatty: Path, tiny_parts: TinyParts) -> None:
    import pty
    import select

    keyboard, terminal = pty.openpty()
    image = min(tiny_parts.images.glob("*.png"))
    process = subprocess.Popen(
        [sys.executable, "-m", "beholder", "chat", str(chatty), "--image", str(image), "--max-new-tokens", "4000"],
        stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    seen = ""

    def read_until(done: Callable[[], bool]) -> None:
        nonlocal seen
        deadline = time.monotonic() + 150
        while not done():
            assert time.monotonic() < deadline, f"nothing more after {seen!r}"
            if select.select([keyboard], [], [], 1.0)[0]:
                seen += os.read(keyboard, 4096).decode(errors="replace")

    def wait_for(text: str, after: int = 0) -> None:
        read_until(lambda: text in seen[after:])

    try:
        wait_for("you> ")
        os.write(keyboard, b"/picture\n")
        wait_for("/picture is no command")  # a mistake does not end a conversation
        asked = len(seen)
        os.write(keyboard, "Größe?\n".encode())
        read_until(lambda: len(seen) > asked + 200)  # it is in the middle of its answer
        process.send_signal(signal.SIGINT)
        wait_for("(stopped; Ctrl-C again or /quit leaves)")
        wait_for("you> ", seen.index("(stopped"))  # before the prompt the terminal would swallow it
        os.write(keyboard, b"\x04")

        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(keyboard)


# ---------------------------------------------------------------------------------------------------------------
# What a newcomer stumbled over


def test_only_the_main_process_of_a_job_leaves_with_more_than_0() -> None:
    for outcome in (Outcome(Path("x"), Status.CANCELLED, 3, signal.SIGTERM), Outcome(Path("x"), Status.SUCCEEDED, 3)):
        with pytest.raises(typer.Exit) as left:
            exit_for(replace(outcome, is_main=False))
        assert left.value.exit_code == 0


def test_check_takes_the_names_of_columns_for_a_file_and_not_for_a_config(
    trained: Path, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    image = next(Path(tiny_parts.images).rglob("*.png"))
    (tmp_path / "a.csv").write_text(f"img,description\n{image.name},a red tile on a wall\n")
    names = ("--column", "image=img", "--column", "caption=description", "--image-root", str(image.parent))

    assert json.loads(invoke("check", str(tmp_path / "a.csv"), *names, "--json"))["accepted"] == 1
    with pytest.raises(UserError, match="expected FIELD=NAME"):
        invoke("check", str(tmp_path / "a.csv"), "--column", "img")
    with pytest.raises(UserError, match=r"--column.*describe a record file"):
        invoke("check", str(trained / "config.yaml"), *names)


def test_a_finished_run_says_which_settings_it_was_not_made_with(trained: Path) -> None:
    again = ["run", str(trained / "config.yaml")]
    output = CliRunner().invoke(app, [*again, "--set", "eval.answer_tokens=3"]).output

    assert "had finished before" in output and re.search(r"eval\.answer_tokens: \d+ → 3", output)
    assert "→" not in CliRunner().invoke(app, again).output
