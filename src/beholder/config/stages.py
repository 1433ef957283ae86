"""The stages: what each of them must show, and which one a config is."""

from __future__ import annotations

from typing import Any, Literal

from beholder.config.parts import LoraConfig
from beholder.config.section import Positive, Section

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
