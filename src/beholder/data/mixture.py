"""The order of training: position p = 0, 1, 2 … → example, as a pure function of (seed, epoch, data, p).

No state, so a resume, another worker count or another world size start anywhere and see the same samples. What goes
into train at all is decided in `splits`; batches are made in `collate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from beholder.data.sources import Records
from beholder.types import Example, Turn, UserError

_ROUNDS = 8
_PARTNER_TRIES = 32


def permute(n: int, seed: int, epoch: int, fingerprint: str, positions: np.ndarray) -> np.ndarray:
    """Where ``positions`` (int, each in [0, n)) go in a pseudo-random permutation of [0, n). int64, same shape.

    A Feistel network over the next even power of two, walked until it falls below n (Black & Rogaway, "Ciphers with
    arbitrary finite domains", 2002): a bijection by construction, without a table of n entries. Integer arithmetic
    only, so the order is the same on every machine; tests pin it.
    """
    positions = np.asarray(positions, dtype=np.int64)
    assert n > 0, n
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < n), "position outside [0, n)"
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    digest = hashlib.sha512(f"beholder order 1|{seed}|{epoch}|{fingerprint}".encode()).digest()
    keys = np.frombuffer(digest, dtype="<u8")
    assert len(keys) == _ROUNDS

    out = positions.astype(np.uint64).ravel()
    walking = np.arange(out.size)  # every walk ends: it follows a cycle that its own start, a value below n, lies on
    while walking.size:
        x = out[walking]
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        x = (left << half) | right
        out[walking] = x
        walking = walking[x >= np.uint64(n)]
    return out.astype(np.int64).reshape(positions.shape)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea & Flood, 2014), modulo 2^64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Mixture:
    """The endless training stream over ``indices`` of ``examples``: epoch e is positions [e·len, (e+1)·len).

    ``multi_image_fraction`` of the positions join their example with another one of the same set under template B, so
    that the model learns which image is which. Both must have one image and one caption; a position whose example does
    not, or that finds no such partner in a bounded number of draws, stays as it is.
    """

    def __init__(
        self, examples: Records, indices: np.ndarray | Sequence[int], *, seed: int, multi_image_fraction: float = 0.0
    ) -> None:
        self.examples = examples
        self.indices = np.asarray(indices, dtype=np.int64)
        if not self.indices.size:
            raise UserError("there is no training sample: every record was rejected or held out")
        if multi_image_fraction > 0 and self.indices.size < 2:
            raise UserError("data.multi_image_fraction joins two samples, but there is only one training sample")
        self.seed = seed
        self.multi_image_fraction = multi_image_fraction
        facts = f"{examples.fingerprint}|{seed}|{multi_image_fraction!r}|".encode()
        self.fingerprint: str = hashlib.sha256(facts + self.indices.astype("<i8").tobytes()).hexdigest()
        """sha256 over everything that decides which example a position gives."""
        # Of the set alone: changing multi_image_fraction must not change the order of the rest.
        members = examples.fingerprint.encode() + self.indices.astype("<i8").tobytes()
        self._order_key = hashlib.sha256(members).hexdigest()

    def __len__(self) -> int:
        return int(self.indices.size)

    def epoch_of(self, position: int) -> int:
        """Epoch of a position, from 0."""
        return position // len(self)

    def index_at(self, position: int) -> int:
        """Index into ``examples`` at a position (of the first example, where two are joined)."""
        epoch, place = divmod(position, len(self))
        return int(self.indices[permute(len(self), self.seed, epoch, self._order_key, np.array([place]))[0]])

    def example_at(self, position: int) -> Example:
        """The training sample at a position."""
        index = self.index_at(position)
        example = self.examples[index]
        if self._draw("join", position) >= self.multi_image_fraction or not _is_caption(example):
            return example
        for attempt in range(_PARTNER_TRIES):
            other = int(self.indices[int(self._draw(f"partner {attempt}", position) * len(self))])
            if other != index and _is_caption(partner := self.examples[other]):
                return join(example, partner)
        return example

    def _draw(self, purpose: str, position: int) -> float:
        """Uniform in [0, 1), a pure function of its arguments and the mixture."""
        text = f"{purpose}|{position}|{self.seed}|{self._order_key}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48


def _is_caption(example: Example) -> bool:
    return len(example.images) == 1 and sum(t.role == "assistant" for t in example.turns) == 1


def join(first: Example, second: Example) -> Example:
    """Two captioned images as one sample, ready for template B: target ``Image 1: … Image 2: …``, id ``a+b``."""
    target = f"Image 1: {first.target_text.strip()} Image 2: {second.target_text.strip()}"
    return Example(
        id=f"{first.id}+{second.id}",
        images=(*first.images, *second.images),
        turns=(Turn("assistant", (target,)),),
        source=first.source,
        file=first.file,
        row=first.row,
    )
