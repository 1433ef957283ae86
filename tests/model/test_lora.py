"""Adapters land where they were told, change nothing else, and come off, merge and load without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from beholder.config import STAGES, GenerateConfig, LoraConfig
from beholder.model import adapted_linear, adapters, placement
from beholder.model.language import LanguageModel
from beholder.model.learned import learned_state
from beholder.model.plan import TrainPlan, apply_train_plan, frozen_fingerprint, param_groups, plan_of
from beholder.model.vlm import VisionLanguageModel
from beholder.runs import to_json
from beholder.types import TrainedPart, UserError

from .conftest import Build, Built

ON = LoraConfig(enable=True, r=4, alpha=8, dropout=0.0)
IDS = torch.arange(18).reshape(2, 9) + 40


def stirred(language: LanguageModel, size: float = 0.1, seed: int = 5) -> None:
    """B as if it had learned; fresh, it is 0 and hides everything."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in adapters.adapter_parameters(language.part).items():
            if "lora_B" in name:
                weight.copy_(size * torch.randn(weight.shape, generator=draw))


def gradients_of(built: Built, seed: int = 7) -> dict[str, Tensor]:
    """Gradients of everything that learns for one batch; dropout is drawn from ``seed``."""
    torch.manual_seed(seed)
    built.model.train()
    built.model.zero_grad()
    built.model(built.batch()).nll.sum().backward()
    return {n: p.grad.clone() for n, p in built.model.named_parameters() if p.grad is not None}


def a_layer(language: LanguageModel) -> Any:
    return next(m for m in language.modules() if isinstance(m, adapted_linear.AdaptedLinear))


@pytest.fixture
def adapted(build: Build) -> Built:
    built = build(lora=ON)
    stirred(built.model.language)
    return built


# -- where


def sites_in(model: torch.nn.Module, *patterns: str, rank: int = 2) -> list[placement.AdapterSite]:
    return placement.resolve_targets(placement.language_part(model), placement.Selector(patterns), rank)


def test_the_default_patterns_name_every_linear_layer_of_the_decoder_once_and_in_order(build: Build) -> None:
    model = build().model.language.model

    sites = sites_in(model, *LoraConfig().target_modules, rank=4)

    expected = [
        (n, m.in_features, m.out_features)
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    assert [(s.name, s.d_in, s.d_out) for s in sites] == expected and len(expected) == 14
    assert all(s.params == 4 * (s.d_in + s.d_out) and s.rank == 4 for s in sites)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("self_attn.q_proj", ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (r"model\.layers\.1\.mlp\.(up|down)_proj", ["model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"]),
        ("model.layers.0.mlp.up_proj", ["model.layers.0.mlp.up_proj"]),
        (r"[\w.]+\.0\.(?!mlp).*(?:q|k)_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]),
    ],
)
def test_a_pattern_is_the_end_of_a_name_or_a_regular_expression_of_all_of_it(
    build: Build, pattern: str, expected: list[str]
) -> None:
    assert [s.name for s in sites_in(build().model.language.model, pattern)] == expected


def test_a_pattern_does_not_match_a_part_of_a_word(build: Build) -> None:
    with pytest.raises(UserError, match="'proj' matches no module"):
        sites_in(build().model.language.model, "proj")


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("q_prj", r"'q_prj' matches no module\. Nearest: q_proj \(2 modules\)"),
        ("embed_tokens", "outside the language model's layers .* model.embed_tokens there and 0 inside"),
        ("lm_head", "outside the language model's layers .* lm_head there"),
        ("self_attn", r"model.layers.\*.self_attn \(2\) \(2 Qwen3Attention\), which are no linear layers"),
        ("input_layernorm", "Qwen3RMSNorm"),
        (".*", "outside the language model's layers"),
        ("(", "neither the last part of a module's name nor a regular expression"),
        ("a{99999999999}", "nor a regular expression: the repetition number is too large"),
    ],
)
def test_a_pattern_that_hits_nothing_or_something_else_is_refused_with_the_reason(
    build: Build, pattern: str, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        sites_in(build().model.language.model, "q_proj", pattern)


def test_a_pattern_that_leaks_into_the_vision_tower_is_refused_and_a_narrower_one_is_not(build: Build) -> None:
    whole = build(vision="siglip").model

    with pytest.raises(UserError, match=r"vision\.backbone\.encoder\.layers\.\*\.self_attn\.q_proj \(2\) there"):
        sites_in(whole, "q_proj")

    sites = sites_in(whole, r"language\.model\.model\.layers\..*\.q_proj")
    assert [s.name for s in sites] == [f"language.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_a_transformers_vision_language_model_is_protected_from_the_same_leak() -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    small: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionConfig(**small, image_size=16, patch_size=8)
    whole: Any = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(**small, vocab_size=40))
    )

    with pytest.raises(UserError, match="vision_tower"):
        sites_in(whole, "q_proj")
    assert len(sites_in(whole, "gate_proj")) == 2


def test_the_printed_list_counts_modules_and_parameters(build: Build) -> None:
    sites = sites_in(build().model.language.model, "q_proj", "down_proj", rank=4)

    lines = placement.render_sites(sites).splitlines()

    assert [line.split()[0] for line in lines] == ["adapter", "q_proj", "down_proj", "total"]
    assert lines[1].split()[1:] == ["2", "64", "x", "64", "4", "1,024"]
    assert lines[-1].split() == ["total", "4", f"{sum(s.params for s in sites):,}"]


# -- attached


@pytest.mark.parametrize("llm", ["qwen3", "smollm2", "llama"])
def test_fresh_adapters_change_no_logit_and_no_weight_of_the_base(build: Build, llm: str) -> None:
    plain, adapted = build(llm).model, build(llm, lora=ON).model

    assert torch.equal(adapted.text_logits(IDS), plain.text_logits(IDS))
    for model in (plain, adapted):
        apply_train_plan(model, TrainPlan(language="lora") if model.adapters else TrainPlan())
    assert frozen_fingerprint(adapted) == frozen_fingerprint(plain)
    assert adapted.connector_info() == plain.connector_info()


def test_adapter_weights_are_fp32_over_a_bf16_base_and_drawn_from_the_seed_alone(build: Build) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.rand(seed)  # another past of the global generator
        return adapters.adapter_tensors(build(precision="bf16", lora=ON, seed=seed).model.language.part)

    one, again, other = weights(3), weights(3), weights(4)

    assert all(t.dtype == torch.float32 for t in one.values())
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert all(torch.equal(one[k], other[k]) == ("lora_B" in k) for k in one)
    assert all(not t.any() for k, t in one.items() if "lora_B" in k)


def test_attaching_leaves_the_global_random_state_alone(build: Build) -> None:
    language = build().model.language
    before = torch.get_rng_state()

    adapters.attach(language.part, ON, seed=1)

    assert torch.equal(torch.get_rng_state(), before)


def dropouts(language: LanguageModel) -> set[nn.Module]:
    return {
        m
        for layer in language.modules()
        if isinstance(layer, adapted_linear.AdaptedLinear)
        for m in layer.lora_dropout.modules()
    }


def test_only_the_adapters_dropouts_follow_the_training_mode(build: Build) -> None:
    language = build(lora=ON.model_copy(update={"dropout": 0.5})).model.language
    stirred(language)
    positions = torch.arange(9).expand(2, 9)

    def hidden() -> Tensor:
        torch.manual_seed(14)
        return language.hidden(language.embed(IDS), positions)

    language.train()
    training, again = hidden(), hidden()
    assert torch.equal(training, again)
    assert {m for m in language.modules() if m.training} == dropouts(language)
    language.train(False)
    assert not torch.equal(hidden(), training)
    torch.manual_seed(1)
    assert torch.equal(hidden(), language.hidden(language.embed(IDS), positions))


def test_generation_in_training_mode_drops_nothing_and_goes_back_to_training(build: Build) -> None:
    language = build(lora=ON.model_copy(update={"dropout": 0.9}), gradient_checkpointing=True).model.language
    stirred(language)

    def say() -> list[list[int]]:
        prompt = language.embed(IDS)[0]
        return language.generate([prompt], GenerateConfig(temperature=0.0, max_new_tokens=12), eos_ids=[1])

    calm = say()
    language.train()
    assert say() == calm
    assert all(m.training for m in dropouts(language))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_outside_training_the_adapters_have_the_asked_strength(build: Build, precision: str) -> None:
    """Powers of two, so that scaling is exact."""
    weaker = build(precision=precision, lora=ON.model_copy(update={"strength": 0.25})).model.language
    full = build(precision=precision, lora=ON).model.language
    positions = torch.arange(9).expand(2, 9)

    def hidden(language: LanguageModel, mode: bool) -> Tensor:
        language.train(mode)
        return language.hidden(language.embed(IDS), positions)

    stirred(weaker)
    stirred(full)
    as_trained = hidden(full, True)
    assert torch.equal(hidden(weaker, True), as_trained)
    assert torch.equal(hidden(full, False), as_trained)
    rested = hidden(weaker, False)
    assert not torch.equal(rested, as_trained)
    stirred(full, size=0.25 * 0.1)
    assert torch.equal(rested, hidden(full, False))


def test_at_a_strength_the_model_is_the_one_that_was_built_with_it_and_afterwards_itself_again(build: Build) -> None:
    model = build(lora=ON).model
    half = build(lora=ON.model_copy(update={"strength": 0.5})).model.language
    stirred(model.language)
    stirred(half)
    positions = torch.arange(9).expand(2, 9)

    def hidden(language: LanguageModel) -> Tensor:
        return language.hidden(language.embed(IDS), positions)

    model.language.train(False)
    half.train(False)
    own = hidden(model.language)
    with model.at_strength(0.5):
        assert torch.equal(hidden(model.language), hidden(half))
    assert torch.equal(hidden(model.language), own) and not torch.equal(own, hidden(half))
    model.train()
    with pytest.raises(ZeroDivisionError), model.at_strength(0.25):
        raise ZeroDivisionError
    assert model.language.part.learning and a_layer(model.language).scalings[0] == ON.alpha / ON.r


def test_adapters_merge_and_are_written_at_the_strength_they_are_used_at(build: Build) -> None:
    language = build(lora=ON.model_copy(update={"strength": 0.3})).model.language
    stirred(language)
    positions = torch.arange(9).expand(2, 9)

    apart = language.hidden(language.embed(IDS), positions)
    language.train()
    with adapters.merged(language.part):
        together = language.hidden(language.embed(IDS), positions)
    assert language.part.learning

    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    language.train(False)
    assert adapters.adapter_config(language.part)["lora_alpha"] == pytest.approx(0.3 * ON.alpha)
    assert (
        a_layer(language).scaling[adapted_linear.ADAPTER] == adapters.adapter_config(language.part)["lora_alpha"] / ON.r
    )  # as PEFT reads it


def test_dropout_in_16_bits_leaves_the_expected_output_unchanged(build: Build) -> None:
    language = build(precision="bf16", lora=ON.model_copy(update={"dropout": 0.25})).model.language
    layer = a_layer(language)
    stirred(language)
    x = torch.ones(20_000, layer.in_features, dtype=torch.bfloat16)
    torch.manual_seed(0)

    with torch.no_grad():
        calm = layer(x)[0].float()
        language.train()
        noisy = layer(x).float()

    # The mean of 20,000 draws strays by 1/141 of what one strays; 8 bits of the output round by 2^-9 of it.
    assert bool((noisy.std(0) > 0).all())
    assert bool(((noisy.mean(0) - calm).abs() < 5 * noisy.std(0) / 141 + 2**-8 * calm.abs()).all())


def test_kept_entries_have_the_asked_probability() -> None:
    torch.manual_seed(0)
    keep = adapted_linear._keep(torch.zeros(1001, 999, dtype=torch.bfloat16), 0.05) != 0

    # 1e6 draws: standard error 2.2e-4.
    assert keep.shape == (1001, 999) and abs(1 - float(keep.float().mean()) - 0.05) < 1e-3
    columns = keep.float()[:, :4]
    assert float((columns.T.corrcoef() - torch.eye(4)).abs().max()) < 0.15  # lanes of one draw are independent


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_16_bit_computation_has_the_gradients_of_the_plain_formula(build: Build, dropout: float) -> None:
    language = build(precision="bf16", lora=ON.model_copy(update={"dropout": dropout})).model.language
    stirred(language)
    layer = a_layer(language)
    down, up = adapted_linear.adapter_weights(layer)
    language.train()
    x = torch.randn(3, 50, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    probe = torch.randn(3, 50, layer.out_features, generator=torch.Generator().manual_seed(1)).bfloat16()

    torch.manual_seed(4)
    out = layer(x)
    ours = torch.autograd.grad(out, [x, down, up], probe)
    torch.manual_seed(4)
    keep = (
        adapted_linear._keep(x.reshape(-1, x.shape[-1]), dropout).view(x.shape) != 0 if dropout else torch.ones_like(x)
    )
    wide = x.detach().float().requires_grad_()
    scaling = ON.alpha / ON.r
    plain = wide @ layer.base_layer.weight.float().t() + (wide * keep / (1 - dropout)) @ down.t() @ up.t() * scaling
    exact = torch.autograd.grad(plain, [wide, down, up], probe.float())

    assert all(g.dtype == w.dtype for g, w in zip(ours, (x, down, up), strict=True))
    for a, b in zip((out, *ours), (plain, *exact), strict=True):
        assert float(((a.float() - b).norm() / b.norm()).detach()) < 1e-2  # measured 3.2e-3; bf16 rounds by 2^-9


# -- gradients


def test_gradients_reach_connector_and_every_adapter_and_no_other_weight(adapted: Built) -> None:
    apply_train_plan(adapted.model, TrainPlan(language="lora"))

    grads = gradients_of(adapted)

    named = dict(adapted.model.named_parameters())
    assert set(grads) == {n for n, p in named.items() if p.requires_grad}
    assert sum(".lora_" in n for n in grads) == 28 and all(bool(g.any()) for n, g in grads.items() if ".lora_" in n)
    assert all(n.startswith("connector.") or ".lora_" in n for n in grads)


def test_packing_changes_neither_losses_nor_adapter_gradients(adapted: Built) -> None:
    apply_train_plan(adapted.model, TrainPlan(language="lora"))
    found = []
    for packing in (False, True):
        adapted.model.zero_grad()
        batch = adapted.batch(packing=packing)
        nll = adapted.model(batch).nll
        nll.sum().backward()
        grads = [
            p.grad for p in adapters.adapter_parameters(adapted.model.language.part).values() if p.grad is not None
        ]
        found.append((float(nll.detach().sum()), torch.cat([g.reshape(-1) for g in grads])))

    (padded, padded_grads), (packed, packed_grads) = found
    assert packed == pytest.approx(padded, rel=1e-6)
    # fp32, other shapes of the same products: measured 2.6e-7 of their size.
    assert float((packed_grads - padded_grads).norm() / padded_grads.norm()) < 1e-5


def test_an_adapters_gradient_agrees_with_finite_differences(adapted: Built) -> None:
    apply_train_plan(adapted.model, TrainPlan(language="lora"))
    batch = adapted.batch()
    grads = gradients_of(adapted)
    draw = torch.Generator().manual_seed(2)

    def loss() -> float:
        with torch.no_grad():
            return float(adapted.model(batch).nll.double().sum())

    weights = {n: p for n, p in adapted.model.named_parameters() if ".lora_" in n}
    way = {n: torch.randn(p.shape, generator=draw) for n, p in weights.items()}
    eps = 1e-3
    with torch.no_grad():
        for n, p in weights.items():
            p.add_(way[n], alpha=eps)
        up = loss()
        for n, p in weights.items():
            p.add_(way[n], alpha=-2 * eps)
        down = loss()
    expected = float(sum((grads[n] * way[n]).sum() for n in weights))
    # fp32 losses of about 150 are exact to 1e-5, over 2e-3: 1 % of slopes of this size.
    assert (up - down) / (2 * eps) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradient_checkpointing_leaves_gradients_equal_with_dropout_on(build: Build, precision: str) -> None:
    found = []
    for checkpointing in (False, True):
        built = build(
            precision=precision, gradient_checkpointing=checkpointing, lora=ON.model_copy(update={"dropout": 0.3})
        )
        stirred(built.model.language)
        apply_train_plan(built.model, TrainPlan(language="lora"))
        found.append(gradients_of(built))

    plain, checkpointed = found
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[n], checkpointed[n]) for n in plain)


def test_gradient_checkpointing_keeps_fewer_activations_of_a_frozen_base(build: Build) -> None:
    kept = []
    for checkpointing in (False, True):
        built = build(gradient_checkpointing=checkpointing, lora=ON)
        apply_train_plan(built.model, TrainPlan(language="lora"))
        saved: dict[int, int] = {}

        def keep(t: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        batch = built.batch()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = built.model(batch).nll.sum()
        kept.append(sum(saved.values()))
        loss.backward()

    assert kept[1] < 0.5 * kept[0]


# -- off, merged


def test_with_adapters_off_logits_are_the_bases_bit_for_bit_and_on_they_are_back(build: Build, adapted: Built) -> None:
    model, base = adapted.model, build().model
    apply_train_plan(model, TrainPlan(language="lora"))
    model.eval()
    on = model.text_logits(IDS)
    assert not torch.equal(on, base.text_logits(IDS))

    with model.adapters_off():
        assert torch.equal(model.text_logits(IDS), base.text_logits(IDS))

    assert torch.equal(model.text_logits(IDS), on)
    assert all(p.requires_grad for p in adapters.adapter_parameters(model.language.part).values())


def test_adapters_come_back_on_after_an_error_and_stay_frozen_if_they_were(adapted: Built) -> None:
    model = adapted.model
    on = model.text_logits(IDS)
    for weight in adapters.adapter_parameters(model.language.part).values():
        weight.requires_grad_(False)

    with pytest.raises(ZeroDivisionError), model.adapters_off(), model.adapters_off():
        _ = 1 / 0

    assert torch.equal(model.text_logits(IDS), on)
    assert not any(p.requires_grad for p in adapters.adapter_parameters(model.language.part).values())


def test_a_model_without_adapters_can_be_asked_to_switch_them_off(tiny: Built) -> None:
    assert tiny.model.adapters == []
    with tiny.model.adapters_off():
        assert torch.isfinite(tiny.model.text_logits(IDS)).all()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merged_logits_agree_and_the_base_is_restored_bit_for_bit(build: Build, precision: str) -> None:
    model = build(precision=precision, lora=ON).model
    stirred(model.language, 0.02)
    apply_train_plan(model, TrainPlan(language="lora"))
    model.eval()
    before, on = frozen_fingerprint(model), model.text_logits(IDS).float()

    with adapters.merged(model.language.part):
        merged = model.text_logits(IDS).float()
        assert frozen_fingerprint(model)["language"] != before["language"]

    assert frozen_fingerprint(model) == before
    assert torch.equal(model.text_logits(IDS).float(), on)
    # Measured 1.2e-6 (fp32) and 1.4e-2 (bf16: the sum is rounded to 8 bits) of the logits' size.
    tolerance = 1e-5 if precision == "fp32" else 5e-2
    assert float((merged - on).norm() / on.norm()) < tolerance


def test_the_base_is_restored_after_an_error_while_merged(adapted: Built) -> None:
    before = frozen_fingerprint(adapted.model) | {"logits": adapted.model.text_logits(IDS).sum()}

    with pytest.raises(ZeroDivisionError), adapters.merged(adapted.model.language.part):
        _ = 1 / 0

    assert frozen_fingerprint(adapted.model) | {"logits": adapted.model.text_logits(IDS).sum()} == before


# -- in and out


def test_tensors_have_pefts_names_and_come_back_bit_for_bit(build: Build, adapted: Built) -> None:
    tensors = adapters.adapter_tensors(adapted.model.language.part)
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors and len(tensors) == 28
    other = build(lora=ON, seed=8).model

    adapters.load_adapter_tensors(other.language.part, tensors)

    assert torch.equal(other.text_logits(IDS), adapted.model.text_logits(IDS))
    assert all(torch.equal(t, tensors[k]) for k, t in adapters.adapter_tensors(other.language.part).items())


def spoil_nan(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    name = next(iter(tensors))
    return tensors | {name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda t: {k: v for k, v in t.items() if "q_proj" not in k},
         r"also puts adapters on model\.layers\.\*\.self_attn\.q_proj \(2\) \(model\.lora\.target_modules"),
        (lambda t: t | {"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, "the file has adapters on lm_head"),
        (lambda t: {k: torch.cat([v, v], 0 if "lora_A" in k else 1) for k, v in t.items()},
         "model.lora.r: the file 8, this config 4"),
        (lambda t: {k: torch.cat([v, v], 1 if "lora_A" in k else 0) for k, v in t.items()},
         "model.llm.name_or_path: adapters of another language model"),
        (lambda t: {k: v.bfloat16() for k, v in t.items()}, "bfloat16, not float32"),
        (spoil_nan, "NaN or infinite"),
    ],
    ids=["fewer", "more", "rank", "base", "precision", "nan"],
)  # fmt: skip
def test_tensors_that_do_not_fit_are_refused_with_the_field_and_nothing_is_loaded(
    adapted: Built, spoil: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str
) -> None:
    language = adapted.model.language
    before = {k: t.clone() for k, t in adapters.adapter_tensors(language.part).items()}

    with pytest.raises(UserError, match=says):
        adapters.load_adapter_tensors(language.part, spoil({k: t.clone() for k, t in before.items()}))

    assert all(torch.equal(t, before[k]) for k, t in adapters.adapter_tensors(language.part).items())


def test_the_adapters_config_is_json_that_peft_reads_with_the_explicit_modules(adapted: Built, tmp_path: Path) -> None:
    from peft import PeftConfig

    written = adapters.adapter_config(adapted.model.language.part)
    (tmp_path / "adapter_config.json").write_text(json.dumps(written))

    read: Any = PeftConfig.from_pretrained(str(tmp_path))
    assert (read.r, read.lora_alpha, read.bias) == (4, 8, "none")
    assert set(read.target_modules) == {s.name for s in adapted.model.adapters}
    assert read.base_model_name_or_path == adapted.model.language.name


def test_a_merged_folder_loads_without_peft_and_has_the_adapted_logits(adapted: Built, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = adapted.model
    before, on = frozen_fingerprint(model), model.text_logits(IDS)

    adapters.save_merged(model.language, adapted.tokenizer, tmp_path / "merged")

    both: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, output_loading_info=True)
    loaded, info = both
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not any(".lora_" in n or "base_layer" in n for n, _ in loaded.named_parameters())
    with torch.no_grad():
        assert torch.allclose(loaded(input_ids=IDS).logits, on, atol=1e-4)  # measured 3e-6
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a cat")["input_ids"]
    assert frozen_fingerprint(model) == before
    with pytest.raises(UserError, match="is not empty"):
        adapters.save_merged(model.language, adapted.tokenizer, tmp_path / "merged")


# -- the plan


def test_instruct_trains_connector_and_adapters_and_the_table_has_a_row_for_them(adapted: Built) -> None:
    model: VisionLanguageModel = adapted.model

    table = apply_train_plan(model, TrainPlan(language="lora"))

    rows = {r.part: r for r in table.rows}
    assert list(rows) == ["vision", "connector", "language", "lora"]
    assert rows["lora"].params == rows["lora"].trainable == sum(s.params for s in model.adapters)
    assert rows["language"].trainable == 0 and rows["connector"].trainable == rows["connector"].params
    assert table.params == sum(p.numel() for p in model.parameters())
    assert set(frozen_fingerprint(model)) == {"vision", "language"}


def test_the_adapters_have_a_group_with_their_own_rate_and_decay(adapted: Built) -> None:
    apply_train_plan(adapted.model, TrainPlan(language="lora"))

    groups = param_groups(adapted.model, {"connector": 1e-4, "lora": 5e-5}, {"connector": 0.01, "lora": 0.0})

    named = dict(adapted.model.named_parameters())
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("connector.decay", 1e-4, 0.01), ("connector.no_decay", 1e-4, 0.0), ("lora.decay", 5e-5, 0.0),
    ]  # fmt: skip
    members = [name for g in groups for name, _ in g["params"]]
    assert sorted(members) == sorted(n for n, p in named.items() if p.requires_grad)
    assert all(p is named[n] for g in groups for n, p in g["params"])


def test_the_plan_follows_the_config_and_contradictions_are_refused(build: Build) -> None:
    from beholder.config import ConnectorConfig, LlmConfig, ModelConfig, VisionConfig

    def cfg(trainable: bool, enable: bool) -> ModelConfig:
        return ModelConfig(
            llm=LlmConfig(name_or_path="x"), vision=VisionConfig(name_or_path="y"),
            connector=ConnectorConfig(trainable=trainable), lora=LoraConfig(enable=enable),
        )  # fmt: skip

    assert plan_of(cfg(True, True), STAGES["instruct"]) == TrainPlan(language="lora")
    assert plan_of(cfg(False, True), STAGES["instruct"]).connector == "frozen"
    assert plan_of(cfg(True, False), STAGES["instruct"]).language == "frozen"
    assert plan_of(cfg(True, False), STAGES["align"]) == TrainPlan()
    with pytest.raises(UserError, match=r"model\.lora\.enable is true, but stage align"):
        plan_of(cfg(True, True), STAGES["align"])
    with pytest.raises(UserError, match="but the model has none"):
        apply_train_plan(build().model, TrainPlan(language="lora"))


def test_adapters_alone_learn_when_the_connector_is_frozen(adapted: Built) -> None:
    from beholder.model.plan import TrainPlan

    apply_train_plan(adapted.model, TrainPlan(connector="frozen", language="lora"))

    grads = gradients_of(adapted)

    assert len(grads) == 28 and all(".lora_" in n for n in grads)
    assert set(frozen_fingerprint(adapted.model)) == {"vision", "connector", "language"}


def test_adapters_that_are_no_plain_lora_or_would_break_the_base_are_not_merged(build: Build) -> None:
    built = build(lora=ON)
    stirred(built.model.language)
    learned = learned_state(built.model.language.part)["adapter"]
    language = build().model.language
    before = {k: t.clone() for k, t in placement.base_state(language.part).items()}
    first, *_, last = (k for k in learned.tensors if ".lora_B." in k)
    huge = {k: torch.full_like(learned.tensors[k], 1e38) for k in (last, last.replace("lora_B", "lora_A"))}

    for facts, tensors, says in (
        ({"lora_alpha": 10**400}, learned.tensors, "r is 4 and lora_alpha 1000"),
        ({"lora_alpha": 1e9}, learned.tensors, "lora_alpha 1000000000.0"),
        ({"lora_alpha": True}, learned.tensors, "lora_alpha True"),
        ({"layer_replication": [[0, 2]]}, learned.tensors, r"layer_replication is \[\[0, 2\]\]; only plain LoRA"),
        ({"use_qalora": True}, learned.tensors, "use_qalora is True; only plain LoRA"),
        ({"use_something_new": True}, learned.tensors, "use_something_new is True; only plain LoRA"),
        ({"fan_in_fan_out": True}, learned.tensors, "fan_in_fan_out is True, of these layers it is False"),
        ({}, {}, "their file holds none"),
        ({}, {**learned.tensors, first: torch.ones(())}, "do not fit it"),
        ({}, {**learned.tensors, first: torch.ones(4)}, "do not fit it"),
        ({}, {**learned.tensors, **huge}, "would be NaN or infinite in .*float32"),
    ):
        with pytest.raises(UserError, match=says):
            adapters.merge_in(language.part, TrainedPart(tensors, {**learned.facts, **facts}))
        after = placement.base_state(language.part)
        assert all(torch.equal(before[k], after[k]) for k in before) and not language.part.merged
    adapters.merge_in(language.part, learned)
    assert not torch.equal(before[f"{site(last)}.weight"], placement.base_state(language.part)[f"{site(last)}.weight"])


def site(key: str) -> str:
    return key.removeprefix(adapters.KEY_PREFIX).partition(".lora_")[0]


@pytest.mark.parametrize("llm", ["qwen3", "gpt2"])
def test_adapters_as_they_are_written_merge_again(build: Build, llm: str) -> None:
    built = build(llm, lora=LoraConfig(enable=True, r=4, alpha=8, target_modules=("all-linear",)))
    stirred(built.model.language)
    learned = learned_state(built.model.language.part)["adapter"]
    language = build(llm).model.language
    adapters.merge_in(language.part, TrainedPart(learned.tensors, json.loads(to_json(dict(learned.facts)))))

    with torch.no_grad():
        assert torch.allclose(language.model(IDS).logits, built.model.language.model(IDS).logits, atol=1e-4)
