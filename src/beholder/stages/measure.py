"""What a run measures before training and after it: the rows of `panel`, and the proof that nothing frozen moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from beholder.config import RunConfig
from beholder.evidence import Evidence, Measurement
from beholder.model.plan import TrainableTable, frozen_fingerprint
from beholder.probes import clipscore, loss, textonly, wrong_images
from beholder.probes.loss import SampleLoss
from beholder.stages.guard import open_history
from beholder.stages.measured import LEARNS_WHOLE, NO_START, START_CAPTIONS, Before, Measured, Trained
from beholder.stages.panel import PANEL
from beholder.stages.session import Session
from beholder.stages.write_evidence import make_evidence
from beholder.train.promoted import start_evidence
from beholder.types import UserError

BASELINE = "baseline.json"


def check_measurable(session: Session) -> None:
    """What would stop the measurements is found before hours of training, not after; what is left out is said.

    Raises `UserError`: images that cannot be shuffled, an object list or a CLIP folder that cannot be read.
    """
    cfg, held = session.cfg, len(session.held_out.examples)
    _ = session.held_out.golden_items  # chosen and stored here, where every process takes part
    samples = {"eval.caption_samples": session.held_out.written_sample}
    if "shuffled" in cfg.ablation.conditions:
        samples["ablation.num_samples"] = session.held_out.ablation_sample
        if "slots" in cfg.stage_record.measures:
            samples["eval.slot_samples"] = session.held_out.slot_sample
    for name, indices in samples.items():
        if not indices and name != "ablation.num_samples":
            continue
        try:
            wrong_images.shuffle_images(session.held_out.at(indices), session.held_out.content_key, cfg.measure_seed)
        except UserError as e:
            raise UserError(f"{name}: {e}") from e
    _ = session.held_out.objects
    _ = session.monitors.fingerprint  # whose files are read here
    if cfg.eval.clip_model is not None:
        clipscore.ClipJudge(cfg.eval.clip_model, session.dist.device)
    if blind := held - len(session.held_out.sighted):
        session.gap(f"{blind} of {held} held-out samples show no image: the comparison of images leaves them out.")
    if long := len(session.held_out.sighted) - len(session.held_out.describable):
        session.gap(
            f"{long} of {held} held-out samples are not captioned: they end with the user's turn, or the turns before "
            f"their last answer do not fit into prompting.max_seq_len {cfg.prompting.max_seq_len}."
        )


def measure_before(session: Session, *, fresh: bool) -> Before:
    """Held-out losses of the untrained connector and of the language model alone, and its text logits.

    The losses are measured once, at the true start, and kept in the run folder: after a resume the first could not be
    measured any more. The text logits are those of the weights as loaded from their own files, in every process.
    """
    check_measurable(session)
    with session.model.adapters_off():
        text = textonly.text_logits(session.model, session.tokenizer)
    path = session.run.path / BASELINE
    watched = open_history(session, fresh=fresh)
    if fresh:
        frozen = frozen_fingerprint(session.model)  # a connector that stays as it is has its weights only now
        untrained = session.eval_losses()
        with session.phase("evaluation"):
            text_only = session.together.text_losses(session.held_out.examples)
        start, no_start = ask_start(session, untrained)
        measured = [*session.held_out.summary(untrained), *watched]
        if session.dist.is_main:
            record = {
                "measurements": [m.model_dump(mode="json") for m in measured],
                "frozen": frozen,
                "untrained": [asdict(x) for x in untrained],
                "text_only": [asdict(x) for x in text_only],
                "start": None if start is None else [asdict(x) for x in start],
                "no_start": no_start,
            }
            session.run.write_json(BASELINE, record)
        session.reporter.eval(measured[0].value, step=0)
        return Before(measured, frozen, text, untrained, text_only, start, no_start)
    if path.is_file():
        saved = session.run.read_json(BASELINE)
        try:
            measured = [Measurement.model_validate(m) for m in saved["measurements"]]
            kept = [[SampleLoss(**row) for row in saved.get(k, [])] or None for k in ("untrained", "text_only")]
            rows = saved.get("start")
            start = None if rows is None else [SampleLoss(**row) for row in rows]
            why = saved.get("no_start", Before.no_start)
            return Before(measured, dict(saved["frozen"]), text, *kept, start=start, no_start=why)
        except (KeyError, TypeError, ValueError) as e:
            raise UserError(
                f"{path} is damaged ({type(e).__name__}); what was measured before training cannot be measured again. "
                "Remove the file to go on without a baseline."
            ) from e
    session.gap("Baseline: not measured, because this run went on from a checkpoint of another folder.")
    return Before([], frozen_fingerprint(session.model), text)


def ask_start(session: Session, own: Sequence[SampleLoss]) -> tuple[list[SampleLoss] | None, str]:
    """Losses of `HeldOut.single` by the run that this one starts from, or why there are none.

    ``own``: of every held-out sample as this run starts. Its adapters are that run's, but may be used at another
    strength; then those of this one are asked again.
    """
    cfg, single = session.cfg, session.held_out.single
    if cfg.model.connector.load_checkpoint is None:
        return None, NO_START
    known = session.dist.on_main(lambda: start_facts(cfg))
    if known is None:
        return None, "the run it starts from has no evidence.json"
    answers_questions, adapted, strength = known
    if not answers_questions:
        return None, START_CAPTIONS
    if adapted and cfg.model.lora.adapters == "fresh":
        return None, "the adapters of the run it starts from were dropped (model.lora.adapters: fresh)"
    if not adapted or cfg.model.lora.adapters == "merge" or strength == cfg.model.lora.strength:
        return [own[i] for i in single], ""
    with session.phase("evaluation"), session.model.at_strength(strength):
        return session.together.losses(session.held_out.at(single)), ""


def start_facts(cfg: RunConfig) -> tuple[bool, bool, float] | None:
    """Of the run this one starts from: whether it answers questions, has adapters, and at which strength."""
    known = start_evidence(cfg)
    if known is None:
        return None
    return known.get("answer.accuracy.correct") is not None, bool(known.adapters), known.adapter_strength


def measure(
    session: Session, table: TrainableTable, before: Before, trained: Trained, losses: list[SampleLoss] | None = None
) -> Evidence:
    """Measure the trained model and write ``evidence.json``, ``metrics.json``, ``report.html`` and ``report.md``.

    ``losses``: of the held-out samples, when just measured.
    """
    m = Measured(trained.step, losses or session.eval_losses(), before, trained.again)
    for name in session.cfg.stage_record.measures:
        row = PANEL[name]
        if row.needs(session):
            row.make(session, m)
        elif row.without is not None and row.monitor:
            m.leave_out(row.without[0], row.monitor, row.without[1])
        elif row.without is not None:
            m.inapplicable |= dict([row.without])
        if name == "losses":
            tell_losses(session, m)
    text = None
    if session.model.language_learns:
        m.inapplicable |= {"text.": LEARNS_WHOLE, "retention.": LEARNS_WHOLE, "merge.": LEARNS_WHOLE}
    else:
        with session.model.adapters_off():
            text = textonly.compare(before.text, textonly.text_logits(session.model, session.tokenizer))
    after = frozen_fingerprint(session.model)
    if not before.frozen.keys() & after.keys():
        m.inapplicable["frozen."] = "no part is frozen, or has a part that is"
    session.dist.barrier()
    return make_evidence(session, table, m, trained, after, text)


def tell_losses(session: Session, m: Measured) -> None:
    """The held-out loss on the terminal and in the log."""
    total = next(x.value for x in m.measurements if x.name == "eval.loss" and x.stratum is None)
    exact = loss.exact_shares(m.losses)[None]
    session.reporter.eval(total, step=m.step, more=[("exact", exact)])
    if session.dist.is_main:
        seen = {"step": m.step, "eval_loss": total, "eval_examples": len(m.losses), "eval_exact": exact}
        if seen not in session.run.metrics():  # told by a process that died since
            session.run.log(seen)
