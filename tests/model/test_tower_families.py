"""Every family of towers loads and is right, or is refused with a sentence that says what to do. Prints the table."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from beholder.config import VisionConfig
from beholder.model.vision import VisionTower, load_vision
from beholder.types import UserError

from .conftest import CPU
from .tower_zoo import HF, TIMM, TIMM_REFUSED, build, shake

pytestmark = pytest.mark.slow


@dataclass
class Table:
    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, where: str, name: str, said: str) -> None:
        self.rows.append((where, name, said))

    def __str__(self) -> str:
        lines = [f"{where:12} {name:32} {said}" for where, name, said in self.rows]
        loaded = sum(not said.startswith("refused") for _, _, said in self.rows)
        return "\n".join([*lines, f"{loaded} families load, {len(lines) - loaded} are refused by name"])


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[Table]:
    """Filled by the tests, printed when the last one has run."""
    rows = Table()
    yield rows
    capture: Any = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print(f"\n\n{rows}")


def pictures(tower: VisionTower, count: int, seed: int = 0) -> torch.Tensor:
    g, draw = tower.geometry, torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, g.height, g.width), dtype=torch.uint8, generator=draw)


def check(tower: VisionTower, patches: int) -> str:
    """Token count = grid, batched = single."""
    g = tower.geometry
    pixels = pictures(tower, 3)
    together = tower(pixels)
    assert together.shape == (3, patches, g.d_vision), f"{list(together.shape)}, expected 3 x {patches} patches"
    alone = torch.cat([tower(p[None]) for p in pixels])
    # Another batch size may be another blocking of the same sums.
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max()))
    apart = (together[0] - together[1]).abs().max()
    assert apart > 1e-3 * together.abs().max(), "the features do not depend on the picture"
    side = round(patches**0.5)
    return f"{side} x {side} patches of width {g.d_vision} at {g.height} px"


def moved_by(tower: VisionTower) -> torch.Tensor:
    """[cells, tokens]: how far each token moves when one cell of the grid is painted over."""
    g = tower.geometry
    side = round(g.num_patches**0.5)
    step = g.height // side
    plain, other = pictures(tower, 2, seed=1)
    changed = []
    for cell in range(side * side):
        y, x = (cell // side) * step, (cell % side) * step
        picture = plain.clone()
        picture[:, y : y + step, x : x + step] = other[:, y : y + step, x : x + step]
        changed.append(picture)
    return (tower(torch.stack(changed)) - tower(plain[None])).norm(dim=-1)


@pytest.mark.parametrize("name", HF)
def test_hugging_face_families(name: str, tmp_path: Path, table: Table) -> None:
    family = HF[name]
    build(family, tmp_path)
    cfg = VisionConfig(name_or_path=str(tmp_path), precision="fp32")
    if family.patches is None:
        with pytest.raises(UserError, match=family.refused) as e:
            load_vision(cfg, CPU)
        table.add("transformers", name, "refused: " + str(e.value).replace(str(tmp_path), "…"))
        return
    tower = load_vision(cfg, CPU)
    said = check(tower, family.patches)
    if tower.backbone(pixel_values=pictures(tower, 1).float()).last_hidden_state.ndim == 3:  # a map has its order
        moved = moved_by(tower)
        # Each patch's own token is the one that it moves most, against how much that token and that patch move at all.
        relative = (moved / moved.mean(0)) / moved.mean(1, keepdim=True)
        at_home = relative.argmax(1).eq(torch.arange(len(moved))).float().mean()
        assert at_home >= 0.9, f"only {at_home:.0%} of the patches move their own token most"
    table.add("transformers", name, said)


@pytest.mark.parametrize("name", [*TIMM, *TIMM_REFUSED])
def test_timm_families(name: str, tmp_path: Path, table: Table) -> None:
    import timm

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old model definitions
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10)
        shake(model, model.pretrained_cfg["input_size"][1], matrices=False)
    path = tmp_path / "w.safetensors"
    save_file({k: v.clone().contiguous() for k, v in model.state_dict().items()}, path)
    cfg = VisionConfig(name_or_path=f"timm/{name}", weights=str(path), precision="fp32")
    if name in TIMM:
        table.add("timm", name, check(load_vision(cfg, CPU), TIMM[name]))
        return
    words, patches = TIMM_REFUSED[name]
    with pytest.raises(UserError, match=words) as e:
        load_vision(cfg, CPU)
    table.add("timm", name, f"refused: {e.value}")
    layer = re.search(r"feature_layer: (\d+)", str(e.value))
    assert layer, "the refusal does not say what to do"
    check(load_vision(cfg.model_copy(update={"feature_layer": int(layer[1])}), CPU), patches)
