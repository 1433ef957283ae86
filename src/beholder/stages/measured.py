"""What those who measure hand to those who write it down: of the start, and of one state of the weights."""

from __future__ import annotations

from dataclasses import dataclass, field

from beholder.evidence import Cost, GuardrailStop, Histogram, Measurement, WordReliance, WordStat
from beholder.probes import textonly
from beholder.probes.loss import SampleLoss
from beholder.probes.written import Written
from beholder.types import Condition, Status

NO_START, START_CAPTIONS = "the run starts from no other", "the run it starts from answers no questions"
LEARNS_WHOLE = "the language model learns itself (model.student)"
"""Why nothing says whether it is the language model it was."""
NOTHING_TO_KEEP = (NO_START, START_CAPTIONS)
"""Why there is nothing that the start could do and the trained model might not."""


@dataclass(frozen=True)
class Before:
    """What was measured before training."""

    measurements: list[Measurement]
    frozen: dict[str, str]
    """sha256 of each frozen part."""
    text: textonly.TextLogits
    untrained: list[SampleLoss] | None = None
    """Of every held-out sample, with the untrained connector."""
    text_only: list[SampleLoss] | None = None
    """Of every held-out sample, by the language model alone: no image, no connector."""
    start: list[SampleLoss] | None = None
    """Of `HeldOut.single`, by the run this one starts from, its adapters at that run's strength."""
    no_start: str = "it was not when the run began"
    """Why that was not measured."""


@dataclass
class Measured:
    """What the rows say of one state of the weights, collected in the order they are asked."""

    step: int
    """Optimizer steps the weights have behind them."""
    losses: list[SampleLoss]
    """Of every held-out sample, with its own image."""
    before: Before | None = None
    """None between steps."""
    again: bool = False
    """A run that was trained earlier is measured again: what is stored of this step is made anew."""
    measurements: list[Measurement] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    written: dict[int, list[Written]] = field(default_factory=dict)
    """By index of the held-out sample, one record a condition."""
    ablated: dict[Condition, list[SampleLoss]] = field(default_factory=dict)
    """Losses of ``HeldOut.ablation_sample`` under each condition."""
    words: dict[int, list[WordReliance]] = field(default_factory=dict)
    word_stats: list[WordStat] = field(default_factory=list)
    inapplicable: dict[str, str] = field(default_factory=dict)
    """Beginnings of measurement names that say nothing here, and why; gates on them are not judged."""
    gaps: list[str] = field(default_factory=list)
    """What could not be measured, and why."""

    def leave_out(self, begin: str, what: str, why: str) -> None:
        """Measurements whose names begin so say nothing here."""
        self.inapplicable[begin] = why
        self.gaps.append(f"{what}: not measured, {why}.")

    def why_not(self, measure: str | None) -> str | None:
        """Why a gate on that measurement is not judged; None where it is."""
        return next((why for begin, why in self.inapplicable.items() if (measure or "").startswith(begin)), None)


@dataclass(frozen=True)
class Trained:
    """The state that is measured at the end."""

    step: int
    """Of the checkpoint whose weights are in place."""
    steps: int
    """That the run made."""
    status: Status
    whole: bool
    """This process made all of them, so its own time is the run's."""
    again: bool = False
    """A run that was trained earlier is measured again."""
    stopped: GuardrailStop | None = None
    """The guardrail that ended it early."""
    cost: Cost | None = None
    """What the training cost, when an earlier process has told it already."""
