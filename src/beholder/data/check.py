"""What can be said of record files before a run: counts, lengths, rejects, duplicates.

Uses the same sources and the same hygiene as training, so what it accepts is what a run gets. Loading a tokenizer or a
config is `prepare.check`'s part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import orjson
from rich.console import Console
from rich.table import Table
from rich.text import Text

from beholder.config import STAGES, HygieneConfig, HygieneLimits, SourceConfig, Stage
from beholder.data.hygiene import HygieneReport, Progress, apply_hygiene
from beholder.data.images import ImageFacts
from beholder.data.sources import Records, Reject, instructs, open_sources
from beholder.types import printable

EXAMPLES_PER_REASON = 3


@dataclass
class CheckReport:
    """What was found. ``rejects`` is complete; printing shows the first of each reason."""

    files: list[str]
    fingerprint: str
    records: int
    """All records of the files, bad ones included."""
    accepted: int
    images: int
    """Image references of the structurally good records."""
    sources: dict[str, dict[str, int]]
    """Source name → records and accepted."""
    unit: Literal["tokens", "words"]
    length: dict[str, float]
    """min, median, mean, p95, max of the target length, end token not counted"""
    length_histogram: list[tuple[int, int, int]]
    """(from, to inclusive, records)"""
    rejects_by_reason: dict[str, int]
    rejects: list[Reject]
    duplicate_captions: dict[str, int]
    """exact / near: captions, or whole conversations about an image, that repeat an earlier one"""
    duplicate_ids: int
    """Records whose id an earlier record has. Allowed (LLaVA's instruction data does it), worth knowing."""
    duplicate_images: int | None = None
    """Image files whose bytes an earlier, different file has; None: images were not read"""
    image_sizes: dict[str, Any] | None = None
    """min, median and max of width and height, megapixels, and counts per format; None: images were not read"""
    inserted_markers: int = 0
    """Records with images and no place for them, which get them in front of their first user turn"""
    absent_images: int = 0
    """Records whose words name an image that they do not have, such as "image 5" of three"""
    layouts: dict[str, int] = field(default_factory=dict)
    """What the files were read as, container and shape, and how many good records of each"""
    fruitless: list[str] = field(default_factory=list)
    """Files from which nothing was accepted"""
    chat: bool = False
    """Held to the rules of stage instruct: the user speaks first, at least one image, no empty answer"""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Plain data, every reject included."""
        return asdict(self)

    def write_rejects(self, path: str | Path) -> None:
        """The reject log: one JSON object a line."""
        with open(path, "wb") as file:
            for reject in self.rejects:
                file.write(orjson.dumps(asdict(reject)) + b"\n")

    def print(self, console: Console) -> None:
        """Tables for a person. Text from the data is printed literally, never as markup."""
        console.print(Text("read as " + ", ".join(f"{name} ({n:,})" for name, n in self.layouts.items())))
        console.print(f"[bold]{self.accepted:,} of {self.records:,} records accepted[/], {self.images:,} images, "
                      f"{len(self.files)} file(s), fingerprint {self.fingerprint[:12]}")  # fmt: skip
        table = _table("sources", "source", "records", "accepted")
        for name, n in self.sources.items():
            table.add_row(Text(printable(name, one_line=True)), f"{n['records']:,}", f"{n['accepted']:,}")
        console.print(table)
        if self.length:
            console.print(f"target length in {self.unit}: " + ", ".join(f"{k} {v:g}" for k, v in self.length.items()))
            most = max(n for _, _, n in self.length_histogram)
            table = _table("lengths", self.unit, "records", "")
            for low, high, n in self.length_histogram:
                table.add_row(f"{low}-{high}" if high > low else str(low), f"{n:,}", "█" * round(40 * n / most))
            console.print(table)
        exact, near = self.duplicate_captions["exact"], self.duplicate_captions["near"]
        what = "conversations" if self.chat else "captions"
        console.print(f"{what} that repeat an earlier one: {exact:,} exactly, {near:,} nearly; "
                      f"repeated ids: {self.duplicate_ids:,}")  # fmt: skip
        if self.inserted_markers:
            console.print(f"records without a marker, which get their images at their start: {self.inserted_markers:,}")
        if self.absent_images:
            console.print(f"[bold]warning[/]: {self.absent_images:,} records name an image that they do not have, "
                          "such as “image 5” of three")  # fmt: skip
        if self.image_sizes is not None:
            console.print(f"images that are copies of another: {self.duplicate_images:,}")
            for name, value in self.image_sizes.items():
                console.print(Text(f"image {name}: {value}"))
        if self.rejects:
            table = _table("rejects", "reason", "records", "first")
            for reason, n in self.rejects_by_reason.items():
                first = [r for r in self.rejects if r.reason == reason][:EXAMPLES_PER_REASON]
                shown = "\n".join(
                    printable(f"{r.file}: record {r.row} (id {r.id}): {r.detail}", one_line=True) for r in first
                )
                table.add_row(reason, f"{n:,}", Text(shown))
            console.print(table)
        for note in self.notes:
            console.print(Text(f"note: {note}"))


def check_data(
    sources: Sequence[SourceConfig],
    tokenizer: Any = None,
    *,
    hygiene: HygieneLimits | None = None,
    image_token: str = "<image>",
    max_images: int | None = None,
    stage: Stage | None = None,
    verify_images: Literal["none", "exists", "decode"] = "exists",
    max_megapixels: float = 50.0,
    progress: Progress | None = None,
) -> CheckReport:
    """Open ``sources``, vet every record, and report. Bad records and images are counted, never raised.

    ``stage``: whose rules records are held to; by default those of a stage of dialogues when all sources are made for
    such a one (`sources.instructs`), else of one of captions, and a note says so. ``hygiene`` and
    ``max_images`` default to that stage's own. ``tokenizer`` None: lengths are in words and the length limits are not
    applied (a note says so). ``verify_images`` decode also reads every image, for sizes and for copies. Raises
    `UserError` where a file as a whole cannot be read.
    """
    guessed = stage is None
    if stage is None:
        dialogues = all(map(instructs, sources))
        stage = next(s for s in STAGES.values() if s.dialogues == dialogues)
    cfg = hygiene or HygieneConfig().limits(stage.hygiene)
    most = max_images or stage.max_images
    records = open_sources(sources, image_token=image_token, max_images=most, on_reject="collect", chat=stage.dialogues)
    vetted = apply_hygiene(
        records, tokenizer, cfg, verify_images=verify_images, max_megapixels=max_megapixels, on_bad_image="skip",
        progress=progress,
    )  # fmt: skip
    rejects = [*records.rejects, *vetted.rejects]
    facts = vetted.image_facts
    notes = []
    if guessed:
        kinds = ", ".join(records.layouts)
        others = " or ".join(name for name in STAGES if name != stage.name)
        notes.append(
            f"records of {kinds} are held to the rules of stage {stage.name}; for the other's say --stage {others}"
        )
    if tokenizer is None:
        notes.append(f"no tokenizer: lengths are in words, and the limits of {cfg.told_limits} tokens were not applied")
    if verify_images == "none":
        notes.append("images were not looked for")
    elif verify_images == "exists":
        notes.append("images were looked for, not decoded")
    return CheckReport(
        files=records.files,
        fingerprint=records.fingerprint,
        records=len(records) + len(records.rejects),
        accepted=len(vetted.accepted),
        images=records.num_images,
        sources=_per_source(records, vetted),
        unit=vetted.unit,
        length=_spread(vetted.target_tokens),
        length_histogram=vetted.length_histogram,
        rejects_by_reason=dict(Counter(r.reason for r in rejects).most_common()),
        rejects=rejects,
        duplicate_captions=vetted.duplicates,
        duplicate_ids=len(records) - len(set(records.ids())),
        duplicate_images=None if facts is None else len(facts) - len({f.sha256 for f in facts}),
        image_sizes=None if facts is None else _image_sizes(facts),
        inserted_markers=records.inserted_markers,
        absent_images=records.absent_images,
        layouts=records.layouts,
        fruitless=_fruitless(records, vetted),
        chat=stage.dialogues,
        notes=notes,
    )


def _fruitless(records: Records, vetted: HygieneReport) -> list[str]:
    lost = Counter(reject.file for reject in vetted.rejects)
    return [path for path, (good, _) in records.num_of.items() if good == lost[path]]


def _per_source(records: Records, vetted: HygieneReport) -> dict[str, dict[str, int]]:
    num = len(records.source_names)
    found = np.bincount(records.source_ids, minlength=num).tolist()
    kept = np.bincount(records.source_ids[vetted.accepted], minlength=num).tolist()
    return {
        name: {"records": f, "accepted": k} for name, f, k in zip(records.source_names, found, kept, strict=True)
    }  # fmt: skip


def _spread(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    facts = {"min": values.min(), "median": np.median(values), "mean": values.mean(),
             "p95": np.percentile(values, 95), "max": values.max()}  # fmt: skip
    return {name: round(float(value), 3) for name, value in facts.items()}


def _image_sizes(facts: Sequence[ImageFacts]) -> dict[str, Any]:
    pixels = np.array([(f.width, f.height) for f in facts], np.float64).reshape(-1, 2)
    return {
        "width": _spread(pixels[:, 0]), "height": _spread(pixels[:, 1]), "megapixels": _spread(pixels.prod(1) / 1e6),
        "formats": dict(Counter(f.format for f in facts).most_common()),
    }  # fmt: skip


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column in ("records", "accepted") else "left")
    return table
