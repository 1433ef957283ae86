"""Looks over a model that answers: a teacher of a distillation (``beholder doctor teacher``) or a run's checkpoint
(``beholder doctor inference``), with its own picture, with others, and without.

What compares teacher and student stands in `diagnose_distill`. Nothing is trained, and no run is changed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.config import GREEDY, RunConfig, TeacherConfig
from beholder.config.file import check_consent, load_config, parse_config
from beholder.data.build import build_data
from beholder.data.images import content_hash, typed
from beholder.model.plan import apply_train_plan, plan_of
from beholder.prepare.doctor import Check, Diagnosis
from beholder.prepare.tiny import colour_set, colour_source
from beholder.probes import measuring
from beholder.probes.written import write
from beholder.runs import RunDir
from beholder.stages.begin import base_of
from beholder.stages.session import Session, open_session
from beholder.stages.teachers import Teacher, open_teacher
from beholder.train import checkpoint, restore
from beholder.train.distributed import joined, pick_device
from beholder.train.objectives import log_probabilities
from beholder.train.trained import open_trained
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError, printable

LIKELIEST = 5
"""Tokens shown of a distribution."""
OTHERS = 4
"""Other pictures that a question is asked about."""
MOVES = 1e-3
"""Total variation between the first words' distributions under two pictures, below which the picture does not count:
well above what 16-bit arithmetic moves between two equal ones, far below what any answer that follows it shows."""
ANSWER_TOKENS = 32
"""Of a teacher's answer."""


# ---------------------------------------------------------------------------------------------------------------
# What every examination gives


@dataclass(frozen=True)
class Shown:
    """A table for a person to read; an empty heading leaves the column's unnamed."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def print(self, console: Console) -> None:
        console.print(Text(f"\n{self.title}", style="bold"))
        table = Table(box=None, pad_edge=False, show_header=any(self.columns), padding=(0, 2, 0, 0))
        for k, name in enumerate(self.columns):
            table.add_column(Text(name, style="dim"), no_wrap=k < len(self.columns) - 1, overflow="ellipsis")
        for row in self.rows:
            table.add_row(*map(Text, row))
        console.print(table)


@dataclass(frozen=True)
class Examined:
    """What was looked at, and what was found to hold or not."""

    subject: str
    checks: tuple[Check, ...]
    shown: tuple[Shown, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    """Numbers behind what is shown."""

    @property
    def failed(self) -> bool:
        return any(c.level == "fail" for c in self.checks)

    def print(self, console: Console) -> None:
        for shown in self.shown:
            shown.print(console)
        console.print()
        Diagnosis(self.checks).print(console)

    def to_json(self) -> dict[str, Any]:
        return {
            "subject": self.subject,
            "ok": not self.failed,
            "checks": [asdict(c) for c in self.checks],
            "shown": [asdict(s) for s in self.shown],
            **self.facts,
        }


class NotFiniteError(UserError):
    """A model gives log-probabilities that are not finite."""


def judged(name: str, holds: bool, found: str, advice: str) -> Check:
    """ok, or a failure with what to do."""
    return Check(name, "ok", found) if holds else Check(name, "fail", found, advice)


# ---------------------------------------------------------------------------------------------------------------
# Opening


def config_of(subject: str, overrides: Sequence[str] = ()) -> tuple[RunConfig, Path | None]:
    """The config that ``subject`` is, or that of the run it is, and then the run's checkpoint, if it has one."""
    path = Path(subject)
    if not path.is_dir():
        return load_config(path, overrides), None
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path} is neither a config file nor a run folder: it has no config.yaml")
    cfg = load_config(path / "config.yaml", overrides)
    check_consent(cfg, overrides)
    return cfg, checkpoint.resolve_checkpoint(path) if (path / "checkpoints").is_dir() else None


@contextmanager
def student_of(subject: str, overrides: Sequence[str] = ()) -> Iterator[Session]:
    """The student of a distillation with its data: of a config as training would start it, of a run as it is now. Its
    folder is not touched."""
    cfg, where = config_of(subject, overrides)
    if cfg.distill is None:
        raise UserError(f"{subject} names no teachers (distill.teachers); give a config or a run of a distillation")
    with joined(cfg.device, cfg.train.timeout_s) as dist, tempfile.TemporaryDirectory() as folder:
        if dist.world_size > 1:
            raise UserError("beholder doctor runs as one process; start it without torchrun")
        with open_session(cfg, RunDir(folder), dist, base_of(cfg, where), aside=True) as session:
            apply_train_plan(session.model, plan_of(cfg.model, cfg.stage_record))
            origin = cfg.model.connector.load_checkpoint
            if where is not None:
                restore.load_trained(where, session.model)
            elif origin is not None:
                restore.load_start(checkpoint.resolve_checkpoint(origin), session.model, cfg.model.lora.adapters)
            session.model.train(False)
            yield session


# ---------------------------------------------------------------------------------------------------------------
# One question, several pictures


@dataclass(frozen=True)
class Look:
    """One question answered with its own picture, with others, and without one."""

    sample: str
    question: str
    reference: str
    answer: str
    tokens: int
    seconds: float
    finished: bool
    blind: str | None
    """Without a picture; None where the run's prompt needs one."""
    others: tuple[str, ...]
    moved: float
    """Largest total variation between the distributions of its first token with its own and with another picture."""
    likeliest: tuple[tuple[str, float, float], ...]
    """Token, and its probability with its own and with another picture."""

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


@torch.no_grad()
def first_word(teacher: Teacher, example: Example) -> torch.Tensor:
    """fp64 [V]: log-probabilities of the first token of the example's answer. Raises `NotFiniteError`."""
    builder = teacher.asked.builder
    found = teacher.supervised(builder.batch([example], teacher.asked.layout))
    logits = teacher.language.head(found.hidden[:1])
    return finite(logits, teacher.language.vocab, example)[0].double().cpu()


def finite(logits: torch.Tensor, vocab: int, example: Example) -> torch.Tensor:
    """`log_probabilities`; what it refuses is an error of its own kind here."""
    try:
        return log_probabilities(logits, vocab, [example.id])
    except UserError as e:
        raise NotFiniteError(str(e)) from None


def look(teacher: Teacher, example: Example, others: Sequence[Example], max_new_tokens: int) -> Look:
    """Ask about ``example``, and the same about the pictures of ``others``. Raises `NotFiniteError`, and
    `UserError` for a picture that cannot be had."""
    how = GREEDY.model_copy(update={"max_new_tokens": max_new_tokens})
    builder, encoder = teacher.asked.builder, teacher.encoder
    swapped = [replace(example, images=other.images) for other in others]
    with measuring(teacher.model):
        asked = example if example.answer_text else replace(example, turns=(*example.turns, Turn("assistant", (".",))))
        own = first_word(teacher, asked)
        wrong = [first_word(teacher, replace(asked, images=other.images)) for other in others]
        moved = max((float((own.exp() - w.exp()).abs().sum() / 2) for w in wrong), default=0.0)
        write(teacher.model, encoder, builder, [example], how.model_copy(update={"max_new_tokens": 1}))  # warm
        began = time.perf_counter()
        (said,) = write(teacher.model, encoder, builder, [example], how)
        seconds = time.perf_counter() - began
        elsewhere = write(teacher.model, encoder, builder, swapped, how, batch_size=1)
        blind = (
            None
            if encoder.template == "caption"
            else write(teacher.model, encoder, builder, [example], how, "none")[0].prediction
        )
    top = own.topk(min(LIKELIEST, len(own)))
    return Look(
        sample=example.id,
        question=_words(example) or encoder.instruction,
        reference=example.answer_text,
        answer=said.prediction,
        tokens=said.tokens_len + said.finished,
        seconds=seconds,
        finished=said.finished,
        blind=blind,
        others=tuple(w.prediction for w in elsewhere),
        moved=moved,
        likeliest=tuple(
            (token_text(teacher.tokenizer, i), p, float(wrong[0][i].exp()) if wrong else float("nan"))
            for i, p in zip(top.indices.tolist(), top.values.exp().tolist(), strict=True)
        ),
    )


def _words(example: Example) -> str:
    """What the user says, without the places of pictures."""
    parts = [p for turn in example.turns if turn.role == "user" for p in turn.parts]
    return " ".join(p.strip() for p in parts if isinstance(p, str) and p.strip())


def token_text(tokenizer: Any, token: int) -> str:
    """A token as a person reads it: in quotes, what cannot be seen escaped."""
    return repr(tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def examine(teacher: Teacher, examples: Sequence[Example], max_new_tokens: int) -> tuple[Look | None, list[Check]]:
    """Let it answer the first of ``examples``, with the pictures of the others for comparison."""
    example, *rest = map(teacher.asked.as_recorded, examples)
    try:
        found = look(teacher, example, rest[:OTHERS], max_new_tokens)
    except NotFiniteError as e:
        return None, [
            Check("log-probabilities", "fail", str(e),
                  "Load it at another precision (teachers[].precision: fp32, or model.llm.precision of its run); if "
                  "that does not help its weights are damaged: fetch or train them again.")
        ]  # fmt: skip
    many = f"{len(found.others)} other pictures"
    checks = [
        Check("log-probabilities", "ok", "finite"),
        judged(
            "answer", bool(found.answer.strip()), f"{found.tokens} tokens" if found.answer.strip() else "empty",
            "It ends before it has said anything: look at its prompt with beholder preview, and give a native teacher "
            "the template it was trained with (chat_template).",
        ),
        judged(
            "picture", found.moved >= MOVES,
            f"its first word moves by up to {found.moved:.3g} (total variation) with {many}",
            "It answers the same for another picture, so there is nothing to see in what it says: its picture does not "
            "reach it, or it has not learned to look (beholder ablate RUN).",
        ),
    ]  # fmt: skip
    if found.moved >= MOVES:
        same = all(other == found.answer for other in found.others)
        told = "the same for all of them" if same else "changes with them"
        why = "Its words may still be right for all these pictures; beholder ablate RUN says over many samples."
        checks.append(Check("written answer", "warn" if same else "ok", told, why if same else ""))
    return found, checks


def shown_of(title: str, found: Look) -> tuple[Shown, Shown]:
    """The look as tables."""
    rows = [
        ("question", found.question), ("reference", found.reference or "(none)"), ("answer", found.answer),
        *(("other picture", other) for other in found.others[:2]),
        *([] if found.blind is None else [("no picture", found.blind)]),
        ("time", f"{found.seconds:.2f} s, {found.tokens_per_s:.1f} tokens a second"),
    ]  # fmt: skip
    words = tuple((token, f"{p:.4f}", f"{q:.4f}") for token, p, q in found.likeliest)
    return (
        Shown(f"{title}: {found.sample}", ("", ""), tuple((a, printable(b)) for a, b in rows)),
        Shown("Likeliest first words", ("token", "its own picture", "another's"), words),
    )


def askable(examples: Sequence[Example]) -> list[Example]:
    """`OTHERS` + 1 of the examples, each cut to its first answer: of as many images as the first of them, all
    different; those with another answer than the first one's come first."""
    seeing = [_first_answer(e) for e in examples if e.images and e.num_answers]
    if not seeing:
        raise UserError("no sample shows a picture and has an answer, so nothing can be asked about one")
    first, *rest = seeing
    kept, known = [], {_content(first)}
    for e in sorted(rest, key=lambda e: e.answer_text == first.answer_text):
        if len(kept) == OTHERS:
            break
        if len(e.images) == len(first.images) and (own := _content(e)) not in known:
            kept.append(e)
            known.add(own)
    if not kept:
        raise UserError(f"no sample shows another picture than {first.id!r}; nothing can be compared with it")
    return [first, *kept]


def _first_answer(example: Example) -> Example:
    stop = next(k for k, turn in enumerate(example.turns) if turn.role == "assistant") + 1
    slots = sum(isinstance(p, ImageSlot) for turn in example.turns[:stop] for p in turn.parts)
    return replace(example, turns=example.turns[:stop]) if slots in (0, len(example.images)) else example


def _content(example: Example) -> tuple[str, ...]:
    return tuple(map(content_hash, example.images))


# ---------------------------------------------------------------------------------------------------------------
# The two examinations


def examine_teacher(subject: str, overrides: Sequence[str] = ()) -> Examined:
    """Let each teacher of a distillation answer a question about a held-out picture; or the run, or the native model in
    the folder, that ``subject`` is. Raises `UserError` for one that cannot be loaded."""
    path = Path(subject)
    if not path.is_dir():
        with student_of(subject, overrides) as session:
            examples = askable(session.held_out.examples)
            cfg, device = session.cfg, session.model.device
            return _joined(subject, [(t, _of_config(t, cfg, device, examples)) for t in cfg.learnt_from.teachers])
    with tempfile.TemporaryDirectory() as folder:
        if (path / "config.json").is_file() and not (path / "config.yaml").is_file():
            which, cfg = TeacherConfig(native=subject), _native_config(subject, Path(folder), overrides)
        else:
            where = checkpoint.resolve_checkpoint(path)
            which, (cfg, _) = TeacherConfig(run=subject), config_of(str(checkpoint.run_of(where.resolve())), overrides)
        device = pick_device(cfg.device)
        teacher = open_teacher(which, cfg, device)
        geometry, places = teacher.model.geometry, teacher.model.num_visual_tokens
        data = build_data(cfg, teacher.tokenizer, geometry, places)
        return _joined(subject, [(which, examine(teacher, askable(data.eval_examples), ANSWER_TOKENS))])


def _of_config(
    which: TeacherConfig, student: RunConfig, device: torch.device, examples: Sequence[Example]
) -> tuple[Look | None, list[Check]]:
    return examine(open_teacher(which, student, device), examples, ANSWER_TOKENS)  # one at a time in memory


def _joined(subject: str, found: Sequence[tuple[TeacherConfig, tuple[Look | None, list[Check]]]]) -> Examined:
    several = len(found) > 1
    checks = [
        replace(c, name=f"{which.name}: {c.name}" if several else c.name) for which, (_, own) in found for c in own
    ]
    shown = [s for which, (seen, _) in found if seen is not None for s in shown_of(which.name, seen)]
    return Examined(
        subject, tuple(checks), tuple(shown),
        {"teachers": [{"name": w.name, "look": None if s is None else asdict(s)} for w, (s, _) in found]},
    )  # fmt: skip


def _native_config(subject: str, folder: Path, overrides: Sequence[str]) -> RunConfig:
    """A config around a native model alone: questions about drawn pictures."""
    source = colour_source(folder, "jsonl", 24, dialogues=True)
    raw = {
        "run_name": "teacher",
        "model": {"native": {"name_or_path": subject}, "lora": {"enable": True}},  # a config must train
        "data": {"json_path": source.json_path, "image_root": source.image_root, "eval_size": 12},
    }  # fmt: skip
    return parse_config(yaml.safe_dump(raw), "doctor", overrides)


def examine_inference(
    run: str, image: str | Path | None = None, prompt: str | None = None, *, max_new_tokens: int = 64,
    device: str = "auto", overrides: Sequence[str] = (),
) -> Examined:  # fmt: skip
    """One answer of a run's checkpoint about a held-out picture, or about ``image``: with it, with others, without."""
    if prompt is not None and image is None:
        raise UserError("--prompt asks about --image FILE; give both, or none of them")
    opened = open_trained(run, pick_device(device), overrides)
    teacher = Teacher(str(run), opened.model, opened.tokenizer, opened.encoder, opened.pipeline)
    with tempfile.TemporaryDirectory() as folder:
        if image is None:
            file = next(iter(sorted((opened.folder / "splits").glob("split_*.json"))), None)
            data = build_data(
                opened.cfg, opened.tokenizer, opened.model.geometry, opened.model.num_visual_tokens, split_file=file,
                write_split=False,
            )  # fmt: skip
            examples = askable(data.eval_examples)
        else:
            if prompt is None and opened.cfg.template == "chat":
                raise UserError(f"{opened.cfg.run_name} answers questions; give --prompt beside --image")
            turns = () if prompt is None else (Turn("user", (ImageSlot(0), "\n", prompt)),)
            own = Example(str(image), (typed(str(image)),), turns, file="input")
            _, root = colour_set(Path(folder), OTHERS)
            drawn = [ImageRef(str(root), p.name) for p in sorted(root.iterdir())]
            examples = [own, *(replace(own, id=ref.path, images=(ref,)) for ref in drawn)]
        found, checks = examine(teacher, examples, max_new_tokens)
    title = f"{opened.cfg.run_name}, step {opened.step}"
    shown = () if found is None else shown_of(title, found)
    facts = {"checkpoint": str(opened.checkpoint), "step": opened.step}
    return Examined(str(run), tuple(checks), shown, facts | {"look": None if found is None else asdict(found)})
