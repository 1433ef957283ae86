from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beholder.data.collate import Layout
from beholder.data.images import content_hash
from beholder.evidence import Measurement
from beholder.model.vlm import VisionLanguageModel
from beholder.probes import loss as probe
from beholder.probes.loss import SampleLoss
from beholder.types import Example, ImageRef, UserError


def named(measurements: list[Measurement]) -> dict[str, Measurement]:
    return {m.key: m for m in measurements}


# ---------------------------------------------------------------------------------------------------------------
# Loss per sample


def test_sample_losses_are_equal_for_every_batch_size_and_packing(bench: Any):
    examples = bench.held_out[:16]
    layouts: list[tuple[Layout, int]] = [
        (bench.padded, 1),
        (bench.padded, 5),
        (bench.padded, 16),
        (bench.packed, 3),
        (bench.packed, 16),
    ]

    runs = [probe.sample_losses(bench.model, bench.batches(layout, size)(examples)) for layout, size in layouts]

    reference = {s.id: s for s in runs[0]}
    for run in runs[1:]:
        assert [s.id for s in run] == [e.id for e in examples]
        for s in run:
            # fp32 matrix products round differently with the number of rows: worst measured 3e-7 relative.
            assert s.nll == pytest.approx(reference[s.id].nll, rel=5e-6)
            assert (s.tokens, s.correct) == (reference[s.id].tokens, reference[s.id].correct)


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
    losses = [SampleLoss("short", nll=8.0, tokens=2, correct=0), SampleLoss("long", nll=18.0, tokens=18, correct=9)]

    m = named(probe.summarize(losses, "eval"))

    assert m["eval.loss"].value == pytest.approx(26 / 20)  # not (4 + 1) / 2
    assert m["eval.perplexity"].value == pytest.approx(math.exp(26 / 20))
    assert m["eval.token_accuracy"].value == pytest.approx(9 / 20)
    assert (m["eval.tokens"].value, m["eval.loss"].n) == (20, 2)


def test_intervals_contain_the_value_and_shrink_with_more_samples():
    rng = np.random.default_rng(0)
    losses = [SampleLoss(str(k), float(rng.gamma(4.0) * 7), 7, 3) for k in range(400)]

    few, many = (named(probe.summarize(losses[:n], "eval"))["eval.loss"] for n in (25, 400))

    assert few.ci95 is not None and many.ci95 is not None
    assert few.ci95[0] < few.value < few.ci95[1]
    assert (many.ci95[1] - many.ci95[0]) < 0.5 * (few.ci95[1] - few.ci95[0])  # sqrt(25 / 400) = 1/4


def test_strata_partition_the_samples():
    losses = [SampleLoss(f"{k}", 1.0 + k, 2, 1) for k in range(9)]
    stratum_of = {f"{k}": ("short", "medium", "long")[k % 3] for k in range(9)}

    m = named(probe.summarize_strata(losses, "eval", stratum_of))

    strata = [m[f"eval.loss/{s}"] for s in ("short", "medium", "long")]
    assert sum(s.n for s in strata) == m["eval.loss"].n == 9
    assert np.mean([s.value for s in strata]) == pytest.approx(m["eval.loss"].value)  # equal token counts
    assert m["eval.loss/short"].value == pytest.approx((1 + 4 + 7) / 6)


def test_an_absurd_loss_has_no_perplexity_and_no_samples_is_an_error():
    assert "eval.perplexity" not in named(probe.summarize([SampleLoss("a", 900.0, 1, 0)], "eval"))
    with pytest.raises(UserError, match="no sample was left"):
        probe.summarize([], "eval")


# ---------------------------------------------------------------------------------------------------------------
# Shuffling images


@given(st.lists(st.integers(0, 4), min_size=2, max_size=40), st.integers(0, 5))
def test_derange_never_gives_an_equal_item_and_permutes_wherever_that_is_possible(classes: list[int], seed: int):
    n, largest = len(classes), max(classes.count(c) for c in set(classes))

    def same(i: int, j: int) -> bool:
        return classes[i] == classes[j]

    if len(set(classes)) == 1:
        with pytest.raises(UserError, match="two different images"):
            probe.derange(classes, same, seed)
        return
    pick = probe.derange(classes, same, seed)

    assert all(classes[i] != classes[j] for i, j in enumerate(pick))
    assert probe.derange(classes, same, seed) == pick
    if 2 * largest <= n:  # by Hall's theorem exactly then a permutation without equal pairs exists
        assert sorted(pick) == list(range(n))


@pytest.mark.parametrize("items", [[], ["only one"]])
def test_derange_needs_two_items(items: list[str]):
    with pytest.raises(UserError, match="cannot shuffle"):
        probe.derange(items, lambda i, j: i == j, 0)


@given(st.lists(st.lists(st.integers(0, 9), min_size=0, max_size=3), min_size=2, max_size=12), st.integers(0, 3))
def test_no_image_slot_is_given_an_image_that_its_example_shows(shown: list[list[int]], seed: int):
    examples = [
        Example(str(k), tuple(ImageRef("root", f"{k}-{j}-{c}") for j, c in enumerate(images)), ())
        for k, images in enumerate(shown)
    ]

    def content(ref: ImageRef) -> str:  # equal contents under different paths
        return ref.path.split("-")[2]

    try:
        shuffled = probe.shuffle_images(examples, content, seed)
    except UserError:
        every = {c for images in shown for c in images}
        assert any(set(images) == every for images in shown)
        return
    for before, after in zip(examples, shuffled, strict=True):
        assert replace(after, images=before.images) == before
        assert len(after.images) == len(before.images)
        assert {content(r) for r in before.images}.isdisjoint(content(r) for r in after.images)


# ---------------------------------------------------------------------------------------------------------------
# Ablation


def test_shuffled_and_zero_images_raise_the_loss_of_a_model_that_looks(bench: Any, sighted: VisionLanguageModel):
    m = named(probe.ablate(sighted, bench.held_out, bench.batches(), content_key=content_hash))

    delta, ratio = m["ablation.delta.shuffled"], m["ablation.ratio.shuffled"]
    assert delta.ci95 is not None and delta.ci95[0] > 0.2  # measured 0.48 (0.41 to 0.55)
    assert ratio.ci95 is not None and ratio.ci95[0] > 2  # measured 4.9 (4.0 to 6.0)
    assert m["ablation.delta.zero"].value > 0.2
    assert m["ablation.loss.correct"].n == len(bench.held_out)
    right, wrong = m["ablation.loss.correct"].value, m["ablation.loss.shuffled"].value
    assert delta.value == pytest.approx(wrong - right)
    assert ratio.value == pytest.approx(wrong / right)


def test_a_blind_model_shows_no_difference_however_low_its_loss(bench: Any, blind: VisionLanguageModel):
    m = named(probe.ablate(blind, bench.held_out, bench.batches(bench.padded, 16), content_key=content_hash))

    assert m["ablation.loss.correct"].value < 2  # it knows how captions go; an untrained model is at 6.3
    for condition in ("shuffled", "zero"):
        assert m[f"ablation.delta.{condition}"].value == 0
        assert m[f"ablation.delta.{condition}"].ci95 == (0, 0)
        assert m[f"ablation.ratio.{condition}"].value == 1


def test_an_untrained_connector_does_not_pass_for_sight(bench: Any):
    m = named(probe.ablate(bench.model, bench.held_out, bench.batches(), content_key=content_hash))

    ci = m["ablation.delta.shuffled"].ci95
    assert ci is not None and ci[0] < 0 < ci[1]


def test_the_zero_image_is_the_grey_whose_normalised_pixels_are_zero(bench: Any):
    g = bench.model.geometry
    seen: list[torch.Tensor] = []
    assert bench.model.vision is not None
    handle = bench.model.vision.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        blank = probe.zero_image(bench.model)
    finally:
        handle.remove()

    [pixels] = seen
    normalised = (pixels[0].float() / 255 - torch.tensor(g.mean)[:, None, None]) / torch.tensor(g.std)[:, None, None]
    assert normalised.abs().max() <= 0.5 / 255 / min(g.std) + 1e-6
    assert blank.features is not None and blank.features.shape == (g.num_patches, g.d_vision)


def test_the_zero_condition_does_not_depend_on_the_image(bench: Any, sighted: VisionLanguageModel):
    own, other = bench.held_out[:6], probe.shuffle_images(bench.held_out[:6], content_hash, 0)

    a, b = (
        probe.ablation_losses(sighted, examples, bench.batches(), ("zero",), content_key=content_hash)["zero"]
        for examples in (own, other)
    )

    assert a == b


def test_only_samples_that_every_condition_measured_are_compared():
    losses = {
        "correct": [SampleLoss("a", 1.0, 2, 1), SampleLoss("b", 2.0, 4, 1), SampleLoss("b", 3.0, 6, 1)],
        "shuffled": [SampleLoss("b", 4.0, 4, 1), SampleLoss("b", 9.0, 6, 1), SampleLoss("c", 9.0, 2, 1)],
    }

    m = named(probe.compare_conditions(losses))  # type: ignore[arg-type]

    assert m["ablation.loss.correct"].n == 2
    assert m["ablation.delta.shuffled"].value == pytest.approx((13 - 5) / 10)
    assert m["ablation.ratio.shuffled"].value == pytest.approx(13 / 5)


def test_the_paired_interval_is_narrower_than_the_losses_own_spread():
    rng = np.random.default_rng(0)
    base = rng.gamma(2.0, 5.0, size=200)  # samples differ a lot, the effect of the image does not
    losses = {
        "correct": [SampleLoss(str(k), float(v), 5, 1) for k, v in enumerate(base)],
        "shuffled": [SampleLoss(str(k), float(v) + 1 + 0.1 * float(rng.random()), 5, 1) for k, v in enumerate(base)],
    }

    m = named(probe.compare_conditions(losses))  # type: ignore[arg-type]
    delta, right = m["ablation.delta.shuffled"].ci95, m["ablation.loss.correct"].ci95

    assert delta is not None and right is not None
    assert (delta[1] - delta[0]) < 0.05 * (right[1] - right[0])


def test_a_loss_of_exactly_zero_has_a_difference_but_no_ratio():
    losses = {"correct": [SampleLoss("a", 0.0, 2, 2)] * 2, "zero": [SampleLoss("a", 1.0, 2, 0)] * 2}

    m = named(probe.compare_conditions(losses))  # type: ignore[arg-type]

    assert m["ablation.delta.zero"].value == 0.5
    assert "ablation.ratio.zero" not in m
