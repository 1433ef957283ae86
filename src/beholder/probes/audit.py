"""Leakage audit: which answers a model gives without any image, from the question alone or from earlier turns.

A conversation whose later turns can be answered from its earlier turns' text trains to a low loss without a look at the
image. Here the text is scored with the images and their places taken out, so only the language model speaks; or, for
a trained model, with an empty image in every place, because training may have taught the connector to make the language
model read what it would not read by itself. Whether a trained model looks is told by the ablation (`wrong_images`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, groupby
from statistics import fmean

import numpy as np

from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.collate import Layout, collate
from beholder.data.images import content_hash
from beholder.evidence import Measurement
from beholder.probes import joined, measurement, ratio_of_sums, share
from beholder.probes.loss import LossModel, SampleLoss, sample_losses
from beholder.probes.strata import MIN_SAMPLES, groups_of, parts, questions
from beholder.probes.wrong_images import without_images
from beholder.types import Batch, Encoded, Example, ImageInput, ImageRef, ImageSlot, Turn

LEAK = 0.05
"""Nats per token above which the lower end of ``audit.leak`` is a finding."""
BLIND = 0.5
"""Share of answers given without an image above which (lower end of the interval) a group of questions is a finding."""
CONTROLS = 2
"""Other samples whose turns serve as control for one turn: their mean is steadier than one alone."""
MAX_TRIED = 8
"""Samples tried as control for one turn before it goes with fewer, or without."""


@dataclass(frozen=True, slots=True)
class AuditTurn:
    """One answer, scored without any image. Losses are nats summed over ``tokens``, the end token not counted."""

    id: str
    turn: int
    """Number of the assistant turn in its sample, from 0."""
    question: str
    answer: str
    tokens: int
    alone_nll: float
    """Given its own question only."""
    context_nll: float
    """Given all earlier turns of its sample; equal to ``alone_nll`` for a first turn."""
    control_nll: float | None
    """Given as many turns of another sample, mean over ``controls``; None for a first turn, and when none fitted."""
    answered_alone: bool
    """Every token of the answer was the arg-max."""
    answered_in_context: bool
    controls: tuple[str, ...] = ()
    """Ids of the samples whose earlier turns were borrowed."""


@dataclass(frozen=True)
class Audit:
    turns: list[AuditTurn]
    measurements: list[Measurement]
    findings: list[str]
    """Causes in words, with number and remedy; empty when nothing was found."""
    gaps: list[str]
    """What could not be scored, and why."""


def audit(
    model: LossModel,
    encoder: ChatEncoder,
    layout: Layout,
    examples: Sequence[Example],
    num_turns: int = 128,
    seed: int = 0,
    *,
    batch_size: int = 16,
    content_key: Callable[[ImageRef], str] = content_hash,
    blank: ImageInput | None = None,
    name: str = "audit",
) -> Audit:
    """Score at most ``num_turns`` answers without any image, three ways.

    ``alone``: after their own question. ``context``: after all earlier turns of their own sample. ``control``: after as
    many earlier turns of another sample that shows another image, then their own question (mean over `CONTROLS` such
    samples). Control has what any earlier turns teach about form and vocabulary, so what context knows beyond it was
    told about this very image: ``audit.leak`` = (control - context) nats per token over later turns, absent when fewer
    than `MIN_SAMPLES` samples have one with a control. ``audit.answerable.alone`` is the share of answers whose every
    token is the arg-max, ``….context`` the same share of the later turns, absent when there are none. It finds what
    *this* model can make of the text: a stronger reader may find more.

    ``blank``: an empty image (`wrong_images.blank_image`) for every image place, to audit what a trained model reads;
    call it with a ``name`` of its own then. None: no image, no place for one, no visual token.

    The turns are spread over samples, at random positions. Equal for every process of a job; no image is opened except
    to tell whether two are the same (``content_key``). Raises UserError when no answer fits into ``max_seq_len``.
    """
    shown = [encoder.apply_template(example) for example in examples]
    limit = min(encoder.max_seq_len, layout.pack_len) if layout.packing else encoder.max_seq_len
    plans, left_out = _plan(shown, _text_encoder(encoder), limit, num_turns, seed, content_key, blank is not None)
    if not plans:
        raise EncodeError(
            f"leakage audit: none of {len(examples)} samples has an answer that fits into prompting.max_seq_len "
            f"{encoder.max_seq_len}"
        )
    # Scored together and shortest first: batches of alike lengths waste little padding.
    jobs = sorted(
        ((k, view, ids) for k, plan in enumerate(plans) for view, ids in plan.views.items()),
        key=lambda j: len(j[2].ids),
    )
    batches = _batches([(f"{k}/{view}", encoded) for k, view, encoded in jobs], layout, batch_size, blank)
    scored = {(k, view): loss for (k, view, _), loss in zip(jobs, sample_losses(model, batches), strict=True)}
    turns = [_told(shown, plan, {v: scored[k, v] for v in plan.views}) for k, plan in enumerate(plans)]
    groups = groups_of(shown, [""] * len(shown))
    strata = {by: [groups[by][plan.sample][plan.turn] for plan in plans] for by in ("question", "answer")}
    measured = _measure(turns, [plan.sample for plan in plans], strata, seed, name)
    gaps = [] if not left_out else [
        f"Leakage audit: {left_out} answers were left out, because with their conversation they do not fit into "
        f"prompting.max_seq_len {encoder.max_seq_len}."
    ]  # fmt: skip
    later = sum(t.turn > 0 for t in turns)
    lost = sum(t.turn > 0 and t.control_nll is None for t in turns)
    if lost:
        gaps.append(
            f"Leakage audit: {lost} of {later} later turns have no control: no other sample with another image and as "
            "many earlier turns was found."
        )
    paired = len({plan.sample for plan in plans if plan.donors})
    if later and paired < MIN_SAMPLES:
        gaps.append(
            f"Leakage audit: how much is read from earlier turns was not measured: {paired or 'none'} of the samples "
            f"that were scored have a later turn with a control, expected {MIN_SAMPLES} or more; raise "
            "eval.audit_turns or hold out more conversations."
        )
    reader = "the language model" if blank is None else "the model with an empty image"
    return Audit(turns, measured, _findings(measured, name, reader), gaps)


def text_losses(
    model: LossModel, encoder: ChatEncoder, layout: Layout, examples: Sequence[Example], batch_size: int = 16
) -> list[SampleLoss]:
    """Loss of the same targets by the language model alone, no image and no visual token, aligned with ``examples``.

    Fewer tokens may be cut off than with the image, which takes room; `loss.paired_gain` knows.
    """
    return sample_losses(model, _batches(texts(encoder, examples), layout, batch_size))


def texts(encoder: ChatEncoder, examples: Sequence[Example]) -> list[tuple[str, Encoded]]:
    """(id, encoded) of each sample without its images and their places."""
    plain = _text_encoder(encoder)
    return [(e.id, plain.encode(without_images(encoder.apply_template(e)))) for e in examples]


# ---------------------------------------------------------------------------------------------------------------
# What is scored


@dataclass(frozen=True)
class _Plan:
    sample: int
    turn: int
    views: dict[str, Encoded]
    """``alone``; for later turns ``context`` and ``control0``, …"""
    donors: list[int]


def _text_encoder(encoder: ChatEncoder) -> ChatEncoder:
    """The same encoder for conversations: under the caption template a sample without images is an error in data.

    A chat stays one: its model reads nothing else, and its samples may be without images.
    """
    if encoder.template == "chat":
        return encoder
    plain = copy.copy(encoder)
    plain.template = "conversation"
    return plain


def _plan(
    shown: Sequence[Example],
    encoder: ChatEncoder,
    limit: int,
    num_turns: int,
    seed: int,
    content_key: Callable[[ImageRef], str],
    with_places: bool,
) -> tuple[list[_Plan], int]:
    """The turns to score with their texts, and how many were left out because they do not fit."""
    rng = np.random.default_rng(seed)
    plain = list(shown) if with_places else [without_images(example) for example in shown]
    answers = [example.num_answers for example in plain]
    keys: dict[int, frozenset[str]] = {}

    def images(i: int) -> frozenset[str]:
        if i not in keys:
            keys[i] = frozenset(content_key(ref) for ref in shown[i].images)
        return keys[i]

    # One turn of every sample before a second of any, each sample's turns in an order of their own.
    orders = {i: rng.permutation(answers[i]) for i in rng.permutation(len(plain)).tolist()}
    queue = [
        (i, int(order[r])) for r in range(max(answers, default=0)) for i, order in orders.items() if r < len(order)
    ]
    plans: list[_Plan] = []
    left_out = 0
    for i, turn in queue:
        if len(plans) == num_turns:
            break
        own = _rounds(plain[i])
        alone = _encode(encoder, plain[i], own[turn], limit)
        context = _encode(encoder, plain[i], [t for r in own[: turn + 1] for t in r], limit)
        if alone is None or context is None:
            left_out += 1
            continue
        views: dict[str, Encoded] = {"alone": alone}
        donors: list[int] = []
        if turn > 0:
            views["context"] = context
            others = [j for j in range(len(plain)) if j != i and answers[j] >= turn]
            tried = 0
            for j in (others[k] for k in rng.permutation(len(others)).tolist()):
                if tried == MAX_TRIED or len(donors) == CONTROLS:
                    break
                if not images(j).isdisjoint(images(i)):
                    continue
                tried += 1
                borrowed = [t for r in _rounds(plain[j])[:turn] for t in r]
                control = _encode(encoder, plain[i], [*borrowed, *own[turn]], limit)
                if control is not None:
                    views[f"control{len(donors)}"] = control
                    donors.append(j)
        plans.append(_Plan(i, turn, views, donors))
    return plans, left_out


def _rounds(example: Example) -> list[list[Turn]]:
    """The turns up to and with each assistant turn, since the one before; a system turn belongs to the first round."""
    out: list[list[Turn]] = []
    open_: list[Turn] = []
    for turn in example.turns:
        open_.append(turn)
        if turn.role == "assistant":
            out.append(open_)
            open_ = []
    return out


def _encode(encoder: ChatEncoder, example: Example, turns: Sequence[Turn], limit: int) -> Encoded | None:
    """The turns with nothing but the last answer supervised, its end token not; None when they do not fit.

    Image places are numbered anew, for they may come from two samples; turns without one get the example's, if it has
    an image, before their first question.
    """
    if not any(t.role == "user" for t in turns):
        turns = (Turn("user", ()), *turns)  # the encoder would put its instruction there
    slots = sum(isinstance(p, ImageSlot) for t in turns for p in t.parts)
    if example.images and not slots:
        k = next(k for k, t in enumerate(turns) if t.role == "user")
        turns = [*turns[:k], replace(turns[k], parts=(ImageSlot(0), "\n", *turns[k].parts)), *turns[k + 1 :]]
        slots = 1
    number = count()
    told = tuple(
        replace(t, parts=tuple(ImageSlot(next(number)) if isinstance(p, ImageSlot) else p for p in t.parts))
        for t in turns
    )
    try:
        encoded = encoder.encode(replace(example, images=example.images[:1] * slots, turns=told))
    except EncodeError:
        return None
    if encoded.truncated or len(encoded.ids) > limit:
        return None
    start = stop = int(np.flatnonzero(encoded.supervise)[-1])  # a chat template may write something after the end token
    while start > 0 and encoded.supervise[start - 1]:
        start -= 1
    supervise = np.zeros_like(encoded.supervise)
    supervise[start:stop] = True
    return replace(encoded, supervise=supervise)


def _batches(
    samples: Sequence[tuple[str, Encoded]], layout: Layout, batch_size: int, blank: ImageInput | None = None
) -> Iterator[Batch]:
    for k in range(0, len(samples), batch_size):
        chunk = samples[k : k + batch_size]
        yield collate([(id, e, [blank] * len(e.image_spans) if blank else []) for id, e in chunk], layout)


# ---------------------------------------------------------------------------------------------------------------
# What it says


def _told(shown: Sequence[Example], plan: _Plan, scored: Mapping[str, SampleLoss]) -> AuditTurn:
    example = shown[plan.sample]
    alone, context = scored["alone"], scored.get("context", scored["alone"])
    controls = [scored[f"control{k}"] for k in range(len(plan.donors))]
    assert {x.tokens for x in (context, *controls)} == {alone.tokens}, (example.id, plan.turn)
    return AuditTurn(
        id=example.id,
        turn=plan.turn,
        question=questions(example)[plan.turn].strip(),
        answer=[t.text for t in example.turns if t.role == "assistant"][plan.turn],
        tokens=alone.tokens,
        alone_nll=alone.nll,
        context_nll=context.nll,
        control_nll=fmean(x.nll for x in controls) if controls else None,
        answered_alone=alone.exact,
        answered_in_context=context.exact,
        controls=tuple(shown[j].id for j in plan.donors),
    )


def _measure(
    turns: Sequence[AuditTurn], samples: Sequence[int], strata: Mapping[str, Sequence[str | None]], seed: int, name: str
) -> list[Measurement]:
    """Overall, and for the questions that begin alike and the answer types that 20 of the samples have.

    What a group's value is over counts: ``context`` and ``leak`` need 20 samples with later turns (and a control).
    Overall, only ``leak`` does.
    """
    out: list[Measurement] = []
    everyone = list(range(len(turns)))
    groups: list[tuple[str | None, str | None, list[int]]] = [(None, None, everyone)]
    for by, labels in strata.items():
        groups += [(by, name, own.tolist()) for by, name, own in parts(labels, by)]

    def few(these: Sequence[int]) -> bool:
        return len({samples[k] for k in these}) < MIN_SAMPLES

    for by, stratum, own in groups:
        for view in ("alone", "context"):
            asked = own if view == "alone" else [k for k in own if turns[k].turn > 0]
            if not asked or (stratum is not None and few(asked)):
                continue
            hits = sum(turns[k].answered_alone if view == "alone" else turns[k].answered_in_context for k in asked)
            several = len({samples[k] for k in asked}) < len(asked)
            caveat = joined(
                "every token the arg-max, the end token not counted; the image was not shown",
                "later turns only" if view == "context" else None,
                "several turns of one sample count as independent" if several else None,
            )
            told = f"{name}.answerable.{view}"
            out.append(share(told, hits, len(asked), by=by, stratum=stratum, caveat=caveat))
        paired = [k for k in own if turns[k].control_nll is not None]
        if few(paired):
            continue
        gain: list[float] = []
        tokens: list[int] = []
        for _, group in groupby(sorted(paired, key=lambda k: samples[k]), key=lambda k: samples[k]):
            one = [turns[k] for k in group]
            gain.append(sum((t.control_nll or 0.0) - t.context_nll for t in one))
            tokens.append(sum(t.tokens for t in one))
        leak = ratio_of_sums(np.array(gain), np.array(tokens, dtype=np.float64), seed)
        told = f"later turns of {len(gain)} samples; paired: another sample's earlier turns minus its own"
        out.append(measurement(f"{name}.leak", *leak, n=len(paired), by=by, stratum=stratum, caveat=told))
    return out


def _findings(measured: Sequence[Measurement], name: str, reader: str) -> list[str]:
    out: list[str] = []
    leaks = [m for m in measured if m.name == f"{name}.leak" and m.ci95 is not None and m.ci95[0] > LEAK]
    overall = next((m for m in leaks if m.stratum is None), None)
    if leaks:
        first = overall or max(leaks, key=lambda m: m.value)
        assert first.ci95 is not None
        where = "" if first.stratum is None else f" (group {first.stratum!r})"
        worse = [
            f"{m.stratum!r} {m.value:.2f}"
            for m in sorted(leaks, key=lambda m: -m.value)
            if m.stratum and m is not first
        ]
        low, high = first.ci95
        out.append(
            f"Leakage: later turns{where} can be answered from earlier turns' text ({first.value:.2f} nats/token "
            f"easier for {reader} than after another sample's turns, {low:.2f} to {high:.2f}, n={first.n}"
            f"{'; ' + ', '.join(worse[:4]) if worse else ''}). A low loss on them is not sight: train and evaluate on "
            "one question a sample, or limit and shuffle the turns."
        )
    blind = [m for m in measured if m.name == f"{name}.answerable.alone" and m.ci95 is not None and m.ci95[0] > BLIND]
    if blind:
        told = ", ".join(
            f"{'all questions' if m.stratum is None else repr(m.stratum)} {m.value:.0%} (n={m.n})"
            for m in sorted(blind, key=lambda m: (m.stratum is not None, -m.value))[:6]
        )
        out.append(
            f"Answerable without the image: from the question alone {reader} gives {told} of the answers "
            "word for word. Accuracy on them says nothing about sight: balance the answers, or judge by the "
            "difference to the shuffled image."
        )
    return out
