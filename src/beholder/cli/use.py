"""A trained model at work, and what its answers are worth."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from beholder.cli.common import (
    EXIT_GATES,
    EXIT_OK,
    Device,
    ImageRoots,
    Json,
    PartSets,
    RunArg,
    app,
    example,
    say,
    tell,
    terminal,
    without_extra,
)


@app.command(
    epilog=example('beholder generate outputs/quickstart/instruct --image a.png --prompt "What colour is it?"')
)
def generate(
    run_folder: RunArg,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image file. Repeatable: image 1, image 2, … of a run that knows several."),
    ] = None,
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
    image_root: ImageRoots = None,
    image_pattern: Annotated[
        str | None, typer.Option(help="With --from: file name of an image_id, as in COCO_val2014_{image_id:012d}.jpg.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --from: questions at a time.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.9,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1)] = 0,
    device: Device = "auto",
    json: Json = False,
    sets: PartSets = None,
) -> None:
    """Say what a trained run sees in an image, or answer a file of questions.

    Python: beholder.load(RUN).generate(image, prompt); beholder.use.generate.generate for files.
    """
    from beholder.train.reporter import ticking
    from beholder.use.generate import generate as ask
    from beholder.use.vlm import decoding

    roots = image_root or []
    with ticking(terminal(stderr=True)) as tick:
        told = ask(
            run_folder, image or [], prompt, questions=questions, out=out, image_root=next(iter(roots), None),
            more_image_roots=roots[1:], image_pattern=image_pattern, batch_size=batch_size,
            how=decoding(temperature, top_p, max_new_tokens), seed=seed, device=device, overrides=sets or [],
            progress=tick,
        )  # fmt: skip
    tell(told, json, stderr=questions is not None)


@app.command(epilog=example("beholder chat outputs/quickstart/instruct --image data/quickstart/data/images/test/0.png"))
def chat(
    run_folder: RunArg,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="What to talk about; /image FILE shows it one more. Repeatable: image 1, image 2, …"),
    ] = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything else.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.01, max=1)] = 0.9,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
    device: Device = "auto",
    sets: PartSets = None,
) -> None:
    """Talk to a trained run about images. /help lists the commands; Ctrl-C stops an answer, a second one leaves.

    Standard input may be a pipe: every line is said in turn, answers go to standard output, the rest to standard error.
    Python: beholder.load(RUN).chat(messages, image), .stream(messages, image).
    """
    from beholder.use.chat import Conversation, talk
    from beholder.use.vlm import decoding, load

    vlm = load(run_folder, device=device, overrides=sets or [])
    conversation = Conversation(vlm, image or [], system, decoding(temperature, top_p, max_new_tokens), seed)
    talk(conversation, source=sys.stdin, out=sys.stdout, notes=sys.stderr)


@app.command(epilog=example("beholder export outputs/quickstart/instruct --to hf --out exported"))
def export(
    run_folder: RunArg,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="New, or empty.")],
    to: Annotated[
        Literal["hf", "gguf"], typer.Option(help="hf: a Hugging Face folder; gguf: files that llama.cpp opens.")
    ] = "hf",
    adapter: Annotated[
        bool,
        typer.Option(
            "--adapter/--merged", help="Leave the adapters beside their base as a PEFT folder, or merge them into it."
        ),
    ] = False,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples that it is compared on.")] = 4,
    shard: Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights, of hf.")] = "5GB",
    dtype: Annotated[
        Literal["f32", "f16", "bf16"] | None,
        typer.Option(help="How gguf keeps matrices; default as the run's language model does."),
    ] = None,
    fold_norm: Annotated[
        bool,
        typer.Option(
            "--fold-norm",
            help="Make the connector's output norm constant and fold it into its last layer, so that it becomes a "
            "class of transformers' own. That changes what it computes: loss and answers are measured and told.",
        ),
    ] = False,
    calibration: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With --fold-norm: training images it is calibrated on; default 256."),
    ] = None,
    json: Json = False,
    sets: PartSets = None,
) -> None:
    """Write a trained run as a folder that others open without Beholder, and prove it in a process of its own.

    hf: where it computes what a class of transformers' own computes (LLaVA, VipLLaVA, Idefics3), it becomes that class;
    else a class in a file of the folder. gguf: model.gguf and mmproj.gguf for llama.cpp, of a SigLIP tower with an MLP;
    llama.cpp itself is asked where its binding is installed (the extra gguf). Logits and answers are compared with the
    run's; where they differ nothing is left behind.

    Python: beholder.use.export.export.
    """
    from beholder.use.export import export as write

    told = write(
        run_folder, out, to=to, adapter=adapter, samples=samples, max_shard_size=shard, dtype=dtype,
        fold_norm=fold_norm, calibration=calibration, overrides=sets or [],
    )  # fmt: skip
    tell(told, json)


@app.command(epilog=example("beholder parity outputs/quickstart/instruct http://127.0.0.1:8000/v1"))
def parity(
    run_folder: RunArg,
    other: Annotated[
        str, typer.Argument(metavar="EXPORT|URL", help="A folder of `beholder export`, or a server with OpenAI's API.")
    ],
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples, the golden set first.")] = 24,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 32,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a server: its model; default the only one it has.")
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the server's key.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.1, max=3600, help="Seconds that a server may take over one answer.")
    ] = 120,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code in the folder that is not Beholder's own.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
    sets: PartSets = None,
) -> None:
    """Ask a run and what was made of it, an export or a server, the same samples: equal answers, or where not.

    Exit code 3 where answers differ. Python: beholder.use.parity.parity.
    """
    from beholder.train.reporter import ticking
    from beholder.use.parity import parity as compare
    from beholder.web.keys import key_in

    with ticking(terminal(stderr=True)) as tick:
        told = compare(
            run_folder, other, samples=samples, max_new_tokens=max_new_tokens, model=model, key=key_in(api_key_env),
            timeout_s=timeout, trust_remote_code=trust_remote_code, device=device, overrides=sets or [], progress=tick,
        )  # fmt: skip
    tell(told, json)
    raise typer.Exit(EXIT_GATES if told.differences else EXIT_OK)


@app.command(epilog=example("beholder serve outputs/quickstart/instruct"))
def serve(
    run_folder: RunArg,
    host: Annotated[
        str, typer.Option(help="Where to listen; other than this machine alone needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="The environment variable that holds the key clients must send.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What the model is called; default the run's name.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Answers written together.")] = 8,
    max_waiting: Annotated[int, typer.Option(min=0, max=65536, help="Requests beyond those; more get a 429.")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, max=1_048_576, help="Longest answer.")] = 1024,
    max_images: Annotated[int, typer.Option(min=0, max=1000, help="Images of a request.")] = 16,
    max_image_mb: Annotated[float, typer.Option(min=0.001, max=256, help="Megabytes of an image.")] = 10.0,
    max_megapixels: Annotated[float, typer.Option(min=0.001, max=1000, help="Megapixels of an image.")] = 20.0,
    max_body_mb: Annotated[float, typer.Option(min=0.001, max=1024, help="Megabytes of a request.")] = 32.0,
    allow_image_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST", help="Fetch https images of this host. Repeatable; default none: data: URIs only."
        ),
    ] = None,
    grace: Annotated[float, typer.Option(min=1, max=3600, help="Seconds that answers may take when stopped.")] = 30.0,
    device: Device = "auto",
    sets: PartSets = None,
) -> None:
    """Answer requests as OpenAI's API does (/v1/chat/completions, with images), until SIGTERM or Ctrl-C. docs/serve.md.

    Needs the extra "serve" (fastapi, uvicorn, prometheus-client). Python: beholder.use.serving.serve.serve.
    """
    try:
        from beholder.use.serving.conversation import Limits
        from beholder.use.serving.serve import serve as answer
    except ModuleNotFoundError as error:
        raise without_extra(error) from None
    from beholder.web.keys import MIN_KEY, key_in

    limits = Limits(
        max_batch=max_batch, max_waiting=max_waiting, max_tokens=max_tokens, max_images=max_images,
        max_image_bytes=round(max_image_mb * 1e6), max_megapixels=max_megapixels,
        max_body_bytes=round(max_body_mb * 1e6), grace_s=grace,
    )  # fmt: skip
    answer(
        run_folder, host=host, port=port, key=key_in(api_key_env, least=MIN_KEY), name=name, limits=limits,
        image_hosts=allow_image_host or [], device=device, overrides=sets or [],
        ready=lambda url, model: say(f"{model} answers at {url}"),
    )  # fmt: skip


@app.command(epilog=example("beholder score vqa --predictions answers.jsonl --references v2_val2014_annotations.json"))
def score(
    kind: Annotated[
        Literal["vqa", "pope", "caption", "instructions"],
        typer.Argument(
            metavar="KIND",
            help="vqa: official VQA accuracy. pope: yes and no. caption: BLEU, CIDEr, … instructions: relevance, "
            "completeness, coherence.",
        ),
    ],
    predictions: Annotated[
        Path, typer.Option(metavar="FILE", help="Answers, JSON or a line each, e.g. of beholder generate --from.")
    ],
    references: Annotated[Path, typer.Option(metavar="FILE", help="What is right: annotation file, or a line each.")],
    json: Json = False,
) -> None:
    """Score a file of answers against references, with the arithmetic that runs are scored with. No model is loaded.

    Predictions: {"question_id": 1, "answer": "yes"} a line or in a JSON array; caption: {"image_id": 1, "caption": "A
    dog."}. References: VQA's, COCO's or GQA's own files, or {"question_id": 1, "answers": ["yes", …]} a line;
    instructions: with "instruction", or messages.

    Python: beholder.use.score.score_files.
    """
    from beholder.use.score import score_files

    tell(score_files(kind, predictions, references), json)
