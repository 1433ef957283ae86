"""The golden set over the steps of a run: what was written at each, and what changed between two."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.probes import collapse
from beholder.probes.caption_metrics import exact_match
from beholder.probes.golden import MAX_TOLD, GoldenCaption, load_captions
from beholder.terminal import Terminal
from beholder.types import UserError, printable

Step = int | str
"""Optimizer steps done, or ``first`` or ``last`` for the earliest and latest that were captioned."""


@dataclass(frozen=True, slots=True)
class GoldenRun:
    """The captioned steps of a run."""

    folder: Path
    files: Mapping[int, Path]
    """By step, ascending; all of one golden set size."""

    def resolve(self, step: Step) -> int:
        """``first``, ``last`` or a number as the step it names. Raises UserError naming the steps there are."""
        steps = list(self.files)
        if step in ("first", "last"):
            return steps[0] if step == "first" else steps[-1]
        number = int(step) if isinstance(step, int) or re.fullmatch(r"\d+", step) else None
        if number is None or number not in self.files:
            shown = ", ".join(map(str, steps[:MAX_TOLD])) + (f", … {steps[-1]}" if len(steps) > MAX_TOLD else "")
            raise UserError(
                f"{self.folder}: no golden captions of step {step!r}; there are steps {shown} (or say first, last)"
            )
        return number

    def captions(self, step: Step) -> list[GoldenCaption]:
        """The captions of a step. Raises UserError for an unknown step and a damaged or empty file."""
        path = self.files[self.resolve(step)]
        rows = load_captions(path)
        if not rows:
            raise UserError(f"{path}: no caption in it; caption again with beholder evaluate {self.folder}")
        return rows


def steps_of(qual: Path) -> list[tuple[int, Path]]:
    """The golden caption files in a run's ``qual`` folder with their steps, ascending; none when there is no folder."""
    return [(step, path) for step, _, path in _files(qual)]


def _files(qual: Path) -> list[tuple[int, int, Path]]:
    """(step, size of the set, file), ascending."""
    return sorted((int(m[1]), int(m[2]), path) for path in qual.glob("*") if (m := _NAME.fullmatch(path.name)))


def read_run(folder: str | Path) -> GoldenRun:
    """The captioned steps of a run folder.

    Where sets of several sizes were captioned (``beholder evaluate`` with another ``eval.golden_set_path``), it is the
    one with the most steps, of equally many the larger. Raises UserError when the folder has none.
    """
    folder = Path(folder)
    by_size: dict[int, dict[int, Path]] = {}
    for step, size, path in _files(folder / "qual"):
        by_size.setdefault(size, {})[step] = path
    if not by_size:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; give the output_dir of a run")
        raise UserError(
            f"{folder}: no golden captions in its qual/ folder; a run writes them when eval.golden_size is not 0 and "
            "eval.run_golden_every is not never, at each save by default"
        )
    size = max(by_size, key=lambda size: (len(by_size[size]), size))
    return GoldenRun(folder, by_size[size])


@dataclass(frozen=True, slots=True)
class GoldenStep:
    """What was written for the golden set at one step."""

    folder: str
    step: int
    rows: list[GoldenCaption]

    def print(self, console: Console | None = None) -> None:
        """Reference and caption of every picture, and the symptoms of collapse."""
        console = console or Terminal()
        rows = self.rows
        table = Table(title=_plain(f"{self.folder}: golden captions, step {self.step}"))
        chats = any(r.category or r.prompt_text for r in rows)
        kinds = ("category", "question") if chats else ()
        for name in ("sample", "bucket", *kinds, "reference", "answer" if chats else "caption"):
            table.add_column(name, overflow="fold")
        table.add_column("exact")
        for r in rows:
            exact = Text("yes", "green") if exact_match(r.pred_text, r.gt_text) else Text("no", "red")
            kind = (_plain(r.category), _plain(r.prompt_text)) if chats else ()
            table.add_row(_plain(r.id), _plain(r.bucket), *kind, _plain(r.gt_text), _plain(r.pred_text), exact)
        console.print(table)
        found = collapse.symptoms([r.pred_text for r in rows], [r.gt_text for r in rows], ids=[r.id for r in rows])
        console.print(Text(f"exact matches {_exact(rows)} of {len(rows)}"))
        for s in found:
            low, high = s.ci95
            ids = ": " + ", ".join(s.ids[:5]) + (", …" if s.count > 5 else "") if s.count else ""
            told = f"{s.name} {s.count} of {s.n} ({s.share:.0%}, 95 % interval {low:.0%} to {high:.0%}){ids}"
            console.print(_plain(told, "yellow" if s.count else ""))

    def to_json(self) -> list[dict[str, Any]]:
        """Every picture as plain data."""
        return [asdict(row) for row in self.rows]


@dataclass(frozen=True, slots=True)
class GoldenChange:
    """One picture at two steps."""

    before: GoldenCaption
    after: GoldenCaption
    status: Literal["same", "changed"]
    removed: tuple[str, ...]
    """Words of the earlier caption that the later one does not have in that place."""
    added: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GoldenDiff:
    """The golden set at two steps of a run, picture by picture."""

    folder: str
    step_before: int
    step_after: int
    rows: tuple[GoldenChange, ...]

    @property
    def changed(self) -> list[GoldenChange]:
        return [r for r in self.rows if r.status == "changed"]

    @property
    def exact(self) -> tuple[int, int]:
        """Captions that are the reference (up to case, spacing and closing punctuation), before and after."""
        return _exact([r.before for r in self.rows]), _exact([r.after for r in self.rows])

    @property
    def near_identical(self) -> tuple[int, int]:
        """Size of the largest group of near-identical captions (`collapse.near_identical`), before and after."""
        before, after = [r.before.pred_text for r in self.rows], [r.after.pred_text for r in self.rows]
        return len(collapse.near_identical(before)), len(collapse.near_identical(after))

    @property
    def summary(self) -> str:
        """``changed 5 of 24 · exact matches 20 → 22 · near-identical captions 3 → 2 (references 2)``."""
        (exact, exact_after), (near, near_after) = self.exact, self.near_identical
        references = len(collapse.near_identical([r.before.gt_text for r in self.rows]))
        return (
            f"changed {len(self.changed)} of {len(self.rows)} · exact matches {exact} → {exact_after} · near-identical "
            f"captions {near} → {near_after} (references {references})"
        )

    def print(self, console: Console | None = None) -> None:
        """Every picture whose caption changed, with the words that did; the others are only counted."""
        console = console or Terminal()
        if self.changed:
            table = Table(title=_plain(f"{self.folder}: golden captions, step {self.step_before} → {self.step_after}"))
            table.add_column("sample", overflow="fold")
            table.add_column("reference", overflow="fold")
            table.add_column("[-only before-] {+only after+}", overflow="fold")
            for r in self.changed:
                table.add_row(_plain(r.before.id), _plain(r.before.gt_text), _marked(r))
            console.print(table)
        console.print(Text(f"step {self.step_before} → {self.step_after}: {self.summary}"))

    def to_json(self) -> dict[str, Any]:
        """The summary's numbers and every picture, changed or not, as plain data."""
        rows = [
            {
                "id": r.before.id, "bucket": r.before.bucket, "image": r.before.image_relpath,
                "reference": r.before.gt_text, "status": r.status, "before": r.before.pred_text,
                "after": r.after.pred_text, "removed": r.removed, "added": r.added,
            }
            for r in self.rows
        ]  # fmt: skip
        sums = {"pictures": len(rows), "changed": len(self.changed)}
        pairs = {"exact_matches": self.exact, "near_identical": self.near_identical}
        return {"run": self.folder, "steps": (self.step_before, self.step_after), **sums, **pairs, "rows": rows}


def diff(before: Sequence[GoldenCaption], after: Sequence[GoldenCaption]) -> list[GoldenChange]:
    """Picture by picture what changed between two steps. Raises UserError when they caption different sets."""
    ids, ids_after = [c.id for c in before], [c.id for c in after]
    if ids != ids_after:
        only = [f"{id!r} only {when}" for id, when in _only(ids, ids_after)] or ["the order differs"]
        raise UserError(
            f"the two files caption different golden sets ({', '.join(only[:MAX_TOLD])}); compare steps of the same set"
        )
    return [_change(a, b) for a, b in zip(before, after, strict=True)]


def diff_steps(run_folder: str | Path, step_a: Step, step_b: Step) -> GoldenDiff:
    """What changed in a run's golden captions from step ``step_a`` to ``step_b`` (numbers, ``first`` or ``last``)."""
    run = read_run(run_folder)
    a, b = run.resolve(step_a), run.resolve(step_b)
    return GoldenDiff(str(run.folder), a, b, tuple(diff(run.captions(a), run.captions(b))))


def show_step(run_folder: str | Path, step: Step = "last") -> GoldenStep:
    """A run's golden captions at a step (a number, ``first`` or ``last``)."""
    run = read_run(run_folder)
    number = run.resolve(step)
    return GoldenStep(str(run.folder), number, run.captions(number))


def _change(before: GoldenCaption, after: GoldenCaption) -> GoldenChange:
    pieces = _pieces(before.pred_text, after.pred_text)
    removed, added = (tuple(word for mark, word in pieces if mark == kind) for kind in "-+")
    return GoldenChange(before, after, "same" if before.pred_text == after.pred_text else "changed", removed, added)


def _pieces(before: str, after: str) -> list[tuple[str, str]]:
    """The words of both texts in order, each in both (``" "``), only before (``-``) or only after (``+``)."""
    old, new = before.split(), after.split()
    pieces: list[tuple[str, str]] = []
    for kind, i, j, k, m in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces += [(" ", word) for word in old[i:j]]
        else:
            pieces += [("-", word) for word in old[i:j]] + [("+", word) for word in new[k:m]]
    return pieces


def _marked(row: GoldenChange) -> Text:
    """Both captions in one line. Brackets as well as colours: a terminal may have none."""
    if not row.removed and not row.added:
        return _plain(row.after.pred_text).append(" (spacing changed)", "dim")
    forms = {"-": ("[-{}-]", "red"), "+": ("{{+{}+}}", "green"), " ": ("{}", "")}
    words = [
        _plain(forms[mark][0].format(word), forms[mark][1])
        for mark, word in _pieces(row.before.pred_text, row.after.pred_text)
    ]
    if not row.before.pred_text.split() or not row.after.pred_text.split():
        words.insert(0, Text("(was empty)" if row.after.pred_text.split() else "(now empty)", "dim"))
    return Text(" ").join(words)


def _plain(text: str, style: str = "") -> Text:
    """Model output on a terminal: never markup, and no control character reaches it."""
    return Text(printable(" ".join(text.split())) or "(empty)", style)


def _exact(captions: Sequence[GoldenCaption]) -> int:
    return sum(exact_match(c.pred_text, c.gt_text) for c in captions)


def _only(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    first, second = Counter(before), Counter(after)
    return [(id, "before") for id in (first - second)] + [(id, "after") for id in (second - first)]


_NAME = re.compile(r"step_(\d+)_golden(\d+)\.jsonl")
