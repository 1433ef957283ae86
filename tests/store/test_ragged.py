"""Features of images that differ in their number of tokens: an image is there whole and right, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beholder.store import features, rows
from beholder.store.features import TOKENS, FeatureStore, FillReport, bytes_of
from beholder.types import ImageRef, UserError

SHAPE = (3, 5)
LENGTHS = [1, TOKENS, TOKENS + 1, 3 * TOKENS - 1]


def images(root: Path) -> list[ImageRef]:
    root.mkdir(exist_ok=True)
    for k in range(len(LENGTHS)):
        Image.new("RGB", (1 + k, 1), (k, 0, 0)).save(root / f"{k}.png")
    return [ImageRef(str(root), f"{k}.png") for k in range(len(LENGTHS))]


def number(ref: ImageRef) -> int:
    return int(ref.path.partition(".")[0])


def said(k: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(LENGTHS[k], *SHAPE, generator=torch.Generator().manual_seed(k)).to(dtype)


def opened(folder: Path, tower: str = "tower", dtype: torch.dtype = torch.float32, room: int = 10**6) -> FeatureStore:
    return FeatureStore(
        folder, tower_fingerprint=tower, pipeline_fingerprint="p", shape=SHAPE, max_bytes=room, dtype=dtype, ragged=True
    )


def fill(
    store: FeatureStore, refs: Sequence[ImageRef], encode: Callable[[list[int]], list[torch.Tensor]] | None = None
) -> FillReport:
    encode = encode or (lambda ks: [said(k, store.dtype) for k in ks])
    return store.fill(refs, encode, number, batch_size=3, num_threads=1)


def right_or_absent(store: FeatureStore, refs: Sequence[ImageRef]) -> int:
    """How many are there; fails where one is not what was computed."""
    found = [(k, own) for k, ref in enumerate(refs) if (own := store.read(ref)) is not None]
    for k, own in found:
        assert torch.equal(own, said(k, store.dtype))
    return len(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_image_has_as_many_tokens_as_it_was_given_and_is_computed_once(tmp_path: Path, dtype: torch.dtype) -> None:
    refs, store = images(tmp_path / "images"), opened(tmp_path / "store", dtype=dtype)

    first = fill(store, refs)
    again = fill(opened(tmp_path / "store", dtype=dtype), refs, lambda _: pytest.fail("computed again"))

    assert (first.computed, first.reused, first.over_cap) == (4, 0, 0) and (again.computed, again.reused) == (0, 4)
    assert right_or_absent(store, refs) == 4
    assert store.bytes_used == sum(bytes_of(n, SHAPE, dtype) for n in LENGTHS)
    assert right_or_absent(opened(tmp_path / "store", "another", dtype), refs) == 0


def test_a_writer_that_dies_after_any_row_leaves_whole_images_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refs, put = images(tmp_path / "images"), rows.RowWriter.put
    total = sum(-(-n // TOKENS) for n in LENGTHS)

    class Died(Exception):
        pass

    for survive in range(total):
        store, left = opened(tmp_path / f"store{survive}"), [survive]

        def dying(self: rows.RowWriter, items: Sequence[tuple[bytes, memoryview]], left: list[int] = left) -> int:
            for item in items:
                if not left[0]:
                    raise Died
                left[0] -= put(self, [item])
            return len(items)

        monkeypatch.setattr(rows.RowWriter, "put", dying)
        with pytest.raises(Died):
            fill(store, refs)
        monkeypatch.undo()
        there = right_or_absent(store, refs)
        report = fill(opened(tmp_path / f"store{survive}"), refs)
        assert (report.reused, report.computed) == (there, 4 - there) and right_or_absent(store, refs) == 4


def test_a_damaged_row_of_an_image_makes_it_absent_and_the_next_fill_repairs_it(tmp_path: Path) -> None:
    refs, store = images(tmp_path / "images"), opened(tmp_path / "store")
    fill(store, refs)
    (shard,) = store.rows.folder.glob("shard-*.bin")
    whole = bytearray(shard.read_bytes())
    for row in range(len(whole) // store.rows.row_bytes):
        broken = bytearray(whole)
        broken[row * store.rows.row_bytes + 11] ^= 1
        shard.write_bytes(broken)
        assert right_or_absent(opened(tmp_path / "store"), refs) == 3, row
        assert fill(opened(tmp_path / "store"), refs).computed == 1
        assert right_or_absent(opened(tmp_path / "store"), refs) == 4
        whole = bytearray(shard.read_bytes())


def test_an_image_that_does_not_fit_under_the_cap_is_left_out_whole(tmp_path: Path) -> None:
    refs = images(tmp_path / "images")
    for room in range(sum(-(-n // TOKENS) for n in LENGTHS)):
        store = opened(tmp_path / f"store{room}", room=room * bytes_of(1, SHAPE, torch.float32))
        report = fill(store, refs)
        assert report.computed + report.over_cap == 4 and right_or_absent(store, refs) == report.computed < 4


def test_features_that_are_not_finite_name_the_image(tmp_path: Path) -> None:
    refs = images(tmp_path / "images")

    def broken(ks: list[int]) -> list[torch.Tensor]:
        return [said(k) if k != 1 else said(k).fill_(np.inf) for k in ks]

    with pytest.raises(UserError, match=r"1\.png: .*not finite in float32.* model\.native\.precision"):
        fill(opened(tmp_path / "store"), refs, broken)


def test_a_row_holds_what_the_module_says() -> None:
    assert bytes_of(1, (4, 2560), torch.bfloat16) == features._COUNT + TOKENS * 4 * 2560 * 2
