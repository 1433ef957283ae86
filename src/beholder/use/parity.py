"""Whether a run, its export and a server of it give the same answers: ``beholder parity RUN EXPORT|URL``.

The same held-out samples, the golden set first, go through both, greedily. An exported folder is loaded as its own
proof loads it: by a process without Beholder, in fp32. A server is asked over OpenAI's API.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from beholder.config import GREEDY
from beholder.model.native import NativeModel
from beholder.model.weights import quiet_transformers
from beholder.probes import golden
from beholder.train.distributed import pick_device
from beholder.train.trained import TrainedRun, open_trained
from beholder.types import Encoded, Example, ImageInput, ImageSlot, Turn, UserError, printable
from beholder.use.export.adapters import ADAPTER
from beholder.use.export.proof import ask_fresh, in_fp32, same_prompt
from beholder.use.export.samples import AskedSample, askable, asked_turns, held_out, prompt_of
from beholder.use.exported import CODE
from beholder.use.remote import Refused, Remote

NUM_SAMPLES = 24
NEW_TOKENS = 32
MAX_SETTINGS = 16_000_000
"""Bytes of a settings file of an export."""
Cause = Literal["prompt", "answer", "refused"]
CAUSES: dict[Cause, str] = {
    "prompt": "another prompt", "answer": "the same prompt, another answer", "refused": "not answered",
}  # fmt: skip
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Difference:
    """A sample that the two do not answer alike."""

    id: str
    cause: Cause
    """``prompt``: it was laid out as other ids (of a server: another number of them); ``refused``: the server did not
    take it; else ``answer``."""
    question: str
    run: str
    other: str
    at: int | None
    """The first token (of an export) or word (of a server) that differs, from 0; None where there is none."""
    unit: Literal["token", "word"]
    why: str = ""
    """What the server said, or the lengths of the prompts."""


@dataclass(frozen=True)
class Parity:
    """How many samples are answered alike, and where not."""

    run: str
    checkpoint: int
    other: str
    model: str
    """Class of the export, or the server's name for the model."""
    samples: int
    golden: int
    """How many of them are of the run's golden set."""
    equal: int
    prompts_differ: int | None
    """Samples whose prompt is laid out otherwise, also where the answers agree; None where the other does not tell."""
    differences: list[Difference]

    @property
    def share(self) -> float:
        return self.equal / self.samples

    def print(self, console: Console) -> None:
        def line(text: str) -> None:
            console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

        line(
            f"{self.run} (step {self.checkpoint}) and {self.other} ({self.model}): {self.equal} of {self.samples} "
            f"answers equal ({self.share:.1%}); {self.golden} samples are of the golden set"
        )
        if self.prompts_differ:
            line(f"  {self.prompts_differ} prompts are laid out otherwise")
        for cause, words in CAUSES.items():
            found = [d for d in self.differences if d.cause == cause]
            if not found:
                continue
            line(f"  {words}: {len(found)}")
            for d in found:
                where = "" if d.at is None else f" from {d.unit} {d.at + 1} on"
                line(f"    {d.id}{where}{f' ({d.why})' if d.why else ''}: {d.question!r}")
                line(f"      run   {d.run!r}")
                if cause != "refused":
                    line(f"      other {d.other!r}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"share": self.share}


def parity(
    run: str | Path,
    other: str | Path,
    *,
    samples: int = NUM_SAMPLES,
    max_new_tokens: int = NEW_TOKENS,
    model: str | None = None,
    key: str | None = None,
    timeout_s: float = 120.0,
    trust_remote_code: bool = False,
    device: str = "auto",
    overrides: Sequence[str] = (),
    progress: Progress | None = None,
) -> Parity:
    """Ask ``run`` and ``other``, a folder of `beholder export` or the URL of a server, the same held-out samples.

    ``model``, ``key`` and ``timeout_s`` (of one answer) are a server's; ``device`` is the run's beside a server: an
    export is compared on the CPU, both sides in fp32. ``trust_remote_code``: run code in the folder that is not this
    package's own. Raises `UserError` for what cannot be opened or asked.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}, expected 1 or more")
    tick = progress or (lambda what, done, total: None)
    if str(other).startswith(("http://", "https://")):
        remote = Remote(str(other), key, timeout_s=timeout_s)
        return _with_server(run, remote, model, samples, max_new_tokens, device, overrides, tick)
    if "://" in str(other):
        raise UserError(f"{str(other)[:200]}: expected a folder, or a URL that begins with https:// or http://")
    folder = _Folder.read(Path(other), trust_remote_code)
    return _with_export(run, folder, samples, max_new_tokens, overrides, tick)


# ---------------------------------------------------------------------------------------------------------------
# The samples


def _chosen(run: TrainedRun, samples: int) -> tuple[list[AskedSample], int]:
    """The golden set first, then other held-out samples; and how many are of the golden set."""
    at = run.cfg.eval.golden_set_path
    path = run.folder / "golden.jsonl" if at is None else Path(at)
    place = {golden.key(item): k for k, item in enumerate(golden.load(path))} if path.is_file() else {}
    first: dict[int, Example] = {}
    rest: list[Example] = []
    for example in held_out(run):
        k = place.get(golden.key(golden.describe(example, "", 0)))
        if k is not None and k not in first:
            first[k] = example
        elif len(rest) < 4 * samples:  # some of them cannot be asked
            rest.append(example)
        if len(first) == len(place) and len(rest) >= 4 * samples:
            break
    found = askable(run, samples, [*(first[k] for k in sorted(first)), *rest])
    return found, sum(golden.key(golden.describe(s.example, "", 0)) in place for s in found)


@torch.no_grad()
def _own_ids(run: TrainedRun, encoded: Encoded, inputs: list[ImageInput], max_new_tokens: int) -> list[int]:
    how = GREEDY.model_copy(update={"max_new_tokens": max_new_tokens})
    return run.model.generate([encoded], [inputs], how, eos_ids=run.encoder.eos_ids)[0]


# ---------------------------------------------------------------------------------------------------------------
# With an exported folder


@dataclass(frozen=True)
class _Folder:
    """What an exported folder says of itself."""

    path: Path
    name: str
    model_code: bool
    processor_code: bool
    beside: bool

    @classmethod
    def read(cls, path: Path, trust: bool) -> _Folder:
        """Raises `UserError` for what is no export, or brings code that is not this package's."""
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give one that `beholder export` wrote, or the URL of a server")
        config = _settings(path / "config.json")
        names = config.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise UserError(f"{path}/config.json names no class; give a folder that `beholder export` wrote")
        processor = _settings(path / "processor_config.json") if (path / "processor_config.json").is_file() else {}
        if not trust:
            _check_code(path)
        beside = (path / ADAPTER / "adapter_config.json").is_file()
        if beside and not (path / ADAPTER / "adapter_model.safetensors").is_file():
            raise UserError(f"{path}/{ADAPTER} has no adapter_model.safetensors; weights are read in no other form")
        return cls(path, names[0], bool(config.get("auto_map")), bool(processor.get("auto_map")), beside)


def _check_code(folder: Path) -> None:
    """Raises `UserError` unless all code that the folder could have run is what `export` puts there."""
    for code in sorted(folder.glob("*.py")):
        ours = CODE / code.name
        if not (ours.is_file() and code.is_file()) or ours.read_bytes() != code.read_bytes():
            raise UserError(
                f"{code} is not the code that this version of Beholder exports, and comparing would run it; look at "
                "it, then give --trust-remote-code"
            )
    for name in ("custom_generate", "adapter_config.json"):  # a program, and a base that lies somewhere else
        if os.path.lexists(folder / name):
            raise UserError(
                f"{folder / name} is nothing that `beholder export` writes, and code could be run because of it; look "
                "at it, then give --trust-remote-code"
            )
    ours = {code.stem for code in CODE.glob("*_beholder.py")}
    for path in sorted(folder.glob("*config*.json")):
        for name in _code_names(_settings(path)):
            if name.partition(".")[0] not in ours:
                raise UserError(f"{path} asks for the code {name[:80]!r}; look at it, then give --trust-remote-code")


def _code_names(value: Any, *, named: bool = False) -> Iterator[str]:
    """What any ``auto_map`` in a settings file names, a mapping or a list."""
    match value:
        case dict():
            for key, inner in value.items():
                yield from _code_names(inner, named=named or key == "auto_map")
        case list():
            for inner in value:
                yield from _code_names(inner, named=named)
        case str() if named:
            yield value
        case _:
            pass


def _settings(path: Path) -> dict[str, Any]:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is no file")
        with path.open("rb") as file:
            data = file.read(MAX_SETTINGS + 1)
        if len(data) > MAX_SETTINGS:
            raise UserError(f"{path} has more than {MAX_SETTINGS:,} bytes; give a folder that `beholder export` wrote")
        told = json.loads(data.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give a folder that `beholder export` wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(told, dict):
        raise UserError(f"{path} holds {type(told).__name__}, not an object")
    return told


def _with_export(
    run: str | Path, folder: _Folder, samples: int, max_new_tokens: int, overrides: Sequence[str], tick: Progress
) -> Parity:
    opened = open_trained(run, torch.device("cpu"), overrides)
    chosen, num_golden = _chosen(opened, samples)
    if folder.processor_code == isinstance(opened.model, NativeModel):
        raise UserError(
            f"{folder.path} is no export of a run like {run}: the one has a native model, the other is joined of parts"
        )
    tick("asking the export", 0, len(chosen))
    theirs, answers = ask_fresh(
        folder.path, folder.name, chosen, processor_code=folder.processor_code, model_code=folder.model_code,
        beside=folder.beside, special=opened.tokenizer.bos_token is None, max_new_tokens=max_new_tokens, logits=False,
    )  # fmt: skip
    differences: list[Difference] = []
    others = 0
    with ExitStack() as stack, quiet_transformers():
        if not folder.beside:
            stack.enter_context(opened.model.adapters_merged())
        in_fp32(opened.model)
        for k, sample in enumerate(chosen):
            tick("asking the run", k, len(chosen))
            encoded, inputs = prompt_of(opened, sample)
            own = _until_end(opened, _own_ids(opened, encoded, inputs, max_new_tokens))
            other = _until_end(opened, answers[k])
            same = same_prompt(opened, encoded, theirs[f"ids.{k}"])
            others += not same
            if opened.encoder.decode(own) == opened.encoder.decode(other):
                continue
            lengths = f"{len(theirs[f'ids.{k}'])} tokens, the run {len(encoded.ids)}"
            differences.append(
                Difference(
                    sample.example.id, "answer" if same else "prompt", golden.asked(sample.example),
                    opened.encoder.decode(own), opened.encoder.decode(other), _first(own, other), "token",
                    "" if same else lengths,
                )
            )  # fmt: skip
    return Parity(
        str(run), opened.step, str(folder.path), folder.name, len(chosen), num_golden, len(chosen) - len(differences),
        others, differences,
    )  # fmt: skip


def _until_end(run: TrainedRun, ids: Sequence[int]) -> list[int]:
    ends = [k for k, i in enumerate(ids) if i in run.encoder.eos_ids]
    return list(ids[: ends[0]] if ends else ids)


def _first(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """Where two unequal sequences part."""
    return next((k for k, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


# ---------------------------------------------------------------------------------------------------------------
# With a server


def _with_server(
    run: str | Path, remote: Remote, model: str | None, samples: int, max_new_tokens: int, device: str,
    overrides: Sequence[str], tick: Progress,
) -> Parity:  # fmt: skip
    name = model or remote.model()
    opened = open_trained(run, pick_device(device), overrides)
    chosen, num_golden = _chosen(opened, samples)
    differences: list[Difference] = []
    others: int | None = None
    for k, sample in enumerate(chosen):
        tick(f"asking {remote.url}", k, len(chosen))
        encoded, inputs = prompt_of(opened, sample)
        own = opened.encoder.decode(_own_ids(opened, encoded, inputs, max_new_tokens))
        question = golden.asked(sample.example)
        try:
            got = remote.answer(name, messages(sample), max_new_tokens)
        except Refused as error:
            differences.append(Difference(sample.example.id, "refused", question, own, "", None, "word", str(error)))
            continue
        same = got.prompt_tokens is None or got.prompt_tokens == len(encoded.ids)
        if got.prompt_tokens is not None:
            others = (others or 0) + (not same)
        text = got.text.strip()
        if text != own:
            words, theirs = own.split(), text.split()
            why = "" if same else f"{got.prompt_tokens} tokens, the run {len(encoded.ids)}"
            why = why or ("only blanks differ" if words == theirs else "")
            at = None if words == theirs else _first(words, theirs)
            cause: Cause = "answer" if same else "prompt"
            differences.append(Difference(sample.example.id, cause, question, own, text, at, "word", why))
    return Parity(
        str(run), opened.step, remote.url, name, len(chosen), num_golden, len(chosen) - len(differences), others,
        differences,
    )  # fmt: skip


def messages(sample: AskedSample) -> list[dict[str, Any]]:
    """A sample as OpenAI's API takes it: pictures are parts, and the line break behind one is the server's to write."""
    return [{"role": turn.role, "content": _content(turn, sample.images)} for turn in asked_turns(sample.example)]


def _content(turn: Turn, images: Sequence[bytes]) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, ImageSlot) for part in turn.parts):
        return turn.text
    parts: list[dict[str, Any]] = []
    for part in turn.parts:
        if isinstance(part, ImageSlot):
            parts.append({"type": "image_url", "image_url": {"url": _data_uri(images[part.index])}})
            continue
        text = part.removeprefix("\n") if parts and parts[-1]["type"] == "image_url" else part
        if text:
            parts.append({"type": "text", "text": text})
    return parts


_KINDS = {b"\x89PNG": "png", b"\xff\xd8": "jpeg", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}


def _data_uri(image: bytes) -> str:
    kind = next((kind for start, kind in _KINDS.items() if image.startswith(start)), "png")
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
