"""What came out of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from beholder.cli.common import Json, RunArg, Sets, app, example, exit_for, say, tell, without_extra
from beholder.types import UserError

golden_app = typer.Typer(help="Look at the captions of the fixed golden set, step by step.", no_args_is_help=True)
app.add_typer(golden_app, name="golden")


@app.command(epilog=example("beholder watch outputs/quickstart/instruct"))
def watch(
    run_folder: Annotated[str, typer.Argument(metavar="RUN", help="A run folder, also one that is not there yet.")],
    host: Annotated[
        str, typer.Option(help="Where to listen; other than this machine alone needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8001,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the key of the page.")
    ] = None,
) -> None:
    """Show a run in a browser while it trains: curves, golden set by step, gates so far. Nothing is written.

    Needs the extra "serve" (fastapi, uvicorn, prometheus-client). Python: beholder.watching.app.watch.
    """
    try:
        from beholder.watching.app import watch as show
    except ModuleNotFoundError as error:
        raise without_extra(error) from None
    from beholder.web.keys import MIN_KEY, key_in

    show(
        run_folder, host=host, port=port, key=key_in(api_key_env, least=MIN_KEY),
        ready=lambda url: say(f"{run_folder} is shown at {url}"),
    )  # fmt: skip


@app.command(epilog=example("beholder evaluate outputs/quickstart/instruct"))
def evaluate(
    run_folder: RunArg,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="How it is measured, e.g. eval.caption_samples=100."),
    ] = None,
) -> None:
    """Measure a trained run again on its held-out samples and rewrite evidence and report.

    Python: beholder.stages.remeasure.evaluate_run.
    """
    from beholder.stages.remeasure import evaluate_run

    exit_for(evaluate_run(run_folder, sets or []))


@app.command(epilog=example("beholder ablate outputs/quickstart --num-samples 256 --words"))
def ablate(
    run_folder: RunArg,
    num_samples: Annotated[int | None, typer.Option(min=2, help="Held-out samples; default the run's own.")] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="A wrong image: shuffled, zero or noise. Repeatable; default the run's own."),
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="Also say which words lose most without the image.")] = False,
    slots: Annotated[
        bool, typer.Option("--slots", help="Of samples of several images: does every place count, do answers follow?")
    ] = False,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Loss with its own, another's, an empty and a noise image: does the run look? Its evidence stays as it is.

    Python: beholder.stages.remeasure.ablate_run, ablate_slots.
    """
    from beholder.stages.remeasure import ablate_run, ablate_slots

    if slots:
        if words or condition:
            raise UserError("--slots replaces one image at a time, in its own ways; remove --words and --condition")
        tell(ablate_slots(run_folder, num_samples=num_samples, overrides=sets or []), json)
        return
    tell(ablate_run(run_folder, num_samples=num_samples, conditions=condition, words=words, overrides=sets or []), json)


@golden_app.command("show", epilog=example("beholder golden show outputs/quickstart/align --step last"))
def golden_show(
    run_folder: RunArg,
    step: Annotated[str, typer.Option(help="A step, first or last.")] = "last",
    json: Json = False,
) -> None:
    """Captions of the golden set after a step, and what ails them. Python: beholder.probes.golden_history.show_step."""
    from beholder.probes.golden_history import show_step

    tell(show_step(run_folder, step), json)


@golden_app.command("diff", epilog=example("beholder golden diff outputs/quickstart first last"))
def golden_diff(
    run_folder: RunArg,
    before: Annotated[str, typer.Argument(metavar="STEP", help="A step, first or last.")],
    after: Annotated[str, typer.Argument(metavar="STEP", help="A step, first or last.")],
    json: Json = False,
) -> None:
    """What changed in the captions between two steps, word by word.

    Python: beholder.probes.golden_history.diff_steps.
    """
    from beholder.probes.golden_history import diff_steps

    tell(diff_steps(run_folder, before, after), json)


@app.command(epilog=example("beholder layers outputs/quickstart/instruct"))
def layers(
    run_folder: RunArg,
    num_samples: Annotated[int, typer.Option(min=4, max=4096, help="Held-out samples.")] = 64,
    step: Annotated[int | None, typer.Option(min=1, help="Of this checkpoint.  [default: the best]")] = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """How much each layer of the language model changes what passes through it: CKA of its input and output.

    Python: beholder.stages.layers.layers_of_run.
    """
    from beholder.stages.layers import layers_of_run

    tell(layers_of_run(run_folder, num_samples=num_samples, step=step, overrides=sets or []), json)


@app.command(epilog=example("beholder compare outputs/a outputs/b --out compare.html"))
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Run folders, two or more.")],
    out: Annotated[Path | None, typer.Option(help="Write the comparison to this .html or .md file.")] = None,
    json: Json = False,
) -> None:
    """Lay runs side by side: settings that differ, measurements with intervals, gates.

    Python: beholder.report.compare.compare_runs.
    """
    from beholder.report.compare import compare_runs

    if out is not None and out.suffix not in (".html", ".md"):
        raise UserError(f"--out {out}: expected a file that ends in .html or .md")
    if out is not None and not out.parent.is_dir():
        raise UserError(f"--out {out}: expected a file in an existing folder")
    comparison = compare_runs(runs)
    tell(comparison, json)
    if out is not None:
        comparison.write(out)
        say(f"written to {out}", err=True)


@app.command(epilog=example("beholder report outputs/quickstart/instruct"))
def report(run_folder: RunArg, json: Json = False) -> None:
    """Render report.html and report.md again, from evidence.json alone. Python: beholder.report.render.render."""
    from beholder.report import render

    tell(render(run_folder, run_folder), json)
