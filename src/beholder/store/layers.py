"""What goes into the lowest layer of the language model that learns, kept for every sample: below it nothing changes
from one pass over the data to the next, so there it is computed once.

The rows themselves are `rows`' business. A row holds `POSITIONS` positions of one sample; a sample's key is its tokens
and what its images say (`LanguageModel` and `VisionLanguageModel` know when that is all that decides).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from beholder.store.rows import RowStore, RowWriter, row_key
from beholder.types import UserError

POSITIONS = 32
"""Of a row: half of one is left empty on average."""


class LayerStore:
    """A `types.LayerKeeper`: hidden states ``[T, width]`` of samples by key. ``below``: what decides them besides the
    sample (weights of everything below, precision, the layer). ``with``: closed at the end.

    Raises `UserError` where the folder cannot be used (not writable, damaged index, disk full).
    """

    def __init__(
        self, folder: Path, below: Mapping[str, Any], *, width: int, dtype: torch.dtype, max_bytes: int
    ) -> None:
        self.width, self.dtype = width, dtype
        meta = {"kind": "layers", "version": 1, **below, "width": width, "dtype": str(dtype), "positions": POSITIONS}
        self.rows = RowStore(
            Path(folder), meta, row_bytes=POSITIONS * width * dtype.itemsize, max_bytes=max_bytes,
            name="store of layers' inputs",
            remedy="Give a writable folder with room in features.dir (or BEHOLDER_CACHE), lower features.max_gb, or "
            "set features.layers: false",
        )  # fmt: skip
        self._writing = self.rows.writer()
        self._writer: RowWriter = self._writing.__enter__()
        self.reused = self.computed = self.over_cap = 0
        """Samples, counted as often as they were asked for."""

    def __enter__(self) -> LayerStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._writing.__exit__(None, None, None)
        self.rows.close()

    def read(self, key: bytes, length: int) -> torch.Tensor | None:
        """``[length, width]`` of the sample, or None where a row of it is not there or not right."""
        out = torch.empty(-(-length // POSITIONS), POSITIONS, self.width, dtype=self.dtype)
        view = out.view(torch.uint8).flatten(1).numpy()
        if not all(self.rows.read_into(row_key(key, k), memoryview(row)) for k, row in enumerate(view)):
            return None
        self.reused += 1
        return out.flatten(0, 1)[:length]

    def put(self, key: bytes, hidden: torch.Tensor) -> None:
        """Keep ``hidden`` ``[T, width]`` under the key, as far as the cap leaves room. Raises `UserError` for values
        that are not finite."""
        if not bool(hidden.isfinite().all()):
            raise UserError(
                "the language model's layers gave values that are not finite; its weights may be damaged, or "
                "model.llm.precision is too narrow for it (try fp32)"
            )
        length = hidden.shape[0]
        out = torch.zeros(-(-length // POSITIONS), POSITIONS, self.width, dtype=self.dtype)
        out.flatten(0, 1)[:length] = hidden.detach().to("cpu", self.dtype)
        view = out.view(torch.uint8).flatten(1).numpy()
        if not self._writer.has_room(len(view)):
            self.over_cap += 1
            return
        stored = self._writer.put([(row_key(key, k), memoryview(row)) for k, row in enumerate(view)])
        self.over_cap += stored < len(view)
        self.computed += stored == len(view)
