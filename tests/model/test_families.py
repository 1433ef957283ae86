"""Causal LM families that people bring: each loads and is right, or is refused with a sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers

from beholder.config import GenerateConfig, LlmConfig, LoraConfig
from beholder.model import adapters
from beholder.model.language import LanguageModel, load_language
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
    assert (language.packing_error is None) == family.packs, language.packing_error
    if family.packs:
        packed = losses(language, torch.cat(ids, 1), torch.cat([counted(i.shape[1]) for i in ids], 1))[0]
        starts = [0, 14, 23]
        for start, one in zip(starts, alone, strict=True):
            torch.testing.assert_close(packed[start : start + one.shape[1]], one[0], rtol=1e-4, atol=5e-5)
    else:
        assert language.packing_error is not None and "Set train.packing: false" in language.packing_error

    # The plan's numbers are the model's.
    assert language.max_positions == family.positions
    if name == "Mamba":
        with pytest.raises(UserError, match=r"no attention heads.*cannot be estimated"):
            language_shape(cfg)
    else:
        shape = language_shape(cfg)
        assert shape.params == sum(p.numel() for p in language.parameters())
        assert (shape.hidden, shape.vocab, shape.max_positions) == (64, language.vocab, family.positions)
        assert shape.layers == 2 and 0 < shape.layer_params < shape.params

    # Every adapter learns, and merged they compute the same.
    kinds = linear_kinds(language)
    if family.fused:
        with pytest.raises(UserError, match=r"PEFT does not put adapters on .* Name fewer layers"):
            adapters.attach(language, LoraConfig(enable=True, target_modules=kinds), seed=0)
        language, _ = load_language(cfg, CPU)
        kinds = tuple(k for k in kinds if not re.search(r"(gate|gate_proj|up_proj|down_proj)$", k))
        said = "adapters on experts' names refused"
    if name == "Llama4":
        with pytest.raises(UserError, match=r"does not run with adapters on .*router"):
            adapters.attach(language, LoraConfig(enable=True, target_modules=kinds), seed=0)
        language, _ = load_language(cfg, CPU)
        kinds = tuple(k for k in kinds if not k.endswith("router"))
    if name == "Mamba":
        for target, why in (("dt_proj", "never calls .*dt_proj.*take them out"), ("out_proj", "PEFT does not put")):
            with pytest.raises(UserError, match=why):
                adapters.attach(language, LoraConfig(enable=True, target_modules=(target,)), seed=0)
            language, _ = load_language(cfg, CPU)
        kinds = ("in_proj", "x_proj")
        said += "; adapters on dt_proj, out_proj refused"
    sites = adapters.attach(language, LoraConfig(enable=True, target_modules=kinds, dropout=0.0), seed=0)
    for key, weight in adapters.adapter_tensors(language).items():
        if ".lora_B." in key:
            weight.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    language.train(True)
    for parameter in adapters.adapter_parameters(language).values():
        parameter.requires_grad_(True)
    embeds = language.embed(ids[0]).clone().requires_grad_(True)
    out = language.head(language.hidden(embeds, counted(14))[0])
    torch.nn.functional.cross_entropy(out[:-1].float(), ids[0][0, 1:]).backward()
    learned = {
        folded(n) for n, p in adapters.adapter_parameters(language).items() if p.grad is not None and p.grad.any()
    }
    assert learned == {folded(n) for n in adapters.adapter_parameters(language)}, "an adapter gets no gradient"
    assert embeds.grad is not None and bool(embeds.grad.any()) and bool(embeds.grad.isfinite().all())
    language.train(False)
    adapted = language.head(language.hidden(language.embed(ids[0]), counted(14))[0])
    with adapters.merged(language):
        merged = language.head(language.hidden(language.embed(ids[0]), counted(14))[0])
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=2e-4)
    assert not torch.allclose(adapted, split, atol=1e-3)

    table.append((
        name, family.kernel, "yes" if family.packs else "refused", str(family.positions or "computed"),
        f"{len(sites)} layers", said,
    ))  # fmt: skip


def test_the_table_has_the_families_people_bring() -> None:
    assert len(FAMILIES) >= 40 and sum(f.refused is None for f in FAMILIES.values()) >= 35
