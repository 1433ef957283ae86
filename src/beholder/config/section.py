"""What every group of settings has in common: strict, immutable, and able to say which combinations cannot be."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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
