"""The plan decides what learns; table, groups and fingerprints tell the truth about it."""

from __future__ import annotations

import json

import pytest
import torch

from beholder.model.plan import TrainPlan, apply_train_plan, frozen_fingerprint, param_groups
from beholder.model.weights import hash_tensors, sketch_module
from beholder.types import UserError

from .conftest import Build


def test_align_trains_the_connector_alone_and_the_table_says_so(build: Build) -> None:
    model = build().model
    table = apply_train_plan(model, TrainPlan())

    counts = {r.part: (r.params, r.trainable) for r in table.rows}
    for part, (params, trainable) in counts.items():
        assert params == sum(p.numel() for p in getattr(model, part).parameters())
        assert trainable == (params if part == "connector" else 0)
    assert table.trainable == counts["connector"][0] and table.params == sum(p for p, _ in counts.values())
    assert json.loads(json.dumps(table.to_json()))[1]["part"] == "connector"
    assert "connector" in str(table) and f"{table.trainable:,}" in str(table)


def test_groups_hold_every_trainable_weight_once_and_decay_matrices_only(build: Build) -> None:
    model = build().model
    apply_train_plan(model, TrainPlan())

    groups = param_groups(model, {"connector": 1e-4}, {"connector": 0.01})

    named = dict(model.named_parameters())
    members = [name for group in groups for name, _ in group["params"]]
    assert sorted(members) == sorted(n for n, p in named.items() if p.requires_grad)
    assert all(p is named[n] for group in groups for n, p in group["params"])
    decayed, not_decayed = groups
    assert (decayed["name"], decayed["weight_decay"]) == ("connector.decay", 0.01)
    assert (not_decayed["name"], not_decayed["weight_decay"]) == ("connector.no_decay", 0.0)
    assert all(p.ndim == 2 for _, p in decayed["params"])
    assert "connector.resampler.latents" in dict(not_decayed["params"])
    assert all(group["lr"] == 1e-4 for group in groups)
    torch.optim.AdamW(groups)


def test_nothing_trainable_is_an_error(build: Build) -> None:
    model = build().model
    apply_train_plan(model, TrainPlan(connector="frozen"))

    with pytest.raises(UserError, match="nothing is trainable"):
        param_groups(model, 1e-4, 0.0)
    assert set(frozen_fingerprint(model)) == {"vision", "connector", "language"}


def test_the_fingerprint_sees_one_bit_of_one_frozen_weight(build: Build) -> None:
    model = build().model
    apply_train_plan(model, TrainPlan())
    before = frozen_fingerprint(model)
    assert frozen_fingerprint(model) == before

    weight = model.language.model.model.layers[1].mlp.down_proj.weight
    weight.view(torch.int32)[5, 5] ^= 1
    after = frozen_fingerprint(model)

    assert after["language"] != before["language"] and after["vision"] == before["vision"]


def test_hashes_cover_names_shapes_types_and_bytes_and_not_the_order() -> None:
    a, b = torch.arange(6.0), torch.ones(2)
    base = hash_tensors({"a": a, "b": b})

    assert hash_tensors({"b": b, "a": a}) == base
    assert hash_tensors({"a": a.clone(), "b": b}) == base
    assert base not in {
        hash_tensors({"a": a.view(2, 3), "b": b}), hash_tensors({"a": a.int(), "b": b}), hash_tensors({"a": b, "b": a}),
        hash_tensors({"a": a, "c": b}), hash_tensors({"a": a + 1e-6, "b": b}), hash_tensors({"a": a, "b": b}, "header"),
    }  # fmt: skip
    assert hash_tensors({"e": torch.empty(0)}) == hash_tensors({"e": torch.empty(0)})


def test_a_sketch_is_the_same_in_bf16_and_another_for_other_weights() -> None:
    def layer(seed: int) -> torch.nn.Linear:
        torch.manual_seed(seed)
        return torch.nn.Linear(300, 300)

    assert sketch_module(layer(0)) == sketch_module(layer(0).bfloat16())
    assert sketch_module(layer(0)) != sketch_module(layer(1))
