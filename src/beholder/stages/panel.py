"""Every measurement of a stage, a row each: what it is called, when it comes due, and the function that makes it.

Read by `watch` between steps and by `measure` at the end alike. A new probe is its file in `probes`, a row here, and
its names in `evidence.catalogue`; which stages make it at their end, their records say (`config.stages`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from beholder.config import GREEDY, MONITORED, MONITORS, STRENGTH_LINE, RunConfig
from beholder.data.chat import ChatEncoder, EncodeError
from beholder.evidence import Measurement, WordReliance
from beholder.probes import (
    answers,
    audit,
    blindness,
    captions,
    cells,
    clipscore,
    collapse,
    golden,
    hallucination,
    instruction,
    loss,
    pairs,
    qa,
    reliance,
    retention,
    slots,
    text_learner,
    textonly,
    wrong_images,
)
from beholder.probes.loss import SampleLoss
from beholder.probes.written import Written
from beholder.stages import monitors, teachers
from beholder.stages.measured import LEARNS_WHOLE, NOTHING_TO_KEEP, Measured
from beholder.stages.session import Session
from beholder.types import Condition, Example, UserError

ANSWER = GREEDY.model_copy(update={"max_new_tokens": 24})
"""An answer to a short question is a sentence at most."""
QUESTION_CONDITIONS: tuple[Condition, ...] = ("correct", "shuffled", "zero")
"""Under which the questions made from captions are asked."""
NUM_CELLS = 128
"""Held-out samples whose image and question are exchanged."""
NUM_BLIND = 128
"""Held-out questions that are asked once more with the image said to be missing, and of the base alone."""
NUM_MERGED = 128
"""Held-out samples that are asked with the adapters merged as well."""
TELL_COLLAPSE = 0.2
"""Share of outputs from which a symptom of collapse is told in words; the gate's own bound is in the config."""


@dataclass(frozen=True)
class Row:
    """One measurement, or several that are made in one go."""

    name: str
    make: Callable[[Session, Measured], None]
    every: Callable[[RunConfig], Sequence[str | int]] = lambda cfg: ()
    """When it comes due between steps, besides the end: ``epoch``, ``save`` or every so many steps; others: not."""
    needs: Callable[[Session], bool] = lambda session: True
    """Whether there is anything for it to measure."""
    without: tuple[str, str] | None = None
    """When there is not: how the names begin that gates are then not judged on, and why."""
    monitor: str = ""
    """What a monitor is called; it is made at every evaluation."""
    candidate: bool = False
    """Where it comes due, the whole held-out set is measured, and the step is a candidate for the best."""


# ---------------------------------------------------------------------------------------------------------------
# Losses


def losses(session: Session, m: Measured) -> None:
    """The held-out loss, overall and by stratum, and how many targets were cut."""
    m.measurements += session.held_out.summary(m.losses)


def truncated(session: Session, m: Measured) -> None:
    """Share of the held-out samples whose target was cut to the maximum length."""
    examples = session.held_out.examples
    cut = sum(session.data.encoder.encode(e).truncated for e in examples)
    m.measurements.append(
        Measurement(
            name="eval.truncated_pct", value=100 * cut / len(examples), unit="%", better="lower", n=len(examples)
        )
    )


def learned(session: Session, m: Measured) -> None:
    """What training changed, paired by sample, and the bands a loss is read against."""
    assert m.before is not None, "measured at the end"
    seed = session.held_out.seed
    same = [e.id for e in session.held_out.examples]
    if session.model.language_learns:
        m.inapplicable["learn.delta_text"] = f"{LEARNS_WHOLE}, and what it could say without an image was before that"
    for name, band, earlier in (
        ("learn.delta", "band.untrained", m.before.untrained),
        ("learn.delta_text", "band.text_only", m.before.text_only),
    ):
        if earlier is None or m.why_not(name) is not None:
            continue
        if [x.id for x in earlier] != same:
            m.gaps.append(f"{name}: the held-out samples are not those of the start, so nothing can be paired.")
            continue
        m.measurements.append(loss.paired_gain(earlier, m.losses, name, seed))
        first = loss.summarize(earlier, "band", seed=seed)[0]
        m.measurements.append(first.model_copy(update={"name": band, "better": "none"}))
    size = session.model.language.vocab
    m.measurements.append(
        Measurement(
            name="band.uniform", value=math.log(size), unit="nats/token", better="none", n=len(m.losses),
            caveat=f"guessing evenly over the {size:,} tokens of the vocabulary",
        )
    )  # fmt: skip
    rows = sorted(
        {r["step"]: r["loss"] for r in session.run.metrics() if isinstance(r.get("loss"), int | float)}.items()
    )
    whole = bool(rows) and rows[0][0] == 1  # the log of a run that went on from elsewhere lacks the fall
    if whole and (share := late_share([y for _, y in rows])) is not None:
        m.measurements.append(
            Measurement(
                name="curve.late_share", value=share, unit="share", better="lower", n=len(rows),
                caveat="share of the training loss's whole fall that came in the last quarter of the steps",
            )
        )  # fmt: skip


def late_share(losses: Sequence[float]) -> float | None:
    """Share of the loss's fall that came in the last quarter of the steps; 1 when it did not fall at all.

    Each end is a mean over a tenth of the steps, so that single batches do not decide; the start is the mean over the
    first fiftieth, where most of the fall happens. None for fewer than 20 steps.
    """
    n = len(losses)
    if n < 20:
        return None
    tenth, first = n // 10, max(1, n // 50)

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    start, end = mean(losses[:first]), mean(losses[-tenth:])
    quarter = n - n // 4
    return 1.0 if start <= end else min(1.0, max(0.0, mean(losses[quarter - tenth : quarter]) - end) / (start - end))


# ---------------------------------------------------------------------------------------------------------------
# Does it look


def ablation(session: Session, m: Measured) -> None:
    """The loss with the right and the wrong images (S11-4), overall and by stratum."""
    held, conditions = session.held_out, session.cfg.ablation.conditions
    indices = held.ablation_sample
    with session.phase("ablation"):
        m.ablated = session.together.ablation_losses(
            indices, ("correct", *conditions), {"correct": [m.losses[i] for i in indices]}
        )
    m.measurements += loss.compare_conditions(m.ablated, held.groups(indices), seed=held.seed)


def words(session: Session, m: Measured) -> None:
    """What each word loses without the image: of the ablated samples, and of the others in the report."""
    held, shown = session.held_out, session.held_out.shown_sample
    found = by_word(session, held.ablation_sample, m.ablated)
    if found:
        m.word_stats = reliance.word_stats(list(found.values()), seed=held.seed)
    missing = [i for i in shown if i not in found]
    if missing:
        with session.phase("ablation"):
            rest = session.together.ablation_losses(
                missing, ("correct", "zero"), {"correct": [m.losses[i] for i in missing]}
            )
        found |= by_word(session, missing, rest)
    m.words = {i: found[i] for i in shown}


def by_word(
    session: Session, indices: Sequence[int], losses: Mapping[Condition, Sequence[SampleLoss]]
) -> dict[int, list[WordReliance]]:
    """What each word of these held-out samples loses with the zero image; nothing where that was not measured."""
    if "zero" not in losses:
        return {}
    return {
        i: reliance.words(session.data.encoder, session.held_out.examples[i], right, wrong)
        for i, right, wrong in zip(indices, losses["correct"], losses["zero"], strict=True)
    }


def every_slot(session: Session, m: Measured) -> None:
    """Whether every image of a sample with several counts, wherever it stands (S3-3)."""
    cfg, held = session.cfg, session.held_out
    if not held.several:
        m.gaps.append("Places of images: not measured, no held-out sample shows several images.")
        return
    with session.phase("slots"):
        costs = one_replaced(session, m) if cfg.eval.slot_samples else {}
        if not cfg.eval.slot_samples:
            m.gaps.append("Every place by itself: not measured (eval.slot_samples is 0).")
        if cfg.eval.moved_samples:
            move(session, m, costs)
        else:
            m.gaps.append("Images moved and swapped: not measured (eval.moved_samples is 0).")


def one_replaced(session: Session, m: Measured) -> dict[int, list[float]]:
    """The table of places. Gives what another's image costs in each place, nats per token, by held-out sample."""
    held, model, encoder = session.held_out, session.model, session.data.encoder
    indices, seed = held.slot_sample, held.seed
    kinds: list[slots.Replacement] = [*session.cfg.ablation.conditions, "neighbour", "text"]
    zero, noise = (wrong_images.blank_images(model, kind, seed) for kind in ("zero", "noise"))
    filler = encoder.literal(slots.FILLER, inside=True)
    found = slots.replaced(
        session.together.losses, held.at(indices), kinds,
        {
            "zero": lambda k: slots.image_in_slot(k, zero),
            "noise": lambda k: slots.image_in_slot(k, noise),
            "text": lambda k: slots.text_in_slot(k, filler),
        },
        content_key=held.content_key, seed=seed,
    )  # fmt: skip
    own = [m.losses[i] for i in indices]
    measured = slots.compare_slots(held.at(indices), own, found, content_key=held.content_key, seed=seed)
    m.measurements += measured
    if few := slots.too_few(measured):
        m.gaps.append(f"Places with too few samples to judge: {', '.join(few)}.")
    return {
        i: [(x.nll - right.nll) / right.tokens for x in wrong]
        for i, right, wrong in zip(indices, own, found.get("shuffled", ()), strict=False)  # it may not be asked for
    }


def move(session: Session, m: Measured, costs: Mapping[int, Sequence[float]]) -> None:
    """The deciding image through every place, and two images swapped with the words renamed or kept."""
    held, cfg = session.held_out, session.cfg

    def write(examples: Sequence[Example], label: str) -> list[str]:
        found = session.together.written(examples, cfg.eval.greedy, "correct", cfg.eval.batch_size, label)
        return [r.prediction for r in found]

    found = slots.move(
        {i: held.examples[i] for i in held.several}, m.losses, costs, session.together.losses, write,
        size=cfg.eval.moved_samples, choose=held.by_images, fits=partial(fits_whole, session.data.encoder),
        content_key=held.content_key, seed=held.seed,
    )  # fmt: skip
    m.measurements += found.measurements
    m.gaps += found.gaps
    m.inapplicable |= found.inapplicable


def fits_whole(encoder: ChatEncoder, example: Example) -> bool:
    """Whether nothing of a sample is cut off or rejected for its length, now that it says something else."""
    try:
        return not encoder.encode(example).truncated
    except EncodeError:
        return False


# ---------------------------------------------------------------------------------------------------------------
# What does it say


def golden_set(session: Session, m: Measured) -> None:
    """The fixed set, written and stored as ``qual/step_{n}_golden{m}.jsonl``, unless it is there."""
    write_golden(session, m.step, again=m.again)


def has_golden(session: Session, step: int) -> bool:
    """Whether the fixed set has been written at this step; the same answer on every process."""
    items = session.held_out.golden_items
    path = golden.captions_path(session.run.qual, step, len(items))
    return bool(items) and session.dist.on_main(path.exists)


def write_golden(session: Session, step: int, *, again: bool = False) -> None:
    items, e = session.held_out.golden_items, session.cfg.eval
    if not items or (has_golden(session, step) and not again):
        return
    with session.phase("captions"):
        records = session.together.written(
            session.held_out.at([i for i, _ in items]), e.golden_generate, "correct", e.golden_batch_size, "captions"
        )
    if session.dist.is_main:
        rows = golden.join([item for _, item in items], records)
        golden.save(golden.captions_path(session.run.qual, step, len(items)), rows)


def written(session: Session, m: Measured) -> None:
    """The last answers of held-out samples, captions or answers to questions, and every score of them."""
    cfg, data = session.cfg, session.data
    chosen = session.held_out.written_sample
    if not chosen:
        why = "no held-out sample can be captioned" if cfg.eval.caption_samples else "eval.caption_samples is 0"
        m.gaps.append(f"Captions and answers: none were written ({why}).")
        return
    examples = session.held_out.at(chosen)
    seed = cfg.measure_seed
    by: dict[Condition, list[Written]]
    stage = cfg.stage_record
    greedy = cfg.eval.greedy
    label = f"{stage.writes}s"
    with session.phase(label):
        by = {c: session.together.written(examples, greedy, c, cfg.eval.batch_size, label) for c in stage.conditions}
    m.written = {i: [by[c][k] for c in stage.conditions] for k, i in enumerate(chosen)}
    records = [r for c in stage.conditions for r in by[c]]
    if stage.writes == "answer":
        judge_answers(session, chosen, by, m)
    groups = {
        k: [turns[0] if len(turns) == 1 else None for turns in v] for k, v in session.held_out.groups(chosen).items()
    }
    m.measurements += captions.score(records, seed=seed, groups=groups)
    m.histograms.append(captions.length_histogram(records))

    found = hallucination.score_chair(by, session.held_out.objects, seed)
    m.measurements += found.measurements
    m.gaps += found.gaps
    swapped = wrong_images.shuffle_images(examples, session.held_out.content_key, seed)
    symptoms = collapse.symptoms(
        [r.prediction for r in by["correct"]],
        [r.reference for r in by["correct"]],
        [r.prediction for r in by["shuffled"]],
        seed=seed,
        other_references=collapse.references_shown(examples, swapped),
        ids=[r.id for r in by["correct"]],
    )
    m.measurements += collapse.measurements(symptoms)
    m.findings += collapse.findings(symptoms, limit=TELL_COLLAPSE)
    if all(s.name != "image_independent" for s in symptoms):
        m.gaps.append(
            "Whether captions are the same for every image: not measured, too few samples whose image another sample "
            "shows with the same question and another answer."
        )
    if cfg.eval.clip_model is None:
        m.gaps.append("CLIPScore: not measured; give eval.clip_model a CLIP folder.")
    else:
        single = [k for k, e in enumerate(examples) if len(e.images) == 1]
        if len(single) < len(examples):
            m.gaps.append(f"CLIPScore: {len(examples) - len(single)} captions of several images are left out.")
        if not single:
            return
        with session.phase("captions"):
            m.measurements += clipscore.clip_score(
                cfg.eval.clip_model,
                (data.pipeline.open(examples[k].images[0]) for k in single),
                [by["correct"][k].prediction for k in single],
                [by["correct"][k].reference for k in single],
                device=session.dist.device,
                seed=seed,
            )


def judge_answers(
    session: Session, chosen: Sequence[int], by: Mapping[Condition, Sequence[Written]], m: Measured
) -> None:
    """Answers that are right or wrong as a whole, scored by kind of question; longer ones are judged by their loss.

    Where no question has a short answer the gates on answers do not apply, and the report says so.
    """
    examples = session.held_out.at(chosen)
    short = [k for k, e in enumerate(examples) if answers.is_short(e)]
    if len(short) < len(examples):
        m.gaps.append(
            f"Accuracy: {len(examples) - len(short)} of {len(examples)} answers are longer than "
            f"{answers.SHORT_WORDS} words, which are not right or wrong as a whole; they are judged by their loss."
        )
    if not short:
        m.inapplicable["answer."] = "no held-out answer is short"
        return
    # the answer that was written is the last turn's
    groups = session.held_out.groups([chosen[k] for k in short])
    last = {name: [turns[-1] if turns else None for turns in own] for name, own in groups.items()}
    m.measurements += answers.score(
        [examples[k] for k in short], {c: [r[k] for k in short] for c, r in by.items()}, last,
        seed=session.held_out.seed,
    )  # fmt: skip


def followed(session: Session, m: Measured) -> None:
    """How well the written answers, long ones too, follow their instructions (D-6)."""
    if not m.written:
        return  # `written` says why
    held, chosen = session.held_out, list(m.written)
    by: dict[Condition, list[Written]]
    by = {c: [m.written[i][k] for i in chosen] for k, c in enumerate(session.cfg.stage_record.conditions)}
    groups = {
        name: [turns[-1] if turns else None for turns in own]
        for name, own in held.groups(chosen).items()
        if name in answers.GROUPINGS
    }
    m.measurements += instruction.score(held.at(chosen), by, groups, seed=held.seed)


def kept(session: Session, m: Measured) -> None:
    """Whether questions about one image are still answered as by the run that this one started from."""
    assert m.before is not None, "measured at the end"
    name, what, before = "answer.kept", "Answers kept from the run it started from", m.before
    now = [m.losses[i] for i in session.held_out.single]
    if before.start is None:
        if before.no_start in NOTHING_TO_KEEP:
            m.inapplicable[name] = before.no_start
        else:  # a setting waives no gate
            m.gaps.append(f"{what}: not measured, {before.no_start}.")
    elif not now:
        m.leave_out(name, what, "no held-out sample asks one question about one image and has a short answer")
    elif [x.id for x in before.start] != [x.id for x in now]:
        m.gaps.append(f"{what}: not measured, the held-out samples are not those of the start.")
    else:
        m.measurements.append(answers.kept(before.start, now, session.held_out.seed))


def questions(session: Session, m: Measured) -> None:
    """The question-answer sanity set, made from the held-out captions themselves."""
    size, seed = session.cfg.eval.qa_samples, session.held_out.seed
    if not size:
        m.gaps.append("Questions: none were asked (eval.qa_samples is 0).")
        return
    items = qa.build_qa(session.held_out.examples, session.held_out.objects, size, seed)
    if not items:
        m.gaps.append(
            "Questions: none could be made: no held-out sample with one image and one answer names an object of "
            "eval.object_list (default COCO's), or all of them name the same one."
        )
        return
    asked = [qa.qa_prompt(session.held_out.examples[item.index], item) for item in items]
    conditions: tuple[Condition, ...] = QUESTION_CONDITIONS
    if len({session.held_out.content_key(e.images[0]) for e in asked}) < 2:
        m.gaps.append("Questions under another image: not asked, all of them are about one picture.")
        conditions = ("correct", "zero")
    given: dict[Condition, list[str]]
    with session.phase("captions"):
        given = {
            c: [
                r.prediction
                for r in session.together.written(asked, ANSWER, c, session.cfg.eval.batch_size, "questions")
            ]
            for c in conditions
        }
    m.measurements += qa.score_qa(items, given)


# ---------------------------------------------------------------------------------------------------------------
# Does the answer follow image and question: contrast pairs, four cells, two kinds of blindness


def contrast_pairs(session: Session, m: Measured) -> None:
    """Pairs of the written answers with one question and two right answers: both right (E-3)."""
    chosen = short_answers(session, m, "pairs.", "Contrast pairs")
    if not chosen:
        return
    held = session.held_out
    examples = held.at(chosen)
    found = pairs.find(examples, held.content_key, held.seed)
    if (why := pairs.why_not(found)) is not None:
        all_short = held.at([i for i in held.describable if answers.is_short(held.examples[i])])
        if pairs.why_not(pairs.find(all_short, held.content_key, held.seed)) is None:  # a setting waives no gate
            m.gaps.append(f"Contrast pairs: not measured, {why}; raise eval.caption_samples.")
        else:
            m.leave_out("pairs.", "Contrast pairs", why)
        return
    kinds = [turns[-1] if turns else None for turns in held.groups(chosen)["question"]]
    by: dict[Condition, list[Written]]
    by = {c: [m.written[i][k] for i in chosen] for k, c in enumerate(session.cfg.stage_record.conditions)}
    m.measurements += pairs.score(examples, found, by, kinds, content_key=held.content_key, seed=held.seed)


def four_cells(session: Session, m: Measured) -> None:
    """Own and another's image, own and another's question: is the question read as well (E-1)."""
    held = session.held_out
    if session.cfg.template == "caption":
        why = (
            "captions are all asked for in the same words, so there is no other question; the two cells that there "
            "are, own and another's image, are the losses with the right and the wrong image"
        )
        m.leave_out("cells.", "Four cells", why)
        return
    chosen = [held.sighted[k] for k in cells.swappable(held.at(held.sighted))]
    chosen = held.among(chosen, NUM_CELLS)
    chosen = [chosen[k] for k in cells.swappable(held.at(chosen))]
    if len(chosen) < 2:
        m.leave_out("cells.", "Four cells", "no two held-out samples of as many images ask different questions")
        return
    examples = held.at(chosen)
    own, *others = cells.CELLS
    try:
        shown = cells.four(examples, held.content_key, held.seed)
    except UserError as e:
        m.leave_out("cells.", "Four cells", str(e))
        return
    whole = [k for k in range(len(chosen)) if all(fits_whole(session.data.encoder, shown[c][k]) for c in cells.CELLS)]
    if len(whole) < len(chosen):
        m.gaps.append(
            f"Four cells: {len(chosen) - len(whole)} of {len(chosen)} samples are left out; with another's question "
            f"they are longer than prompting.max_seq_len {session.cfg.prompting.max_seq_len}."
        )
    with session.phase("cells"):
        losses = {own: [m.losses[chosen[k]] for k in whole]}
        losses |= {c: session.together.losses([shown[c][k] for k in whole]) for c in others}
    num_answers = [examples[k].num_answers for k in whole]
    if measured := cells.score(losses, num_answers, held.seed):
        m.measurements += measured
    else:
        m.leave_out("cells.", "Four cells", "the last answer of every sample was cut off")


def blind_two_ways(session: Session, m: Measured) -> None:
    """The image left out silently and said to be missing, and the base alone (E-2)."""
    what = "Two kinds of blindness"
    if session.cfg.template == "caption":
        why = (
            "a caption is asked for by its image, and without one there is no prompt; blind is here what it writes for "
            "an empty image"
        )
        m.leave_out("blind.", what, why)
        return
    chosen = session.held_out.among(short_answers(session, m, "blind.", what), NUM_BLIND)
    if not chosen:
        return
    conditions = session.cfg.stage_record.conditions
    examples, size = session.held_out.at(chosen), session.cfg.eval.batch_size
    told = [blindness.told_missing(e) for e in examples]
    write = partial(session.together.written, settings=ANSWER, condition="none", batch_size=size)
    base = None
    with session.phase("blindness"):
        if "none" in conditions:
            silent = [m.written[i][conditions.index("none")] for i in chosen]
        else:
            silent = write(examples, label="blind answers")
        guessed = write(told, label="guesses")
        if session.model.adapters:
            with session.model.adapters_off():
                base = write(examples, label="the base's answers")
        else:
            why = f"{_NONE}, so without an image it is the base that answers"
            if session.model.language_learns:
                why = f"{LEARNS_WHOLE}, so there is no base beside it"
            m.leave_out("blind.base", "What the base answers blind", why)
            m.inapplicable["blind.leak"] = why
    seen = [m.written[i][conditions.index("correct")] for i in chosen]
    m.measurements += blindness.score(examples, seen, silent, guessed, base, session.held_out.seed)


def learnable(session: Session, m: Measured) -> None:
    """What a learner of the words alone makes of the training questions (E-4). `beholder audit` names the words."""
    if session.cfg.template == "caption":
        why = "captions are all asked for in the same words, from which nothing can be learned"
        m.leave_out("learner.", "Learner of words", why)
        return

    def learned() -> tuple[list[dict[str, Any]], list[str], list[str], str]:
        examples = session.data.train.first(text_learner.MAX_QUESTIONS)
        try:
            found = text_learner.learn(examples, seed=session.held_out.seed, content_key=session.held_out.content_key)
        except UserError as e:
            return [], [], [], str(e)
        return [x.model_dump(mode="json") for x in found.measurements], found.findings, found.gaps, ""

    with session.phase("learnable"):
        found, findings, gaps, why = session.dist.on_main(learned)
    m.findings += findings
    m.gaps += gaps
    if why:
        m.leave_out("learner.", "Learner of words", why)
        return
    right = next((x for x in m.measurements if x.key == "answer.accuracy.correct"), None)
    m.measurements += (learner := [Measurement.model_validate(x) for x in found])
    if right is not None:
        m.measurements.append(text_learner.gain_over(right, next(x for x in learner if x.key == "learner.accuracy")))
    elif (why := m.why_not("answer.accuracy.correct")) is not None:
        m.inapplicable["learner.gain"] = why


def short_answers(session: Session, m: Measured, about: str, what: str) -> list[int]:
    """Held-out samples whose answers were written and are right or wrong as a whole; none: measurements whose names
    begin with ``about`` do not apply."""
    chosen = [i for i in m.written if answers.is_short(session.held_out.examples[i])]
    if m.written and not chosen:
        kind = session.cfg.stage_record.writes
        m.leave_out(about, what, f"no held-out {kind} is short, so none is right or wrong as a whole")
    return chosen


# ---------------------------------------------------------------------------------------------------------------
# Could one do without looking, and is it still the language model it was


def guessable(session: Session, m: Measured) -> None:
    """Whether the answers can be had from the text alone, or from earlier turns."""
    turns, data = session.cfg.eval.audit_turns, session.data
    if all(e.num_answers <= 1 for e in data.eval_examples):
        n = len(data.eval_examples)
        m.measurements.append(
            Measurement(
                name="audit.trained.leak", value=0.0, unit="nats/token", better="lower", n=n, ci95=(0.0, 0.0),
                caveat="no held-out sample has a second answer, so there are no earlier turns to read",
            )
        )  # fmt: skip
    if not turns:
        m.gaps.append("Leakage audit: not made (eval.audit_turns is 0).")
        return
    # The language model alone says what is in the text; the trained model with an empty image says what it makes of it:
    # a small model may only come to read earlier turns because the connector prompts it to.
    blank = wrong_images.blank_image(session.model, "zero", session.held_out.seed)
    with session.phase("audit"):
        for name, image in (("audit", None), ("audit.trained", blank)):
            found = audit.audit(
                session.model, data.encoder, data.layout, data.eval_examples, turns, session.held_out.seed,
                batch_size=session.cfg.eval.batch_size, content_key=session.held_out.content_key,
                blank=image, name=name,
            )  # fmt: skip
            m.measurements += found.measurements
            m.findings += found.findings
            m.gaps += [] if image is not None else found.gaps


def retained(session: Session, m: Measured) -> None:
    """What the adapters cost on plain text."""
    path = session.cfg.eval.retention_path
    with session.phase("retention"):
        kept = retention.measure(
            session.model, session.tokenizer, retention.load_texts(path), seed=session.held_out.seed
        )
    m.measurements += kept
    m.findings += retention.findings(kept) if path is None else []


def merges(session: Session, m: Measured) -> None:
    """Whether the adapters can be merged into the weights."""
    with session.phase("retention"):
        # On one process: a merge keeps a copy of every adapted weight in the memory of the machine.
        found = session.dist.on_main(lambda: [x.model_dump(mode="json") for x in merging(session)])
    m.measurements += [Measurement.model_validate(x) for x in found]


def merging(session: Session) -> list[Measurement]:
    """The same prompts and held-out samples, in the same batches, with the adapters apart and merged."""
    model, chosen = session.model, session.held_out.ablation_sample[:NUM_MERGED]

    def look() -> tuple[textonly.TextLogits, list[SampleLoss]]:
        batches = session.data.eval_batches(session.held_out.at(chosen), session.store, session.cfg)
        return textonly.text_logits(model, session.tokenizer), loss.sample_losses(model, batches)

    text, apart = look()
    with model.adapters_merged():
        text_merged, together = look()
    pairs = list(zip(text.logits, text_merged.logits, strict=True))
    gap = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    predicted = sum(a[..., 0].numel() for a, _ in pairs)
    other = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs)
    tokens = sum(x.tokens for x in apart)
    turned = sum(abs(x.correct - y.correct) for x, y in zip(apart, together, strict=True))
    why = f"weights are stored in {str(model.language.dtype).removeprefix('torch.')}, to which a merge rounds"
    found = (
        ("max_logit_diff", gap, "logits", len(pairs), f"on the prompts of the text-only suite; {why}"),
        (
            "changed_pct", 100 * other / predicted, "%", predicted,
            f"next tokens of plain text that become another; {why}",
        ),
        (
            "tokens_changed_pct", 100 * turned / max(tokens, 1), "%", max(len(apart), 1),
            "tokens of held-out answers that only one of the two predicts; those that change sides within a sample "
            "cancel",
        ),
    )  # fmt: skip
    return [
        Measurement(name=f"merge.{name}", value=value, unit=unit, better="lower", n=n, caveat=caveat)
        for name, value, unit, n, caveat in found
    ]


# ---------------------------------------------------------------------------------------------------------------
# The table


def _whole(cfg: RunConfig) -> Sequence[str | int]:
    every = cfg.train.full_eval_every
    return (every, "save") if every == "epoch" and cfg.stage_record.evaluates_saves else (every,)


_NONE = "there are no adapters"


def _adapted(session: Session) -> bool:
    return bool(session.model.adapters)


def strengths(session: Session, m: Measured) -> None:
    """The line from the base to the trained model: the same measurements at part of the adapters' strength."""
    rows = ("losses", "retained", *(own.name for own in MONITORS if any(w.strength for w in own.watched)))
    for strength in session.cfg.eval.strengths:
        with session.model.at_strength(strength):
            there = Measured(m.step, session.eval_losses())
            for name in rows:
                if PANEL[name].needs(session):
                    PANEL[name].make(session, there)
        m.measurements += [
            x.model_copy(update={"name": STRENGTH_LINE[x.name], "stratum": f"{strength:g}", "by": "strength"})
            for x in there.measurements
            if x.name in STRENGTH_LINE and x.stratum is None
        ]


def _monitor(name: str, make: Callable[[Session, Measured], None]) -> Row:
    """Made where a setting says on what; else a named gap."""
    own = next(m for m in MONITORS if m.name == name)
    begin, why = own.begins[0], f"{own.setting} is not given"
    return Row(
        name, make, needs=lambda session: session.cfg.eval.off(begin) is None, without=(begin, why), monitor=own.called
    )


def watched(cfg: RunConfig) -> list[Row]:
    """The rows that are made at every evaluation."""
    kept = cfg.eval.retention_every == "eval"
    return [row for row in PANEL.values() if row.monitor or (row.name == "retained" and kept)]


PANEL: dict[str, Row] = {
    row.name: row
    for row in (
        Row("losses", losses, every=_whole, candidate=True),
        Row("truncated", truncated),
        Row("taught", teachers.closeness),
        Row("learned", learned),
        Row("golden", golden_set, every=lambda cfg: (cfg.eval.run_golden_every,)),
        Row("ablation", ablation, every=lambda cfg: (cfg.ablation.run_every,), candidate=True),
        Row("words", words),
        Row("slots", every_slot),
        Row("written", written),
        Row("followed", followed),
        Row("kept", kept),
        Row("questions", questions),
        Row("pairs", contrast_pairs),
        Row("cells", four_cells),
        Row("blind", blind_two_ways),
        Row("learnable", learnable),
        Row("guessable", guessable),
        # Before those that write down what was said: that of the run's own strength is to stay.
        Row("strengths", strengths, needs=lambda s: _adapted(s) and bool(s.cfg.eval.strengths)),
        Row("retained", retained, needs=_adapted, without=("retention.", _NONE)),
        Row("merges", merges, needs=_adapted, without=("merge.", _NONE)),
        Row(
            "crossed",
            monitors.crossed,
            needs=lambda s: _adapted(s) and s.cfg.eval.off("cross.") is None,
            without=("cross.", f"{_NONE}, or {MONITORED['cross.']} is not given"),
        ),
        _monitor("irrelevant", monitors.irrelevant),
        _monitor("ood", monitors.ood),
        _monitor("jitter", monitors.jitter),
        _monitor("gap", monitors.gap),
    )
}
"""Every measurement. Which of them a stage makes at its end, and in which order, its record says."""
