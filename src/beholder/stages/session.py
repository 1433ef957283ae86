"""A run's loaded parts: model, data, feature store, and who measures what with them.

Here the rooms meet. What can be measured stands in `panel`, what a stage measures in its record; nothing here trains.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self

import torch

from beholder.config import RunConfig
from beholder.data import Data, build_data, build_encoder
from beholder.data.build import build_pipeline
from beholder.model.build import Vlm, build_vlm
from beholder.model.families import check_limits
from beholder.model.native import NativeModel
from beholder.model.plan import frozen_fingerprint
from beholder.model.vlm import VisionLanguageModel
from beholder.probes.loss import SampleLoss
from beholder.runs import RunDir, to_json
from beholder.stages.held_out import HeldOut
from beholder.stages.monitor_sets import MonitorSets
from beholder.stages.together import Together
from beholder.store.features import FeatureStore, FillReport, store_dir
from beholder.store.layers import LayerStore
from beholder.terminal import Terminal
from beholder.train import same_run
from beholder.train.distributed import Dist
from beholder.train.reporter import Reporter
from beholder.train.tracking import Trackers
from beholder.train.trained import identity
from beholder.types import ImageGeometry, ImageInput, Status, TrainedPart, UserError

BASE = (
    "the adapters of {} earlier run(s) are part of the base's weights (model.lora.adapters: merge); what is compared "
    "with the base, such as the text loss, is compared with these and not with the language model's own weights"
)


Opened = tuple[FeatureStore, Callable[[Any], Sequence[torch.Tensor] | torch.Tensor], int]
"""A feature store, what computes its rows, and of how many images at a time."""


class Session:
    """Everything a stage works with. Opened by `open_session`; nobody sets anything on it from outside. ``with``: its
    files are closed at the end."""

    def __init__(
        self, cfg: RunConfig, run: RunDir, dist: Dist, model: Vlm, tokenizer: Any, data: Data,
        reporter: Reporter, *, frozen: dict[str, str], started: float, gaps: list[str], phases_s: dict[str, float],
    ) -> None:  # fmt: skip
        self.cfg, self.run, self.dist = cfg, run, dist
        self.model, self.tokenizer, self.data, self.reporter = model, tokenizer, data, reporter
        self.started = started
        """`time.perf_counter` when the work began."""
        self.store: FeatureStore | None = None
        """What `fill_features` has filled; None before, and where the config switches it off."""
        self.layers: LayerStore | None = None
        """What `keep_layers` opened."""
        self.filled: FillReport | None = None
        self.held_out = HeldOut(cfg, run, dist, data)
        self.together = Together(cfg, dist, model, data, self.held_out, lambda: self.store, reporter)
        self.monitors = MonitorSets(cfg, data, self.held_out)
        self.gaps = gaps
        """What could not be had or measured, in the order it was found; `gap` adds."""
        self.phases_s = phases_s
        """Seconds by phase; `phase` adds."""
        self.trackers = Trackers(cfg.stage_record.tracked_as, self._track_failed)
        """What `track` has opened."""
        self._frozen = frozen
        self._inner_s: list[float] = [0.0]
        """Seconds of the phases inside each open phase, outermost first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for store in (self.store, self.layers):
            if store is not None:
                store.close()
        self.trackers.close()  # of a run that did not come to its evidence

    @property
    def fingerprints(self) -> dict[str, str]:
        """What must not have changed when a run is resumed."""
        return {
            # not the connector: it has its weights only once a checkpoint is loaded
            **{part: digest for part, digest in self._frozen.items() if part != "connector"},
            "preprocessing": g.fingerprint
            if not isinstance(g := self.model.geometry, ImageGeometry)
            else hashlib.sha256(to_json(asdict(g)).encode()).hexdigest(),
            "data": self.data.train.fingerprint,
            "encoder": self.data.encoder.fingerprint,
            **({same_run.COMPUTED: found} if (found := self.model.language.computed_in) else {}),
            **self._teachers,
        }

    def rounded_then(self, saved: Mapping[str, Any]) -> str | None:
        """What a checkpoint's ``fingerprints`` say of rotary frequencies that were rounded when it was trained, as they
        are no longer; None where they were not, or it cannot matter."""
        now, weights = self.model.language.computed_in, str(self.model.language.dtype).removeprefix("torch.")
        if not now or same_run.COMPUTED in saved or now == weights:
            return None
        return (
            "it was trained by an earlier version of Beholder, which rounded the language model's rotary frequencies "
            f"to {weights} and so took positions for others"
        )

    @cached_property
    def _teachers(self) -> dict[str, str]:
        """Of those that are there: a finished student is measured without them as well. Told once: files of theirs are
        hashed for it, and every checkpoint holds it."""
        found: dict[str, str] = {}
        for number, teacher in enumerate(self.cfg.distill.teachers if self.cfg.distill else (), 1):
            with suppress(UserError):
                found[f"teacher {number}"] = identity(teacher)
        return found

    def gap(self, what: str) -> None:
        """Something that a reader of the report must know was not had."""
        self.gaps.append(what)

    def track(self, step: int) -> None:
        """Opens the trackers that the config asks for; from here on they are told every line of the log. ``step``:
        steps done."""
        cfg, run = self.cfg, self.run
        if not (cfg.tracking and self.dist.is_main):
            return
        known = run.read_json("run.json").get("tracked")
        known = known if isinstance(known, dict) else {}
        ids = self.trackers.open(cfg.tracking, run.path, cfg.run_name, step, known)
        run.set_status(Status.RUNNING, tracked=ids)
        run.listeners.append(self.trackers.log)

    def _track_failed(self, what: str) -> None:
        self.reporter.line("tracking", f"WARNING: {what}")
        self.gap(f"Tracking: {what}.")

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the seconds spent inside to ``phases_s[name]``, without those of phases within."""
        started = time.perf_counter()
        self._inner_s.append(0.0)
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.phases_s[name] = self.phases_s.get(name, 0.0) + spent - self._inner_s.pop()
            self._inner_s[-1] += spent

    def fill_features(self, start: int, stop: int) -> None:
        """Stores the tower's features of every image that training positions ``[start, stop)`` and evaluation need.

        Switched off, with a line that says so, under augmentation: stored features would undo it.
        """
        cfg = self.cfg
        if not cfg.features.enabled:
            return
        if cfg.data.augment != "none":
            self.reporter.line("features", f"off: data.augment is {cfg.data.augment}, every pass needs fresh features")
            self.gap("Feature store: switched off, because data.augment changes every image at every pass.")
            return
        opened = self._native_store() if isinstance(self.model, NativeModel) else self._tower_store(self.model)
        if opened is None:
            return
        store, encode, batch_size = opened
        stop = min(stop, start + len(self.data.train))  # later epochs show the same images again
        refs = dict.fromkeys([*self.data.train_refs(start, stop), *self.data.eval_refs()])
        with self.phase("features"), self.reporter.progress("features") as tick:

            def progress(done: int, of: int) -> None:
                tick(done, of)
                self.dist.alive()

            report = store.fill(
                refs, encode, self.data.pipeline, batch_size=batch_size, progress=progress,
                on_bad_image=cfg.data.on_bad_image, rank=self.dist.rank, world_size=self.dist.world_size,
            )  # fmt: skip
            self.dist.barrier()
        self.reporter.line("features", report.summary)
        self.store, self.filled = store, report
        if over := int(self.dist.all_reduce_sum([float(report.over_cap)])[0]):
            self.gap(
                f"Feature store: {over} images did not fit into features.max_gb = {cfg.features.max_gb:g} GB; the "
                "tower saw them at every pass."
            )

    def _tower_store(self, model: VisionLanguageModel) -> Opened | None:
        """Of the tower's features, or of what goes into its lowest block that learns."""
        vision, g = model.vision, model.geometry
        assert vision is not None
        shape, dtype = (g.num_patches, g.d_vision), torch.bfloat16
        if vision.learns:
            if (why := vision.check_kept()) is not None:
                self.reporter.line("features", f"off: the vision tower learns, and {why}")
                self.gap(f"Feature store: switched off, because the vision tower learns and {why}.")
                return None
            empty = torch.zeros(1, 3, g.height, g.width, dtype=torch.uint8, device=model.device)
            shape, dtype = tuple(vision.keep(empty).shape[1:]), vision.dtype
            self.reporter.line(
                "features", f"kept: what goes into {vision.lowest}, the tower's lowest block that learns"
            )
        store = self._open_store(vision.kept_fingerprint(), shape=shape, dtype=dtype)
        return store, lambda pixels: vision.keep(pixels.to(model.device)), 32

    def _native_store(self) -> Opened | None:
        """Of what a native model's eyes say, for each position that an image takes."""
        model = self.model
        assert isinstance(model, NativeModel)
        if (why := model.check_kept()) is not None:
            self.reporter.line("features", f"off: {why}")
            self.gap(f"Feature store: switched off, because {why}; the tower sees every image at every pass.")
            return None
        shape, dtype = model.kept_like
        store = self._open_store(model.kept_fingerprint(), shape=shape, dtype=dtype, ragged=True)

        def encode(images: Sequence[ImageInput]) -> list[torch.Tensor]:
            return [kept for image in images if (kept := model.keep(image).features) is not None]

        return store, encode, 8  # whose inputs take several MB each

    def _open_store(self, fingerprint: str, **of: Any) -> FeatureStore:
        return FeatureStore(
            store_dir(self.cfg.features), tower_fingerprint=fingerprint, max_bytes=int(self.cfg.features.max_gb * 1e9),
            pipeline_fingerprint=self.data.pipeline.fingerprint, **of,
        )  # fmt: skip

    def keep_layers(self) -> None:
        """Lets the model keep what goes into the language model's lowest layer that learns, where the config asks."""
        cfg, model = self.cfg, self.model
        if not cfg.features.layers:
            return
        if cfg.data.augment != "none":
            self.reporter.line("layers", f"not kept: data.augment is {cfg.data.augment}, every pass is of other images")
            self.gap(
                "Layers: what goes into them was not kept, because data.augment changes every image at every pass "
                "(features.layers)."
            )
            return
        if (why := model.check_layers_kept()) is not None:
            self.reporter.line("layers", f"not kept: {why}")
            self.gap(f"Layers: what goes into them was not kept, because {why} (features.layers).")
            return
        assert isinstance(model, VisionLanguageModel), "a native model's layers are not kept"
        language = model.language
        self.layers = LayerStore(
            store_dir(cfg.features), {"below": model.below_fingerprint()}, width=language.d_text, dtype=language.dtype,
            max_bytes=int(cfg.features.max_gb * 1e9),
        )  # fmt: skip
        model.layer_keeper = self.layers
        self.reporter.line("layers", f"kept: what goes into {language.lowest}, the lowest that learns")

    def eval_losses(self) -> list[SampleLoss]:
        """Loss of every held-out sample."""
        with self.phase("evaluation"):
            return self.together.losses(self.held_out.examples)


def open_session(
    cfg: RunConfig,
    run: RunDir,
    dist: Dist,
    base: Mapping[str, TrainedPart] = MappingProxyType({}),
    *,
    aside: bool = False,
) -> Session:
    """Loads the parts and opens the data. Nothing is trained or measured yet.

    ``base``: what earlier runs have learned and is part of the base (`begin.base_of`). ``aside``: progress goes to
    standard error, where the answer of a command has standard output to itself.
    """
    if cfg.train.num_threads:
        torch.set_num_threads(cfg.train.num_threads)
    started = time.perf_counter()
    model, tokenizer = build_vlm(
        cfg.model, compute_precision=cfg.train.precision, device=dist.device, seed=cfg.seed, base=base
    )
    pipeline = build_pipeline(cfg, model.geometry)
    build_encoder(cfg, tokenizer, model.num_visual_tokens, pipeline).check_table(model.language.vocab)
    check_limits(model.language.limits, cfg)
    frozen = frozen_fingerprint(model)
    loaded = time.perf_counter()

    def open_data() -> Data:
        return build_data(
            cfg, tokenizer, model.geometry, model.num_visual_tokens, split_file=run.splits / split_name(cfg),
            write_split=dist.is_main, progress=lambda *_: dist.alive(),
        )  # fmt: skip

    # The main process writes the split; the others read it.
    data = open_data() if dist.is_main else None
    dist.barrier()
    data = data or open_data()
    dist.same_on_all_ranks("the training data", data.train.fingerprint)
    whole = len(data.hygiene.accepted) - len(data.split.eval)
    reporter = Reporter(
        total_steps=data.total_steps(cfg),
        steps_per_epoch=len(data.train) / cfg.effective_batch,
        samples_per_step=cfg.effective_batch,
        full_train_samples=max(len(data.train), whole),
        log_every=cfg.train.log_every,
        progress_percent=cfg.train.progress_percent,
        live=False if cfg.train.tqdm_disable else None,
        enabled=dist.is_main,
        console=Terminal(stderr=aside, soft_wrap=True),
    )
    reporter.data(
        full_len=data.counts.records,
        subset_train=len(data.train),
        subset_eval=len(data.eval_examples),
        full_train=whole,
    )
    if rejects := data.counts.rejects:
        reporter.line("data", "rejected " + " ".join(f"{reason}={n}" for reason, n in sorted(rejects.items())))
    if n := data.counts.absent_images:
        reporter.line("data", f'WARNING: {n:,} records name an image that they do not have ("image 5" of three)')
    data = data.without_unusable(skip_bad_images=cfg.data.on_bad_image == "skip")
    # A native model is taken as it is: where its class does not keep packed samples apart, they are padded.
    padded = model.language.packing_error if cfg.model.native is not None and cfg.train.packing else None
    if padded:
        data = replace(data, layout=replace(data.layout, packing=False))
        reporter.line("packing", f"off, one sample a row: {padded}")
    return Session(
        cfg, run, dist, model, tokenizer, data, reporter, frozen=frozen, started=started,
        gaps=[
            *(f"Split: {note}" for note in data.counts.split_notes),
            *(f"Prompt: {note}." for note in [data.encoder.prompt_note] if note),
            *([f"Packing: off, one sample a row; {padded}"] if padded else []),
            *([f"Base: {BASE.format(merged)}."] if (merged := sum("merged" in name for name in base)) else []),
        ],
        phases_s={"load": loaded - started, "data": time.perf_counter() - loaded},
    )  # fmt: skip


def split_name(cfg: RunConfig) -> str:
    """``split_seed{seed}_eval{n}.json``, n as asked for."""
    return f"split_seed{cfg.measure_seed}_eval{cfg.data.eval_size or cfg.data.eval_ratio or 'default'}.json"
