"""A template of this package or of another filled in, with every text escaped and made visible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined

from beholder.types import printable


def page(template: str, *, folder: Path | None = None, **facts: Any) -> str:
    """A page from a template; ``folder`` is searched for it before this one.

    Every text in it is escaped, and control characters are made visible.
    """
    here = Path(__file__).parent
    environment = Environment(
        loader=ChoiceLoader([FileSystemLoader(f) for f in (folder, here) if f is not None]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize,
    )  # fmt: skip
    return environment.get_template(template).render(**facts)


def _finalize(value: Any) -> Any:
    # Every text that a template prints passes here; Markup (our own SVG) is a str subclass and passes unchanged.
    return printable(value) if type(value) is str else value
