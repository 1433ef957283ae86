"""The door through which everything goes that is printed for a person."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.segment import Segment

from beholder.types import printable


class Terminal(Console):
    """A console on which no text has power over the terminal, whoever wrote it: see `types.printable`.

    Colours and cursor movements are the console's own; what a text brings of them is shown as an escape.
    """

    def __init__(self, *, highlight: bool = False, emoji: bool = False, **options: Any) -> None:
        super().__init__(highlight=highlight, emoji=emoji, **options)
        self.push_render_hook(_Door())


class _Door(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(renderable) for renderable in renderables]


class _Shown:
    def __init__(self, what: ConsoleRenderable) -> None:
        self.what = what

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self.what, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
