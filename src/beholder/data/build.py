"""A run's data, ready to train on and to measure with: `build_data` walks the first three steps of the overview in
`beholder.data` and hands over the tools for the other two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from beholder.config import HygieneLimits, RunConfig, SourceConfig
from beholder.data.chat import ChatEncoder, EncodeError
from beholder.data.collate import AskedTeacher, Layout, SampleBuilder, TrainStream, eval_batches
from beholder.data.hygiene import HygieneReport, apply_hygiene
from beholder.data.images import ImageError, ImagePipeline, NativePipeline
from beholder.data.mixture import Mixture
from beholder.data.same_ids import check_same_ids
from beholder.data.sources import Records, Reject, open_sources
from beholder.data.splits import Split, balanced_sample, bucket_names, load_split, make_split, save_split, shared_images
from beholder.types import (
    Batch,
    Example,
    FeatureReader,
    ImageGeometry,
    ImageProcessor,
    ImageRef,
    TeacherReader,
    UserError,
)

NUM_TRIED = 16
"""Training samples that are laid out before anything is trained: a template that fits none of them is told now."""


@dataclass(frozen=True)
class DataCounts:
    """What became of the records: what the report prints of them."""

    records: int
    """Of the training sources, bad ones included."""
    eval_records: int
    """Of sources of held-out records; 0 without such sources."""
    accepted: int
    """Training records that hygiene let through."""
    train: int
    eval: int
    train_buckets: dict[str, int]
    eval_buckets: dict[str, int]
    split_notes: list[str]
    """What a reader of the split must know."""
    sources: dict[str, int]
    """Training samples by source."""
    rejects: dict[str, int]
    """By reason."""
    inserted_markers: int
    absent_images: int
    """Records, held-out ones included, whose words name an image that they do not have."""
    duplicates: dict[str, int]
    target_tokens: dict[str, float]
    """mean, min and max of the training targets."""


@dataclass(frozen=True)
class Data:
    """Everything a stage needs of its data."""

    records: Records
    hygiene: HygieneReport
    split: Split
    train: Mixture
    eval_examples: list[Example]
    """Templated, in a fixed order."""
    eval_buckets: list[str]
    """Length bucket of each held-out sample."""
    eval_label_len: list[int]
    """Target tokens of each held-out sample."""
    encoder: ChatEncoder
    pipeline: ImagePipeline | NativePipeline
    """Without augmentation: evaluation, feature store, reports."""
    train_pipeline: ImagePipeline | NativePipeline
    layout: Layout
    rejects: list[Reject]
    """Structural rejects, then hygiene's, of train and held-out records."""
    counts: DataCounts

    def without_unusable(self, *, skip_bad_images: bool) -> Data:
        """The same without held-out samples that cannot be laid out, counted and named among the rejects.

        ``skip_bad_images``: also without those whose image cannot be had. Otherwise the probes would each have to lose
        them on their own, the shuffle after hours of training. Raises `UserError` when none is left, and when none of
        the first training samples can be laid out; without ``skip_bad_images`` also `ImageError` for an image that
        decides a sample's layout and cannot be had.
        """
        kept: list[int] = []
        rejects: list[Reject] = []
        for i, example in enumerate(self.eval_examples):
            try:
                self.encoder.encode(example)
                for ref in example.images if skip_bad_images else ():
                    self.pipeline(ref)
                kept.append(i)
            except (EncodeError, ImageError) as e:
                if isinstance(e, ImageError) and not skip_bad_images:
                    raise e.needed_by(example.where) from e
                rejects.append(Reject(example.id, example.row, example.file, e.reason, str(e)))
        if not kept:
            raise UserError(
                f"no held-out sample can be used; the last of {len(self.eval_examples)}: {rejects[-1].detail}"
            )
        refused: list[UserError] = []
        for position in range(min(NUM_TRIED, len(self.train))):
            example = self.train.example_at(position)
            try:
                self.encoder.encode(example)
                break
            except (EncodeError, ImageError) as e:
                if isinstance(e, ImageError) and not skip_bad_images:
                    raise e.needed_by(example.where) from e
                refused.append(e)
        else:
            raise UserError(f"none of the first {len(refused)} training samples can be laid out: {refused[0]}")
        buckets = [self.eval_buckets[i] for i in kept]
        return replace(
            self,
            eval_examples=[self.eval_examples[i] for i in kept],
            eval_buckets=buckets,
            eval_label_len=[self.eval_label_len[i] for i in kept],
            rejects=[*self.rejects, *rejects],
            counts=replace(
                self.counts, eval=len(kept), eval_buckets=dict(Counter(buckets)),
                rejects=dict(Counter(self.counts.rejects) + Counter(r.reason for r in rejects)),
            ),
        )  # fmt: skip

    def mixture(self, cfg: RunConfig, steps: int) -> list[str]:
        """Of each weighted source, the share that was asked for and what ``steps`` steps take from it:
        ``mantis 40.0 % asked, 40.0 % seen (1,600, each 2.5 times)``; nothing where sources have no weights."""
        seen = self.train.shares(steps * cfg.effective_batch)
        sources = cfg.data.train_sources
        asked = [s.weight or 0.0 for s in sources]
        return [
            f"{s.name or Path(s.json_path).stem} {w / sum(asked):.1%} asked, {n / sum(seen):.1%} seen ({n:,}"
            f"{f', each {n / own:.1f} times' if n > own else ''})"
            for s, w, n, own in zip(sources, asked, seen, self.train.sizes, strict=bool(seen))
        ]

    def train_refs(self, start: int, stop: int) -> Iterator[ImageRef]:
        """Images of the training positions ``[start, stop)``, each once, in order of first use."""
        seen: set[ImageRef] = set()
        for position in range(start, stop):
            for ref in self.train.example_at(position).images:
                if ref not in seen:
                    seen.add(ref)
                    yield ref

    def eval_refs(self) -> Iterator[ImageRef]:
        """Images of the held-out samples."""
        for example in self.eval_examples:
            yield from example.images

    def eval_sample(self, size: int, seed: int, among: Sequence[int] | None = None) -> list[int]:
        """At most ``size`` indices of held-out samples (``among`` these), balanced over length buckets, ascending."""
        indices = range(len(self.eval_examples)) if among is None else among
        names = bucket_names(self.split.settings["len_buckets"])
        buckets = [self.eval_buckets[i] for i in indices]
        return balanced_sample(np.array(indices, dtype=np.int64), buckets, names, size, seed).tolist()

    def builder(self, features: FeatureReader | None, *, train: bool, cfg: RunConfig) -> SampleBuilder:
        """Turns examples into encoded samples with images; augments only for training."""
        augment = train and cfg.data.augment != "none"
        return SampleBuilder(
            self.encoder,
            self.train_pipeline if train else self.pipeline,
            None if augment else features,
            on_bad_image=cfg.data.on_bad_image,
            augment_seed=cfg.seed if augment else None,
        )

    def stream(
        self, features: FeatureReader | None, cfg: RunConfig, *, rank: int, world_size: int,
        teachers: tuple[TeacherReader | AskedTeacher, ...] = (),
    ) -> TrainStream:  # fmt: skip
        """Micro-batches of every optimizer step for one rank."""
        return TrainStream(
            self.train,
            replace(self.builder(features, train=True, cfg=cfg), teachers=teachers),
            self.layout,
            micro_batch_size=cfg.train.micro_batch_size,
            gradient_accum=cfg.train.gradient_accum,
            rank=rank,
            world_size=world_size,
            num_workers=cfg.data.num_workers,
            prefetch_factor=cfg.data.prefetch_factor,
            pin_memory=cfg.data.pin_memory,
            persistent_workers=cfg.data.persistent_workers,
            timeout_s=cfg.train.timeout_s,
        )

    def total_steps(self, cfg: RunConfig) -> int:
        """Optimizer steps of the run."""
        return cfg.train.train_steps or self.stream(None, cfg, rank=0, world_size=1).steps_for(cfg.train.num_epochs)

    def eval_batches(
        self, examples: Sequence[Example], features: FeatureReader | None, cfg: RunConfig, batch_size: int | None = None
    ) -> Iterator[Batch]:
        """Held-out batches in the given order, without augmentation."""
        return eval_batches(
            examples, self.builder(features, train=False, cfg=cfg), self.layout, batch_size or cfg.eval.batch_size
        )


def build_pipeline(cfg: RunConfig, geometry: ImageGeometry | ImageProcessor) -> ImagePipeline | NativePipeline:
    """A run's images without augmentation: for evaluation, feature store, reports and generation."""
    if isinstance(geometry, ImageGeometry):
        return ImagePipeline(geometry, cfg.data.max_megapixels)
    return NativePipeline(geometry, cfg.data.max_megapixels)


def build_encoder(
    cfg: RunConfig,
    tokenizer: Any,
    num_visual_tokens: int | None,
    pipeline: ImagePipeline | NativePipeline | None = None,
) -> ChatEncoder:
    """The encoder of a run: for training, evaluation, preview and generation alike. A native model's
    (``num_visual_tokens`` None) needs its ``pipeline``."""
    p = cfg.prompting
    native = pipeline if isinstance(pipeline, NativePipeline) else None
    if native is not None and (most := native.processor.most_images) is not None and cfg.max_images > most:
        raise UserError(
            f"prompting.max_images_per_sample is {cfg.max_images}, but this class of native model takes {most} image a "
            f"sample: it lays several out otherwise than one by one. Set it to {most}, or choose another model"
        )
    template = template_text(p.chat_template)
    if template is None and native is not None:
        template = native.processor.chat_template
    encoder = ChatEncoder(
        tokenizer,
        num_visual_tokens=num_visual_tokens,
        max_seq_len=p.max_seq_len,
        template=cfg.template,
        instruction=p.instruction,
        instruction_multi=p.instruction_multi,
        im_start=p.im_start,
        im_end=p.im_end,
        image_label=cfg.image_label,
        chat_template=template,
        system=p.system,
        thinking=p.thinking,
        too_long=p.too_long,
        images=None if native is None else native.processor,
        size_of=None if native is None else native.size,
    )
    if native is not None and p.chat_template is None:
        check_same_ids(encoder)
    return encoder


def template_text(path: str | None) -> str | None:
    """The text of ``prompting.chat_template``, a file of the person's choosing.

    A template is sandboxed: it reaches no files and no private attributes, and is stopped where it does not end
    (`chat_template.LONGEST`).
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"prompting.chat_template {path}: cannot be read: {e}") from e


def open_records(cfg: RunConfig, sources: Sequence[SourceConfig]) -> Records:
    """Records of ``sources`` with the run's marker, image limit and stage; bad records become named rejects."""
    return open_sources(
        sources,
        image_token=cfg.prompting.image_token,
        max_images=cfg.max_images,
        on_reject="collect",
        chat=cfg.stage_record.dialogues,
    )


def build_data(
    cfg: RunConfig,
    tokenizer: Any,
    geometry: ImageGeometry | ImageProcessor,
    num_visual_tokens: int | None,
    *,
    split_file: Path | None = None,
    write_split: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Data:
    """Steps 1-3 of the overview in `beholder.data`.

    ``split_file``: the persisted split; read when it exists (and must match the data), written otherwise. Raises
    `UserError` when nothing is left to train on or to evaluate on.

    No training sample shows an image whose bytes are those of a held-out one. ``data.verify_images: none`` says that no
    image is to be looked at beforehand; images are then told apart by where they lie, and ``counts.split_notes``
    says so.
    """
    d = cfg.data
    pipeline = build_pipeline(cfg, geometry)
    encoder = build_encoder(cfg, tokenizer, num_visual_tokens, pipeline)
    records = open_records(cfg, d.train_sources)
    vet = partial(
        apply_hygiene, tokenizer=tokenizer, verify_images=d.verify_images, max_megapixels=d.max_megapixels,
        on_bad_image=d.on_bad_image, progress=progress,
    )  # fmt: skip
    hygiene = vet(records, cfg=cfg.hygiene)
    rejects = [*records.rejects, *hygiene.rejects]
    if not len(hygiene.accepted):
        raise UserError(f"no training sample is left of {len(records)} records: {_reasons(rejects)}")

    settings = _split_settings(cfg)
    if split_file is not None and split_file.exists():
        split = load_split(split_file, records, settings)
    else:
        split = make_split(records, hygiene.accepted, hygiene.target_tokens, **settings, progress=progress)
        if split_file is not None and write_split:
            save_split(split_file, split, records)

    held, train_indices, overlap = _HeldOut(records, split, split.eval), split.train, split.overlap
    if d.eval_sources:
        held = _held_out_of_its_own(cfg, vet, settings)
        rejects += held.rejects
        overlap = shared_images(records, train_indices, held.records, held.indices, settings["same_image"], progress)
        train_indices = np.setdiff1d(train_indices, overlap, assume_unique=True)
        if not len(train_indices):
            raise UserError(
                f"all {len(overlap)} training samples show an image of data.eval_sources, so none may be trained on; "
                "give held-out records of other images"
            )
    for example in (records[int(i)] for i in overlap):
        why = "shows an image of a held-out sample"
        rejects.append(Reject(example.id, example.row, example.file, "held_out_image", why))
    if not len(held.indices):
        raise UserError(
            "no held-out sample is left, so nothing could be measured: set data.eval_size, data.eval_ratio or "
            f"data.eval_sources ({_reasons(rejects)})"
        )
    t = cfg.train
    return Data(
        records=records,
        hygiene=hygiene,
        split=split,
        train=Mixture(
            records, train_indices, seed=cfg.seed, multi_image_fraction=d.multi_image_fraction,
            weights=[s.weight for s in d.train_sources if s.weight is not None],
        ),
        eval_examples=[encoder.apply_template(held.records[int(i)]) for i in held.indices],
        eval_buckets=held.buckets,
        eval_label_len=[held.split.label_len[int(i)] for i in held.indices],
        encoder=encoder,
        pipeline=pipeline,
        train_pipeline=(
            ImagePipeline(geometry, d.max_megapixels, d.augment) if isinstance(geometry, ImageGeometry) else pipeline
        ),
        layout=Layout(t.packing, t.pack_len or cfg.prompting.max_seq_len, cfg.prompting.pad_to_multiple_of),
        rejects=rejects,
        counts=_count(records, hygiene, split, train_indices, held, rejects),
    )  # fmt: skip


def _split_settings(cfg: RunConfig) -> dict[str, Any]:
    d = cfg.data
    return {
        "mode": d.split,
        "eval_size": None if d.eval_sources else d.eval_size,
        "eval_ratio": d.eval_ratio,
        "len_buckets": list(d.len_buckets),
        "max_samples": d.max_samples,
        "seed": cfg.measure_seed,
        "same_image": "place" if d.verify_images == "none" else "content",
    }


@dataclass(frozen=True)
class _HeldOut:
    """Held-out samples, of the training records or of sources of their own."""

    records: Records
    split: Split
    indices: np.ndarray
    """int64: which of ``records``."""
    rejects: list[Reject] = field(default_factory=list)

    @property
    def buckets(self) -> list[str]:
        return [self.split.bucket[int(i)] for i in self.indices]


def _held_out_of_its_own(cfg: RunConfig, vet: Callable[..., HygieneReport], settings: dict[str, Any]) -> _HeldOut:
    """The samples of ``data.eval_sources``. Raises `UserError` where they are fewer than ``data.eval_size``."""
    d = cfg.data
    records = open_records(cfg, d.eval_sources)
    # Held-out records are measured as they are: a caption that training would reject as too short or as a
    # duplicate is still a question the model must answer. Only what cannot be used at all is left out.
    hygiene = vet(records, cfg=HygieneLimits(min_tokens=1, max_tokens=None, spam=(), duplicates="report"))
    rejects = [*records.rejects, *hygiene.rejects]
    if d.eval_size is not None and d.eval_size > len(hygiene.accepted):
        raise UserError(
            f"data.eval_size is {d.eval_size:,}, but data.eval_sources hold {len(hygiene.accepted):,} usable "
            f"samples ({_reasons(rejects)}); lower it, or leave it out to use all"
        )
    how = {**settings, "mode": "none", "eval_ratio": None, "max_samples": d.eval_size}
    split = make_split(records, hygiene.accepted, hygiene.target_tokens, **how)
    return _HeldOut(records, split, split.train, rejects)


def _count(
    records: Records, hygiene: HygieneReport, split: Split, train: np.ndarray, held: _HeldOut, rejects: Sequence[Reject]
) -> DataCounts:
    notes = list(split.notes)
    if split.settings["same_image"] == "place":
        notes.append(
            "data.verify_images is none, so no image was opened: a copy of a held-out image under another name would "
            "not have been noticed among the training samples"
        )
    apart = [] if held.records is records else [held.records]
    tokens = hygiene.target_tokens[train]
    return DataCounts(
        records=len(records) + len(records.rejects),
        eval_records=sum(len(r) + len(r.rejects) for r in apart),
        accepted=len(hygiene.accepted),
        train=len(train),
        eval=len(held.indices),
        train_buckets=dict(Counter(split.bucket[int(i)] for i in train)),
        eval_buckets=dict(Counter(held.buckets)),
        split_notes=notes,
        sources=dict(Counter(records.source_of(int(i)) for i in train)),
        rejects=dict(Counter(r.reason for r in rejects)),
        inserted_markers=sum(r.inserted_markers for r in (records, *apart)),
        absent_images=sum(r.absent_images for r in (records, *apart)),
        duplicates=dict(hygiene.duplicates),
        target_tokens={"mean": float(tokens.mean()), "min": int(tokens.min()), "max": int(tokens.max())},
    )


def _reasons(rejects: Sequence[Reject]) -> str:
    counts = Counter(r.reason for r in rejects)
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "the files hold no records"
