"""Whether a run that goes on is the same run: settings that may change, and what is behind them that may not.

What a setting decides is said at its own field (`config.section.decides`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from beholder.config import RunConfig, decided_by
from beholder.config.file import flatten
from beholder.runs import to_json
from beholder.train.checkpoint import TRAINER
from beholder.types import UserError

ANOTHER = "Use another step of the same run."
COMPUTED = "type of the language model's rotary frequencies and other computed buffers"
"""Among the fingerprints. Checkpoints from before it was there computed them in the type of the weights."""


def may_change(path: str, *, same_data: bool) -> bool:
    """Whether a setting may differ between an interrupted run and its resumption: none that does moves a weight.

    ``same_data``: the data's fingerprints are equal, so paths of data may differ: the files were moved, not changed.
    """
    decided = decided_by(RunConfig, path)
    if decided & {"weights", "data"} or ("place" in decided and path.startswith("data.") and not same_data):
        return False
    return bool(decided & {"measuring", "watching", "speed", "place", "start", "run"})


def check_same_config(
    saved: Mapping[str, Any], current: Mapping[str, Any], *, same_data: bool = False
) -> list[tuple[str, Any, Any]]:
    """`UserError` listing every setting that may not change on resume and did (old → new).

    Both are resolved configs as plain dicts (``RunConfig.model_dump(mode="json")``). ``same_data``: the data's
    fingerprints were compared and are equal, so paths may differ. Gives the allowed changes: (field, old, new).
    """
    then, now = flatten(json.loads(to_json(dict(saved)))), flatten(json.loads(to_json(dict(current))))
    changed = [(k, then.get(k, _ABSENT), now.get(k, _ABSENT)) for k in sorted(then.keys() | now.keys())]
    changed = [(k, a, b) for k, a, b in changed if a != b]
    refused = [c for c in changed if not may_change(c[0], same_data=same_data)]
    if refused:
        raise UserError(
            "this run cannot go on with another config; these settings changed since the checkpoint:\n  "
            + "\n  ".join(f"{k}: {shown(a)} → {shown(b)}" for k, a, b in refused)
            + "\nPut them back to resume exactly, or start a new run: another run_name, or --resume never in an empty "
            "folder (model.connector.load_checkpoint can name this run to start from its connector)."
        )
    return changed


def check_same_fingerprints(saved: Mapping[str, str], current: Mapping[str, str]) -> None:
    """`UserError` naming each part (data, tower, language model, …) whose content is not that of the checkpoint."""
    changed = [k for k in saved.keys() & current.keys() if saved[k] != current[k]]
    if odd := [k for k in changed if not isinstance(saved[k], str)]:
        raise UserError(f"{TRAINER}: the fingerprints of {', '.join(odd)} are no text. {ANOTHER}")
    if changed:
        raise UserError(
            "this run cannot go on: what is behind these parts changed since the checkpoint:\n  "
            + "\n  ".join(f"{k}: {saved[k][:12]} → {current[k][:12]}" for k in sorted(changed))
            + "\nPut the original files back, or start a new run in another folder."
        )


class _Absent:
    def __repr__(self) -> str:
        return "(not a setting)"


_ABSENT = _Absent()


def shown(value: Any) -> str:
    return repr(value) if isinstance(value, _Absent) else json.dumps(value, ensure_ascii=False)
