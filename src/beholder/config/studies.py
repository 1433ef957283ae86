"""Settings of several runs as one question, and the runbook's sizes of one run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from beholder.config.section import Fraction, Positive, Section

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
    parallel: Annotated[Positive | None, Field(le=1024)] = None
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
