"""Several runs as one question: which settings are best, and is the difference more than chance?

score             from numbers to a ranking, without I/O
record            what is known of a sweep, ``sweep.json`` and ``summary.csv``, and what its runs are called
points            from a config and points to one resolved config a run
runner            their processes, as many at a time as there are devices
scatter           points with intervals and names, drawn
page, sweep       a sweep's record as HTML, as Markdown and on a terminal; a grid, run and scored
matrix            the points of a footprint study, from its settings alone
frontier          what no other point dominates, and the point to take, without I/O
hypotheses        what a footprint study says of the plan's H1 to H4, without I/O
footprint_record  what is known of a footprint study, and what follows from it
footprint_page    that as HTML, as Markdown and on a terminal
footprint         the points, counted, run and put together
distillation_record, distillation_page, distillation
                  the same of a distillation study: what follows from its runs, pages, its arms run and put together

Each imports only those above it.
"""

from beholder.studies.distillation import DistillationResult, run_distillation
from beholder.studies.footprint import FootprintResult, run_footprint
from beholder.studies.sweep import SweepResult, run_sweep

__all__ = [
    "DistillationResult", "FootprintResult", "SweepResult", "run_distillation", "run_footprint", "run_sweep",
]  # fmt: skip
