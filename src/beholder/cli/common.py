"""What the commands share: the application, their exit codes, the options that several have, how a record is told."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

if TYPE_CHECKING:
    from beholder.stages import Outcome

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USER = 2
"""The input was wrong; the message says what to do."""
EXIT_GATES = 3
"""The run finished, and its evidence does not meet its gates."""
EXIT_GUARDRAIL = 4
"""The run stopped itself: a loss or gradient was not finite."""
EXIT_SIGINT = 130
EXIT_SIGTERM = 143
"""Ctrl-C or SIGTERM during training: the step was finished and a checkpoint written."""

ORDER = (
    "quickstart", "run", "prepare", "check", "preview", "plan", "generate", "chat", "score", "evaluate", "ablate",
    "audit", "sweep", "compare", "report", "doctor", "schema", "golden",
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
    epilog="Exit codes: 0 done, 1 crash, 2 wrong input, 3 finished but gates failed, 4 stopped by a guardrail, "
    "130/143 interrupted (in training: after the step was saved).",
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
# typer reads these lists on start, before any import of settings (pydantic) would be worth its time; a test holds them
# to the lists of the functions behind.
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where the model runs.")]


def example(text: str) -> str:
    return f"[bold]Example:[/bold] {escape(text)}"


def terminal(stderr: bool = False) -> Console:
    return Console(highlight=False, stderr=stderr)


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

        typer.echo(to_json(record.to_json(), indent=2))
    else:
        record.print(terminal(stderr))


def exit_for(outcome: Outcome, *, smoke: bool = False) -> None:
    """Prints where the report is and leaves with the exit code of the run's status.

    ``smoke``: random parts and a few steps prove the plumbing and cannot pass a gate.
    """
    if not outcome.is_main:
        raise typer.Exit(EXIT_OK)
    say = partial(terminal().print, markup=False, soft_wrap=True)
    if outcome.signal is not None:
        say(
            f"stopped by {signal.Signals(outcome.signal).name} after step {outcome.step}; saved in {outcome.folder}. "
            "The same command continues.",
        )
        raise typer.Exit(EXIT_SIGINT if outcome.signal == signal.SIGINT else EXIT_SIGTERM)
    if outcome.again:
        say(
            f"{outcome.folder} had finished before; its report is {outcome.folder / 'report.html'}. "
            f"To measure it again: beholder evaluate {outcome.folder}. To train anew choose another output folder.",
        )
    if smoke:
        terminal().print("smoke run: everything ran; its gates are not judged, tiny random parts cannot pass them")
    elif outcome.evidence is not None and outcome.evidence.gates and outcome.evidence.failed_gates:
        failed = outcome.evidence.failed_gates
        say(
            f"\nGATES FAILED: {len(failed)} of {len(outcome.evidence.gates)} ({', '.join(g.name for g in failed)}). "
            f"Read {outcome.folder / 'report.html'} before you build on this run; a later stage refuses it unless it "
            "is told --promote-anyway.",
        )
        raise typer.Exit(EXIT_GATES)
    raise typer.Exit(EXIT_OK)


def progress_line() -> Callable[[str, int, int], None]:
    """Long checks say where they are, on standard error: a line that overwrites itself, or one every tenth."""
    started: dict[str, float] = {}
    last: dict[str, int] = {}
    tty = sys.stderr.isatty()

    def tick(what: str, done: int, total: int) -> None:
        began = started.setdefault(what, time.perf_counter())
        elapsed, tenth = time.perf_counter() - began, 10 * done // max(total, 1)
        if elapsed < 2 or (not tty and tenth == last.get(what)):
            return
        last[what] = tenth
        eta = elapsed * (total - done) / max(done, 1)
        end = "\r" if tty and done < total else "\n"
        print(f"[progress] {what} {done:,}/{total:,} ETA {eta:.0f} s ", end=end, file=sys.stderr, flush=True)

    return tick
