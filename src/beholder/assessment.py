"""What a run can say for itself: everything that is measured before and after training, and the evidence made of it.

Each probe's own maths stands in `probes`, how it is shared among processes in `workbench`; here they are called in
turn, once, by whoever trains (`stages`) or measures again (`remeasure`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from beholder.dossier import Before, GoldenItems, Told, make_evidence
from beholder.evidence import Candidate, Condition, Cost, Evidence, Measurement, WordReliance
from beholder.model.adapters import merged
from beholder.model.plan import TrainableTable, frozen_fingerprint
from beholder.probes import (
    answers,
    audit,
    captions,
    clipscore,
    collapse,
    golden,
    hallucination,
    loss,
    qa,
    reliance,
    retention,
    textonly,
    written,
    wrong_images,
)
from beholder.types import Status, UserError
from beholder.workbench import Workbench

BASELINE = "baseline.json"
CAPTION_CONDITIONS: tuple[Condition, ...] = ("correct", "shuffled", "zero")
"""Captions are written under these; a fourth, under noise, would cost a third more and tell what the loss under noise
tells."""
ANSWER_CONDITIONS: tuple[Condition, ...] = ("correct", "shuffled", "none")
"""Answers of a model that was taught to chat: the blind baseline is the same model, asked without any image."""
ANSWER = written.GREEDY.model_copy(update={"max_new_tokens": 24})
"""An answer to a short question is a sentence at most."""
NUM_MERGED = 128
"""Held-out samples that are asked with the adapters merged as well."""
TELL_COLLAPSE = 0.2
"""Share of outputs from which a symptom of collapse is told in words; the gate's own bound is in the config."""


# ---------------------------------------------------------------------------------------------------------------
# Before training


def check_measurable(bench: Workbench) -> None:
    """What would stop the measurements is found before hours of training, not after; what is left out is said.

    Raises `UserError`: images that cannot be shuffled, an object list or a CLIP folder that cannot be read.
    """
    cfg, held = bench.cfg, len(bench.data.eval_examples)
    _ = bench.golden_items  # chosen and stored here, where every process takes part
    samples = {"eval.caption_samples": bench.caption_sample}
    if "shuffled" in cfg.ablation.conditions:
        samples["ablation.num_samples"] = bench.ablation_sample
    for name, indices in samples.items():
        if not indices and name == "eval.caption_samples":
            continue
        try:
            wrong_images.shuffle_images(bench.examples(indices), bench.content_key, cfg.measure_seed)
        except UserError as e:
            raise UserError(f"{name}: {e}") from e
    _ = bench.objects
    if cfg.eval.clip_model is not None:
        clipscore.ClipJudge(cfg.eval.clip_model, bench.dist.device)
    if blind := held - len(bench.sighted):
        bench.gaps.append(
            f"{blind} of {held} held-out samples show no image: the comparison of images leaves them out."
        )
    if long := len(bench.sighted) - len(bench.describable):
        bench.gaps.append(
            f"{long} of {held} held-out samples are not captioned: they end with the user's turn, or the turns before "
            f"their last answer do not fit into prompting.max_seq_len {cfg.prompting.max_seq_len}."
        )


def measure_before(bench: Workbench, *, fresh: bool) -> Before:
    """Held-out losses of the untrained connector and of the language model alone, and its text logits.

    The losses are measured once, at the true start, and kept in the run folder: after a resume the first could not be
    measured any more. The text logits are those of the weights as loaded from their own files, in every process.
    """
    check_measurable(bench)
    with bench.model.adapters_off():
        text = textonly.text_logits(bench.model, bench.tokenizer)
    path = bench.run.path / BASELINE
    if fresh:
        untrained = bench.eval_losses()
        text_only = bench.text_losses()
        measured = bench.eval_summary(untrained)
        if bench.dist.is_main:
            record = {
                "measurements": [m.model_dump(mode="json") for m in measured],
                "frozen": bench.frozen,
                "untrained": [asdict(x) for x in untrained],
                "text_only": [asdict(x) for x in text_only],
            }
            bench.run.write_json(BASELINE, record)
        bench.reporter.eval(measured[0].value, step=0)
        return Before(measured, bench.frozen, text, untrained, text_only)
    if path.is_file():
        saved = bench.run.read_json(BASELINE)
        try:
            measured = [Measurement.model_validate(m) for m in saved["measurements"]]
            kept = [[loss.SampleLoss(**row) for row in saved.get(k, [])] or None for k in ("untrained", "text_only")]
            return Before(measured, dict(saved["frozen"]), text, *kept)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{path} is damaged ({type(e).__name__}); what was measured before training cannot be measured again. "
                "Remove the file to go on without a baseline."
            ) from e
    bench.gaps.append("Baseline: not measured, because this run went on from a checkpoint of another folder.")
    return Before([], bench.frozen, text)


# ---------------------------------------------------------------------------------------------------------------
# After training: the page


def assess(
    bench: Workbench,
    table: TrainableTable,
    before: Before,
    *,
    step: int,
    trained: int,
    status: Status,
    known: Cost | None = None,
    correct: Sequence[loss.SampleLoss] | None = None,
) -> Evidence:
    """Measure the trained model and write ``evidence.json``, ``metrics.json``, ``report.html`` and ``report.md``.

    ``step``: of the checkpoint whose weights are in place; ``trained``: steps the run made. ``known``: what the
    training cost, when an earlier process has told it already. ``correct``: the held-out losses, when just measured.
    """
    tell = Told()
    correct = bench.eval_losses() if correct is None else correct  # did it learn
    tell.measured += [*bench.eval_summary(correct), truncated(bench)]
    exact = loss.exact_shares(correct)[None]
    bench.reporter.eval(tell.measured[0].value, step=step, more=[("exact", exact)])
    if bench.dist.is_main:
        seen = {"step": step, "eval_loss": tell.measured[0].value, "eval_examples": len(correct), "eval_exact": exact}
        if seen not in bench.run.metrics():  # told by a process that died since
            bench.run.log(seen)
    learned(bench, before, correct, tell)

    items = bench.golden_items
    if items and (bench.remeasured or not has_golden(bench, items, step)):
        write_golden(bench, items, step)
    looks(bench, correct, tell)  # does it look
    describes(bench, tell)  # what does it say
    if bench.cfg.stage_name == "align":
        questions(bench, tell)
    could_be_guessed(bench, tell)  # could one do without looking
    if bench.model.adapters:
        keeps(bench, tell)  # is it still the language model it was

    with bench.model.adapters_off():
        text = textonly.compare(before.text, textonly.text_logits(bench.model, bench.tokenizer))
    after = frozen_fingerprint(bench.model)
    bench.dist.barrier()
    return make_evidence(
        bench, table, before, after, tell, items, text, step=step, trained=trained, status=status, known=known
    )


def summarize_step(
    bench: Workbench,
    correct: Sequence[loss.SampleLoss],
    step: int,
    measured: Sequence[Measurement] = (),
    *,
    write: bool,
) -> Candidate:
    """The checkpoint of ``step`` as a candidate for the run's best: its loss, image reliance and golden outputs.

    ``measured``: the ablation of this step, when it has been made; else only the shuffled images are shown.
    ``write``: whether the golden set is to be written for it; else only what has been written of this step is judged.
    """
    ablated = list(measured)
    if not ablated and "shuffled" in bench.cfg.ablation.conditions:
        indices = bench.ablation_sample
        known: dict[Condition, list[loss.SampleLoss]] = {"correct": [correct[i] for i in indices]}
        losses = bench.ablation_losses(indices, ("correct", "shuffled"), known)
        ablated = loss.compare_conditions(losses, bench.groups(indices), seed=bench.cfg.measure_seed)
    delta = next((m.value for m in ablated if m.name == "ablation.delta.shuffled" and m.stratum is None), None)
    items = bench.golden_items
    worst: float | None = None
    there = bool(items) and has_golden(bench, items, step)
    if items and write and not there:
        write_golden(bench, items, step)
        there = True
    if there:
        path = golden.captions_path(bench.run.qual, step, len(items))
        rows = bench.dist.on_main(lambda: [(r.pred_text, r.gt_text) for r in golden.load_captions(path)])
        found = collapse.symptoms([p for p, _ in rows], [t for _, t in rows], seed=bench.cfg.measure_seed)
        worst = max((s.share for s in found), default=None)
    total = loss.summarize(correct, "eval", seed=bench.cfg.measure_seed)[0].value
    return Candidate(step=step, eval_loss=total, delta_shuffled=delta, collapse=worst)


def learned(bench: Workbench, before: Before, correct: Sequence[loss.SampleLoss], tell: Told) -> None:
    """What training changed, paired by sample, and the bands a loss is read against."""
    seed = bench.cfg.measure_seed
    same = [e.id for e in bench.data.eval_examples]
    for name, band, earlier in (
        ("learn.delta", "band.untrained", before.untrained),
        ("learn.delta_text", "band.text_only", before.text_only),
    ):
        if earlier is None:
            continue
        if [x.id for x in earlier] != same:
            bench.gaps.append(f"{name}: the held-out samples are not those of the start, so nothing can be paired.")
            continue
        tell.measured.append(loss.paired_gain(earlier, correct, name, seed))
        first = loss.summarize(earlier, "band", seed=seed)[0]
        tell.measured.append(first.model_copy(update={"name": band, "better": "none"}))
    size = bench.model.language.vocab
    tell.measured.append(
        Measurement(
            name="band.uniform", value=math.log(size), unit="nats/token", better="none", n=len(correct),
            caveat=f"guessing evenly over the {size:,} tokens of the vocabulary",
        )
    )  # fmt: skip
    rows = sorted({r["step"]: r["loss"] for r in bench.run.metrics() if isinstance(r.get("loss"), int | float)}.items())
    whole = bool(rows) and rows[0][0] == 1  # the log of a run that went on from elsewhere lacks the fall
    if whole and (share := late_share([y for _, y in rows])) is not None:
        tell.measured.append(
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


def looks(bench: Workbench, correct: Sequence[loss.SampleLoss], tell: Told) -> None:
    """The loss with the wrong images, overall and by stratum, and word by word."""
    measured, losses = bench.ablation(correct)
    tell.measured += measured
    words = by_word(bench, bench.ablation_sample, losses)
    if words:
        tell.word_stats = reliance.word_stats(list(words.values()), seed=bench.cfg.measure_seed)
    missing = [i for i in bench.shown_sample if i not in words]
    if missing:
        rest = bench.ablation_losses(missing, ("correct", "zero"), {"correct": [correct[i] for i in missing]})
        words |= by_word(bench, missing, rest)
    tell.words = {i: words[i] for i in bench.shown_sample}


def by_word(
    bench: Workbench, indices: Sequence[int], losses: Mapping[Condition, Sequence[loss.SampleLoss]]
) -> dict[int, list[WordReliance]]:
    """What each word of these held-out samples loses with the zero image; nothing where that was not measured."""
    if "zero" not in losses:
        return {}
    return {
        i: reliance.words(bench.data.encoder, bench.data.eval_examples[i], right, wrong)
        for i, right, wrong in zip(indices, losses["correct"], losses["zero"], strict=True)
    }


def describes(bench: Workbench, tell: Told) -> None:
    """The last answers of held-out samples, captions or answers to questions, and every score of them."""
    cfg, data = bench.cfg, bench.data
    chosen = bench.caption_sample
    if not chosen:
        why = "no held-out sample can be captioned" if cfg.eval.caption_samples else "eval.caption_samples is 0"
        bench.gaps.append(f"Captions and answers: none were written ({why}).")
        return
    examples = bench.examples(chosen)
    seed = cfg.measure_seed
    by: dict[Condition, list[written.Written]]
    chats = cfg.stage_name == "instruct"
    conditions = ANSWER_CONDITIONS if chats else CAPTION_CONDITIONS
    greedy = written.GREEDY.model_copy(update={"max_new_tokens": cfg.eval.answer_tokens})
    label = "answers" if chats else "captions"
    with bench.phase(label):
        by = {c: bench.captions(examples, greedy, c, cfg.eval.batch_size, label) for c in conditions}
    tell.captions = {i: [by[c][k] for c in conditions] for k, i in enumerate(chosen)}
    records = [r for c in conditions for r in by[c]]
    if chats:
        judge_answers(bench, chosen, by, tell)
    groups = {k: [turns[0] if len(turns) == 1 else None for turns in v] for k, v in bench.groups(chosen).items()}
    tell.measured += captions.score(records, seed=seed, groups=groups)
    tell.histograms.append(captions.length_histogram(records))

    found = hallucination.score_chair(by, bench.objects, seed)
    tell.measured += found.measurements
    bench.gaps += found.gaps
    swapped = wrong_images.shuffle_images(examples, bench.content_key, seed)
    symptoms = collapse.symptoms(
        [r.prediction for r in by["correct"]],
        [r.reference for r in by["correct"]],
        [r.prediction for r in by["shuffled"]],
        seed=seed,
        other_references=collapse.references_shown(examples, swapped),
        ids=[r.id for r in by["correct"]],
    )
    tell.measured += collapse.measurements(symptoms)
    tell.findings += collapse.findings(symptoms, limit=TELL_COLLAPSE)
    if all(s.name != "image_independent" for s in symptoms):
        bench.gaps.append(
            "Whether captions are the same for every image: not measured, too few samples whose image another sample "
            "shows with the same question and another answer."
        )
    if cfg.eval.clip_model is None:
        bench.gaps.append("CLIPScore: not measured; give eval.clip_model a CLIP folder.")
    else:
        single = [k for k, e in enumerate(examples) if len(e.images) == 1]
        if len(single) < len(examples):
            bench.gaps.append(f"CLIPScore: {len(examples) - len(single)} captions of several images are left out.")
        if not single:
            return
        with bench.phase("captions"):
            tell.measured += clipscore.clip_score(
                cfg.eval.clip_model,
                (data.pipeline.open(examples[k].images[0]) for k in single),
                [by["correct"][k].prediction for k in single],
                [by["correct"][k].reference for k in single],
                device=bench.dist.device,
                seed=seed,
            )


def judge_answers(
    bench: Workbench, chosen: Sequence[int], by: Mapping[Condition, Sequence[written.Written]], tell: Told
) -> None:
    """Answers that are right or wrong as a whole, scored by kind of question; longer ones are judged by their loss.

    Where no question has a short answer the gates on answers do not apply, and the report says so.
    """
    examples = bench.examples(chosen)
    short = [k for k, e in enumerate(examples) if answers.is_short(e)]
    if len(short) < len(examples):
        bench.gaps.append(
            f"Accuracy: {len(examples) - len(short)} of {len(examples)} answers are longer than "
            f"{answers.SHORT_WORDS} words, which are not right or wrong as a whole; they are judged by their loss."
        )
    if not short:
        tell.inapplicable = {name for name, g in bench.cfg.gates.items() if (g.measure or "").startswith("answer.")}
        return
    # the answer that was written is the last turn's
    groups = bench.groups([chosen[k] for k in short])
    last = {name: [turns[-1] if turns else None for turns in own] for name, own in groups.items()}
    tell.measured += answers.score(
        [examples[k] for k in short], {c: [r[k] for k in short] for c, r in by.items()}, last,
        seed=bench.cfg.measure_seed,
    )  # fmt: skip


def questions(bench: Workbench, tell: Told) -> None:
    """The question-answer sanity set, made from the held-out captions themselves."""
    size, seed = bench.cfg.eval.qa_samples, bench.cfg.measure_seed
    if not size:
        bench.gaps.append("Questions: none were asked (eval.qa_samples is 0).")
        return
    items = qa.build_qa(bench.data.eval_examples, bench.objects, size, seed)
    if not items:
        bench.gaps.append(
            "Questions: none could be made: no held-out sample with one image and one answer names an object of "
            "eval.object_list (default COCO's), or all of them name the same one."
        )
        return
    asked = [qa.qa_prompt(bench.data.eval_examples[item.index], item) for item in items]
    conditions: tuple[Condition, ...] = CAPTION_CONDITIONS
    if len({bench.content_key(e.images[0]) for e in asked}) < 2:
        bench.gaps.append("Questions under another image: not asked, all of them are about one picture.")
        conditions = ("correct", "zero")
    given: dict[Condition, list[str]]
    with bench.phase("captions"):
        given = {
            c: [r.prediction for r in bench.captions(asked, ANSWER, c, bench.cfg.eval.batch_size, "questions")]
            for c in conditions
        }
    tell.measured += qa.score_qa(items, given)


def could_be_guessed(bench: Workbench, tell: Told) -> None:
    """Whether the answers can be had from the text alone, or from earlier turns."""
    turns, data = bench.cfg.eval.audit_turns, bench.data
    if not any(sum(t.role == "assistant" for t in e.turns) > 1 for e in data.eval_examples):
        n = len(data.eval_examples)
        tell.measured.append(
            Measurement(
                name="audit.trained.leak", value=0.0, unit="nats/token", better="lower", n=n, ci95=(0.0, 0.0),
                caveat="no held-out sample has a second answer, so there are no earlier turns to read",
            )
        )  # fmt: skip
    if not turns:
        bench.gaps.append("Leakage audit: not made (eval.audit_turns is 0).")
        return
    # The language model alone says what is in the text; the trained model with an empty image says what it makes of it:
    # a small model may only come to read earlier turns because the connector prompts it to.
    blank = wrong_images.blank_image(bench.model, "zero", bench.cfg.measure_seed)
    with bench.phase("audit"):
        for name, image in (("audit", None), ("audit.trained", blank)):
            found = audit.audit(
                bench.model, data.encoder, data.layout, data.eval_examples, turns, bench.cfg.measure_seed,
                batch_size=bench.cfg.eval.batch_size, content_key=bench.content_key, blank=image, name=name,
            )  # fmt: skip
            tell.measured += found.measurements
            tell.findings += found.findings
            bench.gaps += [] if image is not None else found.gaps


def keeps(bench: Workbench, tell: Told) -> None:
    """What the adapters cost on plain text, and whether they can be merged into the weights."""
    with bench.phase("retention"):
        texts = retention.load_texts(bench.cfg.eval.retention_path)
        kept = retention.measure(bench.model, bench.tokenizer, texts, seed=bench.cfg.measure_seed)
        tell.measured += kept
        tell.findings += retention.findings(kept) if bench.cfg.eval.retention_path is None else []
        # On one process: a merge keeps a copy of every adapted weight in the memory of the machine.
        found = bench.dist.on_main(lambda: [m.model_dump(mode="json") for m in merging(bench)])
        tell.measured += [Measurement.model_validate(m) for m in found]


def merging(bench: Workbench) -> list[Measurement]:
    """The same prompts and held-out samples, in the same batches, with the adapters apart and merged."""
    model, chosen = bench.model, bench.ablation_sample[:NUM_MERGED]

    def look() -> tuple[textonly.TextLogits, list[loss.SampleLoss]]:
        batches = bench.data.eval_batches(bench.examples(chosen), bench.store, bench.cfg)
        return textonly.text_logits(model, bench.tokenizer), loss.sample_losses(model, batches)

    text, apart = look()
    with merged(model.language):
        text_merged, together = look()
    pairs = list(zip(text.logits, text_merged.logits, strict=True))
    gap = max(float((a.double() - b.double()).abs().max()) for a, b in pairs)
    places = sum(a[..., 0].numel() for a, _ in pairs)
    other = sum(int((a.argmax(-1) != b.argmax(-1)).sum()) for a, b in pairs)
    tokens = sum(x.tokens for x in apart)
    turned = sum(abs(x.correct - y.correct) for x, y in zip(apart, together, strict=True))
    why = f"weights are stored in {str(model.language.dtype).removeprefix('torch.')}, to which a merge rounds"
    found = (
        ("max_logit_diff", gap, "logits", len(pairs), f"on the prompts of the text-only suite; {why}"),
        ("changed_pct", 100 * other / places, "%", places, f"next tokens of plain text that become another; {why}"),
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


def truncated(bench: Workbench) -> Measurement:
    """Share of the held-out samples whose target was cut to the maximum length."""
    n = len(bench.data.eval_examples)
    cut = sum(bench.data.encoder.encode(e).truncated for e in bench.data.eval_examples)
    return Measurement(name="eval.truncated_pct", value=100 * cut / n, unit="%", better="lower", n=n)


def has_golden(bench: Workbench, items: GoldenItems, step: int) -> bool:
    """Whether the fixed set has been written at this step; the same answer on every process."""
    return bench.dist.on_main(golden.captions_path(bench.run.qual, step, len(items)).exists)


def write_golden(bench: Workbench, items: GoldenItems, step: int) -> None:
    """Caption the fixed set and store it as ``qual/step_{n}_golden{m}.jsonl``."""
    e = bench.cfg.eval
    with bench.phase("captions"):
        records = bench.captions(
            bench.examples([i for i, _ in items]), e.golden_generate, "correct", e.golden_batch_size
        )
    if bench.dist.is_main:
        rows = golden.join([item for _, item in items], records)
        golden.save(golden.captions_path(bench.run.qual, step, len(items)), rows)
