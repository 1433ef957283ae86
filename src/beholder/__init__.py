"""Beholder grows eyes on a language model, one proven stage at a time.

>>> from beholder import load
>>> load("outputs/quickstart/instruct").generate("a.png", "What colour is the shape?")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RunConfig", "UserError", "__version__", "load", "load_config", "run_stage"]

if TYPE_CHECKING:
    from beholder.config import RunConfig
    from beholder.config.file import load_config
    from beholder.stages import run_stage
    from beholder.types import UserError
    from beholder.use.vlm import load

_HOME = {
    "RunConfig": "beholder.config",
    "UserError": "beholder.types",
    "load": "beholder.use.vlm",
    "load_config": "beholder.config.file",
    "run_stage": "beholder.stages",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: ``import beholder`` stays quick, torch comes when it is needed."""
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'beholder' has no attribute {name!r}")
