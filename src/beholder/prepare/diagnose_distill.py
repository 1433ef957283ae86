"""Looks over a distillation before it is trained: do teacher and student speak of the same tokens, is what is kept of
the teacher whole and right, how much is lost by keeping less than all (``beholder doctor distillation``); and a batch
with what its teachers say (``beholder doctor batch``).

Everything is asked of the parts that train: the student's encoder, the cache's reader, the divergence.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from beholder.config import DistillConfig, TeacherConfig
from beholder.data.chat import EncodeError
from beholder.data.images import ImageError
from beholder.model import divergence as kl
from beholder.prepare.diagnose import Examined, NotFiniteError, Shown, finite, judged, student_of, token_text
from beholder.prepare.doctor import Check
from beholder.probes import measuring
from beholder.stages.session import Session
from beholder.stages.teachers import Teacher, check_vocabulary, keys, needed, open_teacher, say, translate
from beholder.store.teachers import TeacherCache, TeacherKey, token_type
from beholder.types import Encoded, Example, UserError, printable

ITSELF, ITSELF_16 = 1e-4, 1e-2
"""Nats a token that a teacher may be from itself: what is left of log-probabilities kept in 16 bits, and of a teacher
that computes in 16 bits and is asked with other samples beside it. Both are of second order, far above what they were
measured at."""
ERRORS = 4.0
"""Standard errors that the mean of drawn values may be off."""
LOST = 0.05
"""Share of the divergence that a top k may miss before it is told."""
NAMED = 5
"""Samples spelled out."""
MOST = 64
"""Tokens of a sample whose distributions are compared: the whole vocabulary is held for each."""
TOP = 3
"""Tokens of a teacher shown beside each of a batch."""


@dataclass(frozen=True)
class Taken:
    """A sample with its tokens as the student takes it."""

    example: Example
    encoded: Encoded

    @property
    def targets(self) -> np.ndarray:
        return self.encoded.ids[self.encoded.supervise]


def taken(session: Session, examples: Sequence[Example]) -> list[Taken]:
    """Those of the examples that can be laid out. Raises `ImageError` for a picture that cannot be had, unless the
    config skips such samples."""
    builder = replace(session.data.builder(None, train=False, cfg=session.cfg), on_bad_image="error")
    out: list[Taken] = []
    for example in examples:
        try:
            out.append(Taken(example, builder.build(example)[1]))
        except EncodeError:
            continue
        except ImageError:
            if session.cfg.data.on_bad_image == "error":
                raise
    return out


# ---------------------------------------------------------------------------------------------------------------
# beholder doctor distillation


def examine_distillation(subject: str, overrides: Sequence[str] = (), *, num: int = 8) -> Examined:
    """Hold a distillation's teachers and student side by side, on ``num`` samples, half of them held out. Raises
    `UserError` for parts that cannot be loaded."""
    with student_of(subject, overrides) as session:
        cfg, total = session.cfg.learnt_from, session.data.total_steps(session.cfg)
        held = session.held_out.examples[: num // 2]
        samples = taken(session, [*session.data.train.first(num - len(held)), *held])
        student = [_student_logits(session, s) for s in samples]
        shown = [_schedule(cfg, total)]
        checks = [
            judged("teacher's share", cfg.taught, f"alpha {cfg.alpha:g}" if cfg.taught else "alpha is 0 throughout",
                   "The student would learn from the data alone: raise distill.alpha."),
            judged("samples", bool(samples), f"{len(samples)} compared, {sum(len(s.targets) for s in samples)} tokens",
                   "None can be laid out: see beholder check."),
        ]  # fmt: skip
        facts: dict[str, Any] = {"teachers": []}
        for which, key in zip(cfg.teachers, keys(session), strict=True):
            told = f"{which.name}: " if len(cfg.teachers) > 1 else ""
            own, tables, numbers = _one_teacher(session, which, key, samples, student)
            checks += [Check(told + c.name, c.level, c.found, c.advice) for c in own]
            shown += tables
            facts["teachers"].append({"name": which.name, **numbers})
        return Examined(subject, tuple(checks), tuple(shown), facts)


def _one_teacher(
    session: Session, which: TeacherConfig, key: TeacherKey, samples: Sequence[Taken], student: Sequence[Tensor]
) -> tuple[list[Check], list[Shown], dict[str, Any]]:
    cfg = session.cfg.learnt_from
    checks: list[Check] = []
    cache = None if cfg.online else TeacherCache(cfg, key)
    try:
        checks.append(
            Check("cache", "ok", "none: teachers are asked while the student learns (distill.online)")
            if cache is None else _whole(session, cache)
        )  # fmt: skip
        teacher = open_teacher(which, session.cfg, session.model.device)
        if cfg.vocabulary == "shared":
            assert cache is not None, "checked by `DistillConfig.impossible`"
            return [*checks, _translated(translate(teacher, session), cache, cfg, samples)], [], {}
        try:
            check_vocabulary(teacher, session.tokenizer)
        except UserError as e:
            checks.append(Check("vocabulary", "fail", "teacher and student have different tokenizers", str(e)))
            return checks, [], {}
        checks.append(Check("vocabulary", "ok", f"equal, {len(session.tokenizer.get_vocab()):,} tokens"))
        mask, fit = _aligned(session, teacher, samples)
        checks.append(mask)
        if not fit:
            return checks, [], {}
        try:
            log_p = [_teacher_log_p(teacher, samples[k], key.vocab) for k in fit]
        except NotFiniteError as e:
            checks.append(Check("log-probabilities", "fail", str(e), "See beholder doctor teacher."))
            return checks, [], {}
        some = [samples[k] for k in fit]
        checks += _itself(teacher, cache, cfg, key, some, log_p)
        more, table, numbers = _forms(cfg, key.vocab, [student[k] for k in fit], log_p)
        return [*checks, *more], [table], numbers
    finally:
        if cache is not None:
            cache.close()


def _schedule(cfg: DistillConfig, total: int) -> Shown:
    """alpha and T at the first, the middle and the last step, as the objective takes them."""
    rows = [
        (f"{name} ({step + 1:,})", *(f"{value:.4g}" for value in cfg.at(step, total)))
        for name, step in (("first", 0), ("middle", total // 2), ("last", total - 1))
    ]
    return Shown("Schedule", ("step", "alpha", "temperature"), tuple(rows))


def _whole(session: Session, cache: TeacherCache) -> Check:
    """Whether the cache has every sample that training and evaluation need."""
    count, lost, unread = 0, [], 0
    for example, targets in needed(session):
        try:
            count += 1
            if not cache.has(example, targets):
                lost.append(example.id)
        except ImageError:
            unread += 1
    bad = f", {unread:,} with a picture that cannot be read" if unread else ""
    if not lost:
        return Check("cache", "ok", f"whole: all {count - unread:,} samples have their rows{bad}")
    some = ", ".join(map(repr, lost[:NAMED])) + (", …" if len(lost) > NAMED else "")
    told = f"{count - unread - len(lost):,} of {count:,} samples have rows; missing: {some}{bad}"
    return Check("cache", "fail", told, f"{cache.missing(lost)}.")


def _translated(teacher: Teacher, cache: TeacherCache, cfg: DistillConfig, samples: Sequence[Taken]) -> Check:
    """Of how many of the student's tokens a teacher with another tokenizer has something to say; masks and forms cannot
    be compared id by id."""
    said = total = 0
    for s in samples:
        columns = say(teacher, [s.example], [s.targets], cfg, cache.key.vocab, cache.sample_key)[0]
        said += int((columns["log_p"].amax(-1) > -torch.inf).sum())
        total += len(s.targets)
    return judged(
        "vocabulary", said > 0, f"shared: the teacher speaks of {said} of {total} learned tokens",
        "None of its tokens begins where one of the student's does: take a teacher of the same tokenizer.",
    )  # fmt: skip


def _aligned(session: Session, teacher: Teacher, samples: Sequence[Taken]) -> tuple[Check, list[int]]:
    """Whether teacher and student learn the same tokens of each sample, and of which they do."""
    fit: list[int] = []
    first: str | None = None
    for k, sample in enumerate(samples):
        wanted = sample.targets
        try:
            theirs = teacher.encoder.encode(sample.example)
        except (EncodeError, ImageError) as e:
            first = first or f"{sample.example.where}: the teacher cannot be shown it: {e}"
            continue
        own = theirs.ids[theirs.supervise]
        if len(own) >= len(wanted) and bool((own[: len(wanted)] == wanted).all()):
            fit.append(k)
        elif first is None:
            first = f"{sample.example.where}: {_difference(teacher, session.tokenizer, own, wanted)}"
    told = f"the same supervised tokens in {len(fit)} of {len(samples)} samples"
    check = judged(
        "mask", first is None, told,
        f"First difference, {first}. Give both the same prompting.chat_template and prompting.template.",
    )  # fmt: skip
    return check, fit


def _difference(teacher: Teacher, student: Any, own: np.ndarray, wanted: np.ndarray) -> str:
    k = next((k for k, (a, b) in enumerate(zip(own, wanted, strict=False)) if a != b), min(len(own), len(wanted)))

    def word(tokenizer: Any, ids: np.ndarray) -> str:
        return f"{token_text(tokenizer, int(ids[k]))} (id {ids[k]})" if k < len(ids) else "nothing more"

    before = token_text(student, int(wanted[k - 1])) if k else "the prompt"
    return (
        f"after {before}, token {k + 1} of what is learned is {word(teacher.tokenizer, own)} for the teacher and "
        f"{word(student, wanted)} for the student"
    )


# -- what both say


@torch.no_grad()
def _student_logits(session: Session, sample: Taken) -> Tensor:
    """fp32 [K, V] of a sample's first `MOST` supervised tokens."""
    builder = session.data.builder(None, train=False, cfg=session.cfg)
    with measuring(session.model):
        found = session.model.supervised(builder.batch([sample.example], session.data.layout))
        return session.model.language.head(found.hidden[:MOST])[:, : session.model.language.vocab].float()


@torch.no_grad()
def _teacher_log_p(teacher: Teacher, sample: Taken, vocab: int, most: int | None = MOST) -> Tensor:
    """fp32 [K, V] of a sample's first ``most`` supervised tokens. Raises `NotFiniteError`."""
    found = teacher.supervised(teacher.asked.batch([sample.example], [sample.targets]))
    return finite(teacher.language.head(found.hidden[:most]), vocab, sample.example)


def _as_kept(columns: dict[str, Tensor], cfg: DistillConfig, vocab: int) -> dict[str, Tensor]:
    """The numbers as they come back from the cache: rounded to the bits that are kept."""
    kind = token_type(cfg, vocab)
    return {
        name: torch.from_numpy(value.cpu().numpy().astype(kind[name].base).astype(np.float64)).to(value.dtype)
        for name, value in columns.items()
    }


@torch.no_grad()
def _itself(
    teacher: Teacher, cache: TeacherCache | None, cfg: DistillConfig, key: TeacherKey, samples: Sequence[Taken],
    log_p: Sequence[Tensor],
) -> list[Check]:  # fmt: skip
    """KL of what is kept of the teacher with the teacher as it is, which should be 0: read from the cache where it has
    the samples, else made and rounded as the cache would."""
    sums: dict[float, list[Tensor]] = {t: [] for t in cfg.temperatures}
    spread: dict[float, float] = dict.fromkeys(cfg.temperatures, 0.0)
    read = 0
    for sample, own in zip(samples, log_p, strict=True):
        if cfg.online:
            form: kl.Teacher = kl.Full(own)
        else:
            assert cache is not None
            if cache.has(sample.example, sample.targets):
                columns = cache.taught([sample.example], [sample.targets])
                read += 1
            else:
                made = say(teacher, [sample.example], [sample.targets], cfg, key.vocab, cache.sample_key)[0]
                columns = _as_kept(made, cfg, key.vocab)
            form = kl.teacher_of({n: c[:MOST].to(own.device) for n, c in columns.items()}, cfg.kept_temperatures)
        for t in cfg.temperatures:
            sums[t].append(kl.divergence(own, form, t))
            if isinstance(form, kl.Sampled):
                spread[t] += float(_variance(own, own, t).sum()) / form.ids.shape[-1]
    form_name = "full" if cfg.online else cfg.form
    where = "asked" if cfg.online else f"{read} of {len(samples)} samples from the cache"
    worst, allowed = 0.0, 0.0
    narrow = ITSELF if teacher.language.dtype == torch.float32 else ITSELF_16
    for t, found in sums.items():
        values = torch.cat(found)
        off = abs(float(values.double().mean()))
        tolerance = ERRORS * math.sqrt(spread[t]) / len(values) + narrow
        if not off / tolerance <= (worst / allowed if allowed else -1.0):
            worst, allowed = off, tolerance
    how = f" = {ERRORS:g} standard errors of the draws + {narrow:g}" if form_name == "sampled" else ""
    return [
        judged(
            "KL of the teacher with itself", worst <= allowed,
            f"{worst:.2g} nats a token (0 up to {allowed:.2g}{how}; form {form_name}; {where})",
            "What is kept is not what the teacher says now: its cache was damaged, or made at another precision or on "
            "another machine. Remove its folder (distill.dir) and run beholder teacher-cache CONFIG.",
        )
    ]  # fmt: skip


def _variance(log_q: Tensor, log_p: Tensor, t: float) -> Tensor:
    """fp64 [K]: variance of log q_T under p_T, which is that of a sampled divergence with one draw."""
    q, p = (torch.log_softmax(x.double() / t, -1) for x in (log_q, log_p))
    weight = p.exp()
    q = torch.where(weight > 0, q, 0.0)
    return ((weight * q * q).sum(-1) - (weight * q).sum(-1) ** 2).clamp_min(0)


@torch.no_grad()
def _forms(
    cfg: DistillConfig, vocab: int, logits: Sequence[Tensor], log_p: Sequence[Tensor]
) -> tuple[list[Check], Shown, dict[str, Any]]:
    """Bytes of each form, and how far its divergence of the student as it is lies from the full one."""
    t, tokens, k = cfg.temperature, sum(map(len, log_p)), min(cfg.k, vocab)
    sums: dict[str, float] = dict.fromkeys(("full", "topk", "bound", "drawn", "variance"), 0.0)
    draw = torch.Generator(device=log_p[0].device).manual_seed(0)
    for q, p in zip(logits, log_p, strict=True):
        found = {
            "full": kl.divergence(q, kl.Full(p), t),
            "topk": kl.divergence(q, kl.top_k(p, k, (t,)), t),
            "bound": kl.tail_gap(q, p, k, t),
            "drawn": kl.divergence(q, kl.sampled(p, cfg.draws, t, draw), t),
            "variance": _variance(q, p, t) / cfg.draws,
        }
        for name, values in found.items():
            sums[name] += float(values.double().sum())
    full, top, bound, drawn = (sums[name] / tokens for name in ("full", "topk", "bound", "drawn"))
    error = math.sqrt(sums["variance"]) / tokens
    rounding = 1e-4 * (1 + abs(full))
    checks = [
        judged("top-k error", abs(full - top - bound) <= rounding,
               f"|KL_topk - KL_full| = {abs(top - full):.3g}, as its bound says ({bound:.3g})",
               "It must be p_tail · KL within the tail: please report this."),
        judged("sampled error", abs(drawn - full) <= ERRORS * error + rounding,
               f"|KL_sampled - KL_full| = {abs(drawn - full):.3g}, within {ERRORS:g} standard errors of {error:.3g}",
               "It must be the full divergence on average: please report this."),
    ]  # fmt: skip
    if cfg.form == "topk" and not cfg.online and bound > LOST * full:
        checks.append(
            Check("size of k", "warn", f"k = {k} misses {bound / full:.0%} of the divergence",
                  "Raise distill.k, or use form sampled, which misses nothing on average.")
        )  # fmt: skip
    forms: tuple[tuple[Literal["topk", "sampled", "full"], str, float, str], ...] = (
        ("topk", f"topk, k {k}", top, f"{bound:.3g} (bound)"),
        ("sampled", f"sampled, {cfg.draws} draws", drawn, f"{error:.3g} (standard error)"),
        ("full", "full", full, "0"),
    )
    size = {form: token_type(cfg.model_copy(update={"form": form, "k": k}), vocab).itemsize for form, *_ in forms}
    rows = tuple((name, f"{size[f]:,}", f"{x:.4f}", f"{abs(x - full):.2e}", e) for f, name, x, e in forms)
    return (
        checks,
        Shown(
            f"Forms of {tokens} tokens at temperature {t:g}",
            ("form", "bytes a token", "KL, nats", "off full", "expected"), rows,
        ),
        {
            "tokens": tokens, "bytes_per_token": size, "kl": {"topk": top, "sampled": drawn, "full": full},
            "topk_bound": bound, "sampled_standard_error": error,
        },
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# beholder doctor batch


@dataclass(frozen=True)
class Row:
    """A supervised token and what a teacher says in its place."""

    token: str
    probability: float | None
    """Of this very token; None: not among what is kept."""
    top: tuple[tuple[str, float], ...]


def examine_batch(subject: str, overrides: Sequence[str] = (), *, num: int = 2) -> Examined:
    """The first ``num`` samples of the first training step, as a batch: what is masked, what is learned, and what each
    teacher says in the place of each learned token, from the cache where it has the sample, else by asking."""
    with student_of(subject, overrides) as session:
        cfg = session.cfg.learnt_from
        examples = [session.data.train.example_at(k) for k in range(num)]
        batch = session.data.builder(None, train=True, cfg=session.cfg).batch(examples, session.data.layout)
        samples: list[Taken] = []
        for example in examples:  # in this order, without those that were rejected
            if len(samples) < len(batch.ids) and batch.ids[len(samples)] == example.id:
                samples.append(Taken(example, session.data.encoder.encode(example)))
        rejected = "; ".join(f"{i}: {why}" for i, why in batch.rejected)
        checks = [
            judged("samples", not batch.rejected, f"{len(samples)} of {num} laid out", f"Rejected: {rejected}."),
            _same_tokens([batch.input_ids[batch.supervise & (batch.sample_index == k)].numpy()
                          for k in range(len(samples))], samples),
        ]  # fmt: skip
        said: list[tuple[str, list[list[Row]]]] = []
        for which, key in zip(cfg.teachers, keys(session), strict=True):
            try:
                rows, where = _said(session, which, key, samples)
            except UserError as e:
                checks.append(Check(f"teacher {which.name}", "fail", str(e), "See beholder doctor distillation."))
                continue
            said.append((which.name, rows))
            checks.append(_likes(which.name, rows, key.vocab, where))
        shown: list[Shown] = []
        for k, sample in enumerate(samples):
            shown.append(_masked(session, sample))
            shown += [_table(name, rows[k]) for name, rows in said]
        facts = {
            "samples": [
                {
                    "id": s.example.id, "tokens": len(s.encoded.ids), "supervised": s.encoded.supervise.tolist(),
                    "teachers": {name: [asdict(r) for r in rows[k]] for name, rows in said},
                }
                for k, s in enumerate(samples)
            ]
        }  # fmt: skip
        return Examined(subject, tuple(checks), tuple(shown), facts)


def _same_tokens(batch: Sequence[np.ndarray], samples: Sequence[Taken]) -> Check:
    wrong = [s.example.id for own, s in zip(batch, samples, strict=True) if not np.array_equal(own, s.targets)]
    empty = [s.example.id for s in samples if not len(s.targets)]
    told = f"{sum(map(len, batch))} supervised tokens, those of the samples"
    if wrong or empty:
        told = f"{', '.join(map(repr, wrong or empty))}: {'other tokens than the sample' if wrong else 'none'}"
    return judged("mask", not wrong and not empty, told, "Nothing would be learned of it: see beholder preview.")


def _said(
    session: Session, which: TeacherConfig, key: TeacherKey, samples: Sequence[Taken]
) -> tuple[list[list[Row]], str]:
    """What a teacher says of each sample's learned tokens, and where that is from."""
    cfg, teacher = session.cfg.learnt_from, None
    cache = None if cfg.online else TeacherCache(cfg, key)
    rows: list[list[Row]] = []
    kept = 0
    try:
        for s in samples:
            if cache is not None and cache.has(s.example, s.targets):
                columns, kept = cache.taught([s.example], [s.targets]), kept + 1
                form = kl.teacher_of(columns, cfg.kept_temperatures)
            else:
                if teacher is None:
                    teacher = open_teacher(which, session.cfg, session.model.device)
                    if cfg.vocabulary == "equal":
                        check_vocabulary(teacher, session.tokenizer)
                    else:
                        teacher = translate(teacher, session)
                if cache is not None and teacher.translation is not None:
                    columns = say(teacher, [s.example], [s.targets], cfg, key.vocab, cache.sample_key)[0]
                    form = kl.teacher_of({n: c.cpu() for n, c in columns.items()}, cfg.kept_temperatures)
                else:
                    form = kl.Full(_teacher_log_p(teacher, s, key.vocab, None).cpu())
            rows.append(_rows(form, torch.from_numpy(s.targets), session.tokenizer))
    finally:
        if cache is not None:
            cache.close()
    asked = "" if kept == len(samples) else ", the others asked now"
    return rows, f"{kept} of {len(samples)} samples from the cache{asked}" if kept else "asked now"


def _rows(form: kl.Teacher, targets: Tensor, tokenizer: Any) -> list[Row]:
    """At temperature 1; of a sampled teacher the shares of what was drawn."""
    out: list[Row] = []
    for n, target in enumerate(targets.tolist()):
        match form:
            case kl.TopK(ids, log_p, _, _):
                p = dict(zip(ids[n].tolist(), log_p[n].exp().tolist(), strict=True))
            case kl.Sampled(ids, _, _):
                p = {i: c / ids.shape[-1] for i, c in Counter(ids[n].tolist()).items()}
            case kl.Full(log_p):
                best = log_p[n].topk(min(TOP, log_p.shape[-1])).indices.tolist()
                p = {i: float(log_p[n, i].exp()) for i in {*best, target}}
        p = {i: own for i, own in p.items() if own > 0}  # vocabulary: shared has tokens of which nothing is said
        best = sorted(p, key=lambda i: -p[i])[:TOP]
        top = tuple((token_text(tokenizer, i), p[i]) for i in best)
        out.append(Row(token_text(tokenizer, target), p.get(target), top))
    return out


def _likes(name: str, rows: Sequence[Sequence[Row]], vocab: int, where: str) -> Check:
    """A teacher that finds what is learned no likelier than chance is either hopeless or answers something else."""
    found = [r.probability for own in rows for r in own]
    seen = [p for p in found if p]
    told = f"{where}; {len(seen)} of {len(found)} learned tokens are among those shown or kept"
    if not seen:
        likes = False
    else:
        mean = math.exp(sum(math.log(p or 1 / vocab) for p in found) / len(found))
        told += f", probability {mean:.2g} each (geometric mean)"
        likes = mean > 1 / vocab
    why = (
        "It finds the tokens no likelier than chance: they may not stand where it thinks (beholder doctor "
        "distillation), or it cannot do the task (beholder doctor teacher)."
    )
    return Check(f"teacher {name}", "ok" if likes else "warn", told, "" if likes else why)


def _masked(session: Session, sample: Taken) -> Shown:
    names = {"prompt": "masked", "image": "masked", "target": "learned"}
    rows = tuple((names[s.kind], s.text.rstrip("\n")) for s in session.data.encoder.segments(sample.encoded))
    n, total = len(sample.targets), len(sample.encoded.ids)
    return Shown(f"{sample.example.where}: {n} of {total} tokens are learned", ("", ""), rows)


def _table(name: str, rows: Sequence[Row]) -> Shown:
    table = tuple(
        (printable(r.token), "<" if r.probability is None else f"{r.probability:.3f}",
         "  ".join(f"{printable(t)} {p:.3f}" for t, p in r.top))
        for r in rows
    )  # fmt: skip
    return Shown(f"Said by {name}", ("learned", "its p", "the teacher's likeliest"), table)
