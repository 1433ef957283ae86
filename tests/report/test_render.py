from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.report.conftest import gate, group, text_of

from beholder.evidence import (
    Cost,
    Curve,
    Evidence,
    Histogram,
    Measurement,
    Prediction,
    Sample,
    TextOnly,
    TrainableRow,
    WordReliance,
    WordStat,
)
from beholder.report import render, render_html, render_markdown
from beholder.report.content import warnings
from beholder.report.verdicts import learned, looks
from beholder.report.words import duration, fmt, fmt_ci
from beholder.types import Status, UserError, printable

MakeEvidence = Callable[..., Evidence]

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(2)>",
    "</bdi></div></style><style>*{display:none}",
    "{{ 7*7 }}{% raw %}",
    "a | b | `c` **d** [e](javascript:alert(3)) ![f](http://example.org/g.png)",
    "# heading\n- item\n\n<!-- gone -->",
    "right to left: \u202egnp.exe\u202c and nul: \x00 and escape: \x1b[31m and \x7f",
    "&lt;b&gt; stays as written &amp;",
    "$x_1$ and \\alpha",
    "日本語 🧿 עברית",
)


class Page(HTMLParser):
    """What a browser would see: elements with attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.elements}


def number(name: str, value: float, ci95: tuple[float, float] | None, unit: str = "nats/token") -> Measurement:
    return Measurement(name=name, value=value, unit=unit, better="none", n=100, ci95=ci95)


# ---------------------------------------------------------------------------------------------------------------
# Verdicts


@pytest.mark.parametrize(
    ("before", "after", "tone", "answer"),
    [
        ((4.7, (4.6, 4.8)), (0.03, (0.02, 0.04)), "good", "Yes"),
        ((4.7, (4.5, 4.9)), (4.6, (4.4, 4.8)), "weak", "Not shown"),
        ((4.7, None), (0.03, None), "weak", "Not shown"),
        ((4.7, (4.6, 4.8)), (5.0, (4.9, 5.1)), "bad", "No"),
        (None, (0.03, (0.02, 0.04)), "unknown", "No baseline"),
        ((4.7, (4.6, 4.8)), None, "unknown", "Not measured"),
    ],
)
def test_it_learned_only_if_the_interval_after_lies_below_the_one_before(
    make_evidence: MakeEvidence, before: Any, after: Any, tone: str, answer: str
):
    e = make_evidence(
        baseline=[number("eval.loss", *before)] if before else [],
        measurements=[number("eval.loss", *after)] if after else [],
    )

    verdict = learned(e)

    assert verdict.tone == tone
    assert verdict.answer.startswith(answer)


@pytest.mark.parametrize(
    ("delta", "ratio", "tone", "answer"),
    [
        ((1.8, (1.7, 1.9)), (56.0, (47.0, 66.0)), "good", "Yes"),
        ((0.0084, (0.002, 0.015)), (1.002, (1.001, 1.004)), "weak", "Barely"),
        ((0.0084, (-0.002, 0.02)), (1.002, (0.999, 1.01)), "bad", "No"),
        ((-0.5, (-0.6, -0.4)), (0.9, (0.8, 0.95)), "bad", "No"),
        ((0.5, None), (2.0, None), "bad", "No"),
        (None, None, "unknown", "Not measured"),
    ],
)
def test_it_looks_only_if_another_image_raises_the_loss_clearly(
    make_evidence: MakeEvidence, delta: Any, ratio: Any, tone: str, answer: str
):
    found = [number("ablation.delta.shuffled", *delta)] if delta else []
    found += [number("ablation.ratio.shuffled", *ratio, unit="ratio")] if ratio else []

    verdict = looks(make_evidence(measurements=found))

    assert verdict.tone == tone
    assert verdict.answer.startswith(answer)


def test_a_low_loss_is_not_taken_for_sight(make_evidence: MakeEvidence):
    e = make_evidence()
    blind = [m for m in e.measurements if not m.name.startswith("ablation")]
    blind += [
        number("ablation.delta.shuffled", 0.0, (0.0, 0.0)),
        number("ablation.ratio.shuffled", 1.0, (1.0, 1.0), "ratio"),
    ]
    text = Page(render_html(make_evidence(measurements=blind))).text

    assert "Yes, it learned." in text
    assert "No, it does not look." in text
    assert "A low loss is not sight." in text


CHANGED_PART = TrainableRow(part="language", params=9, trainable=0, dtype="f", sha256_before="a", sha256_after="b")
CHANGED_TEXT = TextOnly(prompts=1, logits=9, equal=False, sha256_before="a", sha256_after="b", changed=["Hi"])


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"status": Status.FAILED}, "ended as “failed”"),
        ({"trainable": [CHANGED_PART]}, "Frozen weights changed: language"),
        ({"text_only": CHANGED_TEXT}, "not bit-equal"),
        ({"measurements": [number("caption.empty.correct", 0.4, None, "share")]}, "of the captions are empty"),
    ],
)
def test_what_must_not_be_overlooked_stands_above_the_verdicts(
    make_evidence: MakeEvidence, changes: dict[str, Any], warning: str
):
    e = make_evidence(curves=[], histograms=[], **changes)
    page, markdown = Page(render_html(e)).text, render_markdown(e)

    assert warnings(make_evidence()) == []
    assert page.index(warning) < page.index("Did it learn?")
    assert markdown.index(warning) < markdown.index("Did it learn?")


# ---------------------------------------------------------------------------------------------------------------
# The page


ORDER = (
    "Can I promote it? Yes: all 3 gates passed.", "Did it learn? Yes, it learned.", "Does it look at the image? Yes",
    "Where does it fail? Nothing stands out.", "What did it cost? 7 min 11 s.",
    "Did it learn? Yes, it learned.", "Does it look at the image? Yes", "Where does it fail? Nothing stands out.",
    "Samples it never trained on", "What did it cost? 7 min 11 s.", "Can I promote it? Yes: all 3 gates passed.",
    "Gaps", "What was trainable", "Data", "Rejected, by reason", "Provenance", "Resolved config",
)  # fmt: skip


def test_the_page_answers_in_order_and_its_first_screen_has_every_verdict(make_evidence: MakeEvidence):
    text = text_of(render_html(make_evidence(curves=[])))

    place = 0
    for heading in ORDER:
        assert heading in text[place:], heading
        place += text[place:].index(heading) + 1


def test_a_run_that_succeeded_is_green_only_when_no_gate_failed(make_evidence: MakeEvidence):
    failed = make_evidence(curves=[], histograms=[], gates=[gate("looks_zero", -0.1, passed=False)])

    assert '<span class="pill succeeded">succeeded</span>' in render_html(make_evidence(curves=[], histograms=[]))
    assert '<span class="pill ">succeeded</span>' in render_html(failed)


def test_the_markdown_answers_in_the_same_order(make_evidence: MakeEvidence):
    markdown = render_markdown(make_evidence())

    headings = [re.sub(r"\W*(.*?\?).*", r"\1", h).strip("# ") for h in re.findall(r"^## .*", markdown, re.MULTILINE)]
    assert headings == [
        "Did it learn?", "Does it look at the image?", "Where does it fail?", "What did it cost?", "Can I promote it?",
        "What was trainable", "Data", "Provenance", "Config",
    ]  # fmt: skip
    first = markdown[: markdown.index("\n## ")]
    assert re.findall(r"\*\*(.*?\?)\*\*", first)[0] == "Can I promote it?"


def test_the_page_shows_the_numbers_with_their_intervals_the_samples_and_the_gaps(make_evidence: MakeEvidence):
    e = make_evidence()
    page = Page(render_html(e))

    for part in (
        "98.0\u00a0%", "96.8–99.2\u00a0%", "0.0312", "4.71", "56.8×", "A teal circle.", "A green circle.", "3,980",
        "undecodable", "7 min 11 s", "2,210 MB", "4f2c1d9", "bit-identical", "CLIPScore was not measured", "seed: 42",
    ):  # fmt: skip
        assert part in page.text, part
    pictures = [attrs["src"] for tag, attrs in page.elements if tag == "img"]
    assert set(pictures) == {uri for s in e.samples for uri in s.images}
    final = [(attrs.get("class") or "").split() for _, attrs in page.elements if "at1" in (attrs.get("class") or "")]
    assert sum("wrong" in classes for classes in final) == 1


def test_the_page_is_self_contained_and_forbids_everything_else(make_evidence: MakeEvidence):
    html = render_html(make_evidence())
    page = Page(html)

    assert page.tags().isdisjoint({"script", "link", "iframe", "object", "embed", "form", "base", "audio", "video"})
    [policy] = [a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv")]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    for tag, attrs in page.elements:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href") and value is not None:
                assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert len(html) < 400_000


def test_ids_are_unique_and_every_reference_resolves(make_evidence: MakeEvidence):
    html = render_html(make_evidence())

    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html)) <= set(ids)


def with_text(make_evidence: MakeEvidence, text: str) -> Evidence:
    """The example with ``text`` wherever other people's text can be."""
    e = make_evidence()
    predictions = [Prediction(step=k, text=text) for k in (1, 2)] + [Prediction(step=2, text=text, condition="zero")]
    spoken = [WordReliance(text=text, with_image=1, without=3)]
    sample = Sample(
        id=text, images=e.samples[0].images, reference=text, bucket=text, predictions=predictions, words=spoken
    )
    strata = [m.model_copy(update={"by": text, "stratum": s}) for s in (text, "b") for m in group("x", "y", 1.0, 0.1)]
    judged = gate(text, 0.0, text, passed=False, why=text, note=text, stratum=text, unit=text)
    odd = Measurement(
        name=f"eval.{text}", value=1, unit=text, better="none", n=1, stratum=text, caveat=text
    )  # fmt: skip
    return make_evidence(
        run_name=text, summary={text: text}, gaps=[text], config_yaml=text, provenance={text: [text]},
        samples=[sample], data=e.data.model_copy(update={"rejects": {text: 1}, "eval_origin": text}),
        measurements=[*e.measurements, odd, *strata], curves=[], histograms=[], gates=[judged, gate(text, None, text)],
        findings=[text], words=[WordStat(word=text, n=5, delta=1.0)],
        text_only=TextOnly(prompts=1, logits=1, equal=False, sha256_before="a", sha256_after="b", changed=[text]),
    )  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_and_never_acts(make_evidence: MakeEvidence, text: str):
    expected = Page(render_html(with_text(make_evidence, "plain")))
    html = render_html(with_text(make_evidence, text))
    page = Page(html)

    assert [t for t, _ in page.elements] == [t for t, _ in expected.elements]
    assert [sorted(a) for _, a in page.elements] == [sorted(a) for _, a in expected.elements]
    assert printable(text).split("\n")[0] in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", html)


def test_hostile_names_of_curves_and_bins_stay_text_in_the_drawings(make_evidence: MakeEvidence):
    def evidence(names: tuple[str, ...]) -> Evidence:
        return make_evidence(
            curves=[Curve(name=n, unit=n, x=[1, 2], y=[3, 4]) for n in names],
            histograms=[Histogram(name=names[0], unit=names[1], bins=list(names), series={names[2]: [1] * len(names)})],
        )

    page = Page(render_html(evidence(HOSTILE)))
    expected = Page(render_html(evidence(tuple(f"name {k}" for k in range(len(HOSTILE))))))

    ticks = {"g", "path", "use", "text", "tspan"}  # how many there are depends on the widths of the texts
    assert [t for t, _ in page.elements if t not in ticks] == [t for t, _ in expected.elements if t not in ticks]
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_in_its_markdown_cell(make_evidence: MakeEvidence, text: str):
    markdown, plain = (render_markdown(with_text(make_evidence, t)) for t in (text, "plain"))
    before_config, plain_before = markdown.split("## Config")[0], plain.split("## Config")[0]
    lines = before_config.splitlines()
    row = lines[lines.index("| id | reference | step 1 | step 2 | no image |") + 2]

    assert len(lines) == len(plain_before.splitlines())
    assert len(re.findall(r"(?<!\\)\|", row)) == 6  # five cells
    assert not re.search(r"(?<!\\)[<`]", before_config.replace("> **", ""))
    assert not re.search(r"(?<!\\)\]\(", before_config)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", markdown)


def test_a_run_that_measured_nothing_renders_and_says_so(make_evidence: MakeEvidence):
    e = make_evidence(
        measurements=[], baseline=[], curves=[], histograms=[], samples=[], trainable=[], text_only=None, gaps=[],
        provenance={}, summary={}, status=Status.CANCELLED, gates=[], words=[], cost=Cost(steps=0),
    )  # fmt: skip
    text = Page(render_html(e)).text

    assert text.count("Not measured.") == 2 * 4  # on the first screen and over each section
    assert "No loss curve was recorded." in text
    assert "cancelled" in render_markdown(e)


def test_odd_numbers_render(make_evidence: MakeEvidence):
    e = make_evidence(
        curves=[
            Curve(name="train.loss", unit="nats/token", x=[1], y=[0.0]),
            Curve(name="flat", unit="$x$", x=[1, 2], y=[5, 5]),
        ],
        measurements=[number("eval.loss", 1e-9, (0.0, 1e30)), number("ablation.loss.correct", 0.0, None)],
        baseline=[number("eval.loss", 0.0, (0.0, 0.0))],
    )

    assert "No." in Page(render_html(e)).text


# ---------------------------------------------------------------------------------------------------------------
# Files


def test_the_report_is_rendered_from_evidence_json_alone(make_evidence: MakeEvidence, tmp_path: Path):
    e = make_evidence()
    run = tmp_path / "run"
    run.mkdir()
    (run / "evidence.json").write_text(e.to_json(), encoding="utf-8")

    html, markdown = render(run, run)
    again = render(e, tmp_path / "elsewhere")

    assert (html.name, markdown.name) == ("report.html", "report.md")
    assert [p.read_bytes() for p in (html, markdown)] == [p.read_bytes() for p in again]
    assert sorted(p.name for p in run.iterdir()) == ["evidence.json", "report.html", "report.md"]


def test_a_folder_without_evidence_is_an_error_and_writes_nothing(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        render(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------
# Words for numbers


@pytest.mark.parametrize(
    ("value", "unit", "ci", "text", "interval"),
    [
        (0.9757, "share", (0.961, 0.985), "97.6 %", "96.1–98.5 %"),
        (1.0, "share", (0.99, 1.0), "100 %", "99.0–100 %"),
        (0.031249, "nats/token", (0.0272, 0.0352), "0.0312 nats/token", "0.0272–0.0352"),
        (-0.5, "nats/token", (-0.6, -0.4), "-0.500 nats/token", "-0.600 … -0.400"),
        (56.84, "ratio", (47.3, 66.3), "56.8×", "47.3–66.3×"),
        (1234.5, "ratio", None, "1,234×", ""),
        (12.0, "ratio", (3.0, 99.97), "12.0×", "3.00–100×"),
        (0.5, "%", None, "0.5 %", ""),
        (2.0, "parts", None, "2 parts", ""),
        (1.0023, "ratio", (0.995, 1.011), "1.002×", "0.995–1.011×"),
        (111.05, "perplexity", None, "111", ""),
        (26_000.0, "tokens", None, "26,000", ""),
        (0.0, "score 0-1", None, "0", ""),
        (1e-9, "nats/token", None, "1e-09 nats/token", ""),
    ],
)
def test_numbers_read_as_a_person_writes_them(value: float, unit: str, ci: Any, text: str, interval: str):
    m = number("x", value, ci, unit)

    assert fmt(m).replace("\u00a0", " ") == text
    assert fmt_ci(m).replace("\u00a0", " ") == interval


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (59.4, "59.4 s"), (431.2, "7 min 11 s"), (11_100, "3 h 05 min")]
)
def test_durations_read_as_a_person_writes_them(seconds: float, text: str):
    assert duration(seconds) == text
