"""The golden set: a few held-out samples, chosen once, captioned again and again during training.

The set is a JSONL file that outlives the run, so that captions of different steps and runs can be laid side by side.
Choosing, persisting and joining the set live here, and reading what a run wrote: `show_step` and `diff_steps` are what
``beholder golden show`` and ``beholder golden diff`` print. When to decode is decided by the stage.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.probes import collapse
from beholder.probes.caption_metrics import exact_match
from beholder.probes.categories import category
from beholder.probes.strata import questions
from beholder.runs import atomic_write
from beholder.types import Example, UserError

if TYPE_CHECKING:  # reading what a run wrote needs no model
    from beholder.probes.captions import CaptionRecord

MAX_TOLD = 20
"""Samples that an error names."""

Step = int | str
"""Optimizer steps done, or ``first`` or ``last`` for the earliest and latest that were captioned."""


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One line of the golden set file."""

    id: str
    bucket: str
    gt_text: str
    """`Example.answer_text`."""
    image_relpath: str
    label_len: int
    """Target tokens of the whole sample."""
    category: str = ""
    """`categories.category` of the question; empty in a set of captions."""
    prompt_text: str = ""
    """What the user asked last; empty in a set of captions."""


@dataclass(frozen=True, slots=True)
class GoldenCaption:
    """One line of ``qual/step_{n}_golden{m}.jsonl``."""

    id: str
    bucket: str
    gt_text: str
    pred_text: str
    image_relpath: str
    label_len: int
    pred_tokens_len: int
    hash: str
    """First 16 hex digits of sha256 over ``pred_text``: a quick diff between steps."""
    category: str = ""
    prompt_text: str = ""


OPTIONAL = ("category", "prompt_text")
"""Fields that only sets of questions have."""


def choose(buckets: Sequence[str], size: int, seed: int, categories: Sequence[str] | None = None) -> list[int]:
    """``size`` of the samples as indices into ``buckets``, balanced over them, as a pure function of the arguments.

    Every bucket gets the same number, the earlier ones one more where it does not divide; a bucket with too few gives
    its share to the others. Fewer than ``size`` samples: all of them. Buckets are ordered by name. With ``categories``
    (one a sample) the size is shared out over these first in the same way, then over the buckets within each.
    """
    if categories is not None:
        assert len(categories) == len(buckets), f"{len(categories)} categories, {len(buckets)} buckets"
        found: list[int] = []
        for pool, share in _shares(_pools(categories), size):
            found += [pool[k] for k in choose([buckets[i] for i in pool], share, seed)]
        return sorted(found)
    rng = np.random.default_rng(seed)
    pools = {name: [pool[k] for k in rng.permutation(len(pool))] for name, pool in _pools(buckets).items()}
    return sorted(index for pool, share in _shares(pools, size) for index in pool[:share])


def _pools(names: Sequence[str]) -> dict[str, list[int]]:
    pools: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        pools.setdefault(name, []).append(index)
    return dict(sorted(pools.items()))


def _shares(pools: Mapping[str, list[int]], size: int) -> list[tuple[list[int], int]]:
    """How many of each pool: one at a time to the pool that has given the fewest and has any left."""
    taken: dict[str, int] = dict.fromkeys(pools, 0)
    for _ in range(min(size, sum(map(len, pools.values())))):
        name = min((n for n in pools if taken[n] < len(pools[n])), key=lambda n: (taken[n], n))
        taken[name] += 1
    return [(pool, taken[name]) for name, pool in pools.items()]


def golden_set(
    path: Path,
    examples: Sequence[Example],
    *,
    buckets: Sequence[str],
    label_len: Sequence[int],
    size: int,
    seed: int,
    by_category: bool = False,
) -> list[tuple[int, GoldenItem]]:
    """The golden set as (index into ``examples``, item): read from ``path`` if it is there, else chosen and stored.

    ``examples`` are the held-out samples; ``buckets`` and ``label_len`` (target tokens) are aligned with them.
    ``by_category``: the samples are questions; the set is balanced over what they ask for (`categories`) before length,
    and says so. Raises UserError when the file is malformed or empty, or when one of its samples is not among them or
    reads differently now: the set would then test on training data or on other data.
    """
    assert len(examples) == len(buckets) == len(label_len), (len(examples), len(buckets), len(label_len))
    assert size > 0 and examples, "a golden set needs a size and held-out samples"
    if path.exists():
        return _match(path, load(path), examples)
    kinds = [category(asked(e)) for e in examples] if by_category else None
    chosen = choose(buckets, size, seed, kinds)
    items = [
        (index, describe(examples[index], buckets[index], int(label_len[index]), chats=by_category)) for index in chosen
    ]
    save(path, [item for _, item in items])
    return items


def save(path: Path, rows: Sequence[GoldenItem | GoldenCaption]) -> None:
    """Write JSONL in one step: a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    plain = [{k: v for k, v in asdict(row).items() if v != "" or k not in OPTIONAL} for row in rows]
    atomic_write(path, b"".join(orjson.dumps(row) + b"\n" for row in plain))


def load(path: Path) -> list[GoldenItem]:
    """Read a golden set file. Raises UserError naming file and line, and for a file without any sample."""
    items = [GoldenItem(**row) for row in _rows(path, GoldenItem)]
    if not items:
        raise UserError(
            f"{path}: no golden sample in it, expected one JSON object a line; delete the file to have it made again, "
            "or give another eval.golden_set_path"
        )
    return items


def load_captions(path: Path) -> list[GoldenCaption]:
    """Read the captions of one step. Raises UserError naming file and line."""
    return [GoldenCaption(**row) for row in _rows(path, GoldenCaption)]


def captions_path(qual: Path, step: int, size: int) -> Path:
    """``qual/step_{n}_golden{m}.jsonl``."""
    return qual / f"step_{step}_golden{size}.jsonl"


def join(items: Sequence[GoldenItem], records: Sequence[CaptionRecord]) -> list[GoldenCaption]:
    """The items with what the model wrote for them, in the items' order; an item without a record is left out."""
    waiting: dict[str, deque[CaptionRecord]] = {}
    for record in records:
        waiting.setdefault(record.id, deque()).append(record)
    rows = [
        _with(item, record.prediction, record.tokens_len)
        for item in items
        if (queue := waiting.get(item.id)) and (record := queue.popleft())
    ]
    unknown = sorted(id for id, queue in waiting.items() if queue)
    assert not unknown, f"captions of samples that are not in the golden set: {unknown}"
    return rows


def _with(item: GoldenItem, prediction: str, tokens_len: int) -> GoldenCaption:
    return GoldenCaption(
        id=item.id, bucket=item.bucket, gt_text=item.gt_text, pred_text=prediction,
        image_relpath=item.image_relpath, label_len=item.label_len, pred_tokens_len=tokens_len,
        hash=hashlib.sha256(prediction.encode("utf-8", "surrogatepass")).hexdigest()[:16],
        category=item.category, prompt_text=item.prompt_text,
    )  # fmt: skip


def describe(example: Example, bucket: str, label_len: int, *, chats: bool = False) -> GoldenItem:
    """The example as a line of the golden set file; ``chats``: with its question and the kind of it."""
    question = asked(example) if chats else ""
    return GoldenItem(
        id=example.id, bucket=bucket, gt_text=example.answer_text,
        image_relpath=", ".join(ref.path for ref in example.images), label_len=label_len,
        category=category(question) if chats else "", prompt_text=question,
    )  # fmt: skip


def asked(example: Example) -> str:
    """What the user said before the last answer, without images."""
    return (questions(example) or [""])[-1].strip()


def _match(path: Path, items: Sequence[GoldenItem], examples: Sequence[Example]) -> list[tuple[int, GoldenItem]]:
    by_key: dict[tuple[str, str, str], list[int]] = {}
    by_id: dict[str, list[tuple[str, str]]] = {}
    for index, example in enumerate(examples):
        now = describe(example, "", 0)
        by_key.setdefault(_key(now), []).append(index)
        by_id.setdefault(now.id, []).append((now.gt_text, now.image_relpath))
    found: list[tuple[int, GoldenItem]] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    lost: list[str] = []
    for item in items:
        places = by_key.get(_key(item))
        if places is None:
            lost.append(f"{item.id!r} ({_why(item, by_id.get(item.id, []))})")
            continue
        found.append((places[min(seen[_key(item)], len(places) - 1)], item))  # equal records in their order
        seen[_key(item)] += 1
    if lost:
        more = f" and {len(lost) - MAX_TOLD} more" if len(lost) > MAX_TOLD else ""
        raise UserError(
            f"{path}: {len(lost)} of {len(items)} golden samples do not match the held-out samples of this run: "
            f"{', '.join(lost[:MAX_TOLD])}{more}. An absent one may be trained on now. Use the data, seed and split of "
            "the run that made the file, or give another eval.golden_set_path"
        )
    return found


def _key(item: GoldenItem) -> tuple[str, str, str]:
    return item.id, item.gt_text, item.image_relpath


def _why(item: GoldenItem, same_id: Sequence[tuple[str, str]]) -> str:
    """How the item differs from the nearest held-out sample of its id, given as (text, image)."""
    if not same_id:
        return "absent"
    text, image = max(same_id, key=lambda pair: (pair[0] == item.gt_text) + (pair[1] == item.image_relpath))
    return " and ".join(["other text"] * (text != item.gt_text) + ["other image"] * (image != item.image_relpath))


# ---------------------------------------------------------------------------------------------------------------
# What a run wrote


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
    found = [(m, path) for path in qual.glob("step_*_golden*.jsonl") if (m := _NAME.fullmatch(path.name))]
    return [(step, path) for step, _, path in sorted((int(m[1]), int(m[2]), path) for m, path in found)]


def read_run(folder: str | Path) -> GoldenRun:
    """The captioned steps of a run folder.

    Where sets of several sizes were captioned (``beholder evaluate`` with another ``eval.golden_set_path``), it is the
    one with the most steps, of equally many the larger. Raises UserError when the folder has none.
    """
    folder = Path(folder)
    by_size: dict[int, dict[int, Path]] = {}
    for step, path in steps_of(folder / "qual"):
        match = _NAME.fullmatch(path.name)
        assert match is not None
        by_size.setdefault(int(match[2]), {})[step] = path
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
        console = console or Console()
        if self.changed:
            table = Table(title=_plain(f"{self.folder}: golden captions, step {self.step_before} → {self.step_after}"))
            table.add_column("sample", overflow="fold")
            table.add_column("reference", overflow="fold")
            table.add_column("[-only before-] {+only after+}", overflow="fold")
            for r in self.changed:
                table.add_row(_plain(r.before.id), _plain(r.before.gt_text), _marked(r))
            console.print(table)
        console.print(Text(f"step {self.step_before} → {self.step_after}: {self.summary}"))

    def to_json(self) -> str:
        """Indented JSON with the summary's numbers and every picture, changed or not."""
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
        told = {"run": self.folder, "steps": (self.step_before, self.step_after), **sums, **pairs, "rows": rows}
        return orjson.dumps(told, option=orjson.OPT_INDENT_2).decode()


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


def show_step(run_folder: str | Path, step: Step = "last", console: Console | None = None) -> list[GoldenCaption]:
    """Print reference and caption of every picture at a step, and the symptoms of collapse; gives the captions."""
    console = console or Console()
    run = read_run(run_folder)
    number = run.resolve(step)
    rows = run.captions(number)
    table = Table(title=_plain(f"{run.folder}: golden captions, step {number}"))
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
    return rows


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
    line = " ".join(text.split())
    return Text("".join(c if c.isprintable() else "\ufffd" for c in line) or "(empty)", style)


def _exact(captions: Sequence[GoldenCaption]) -> int:
    return sum(exact_match(c.pred_text, c.gt_text) for c in captions)


def _only(before: Sequence[str], after: Sequence[str]) -> list[tuple[str, str]]:
    first, second = Counter(before), Counter(after)
    return [(id, "before") for id in (first - second)] + [(id, "after") for id in (second - first)]


_NAME = re.compile(r"step_(\d+)_golden(\d+)\.jsonl")


def _rows(path: Path, kind: type[GoldenItem] | type[GoldenCaption]) -> Iterator[dict[str, Any]]:
    expected = {f.name: int if f.type == "int" else str for f in fields(kind)}
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e}); expected a JSONL file") from e
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as e:
            raise UserError(f"{path}:{number}: not valid JSON ({e}); delete the file to have it made again") from e
        got = {key: type(value) for key, value in row.items()} if isinstance(row, dict) else None
        if got is None or got | {name: str for name in OPTIONAL if name not in got} != expected:
            raise UserError(
                f"{path}:{number}: expected the fields {_named(expected)}, "
                f"got {type(row).__name__ if got is None else _named(got)}; delete the file to have it made again"
            )
        yield row


def _named(fields: Mapping[str, type]) -> str:
    return ", ".join(f"{name} ({kind.__name__})" for name, kind in fields.items())
