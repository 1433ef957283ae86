"""The stages: one `Stage` record each, and the gates it must pass. Here is where a stage is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from beholder.config.data import CAPTION_SPAM, HygieneLimits, Template
from beholder.config.monitors import MONITORS
from beholder.config.parts import ModelConfig
from beholder.config.section import Bound, Positive, Rise, Section, decides
from beholder.types import Condition


class GateConfig(Section):
    """A condition that the evidence of a run must meet before the run may be built upon."""

    all_decide = decides("measuring")

    enable: bool = True
    measure: str | None = None
    """Name of the measurement it judges, such as ``ablation.delta.shuffled``. Required for a gate of your own."""
    above: Bound | None = None
    """It must be larger than this."""
    at_least: Bound | None = None
    """It must not be smaller than this."""
    at_most: Bound | None = None
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
    "describes": _gate(
        "caption.gain.shuffled", "what it writes fits its own image better than what it writes for another's",
        above=0, end="low",
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

INSTRUCT_GATES: dict[str, GateConfig] = {name: gate for name, gate in GATES.items() if name != "describes"} | {
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
    "pairs_right": _gate(
        "pairs.right.correct", "the same question about two pictures gets two right answers, oftener than any guessing "
        "without looking could", above=0.25, end="low",
    ),
    "better_than_words": _gate(
        "learner.gain", "answers are right oftener than what a learner gets from the questions' words alone",
        above=0, end="low",
    ),
    "merges": _gate(
        "merge.tokens_changed_pct", "with its adapters merged into the weights it predicts the answers as before",
        at_most=2,
    ),
}  # fmt: skip
"""The gates of every instruction tuning (S2-5, S2-7): the alignment's, about a model whose adapters learn and that
answers: ``answers_look_closely`` instead of ``describes``."""


SLOT_GATES: dict[str, GateConfig] = {
    "every_slot_counts": _gate(
        "slots.delta.shuffled", "in every place another sample's image makes it worse", above=0, end="low", strata=True
    ),
    "slot_spread": _gate(
        "slots.spread", "it is as often right wherever the image stands that decides", at_most=0.1
    ),
    "no_last_image_bias": _gate(
        "slots.last_bias", "it is not right more often when the image that decides stands last", at_most=0.1
    ),
    "minds_the_order": _gate(
        "slots.order", "when another image stands where the words point, the old answer becomes clearly less likely",
        above=0.1, end="low",
    ),
    "follows_the_swap": _gate(
        "slots.follows", "when two images change places and the words do not, the answer follows", at_least=0.9
    ),
}  # fmt: skip
"""What every stage of several images must show as well (S3-3)."""


TAUGHT_GATES: dict[str, GateConfig] = INSTRUCT_GATES | {
    "close_to_teacher": _gate(
        "teacher.kl", "its next tokens are distributed nearly as its teachers'", at_most=1.0
    ),
    "looking_transfers": _gate(
        "transfer.share", "it leans on the image at least half as much as its teacher does, and has not only learned "
        "its words", at_least=0.5, end="low",
    ),
}  # fmt: skip
"""The gates of every distillation (D-6, E-6); those on a base that stays are not judged where it learns whole."""


class GuardrailConfig(Section):
    """When a run stops itself over what is measured at every evaluation; each bound that is given is one."""

    all_decide = decides("watching")

    enable: bool = True
    measure: str | None = None
    """Name of a measurement that is made at every evaluation, such as ``ood.hallucination``. Required for one of your
    own."""
    falls: Annotated[float, Field(gt=0, le=1)] | None = None
    """Stop when it is lower than the baseline by more than this share of the baseline's size (of 0.3 where it is
    -0.3)."""
    rises: Rise | None = None
    """Stop when it is higher than the baseline by more than this, in its own unit: 0.15 of a share are 15 points."""
    below: Bound | None = None
    """Stop when it is lower than this ``times`` evaluations in a row."""
    above: Bound | None = None
    """Stop when it is higher than this ``times`` evaluations in a row."""
    widens: Rise | None = None
    """Stop when it is higher than its lowest value so far by more than this and rose over the last ``times``
    evaluations, one after the other."""
    times: Annotated[Positive, Field(le=1000)] = 2
    """For below, above and widens."""
    best_falls: Annotated[float, Field(gt=0, le=1)] | None = None
    """The run's best checkpoint may not be lower than the baseline by more than this share of its size."""
    best_rises: Rise | None = None
    """The run's best checkpoint may not be higher than the baseline by more than this."""
    why: str = ""
    """What it protects from, for the report."""

    @property
    def compares(self) -> bool:
        """Whether it needs a baseline."""
        return any(x is not None for x in (self.falls, self.rises, self.best_falls, self.best_rises))

    @property
    def stops(self) -> bool:
        """Whether it has a bound."""
        return any(x is not None for x in (self.falls, self.rises, self.below, self.above, self.widens))

    def useless(self, *, share: bool) -> list[str]:
        """Bounds that never stop a run or always do. ``share``: what it judges lies in 0…1."""
        wrong: list[str] = []
        if self.above is not None and self.below is not None and self.below >= self.above:
            wrong.append(
                f"above is {self.above:g} and below {self.below:g}, but a run goes on with what lies "
                "between below and above, and nothing does; give a smaller below or a larger above"
            )
        if not share:
            return wrong
        for name in ("falls", "best_falls", "rises", "best_rises", "widens"):
            value: float | None = getattr(self, name)
            if value is not None and value >= 1:
                wrong.append(
                    f"{name} is {value:g}, but {self.measure} is a share, from 0 to 1, which never moves by more than "
                    "1; give less than 1"
                )
        if self.above is not None and not 0 <= self.above < 1:
            wrong.append(f"above is {self.above:g}, but {self.measure} is a share; expected 0 or more, less than 1")
        if self.below is not None and not 0 < self.below <= 1:
            wrong.append(f"below is {self.below:g}, but {self.measure} is a share; expected more than 0, at most 1")
        return wrong


def _guardrail(measure: str, why: str, **bounds: Any) -> GuardrailConfig:
    return GuardrailConfig(measure=measure, why=why, **bounds)


GUARDRAILS: dict[str, GuardrailConfig] = {
    "irrelevant_pass": _guardrail(
        "irrelevant.pass", "it still says of unrelated images that they are", falls=0.2, below=0.8, best_falls=0.1
    ),
    "hallucination": _guardrail(
        "ood.hallucination", "it does not see what it was trained on in images that show something else",
        rises=0.15, best_rises=0.1,
    ),
    "generalisation_gap": _guardrail(
        "gap.generalisation", "it learns what holds for images it has not seen, not its training samples by heart",
        widens=0.06,
    ),
    "caption_sanity": _guardrail(
        "sane.captions", "it still writes whole, different sentences about images unlike its training's", below=0.8
    ),
}  # fmt: skip
"""The stage-4 plan's bounds (S4-3). A stage has those whose monitor is switched on (``eval.irrelevant``, ``eval.ood``,
``eval.gap_samples``); ``guardrails:`` in a config changes, switches off or adds some by name."""


@dataclass(frozen=True, slots=True)
class BestRule:
    """Which checkpoints may be a run's best (S2-7); of those the one with the lowest held-out loss is."""

    kept: float = 0.5
    """It must keep this share of the largest image reliance seen so far: a falling loss that is bought by looking less
    is what instruction tuning does when it goes wrong."""
    max_collapse: float = 0.5
    """As the gate ``no_collapse``: golden outputs that are empty, looping or all alike."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What tells a stage from the others. Adding one is adding a record to `STAGES`; nothing asks for its name."""

    name: str
    is_meant: Callable[[ModelConfig], bool] | None
    """Whether a config that names no stage means this one, by what it lets learn; None: it must be named."""

    builds_on: str
    """The stage whose runs it is meant to start from; a run that starts from none says so. Empty: from none."""
    tracked_as: str
    """What stands before the names of its numbers in trackers (`train.tracking`)."""
    adapters: bool
    """Adapters may learn (``model.lora``), or a language model that was made for it whole (``model.student``)."""
    connector_learns: bool
    """The connector has to learn; else it does as ``model.connector.trainable`` says."""
    objective: str
    """One of `train.objectives.OBJECTIVES`."""

    template: Template
    """How samples are laid out unless ``prompting.template`` says otherwise."""
    templates: tuple[Template, ...]
    """All that make sense here."""
    max_images: int
    """Images of a sample, unless ``prompting.max_images_per_sample`` says otherwise."""
    most_images: int | None
    """What it may not be more than; None: no bound."""
    image_label: str
    """Before each image of a sample with several, unless ``prompting.image_label`` says otherwise."""
    dialogues: bool
    """Records are held to the rules of a dialogue: the user opens it, about an image, and is always answered."""
    hygiene: HygieneLimits
    """What training records are held to unless ``data.hygiene`` says otherwise."""

    writes: Literal["caption", "answer"]
    """What the model is asked to write for held-out images."""
    conditions: tuple[Condition, ...]
    """Under which images it is written. A fourth, under noise, would cost a third more and tell what the loss under
    noise tells. The blind baseline of a model that chats is the same model, asked without any image. ``correct`` and
    ``shuffled`` must be among them: whether outputs are the same for every image is told from these two."""
    golden_size: int
    """Samples of the fixed set, unless ``eval.golden_size`` says otherwise."""
    golden_by: Literal["length", "category"]
    """What the fixed set is balanced over."""
    measures: tuple[str, ...]
    """What is measured at the end, in this order: rows of `stages.panel`."""
    evaluates_saves: bool
    """Under ``full_eval_every: epoch`` every save is evaluated too: the best is chosen among those that were."""
    gates: Mapping[str, GateConfig]
    """What its evidence must show; ``gates:`` in a config changes, switches off or adds some by name."""
    best: BestRule = BestRule()
    guardrails: Mapping[str, GuardrailConfig] = field(default_factory=dict)
    """What stops it early, each where its monitor is switched on."""

    def __post_init__(self) -> None:
        assert {"correct", "shuffled"} <= set(self.conditions), f"{self.name}: {self.conditions}"


MONITOR_ROWS = tuple(m.name for m in MONITORS)
"""Rows of the panel that are made at every evaluation where their data are given."""

MEASURED_EVERYWHERE = ("losses", "truncated", "learned", "golden", "ablation", "words", "written")

FOLLOWS = ("pairs", "cells", "blind", "learnable")
"""Whether the answer follows image and question, and not the words (E-1 to E-4)."""

ALIGN = Stage(
    name="align",
    is_meant=lambda model: model.lora.enable is not True and not model.language_learns,
    builds_on="",
    tracked_as="stage1",
    adapters=False,
    connector_learns=True,
    objective="next_token",
    template="caption",
    templates=("caption", "conversation", "chat"),
    max_images=2,
    most_images=None,
    image_label="",
    dialogues=False,
    hygiene=HygieneLimits(min_tokens=5, max_tokens=60, spam=CAPTION_SPAM),
    writes="caption",
    conditions=("correct", "shuffled", "zero"),
    golden_size=32,
    golden_by="length",
    measures=(*MEASURED_EVERYWHERE, "questions", *FOLLOWS, "guessable", *MONITOR_ROWS),
    evaluates_saves=False,
    gates=GATES,
)
"""The connector learns from captions (S1)."""

INSTRUCT = Stage(
    name="instruct",
    is_meant=lambda model: model.lora.enable is True or model.language_learns,
    builds_on="align",
    tracked_as="stage2",
    adapters=True,
    connector_learns=False,
    objective="next_token",
    template="chat",
    templates=("chat", "conversation"),
    max_images=1,
    most_images=1,
    image_label="",
    dialogues=True,
    hygiene=HygieneLimits(min_tokens=1, max_tokens=None, spam=()),
    writes="answer",
    conditions=("correct", "shuffled", "none"),
    golden_size=64,
    golden_by="category",
    measures=(
        *MEASURED_EVERYWHERE,
        "followed",
        "kept",
        *FOLLOWS,
        "guessable",
        "strengths",
        "retained",
        "merges",
        "crossed",
        *MONITOR_ROWS,
    ),
    evaluates_saves=True,
    gates=INSTRUCT_GATES,
    guardrails=GUARDRAILS,
)  # fmt: skip
"""Connector and adapters, or a student's whole language model, learn from conversations about one image (S2)."""

MULTI = replace(
    INSTRUCT,
    name="multi",
    is_meant=None,
    builds_on="instruct",
    tracked_as="stage3",
    max_images=6,
    most_images=None,
    image_label="Image {k}: ",
    measures=(*INSTRUCT.measures, "slots"),
    gates=INSTRUCT_GATES | SLOT_GATES,
)
"""Connector and adapters learn from conversations about several images (S3)."""

DISTILL = replace(
    INSTRUCT,
    name="distill",
    is_meant=None,
    builds_on="",
    tracked_as="stage2",
    objective="distill",
    measures=(*MEASURED_EVERYWHERE, "taught", *(m for m in INSTRUCT.measures if m not in MEASURED_EVERYWHERE)),
    gates=TAUGHT_GATES,
)
"""A small model learns from conversations and from what a big one says of each of their tokens (D-1, D-2)."""

STAGES: dict[str, Stage] = {stage.name: stage for stage in (ALIGN, INSTRUCT, MULTI, DISTILL)}
"""Every stage by name. A config that names none is of the first that it may be meant as."""


if TYPE_CHECKING:
    StageName = str
else:
    StageName = Literal[tuple(STAGES)]
"""A stage's name, as a config writes it."""


def stage_of(name: object, model: object) -> Stage:
    """The stage of a run that names one or leaves it to what its ``model`` section lets learn."""
    if isinstance(name, str) and name in STAGES:
        return STAGES[name]
    # a section with errors of its own may be absent
    return next(
        (s for s in STAGES.values() if isinstance(model, ModelConfig) and s.is_meant and s.is_meant(model)), ALIGN
    )


def usual_gate(name: str) -> GateConfig:
    """A gate as the stages have it that have one of that name."""
    return next(stage.gates[name] for stage in STAGES.values() if name in stage.gates)


def complete_gates(given: Mapping[str, GateConfig], stage: Stage) -> dict[str, GateConfig]:
    """The stage's own gates with what ``given`` changes of them, then the others; all stand in the resolved config."""
    own = {
        name: gate.model_copy(update={f: getattr(given[name], f) for f in given[name].model_fields_set})
        if name in given else gate
        for name, gate in stage.gates.items()
    }  # fmt: skip
    return own | {name: gate for name, gate in given.items() if name not in own}


def complete_guardrails(
    given: Mapping[str, GuardrailConfig], stage: Stage, taken: Callable[[str], bool]
) -> dict[str, GuardrailConfig]:
    """The stage's own guardrails whose measurement is ``taken``, with what ``given`` changes of them, then the others;
    one of `GUARDRAILS` that a stage has not by itself is completed from there, too."""
    named = {
        name: GUARDRAILS[name].model_copy(update={f: getattr(rule, f) for f in rule.model_fields_set})
        if name in GUARDRAILS else rule
        for name, rule in given.items()
    }  # fmt: skip
    own = {name: rule for name, rule in stage.guardrails.items() if taken(rule.measure or "")}
    return own | named
