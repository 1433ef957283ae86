"""The whole model on tiny real parts: losses, gradients, mapping, generation, and what must not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from beholder.config import GenerateConfig, ResamplerConfig
from beholder.data.collate import Layout, collate
from beholder.model.plan import TrainPlan, apply_train_plan, frozen_fingerprint, param_groups
from beholder.types import Batch, Encoded, ImageInput, TokenLosses, UserError

from .conftest import CAPTIONS, PAIRS, Build, Built


def per_sample(out: TokenLosses) -> list[torch.Tensor]:
    return [out.nll[out.sample == i] for i in range(int(out.sample.max()) + 1)]


@pytest.mark.parametrize("num_images", [1, 2])
@pytest.mark.parametrize(("llm", "vision", "attention"), [(*p, "sdpa") for p in PAIRS] + [("qwen3", "siglip", "eager")])
def test_packing_changes_neither_losses_nor_connector_gradients(
    build: Build, llm: str, vision: str, attention: str, num_images: int
) -> None:
    built = build(llm, vision, attention=attention)
    padded, packed = (built.batch(num_images=num_images, packing=p) for p in (False, True))

    assert packed.input_ids.shape[0] == 1 and padded.input_ids.shape[0] == len(CAPTIONS)
    for a, b in zip(per_sample(built.model(padded)), per_sample(built.model(packed)), strict=True):
        # fp32 sums in another order; worst seen over all pairs 1e-6 nats. A leak moves losses by more than 1.
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    one, other = built.connector_gradients(padded), built.connector_gradients(packed)
    for name, gradient in one.items():
        # Worst seen 5e-7 of the largest entry of a tensor.
        scale = float(gradient.abs().max())
        torch.testing.assert_close(gradient, other[name], rtol=0, atol=1e-5 * scale, msg=name)
        assert scale > 0, f"{name} gets no gradient"


@pytest.mark.parametrize(("llm", "vision"), PAIRS)
def test_loss_is_the_language_models_own_cross_entropy_over_all_positions(build: Build, llm: str, vision: str) -> None:
    built = build(llm, vision)
    batch = built.batch()
    embeds = built.model.embed(batch)
    logits = built.model.language.model(inputs_embeds=embeds, position_ids=batch.position_ids).logits
    labels = batch.input_ids.masked_fill(~batch.supervise, -100)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")

    out = built.model(batch)
    with torch.no_grad():
        measured = built.model(batch)

    assert out.nll.numel() == batch.num_targets and out.correct is None
    # The head runs on K rows instead of B x T: another blocking of the same sums. Worst seen 2e-6.
    torch.testing.assert_close(out.nll, expected[labels[:, 1:].flatten() != -100], rtol=1e-5, atol=1e-5)
    right = logits[:, :-1].argmax(-1) == batch.input_ids[:, 1:]
    assert measured.correct is not None and torch.equal(measured.correct, right[batch.supervise[:, 1:]])
    assert torch.equal(measured.nll, out.nll)


def test_a_sample_has_the_same_loss_in_any_company(tiny: Built) -> None:
    together = per_sample(tiny.model(tiny.batch()))
    for i, caption in enumerate(CAPTIONS):
        name, encoded, _ = tiny.samples([caption])[0]
        alone = tiny.model(collate([(name, encoded, [tiny.picture(10 * i)])], Layout(False, 4096, 1))).nll
        torch.testing.assert_close(alone, together[i], rtol=2e-5, atol=2e-5)


def test_swapping_two_images_swaps_their_visual_blocks_and_nothing_else(tiny: Built) -> None:
    (sample,) = tiny.samples(["one thing and another"], num_images=2)
    name, encoded, (first, second) = sample
    before = collate([(name, encoded, [first, second])], Layout(False, 4096, 8))
    after = collate([(name, encoded, [second, first])], Layout(False, 4096, 8))
    a, b = (tiny.model.embed(x).flatten(0, 1) for x in (before, after))

    where = before.image_positions.split(before.image_lengths.tolist())
    assert torch.equal(a[where[0]], b[where[1]]) and torch.equal(a[where[1]], b[where[0]])
    assert not torch.equal(a[where[0]], a[where[1]])
    others = torch.ones(a.shape[0], dtype=torch.bool)
    others[before.image_positions] = False
    assert torch.equal(a[others], b[others])
    assert not torch.allclose(tiny.model(before).nll, tiny.model(after).nll, atol=1e-5)


def test_every_target_sees_its_own_image_and_no_other_samples(tiny: Built) -> None:
    batch = tiny.batch(packing=True)
    base = per_sample(tiny.model(batch))
    batch.images[1] = tiny.picture(999)
    moved = per_sample(tiny.model(batch))

    for i, (a, b) in enumerate(zip(base, moved, strict=True)):
        assert torch.equal(a, b) == (i != 1), i


def test_training_changes_exactly_the_declared_weights(build: Build) -> None:
    built = build()
    table = apply_train_plan(built.model, TrainPlan())
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    frozen, ids = frozen_fingerprint(built.model), torch.randint(0, 200, (2, 30))
    logits = built.model.text_logits(ids)
    optimizer = torch.optim.AdamW(param_groups(built.model, 1e-2, 0.01))

    for _ in range(3):
        optimizer.zero_grad()
        built.model(built.batch()).nll.sum().backward()
        optimizer.step()

    changed = {n for n, p in built.model.named_parameters() if not torch.equal(p, before[n])}
    declared = {n for n, p in built.model.named_parameters() if p.requires_grad}
    assert changed == declared == {n for n in before if n.startswith("connector.")}
    assert table.trainable == sum(before[n].numel() for n in declared)
    assert frozen_fingerprint(built.model) == frozen and set(frozen) == {"vision", "language"}
    assert torch.equal(built.model.text_logits(ids), logits)
    assert all(p.grad is None for n, p in built.model.named_parameters() if n not in declared)


def test_frozen_parts_stay_in_eval_mode_while_training(build: Build) -> None:
    built = build(projector={"dropout": 0.5})
    apply_train_plan(built.model, TrainPlan())

    assert built.model.connector.training
    assert not any(m.training for part in ("vision", "language") for m in getattr(built.model, part).modules())
    built.model.eval()
    assert not any(m.training for m in built.model.modules())


def greedy(max_new_tokens: int) -> GenerateConfig:
    return GenerateConfig(temperature=0.0, max_new_tokens=max_new_tokens)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_greedy_captions_do_not_depend_on_the_batch(build: Build, precision: str) -> None:
    # bf16 rounds differently in other shapes, so equality is asked of fp32 alone.
    built = build(precision=precision)
    prompts, images = [], []
    for i, count in enumerate([1, 2, 1, 1, 2]):
        example = built.example(f"s{i}", "unused " * i + "x", count)
        prompts.append(built.encoder.encode_prompt(example))
        images.append([built.picture(7 * i + k) for k in range(count)])
    how, eos_ids = greedy(12), built.encoder.eos_ids

    together = built.model.generate(prompts, images, how, eos_ids=eos_ids)
    alone = [built.model.generate([p], [i], how, eos_ids=eos_ids)[0] for p, i in zip(prompts, images, strict=True)]

    assert all(0 < len(row) <= 12 for row in together)
    assert len({tuple(row) for row in together}) > 1, "all captions equal: the test would not see a mix-up"
    if precision == "fp32":
        assert together == alone


def test_greedy_generation_follows_the_teacher_forced_loss(tiny: Built) -> None:
    """Each generated token is the arg-max that the training forward sees after the same prefix."""
    prompt = tiny.encoder.encode_prompt(tiny.example("s", "x"))
    (new,) = tiny.model.generate([prompt], [[tiny.picture(1)]], greedy(8), eos_ids=[0])
    ids = np.concatenate([prompt.ids, np.array(new)])
    supervise = np.arange(len(ids)) >= len(prompt.ids)
    encoded = Encoded(ids, supervise, prompt.image_spans)
    with torch.no_grad():
        out = tiny.model(collate([("s", encoded, [tiny.picture(1)])], Layout(False, 4096, 1)))

    assert bool(out.correct.all())


def test_sampling_is_seeded_and_leaves_the_global_random_state_alone(tiny: Built) -> None:
    prompt, image = tiny.encoder.encode_prompt(tiny.example("s", "x")), tiny.picture(1)

    def sample(seed: int) -> list[int]:
        how = GenerateConfig(temperature=1.0, top_p=0.95, max_new_tokens=16)
        return tiny.model.generate([prompt], [[image]], how, eos_ids=[0], seed=seed)[0]

    state = torch.get_rng_state()
    first, again, other = sample(1), sample(1), sample(2)

    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_stops_with_the_end_token(tiny: Built) -> None:
    prompt, image = tiny.encoder.encode_prompt(tiny.example("s", "x")), tiny.picture(1)
    (free,) = tiny.model.generate([prompt], [[image]], greedy(10), eos_ids=[319])
    end = free[3]
    (stopped,) = tiny.model.generate([prompt], [[image]], greedy(10), eos_ids=[end])

    assert stopped == free[: free.index(end) + 1]


def test_a_batch_without_images_gives_zero_gradients_to_every_weight(tiny: Built) -> None:
    name, encoded, _ = tiny.samples(["words only"])[0]
    text = Encoded(encoded.ids, encoded.supervise, ())
    batch = collate([(name, text, [])], Layout(False, 4096, 8))
    gradients = tiny.connector_gradients(batch)

    assert tiny.model(batch).nll.numel() == encoded.num_targets
    assert all(float(g.abs().max()) == 0 for g in gradients.values())


def test_a_batch_whose_samples_were_all_rejected_has_an_empty_loss_on_the_graph(tiny: Built) -> None:
    batch = collate([], Layout(True, 64, 8))

    assert tiny.model(batch).nll.shape == (0,)
    assert all(float(g.abs().max()) == 0 for g in tiny.connector_gradients(batch).values())


def test_stored_features_and_pixels_mix_in_any_order(tiny: Built) -> None:
    pictures = [tiny.picture(i) for i in range(4)]
    fresh = tiny.model.patches(pictures)
    mixed = [ImageInput(features=fresh[i].bfloat16()) if i % 2 else p for i, p in enumerate(pictures)]

    got = tiny.model.patches(mixed)

    assert torch.equal(got[1::2], fresh[1::2].bfloat16().float())
    # The tower sees two images instead of four.
    torch.testing.assert_close(got[::2], fresh[::2], rtol=1e-5, atol=1e-5)


def test_stored_features_serve_without_the_tower_and_pixels_do_not(build: Build) -> None:
    built = build()
    pictures = [built.picture(i) for i in range(2)]
    stored = [ImageInput(features=f.bfloat16()) for f in built.model.patches(pictures)]
    built.model.drop_vision()

    assert built.model.visual_tokens(stored).shape == (2, 4, 64)
    with pytest.raises(UserError, match="released"):
        built.model.visual_tokens(pictures)
    with pytest.raises(UserError, match="another tower"):
        built.model.visual_tokens([ImageInput(features=torch.zeros(3, 48, dtype=torch.bfloat16))])


def test_the_connector_starts_from_the_seed_alone(build: Build) -> None:
    def weights(seed: int) -> dict[str, torch.Tensor]:
        return build(seed=seed).model.connector.state_dict()

    torch.manual_seed(1)
    first = weights(5)
    torch.manual_seed(2)
    again, other = weights(5), weights(6)

    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["resampler.latents"], other["resampler.latents"])


class CastsOf(TorchDispatchMode):
    """Records copies to another type whose input is one of the given weights."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.pointers = {w.untyped_storage().data_ptr() for w in weights}
        self.casts = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten._to_copy.default and args[0].untyped_storage().data_ptr() in self.pointers:
            self.casts += 1
        return func(*args, **(kwargs or {}))


def test_a_bf16_step_casts_no_frozen_weight_and_each_connector_weight_once(build: Build) -> None:
    built = build(precision="bf16")
    apply_train_plan(built.model, TrainPlan())
    batch = built.batch()
    frozen = [p for p in built.model.parameters() if not p.requires_grad]
    learns = list(built.model.connector.parameters())

    with CastsOf(frozen) as of_frozen:
        built.model(batch).nll.sum().backward()
    with CastsOf(learns) as of_connector:
        built.model(batch)

    assert {p.dtype for p in frozen} == {torch.bfloat16} and {p.dtype for p in learns} == {torch.float32}
    assert of_frozen.casts == 0
    assert 0 < of_connector.casts <= len(learns)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in learns)


def test_bf16_losses_are_close_to_fp32(build: Build) -> None:
    full, half = build().model, build(precision="bf16")
    batch = half.batch()

    with torch.no_grad():
        difference = half.model(batch).nll - full(batch).nll

    # 8 bits of mantissa over 4 layers; of 95 tokens the worst is off by 0.052 nats, the mean by 0.002.
    assert float(difference.abs().max()) < 0.2 and abs(float(difference.mean())) < 0.02


def test_gradient_checkpointing_recomputes_layers_and_keeps_gradients(build: Build) -> None:
    plain, saving = build(), build(gradient_checkpointing=True)
    batch = plain.batch()
    apply_train_plan(saving.model, TrainPlan())
    calls = []
    for layer in saving.model.language.decoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))

    expected, got = plain.connector_gradients(batch), saving.connector_gradients(batch)

    assert len(calls) == 2 * 2, "two layers, each run again in the backward pass"
    for name, gradient in expected.items():
        torch.testing.assert_close(gradient, got[name], rtol=1e-5, atol=1e-6, msg=name)
    saving.model.eval()
    saving.model(batch)
    assert len(calls) == 2 * 2 + 2


def test_packed_rows_are_refused_where_attention_would_leak(build: Build) -> None:
    built = build()
    built.model.language.packing_error = "this attention leaks"

    built.model(built.batch(packing=False))
    with pytest.raises(UserError, match="leaks"):
        built.model(built.batch(packing=True))


@pytest.mark.parametrize("lost", ["image", "place", "width"])
def test_counts_that_disagree_stop_with_both_numbers(tiny: Built, lost: str) -> None:
    batch = tiny.batch(num_images=2)
    match lost:
        case "image":
            batch.images.pop()
        case "place":
            batch.image_lengths, batch.image_sample = batch.image_lengths[:-1], batch.image_sample[:-1]
        case _:
            batch.image_lengths = batch.image_lengths - 1

    expected = {
        "image": "9 images .* room for 10",
        "place": "10 images .* room for 9",
        "width": "3 reserved .* 4 tokens",
    }
    with pytest.raises(UserError, match=expected[lost]):
        tiny.model(batch)
    with pytest.raises(UserError, match="1 image places but 0 images"):
        prompt = tiny.encoder.encode_prompt(tiny.example("s", "x"))
        tiny.model.generate([prompt], [[]], greedy(1), eos_ids=[0])


def test_connector_info_tells_models_apart_but_not_precisions(build: Build) -> None:
    full, half, other = build().model, build(precision="bf16").model, build("smollm2").model

    assert full.connector_info() == half.connector_info()
    assert full.connector_info()["language"] != other.connector_info()["language"]
    assert full.connector_info()["resampler"] == "perceiver"


@pytest.mark.parametrize("kind", ["perceiver", "mean_pool", "grid", "pixel_shuffle", "none"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_resampler_trains_through_the_language_model(build: Build, kind: str, precision: str) -> None:
    tokens = {"perceiver": 4, "mean_pool": 1, "grid": 4, "pixel_shuffle": 4, "none": 16}[kind]
    built = build(
        precision=precision,
        num_visual_tokens=tokens,
        resampler=ResamplerConfig(kind=kind, num_heads=4),  # type: ignore[arg-type]
    )
    apply_train_plan(built.model, TrainPlan())
    optimizer = torch.optim.AdamW(param_groups(built.model, 3e-3, 0.0))
    batch: Batch = built.batch(CAPTIONS[:3])
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = built.model(batch).nll.mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))

    assert built.model.num_visual_tokens == tokens
    assert losses[-1] < 0.95 * losses[0]  # mean_pool has one token for everything: 0.917
