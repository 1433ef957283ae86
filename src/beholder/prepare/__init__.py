"""Before a run: parts and data from packages, tiny stand-ins, the quickstart, this machine, what a run will need, data
checked and samples previewed."""
