"""Measures a finished run again, or one thing about it: all its evidence, the ablation alone, what a blind model knows.

Nothing here trains. What is measured stands in `panel` and `probes`; the run's split, checkpoint and fingerprints
must be those it was trained with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from beholder.config import RunConfig, decided_by
from beholder.config.file import check_consent, diff_configs, load_config
from beholder.evidence import Condition, Measurement, load_evidence
from beholder.evidence.catalogue import IMAGE_NAMES
from beholder.evidence.gates import judge, told
from beholder.model.plan import TrainableTable, apply_train_plan, plan_of
from beholder.probes import audit, loss, reliance, slots
from beholder.report.slots import marked
from beholder.runs import RunDir, atomic_write, stop_signals, to_json
from beholder.stages.guard import measured_otherwise
from beholder.stages.lifetime import sole_writer
from beholder.stages.measure import measure, measure_before
from beholder.stages.measured import Measured, Trained
from beholder.stages.panel import by_word, every_slot
from beholder.stages.run import Outcome
from beholder.stages.session import Session, open_session
from beholder.train import checkpoint, restore, same_run
from beholder.train.distributed import joined
from beholder.types import CONDITIONS, Example, UserError


@dataclass(frozen=True)
class Opened:
    """A trained run opened, with the weights of its best checkpoint, else of its latest."""

    session: Session
    table: TrainableTable
    step: int


@contextmanager
def reopen(folder: str, overrides: Sequence[str], *, aside: bool = False, step: int | None = None) -> Iterator[Opened]:
    """The run in ``folder`` with its best checkpoint, else its latest, or with that of ``step``, locked while it is
    measured.

    ``overrides``: settings of ``eval``, ``ablation`` and the like; one that changes what was trained is refused.
    ``aside`` as in `open_session`.
    """
    path = run_folder(folder)
    saved = load_config(path / "config.yaml")
    cfg = load_config(path / "config.yaml", overrides)
    check_consent(cfg, overrides)
    # Parts and data may have been moved; fingerprints, not paths, say whether they are the same.
    may = {"measuring", "speed", "place"}
    refused = [f for f, _, _ in diff_configs(saved, cfg) if not decided_by(RunConfig, f) & may]
    if refused:
        raise UserError(
            f"{', '.join(refused)}: only how a run is measured can be changed here (eval.*, ablation.*, gates.*, "
            "features.*, device, threads, workers) or where its parts and data lie; start a new run to train with "
            "other settings"
        )
    run = RunDir(path)
    with joined(cfg.device, cfg.train.timeout_s) as dist, stop_signals(), sole_writer(run, dist):
        where = checkpoint.resolve_checkpoint(path if step is None else run.checkpoints / f"step_{step}")
        session = open_session(cfg, run, dist, restore.read_base(where), aside=aside)
        table = apply_train_plan(session.model, plan_of(cfg.model, cfg.stage_record))
        restore.load_trained(where, session.model)
        trainer = restore.read_trainer(where)
        fingerprints = restore.entry(trainer, "fingerprints")
        same_run.check_same_fingerprints(fingerprints, session.fingerprints)
        if (why := session.rounded_then(fingerprints)) is not None:
            session.gap(f"The run: {why}; its numbers are those of positions as they are now.")
        told = run.read_json("run.json").get("promoted") if run.run_path.exists() else None
        if told:
            session.gap(told)
        if judged := [f"{f}: {a} → {b}" for f, a, b in diff_configs(saved, cfg) if f.startswith("gates.")]:
            session.gap(f"Gates judged otherwise than the run declared them: {'; '.join(judged)}.")
        with session:
            session.fill_features(0, 0)
            yield Opened(session, table, int(trainer["step"]))


def run_folder(name: str) -> Path:
    """The folder of a finished or interrupted run, or a `UserError` that says what is missing."""
    path = Path(name)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is not a run folder: it has no config.yaml. Give the output_dir of a run.")
    return path


def evaluate_run(folder: str, overrides: Sequence[str] = ()) -> Outcome:
    """Measure a run's best checkpoint, else its latest, again, judge its gates, rewrite its evidence and report."""
    with reopen(folder, overrides) as opened:
        session = opened.session
        status = session.run.read_status()  # measuring a stopped run does not finish it
        before = measure_before(session, fresh=False)
        if (changed := measured_otherwise(session)) is not None:
            session.gap(f"Monitors: {changed}.")
        earlier = load_evidence(session.run.path) if (session.run.path / "evidence.json").is_file() else None
        known = None if earlier is None else earlier.cost
        latest = checkpoint.latest_checkpoint(session.run.checkpoints)
        steps = opened.step if latest is None else int(restore.read_trainer(latest)["step"])
        known = None if known is not None and known.steps != steps else known  # of an earlier state
        trained = Trained(opened.step, steps, status, whole=False, again=True, cost=known)
        if earlier is not None and earlier.cost.steps == steps:
            trained = replace(trained, stopped=earlier.stopped)
        evidence = measure(session, opened.table, before, trained)
        return Outcome(session.run.path, evidence.status, opened.step, evidence=evidence, is_main=session.dist.is_main)


# ---------------------------------------------------------------------------------------------------------------
# One question at a time


@dataclass(frozen=True)
class Answer:
    """Measurements as a command prints them: a line for all samples and for each stratum."""

    title: str
    measurements: list[Measurement]
    columns: dict[str, str]
    """Measurement name -> heading, of what is printed; the JSON has everything."""
    findings: list[str]
    file: Path | None = None
    """Where the single samples are written, one a line."""
    is_main: bool = True
    """Whether this process is the one that speaks."""

    def print(self, console: Console) -> None:
        """As many tables as it takes for the console's width; a row that has nothing to say in one is not in it."""
        found = {(m.by, m.stratum, m.name): m for m in self.measurements}
        rows = dict.fromkeys((m.by, m.stratum) for m in self.measurements if m.name in self.columns)
        labels = {row: "all" if row[1] is None else f"{row[0]}: {row[1]}" for row in rows}
        given = [name for name in self.columns if any(m.name == name for m in self.measurements)]
        texts = {name: {row: _with_interval(m) for row in rows if (m := found.get((*row, name)))} for name in given}
        left = console.width - max(map(len, labels.values()), default=0) - 14  # borders, and how many samples
        title = f"{self.title} (95 % intervals below)"
        for names in _that_fit({name: _width(self.columns[name], texts[name].values()) for name in given}, left):
            table = Table(title=title, title_justify="left")
            table.add_column("samples", no_wrap=True)
            table.add_column("n", justify="right", no_wrap=True)
            for name in names:
                table.add_column(self.columns[name], justify="right")
            for row in rows:
                if told := [found[*row, name] for name in names if row in texts[name]]:
                    table.add_row(escape(labels[row]), str(told[0].n), *(texts[name].get(row, "") for name in names))
            console.print(table)
            title = None
        for finding in self.findings:
            console.print(finding, markup=False, soft_wrap=True)
        if self.file is not None:
            console.print(f"single samples: {self.file}", markup=False, soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        return {"measurements": [m.model_dump(mode="json") for m in self.measurements], "findings": self.findings}


def _that_fit(widths: Mapping[str, int], most: int) -> list[list[str]]:
    """The columns, in order, in groups whose widths together are at most ``most``, or of one that is wider."""
    groups: list[list[str]] = []
    for name, width in widths.items():
        if groups and sum(widths[other] for other in groups[-1]) + width <= most:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups


def _width(heading: str, cells: Iterable[str]) -> int:
    """Columns of the terminal, borders included; a heading breaks between words, a cell between its lines."""
    lines = (Text.from_markup(cell).plain.splitlines() for cell in cells)
    return 3 + max(len(word) for word in (*heading.split(), *(line for own in lines for line in own)))


def _with_interval(m: Measurement) -> str:
    digits = ".1%" if m.unit == "share" else ".4g" if m.better == "lower" else "+.3g"
    interval = "" if m.ci95 is None else f"\n[dim]{m.ci95[0]:{digits}} … {m.ci95[1]:{digits}}[/dim]"
    return f"{m.value:{digits}}{interval}"


def ablate_run(
    folder: str,
    *,
    num_samples: int | None = None,
    conditions: Sequence[str] | None = None,
    words: bool = False,
    overrides: Sequence[str] = (),
) -> Answer:
    """The loss of a trained run with the right and the wrong images (S11-4); its evidence stays as it is.

    ``words``: also which words lose most without the image. The losses of every sample and token go to
    ``qual/step_N_ablationM.jsonl``.
    """
    wrong = [c for c in CONDITIONS if c != "correct"]
    for name in conditions or []:
        if name not in wrong:
            raise UserError(f"--condition {name}: expected one of {', '.join(wrong)}")
    more = [] if num_samples is None else [f"ablation.num_samples={num_samples}"]
    more += [] if conditions is None else [f"ablation.conditions={list(conditions)}"]
    with reopen(folder, [*overrides, *more], aside=True) as opened:
        session, held = opened.session, opened.session.held_out
        indices = held.ablation_sample
        wanted: tuple[Condition, ...] = ("correct", *session.cfg.ablation.conditions)
        if words and "zero" not in wanted:
            raise UserError("the words need condition zero: what they lose is told against the zero image")
        with session.phase("ablation"):
            losses = session.together.ablation_losses(indices, wanted)
        measured = loss.compare_conditions(losses, held.groups(indices), seed=held.seed)
        findings: list[str] = []
        if words:
            stats = reliance.word_stats(list(by_word(session, indices, losses).values()), seed=held.seed)
            findings = [f"{w.word!r} loses {w.delta:+.3g} nats without the image (n={w.n})" for w in stats]
        path = session.run.qual / f"step_{opened.step}_ablation{len(indices)}.jsonl"
        if session.dist.is_main:
            lines = [to_json({"condition": c, **asdict(x)}) for c in wanted for x in losses[c]]
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, "".join(line + "\n" for line in lines))
        columns = {"ablation.loss.correct": "loss, own image"}
        columns |= {
            f"ablation.delta.{c}": f"{name}" for c, name in IMAGE_NAMES["caption"].items() if c in CONDITIONS[1:]
        }
        title = f"{folder}, step {opened.step}: nats/token, and what a wrong image adds"
        return Answer(title, measured, columns, findings, path, session.dist.is_main)


def ablate_slots(folder: str, *, num_samples: int | None = None, overrides: Sequence[str] = ()) -> Answer:
    """Whether every image of a sample with several counts, wherever it stands (S3-3); the run's evidence stays as it
    is. ``num_samples``: of several images, in which each is replaced. Raises `UserError` for a run without such."""
    more = [] if num_samples is None else [f"eval.slot_samples={num_samples}"]
    with reopen(folder, [*overrides, *more], aside=True) as opened:
        session = opened.session
        if not session.held_out.several:
            raise UserError(f"{folder}: no held-out sample shows several images, so there is only one place")
        m = Measured(opened.step, session.eval_losses())
        every_slot(session, m)
        gates = {
            name: gate
            for name, gate in session.cfg.gates.items()
            if (gate.measure or "").startswith("slots.") and m.why_not(gate.measure) is None
        }
        judged = judge(gates, m.measurements)
        findings = [
            f"gate {g.name} {'passed' if g.passed else f'FAILED: {told(g)}'}{f' ({g.note})' if g.note else ''}"
            for g in judged
        ]
        findings += [f"weak place, {slot.told}" for slot in marked(m.measurements, judged)]
        findings += [f"{name}: not judged, {why}" for name, why in m.inapplicable.items()] + m.gaps
        names = IMAGE_NAMES["answer"]
        columns = {"slots.accuracy": "right, deciding image there", "slots.gain.shuffled": "gain over another"}
        columns |= {f"slots.delta.{c}": names[c] for c in slots.REPLACEMENTS}
        columns |= {"slots.spread": "spread", "slots.follows": "follows a swap", "slots.last_bias": "last-image bias"}
        columns |= {"slots.order": "order minded, nats/token"}
        title = f"{folder}, step {opened.step}: nats/token that replacing one image adds, and where images may stand"
        return Answer(title, m.measurements, columns, findings, is_main=session.dist.is_main)


def audit_data(session: Session, examples: Sequence[Example], title: str, *, num_turns: int = 256) -> Answer:
    """How many of these samples' answers the language model gives without any image, alone and from earlier turns.

    Nothing is trained, and no image is looked at beyond the checks that every run makes.
    """
    cfg, data = session.cfg, session.data
    found = audit.audit(
        session.model, data.encoder, data.layout, examples, num_turns, cfg.measure_seed,
        batch_size=cfg.eval.batch_size, content_key=session.held_out.content_key,
    )  # fmt: skip
    findings = found.findings or [
        "No leakage found. The table says how much a model answers that has never seen an image; a small one may "
        "not read earlier turns by itself and learn to in training, which a run's report says (audit.trained)."
    ]
    findings += found.gaps
    columns = {
        "audit.answerable.alone": "answered from the question", "audit.answerable.context": "and earlier turns",
        "audit.leak": "leak, nats/token",
    }  # fmt: skip
    return Answer(title, found.measurements, columns, findings, is_main=session.dist.is_main)
