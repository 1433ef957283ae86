"""What it saves to keep what a teacher says: a student's steps without a teacher, with one that is read, with one that
is asked; the cost of keeping; bytes a token and the error of each form.

    python benchmarks/teacher_cache.py configs/quickstart/distill.yaml --set output_dir=/tmp/bench

Steps are forward and backward passes of the run's own batches, interleaved; no weight changes. Seconds of processor
time (of the wall on a GPU), the median of the steps. The break-even epoch is the one from which keeping (which costs
asking once) has been worth it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beholder.config import DistillConfig, RunConfig
from beholder.config.file import load_config
from beholder.model.plan import apply_train_plan, plan_of
from beholder.runs import RunDir
from beholder.stages.begin import base_of
from beholder.stages.session import Session, open_session
from beholder.stages.teachers import check_vocabulary, keys, open_teacher, say
from beholder.store.teachers import TeacherCache
from beholder.train import checkpoint, restore
from beholder.train.distributed import Dist, pick_device
from beholder.train.objectives import Distill

FORMS: dict[str, dict[str, Any]] = {"topk": {}, "sampled": {}, "full": {}}


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def open_student(cfg: RunConfig, device: torch.device) -> Session:
    run = RunDir(cfg.run_dir)
    run.create()
    session = open_session(cfg, run, Dist(device=device), base_of(cfg, None), aside=True)
    apply_train_plan(session.model, plan_of(cfg.model, cfg.stage_record))
    if (origin := cfg.model.connector.load_checkpoint) is not None:
        restore.load_start(checkpoint.resolve_checkpoint(origin), session.model, cfg.model.lora.adapters)
    return session


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    cfg = load_config(args.config, [*args.sets, f"output_dir={folder / 'run'}", f"distill.dir={folder}"])
    own, device = cfg.learnt_from, pick_device(cfg.device)
    forms: dict[str, DistillConfig] = {
        form: own.model_copy(update={"form": form, "online": False, "dir": str(folder)}) for form in FORMS
    }
    with ExitStack() as stack:
        session = stack.enter_context(open_student(cfg, device))
        session.fill_features(0, args.steps * cfg.effective_batch)
        teacher = open_teacher(own.teachers[0], cfg, device)
        check_vocabulary(teacher, session.tokenizer)
        caches = {form: stack.enter_context(TeacherCache(c, keys(session)[0])) for form, c in forms.items()}
        train, encoder = session.data.train, session.data.encoder
        examples = [train.example_at(p) for p in train.distinct(0, args.steps * cfg.effective_batch)]
        targets = [e.ids[e.supervise] for e in map(encoder.encode, examples)]
        tokens, asking = sum(map(len, targets)), dict.fromkeys(forms, 0.0)
        for form, cache in caches.items():
            with cache.writer() as writer:
                for start in range(0, len(examples), cfg.eval.batch_size):
                    some = slice(start, start + cfg.eval.batch_size)
                    began = clock(device)
                    said = say(teacher, examples[some], targets[some], forms[form], cache.key.vocab, cache.sample_key)
                    cache.put(writer, list(zip(examples[some], targets[some], strict=True)), said)
                    asking[form] += clock(device) - began

        objective = {form: Distill(c, 10**9) for form, c in forms.items()}
        objective |= {"asked": Distill(own.model_copy(update={"online": True}), 10**9, [teacher])}
        objective |= {"alone": Distill(own.model_copy(update={"alpha": 0.0, "alpha_end": None}), 10**9)}
        readers: dict[str, tuple[Any, ...]] = {form: (cache,) for form, cache in caches.items()}
        readers |= {"asked": (teacher.asked,), "alone": ()}
        streams = {
            name: session.data.stream(session.store, cfg, rank=0, world_size=1, teachers=readers[name])
            for name in readers
        }
        streams = {name: replace(stream, num_workers=0) for name, stream in streams.items()}
        steps = {name: stream.steps(0, args.steps) for name, stream in streams.items()}
        seconds: dict[str, list[float]] = {name: [] for name in streams}
        losses: dict[str, list[float]] = {name: [] for name in streams}
        divergence: dict[str, list[float]] = {name: [] for name in streams}
        session.model.train()
        for _ in range(args.steps):
            for name in streams:
                began = clock(device)
                total, kl, count = 0.0, 0.0, 0
                for batch in next(steps[name]):
                    terms = objective[name](session.model, batch)
                    terms.total.backward()
                    total, kl = total + float(terms.total), kl + float(terms.parts["teacher_kl"])
                    count += terms.tokens
                for weight in session.model.parameters():
                    weight.grad = None
                seconds[name].append(clock(device) - began)
                losses[name].append(total / count)
                divergence[name].append(kl / count)

        took = {name: statistics.median(own[1:] or own) for name, own in seconds.items()}
        table = sum(p.numel() for p in teacher.model.parameters()), sum(p.numel() for p in session.model.parameters())
        print(f"\nteacher {table[0] / 1e6:,.1f} M parameters, student {table[1] / 1e6:,.1f} M; {device}")
        print(
            f"{args.steps} steps of {cfg.effective_batch} samples, {tokens / len(examples):.1f} supervised tokens each"
        )
        for name in ("alone", "topk", "sampled", "full", "asked"):
            ratio = took["asked"] / took[name]
            print(
                f"{name:<8} {took[name]:7.3f} s a step, {ratio:5.2f} x as fast as asking; loss "
                f"{np.mean(losses[name]):.6f}, KL {np.mean(divergence[name]):.6f}"
            )
        print("\nform      bytes a token   asking once     worth it from epoch   |KL - KL of the whole|")
        for form, cache in caches.items():
            saved = (took["asked"] - took[form]) * len(examples) / cfg.effective_batch
            epoch = asking[form] / saved if saved > 0 else float("inf")
            error = float(np.mean(np.abs(np.subtract(divergence[form], divergence["asked"]))))
            print(
                f"{form:<9} {cache.type.itemsize:>8,} {tokens / asking[form]:>12,.0f} tokens/s {epoch:>17.2f} "
                f"{error:>22.2e}"
            )


if __name__ == "__main__":
    main()
