"""The one config schema: every setting of every stage, its type, default, unit and meaning.

Only the schema lives here; `configfile` reads YAML into it and turns violations into ``file:line:col`` errors.
The field docstrings become the JSON schema's descriptions (``beholder schema``), so an editor shows them.
Paths are relative to the working directory, as on a command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

Cadence = Literal["epoch", "end", "never"]
Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """A group of settings: unknown keys are errors, values are not coerced, instances are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    def impossible(self) -> list[str]:
        """Combinations of this section's settings that cannot be, one message each, naming the settings."""
        return []

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if wrong := self.impossible():
            raise ValueError("\n".join(wrong))
        return self


# ---------------------------------------------------------------------------------------------------------------
# model


class LlmConfig(Section):
    name_or_path: str
    """Hub name, local folder, or a ``.gguf`` file of a causal language model."""
    revision: str | None = None
    """Hub commit or tag."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention kernel. Packing is proven for sdpa and eager on CPU; each kernel is checked again at start-up."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Storage and compute type of the frozen weights."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    use_cache: Literal[False] = False
    """Key/value cache while training; generation always uses one."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off unless you say so."""


class VisionConfig(Section):
    name_or_path: str
    """Hub name or local folder of a Hugging Face vision tower, or ``timm/<name>``."""
    revision: str | None = None
    """Hub commit or tag."""
    weights: str | None = None
    """``timm/…`` only: a local ``.safetensors`` file to load strictly, instead of timm's own download."""
    freeze: Literal[True] = True
    """The tower stays bit-identical."""
    feature_layer: int = -1
    """Hidden layer whose patch tokens are used: -1 is the tower's final output, -2 the layer before."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Compute type of the tower."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Off unless you say so."""


class ResamplerConfig(Section):
    kind: Literal["perceiver", "mean_pool", "grid", "pixel_shuffle", "none"] = "perceiver"
    """perceiver: learned latents attend to the patches. mean_pool: one token. grid: average-pooled square.
    pixel_shuffle: neighbouring patches stacked into channels. none: every patch is a token."""
    num_latents: Positive | None = None
    """Visual tokens per image; must equal ``connector.num_visual_tokens`` when both are given."""
    depth: Positive = 2
    """perceiver: number of cross-attention blocks."""
    num_heads: Positive = 8
    """perceiver: attention heads."""
    dim: Positive | None = None
    """perceiver: width Dr; default the tower's width."""
    latent_std: Annotated[float, Field(gt=0)] = 1.0
    """perceiver: standard deviation the latents are drawn with. See `model.connector.Perceiver` for why it is 1."""


class ProjectorConfig(Section):
    kind: Literal["mlp", "linear"] = "mlp"
    """mlp: Linear, GELU, Linear. linear: one matrix."""
    hidden: Positive | None = None
    """mlp: hidden width; default the language model's width."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """mlp: dropout after the activation; 0 to 0.1 is usual."""


class ConnectorConfig(Section):
    load_checkpoint: str | None = None
    """A run folder or a checkpoint folder whose connector this run starts from."""
    trainable: bool = True
    num_visual_tokens: Positive | None = None
    """N, the language-model positions one image takes. Default 64 for the perceiver; fixed by the other kinds."""
    vision_ln: bool = False
    """LayerNorm on the patch features. Must match the checkpoint that is loaded."""
    resampler: ResamplerConfig = ResamplerConfig()
    projector: ProjectorConfig = ProjectorConfig()
    output_norm: Literal["rms", "none"] = "rms"
    """rms: visual tokens start at the RMS of the language model's embedding table, with a learned gain."""

    def impossible(self) -> list[str]:
        r = self.resampler
        wrong: list[str] = []
        if r.num_latents and self.num_visual_tokens and r.num_latents != self.num_visual_tokens:
            wrong.append(
                f"num_visual_tokens is {self.num_visual_tokens} but resampler.num_latents is {r.num_latents}; "
                "they are the same number, give one of them or make them equal"
            )
        if r.kind == "mean_pool" and (self.num_visual_tokens or r.num_latents or 1) != 1:
            wrong.append("resampler.kind mean_pool gives 1 visual token; remove num_visual_tokens or set it to 1")
        return wrong

    @property
    def tokens_asked(self) -> int | None:
        """N as the user asked for it, or None when the resampler kind decides."""
        n = self.num_visual_tokens or self.resampler.num_latents
        return n if n or self.resampler.kind != "perceiver" else 64


class LoraConfig(Section):
    enable: bool = False
    """Train low-rank adapters on the language model (stage 2)."""
    r: Positive = 16
    """Rank of the two matrices of an adapter."""
    alpha: Positive = 32
    """The adapter's output is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Dropout on the adapter's input while training."""
    strength: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Outside training (evaluations, checkpoints as others load them, chat) adapters are scaled by this too: a model
    on the line from the language model's own weights (0) to the trained ones (1). Below 1 it keeps more of the language
    (WiSE-FT, Wortsman et al. 2022)."""
    bias: Literal["none"] = "none"
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Linear layers of the language model that get an adapter: the last part of a module's name (``q_proj``), several
    parts (``self_attn.q_proj``), or a regular expression that matches the whole name below the language model. Each
    must match something, and nothing outside the language model's layers; the resolved list is printed and counted."""


class ModelConfig(Section):
    llm: LlmConfig
    vision: VisionConfig
    connector: ConnectorConfig = ConnectorConfig()
    lora: LoraConfig = LoraConfig()


# ---------------------------------------------------------------------------------------------------------------
# data

DatasetKind = Literal["jsonl", "llava_pretrain", "llava_instruct", "sharegpt", "vqa", "gqa", "webdataset", "parquet"]
"""jsonl: ``{"id","images":[…],"caption" | "messages" | "conversations","source"}`` a line. llava_pretrain: one JSON
array of conversations. llava_instruct: the same shape, multi-turn. sharegpt: conversations with system turns, as a JSON
array or a record a line. vqa: VQA-v2's or OK-VQA's question file, with its annotation file. gqa: GQA's question file.
webdataset: tar shards. parquet: rows with image bytes."""


class SourceConfig(Section):
    dataset: DatasetKind = "jsonl"
    json_path: str
    """The record file; for webdataset and parquet a file, a folder or a glob; for vqa and gqa the question file."""
    annotations_path: str | None = None
    """vqa: the annotation file with the ten answers of each question."""
    image_pattern: str | None = None
    """vqa, gqa: file name of an image below ``image_root``, with ``{image_id}``, as in
    ``COCO_val2014_{image_id:012d}.jpg``. Default for vqa COCO's own name for the question file's split, else
    ``{image_id:012d}.jpg``; for gqa ``{image_id}.jpg``."""
    image_root: str | None = None
    """Folder that image paths are relative to and may not leave. Not used by webdataset and parquet."""
    name: str | None = None
    """Source name in counts and caps; default the record's own ``source``, else the file's stem."""
    cap: Positive | None = None
    """At most this many accepted samples from this source."""


class HygieneConfig(Section):
    min_tokens: Annotated[int, Field(ge=0)] | None = None
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

    def limits(self, stage: Literal["align", "instruct"]) -> HygieneLimits:
        """What holds in ``stage``, its defaults filled in."""
        low, high, spam = (5, 60, CAPTION_SPAM) if stage == "align" else (1, None, ())
        return HygieneLimits(
            min_tokens=low if self.min_tokens is None else self.min_tokens,
            max_tokens=high if self.max_tokens is None else self.max_tokens,
            spam=spam if self.spam is None else self.spam,
            duplicates=self.duplicates, near_threshold=self.near_threshold, source_cap=self.source_cap,
        )  # fmt: skip


CAPTION_SPAM = (
    "watermark", "stock photo", "stock image", "royalty free", "download", "click here", "click to",
)  # fmt: skip


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


class DataConfig(Section):
    dataset: DatasetKind = "jsonl"
    """Kind of ``json_path``; see also ``sources`` for several."""
    json_path: str | None = None
    """Training records. Give this or ``sources``."""
    image_root: str | None = None
    """Folder that image paths are relative to and may not leave."""
    sources: tuple[SourceConfig, ...] = ()
    """Several record files instead of ``json_path``."""
    eval_sources: tuple[SourceConfig, ...] = ()
    """Held-out records of their own. When given, ``split_mode`` must be ``none``: nothing is split off."""
    split_mode: Literal["ratio", "stratified_len", "none"] | None = None
    """How held-out samples are taken from the training records. Default ratio, or none with ``eval_sources``."""
    eval_ratio: Fraction | None = None
    """ratio: share of the records held out (default 0.02). Give this or ``eval_size``."""
    eval_size: Positive | None = None
    """Held-out samples; with ``eval_sources`` at most this many of theirs."""
    split_seed: Annotated[int, Field(ge=0, le=2**32 - 1)] | None = None
    """Decides which samples are used and held out, and which images are swapped; default ``seed``. Runs that differ
    in ``seed`` alone are measured on the same samples when this is the same."""
    len_buckets: tuple[int, ...] = (0, 10, 20, 9999)
    """Upper bounds of the target-length buckets in tokens: ``[0, 10, 20, 9999]`` means <=10, 11-20, >=21."""
    max_samples: Positive | None = None
    """Use only this many records (train + eval), drawn by the seed."""
    multi_image_fraction: Fraction = 0.0
    """Share of training samples that join two captioned images under template B (at most 2 images a sample)."""
    augment: Literal["none", "random_crop"] = "none"
    """random_crop: 80-100 % of the area, seeded by (seed, epoch, sample). Switches the feature store off."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or undecodable image: stop, or reject the sample, count it and name it."""
    verify_images: Literal["none", "exists", "decode"] = "exists"
    """What is checked of every image before training starts."""
    max_megapixels: Annotated[float, Field(gt=0)] = 50.0
    """Larger images are refused before they are decoded."""
    hygiene: HygieneConfig = HygieneConfig()
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Processes that decode and encode ahead of training, per rank. 0: in the training process."""
    prefetch_factor: Positive = 2
    """What each worker keeps ready: micro-batches, or with packing what shares rows (up to 64 samples)."""
    pin_memory: bool = False
    """Page-locked host memory for faster copies to a GPU."""
    persistent_workers: bool = True
    """Keep workers alive between epochs."""

    def impossible(self) -> list[str]:
        wrong: list[str] = []
        if bool(self.json_path) == bool(self.sources):
            wrong.append("give exactly one of json_path and sources")
        if self.sources and self.image_root:
            wrong.append("image_root belongs to json_path; with sources, give image_root in each source")
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
        return (SourceConfig(dataset=self.dataset, json_path=self.json_path, image_root=self.image_root),)

    @property
    def split(self) -> Literal["ratio", "stratified_len", "none"]:
        return self.split_mode or ("none" if self.eval_sources else "ratio")


class FeaturesConfig(Section):
    enabled: bool = True
    """Compute frozen-tower features once and keep them on disk."""
    dir: str | None = None
    """Folder of the store, shared by all runs. Default ``$BEHOLDER_CACHE/features``, else
    ``~/.cache/beholder/features``."""
    max_gb: Annotated[float, Field(gt=0)] = 20.0
    """Size cap in GB (1e9 bytes). Images that do not fit go through the tower at every step."""


class PromptingConfig(Section):
    image_token: str = "<image>"
    """Marker of an image in the user turns of record files."""
    max_images_per_sample: Positive = 2
    """Samples with more images are rejected."""
    max_seq_len: Positive = 1536
    """Longest sample in tokens, image positions included. Longer captions are cut and counted."""
    too_long: Literal["truncate_answer", "reject"] = "truncate_answer"
    """A sample longer than ``max_seq_len``: cut the end of its last answer and count it, or reject, name and count it.
    One whose prompt alone is too long is rejected in either case."""
    template: Literal["caption", "conversation", "chat"] | None = None
    """caption: templates A and B. conversation: the records' own user text, no chat template. chat: the tokenizer's
    chat template. Default caption in stage align, chat in stage instruct."""
    chat_template: str | None = None
    """chat: a Jinja file to use instead of the tokenizer's own template."""
    system: str | None = None
    """chat: system text put before conversations that have none. Default: whatever the template does by itself."""
    thinking: bool = False
    """chat: for templates with a reasoning mode (Qwen3), whether a prompt leaves it open (``enable_thinking``)."""
    instruction: str = "Describe the image in one sentence."
    """Template A's text after the image."""
    instruction_multi: str = "Describe each image in order, one sentence per image."
    """Template B's text after the images."""
    im_start: str = "auto"
    """Text whose existing tokens open an image; auto: the tokenizer's own vision token, else ``[``."""
    im_end: str = "auto"
    """Text whose existing tokens close an image; auto: the tokenizer's own vision token, else ``]``."""
    pad_to_multiple_of: Positive = 8
    """Row lengths are rounded up to this."""


# ---------------------------------------------------------------------------------------------------------------
# train, eval


class PerGroup(Section):
    connector: Annotated[float, Field(ge=0)]
    lora: Annotated[float, Field(ge=0)] = 0.0


class LearningRates(PerGroup):
    connector: Annotated[float, Field(ge=0)] = 1e-4
    """Peak learning rate of the connector."""
    lora: Annotated[float, Field(ge=0)] = 5e-5
    """Peak learning rate of the adapters (stage 2)."""


class WeightDecays(PerGroup):
    connector: Annotated[float, Field(ge=0)] = 0.01
    """On the connector's matrices; norms, biases and latents always get 0."""
    lora: Annotated[float, Field(ge=0)] = 0.0


class TrainConfig(Section):
    num_epochs: Annotated[float, Field(gt=0)] = 1
    """Passes over the training samples. Ignored when ``train_steps`` is given."""
    train_steps: Positive | None = None
    """Optimizer steps."""
    micro_batch_size: Positive = 8
    """Samples in one forward and backward pass. When packed: whole rows, as many as so many samples fill on average,
    at least one; so a micro-batch of 1 is packed too (up to 64 samples of a step share rows), in the memory of a row of
    ``pack_len``."""
    gradient_accum: Positive = 1
    """micro_batch_size x gradient_accum samples make one optimizer step, however many processes share them."""
    packing: bool = True
    """Lay several samples into one row, with restarting positions and block-diagonal attention."""
    pack_len: Positive | None = None
    """Longest packed row in tokens; default max_seq_len."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Compute type; trainable weights and optimizer state are always fp32."""
    grad_clip: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest global gradient norm."""
    lr: LearningRates = LearningRates()
    weight_decay: WeightDecays = WeightDecays()
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup_ratio: Fraction = 0.03
    """Share of the steps with a linearly rising learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: Fraction = 0.1
    """Share of the peak the schedule ends at."""
    save_every: Positive = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    """Checkpoints kept; never fewer than two."""
    log_every: Positive = 20
    """Steps between log lines; metrics.jsonl gets every step."""
    full_eval_every: Cadence | Positive = "epoch"
    """When the whole held-out set is evaluated. epoch, in stage instruct: at every ``save_every`` too, because the best
    checkpoint is chosen among those that were (S2-7)."""
    quick_eval_size: Annotated[int, Field(ge=0)] = 0
    """Held-out samples of a quick evaluation."""
    quick_eval_steps: Annotated[int, Field(ge=0)] = 0
    """Steps between quick evaluations; 0: none."""
    tqdm_disable: bool = False
    """No live progress bar, even on a terminal."""
    progress_percent: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of an epoch between ``[progress]`` lines."""
    num_threads: Positive | None = None
    """CPU threads of a process; default torch's."""


class GenerateConfig(Section):
    temperature: Annotated[float, Field(ge=0)] = 0.2
    """0: greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.9
    max_new_tokens: Positive = 64
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0


class EvalConfig(Section):
    batch_size: Positive = 16
    """Samples a forward pass; the numbers do not depend on it."""
    golden_set_path: str | None = None
    """File of the fixed set; made on first use. Default inside the run folder."""
    golden_size: Annotated[int, Field(ge=0)] | None = None
    """Samples of the fixed set that is captioned or asked during training. Default 32 in stage align, 64 in stage
    instruct."""
    golden_seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 123
    run_golden_every: Literal["save", "epoch", "end", "never"] | Positive = "save"
    golden_batch_size: Positive = 8
    golden_generate: GenerateConfig = GenerateConfig()
    caption_samples: Annotated[int, Field(ge=0)] = 256
    """Held-out samples whose last answer is written at the end, greedily. align: captions, scored by exact match, BLEU,
    ROUGE-L, CIDEr-D and CHAIR; instruct: answers, scored by VQA accuracy, POPE and exact match as well. 0: none."""
    answer_tokens: Positive = 64
    """Longest answer written for them, in tokens."""
    qa_samples: Annotated[int, Field(ge=0)] = 200
    """align: questions made from the held-out captions ("What is in the image?", "What colour is the …?"); 0: none."""
    retention_path: str | None = None
    """instruct: a text file, a passage a line, on which the language model with and without its adapters is compared.
    Default a fixed set of the package (English, other languages, code, arithmetic, dialogue)."""
    object_list: str | None = None
    """Objects for CHAIR and the questions: a text file, one ``name: synonym, synonym`` a line. Default COCO's 80."""
    clip_model: str | None = None
    """CLIP folder or hub name for CLIPScore; none: not measured."""
    audit_turns: Annotated[int, Field(ge=0)] = 128
    """Held-out answers that the language model is scored on without any image, and the trained model with an empty one
    (leakage audit); 0: none."""


class AblationConfig(Section):
    run_every: Cadence | Positive = "end"
    """When the loss with the wrong images is measured besides the end."""
    num_samples: Annotated[int, Field(ge=2)] = 256
    """Held-out samples of the measurement; shuffling needs at least two."""
    conditions: tuple[Literal["shuffled", "zero", "noise"], ...] = ("shuffled", "zero", "noise")
    """The wrong images: another sample's, one whose normalised pixels are 0, one whose normalised pixels are drawn
    from N(0, 1)."""


# ---------------------------------------------------------------------------------------------------------------
# gates


class GateConfig(Section):
    """A condition that the evidence of a run must meet before the run may be built upon."""

    enable: bool = True
    measure: str | None = None
    """Name of the measurement it judges, such as ``ablation.delta.shuffled``. Required for a gate of your own."""
    above: float | None = None
    """It must be larger than this."""
    at_least: float | None = None
    """It must not be smaller than this."""
    at_most: float | None = None
    """It must not be larger than this."""
    end: Literal["value", "low", "high"] = "value"
    """What is judged: the value, or the lower or upper end of its 95 % interval."""
    stratum: str | None = None
    """Judge it in this group only, such as ``yes/no``."""
    strata: bool = False
    """Judge it in every group of samples as well (target length, turn, question, answer type), not only overall."""
    min_n: Positive = 20
    """Groups with fewer samples are not judged."""
    why: str = ""
    """What the gate protects from, for the report."""

    @property
    def bound(self) -> str:
        """``> 1.05``."""
        pairs = ((">", self.above), ("≥", self.at_least), ("≤", self.at_most))
        return " and ".join(f"{sign} {value:g}" for sign, value in pairs if value is not None)


def _gate(measure: str, why: str, **bounds: Any) -> GateConfig:
    return GateConfig(measure=measure, why=why, **bounds)


GATES: dict[str, GateConfig] = {
    "learned": _gate("learn.delta", "the held-out loss fell, beyond its uncertainty", above=0, end="low"),
    "settled": _gate(
        "curve.late_share", "the loss fell and then flattened: the last quarter of training brought little", at_most=0.2
    ),
    "looks_shuffled": _gate(
        "ablation.delta.shuffled", "another sample's image makes it worse", above=0, end="low"
    ),
    "looks_zero": _gate("ablation.delta.zero", "an empty image makes it worse", above=0, end="low"),
    "looks_noise": _gate("ablation.delta.noise", "a noise image makes it worse", above=0, end="low"),
    "looks_clearly": _gate(
        "ablation.ratio.shuffled",
        "the image matters, not only measurably: healthy alignments reach 1.2 and more, a collapsed one 1.002",
        above=1.05, end="low",
    ),
    "looks_everywhere": _gate(
        "ablation.ratio.shuffled", "no group of samples is answered without looking", above=1.02, end="low", strata=True
    ),
    "no_leak": _gate(
        "audit.trained.leak", "answers are not read from earlier turns' text instead of the image", at_most=0.05,
        end="low",
    ),
    "better_than_text": _gate(
        "learn.delta_text", "its loss is below the language model's own, without any image", above=0, end="low"
    ),
    "no_collapse": _gate(
        "collapse.worst", "outputs are not empty, looping, all alike or the same for every image", at_most=0.5
    ),
    "nothing_cut": _gate("data.truncated_pct", "targets are not cut to the maximum length", at_most=1),
    "all_supervised": _gate("data.label_zero_pct", "every sample had something to learn", at_most=0),
    "frozen": _gate("frozen.changed", "frozen weights are bit-identical afterwards", at_most=0),
    "text_unchanged": _gate("text.changed", "the language model answers text as before, bit for bit", at_most=0),
}  # fmt: skip
"""The gates of every alignment (S11-7); ``gates:`` in a config changes, switches off or adds some by name."""

INSTRUCT_GATES: dict[str, GateConfig] = GATES | {
    "frozen": _gate("frozen.changed", "tower and base weights are bit-identical afterwards", at_most=0),
    "text_unchanged": _gate(
        "text.changed", "with its adapters off the language model answers text as before, bit for bit", at_most=0
    ),
    "retained": _gate(
        "retention.loss_ratio", "with its adapters on the language model still writes text as well as the base",
        at_most=1.05,
    ),
    "answers_look": _gate(
        "answer.gain.none", "answers are right more often with the image than without, for every kind of question",
        above=0, end="low", strata=True,
    ),
    "answers_look_closely": _gate(
        "answer.gain.shuffled", "answers are right more often with their own image than with another's, for every kind",
        above=0, end="low", strata=True,
    ),
    "merges": _gate(
        "merge.tokens_changed_pct", "with its adapters merged into the weights it predicts the answers as before",
        at_most=2,
    ),
}  # fmt: skip
"""The gates of every instruction tuning (S2-5, S2-7): the alignment's, about a model whose adapters learn."""


def stage_gates(stage: Literal["align", "instruct"]) -> dict[str, GateConfig]:
    return INSTRUCT_GATES if stage == "instruct" else GATES


def stage_of(stage: str | None, model: object) -> Literal["align", "instruct"]:
    """The stage of a run that names ``stage`` or leaves it to whether ``model`` has adapters."""
    if stage in ("align", "instruct"):
        return stage
    lora = getattr(model, "lora", None)  # the model section may have errors of its own and be absent
    return "instruct" if isinstance(lora, LoraConfig) and lora.enable is True else "align"


def complete_gates(given: dict[str, GateConfig], stage: Literal["align", "instruct"]) -> dict[str, GateConfig]:
    """The stage's own gates with what ``given`` changes of them, then the others; all stand in the resolved config."""
    own = {
        name: gate.model_copy(update={f: getattr(given[name], f) for f in given[name].model_fields_set})
        if name in given else gate
        for name, gate in stage_gates(stage).items()
    }  # fmt: skip
    return own | {name: gate for name, gate in given.items() if name not in own}


# ---------------------------------------------------------------------------------------------------------------
# sweep


class SweepConfig(Section):
    """Short runs over a grid of settings, on one split and one golden set (``beholder sweep``)."""

    grid: dict[str, tuple[bool | int | float | str, ...]]
    """Dotted setting -> the values it takes; every combination is a run."""
    seeds: tuple[Annotated[int, Field(ge=0, le=2**32 - 1)], ...] = ()
    """Repeat every combination with these seeds, to tell a difference from chance; none: the config's seed alone."""
    ablation_weight: Annotated[float, Field(ge=0)] = 0.1
    """Score = held-out loss - this x (shuffled minus correct loss + zero minus correct loss); lower is better."""
    collapsed_below: Fraction = 0.1
    """Runs whose shuffled minus correct loss is below this share of the grid's median are marked "do not use"."""
    parallel: Positive | None = None
    """Runs at a time; default one for each GPU, one on a CPU."""

    def impossible(self) -> list[str]:
        wrong = [] if self.grid else ["grid is empty; give at least one setting with its values"]
        wrong += [f"grid {key} has no values" for key, values in self.grid.items() if not values]
        wrong += [f"grid {key} has a value twice" for key, v in self.grid.items() if len(set(map(repr, v))) < len(v)]
        if len(set(self.seeds)) < len(self.seeds):
            wrong.append("seeds has a number twice")
        return wrong


SCALES: dict[str, dict[str, bool | int | float | str | None]] = {
    "smoke": {"data.max_samples": 2000, "data.eval_size": 200, "train.train_steps": 200, "train.save_every": 200},
    "trial": {"data.max_samples": 20_000, "data.eval_size": 2000, "train.train_steps": None, "train.num_epochs": 1},
    "full": {},
}
"""The seed's runbook (S2-7): settings of ``beholder run CONFIG --scale NAME``; ``scales:`` in a config has its own."""


class RunConfig(Section):
    """One run: a stage, its parts, its data, its training and its evidence."""

    run_name: Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$")]
    """Name of the run; part of a path, so without slashes and not starting with a dot."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Decides order, split, initial weights and dropout."""
    stage: Literal["align", "instruct"] | None = None
    """Default: instruct when ``model.lora.enable`` is set, else align."""
    output_dir: str | None = None
    """Run folder; default ``outputs/<run_name>``."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the model runs."""
    model: ModelConfig
    data: DataConfig
    features: FeaturesConfig = FeaturesConfig()
    prompting: PromptingConfig = PromptingConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    ablation: AblationConfig = AblationConfig()
    gates: Annotated[dict[str, GateConfig], Field(default_factory=dict, validate_default=True)]
    """What the evidence must show before the run may be built upon; the stage's own gates unless changed by name."""
    scales: dict[str, dict[str, bool | int | float | str | None]] = {}
    """Named sets of settings (dotted name: value) for ``beholder run CONFIG --scale NAME``, in place of the runbook's
    smoke, trial and full."""
    sweep: SweepConfig | None = None
    """Only for ``beholder sweep``."""

    @field_validator("gates")
    @classmethod
    def _complete(cls, given: dict[str, GateConfig], info: ValidationInfo) -> dict[str, GateConfig]:
        return complete_gates(given, stage_of(info.data.get("stage"), info.data.get("model")))

    @property
    def measure_seed(self) -> int:
        """Decides which samples are held out and how images are swapped."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def stage_name(self) -> Literal["align", "instruct"]:
        return stage_of(self.stage, self.model)

    @property
    def golden_size(self) -> int:
        """Samples of the fixed set that are asked for; fewer when fewer are held out."""
        default = 32 if self.stage_name == "align" else 64
        return default if self.eval.golden_size is None else self.eval.golden_size

    @property
    def hygiene(self) -> HygieneLimits:
        """What hygiene holds training records to in this stage."""
        return self.data.hygiene.limits(self.stage_name)

    @property
    def run_dir(self) -> str:
        return self.output_dir or f"outputs/{self.run_name}"

    @property
    def template(self) -> Literal["caption", "conversation", "chat"]:
        return self.prompting.template or ("chat" if self.stage_name == "instruct" else "caption")

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.train.micro_batch_size * self.train.gradient_accum

    def impossible(self) -> list[str]:
        wrong: list[str] = []
        if self.stage_name == "instruct" and not self.model.lora.enable and not self.model.connector.trainable:
            wrong.append("nothing would be trained: model.lora.enable and model.connector.trainable are false")
        if self.stage_name == "align" and not self.model.connector.trainable:
            wrong.append("stage align trains the connector, but model.connector.trainable is false")
        if self.stage_name == "instruct" and self.template == "caption":
            wrong.append(
                "stage instruct answers questions, and prompting.template caption has none; use chat or conversation"
            )
        if self.stage_name == "instruct" and self.prompting.max_images_per_sample > 1:
            wrong.append(
                "stage instruct takes one image a sample; set prompting.max_images_per_sample: 1 (several images come "
                "with stage multi)"
            )
        if self.prompting.max_images_per_sample < 2 and self.data.multi_image_fraction > 0:
            wrong.append("data.multi_image_fraction needs prompting.max_images_per_sample of at least 2")
        limits = self.hygiene
        if limits.max_tokens is not None and limits.min_tokens > limits.max_tokens:
            wrong.append(
                f"data.hygiene.min_tokens is {limits.min_tokens}, larger than data.hygiene.max_tokens "
                f"{limits.max_tokens}"
            )
        for name, gate in self.gates.items():
            if gate.strata and gate.stratum is not None:
                wrong.append(f"gates.{name}: strata judges every group and stratum one of them; give one of the two")
            if gate.measure is None:
                own = ", ".join(stage_gates(self.stage_name))
                wrong.append(f"gates.{name} has no measure; name what it judges, or use one of the stage's own: {own}")
            elif not gate.bound:
                wrong.append(f"gates.{name} has no bound; give above, at_least or at_most")
        return wrong
