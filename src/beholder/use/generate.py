"""``beholder generate RUN``: what a run says about images, or its answers to a file of questions.

In Python, `beholder.load` keeps the model for the next question; here it is loaded, asked and let go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from beholder.config import GREEDY, GenerateConfig
from beholder.types import UserError, printable
from beholder.use.answer_file import answer_file, read_questions
from beholder.use.vlm import Request, load


@dataclass(frozen=True)
class Said:
    """What the model said, or what became of a file of questions: for a person, and as plain data."""

    text: str
    facts: dict[str, Any]

    def print(self, console: Console) -> None:
        console.file.write(f"{printable(self.text)}\n")  # not wrapped, no tab expanded, never markup

    def to_json(self) -> dict[str, Any]:
        return self.facts


def generate(
    run: str | Path,
    images: Sequence[Path] = (),
    prompt: str | None = None,
    *,
    questions: Path | None = None,
    out: Path | None = None,
    image_root: Path | None = None,
    more_image_roots: Sequence[Path] = (),
    image_pattern: str | None = None,
    batch_size: int = 8,
    how: GenerateConfig = GREEDY,
    seed: int = 0,
    device: str = "auto",
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Said:
    """What ``run`` says about ``images``, seen together, or its answers to the ``questions`` of a file, into ``out``.

    ``questions`` are answered greedily and have images of their own, in ``image_root`` (or, through symlinks, in
    ``more_image_roots``): see `answer_file`. Raises
    `UserError` for settings of one kind given with the other, before anything is loaded.
    """
    if questions is None:
        if not images:
            raise UserError("give --image FILE, or many questions with --from FILE --out FILE")
        if out or image_root or image_pattern:
            raise UserError("--out, --image-root and --image-pattern belong to --from FILE")
        text = load(run, device=device, overrides=overrides).answers([Request(prompt, images)], how, seed)[0]
        return Said(text, {"answer": text})
    if out is None:
        raise UserError("--from needs --out FILE for the answers")
    if images or how.temperature > 0:
        raise UserError("--from has its own images and answers greedily; remove --image and --temperature")
    asked = read_questions(questions, image_root, more_image_roots, prompt=prompt, image_pattern=image_pattern)
    vlm = load(run, device=device, overrides=overrides)
    new = answer_file(vlm, asked, out, batch_size=batch_size, how=how, progress=progress)
    before = len(asked) - new
    text = f"{new:,} questions answered, {before:,} were before; see {out}"
    return Said(text, {"answered": new, "before": before, "out": str(out)})
