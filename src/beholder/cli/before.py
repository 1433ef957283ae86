"""Before a run: fetch, vet, preview, estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from beholder.cli.common import ConfigArg, ImageRoots, Json, Sets, app, example, say, tell, terminal
from beholder.types import DatasetKind, ShapeName, UserError

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--column", metavar="FIELD=NAME", help="What a field is called here, as caption=description. Repeatable."
    ),
]


@app.command(epilog=example("beholder prepare openmoji"))
def prepare(
    name: Annotated[
        Literal["quickstart", "openmoji", "ood", "unified"],
        typer.Argument(
            metavar="NAME",
            help="quickstart: its parts and easy-VQA. openmoji: drawings and their names. ood: images to watch a model "
            "with (eval.ood, eval.irrelevant). unified: FILES of any layout as JSON lines of {image, instruction, "
            "response, metadata}.",
        ),
    ],
    files: Annotated[
        list[str] | None, typer.Argument(metavar="[FILES]", help="unified: record files, shards, folders or globs.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to fill; default data/NAME. unified: the file to write.")
    ] = None,
    font: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="ood: a font for scripts that DejaVu lacks, such as Chinese. Repeatable."),
    ] = None,
    image_root: ImageRoots = None,
    annotations: Annotated[Path | None, typer.Option(help="unified: the answers of a VQA question file.")] = None,
    shape: Annotated[ShapeName | None, typer.Option("--as", help="unified: what every record says.")] = None,
    column: Columns = None,
    split_turns: Annotated[
        bool,
        typer.Option(
            "--split-turns",
            help="unified: a line of every answer, with what was said before it as text in its instruction. Without it "
            "a dialogue of several turns is a counted reject, as one with several images always is.",
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="unified: replace the file.")] = False,
    rejects: Annotated[Path | None, typer.Option(help="unified: write every reject to this JSONL file.")] = None,
    json: Json = False,
) -> None:
    """Fetch pinned packages and turn them into the parts and data that the configs name, or (unified) turn data into
    one format. Nothing is installed.

    Python: beholder.prepare.packages.prepare; beholder.prepare.unified.unify.
    """
    if (fonts := font or []) and name != "ood":
        raise UserError(f"--font is for prepare ood; {name} draws no text")
    if name == "unified":
        if out is None:
            raise UserError("prepare unified writes a file; name it: --out FILE")
        from beholder.prepare.unified import unify
        from beholder.train.reporter import ticking

        roots = image_root or []
        with ticking(terminal(stderr=True)) as tick:
            told = unify(
                files or [], out, shape=shape, columns=_pairs(column), annotations=annotations,
                image_root=next(iter(roots), None), more_image_roots=roots[1:], split_turns=split_turns, force=force,
                rejects=rejects, progress=tick,
            )  # fmt: skip
        return tell(told, json)
    if files or image_root or annotations or shape or column or split_turns or force or rejects or json:
        raise UserError(f"FILES and what describes them are for prepare unified; prepare {name} has --out alone")
    from beholder.prepare.packages import prepare as prepare_assets

    say(f"{name} is ready in {prepare_assets(name, out or Path('data') / name, say=say, fonts=fonts)}")


def _pairs(column: list[str] | None) -> dict[str, str]:
    columns = dict(pair.split("=", 1) for pair in column or [] if "=" in pair)
    if len(columns) < len(column or []):
        raise UserError(
            f"--column {' '.join(column or [])}: expected FIELD=NAME, each field once, as caption=description"
        )
    return columns


@app.command(epilog=example("beholder check data/captions.jsonl --image-root data/images --decode"))
def check(
    data: Annotated[str, typer.Argument(metavar="DATA", help="A record file, shard, folder, glob, URL, or config.")],
    dataset: Annotated[
        DatasetKind | None, typer.Option(help="Hold DATA to this kind; recognised by looking when not given.")
    ] = None,
    shape: Annotated[
        ShapeName | None, typer.Option("--as", help="What every record says; recognised by looking when not given.")
    ] = None,
    column: Columns = None,
    annotations: Annotated[Path | None, typer.Option(help="vqa: the annotation file with the answers.")] = None,
    stage: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Whose rules records are held to (align, instruct); guessed from DATA."),
    ] = None,
    image_root: ImageRoots = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub name, folder or GGUF file, to count tokens.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image and find equal ones.")] = False,
    rejects: Annotated[Path | None, typer.Option(help="Write every reject to this JSONL file.")] = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Count, measure and vet a data set without training: lengths, rejects with reasons, duplicates.

    Python: beholder.prepare.check.check.
    """
    from beholder.prepare.check import check as check_files
    from beholder.train.reporter import ticking

    columns = _pairs(column)
    roots = image_root or []
    with ticking(terminal(stderr=True)) as tick:
        report = check_files(
            data, dataset=dataset, shape=shape, columns=columns, annotations=annotations, stage=stage,
            tokenizer=tokenizer, decode=decode, image_root=next(iter(roots), None), more_image_roots=roots[1:],
            rejects=rejects, overrides=sets or [], progress=tick,
        )  # fmt: skip
    tell(report, json)
    if rejects is not None:
        say(f"rejects written to {rejects}", err=True)
    if report.fruitless:
        raise UserError(
            f"{', '.join(report.fruitless[:3])}: nothing was accepted; the rejects above say why. Fields called "
            "otherwise: --column caption=NAME (columns in data.sources); images elsewhere: --image-root DIR; several "
            "images a record: --stage align; where looking does not tell what records say: --as SHAPE"
        )


@app.command(epilog=example("beholder preview configs/stage1_align.yaml --num 3 --out preview"))
def preview(
    config: ConfigArg,
    num: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the images as the model sees them.")] = Path("preview"),
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Print samples as the model gets them: supervised tokens coloured, image spans marked, images beside them.

    Python: beholder.prepare.preview.preview_config.
    """
    from beholder.config.file import load_config

    cfg = load_config(config, sets or [])
    from beholder.prepare.preview import preview_config

    tell(preview_config(cfg, num, out), json)


@app.command(epilog=example("beholder plan configs/stage1_align.yaml"))
def plan(
    config: ConfigArg,
    llm_config: Annotated[
        Path | None, typer.Option(help="config.json of the language model, or of model.native, when offline.")
    ] = None,
    vision_config: Annotated[Path | None, typer.Option(help="config.json of the tower, when offline.")] = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Say what will be trained, how much memory and time it takes, before anything large is loaded.

    Python: beholder.prepare.estimate.estimate.
    """
    from beholder.config.file import load_config

    cfg = load_config(config, sets or [])  # a wrong one is told before seconds of imports
    from beholder.prepare.estimate import estimate

    tell(estimate(cfg, llm_config=llm_config, vision_config=vision_config), json)


@app.command(epilog=example("beholder audit data/questions.jsonl --image-root data/images"))
def audit(
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="A config, a run folder, or a record file.")],
    num_turns: Annotated[
        int | None, typer.Option(min=1, help="Answers of a config's or run's data that its language model scores; 256.")
    ] = None,
    part: Annotated[
        Literal["train", "eval"] | None, typer.Option(help="Which samples of a config or run; train.")
    ] = None,
    learner: Annotated[
        Literal["words", "lm"],
        typer.Option(help="Trained without images: on words, in seconds; also a run's language model, in minutes."),
    ] = "words",
    image_root: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Of a record file: what image paths are relative to.")
    ] = None,
    json: Json = False,
    sets: Sets = None,
) -> None:
    """Say how much of a data set can be answered or learned without any image, and which words give it away.

    Python: beholder.stages.learnable.audit_subject.
    """
    if subject.endswith((".yaml", ".yml")):
        from beholder.config.file import load_config

        load_config(subject, sets or [])  # a wrong one is told before seconds of torch
    from beholder.stages.learnable import audit_subject

    found = audit_subject(
        subject, num_turns=num_turns, part=part, learner=learner, image_root=image_root, overrides=sets or []
    )
    tell(found, json)


@app.command(epilog=example("beholder schema > beholder.schema.json"))
def schema() -> None:
    """Print the config's JSON schema, for editors. Python: beholder.config.file.json_schema."""
    import json

    from beholder.config.file import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command("teacher-cache", epilog=example("beholder teacher-cache configs/quickstart/distill.yaml"))
def teacher_cache(config: ConfigArg, sets: Sets = None, json: Json = False) -> None:
    """Ask the teachers of a distillation about every sample once, and keep what they say. Only what is missing is done.

    Training then loads no teacher. Python: beholder.stages.teachers.cache_teachers.
    """
    from beholder.config.file import load_config
    from beholder.stages.teachers import cache_teachers

    tell(cache_teachers(load_config(config, sets or [])), json)
