"""What the commands share: the application, their exit codes, the options that several have, how a record is told."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from beholder.terminal import Terminal
from beholder.types import UserError, printable

if TYPE_CHECKING:
    from beholder.stages import Outcome

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER = 2
"""The input was wrong; the message says what to do."""
EXIT_GATES = 3
"""The run finished, and its evidence does not meet its gates; or a check of ``beholder doctor`` does not hold, or
answers that ``beholder parity`` compares differ."""
EXIT_GUARDRAIL = 4
"""The run stopped itself: a guardrail, or a loss or gradient that was not finite."""
EXIT_SIGINT = 130
EXIT_SIGTERM = 143
"""Ctrl-C or SIGTERM during training: the step was finished and a checkpoint written."""

ORDER = (
    "quickstart", "run", "watch", "prepare", "check", "preview", "plan", "generate", "chat", "serve", "score",
    "evaluate", "ablate", "export", "parity", "audit", "layers", "sweep", "footprint", "teacher-cache", "distill",
    "compare", "report", "doctor", "schema", "golden",
)  # fmt: skip
"""The commands as a person meets them, whatever file they stand in; one that is missing here comes last."""


class _InOrder(TyperGroup):
    def list_commands(self, ctx: Any) -> list[str]:
        return sorted(super().list_commands(ctx), key=lambda name: (*ORDER, name).index(name))


app = typer.Typer(
    name="beholder",
    cls=_InOrder,
    help="Grow eyes on a language model, one proven stage at a time.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 crash, 2 wrong input, 3 finished but gates (doctor: checks; parity: answers) failed, "
    "4 stopped by a guardrail, 130/143 interrupted (in training: after the step was saved).",
)


def _version(asked: bool) -> None:
    if asked:
        from beholder import __version__

        typer.echo(f"beholder {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. train.lr.connector=2e-4. Repeatable."),
]
PartSets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="For parts that were moved, e.g. model.vision.weights=FILE."),
]
ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config file.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, e.g. outputs/quickstart/instruct.")]
ImageRoots = Annotated[
    list[Path] | None,
    typer.Option(
        "--image-root",
        metavar="FOLDER",
        help="Folder the image paths are relative to; default the file's own. Repeatable: symlinks may lead into the "
        "others.",
    ),
]
# typer reads these lists on start, before any import of settings (pydantic) would be worth its time; a test holds them
# to the lists of the functions behind.
Json = Annotated[bool, typer.Option("--json", help="Print as JSON.")]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where the model runs.")]


def example(text: str) -> str:
    return f"[bold]Example:[/bold] {escape(text)}"


def terminal(stderr: bool = False) -> Terminal:
    return Terminal(stderr=stderr)


def say(line: str, err: bool = False) -> None:
    """A line as it is: not wrapped, never markup."""
    typer.echo(printable(line), err=err)


def without_extra(error: ModuleNotFoundError) -> Exception:
    """What to raise where an import that the extra ``serve`` is for failed."""
    if error.name not in ("fastapi", "starlette", "uvicorn", "h11", "prometheus_client"):
        return error
    return UserError(f'{error.name} is not installed; install what serving needs: pip install "beholder[serve]"')


class Record(Protocol):
    """What the function behind a command gives."""

    def print(self, console: Console, /) -> None: ...

    def to_json(self) -> Any: ...


def tell(record: Record, json: bool = False, stderr: bool = False) -> None:
    """A record as a person reads it, or as JSON; of a job of several processes only the main one speaks."""
    if not getattr(record, "is_main", True):
        return
    if json:
        from beholder.runs import to_json

        say(to_json(record.to_json(), indent=2))
    else:
        record.print(terminal(stderr))


def exit_for(outcome: Outcome) -> None:
    """Says how a run ended and leaves with its exit code."""
    if not outcome.is_main:
        raise typer.Exit(EXIT_OK)
    outcome.print(terminal())
    if outcome.signal is not None:
        raise typer.Exit(EXIT_SIGINT if outcome.signal == signal.SIGINT else EXIT_SIGTERM)
    if outcome.stopped:
        raise typer.Exit(EXIT_GUARDRAIL)
    raise typer.Exit(EXIT_GATES if outcome.failed_gates else EXIT_OK)
