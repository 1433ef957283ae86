"""Several runs as one question: which settings are best, and is the difference more than chance?

score   from numbers to a ranking, without I/O
sweep   from a config with ``sweep:`` to runs, each a process of its own, and their summary
page    the summary as HTML and Markdown, from ``sweep.json`` alone
"""

from beholder.study.sweep import SweepResult, run_sweep

__all__ = ["SweepResult", "run_sweep"]
