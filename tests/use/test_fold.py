"""An output norm folded into the projector at export: what becomes of it, and that what it costs is measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyParts, make_config
from tests.use.talking import untrained_run
from typer.testing import CliRunner

from beholder.cli import app
from beholder.config import ConnectorConfig
from beholder.data import build_data
from beholder.data.build import open_records
from beholder.data.images import as_input
from beholder.data.splits import load_split
from beholder.evidence import Measurement
from beholder.model.connector import Connector, build_connector, without_output_norm
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.estimate import estimate
from beholder.stages import run_stage
from beholder.stages.session import split_name
from beholder.train.trained import TrainedRun, open_trained
from beholder.types import UserError
from beholder.use.export import Exported, export, held_out
from beholder.use.export.fold import FoldedNorm, fold_norm
from beholder.use.export.gguf_proof import BINDING
from beholder.use.export.samples import trained_on

MLP = {
    "model.connector.resampler.kind": "none", "model.connector.num_visual_tokens": None,
    "model.vision.feature_layer": -2,
}  # fmt: skip
SHUFFLED = {
    "model.connector.resampler.kind": "pixel_shuffle", "model.connector.num_visual_tokens": None,
    "model.connector.projector.kind": "linear", "model.connector.projector.bias": False,
}  # fmt: skip


def connector(**settings: Any) -> Connector:
    cfg = ConnectorConfig.model_validate({"resampler": {"kind": "none"}, **settings})
    return build_connector(cfg, num_patches=4, d_vision=6, d_text=8, embed_rms=0.1, seed=3)


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With random weights and a split of its own."""
    folder = tmp_path_factory.mktemp("fold")
    run = untrained_run(tiny_parts, folder, **MLP, **{
        "stage": "align", "model.lora": {"enable": False}, "eval.batch_size": 8,
    })  # fmt: skip
    opened = open_trained(run, torch.device("cpu"))
    split = run / "splits" / split_name(opened.cfg)
    split.parent.mkdir()
    build_data(opened.cfg, opened.tokenizer, opened.model.geometry, opened.model.num_visual_tokens, split_file=split)
    return run


@pytest.fixture
def opened(run: Path) -> TrainedRun:
    return open_trained(run, torch.device("cpu"))


# ---------------------------------------------------------------------------------------------------------------
# The arithmetic


@pytest.mark.parametrize(
    "settings", [{}, {"projector": {"kind": "linear"}}, {"projector": {"kind": "linear", "bias": False}}]
)
def test_where_every_token_has_one_rms_folding_changes_nothing(settings: Any) -> None:
    whole = connector(**settings)
    assert whole.output_norm is not None
    with torch.no_grad():
        whole.output_norm.weight.mul_(torch.rand(8) + 0.5)
    one = torch.randn(1, 1, 6, generator=torch.Generator().manual_seed(0)).expand(2, 4, 6)
    before = {k: v.clone() for k, v in whole.state_dict().items()}
    rms = whole.projector(one).double().square().mean(-1).sqrt()[0, 0]

    folded = without_output_norm(whole, whole.output_norm.weight.double() / rms)

    assert folded.output_norm is None and folded.info()["output_norm"] == "none"
    torch.testing.assert_close(folded(one), whole(one), rtol=1e-5, atol=1e-7)
    after = whole.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items()), "the run's own is left as it is"


def test_the_factors_are_the_least_squares_fit_to_training_images(opened: TrainedRun) -> None:
    model = opened.model
    assert isinstance(model, VisionLanguageModel) and model.vision is not None
    whole = model.connector
    assert whole.output_norm is not None
    gain = whole.output_norm.weight.detach().double()

    folding = fold_norm(opened, 16)

    folded = model.connector
    assert folded is not whole and folded.output_norm is None and folding.unfolded is whole
    assert (folding.images, folding.tokens) == (16, 16 * folded.num_tokens)
    refs = list(dict.fromkeys(ref for e in trained_on(opened) for ref in e.images))[:16]
    with torch.no_grad():
        patches = model.patches([as_input(opened.pipeline(ref)) for ref in refs])
        normed, scaled = whole(patches).double().flatten(0, 1), folded(patches).double().flatten(0, 1)
        plain = whole.projector(whole.resampler(patches.float())).double().flatten(0, 1)
    rms = plain.square().mean(1).sqrt()

    def left(guess: torch.Tensor) -> torch.Tensor:
        return (normed - guess).square().sum(0)

    best = left(scaled)
    for factor in (0.99, 1.01):
        assert (best < left(scaled * factor)).all(), "of every channel"
    assert best.sum() < left(plain * gain * (1 / rms).mean()).sum(), "better than the mean of the scales"
    assert folding.kept == pytest.approx(1 - float(best.sum() / normed.square().sum()), abs=1e-6)
    assert folding.rms_spread == pytest.approx(float(rms.std(correction=0) / rms.mean()), rel=1e-5)
    assert folding.rms_spread > 0.005, "or this test says nothing"


def test_it_is_calibrated_on_what_is_not_held_out(opened: TrainedRun) -> None:
    learned, held = {e.id for e in trained_on(opened)}, {e.id for e in held_out(opened)}
    assert learned and held and not learned & held
    path = next((opened.folder / "splits").iterdir())
    assert len(learned) == len(load_split(path, open_records(opened.cfg, opened.cfg.data.train_sources)).train)
    many = fold_norm(opened, 10_000)
    assert many.images == len({ref for e in trained_on(opened) for ref in e.images})


def test_what_it_costs_is_measured_on_held_out_samples(opened: TrainedRun) -> None:
    held = sum(1 for _ in held_out(opened))

    told = fold_norm(opened, 8).measure()

    found = {m.name: m for m in map(Measurement.model_validate, told.measured)}
    assert set(found) == {"unfolded.loss", "folded.loss", "folded.added", "folded.same_answers"}
    assert {m.n for m in found.values()} == {held}
    added = found["folded.added"]
    assert added.value == pytest.approx(found["folded.loss"].value - found["unfolded.loss"].value, abs=1e-9)
    assert added.value != 0 and added.ci95 is not None and added.ci95[0] <= added.value <= added.ci95[1]
    assert 0 <= found["folded.same_answers"].value <= 1
    assert FoldedNorm(**json.loads(json.dumps(told.to_json()))) == told
    assert all(f"{n} held-out samples" in told.told[1] for n in [held]) and "nats/token" in told.told[1]


# ---------------------------------------------------------------------------------------------------------------
# What is refused, and said beforehand


def test_what_cannot_be_folded_is_told_before_anything_is_written(
    run: Path, opened: TrainedRun, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="give --fold-norm too, or leave --calibration out"):
        export(run, out, calibration=4)
    with pytest.raises(UserError, match="calibration is 0, expected 1 image or more"):
        export(run, out, fold_norm=True, calibration=0)
    bare = untrained_run(tiny_parts, tmp_path / "bare", **MLP, **{"model.connector.output_norm": "none"})
    with pytest.raises(UserError, match=r"has no output norm .*leave --fold-norm out"):
        export(bare, out, fold_norm=True)
    perceiver = untrained_run(tiny_parts, tmp_path / "perceiver")
    with pytest.raises(UserError, match=r"none all the same: model\.connector\.resampler\.kind is perceiver"):
        export(perceiver, out, fold_norm=True)
    lost = untrained_run(tiny_parts, tmp_path / "lost", **MLP)
    with pytest.raises(UserError, match="has no split file"):
        export(lost, out, fold_norm=True)
    assert not out.exists()


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (MLP, "output_norm is rms, which scales each token by itself; LlavaForConditionalGeneration has none. `beh"),
        (SHUFFLED, "output_norm is rms, which scales each token by itself; Idefics3ForConditionalGeneration has none"),
        ({}, "model.connector.resampler.kind is perceiver"),
        (MLP | {"model.vision.feature_layer": -1}, "model.vision.feature_layer is -1"),
    ],
)
def test_plan_offers_folding_only_where_the_norm_alone_is_in_the_way(
    tiny_parts: TinyParts, tmp_path: Path, sets: Any, expected: str
) -> None:
    told = estimate(make_config(tiny_parts, tmp_path, **sets), measure=False).exports_as

    assert told is not None and expected in told
    assert ("--fold-norm" in told) == ("output_norm is rms" in expected)


# ---------------------------------------------------------------------------------------------------------------
# The whole


@pytest.mark.skipif(importlib.util.find_spec(BINDING) is None, reason="llama.cpp's binding is not installed")
def test_folded_it_is_llama_cpps_too_and_its_card_says_that_the_figures_are_of_another_model(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"output_norm is rms.*--fold-norm` makes that scale constant"):
        export(run, tmp_path / "out", to="gguf")

    told = export(run, tmp_path / "out", to="gguf", fold_norm=True, calibration=8)

    assert told.compared_by.startswith("llama.cpp") and told.folded is not None and told.folded["images"] == 8
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- Output norm folded into the last layer: one factor a channel" in card


@pytest.mark.slow
@pytest.mark.parametrize(("sets", "name"), [(MLP, "Llava"), (SHUFFLED, "Idefics3")])
def test_a_trained_run_becomes_a_class_of_transformers_with_its_price(
    tiny_parts: TinyParts, tmp_path: Path, sets: dict[str, Any], name: str
) -> None:
    cfg = make_config(tiny_parts, tmp_path, **sets)
    run_stage(cfg)
    words = ["export", str(cfg.run_dir), "--fold-norm", "--calibration", "24", "--out", str(tmp_path / "out")]

    done = CliRunner().invoke(app, [*words, "--json"])

    assert done.exit_code == 0, done.output
    told = Exported(**json.loads(done.output))
    assert told.exported_class == f"{name}ForConditionalGeneration" and told.prevents == ""
    assert told.max_logit_difference == 0, "with the folded run"
    assert told.folded is not None and told.folded["images"] == 24
    assert json.loads((tmp_path / "out" / "folded_norm.json").read_text()) == told.folded
    assert "> **The figures are of the run as it is" in (tmp_path / "out" / "README.md").read_text()
    assert "folded_norm.json" in told.files and "modeling_beholder.py" not in told.files
