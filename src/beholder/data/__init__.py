"""From record files to batches, in five steps. This is the only overview.

1. `sources`   record files, `containers` of records of a `formats` shape -> `Example`s with image references; bad ones
               -> named rejects
2. `hygiene`   every caption and image vetted -> accepted indices, rejects with reasons, target lengths
3. `splits`    accepted indices -> train and held-out (persisted); `mixture` orders train: position -> `Example`
4. `chat`      `Example` -> `Encoded`: ids + supervision mask + image spans, appended together
5. `collate`   `Encoded` + images (stored features, or pixels by `images`) -> `Batch` rows, padded or packed

`build.build_data` runs steps 1-3 and hands over the tools for 4 and 5. Nothing here imports `model`: what the data must
know of it is an `ImageGeometry`, a tokenizer and a number of visual tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beholder.data.build import Data, build_data, build_encoder, open_records

__all__ = ["Data", "build_data", "build_encoder", "open_records"]


def __getattr__(name: str) -> Any:
    """Imports on first use: who reads, checks or scores files needs no batches, and so no torch."""
    if name in __all__:
        from beholder.data import build

        return getattr(build, name)
    raise AttributeError(f"module 'beholder.data' has no attribute {name!r}")
