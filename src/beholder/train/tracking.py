"""Where a run's numbers go beside ``metrics.jsonl``: TensorBoard, W&B, trackio, MLflow, those that the config asks for.

``metrics.jsonl`` is the run's memory, from which it is judged and goes on; a tracker only listens to it
(`RunDir.listeners`) and is told the final measurements. So one that fails is switched off, and the run goes on.
"""

from __future__ import annotations

import io
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from beholder.types import UserError

GUIDE: Final[dict[str, tuple[str, ...]]] = {
    "total_loss": ("loss",),
    "sft_loss": ("sft_loss",),
    "distill_loss": ("distill_loss",),
    "teacher_kl_div": ("teacher_kl", "teacher.kl"),
    "learning_rate": ("lr.language", "lr.lora", "lr.connector", "lr.vision"),
    "vqa_accuracy": ("vqa.accuracy", "answer.accuracy.correct"),
    "instruct_score": ("instruct.score.correct",),
}
"""The distillation guide's names, each for the first of ours that is there; everything else keeps its own name."""

_NESTED: Final = {"monitors": "", "candidate": "candidate."}
"""What holds numbers inside a line of the log, and what is put before their names."""


# ---------------------------------------------------------------------------------------------------------------
# The trackers


@dataclass(frozen=True, slots=True)
class Opening:
    """What a tracker is opened for."""

    folder: Path
    """The run's."""
    name: str
    step: int = 0
    """Steps done: more than 0 when the run goes on."""
    known: str | None = None
    """`Writer.id` of the part before, when the run goes on."""


class Writer(Protocol):
    """One open tracker. Whatever it raises switches it off."""

    id: str
    """What the tracker calls the run, for the next part of it; empty where the folder says it all."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self, done: bool) -> None:
        """``done``: the run has come to its evidence; else it failed, or goes on another time."""
        ...


class _TensorBoard:
    def __init__(self, o: Opening) -> None:
        self.id = ""
        module = import_module("torch.utils.tensorboard")
        # What an earlier part logged of steps that are made again is hidden.
        self._writer = module.SummaryWriter(str(o.folder / "tensorboard"), purge_step=o.step + 1 if o.step else 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run has what metrics.jsonl has

    def close(self, done: bool) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, o: Opening) -> None:
        wandb = import_module("wandb")
        quiet = {
            "console": "off", "silent": True, "disable_git": True, "save_code": False, "x_disable_meta": True,
            "x_disable_stats": True, "x_disable_machine_info": True,
        }  # fmt: skip
        known = {name: value for name, value in quiet.items() if name in wandb.Settings.model_fields}
        given = os.environ.get
        self._run = wandb.init(
            project=given("WANDB_PROJECT", "beholder"), name=o.name, id=o.known, resume="allow", reinit="create_new",
            mode=given("WANDB_MODE", "offline"), dir=given("WANDB_DIR", str(o.folder)),
            settings=wandb.Settings(**known),
        )  # fmt: skip
        self._run.define_metric("*", step_metric="step")  # its own may not go back, to the step of the best checkpoint
        self.id = str(self._run.id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class _Trackio:
    def __init__(self, o: Opening) -> None:
        with redirect_stdout(io.StringIO()):
            self._run = import_module("trackio").init(
                project=os.environ.get("TRACKIO_PROJECT", "beholder"), name=o.known or o.name,
                resume="never" if o.known is None else "allow", embed=False, auto_log_gpu=False, auto_log_cpu=False,
            )  # fmt: skip
        self.id = str(self._run.name)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, done: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self._run.finish()


class _MLflow:
    def __init__(self, o: Opening) -> None:
        for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_ALLOW_FILE_STORE"):  # it refuses local files otherwise
            os.environ.setdefault(name, "true")
        mlflow = import_module("mlflow")
        self._metric = import_module("mlflow.entities").Metric
        local = (o.folder / "mlruns").resolve().as_uri()
        self._client = client = mlflow.MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or local)
        if o.known is not None:
            self.id = o.known
            client.update_run(self.id, status="RUNNING")
            return
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "beholder")
        found = client.get_experiment_by_name(experiment)
        number = client.create_experiment(experiment) if found is None else found.experiment_id
        self.id = str(client.create_run(number, run_name=o.name).info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        rows = [self._metric(_for_mlflow(name), value, now, step) for name, value in values.items()]
        for k in range(0, len(rows), 1000):  # its largest batch
            self._client.log_batch(self.id, rows[k : k + 1000])

    def close(self, done: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if done else "KILLED")


def _for_mlflow(name: str) -> str:
    """Its local store has a file a name, so ``a/b`` and ``a/b/c`` cannot both be: only the prefix is a folder."""
    prefix, _, own = name.partition("/")
    own = re.sub(r"[^\w\-. :]", "_", own.replace("/", "."))
    return f"{prefix}/{own}"[:250]


@dataclass(frozen=True, slots=True)
class Tracker:
    """One that a config can ask for."""

    package: str
    """What is imported; pip knows it by the same name."""
    open: Callable[[Opening], Writer]


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker("tensorboard", _TensorBoard),
    "wandb": Tracker("wandb", _Wandb),
    "trackio": Tracker("trackio", _Trackio),
    "mlflow": Tracker("mlflow", _MLflow),
}
"""Every tracker by its name in the config (`config.run.TrackerName`)."""


def check_installed(names: Sequence[str]) -> None:
    """Raises `UserError` naming the packages that are asked for and not there."""
    absent = [TRACKERS[name].package for name in names if not _is_installed(TRACKERS[name].package)]
    if absent:
        raise UserError(
            f"tracking: {', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed. Install with: "
            f"pip install {' '.join(absent)} (or take it out of tracking; metrics.jsonl is always written)"
        )


def _is_installed(package: str) -> bool:
    found = find_spec(package)
    return found is not None and found.origin is not None  # a folder of that name (wandb makes one) is no package


# ---------------------------------------------------------------------------------------------------------------
# What they are told


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers in a line of the log, by name; none of a line that repeats another run's reading."""
    if "baseline_run" in record:
        return {}
    found = {name: value for name, value in record.items() if name not in ("step", *_NESTED)}
    for name, before in _NESTED.items():
        inner = record.get(name)
        found |= {f"{before}{k}": v for k, v in inner.items() if k != "step"} if isinstance(inner, Mapping) else {}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def named(values: Mapping[str, float], prefix: str) -> dict[str, float]:
    """``prefix/name`` for each, under the guide's name where it has one (`GUIDE`), of a stratum too."""
    bases = {name.partition("/")[0] for name in values}
    guide = {found: name for name, ours in GUIDE.items() if (found := next((o for o in ours if o in bases), None))}
    out: dict[str, float] = {}
    for name, value in values.items():
        base, slash, stratum = name.partition("/")
        out[f"{prefix}/{guide.get(base, base)}{slash}{stratum}"] = value
    return out


class Trackers:
    """The open trackers of one run; none on any process but the main one."""

    def __init__(self, prefix: str, tell: Callable[[str], None]) -> None:
        self.prefix, self._tell = prefix, tell
        self._open: dict[str, Writer] = {}

    def open(
        self, names: Sequence[str], folder: Path, name: str, step: int, known: Mapping[str, str]
    ) -> dict[str, str]:
        """Opens those; gives what each calls the run, for ``known`` when the run goes on."""
        for tracker in names:
            own = known.get(tracker) if step else None
            opened = self._try(
                tracker, "cannot be opened",
                lambda tracker=tracker, own=own: TRACKERS[tracker].open(Opening(folder, name, step, own)),
            )  # fmt: skip
            if opened is not None:
                self._open[tracker] = opened
        return {tracker: writer.id for tracker, writer in self._open.items() if writer.id}

    def log(self, record: Mapping[str, Any]) -> None:
        """A line of ``metrics.jsonl``."""
        if isinstance(step := record.get("step"), int) and (values := numbers(record)):
            self._each("cannot log", lambda writer: writer.log(step, named(values, self.prefix)))

    def finish(self, step: int, values: Mapping[str, float]) -> None:
        """The final measurements, and the end; before the evidence is written, which tells what failed."""
        self._each("cannot log", lambda writer: writer.log(step, named(values, self.prefix)))
        self.close(done=True)

    def close(self, *, done: bool = False) -> None:
        self._each("did not close", lambda writer: writer.close(done))
        self._open.clear()

    def _each(self, what: str, act: Callable[[Writer], None]) -> None:
        for tracker, writer in list(self._open.items()):
            self._try(tracker, what, lambda writer=writer: act(writer))

    def _try(self, tracker: str, what: str, act: Callable[[], Any]) -> Any:
        try:
            return act()
        except Exception as e:  # whatever it is: a tracker never stops a run
            if (failed := self._open.pop(tracker, None)) is not None and what != "did not close":
                with suppress(Exception):
                    failed.close(False)
            # An address may hold a password.
            why = re.sub(r"//[^/\s@]+@", "//…@", f"{type(e).__name__}: {e}").strip(": ")[:300]
            self._tell(f"{tracker} {what} and is off for the rest of the run, which goes on ({why})")
        return None
