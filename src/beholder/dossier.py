"""The evidence of a run, put together: measurements with everything that is needed to read them, written and rendered.

What is measured, and in which order, is `assessment`'s business; here it becomes ``evidence.json``, ``metrics.json``,
``report.html`` and ``report.md``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from beholder.config.file import dump_config
from beholder.evidence import (
    AdapterRow,
    Candidate,
    Cost,
    Curve,
    DataFacts,
    Evidence,
    Histogram,
    Measurement,
    Prediction,
    Sample,
    TextOnly,
    TrainableRow,
    WordReliance,
    WordStat,
    thin,
    thumbnail,
)
from beholder.evidence.best import choose
from beholder.evidence.catalogue import flat_names, said
from beholder.evidence.gates import judge, told, verdict
from beholder.model.plan import TrainableTable
from beholder.probes import captions, golden, golden_history, loss, strata, textonly, written
from beholder.report import render
from beholder.runs import atomic_write, now, to_json
from beholder.train.checkpoint import steps_on_disk
from beholder.types import Status, UserError
from beholder.workbench import Workbench

CHANGES = ("status", "updated", "step", "best_step", "phases_s", "gates_failed", "error", "signal")
"""What ``run.json`` says of the moment, and not of where the run comes from."""

GoldenItems = list[tuple[int, golden.GoldenItem]]
Record = dict[str, Any]


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


@dataclass
class Told:
    """What the probes say, collected in the order they are asked."""

    measured: list[Measurement] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    captions: dict[int, list[written.Written]] = field(default_factory=dict)
    """By index of the held-out sample, one record a condition."""
    words: dict[int, list[WordReliance]] = field(default_factory=dict)
    inapplicable: set[str] = field(default_factory=set)
    """Gates about what this data does not hold."""
    word_stats: list[WordStat] = field(default_factory=list)


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
    *,
    step: int,
    trained: int,
    status: Status,
    known: Cost | None,
) -> Evidence:
    """The measurements with everything that is needed to read them; the main process writes them down.

    ``step``: of the checkpoint that was measured; ``trained``: steps the run made.
    """
    cfg, run, c = bench.cfg, bench.run, bench.data.counts
    steps = [r for r in run.metrics() if "step" in r]
    logged = [r for r in steps if "step_time_s" in r and r["step"] <= trained]
    lost = {id: str(reason) for r in logged for id, reason in r.get("rejected", [])}  # while training, once each
    slugs = Counter(reason.partition(":")[0] for reason in lost.values())
    facts = DataFacts(
        records=c["records"] + (c["eval_records"] if cfg.data.eval_sources else 0),
        train=c["train"],
        eval=c["eval"],
        sources=c["sources"],
        rejects=dict(Counter(c["rejects"]) + slugs),
        duplicates=c["duplicates"],
        train_buckets=c["train_buckets"],
        eval_buckets=c["eval_buckets"],
        held_out_sha256=bench.held_out_sha256,
        truncated_pct=_weighted(logged, "truncated_pct", "samples"),
        label_zero_pct=_weighted(logged, "label_zero_pct", "samples"),
        eval_origin="their own files" if cfg.data.eval_sources else f"held out by split {cfg.data.split}",
        fingerprint=bench.data.train.fingerprint,
    )
    rows = [
        TrainableRow(**asdict(r), sha256_before=before.frozen.get(r.part), sha256_after=after.get(r.part))
        for r in table.rows
    ]
    measured = [*tell.measured, *_as_measurements(facts, rows, text, logged)]
    candidates = [Candidate.model_validate(r["candidate"]) for r in steps if "candidate" in r]
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
        gates=judge({name: g for name, g in cfg.gates.items() if name not in tell.inapplicable}, measured),
        findings=tell.findings,
        words=tell.word_stats,
        curves=_curves(steps, before),
        histograms=tell.histograms,
        samples=_samples(bench, tell, items, step),
        text_only=text,
        adapters=[AdapterRow(**asdict(site)) for site in bench.model.adapters],
        adapter_strength=cfg.model.lora.strength,
        candidates=choose(candidates, {step, *steps_on_disk(run.checkpoints)}),
        step=step,
        cost=known or _cost(bench, logged, trained),
        provenance={k: v for k, v in run.read_json("run.json").items() if k not in CHANGES},
        config_yaml=dump_config(cfg),
        gaps=[
            *bench.gaps,
            *(f"Gate {name}: not judged, no held-out answer is short." for name in sorted(tell.inapplicable)),
        ],
    )
    _say_figures(bench, evidence)
    if bench.dist.is_main:
        rejects = "".join(to_json(asdict(r)) + "\n" for r in bench.data.rejects)
        rejects += "".join(
            to_json({"id": id, "reason": why.partition(":")[0], "detail": why}) + "\n" for id, why in lost.items()
        )
        atomic_write(run.path / "rejects.jsonl", rejects)
        written = [asdict(r) for by_condition in zip(*tell.captions.values(), strict=True) for r in by_condition]
        if written:
            lines = "".join(to_json(r) + "\n" for r in written)
            atomic_write(run.qual / f"step_{step}_captions{len(written)}.jsonl", lines)
        run.write_json("metrics.json", evidence.metrics() | flat_names(evidence))
        atomic_write(run.path / "evidence.json", evidence.to_json())
        render(evidence, run.path)
        facts_now = {"best_step": step, "gates_failed": [g.name for g in evidence.failed_gates]}
        facts_now |= {} if bench.remeasured else {"phases_s": bench.phases_s}
        run.set_status(status, step=trained, **facts_now)
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


def _short(name: str) -> str:
    """A hub name as it is, a local path by its last part: reports are passed on."""
    return Path(name).name if Path(name).is_absolute() else name


def _say_figures(bench: Workbench, e: Evidence) -> None:
    line = bench.reporter.line
    for m in said(e):
        line("result", m.told)
    same = e.text_only is not None and e.text_only.equal
    line("result", f"text-only logits bit-equal before and after: {'yes' if same else 'NO'}")
    for finding in e.findings:
        line("finding", finding)
    for gate in e.failed_gates:
        line("gate", f"FAILED {told(gate)}: {gate.why}" if gate.why else f"FAILED {told(gate)}")
    line("gates", verdict(e).partition(":")[0])


def _curves(steps: list[Record], before: Before) -> list[Curve]:
    """What was logged over the steps, where it was; the share of exactly right answers by kind of question, too."""
    kinds = sorted({key for r in steps for key in r if key.startswith("quick_eval_exact/")})
    logged = (
        ("train.loss", "nats/token", "loss"),
        ("eval.loss", "nats/token", "eval_loss"),
        ("quick_eval.loss", "nats/token", "quick_eval_loss"),
        ("eval.exact", "share", "eval_exact"),
        ("quick_eval.exact", "share", "quick_eval_exact"),
        *((f"quick_eval.exact/{key.partition('/')[2]}", "share", key) for key in kinds),
        ("lr.connector", "learning rate", "lr.connector"),
        ("lr.lora", "learning rate", "lr.lora"),
        ("grad_norm", "L2 norm", "grad_norm"),
    )
    return [curve for name, unit, key in logged if (curve := _curve(name, unit, key, steps, before)).x]


def _curve(name: str, unit: str, key: str, steps: list[Record], before: Before) -> Curve:
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
    data, chats = bench.data, bench.cfg.stage_name == "instruct"
    shown = bench.shown_sample
    predictions: dict[int, list[Prediction]] = {i: [] for i in shown}
    index_of = {(item.id, item.gt_text, item.image_relpath): i for i, item in items}
    for at, path in golden_history.steps_of(bench.run.qual):
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
            question=(strata.questions(data.eval_examples[i]) or [""])[-1].strip() if chats else "",
            reference=data.eval_examples[i].answer_text,
            predictions=predictions[i],
            bucket=data.eval_buckets[i],
            words=tell.words.get(i, []),
        )
        for i in shown
    ]
