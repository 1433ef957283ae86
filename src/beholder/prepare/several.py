"""Questions about several of easy-VQA's pictures at once, whose answer lies in one of them or in a comparison.

Made so that nothing but the pictures helps: the place of the picture that decides, the number of pictures and every
answer that a question can have are equally frequent where they are measured, so whoever guesses from the words, from
the last picture or from the first is right no more often than chance.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from beholder.types import UserError

Kind = Literal["which image", "color in image", "shape in image", "how many", "same color"]
Feature = Literal["color", "shape"]
KINDS: tuple[Kind, ...] = ("which image", "color in image", "shape in image", "how many", "same color")
_TAUGHT: dict[Feature, dict[Kind, float]] = {
    "color": {"same color": 0.7, "how many": 0.15, "color in image": 0.1, "which image": 0.05},
    "shape": {"how many": 0.4, "shape in image": 0.3, "which image": 0.3},
}
"""How often `conversations` ask what: what compares pictures is learned last, so it comes more often."""
NUM_IMAGES = (2, 3, 4)
_TAUGHT_IMAGES = (2, 3, 4, 4)
"""Numbers of pictures of `conversations`, in turn: four are learned last, so they come twice as often (docs/LOG.md)."""
_TRIES = 1000
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
    make = _Maker(captions, random.Random(seed))
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


def conversations(captions: Mapping[int, str], count: int, seed: int) -> Iterator[list[Asked]]:
    """``count`` times two or three questions about the same pictures, for training: the pictures, which are most of a
    sample's length, are paid for once. The same for the same arguments.

    No answer helps with another: of two questions either one is about colours and one about shapes, which are drawn
    apart, or they are about the colours of different pictures. A model that is taught what earlier answers give away
    does not learn to look (docs/footguns.md).
    """
    make = _Maker(captions, random.Random(seed))
    for number in range(count):
        yield make.converse(_TAUGHT_IMAGES[number % len(_TAUGHT_IMAGES)])


def record(*asked: Asked) -> dict[str, Any]:
    """What a record says beside its images: they stand in front of the first question; the encoder numbers them."""
    messages: list[dict[str, str]] = []
    for a in asked:
        messages += [{"role": "user", "content": a.question}, {"role": "assistant", "content": a.answer}]
    messages[0]["content"] = "<image>\n" * len(asked[0].images) + messages[0]["content"]
    return {"messages": messages} | ({"question_type": asked[0].kind} if len(asked) == 1 else {})


@dataclass(frozen=True, slots=True)
class _Draft:
    """A question, and what pictures must show so that its answer is right."""

    kind: Kind
    question: str
    answer: str
    decides: int | None
    wants: Mapping[int, Mapping[str, str]]
    """Place, from 0 -> what is shown there."""
    shuns: Mapping[str, str] | None = None
    """What is shown nowhere else."""

    def fits(self, place: int, shown: Shown) -> bool:
        if place in self.wants:
            return _is(shown, self.wants[place])
        return self.shuns is None or not _is(shown, self.shuns)


class _Maker:
    def __init__(self, captions: Mapping[int, str], rng: random.Random) -> None:
        shown = [Shown(n, *text.removeprefix("A ").removesuffix(".").split()) for n, text in sorted(captions.items())]
        self.rng = rng
        self.values: dict[Feature, list[str]] = {
            "color": sorted({s.color for s in shown}), "shape": sorted({s.shape for s in shown}),
        }  # fmt: skip
        self.by_image = {s.image: s for s in shown}
        self.by_looks: dict[tuple[str, str], list[Shown]] = {}
        for s in shown:
            self.by_looks.setdefault((s.color, s.shape), []).append(s)

    def ask(self, kind: Kind, n: int) -> Asked:
        return self._about_pictures(lambda: [self._draft(kind, n)], n)[0]

    def _draft(self, kind: Kind, n: int) -> _Draft:
        match kind:
            case "which image":
                about: tuple[tuple[Feature, ...], ...] = (("color",), ("shape",), ("color", "shape"))
                return self._which(n, self.rng.choice(about))
            case "how many":
                return self._how_many(n, self.rng.choice(("color", "shape")))
            case "same color":
                return self._same(self.rng.sample(range(n), 2))
            case _:
                return self._in_image(kind, self.rng.randrange(n))

    def every_place(self, kind: Kind, n: int) -> list[Asked]:
        """One question of that kind about each place of the same pictures, in the same words."""
        places, words = self._fill(n, []), self.rng.choice(_IN_IMAGE[kind])
        if not places:
            raise UserError(f"{len(self.by_image)} pictures are too few for questions about {n} of them")
        what = kind.partition(" ")[0]
        return [
            Asked(kind, places, words.format(k=k), getattr(self.by_image[image], what), k)
            for k, image in enumerate(places, 1)
        ]

    def converse(self, n: int) -> list[Asked]:
        return self._about_pictures(lambda: self._talk(n), n)

    def _talk(self, n: int) -> list[_Draft]:
        drafts: list[_Draft] = []
        for feature, share in _TAUGHT.items():
            free = self.rng.sample(range(n), n)
            match self.rng.choices(list(share), list(share.values()))[0]:
                case "which image":
                    drafts.append(self._which(n, (feature,)))
                case "how many":
                    drafts.append(self._how_many(n, feature))
                case "same color":
                    drafts.append(self._same(free[:2]))
                    if len(left := free[2:]) == 2 and self.rng.random() < 0.5:
                        drafts.append(self._same(left))
                    elif left:
                        drafts.append(self._in_image("color in image", left[0]))
                case kind:
                    drafts.append(self._in_image(kind, free[0]))
        self.rng.shuffle(drafts)
        return drafts

    def _which(self, n: int, features: Sequence[Feature]) -> _Draft:
        """One picture has what is asked for, and no other."""
        k = self.rng.randrange(n)
        wanted = {f: self.rng.choice(self.values[f]) for f in features}
        what = _article(" ".join(wanted.values()) + ("" if "shape" in wanted else " shape"))
        return _Draft(
            "which image", self.rng.choice(_WHICH).format(what=what), str(k + 1), k + 1, {k: wanted}, wanted
        )  # fmt: skip

    def _in_image(self, kind: Kind, k: int) -> _Draft:
        feature: Feature = "color" if kind == "color in image" else "shape"
        answer = self.rng.choice(self.values[feature])
        return _Draft(kind, self.rng.choice(_IN_IMAGE[kind]).format(k=k + 1), answer, k + 1, {k: {feature: answer}})

    def _how_many(self, n: int, feature: Feature) -> _Draft:
        rng, count = self.rng, self.rng.randint(0, n)
        value = rng.choice(self.values[feature])
        wanted = {feature: value}
        what = f"{_article(value)} shape" if feature == "color" else _article(value)
        return _Draft(
            "how many", rng.choice(_HOW_MANY).format(what=what), str(count), None,
            dict.fromkeys(rng.sample(range(n), count), wanted), wanted,
        )  # fmt: skip

    def _same(self, places: Sequence[int]) -> _Draft:
        rng, (i, j) = self.rng, sorted(places)
        color = rng.choice(self.values["color"])
        others = [c for c in self.values["color"] if c != color]
        same = not others or rng.random() < 0.5
        other = color if same else rng.choice(others)
        return _Draft(
            "same color", rng.choice(_SAME).format(i=i + 1, j=j + 1), "yes" if same else "no", None,
            {i: {"color": color}, j: {"color": other}},
        )  # fmt: skip

    def _about_pictures(self, draft: Callable[[], list[_Draft]], n: int) -> list[Asked]:
        """The questions of a draft, and pictures for them. What no pictures are left for is drafted again."""
        for _ in range(_TRIES):
            drafts = draft()
            if images := self._fill(n, drafts):
                return [Asked(d.kind, images, d.question, d.answer, d.decides) for d in drafts]
        raise UserError(f"{len(self.by_image)} pictures are too few for questions about {n} of them")

    def _fill(self, n: int, drafts: Sequence[_Draft]) -> tuple[int, ...]:
        """``n`` different pictures that fit every question; none where there are not so many."""
        used: list[Shown] = []
        for place in range(n):
            fitting = [
                unused
                for same in self.by_looks.values()
                if all(d.fits(place, same[0]) for d in drafts) and (unused := [s for s in same if s not in used])
            ]
            if not fitting:
                return ()
            # what is shown first, then a picture of it: rare looks are as frequent as common ones
            used.append(self.rng.choice(self.rng.choice(fitting)))
        return tuple(s.image for s in used)


def _is(shown: Shown, wanted: Mapping[str, str]) -> bool:
    return all(getattr(shown, name) == value for name, value in wanted.items())


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"
