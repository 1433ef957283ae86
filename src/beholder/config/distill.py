"""What a student learns from: its teachers, what of them is kept, and how much it counts."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from beholder.config.section import Fraction, Inert, Positive, Section, Tiny, decides

PRESETS: dict[str, dict[str, float]] = {
    "hard": {"alpha": 0.5, "temperature": 1.0},
    "soft": {"alpha": 0.2, "temperature": 3.0},
    "progressive": {"alpha": 0.5, "alpha_end": 0.2},
}
"""The distillation guide's strategies; what the config says itself comes before."""

TEMPERATURES = 9
"""Values that a changing temperature takes: what is kept of a teacher is made for each (`model.divergence`)."""


class TeacherConfig(Section):
    run: Annotated[str | None, decides("start"), Tiny()] = None
    """A run folder, or one of its checkpoints: a model that was grown here."""
    native: Annotated[str | None, decides("start"), Tiny()] = None
    """Hub name or local folder of a whole Hugging Face vision-language model."""
    revision: Annotated[str | None, Tiny()] = None
    """native: hub commit or tag."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """native: storage and compute type of its weights."""
    chat_template: Annotated[str | None, Tiny()] = None
    """native: a Jinja file to use instead of the processor's own template."""
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of this teacher in the divergence; those of all teachers add up to 1."""

    @property
    def name(self) -> str:
        return self.run or self.native or "?"

    def impossible(self) -> list[str]:
        if (self.run is None) == (self.native is None):
            return ["give run, a run folder, or native, a Hugging Face vision-language model: one of the two"]
        if self.run is not None and (self.revision is not None or self.chat_template is not None):
            return ["revision and chat_template are for native teachers; a run has its own"]
        return []


_ONLINE = Inert(lambda _, own: own.online, "teachers are asked while the student learns (distill.online)", ".online")


class DistillConfig(Section):
    """``L = (1 - alpha) · L_sft + alpha · T² · KL(teacher ‖ student)``, over the supervised tokens (D-2)."""

    teachers: Annotated[tuple[TeacherConfig, ...], Field(min_length=1)]
    preset: Literal["hard", "soft", "progressive"] | None = None
    """hard: alpha 0.5, temperature 1. soft: alpha 0.2, temperature 3. progressive: alpha from 0.5 to 0.2. What is given
    beside it comes first."""
    alpha: Fraction = 0.3
    """Weight of the divergence; 0: no teacher is asked, and the student learns from the data alone."""
    alpha_end: Fraction | None = None
    """Where alpha has moved to at the last step, in a straight line; default: it stays."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 2.0
    """T: both distributions are those of logits divided by it."""
    temperature_end: Annotated[float, Field(gt=0, le=100)] | None = None
    """Where T has moved to at the last step, in nine equal steps; default: it stays."""
    online: bool = False
    """Ask the teachers while the student learns, instead of reading what ``beholder teacher-cache`` has kept of them.
    Their whole distribution is used."""
    form: Annotated[Literal["topk", "sampled", "full"], _ONLINE] = "topk"
    """What is kept of a teacher's distribution over the next token. topk: the ``k`` likeliest ids and the mass of the
    rest. sampled: ``draws`` ids drawn from it, which give the whole's gradient on average (arXiv:2503.16870). full: all
    of it, for small experiments."""
    k: Annotated[
        Positive, Field(le=65_536), _ONLINE, Tiny(at_most=8),
        Inert(lambda _, own: own.form != "topk", "only form topk has it", ".form"),
    ] = 64  # fmt: skip
    """topk: ids kept of each token."""
    draws: Annotated[
        Positive, Field(le=65_536), _ONLINE,
        Inert(lambda _, own: own.form != "sampled", "only form sampled has it", ".form"),
    ] = 12  # fmt: skip
    """sampled: ids drawn for each token."""
    vocabulary: Literal["equal", "shared"] = "equal"
    """equal: student and teachers must have one tokenizer. shared: ids are translated by their text; a token that
    begins elsewhere in the text for the teacher has no teacher (docs/distillation.md)."""
    dir: Annotated[str | None, decides("place"), _ONLINE, Tiny()] = None
    """Folder of what is kept of teachers, shared by all runs. Default ``$BEHOLDER_CACHE/teachers``, else
    ``~/.cache/beholder/teachers``."""
    max_gb: Annotated[float, Field(gt=0, le=1_000_000), decides("speed"), _ONLINE] = 50.0
    """Size cap of each teacher in GB (1e9 bytes)."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        if isinstance(teachers := given.get("teachers"), list):
            given = given | {"teachers": tuple(teachers)}  # what came as JSON is checked as Python from here on
        return PRESETS.get(str(given.get("preset")), {}) | given

    @property
    def taught(self) -> bool:
        """Whether a teacher has a say."""
        return self.alpha > 0 or bool(self.alpha_end)

    def at(self, step: int, total_steps: int) -> tuple[float, float]:
        """alpha, and T, which is one of `temperatures`, in the step of this number, from 0: the last of several is at
        the end of both schedules."""
        done = step / max(total_steps - 1, 1)
        alpha = self.alpha if self.alpha_end is None else self.alpha + (self.alpha_end - self.alpha) * done
        every = self.temperatures
        return alpha, every[min(int(done * len(every)), len(every) - 1)]

    @property
    def temperatures(self) -> tuple[float, ...]:
        """All that T is during the run, in order."""
        if self.temperature_end is None or self.temperature_end == self.temperature:
            return (self.temperature,)
        step = (self.temperature_end - self.temperature) / (TEMPERATURES - 1)
        return tuple(round(self.temperature + k * step, 6) for k in range(TEMPERATURES))

    @property
    def kept_temperatures(self) -> tuple[float, ...]:
        """Those that what is kept of a teacher is made for: of a sampled one, that which it is drawn at; else also 1,
        which the divergence is measured at."""
        return self.temperatures if self.form == "sampled" else tuple(sorted({1.0, *self.temperatures}))

    def impossible(self) -> list[str]:
        wrong: list[str] = []
        total = math.fsum(t.weight for t in self.teachers)
        if abs(total - 1) > 1e-6:
            shares = " + ".join(f"{t.weight:g}" for t in self.teachers)
            wrong.append(f"the weights of the teachers are {shares} = {total:g}; they must add up to 1")
        if len({(t.name, t.revision) for t in self.teachers}) < len(self.teachers):
            wrong.append("teachers names one twice; give each once, with its weight")
        if self.form == "sampled" and not self.online and len(self.temperatures) > 1:
            wrong.append("form sampled is drawn at one temperature; leave temperature_end out, or use form topk")
        if self.online and self.vocabulary == "shared":
            wrong.append("vocabulary shared is for teachers that are kept (online: false)")
        elif self.vocabulary == "shared" and self.form != "topk":
            wrong.append(f"vocabulary shared is kept as topk, not as {self.form}; use form topk")
        return wrong
