from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from beholder import evidence as ev
from beholder.evidence import Cost, Curve, DataFacts, Evidence, Histogram, Measurement, Sample, TrainableRow
from beholder.types import Status, UserError


def measurement(**changes: Any) -> Measurement:
    return Measurement(
        **({"name": "eval.loss", "value": 1.5, "unit": "nats/token", "better": "lower", "n": 10} | changes)
    )


def small(**changes: Any) -> Evidence:
    fields: dict[str, Any] = {
        "run_name": "r", "stage": "align", "status": Status.SUCCEEDED, "created": "2026-01-01T00:00:00Z",
        "trainable": [TrainableRow(part="connector", params=2, trainable=2, dtype="float32")],
        "data": DataFacts(records=3, train=2, eval=1), "cost": Cost(steps=4), "config_yaml": "seed: 1\n",
        "measurements": [measurement(), measurement(stratum="short", value=1.0), measurement(name="eval.perplexity")],
        "baseline": [measurement(value=4.0)],
    }  # fmt: skip
    return Evidence(**(fields | changes))


# ---------------------------------------------------------------------------------------------------------------
# Records


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), st.floats(allow_nan=False, allow_infinity=False))
def test_evidence_survives_json_with_any_text_and_any_finite_number(text: str, value: float):
    picture = ev.thumbnail(Image.new("RGB", (4, 3), (1, 2, 3)))
    record = small(
        run_name=text,
        gaps=[text],
        measurements=[measurement(value=value, caveat=text)],
        samples=[Sample(id=text, images=[picture], reference=text, predictions=[ev.Prediction(step=1, text=text)])],
        provenance={"nested": {text: [1, None, text, True, value]}},
    )

    assert Evidence.from_json(record.to_json()) == record
    assert Evidence.from_json(record.to_json().encode()) == record


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_is_no_measurement(value: float):
    with pytest.raises(ValidationError, match="finite"):
        measurement(value=value)
    with pytest.raises(ValidationError, match="finite"):
        measurement(ci95=(0.0, value))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n": 0}, "greater than or equal to 1"),
        ({"ci95": (2.0, 1.0)}, "ends swapped"),
        ({"better": "more"}, "'lower', 'higher' or 'none'"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)
def test_a_measurement_that_cannot_be_read_is_refused(change: dict[str, Any], match: str):
    with pytest.raises(ValidationError, match=match):
        measurement(**change)


@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/x.png",
        "javascript:alert(1)",
        "data:text/html;base64,PGI+",
        "data:image/svg+xml;base64,PHN2Zz4=",
        'data:image/png;base64,AAAA" onload="x',
        "data:image/png;base64,",
    ],
)
def test_a_picture_that_is_not_inline_pixels_is_refused(uri: str):
    with pytest.raises(ValidationError, match="pattern"):
        Sample(id="x", images=[uri], reference="", predictions=[])


def test_curves_and_histograms_with_unequal_lengths_are_refused():
    with pytest.raises(ValidationError, match="2 x values but 1 y values"):
        Curve(name="c", unit="", x=[1, 2], y=[1])
    with pytest.raises(ValidationError, match="'a' has 1 counts for 2 bins"):
        Histogram(name="h", unit="", bins=["0", "1"], series={"a": [1]})


def test_frozen_weights_are_intact_only_when_both_hashes_are_there_and_equal():
    def row(before: str | None, after: str | None) -> bool | None:
        return TrainableRow(part="p", params=1, trainable=0, dtype="f", sha256_before=before, sha256_after=after).intact

    assert [row("a", "a"), row("a", "b"), row("a", None), row(None, None)] == [True, False, None, None]


def test_measurements_are_found_by_name_and_stratum_and_flatten_to_metrics():
    e = small()

    overall, short, before = e.get("eval.loss"), e.get("eval.loss", "short"), e.get_baseline("eval.loss")
    assert overall is not None and short is not None and before is not None
    assert (overall.value, short.value, before.value) == (1.5, 1.0, 4.0)
    assert e.get("eval.loss", "long") is None
    assert e.metrics() == {"eval.loss": 1.5, "eval.loss/short": 1.0, "eval.perplexity": 1.5}


# ---------------------------------------------------------------------------------------------------------------
# Reading back


def test_every_wrong_field_is_named_by_its_path(tmp_path: Path):
    raw = json.loads(small().to_json())
    raw["measurements"][1]["value"] = "high"
    raw["cost"]["stepz"] = 1
    del raw["data"]["eval"]
    path = tmp_path / "evidence.json"
    path.write_text(json.dumps(raw))

    with pytest.raises(UserError) as error:
        ev.load_evidence(tmp_path)

    for part in (str(path), "measurements.1.value", "cost.stepz", "data.eval"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected one JSON object, got list"),
        ('{"schema_version": 2}', "schema_version is 2, this version of beholder reads 1"),
        ("{}", "schema_version is None"),
    ],
)
def test_a_file_that_is_no_evidence_says_what_it_is(tmp_path: Path, text: str, match: str):
    (tmp_path / "evidence.json").write_text(text)

    with pytest.raises(UserError, match=match):
        ev.load_evidence(tmp_path / "evidence.json")


def test_a_run_without_evidence_says_so(tmp_path: Path):
    with pytest.raises(UserError, match=r"evidence\.json: no such file"):
        ev.load_evidence(tmp_path)


# ---------------------------------------------------------------------------------------------------------------
# Curves and thumbnails


def test_thinning_keeps_the_mean_the_last_point_and_short_curves():
    points = [(float(k), 100.0 / (k + 1)) for k in range(5000)]

    curve = ev.thin("train.loss", "nats/token", points, limit=100)

    assert len(curve.x) == 100
    assert (curve.x[-1], curve.y[-1]) == points[-1]
    assert curve.x == sorted(curve.x)
    body = [y for _, y in points[:-1]]  # 99 groups of 50 or 51 points: their mean is the mean up to 2 %
    assert sum(curve.y[:-1]) / 99 == pytest.approx(sum(body) / len(body), rel=0.03)
    assert ev.thin("c", "", points[:100], limit=100).y == [y for _, y in points[:100]]


def test_thinning_leaves_out_what_is_not_finite():
    curve = ev.thin("c", "", [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)])

    assert (curve.x, curve.y) == ([1, 4], [2, 1])


@pytest.mark.parametrize(
    ("size", "mode", "expected"),
    [
        ((64, 64), "RGB", (128, 128)),
        ((1000, 500), "RGB", (176, 88)),
        ((100, 3000), "L", (6, 176)),
        ((88, 20), "P", (88, 20)),
    ],
)
def test_thumbnails_fit_and_tiny_pictures_are_enlarged_by_whole_factors(
    size: tuple[int, int], mode: str, expected: tuple[int, int]
):
    uri = ev.thumbnail(Image.new(mode, size))

    shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert shown.size == expected
    assert Sample(id="x", images=[uri], reference="", predictions=[]).images == [uri]


def test_a_busy_picture_becomes_a_small_jpeg():
    noise = Image.effect_noise((800, 600), 90).convert("RGB")

    uri = ev.thumbnail(noise)

    assert uri.startswith("data:image/jpeg;base64,")
    assert len(uri) < 40_000
