"""What is kept for measuring: which held-out samples each measurement takes, the same in every run of one seed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from beholder.config import RunConfig
from beholder.data import Data
from beholder.data.chat import EncodeError
from beholder.data.images import content_hash
from beholder.data.splits import balanced_sample
from beholder.evidence import Measurement
from beholder.probes import answers, golden, hallucination, loss, strata
from beholder.probes.loss import SampleLoss
from beholder.runs import RunDir, to_json
from beholder.train.distributed import Dist
from beholder.types import Example, ImageRef, UserError

NUM_GOLDEN_SHOWN = 64
"""Golden samples with pictures in the report: the seed's whole set."""
NUM_SHOWN = 24
"""Samples with pictures when there is no golden set."""


class HeldOut:
    """The held-out samples of a run. Samples are named by their index in ``examples``; choices are balanced over length
    buckets and ascending."""

    def __init__(self, cfg: RunConfig, run: RunDir, dist: Dist, data: Data) -> None:
        self._cfg, self._run, self._dist, self._data = cfg, run, dist, data
        self.examples, self.buckets = data.eval_examples, data.eval_buckets
        self.seed = cfg.measure_seed
        """Decides which samples are measured and how images are swapped."""
        self._content: dict[ImageRef, str] = {}

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, indices: Sequence[int]) -> list[Example]:
        return [self.examples[i] for i in indices]

    def _sample(self, size: int, among: Sequence[int] | None = None) -> list[int]:
        return self._data.eval_sample(size, self.seed, among)

    def among(self, indices: Sequence[int], size: int) -> list[int]:
        """At most ``size`` of these samples."""
        return self._sample(min(size, len(indices)), indices) if indices else []

    # -- which samples

    @cached_property
    def sighted(self) -> list[int]:
        """Those with an image: without one, every condition is the same."""
        return [i for i, e in enumerate(self.examples) if e.images]

    @cached_property
    def describable(self) -> list[int]:
        """Those whose last answer can be written and compared: it is there, and the turns before it fit."""
        fits: list[int] = []
        for i in self.sighted:
            if not self.examples[i].answer_text:  # a question that nobody has answered
                continue
            try:
                self._data.encoder.encode_prompt(self.examples[i])
                fits.append(i)
            except EncodeError:
                continue
        return fits

    @cached_property
    def quick_sample(self) -> list[int]:
        """Of ``train.quick_eval_size``."""
        return self._sample(self._cfg.train.quick_eval_size)

    @cached_property
    def ablation_sample(self) -> list[int]:
        """Of ``ablation.num_samples``."""
        return self._sample(self._cfg.ablation.num_samples, self.sighted)

    @cached_property
    def several(self) -> list[int]:
        """Those with several images."""
        return [i for i, e in enumerate(self.examples) if len(e.images) > 1]

    @cached_property
    def single(self) -> list[int]:
        """Those that ask one question about one image and have a short answer."""
        return [i for i, e in enumerate(self.examples) if len(e.images) == e.num_answers == 1 and answers.is_short(e)]

    @cached_property
    def slot_sample(self) -> list[int]:
        """Of ``eval.slot_samples``, as many of each number of images as there are."""
        return self.by_images(self.several, self._cfg.eval.slot_samples)

    def by_images(self, among: Sequence[int], size: int) -> list[int]:
        """At most ``size`` of these, balanced over the number of images, ascending."""
        if not among:
            return []
        numbers = [str(len(self.examples[i].images)) for i in among]
        names = sorted(set(numbers), key=int)
        return balanced_sample(np.array(among, dtype=np.int64), numbers, names, size, self.seed, "images").tolist()

    @cached_property
    def written_sample(self) -> list[int]:
        """Of ``eval.caption_samples``; the golden set comes first, so that its pictures are shown under every image."""
        n = min(self._cfg.eval.caption_samples, len(self.describable))
        balanced = self._sample(n, self.describable)
        return sorted(list(dict.fromkeys([*(i for i, _ in self.golden_items), *balanced]))[:n])

    @cached_property
    def shown_sample(self) -> list[int]:
        """Whose pictures are in the report: the golden set, at most `NUM_GOLDEN_SHOWN` of it, else a few."""
        golden_set = [i for i, _ in self.golden_items][:NUM_GOLDEN_SHOWN]
        return golden_set or self._sample(NUM_SHOWN, self.sighted)

    @cached_property
    def golden_items(self) -> list[tuple[int, golden.GoldenItem]]:
        """The fixed set as (index, item); chosen and stored when first asked for, which all processes must do
        together, as `measure.check_measurable` does."""
        e, size = self._cfg.eval, self._cfg.golden_size
        if not size or e.run_golden_every == "never" or not self.describable:
            return []
        path = self._run.path / "golden.jsonl" if e.golden_set_path is None else Path(e.golden_set_path)

        def make() -> list[int]:
            among = self.describable
            chosen = golden.golden_set(
                path,
                self.at(among),
                buckets=[self.buckets[i] for i in among],
                label_len=[self._data.eval_label_len[i] for i in among],
                size=size,
                seed=e.golden_seed,
                by_category=self._cfg.stage_record.golden_by == "category",
            )
            wanted = min(size, len(among))
            if len(chosen) != wanted:
                raise UserError(
                    f"{path} holds {len(chosen)} samples, eval.golden_size asks for {wanted}; change the setting, or "
                    "give another eval.golden_set_path"
                )
            return [among[index] for index, _ in chosen]

        indices: list[int] = self._dist.on_main(make)
        return list(zip(indices, golden.load(path), strict=True))

    # -- what is known of them

    def groups(self, indices: Sequence[int]) -> loss.Groups:
        """Strata of these samples; what is rare is rare among them."""
        return strata.groups_of(self.at(indices), [self.buckets[i] for i in indices])

    def summary(self, losses: Sequence[SampleLoss]) -> list[Measurement]:
        """Token-weighted loss, perplexity and accuracy of all samples, overall and by stratum."""
        return [
            *loss.summarize(losses, "eval", seed=self.seed),
            *loss.summarize_groups(losses, self.groups(range(len(losses))), "eval", seed=self.seed),
        ]

    @cached_property
    def objects(self) -> hallucination.ObjectList:
        """What CHAIR and the questions know by name."""
        return hallucination.load_objects(self._cfg.eval.object_list)

    def content_key(self, ref: ImageRef) -> str:
        """Tells images apart by their bytes; each is read once."""
        if ref not in self._content:
            self._content[ref] = content_hash(ref)
        return self._content[ref]

    @cached_property
    def sha256(self) -> str:
        """Over every sample: its id, its text, its pictures' bytes."""
        digest = hashlib.sha256()
        for e in self.examples:
            digest.update(to_json([e.id, [t.text for t in e.turns], [self.content_key(r) for r in e.images]]).encode())
        return digest.hexdigest()
