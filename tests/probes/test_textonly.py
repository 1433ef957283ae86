from __future__ import annotations

import copy
from typing import Any

import torch

from beholder.model.vlm import VisionLanguageModel
from beholder.probes import textonly


def test_logits_are_bit_equal_after_training_the_connector_alone(bench: Any):
    model = copy.deepcopy(bench.model)
    before = textonly.text_logits(model, bench.tokenizer)
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=1e-2)
    model.train()
    for k in range(3):
        model(bench.builder.batch(bench.train[8 * k : 8 * k + 8], bench.packed)).nll.mean().backward()
        optimizer.step()

    proof = textonly.compare(before, textonly.text_logits(model, bench.tokenizer))

    assert proof.equal and proof.changed == []
    assert proof.sha256_before == proof.sha256_after
    assert proof.max_abs_difference == 0
    assert proof.prompts == len(textonly.PROMPTS)
    assert proof.logits == sum(t.numel() for t in before.logits) > 100_000


def test_one_changed_bit_of_the_language_model_is_found_and_measured(bench: Any):
    model = copy.deepcopy(bench.model)
    before = textonly.text_logits(model, bench.tokenizer)
    weight = next(p for name, p in model.language.named_parameters() if "q_proj" in name)
    with torch.no_grad():
        flat = weight.view(-1).view(torch.int32)
        flat[0] ^= 1 << 20  # one bit high in the mantissa of one weight

    proof = textonly.compare(before, textonly.text_logits(model, bench.tokenizer))

    assert not proof.equal
    assert proof.changed
    assert proof.max_abs_difference is not None and proof.max_abs_difference > 0


def test_a_trained_language_model_is_not_the_old_one(bench: Any, sighted: VisionLanguageModel):
    before = textonly.text_logits(bench.model, bench.tokenizer)

    proof = textonly.compare(before, textonly.text_logits(sighted, bench.tokenizer))

    assert not proof.equal and len(proof.changed) == proof.prompts


def test_the_measured_logits_are_the_language_models_own(bench: Any):
    measured = textonly.text_logits(bench.model, bench.tokenizer, ["Hello"])

    ids = torch.tensor([bench.tokenizer("Hello")["input_ids"]])
    with torch.no_grad():
        own = bench.model.language.model(input_ids=ids, use_cache=False).logits

    # Another path through the same modules (no explicit positions, whole model): rounding of fp32, worst seen 0.
    torch.testing.assert_close(measured.logits[0], own, rtol=1e-5, atol=1e-5)
