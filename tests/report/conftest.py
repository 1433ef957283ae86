"""A complete evidence record as a quickstart-like run would leave it, for the report's tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image, ImageDraw

from beholder.evidence import (
    AdapterRow,
    Candidate,
    Condition,
    Cost,
    Curve,
    DataFacts,
    Evidence,
    GateResult,
    Histogram,
    Measurement,
    Prediction,
    Sample,
    TextOnly,
    TrainableRow,
    WordReliance,
    WordStat,
    thumbnail,
)
from beholder.types import Status

COLOURS = {"red": (214, 45, 45), "blue": (52, 92, 214), "green": (38, 150, 75), "yellow": (240, 200, 50)}


def picture(colour: str, shape: str) -> str:
    image = Image.new("RGB", (64, 64), (244, 244, 240))
    draw, box = ImageDraw.Draw(image), (16, 16, 48, 48)
    match shape:
        case "circle":
            draw.ellipse(box, fill=COLOURS[colour])
        case "triangle":
            draw.polygon([(32, 14), (50, 48), (14, 48)], fill=COLOURS[colour])
        case _:
            draw.rectangle(box, fill=COLOURS[colour])
    return thumbnail(image)


def text_of(html: str) -> str:
    """The words a reader of the page sees, separated by single spaces."""
    words: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            words.append(data)

    Reader().feed(html[html.index("<body>") :])
    return " ".join(" ".join(words).split())


def measurement(name: str, value: float, unit: str = "share", half: float = 0.0, **more: Any) -> Measurement:
    fields: dict[str, Any] = {"better": "none", "n": 400, "ci95": (value - half, value + half) if half else None}
    return Measurement(name=name, value=value, unit=unit, **(fields | more))


def group(by: str, stratum: str, ratio: float, half: float, n: int = 100, loss: float = 0.03) -> list[Measurement]:
    """A stratum whose loss with another image is ``ratio`` +- ``half`` times the own one's."""
    return [
        measurement("ablation.ratio.shuffled", ratio, "ratio", half, n=n, by=by, stratum=stratum),
        measurement(
            "ablation.delta.shuffled", loss * (ratio - 1), "nats/token", loss * half, n=n, by=by, stratum=stratum
        ),
        measurement("eval.loss", loss, "nats/token", loss / 10, n=n, by=by, stratum=stratum),
    ]


def gate(name: str, value: float | None, bound: str = "> 0", passed: bool = True, **more: Any) -> GateResult:
    fields: dict[str, Any] = {"why": f"why {name}", "end": "low", "measure": "ablation.delta.shuffled"}
    fields |= {"unit": "nats/token", "note": "not measured" if value is None else ""}
    return GateResult(name=name, passed=passed, bound=bound, value=value, **(fields | more))


@pytest.fixture
def make_evidence() -> Callable[..., Evidence]:
    """``make_evidence(field=value, …)``: the example with some fields replaced."""

    def make(**changes: Any) -> Evidence:
        samples = []
        for k in range(12):
            colour, shape = list(COLOURS)[k % 4], ["circle", "triangle", "rectangle"][k % 3]
            reference = f"A {colour} {shape}."
            wrong = k == 6
            samples.append(
                Sample(
                    id=f"test/{k}", images=[picture(colour, shape)], reference=reference, bucket="short",
                    predictions=[
                        Prediction(step=40, text=f"A {colour} shape shape", exact=False),
                        Prediction(step=240, text="A teal circle." if wrong else reference, exact=not wrong),
                        Prediction(step=240, text="A black circle.", condition="zero", exact=False),
                        Prediction(step=240, text="A gray triangle.", condition="shuffled", exact=False),
                    ],
                    words=[
                        WordReliance(text="A", with_image=0.01, without=0.02),
                        WordReliance(text=f" {colour}", with_image=0.02, without=4.22),
                        WordReliance(text=f" {shape}", with_image=0.02, without=1.02),
                        WordReliance(text=".", with_image=0.5, without=0.1),
                    ],
                )
            )  # fmt: skip
        steps = [float(s) for s in range(1, 241)]
        loss = [0.03 + 4.6 * math.exp(-s / 22) * (1 + 0.3 * math.sin(s * 12.9898)) for s in steps]
        fields: dict[str, Any] = {
            "run_name": "quickstart", "stage": "align", "status": Status.SUCCEEDED, "created": "2026-11-21T10:15:00Z",
            "summary": {"language model": "SmolLM2-135M-Instruct", "tower": "efficientnet_lite0",
                        "connector": "perceiver, 16 tokens"},
            "trainable": [
                TrainableRow(part="vision", params=3_400_000, trainable=0, dtype="bfloat16",
                             sha256_before="ab" * 32, sha256_after="ab" * 32),
                TrainableRow(part="connector", params=21_300_000, trainable=21_300_000, dtype="float32"),
                TrainableRow(part="language", params=134_515_008, trainable=0, dtype="bfloat16",
                             sha256_before="cd" * 32, sha256_after="cd" * 32),
            ],
            "data": DataFacts(
                records=4_000, train=3_980, eval=1_000, sources={"easy-vqa train": 3_980},
                rejects={"too_short": 12, "undecodable": 8}, duplicates={"exact": 3_967},
                train_buckets={"short": 3_980}, eval_buckets={"short": 1_000}, truncated_pct=0.0, label_zero_pct=0.0,
                eval_origin="Official test images, used for evaluation only.", fingerprint="0123456789abcdef" * 4,
            ),
            "baseline": [
                measurement("eval.loss", 4.71, "nats/token", 0.05, better="lower", n=1000),
                measurement("eval.perplexity", 111.05, "perplexity", 5.5, better="lower", n=1000),
                measurement("eval.token_accuracy", 0.31, "share", 0.012, better="higher", n=1000),
            ],
            "measurements": [
                measurement("eval.loss", 0.0312, "nats/token", 0.004, better="lower", n=1000),
                measurement("eval.perplexity", 1.0317, "perplexity", 0.004, better="lower", n=1000),
                measurement("eval.token_accuracy", 0.991, "share", 0.003, better="higher", n=1000),
                measurement("ablation.loss.correct", 0.0324, "nats/token", 0.007, n=256),
                measurement("ablation.loss.shuffled", 1.84, "nats/token", 0.11, n=256),
                measurement("ablation.loss.zero", 2.31, "nats/token", 0.09, n=256),
                measurement("ablation.delta.shuffled", 1.8076, "nats/token", 0.12, better="higher", n=256),
                measurement("ablation.ratio.shuffled", 56.8, "ratio", 9.5, better="higher", n=256),
                measurement("ablation.delta.zero", 2.2776, "nats/token", 0.1, better="higher", n=256),
                measurement("ablation.ratio.zero", 71.3, "ratio", 12.0, better="higher", n=256),
                measurement("caption.exact_match.correct", 0.98, "share", 0.012, better="higher",
                            caveat="case, spacing and closing punctuation ignored"),
                measurement("caption.bleu1.correct", 0.991, "score 0-1", 0.006),
                measurement("caption.cider_d.correct", 7.38, "score 0-10", 0.1,
                            caveat="document frequencies from this set; compare only on the same set"),
                measurement("caption.length.correct", 3.0, "words"),
                measurement("caption.exact_match.shuffled", 0.07, "share", 0.025),
                measurement("caption.exact_match.zero", 0.055, "share", 0.022),
                measurement("caption.exact_match.chance", 0.0625, "share", 0.024),
                measurement("ablation.loss.noise", 2.5, "nats/token", 0.1, n=256),
                measurement("ablation.delta.noise", 2.4676, "nats/token", 0.1, better="higher", n=256),
                measurement("ablation.ratio.noise", 77.2, "ratio", 13.0, better="higher", n=256),
                measurement("learn.delta", 4.6788, "nats/token", 0.05, better="higher", n=1000),
                measurement("learn.delta_text", 3.06, "nats/token", 0.06, better="higher", n=1000),
                measurement("band.untrained", 4.71, "nats/token", 0.05, n=1000),
                measurement("band.text_only", 3.09, "nats/token", 0.06, n=1000),
                measurement("band.uniform", 10.8, "nats/token", n=1000),
                measurement("chair.s.correct", 0.02, "share", 0.01, better="lower"),
                measurement("chair.s.zero", 0.7, "share", 0.05, better="lower"),
                measurement("qa.accuracy.correct", 0.93, "share", 0.03, better="higher", n=200),
                measurement("qa.accuracy.chance", 0.24, "share", 0.05, n=200),
                measurement("collapse.worst", 0.03, "share", 0.02, better="lower"),
                *group("question", "what shape", 40.0, 6.0), *group("question", "what colour", 80.0, 9.0),
                *group("length", "short", 50.0, 8.0), *group("length", "long", 30.0, 5.0),
            ],
            "gates": [
                gate("looks_shuffled", 1.6876),
                gate("looks_clearly", 47.3, "> 1.05", measure="ablation.ratio.shuffled", unit="ratio"),
                gate("no_collapse", 0.03, "≤ 0.5", measure="collapse.worst", unit="share", end="value"),
            ],
            "words": [
                WordStat(word=w, n=n, delta=d, ci95=(d - 0.2, d + 0.2))
                for w, n, d in (("blue", 40, 4.1), ("circle", 60, 1.9), ("A", 256, 0.01), (".", 256, -0.3))
            ],
            "curves": [
                Curve(name="train.loss", unit="nats/token", x=steps, y=loss),
                Curve(name="eval.loss", unit="nats/token", x=[60, 120, 180, 240], y=[0.36, 0.08, 0.044, 0.0312]),
                Curve(name="lr.connector", unit="learning rate", x=steps,
                      y=[3e-4 * min(1, s / 8) * (0.55 + 0.45 * math.cos(math.pi * s / 240)) for s in steps]),
                Curve(name="grad_norm", unit="gradient norm", x=steps, y=[0.2 + 3 * math.exp(-s / 30) for s in steps]),
                Curve(name="samples_per_s", unit="samples/s", x=steps, y=[11.5 + math.sin(s) for s in steps]),
            ],
            "histograms": [Histogram(name="caption length", unit="words", bins=["2", "3", "4", "5"],
                                     series={"reference": [0, 400, 0, 0], "correct": [1, 398, 1, 0],
                                             "zero": [12, 371, 14, 3]})],
            "samples": samples,
            "text_only": TextOnly(prompts=8, logits=4_816_896, equal=True, sha256_before="ef" * 32,
                                  sha256_after="ef" * 32, max_abs_difference=0.0),
            "cost": Cost(steps=240, epochs=0.96, samples=3_840, images=3_840, tokens=92_160, wall_s=431.2,
                         train_s=312.9, phases_s={"features": 31.0, "evaluation": 54.2}, step_s=1.3,
                         samples_per_s=12.3, data_wait_share=0.004, peak_memory_mb=2210, device="cpu, 2 cores"),
            "provenance": {"git": {"commit": "4f2c1d9", "dirty": False}, "versions": {"torch": "2.15.0"},
                           "argv": ["beholder", "quickstart"], "seed": 42},
            "config_yaml": "run_name: quickstart\nseed: 42\n",
            "gaps": ["CLIPScore was not measured: no CLIP model was given."],
        }  # fmt: skip
        return Evidence(**(fields | changes))

    return make


# ---------------------------------------------------------------------------------------------------------------
# Stage 2: answers to questions


def kind(
    stratum: str | None,
    own: float,
    shuffled: float,
    none: float,
    n: int,
    *,
    by: str | None = None,
    half: float = 0.03,
) -> list[Measurement]:
    """Answers of one kind of question under three conditions, with the gains of its own image, as the probe names them.

    ``half``: half the width of every interval.
    """
    shown: dict[Condition, float] = {"correct": own, "shuffled": shuffled, "none": none}
    where: dict[str, Any] = {"n": n, "by": by, "stratum": stratum, "better": "higher"}
    right, exact = (
        [
            measurement(f"answer.{what}.{c}", v, "share", ci95=(max(0.0, v - half), min(1.0, v + half)), **where)
            for c, v in shown.items()
        ]
        for what in ("accuracy", "exact")
    )
    others = [(c, v) for c, v in shown.items() if c != "correct"]
    return [*right, *exact, *(measurement(f"answer.gain.{c}", own - v, "share", half, **where) for c, v in others)]


YES_NO_SEEN, YES_NO_GUESSED = (0.975, 0.52, 0.69), (0.83, 0.83, 0.826)
"""Right on yes/no questions with the own image, with another's, with none: of a model that looks, and of the one in
the facts that reached 83 % without looking."""


def answers_by_kind(yes_no: tuple[float, float, float]) -> list[Measurement]:
    shape, colour = (1.0, 0.39, 0.28), (0.948, 0.18, 0.05)
    parts = [("yes/no questions", yes_no, 389), ("shape", shape, 305), ("color", colour, 306)]
    own, shuffled, none = (sum(n * shown[k] for _, shown, n in parts) / 1000 for k in range(3))
    rest = [(305 * a + 306 * b) / 611 for a, b in zip(shape, colour, strict=True)]
    return [
        *kind(None, own, shuffled, none, 1000, half=0.015),
        *(m for stratum, shown, n in parts for m in kind(stratum, *shown, n, by="question")),
        *kind("yes/no", *yes_no, 389, by="answer"),
        *kind("other answers", rest[0], rest[1], rest[2], 611, by="answer"),
    ]


def pope(condition: Condition, accuracy: float, yes_rate: float) -> list[Measurement]:
    values = {"accuracy": accuracy, "precision": accuracy, "recall": accuracy + 0.01, "f1": accuracy + 0.005}
    scores = [
        measurement(f"pope.{what}.{condition}", v, "share", 0.015, better="higher", n=389) for what, v in values.items()
    ]
    return [*scores, measurement(f"pope.yes_rate.{condition}", yes_rate, "share", 0.02, n=389)]


@pytest.fixture
def make_instruct_evidence(make_evidence: Callable[..., Evidence]) -> Callable[..., Evidence]:
    """The same for a run of stage instruct: ``make_instruct_evidence(yes_no=…, field=value, …)``."""

    def make(yes_no: tuple[float, float, float] = YES_NO_SEEN, **changes: Any) -> Evidence:
        base = make_evidence()
        dropped = ("caption.", "chair.", "qa.", "ablation.ratio.noise")
        kept = [m for m in base.measurements if m.stratum is None and not m.name.startswith(dropped)]
        by_kind = [
            *group("question", "yes/no questions", 3.1, 0.5, n=389), *group("question", "shape", 40.0, 6.0, n=305),
            *group("question", "color", 80.0, 9.0, n=306),
        ]  # fmt: skip
        samples = []
        for k in range(9):
            colour, shape = list(COLOURS)[k % 4], ["circle", "triangle", "rectangle"][k % 3]
            question, reference = [
                ("what shape is in the image?", shape),
                (f"is there a {colour} shape?", "yes"),
                (f"what color is the {shape}?", colour),
            ][(k + 1) % 3]
            samples.append(
                Sample(
                    id=f"test-q{k}", images=[picture(colour, shape)], question=question, reference=reference,
                    bucket="short",
                    predictions=[
                        Prediction(step=140, text="a", exact=False),
                        Prediction(step=280, text=reference if k else "no", exact=bool(k)),
                        Prediction(step=280, text="teal", condition="shuffled"),
                        Prediction(step=280, text="no", condition="none"),
                    ],
                )
            )  # fmt: skip
        modules = [
            ("self_attn.q_proj", 576, 576), ("self_attn.k_proj", 576, 192), ("self_attn.v_proj", 576, 192),
            ("self_attn.o_proj", 576, 576), ("mlp.gate_proj", 576, 1536), ("mlp.up_proj", 576, 1536),
            ("mlp.down_proj", 1536, 576),
        ]  # fmt: skip
        adapters = [
            AdapterRow(name=f"model.layers.{k}.{name}", d_in=a, d_out=b, rank=16, params=16 * (a + b))
            for k in range(30) for name, a, b in modules
        ]  # fmt: skip
        learned = sum(a.params for a in adapters)
        steps = [float(s) for s in range(70, 421, 70)]
        answered = answers_by_kind(yes_no)
        fields: dict[str, Any] = {
            "run_name": "quickstart_instruct", "stage": "instruct", "samples": samples, "step": 280,
            "adapters": adapters,
            "trainable": [
                *base.trainable,
                TrainableRow(part="lora", params=learned, trainable=learned, dtype="float32"),
            ],
            "measurements": [
                *kept, *by_kind, *answered,
                *pope("correct", yes_no[0], 0.51), *pope("shuffled", yes_no[1], 0.52), *pope("none", yes_no[2], 0.97),
                measurement("retention.loss_base", 3.412, "nats/token", 0.2, better="none", n=40),
                measurement("retention.loss", 3.441, "nats/token", 0.2, better="lower", n=40),
                measurement("retention.loss_ratio", 1.0085, "ratio", 0.003, better="lower", n=40),
                measurement("retention.kl", 0.0312, "nats/token", 0.005, better="lower", n=40),
                measurement("merge.max_logit_diff", 0.1875, "logits", better="lower", n=32,
                            caveat="weights are stored in bfloat16, to which a merge rounds"),
                measurement("merge.changed_pct", 0.31, "%", better="lower", n=2210),
            ],
            "gates": [
                gate("looks_shuffled", 1.6876),
                gate("retained", 1.0085, "≤ 1.02", measure="retention.loss_ratio", unit="ratio", end="value"),
                gate("answers_right", answered[0].value, "≥ 0.9", measure="answer.accuracy.correct",
                     unit="share", end="value"),
                gate("yes_no_needs_image", yes_no[0] - yes_no[2], "≥ 0.1", yes_no[0] - yes_no[2] >= 0.1,
                     measure="answer.gain.none", unit="share", end="value", stratum="yes/no"),
                gate("merges", 0.31, "≤ 1", measure="merge.changed_pct", unit="%", end="value"),
            ],
            "candidates": [
                Candidate(step=140, eval_loss=0.221, delta_shuffled=1.1, collapse=0.08),
                Candidate(step=280, eval_loss=0.031, delta_shuffled=1.8, collapse=0.04, best=True),
                Candidate(step=420, eval_loss=0.024, delta_shuffled=0.7, collapse=0.04,
                          refused="it looks less than before (+0.7 of at most +1.8 nats/token)"),
            ],
            "curves": [
                *(c for c in base.curves if not c.name.startswith("samples")),
                Curve(name="lr.lora", unit="learning rate", x=steps, y=[1e-3 * (1 - s / 480) for s in steps]),
                Curve(name="quick_eval.exact", unit="share", x=steps, y=[0.31, 0.62, 0.83, 0.94, 0.965, 0.97]),
                Curve(name="eval.exact", unit="share", x=[140, 280, 420], y=[0.6, 0.94, 0.9707]),
            ],
            "histograms": [Histogram(name="caption.length", unit="words", bins=["1", "2", "3"],
                                     series={"reference": [389, 0, 0], "correct": [380, 8, 1],
                                             "shuffled": [380, 8, 1], "none": [350, 30, 9]})],
            "cost": base.cost.model_copy(update={"steps": 420}),
            "config_yaml": "run_name: quickstart_instruct\nstage: instruct\nseed: 42\n",
        }  # fmt: skip
        return base.model_copy(update=fields | changes)

    return make
