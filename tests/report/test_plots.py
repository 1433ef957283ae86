from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import pytest

from beholder.evidence import Curve, Histogram
from beholder.report import plots


def curve(y: list[float], name: str = "train.loss") -> Curve:
    return Curve(name=name, unit="nats/token", x=list(range(len(y))), y=y)


def test_a_drawing_is_well_formed_and_themed_by_the_page():
    plot = plots.curves(
        [("training", curve([3.0, 2.0, 1.0])), ("held-out", curve([3.1, 2.2, 1.3]))], title='Loss "a" & <b>'
    )

    root = ET.fromstring(str(plot.svg).replace("xlink:href", "href"))
    assert root.attrib["aria-label"] == 'Loss "a" & <b>'
    assert not re.search(r"#[0-9a-fA-F]{6}\b", str(plot.svg).replace("#" + "ffffff", "")), "a colour of its own"
    assert "var(--s1)" in plot.svg and "var(--s2)" in plot.svg and "var(--muted)" in plot.svg
    assert "font-family" not in plot.svg
    assert plot.legend == [("s1", "training"), ("s2", "held-out")]


def test_equal_input_gives_equal_bytes():
    assert plots.curves([("a", curve([1.0, 2.0]))], title="t") == plots.curves([("a", curve([1.0, 2.0]))], title="t")


@pytest.mark.parametrize(
    ("y", "log"), [([5.0, 0.05], True), ([5.0, 1.0], False), ([5.0, 0.0], False), ([5.0, -5.0], False)]
)
def test_only_positive_curves_of_a_wide_range_get_a_logarithmic_axis(y: list[float], log: bool):
    assert bool(plots.curves([("a", curve(y))], title="t").note) == log


def test_texts_in_a_drawing_are_not_read_as_formulae():
    data = Histogram(name="h", unit="$\\frac{1}$", bins=["$a", "b$"], series={"reference": [1, 2], "zero": [2, 1]})

    plot = plots.histogram(data, title="h", labels={"zero": "no image"})

    assert "$\\frac{1}$" in plot.svg and "$a" in plot.svg
    assert plot.legend == [("s1", "reference"), ("s4", "no image")]


def test_the_running_mean_starts_at_the_first_value_and_follows_a_constant():
    assert plots.running_mean([4.0, 4.0, 4.0], 10) == pytest.approx([4.0, 4.0, 4.0])
    assert plots.running_mean([1.0, 3.0], 1) == [1.0, 3.0]  # no memory
    slow = plots.running_mean([0.0] * 50 + [1.0] * 50, 10)
    assert slow[49] == 0 and 0.99 < slow[-1] <= 1
