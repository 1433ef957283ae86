"""Settings of the data: sources, hygiene, splits, the feature store, and how a sample is laid out."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from beholder.config.section import Bound, Filled, Fraction, Inert, Natural, Positive, Section, Tiny, decides
from beholder.types import DatasetKind, ShapeName

# ---------------------------------------------------------------------------------------------------------------
# data


Template = Literal["caption", "conversation", "chat"]

_CARRIED = Inert(lambda _, own: own.dataset == "webdataset", "tar shards carry their images", ".dataset")
_NO_QUESTIONS = Inert(
    lambda _, own: own.dataset not in ("vqa", "gqa", "auto"), "only vqa and gqa files have it", ".dataset"
)
_QUESTIONS = Inert(
    lambda _, own: own.dataset in ("vqa", "gqa"), "vqa and gqa files have fields of their own", ".dataset"
)


class SourceConfig(Section):
    dataset: DatasetKind = "auto"
    """auto: recognised by looking. The others hold the file to what they say."""
    json_path: Filled
    """The record file, a folder or a glob of them, or their URL; for vqa and gqa the question file."""
    shape: Annotated[ShapeName | None, _QUESTIONS] = None
    """What every record says, where looking does not tell: ``beholder check --as``."""
    columns: Annotated[dict[str, Filled], _QUESTIONS] = Field(default_factory=dict)
    """Fields that are called something else here, as in ``{image: img_path, caption: alt_text}``."""
    min_rating: Annotated[dict[str, Bound], _QUESTIONS] = Field(default_factory=dict)
    """Records rated lower are rejected and counted, as in ``{relevance: 3}`` for ``relevance_ratings`` of FineVision;
    of several ratings the lowest counts."""
    annotations_path: Annotated[
        Filled | None, Inert(lambda _, own: own.dataset not in ("vqa", "auto"), "only vqa files have it", ".dataset")
    ] = None
    """vqa: the annotation file with the ten answers of each question."""
    image_pattern: Annotated[Filled | None, _NO_QUESTIONS] = None
    """vqa, gqa: file name of an image below ``image_root``, with ``{image_id}``, as in
    ``COCO_val2014_{image_id:012d}.jpg``. Default for vqa COCO's own name for the question file's split, else
    ``{image_id:012d}.jpg``; for gqa ``{image_id}.jpg``."""
    image_root: Annotated[str | None, _CARRIED] = None
    """Folder that image paths are relative to and may not leave; default the record file's own."""
    more_image_roots: Annotated[tuple[str, ...], _CARRIED] = ()
    """Further folders that images may lie in: symlinks below ``image_root`` and absolute paths may lead there."""
    name: Filled | None = None
    """Source name in counts and caps; default the record's own ``source``, else the file's stem."""
    cap: Positive | None = None
    """At most this many accepted samples from this source."""
    weight: Annotated[float, Field(gt=0, le=10**12)] | None = None
    """Share of the training samples that come from this source, beside the other sources' weights: of every 1,000
    exactly so many, each source in epochs of its own. Give all sources a weight, or none: then every sample comes once
    an epoch."""


CAPTION_SPAM = (
    "watermark", "stock photo", "stock image", "royalty free", "download", "click here", "click to",
)  # fmt: skip


class HygieneConfig(Section):
    min_tokens: Natural | None = None
    """Samples with fewer target tokens are rejected. Default 5 in stage align, 1 in stage instruct."""
    max_tokens: Positive | None = None
    """Samples with more target tokens, over all turns, are rejected. Default 60 in stage align, none in instruct."""
    spam: tuple[str, ...] | None = None
    """Samples that contain one of these phrases (case-insensitive, whole words) are rejected. Default the marks of
    scraped captions in stage align (watermark, stock photo, …), none in stage instruct."""
    duplicates: Literal["report", "reject_exact", "reject_near"] = "report"
    """Captions that repeat an earlier one. near: same words up to case, punctuation and small edits."""
    near_threshold: Fraction = 0.9
    """Estimated Jaccard similarity of word sets from which two captions count as near-duplicates."""
    source_cap: Positive | None = None
    """At most this many accepted samples per value of the record's ``source``."""

    def limits(self, usual: HygieneLimits) -> HygieneLimits:
        """What is ``usual`` in a stage, with what this changes of it."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        return replace(usual, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True)
class HygieneLimits:
    """`HygieneConfig` with the stage's defaults filled in."""

    min_tokens: int = 5
    max_tokens: int | None = 60
    """None: no limit."""
    spam: tuple[str, ...] = CAPTION_SPAM
    duplicates: Literal["report", "reject_exact", "reject_near"] = "report"
    near_threshold: float = 0.9
    source_cap: int | None = None

    @property
    def told_limits(self) -> str:
        """``5 to 60`` or ``at least 1``, in tokens."""
        return f"at least {self.min_tokens}" if self.max_tokens is None else f"{self.min_tokens} to {self.max_tokens}"


_NO_WORKERS = Inert(lambda _, own: own.num_workers == 0, "data.num_workers is 0", ".num_workers")


class DataConfig(Section):
    all_decide = decides("data")

    dataset: Annotated[
        DatasetKind, Inert(lambda _, own: bool(own.sources), "each of data.sources has its own", ".sources")
    ] = "auto"
    """Kind of ``json_path``; see also ``sources`` for several, and for more settings."""
    json_path: Annotated[Filled | None, decides("place")] = None
    """Training records. Give this or ``sources``."""
    image_root: Annotated[
        str | None, decides("place"),
        Inert(
            lambda _, own: not own.sources and own.dataset == "webdataset", "tar shards carry their images", ".dataset"
        ),
    ] = None  # fmt: skip
    """Folder that image paths are relative to and may not leave."""
    more_image_roots: Annotated[
        tuple[str, ...], decides("place"),
        Inert(
            lambda _, own: not own.sources and own.dataset == "webdataset", "tar shards carry their images", ".dataset"
        ),
    ] = ()  # fmt: skip
    """Further folders that images may lie in: symlinks below ``image_root`` and absolute paths may lead there."""
    sources: Annotated[tuple[SourceConfig, ...], decides("place")] = ()
    """Several record files instead of ``json_path``."""
    eval_sources: Annotated[tuple[SourceConfig, ...], decides("place", "held_out")] = ()
    """Held-out records of their own. When given, ``split_mode`` must be ``none``: nothing is split off."""
    split_mode: Annotated[Literal["ratio", "stratified_len", "none"] | None, decides("held_out")] = None
    """How held-out samples are taken from the training records. Default ratio, or none with ``eval_sources``."""
    eval_ratio: Annotated[
        Fraction | None, decides("held_out"),
        Inert(
            lambda _, own: own.split == "none", "nothing is split off (split_mode none, or eval_sources)",
            ".split_mode .eval_sources",
        ),
        Inert(
            lambda _, own: own.split == "stratified_len", "split_mode stratified_len goes by eval_size", ".split_mode"
        ),
    ] = None  # fmt: skip
    """ratio: share of the records held out (default 0.02). Give this or ``eval_size``."""
    eval_size: Annotated[
        Positive | None, decides("held_out"),
        # with eval_sources it says how many of them are used
        Inert(
            lambda _, own: own.split == "none" and not own.eval_sources, "nothing is split off (split_mode none)",
            ".split_mode",
        ),
    ] = None  # fmt: skip
    """Held-out samples; with ``eval_sources`` at most this many of theirs."""
    split_seed: Annotated[Annotated[int, Field(ge=0, le=2**32 - 1)] | None, decides("held_out")] = None
    """Decides which samples are used and held out, and which images are swapped; default ``seed``. Runs that differ
    in ``seed`` alone are measured on the same samples when this is the same."""
    len_buckets: Annotated[tuple[Natural, ...], decides("held_out")] = (0, 10, 20, 9999)
    """Upper bounds of the target-length buckets in tokens: ``[0, 10, 20, 9999]`` means <=10, 11-20, >=21."""
    max_samples: Annotated[Positive | None, decides("held_out")] = None
    """Use only this many records (train + eval), drawn by the seed."""
    multi_image_fraction: Fraction = 0.0
    """Share of training samples that join two captioned images under template B (at most 2 images a sample); under
    ``prompting.template`` caption alone, which takes no words from the records' user turns."""
    augment: Literal["none", "random_crop"] = "none"
    """random_crop: 80-100 % of the area, seeded by (seed, epoch, sample). Switches the feature store off."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or undecodable image: stop, or reject the sample, count it and name it."""
    verify_images: Annotated[Literal["none", "exists", "decode"], decides("speed")] = "exists"
    """What is checked of every image before training starts."""
    max_megapixels: Annotated[float, Field(gt=0, le=100_000)] = 50.0
    """Larger images are refused before they are decoded."""
    hygiene: Annotated[HygieneConfig, decides("data", "held_out")] = HygieneConfig()
    num_workers: Annotated[Natural, Field(le=512), decides("speed"), Tiny(value=0)] = 0
    """Processes that decode and encode ahead of training, per rank. 0: in the training process."""
    prefetch_factor: Annotated[Positive, Field(le=1024), decides("speed"), _NO_WORKERS] = 2
    """What each worker keeps ready: micro-batches, or with packing what shares rows (up to 64 samples)."""
    pin_memory: Annotated[bool, decides("speed"), Tiny(value=False)] = False
    """Page-locked host memory for faster copies to a GPU."""
    persistent_workers: Annotated[bool, decides("speed"), _NO_WORKERS] = True
    """Keep workers alive between epochs."""

    def impossible(self) -> list[str]:
        wrong: list[str] = []
        if bool(self.json_path) == bool(self.sources):
            wrong.append("give exactly one of json_path and sources")
        for name in ("image_root", "more_image_roots"):
            if self.sources and getattr(self, name):
                wrong.append(f"{name} belongs to json_path; with sources, give {name} in each source")
        if 0 < sum(s.weight is not None for s in self.sources) < len(self.sources):
            wrong.append("sources: some have a weight and some have none; give each one, or none")
        if any(s.weight is not None for s in self.eval_sources):
            wrong.append("eval_sources: a weight is for training; held-out samples are all measured")
        if self.eval_sources and self.split_mode not in (None, "none"):
            wrong.append(f"split_mode is {self.split_mode} but eval_sources are given; set split_mode: none")
        if self.eval_ratio is not None and self.eval_size is not None:
            wrong.append("give eval_ratio or eval_size, not both")
        if self.split_mode == "stratified_len" and self.eval_size is None:
            wrong.append("split_mode stratified_len needs eval_size")
        if list(self.len_buckets) != sorted(set(self.len_buckets)) or len(self.len_buckets) < 2:
            wrong.append("len_buckets must be at least two increasing numbers, such as [0, 10, 20, 9999]")
        return wrong

    @property
    def train_sources(self) -> tuple[SourceConfig, ...]:
        if self.sources:
            return self.sources
        assert self.json_path is not None
        return (
            SourceConfig(
                dataset=self.dataset, json_path=self.json_path, image_root=self.image_root,
                more_image_roots=self.more_image_roots,
            ),
        )  # fmt: skip

    @property
    def split(self) -> Literal["ratio", "stratified_len", "none"]:
        return self.split_mode or ("none" if self.eval_sources else "ratio")


_NATIVE = Inert(
    lambda cfg, _: cfg.model.native is not None, "model.native does it in its own way",
    "model.native model.native.name_or_path",
)  # fmt: skip
_NOT_ENABLED = Inert(lambda _, own: not own.enabled, "features.enabled is false", ".enabled")


class FeaturesConfig(Section):
    all_decide = decides("speed")

    enabled: Annotated[bool, decides("weights", "speed")] = True
    """Compute frozen-tower features once and keep them on disk."""
    dir: Annotated[Filled | None, decides("place"), _NOT_ENABLED] = None
    """Folder of the store, shared by all runs. Default ``$BEHOLDER_CACHE/features``, else
    ``~/.cache/beholder/features``."""
    max_gb: Annotated[float, Field(gt=0, le=1_000_000), _NOT_ENABLED, Tiny(value=0.1)] = 20.0
    """Size cap in GB (1e9 bytes). Images that do not fit go through the tower at every step."""
    layers: Annotated[
        bool, decides("weights", "speed"), _NOT_ENABLED,
        Inert(
            # In a study the tower learns in some runs only; in these it is left out.
            lambda cfg, _: (
                cfg.model.connector.trainable
                or (cfg.tower_may_learn and cfg.footprint is None)
                or not cfg.has_adapters
            ),
            "what goes into the language model's layers changes where connector or tower learn, and nothing learns in "
            "them without adapters", "model.connector.trainable model.lora.enable",
        ),
    ] = False  # fmt: skip
    """Keep, of every sample, what goes into the lowest layer of the language model that learns as well: later passes
    over the data begin there. Worth its room (2 or 4 bytes x width a token) for ``model.lora.llm_layers: last-K`` and
    more than one pass."""


_CHAT = Inert(
    lambda cfg, _: cfg.template == "chat", "the chat template uses the records' own text",
    "stage prompting.template model.lora.enable",
)  # fmt: skip
_NO_CHAT = Inert(lambda cfg, _: cfg.template != "chat", "only the chat template has it", "stage prompting.template")
_ONE_IMAGE = Inert(lambda cfg, _: cfg.max_images == 1, "prompting.max_images_per_sample is 1", ".max_images_per_sample")


class PromptingConfig(Section):
    all_decide = decides("data")

    image_token: Filled = "<image>"
    """Marker of an image in the user turns of record files."""
    max_images_per_sample: Annotated[Positive, Field(le=65_536)] | None = None
    """Samples with more images are rejected. Default 2 in stage align, 1 in instruct, 6 in multi."""
    image_label: Annotated[str | None, _ONE_IMAGE] = None
    """Text before each image of a sample with several, ``{k}`` its number, so that words can name an image; the same in
    training, evaluation and chat. Default ``Image {k}: `` in stage multi, none in the others. It stands before the
    tokenizer's own vision tokens, which are around every image where there are such (``im_start``, ``im_end``)."""
    max_seq_len: Annotated[Positive, Field(le=16_777_216)] = 1536
    """Longest sample in tokens, image positions included. Longer captions are cut and counted."""
    too_long: Literal["truncate_answer", "reject"] = "truncate_answer"
    """A sample longer than ``max_seq_len``: cut the end of its last answer and count it, or reject, name and count it.
    One whose prompt alone is too long is rejected in either case."""
    template: Template | None = None
    """caption: templates A and B. conversation: the records' own user text, no chat template. chat: the tokenizer's
    chat template. Default caption in stage align, chat in stage instruct."""
    # The tiny tokenizers know ChatML's control tokens; in another template theirs would be ordinary text.
    chat_template: Annotated[Filled | None, _NO_CHAT, Tiny()] = None
    """chat: a Jinja file to use instead of the tokenizer's own template."""
    system: Annotated[str | None, _NO_CHAT] = None
    """chat: system text put before conversations that have none. Default: whatever the template does by itself."""
    thinking: Annotated[bool, _NO_CHAT] = False
    """chat: for templates with a reasoning mode (Qwen3), whether a prompt leaves it open (``enable_thinking``)."""
    instruction: Annotated[str, _CHAT] = "Describe the image in one sentence."
    """Template A's text after the image."""
    instruction_multi: Annotated[str, _CHAT, _ONE_IMAGE] = "Describe each image in order, one sentence per image."
    """Template B's text after the images."""
    im_start: Annotated[str, _NATIVE] = "auto"
    """Text whose existing tokens open an image; auto: the tokenizer's own vision token, else ``[``."""
    im_end: Annotated[str, _NATIVE] = "auto"
    """Text whose existing tokens close an image; auto: the tokenizer's own vision token, else ``]``."""
    pad_to_multiple_of: Annotated[Positive, Field(le=65_536)] = 8
    """Row lengths are rounded up to this."""
