"""Connector shapes, arithmetic of the parameter-free resamplers, and the scale everything starts at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from beholder.config import ConnectorConfig
from beholder.model.connector import Connector, GridPool, PixelShuffle, build_connector, resolve_num_tokens
from beholder.types import UserError


def make(kind: str = "perceiver", *, patches: int = 16, d_vision: int = 12, d_text: int = 10, seed: int = 0,
         projector: dict[str, Any] | None = None, device: str = "cpu", **settings: Any) -> Connector:  # fmt: skip
    resampler = {"kind": kind, "num_heads": 2, "depth": 2} | settings.pop("resampler", {})
    cfg = ConnectorConfig.model_validate({"resampler": resampler, "projector": projector or {}, **settings})
    return build_connector(
        cfg, num_patches=patches, d_vision=d_vision, d_text=d_text, embed_rms=0.136, seed=seed, device=device
    )


@pytest.mark.parametrize("output_norm", ["rms", "none"])
@pytest.mark.parametrize("vision_ln", [False, True])
@pytest.mark.parametrize("projector", ["mlp", "linear"])
@pytest.mark.parametrize(
    ("kind", "patches", "asked", "tokens"),
    [
        ("perceiver", 16, 5, 5), ("perceiver", 7, None, 64), ("mean_pool", 7, None, 1), ("grid", 49, 16, 16),
        ("grid", 49, None, 49), ("grid", 729, None, 64), ("pixel_shuffle", 16, None, 4), ("pixel_shuffle", 81, 9, 9),
        ("none", 7, None, 7), ("none", 7, 7, 7),
    ],
)  # fmt: skip
def test_every_kind_gives_n_tokens_of_the_language_models_width(
    kind: str, patches: int, asked: int | None, tokens: int, projector: str, vision_ln: bool, output_norm: str
) -> None:
    connector = make(
        kind, patches=patches, num_visual_tokens=asked, projector={"kind": projector}, vision_ln=vision_ln,
        output_norm=output_norm,
    )  # fmt: skip

    out = connector(torch.randn(3, patches, 12, generator=torch.Generator().manual_seed(0)))

    assert out.shape == (3, tokens, 10) and connector.num_tokens == tokens
    names = {n.partition(".")[0] for n in connector.state_dict()}
    assert ("vision_ln" in names) == vision_ln and ("output_norm" in names) == (output_norm == "rms")
    assert all(p.dtype == torch.float32 for p in connector.parameters())


@pytest.mark.parametrize(
    ("kind", "patches", "asked", "message"),
    [
        ("grid", 49, 12, "1 or 4 or 9"), ("grid", 16, 25, "1 or 4 or 9 or 16"), ("grid", 7, 4, "do not form a square"),
        ("pixel_shuffle", 49, None, "cannot be halved"), ("pixel_shuffle", 16, 9, "16 or 4 or 1"),
        ("none", 16, 4, "makes 16 tokens"),
    ],
)  # fmt: skip
def test_impossible_token_counts_say_what_is_possible(kind: str, patches: int, asked: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(kind, patches=patches, num_visual_tokens=asked)


def test_a_width_that_heads_do_not_divide_says_which_do() -> None:
    with pytest.raises(UserError, match=r"divisible by num_heads = 5.*\[1, 2, 3, 4, 6, 12\]"):
        make(resampler={"num_heads": 5})


def test_the_perceiver_can_have_its_own_width_and_a_mean_pool_has_no_weights() -> None:
    narrow = make(resampler={"dim": 6, "num_latents": 3})

    assert narrow.resampler.latents.shape == (3, 6) and narrow(torch.randn(2, 16, 12)).shape == (2, 3, 10)
    assert not list(make("mean_pool").resampler.parameters())


def test_every_image_is_resampled_alone() -> None:
    connector = make(num_visual_tokens=3).eval()
    images = torch.randn(4, 16, 12, generator=torch.Generator().manual_seed(1))

    together = connector(images)

    for i in range(4):
        torch.testing.assert_close(connector(images[i : i + 1])[0], together[i], rtol=1e-5, atol=1e-6)


def test_grid_pooling_averages_neighbours_in_image_order() -> None:
    grid = torch.arange(16.0).view(1, 16, 1)

    pooled = GridPool(1, 16, 4)(grid)

    assert pooled.flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_pixel_shuffle_loses_nothing_and_keeps_neighbours_together() -> None:
    patches = torch.arange(32.0).view(1, 16, 2)

    out = PixelShuffle(2, 16, 2)(patches)

    assert out.shape == (1, 4, 8) and sorted(out.flatten().tolist()) == list(range(32))
    assert out[0, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11], "patches 0, 1, 4, 5 of a 4 x 4 grid"


@pytest.mark.parametrize("kind", ["perceiver", "mean_pool", "grid", "pixel_shuffle", "none"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_visual_tokens_start_at_the_size_of_word_embeddings_whatever_the_tower_gives(kind: str, scale: float) -> None:
    connector = make(kind)

    out = connector(scale * torch.randn(8, 16, 12, generator=torch.Generator().manual_seed(2)))

    # eps and biases of 0 leave nothing but rounding
    assert float(out.detach().square().mean().sqrt()) == pytest.approx(0.136, rel=0.01)


def test_latents_start_at_unit_scale_and_tokens_start_apart() -> None:
    draw = torch.Generator().manual_seed(3)
    # Patches of a real tower share a large common part; what differs between them is of the same size at best.
    patches = torch.randn(1, 16, 32, generator=draw) + torch.randn(1, 1, 32, generator=draw)

    def likeness(std: float) -> float:
        """Mean cosine between the visual tokens of one image."""
        connector = make(d_vision=32, d_text=64, num_visual_tokens=16, resampler={"latent_std": std})
        tokens = torch.nn.functional.normalize(connector(patches)[0].detach(), dim=-1)
        return float((tokens @ tokens.T)[~torch.eye(16, dtype=torch.bool)].mean())

    default = make(d_vision=512, num_visual_tokens=64)
    assert float(default.resampler.latents.detach().std()) == pytest.approx(1.0, abs=0.02)
    assert likeness(1.0) < 0.5 < 0.9 < likeness(0.02)


def test_initial_weights_depend_on_the_seed_alone_and_on_every_bit_of_it() -> None:
    torch.manual_seed(0)
    first = make(seed=7).state_dict()
    torch.manual_seed(1)
    again, other = make(seed=7).state_dict(), make(seed=8).state_dict()

    assert all(torch.equal(first[k], again[k]) for k in first)
    assert all(not torch.equal(first[k], other[k]) for k in first if first[k].ndim == 2)


def test_dropout_acts_while_training_only() -> None:
    connector = make("mean_pool", projector={"dropout": 0.5})
    patches = torch.randn(2, 16, 12)

    connector.train()
    assert not torch.equal(connector(patches), connector(patches))
    connector.eval()
    assert torch.equal(connector(patches), connector(patches))


def test_features_of_another_tower_are_refused_with_both_shapes() -> None:
    with pytest.raises(UserError, match=r"16 patches of width 12 .* got 9 of width 12"):
        make()(torch.zeros(1, 9, 12))


def test_the_meta_device_draws_no_weights() -> None:
    connector = make(device="meta", num_visual_tokens=4)

    assert {p.device.type for p in connector.parameters()} == {"meta"}
    assert resolve_num_tokens(ConnectorConfig(), 729) == 64
