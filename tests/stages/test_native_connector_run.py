"""Runs whose native model's connector learns: killed and resumed, gone on from, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.stages.dying import dying_at
from tests.stages.test_native_run import FILES, Setting, losses_of

from beholder.config import RunConfig
from beholder.evidence import load_evidence
from beholder.model.native import NativeModel
from beholder.prepare.estimate import estimate
from beholder.prepare.tiny import NativeFamily
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.train.checkpoint import resolve_checkpoint
from beholder.types import ImageInput, Status
from beholder.use.vlm import load

pytestmark = pytest.mark.slow
LITTLE = (
    "eval.jitter_samples=0", "eval.audit_turns=0", "eval.caption_samples=0", "ablation.num_samples=4",
    "eval.golden_size=1",
)  # fmt: skip


@pytest.fixture(scope="module", params=["qwen3_vl", "llava", "gemma3"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    family: NativeFamily = request.param
    return Setting(tmp_path_factory.mktemp(family), family)


def learning(setting: Setting, folder: Path, *more: str) -> RunConfig:
    return setting.config(folder, "model.connector.trainable=true", "train.lr.connector=1e-2", *LITTLE, *more)


@pytest.fixture(scope="module")
def straight(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    assert run_stage(learning(setting, folder)).status == Status.SUCCEEDED
    return folder / "run"


def connector_of(run: Path, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step}" / "connector.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[k]) for k, t in one.items())


def test_it_is_counted_proven_and_planned(setting: Setting, straight: Path, tmp_path: Path) -> None:
    e = load_evidence(straight)
    rows = {row.part: row for row in e.trainable}

    assert rows["connector"].trainable == rows["connector"].params > 0
    assert rows["vision"].intact is True and rows["language"].intact is True and rows["vision"].trainable == 0
    assert any(gap.startswith("Feature store: switched off, because its connector learns") for gap in e.gaps)
    assert e.text_only is not None and e.text_only.equal
    planned = estimate(learning(setting, tmp_path), measure=False)
    assert {r.part: (r.params, r.trainable, r.dtype) for r in planned.trainable.rows} == {
        part: (r.params, r.trainable, r.dtype) for part, r in rows.items()
    }
    assert planned.store_bytes is None and planned.memory["connector_gradients_and_AdamW"] > 0
    assert any(gap.startswith("the feature store will be off: its connector learns") for gap in planned.gaps)
    assert not same(connector_of(straight, 2), connector_of(straight))


def test_killed_and_resumed_it_is_the_straight_run(setting: Setting, straight: Path, tmp_path: Path) -> None:
    with dying_at(3):
        run_stage(learning(setting, tmp_path))
    assert run_stage(learning(setting, tmp_path)).status == Status.SUCCEEDED

    assert losses_of(tmp_path / "run") == losses_of(straight)
    for name in FILES:
        found = [sha256_file(run / "checkpoints" / "step_4" / name) for run in (tmp_path / "run", straight)]
        assert found[0] == found[1], name


@pytest.mark.parametrize("adapters", ["continue", "merge", "fresh"])
def test_a_later_stage_goes_on_from_it(setting: Setting, straight: Path, tmp_path: Path, adapters: str) -> None:
    """Frozen there it is as it had learned, and in its checkpoints."""
    how = (f"model.connector.load_checkpoint={straight}", f"model.lora.adapters={adapters}", "train.train_steps=2")
    assert run_stage(setting.config(tmp_path, *LITTLE, *how), promote_anyway=True).status == Status.SUCCEEDED

    e = load_evidence(tmp_path / "run")
    row = next(row for row in e.trainable if row.part == "connector")
    begun = load_file(resolve_checkpoint(straight) / "connector.safetensors")
    assert same(connector_of(tmp_path / "run", 2), begun)
    assert row.trainable == 0 and row.params > 0 and row.intact is True
    assert not any("Feature store" in gap for gap in e.gaps)
    if adapters == "continue":
        more = learning(setting, tmp_path / "more", *how)
        assert run_stage(more, promote_anyway=True).status == Status.SUCCEEDED
        assert not same(connector_of(tmp_path / "more" / "run", 2), begun)


def test_one_that_was_frozen_before_begins_as_it_came(setting: Setting, tmp_path: Path) -> None:
    frozen = setting.config(tmp_path / "frozen", *LITTLE, "train.train_steps=2")
    assert run_stage(frozen).status == Status.SUCCEEDED
    start = f"model.connector.load_checkpoint={tmp_path / 'frozen' / 'run'}"

    later = learning(setting, tmp_path / "later", start, "train.train_steps=2")
    assert run_stage(later, promote_anyway=True).status == Status.SUCCEEDED

    assert not connector_of(tmp_path / "frozen" / "run", 2) and connector_of(tmp_path / "later" / "run", 2)


def test_others_load_it_whole(setting: Setting, straight: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForImageTextToText

    vlm = load(straight, device="cpu")
    assert isinstance(vlm.model, NativeModel)
    vlm.save_merged(tmp_path / "merged")

    merged = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "merged"), dtype=torch.float32)
    base = AutoModelForImageTextToText.from_pretrained(str(setting.native), dtype=torch.float32)
    image = vlm.pipeline.from_pil(Image.new("RGB", (64, 64), "red"))
    assert isinstance(image, ImageInput) and image.inputs is not None
    with torch.no_grad():
        own = vlm.model.patches([image])
        theirs, before = (
            torch.cat([t.reshape(-1, t.shape[-1]) for t in m.model.get_image_features(**image.inputs).pooler_output])
            for m in (merged, base)
        )
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(own, before, rtol=1e-2)


def test_without_adapters_it_learns_alone(setting: Setting, tmp_path: Path) -> None:
    cfg = learning(setting, tmp_path, "model.lora.enable=false", "train.train_steps=2")
    assert run_stage(cfg).status == Status.SUCCEEDED

    rows = {row.part: row for row in load_evidence(tmp_path / "run").trainable}
    assert [part for part, row in rows.items() if row.trainable] == ["connector"]
    load(tmp_path / "run", device="cpu").save_merged(tmp_path / "merged")
