"""What llama.cpp makes of exported files in a process of its own, against what the run itself computes; and, with or
without llama.cpp, whether every tensor and key stands in the files as it was meant.

llama.cpp takes GELU from a table of 16-bit numbers and multiplies 16-bit matrices by what it has rounded to 16 bits, so
how far it may be from the run is measured: as far as the run's own log-probabilities move when it computes like that,
twice over, and `NATS`.
"""

from __future__ import annotations

import importlib.util
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from beholder.config import GREEDY
from beholder.model.vlm import VisionLanguageModel
from beholder.runs import stop_signals, writing
from beholder.train.trained import TrainedRun
from beholder.types import Encoded, ImageInput, ImageSlot, UserError
from beholder.use.export.gguf import MARKER, MMPROJ, MODEL, Stored, language_tensors, tower_tensors
from beholder.use.export.proof import NEW_TOKENS, in_fp32, logits_of, run_fresh
from beholder.use.export.samples import AskedSample, asked_turns, prompt_of
from beholder.use.export.template import marked_template

BINDING = "xllamacpp"
"""The package that brings llama.cpp; the extra ``gguf`` asks for it."""
NATS = 5e-3
"""Log-probabilities may differ by this much beyond what rounding explains. Seen on tiny parts with random weights, in
f32: up to 4.5e-3 in all, of which GELU's table is half. A wrong permutation, norm or token is tenths to whole nats."""
SHOWN = 512
"""Likeliest tokens of each step that are compared."""


@dataclass(frozen=True)
class GgufProof:
    """What was compared, and how far it was apart."""

    by: str
    """``llama.cpp (xllamacpp VERSION)``, or that the files were read again and no more."""
    difference: float
    """Largest of log-probabilities, in nats; 0 where llama.cpp was not asked."""
    allowed: float
    answers: list[str]
    """Of llama.cpp, one a sample."""
    same: int
    """Of these, the run's own."""


def binding() -> Path | None:
    """The folder that the binding is imported from, or None where there is none."""
    found = importlib.util.find_spec(BINDING)
    return None if found is None or found.origin is None else Path(found.origin).parent.parent


# ---------------------------------------------------------------------------------------------------------------
# Read again


def check_files(
    run: TrainedRun, model: VisionLanguageModel, folder: Path, stored: Stored, meant: dict[str, dict[str, Any]]
) -> tuple[int, int]:
    """(tensors, keys) that were read from the disk again as they were meant, to the last bit; ``meant``: keys by file.
    Raises `UserError` for one that is another."""
    tensors = keys = 0
    for name, written in ((MODEL, language_tensors), (MMPROJ, tower_tensors)):
        reader = gguf.GGUFReader(folder / name)
        there = {t.name: t for t in reader.tensors}
        for t in written(run, model, stored):
            read = there.pop(t.name, None)
            as_meant = (
                read is not None
                and read.tensor_type == t.kind
                and list(read.shape) == list(reversed(t.data.shape))
                and read.data.tobytes() == t.data.tobytes()
            )
            if not as_meant:
                raise UserError(f"{name}: the tensor {t.name} is another one on the disk, so nothing was kept")
            tensors += 1
        if there:
            raise UserError(f"{name}: {len(there)} tensors that nobody wrote, among them {next(iter(there))}")
        for key, value in meant[name].items():
            field = reader.fields.get(key)
            if field is None or not _same(field.contents(), value):
                raise UserError(f"{name}: the key {key} is another one on the disk, so nothing was kept")
            keys += 1
    return tensors, keys


def _same(read: Any, meant: Any) -> bool:
    if isinstance(meant, float):
        return read == float(np.float32(meant))
    if isinstance(meant, list | tuple):
        return len(read) == len(meant) and all(_same(r, m) for r, m in zip(read, meant, strict=True))
    return read == meant


# ---------------------------------------------------------------------------------------------------------------
# Asked


@dataclass(frozen=True)
class Prompt:
    """A sample as llama.cpp takes it."""

    encoded: Encoded
    inputs: list[ImageInput]
    text: str
    """With a mark where an image goes."""
    messages: list[dict[str, Any]] | None
    """Where the chat template makes that very text of them."""


def prompts_of(run: TrainedRun, samples: Sequence[AskedSample]) -> list[Prompt]:
    """The prompts of samples as texts. Raises `UserError` where a text, read as one, gives other ids than the run's,
    or where the chat template makes another text of every sample."""
    made = [_prompt(run, sample) for sample in samples]
    if not any(p.messages for p in made):
        raise UserError(
            "the chat template lays none of the samples out as the run was trained, so a client of llama.cpp could not "
            "ask it; such runs cannot be exported to GGUF"
        )
    return made


def _prompt(run: TrainedRun, sample: AskedSample) -> Prompt:
    encoded, inputs = prompt_of(run, sample)
    tokenizer, ids = run.tokenizer, encoded.ids.tolist()
    cuts = [0, *(edge for span in encoded.image_spans for edge in span), len(ids)]
    texts = []
    for start, stop in zip(cuts[::2], cuts[1::2], strict=True):
        text = str(tokenizer.decode(ids[start:stop], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if list(tokenizer(text, add_special_tokens=False)["input_ids"]) != ids[start:stop]:
            raise UserError(
                f"sample {sample.example.id!r}: read as one text, {text[-60:]!r} gives other ids than in training, "
                "where what stands around an image was read apart from it. llama.cpp reads it as one, so such runs "
                "cannot be exported to GGUF; control tokens as prompting.im_start and im_end (<|vision_start|>) keep "
                "texts apart"
            )
        texts.append(text)
    text = MARKER.join(texts)
    messages = _messages(run, sample)
    shown = tokenizer.apply_chat_template(
        _marked(messages), chat_template=marked_template(run), tokenize=False, add_generation_prompt=True
    )
    return Prompt(encoded, inputs, text, messages if shown == text else None)


def _messages(run: TrainedRun, sample: AskedSample) -> list[dict[str, Any]]:
    """Turns in parts. The chat template writes the run's own system prompt and labels."""
    said = []
    for turn in asked_turns(sample.example):
        parts: list[dict[str, Any]] = []
        for part in turn.parts:
            if isinstance(part, ImageSlot):
                parts.append({"type": "image"})
            elif parts and parts[-1]["type"] == "text":  # llama.cpp would put a line's end between two texts
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part}
            else:
                parts.append({"type": "text", "text": part})
        said.append({"role": turn.role, "content": parts})
    return said


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as llama.cpp hands them to a template."""
    return [
        {"role": m["role"], "content": "".join(MARKER if p["type"] == "image" else p["text"] for p in m["content"])}
        for m in messages
    ]


@stop_signals()
def ask_llama(
    folder: Path,
    where: Path,
    samples: Sequence[AskedSample],
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    vocab: int,
    partial: list[int],
) -> tuple[str, list[dict[str, Any]]]:
    """(version of the binding, what it told of each sample): `exported.fresh_llama` says what. ``partial``: tokens that
    are no whole character. Raises `UserError` where llama.cpp cannot load the files."""
    with tempfile.TemporaryDirectory(prefix="beholder-export-") as scratch:
        job = Path(scratch)
        longest = max(len(p.encoded.ids) for p in prompts)
        asked: dict[str, Any] = {
            "model": str(folder.resolve() / MODEL), "mmproj": str(folder.resolve() / MMPROJ), "binding": str(where),
            "marker": MARKER, "threads": torch.get_num_threads(), "context": longest + max_new_tokens + 64,
            "max_new_tokens": max_new_tokens, "shown": min(vocab, SHOWN), "partial": partial, "samples": [],
        }  # fmt: skip
        with writing(job):
            for k, (sample, prompt) in enumerate(zip(samples, prompts, strict=True)):
                names = [f"{k}.{i}" for i in range(len(sample.images))]
                for name, made in zip(names, prompt.inputs, strict=True):
                    (job / name).write_bytes(_as_png(made))
                asked["samples"].append({"prompt": prompt.text, "messages": prompt.messages, "images": names})
            (job / "job.json").write_text(json.dumps(asked), "utf-8")
        run_fresh("fresh_llama.py", job)
        told = json.loads((job / "answers.json").read_text("utf-8"))
        return told["version"], told["answers"]


def _as_png(made: ImageInput) -> bytes:
    """The pixels that the tower sees, so that what is compared is the model and not two ways to resize."""
    assert made.pixels is not None
    file = io.BytesIO()
    Image.fromarray(made.pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


def prove_gguf(
    run: TrainedRun, model: VisionLanguageModel, folder: Path, where: Path, samples: Sequence[AskedSample],
    prompts: Sequence[Prompt], stored: Stored,
) -> GgufProof:  # fmt: skip
    """What llama.cpp, whose binding lies in ``where``, makes of the files in ``folder``. Raises `UserError` where it
    cannot load them, or reads something else."""
    tokenizer, vocab = run.tokenizer, model.language.vocab
    partial = [i for i in range(min(vocab, len(tokenizer))) if "\ufffd" in str(tokenizer.decode([i]))]
    version, told = ask_llama(folder, where, samples, prompts, NEW_TOKENS, vocab, partial)
    return compare(run, model, samples, prompts, told, stored, f"llama.cpp ({BINDING} {version})")


@torch.no_grad()
def compare(
    run: TrainedRun, model: VisionLanguageModel, samples: Sequence[AskedSample], prompts: Sequence[Prompt],
    told: list[dict[str, Any]], stored: Stored, by: str,
) -> GgufProof:  # fmt: skip
    """llama.cpp's answers and log-probabilities against the run's own in fp32. Raises `UserError` where they are
    further apart than rounding explains."""
    in_fp32(run.model)
    answers = [[int(i) for i in heard["ids"]] for heard in told]
    scored = [[int(i) for i in heard["scored"]["ids"]] for heard in told]
    how = GREEDY.model_copy(update={"max_new_tokens": NEW_TOKENS})
    own, gaps = [], []
    for sample, prompt, heard, theirs in zip(samples, prompts, told, answers, strict=True):
        for way, read in (("", heard), (" that its chat template makes", heard["chat"])):
            if read is not None and read["prompt"] != len(prompt.encoded.ids):
                raise UserError(
                    f"sample {sample.example.id!r}: llama.cpp reads the prompt{way} as {read['prompt']} tokens, the "
                    f"run has {len(prompt.encoded.ids)}, so nothing was kept"
                )
        ids = run.model.generate([prompt.encoded], [prompt.inputs], how, eos_ids=run.encoder.eos_ids)[0]
        own.append([int(i) for i in ids])
        gaps.append(_gap(run, prompt, own[-1], theirs))
    ours = [_log_probabilities(run, p, ids) for p, ids in zip(prompts, scored, strict=True)]
    _as_llama(model, stored)
    rounded = [_log_probabilities(run, p, ids) for p, ids in zip(prompts, scored, strict=True)]
    worst = rounding = 0.0
    for sample, mine, other, heard in zip(samples, ours, rounded, told, strict=True):
        chat = (heard["chat"] or {"steps": []})["steps"]
        if not heard["scored"]["steps"]:
            raise UserError(f"sample {sample.example.id!r}: llama.cpp told no log-probability, so nothing was compared")
        for k, shown in [*enumerate(heard["scored"]["steps"]), *enumerate(chat)]:
            at = torch.tensor(shown["ids"])
            worst = max(worst, float((mine[k, at] - torch.tensor(shown["logprobs"])).abs().max()))
            rounding = max(rounding, float((mine[k, at] - other[k, at]).abs().max()))
    allowed = NATS + 2 * rounding
    if not worst <= allowed:
        raise UserError(
            f"log-probabilities of what llama.cpp reads differ from the run's by {worst:.3g} nats (allowed "
            f"{allowed:.3g} for {stored}), so nothing was kept"
        )
    texts = [run.encoder.decode(ids) for ids in answers]
    same = 0
    for k, sample in enumerate(samples):
        mine = run.encoder.decode(own[k])
        if texts[k] == mine:
            same += 1
        elif not gaps[k] <= 2 * allowed:
            raise UserError(
                f"sample {sample.example.id!r}: the run answers {mine!r}, llama.cpp {texts[k]!r}, so nothing was kept"
            )
    return GgufProof(by, worst, allowed, texts, same)


def _gap(run: TrainedRun, prompt: Prompt, own: list[int], theirs: list[int]) -> float:
    """By how many nats the run prefers its own token where two answers part; 0 where they do not."""
    at = next((k for k, (a, b) in enumerate(zip(own, theirs, strict=False)) if a != b), None)
    if at is None:
        return 0.0 if run.encoder.decode(own) == run.encoder.decode(theirs) else float("inf")
    last = _log_probabilities(run, prompt, own[: at + 1])[at]
    return float(last[own[at]] - last[theirs[at]])


def _as_llama(model: VisionLanguageModel, stored: Stored) -> None:
    """From now on the model computes as llama.cpp does on a CPU: GELU in its tanh form, from a table of 16-bit numbers
    (ggml's ``ggml_vec_gelu_f32``); matrices kept in 16 bits, and what goes into them rounded to these."""
    dtype = torch.float16 if stored == "f16" else torch.bfloat16

    def rounded(x: Tensor) -> Tensor:
        return x if stored == "f32" else x.to(dtype).to(x.dtype)

    def round_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (rounded(args[0]), *args[1:])

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data = rounded(module.weight.data)
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(round_input)
    assert model.vision is not None
    for part in (model.vision, model.connector):
        modules = dict(part.named_modules())
        for name, module in modules.items():
            if name.endswith("fc1"):
                _from_table(module, modules[f"{name[:-1]}2"], rounded)


def _from_table(before: nn.Module, after: nn.Module, rounded: Callable[[Tensor], Tensor]) -> None:
    """Of two layers with a GELU between them, let the second have what comes out of the table."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        seen[:] = [out]

    def give(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = seen.pop()
        table = functional.gelu(x.half().float(), approximate="tanh").half().to(x.dtype)
        return (rounded(torch.where(x <= -10, 0, torch.where(x >= 10, x, table))),)

    before.register_forward_hook(keep)
    after.register_forward_pre_hook(give)


def _log_probabilities(run: TrainedRun, prompt: Prompt, answer: list[int]) -> Tensor:
    """Before each token of ``answer``, ``[t, v]``."""
    ids = np.concatenate([prompt.encoded.ids, np.array(answer[:-1], dtype=np.int64)])
    whole = replace(prompt.encoded, ids=ids, supervise=np.zeros(len(ids), dtype=bool))
    return logits_of(run, whole, prompt.inputs)[len(prompt.encoded.ids) - 1 :].float().log_softmax(-1)
