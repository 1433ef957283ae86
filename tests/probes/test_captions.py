from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beholder.config import GenerateConfig
from beholder.config.stages import GATES
from beholder.data.chat import ChatEncoder
from beholder.data.collate import SampleBuilder
from beholder.data.images import ImageError, content_hash
from beholder.evidence import Measurement
from beholder.evidence.gates import judge
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import captions, written
from beholder.probes.written import Written
from beholder.probes.wrong_images import shuffle_images
from beholder.types import ImageSlot, Turn, UserError


def record(reference: str, prediction: str, condition: Any = "correct", id: str = "x", **more: Any) -> Written:
    return Written(id, reference, prediction, condition, tokens_len=len(prediction), **more)


def named(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {m.name: m for m in measurements}


# ---------------------------------------------------------------------------------------------------------------
# Generation


def test_greedy_captions_do_not_depend_on_the_batch_size(bench: Any, sighted: VisionLanguageModel):
    one, five, all_ = (
        written.write(sighted, bench.encoder, bench.builder, bench.held_out[:11], batch_size=size)
        for size in (1, 5, 11)
    )

    assert one == five == all_
    assert [r.id for r in one] == [e.id for e in bench.held_out[:11]]


def test_a_model_that_looks_captions_well_only_with_its_own_image(bench: Any, sighted: VisionLanguageModel):
    others = shuffle_images(bench.held_out, content_hash, 0)
    records = written.write(sighted, bench.encoder, bench.builder, bench.held_out)
    records += written.write(sighted, bench.encoder, bench.builder, bench.held_out, condition="zero")
    records += [replace(r, condition="shuffled") for r in written.write(sighted, bench.encoder, bench.builder, others)]
    m = named(captions.score(records))

    own, shuffled, blind = (m[f"caption.exact_match.{c}"] for c in ("correct", "shuffled", "zero"))
    assert own.ci95 is not None and shuffled.ci95 is not None and blind.ci95 is not None
    assert own.ci95[0] > max(shuffled.ci95[1], blind.ci95[1])
    # Without an image it writes one and the same caption, which is right as often as that caption is the reference.
    assert len({r.prediction for r in records if r.condition == "zero"}) == 1
    chance = m["caption.exact_match.chance"]
    assert blind.value <= chance.value
    assert m["caption.cider_d.correct"].value > m["caption.cider_d.shuffled"].value
    (described,) = judge({"describes": GATES["describes"]}, list(m.values()))
    assert described.passed and described.value is not None and described.value > 1


def test_a_model_that_writes_without_looking_does_not_describe(bench: Any, sighted: VisionLanguageModel):
    blind = written.write(sighted, bench.encoder, bench.builder, bench.held_out, condition="zero")
    records = [replace(r, condition=c) for c in ("correct", "shuffled") for r in blind]

    (described,) = judge({"describes": GATES["describes"]}, captions.score(records))

    assert not described.passed and described.value == 0


def test_the_gain_over_another_image_is_paired_by_sample() -> None:
    references = [
        f"a {colour} {shape}" for colour in ("red", "blue", "green", "teal") for shape in ("disc", "box", "bar")
    ]
    own = [record(r, r, id=str(k)) for k, r in enumerate(references)]
    other = [record(r, references[k - 1], "shuffled", id=str(k)) for k, r in enumerate(references)]
    same = [replace(r, condition="zero") for r in own]

    m = named(captions.score([*own, *other, *same]))

    gain, nothing = m["caption.gain.shuffled"], m["caption.gain.zero"]
    lost = m["caption.cider_d.correct"].value - m["caption.cider_d.shuffled"].value
    assert gain.value == pytest.approx(lost) and gain.value > 0 and gain.n == 12
    assert gain.ci95 is not None and gain.ci95[0] > 0
    assert (nothing.value, nothing.ci95) == (0, (0, 0))


def test_one_sample_has_no_gain_and_samples_that_differ_are_our_own_mistake() -> None:
    pair = [record("a red disc", "a red disc", id="a"), record("a red disc", "a disc", "shuffled", id="a")]

    assert not [m for m in captions.score(pair) if m.name.startswith("caption.gain.")]
    with pytest.raises(AssertionError, match="captions of other samples"):
        captions.score([*pair, replace(pair[0], id="b"), replace(pair[1], id="c")])


def test_end_of_text_is_reported_and_length_counts_tokens_before_it(bench: Any, sighted: VisionLanguageModel):
    [whole] = written.write(sighted, bench.encoder, bench.builder, bench.held_out[:1])
    [cut] = written.write(
        sighted, bench.encoder, bench.builder, bench.held_out[:1], GenerateConfig(temperature=0, max_new_tokens=5)
    )

    assert whole.finished and whole.tokens_len == len(whole.prediction.encode())  # one byte is one token here
    assert not cut.finished and cut.tokens_len == 5
    assert whole.prediction.startswith(cut.prediction)


def test_sampling_is_a_function_of_the_seed(bench: Any):
    settings = GenerateConfig(temperature=1.0, top_p=0.95, max_new_tokens=12)

    a, again, b = (
        written.write(bench.model, bench.encoder, bench.builder, bench.held_out[:4], settings, seed=s)
        for s in (1, 1, 2)
    )

    assert a == again
    assert [r.prediction for r in a] != [r.prediction for r in b]


def test_an_unusable_image_stops_the_probe_or_leaves_the_sample_out(bench: Any, tmp_path: Path):
    (tmp_path / "broken.png").write_bytes(b"not an image")
    bad = replace(
        bench.held_out[0],
        id="bad",
        images=(replace(bench.held_out[0].images[0], root=str(tmp_path), path="broken.png"),),
    )
    examples = [bad, bench.held_out[1]]
    lenient = SampleBuilder(bench.encoder, bench.builder.pipeline, None, on_bad_image="skip")

    with pytest.raises(ImageError, match=r"broken\.png.*'bad'"):
        written.write(bench.model, bench.encoder, bench.builder, examples)
    kept = written.write(bench.model, bench.encoder, lenient, examples, batch_size=1)

    assert [r.id for r in kept] == [bench.held_out[1].id]


def test_the_reference_of_a_conversation_is_the_answer_that_is_asked_for(bench: Any):
    encoder = ChatEncoder(
        bench.tokenizer,
        num_visual_tokens=4,
        max_seq_len=256,
        template="conversation",
        instruction="",
        instruction_multi="",
    )
    turns = (
        Turn("user", (ImageSlot(0), "What colour?")), Turn("assistant", ("red",)),
        Turn("user", ("Is it round?",)), Turn("assistant", ("no",)),
    )  # fmt: skip
    builder = SampleBuilder(encoder, bench.builder.pipeline, None, on_bad_image="error")
    asked = replace(bench.held_out[0], turns=turns)

    [answered] = written.write(bench.model, encoder, builder, [asked], GenerateConfig(max_new_tokens=1))
    [waiting] = written.write(
        bench.model, encoder, builder, [replace(asked, turns=turns[:3])], GenerateConfig(max_new_tokens=1)
    )

    assert answered.reference == "no"
    assert waiting.reference == ""  # what was said before is no answer to the last question


def test_progress_reaches_the_total(bench: Any):
    seen: list[tuple[int, int]] = []

    written.write(
        bench.model, bench.encoder, bench.builder, bench.held_out[:5], GenerateConfig(max_new_tokens=1),
        batch_size=2, progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip

    assert seen == [(2, 5), (4, 5), (5, 5)]


# ---------------------------------------------------------------------------------------------------------------
# Scores


def test_perfect_captions_score_perfectly():
    texts = ["A red square on white.", "two blue discs on black", "a small green triangle"]
    m = named(captions.score([record(t, t.lower()) for t in texts]))

    assert m["caption.exact_match.correct"].value == 1
    assert m["caption.exact_match.correct"].ci95 == pytest.approx((0.4385, 1.0), abs=1e-4)  # Wilson, 3 of 3
    assert [m[f"caption.bleu{n}.correct"].value for n in range(1, 5)] == pytest.approx([1.0] * 4)
    assert m["caption.rouge_l.correct"].value == pytest.approx(1.0)
    assert m["caption.cider_d.correct"].value == pytest.approx(10.0)
    assert m["caption.distinct.correct"].value == 1


def test_a_collapsed_model_shows_in_the_distinct_share_and_in_the_chance_level():
    references = ["a red disc"] * 5 + ["a blue disc"] * 3 + ["a green disc"] * 2
    m = named(captions.score([record(r, "a red disc.") for r in references]))

    assert m["caption.exact_match.correct"].value == m["caption.exact_match.chance"].value == 0.5
    assert m["caption.distinct.correct"].value == 0.1
    assert m["caption.distinct.correct"].caveat is not None and "3" in m["caption.distinct.correct"].caveat


def test_empty_and_cut_captions_are_counted():
    records = [record("a b", ""), record("a b", " . "), record("a b", "a b"), record("a b", "a b a", finished=False)]
    m = named(captions.score(records))

    assert m["caption.empty.correct"].value == 0.5
    assert m["caption.unfinished.correct"].value == 0.25


def test_bleu_orders_that_no_reference_reaches_are_absent_and_cider_says_so():
    m = named(captions.score([record("a blue square", "a blue square"), record("a red disc", "a red disc")]))

    assert m["caption.bleu3.correct"].value == pytest.approx(1.0)
    assert "caption.bleu4.correct" not in m
    caveat = m["caption.cider_d.correct"].caveat
    assert caveat is not None and "2 of 2 references have fewer than 4 words" in caveat


def test_corpus_bleu_lies_in_its_interval():
    records = [
        record(f"a {c} disc on white", f"a {p} disc on white") for c, p in zip("rgbyk" * 6, "rgbrr" * 6, strict=True)
    ]
    m = named(captions.score(records))

    for name in ("bleu1", "bleu4", "rouge_l", "cider_d", "length"):
        ci = m[f"caption.{name}.correct"].ci95
        assert ci is not None and ci[0] <= m[f"caption.{name}.correct"].value <= ci[1], name


def test_only_the_own_image_has_a_direction():
    m = named(captions.score([record("a", "a"), record("a", "b", "zero")]))

    assert m["caption.exact_match.correct"].better == "higher"
    assert m["caption.exact_match.zero"].better == "none"


def test_exact_match_of_each_stratum_is_over_its_own_captions():
    records = [record("a", "a"), record("b", "x"), record("c", "c"), record("d", "d")]
    records += [record(letter, "x", "zero") for letter in "abcd"]
    groups = {"length": ["short", "short", "long", None], "question": ["all", "all", "all", "all"]}

    rows = [m for m in captions.score(records, groups=groups) if m.stratum is not None]

    assert {(m.name, m.by, m.stratum): (m.value, m.n) for m in rows} == {
        ("caption.exact_match.correct", "length", "long"): (1.0, 1),
        ("caption.exact_match.correct", "length", "short"): (0.5, 2),
    }  # a grouping with a single stratum says nothing new
    assert all(m.ci95 is not None and m.ci95[0] <= m.value <= m.ci95[1] for m in rows)


def test_strata_that_do_not_line_up_with_the_captions_are_refused():
    with pytest.raises(AssertionError, match="length: 1 strata for 2 captions"):
        captions.score([record("a", "a"), record("b", "b")], groups={"length": ["short"]})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_a_number_is_named(value: float, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captions, "cider_d", lambda predictions, references: [value] * len(predictions))

    with pytest.raises(FloatingPointError, match=r"caption\.cider_d\.correct is (nan|inf) over 2 samples"):
        captions.score([record("a", "a"), record("b", "b")])


def test_nothing_to_score_is_an_error():
    with pytest.raises(UserError, match="no captions"):
        captions.score([])


def test_length_histogram_counts_every_sample_once_and_has_few_bins():
    records = [record("a b c", "a " * n) for n in (0, 3, 3, 90)]
    h = captions.length_histogram(records)

    assert len(h.bins) <= 24
    assert sum(h.series["reference"]) == sum(h.series["correct"]) == 4
    assert h.bins[0].startswith("0") and h.series["correct"][0] == 3 and h.series["correct"][-1] == 1
