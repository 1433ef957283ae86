"""Scores of plain answer files against plain reference files, so that anyone can check the arithmetic of a report.

No model and no run is needed: ``beholder score vqa|pope|caption|instructions`` reads two JSON or JSONL files and calls
the functions that runs are scored with (`probes.vqa`, `probes.answers`, `probes.captions`, `probes.instruction`). Which
fields a file may have stands at `read_predictions` and `read_references`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.data.formats import BadRecord, turn_said
from beholder.data.questions import gqa_kind, plain_records
from beholder.evidence import Measurement
from beholder.probes import instruction, mean, measurement
from beholder.probes.answers import accuracy_rule, mean_share, pope, says_yes
from beholder.probes.caption_metrics import exact_match
from beholder.probes.captions import match_scores
from beholder.probes.vqa import vqa_accuracy
from beholder.terminal import Terminal
from beholder.types import UserError, printable

Kind = Literal["vqa", "pope", "caption", "instructions"]

MAX_CHARACTERS = 20_000
"""Of a text that is scored."""
MAX_TOLD = 10
"""Ids that an error names."""
_IDS = {
    "vqa": ("question_id", "id"), "pope": ("question_id", "id"), "caption": ("image_id", "id"),
    "instructions": ("question_id", "id"),
}  # fmt: skip
_TEXTS = ("answer", "prediction", "text", "caption", "response")
_INSTRUCTIONS = ("instruction", "question", "query", "prompt")
"""Where a reference may say what was asked."""
_REFERENCES = ("references", "reference")
"""As Hugging Face evaluate, sacrebleu and NLTK call what is right."""


@dataclass(frozen=True)
class Reference:
    """What is right for one id."""

    texts: tuple[str, ...]
    instruction: str = ""
    """What was asked; for ``instructions`` alone."""
    question_type: str = ""
    answer_type: str = ""


@dataclass(frozen=True)
class Score:
    """The scores of one file of answers."""

    kind: Kind
    predictions: str
    references: str
    n: int
    """Questions, or pictures."""
    measurements: list[Measurement] = field(default_factory=list)

    def get(self, name: str, stratum: str | None = None) -> Measurement | None:
        return next((m for m in self.measurements if m.name == name and m.stratum == stratum), None)

    def print(self, console: Console | None = None) -> None:
        """A table: value, 95 % interval and number of answers of every score; what to know about them below."""
        console = console or Terminal()
        table = Table(title=Text(printable(f"{self.predictions} against {self.references}")), title_justify="left")
        table.add_column("score", overflow="fold")
        for heading in ("value", "95 % interval", "n"):
            table.add_column(heading, justify="right")
        for m in self.measurements:
            name = m.name if m.stratum is None else f"  {m.by}: {m.stratum}"
            ends = "" if m.ci95 is None else " to ".join(_shown(end, m.unit) for end in m.ci95)
            table.add_row(Text(printable(name)), _shown(m.value, m.unit), ends, f"{m.n:,}")
        console.print(table)
        for caveat in dict.fromkeys(m.caveat for m in self.measurements if m.caveat and m.stratum is None):
            console.print(Text(f"· {caveat}"), soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        """Plain data: what was scored, and every measurement."""
        return {
            "kind": self.kind, "predictions": self.predictions, "references": self.references, "n": self.n,
            "measurements": [m.model_dump(mode="json") for m in self.measurements],
        }  # fmt: skip


def score_files(kind: Kind, predictions: str | Path, references: str | Path) -> Score:
    """Score answers against references: every reference needs exactly one answer, and every answer a reference.

    ``vqa``: official VQA accuracy, overall, by question type and by answer type, and the share that is the most
    frequent reference exactly. ``pope``: accuracy, precision, recall, F1 and yes-rate of yes/no answers. ``caption``:
    exact match, BLEU-1…4, ROUGE-L and CIDEr-D against one or more captions. ``instructions``: instruction following as
    `probes.instruction` defines it, and its parts. Raises UserError for a file that cannot be
    read, a record without id or text, and ids that are missing, unknown or there twice, naming them.
    """
    predictions, references = Path(predictions), Path(references)
    said, id_field = read_predictions(predictions, kind)
    right = read_references(references, kind, id_field)
    missing, extra = [id for id in right if id not in said], [id for id in said if id not in right]
    if missing or extra:
        wrong = [f"{len(missing)} of {len(right)} references have no answer ({_some(missing)})"] * bool(missing)
        wrong += [f"{len(extra)} of {len(said)} answers have no reference ({_some(extra)})"] * bool(extra)
        raise UserError(
            f"{predictions} does not answer {references}: {'; '.join(wrong)}. Ids are compared as text; score a part "
            "by giving a reference file of that part"
        )
    texts, given = [said[id] for id in right], list(right.values())
    for file, id, text in chain(
        ((predictions, id, said[id]) for id in right), ((references, id, t) for id, r in right.items() for t in r.texts)
    ):
        if len(text) > MAX_CHARACTERS:
            raise UserError(
                f"{file}: the text of id {_some([id[:80]])} has {len(text):,} characters, expected at most "
                f"{MAX_CHARACTERS:,}: scoring takes time that grows with the square; cut it"
            )
    scored = {"vqa": _vqa, "pope": _pope, "caption": _captions, "instructions": _instructions}[kind](texts, given)
    return Score(kind, str(predictions), str(references), len(texts), scored)


# ---------------------------------------------------------------------------------------------------------------
# Files


def read_predictions(path: Path, kind: Kind) -> tuple[dict[str, str], str]:
    """Id -> answer, and the field the ids were in.

    A JSON array (the result format of VQA and COCO) or JSONL of objects with an id (``question_id`` or ``id``; captions
    also ``image_id``) and a text under ``answer``, ``prediction``, ``text``, ``caption`` or ``response``.
    """
    records = list(_records(path))
    if not records:
        raise UserError(f"{path}: no answers in it, expected a JSON array or JSONL of {{question_id, answer}} or alike")
    id_field = next((name for name in _IDS[kind] if name in records[0][1]), _IDS[kind][-1])
    out: dict[str, str] = {}
    twice: list[str] = []
    for where, record in records:
        id = _id(record, (id_field,), where)
        text = next((record[name] for name in _TEXTS if name in record), None)
        if not isinstance(text, str):
            raise UserError(
                f"{where}: expected a string under one of {', '.join(_TEXTS)}, got {_what(text)} in the fields "
                f"{', '.join(record) or '(none)'}"
            )
        twice += [id] * (id in out)
        out[id] = text
    if twice:
        raise UserError(
            f"{path}: {len(twice)} ids are answered more than once ({_some(twice)}); expected one answer each"
        )
    return out, id_field


def read_references(path: Path, kind: Kind, id_field: str | None = None) -> dict[str, Reference]:
    """Id -> what is right, from one of these files:

    - a VQA annotation file (``annotations`` with ``question_id``, ``answers``, ``question_type``, ``answer_type``) or,
      for captions, COCO's (``annotations`` with ``image_id`` and ``caption``, one or more a picture);
    - a GQA question file, an object of questions by id;
    - a JSON array or JSONL of objects with an id and ``answers`` (texts, or objects with ``answer``), ``answer``,
      ``label``, ``captions``, ``caption``, ``references``, ``reference`` or ``messages`` (the assistant's last turn),
      and perhaps ``question_type`` and ``answer_type``. POPE's label files are of this shape. ``instructions``
      also needs what was asked, under ``instruction``, ``question``, ``query`` or ``prompt`` or in ``messages``, and
      takes ``response`` and ``output``.

    ``id_field``: where the answers have their ids; it goes first where a record has several.
    """
    names = list(dict.fromkeys([id_field or _IDS[kind][0], *_IDS[kind]]))
    out: dict[str, Reference] = {}
    twice: list[str] = []
    several = False
    for where, record in _records(path):
        container = kind == "caption" and "image_id" in record and isinstance(record.get("caption"), str)
        id = _id(record, ["image_id"] if container else names, where)
        found = _reference(record, kind, where)
        if id in out and container:  # COCO: a picture has five
            several = True
            found = Reference(out[id].texts + found.texts, found.instruction)
        elif id in out:
            twice.append(id)
        out[id] = found
    if twice:
        raise UserError(
            f"{path}: {len(twice)} ids are there more than once ({_some(twice)}); expected one reference each"
            + (", or captions under image_id" if several else "")
        )
    if not out:
        raise UserError(f"{path}: no references in it; expected an annotation file, or JSON or JSONL with an id each")
    return out


def _reference(record: Mapping[str, Any], kind: Kind, where: str) -> Reference:
    own = {
        "vqa": ("answers", "answer", "label", "multiple_choice_answer"), "pope": ("label", "answer", "answers"),
        "caption": ("captions", "caption", "answers", "answer"),
        "instructions": ("answers", "answer", "response", "output"),
    }[kind]  # fmt: skip
    order = (*own, *_REFERENCES)
    value = next((record[name] for name in order if name in record), None)
    turns = record.get("messages", record.get("conversations"))
    if value is None and isinstance(turns, list):
        value = _last_answer(turns)
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    found = [t.get("answer") if isinstance(t, dict) else t for t in listed]
    texts = tuple(t for t in found if isinstance(t, str))
    if not texts or len(texts) < len(found):
        raise UserError(
            f"{where}: expected what is right under one of {', '.join(order)} or messages (a text or a list of them), "
            f"got {_what(value)} in the fields {', '.join(record) or '(none)'}"
        )
    if kind == "pope" and says_yes(texts[0]) is None:
        raise UserError(f"{where}: the reference is {texts[0]!r}, expected yes or no; score other answers with vqa")
    kind_asked = gqa_kind(record["types"]) if isinstance(record.get("types"), dict) else record.get("question_type")
    instruction = _instruction(record, turns, where) if kind == "instructions" else ""
    return Reference(texts, instruction, _text_of(kind_asked), _text_of(record.get("answer_type")))


def _last_answer(turns: Sequence[Any]) -> str | None:
    role, text = _turn(turns, -1)
    return text if role == "assistant" else None


def _instruction(record: Mapping[str, Any], turns: object, where: str) -> str:
    value = next((record[name] for name in _INSTRUCTIONS if name in record), None)
    if value is None and isinstance(turns, list):
        role, text = _turn(turns, -2)
        value = text if role == "user" else None
    if not isinstance(value, str):
        raise UserError(
            f"{where}: expected what was asked under one of {', '.join(_INSTRUCTIONS)} or messages, got "
            f"{_what(value)} in the fields {', '.join(record) or '(none)'}; how an instruction is followed cannot be "
            "told without it"
        )
    return value.replace("<image>", " ").strip()


def _turn(turns: Sequence[Any], k: int) -> tuple[str, str | None]:
    try:
        return turn_said(turns[k], "a turn")
    except (BadRecord, IndexError):
        return "", None


def _text_of(value: object) -> str:
    return value if isinstance(value, str) else ""


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    expected = "a JSON array, an annotation file, or JSONL with an object a line"
    for where, record in plain_records(path, expected, ("annotations", "questions")).records:
        if not isinstance(record, dict):
            raise UserError(f"{where}: expected an object with an id and a text, got {_what(record)}")
        yield where, {name: value for name, value in record.items() if value is not None}


def _id(record: Mapping[str, Any], names: Sequence[str], where: str) -> str:
    value = next((record[name] for name in names if name in record), None)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UserError(
            f"{where}: expected a number or text under {' or '.join(names)}, got {_what(value)} in the fields "
            f"{', '.join(record) or '(none)'}"
        )
    return str(value)


def _what(value: object) -> str:
    return "nothing" if value is None else type(value).__name__


def _some(ids: Sequence[str]) -> str:
    return ", ".join(printable(id, one_line=True) for id in ids[:MAX_TOLD]) + (", …" if len(ids) > MAX_TOLD else "")


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic


def _vqa(texts: Sequence[str], given: Sequence[Reference]) -> list[Measurement]:
    accuracy = np.array([vqa_accuracy(text, r.texts) for text, r in zip(texts, given, strict=True)])
    exact = np.array(
        [exact_match(text, max(r.texts, key=r.texts.count)) for text, r in zip(texts, given, strict=True)], dtype=float
    )
    rule = accuracy_rule([r.texts for r in given])
    out: list[Measurement] = []

    def add(name: str, values: np.ndarray, caveat: str, by: str | None = None, stratum: str | None = None) -> None:
        value, ci = mean_share(values)
        out.append(measurement(
            name, value, unit="share", better="higher", n=len(values), ci95=ci, by=by, stratum=stratum, caveat=caveat,
        ))  # fmt: skip

    add("vqa.accuracy", accuracy, rule)
    for by, kinds in (("question", [r.question_type for r in given]), ("answer", [r.answer_type for r in given])):
        for kind in sorted({k for k in kinds if k}):
            add("vqa.accuracy", accuracy[[k == kind for k in kinds]], rule, by, kind)
    add("vqa.exact", exact, "the most frequent reference; case, spacing and closing punctuation ignored")
    return out


def _pope(texts: Sequence[str], given: Sequence[Reference]) -> list[Measurement]:
    return pope(texts, [says_yes(r.texts[0]) is True for r in given])


def _captions(texts: Sequence[str], given: Sequence[Reference]) -> list[Measurement]:
    return [
        measurement(f"caption.{name}", value, unit=unit, better="higher", n=len(texts), ci95=ci, caveat=caveat)
        for name, value, unit, ci, caveat in match_scores(texts, [r.texts for r in given])
    ]


def _instructions(texts: Sequence[str], given: Sequence[Reference]) -> list[Measurement]:
    references = [r.texts for r in given]
    judged = instruction.judge_all([r.instruction for r in given], references, texts)
    told = instruction.rule(references)
    out = [measurement(f"instruct.{name}", *mean(values), n=len(texts), caveat=told) for name, values in judged.items()]
    for by, kinds in (("question", [r.question_type for r in given]), ("answer", [r.answer_type for r in given])):
        for kind in sorted({k for k in kinds if k}):
            own = judged["score"][[k == kind for k in kinds]]
            out.append(measurement("instruct.score", *mean(own), n=len(own), by=by, stratum=kind, caveat=told))
    return out


def _shown(value: float, unit: str) -> str:
    return f"{100 * value:.2f} %" if unit == "share" else f"{value:.4f}"
