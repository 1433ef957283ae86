"""Questions about several of easy-VQA's pictures at once, whose answer lies in one of them or in a comparison.

Made so that nothing but the pictures helps: the place of the picture that decides, the number of pictures and every
answer that a question can have are equally frequent, so whoever guesses from the words, from the last picture or from
the first is right no more often than chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

Kind = Literal["which image", "color in image", "shape in image", "how many", "same color"]
KINDS: tuple[Kind, ...] = ("which image", "color in image", "shape in image", "how many", "same color")
NUM_IMAGES = (2, 3, 4)
EVEN = len(KINDS) * len(NUM_IMAGES) * math.lcm(*NUM_IMAGES)
"""As many questions ask every kind for every number of images equally often, and of every place."""

_IN_IMAGE = {
    "color in image": ("what color is the shape in image {k}?", "what is the color of the shape in image {k}?"),
    "shape in image": ("what shape is in image {k}?", "what is the shape in image {k}?"),
}
_WHICH = ("which image shows {what}?", "in which image is there {what}?")
_HOW_MANY = ("how many images show {what}?", "how many of the images show {what}?")
_SAME = ("do image {i} and image {j} show the same color?", "is the color in image {i} the same as in image {j}?")


@dataclass(frozen=True, slots=True)
class Shown:
    """What one picture shows."""

    image: int
    color: str
    shape: str


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about several pictures."""

    kind: Kind
    images: tuple[int, ...]
    question: str
    answer: str
    decides: int | None
    """Place, from 1, of the picture in which the answer lies; None: it lies in several."""


def questions(captions: Mapping[int, str], count: int, seed: int, *, every_place: bool = False) -> Iterator[Asked]:
    """``count`` questions, kinds and numbers of pictures in turn. ``captions``: picture -> ``A blue rectangle.``

    The same for the same arguments. A picture may be in several questions, never twice in one. ``every_place``: what is
    asked of one place is asked of every place of the same pictures, so that what is right once two of them have changed
    places is the answer to another of the questions; ``count`` a multiple of `EVEN` leaves no place out.
    """
    shown = [Shown(n, *text.removeprefix("A ").removesuffix(".").split()) for n, text in sorted(captions.items())]
    rng = random.Random(seed)
    make = _Maker(shown, rng)
    waiting: dict[tuple[Kind, int], list[Asked]] = {}
    for number in range(count):
        kind, n = KINDS[number % len(KINDS)], NUM_IMAGES[number // len(KINDS) % len(NUM_IMAGES)]
        if not (every_place and kind in _IN_IMAGE):
            yield make.ask(kind, n)
            continue
        left = waiting.setdefault((kind, n), [])
        if not left:
            left += make.every_place(kind, n)
        yield left.pop(0)


def record(asked: Asked) -> dict[str, Any]:
    """What a record says beside its images: they stand in front of the question; the encoder numbers them."""
    places = "<image>\n" * len(asked.images)
    return {
        "messages": [
            {"role": "user", "content": f"{places}{asked.question}"}, {"role": "assistant", "content": asked.answer}
        ],
        "question_type": asked.kind,
    }  # fmt: skip


class _Maker:
    def __init__(self, shown: Sequence[Shown], rng: random.Random) -> None:
        self.rng = rng
        self.colors = sorted({s.color for s in shown})
        self.shapes = sorted({s.shape for s in shown})
        self.by_image = {s.image: s for s in shown}
        self.by_looks: dict[tuple[str, str], list[Shown]] = {}
        for s in shown:
            self.by_looks.setdefault((s.color, s.shape), []).append(s)

    def ask(self, kind: Kind, n: int) -> Asked:
        match kind:
            case "which image":
                return self._which(n)
            case "how many":
                return self._how_many(n)
            case "same color":
                return self._same(n)
            case _:
                return self._in_image(kind, n)

    def _which(self, n: int) -> Asked:
        """One picture has what is asked for, and no other; by its colour, its shape, or both."""
        rng, k = self.rng, self.rng.randrange(n)
        color, shape = rng.choice(self.colors), rng.choice(self.shapes)
        wanted = rng.choice(({"color": color}, {"shape": shape}, {"color": color, "shape": shape}))
        what = f"{_article(color)} shape" if "shape" not in wanted else _article(shape)
        if len(wanted) == 2:
            what = _article(f"{color} {shape}")
        places = self._fill(n, {k: wanted}, lambda s: not _is(s, wanted))
        return Asked("which image", places, rng.choice(_WHICH).format(what=what), str(k + 1), k + 1)

    def _in_image(self, kind: Kind, n: int) -> Asked:
        rng, k = self.rng, self.rng.randrange(n)
        which = "color" if kind == "color in image" else "shape"
        answer = rng.choice(self.colors if which == "color" else self.shapes)
        places = self._fill(n, {k: {which: answer}}, lambda s: True)
        return Asked(kind, places, rng.choice(_IN_IMAGE[kind]).format(k=k + 1), answer, k + 1)

    def every_place(self, kind: Kind, n: int) -> list[Asked]:
        """One question of that kind about each place of the same pictures, in the same words."""
        places, words = self._fill(n, {}, lambda s: True), self.rng.choice(_IN_IMAGE[kind])
        what = kind.partition(" ")[0]
        return [
            Asked(kind, places, words.format(k=k), getattr(self.by_image[image], what), k)
            for k, image in enumerate(places, 1)
        ]

    def _how_many(self, n: int) -> Asked:
        rng, count = self.rng, self.rng.randint(0, n)
        which = rng.choice(("color", "shape"))
        value = rng.choice(self.colors if which == "color" else self.shapes)
        wanted = {which: value}
        what = f"{_article(value)} shape" if which == "color" else _article(value)
        places = self._fill(n, dict.fromkeys(rng.sample(range(n), count), wanted), lambda s: not _is(s, wanted))
        return Asked("how many", places, rng.choice(_HOW_MANY).format(what=what), str(count), None)

    def _same(self, n: int) -> Asked:
        rng = self.rng
        i, j = sorted(rng.sample(range(n), 2))
        color, same = rng.choice(self.colors), rng.random() < 0.5
        other = color if same else rng.choice([c for c in self.colors if c != color])
        places = self._fill(n, {i: {"color": color}, j: {"color": other}}, lambda s: True)
        return Asked(
            "same color", places, rng.choice(_SAME).format(i=i + 1, j=j + 1), "yes" if same else "no", None
        )  # fmt: skip

    def _fill(self, n: int, fixed: Mapping[int, Mapping[str, str]], fits: Callable[[Shown], bool]) -> tuple[int, ...]:
        """``n`` different pictures: at the places of ``fixed`` ones that have what it says, elsewhere ones that fit."""
        used: list[Shown] = []
        for place in range(n):
            used.append(self._draw(partial(_is, wanted=fixed[place]) if place in fixed else fits, used))
        return tuple(s.image for s in used)

    def _draw(self, fits: Callable[[Shown], bool], used: Sequence[Shown]) -> Shown:
        """Colour and shape first, then a picture of them: rare ones are as frequent as common ones."""
        while True:
            looks = self.rng.choice(self.colors), self.rng.choice(self.shapes)
            found = [s for s in self.by_looks.get(looks, ()) if s not in used]
            if found and fits(found[0]):
                return self.rng.choice(found)


def _is(shown: Shown, wanted: Mapping[str, str]) -> bool:
    return all(getattr(shown, name) == value for name, value in wanted.items())


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
