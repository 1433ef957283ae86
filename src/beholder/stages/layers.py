"""Which layers of a trained run's language model change most what passes through them (``beholder layers``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from beholder.probes.loss import sample_losses
from beholder.probes.similarity import layer_similarity, most_changing
from beholder.stages.remeasure import reopen
from beholder.types import UserError


@dataclass(frozen=True)
class Layers:
    """Linear CKA between the input and the output of every layer, on held-out samples."""

    folder: str
    step: int
    num_samples: int
    similarity: tuple[float, ...]
    """First layer to last; small: it changes much."""
    is_main: bool = True

    def most_changing(self, number: int) -> tuple[int, ...]:
        """The layers with the lowest similarity, in the model's order."""
        return most_changing(self.similarity, number)

    def print(self, console: Console) -> None:
        title = f"{self.folder}, step {self.step}: CKA of input and output, {self.num_samples} held-out samples"
        table = Table("layer", "CKA", title=title, title_justify="left")
        for k, value in enumerate(self.similarity):
            table.add_row(str(k), f"{value:.4f}")
        console.print(table)
        two = ", ".join(map(str, self.most_changing(2)))
        console.print(f"The two that change most: {two} (model.lora.llm_layers: [{two}])", markup=False, soft_wrap=True)

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": self.folder, "step": self.step, "num_samples": self.num_samples,
            "similarity": list(self.similarity),
        }  # fmt: skip


def layers_of_run(
    folder: str, *, num_samples: int = 64, step: int | None = None, overrides: Sequence[str] = ()
) -> Layers:
    """Layers of the language model of a trained run, its adapters on; its evidence stays as it is. ``step``: of that
    checkpoint; default the best, else the latest."""
    with reopen(folder, overrides, aside=True, step=step) as opened:
        session = opened.session
        held = session.held_out
        chosen = held.at(held.among(range(len(held)), min(num_samples, len(held))))
        if len(chosen) < 4:
            raise UserError(f"{folder} holds {len(chosen)} samples out; four are needed to compare features")

        def run(i: int) -> None:
            batches = session.data.eval_batches([chosen[i]], session.store, session.cfg, batch_size=1)
            sample_losses(session.model, batches)

        part = session.model.language.part
        with session.phase("layers"):
            found = layer_similarity(part.module, part.blocks, run, len(chosen))
        return Layers(folder, opened.step, len(chosen), tuple(found), session.dist.is_main)
