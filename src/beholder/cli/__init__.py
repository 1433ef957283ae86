"""The command line: parse, call, print, exit code. Nothing here is worth calling from a notebook.

Every command has a Python function behind it (named in its help) and stands in the file of its kind: `before` a run,
`train`, `look` at what came out, `use` a trained model, `doctor` when something is wrong. Heavy imports happen inside
the commands, so that ``beholder --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from rich.markup import escape

from beholder.cli import before, doctor, look, train, use
from beholder.cli.common import EXIT_CRASH, EXIT_GUARDRAIL, EXIT_SIGINT, EXIT_USER, app, terminal
from beholder.types import ConfigNote, ProcessError, UserError

__all__ = ["app", "before", "doctor", "look", "main", "train", "use"]


def main() -> None:
    """Entry point of ``beholder`` and ``python -m beholder``."""
    # A tokenizer forked into a DataLoader worker warns about its thread pool on every batch otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    err = terminal(stderr=True)
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if not issubclass(category, ConfigNote):
            shown(message, category, *where, **more)
        elif os.environ.get("RANK", "0") == "0":
            err.print(f"[yellow]note:[/yellow] {escape(str(message))}", soft_wrap=True)

    warnings.showwarning = show
    try:
        app()
    except UserError as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(EXIT_USER)
    except ProcessError as error:
        err.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        sys.exit(EXIT_CRASH)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_SIGINT)
    except Exception as error:
        from beholder.train.nonfinite import NonFiniteError

        if isinstance(error, NonFiniteError | FloatingPointError):
            err.print(f"[bold red]stopped:[/bold red] {escape(str(error))}", soft_wrap=True)
            sys.exit(EXIT_GUARDRAIL)
        raise
