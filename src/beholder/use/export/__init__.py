"""A trained run as a folder that needs nothing of this package: ``beholder export RUN --to hf|gguf``.

1 `hf`, `gguf`: write what the run has learned, merged or beside its base, into a folder next to the one that was asked
  for
2 `proof`, `gguf_proof`: load that folder in a process of its own, with transformers or llama.cpp alone, and ask it
  held-out `samples`
3 compare ids, logits and answers with the run's own; only if they are equal, the folder gets its model `card` and
  its name

Asked for, `fold` makes the connector's output norm constant before, and says what that costs.

Which class it becomes is `model.standard`'s to say. What lies in ``exported/`` is copied into the folder as it stands.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError

from beholder.model.native import NativeModel
from beholder.model.standard import GGUF_LANGUAGE
from beholder.model.vlm import VisionLanguageModel
from beholder.model.weights import quiet_transformers
from beholder.runs import stop_signals, writing
from beholder.train.trained import TrainedRun, open_trained
from beholder.types import UserError
from beholder.use.export.adapters import ADAPTER
from beholder.use.export.card import ExportedAs, as_gguf, as_transformers, evidence_of, sentence, write_card
from beholder.use.export.fold import NUM_CALIBRATION, FoldedNorm, check_worth_folding, without_norm
from beholder.use.export.fold import fold_norm as fold
from beholder.use.export.gguf import (
    MMPROJ,
    MODEL,
    PROJECTOR,
    Stored,
    check_gguf,
    default_stored,
    pictures_note,
    write_gguf,
)
from beholder.use.export.gguf_proof import binding, check_files, prompts_of, prove_gguf
from beholder.use.export.hf import write
from beholder.use.export.proof import prove
from beholder.use.export.samples import AskedSample, askable, held_out
from beholder.use.export.vocabulary import pre_tokenizer

Format = Literal["hf", "gguf"]
SHARD = "5GB"
NUM_SAMPLES = 4


@dataclass(frozen=True)
class Exported:
    """What was written, and what loading it again gave."""

    folder: str
    exported_class: str
    prevents: str
    """Why it is no class of transformers' own; empty where it is one."""
    adapter: str | None
    """Folder of the adapters below it; None where they are merged, or there are none."""
    files: dict[str, int]
    """Bytes by name."""
    samples: int
    """Held-out samples it was asked, in a process of its own."""
    max_logit_difference: float
    """Between the run and what was loaded, both in fp32, over all positions of the samples."""
    answers: list[str]
    """To these samples, the same from both; of 16-bit GGUF, llama.cpp's."""
    stored: str | None = None
    """How the matrices of GGUF are kept."""
    read_again: tuple[int, int] | None = None
    """Of GGUF: tensors and keys that were read from the disk as they were meant."""
    compared_by: str = "a fresh process"
    """What loaded it; empty where nothing could (GGUF without llama.cpp's binding)."""
    allowed_difference: float = 0.0
    """Of GGUF, in nats, as ``max_logit_difference`` is then: of log-probabilities."""
    same_answers: int | None = None
    """Of GGUF: answers of llama.cpp's that are the run's own; another one parts from it where the run has two tokens as
    close as rounding can turn."""
    pictures: list[str] = field(default_factory=list)
    """Of GGUF: where llama.cpp prepares pictures otherwise than the run does."""
    folded: dict[str, Any] | None = None
    """`fold.FoldedNorm`, where the output norm was folded: the comparison above is with the folded run."""

    def print(self, console: Console) -> None:
        console.print(
            f"{self.folder}: {self.exported_class}, {sum(self.files.values()) / 1e6:,.1f} MB", highlight=False
        )
        if self.prevents:
            console.print(f"  no class of transformers' own: {self.prevents}", highlight=False)
        if self.adapter:
            console.print(f"  adapters beside their base, in {self.adapter}/", highlight=False)
        for line in FoldedNorm(**self.folded).told if self.folded else ():
            console.print(f"  {line}", highlight=False)
        if self.stored is not None:
            self._print_gguf(console)
            return
        console.print(
            f"  loaded in a fresh process: {self.samples} held-out samples, largest difference of logits "
            f"{self.max_logit_difference:g}, same answers",
            highlight=False,
        )

    def _print_gguf(self, console: Console) -> None:
        assert self.read_again is not None
        tensors, keys = self.read_again
        for note in self.pictures:
            console.print(f"  {note}", highlight=False)
        console.print(f"  {self.stored}; {tensors} tensors and {keys} keys read again as written", highlight=False)
        if not self.compared_by:
            console.print(
                "  llama.cpp itself was not asked: its binding is not installed (pip install 'beholder[gguf]')",
                highlight=False,
            )
            return
        console.print(
            f"  read by {self.compared_by} in a fresh process: {self.samples} held-out samples, largest difference of "
            f"log-probabilities {self.max_logit_difference:.2g} nats (allowed {self.allowed_difference:.2g}), "
            f"{self.same_answers} of {self.samples} answers the same",
            highlight=False,
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@stop_signals()
def export(
    run: str | Path,
    out: str | Path,
    *,
    to: Format = "hf",
    adapter: bool = False,
    samples: int = NUM_SAMPLES,
    max_shard_size: str = SHARD,
    dtype: Stored | None = None,
    fold_norm: bool = False,
    calibration: int | None = None,
    overrides: Sequence[str] = (),
) -> Exported:
    """Write ``run`` (its best checkpoint, else its latest) to ``out`` as a folder that others open, and prove it.

    ``to``: ``hf``, a Hugging Face folder, or ``gguf``, the two files that llama.cpp opens. ``adapter``: leave the
    adapters beside their base as a PEFT folder instead of merging them. ``dtype``: how GGUF keeps matrices; default as
    the run's language model does. ``fold_norm``: make the output norm constant, from ``calibration`` images (default
    `fold.NUM_CALIBRATION`), so that the run becomes a class of transformers' own or llama.cpp's; that is another model,
    which is what the folder is compared with, and `Exported.folded` says what it costs. Raises `UserError` for an
    ``out`` that holds something, a run without adapters where they are asked for, a norm that cannot be folded or would
    be for nothing, parts that bring code of their own or that llama.cpp has nothing for, and where what was loaded does
    not compute what the run computes; nothing is left behind then.
    """
    out = Path(out)
    with writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} is not empty; name a new folder for the export")
    if os.path.ismount(out):
        raise UserError(f"{out} is where a disk is mounted, which nothing can take the place of; name a folder in it")
    if samples < 1:
        raise UserError(f"samples is {samples}, expected 1 or more: an export that nothing was compared on is no proof")
    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMGT]B", max_shard_size):
        raise UserError(f"the largest file of weights is {max_shard_size!r:.40}, expected a size such as 500MB or 5GB")
    if to == "gguf" and adapter:
        raise UserError("--to gguf merges adapters into the weights; leave --adapter out, or export --to hf")
    if to == "gguf" and max_shard_size != SHARD:
        raise UserError("--to gguf writes one file of each part; leave --shard out (llama-gguf-split cuts files)")
    if to == "hf" and dtype is not None:
        raise UserError("--dtype says how --to gguf keeps matrices; a Hugging Face folder keeps them as the run does")
    if calibration is not None and not fold_norm:
        raise UserError("calibration is for folding the output norm; give --fold-norm too, or leave --calibration out")
    opened = open_trained(run, torch.device("cpu"), overrides)
    if adapter and not opened.model.adapters:
        raise UserError(f"{run} has no adapters, so there is nothing to put beside its base; leave --adapter out")
    folding = None
    if fold_norm:
        check_worth_folding(opened) if to == "hf" else check_gguf(without_norm(opened))
        folding = fold(opened, NUM_CALIBRATION if calibration is None else calibration)
        opened = folding.run
    readable = check_gguf(opened) if to == "gguf" else None
    if readable is not None:
        pre_tokenizer(opened.tokenizer)
    chosen, evidence = askable(opened, samples, held_out(opened)), evidence_of(opened)
    with writing(out):
        place = Path(os.path.realpath(out))
        missing = [parent for parent in place.parents if not parent.exists()]
        place.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name[:40]}.", suffix=".tmp", dir=place.parent))
    try:
        folder.chmod(0o777 & ~_umask())
        with ExitStack() as stack, quiet_transformers():
            if not adapter:
                stack.enter_context(opened.model.adapters_merged())
            # Before the proof, which leaves the model computing as whoever was asked does.
            folded = None if folding is None else folding.measure()
            if readable is not None:
                told, exported = _gguf(opened, readable, out, folder, chosen, dtype or default_stored(readable))
            else:
                told, exported = _hf(opened, out, folder, chosen, adapter, max_shard_size)
        with writing(out):
            if folded is not None:
                folded.save(folder)
                exported = replace(
                    exported, told=(*exported.told, *map(sentence, folded.told)),
                    unlike="The figures are of the run as it is; what was exported has its output norm folded.",
                )  # fmt: skip
            write_card(folder, opened, evidence, exported)
        files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
        with writing(out):
            if place.is_dir():
                place.rmdir()
            os.replace(folder, place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # something else lies there by now
            for parent in missing:
                parent.rmdir()
        raise
    return replace(told, files=files, folded=None if folded is None else folded.to_json())


def _hf(
    run: TrainedRun, out: Path, folder: Path, samples: Sequence[AskedSample], adapter: bool, max_shard_size: str
) -> tuple[Exported, ExportedAs]:
    with writing(out):
        try:
            written = write(run, folder, beside=adapter, max_shard_size=max_shard_size)
        except SafetensorError as error:  # what the disk says, wrapped
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else 0, str(error)) from error
    difference, answers = prove(run, folder, written, samples, beside=adapter)
    beside = ADAPTER if adapter else None
    told = Exported(str(out), written.name, written.prevents, beside, {}, len(samples), difference, answers)
    return told, as_transformers(
        written.name, written.prevents, native=isinstance(run.model, NativeModel), adapters=bool(run.model.adapters),
        beside=beside, samples=len(samples), difference=difference,
    )  # fmt: skip


def _gguf(
    run: TrainedRun, model: VisionLanguageModel, out: Path, folder: Path, samples: Sequence[AskedSample], stored: Stored
) -> tuple[Exported, ExportedAs]:
    prompts = prompts_of(run, samples)
    with writing(out):
        meant = write_gguf(run, model, folder, stored)
    read_again = check_files(run, model, folder, stored, meant)
    name = f"{GGUF_LANGUAGE[type(model.language.model).__name__]} and {PROJECTOR}"
    told = Exported(str(out), name, "", None, {}, 0, 0.0, [], stored, read_again, "", pictures=pictures_note(model))
    if (where := binding()) is not None:
        proof = prove_gguf(run, model, folder, where, samples, prompts, stored)
        told = replace(
            told, samples=len(samples), max_logit_difference=proof.difference, answers=proof.answers,
            compared_by=proof.by, allowed_difference=proof.allowed, same_answers=proof.same,
        )  # fmt: skip
    return told, as_gguf(
        MODEL, MMPROJ, stored=stored, pictures=told.pictures, adapters=bool(run.model.adapters), read_again=read_again,
        compared_by=told.compared_by, samples=told.samples, difference=told.max_logit_difference,
        allowed=told.allowed_difference, same=told.same_answers,
    )  # fmt: skip


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
