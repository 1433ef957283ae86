"""What to ask when something is wrong: with this machine, a teacher, a distillation, a batch, an answer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beholder.cli import common
from beholder.cli.common import Device, Json, PartSets, RunArg, Sets, app, example, tell
from beholder.types import UserError

if TYPE_CHECKING:
    from beholder.prepare.diagnose import Examined

doctor_app = typer.Typer(invoke_without_command=True)
app.add_typer(doctor_app, name="doctor")

SubjectArg = Annotated[
    str, typer.Argument(metavar="CONFIG_OR_RUN", help="A config with a distill section, or a run of one.")
]


@doctor_app.callback(epilog=example("beholder doctor"))
def doctor(ctx: typer.Context, json: Json = False) -> None:
    """Look over this machine: versions, device, speed, memory, caches. With a command: look over what it names.

    The commands exit with 0 when every check holds and 3 otherwise. Python: beholder.prepare.doctor.diagnose.
    """
    if ctx.invoked_subcommand is not None:
        if json:
            raise UserError(f"--json comes after the command: beholder doctor {ctx.invoked_subcommand} … --json")
        return
    from beholder.prepare.doctor import diagnose

    found = diagnose()
    tell(found, json)
    raise typer.Exit(common.EXIT_CRASH if found.failed else common.EXIT_OK)


@doctor_app.command(epilog=example("beholder doctor teacher configs/quickstart/distill.yaml"))
def teacher(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG_OR_RUN", help="A config with a distill section, a run, or a folder of a native model."
        ),
    ],
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Let each teacher answer one question about a picture: does it speak, is its answer finite, does it look?

    Of a run folder, the run itself is asked. Python: beholder.prepare.diagnose.examine_teacher.
    """
    from beholder.prepare.diagnose import examine_teacher

    _leave(examine_teacher(subject, sets or []), json)


@doctor_app.command(epilog=example("beholder doctor distillation configs/quickstart/distill.yaml"))
def distillation(
    subject: SubjectArg,
    num: Annotated[int, typer.Option(min=2, max=256, help="Samples to compare on.")] = 8,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Hold teacher and student side by side: tokens, masks, KL of the teacher with itself, what is kept and its error.

    Python: beholder.prepare.diagnose_distill.examine_distillation.
    """
    from beholder.prepare.diagnose_distill import examine_distillation

    _leave(examine_distillation(subject, sets or [], num=num), json)


@doctor_app.command(epilog=example("beholder doctor batch configs/quickstart/distill.yaml --num 2"))
def batch(
    subject: SubjectArg,
    num: Annotated[int, typer.Option(min=1, max=64, help="Samples of the first training step.")] = 2,
    sets: Sets = None,
    json: Json = False,
) -> None:
    """Print a training batch: what is masked, what is learned, and beside each token what the teachers say there.

    Python: beholder.prepare.diagnose_distill.examine_batch.
    """
    from beholder.prepare.diagnose_distill import examine_batch

    _leave(examine_batch(subject, sets or [], num=num), json)


@doctor_app.command(epilog=example("beholder doctor inference outputs/quickstart/instruct"))
def inference(
    run_folder: RunArg,
    image: Annotated[Path | None, typer.Option(help="A picture; default one of the held-out samples.")] = None,
    prompt: Annotated[str | None, typer.Option(help="With --image: what to ask.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
    device: Device = "auto",
    sets: PartSets = None,
    json: Json = False,
) -> None:
    """One answer of a run's checkpoint: with its picture, with another's, without any; and how fast.

    Python: beholder.prepare.diagnose.examine_inference.
    """
    from beholder.prepare.diagnose import examine_inference

    found = examine_inference(
        run_folder, image, prompt, max_new_tokens=max_new_tokens, device=device, overrides=sets or []
    )
    _leave(found, json)


def _leave(found: Examined, json: bool) -> None:
    tell(found, json)
    raise typer.Exit(common.EXIT_GATES if found.failed else common.EXIT_OK)
