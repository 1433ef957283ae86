from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.data.collate import Layout
from beholder.data.images import content_hash
from beholder.evidence import CONDITIONS, Condition, Measurement
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import loss as probe
from beholder.probes import wrong_images
from beholder.probes.loss import SampleLoss
from beholder.types import Batch, Example, ImageRef, ImageSlot, Turn, UserError


def named(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {m.key: m for m in measurements}


def sums(id: str, nll: float, tokens: int, correct: int = 0) -> SampleLoss:
    """A sample with one turn, its nats spread evenly over the tokens."""
    return SampleLoss(id, nll, tokens, correct, (nll / tokens,) * tokens, (tokens,))


def of_turns(id: str, *turns: Sequence[float]) -> SampleLoss:
    """A sample with the given token losses, turn by turn."""
    tokens = [x for turn in turns for x in turn]
    return SampleLoss(id, sum(tokens), len(tokens), 0, tuple(tokens), tuple(map(len, turns)))


def conversation(example: Example, *rounds: tuple[str, str]) -> Example:
    """The example's image with other questions and answers."""
    turns: list[Turn] = []
    for k, (question, answer) in enumerate(rounds):
        turns.append(Turn("user", (ImageSlot(0), "\n", question) if k == 0 else (question,)))
        turns.append(Turn("assistant", (answer,)))
    return replace(example, turns=tuple(turns))


# ---------------------------------------------------------------------------------------------------------------
# Loss per sample


LAYOUTS = [("padded", 1), ("padded", 4), ("padded", 16), ("packed", 1), ("packed", 4), ("packed", 16)]


def test_losses_are_equal_for_every_batch_size_and_packing(bench: Any):
    examples = bench.held_out[:16]
    layouts: dict[str, Layout] = {"padded": bench.padded, "packed": bench.packed}

    runs = [probe.sample_losses(bench.model, bench.batches(layouts[kind], n)(examples)) for kind, n in LAYOUTS]

    reference = runs[0]
    for run in runs[1:]:
        assert [s.id for s in run] == [e.id for e in examples]
        for s, r in zip(run, reference, strict=True):
            # fp32 matrix products round differently with the number of rows: worst measured 3e-7 relative.
            assert s.nll == pytest.approx(r.nll, rel=5e-6)
            assert s.token_nll == pytest.approx(r.token_nll, rel=5e-5, abs=5e-6)
            assert (s.tokens, s.correct, s.turns) == (r.tokens, r.correct, r.turns)
        ours, theirs = (named(probe.summarize(x, "eval"))["eval.loss"].value for x in (run, reference))
        assert ours == pytest.approx(theirs, rel=1e-6)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_the_ablation_does_not_depend_on_batch_size_packing_or_processes(
    bench: Any, sighted: VisionLanguageModel, condition: Condition
):
    examples = bench.held_out[:15]

    def losses(make: Callable[[Sequence[Example]], Any]) -> list[SampleLoss]:
        return wrong_images.ablation_losses(sighted, examples, make, (condition,), content_key=content_hash)[condition]

    one = losses(bench.batches(bench.padded, 1))
    other = losses(bench.batches(bench.packed, 16))
    # Two processes each batch every second example; `together` puts the results back in turn.
    shares = [losses(lambda e, r=r: bench.batches(bench.packed, 4)(e[r::2])) for r in range(2)]
    shared = [shares[i % 2][i // 2] for i in range(len(examples))]

    for run in (other, shared):
        assert [s.id for s in run] == [e.id for e in examples]
        assert [s.nll for s in run] == pytest.approx([s.nll for s in one], rel=5e-6)


def test_a_packed_batch_of_conversations_gives_every_turn_its_own_losses(bench: Any):
    encoder = conversation_encoder(bench)
    three = conversation(bench.held_out[0], ("What?", "red"), ("And?", "a square"), ("Sure?", "yes"))
    examples = [three, conversation(bench.held_out[1], ("Where?", "left")), replace(three, id="again")]
    builder = type(bench.builder)(encoder, bench.builder.pipeline, None, on_bad_image="error")
    batch = builder.batch(examples, replace(bench.packed, pack_len=256))
    assert batch.input_ids.shape[0] < len(examples)

    losses = probe.sample_losses(bench.model, [batch])

    assert [s.turns for s in losses] == [(4, 9, 4), (5,), (4, 9, 4)]  # byte tokens and an end token each
    for s in losses:
        assert s.tokens == len(s.token_nll) == sum(s.turns)
        assert s.nll == pytest.approx(sum(s.token_nll), rel=1e-12)
    parts = losses[0].token_nll[:4], losses[0].token_nll[4:13], losses[0].token_nll[13:]
    assert losses[0].turn_nll == pytest.approx([sum(part) for part in parts])
    [alone] = probe.sample_losses(bench.model, [builder.batch(examples[:1], bench.padded)])
    assert losses[0].token_nll == pytest.approx(alone.token_nll, rel=5e-5, abs=5e-6)


def conversation_encoder(bench: Any) -> Any:
    from beholder.data.chat import ChatEncoder

    return ChatEncoder(
        bench.tokenizer, num_visual_tokens=4, max_seq_len=256, template="conversation", instruction="Say it:",
        instruction_multi="Say each:",
    )  # fmt: skip


@given(
    st.lists(
        st.tuples(st.text(max_size=5), st.lists(st.lists(st.floats(0, 50), min_size=1, max_size=4), min_size=1)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
@settings(deadline=None)  # a busy machine is no failure
def test_a_sample_loss_survives_json(samples: list[tuple[str, list[list[float]]]]):
    losses = [of_turns(id, *turns) for id, turns in samples]

    back = [SampleLoss(**row) for row in json.loads(json.dumps([asdict(x) for x in losses]))]

    assert back == losses
    assert all(isinstance(x.token_nll, tuple) and isinstance(x.turns, tuple) for x in back)


def test_sample_loss_equals_cross_entropy_computed_without_our_loss_code(bench: Any):
    example = bench.held_out[3]
    [batch] = bench.batches(bench.padded, 1)([example])
    [ours] = probe.sample_losses(bench.model, [batch])

    with torch.no_grad():
        hidden = bench.model.language.hidden(bench.model.embed(batch), batch.position_ids)
        logits = bench.model.language.head(hidden[0]).double()
    targets = torch.nonzero(batch.supervise[0]).flatten()
    log_p = logits[targets - 1].log_softmax(-1)[range(len(targets)), batch.input_ids[0, targets]]

    assert ours.tokens == len(targets) == len(example.target_text.encode()) + 1  # byte tokens and the end token
    assert ours.nll == pytest.approx(-float(log_p.sum()), rel=1e-5)
    assert ours.token_nll == pytest.approx((-log_p).tolist(), rel=1e-4, abs=1e-5)
    assert ours.turns == (len(targets),)


def test_measuring_leaves_the_model_in_the_mode_it_found_and_dropout_off(bench: Any):
    model = bench.model
    model.train()
    inside: list[bool] = []
    handle = model.connector.register_forward_hook(lambda module, *_: inside.append(module.training))
    try:
        probe.sample_losses(model, bench.batches()(bench.held_out[:2]))
    finally:
        handle.remove()

    assert inside == [False]
    assert model.training
    model.train(False)


def test_a_loss_that_is_not_finite_names_the_samples(bench: Any):
    handle = bench.model.connector.register_forward_hook(lambda *args: args[2] * float("nan"))
    try:
        with pytest.raises(FloatingPointError, match=bench.held_out[0].id):
            probe.sample_losses(bench.model, bench.batches()(bench.held_out[:2]))
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------------------------
# Summary


def test_summary_weighs_tokens_not_samples():
    losses = [sums("short", 8.0, 2), sums("long", 18.0, 18, 9)]

    m = named(probe.summarize(losses, "eval"))

    assert m["eval.loss"].value == pytest.approx(26 / 20)  # not (4 + 1) / 2
    assert m["eval.perplexity"].value == pytest.approx(math.exp(26 / 20))
    assert m["eval.token_accuracy"].value == pytest.approx(9 / 20)
    assert (m["eval.tokens"].value, m["eval.loss"].n) == (20, 2)


def test_intervals_contain_the_value_and_shrink_with_more_samples():
    rng = np.random.default_rng(0)
    losses = [sums(str(k), float(rng.gamma(4.0) * 7), 7, 3) for k in range(400)]

    few, many = (named(probe.summarize(losses[:n], "eval"))["eval.loss"] for n in (25, 400))

    assert few.ci95 is not None and many.ci95 is not None
    assert few.ci95[0] < few.value < few.ci95[1]
    assert (many.ci95[1] - many.ci95[0]) < 0.5 * (few.ci95[1] - few.ci95[0])  # sqrt(25 / 400) = 1/4


def test_strata_partition_the_samples():
    losses = [sums(f"{k}", 1.0 + k, 2, 1) for k in range(9)]
    groups = {"length": [[("short", "medium", "long")[k % 3]] for k in range(9)]}

    m = named(probe.summarize_groups(losses, groups, "eval"))
    overall = named(probe.summarize(losses, "eval"))["eval.loss"]

    strata = [m[f"eval.loss/{s}"] for s in ("short", "medium", "long")]
    assert sum(s.n for s in strata) == overall.n == 9
    assert np.mean([s.value for s in strata]) == pytest.approx(overall.value)  # equal token counts
    assert m["eval.loss/short"].value == pytest.approx((1 + 4 + 7) / 6)
    assert m["eval.token_accuracy/short"].value == 0.5
    assert {s.by for s in strata} == {"length"}


def test_a_stratum_sums_its_own_turns_and_counts_samples():
    losses = [of_turns("a", [1.0], [2.0, 4.0], [6.0]), of_turns("b", [3.0]), of_turns("c", [5.0], [7.0])]
    groups = {"turn": [["first", "later", "later"], ["first"], ["first", "later"]]}

    m = named(probe.summarize_groups(losses, groups, "eval"))

    assert m["eval.loss/first"].value == pytest.approx((1 + 3 + 5) / 3)
    assert m["eval.loss/later"].value == pytest.approx((2 + 4 + 6 + 7) / 4)
    assert (m["eval.tokens/later"].value, m["eval.loss/later"].n) == (4, 2)
    assert "3 turns of 2 samples" in (m["eval.loss/later"].caveat or "")
    assert "eval.token_accuracy/later" not in m  # hits are known per sample, not per turn


def test_turns_of_one_sample_are_not_counted_as_independent():
    rng = np.random.default_rng(0)
    level = rng.gamma(4.0, size=30)  # every sample has its own, shared by its ten turns
    losses = [of_turns(str(k), *[[float(v)]] * 10) for k, v in enumerate(level)] + [of_turns("x", [1.0])]
    groups = {"turn": [["many"] * 10] * 30 + [["one"]]}

    ci = named(probe.summarize_groups(losses, groups, "eval"))["eval.loss/many"].ci95

    assert ci is not None
    assert ci[1] - ci[0] > 3 * level.std() / math.sqrt(30)  # about 3.92 standard errors over 30 samples, not over 300


def test_groups_leave_out_what_says_nothing_and_what_was_cut_off():
    losses = [of_turns("a", [1.0], [2.0]), of_turns("b", [3.0])]

    m = probe.summarize_groups(
        losses, {"length": [["short", "short"], ["short"]], "turn": [["first", "later"], ["first", "cut off"]],
                 "answer": [[None, "number"], ["other"]]}, "eval",
    )  # fmt: skip

    assert {(x.by, x.stratum) for x in m} == {
        ("turn", "first"), ("turn", "later"), ("answer", "number"), ("answer", "other")
    }  # fmt: skip


def test_an_absurd_loss_has_no_perplexity_and_no_samples_is_an_error():
    assert "eval.perplexity" not in named(probe.summarize([sums("a", 900.0, 1)], "eval"))
    for empty in (lambda: probe.summarize([], "eval"), lambda: probe.paired_gain([], [], "eval"),
                  lambda: probe.compare_conditions({"correct": []}, name="eval")):  # fmt: skip
        with pytest.raises(UserError, match="eval: no sample was left"):
            empty()


def test_a_number_that_is_not_finite_is_an_error_that_names_the_metric():
    bad = [sums("a", math.nan, 2), sums("b", 1.0, 2)]

    with pytest.raises(FloatingPointError, match=r"eval\.loss is nan"):
        probe.summarize(bad, "eval")
    with pytest.raises(FloatingPointError, match=r"learn\.delta is nan"):
        probe.paired_gain(bad, bad, "learn.delta")
    with pytest.raises(FloatingPointError, match=r"eval\.loss for odd is nan"):
        probe.summarize_groups(bad, {"kind": [["odd"], ["even"]]}, "eval")


# ---------------------------------------------------------------------------------------------------------------
# The same targets twice


def test_the_gain_is_paired_and_weighs_tokens():
    before = [sums("a", 8.0, 2), sums("b", 20.0, 10), sums("c", 9.0, 3)]
    after = [sums("a", 4.0, 2), sums("b", 5.0, 10), sums("c", 3.0, 3)]

    gain = probe.paired_gain(before, after, "learn.delta")

    assert gain.value == pytest.approx((4 + 15 + 6) / 15)
    assert (gain.name, gain.better, gain.n) == ("learn.delta", "higher", 3)
    assert gain.ci95 is not None and gain.ci95[0] < gain.value < gain.ci95[1]


def test_the_paired_gain_is_surer_than_either_loss():
    rng = np.random.default_rng(1)
    base = rng.gamma(2.0, 5.0, size=200)
    before = [sums(str(k), float(v) + 1 + 0.1 * float(rng.random()), 5) for k, v in enumerate(base)]
    after = [sums(str(k), float(v), 5) for k, v in enumerate(base)]

    ci, own = probe.paired_gain(before, after, "x").ci95, probe.summarize(after, "x")[0].ci95

    assert ci is not None and own is not None
    assert ci[1] - ci[0] < 0.05 * (own[1] - own[0])


def test_a_target_that_was_cut_in_one_of_the_two_is_compared_over_what_both_have():
    gain = probe.paired_gain([of_turns("a", [3.0, 2.0], [9.0])], [of_turns("a", [1.0, 1.0])], "x")

    assert gain.value == pytest.approx(3 / 2)


def test_losses_of_different_samples_are_not_compared():
    two, one = [sums("a", 1.0, 2), sums("b", 2.0, 2)], [sums("a", 1.0, 2)]

    with pytest.raises(AssertionError, match="2 losses before, 1 after"):
        probe.paired_gain(two, one, "x")
    with pytest.raises(AssertionError, match="2 losses under correct, 1 zero"):
        probe.compare_conditions({"correct": two, "zero": one})
    with pytest.raises(AssertionError, match="supervises"):
        probe.compare_conditions({"correct": one, "zero": [sums("a", 1.0, 3)]})
    with pytest.raises(AssertionError, match="strata of 1 samples, losses of 2"):
        probe.summarize_groups(two, {"turn": [["first"]]}, "x")


# ---------------------------------------------------------------------------------------------------------------
# Shuffling images


def showing(contents: Sequence[int]) -> list[Example]:
    """One image a sample; equal contents lie under different paths."""
    return [Example(str(k), (ImageRef("root", f"{k}-{c}"),), ()) for k, c in enumerate(contents)]


def content_of(ref: ImageRef) -> str:
    return ref.path.split("-")[-1]


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 5))
@settings(deadline=None)  # a busy machine is no failure
def test_the_shuffle_never_gives_an_equal_image_and_permutes_wherever_that_is_possible(contents: list[int], seed: int):
    examples, largest = showing(contents), max(contents.count(c) for c in set(contents))
    if len(set(contents)) == 1:
        with pytest.raises(UserError, match="two different images"):
            wrong_images.shuffle_images(examples, content_of, seed)
        return

    shuffled = wrong_images.shuffle_images(examples, content_of, seed)

    assert all(content_of(a.images[0]) != content_of(b.images[0]) for a, b in zip(examples, shuffled, strict=True))
    assert wrong_images.shuffle_images(examples, content_of, seed) == shuffled
    if 2 * largest <= len(examples):  # by Hall's theorem exactly then a permutation without equal pairs exists
        assert sorted(e.images[0].path for e in shuffled) == sorted(e.images[0].path for e in examples)


@pytest.mark.parametrize("contents", [[], [1]])
def test_the_shuffle_needs_two_images(contents: list[int]):
    with pytest.raises(UserError, match="cannot shuffle"):
        wrong_images.shuffle_images(showing(contents), content_of, 0)


@given(st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=2, max_size=12), st.integers(0, 3))
@settings(deadline=None)  # a busy machine is no failure
def test_no_image_slot_is_given_an_image_that_its_example_shows(shown: list[list[int]], seed: int):
    examples = [
        Example(str(k), tuple(ImageRef("root", f"{k}-{j}-{c}") for j, c in enumerate(images)), ())
        for k, images in enumerate(shown)
    ]

    try:
        shuffled = wrong_images.shuffle_images(examples, content_of, seed)
    except UserError:
        every = {c for images in shown for c in images}
        assert any(set(images) == every for images in shown)
        return
    for before, after in zip(examples, shuffled, strict=True):
        assert replace(after, images=before.images) == before
        assert len(after.images) == len(before.images)
        assert {content_of(r) for r in before.images}.isdisjoint(content_of(r) for r in after.images)


# ---------------------------------------------------------------------------------------------------------------
# Ablation


def ablate(bench: Any, model: VisionLanguageModel, layout: Layout | None = None) -> dict[str, Measurement]:
    make = bench.batches(layout or bench.packed)
    losses = wrong_images.ablation_losses(model, bench.held_out, make, content_key=content_hash)
    return named(probe.compare_conditions(losses))


def test_shuffled_zero_and_noise_images_raise_the_loss_of_a_model_that_looks(bench: Any, sighted: VisionLanguageModel):
    m = ablate(bench, sighted)

    delta, ratio = m["ablation.delta.shuffled"], m["ablation.ratio.shuffled"]
    assert delta.ci95 is not None and delta.ci95[0] > 0.2  # measured 0.48 (0.41 to 0.55)
    assert ratio.ci95 is not None and ratio.ci95[0] > 2  # measured 4.9 (4.0 to 6.0)
    for condition in ("zero", "noise"):
        ci = m[f"ablation.delta.{condition}"].ci95
        assert ci is not None and ci[0] > 0.2
    assert m["ablation.loss.correct"].n == len(bench.held_out)
    right, wrong = m["ablation.loss.correct"].value, m["ablation.loss.shuffled"].value
    assert delta.value == pytest.approx(wrong - right)
    assert ratio.value == pytest.approx(wrong / right)


def test_a_blind_model_shows_no_difference_however_low_its_loss(bench: Any, blind: VisionLanguageModel):
    m = ablate(bench, blind, bench.padded)

    assert m["ablation.loss.correct"].value < 2  # it knows how captions go; an untrained model is at 6.3
    for condition in ("shuffled", "zero", "noise"):
        assert m[f"ablation.delta.{condition}"].value == 0
        assert m[f"ablation.delta.{condition}"].ci95 == (0, 0)
        assert m[f"ablation.ratio.{condition}"].value == 1


def test_an_untrained_connector_does_not_pass_for_sight(bench: Any):
    m = ablate(bench, bench.model)

    ci = m["ablation.delta.shuffled"].ci95
    assert ci is not None and ci[0] < 0 < ci[1]


def pixels_seen(bench: Any, kind: Any, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels that the tower was given for a blank image, and the features that came back."""
    g = bench.model.geometry
    seen: list[torch.Tensor] = []
    assert bench.model.vision is not None
    handle = bench.model.vision.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        blank = wrong_images.blank_image(bench.model, kind, seed)
    finally:
        handle.remove()
    [pixels] = seen
    assert pixels.dtype == torch.uint8
    assert blank.features is not None and blank.features.shape == (g.num_patches, g.d_vision)
    mean, std = torch.tensor(g.mean)[:, None, None], torch.tensor(g.std)[:, None, None]
    return (pixels[0].float() / 255 - mean) / std, blank.features


def test_the_zero_image_is_the_grey_whose_normalised_pixels_are_zero(bench: Any):
    normalised, _ = pixels_seen(bench, "zero")

    assert normalised.abs().max() <= 0.5 / 255 / min(bench.model.geometry.std) + 1e-6


def test_the_noise_image_has_normal_pixels_as_far_as_bytes_go(bench: Any):
    g = bench.model.geometry
    normalised, features = pixels_seen(bench, "noise", 3)
    again, same = pixels_seen(bench, "noise", 3)
    other, _ = pixels_seen(bench, "noise", 4)

    drawn = torch.randn(normalised.shape, generator=torch.Generator().manual_seed(3))
    low = [(0 - m) / s for m, s in zip(g.mean, g.std, strict=True)]
    high = [(1 - m) / s for m, s in zip(g.mean, g.std, strict=True)]
    clipped = torch.stack([drawn[c].clamp(low[c], high[c]) for c in range(3)])
    assert (normalised - clipped).abs().max() <= 0.5 / 255 / min(g.std) + 1e-6
    assert normalised.std() > 0.5
    assert torch.equal(normalised, again) and torch.equal(features, same)
    assert not torch.equal(normalised, other)


def test_noise_differs_between_samples_and_image_places(bench: Any):
    two = Turn("user", (ImageSlot(0), ImageSlot(1), "\nSay each:"))
    own = [e.images[0] for e in bench.held_out]
    examples = [Example(f"s{k}", (own[k], own[k + 1]), (two, Turn("assistant", ("a dot",)))) for k in range(12)]
    images = [wrong_images.blank_image(bench.model, "noise", k) for k in range(wrong_images.NUM_NOISE)]

    def shown(size: int) -> list[list[int]]:
        batches: list[Batch] = [wrong_images.show(b, images) for b in bench.batches(bench.padded, size)(examples)]
        flat = [next(j for j, x in enumerate(images) if x is image) for batch in batches for image in batch.images]
        return [flat[k : k + 2] for k in range(0, len(flat), 2)]

    assert shown(1) == shown(5)
    assert len({j for pair in shown(1) for j in pair}) > 4
    assert any(a != b for a, b in shown(1))


def test_the_zero_condition_does_not_depend_on_the_image(bench: Any, sighted: VisionLanguageModel):
    own, other = bench.held_out[:6], wrong_images.shuffle_images(bench.held_out[:6], content_hash, 0)

    a, b = (
        wrong_images.ablation_losses(sighted, examples, bench.batches(), ("zero",), content_key=content_hash)["zero"]
        for examples in (own, other)
    )

    assert a == b


def test_an_average_does_not_hide_a_group_that_is_answered_blindly():
    rng = np.random.default_rng(0)
    kinds = ["what colour", "is there"] * 40
    right = [of_turns(str(k), [float(rng.gamma(4.0) / 40)], [float(rng.gamma(4.0) / 40)]) for k in range(80)]
    wrong = [
        of_turns(x.id, [x.token_nll[0] + (2.0 if kind == "what colour" else 0.0)], [x.token_nll[1]])
        for x, kind in zip(right, kinds, strict=True)
    ]
    groups = {"question": [[kind, "is there"] for kind in kinds], "length": [["short", "short"]] * 80}

    m = named(probe.compare_conditions({"correct": right, "shuffled": wrong}, groups))

    assert m["ablation.ratio.shuffled"].value > 2  # the average looks
    colour, there = m["ablation.delta.shuffled/what colour"], m["ablation.delta.shuffled/is there"]
    assert colour.value == pytest.approx(2.0) and there.value == pytest.approx(0.0)
    assert (colour.n, there.n, there.by) == (40, 80, "question")
    assert m["ablation.ratio.shuffled/is there"].value == pytest.approx(1.0)
    assert not any(x.by == "length" for x in m.values())


def test_the_paired_interval_is_narrower_than_the_losses_own_spread():
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 5.0, size=200)  # samples differ a lot, the effect of the image does not
    losses = {
        "correct": [sums(str(k), float(v), 5, 1) for k, v in enumerate(base)],
        "shuffled": [sums(str(k), float(v) + 1 + 0.1 * float(rng.random()), 5, 1) for k, v in enumerate(base)],
    }

    m = named(probe.compare_conditions(losses))  # type: ignore[arg-type]
    delta, right = m["ablation.delta.shuffled"].ci95, m["ablation.loss.correct"].ci95

    assert delta is not None and right is not None
    assert (delta[1] - delta[0]) < 0.05 * (right[1] - right[0])


def test_a_loss_of_exactly_zero_has_a_difference_but_no_ratio():
    losses = {"correct": [sums("a", 0.0, 2, 2)] * 2, "zero": [sums("a", 1.0, 2)] * 2}

    m = named(probe.compare_conditions(losses))  # type: ignore[arg-type]

    assert m["ablation.delta.zero"].value == 0.5
    assert "ablation.ratio.zero" not in m
