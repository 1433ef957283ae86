"""Causal LM families that people bring: each loads and is right, or is refused with a sentence that says what to do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from beholder.config import GenerateConfig, LlmConfig, LoraConfig
from beholder.model import adapters
from beholder.model.language import LanguageModel, load_language, load_tokenizer
from beholder.model.placement import decoder_layers, folded
from beholder.prepare.estimate import language_shape
from beholder.types import UserError

from .conftest import CPU
from .families import FAMILIES, saved


def config_of(folder: Path, kernel: str) -> LlmConfig:
    return LlmConfig.model_validate({
        "name_or_path": str(folder), "precision": "fp32", "attn_implementation": kernel
    })  # fmt: skip


def draw(length: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 250, (1, length), generator=torch.Generator().manual_seed(seed))


def counted(length: int) -> torch.Tensor:
    return torch.arange(length)[None]


def losses(language: LanguageModel, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Loss of every next token, as the run computes it: from embeddings, the head last."""
    hidden = language.hidden(language.embed(ids), positions)
    logits = language.head(hidden.flatten(0, 1)).view(*ids.shape, -1)
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def greedy(language: LanguageModel, ids: torch.Tensor, steps: int) -> list[int]:
    """The family's own way, from ids, without a cache."""
    for _ in range(steps):
        logits = language.model(input_ids=ids, use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    return ids[0, -steps:].tolist()


def linear_kinds(language: LanguageModel) -> tuple[str, ...]:
    """Patterns for every linear layer of the decoder."""
    layers = decoder_layers(language.model)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    found = {
        folded(n) for n, m in language.model.named_modules() if n.startswith(layers + ".") and isinstance(m, kinds)
    }
    return tuple(re.escape(name).replace(r"\*", r"\d+") for name in sorted(found))


# ---------------------------------------------------------------------------------------------------------------
# The table


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[tuple[str, ...]]]:
    """Rows as they come; printed when all are there."""
    rows: list[tuple[str, ...]] = []
    yield rows
    lines = [("family", "attention", "packing", "positions", "adapters on", "what else"), *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(5)]
    right = sum(row[1] != "refused" for row in rows)
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():  # pyright: ignore
        print(f"\n\n{len(rows)} families of causal LMs: {right} right, {len(rows) - right} refused with a sentence")
        for line in lines:
            print(
                "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[5]]).rstrip()
            )


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_right_or_refused_with_a_sentence(name: str, tmp_path: Path, table: list[tuple[str, ...]]) -> None:
    family = FAMILIES[name]
    if not hasattr(transformers, family.config or f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    folder = saved(tmp_path, name)
    said = ""
    if family.kernel == "eager":
        with pytest.raises(UserError, match=r"sdpa.*Set model\.llm\.attn_implementation: eager") as refusal:
            load_language(config_of(folder, "sdpa"), CPU)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
        said = "sdpa refused: set eager"
    cfg = config_of(folder, family.kernel)
    if family.refused:
        with pytest.raises(UserError, match=rf"{family.refused}.*give another language model") as refusal:
            load_language(cfg, CPU)
        table.append((name, "refused", "-", "-", "-", str(refusal.value).removeprefix(f"{folder} ")[:110] + " …"))
        return
    language, _ = load_language(cfg, CPU)
    ids = [draw(length, seed=length) for length in (14, 9, 3)]

    # The split model is the model. fp32: worst seen 3e-6 of logits up to 8.
    own = language.model(input_ids=ids[0]).logits
    split = language.head(language.hidden(language.embed(ids[0]), counted(14))[0])
    torch.testing.assert_close(split, own[0], rtol=1e-4, atol=5e-5)

    # Rows filled up on the right, as unpacked batches are, are what they are alone.
    alone = [losses(language, i, counted(i.shape[1])) for i in ids]
    padded = torch.cat([torch.nn.functional.pad(i, (0, 14 - i.shape[1])) for i in ids])
    together = losses(language, padded, counted(14).expand(3, -1))
    for k, one in enumerate(alone):
        torch.testing.assert_close(together[k, : one.shape[1]], one[0], rtol=1e-4, atol=5e-5)

    # Written in a batch, filled up on the left, = written alone = the family's own, from ids and without a cache.
    how = GenerateConfig(temperature=0.0, max_new_tokens=8)
    prompts = [language.embed(i)[0] for i in ids]
    batched = language.generate(prompts, how, eos_ids=[len(own[0, 0]) + 7])
    assert batched == [language.generate([p], how, eos_ids=[len(own[0, 0]) + 7])[0] for p in prompts]
    assert batched == [greedy(language, i, 8) for i in ids]

    # Packed = unpacked, where it is claimed; else it is refused before a step is made.
    packs = language.packing_error is None
    assert packs == family.packs or family.packs is None, language.packing_error
    if packs:
        packed = losses(language, torch.cat(ids, 1), torch.cat([counted(i.shape[1]) for i in ids], 1))[0]
        starts = [0, 14, 23]
        for start, one in zip(starts, alone, strict=True):
            torch.testing.assert_close(packed[start : start + one.shape[1]], one[0], rtol=1e-4, atol=5e-5)
    else:
        assert language.packing_error is not None and "Set train.packing: false" in language.packing_error

    # The plan's numbers are the model's.
    assert language.limits.positions == family.positions
    if name == "Mamba":
        with pytest.raises(UserError, match=r"no attention heads.*cannot be estimated"):
            language_shape(cfg)
    else:
        shape = language_shape(cfg)
        assert shape.params == sum(p.numel() for p in language.parameters())
        assert (shape.hidden, shape.vocab, shape.limits) == (64, language.vocab, language.limits)
        assert shape.layers == 2 and 0 < shape.layer_params < shape.params

    # Every adapter learns, and merged they compute the same.
    kinds = linear_kinds(language)
    if family.fused:
        with pytest.raises(UserError, match=r"PEFT does not put adapters on .* Name fewer layers"):
            adapters.attach(language.part, LoraConfig(enable=True, target_modules=kinds), seed=0)
        language, _ = load_language(cfg, CPU)
        kinds = tuple(k for k in kinds if not re.search(r"(gate|gate_proj|up_proj|down_proj)$", k))
        said = "adapters on experts' names refused"
    if name == "Llama4":
        with pytest.raises(UserError, match=r"does not run with adapters on .*router"):
            adapters.attach(language.part, LoraConfig(enable=True, target_modules=kinds), seed=0)
        language, _ = load_language(cfg, CPU)
        kinds = tuple(k for k in kinds if not k.endswith("router"))
    if name == "Mamba":
        for target, why in (("dt_proj", "never calls .*dt_proj.*take them out"), ("out_proj", "PEFT does not put")):
            with pytest.raises(UserError, match=why):
                adapters.attach(language.part, LoraConfig(enable=True, target_modules=(target,)), seed=0)
            language, _ = load_language(cfg, CPU)
        kinds = ("in_proj", "x_proj")
        said += "; adapters on dt_proj, out_proj refused"
    sites = adapters.attach(language.part, LoraConfig(enable=True, target_modules=kinds, dropout=0.0), seed=0)
    for key, weight in adapters.adapter_tensors(language.part).items():
        if ".lora_B." in key:
            weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    language.train(True)
    for parameter in adapters.adapter_parameters(language.part).values():
        parameter.requires_grad_(True)
    embeds = language.embed(ids[0]).clone().requires_grad_(True)
    out = language.head(language.hidden(embeds, counted(14))[0])
    torch.nn.functional.cross_entropy(out[:-1].float(), ids[0][0, 1:]).backward()
    learned = {
        folded(n) for n, p in adapters.adapter_parameters(language.part).items() if p.grad is not None and p.grad.any()
    }
    assert learned == {folded(n) for n in adapters.adapter_parameters(language.part)}, "an adapter gets no gradient"
    assert embeds.grad is not None and bool(embeds.grad.any()) and bool(embeds.grad.isfinite().all())
    language.train(False)
    adapted = language.head(language.hidden(language.embed(ids[0]), counted(14))[0])
    with adapters.merged(language.part):
        merged = language.head(language.hidden(language.embed(ids[0]), counted(14))[0])
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=2e-4)
    assert not torch.allclose(adapted, split, atol=1e-3)

    table.append((
        name, family.kernel, "yes" if packs else "refused", str(family.positions or "computed"),
        f"{len(sites)} layers", said,
    ))  # fmt: skip


def test_the_table_has_the_families_people_bring() -> None:
    assert len(FAMILIES) >= 40 and sum(f.refused is None for f in FAMILIES.values()) >= 35


# ---------------------------------------------------------------------------------------------------------------
# What a family cannot do


def cfg_for(folder: Path, **settings: Any) -> LlmConfig:
    return LlmConfig.model_validate({"name_or_path": str(folder), "precision": "fp32"} | settings)


def rewrite(folder: Path, extra: dict[str, torch.Tensor], drop: str = "") -> Path:
    weights = load_file(folder / "model.safetensors") | extra
    kept = {(k.removeprefix(drop) if drop else k): v for k, v in weights.items()}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_family_without_the_kernel_names_the_one_it_has(tmp_path: Path) -> None:
    folder = saved(tmp_path, "GPTJ")

    for look in (lambda c: load_language(c, CPU), language_shape):
        with pytest.raises(UserError, match=r"sdpa: GPTJForCausalLM does not support.*attn_implementation: eager$"):
            look(cfg_for(folder))
        look(cfg_for(folder, attn_implementation="eager"))


def test_a_soft_cap_under_sdpa_is_refused_whatever_the_library_says(tmp_path: Path) -> None:
    """Gemma 3 under every transformers, and Gemma 2 before 5.18: sdpa is allowed there, and leaves the cap out."""
    folder = saved(tmp_path, "Gemma3", attn_logit_softcapping=2.0)

    for look in (lambda c: load_language(c, CPU), language_shape):
        with pytest.raises(UserError, match=r"softcapping 2.*sdpa cannot\. Set .*attn_implementation: eager"):
            look(cfg_for(folder))
        look(cfg_for(folder, attn_implementation="eager"))


@pytest.mark.parametrize(("name", "place", "kernel"), [
    ("GPTJ", "transformer.h.{}.attn", "eager"), ("GPTNeo", "transformer.h.{}.attn.attention", "eager"),
    ("CodeGen", "transformer.h.{}.attn", "eager"), ("GPT2", "transformer.h.{}.attn", "sdpa"),
    ("GPT2", "h.{}.attn", "sdpa"), ("Llama", "model.layers.{}.self_attn", "sdpa"),
])  # fmt: skip
def test_constants_among_the_weights_of_old_checkpoints_are_passed_over(
    tmp_path: Path, name: str, place: str, kernel: str
) -> None:
    folder = saved(tmp_path, name)
    constants = {
        f"{place.format(layer)}.{what}": tensor
        for layer in (0, 1)
        for what, tensor in (
            ("bias", torch.ones(1, 1, 128, 128, dtype=torch.bool).tril()), ("masked_bias", torch.tensor(-1e9)),
            ("rotary_emb.inv_freq", torch.ones(8)),
        )
    }  # fmt: skip

    rewrite(folder, constants, drop="transformer." if place.startswith("h.") else "")

    load_language(cfg_for(folder, attn_implementation=kernel), CPU)


def test_a_bias_that_a_layer_has_no_place_for_is_still_told(tmp_path: Path) -> None:
    folder = rewrite(saved(tmp_path, "Llama"), {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})

    with pytest.raises(UserError, match=r"no place for: model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_language(cfg_for(folder), CPU)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 with transformers 5.23
def test_a_folder_of_adapters_is_refused_by_every_door(tmp_path: Path) -> None:
    """transformers would load the base with the adapter beside it, under other names, unmerged."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    base = saved(tmp_path / "base", "Llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PeftLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "adapter")
    )

    for look in (lambda c: load_language(c, CPU), load_tokenizer, language_shape):
        with pytest.raises(UserError, match=r"is a PEFT adapter.*merge_and_unload\(\)\.save_pretrained\(FOLDER\)"):
            look(cfg_for(tmp_path / "adapter"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 with transformers 5.23
def test_adapters_that_come_from_the_hub_are_refused_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a hub name they are no folder to look into; the door for weights asks for the file."""
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    base = saved(tmp_path / "base", "Llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, PeftLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        str(tmp_path / "adapter")
    )
    monkeypatch.setattr("beholder.model.language.check_no_adapter", lambda *_: None)

    with pytest.raises(UserError, match="is a PEFT adapter"):
        load_language(cfg_for(tmp_path / "adapter"), CPU)


def test_a_folder_without_a_tokenizer_is_told_instead_of_given_an_empty_one(tmp_path: Path) -> None:
    transformers.GPT2Config().save_pretrained(tmp_path)

    with pytest.raises(UserError, match="has no tokenizer files"):
        load_tokenizer(cfg_for(tmp_path))


def test_a_gguf_file_whose_library_needs_a_missing_token_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def from_pretrained(*_: Any, **__: Any) -> None:  # what transformers 5.15 to 5.17 do, word by word
        raise AttributeError("'GGUFTokenizerSkeleton' object has no attribute 'bos_token_id'")

    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)

    with pytest.raises(UserError, match=r"cannot be read .*tokenizer\.ggml\.bos_token_id.*update transformers"):
        load_tokenizer(cfg_for(tmp_path / "tiny.gguf"))


def test_a_family_that_carries_a_state_through_the_filling_of_a_batch_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, "Rwkv")

    with pytest.raises(UserError, match=r"in a batch, where shorter prompts.*give another language model"):
        load_language(cfg_for(folder, attn_implementation="eager"), CPU)


def test_a_family_that_cannot_be_run_from_embeddings_is_refused_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, "Llama")
    forward = transformers.LlamaModel.forward

    def from_ids_alone(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        if input_ids is None:
            raise NotImplementedError("ids, please\nand more lines")
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", from_ids_alone)
    with pytest.raises(UserError, match=r"LlamaForCausalLM\) cannot be run from embeddings.*: ids, please\. This"):
        load_language(cfg_for(folder), CPU)


# ---------------------------------------------------------------------------------------------------------------
# Tables of positions


@pytest.mark.parametrize("name", ["GPT2", "GPTNeo", "GPTJ", "Mpt", "Llama", "Bloom"])
def test_a_table_of_positions_is_known_and_written_to_its_end(tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    language, _ = load_language(config_of(saved(tmp_path, name), family.kernel), CPU)
    assert language.limits.positions == family.positions
    prompts = [language.embed(draw(length, seed=length))[0] for length in (120, 20)]
    how = GenerateConfig(temperature=0.0, max_new_tokens=16)

    written = language.generate(prompts, how, eos_ids=[language.vocab])

    assert [len(ids) for ids in written] == [9 if family.positions else 16, 16]
    assert written[0] == greedy(language, draw(120, seed=120), len(written[0]))
    if family.positions:
        with pytest.raises(UserError, match=r"prompt takes 129 positions .* table of 128"):
            language.generate([language.embed(draw(129, seed=1))[0]], how, eos_ids=[language.vocab])


# ---------------------------------------------------------------------------------------------------------------
# Adapters on GPT-2's transposed linear layers


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT 0.21 with transformers 5.23
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_on_conv1d_learn_merge_and_are_what_peft_loads(tmp_path: Path, precision: str) -> None:
    from peft import PeftModel

    folder = saved(tmp_path / "llm", "GPT2")
    cfg = cfg_for(folder, precision=precision)
    language, tokenizer = load_language(cfg, CPU)
    targets = ("c_attn", "c_fc", "mlp.c_proj")
    sites = adapters.attach(language.part, LoraConfig(enable=True, r=4, target_modules=targets, dropout=0.0), seed=0)
    assert [(s.d_in, s.d_out) for s in sites[:3]] == [(64, 192), (64, 256), (256, 64)]
    for key, weight in adapters.adapter_tensors(language.part).items():
        if ".lora_B." in key:
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    ids = draw(14, seed=3)

    def logits(model: LanguageModel) -> torch.Tensor:
        return model.head(model.hidden(model.embed(ids), counted(14))[0]).float()

    with torch.no_grad():
        ours = logits(language)
        with adapters.adapters_off(language.part):
            base = logits(language)
        with adapters.merged(language.part):
            merged = logits(language)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(adapters.adapter_tensors(language.part), adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(json.dumps(adapters.adapter_config(language.part)))
    adapters.save_merged(language, tokenizer, tmp_path / "merged")

    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=language.dtype)
    theirs = PeftModel.from_pretrained(plain, str(adapter)).eval()(input_ids=ids).logits[0].float()
    again = logits(load_language(cfg_for(tmp_path / "merged", precision=precision), CPU)[0])

    size = ours.norm()
    allowed = 1e-5 if precision == "fp32" else 2e-2  # bf16: 2^-9 a layer; worst seen 6e-3
    assert (ours - base).norm() / size > 0.1
    for other in (merged, theirs, again):
        assert (ours - other).norm() / size < allowed


def test_the_gradient_of_a_16_bit_conv1d_adapter_is_pefts(tmp_path: Path) -> None:
    folder = saved(tmp_path, "GPT2")
    gradients = []
    for precision in ("fp32", "bf16"):
        language, _ = load_language(cfg_for(folder, precision=precision), CPU)
        adapters.attach(language.part, LoraConfig(enable=True, r=4, target_modules=("c_attn",), dropout=0.0), seed=0)
        language.train(True)
        own = adapters.adapter_parameters(language.part)
        for name, weight in own.items():
            weight.requires_grad_(True)
            if ".lora_B." in name:
                torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
        ids = draw(14, seed=3)
        out = language.head(language.hidden(language.embed(ids), counted(14))[0]).float()
        loss = torch.nn.functional.cross_entropy(out[:-1], ids[0, 1:])
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.values()))]))

    exact, rounded = gradients
    assert float((exact - rounded).norm() / exact.norm()) < 5e-2  # 16 bits; worst seen 1.5e-2


def test_the_default_targets_on_gpt2_are_told_what_it_has(tmp_path: Path) -> None:
    language, _ = load_language(cfg_for(saved(tmp_path, "GPT2")), CPU)

    with pytest.raises(UserError, match=r"'q_proj' matches no module\. Nearest: .*c_proj \(4 modules\)"):
        adapters.attach(language.part, LoraConfig(enable=True), seed=0)
