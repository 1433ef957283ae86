"""Measuring, shared among the processes of a job: each takes its share of the samples, and all get the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Literal, Protocol, TypeVar

import torch

from beholder.config import GenerateConfig, RunConfig
from beholder.data import Data
from beholder.model.build import Vlm
from beholder.probes import audit, loss, written, wrong_images
from beholder.probes.loss import SampleLoss
from beholder.probes.written import Written
from beholder.stages.held_out import HeldOut
from beholder.store.features import FeatureStore
from beholder.train.distributed import Dist
from beholder.train.reporter import Reporter
from beholder.types import Batch, Condition, Example, ImageInput, ImageRef, UserError

T = TypeVar("T")


class HasId(Protocol):
    @property
    def id(self) -> str: ...


Identified = TypeVar("Identified", bound=HasId)


class Together:
    """What the model makes of samples. Every method gives the same on every process, in the order of the samples."""

    def __init__(
        self, cfg: RunConfig, dist: Dist, model: Vlm, data: Data, held_out: HeldOut,
        store: Callable[[], FeatureStore | None], reporter: Reporter,
    ) -> None:  # fmt: skip
        self._cfg, self._dist, self._model, self._data = cfg, dist, model, data
        self._held_out, self._store, self._reporter = held_out, store, reporter

    # -- measurements

    def losses(
        self, examples: Sequence[Example], change: Callable[[Batch], Batch] | None = None, /
    ) -> list[SampleLoss]:
        """Loss of every sample, whichever process measured it; each batch as ``change`` makes it."""
        batches = self.batches(examples)
        mine = loss.sample_losses(self._model, batches if change is None else map(change, batches))
        return self._gather_all(mine, SampleLoss, examples)

    def text_losses(self, examples: Sequence[Example]) -> list[SampleLoss]:
        """Loss of every target by the language model alone: no image, no connector."""
        mine = audit.text_losses(
            self._model, self._data.encoder, self._data.layout, self._mine(examples),
            batch_size=self._cfg.eval.batch_size,
        )  # fmt: skip
        return self._gather_all(mine, SampleLoss, examples)

    def ablation_losses(
        self,
        indices: Sequence[int],
        conditions: Sequence[Condition],
        known: Mapping[Condition, Sequence[SampleLoss]] | None = None,
    ) -> dict[Condition, list[SampleLoss]]:
        """Losses of the held-out samples ``indices`` under each condition; those in ``known`` are taken from there."""
        known, examples = known or {}, self._held_out.at(indices)
        mine = wrong_images.ablation_losses(
            self._model, examples, self.batches, [c for c in conditions if c not in known],
            content_key=self._held_out.content_key, seed=self._held_out.seed,
        )  # fmt: skip
        found = {c: self._gather_all(losses, SampleLoss, examples) for c, losses in mine.items()}
        return {c: list(known[c]) if c in known else found[c] for c in conditions}

    def written(
        self, examples: Sequence[Example], settings: GenerateConfig, condition: Condition, batch_size: int, label: str,
        *, pipeline: Callable[[ImageRef, str | None], torch.Tensor | ImageInput] | None = None,
    ) -> list[Written]:  # fmt: skip
        """What the model writes for each example under ``condition``; ``label`` names the work in its progress.

        ``pipeline``: how images are made ready, in place of the run's own and of stored features.
        """
        assert condition != "noise", "nothing is written under noise"
        seen: Literal["correct", "zero", "none"] = condition if condition in ("zero", "none") else "correct"
        shown = list(examples)
        if condition == "shuffled":
            shown = wrong_images.shuffle_images(examples, self._held_out.content_key, self._held_out.seed)
        builder = self._data.builder(self._store(), train=False, cfg=self._cfg)
        if pipeline is not None:
            builder = replace(builder, pipeline=pipeline, features=None)
        with self._reporter.progress(f"{label} ({condition} image)") as tick:
            mine = written.write(
                self._model, self._data.encoder, builder, self._mine(shown), settings, seen,
                batch_size=batch_size, seed=self._cfg.seed, progress=tick,
            )  # fmt: skip
        return self._gather_all([replace(r, condition=condition) for r in mine], Written, examples)

    def batches(self, examples: Sequence[Example]) -> Iterator[Batch]:
        """This process's share of the examples as held-out batches, with the progress of what is done with them."""
        mine, done = self._mine(examples), 0
        with self._reporter.progress("losses") as tick:
            for batch in self._data.eval_batches(mine, self._store(), self._cfg):
                yield batch
                tick(done := done + len(batch.ids), len(mine))

    # -- shares

    def _mine(self, items: Sequence[T]) -> Sequence[T]:
        return items[self._dist.rank :: self._dist.world_size]

    def _gather_all(
        self, mine: Sequence[Any], kind: Callable[..., Identified], examples: Sequence[Example]
    ) -> list[Identified]:
        """Every process's records in the order of the examples they were strided from, one for each: what was readable
        at the start must still be."""
        parts = self._dist.gather_objects([asdict(m) for m in mine])
        total = sum(len(p) for p in parts)
        if _strided(parts):
            rows = [parts[i % len(parts)][i // len(parts)] for i in range(total)]
        else:  # policy skip: some process had a sample less; the order then says nothing
            rows = [row for part in parts for row in part]
        found = [kind(**row) for row in rows]
        if len(found) != len(examples):
            known = {f.id for f in found}
            lost = [e.id for e in examples if e.id not in known]
            raise UserError(
                f"images of {len(examples) - len(found)} held-out samples could be read when the run started and "
                f"cannot be read now ({', '.join(map(repr, lost[:5]))}); the numbers would be about other samples"
            )
        return found


def _strided(parts: Sequence[Sequence[Any]]) -> bool:
    """Whether the parts are what striding one list gives: lengths non-increasing and at most one apart."""
    lengths = [len(p) for p in parts]
    return lengths == sorted(lengths, reverse=True) and lengths[0] - lengths[-1] <= 1
