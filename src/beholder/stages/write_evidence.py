"""The evidence of a run, put together: measurements with everything that is needed to read them, written and rendered.

What can be measured stands in `panel`, what a stage measures in its record; here it becomes ``evidence.json``,
``metrics.json``, ``report.html`` and ``report.md``.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from beholder.config.file import dump_config
from beholder.evidence import (
    AdapterRow,
    Cost,
    Curve,
    DataFacts,
    Evidence,
    Measurement,
    Prediction,
    Sample,
    TextOnly,
    TrainableRow,
    thin,
    thumbnail,
)
from beholder.evidence.best import choose
from beholder.evidence.catalogue import flat_names, logged_curves, quantity, said
from beholder.evidence.gates import judge, told, verdict
from beholder.model.plan import TrainableTable
from beholder.probes import captions, golden, golden_history, strata
from beholder.report import render
from beholder.runs import atomic_write, now, to_json
from beholder.stages.guard import best_limits, history
from beholder.stages.keep import candidates
from beholder.stages.measured import Before, Measured, Trained
from beholder.stages.session import Session
from beholder.train.checkpoint import steps_on_disk
from beholder.types import UserError

CHANGES = (
    "status",
    "updated",
    "step",
    "best_step",
    "phases_s",
    "gates_failed",
    "error",
    "signal",
    "stopped",
    "tracked",
)
"""What ``run.json`` says of the moment, and not of where the run comes from."""

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------
# Evidence and report


def make_evidence(
    session: Session, table: TrainableTable, m: Measured, trained: Trained, after: dict[str, str],
    text: TextOnly | None,
) -> Evidence:  # fmt: skip
    """The measurements with everything that is needed to read them; the main process writes them down. ``text``: None
    where the language model is not meant to be what it was."""
    assert m.before is not None, "measured at the end"
    before, step = m.before, trained.step
    cfg, run, c = session.cfg, session.run, session.data.counts
    steps = [r for r in run.metrics() if "step" in r]
    logged = [r for r in steps if "step_time_s" in r and r["step"] <= trained.steps]
    lost = {id: str(reason) for r in logged for id, reason in r.get("rejected", [])}  # while training, once each
    slugs = Counter(reason.partition(":")[0] for reason in lost.values())
    facts = DataFacts(
        records=c.records + (c.eval_records if cfg.data.eval_sources else 0),
        train=c.train,
        eval=c.eval,
        sources=c.sources,
        rejects=dict(Counter(c.rejects) + slugs),
        duplicates=c.duplicates,
        absent_images=c.absent_images,
        train_buckets=c.train_buckets,
        eval_buckets=c.eval_buckets,
        held_out_sha256=session.held_out.sha256,
        truncated_pct=_weighted(logged, "truncated_pct", "samples"),
        label_zero_pct=_weighted(logged, "label_zero_pct", "samples"),
        eval_origin="their own files" if cfg.data.eval_sources else f"held out by split {cfg.data.split}",
        fingerprint=session.data.train.fingerprint,
    )
    rows = [
        TrainableRow(**asdict(r), sha256_before=before.frozen.get(r.part), sha256_after=after.get(r.part))
        for r in table.rows
    ]
    measured = [*m.measurements, *_as_measurements(facts, rows, text, logged)]
    session.trackers.finish(step, {x.key: x.value for x in measured})
    idle = {name: why for name, gate in cfg.gates.items() if (why := m.why_not(gate.measure)) is not None}
    evidence = Evidence(
        run_name=cfg.run_name,
        stage=cfg.stage_name,
        status=trained.status,
        created=now(),
        summary={
            "Language model": _short(session.model.language.name),
            **(_eyes(session)),
            **({"Mixture": ", ".join(mixed)} if (mixed := session.data.mixture(cfg, trained.steps)) else {}),
        },
        trainable=rows,
        data=facts,
        baseline=before.measurements,
        measurements=measured,
        gates=judge({name: g for name, g in cfg.gates.items() if name not in idle}, measured),
        findings=m.findings,
        words=m.word_stats,
        curves=[*_curves(steps, before), *_monitor_curves(session)],
        histograms=m.histograms,
        samples=_samples(session, m),
        text_only=text,
        adapters=[
            AdapterRow(**asdict(replace(site, name=part.prefix + site.name)), part=name)
            for name, part in session.model.parts().items()
            for site in part.adapters
        ],
        adapter_strength=cfg.model.lora.strength,
        stopped=trained.stopped,
        candidates=choose(
            candidates(session), {step, *steps_on_disk(run.checkpoints)}, cfg.stage_record.best, best_limits(session)
        ),
        step=step,
        cost=trained.cost or _cost(session, logged, trained),
        provenance={k: v for k, v in run.read_json("run.json").items() if k not in CHANGES},
        config_yaml=dump_config(cfg),
        gaps=[*session.gaps, *m.gaps, *(f"Gate {name}: not judged, {why}." for name, why in sorted(idle.items()))],
    )
    _say_figures(session, evidence)
    if session.dist.is_main:
        rejects = "".join(to_json(asdict(r)) + "\n" for r in session.data.rejects)
        rejects += "".join(
            to_json({"id": id, "reason": why.partition(":")[0], "detail": why}) + "\n" for id, why in lost.items()
        )
        atomic_write(run.path / "rejects.jsonl", rejects)
        written = [asdict(r) for by_condition in zip(*m.written.values(), strict=True) for r in by_condition]
        if written:
            lines = "".join(to_json(r) + "\n" for r in written)
            atomic_write(run.qual / f"step_{step}_captions{len(written)}.jsonl", lines)
        run.write_json("metrics.json", evidence.metrics() | flat_names(evidence))
        atomic_write(run.path / "evidence.json", evidence.to_json())
        render(evidence, run.path)
        facts_now = {"best_step": step, "gates_failed": [g.name for g in evidence.failed_gates]}
        facts_now["stopped"] = None if trained.stopped is None else trained.stopped.sentence
        facts_now |= {} if trained.again else {"phases_s": session.phases_s}
        run.set_status(trained.status, step=trained.steps, **facts_now)
        session.reporter.line("report", str(run.path / "report.html"))
    return evidence


def _as_measurements(
    facts: DataFacts, rows: Sequence[TrainableRow], text: TextOnly | None, trained: Sequence[Record]
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
    if text is not None:
        out.append(
            Measurement(name="text.changed", value=len(text.changed), unit="prompts", better="lower", n=text.prompts)
        )
    return out


def _short(name: str) -> str:
    """A hub name as it is, a local path by its last part: reports are passed on."""
    return Path(name).name if Path(name).is_absolute() else name


def _eyes(session: Session) -> dict[str, str]:
    model = session.cfg.model
    if model.native is not None:
        return {"Vision": "its own tower and connector, as many visual tokens as an image's size asks for"}
    return {
        "Vision tower": _short(model.vision.name_or_path),
        "Connector": f"{model.connector.resampler.kind}, {session.model.num_visual_tokens} visual tokens",
    }


def _say_figures(session: Session, e: Evidence) -> None:
    line = session.reporter.line
    for m in said(e):
        line("result", m.told)
    if e.text_only is not None:
        line("result", f"text-only logits bit-equal before and after: {'yes' if e.text_only.equal else 'NO'}")
    for finding in e.findings:
        line("finding", finding)
    for gate in e.failed_gates:
        line("gate", f"FAILED {told(gate)}: {gate.why}" if gate.why else f"FAILED {told(gate)}")
    line("gates", verdict(e).partition(":")[0])


def _curves(steps: list[Record], before: Before) -> list[Curve]:
    """What was logged over the steps, where it was; the share of exactly right answers by kind of question, too."""
    rows = logged_curves(key for r in steps for key in r)
    return [curve for name, unit, key in rows if (curve := _curve(name, unit, key, steps, before)).x]


def _monitor_curves(session: Session) -> list[Curve]:
    """What the monitors said over the steps, the baseline at step 0."""
    read = history(session)
    names = [n for n in session.cfg.eval.watched if any(n in r.values for r in read)]
    return [thin(n, quantity(n)[0].unit, [(r.step, r.values[n]) for r in read if n in r.values]) for n in names]


def _curve(name: str, unit: str, key: str, steps: list[Record], before: Before) -> Curve:
    points = [(r["step"], r[key]) for r in steps if isinstance(r.get(key), int | float)]
    if key == "eval_loss" and before.measurements:
        points.insert(0, (0, before.measurements[0].value))
    return thin(name, unit, sorted(dict(points).items()))


def _weighted(records: list[Record], key: str, weight: str) -> float | None:
    total = sum(r[weight] for r in records)
    return sum(r[key] * r[weight] for r in records) / total if total else None


def _cost(session: Session, logged: list[Record], trained: Trained) -> Cost:
    if not logged:
        return Cost(steps=trained.steps, device=str(session.dist.device), processes=session.dist.world_size)
    seconds = sum(r["step_time_s"] for r in logged)
    samples, images = sum(r["samples"] for r in logged), sum(r["images"] for r in logged)
    tokens = sum(r["tokens_per_s"] * r["step_time_s"] for r in logged)
    return Cost(
        steps=trained.steps,
        epochs=logged[-1]["epoch"],
        samples=samples,
        images=images,
        tokens=round(tokens),
        target_tokens=sum(r["tokens"] for r in logged),
        wall_s=time.perf_counter() - session.started if trained.whole else None,
        train_s=seconds,
        phases_s=session.phases_s,
        step_s=seconds / len(logged),
        samples_per_s=samples / seconds,
        images_per_s=images / seconds,
        tokens_per_s=tokens / seconds,
        data_wait_share=_weighted(logged, "data_wait_share", "step_time_s"),
        peak_memory_mb=max(r["peak_memory_mb"] for r in logged),
        feature_store_mb=None if (filled := session.filled) is None else filled.bytes_used / 1e6,
        device=str(session.dist.device),
        processes=session.dist.world_size,
    )


def _samples(session: Session, m: Measured) -> list[Sample]:
    """Pictures with what the model wrote over the steps, and what it writes with the wrong image."""
    if not session.dist.is_main:
        return []
    held, items, step = session.held_out, session.held_out.golden_items, m.step
    asked = session.cfg.stage_record.writes == "answer"
    shown = session.held_out.shown_sample
    predictions: dict[int, list[Prediction]] = {i: [] for i in shown}
    index_of = {golden.key(item): i for i, item in items}
    for at, path in golden_history.steps_of(session.run.qual):
        if at <= step and path == golden.captions_path(session.run.qual, at, len(items)):
            try:
                rows = golden.load_captions(path)
            except UserError as e:  # an earlier step's; this one's measurements are not lost for it
                m.gaps.append(f"Golden captions of step {at}: not shown. {e}")
                continue
            for row in rows:
                if (i := index_of.get(golden.key(row))) in predictions:
                    exact = captions.exact_match(row.pred_text, row.gt_text)
                    predictions[i].append(Prediction(step=at, text=row.pred_text, exact=exact))
    for i in shown:
        for r in m.written.get(i, []):
            if r.condition != "correct" or not predictions[i]:
                exact = captions.exact_match(r.prediction, r.reference) if r.condition == "correct" else None
                predictions[i].append(Prediction(step=step, text=r.prediction, condition=r.condition, exact=exact))
    return [
        Sample(
            id=held.examples[i].id,
            images=[thumbnail(session.data.pipeline.open(ref)) for ref in held.examples[i].images],
            question=(strata.questions(held.examples[i]) or [""])[-1].strip() if asked else "",
            reference=held.examples[i].answer_text,
            predictions=predictions[i],
            bucket=held.buckets[i],
            words=m.words.get(i, []),
        )
        for i in shown
    ]
