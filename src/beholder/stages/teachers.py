"""The teachers of a run: which they are, what is kept of them (``beholder teacher-cache``), and asking them online.

What of a teacher is kept lies in `store.teachers`; what the student makes of it is `train.objectives`'.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from beholder.config import DistillConfig, ModelConfig, RunConfig, TeacherConfig
from beholder.data import build_encoder
from beholder.data.build import build_pipeline, template_text
from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.collate import AskedTeacher, Layout, SampleBuilder, eval_batches
from beholder.data.images import ImageError, ImagePipeline, NativePipeline
from beholder.data.shared_tokens import aligned, shared_ids, token_bytes
from beholder.data.tokens import tokenizer_fingerprint
from beholder.evidence import Measurement
from beholder.model.build import Vlm, build_vlm
from beholder.model.divergence import Full, TopK, columns, sampled, top_k
from beholder.probes import joined as joined_words
from beholder.probes import loss, measurement, measuring, ratio_of_sums, transfer, wrong_images
from beholder.probes.loss import SampleLoss
from beholder.runs import RunDir, atomic_write, stop_signals, to_json
from beholder.stages.lifetime import sole_writer
from beholder.stages.measured import Measured
from beholder.stages.session import Session, open_session
from beholder.store.teachers import (
    KEPT_FOR,
    TOKENS,
    TeacherCache,
    TeacherKey,
    bytes_of,
    rows_of,
    seconds_a_token,
    teachers_dir,
)
from beholder.train.distributed import joined
from beholder.train.objectives import log_probabilities, spoken_of, taught_losses
from beholder.train.trained import identity, open_trained
from beholder.types import Batch, Condition, Example, Supervised, TeacherReader, UserError

HELD_OUT: tuple[Condition, ...] = ("correct", "shuffled")
"""Under which images a teacher's held-out losses are kept."""


# ---------------------------------------------------------------------------------------------------------------
# Which teacher it is


def keys(session: Session) -> list[TeacherKey]:
    """What the rows of each teacher are kept under."""
    tokenizer, vocab = tokenizer_fingerprint(session.tokenizer), session.model.language.vocab
    return [
        TeacherKey(t.name, identity(t), _prompted(t, session.cfg), tokenizer, vocab)
        for t in session.cfg.learnt_from.teachers
    ]


def _prompted(teacher: TeacherConfig, student: RunConfig) -> str:
    """sha256 over how a native teacher is asked, which the student's config says; a run has its own way, which is in
    its checkpoint."""
    if teacher.native is None:
        return ""
    p = student.prompting
    facts = [template_text(teacher.chat_template), p.system, p.thinking, p.image_token, student.image_label]
    return hashlib.sha256(to_json(facts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------------
# A teacher at work


@dataclass(frozen=True)
class Teacher:
    """A model that is asked, with what it takes samples by."""

    name: str
    model: Vlm
    tokenizer: Any
    encoder: ChatEncoder
    pipeline: ImagePipeline | NativePipeline

    @property
    def language(self) -> Any:
        return self.model.language

    translation: Translation | None = None
    """Of a teacher with another tokenizer (``distill.vocabulary: shared``)."""
    system: str | None = None
    """As `AskedTeacher` has it."""

    def supervised(self, batch: Batch) -> Supervised:
        """As `model.vlm.Seeing.supervised`."""
        return self.model.supervised(batch)

    @cached_property
    def asked(self) -> AskedTeacher:
        builder = SampleBuilder(self.encoder, self.pipeline, None, on_bad_image="error")
        layout = Layout(packing=False, pack_len=1, pad_to_multiple_of=8)
        return AskedTeacher(builder, layout, self.name, self.translation is not None, self.system)


@dataclass(frozen=True)
class Translation:
    """From a teacher's tokens to the student's (``distill.vocabulary: shared``).

    What the teacher says of a token that begins where one of its own does holds for the student too: both are about the
    text so far. Ids whose text both know are translated, the others' mass is in the rest. A token that begins elsewhere
    has no teacher, and counts in the loss by its data alone.
    """

    ids: torch.Tensor
    """int64 [teacher's V]: the student's id, or -1."""
    own: dict[int, bytes]
    theirs: dict[int, bytes]

    def top_k(self, log_p: torch.Tensor, where: Sequence[int | None], k: int, temperatures: tuple[float, ...]) -> TopK:
        """What the teacher says of the student's tokens; ``where``: at which of its own each begins. -inf throughout:
        nothing."""
        ids = self.ids.to(log_p.device)
        shared = torch.where(ids >= 0, log_p, -torch.inf)
        kept, at = shared.topk(min(k, int((ids >= 0).sum())), dim=-1)
        if kept.shape[-1] < k:
            raise UserError(
                f"distill.k is {k}, but student and teacher share only {kept.shape[-1]} tokens; lower it, or use a "
                "teacher of the same tokenizer"
            )
        rest = log_p.scatter(-1, at, -torch.inf)
        tail = torch.stack([torch.logsumexp(rest / t, dim=-1) for t in temperatures], dim=-1)
        rows = torch.tensor([-1 if w is None else w for w in where], device=log_p.device)
        said = (rows >= 0)[:, None]
        rows = rows.clamp_min(0)
        return TopK(
            torch.where(said, ids[at[rows]], torch.arange(k, device=log_p.device)),
            torch.where(said, kept[rows], -torch.inf), torch.where(said, tail[rows], -torch.inf), temperatures,
        )  # fmt: skip


def translate(teacher: Teacher, session: Session) -> Teacher:
    """The teacher, able to speak of the student's tokens. Raises `UserError` where they share none."""
    tokenizer, encoder = session.tokenizer, session.data.encoder
    ends = list(zip(teacher.encoder.eos_ids[:1], encoder.eos_ids[:1], strict=False))
    ids = torch.from_numpy(shared_ids(teacher.tokenizer, tokenizer, ends, teacher.language.vocab))
    shared, own = int((ids >= 0).sum()), session.model.language.vocab
    if shared < 2:
        raise UserError(f"the teacher {teacher.name} and the student share no tokens, so it can say nothing to it")
    session.reporter.line(
        "teacher", f"{teacher.name}: {shared:,} of its {len(ids):,} tokens are among the student's {own:,}"
    )
    return replace(teacher, translation=Translation(ids, token_bytes(tokenizer), token_bytes(teacher.tokenizer)))


def open_teacher(teacher: TeacherConfig, student: RunConfig, device: torch.device) -> Teacher:
    """The teacher's model, loaded and in eval mode. Raises `UserError` as loading it does."""
    if teacher.run is not None:
        found = open_trained(teacher.run, device)
        found.model.train(False)
        own = teacher.name, found.model, found.tokenizer, found.encoder, found.pipeline
        return Teacher(*own, system=student.prompting.system)
    native = {k: v for k, v in teacher.model_dump().items() if k in ("revision", "precision")}
    model_cfg = ModelConfig.model_validate({"native": {"name_or_path": teacher.native, **native}})
    model, tokenizer = build_vlm(model_cfg, compute_precision=teacher.precision, device=device, seed=0)
    p = student.prompting.model_copy(
        update={"chat_template": teacher.chat_template, "template": "chat", "max_seq_len": 10**9}
    )
    cfg = student.model_copy(update={"prompting": p, "model": model_cfg})
    pipeline = build_pipeline(cfg, model.geometry)
    encoder = build_encoder(cfg, tokenizer, model.num_visual_tokens, pipeline)
    encoder.check_table(model.language.vocab)
    model.train(False)
    return Teacher(teacher.name, model, tokenizer, encoder, pipeline, system=student.prompting.system)


def check_vocabulary(teacher: Teacher, student: Any) -> None:
    """`UserError` unless both tokenizers give every text the same ids, with the first ids that differ."""
    own, theirs = student.get_vocab(), teacher.tokenizer.get_vocab()
    if own == theirs:
        return
    by_id, their_id = ({i: t for t, i in vocab.items()} for vocab in (own, theirs))
    differ = [i for i in sorted(by_id.keys() | their_id.keys()) if by_id.get(i) != their_id.get(i)]
    some = ", ".join(f"{i}: {their_id.get(i)!r} for the teacher, {by_id.get(i)!r} for the student" for i in differ[:3])
    raise UserError(
        f"the teacher {teacher.name} and the student have different tokenizers: {len(differ):,} ids differ ({some}). A "
        "teacher of the same tokenizer is needed; or say distill.vocabulary: shared, which translates the ids whose "
        "text both know (docs/distillation.md says what that loses)"
    )


# ---------------------------------------------------------------------------------------------------------------
# Learning from them


Readers = tuple[TeacherReader | AskedTeacher, ...]


def check_teachers(session: Session, start: int, stop: int) -> None:
    """`UserError` for teachers that are not there, and for samples of training positions ``[start, stop)`` of which
    nothing is kept, before hours are spent. Nothing where the config gives teachers no say."""
    cfg = session.cfg.distill
    if cfg is None or not cfg.taught or start >= stop:
        return
    with session.phase("teachers"):
        for key in keys(session):
            if not cfg.online:
                with TeacherCache(cfg, key) as cache:
                    check_whole(session, cache, start, stop)


@contextmanager
def learning_from(session: Session) -> Iterator[tuple[Readers, Sequence[Teacher]]]:
    """`teachers_of`; nothing where the config gives teachers no say."""
    cfg = session.cfg.distill
    if cfg is None or not cfg.taught:
        yield (), ()
        return
    with teachers_of(session) as (readers, asked):
        if asked:
            session.reporter.line("teachers", f"asked while it learns: {', '.join(t.name for t in asked)}")
        yield readers, asked


@contextmanager
def teachers_of(session: Session) -> Iterator[tuple[Readers, Sequence[Teacher]]]:
    """What tells of samples what the teachers say: readers of what is kept of them; or, online, the teachers, loaded,
    and what shows samples to them."""
    cfg = session.cfg.learnt_from
    if cfg.online:
        teachers = [open_teacher(t, session.cfg, session.model.device) for t in cfg.teachers]
        for teacher in teachers:
            check_vocabulary(teacher, session.tokenizer)
        yield tuple(t.asked for t in teachers), teachers
        return
    with ExitStack() as stack:
        yield tuple(stack.enter_context(TeacherCache(cfg, key)) for key in keys(session)), ()


def check_whole(session: Session, cache: TeacherCache, start: int, stop: int) -> None:
    """`UserError` with the samples of training positions ``[start, stop)``, or held-out ones, that the cache has
    nothing about; but for those whose image cannot be had, which training rejects."""

    def look() -> None:
        lost: list[str] = []
        for example, targets in itertools.chain(_targets(session, start, stop), _held_out(session)):
            try:
                if not cache.has(example, targets):
                    for ref in example.images if session.cfg.data.on_bad_image == "skip" else ():
                        session.data.pipeline(ref)
                    lost.append(example.id)
            except ImageError as e:
                if session.cfg.data.on_bad_image == "error":
                    raise e.needed_by(example.where) from e
        cache.remember()
        if lost:
            raise cache.missing(lost)

    session.dist.on_main(look)
    session.reporter.line("teachers", f"{cache.key.name}: {len(cache.rows):,} rows of {TOKENS} tokens kept")


def _targets(session: Session, start: int, stop: int) -> Iterator[tuple[Example, np.ndarray]]:
    """Examples of training positions and their supervised ids; those that cannot be laid out or read, which training
    rejects, are left out."""
    train = session.data.train
    for position in train.distinct(start, stop):
        example = train.example_at(position)
        try:
            encoded = session.data.encoder.encode(example)
        except (EncodeError, ImageError):
            continue
        yield example, encoded.ids[encoded.supervise]


# ---------------------------------------------------------------------------------------------------------------
# Keeping what they say


@dataclass(frozen=True)
class Kept:
    """What ``beholder teacher-cache`` did of one teacher."""

    teacher: str
    folder: str
    samples: int
    """Training and held-out samples, those that were there already among them."""
    reused: int
    tokens: int
    """Supervised tokens of the samples that were made."""
    train_tokens: int
    """Supervised tokens of all training samples, made now or before."""
    bytes_per_token: int
    """Without the index."""
    seconds: float
    rejects: dict[str, str]
    """Samples that could not be had, with the reason (data.on_bad_image: skip)."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Cached:
    """What ``beholder teacher-cache`` did."""

    teachers: tuple[Kept, ...]
    is_main: bool = True

    def print(self, console: Console) -> None:
        for kept in self.teachers:
            new = kept.samples - kept.reused - len(kept.rejects)
            console.print(
                f"{kept.teacher}: {new:,} samples asked, {kept.reused:,} reused, {len(kept.rejects):,} rejected; "
                f"{kept.tokens:,} supervised tokens in {kept.seconds:.1f} s ({kept.tokens_per_s:,.0f} a second), "
                f"{kept.bytes_per_token} bytes a token; in {kept.folder}",
                markup=False, soft_wrap=True,
            )  # fmt: skip
            for sample, why in list(kept.rejects.items())[:5]:
                console.print(f"  rejected {sample}: {why}", markup=False, soft_wrap=True)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(kept) for kept in self.teachers]


def cache_teachers(cfg: RunConfig) -> Cached:
    """Ask every teacher about every training and held-out sample of a run of stage distill, and keep what it says.

    Killed at any instant, the next call goes on from there. Raises `UserError` for wrong input, and for a teacher that
    gives no finite log-probability.
    """
    if cfg.distill is None or cfg.distill.online or not cfg.distill.taught:
        why = "names no teachers" if cfg.distill is None else "reads nothing that is kept of them"
        raise UserError(
            f"this config {why} (distill.teachers, distill.online, distill.alpha), so there is nothing to do"
        )
    run = RunDir(cfg.run_dir)
    with joined(cfg.device, cfg.train.timeout_s) as dist, stop_signals(), sole_writer(run, dist):
        if dist.world_size > 1:
            raise UserError("beholder teacher-cache runs as one process; start it without torchrun")
        run.create()
        with open_session(cfg, run, dist, aside=True) as session:
            cached = Cached(
                tuple(keep(session, t, k) for t, k in zip(cfg.distill.teachers, keys(session), strict=True))
            )
        atomic_write(run.path / KEPT_FOR, to_json(cached.to_json(), indent=1) + "\n")
        return cached


def keep(session: Session, which: TeacherConfig, key: TeacherKey) -> Kept:
    """Everything of one teacher that is not kept yet."""
    cfg, started = session.cfg.learnt_from, time.perf_counter()
    with TeacherCache(cfg, key) as cache:
        wanted = list(needed(session))
        todo: list[tuple[Example, np.ndarray]] = []
        rejects: dict[str, str] = {}
        for example, targets in wanted:
            try:
                if not cache.has(example, targets):
                    todo.append((example, targets))
            except ImageError as e:
                if session.cfg.data.on_bad_image == "error":
                    raise e.needed_by(example.where) from e
                rejects[example.id] = e.reason
        tokens = sum(len(targets) for _, targets in todo)
        rows = rows_of(len(targets) for _, targets in todo)
        size, room = bytes_of(rows, cfg, key.vocab), cache.rows.max_bytes - cache.rows.bytes_used
        known = seconds_a_token(cache.rows.folder)
        told = "" if known is None else f", about {tokens * known / 60:,.1f} min as before"
        session.reporter.line(
            "teacher",
            f"{key.name}: {len(todo):,} of {len(wanted):,} samples to ask, {tokens:,} supervised tokens, "
            f"{cache.type.itemsize} bytes each ({cfg.form}), about {size / 1e6:,.1f} MB in {teachers_dir(cfg)}{told}",
        )
        if rows * cache.rows.row_bytes > room:
            raise UserError(
                f"{size / 1e9:,.1f} GB do not fit into what is left of distill.max_gb {cfg.max_gb:g} for this teacher "
                f"({room / 1e9:,.1f} GB); raise it, lower distill.k, use form sampled, or fewer samples"
            )
        file = held_out_file(session, cache)
        try:
            known_losses = read_held_out(file, session)
        except UserError:
            known_losses = None
        seconds = 0.0
        if todo or known_losses is None:
            teacher = open_teacher(which, session.cfg, session.model.device)
            if cfg.vocabulary == "equal":
                check_vocabulary(teacher, session.tokenizer)
            else:
                teacher = translate(teacher, session)
            started = time.perf_counter()
            rejects |= _ask(session, teacher, cache, todo)
            seconds = time.perf_counter() - started
            if known_losses is None:
                found = held_out_losses(session, teacher)
                atomic_write(file, to_json({c: [asdict(x) for x in own] for c, own in found.items()}) + "\n")
        cache.remember()
        reused = len(wanted) - len(todo) - len(rejects)
        train_tokens = sum(len(targets) for _, targets in wanted[: len(wanted) - len(session.held_out.examples)])
        return Kept(
            key.name, str(cache.rows.folder), len(wanted), reused, tokens, train_tokens, cache.type.itemsize, seconds,
            rejects,
        )  # fmt: skip


def needed(session: Session) -> Iterator[tuple[Example, np.ndarray]]:
    """Every training and held-out sample that teachers are asked about, with its supervised ids."""
    stop = session.data.total_steps(session.cfg) * session.cfg.effective_batch
    yield from _targets(session, 0, stop)
    yield from _held_out(session)


def _held_out(session: Session) -> Iterator[tuple[Example, np.ndarray]]:
    for example in session.held_out.examples:
        encoded = session.data.encoder.encode(example)
        yield example, encoded.ids[encoded.supervise]


def _ask(
    session: Session, teacher: Teacher, cache: TeacherCache, todo: Sequence[tuple[Example, np.ndarray]]
) -> dict[str, str]:
    """Gives the samples whose image could not be had, with the reason (``data.on_bad_image: skip``)."""
    cfg, size = session.cfg.learnt_from, session.cfg.eval.batch_size
    began, tokens = time.perf_counter(), 0
    rejects: dict[str, str] = {}
    try:
        with cache.writer() as writer, session.reporter.progress(f"teacher {teacher.name}") as tick, torch.no_grad():
            for start in range(0, len(todo), size):
                some = _readable(session, todo[start : start + size], rejects)
                if some:
                    examples, targets = zip(*some, strict=True)
                    cache.put(writer, some, say(teacher, examples, targets, cfg, cache.key.vocab, cache.sample_key))
                    tokens += sum(map(len, targets))
                if start == 0 and len(todo) > size:
                    took = (time.perf_counter() - began) * len(todo) / size
                    session.reporter.line("teacher", f"about {took / 60:,.1f} min for all of them")
                tick(min(start + size, len(todo)), len(todo))
                session.dist.alive()
    finally:
        if tokens:
            cache.note_cost(tokens, time.perf_counter() - began)
    return rejects


def _readable(
    session: Session, some: Sequence[tuple[Example, np.ndarray]], rejects: dict[str, str]
) -> list[tuple[Example, np.ndarray]]:
    """Those whose images can be had; under ``data.on_bad_image: skip`` the others are named in ``rejects``."""
    if session.cfg.data.on_bad_image == "error":
        return list(some)
    out: list[tuple[Example, np.ndarray]] = []
    for example, targets in some:
        try:
            for ref in example.images:
                session.data.pipeline(ref)
            out.append((example, targets))
        except ImageError as e:
            rejects[example.id] = e.reason
    return out


@torch.no_grad()
def say(
    teacher: Teacher, examples: Sequence[Example], targets: Sequence[np.ndarray], cfg: DistillConfig, vocab: int,
    sample_key: Callable[[Example, np.ndarray], bytes],
) -> list[dict[str, torch.Tensor]]:  # fmt: skip
    """What the teacher says of each sample's supervised tokens, in the form that the config keeps."""
    batch = teacher.asked.batch(examples, targets)
    found = teacher.supervised(batch)
    order = found.sample.argsort(stable=True)
    counts = torch.bincount(found.sample, minlength=len(examples)).tolist()
    out: list[dict[str, torch.Tensor]] = []
    for example, own, states, theirs in zip(
        examples, targets, found.hidden[order].split(counts), found.targets[order].split(counts), strict=True
    ):  # a sample's logits at a time
        logits = teacher.language.head(states)
        if (translation := teacher.translation) is not None:
            where = aligned(own.tolist(), theirs.tolist(), translation.own, translation.theirs)
            log_p = log_probabilities(logits, logits.shape[-1], [example.id])
            out.append(columns(translation.top_k(log_p, where, cfg.k, cfg.kept_temperatures)))
            continue
        log_p = log_probabilities(logits, vocab, [example.id])
        match cfg.form:
            case "topk":
                form = top_k(log_p, cfg.k, cfg.kept_temperatures)
            case "sampled":
                seed = int.from_bytes(sample_key(example, own)[:8], "little") & (2**63 - 1)
                draw = torch.Generator(device=log_p.device).manual_seed(seed)  # the same ids whatever the batch
                form = sampled(log_p, cfg.draws, cfg.temperature, draw)
            case "full":
                form = Full(log_p)
        out.append(columns(form))
    return out


# ---------------------------------------------------------------------------------------------------------------
# What the student is compared with


def held_out_file(session: Session, cache: TeacherCache) -> Path:
    """Where the teacher's losses of this run's held-out samples are kept."""
    targets = [own.tolist() for _, own in _held_out(session)]
    facts = [session.held_out.sha256, session.held_out.seed, session.held_out.ablation_sample, targets]
    return cache.rows.folder / f"held_out_{hashlib.sha256(to_json(facts).encode()).hexdigest()[:16]}.json"


def held_out_losses(session: Session, teacher: Teacher) -> dict[Condition, list[SampleLoss]]:
    """The teacher's losses of all held-out samples with their own image, and of the ablated ones with another's."""
    held = session.held_out

    def batches(examples: Sequence[Example]) -> Iterator[Batch]:
        targets = [e.ids[e.supervise] for e in map(session.data.encoder.encode, examples)]
        size = session.cfg.eval.batch_size
        with session.reporter.progress("the teacher's losses") as tick:
            for start in range(0, len(examples), size):
                yield teacher.asked.batch(examples[start : start + size], targets[start : start + size])
                tick(min(start + size, len(examples)), len(examples))

    wrong = wrong_images.ablation_losses(
        teacher.model, held.at(held.ablation_sample), batches, ["shuffled"], content_key=held.content_key,
        seed=held.seed,
    )  # fmt: skip
    return {"correct": loss.sample_losses(teacher.model, batches(held.examples)), **wrong}


def closeness(session: Session, m: Measured) -> None:
    """How far the student's next tokens are from its teachers', and whether it leans on the image as they do (E-6)."""
    try:
        with session.phase("teachers"), teachers_of(session) as (readers, asked):
            m.measurements.append(distance(session, readers, asked))
            looking_beside(session, m, readers, asked)
    except UserError as e:  # a teacher that is gone, or of which nothing is kept about a sample
        m.gaps.append(f"Distance from the teachers: not measured: {e}.")


def distance(session: Session, readers: Readers, asked: Sequence[Teacher]) -> Measurement:
    """``teacher.kl``: Σ wᵢ KL(teacherᵢ ‖ student) per supervised token of the held-out samples."""
    cfg, held = session.cfg.learnt_from, session.held_out
    t = 1.0 if 1.0 in cfg.kept_temperatures or cfg.online or cfg.form == "full" else cfg.temperature
    builder = replace(session.data.builder(session.store, train=False, cfg=session.cfg), teachers=readers)
    mine: list[tuple[str, float, int]] = []
    error: UserError | None = None
    try:
        mine = divergences(session, builder, asked, t)
    except UserError as e:
        error = e
    if session.dist.all_reduce_sum([float(error is not None)])[0]:  # another process may lack other rows
        raise error or UserError("another process lacks what is kept of a teacher")
    found = {id: (kl, n) for own in session.dist.gather_objects(mine) for id, kl, n in own}
    kl, tokens = (np.array([found[e.id][k] for e in held.examples]) for k in (0, 1))
    told = "of all teachers, by their weights" if len(cfg.teachers) > 1 else None
    if cfg.vocabulary == "shared":
        told = joined_words(told, "of the tokens that a teacher speaks of")
    value = ratio_of_sums(kl, tokens.astype(np.float64), held.seed)
    return measurement("teacher.kl", *value, n=len(kl), caveat=joined_words(f"at temperature {t:g}", told))


def looking_beside(session: Session, m: Measured, readers: Readers, asked: Sequence[Teacher]) -> None:
    """Image reliance beside that of the teacher with the largest weight, on the ablated samples (E-6)."""
    what, held = "Whether looking transfers from the teacher", session.held_out
    weights = [t.weight for t in session.cfg.learnt_from.teachers]
    which = weights.index(max(weights))
    if "shuffled" not in m.ablated:
        m.gaps.append(f"{what}: not measured, ablation.conditions leaves shuffled out.")
        return
    reader = readers[which]
    if isinstance(reader, TeacherCache):
        file = held_out_file(session, reader)
        if not file.is_file():
            m.gaps.append(
                f"{what}: not measured, nothing is kept of what the teacher loses on these held-out samples; run "
                "beholder teacher-cache again."
            )
            return
        theirs = read_held_out(file, session)
    else:
        theirs = held_out_losses(session, asked[which])
    indices = held.ablation_sample
    student = _both(m.ablated["correct"], m.ablated["shuffled"])
    teacher = _both([theirs["correct"][i] for i in indices], theirs["shuffled"])
    found = transfer.looking(teacher, student, held.seed)
    m.measurements += found.measurements
    m.gaps += found.gaps


def _both(own: Sequence[SampleLoss], wrong: Sequence[SampleLoss]) -> transfer.Losses:
    right, other = (np.array([x.nll for x in losses]) for losses in (own, wrong))
    return transfer.Losses(right, other, np.array([x.tokens for x in own]))


@torch.no_grad()
def divergences(
    session: Session, builder: SampleBuilder, asked: Sequence[Teacher], t: float
) -> list[tuple[str, float, int]]:
    """(sample, Σ KL in nats, tokens) of this process's share of the held-out samples."""
    cfg, dist = session.cfg.learnt_from, session.dist
    mine = session.held_out.examples[dist.rank :: dist.world_size]
    out: list[tuple[str, float, int]] = []
    with measuring(session.model), session.reporter.progress("distance from the teachers") as tick:
        for batch in eval_batches(mine, builder, session.data.layout, session.cfg.eval.batch_size):
            _, _, kl = taught_losses(session.model, batch, cfg, asked, 0.0, t)
            where = batch.sample_index[batch.supervise]
            sums = torch.zeros(len(batch.ids), dtype=torch.float64).index_add_(0, where, kl.cpu().double())
            counts = torch.bincount(where[spoken_of(batch, cfg)], minlength=len(batch.ids))
            out += zip(batch.ids, sums.tolist(), counts.tolist(), strict=True)
            tick(len(out), len(mine))
    return out


def read_held_out(file: Path, session: Session) -> dict[Condition, list[SampleLoss]]:
    """What `held_out_losses` gave. Raises `UserError` for a file that is not that of this run's held-out samples."""
    held = session.held_out
    wanted = {"correct": held.examples, "shuffled": held.at(held.ablation_sample)}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        found: dict[Condition, list[SampleLoss]] = {c: [SampleLoss(**row) for row in rows[c]] for c in HELD_OUT}
        for condition, own in found.items():
            if [x.id for x in own] != [e.id for e in wanted[condition]] or not all(
                math.isfinite(x.nll) and x.tokens > 0 for x in own
            ):
                raise ValueError("other samples")
        return found
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as e:
        raise UserError(
            f"{file}: the teacher's held-out losses cannot be read ({type(e).__name__}); run beholder teacher-cache "
            "again, which makes them anew"
        ) from e
