"""What a result is.

record     measurements and everything that is needed to read them: what ``evidence.json`` holds
catalogue  what can be measured, by name: words, unit, direction, and where people are told it
gates      bounds on measurements, judged
guardrails when a run stops itself, by what was measured on the way
best       which of a run's checkpoints is its best
"""

from beholder.evidence.record import (
    SCHEMA_VERSION,
    AdapterRow,
    Candidate,
    Cost,
    Curve,
    DataFacts,
    DataUri,
    Evidence,
    GateResult,
    GuardrailStop,
    Histogram,
    Measurement,
    Prediction,
    Record,
    Sample,
    TextOnly,
    TrainableRow,
    WordReliance,
    WordStat,
    held_out_hashes,
    load_evidence,
    thin,
    thumbnail,
)  # fmt: skip
from beholder.types import CONDITIONS, Condition

__all__ = [
    "CONDITIONS", "SCHEMA_VERSION", "AdapterRow", "Candidate", "Condition", "Cost", "Curve", "DataFacts", "DataUri",
    "Evidence", "GateResult", "GuardrailStop", "Histogram", "Measurement", "Prediction", "Record", "Sample", "TextOnly",
    "TrainableRow", "WordReliance", "WordStat", "held_out_hashes", "load_evidence", "thin", "thumbnail",
]  # fmt: skip
