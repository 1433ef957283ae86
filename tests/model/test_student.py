"""A language model made for the run: of a shape or cut from another, learning whole, checked and counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from beholder.config import STAGES, LlmConfig, ModelConfig, StudentConfig
from beholder.model.build import build_vlm
from beholder.model.language import LanguageModel, load_language, load_tokenizer
from beholder.model.learned import learn_whole, learned_state
from beholder.model.losses import head_nll, in_chunks
from beholder.model.plan import apply_train_plan, frozen_fingerprint, param_groups, plan_of
from beholder.model.student import empty_student, make_student
from beholder.prepare.tiny import tiny_llm, tiny_tokenizer
from beholder.types import UserError

from .conftest import CPU, Parts

SMALL: dict[str, Any] = {"like": "llama", "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64}
GPT2: dict[str, Any] = {"like": "gpt2", "hidden": 32, "layers": 2, "heads": 4, "positions": 64}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> LlmConfig:
    """A folder with a tokenizer and nothing else."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder, "smollm2")
    return LlmConfig(name_or_path=str(folder))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], LlmConfig]:
    """A folder with a model of four layers: a tiny Llama or Qwen3, or a GPT-2."""

    def make(family: str) -> LlmConfig:
        folder = tmp_path_factory.getbasetemp() / f"teacher_{family}"
        if folder.exists():
            return LlmConfig(name_or_path=str(folder), precision="fp32")
        if family == "gpt2":
            from transformers import GPT2Config, GPT2LMHeadModel

            tokenizer = tiny_tokenizer(folder, "smollm2")
            torch.manual_seed(0)
            sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
            ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
            GPT2LMHeadModel(GPT2Config(**sizes, **ends, initializer_range=0.2)).save_pretrained(folder)
        else:
            tiny_llm(folder, family, num_hidden_layers=4)  # pyright: ignore[reportArgumentType]
        return LlmConfig(name_or_path=str(folder), precision="fp32")

    return make


def made(llm: LlmConfig, seed: int = 0, **settings: Any) -> LanguageModel:
    cfg = StudentConfig(**settings)
    return load_language(llm, CPU, make_student(cfg, llm, load_tokenizer(llm), seed, held=False))[0]


def logits(language: LanguageModel, ids: Tensor) -> Tensor:
    return language.head(language.hidden(language.embed(ids), torch.arange(ids.shape[1]).expand_as(ids))[0])


IDS = torch.tensor([[5, 9, 33, 70, 12, 4, 90, 41]])


@pytest.mark.parametrize("shape", [SMALL, GPT2, SMALL | {"tie_embeddings": False}], ids=["llama", "gpt2", "untied"])
def test_its_weights_come_from_the_seed_alone_and_its_table_has_a_row_for_each_id(
    words: LlmConfig, shape: dict[str, Any]
) -> None:
    torch.manual_seed(123)
    one, before = made(words, 7, **shape), torch.get_rng_state()
    torch.manual_seed(5)
    again, other = made(words, 7, **shape), made(words, 8, **shape)

    own, same, differs = (m.model.state_dict() for m in (one, again, other))
    assert all(torch.equal(t, same[k]) for k, t in own.items())
    assert any(not torch.equal(t, differs[k]) for k, t in own.items())
    assert one.vocab == 1 + max(load_tokenizer(words).get_vocab().values()) and one.dtype == torch.float32
    torch.manual_seed(123)
    assert torch.equal(before, torch.get_rng_state()), "the global random state was moved"
    tied = one.model.get_output_embeddings().weight is one.model.get_input_embeddings().weight
    assert tied is shape.get("tie_embeddings", True)


@pytest.mark.parametrize("family", ["smollm2", "qwen3", "gpt2"])
@pytest.mark.parametrize("cut", [(0, 3), "first-3", (2,)], ids=str)
def test_a_cut_one_computes_what_the_whole_one_does_without_the_other_layers(
    teacher: Callable[[str], LlmConfig], family: str, cut: Any
) -> None:
    llm = teacher(family)
    whole, student = load_language(llm, CPU)[0], made(llm, cut=cut)
    kept = [0, 1, 2] if cut == "first-3" else list(cut)
    assert len(student.part.blocks) == len(kept)
    for number, block in enumerate(whole.part.blocks):
        if number not in kept:  # as if it were not there
            layer: Any = whole.part.module.get_submodule(block)
            layer.forward = lambda hidden_states, *_, **__: hidden_states

    with torch.no_grad():
        assert torch.equal(logits(student, IDS), logits(whole, IDS))


def test_a_cut_one_is_refused_where_its_layers_are_not(teacher: Callable[[str], LlmConfig]) -> None:
    with pytest.raises(UserError, match=r"model.student.cut names 4, 9, but .* has 4 decoder layers, 0 to 3"):
        made(teacher("smollm2"), cut=(0, 4, 9))
    with pytest.raises(UserError, match=r"model.student.cut is last-7, but .* has 4 decoder layers"):
        made(teacher("smollm2"), cut="last-7")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither is given; give one of them"),
        (SMALL | {"cut": (0,)}, "both are given; give one of them"),
        ({"cut": "none"}, "cut chooses no layer"),
        ({"cut": (1, 1)}, "has 1 twice"),
        ({"like": "llama", "hidden": 32, "layers": 2}, "needs its sizes: heads is missing"),
        (SMALL | {"heads": 5}, "heads is 5, which does not divide hidden 32.*nearest: 4 or 8"),
        (SMALL | {"kv_heads": 3}, "kv_heads is 3, which does not divide heads 4; nearest: 2 or 4"),
        (SMALL | {"heads": 32, "kv_heads": 32}, "takes pairs of numbers"),
        (GPT2 | {"kv_heads": 2}, "gpt2 has keys and values for each head"),
    ],
    ids=["nothing", "both", "none", "twice", "missing", "heads", "kv_heads", "odd", "gpt2"],
)
def test_sizes_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StudentConfig(**settings)


def test_beside_a_native_model_or_adapters_it_is_refused(parts: Parts) -> None:
    llm, vision = {"name_or_path": "l"}, {"name_or_path": "v"}
    with pytest.raises(ValidationError, match="native names a whole model; remove one"):
        ModelConfig.model_validate({"student": SMALL, "native": {"name_or_path": "n"}})
    own = {"llm": llm, "vision": vision, "lora": {"enable": True}}
    with pytest.raises(ValidationError, match=r"lora.enable: false, or student.learns: none"):
        ModelConfig.model_validate(own | {"student": SMALL})
    assert ModelConfig.model_validate(own | {"student": SMALL | {"learns": "none"}}).language_learns is False


def test_a_table_with_fewer_rows_than_ids_is_refused(words: LlmConfig) -> None:
    with pytest.raises(UserError, match=r"model.student.vocab is 50, but the tokenizer of .* has ids up to 258"):
        made(words, **SMALL, vocab=50)


def test_without_weights_it_is_the_same_size(words: LlmConfig, teacher: Callable[[str], LlmConfig]) -> None:
    cases: list[tuple[LlmConfig, dict[str, Any]]]
    cases = [(words, SMALL), (words, GPT2), (teacher("qwen3"), {"cut": (1, 2)})]
    for llm, settings in cases:
        empty = empty_student(StudentConfig(**settings), llm)

        shapes = {k: p.shape for k, p in made(llm, **settings).model.named_parameters()}
        assert {k: p.shape for k, p in empty.named_parameters()} == shapes


# ---------------------------------------------------------------------------------------------------------------
# It learns


def built(parts: Parts, llm: LlmConfig, **settings: Any) -> tuple[Any, ModelConfig]:
    vision, _ = parts.vision("siglip")
    cfg = ModelConfig.model_validate({
        "llm": {"name_or_path": llm.name_or_path}, "vision": {"name_or_path": vision, "precision": "fp32"},
        "student": SMALL | settings, "connector": {"num_visual_tokens": 4, "resampler": {"num_heads": 4, "depth": 1}},
    })  # fmt: skip
    return build_vlm(cfg, compute_precision="fp32", device=CPU, seed=3)[0], cfg


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("which", ["all", "layers", "none"])
def test_what_was_asked_learns_by_its_own_rate_and_the_rest_is_hashed(
    parts: Parts, words: LlmConfig, which: str, tied: bool
) -> None:
    model, cfg = built(parts, words, learns=which, tie_embeddings=tied)
    language = model.language.model
    table, head = language.get_input_embeddings().weight, language.get_output_embeddings().weight

    rows = {r.part: r for r in apply_train_plan(model, plan_of(cfg, STAGES["instruct"])).rows}

    apart = table.numel() + (0 if tied else head.numel())
    learns = {"all": rows["language"].params, "layers": rows["language"].params - apart, "none": 0}[which]
    assert rows["language"].trainable == learns and rows["vision"].trainable == 0
    assert table.requires_grad is head.requires_grad is model.language.head_learns is (which == "all")
    rates, decays = {"connector": 1.0, "language": 2.0}, {"connector": 0.1, "language": 0.2}
    groups = {g["name"]: g for g in param_groups(model, rates, decays)}
    assert ("language.decay" in groups) is (which != "none")
    if which != "none":
        assert groups["language.decay"]["lr"] == 2.0 and groups["language.decay"]["weight_decay"] == 0.2
        assert groups["language.no_decay"]["weight_decay"] == 0
        assert all("norm" in name for name, _ in groups["language.no_decay"]["params"])
    assert ("language" in frozen_fingerprint(model)) is (which != "all")


def test_in_a_stage_that_trains_the_connector_alone_it_is_refused(parts: Parts, words: LlmConfig) -> None:
    with pytest.raises(UserError, match=r"model.student.learns: none"):
        plan_of(built(parts, words)[1], STAGES["align"])


def test_over_its_budget_it_is_refused_with_the_table(parts: Parts, words: LlmConfig) -> None:
    with pytest.raises(UserError, match=r"(?s)more than model.student.max_params 1,000:.*vision .*connector .*lang"):
        built(parts, words, max_params=1000)


def test_its_checkpoint_holds_all_of_it_once(words: LlmConfig) -> None:
    for shape, which in ((SMALL, "all"), (SMALL, "none"), (SMALL | {"tie_embeddings": False}, "layers"), (GPT2, "all")):
        language = made(words, **shape)
        learn_whole(language.part, which)  # pyright: ignore[reportArgumentType]

        kept = learned_state(language.part)["language"].tensors

        assert sum(t.numel() for t in kept.values()) == sum(p.numel() for p in language.model.parameters())


@pytest.mark.parametrize("shape", [SMALL, SMALL | {"tie_embeddings": False}, GPT2], ids=["tied", "untied", "gpt2"])
@pytest.mark.parametrize("rows", [1, 3, 100])
def test_loss_and_gradients_in_chunks_are_those_of_the_plain_computation(
    words: LlmConfig, shape: dict[str, Any], rows: int
) -> None:
    language = made(words, **shape)
    language.model.requires_grad_(True)
    targets = IDS[0, 1:]

    def gradients(loss: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        language.model.zero_grad()
        hidden = language.hidden(language.embed(IDS), torch.arange(8)[None])[0, :-1]
        loss(hidden).backward()
        return {n: p.grad.clone() for n, p in language.model.named_parameters() if p.grad is not None}

    def chunked(hidden: Tensor) -> Tensor:
        nll, correct = head_nll(language.head, hidden, targets, language.vocab, rows * language.vocab, trained=True)
        assert correct is None
        return (nll * torch.arange(1, 8)).sum()

    def plain(hidden: Tensor) -> Tensor:
        own = torch.log_softmax(language.model.get_output_embeddings()(hidden).float(), -1)
        return -(own[torch.arange(7), targets] * torch.arange(1, 8)).sum()

    ours, theirs = gradients(chunked), gradients(plain)

    assert ours.keys() == theirs.keys() == dict(language.model.named_parameters()).keys(), "everything learns"
    for name, grad in ours.items():  # worst seen 3e-7 of the largest
        torch.testing.assert_close(grad, theirs[name], rtol=1e-5, atol=2e-6 * float(theirs[name].abs().max()))


def test_no_more_logits_are_kept_than_of_one_chunk() -> None:
    head, hidden = nn.Linear(8, 1000), torch.randn(64, 8, requires_grad=True)
    targets, largest = torch.arange(64), 0

    def seen(t: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, t.numel() if t.shape[-1] == 1000 and t.ndim == 2 and t.shape[0] != 1000 else 0)
        return t

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        nll, _ = head_nll(head, hidden, targets, 1000, 4 * 1000, trained=True)
    assert largest == 0, "logits are kept for the backward pass"
    nll.sum().backward()
    assert head.weight.grad is not None and hidden.grad is not None


def test_in_chunks_without_gradients_it_computes_nothing_twice() -> None:
    seen: list[int] = []

    def terms(x: Tensor) -> Tensor:
        seen.append(len(x))
        return 2 * x

    with torch.no_grad():
        out = in_chunks(terms, 3, torch.arange(7.0))

    assert torch.equal(out, 2 * torch.arange(7.0)) and seen == [3, 3, 1]


def test_the_table_has_a_gradient_only_where_it_learns(words: LlmConfig) -> None:
    language = made(words, **SMALL)
    assert not language.embed(IDS).requires_grad
    language.model.requires_grad_(True)
    assert language.embed(IDS).requires_grad
    with torch.no_grad():
        assert not language.embed(IDS).requires_grad


def test_it_is_computed_in_the_runs_precision_and_kept_in_fp32(words: LlmConfig) -> None:
    language = made(words, **SMALL)
    with torch.no_grad():
        exact = logits(language, IDS)
        language.compute_dtype = torch.bfloat16
        rounded = logits(language, IDS)

    assert (exact.dtype, rounded.dtype, language.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    assert not torch.equal(exact, rounded.float())
    torch.testing.assert_close(rounded.float(), exact, rtol=0.05, atol=0.02)
