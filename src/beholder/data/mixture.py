"""The order of training: position p = 0, 1, 2 … → example, as a pure function of (seed, epoch, data, p).

No state, so a resume, another worker count or another world size start anywhere and see the same samples. What goes
into train at all is decided in `splits`; batches are made in `collate`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from beholder.data.sources import Records
from beholder.types import Example, Turn, UserError

BLOCK = 1000
"""Positions over which the sources of a weighted mixture have exactly their shares."""
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

    ``weights``: one for each of the config's sources (`Records.origins`); every `BLOCK` positions then hold them in
    exactly these proportions, in a drawn order, and each source runs through its own epochs. An epoch of the whole is
    still as many positions as there are samples. Without weights every sample comes once an epoch.

    ``multi_image_fraction`` of the positions join their example with another one of the same set under template B, so
    that the model learns which image is which; under weights with one of its own source, which keeps the shares. Both
    must have one image and one caption, whose user turn is the template's to write and so may be dropped; a position
    whose example does not, or that finds no such partner in a bounded number of draws, stays as it is.
    """

    def __init__(
        self, examples: Records, indices: np.ndarray | Sequence[int], *, seed: int, multi_image_fraction: float = 0.0,
        weights: Sequence[float] = (),
    ) -> None:  # fmt: skip
        self.examples = examples
        self.indices = np.asarray(indices, dtype=np.int64)
        if not self.indices.size:
            raise UserError("there is no training sample: every record was rejected or held out")
        if multi_image_fraction > 0 and self.indices.size < 2:
            raise UserError("data.multi_image_fraction joins two samples, but there is only one training sample")
        self.seed = seed
        self.multi_image_fraction = multi_image_fraction
        self._sources = _sources(examples, self.indices, weights) if weights else []
        shares = "|".join(f"{s.per_block}" for s in self._sources)
        facts = f"{examples.fingerprint}|{seed}|{multi_image_fraction!r}|{shares}".encode()
        self.fingerprint: str = hashlib.sha256(facts + self.indices.astype("<i8").tobytes()).hexdigest()
        """sha256 over everything that decides which example a position gives."""
        # Of the set alone: changing multi_image_fraction must not change the order of the rest.
        members = examples.fingerprint.encode() + self.indices.astype("<i8").tobytes()
        self._order_key = hashlib.sha256(members).hexdigest()
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.indices.size)

    def epoch_of(self, position: int) -> int:
        """Epoch of a position, from 0."""
        return position // len(self)

    def index_at(self, position: int) -> int:
        """Index into ``examples`` at a position (of the first example, where two are joined)."""
        return int(self._indices_at(np.array([position]))[0])

    def distinct(self, start: int, stop: int) -> list[int]:
        """The positions of ``[start, stop)`` at which an example is seen for the first time, ascending; a joined one is
        known by the first of the two."""
        _, first = np.unique(self._indices_at(np.arange(start, stop)), return_index=True)
        return sorted((start + first).tolist())

    def _indices_at(self, positions: np.ndarray) -> np.ndarray:
        """`index_at` of each, int64 of the same shape [n]: in bulk a hundredth of the time."""
        if not self._sources:
            return self._in_epochs(self.indices, positions, self._order_key)
        out = np.empty_like(positions)
        numbers, places = np.divmod(positions, BLOCK)
        for number in np.unique(numbers).tolist():
            which, earlier = self._drawn(number)
            for k, source in enumerate(self._sources):
                own = np.flatnonzero((numbers == number) & (which[places] == k))
                draws = number * source.per_block + earlier[places[own]]
                out[own] = self._in_epochs(source.indices, draws, f"{self._order_key}|source {k}")
        return out

    def _in_epochs(self, indices: np.ndarray, draws: np.ndarray, key: str) -> np.ndarray:
        """Of ``indices``, gone through in a new order each epoch, those of these draws."""
        out = np.empty_like(draws)
        epochs, places = np.divmod(draws, len(indices))
        for epoch in np.unique(epochs).tolist():
            own = epochs == epoch
            out[own] = indices[permute(len(indices), self.seed, epoch, key, places[own])]
        return out

    def shares(self, positions: int) -> list[int]:
        """How many of the first ``positions`` each source has; nothing without weights."""
        whole, rest = divmod(positions, BLOCK)
        which = self._drawn(whole)[0][:rest] if self._sources else ()
        return [whole * s.per_block + int(np.count_nonzero(which == k)) for k, s in enumerate(self._sources)]

    @property
    def sizes(self) -> list[int]:
        """Samples of each source; nothing without weights."""
        return [len(s.indices) for s in self._sources]

    def _drawn(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source of each position of a block, how many of the block's earlier ones have the same), int64 [BLOCK]."""
        if self._block is None or self._block[0] != block:
            order = permute(BLOCK, self.seed, block, f"{self._order_key}|block", np.arange(BLOCK))
            which = np.repeat(np.arange(len(self._sources)), [s.per_block for s in self._sources])[order]
            earlier = np.empty(BLOCK, np.int64)
            for k in range(len(self._sources)):
                earlier[which == k] = np.arange(np.count_nonzero(which == k))
            self._block = block, which, earlier
        return self._block[1:]

    def example_at(self, position: int) -> Example:
        """The training sample at a position."""
        return self._example(position, self.index_at(position))

    def _example(self, position: int, index: int) -> Example:
        example = self.examples[index]
        if self._draw("join", position) >= self.multi_image_fraction or not _is_caption(example):
            return example
        source = self._sources[int(self.examples.origins[index])].indices if self._sources else self.indices
        for attempt in range(_PARTNER_TRIES):
            other = int(source[int(self._draw(f"partner {attempt}", position) * len(source))])
            if other != index and _is_caption(partner := self.examples[other]):
                return join(example, partner)
        return example

    def each_once(self) -> Iterator[Example]:
        """The samples of the first epoch in the order of training; what weights repeat comes once."""
        seen: set[int] = set()
        for start in range(0, len(self), BLOCK):
            positions = np.arange(start, min(start + BLOCK, len(self)))
            for position, index in zip(positions.tolist(), self._indices_at(positions).tolist(), strict=True):
                if index not in seen:
                    seen.add(index)
                    yield self._example(position, index)

    def first(self, most: int) -> list[Example]:
        """So many different training samples, in their order, which is already random."""
        return list(islice(self.each_once(), most))

    def _draw(self, purpose: str, position: int) -> float:
        """Uniform in [0, 1), a pure function of its arguments and the mixture."""
        text = f"{purpose}|{position}|{self.seed}|{self._order_key}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:6], "big") / 2**48


class _Source(NamedTuple):
    indices: np.ndarray
    per_block: int


def _sources(examples: Records, indices: np.ndarray, weights: Sequence[float]) -> list[_Source]:
    """Each source's samples and its positions in a block: the nearest whole numbers, by the largest remainders."""
    exact = np.array(weights, np.float64) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(int)
    for k in np.argsort(counts - exact, kind="stable")[: BLOCK - int(counts.sum())]:
        counts[k] += 1
    found = [_Source(indices[examples.origins[indices] == k], int(n)) for k, n in enumerate(counts)]
    for k, source in enumerate(found):
        if not source.per_block:
            raise UserError(f"data.sources.{k}.weight is less than a {BLOCK}th of all weights; leave the source out")
        if not source.indices.size:
            raise UserError(f"data.sources.{k} has a weight, but none of its records is left to train on")
    return found


def _is_caption(example: Example) -> bool:
    return len(example.images) == 1 and example.num_answers == 1


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
