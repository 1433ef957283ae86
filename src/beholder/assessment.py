"""What a run can say for itself: everything that is measured before and after training, and the evidence made of it.

Each probe's own maths stands in `probes`, how it is shared among processes in `workbench`; here they are called in
turn, once, by whoever trains (`stages`) or measures again (`remeasure`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beholder.configfile import dump_config
from beholder.evidence import (
    Condition,
    Cost,
    DataFacts,
    Evidence,
    Histogram,
    Measurement,
    Prediction,
    Sample,
    Status,
    TextOnly,
    TrainableRow,
    WordReliance,
    WordStat,
    thin,
    thumbnail,
)
from beholder.gates import judge, told, verdict
from beholder.model.plan import TrainableTable, frozen_fingerprint
from beholder.probes import (
    audit,
    captions,
    clipscore,
    collapse,
    golden,
    hallucination,
    loss,
    qa,
    reliance,
    textonly,
)
from beholder.report import render
from beholder.runs import atomic_write, now, to_json
from beholder.types import UserError
from beholder.workbench import Workbench

BASELINE = "baseline.json"
CAPTION_CONDITIONS: tuple[Condition, ...] = ("correct", "shuffled", "zero")
"""Captions and answers are written under these; a fourth, under noise, would cost a third more and tell what the loss
under noise tells."""
ANSWER = captions.GREEDY.model_copy(update={"max_new_tokens": 24})
"""An answer to a short question is a sentence at most."""
CHANGES = ("status", "updated", "step", "phases_s", "gates_failed", "error", "signal")
"""What ``run.json`` says of the moment, and not of where the run comes from."""

TELL_COLLAPSE = 0.2
"""Share of outputs from which a symptom of collapse is told in words; the gate's own bound is in the config."""

GoldenItems = list[tuple[int, golden.GoldenItem]]
Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------
# Before training


@dataclass(frozen=True)
class Before:
    """What was measured before training."""

    measurements: list[Measurement]
    frozen: dict[str, str]
    text: textonly.TextLogits
    untrained: list[loss.SampleLoss] | None = None
    """Of every held-out sample, with the untrained connector."""
    text_only: list[loss.SampleLoss] | None = None
    """Of every held-out sample, by the language model alone: no image, no connector."""


def check_measurable(bench: Workbench) -> None:
    """What would stop the measurements is found before hours of training, not after; what is left out is said.

    Raises `UserError`: images that cannot be shuffled, an object list or a CLIP folder that cannot be read.
    """
    cfg, held = bench.cfg, len(bench.data.eval_examples)
    assert len(bench.golden_items) <= held  # chosen and stored here, where every process takes part
    samples = {"eval.caption_samples": bench.caption_sample}
    if "shuffled" in cfg.ablation.conditions:
        samples["ablation.num_samples"] = bench.ablation_sample
    for name, indices in samples.items():
        if not indices and name == "eval.caption_samples":
            continue
        try:
            loss.shuffle_images(bench.examples(indices), bench.content_key, cfg.measure_seed)
        except UserError as e:
            raise UserError(f"{name}: {e}") from e
    assert bench.objects.names
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


@dataclass
class Told:
    """What the probes say, collected in the order they are asked."""

    measured: list[Measurement] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    captions: dict[int, list[captions.CaptionRecord]] = field(default_factory=dict)
    """By index of the held-out sample, one record a condition."""
    words: dict[int, list[WordReliance]] = field(default_factory=dict)
    word_stats: list[WordStat] = field(default_factory=list)


def assess(
    bench: Workbench,
    table: TrainableTable,
    before: Before,
    *,
    step: int,
    status: Status,
    known: Cost | None = None,
) -> Evidence:
    """Measure the trained model and write ``evidence.json``, ``metrics.json``, ``report.html`` and ``report.md``.

    ``known``: what the training cost, when an earlier process has told it already.
    """
    tell = Told()
    correct = bench.eval_losses()  # did it learn
    tell.measured += [*bench.eval_summary(correct), truncated(bench)]
    bench.reporter.eval(tell.measured[0].value, step=step)
    if bench.dist.is_main:
        bench.run.log({"step": step, "eval_loss": tell.measured[0].value, "eval_examples": len(correct)})
    learned(bench, before, correct, tell)

    items = bench.golden_items
    if items:
        write_golden(bench, items, step)
    looks(bench, correct, tell)  # does it look
    describes(bench, tell)  # what does it say
    answers(bench, tell)
    could_be_guessed(bench, tell)  # could one do without looking

    text = textonly.compare(before.text, textonly.text_logits(bench.model, bench.tokenizer))
    after = frozen_fingerprint(bench.model)
    bench.dist.barrier()
    return make_evidence(bench, table, before, after, tell, items, text, step, status, known)


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
    """Captions of held-out pictures and every score of them."""
    cfg, data = bench.cfg, bench.data
    chosen = bench.caption_sample
    if not chosen:
        why = "no held-out sample can be captioned" if cfg.eval.caption_samples else "eval.caption_samples is 0"
        bench.gaps.append(f"Captions: none were generated ({why}).")
        return
    examples = bench.examples(chosen)
    seed = cfg.measure_seed
    by: dict[Condition, list[captions.CaptionRecord]]
    with bench.phase("captions"):
        by = {c: bench.captions(examples, captions.GREEDY, c, cfg.eval.batch_size) for c in CAPTION_CONDITIONS}
    tell.captions = {i: [by[c][k] for c in CAPTION_CONDITIONS] for k, i in enumerate(chosen)}
    records = [r for c in CAPTION_CONDITIONS for r in by[c]]
    groups = {k: [turns[0] if len(turns) == 1 else None for turns in v] for k, v in bench.groups(chosen).items()}
    tell.measured += captions.score(records, seed=seed, groups=groups)
    tell.histograms.append(captions.length_histogram(records))

    found = hallucination.score_chair(by, bench.objects, seed)
    tell.measured += found.measurements
    bench.gaps += found.gaps
    swapped = loss.shuffle_images(examples, bench.content_key, seed)
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


def answers(bench: Workbench, tell: Told) -> None:
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
    blank = loss.blank_image(bench.model, "zero", bench.cfg.measure_seed)
    with bench.phase("audit"):
        for name, image in (("audit", None), ("audit.trained", blank)):
            found = audit.audit(
                bench.model, data.encoder, data.layout, data.eval_examples, turns, bench.cfg.measure_seed,
                batch_size=bench.cfg.eval.batch_size, content_key=bench.content_key, blank=image, name=name,
            )  # fmt: skip
            tell.measured += found.measurements
            tell.findings += found.findings
            bench.gaps += [] if image is not None else found.gaps


def truncated(bench: Workbench) -> Measurement:
    """Share of the held-out samples whose target was cut to the maximum length."""
    n = len(bench.data.eval_examples)
    cut = sum(bench.data.encoder.encode(e).truncated for e in bench.data.eval_examples)
    return Measurement(name="eval.truncated_pct", value=100 * cut / n, unit="%", better="lower", n=n)


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


# ---------------------------------------------------------------------------------------------------------------
# Evidence and report


def make_evidence(
    bench: Workbench,
    table: TrainableTable,
    before: Before,
    after: dict[str, str],
    tell: Told,
    items: GoldenItems,
    text: TextOnly,
    step: int,
    status: Status,
    known: Cost | None,
) -> Evidence:
    """The measurements with everything that is needed to read them; the main process writes them down."""
    cfg, run, c = bench.cfg, bench.run, bench.data.counts
    steps = [r for r in run.metrics() if "step" in r]
    trained = [r for r in steps if "step_time_s" in r and r["step"] <= step]
    facts = DataFacts(
        records=c["records"] + (c["eval_records"] if cfg.data.eval_sources else 0),
        train=c["train"],
        eval=c["eval"],
        sources=c["sources"],
        rejects=c["rejects"],
        duplicates=c["duplicates"],
        train_buckets=c["train_buckets"],
        eval_buckets=c["eval_buckets"],
        held_out_sha256=bench.held_out_sha256,
        truncated_pct=_weighted(trained, "truncated_pct", "samples"),
        label_zero_pct=_weighted(trained, "label_zero_pct", "samples"),
        eval_origin="their own files" if cfg.data.eval_sources else f"held out by split {cfg.data.split}",
        fingerprint=bench.data.train.fingerprint,
    )
    rows = [
        TrainableRow(**asdict(r), sha256_before=before.frozen.get(r.part), sha256_after=after.get(r.part))
        for r in table.rows
    ]
    measured = [*tell.measured, *_as_measurements(facts, rows, text, trained)]
    evidence = Evidence(
        run_name=cfg.run_name,
        stage=cfg.stage_name,
        status=status,
        created=now(),
        summary={
            "Language model": _short(bench.model.language.name),
            "Vision tower": _short(cfg.model.vision.name_or_path),
            "Connector": f"{cfg.model.connector.resampler.kind}, {bench.model.num_visual_tokens} visual tokens",
        },
        trainable=rows,
        data=facts,
        baseline=before.measurements,
        measurements=measured,
        gates=judge(cfg.gates, measured),
        findings=tell.findings,
        words=tell.word_stats,
        curves=[
            curve
            for name, unit, key in (
                ("train.loss", "nats/token", "loss"),
                ("eval.loss", "nats/token", "eval_loss"),
                ("quick_eval.loss", "nats/token", "quick_eval_loss"),
                ("lr.connector", "learning rate", "lr.connector"),
                ("grad_norm", "L2 norm", "grad_norm"),
            )
            if (curve := _curve(name, unit, key, steps, before)).x
        ],
        histograms=tell.histograms,
        samples=_samples(bench, tell, items, step),
        text_only=text,
        cost=known or _cost(bench, trained, step),
        provenance={k: v for k, v in run.read_json("run.json").items() if k not in CHANGES},
        config_yaml=dump_config(cfg),
        gaps=bench.gaps,
    )
    _say_figures(bench, evidence)
    if bench.dist.is_main:
        rejects = "".join(to_json(asdict(r)) + "\n" for r in bench.data.rejects)
        atomic_write(run.path / "rejects.jsonl", rejects)
        written = [
            asdict(r) for k in range(len(CAPTION_CONDITIONS)) for r in (own[k] for own in tell.captions.values())
        ]
        if written:
            lines = "".join(to_json(r) + "\n" for r in written)
            atomic_write(run.qual / f"step_{step}_captions{len(written)}.jsonl", lines)
        run.write_json("metrics.json", evidence.metrics() | flat_names(evidence))
        atomic_write(run.path / "evidence.json", evidence.to_json())
        render(evidence, run.path)
        times = {} if bench.remeasured else {"phases_s": bench.phases_s}
        run.set_status(status, step=step, gates_failed=[g.name for g in evidence.failed_gates], **times)
        bench.reporter.line("report", str(run.path / "report.html"))
    return evidence


def _as_measurements(
    facts: DataFacts, rows: Sequence[TrainableRow], text: TextOnly, trained: Sequence[Record]
) -> list[Measurement]:
    """What else gates judge: shares of the training data, frozen parts and text logits that changed."""
    out: list[Measurement] = []
    n = int(sum(r["samples"] for r in trained))
    for name, value in (("truncated_pct", facts.truncated_pct), ("label_zero_pct", facts.label_zero_pct)):
        if value is not None:
            out.append(Measurement(name=f"data.{name}", value=value, unit="%", better="lower", n=n))
    hashed = [r.intact for r in rows if r.intact is not None]
    if hashed:
        changed = sum(not intact for intact in hashed)
        out.append(Measurement(name="frozen.changed", value=changed, unit="parts", better="lower", n=len(hashed)))
    out.append(
        Measurement(name="text.changed", value=len(text.changed), unit="prompts", better="lower", n=text.prompts)
    )
    return out


def flat_names(e: Evidence) -> dict[str, float]:
    """The seed's names for ``metrics.json``: ``eval_loss``, ``eval_loss_short``, ``delta_shuffle``, …"""
    out: dict[str, float] = {}
    for m in e.measurements:
        if m.name == "eval.loss" and m.by in (None, "length"):
            out["eval_loss" if m.stratum is None else f"eval_loss_{m.stratum}"] = m.value
    for name, key in (
        ("eval.tokens", "eval_label_tokens_total"), ("eval.truncated_pct", "eval_truncated_pct"),
        ("ablation.delta.shuffled", "delta_shuffle"), ("ablation.delta.zero", "delta_zero"),
        ("ablation.delta.noise", "delta_noise"),
    ):  # fmt: skip
        if (m := e.get(name)) is not None:
            out[key] = m.value
    return out | {"eval_examples_total": e.data.eval}


def _short(name: str) -> str:
    """A hub name as it is, a local path by its last part: reports are passed on."""
    return Path(name).name if Path(name).is_absolute() else name


def _say_figures(bench: Workbench, e: Evidence) -> None:
    line = bench.reporter.line
    for name in (
        "eval.loss", "eval.perplexity", "learn.delta", "ablation.loss.correct", "ablation.loss.shuffled",
        "ablation.loss.zero", "ablation.loss.noise", "ablation.delta.shuffled", "ablation.delta.zero",
        "ablation.delta.noise", "ablation.ratio.shuffled", "caption.exact_match.correct",
        "caption.exact_match.shuffled", "caption.exact_match.zero", "caption.exact_match.chance",
        "caption.cider_d.correct", "chair.s.correct", "qa.accuracy.correct", "qa.accuracy.zero", "qa.accuracy.chance",
        "audit.answerable.alone", "audit.leak", "collapse.worst",
    ):  # fmt: skip
        if m := e.get(name):
            ci = f" (95 % {m.ci95[0]:.4g} to {m.ci95[1]:.4g})" if m.ci95 else ""
            line("result", f"{name} = {m.value:.4g} {m.unit}{ci}, n={m.n}")
    same = e.text_only is not None and e.text_only.equal
    line("result", f"text-only logits bit-equal before and after: {'yes' if same else 'NO'}")
    for finding in e.findings:
        line("finding", finding)
    for gate in e.failed_gates:
        line("gate", f"FAILED {told(gate)}: {gate.why}" if gate.why else f"FAILED {told(gate)}")
    line("gates", verdict(e).partition(":")[0])


def _curve(name: str, unit: str, key: str, steps: list[Record], before: Before) -> Any:
    points = [(r["step"], r[key]) for r in steps if isinstance(r.get(key), int | float)]
    if key == "eval_loss" and before.measurements:
        points.insert(0, (0, before.measurements[0].value))
    return thin(name, unit, sorted(dict(points).items()))


def _weighted(records: list[Record], key: str, weight: str) -> float | None:
    total = sum(r[weight] for r in records)
    return sum(r[key] * r[weight] for r in records) / total if total else None


def _cost(bench: Workbench, trained: list[Record], step: int) -> Cost:
    if not trained:
        return Cost(steps=step, device=str(bench.dist.device), processes=bench.dist.world_size)
    seconds = sum(r["step_time_s"] for r in trained)
    samples, images = sum(r["samples"] for r in trained), sum(r["images"] for r in trained)
    tokens = sum(r["tokens_per_s"] * r["step_time_s"] for r in trained)
    return Cost(
        steps=step,
        epochs=trained[-1]["epoch"],
        samples=samples,
        images=images,
        tokens=round(tokens),
        target_tokens=sum(r["tokens"] for r in trained),
        wall_s=None if bench.resumed else time.perf_counter() - bench.started,  # an earlier process took its time along
        train_s=seconds,
        phases_s=bench.phases_s,
        step_s=seconds / len(trained),
        samples_per_s=samples / seconds,
        images_per_s=images / seconds,
        tokens_per_s=tokens / seconds,
        data_wait_share=_weighted(trained, "data_wait_share", "step_time_s"),
        peak_memory_mb=max(r["peak_memory_mb"] for r in trained),
        feature_store_mb=bench.fill.bytes_used / 1e6 if bench.fill else None,
        device=str(bench.dist.device),
        processes=bench.dist.world_size,
    )


def _samples(bench: Workbench, tell: Told, items: GoldenItems, step: int) -> list[Sample]:
    """Pictures with what the model wrote over the steps, and what it writes with the wrong image."""
    if not bench.dist.is_main:
        return []
    data = bench.data
    shown = bench.shown_sample
    predictions: dict[int, list[Prediction]] = {i: [] for i in shown}
    index_of = {(item.id, item.gt_text, item.image_relpath): i for i, item in items}
    for at, path in golden.steps_of(bench.run.qual):
        if at <= step and path == golden.captions_path(bench.run.qual, at, len(items)):
            try:
                rows = golden.load_captions(path)
            except UserError as e:  # an earlier step's; this one's measurements are not lost for it
                bench.gaps.append(f"Golden captions of step {at}: not shown. {e}")
                continue
            for row in rows:
                if (i := index_of.get((row.id, row.gt_text, row.image_relpath))) in predictions:
                    exact = captions.exact_match(row.pred_text, row.gt_text)
                    predictions[i].append(Prediction(step=at, text=row.pred_text, exact=exact))
    for i in shown:
        for r in tell.captions.get(i, []):
            if r.condition != "correct" or not predictions[i]:
                exact = captions.exact_match(r.prediction, r.reference) if r.condition == "correct" else None
                predictions[i].append(Prediction(step=step, text=r.prediction, condition=r.condition, exact=exact))
    return [
        Sample(
            id=data.eval_examples[i].id,
            images=[thumbnail(data.pipeline.open(ref)) for ref in data.eval_examples[i].images],
            reference=data.eval_examples[i].answer_text,
            predictions=predictions[i],
            bucket=data.eval_buckets[i],
            words=tell.words.get(i, []),
        )
        for i in shown
    ]
