"""The images and texts that a run's monitors are about, each opened when first asked for."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property

from beholder.config import RunConfig
from beholder.data import Data
from beholder.data.chat import EncodeError
from beholder.data.images import ImageError
from beholder.data.monitor_set import MonitorSet, load_monitor_set
from beholder.probes import monitors as probe
from beholder.stages.held_out import HeldOut
from beholder.types import Example

NUM_TRAINED = 20_000
"""Training samples whose texts are read for what they name and whether they say the phrase."""


class MonitorSets:
    """Which images, which texts; the same on every process."""

    def __init__(self, cfg: RunConfig, data: Data, held_out: HeldOut) -> None:
        self._cfg, self._data, self._held_out = cfg, data, held_out

    @property
    def any(self) -> bool:
        """Whether anything is measured at every evaluation."""
        watched = self._cfg.eval.watched
        return any(not name.startswith("retention.") or self._cfg.has_adapters for name in watched)

    @cached_property
    def irrelevant(self) -> MonitorSet | None:
        own = self._cfg.eval.irrelevant
        if own.path is None:
            return None
        return self._asking(load_monitor_set("eval.irrelevant.path", own.path, own.image_root), own.prompt)

    @cached_property
    def ood(self) -> MonitorSet | None:
        own = self._cfg.eval.ood
        if own.path is None:
            return None
        return self._asking(load_monitor_set("eval.ood.path", own.path, own.image_root), own.prompt)

    def _asking(self, found: MonitorSet, prompt: str | None) -> MonitorSet:
        """Each image with a question, unless its record has one; a model that captions gets the instruction that its
        template writes."""
        if self._cfg.template != "chat":
            return found
        own = list(filter(None, map(_question, self._held_out.examples)))
        asked = [prompt] if prompt is not None or not own else own
        return replace(found, items=[x.asking(asked[i % len(asked)] or "") for i, x in enumerate(found.items)])

    @cached_property
    def phrase(self) -> probe.Phrase | None:
        """What says that an image is irrelevant, where that is measured."""
        own = self._cfg.eval.irrelevant
        return probe.Phrase(own.phrase, own.pattern) if own.path else None

    @cached_property
    def jitter_sample(self) -> list[int]:
        """Of ``eval.jitter_samples``."""
        return self._held_out.among(self._held_out.describable, self._cfg.eval.jitter_samples)

    @cached_property
    def _training(self) -> list[Example]:
        train = self._data.train
        return [train.example_at(p) for p in range(min(len(train), NUM_TRAINED))]

    @cached_property
    def trained(self) -> probe.Trained:
        """What the training texts say and name."""
        answers = [t.text for e in self._training for t in e.turns if t.role == "assistant"]
        texts = [t.text for e in self._training for t in e.turns if t.role != "system"]
        return probe.trained(answers, texts, self._held_out.objects)

    def training(self, size: int) -> list[Example]:
        """So many of the training samples, in the order they are trained on, without those that training rejects."""
        train, found = self._data.train, []
        for position in range(len(train)):
            if len(found) == size:
                break
            if self.fits(example := train.example_at(position)):
                found.append(example)
        return found

    def fits(self, example: Example) -> bool:
        """Whether the sample can be laid out and, where images that cannot be had are skipped, its images be had."""
        skip = self._cfg.data.on_bad_image == "skip"
        try:
            self._data.encoder.encode(example)
            for ref in example.images if skip else ():
                self._data.pipeline(ref)
        except (EncodeError, ImageError) as e:
            if isinstance(e, ImageError) and not skip:
                raise e.needed_by(example.where) from e
            return False
        return True

    def never_said(self) -> str | None:
        """A warning where no training text says what irrelevant images are to be called."""
        if self.phrase is None or any(self.phrase.said_in(t.text) for e in self._training for t in e.turns):
            return None
        return (
            f"no turn of {len(self._training):,} training samples says {self.phrase.words} (eval.irrelevant), so a "
            "model that was not taught it earlier cannot pass"
        )

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Of each set: readings of other images do not compare."""
        sets = {"irrelevant": self.irrelevant, "ood": self.ood}
        return {name: found.sha256 for name, found in sets.items() if found is not None}


def _question(example: Example) -> str:
    """The user's last words, without places of images."""
    asked = next((t for t in reversed(example.turns) if t.role == "user"), None)
    return "" if asked is None else "".join(p for p in asked.parts if isinstance(p, str)).strip()
