"""Which of a sample's images its words name: "image 2", "the third picture", "2" as the answer to "which image".

The one reader of such references: what is counted of data files and what is swapped to measure a model (`probes`) rest
on the same understanding. Pure functions of texts and examples. Texts are anybody's: every expression here takes time
linear in their length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from beholder.types import Example, ImageSlot, Part, Turn

Style = Literal["digits", "word", "ordinal", "nth", "end"]
"""How a place is written: 2, two, second, 2nd, last (of two images also left and right)."""

_WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_NOUN = r"(?:image|picture|photo|photograph|figure|img|pic|frame|panel|slide|screenshot)"
_NUMBER = rf"(?:\d{{1,3}}|{'|'.join(_WORDS)})"
_NTH = r"\d{1,3}(?:st|nd|rd|th)"
_ORDINAL = rf"(?:{'|'.join(_ORDINALS)}|{_NTH})"
_AND = r"(?:\s*,\s*(?:and\s+|or\s+)?|\s+and\s+|\s+or\s+|\s*&\s*|\s+to\s+)"

# "image 2", "Image #2", "images 1, 2 and 3". Not "figure 2.5", "picture 3D".
_NUMBERED = re.compile(
    rf"\b{_NOUN}(?P<more>s)?\s*(?P<sign>#\s*|no\.\s*|number\s+)?"
    rf"(?P<list>{_NUMBER}(?:{_AND}(?:{_NOUN}\s*)?#?{_NUMBER})*)(?![\w%]|[.,:/]\d)",
    re.IGNORECASE,
)
# "the second image", "first and third pictures", "last image". Not "the first two images". The list is matched with or
# without a noun after it: where none follows, none follows the list's later parts either, so they are not tried again.
_ORDERED = re.compile(
    rf"\b(?P<list>(?:{_ORDINAL}|last|left|right)(?:{_AND}(?:the\s+)?(?:{_ORDINAL}|last|left|right))*)"
    rf"(?P<noun>(?:-?hand)?\s+{_NOUN}s?\b)?",
    re.IGNORECASE,
)
_NOUNS = re.compile(r"image|picture|photo|figure|img|pic|frame|panel|slide|screenshot")
_THEN = re.compile(rf"(?:graph)?s?\s*(?:#|no\.|number|\d|(?:{'|'.join(_WORDS)})\b)")
_BEFORE = re.compile(rf"(?:{'|'.join((*_ORDINALS, 'last', 'left', 'right', 'hand'))}|\d(?:st|nd|rd|th))\s+$")
_ITEM = re.compile(rf"{_NTH}|\d{{1,3}}|\b(?:{'|'.join((*_WORDS, *_ORDINALS))}|last|left|right)\b", re.IGNORECASE)
_DETERMINER = re.compile(r"\b(?:the|this|that|a|an|each|every|any|one|which|what|whole|same)\Z", re.IGNORECASE)
_GOES_ON = re.compile(r"\s+(?!and\b|or\b)[a-z]", re.IGNORECASE)
_VAGUE = re.compile(
    rf"\b(?:{_ORDINAL}|last|left(?:most)?|right(?:most)?|middle|cent(?:er|re)|top|bottom|upper|lower|previous|next|"
    r"former|latter|earlier|later|before|after|preceding|following|order|sequence|chronological\w*|consecutive\w*)\b",
    re.IGNORECASE,
)
# "images 1 to 3", "images 1-3": those between are meant too. "image A", "image-2", "A or B": places, but not read.
_UNREAD = re.compile(
    rf"\b(?i:{_NOUN}s?)\s*#?(?i:{_NUMBER})\s*(?:to|through|-|–|—)\s*#?(?i:{_NUMBER})\b"
    rf"|\b(?i:{_NOUN}s?)(?:[-_]\s*\d|[\s_-]+[A-H]\b)|\b[A-H]\s+or\s+[A-H]\b"
)
# "Image II", "picture i", "part iv" may be places as well, and are not read either.
_ROMAN = re.compile(rf"\b(?:[IVX]{{2,}}|(?<!-)[VX](?!-)|(?i:ii|iii|iv|vi{{1,3}}|ix|{_NOUN}s?\s*[ivx]+))\b")
_BARE = re.compile(rf"\W*(?:both\s+)?{_NUMBER}(?:{_AND}{_NUMBER})*\W*", re.IGNORECASE)
_COUNTS = re.compile(r"\b(?:how\s+many|how\s+much|numbers?|count|total|sum)\b", re.IGNORECASE)
_ASKS_WHAT = re.compile(rf"\bwhat\s+{_NOUN}s?\b", re.IGNORECASE)
_ASKS_WHICH = re.compile(
    rf"\b(?:which\s+(?:one\s+)?(?:of\s+(?:the|these)\s+)?(?:\w+\s+)?|what\s+){_NOUN}s?\b", re.IGNORECASE
)
_ANSWER = re.compile(
    rf"\W*(?:the\s+)?(?:{_NOUN}\s*(?:(?:#|no\.|number)\s*)?)?"
    rf"(?P<place>{_ORDINAL}|{_NUMBER}|last|left|right)(?:\s+(?:{_NOUN}|one))?\W*",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\s*(?:[:.)\]\-]+\s*)?(?:<\w+>\s*)?")
# What may stand between two images: "</Image>, <Image>", or "</Image>, (Image " before the number of a label.
_GAP = r"\s*(?:</\w+>\s*)?(?:[,;.]\s*)?"
_BETWEEN = re.compile(rf"{_GAP}(?:<\w+>\s*)?")
_BEFORE_LABEL = re.compile(rf"{_GAP}(?:[(\[]\s*)?{_NOUN}\s*(?:(?:#|no\.|number)\s*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reference:
    """A place that a text names: the characters ``[start, stop)`` say it."""

    start: int
    stop: int
    place: int
    """From 1; perhaps of no image that is there."""
    style: Style


def references(text: str, num_images: int) -> list[Reference]:
    """The places that ``text`` names beyond doubt, in order. "left" and "right" are the places of two images."""
    found: list[Reference] = []
    if not _may_name(text.lower()):
        return found
    for match in _NUMBERED.finditer(text):
        # "in the picture 3 dogs play" counts dogs
        counts = not match["sign"] and _is_determined(text, match.start()) and _GOES_ON.match(text, match.end())
        if not counts:
            found += _items(text, match.start("list"), match.end("list"), num_images)
    for match in _ORDERED.finditer(text):
        if match["noun"]:
            found += _items(text, match.start("list"), match.end("list"), num_images)
    return sorted(found, key=lambda r: r.start)


def _is_determined(text: str, noun: int) -> bool:
    """Whether an article or the like stands right before what begins there: "in the picture"."""
    stop = noun
    while stop and text[stop - 1].isspace():
        stop -= 1
    return stop < noun and _DETERMINER.search(text[max(0, stop - 8) : stop]) is not None


def _may_name(low: str) -> bool:
    """Whether it is worth a closer look; many times as fast, and every record of a data set is asked."""
    return any(
        _THEN.match(low, noun.end()) or _BEFORE.search(low[max(0, noun.start() - 16) : noun.start()])
        for noun in _NOUNS.finditer(low)
    )


def _items(text: str, start: int, stop: int, n: int) -> list[Reference]:
    out: list[Reference] = []
    for item in _ITEM.finditer(text, start, stop):
        if (read := _read(item[0], n)) is not None:
            out.append(Reference(item.start(), item.end(), *read))
    return out


def _read(word: str, n: int) -> tuple[int, Style] | None:
    """Which place a word names, and how."""
    low = word.lower()
    if low.isdecimal():
        return int(low), "digits"
    if low in _WORDS:
        return _WORDS.index(low) + 1, "word"
    if low in _ORDINALS:
        return _ORDINALS.index(low) + 1, "ordinal"
    if low[0].isdecimal():
        return int(low[:-2]), "nth"
    if low == "last":
        return n, "end"
    # None as well for what only looks alike to IGNORECASE: "fırst", "ſecond"
    place = {"left": 1, "right": 2}.get(low) if n == 2 else None
    return None if place is None else (place, "end")


def _say(word: str, style: Style, place: int, n: int) -> str:
    """``place`` in the manner of ``word``."""
    match style:
        case "digits":
            return str(place)
        case "word":
            new = _WORDS[place - 1] if place <= len(_WORDS) else str(place)
        case "end" if word.lower() in ("left", "right"):
            new = ("left", "right")[place - 1]
        case "end" if place == n:
            new = "last"
        case "nth":
            new = f"{place}{_suffix(place)}"
        case _:
            new = _ORDINALS[place - 1] if place <= len(_ORDINALS) else f"{place}{_suffix(place)}"
    return new.upper() if len(word) > 1 and word.isupper() else new.capitalize() if word[0].isupper() else new


def _suffix(place: int) -> str:
    return "th" if place % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")


def _is_vague(text: str, read: Sequence[Reference], *, is_answer: bool) -> bool:
    """Whether other words than these may speak of places or an order of the images: "before", "the first two".

    What is not understood may: other scripts, Roman numerals, and, but in answers, which may count things, numbers.
    """
    if _UNREAD.search(text):
        return True
    rest = _replaced(text, [(r, "#") for r in read])
    return bool(
        _VAGUE.search(rest)
        or _ROMAN.search(rest)
        or any((c.isnumeric() and not is_answer) or (c.isalpha() and not _is_latin(c)) for c in rest)
    )


def _is_latin(letter: str) -> bool:
    return letter.isascii() or "LATIN" in unicodedata.name(letter, "")


def _may_be_places(question: str, answer: str, num_images: int) -> bool:
    """Whether an answer may name places without saying so: numbers, where nothing is counted ("1 and 2", to "which one
    …?"), or one number where both a picture and what one shows may be meant ("what picture hangs in image 1?")."""
    if not _BARE.fullmatch(answer) or _COUNTS.search(question):
        return False
    if answer_place(question, answer, num_images) is None:
        return True
    return bool(_ASKS_WHAT.search(question) and references(question, num_images))


def answer_place(question: str, answer: str, num_images: int) -> Reference | None:
    """The place that is the whole of an answer to "which image …?": ``2``, ``Image 2.``, ``the second one``."""
    found = _ANSWER.fullmatch(answer)
    if found is None or not _ASKS_WHICH.search(question) or re.search(r"\bhow\s+many\b", question, re.IGNORECASE):
        return None
    read = _read(found["place"], num_images)
    return None if read is None else Reference(found.start("place"), found.end("place"), *read)


# ---------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True, slots=True)
class _Text:
    """A part of what user or assistant say."""

    turn: int
    part: int
    text: str
    found: list[Reference]
    labels: list[Reference]
    """References right before the image that they name."""
    question: str
    """What the user said last before it."""


@dataclass(frozen=True, slots=True)
class Named:
    """What the turns of a sample say of its images' places."""

    asked: tuple[int, ...]
    """Places that the words before the last answer name, each once."""
    answered: tuple[int, ...]
    """Places that the last answer names."""


def named(example: Example) -> Named:
    """The places that a sample's words name."""
    asked: list[int] = []
    answered: list[int] = []
    for t in _texts(example.turns, len(example.images)):
        is_answer = t.turn == len(example.turns) - 1 and example.turns[t.turn].role == "assistant"
        (answered if is_answer else asked).extend(r.place for r in t.found)
    return Named(tuple(dict.fromkeys(asked)), tuple(dict.fromkeys(answered)))


def absent(turns: Sequence[Turn], num_images: int) -> list[int]:
    """Places that the words name where the sample has no image: the 5 of "image 5" of three."""
    if not num_images:
        return []
    return sorted({r.place for t in _texts(turns, num_images) for r in t.found} - {*range(1, num_images + 1)})


def stand_together(example: Example) -> bool:
    """Whether no words stand between the images, apart from labels ("Image 2:"): what an image's neighbours say of it
    would not move with it."""
    at = [(t, p) for t, turn in enumerate(example.turns) for p, x in enumerate(turn.parts) if isinstance(x, ImageSlot)]
    if not at:
        return True
    (first, start), (last, stop) = at[0], at[-1]
    if first != last:
        return False
    labels = {(t.turn, t.part): t.labels for t in _texts(example.turns, len(example.images))}
    return all(
        _is_between(text, labels.get((first, p), [])) for p in range(start, stop)
        if isinstance(text := example.turns[first].parts[p], str)
    )  # fmt: skip


def _is_between(text: str, labels: Sequence[Reference]) -> bool:
    if len(labels) == 1:  # from its number on `_is_label` has seen to it
        return _BEFORE_LABEL.fullmatch(text, 0, labels[0].start) is not None
    return _BETWEEN.fullmatch(text) is not None


def renamed(example: Example, to: Mapping[int, int]) -> Example | None:
    """The sample with every place in its words renamed; None where that cannot be done with certainty.

    ``to``: place → place, for every image. A label right before its image ("Image 1: <image>") stays: it names what
    stands there. The system turn stays as well.
    """
    n = len(example.images)
    turns = list(example.turns)
    for t in _texts(example.turns, len(example.images)):
        is_answer = turns[t.turn].role == "assistant"
        if _is_vague(t.text, [*t.found, *t.labels], is_answer=is_answer) or any(r.place not in to for r in t.found):
            return None
        if is_answer and _may_be_places(t.question, t.text, n):
            return None
        parts = list(turns[t.turn].parts)
        parts[t.part] = _rewrite(t.text, t.found, to, n)
        turns[t.turn] = replace(turns[t.turn], parts=tuple(parts))
    question = _said(example.turns)
    answers: list[str] = []
    for answer in example.answers:
        found = _in_answer(question, answer, n)
        if any(r.place not in to for r in found):
            return None
        answers.append(_rewrite(answer, found, to, n))
    return replace(example, turns=tuple(turns), answers=tuple(answers))


def _texts(turns: Sequence[Turn], n: int) -> Iterator[_Text]:
    """What user and assistant say about n images, in order."""
    question = ""
    for t, turn in enumerate(turns):
        if turn.role == "system":
            continue
        for p, text in enumerate(turn.parts):
            if not isinstance(text, str):
                continue
            if turn.role == "assistant":
                yield _Text(t, p, text, _in_answer(question, text, n), [], question)
            else:
                following = turn.parts[p + 1] if p + 1 < len(turn.parts) else None
                found: list[Reference] = []
                labels: list[Reference] = []
                for r in references(text, n):
                    (labels if _is_label(text, r, following) else found).append(r)
                yield _Text(t, p, text, found, labels, question)
        if turn.role == "user":
            question = turn.text


def _in_answer(question: str, answer: str, n: int) -> list[Reference]:
    whole = answer_place(question, answer, n)
    return references(answer, n) if whole is None else [whole]


def _said(turns: Sequence[Turn]) -> str:
    """What the user said last before the last turn."""
    return next((t.text for t in reversed(turns[:-1]) if t.role == "user"), "")


def _is_label(text: str, r: Reference, following: Part | None) -> bool:
    """Whether it stands right before the image that it names."""
    return isinstance(following, ImageSlot) and following.index + 1 == r.place and bool(_LABEL.fullmatch(text, r.stop))


def _rewrite(text: str, found: Sequence[Reference], to: Mapping[int, int], n: int) -> str:
    return _replaced(text, [(r, _say(text[r.start : r.stop], r.style, to[r.place], n)) for r in found])


def _replaced(text: str, new: Iterable[tuple[Reference, str]]) -> str:
    """The text with each of these references said so."""
    out: list[str] = []
    done = 0
    for r, said in sorted(new, key=lambda pair: pair[0].start):
        out += [text[done : r.start], said]
        done = r.stop
    return "".join((*out, text[done:]))
