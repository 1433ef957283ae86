"""Several runs as one question: which settings are best, and is the difference more than chance?

frontier which runs no other dominates, without I/O
score   from numbers to a ranking, without I/O
record  what is known of a sweep, ``sweep.json`` and ``summary.csv``, and what its runs are called
points  from a config with ``sweep:`` to one resolved config a run
page    a record as HTML, as Markdown and on a terminal
sweep   the points, each a process of its own, and their record

Each imports only those above it.
"""

from beholder.studies.sweep import SweepResult, run_sweep

__all__ = ["SweepResult", "run_sweep"]
