"""A trained run as a Hugging Face folder that needs nothing of this package: ``beholder export RUN --to hf``.

1 `hf`: write what the run has learned, merged or beside its base, into a folder next to the one that was asked for
2 `proof`: load that folder in a process of its own, with transformers alone, and ask it held-out `samples`
3 compare ids, logits and answers with the run's own; only if they are equal, the folder gets its name

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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from safetensors import SafetensorError

from beholder.model.weights import quiet_transformers
from beholder.runs import stop_signals, writing
from beholder.train.trained import open_trained
from beholder.types import UserError
from beholder.use.export.adapters import ADAPTER
from beholder.use.export.fold import NUM_CALIBRATION, FoldedNorm, check_worth_folding
from beholder.use.export.fold import fold_norm as fold
from beholder.use.export.hf import write
from beholder.use.export.proof import prove
from beholder.use.export.samples import askable, held_out

Format = Literal["hf"]
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
    """To these samples, the same from both."""
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
        console.print(
            f"  loaded in a fresh process: {self.samples} held-out samples, largest difference of logits "
            f"{self.max_logit_difference:g}, same answers",
            highlight=False,
        )
        if self.folded:
            for line in FoldedNorm(**self.folded).told:
                console.print(f"  {line}", highlight=False)

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
    max_shard_size: str = "5GB",
    fold_norm: bool = False,
    calibration: int | None = None,
    overrides: Sequence[str] = (),
) -> Exported:
    """Write ``run`` (its best checkpoint, else its latest) to ``out`` as a Hugging Face folder, and prove it.

    ``to``: the one format there is. ``adapter``: leave the adapters beside their base as a PEFT folder instead of
    merging them. ``fold_norm``: make the output norm constant, from ``calibration`` images (default
    `fold.NUM_CALIBRATION`), so that the run becomes a class of transformers' own; that is another model, which is what
    the folder is compared with, and `Exported.folded` says what it costs. Raises `UserError` for an ``out`` that holds
    something, a run without adapters where they are asked for, a norm that cannot be folded or would be for nothing,
    parts that bring code of their own, and where what was loaded does not compute what the run computes; nothing is
    left behind then.
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
    if calibration is not None and not fold_norm:
        raise UserError("calibration is for folding the output norm; give --fold-norm too, or leave --calibration out")
    assert to == "hf", to
    opened = open_trained(run, torch.device("cpu"), overrides)
    if adapter and not opened.model.adapters:
        raise UserError(f"{run} has no adapters, so there is nothing to put beside its base; leave --adapter out")
    folding = None
    if fold_norm:
        check_worth_folding(opened)
        folding = fold(opened, NUM_CALIBRATION if calibration is None else calibration)
        opened = folding.run
    chosen = askable(opened, samples, held_out(opened))
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
            with writing(out):
                try:
                    written = write(opened, folder, beside=adapter, max_shard_size=max_shard_size)
                except SafetensorError as error:  # what the disk says, wrapped
                    number = re.search(r"os error (\d+)", str(error))
                    raise OSError(int(number[1]) if number else 0, str(error)) from error
            difference, answers = prove(opened, folder, written, chosen, beside=adapter)
            folded = None if folding is None else folding.measure()
            if folded is not None:
                with writing(out):
                    folded.save(folder)
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
    return Exported(
        str(out),
        written.name,
        written.prevents,
        ADAPTER if adapter else None,
        files,
        len(chosen),
        difference,
        answers,
        None if folded is None else folded.to_json(),
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
