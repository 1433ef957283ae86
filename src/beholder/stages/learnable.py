"""``beholder audit SUBJECT``: what a data set gives away without any image, to readers that were trained on it and not.

A config's or run's data is read by the language model as it is (`probes.audit`), and by a learner that is trained on
the questions (E-4): one that knows their words alone, or the run's own language model with fresh adapters, trained by
the engine that trains runs, on text only.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from beholder.config import RunConfig
from beholder.config.file import load_config
from beholder.data.collate import Layout, collate
from beholder.data.sources import guess_source, open_sources
from beholder.evidence import Measurement, load_evidence
from beholder.model.plan import apply_train_plan, param_groups, plan_of
from beholder.probes import audit, drawn, text_learner
from beholder.probes.answers import is_short
from beholder.probes.loss import SampleLoss
from beholder.runs import RunDir
from beholder.stages.remeasure import Answer, audit_data, run_folder
from beholder.stages.session import Session, open_session
from beholder.train import checkpoint, restore
from beholder.train.distributed import joined
from beholder.train.engine import fit
from beholder.train.objectives import next_token
from beholder.train.optim import build_optimizer
from beholder.types import Batch, Encoded, Example, UserError

MOST_IMAGES = 64
"""Of a record in a file that no config describes."""
LM_QUESTIONS, LM_FOLDS, LM_EPOCHS = 2000, 2, 2
"""Questions that the run's own language model is trained and tested on, and how often it sees each fold's others."""
LM_BATCH = 16
"""Samples a step."""

NUM_TURNS = 256
"""Answers that the language model scores, unless told otherwise."""

Learner = Literal["words", "lm"]
COLUMNS = {
    "learner.accuracy": "learned from the words", "learner.lm": "learned by its language model",
    "learner.majority": "usual answer to the question", "answer.accuracy.none": "the run, blind, on held-out samples",
}  # fmt: skip


def audit_subject(
    subject: str,
    *,
    num_turns: int | None = None,
    part: Literal["train", "eval"] | None = None,
    learner: Learner = "words",
    image_root: str | None = None,
    overrides: Sequence[str] = (),
) -> Answer:
    """What can be answered without any image: in a config's data, a run's, or a record file's.

    ``learner``: ``words`` trains a learner of words and pairs of words, in seconds; ``lm`` the run's own language model
    as well, in minutes. ``num_turns``: answers that the language model scores, default `NUM_TURNS`; ``part``: the
    samples to train on (default), or the held-out ones. Of a record file, which names no model, only the words are
    audited. A run's table has its own
    blind answers beside it, from its evidence. Nothing of the run is changed.
    """
    path = Path(subject)
    is_run, is_config = (path / "config.yaml").is_file(), subject.endswith((".yaml", ".yml"))
    if learner == "lm" and not is_run:
        raise UserError(f"--learner lm trains the language model of a run, and {subject} is none; give a run folder")
    if not is_run and not is_config:
        for flag, given in (("--set", overrides), ("--num-turns", num_turns), ("--part", part)):
            if given:
                raise UserError(f"{flag} is about a config or a run, but SUBJECT is a record file; remove it")
        if path.is_dir() and (path / "checkpoints").is_dir():
            run_folder(subject)  # says what is missing of a run
        source = guess_source(subject, image_root=image_root)
        records = open_sources([source], image_token="<image>", max_images=MOST_IMAGES, on_reject="collect")
        found = text_learner.learn([records[i] for i in range(len(records))])
        lost = [f"{len(records.rejects):,} bad records were left out; beholder check names them."]
        return _told(f"{subject}, no image shown", None, found, lost if records.rejects else [])
    if image_root is not None:
        raise UserError("--image-root describes a record file; SUBJECT has a config, which says it itself; remove it")
    cfg = load_config(path / "config.yaml" if is_run else path, overrides)
    return _audited(cfg, path if is_run else None, num_turns or NUM_TURNS, part or "train", learner)


def _audited(
    cfg: RunConfig, run: Path | None, num_turns: int, part: Literal["train", "eval"], learner: Learner
) -> Answer:
    with joined(cfg.device, cfg.train.timeout_s) as dist, tempfile.TemporaryDirectory() as folder:
        base = (
            restore.read_base(checkpoint.resolve_checkpoint(run))
            if run is not None and (run / "checkpoints").is_dir()
            else {}
        )
        session = open_session(cfg, RunDir(folder), dist, base, aside=True)
        with session:
            held_out = part == "eval"
            examples = session.data.eval_examples if held_out else session.data.train.first(text_learner.MAX_QUESTIONS)
            read = examples if held_out else examples[:num_turns]
            title = f"{part} samples of {cfg.run_name}, no image shown"
            first = audit_data(session, read, title, num_turns=num_turns)
            own: list[Measurement] = []
            extra: list[str] = []
            found = None
            try:
                found = text_learner.learn(examples, seed=cfg.measure_seed, content_key=session.held_out.content_key)
            except UserError as e:  # captions, say; what the language model reads is told all the same
                extra.append(f"Nothing was learned: {e}.")
            if run is not None and (run / "evidence.json").is_file():
                blind = [m for m in load_evidence(run).measurements if m.name == "answer.accuracy.none"]
                own += [m for m in blind if m.by in (None, "question")]
            if learner == "lm":
                measured, seconds, note = language_learner(session, examples, RunDir(folder))
                own += measured
                extra.append(f"The language model's learner took {seconds:.0f} s. {note}")
            return _told(first.title, first, found, extra, own, dist.is_main)


def _told(
    title: str,
    first: Answer | None,
    found: text_learner.Learned | None,
    more: Sequence[str] = (),
    own: Sequence[Measurement] = (),
    is_main: bool = True,
) -> Answer:
    lines = [] if first is None else list(first.findings)
    measured = [] if first is None else list(first.measurements)
    if found is not None:
        said = f"A learner of the questions' words took {found.seconds:.1f} s"
        words = "; ".join(map(str, found.words))
        said += f"; the words that told it most: {words}." if words else " and found no word that tells."
        lines += [*found.findings, said, *found.gaps]
        measured += found.measurements
    columns = ({} if first is None else first.columns) | COLUMNS
    return Answer(title, [*measured, *own], columns, [*lines, *more], is_main=is_main)


# ---------------------------------------------------------------------------------------------------------------
# The run's own language model as a learner


@dataclass(frozen=True)
class _TextStream:
    """Texts as the batches of each step, a pure function of (seed, step), each process its share."""

    mixture: Sequence[tuple[str, Encoded]]
    layout: Layout
    seed: int
    rank: int
    world_size: int

    @property
    def samples_per_step(self) -> int:
        return min(LM_BATCH, len(self.mixture))

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        for step in range(start, stop):
            places = np.arange(step * self.samples_per_step, (step + 1) * self.samples_per_step)
            epochs, within = np.divmod(places, len(self.mixture))
            orders = {
                e: np.random.default_rng([self.seed, e]).permutation(len(self.mixture)) for e in set(epochs.tolist())
            }
            mine = [int(orders[int(e)][k]) for e, k in zip(epochs, within, strict=True)][self.rank :: self.world_size]
            yield [collate([(*self.mixture[k], []) for k in mine], self.layout)]


def language_learner(
    session: Session, examples: Sequence[Example], run: RunDir
) -> tuple[list[Measurement], float, str]:
    """``learner.lm``: share of held-out short answers that the run's language model gives word for word from the text,
    after its fresh adapters were trained on other questions without any image.

    By the rates of the run's config, `LM_EPOCHS` passes over each of `LM_FOLDS` folds of at most `LM_QUESTIONS`
    samples with a single short answer, all about the same images in one fold; the others are left out and counted. The
    adapters are as at the start afterwards. Raises UserError where the run has none, or too few questions.
    """
    started = time.perf_counter()
    cfg, model, dist = session.cfg, session.model, session.dist
    if not cfg.has_adapters:
        raise UserError("--learner lm trains adapters, and this run has none (model.lora.enable); use --learner words")
    asked = [e for e in examples if e.num_answers == 1 and is_short(e)]
    left_out = len(examples) - len(asked)
    rng = np.random.default_rng(cfg.measure_seed)
    asked = drawn(asked, LM_QUESTIONS, rng)
    owner = text_learner.numbered(text_learner.owners_of(asked, session.held_out.content_key)[0])
    if (different := len(np.unique(owner))) < 2 * text_learner.MIN_SAMPLES:
        raise UserError(
            f"--learner lm: only {different} samples have a single short answer; "
            f"{2 * text_learner.MIN_SAMPLES} are needed to learn from some and hold out others"
        )
    fold = text_learner.folds_of(owner, LM_FOLDS, rng)
    texts = audit.texts(session.data.encoder, asked)
    apply_train_plan(model, plan_of(cfg.model, cfg.stage_record))
    groups = [
        g for g in param_groups(model, cfg.train.lr.model_dump(), cfg.train.weight_decay.model_dump())
        if g["name"].startswith("lora.")
    ]  # fmt: skip
    fresh = {name: p.detach().clone() for g in groups for name, p in g["params"]}

    def reset() -> None:
        with torch.no_grad():
            for g in groups:
                for name, p in g["params"]:
                    p.copy_(fresh[name])

    losses: dict[int, SampleLoss] = {}
    for f in range(LM_FOLDS):
        learns = [texts[k] for k in np.flatnonzero(fold != f).tolist()]
        stream = _TextStream(learns, session.data.layout, cfg.seed + f, dist.rank, dist.world_size)
        steps = max(1, LM_EPOCHS * len(learns) // stream.samples_per_step)
        settings = cfg.train.model_copy(update={"save_every": steps + 1, "log_every": steps + 1})
        fit(
            model, next_token, stream, cfg=settings, total_steps=steps,
            optimizer=build_optimizer(groups, cfg.train.betas), run=run, seed=cfg.seed + f, save=lambda step: None,
            dist=dist,
        )  # fmt: skip
        held = np.flatnonzero(fold == f).tolist()
        found = session.together.text_losses([asked[k] for k in held])
        losses |= dict(zip(held, found, strict=True))
        reset()
    right = np.array([losses[k].exact for k in range(len(asked))], dtype=np.float64)
    told = f"{left_out:,} of {len(examples):,} samples left out: several answers, or one too long"
    caveat = "every token, end token included, the arg-max" + (f"; {told}" if left_out else "")
    measured = text_learner.by_kind(asked, owner, {"lm": (right, caveat)}, cfg.measure_seed)
    note = f"{len(asked):,} questions, {LM_FOLDS} folds, {LM_EPOCHS} epochs each, adapters fresh, no image."
    return measured, time.perf_counter() - started, note + (f" {told}." if left_out else "")
