"""Runs as models of lmms-eval: ``python -m lmms_eval --model beholder --model_args pretrained=RUN --tasks …``.

lmms-eval finds `manifest` through the entry-point group ``lmms_eval.models``; the classes are in `model`, which is
imported once one of them is asked for. docs/evaluate-elsewhere.md has the commands.
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers: a class for its simple tasks and one for those with messages."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    here = f"{__name__}.model"
    return ModelManifest("beholder", simple_class_path=f"{here}.Beholder", chat_class_path=f"{here}.BeholderChat")
