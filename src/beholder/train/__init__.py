"""Training: one loop for every stage, its optimizer, its checkpoints, and its processes.

`engine` runs the steps, `objectives` says what is minimised, `optim` how, `checkpoint` keeps it, `restore` and
`same_run` take it up again, `distributed` makes several processes one, `nonfinite` stops what has gone wrong,
`reporter` shows it. Nothing here evaluates.
"""
