"""What a process of its own makes of an exported folder, against what the run itself computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from beholder.config import GREEDY
from beholder.data.collate import Layout, collate
from beholder.model.native import NativeModel
from beholder.model.standard import ExportClass
from beholder.model.vlm import VisionLanguageModel
from beholder.runs import stop_signals, writing
from beholder.train.trained import TrainedRun
from beholder.types import Encoded, ImageInput, UserError
from beholder.use.export.adapters import ADAPTER
from beholder.use.export.samples import AskedSample, prompt_of
from beholder.use.exported import CODE

NEW_TOKENS = 24
"""Of a golden answer."""
ROUNDING = 1e-5
"""Of the largest logit: a library may add in another order in another process. What was seen is 0 throughout."""


def prove(
    run: TrainedRun, folder: Path, written: ExportClass, samples: Sequence[AskedSample], *, beside: bool
) -> tuple[float, list[str]]:
    """(largest difference of logits, answers) of what a process of its own makes of the folder. Raises `UserError`
    where anything differs."""
    native = isinstance(run.model, NativeModel)
    theirs, told = ask_fresh(
        folder, written.name, samples, processor_code=not native, model_code=bool(written.prevents), beside=beside,
        special=run.tokenizer.bos_token is None, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    return _compare(run, samples, theirs, told)


@stop_signals()
def ask_fresh(
    folder: Path, name: str, samples: Sequence[AskedSample], *, processor_code: bool, model_code: bool, beside: bool,
    special: bool, max_new_tokens: int, logits: bool = True,
) -> tuple[dict[str, Tensor], list[list[int]]]:  # fmt: skip
    """(``ids.K`` and, if asked for, ``logits.K`` of every prompt; ids of every answer): what a process without Beholder
    makes of an exported ``folder`` of class ``name``. Raises `UserError` where it cannot."""
    with tempfile.TemporaryDirectory(prefix="beholder-export-") as scratch:
        job = Path(scratch)
        asked: dict[str, Any] = {
            "folder": str(folder.resolve()), "class": name, "threads": torch.get_num_threads(),
            "processor_code": processor_code, "model_code": model_code, "adapter": ADAPTER if beside else None,
            "max_new_tokens": max_new_tokens, "logits": logits, "samples": [],
        }  # fmt: skip
        with writing(job):
            for k, sample in enumerate(samples):
                names = [f"{k}.{i}" for i in range(len(sample.images))]
                for image_name, image in zip(names, sample.images, strict=True):
                    (job / image_name).write_bytes(image)
                asked["samples"].append({"messages": sample.messages, "images": names, "special": special})
            (job / "job.json").write_text(json.dumps(asked), "utf-8")
        run_fresh("fresh_check.py", job)
        told = json.loads((job / "answers.json").read_text("utf-8"))
        return load_file(str(job / "logits.safetensors")), told["ids"]


def run_fresh(script: str, job: Path) -> None:
    """A file of ``exported/`` in a process of its own, which sees nothing of this one's. Raises `UserError` where it
    fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP")}
    env |= {"HF_MODULES_CACHE": str(job / "modules"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-I", str(CODE / script), str(job)], env=env, cwd=job, text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-6:])
        raise UserError(f"the export cannot be loaded in a process of its own:\n{last}")


def same_prompt(run: TrainedRun, encoded: Encoded, ids: Tensor) -> bool:
    """Whether an exported processor gives the run's ids; what stands where an image goes is each one's own."""
    ours = torch.from_numpy(encoded.ids).clone()
    reserved = torch.zeros(len(ours), dtype=torch.bool)
    if run.encoder.images is None:
        for start, stop in encoded.image_spans:
            reserved[start:stop] = True
    return len(ours) == len(ids) and torch.equal(ours[~reserved], ids[~reserved])


@torch.no_grad()
def _compare(
    run: TrainedRun, samples: Sequence[AskedSample], theirs: dict[str, Tensor], answers: list[list[int]]
) -> tuple[float, list[str]]:
    in_fp32(run.model)
    worst, texts = 0.0, []
    for k, sample in enumerate(samples):
        where = f"sample {sample.example.id!r}"
        encoded, inputs = prompt_of(run, sample)
        if not same_prompt(run, encoded, theirs[f"ids.{k}"]):
            raise UserError(
                f"{where}: the exported processor lays the prompt out as other ids ({len(theirs[f'ids.{k}'])}, the "
                f"run {len(encoded.ids)}), so nothing was kept. The run's chat template starts an answer otherwise "
                "than it was trained, or the tokenizer reads text before and after an image as one; such runs cannot "
                "be exported"
            )
        ours = logits_of(run, encoded, inputs)
        shown = theirs[f"logits.{k}"][:, : ours.shape[1]]
        difference = float((ours - shown).abs().max())
        worst = max(worst, difference)
        allowed = ROUNDING * float(ours.abs().max())
        if not difference <= allowed:
            raise UserError(
                f"{where}: the logits of what was exported differ from the run's by {difference:.3g} (both in fp32, "
                f"allowed {allowed:.3g}), so nothing was kept"
            )
        how = GREEDY.model_copy(update={"max_new_tokens": NEW_TOKENS})
        own = run.model.generate([encoded], [inputs], how, eos_ids=run.encoder.eos_ids)[0]
        text, other = run.encoder.decode(own), run.encoder.decode(answers[k])
        if text != other:
            raise UserError(f"{where}: the run answers {text!r}, what was exported {other!r}, so nothing was kept")
        texts.append(text)
    return worst, texts


def logits_of(run: TrainedRun, encoded: Any, inputs: list[ImageInput]) -> Tensor:
    """Of every position of a prompt, ``[t, v]``, through the same forward as in training, with torch's own attention:
    ours for CPUs sums in another order."""
    language = run.model.language
    batch = collate(
        [("export", encoded, inputs)], Layout(packing=False, pack_len=len(encoded.ids), pad_to_multiple_of=1)
    )
    segmented, language.segmented = language.segmented, False
    try:
        hidden = run.model.hidden_states(batch)
    finally:
        language.segmented = segmented
    return language.head(hidden[0]).float()


def in_fp32(model: VisionLanguageModel | NativeModel) -> None:
    """All of it in fp32, for good. What is no weight and was rounded with them (rotary frequencies) is computed anew,
    as it is wherever the folder is loaded."""
    model.float()
    for (
        parameter
    ) in model.parameters():  # products of a single row look at how memory is aligned; files do not align it
        parameter.data = parameter.data.clone()
    language = model.language.model
    model.language.compute_dtype = None
    for part in model.parts().values():
        for widened in part.widened.values():  # these cast to what is around them
            for hook in widened.hooks:
                hook.remove()
    for module in language.modules():
        own = dict(module.named_buffers(recurse=False))
        if own and not any(True for _ in module.parameters(recurse=False)) and not module.state_dict():
            language._init_weights(module)
    if isinstance(model, NativeModel):
        model.geometry.dtype = torch.float32
    elif model.vision is not None:
        model.compute_dtype = model.vision.dtype = torch.float32
