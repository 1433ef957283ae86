"""The images and texts that a run's monitors are about, each opened when first asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from itertools import islice
from operator import attrgetter
from typing import Any

from beholder.config import MONITORS, Monitor, RunConfig
from beholder.data import Data
from beholder.data.chat import EncodeError
from beholder.data.images import ImageError
from beholder.data.monitor_set import MonitorSet, load_monitor_set
from beholder.probes import monitors as probe
from beholder.probes import retention
from beholder.runs import to_json
from beholder.stages.held_out import HeldOut
from beholder.types import Example, UserError

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
        found = load_monitor_set("eval.ood.path", own.path, own.image_root)
        if not any(x.shows for x in found.items):
            raise UserError(f"eval.ood.path {own.path}: {probe.NOTHING_SHOWN}")
        return self._asking(found, own.prompt)

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
        return probe.Phrase(own.phrase, own.pattern, own.negation) if own.path else None

    @cached_property
    def jitter_sample(self) -> list[int]:
        """Of ``eval.jitter_samples``."""
        return self._held_out.among(self._held_out.describable, self._cfg.eval.jitter_samples)

    @cached_property
    def _training(self) -> list[Example]:
        return self._data.train.first(NUM_TRAINED)

    @cached_property
    def trained(self) -> probe.Trained:
        """What the training texts say and name."""
        answers = [t.text for e in self._training for t in e.turns if t.role == "assistant"]
        texts = [t.text for e in self._training for t in e.turns if t.role != "system"]
        return probe.trained(answers, texts, self._held_out.objects)

    @cached_property
    def gap_samples(self) -> tuple[list[Example], list[Example]]:
        """``eval.gap_samples`` held-out samples, and as many training samples, in the order they are trained on,
        without those that training rejects."""
        held, train = self._held_out, self._data.train
        size = min(self._cfg.eval.gap_samples, len(held))
        found = islice(filter(self.fits, train.each_once()), size)
        return held.at(held.among(range(len(held)), size)), list(found)

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
        told = (self._cfg.prompting.system or "", *(t.text for e in self._training for t in e.turns))
        if self.phrase is None or any(map(self.phrase.said_in, told)):
            return None
        return (
            f"no turn of {len(self._training):,} training samples says {self.phrase.words} (eval.irrelevant), so a "
            "model that was not taught it earlier cannot pass"
        )

    @cached_property
    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Of each monitor that is on, what decides its readings, by what people call it: readings that differ in any
        of it do not compare. Settings by their values, files and samples by sha256."""
        cfg = self._cfg
        found = {m.name: self._decides(m) for m in MONITORS if attrgetter(m.setting)(cfg)}
        if cfg.eval.retention_every == "eval" and cfg.has_adapters:
            found["retention"] = {"contents of eval.retention_path": self._contents("eval.retention_path")}
        return found

    def _decides(self, monitor: Monitor) -> dict[str, Any]:
        own: MonitorSet | None = {"irrelevant": self.irrelevant, "ood": self.ood}.get(monitor.name)
        found: dict[str, Any] = {}
        if own is not None:
            found[f"images of {monitor.setting}"] = own.sha256
            asked = [t.text for x in own.items for t in x.example.turns]  # some by held-out samples
            found["questions about them"] = hashlib.sha256(to_json(asked).encode()).hexdigest()
            # an answer that calls an image irrelevant invents nothing
            found["eval.irrelevant.phrase or pattern"] = None if self.phrase is None else self.phrase.words
        found |= {name: attrgetter(name)(self._cfg) for name in monitor.hangs_on}
        found |= {f"contents of {name}": self._contents(name) for name in monitor.reads}
        if monitor.held_out:
            found["held-out samples"] = self._held_out.sha256
            found["seed that draws from them"] = self._held_out.seed
        return found

    def _contents(self, setting: str) -> str:
        """sha256 of what is read from the file that a setting names, or of what comes with the package."""
        read: dict[str, Callable[[], Any]] = {
            "eval.object_list": lambda: list(self._held_out.objects.forms.items()),  # their order decides, too
            "eval.retention_path": lambda: retention.load_texts(self._cfg.eval.retention_path),
        }
        return hashlib.sha256(to_json(read[setting]()).encode()).hexdigest()


def _question(example: Example) -> str:
    """The user's last words, without places of images."""
    asked = next((t for t in reversed(example.turns) if t.role == "user"), None)
    return "" if asked is None else "".join(p for p in asked.parts if isinstance(p, str)).strip()
