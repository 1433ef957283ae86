"""A stage, from start to evidence. Read `run` first: the page.

run             the page
begin           the folder, where weights come from, what is refused before anything is loaded
lifetime        one writer a folder; whatever ends a run is written down as what it is
session         a run's loaded parts, with members of their own:
  held_out      what is kept for measuring, the same samples in every run
  together      measuring, shared among the processes of a job
panel           every measurement, a row each: here is where a probe is added
watch           which rows come due between steps
keep            what is saved, and which checkpoint is the best
measure         before training and after it; what is found travels as `measured`
write_evidence  what was measured, as evidence.json and its report
remeasure       a finished run again, or one question about it
"""

from beholder.stages.run import Outcome, run_stage

__all__ = ["Outcome", "run_stage"]
