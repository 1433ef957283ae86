"""The record a run leaves behind: measurements, curves, samples, cost and provenance as plain checked data.

Probes produce these records and the report renders them; neither knows the other. Nothing here measures, draws or
writes files. `evidence.json` is this record, and whatever a report shows can be rebuilt from it alone.

What there is to measure, by name, stands in `evidence.catalogue`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, ValidationError, model_validator

from beholder.types import Condition, Status, UserError

SCHEMA_VERSION = 1
"""Raised when a reader of the old shape would misread the new one."""


DataUri = Annotated[str, Field(pattern=r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+={0,2}$")]
"""An inline picture. The pattern keeps an `evidence.json` from elsewhere from pointing the report at a URL."""


class Record(BaseModel):
    """Unknown keys are errors, instances are immutable, numbers are finite: an unmeasured value is absent."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Measurement(Record):
    """A number with what is needed to read it. An unmeasured value has no Measurement; it is a gap."""

    name: str
    value: FiniteFloat
    unit: str
    """Such as ``nats/token``, ``share``, ``words``, ``score``, ``ratio``."""
    better: Literal["lower", "higher", "none"]
    n: Annotated[int, Field(ge=1)]
    """Samples the value was measured on."""
    ci95: tuple[FiniteFloat, FiniteFloat] | None = None
    """95 % interval over samples; None where one cannot be given."""
    stratum: str | None = None
    """Part of the samples the value is about; None means all."""
    by: str | None = None
    """Grouping the stratum belongs to: ``length``, ``turn``, ``question``, ``answer``, ``kind``."""
    caveat: str | None = None
    """What a reader could get wrong about the number."""

    @model_validator(mode="after")
    def _ordered(self) -> Measurement:
        if self.ci95 is not None and self.ci95[0] > self.ci95[1]:
            raise ValueError(f"{self.name}: the interval {self.ci95} has its ends swapped")
        return self

    @property
    def key(self) -> str:
        """Flat name: ``eval.loss`` or ``eval.loss/short``."""
        return self.name if self.stratum is None else f"{self.name}/{self.stratum}"

    @property
    def told(self) -> str:
        """``eval.loss = 0.0312 nats/token (95 % 0.0272 to 0.0352), n=1000``, for a terminal."""
        ends = f" (95 % {self.ci95[0]:.4g} to {self.ci95[1]:.4g})" if self.ci95 else ""
        return f"{self.name} = {self.value:.4g} {self.unit}{ends}, n={self.n}"


class TrainableRow(Record):
    """One part of the model in the table of what learned."""

    part: str
    params: Annotated[int, Field(ge=0)]
    trainable: Annotated[int, Field(ge=0)]
    dtype: str
    sha256_before: str | None = None
    """Hash over the part's weights before training, for frozen parts."""
    sha256_after: str | None = None
    """The same hash afterwards; equal means the part is bit-identical."""

    @property
    def intact(self) -> bool | None:
        """Whether a frozen part is bit-identical; None when it was not hashed at both ends."""
        if self.sha256_before is None or self.sha256_after is None:
            return None
        return self.sha256_before == self.sha256_after


class AdapterRow(Record):
    """One adapted layer: where it is and what it adds."""

    name: str
    """Module name below its part, such as ``model.layers.0.self_attn.q_proj``."""
    d_in: int
    d_out: int
    rank: int
    params: int
    part: str = "language"
    """What it is on: ``language`` or ``vision``."""


class Candidate(Record):
    """A checkpoint that was measured, and whether it may be the run's best (S2-7)."""

    step: int
    eval_loss: FiniteFloat
    delta_shuffled: FiniteFloat | None = None
    """Nats per token that another sample's image adds; None when it was not measured at this step."""
    collapse: FiniteFloat | None = None
    """Worst symptom of collapse among its golden outputs, share."""
    monitors: dict[str, FiniteFloat] = {}
    """What the monitors said of it, by name of the measurement."""
    refused: str = ""
    """Why it may not be the best; empty when it may."""
    best: bool = False


class GuardrailStop(Record):
    """Why a run stopped itself (`evidence.guardrails`)."""

    name: str
    """Of the guardrail."""
    measure: str
    step: int
    value: FiniteFloat
    bound: FiniteFloat
    """What the value has passed."""
    baseline: FiniteFloat | None = None
    told: str
    """``more than 20% below its baseline of 0.95 (less than 0.76)``"""
    why: str = ""
    """What the guardrail protects from."""

    @property
    def sentence(self) -> str:
        """``irrelevant_pass: irrelevant.pass is 0.5 after step 40, more than 20% below its baseline of …``"""
        return f"{self.name}: {self.measure} is {self.value:.4g} after step {self.step}, {self.told}"


class DataFacts(Record):
    """What was trained and evaluated on, and what was left out for which reason."""

    records: int
    """Records in the sources before hygiene."""
    train: int
    eval: int
    sources: dict[str, int] = {}
    """Accepted samples by source."""
    rejects: dict[str, int] = {}
    """Rejected records by reason."""
    duplicates: dict[str, int] = {}
    """Repeated captions that were found, whether or not they were rejected."""
    absent_images: Annotated[int, Field(ge=0)] = 0
    """Records whose words name an image that they do not have, such as "image 5" of three."""
    train_buckets: dict[str, int] = {}
    eval_buckets: dict[str, int] = {}
    """Samples by target-length bucket."""
    truncated_pct: FiniteFloat | None = None
    """Per cent of training samples whose target was cut to the maximum length."""
    label_zero_pct: FiniteFloat | None = None
    """Per cent of training samples without a supervised token (must be 0)."""
    eval_origin: str = ""
    """Where the held-out samples come from, in words."""
    fingerprint: str = ""
    held_out_sha256: str = ""
    """Over the held-out samples: ids, texts and pictures. Equal means two runs were measured on the same."""


class Curve(Record):
    """One line of a plot: ``y`` over optimizer steps."""

    name: str
    """``train.loss``, ``eval.loss``, ``quick_eval.loss``, ``lr.connector``, ``grad_norm``, …"""
    unit: str
    x: list[FiniteFloat]
    y: list[FiniteFloat]

    @model_validator(mode="after")
    def _paired(self) -> Curve:
        if len(self.x) != len(self.y):
            raise ValueError(f"curve {self.name}: {len(self.x)} x values but {len(self.y)} y values")
        return self


class Histogram(Record):
    """Counts per bin of two or more series over the same bins."""

    name: str
    unit: str
    bins: list[str]
    series: dict[str, list[int]]

    @model_validator(mode="after")
    def _same_bins(self) -> Histogram:
        for name, counts in self.series.items():
            if len(counts) != len(self.bins):
                raise ValueError(f"histogram {self.name}: {name!r} has {len(counts)} counts for {len(self.bins)} bins")
        return self


class Prediction(Record):
    """What the model wrote for one sample, after ``step`` steps, shown the image of ``condition``."""

    step: int
    text: str
    condition: Condition = "correct"
    exact: bool | None = None
    """Whether it is the reference up to case, spacing and closing punctuation; None where that was not asked."""


class WordReliance(Record):
    """One word of a reference, and how much the image explains it."""

    text: str
    """With the space before it, so that the pieces join to the text."""
    with_image: FiniteFloat
    """Nats of its tokens given the sample's own image."""
    without: FiniteFloat
    """Nats given the zero image."""


class WordStat(Record):
    """A word over all samples: how many nats it loses without the image."""

    word: str
    n: Annotated[int, Field(ge=1)]
    delta: FiniteFloat
    """Mean over its occurrences, nats with the zero image minus nats with the own one."""
    ci95: tuple[FiniteFloat, FiniteFloat] | None = None


class GateResult(Record):
    """One gate, judged. A gate whose measurement is missing is not passed."""

    name: str
    passed: bool
    why: str
    """What the gate protects from."""
    bound: str
    """``> 1.05``."""
    end: Literal["value", "low", "high"]
    measure: str
    """Name of the measurement."""
    stratum: str | None = None
    """The worst of the judged groups, when groups were judged and it was worse than all samples together."""
    value: FiniteFloat | None = None
    """The number that was judged; None when it was not measured."""
    unit: str = ""
    note: str = ""
    """What a reader must know: not measured, groups too small to judge, …"""


class Sample(Record):
    """One held-out sample for people to look at."""

    id: str
    images: list[DataUri]
    reference: str
    predictions: list[Prediction]
    question: str = ""
    """What the user asked last, without images; empty for captions."""
    bucket: str | None = None
    words: list[WordReliance] = []
    """The reference word by word (empty when it was not measured)."""


class TextOnly(Record):
    """Whether the language model still is what it was on text: its logits before and after, bit by bit."""

    prompts: int
    logits: int
    """Numbers compared."""
    equal: bool
    sha256_before: str
    sha256_after: str
    max_abs_difference: FiniteFloat | None = None
    changed: list[str] = []
    """Prompts whose logits changed."""


class Cost(Record):
    """What the run took. Absent values were not measured."""

    steps: int
    epochs: FiniteFloat | None = None
    samples: int | None = None
    images: int | None = None
    tokens: int | None = None
    """Positions processed in training, padding excluded."""
    target_tokens: int | None = None
    wall_s: FiniteFloat | None = None
    """Seconds from start to end, everything included."""
    train_s: FiniteFloat | None = None
    """Seconds inside training steps."""
    phases_s: dict[str, FiniteFloat] = {}
    """Seconds by phase (features, training, evaluation, …)."""
    step_s: FiniteFloat | None = None
    samples_per_s: FiniteFloat | None = None
    images_per_s: FiniteFloat | None = None
    tokens_per_s: FiniteFloat | None = None
    data_wait_share: FiniteFloat | None = None
    peak_memory_mb: FiniteFloat | None = None
    feature_store_mb: FiniteFloat | None = None
    device: str = ""
    processes: int = 1


class Evidence(Record):
    """Everything a run can say for itself; the report is rendered from this and from nothing else."""

    schema_version: Literal[1] = SCHEMA_VERSION
    run_name: str
    stage: str
    status: Status
    created: str
    """UTC, ISO 8601."""
    summary: dict[str, str] = {}
    """Two or three facts for the title line, such as the language model, the tower and the connector."""
    trainable: list[TrainableRow]
    data: DataFacts
    baseline: list[Measurement] = []
    """The same measurements before training, from the same code on the same samples."""
    measurements: list[Measurement]
    curves: list[Curve] = []
    histograms: list[Histogram] = []
    samples: list[Sample] = []
    text_only: TextOnly | None = None
    adapters: list[AdapterRow] = []
    """Every adapted layer of the language model."""
    adapter_strength: FiniteFloat = 1.0
    """Of what the adapters learned, the share that is used outside training (``model.lora.strength``)."""
    stopped: GuardrailStop | None = None
    """The guardrail that ended the run early."""
    candidates: list[Candidate] = []
    """The checkpoints the best one was chosen from."""
    step: int | None = None
    """The step whose checkpoint was measured: the best one; None in files of earlier versions."""
    cost: Cost
    provenance: dict[str, JsonValue] = {}
    config_yaml: str
    gaps: list[str] = []
    """What could not be measured, and why."""
    gates: list[GateResult] = []
    """Every gate that was declared and not switched off."""
    findings: list[str] = []
    """What the audit and the collapse detector say in words: a cause, its number, what to do."""
    words: list[WordStat] = []
    """Words by how much the image explains them, most first."""

    @property
    def failed_gates(self) -> list[GateResult]:
        return [g for g in self.gates if not g.passed]

    @property
    def promotable(self) -> bool:
        """Whether a later stage may build on this run without ``--promote-anyway``."""
        return self.status == Status.SUCCEEDED and bool(self.gates) and not self.failed_gates

    def get(self, name: str, stratum: str | None = None) -> Measurement | None:
        """The measurement of that name and stratum, or None when it is absent."""
        return _find(self.measurements, name, stratum)

    def get_baseline(self, name: str, stratum: str | None = None) -> Measurement | None:
        """The same before training."""
        return _find(self.baseline, name, stratum)

    def metrics(self) -> dict[str, float]:
        """Flat final numbers for ``metrics.json``, ``{"eval.loss": …, "eval.loss/short": …}``."""
        return {m.key: m.value for m in self.measurements}

    def to_json(self) -> str:
        """Indented UTF-8 JSON without NaN; `from_json` gives an equal record back."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, name: str = "evidence.json") -> Evidence:
        """Read a record back.

        Raises UserError for malformed JSON, for a record of another schema version, and for wrong or unknown fields
        (each named by its dotted path).
        """
        try:
            raw: Any = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{name}: not valid JSON ({e}); a report is rendered from the file a run wrote") from e
        if not isinstance(raw, dict):
            raise UserError(f"{name}: expected one JSON object, got {type(raw).__name__}")
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{name}: schema_version is {version!r}, this version of beholder reads {SCHEMA_VERSION}; "
                "use the version of beholder that wrote it"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as e:
            lines = [f"  {'.'.join(map(str, err['loc'])) or '(top)'}: {err['msg']}" for err in e.errors()]
            raise UserError(f"{name}: not an evidence record:\n" + "\n".join(lines)) from e


def _find(measurements: Sequence[Measurement], name: str, stratum: str | None) -> Measurement | None:
    return next((m for m in measurements if m.name == name and m.stratum == stratum), None)


def load_evidence(path: str | Path) -> Evidence:
    """The evidence of a run: ``path`` is an ``evidence.json`` or the run folder that holds one."""
    file = Path(path)
    if file.is_dir():
        file = file / "evidence.json"
    try:
        text = file.read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such file; a run writes it when it ends (beholder run CONFIG)") from e
    return Evidence.from_json(text, name=str(file))


def held_out_hashes(runs: Sequence[tuple[Path, Evidence]]) -> list[str | None]:
    """For each run folder with its evidence, a hash over the samples it was measured on.

    Those of the evidence when all have one. Older records have none: then those over the split files, None when there
    is no such file or the held-out samples have files of their own (``data.eval_sources``).
    """
    if all(e.data.held_out_sha256 for _, e in runs):
        return [e.data.held_out_sha256 for _, e in runs]
    return [_split_hash(f if f.is_dir() else f.parent) for f, _ in runs]


def _split_hash(folder: Path) -> str | None:
    for file in sorted((folder / "splits").glob("split_*.json")):
        with suppress(OSError, ValueError, RecursionError, AttributeError):
            items = json.loads(file.read_bytes()).get("eval")
            if items:
                what = json.dumps(items, sort_keys=True, ensure_ascii=True)
                return hashlib.sha256(what.encode()).hexdigest()
    return None


def thin(name: str, unit: str, points: Sequence[tuple[float, float]], limit: int = 600) -> Curve:
    """A curve of at most ``limit`` points: means over equal groups of neighbours, the last point kept exactly.

    Long runs log tens of thousands of steps; a report needs no more points than a screen has columns. Points whose
    value is not finite are left out (they stopped the run and are named in its log).
    """
    finite = [(float(x), float(y)) for x, y in points if abs(float(y)) < float("inf")]
    if len(finite) > limit:
        body, last = finite[:-1], finite[-1]
        groups = min(limit - 1, len(body))
        edges = [len(body) * k // groups for k in range(groups + 1)]
        finite = [
            (sum(p[0] for p in body[a:b]) / (b - a), sum(p[1] for p in body[a:b]) / (b - a))
            for a, b in itertools.pairwise(edges)
        ]
        finite.append(last)
    return Curve(name=name, unit=unit, x=[p[0] for p in finite], y=[p[1] for p in finite])


def thumbnail(image: Image.Image, side: int = 176) -> str:
    """``image`` as an inline picture whose longer side is at most ``side`` pixels.

    Small flat pictures stay PNG (exact); anything larger than 12 kB that way becomes JPEG, so that a page of samples
    stays in the hundreds of kB.
    """
    small = image.convert("RGB")
    if max(small.size) < side // 2:  # tiny test pictures: enlarge by a whole factor, without blur
        factor = side // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), Image.Resampling.NEAREST)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer, kind = io.BytesIO(), "png"
    small.save(buffer, "PNG", optimize=True)
    if buffer.tell() > 12_000:
        buffer, kind = io.BytesIO(), "jpeg"
        small.save(buffer, "JPEG", quality=82)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
