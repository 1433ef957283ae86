"""One run: its training, its measuring, and the config that holds every section.

Paths are relative to the working directory, as on a command line.
"""

from __future__ import annotations

import re
from operator import attrgetter
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from beholder.config.data import DataConfig, FeaturesConfig, HygieneLimits, PromptingConfig, Template
from beholder.config.distill import DistillConfig
from beholder.config.monitors import MONITORED, RETAINED, SHARES, WATCHED, folded, is_script
from beholder.config.parts import FROZEN_CONNECTOR, FROZEN_LANGUAGE, FROZEN_TOWER, NO_ADAPTERS, ModelConfig
from beholder.config.section import (
    Cadence,
    Filled,
    Fraction,
    Inert,
    Natural,
    Positive,
    Section,
    Tiny,
    Written,
    decides,
    given_twice,
    no_pattern,
)  # fmt: skip
from beholder.config.stages import (
    GUARDRAILS,
    GateConfig,
    GuardrailConfig,
    Stage,
    StageName,
    complete_gates,
    complete_guardrails,
    stage_of,
)  # fmt: skip
from beholder.config.studies import DistillationConfig, FootprintConfig, StudyConfig, SweepConfig

# ---------------------------------------------------------------------------------------------------------------
# train, eval


_Rate = Annotated[float, Field(ge=0, le=10)]
_Decay = Annotated[float, Field(ge=0, le=100)]


class LearningRates(Section):
    connector: Annotated[_Rate, FROZEN_CONNECTOR] = 1e-4
    """Peak learning rate of the connector."""
    lora: Annotated[_Rate, NO_ADAPTERS] = 5e-5
    """Peak learning rate of the adapters on the language model (from stage 2 on)."""
    vision: Annotated[_Rate, FROZEN_TOWER] = 5e-5
    """Peak learning rate of what learns in the vision tower: its adapters, its unfrozen blocks."""
    language: Annotated[_Rate, FROZEN_LANGUAGE] = 2e-4
    """Peak learning rate of a language model that learns whole (``model.student``)."""


class WeightDecays(Section):
    connector: Annotated[_Decay, FROZEN_CONNECTOR] = 0.01
    """On the connector's matrices; norms, biases and latents always get 0."""
    lora: Annotated[_Decay, NO_ADAPTERS] = 0.0
    vision: Annotated[_Decay, FROZEN_TOWER] = 0.0
    language: Annotated[_Decay, FROZEN_LANGUAGE] = 0.01
    """On the matrices of a language model that learns whole, its embeddings among them; norms and biases get 0."""


TrackerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]
"""Rows of `train.tracking.TRACKERS`."""

_SHOWN = decides("watching")
_Beta = Annotated[float, Field(ge=0, lt=1)]


class TrainConfig(Section):
    num_epochs: Annotated[
        float, Field(gt=0, le=1_000_000),
        Inert(lambda _, own: own.train_steps is not None, "train.train_steps decides", ".train_steps"),
    ] = 1  # fmt: skip
    """Passes over the training samples. Ignored when ``train_steps`` is given."""
    train_steps: Positive | None = None
    """Optimizer steps."""
    micro_batch_size: Annotated[Positive, Field(le=65_536), Tiny(at_most=4)] = 8
    """Samples in one forward and backward pass. When packed: whole rows, as many as so many samples fill on average,
    at least one; so a micro-batch of 1 is packed too (up to 64 samples of a step share rows), in the memory of a row of
    ``pack_len``."""
    gradient_accum: Annotated[Positive, Field(le=65_536), Tiny(at_most=2)] = 1
    """micro_batch_size x gradient_accum samples make one optimizer step, however many processes share them."""
    packing: bool = True
    """Lay several samples into one row, with restarting positions and block-diagonal attention."""
    pack_len: Annotated[
        Positive | None, Field(le=16_777_216),
        Inert(lambda _, own: not own.packing, "train.packing is false", ".packing"),
    ] = None  # fmt: skip
    """Longest packed row in tokens; default max_seq_len."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Compute type; trainable weights and optimizer state are always fp32."""
    grad_clip: Annotated[float, Field(gt=0, le=1_000_000)] | None = 1.0
    """Largest global gradient norm."""
    lr: LearningRates = LearningRates()
    weight_decay: WeightDecays = WeightDecays()
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    warmup_ratio: Fraction = 0.03
    """Share of the steps with a linearly rising learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """wsd: warm-up, stable, and a fall in the last fifth of the steps."""
    min_lr_ratio: Annotated[
        Fraction, Inert(lambda _, own: own.lr_scheduler == "constant", "the schedule is constant", ".lr_scheduler")
    ] = 0.1
    """Share of the peak the schedule ends at."""
    save_every: Annotated[Positive, _SHOWN] = 1000
    """Steps between checkpoints; one is always written at the end."""
    keep_checkpoints: Annotated[Positive, Field(ge=2), _SHOWN] = 3
    """Checkpoints kept; never fewer than two."""
    log_every: Annotated[Positive, _SHOWN, Tiny(value=1)] = 20
    """Steps between log lines; metrics.jsonl gets every step."""
    full_eval_every: Annotated[Cadence | Positive, _SHOWN] = "epoch"
    """When the whole held-out set is evaluated. epoch, in stage instruct: at every ``save_every`` too, because the best
    checkpoint is chosen among those that were (S2-7)."""
    quick_eval_size: Annotated[
        Natural, _SHOWN, Tiny(at_most=4),
        Inert(
            lambda _, own: own.quick_eval_steps == 0, "train.quick_eval_steps is 0 or not given", ".quick_eval_steps"
        ),
    ] = 0  # fmt: skip
    """Held-out samples of a quick evaluation."""
    quick_eval_steps: Annotated[
        Natural, _SHOWN, Tiny(at_most=2),
        Inert(lambda _, own: own.quick_eval_size == 0, "train.quick_eval_size is 0 or not given", ".quick_eval_size"),
    ] = 0  # fmt: skip
    """Steps between quick evaluations; 0: none."""
    tqdm_disable: Annotated[bool, _SHOWN] = False
    """No live progress bar, even on a terminal."""
    progress_percent: Annotated[float, Field(gt=0, le=1), _SHOWN] = 0.1
    """Share of an epoch between ``[progress]`` lines."""
    num_threads: Annotated[Positive | None, Field(le=1024), decides("speed"), Tiny(value=1)] = None
    """CPU threads of a process; default torch's."""
    timeout_s: Annotated[float, Field(ge=1, le=7 * 86_400), decides("speed")] = 600.0
    """Longest wait in seconds for another process of the job, or for one that loads data, without a sign of life; then
    the run stops and says which one hangs."""


class GenerateConfig(Section):
    temperature: Annotated[float, Field(ge=0, le=100)] = 0.2
    """0: greedy."""
    top_p: Annotated[
        float, Field(gt=0, le=1),
        Inert(lambda _, own: own.temperature == 0, "temperature 0 is greedy", ".temperature"),
    ] = 0.9  # fmt: skip
    max_new_tokens: Annotated[Positive, Field(le=1_048_576), Tiny(value=6)] = 64
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0


GREEDY = GenerateConfig(temperature=0.0, top_p=1.0)
"""Deterministic decoding, 64 new tokens: what scores are measured with, and what is used when nothing else is asked."""


_NEVER_WRITTEN = Inert(
    lambda cfg, _: cfg.golden_size == 0 or cfg.eval.run_golden_every == "never",
    "the fixed set is never captioned (eval.golden_size 0, or run_golden_every never)",
    "eval.golden_size eval.run_golden_every",
)
_NO_CAPTIONS = Inert(lambda _, own: own.caption_samples == 0, "eval.caption_samples is 0", ".caption_samples")


_ONE_IMAGE = Inert(
    lambda cfg, _: "slots" not in cfg.stage_record.measures, "places are measured in a stage of several images", "stage"
)


_UNASKED = Inert(lambda _, own: own.path is None, "there are no images for it (path is not given)", ".path")


NEGATION = (
    r"(?:不是|并不是|並不是|并非|並非|绝非|不算|不属于|不屬於|没有|沒有|(?<!是)非)(?:一?[张張幅个個种種])?{phrase}"
    r"|(?:\b(?:not|never|no|cannot|pas|nicht|kein\w*|не|нет)|n['’]t)\b"
    r"(?:\s+(?:an?|the|really|actually|at all|de|une?|l[ae]s?|eine?\w?|d(?:er|ie|as)|una?))*\s+{phrase}"
    r"|{phrase}\s*(?:では(?:な|あり)|じゃ(?:な|あり)|[이가]?\s*아[니닙])"
)
"""What takes a phrase back in some languages: negations right before it (with an article or a measure word), or after
it."""


class IrrelevantConfig(Section):
    """Images that have nothing to do with the task, of which the model must say so."""

    path: Annotated[Filled | None, Tiny()] = None
    """A record file or a folder of images (docs/data.md, "Monitors"), as `beholder prepare ood` makes them; none: not
    measured."""
    image_root: Annotated[str | None, _UNASKED, Tiny()] = None
    """Folder the records' images are relative to; default ``images`` beside the record file, else the file's own."""
    phrase: Annotated[str, Field(min_length=1), _UNASKED] = "无关图片"
    """What the answer must contain, in any language; width of characters and case do not count."""
    pattern: Annotated[str | None, _UNASKED] = None
    """A regular expression to be found in the answer, in place of ``phrase``."""
    negation: Annotated[str | None, _UNASKED] = NEGATION
    """A regular expression: what takes the phrase back, with {phrase} in its place ("not {phrase}"); what it matches
    does not count as said. null: nothing does."""
    prompt: Annotated[str | None, _UNASKED] = None
    """What is asked about images whose record asks nothing; default the held-out samples' own questions, in turn."""

    def impossible(self) -> list[str]:
        wrong = [] if self.pattern is None else _bad_pattern("pattern", self.pattern)
        if self.negation is not None:
            if "{phrase}" not in self.negation:
                wrong.append(f"negation {self.negation[:200]!r} has no {{phrase}} for what is taken back")
            elif (why := no_pattern(self.negation.replace("{phrase}", "x"))) is not None:
                wrong.append(f"negation {self.negation[:200]!r} is not a regular expression: {why}")
        if not folded(self.phrase):
            wrong.append(f"phrase {self.phrase!r} is blank, so every answer would have it; give the words that count")
        return wrong


class OodConfig(Section):
    """Images unlike the training's, which the model describes in its own words."""

    path: Annotated[Filled | None, Tiny()] = None
    """A record file or a folder of images (docs/data.md, "Monitors"), as `beholder prepare ood` makes them; none: not
    measured."""
    image_root: Annotated[str | None, _UNASKED, Tiny()] = None
    """Folder the records' images are relative to; default ``images`` beside the record file, else the file's own."""
    prompt: Annotated[str, _UNASKED] = "Describe this image in natural language."
    """What a model that answers is asked; one that captions gets the instruction it was trained with."""
    question: Annotated[str | None, _UNASKED] = "Is there a {object} in the image?"
    """Asked of a model that answers about an object the image does not show, of those that the training texts name;
    null: not asked."""
    yes: Annotated[str, _UNASKED] = r"\s*(yes\b|是(?![否不])|有(?!没有)|对(?![不于])|はい|да\b|oui\b|sí\b|ja\b|نعم)"
    """A regular expression: with what an answer begins that says yes."""
    script: Annotated[str | None, _UNASKED] = None
    """The script captions must be in, by the first word of its letters' names in Unicode: latin, cjk (Chinese),
    hiragana, hangul, cyrillic, arabic, …; none: any."""

    def impossible(self) -> list[str]:
        wrong = _bad_pattern("yes", self.yes)
        if self.question is not None and "{object}" not in self.question:
            wrong.append(f"question {self.question!r} has no {{object}} for what is asked about")
        if self.script is not None and not is_script(self.script):
            wrong.append(
                f"script {self.script!r} is not the first word of any letter's name in Unicode; such are latin, cjk "
                "(Chinese), hiragana, katakana, hangul, cyrillic, greek, arabic, hebrew, devanagari and thai"
            )
        return wrong


def _bad_pattern(name: str, pattern: str) -> list[str]:
    """Also one that is found in a text that says nothing is of no use: it would be found in nearly every answer."""
    if (why := no_pattern(pattern)) is not None:
        return [f"{name} {pattern[:200]!r} is not a regular expression: {why}"]
    empty = next((text for text in ("", " ", ".") if re.search(pattern, text)), None)
    if empty is None:
        return []
    return [
        f"{name} {pattern[:200]!r} matches {'the empty text' if not empty else repr(empty)}, so it would be found "
        "where nothing is said; expected a regular expression that needs the words that count"
    ]


class EvalConfig(Section):
    all_decide = decides("measuring")

    batch_size: Annotated[Positive, Field(le=65_536), decides("speed"), Tiny(at_most=8)] = 16
    """Samples a forward pass; the numbers do not depend on it."""
    golden_set_path: Annotated[Filled | None, _NEVER_WRITTEN] = None
    """File of the fixed set; made on first use. Default inside the run folder."""
    golden_size: Annotated[
        Natural | None,
        Inert(
            lambda cfg, own: cfg.golden_size > 0 and own.run_golden_every == "never",
            "eval.run_golden_every is never", ".run_golden_every",
        ),
    ] = None  # fmt: skip
    """Samples of the fixed set that is captioned or asked during training. Default 32 in stage align, 64 in stage
    instruct."""
    golden_seed: Annotated[int, Field(ge=0, le=2**32 - 1), _NEVER_WRITTEN] = 123
    run_golden_every: Annotated[
        Literal["save", "epoch", "end", "never"] | Positive,
        Inert(lambda cfg, _: cfg.golden_size == 0, "eval.golden_size is 0", ".golden_size"),
    ] = "save"
    golden_batch_size: Annotated[Positive, Field(le=65_536), _NEVER_WRITTEN] = 8
    golden_generate: Annotated[GenerateConfig, _NEVER_WRITTEN] = GenerateConfig()
    caption_samples: Annotated[Natural, Tiny(at_most=4)] = 256
    """Held-out samples whose last answer is written at the end, greedily. align: captions, scored by exact match, BLEU,
    ROUGE-L, CIDEr-D and CHAIR; instruct: answers, scored by VQA accuracy, POPE and exact match as well. 0: none."""
    answer_tokens: Annotated[
        Positive, Field(le=1_048_576), Tiny(at_most=6),
        Inert(
            lambda _, own: own.caption_samples == 0 and not own.watched,
            "eval.caption_samples is 0 and nothing is watched", ".caption_samples",
        ),
    ] = 64  # fmt: skip
    """Longest answer written for them, and about the images of monitors, in tokens."""
    qa_samples: Annotated[
        Natural, Tiny(at_most=4),
        Inert(
            lambda cfg, _: "questions" not in cfg.stage_record.measures,
            "stage instruct is asked the data's own questions (eval.caption_samples)", "stage model.lora.enable",
        ),
    ] = 200  # fmt: skip
    """align: questions made from the held-out captions ("What is in the image?", "What colour is the …?"); 0: none."""
    retention_path: Annotated[
        Filled | None, Tiny(),
        Inert(
            lambda cfg, _: not cfg.has_adapters, "a frozen language model is compared bit by bit",
            "stage model.lora.enable",
        ),
    ] = None  # fmt: skip
    """instruct: a text file, a passage a line, on which the language model with and without its adapters is compared.
    Default a fixed set of the package (English, other languages, code, arithmetic, dialogue)."""
    object_list: Annotated[
        Filled | None, Tiny(),
        Inert(
            lambda _, own: own.caption_samples == 0 and own.qa_samples == 0 and own.ood.path is None,
            "no captions are written and no questions asked", ".caption_samples .qa_samples",
        ),
    ] = None  # fmt: skip
    """Objects for CHAIR, the questions and ``eval.ood``: a text file, one ``name: synonym, synonym`` a line. Default
    COCO's 80."""
    clip_model: Annotated[Filled | None, _NO_CAPTIONS, Tiny()] = None
    """CLIP folder or hub name for CLIPScore; none: not measured."""
    audit_turns: Annotated[Natural, Tiny(at_most=8)] = 128
    """Held-out answers that the language model is scored on without any image, and the trained model with an empty one
    (leakage audit); 0: none."""

    irrelevant: IrrelevantConfig = IrrelevantConfig()
    ood: OodConfig = OodConfig()
    jitter_samples: Annotated[Natural, Tiny(at_most=2)] = 0
    """Held-out samples that are answered once more with a little cut off the edges of their images, at every
    evaluation; 0: none."""
    gap_samples: Annotated[Natural, Tiny(value=0)] = 0
    """Held-out samples, and as many training samples, whose losses make the generalisation gap, at every evaluation;
    0: not measured."""
    retention_every: Annotated[
        Literal["eval", "end"],
        Inert(lambda cfg, _: not cfg.has_adapters, "there are no adapters", "stage model.lora.enable"),
    ] = "end"  # fmt: skip
    """When the loss on plain text is measured: at every evaluation, or at the end alone."""
    strengths: Annotated[
        tuple[Annotated[float, Field(gt=0, lt=1)], ...], Tiny(value=()),
        Inert(lambda cfg, _: not cfg.has_adapters, "there are no adapters", "stage model.lora.enable"),
    ] = ()  # fmt: skip
    """Shares of what the adapters learned at which held-out loss, text loss and monitors are measured at the end as
    well: the line from the base to the trained model, such as [0.25, 0.5, 0.75]. Nothing more is trained for it."""
    baseline_run: Annotated[Filled | None, Tiny()] = None
    """Run folder whose step 0 is the baseline of the guardrails; default this run's own."""

    slot_samples: Annotated[Natural, Tiny(at_most=6), _ONE_IMAGE] = 200
    """Held-out samples of several images in which each image alone is replaced, as many of every number of images;
    0: none."""
    moved_samples: Annotated[Natural, Tiny(at_most=6), _ONE_IMAGE] = 400
    """Held-out samples of several images and a short answer whose images are moved through every place, and as many
    two of which change places; 0: none."""

    def impossible(self) -> list[str]:
        return given_twice("strengths", self.strengths)

    def off(self, measure: str) -> str | None:
        """The setting that would have a monitor's measurement made; None where it is made, and for all others."""
        setting = next((s for begin, s in MONITORED.items() if measure.startswith(begin)), None)
        return setting if setting is not None and not attrgetter(setting.removeprefix("eval."))(self) else None

    @property
    def watched(self) -> tuple[str, ...]:
        """What is measured at every evaluation."""
        more = RETAINED if self.retention_every == "eval" else ()
        return (*(name for name in WATCHED if self.off(name) is None), *more)

    @property
    def greedy(self) -> GenerateConfig:
        """How answers about held-out samples and the images of monitors are written."""
        return GREEDY.model_copy(update={"max_new_tokens": self.answer_tokens})


class AblationConfig(Section):
    all_decide = decides("measuring")

    run_every: Cadence | Positive = "end"
    """When the loss with the wrong images is measured besides the end."""
    num_samples: Annotated[Positive, Field(ge=2), Tiny(at_most=8)] = 256
    """Held-out samples of the measurement; shuffling needs at least two."""
    conditions: tuple[Literal["shuffled", "zero", "noise"], ...] = ("shuffled", "zero", "noise")
    """The wrong images: another sample's, one whose normalised pixels are 0, one whose normalised pixels are drawn
    from N(0, 1)."""

    def impossible(self) -> list[str]:
        return given_twice("conditions", self.conditions)


class RunConfig(Section):
    """One run: a stage, its parts, its data, its training and its evidence."""

    run_name: Annotated[
        str, Field(max_length=200, pattern=r"^[^/\\\x00-\x1f.][^/\\\x00-\x1f]*$"),
        Written("a plain name without slashes, of at most 200 characters"), decides("run"),
    ]  # fmt: skip
    """Name of the run; part of a path, so without slashes and not starting with a dot."""
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 42
    """Decides order, split, initial weights and dropout."""
    stage: StageName | None = None
    """Default: instruct when ``model.lora.enable`` is set or a student learns whole (``model.student``), else align."""
    output_dir: Annotated[Filled | None, decides("run")] = None
    """Run folder; default ``outputs/<run_name>``."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], decides("speed"), Tiny(value="cpu")] = "auto"
    """Where the model runs."""
    model: ModelConfig
    data: DataConfig
    features: FeaturesConfig = FeaturesConfig()
    distill: DistillConfig | None = None
    """What is learned from teachers, in stage distill."""
    prompting: Annotated[PromptingConfig, Field(validate_default=True)] = PromptingConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    ablation: AblationConfig = AblationConfig()
    gates: Annotated[dict[str, GateConfig], Field(default_factory=dict, validate_default=True), decides("measuring")]
    """What the evidence must show before the run may be built upon; the stage's own gates unless changed by name."""
    guardrails: Annotated[
        dict[str, GuardrailConfig], Field(default_factory=dict, validate_default=True), decides("watching"),
        Tiny(value={}),
    ]  # fmt: skip
    """What stops the run early; the stage's own, where their monitor is switched on, unless changed by name."""
    tracking: Annotated[tuple[TrackerName, ...], decides("watching")] = ()
    """Where the run's numbers go beside ``metrics.jsonl``, such as [tensorboard]; each needs its own package
    (docs/tracking.md)."""
    scales: Annotated[
        dict[str, dict[str, bool | int | float | str | None]], Field(default_factory=dict), decides("run")
    ]
    """Named sets of settings (dotted name: value) for ``beholder run CONFIG --scale NAME``, in place of the runbook's
    smoke, trial and full."""
    sweep: Annotated[SweepConfig | None, decides("run"), Tiny()] = None
    """Only for ``beholder sweep``."""
    footprint: Annotated[FootprintConfig | None, decides("run"), Tiny()] = None
    """Only for ``beholder footprint``."""
    distillation: Annotated[DistillationConfig | None, decides("run"), Tiny()] = None
    """Only for ``beholder distill``."""

    @field_validator("prompting")
    @classmethod
    def _number_of_images(cls, given: PromptingConfig, info: ValidationInfo) -> PromptingConfig:
        stage = stage_of(info.data.get("stage"), info.data.get("model"))
        most = given.max_images_per_sample or stage.max_images
        return given.model_copy(update={"max_images_per_sample": most})

    @field_validator("gates")
    @classmethod
    def _complete(cls, given: dict[str, GateConfig], info: ValidationInfo) -> dict[str, GateConfig]:
        return complete_gates(given, stage_of(info.data.get("stage"), info.data.get("model")))

    @field_validator("guardrails")
    @classmethod
    def _guarded(cls, given: dict[str, GuardrailConfig], info: ValidationInfo) -> dict[str, GuardrailConfig]:
        stage, own = stage_of(info.data.get("stage"), info.data.get("model")), info.data.get("eval")
        watched = own.watched if isinstance(own, EvalConfig) else ()
        return complete_guardrails(given, stage, watched.__contains__)

    @property
    def studies(self) -> dict[str, StudyConfig]:
        """The sections that make it more than one run."""
        held = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: study for name, study in held.items() if isinstance(study, StudyConfig)}

    @property
    def guards(self) -> dict[str, GuardrailConfig]:
        """The guardrails that are not switched off."""
        return {name: rule for name, rule in self.guardrails.items() if rule.enable}

    @property
    def measure_seed(self) -> int:
        """Decides which samples are held out and how images are swapped."""
        return self.seed if self.data.split_seed is None else self.data.split_seed

    @property
    def stage_record(self) -> Stage:
        """What its stage is: the one it names, else the one that what may learn makes it."""
        return stage_of(self.stage, self.model)

    @property
    def stage_name(self) -> str:
        return self.stage_record.name

    @property
    def learnt_from(self) -> DistillConfig:
        """The teachers of a run that has some."""
        assert self.distill is not None, "checked by `impossible`"
        return self.distill

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn."""
        return self.stage_record.adapters and self.model.lora.enable

    @property
    def language_learns(self) -> bool:
        """Whether the language model's own weights learn."""
        return self.stage_record.adapters and self.model.language_learns

    @property
    def tower_may_learn(self) -> bool:
        """Whether something in the vision tower learns, or may."""
        return bool(self.model.vision.unfreeze) or (self.has_adapters and self.model.lora.may_reach_tower)

    @property
    def golden_size(self) -> int:
        """Samples of the fixed set that are asked for; fewer when fewer are held out."""
        return self.stage_record.golden_size if self.eval.golden_size is None else self.eval.golden_size

    @property
    def hygiene(self) -> HygieneLimits:
        """What hygiene holds training records to in this stage."""
        return self.data.hygiene.limits(self.stage_record.hygiene)

    @property
    def run_dir(self) -> str:
        return self.output_dir or f"outputs/{self.run_name}"

    @property
    def max_images(self) -> int:
        """Samples with more images are rejected."""
        return self.prompting.max_images_per_sample or self.stage_record.max_images

    @property
    def image_label(self) -> str:
        """Before each image of a sample with several."""
        given = self.prompting.image_label
        return self.stage_record.image_label if given is None else given

    @property
    def template(self) -> Template:
        return self.prompting.template or self.stage_record.template

    @property
    def effective_batch(self) -> int:
        """Samples of one optimizer step, over all processes."""
        return self.train.micro_batch_size * self.train.gradient_accum

    def impossible(self) -> list[str]:
        stage = self.stage_record
        return [
            *given_twice("tracking", self.tracking),
            *self._impossible_learning(stage),
            *self._impossible_samples(stage),
            *self._impossible_gates(stage),
            *self._impossible_guards(),
        ]

    def _impossible_learning(self, stage: Stage) -> list[str]:
        """What learns, and from whom."""
        wrong: list[str] = []
        if self.model.native is not None:
            wrong += self._impossible_natively(stage)
        elif not self.model.connector.trainable and stage.connector_learns:
            wrong.append(f"stage {stage.name} trains the connector, but model.connector.trainable is false")
        if self.model.language_learns and not stage.adapters:
            wrong.append(
                f"stage {stage.name} trains the connector alone, but model.student.learns is "
                f"{self.model.student and self.model.student.learns}; set it to none, or use stage instruct"
            )
        learns = self.model.connector.trainable or self.has_adapters or self.tower_may_learn or self.language_learns
        if not (learns or stage.connector_learns):
            wrong.append("nothing would be trained: model.lora.enable and model.connector.trainable are false")
        if (stage.objective == "distill") != (self.distill is not None):
            wrong.append(
                f"stage {stage.name} learns from no teacher, but distill names some; use stage distill, or leave "
                "distill out"
                if self.distill is not None
                else f"stage {stage.name} learns from a teacher; name it in distill.teachers"
            )
        elif self.distill is not None and self.data.augment != "none" and not self.distill.online:
            wrong.append(
                f"data.augment is {self.data.augment}, but what is kept of a teacher is about the images as they are; "
                "set it to none, or distill.online: true"
            )
        return wrong

    def _impossible_samples(self, stage: Stage) -> list[str]:
        """What a sample is."""
        wrong: list[str] = []
        if self.template not in stage.templates:
            wrong.append(
                f"stage {stage.name} answers questions, and prompting.template {self.template} has none; use "
                f"{' or '.join(stage.templates)}"
            )
        if stage.most_images is not None and self.max_images > stage.most_images:
            number = {1: "one image"}.get(stage.most_images, f"at most {stage.most_images} images")
            wrong.append(
                f"stage {stage.name} takes {number} a sample; set prompting.max_images_per_sample: "
                f"{stage.most_images}. Several images are for stage multi"
            )
        try:
            if self.image_label and self.image_label.format(k=1) == self.image_label.format(k=2):
                raise ValueError("every image has the same")
        except (LookupError, ValueError, AttributeError) as e:
            wrong.append(f"prompting.image_label {self.image_label!r}: {e}; expected a text with {{k}} for the number")
        if self.data.multi_image_fraction > 0 and self.template != "caption":
            wrong.append(
                "data.multi_image_fraction joins two captions under prompting.template caption; under "
                f"{self.template} samples have questions of their own, which a joined one would lose. Remove it; "
                "records of several images are for stage multi"
            )
        elif self.data.multi_image_fraction > 0 and self.max_images < 2:
            wrong.append("data.multi_image_fraction needs prompting.max_images_per_sample of at least 2")
        limits = self.hygiene
        if limits.max_tokens is not None and limits.min_tokens > limits.max_tokens:
            wrong.append(
                f"data.hygiene.min_tokens is {limits.min_tokens}, larger than data.hygiene.max_tokens "
                f"{limits.max_tokens}"
            )
        return wrong

    def _impossible_gates(self, stage: Stage) -> list[str]:
        wrong: list[str] = []
        for name, gate in self.gates.items():
            if gate.strata and gate.stratum is not None:
                wrong.append(f"gates.{name}: strata judges every group and stratum one of them; give one of the two")
            if gate.measure is None:
                own = ", ".join(stage.gates)
                wrong.append(f"gates.{name} has no measure; name what it judges, or use one of the stage's own: {own}")
            elif not gate.bound:
                wrong.append(f"gates.{name} has no bound; give above, at_least or at_most")
            elif gate.enable and (setting := self.eval.off(gate.measure)) is not None:
                wrong.append(f"gates.{name}: {gate.measure} is a monitor without data; give {setting}")
        return wrong

    def _impossible_guards(self) -> list[str]:
        wrong: list[str] = []
        for name, rule in self.guards.items():
            if rule.measure is None:
                wrong.append(
                    f"guardrails.{name} has no measure; name what it judges ({', '.join(WATCHED)}), or use one of: "
                    f"{', '.join(GUARDRAILS)}"
                )
            elif (setting := self.eval.off(rule.measure)) is not None:
                wrong.append(f"guardrails.{name}: {rule.measure} is a monitor without data; give {setting}")
            elif rule.measure not in self.eval.watched or (rule.measure in RETAINED and not self.has_adapters):
                taken = [m for m in self.eval.watched if m not in RETAINED or self.has_adapters]
                wrong.append(
                    f"guardrails.{name}: {rule.measure} is not measured at every evaluation; what is: "
                    f"{', '.join(taken) or 'nothing'}"
                    + ("; retention.* with eval.retention_every: eval" if rule.measure in RETAINED else "")
                )
            elif not rule.stops:
                wrong.append(f"guardrails.{name} has no bound; give falls, rises, below, above or widens")
            else:
                wrong += [f"guardrails.{name}: {why}" for why in rule.useless(share=rule.measure in SHARES)]
        quick = self.train.quick_eval_size and self.train.quick_eval_steps
        ends = ("end", "never")
        if self.guards and not quick and self.train.full_eval_every in ends and self.ablation.run_every in ends:
            wrong.append(
                "guardrails are judged at every evaluation, and none is made before the end: set "
                "train.full_eval_every, or train.quick_eval_size and train.quick_eval_steps"
            )
        return wrong

    def _impossible_natively(self, stage: Stage) -> list[str]:
        wrong: list[str] = []
        if stage.connector_learns:
            wrong.append(
                f"model.native has a connector already, which stage {stage.name} would train; use stage instruct or "
                "multi, with model.lora.enable: true or model.connector.trainable: true"
            )
        if self.template != "chat":
            wrong.append(
                f"model.native reads conversations in its own chat template; prompting.template {self.template} is "
                "another, set it to chat"
            )
        if self.data.augment != "none":
            wrong.append(
                f"data.augment is {self.data.augment}, but model.native lays a sample out by its image's own size; set "
                "it to none"
            )
        return wrong
