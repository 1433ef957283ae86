"""A run's data, ready to train on and to measure with: `build_data` walks the first three steps of the overview in
`beholder.data` and hands over the tools for the other two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from beholder.config import HygieneLimits, RunConfig, SourceConfig
from beholder.data.chat import ChatEncoder
from beholder.data.collate import Layout, SampleBuilder, TrainStream, eval_batches
from beholder.data.hygiene import HygieneReport, apply_hygiene
from beholder.data.images import ImagePipeline
from beholder.data.mixture import Mixture
from beholder.data.sources import Records, Reject, open_sources
from beholder.data.splits import Split, balanced_sample, bucket_names, load_split, make_split, save_split, shared_images
from beholder.types import Batch, Example, FeatureReader, ImageGeometry, ImageRef, UserError


@dataclass
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
    pipeline: ImagePipeline
    """Without augmentation: evaluation, feature store, reports."""
    train_pipeline: ImagePipeline
    layout: Layout
    rejects: list[Reject] = field(default_factory=list)
    """Structural rejects, then hygiene's, of train and held-out records."""
    counts: dict[str, Any] = field(default_factory=dict)
    """What the report prints: records, accepted, train, eval, rejects by reason, target-length histogram …"""

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
        pipeline, seed = self.train_pipeline if train else self.pipeline, cfg.seed if augment else None
        features = None if augment else features
        return SampleBuilder(
            self.encoder, pipeline, features, on_bad_image=cfg.data.on_bad_image, augment_seed=seed
        )  # fmt: skip

    def stream(self, features: FeatureReader | None, cfg: RunConfig, *, rank: int, world_size: int) -> TrainStream:
        """Micro-batches of every optimizer step for one rank."""
        d, builder = cfg.data, self.builder(features, train=True, cfg=cfg)
        return TrainStream(
            self.train, builder, self.layout, micro_batch_size=cfg.train.micro_batch_size,
            gradient_accum=cfg.train.gradient_accum, rank=rank, world_size=world_size, num_workers=d.num_workers,
            prefetch_factor=d.prefetch_factor, pin_memory=d.pin_memory, persistent_workers=d.persistent_workers,
        )  # fmt: skip

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


def build_encoder(cfg: RunConfig, tokenizer: Any, num_visual_tokens: int) -> ChatEncoder:
    """The encoder of a run: for training, evaluation, preview and generation alike."""
    p = cfg.prompting
    return ChatEncoder(
        tokenizer, num_visual_tokens=num_visual_tokens, max_seq_len=p.max_seq_len, template=cfg.template,
        instruction=p.instruction, instruction_multi=p.instruction_multi, im_start=p.im_start, im_end=p.im_end,
        chat_template=_template_text(p.chat_template), system=p.system, thinking=p.thinking, too_long=p.too_long,
    )  # fmt: skip


def _template_text(path: str | None) -> str | None:
    """The text of ``prompting.chat_template``, a file of the person's choosing.

    A template is sandboxed (it reaches no files and no private attributes) but trusted for running time and size:
    nothing stops one that counts for ever.
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
        sources, image_token=cfg.prompting.image_token, max_images=cfg.prompting.max_images_per_sample,
        on_reject="collect", chat=cfg.stage_name == "instruct",
    )  # fmt: skip


def build_data(
    cfg: RunConfig,
    tokenizer: Any,
    geometry: ImageGeometry,
    num_visual_tokens: int,
    *,
    split_file: Path | None = None,
    write_split: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> Data:
    """Steps 1-3 of the overview in `beholder.data`.

    ``split_file``: the persisted split; read when it exists (and must match the data), written otherwise. Raises
    `UserError` when nothing is left to train on or to evaluate on.

    No training sample shows an image whose bytes are those of a held-out one. ``data.verify_images: none`` says that no
    image is to be looked at beforehand; images are then told apart by where they lie, and ``counts["split_notes"]``
    says so.
    """
    d = cfg.data
    encoder = build_encoder(cfg, tokenizer, num_visual_tokens)
    records = open_records(cfg, d.train_sources)
    hygiene = _vet(records, tokenizer, cfg.hygiene, cfg, progress)
    rejects = [*records.rejects, *hygiene.rejects]
    if not len(hygiene.accepted):
        raise UserError(f"no training sample is left of {len(records)} records: {_reasons(rejects)}")

    settings: dict[str, Any] = {
        "mode": d.split,
        "eval_size": None if d.eval_sources else d.eval_size,
        "eval_ratio": d.eval_ratio,
        "len_buckets": list(d.len_buckets),
        "max_samples": d.max_samples,
        "seed": cfg.measure_seed,
        "same_image": "place" if d.verify_images == "none" else "content",
    }
    if split_file is not None and split_file.exists():
        split = load_split(split_file, records, settings)
    else:
        split = make_split(records, hygiene.accepted, hygiene.target_tokens, **settings, progress=progress)
        if split_file is not None and write_split:
            save_split(split_file, split, records)

    overlap = split.overlap
    held, held_split, held_indices = records, split, split.eval
    train_indices = split.train
    if d.eval_sources:
        held = open_records(cfg, d.eval_sources)
        # Held-out records are measured as they are: a caption that training would reject as too short or as a
        # duplicate is still a question the model must answer. Only what cannot be used at all is left out.
        lenient = HygieneLimits(min_tokens=1, max_tokens=None, spam=(), duplicates="report")
        held_hygiene = _vet(held, tokenizer, lenient, cfg, progress)
        rejects += [*held.rejects, *held_hygiene.rejects]
        if d.eval_size is not None and d.eval_size > len(held_hygiene.accepted):
            raise UserError(
                f"data.eval_size is {d.eval_size:,}, but data.eval_sources hold {len(held_hygiene.accepted):,} usable "
                f"samples ({_reasons([*held.rejects, *held_hygiene.rejects])}); lower it, or leave it out to use all"
            )
        held_split = make_split(
            held, held_hygiene.accepted, held_hygiene.target_tokens,
            **{**settings, "mode": "none", "eval_ratio": None, "max_samples": d.eval_size},
        )  # fmt: skip
        held_indices = held_split.train
        overlap = shared_images(records, train_indices, held, held_indices, settings["same_image"], progress)
        train_indices = np.setdiff1d(train_indices, overlap, assume_unique=True)
        if not len(train_indices):
            raise UserError(
                f"all {len(overlap)} training samples show an image of data.eval_sources, so none may be trained on; "
                "give held-out records of other images"
            )
    for example in (records[int(i)] for i in overlap):
        why = "shows an image of a held-out sample"
        rejects.append(Reject(example.id, example.row, example.file, "held_out_image", why))
    eval_examples = [encoder.apply_template(held[int(i)]) for i in held_indices]
    eval_buckets = [held_split.bucket[int(i)] for i in held_indices]
    if not eval_examples:
        raise UserError(
            "no held-out sample is left, so nothing could be measured: set data.eval_size, data.eval_ratio or "
            f"data.eval_sources ({_reasons(rejects)})"
        )

    notes = list(split.notes)
    if settings["same_image"] == "place":
        notes.append(
            "data.verify_images is none, so no image was opened: a copy of a held-out image under another name would "
            "not have been noticed among the training samples"
        )
    tokens = hygiene.target_tokens[train_indices]
    counts = {
        "records": len(records) + len(records.rejects),
        "eval_records": len(held) + len(held.rejects) if d.eval_sources else 0,
        "accepted": len(hygiene.accepted),
        "train": len(train_indices),
        "eval": len(eval_examples),
        "train_buckets": dict(Counter(split.bucket[int(i)] for i in train_indices)),
        "eval_buckets": dict(Counter(eval_buckets)),
        "split_notes": notes,
        "sources": dict(Counter(records.source_of(int(i)) for i in train_indices)),
        "rejects": dict(Counter(r.reason for r in rejects)),
        "inserted_markers": records.inserted_markers + (held.inserted_markers if d.eval_sources else 0),
        "duplicates": dict(hygiene.duplicates),
        "target_tokens": {"mean": float(tokens.mean()), "min": int(tokens.min()), "max": int(tokens.max())},
    }
    t = cfg.train
    return Data(
        records=records,
        hygiene=hygiene,
        split=split,
        train=Mixture(
            records, train_indices, seed=cfg.seed, multi_image_fraction=d.multi_image_fraction
        ),
        eval_examples=eval_examples,
        eval_buckets=eval_buckets,
        eval_label_len=[held_split.label_len[int(i)] for i in held_indices],
        encoder=encoder,
        pipeline=ImagePipeline(geometry, d.max_megapixels),
        train_pipeline=ImagePipeline(geometry, d.max_megapixels, d.augment),
        layout=Layout(t.packing, t.pack_len or cfg.prompting.max_seq_len, cfg.prompting.pad_to_multiple_of),
        rejects=rejects,
        counts=counts,
    )  # fmt: skip


def _vet(
    records: Records,
    tokenizer: Any,
    hygiene: HygieneLimits,
    cfg: RunConfig,
    progress: Callable[[str, int, int], None] | None,
) -> HygieneReport:
    d = cfg.data
    return apply_hygiene(
        records, tokenizer, hygiene, verify_images=d.verify_images, max_megapixels=d.max_megapixels,
        on_bad_image=d.on_bad_image, progress=progress,
    )  # fmt: skip


def _reasons(rejects: Sequence[Reject]) -> str:
    counts = Counter(r.reason for r in rejects)
    return ", ".join(f"{n} {reason}" for reason, n in counts.most_common()) or "the files hold no records"
