"""An output norm made constant, so that a connector becomes what transformers' own classes know: ``--fold-norm``.

The norm of `model.connector.OutputNorm` divides each visual token by its own RMS, which no matrix can do. Over images
that the run was trained on, each channel gets the one factor that reproduces its normed values best (least squares),
and the connector's last linear layer takes it in. That is another model, so what it costs is measured on held-out
samples and told.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beholder.config import GREEDY
from beholder.data.collate import PADDED, SampleBuilder, eval_batches
from beholder.data.images import ImageError, as_input
from beholder.evidence import Measurement
from beholder.model.connector import Connector, OutputNorm, without_output_norm
from beholder.model.native import NativeModel
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import measuring, share
from beholder.probes.loss import SampleLoss, paired_gain, sample_losses, summarize
from beholder.probes.written import Written, write
from beholder.train.trained import TrainedRun
from beholder.types import Example, ImageInput, ImageRef, UserError
from beholder.use.export.hf import joined_class
from beholder.use.export.samples import askable, held_out, trained_on

NUM_CALIBRATION = 256
"""Images that the factors are taken from."""
NUM_MEASURED = 256
"""Held-out samples that folded and unfolded are measured on."""
NEW_TOKENS = 24
"""Of a compared answer, as of those of the proof."""
FILE = "folded_norm.json"
"""`FoldedNorm`, in the exported folder."""


@dataclass(frozen=True)
class FoldedNorm:
    """What became of the output norm and what that costs, as plain data: for a terminal, a file, a model card."""

    images: int
    """Training images that the factors were taken from."""
    tokens: int
    """Visual tokens of theirs."""
    rms_spread: float
    """Standard deviation of these tokens' RMS over its mean: how much the norm depends on what it is given."""
    kept: float
    """Share of the normed tokens' sum of squares that the constant factors reproduce; 1 where the norm was constant."""
    measured: list[dict[str, Any]]
    """`Measurement` records on held-out samples: ``unfolded.loss`` and ``folded.loss``, ``folded.added`` (paired),
    ``folded.same_answers``."""

    @property
    def told(self) -> list[str]:
        """Sentences for people."""
        found = {m.name: m for m in (Measurement.model_validate(d) for d in self.measured)}
        before, after = found["unfolded.loss"], found["folded.loss"]
        return [
            f"output norm folded into the last layer: one factor a channel, from {self.tokens:,} tokens of "
            f"{self.images:,} training images, whose RMS varies by {self.rms_spread:.1%}; {self.kept:.2%} of the "
            "normed tokens' energy is kept",
            f"folded against the run as it is, on {before.n:,} held-out samples: loss {after.value:.4g} against "
            f"{before.value:.4g}, {_signed(found['folded.added'])} nats/token; equal answers "
            f"{_percent(found['folded.same_answers'])}",
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def save(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(self.to_json(), indent=2) + "\n", "utf-8")


def _signed(m: Measurement) -> str:
    ends = "" if m.ci95 is None else f" (95 % {m.ci95[0]:+.4g} to {m.ci95[1]:+.4g})"
    return f"{m.value:+.4g}{ends}"


def _percent(m: Measurement) -> str:
    ends = "" if m.ci95 is None else f" (95 % {m.ci95[0]:.1%} to {m.ci95[1]:.1%})"
    return f"{m.value:.1%}{ends}"


@dataclass(frozen=True)
class Folding:
    """A run whose connector has no norm any more, and what is needed to say what that costs."""

    run: TrainedRun
    """Its connector is the folded one, and its settings say so."""
    unfolded: Connector
    images: int
    tokens: int
    rms_spread: float
    kept: float

    def measure(self) -> FoldedNorm:
        """Folded against unfolded, both as the model stands now, on held-out samples. Raises `UserError` where there
        are none with an image and an answer."""
        run, model = self.run, self.run.model
        asked = askable(run, NUM_MEASURED, (e for e in held_out(run) if e.answer_text))
        examples = [sample.example for sample in asked]
        folded = model.connector
        losses, written = _measured(run, examples)
        try:
            model.connector = self.unfolded
            losses_before, written_before = _measured(run, examples)
        finally:
            model.connector = folded
        same = sum(a.prediction == b.prediction for a, b in zip(written_before, written, strict=True))
        added = paired_gain(losses, losses_before, "folded.added")
        told: list[Measurement] = [
            *(m for m in summarize(losses_before, "unfolded") if m.name == "unfolded.loss"),
            *(m for m in summarize(losses, "folded") if m.name == "folded.loss"),
            added.model_copy(
                update={"unit": "nats/token", "better": "lower", "caveat": "paired: folded minus unfolded"}
            ),
            share("folded.same_answers", same, len(written), unit="share", better="higher",
                  caveat=f"greedy, at most {NEW_TOKENS} tokens"),
        ]  # fmt: skip
        return FoldedNorm(
            self.images, self.tokens, self.rms_spread, self.kept, [m.model_dump(mode="json") for m in told]
        )


def _measured(run: TrainedRun, examples: Sequence[Example]) -> tuple[list[SampleLoss], list[Written]]:
    assert isinstance(run.model, VisionLanguageModel)
    builder = SampleBuilder(run.encoder, run.pipeline, None, on_bad_image="skip")
    how = GREEDY.model_copy(update={"max_new_tokens": NEW_TOKENS})
    rows = run.cfg.eval.batch_size
    losses = sample_losses(run.model, eval_batches(examples, builder, PADDED, rows))
    return losses, write(run.model, run.encoder, builder, examples, how, batch_size=rows)


def check_worth_folding(run: TrainedRun) -> None:
    """Raises `UserError` where there is no norm, or where something else stands in the way of a class of transformers'
    own as well."""
    run, model, _ = _without_norm(run)
    prevents = joined_class(run, model).prevents
    if prevents:
        raise UserError(
            "--fold-norm changes what the model computes, to make it a class of transformers' own, and this run would "
            f"be none all the same: {prevents}. Leave it out"
        )


def without_norm(run: TrainedRun) -> TrainedRun:
    """The run with settings that have no norm, its model as it is. Raises `UserError` where there is none."""
    return _without_norm(run)[0]


def _without_norm(run: TrainedRun) -> tuple[TrainedRun, VisionLanguageModel, OutputNorm]:
    """The run with settings that have no norm; its model and the norm, as they are."""
    model = run.model
    if isinstance(model, NativeModel) or model.connector.output_norm is None:
        raise UserError(
            f"{run.folder} has no output norm (model.connector.output_norm), so there is nothing to fold; leave "
            "--fold-norm out"
        )
    connector = run.cfg.model.connector.model_copy(update={"output_norm": "none"})
    settings = run.cfg.model_copy(update={"model": run.cfg.model.model_copy(update={"connector": connector})})
    return replace(run, cfg=settings), model, model.connector.output_norm


def fold_norm(run: TrainedRun, count: int) -> Folding:
    """``run`` with its output norm folded into its projector, calibrated on ``count`` training images (fewer where
    there are not as many). The model itself is changed: its connector is the folded one from here on.

    Raises `UserError` where there is no norm, and where it is not known which images the run was trained on.
    """
    if count < 1:
        raise UserError(f"calibration is {count}, expected 1 image or more")
    folded_run, model, norm = _without_norm(run)
    unfolded = model.connector
    sums = _Sums()
    handle = norm.register_forward_hook(sums.add)
    images = 0
    try:
        with measuring(model):
            for chunk in _chunks(run, count, run.cfg.eval.batch_size):
                model.visual_tokens(chunk)
                images += len(chunk)
    finally:
        handle.remove()
    if not images:
        raise UserError(
            f"{run.folder}: no image that it was trained on can be opened, so the norm cannot be calibrated"
        )
    model.connector = without_output_norm(unfolded, sums.factors)
    return Folding(folded_run, unfolded, images, sums.tokens, sums.rms_spread, sums.kept)


def _chunks(run: TrainedRun, count: int, size: int) -> Any:
    """At most ``count`` different training images, ``size`` at a time."""
    seen: set[ImageRef] = set()
    chunk: list[ImageInput] = []
    for example in trained_on(run):
        for ref in example.images:
            if len(seen) == count or ref in seen:
                continue
            try:
                chunk.append(as_input(run.pipeline(ref)))
            except ImageError:  # left out of training as well
                continue
            seen.add(ref)
            if len(chunk) == size:
                yield chunk
                chunk = []
        if len(seen) == count:
            break
    if chunk:
        yield chunk


class _Sums:
    """What a norm is given (x) and gives (y), summed in fp64 over tokens."""

    def __init__(self) -> None:
        self.tokens = 0
        self._xx: Tensor = torch.zeros(())
        self._xy: Tensor = torch.zeros(())
        self._yy: Tensor = torch.zeros(())
        self._rms: list[Tensor] = []

    def add(self, _: Any, given: tuple[Tensor, ...], out: Tensor) -> None:
        x, y = given[0].double().flatten(0, -2).cpu(), out.double().flatten(0, -2).cpu()
        self.tokens += len(x)
        self._xx, self._xy = self._xx + (x * x).sum(0), self._xy + (x * y).sum(0)
        self._yy = self._yy + (y * y).sum()
        self._rms.append((x * x).mean(1).sqrt())

    @property
    def factors(self) -> Tensor:
        """Least squares: s of each channel with the smallest Σ (y - s x)²; 0 for a channel that never was anything
        else. fp64 ``[Dh]``."""
        return torch.where(self._xx > 0, self._xy / self._xx, torch.zeros_like(self._xx))

    @property
    def kept(self) -> float:
        return float((self.factors * self._xy).sum() / self._yy)

    @property
    def rms_spread(self) -> float:
        rms = torch.cat(self._rms)
        return float(rms.std(correction=0) / rms.mean())
