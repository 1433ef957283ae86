"""The picture of places: a newcomer sees which place is weak, in the page and in its Markdown twin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.report.conftest import measurement, text_of
from tests.report.test_instruct import page_of, plain

from beholder.evidence import Evidence, Measurement
from beholder.report import render_markdown, slots
from beholder.report.verdicts import looks

MakeEvidence = Callable[..., Evidence]


def place(k: int, n: int, cost: float, right: float, half: float = 0.1, samples: int = 60) -> list[Measurement]:
    more = {"by": "slot", "stratum": f"image {k} of {n}", "n": samples}
    return [
        measurement("slots.delta.shuffled", cost, "nats/token", half, **more),
        measurement("slots.delta.text", cost / 2, "nats/token", half, **more),
        measurement("slots.accuracy", right, half=0.02, **more),
    ]


def of_places(e: Evidence, *found: list[Measurement]) -> Evidence:
    overall = [
        measurement("slots.delta.shuffled", 1.5, "nats/token", 0.2), measurement("slots.delta.text", 0.7, "nats/token"),
        measurement("slots.spread", 0.2, half=0.05), measurement("slots.follows", 0.97, half=0.02),
    ]  # fmt: skip
    return e.model_copy(update={"measurements": [*e.measurements, *overall, *(m for own in found for m in own)]})


def test_a_row_for_each_number_of_images_a_column_for_each_place_and_weak_ones_are_marked(
    make_instruct_evidence: MakeEvidence,
) -> None:
    e = of_places(
        make_instruct_evidence(), place(1, 2, 2.0, 0.97), place(2, 2, 1.0, 0.95), place(1, 3, 0.05, 0.55),
        place(2, 3, 1.5, 0.8), place(3, 3, 1.6, 0.97), place(1, 10, 1.0, 0.9, samples=4),
    )  # fmt: skip

    rows = slots.grid(e.measurements)

    assert [[s.name for s in row] for row in rows] == [
        ["image 1 of 2", "image 2 of 2"], ["image 1 of 3", "image 2 of 3", "image 3 of 3"], ["image 1 of 10"],
    ]  # fmt: skip
    assert [[s.standing for s in row] for row in rows] == [["looks"] * 2, ["blind", "weak", "looks"], ["few"]]
    assert [s.shade for s in rows[0]] == [1.0, 0.5]
    page, twin = text_of(page_of(e)), plain(render_markdown(e))
    assert "Does every place count?" in page and "✗ does not count" in page and "✗ weak" in page
    assert "image 2 of 3: right 80.0" in page.replace("\u00a0", " ") and "too few to judge" in page
    assert "| 3 images | ❌ does not count: 55.0 % (53.0–57.0 %), n = 60; +0.05 nats/token" in twin
    assert "(53.0–57.0 %) right when it decides, n = 60" in page.replace("\u00a0", " ")
    assert "as much text" in page and "as much text" in twin


def test_the_verdict_names_weak_places(make_instruct_evidence: MakeEvidence) -> None:
    good = of_places(make_instruct_evidence(gates=[]), place(1, 2, 2.0, 0.97), place(2, 2, 1.0, 0.95))
    weak = of_places(make_instruct_evidence(gates=[]), place(1, 2, 0.0, 0.5), place(2, 2, 1.0, 0.95))

    assert looks(good).tone == "good"
    assert looks(weak).answer == "Yes, but not in every place." and "image 1 of 2" in looks(weak).why


def test_a_run_of_single_images_has_no_picture_of_places(make_instruct_evidence: MakeEvidence) -> None:
    e = make_instruct_evidence()

    assert slots.grid(e.measurements) == [] and "Does every place count?" not in text_of(page_of(e))
    assert "image 1" not in plain(render_markdown(e))


@pytest.mark.parametrize(("n", "told"), [(1, "1 record names"), (1200, "1,200 records name")])
def test_records_that_name_an_absent_image_are_told_with_the_data(
    make_instruct_evidence: MakeEvidence, n: int, told: str
) -> None:
    e = make_instruct_evidence()
    e = e.model_copy(update={"data": e.data.model_copy(update={"absent_images": n})})

    assert told in text_of(page_of(e)) and told in plain(render_markdown(e))
