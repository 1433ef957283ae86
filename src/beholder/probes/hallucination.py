"""Objects that a caption names and the reference does not: CHAIR (Rohrbach et al. 2018) over a list of objects.

An `ObjectList` finds listed objects in text by word, plural and multi-word synonym. Where the official code takes the
objects of a picture from COCO's segmentation masks and five captions, the references given are all there is here: an
object that is in the picture and that no reference names counts as not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from beholder.evidence import Condition, Measurement
from beholder.probes import bootstrap, measurement, share
from beholder.probes.caption_metrics import tokenize
from beholder.types import UserError

if TYPE_CHECKING:
    from beholder.probes.written import Written

NOT_AN_OBJECT = "-"
"""Name of the list's line of phrases that hold a listed word and mean something else (``train track``)."""

COLOUR_WORDS: dict[str, str] = {
    "black": "black", "white": "white", "red": "red", "green": "green", "yellow": "yellow", "blue": "blue",
    "brown": "brown", "orange": "orange", "pink": "pink", "purple": "purple", "grey": "grey", "gray": "grey",
    "teal": "teal",
}  # fmt: skip
"""The eleven basic colour terms (Berlin & Kay 1969) and teal, as they are spelled -> the one name each counts as."""

_IRREGULAR = {
    "man": "men", "woman": "women", "child": "children", "person": "people", "mouse": "mice", "goose": "geese",
    "foot": "feet", "tooth": "teeth", "ox": "oxen", "sheep": "sheep", "deer": "deer", "fish": "fish",
    "knife": "knives", "calf": "calves", "loaf": "loaves", "leaf": "leaves", "shelf": "shelves", "wolf": "wolves",
    "half": "halves", "scarf": "scarves", "thief": "thieves", "wife": "wives",
}  # fmt: skip


@dataclass(frozen=True)
class ObjectList:
    """Listed objects and every spelling they are found by."""

    forms: Mapping[str, str]
    """Words of a spelling, lower-case, joined by single spaces -> the object's name (`NOT_AN_OBJECT`: found, not told).
    """
    source: str = ""
    """Where the list comes from, for caveats and error messages."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The objects, in the order of the list."""
        return tuple(dict.fromkeys(name for name in self.forms.values() if name != NOT_AN_OBJECT))

    @cached_property
    def _longest(self) -> int:
        return max((form.count(" ") + 1 for form in self.forms), default=0)

    def find(self, text: str) -> list[str]:
        """Name of every mention, in the order of the text; an object that is named twice comes twice."""
        return [name for _, _, name in self.mentions(words(text))]

    def mentions(self, tokens: Sequence[str]) -> list[tuple[int, int, str]]:
        """``(start, stop, name)`` of every mention in `words` of a text; the longest spelling wins, from the left.

        A colour word directly before another object describes it: "an orange cat" names a cat and no orange.
        """
        found: list[tuple[int, int, str]] = []
        i = 0
        while i < len(tokens):
            for stop in range(min(i + self._longest, len(tokens)), i, -1):
                name = self.forms.get(" ".join(tokens[i:stop]).replace("-", " "))
                if name is not None:
                    found.append((i, stop, name))
                    i = stop
                    break
            else:
                i += 1
        kept: list[tuple[int, int, str]] = []
        for k, (start, stop, name) in enumerate(found):
            after = found[k + 1] if k + 1 < len(found) else None
            describes = after is not None and after[0] == stop and tokens[after[0]] not in COLOUR_WORDS
            if name != NOT_AN_OBJECT and not (describes and tokens[start] in COLOUR_WORDS and stop == start + 1):
                kept.append((start, stop, name))
        return kept


def words(text: str) -> list[str]:
    """Tokens of the caption metrics, with ``cat/dog`` taken apart. Hyphenated words stay whole ("cat-shaped")."""
    return tokenize(text.replace("/", " "))


def plural(form: str) -> str:
    """The English plural of a noun or of the last word of several."""
    head, _, last = form.rpartition(" ")
    if last in _IRREGULAR:
        many = _IRREGULAR[last]
    elif re.search(r"(?<!hu)(?:wo)?man$", last):  # policeman, firewoman; not human
        many = last[:-3] + "men"
    elif re.search(r"[^aeiou]y$", last):
        many = last[:-1] + "ies"
    elif re.search(r"(s|x|z|ch|sh|[^aeiou]o)$", last):
        many = last + "es"
    else:
        many = last + "s"
    return f"{head} {many}" if head else many


def load_objects(path: str | Path | None = None) -> ObjectList:
    """The objects of a text file; None: COCO's 80.

    One ``name: synonym, synonym`` a line (without synonyms: ``name``), ``#`` starts a comment. Plurals are made. The
    name ``-`` takes phrases that hold a listed word and mean none of the objects (``-: train track``). Raises
    UserError with the line number for a line that is none of this, and for a spelling that two objects claim.
    """
    if path is None:
        where = "COCO's 80 objects"
        text = resources.files("beholder.probes").joinpath("coco_objects.txt").read_text("utf-8")
    else:
        where = str(path)
        try:
            text = Path(path).read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            reason = "it is not UTF-8 text" if isinstance(e, UnicodeDecodeError) else e.strerror or str(e)
            raise UserError(
                f"{where}: the object list cannot be read: {reason}; eval.object_list takes a text file with one "
                "'name: synonym, synonym' a line"
            ) from e
    return parse_objects(text, where)


def parse_objects(text: str, where: str) -> ObjectList:
    """`load_objects` of the file's text; ``where`` names it in errors."""
    forms: dict[str, str] = {}
    claimed: dict[str, int] = {}
    plurals: dict[str, str] = {}
    lines_of: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        at = f"{where}: line {number}: {line!r}"
        name, colon, rest = line.partition(":")
        name = " ".join(name.split())
        if not name or (not colon and "," in name):
            raise UserError(f"{at} is not 'name: synonym, synonym' (without synonyms: 'name')")
        if name in lines_of:
            raise UserError(f"{at}: {name!r} has a line already (line {lines_of[name]}); put the synonyms together")
        lines_of[name] = number
        spellings = [s.strip() for s in rest.split(",")]
        if any(not s for s in spellings) and rest.strip():
            raise UserError(f"{at} has an empty synonym; take the extra comma out")
        spellings = [s for s in spellings if s]
        for spelling in spellings if name == NOT_AN_OBJECT else [name, *spellings]:
            form = " ".join(words(spelling)).replace("-", " ")
            if not form:
                raise UserError(f"{at}: {spelling!r} has no word that could be found in a caption")
            if forms.get(form, name) != name:
                raise UserError(
                    f"{at}: {spelling!r} belongs to {forms[form]!r} already (line {claimed[form]}); a spelling can "
                    "only mean one object"
                )
            forms[form], claimed[form] = name, number
            plurals.setdefault(plural(form), name)
    if not any(name != NOT_AN_OBJECT for name in forms.values()):
        raise UserError(f"{where}: there is no object in it; write one 'name: synonym, synonym' a line")
    return ObjectList({**plurals, **forms}, where)  # a spelling that was given goes before one that was made


# ---------------------------------------------------------------------------------------------------------------
# CHAIR


@dataclass(frozen=True, slots=True)
class ChairSums:
    """What CHAIR is made of, by caption: sums over captions, divided once."""

    mentions: np.ndarray
    """int64 [S]: listed objects that the caption mentions, repeats counted."""
    invented: np.ndarray
    """int64 [S]: those of them that no reference of the sample names."""
    grounded: np.ndarray
    """bool [S]: some reference of the sample names a listed object."""

    @property
    def i(self) -> float | None:
        """CHAIR-i: share of the mentions that no reference names; None when nothing is mentioned."""
        total = int(self.mentions.sum())
        return float(self.invented.sum() / total) if total else None


def chair(predictions: Sequence[str], references: Sequence[Sequence[str]], objects: ObjectList) -> ChairSums:
    """CHAIR sums of captions; ``references[k]`` are the reference texts of caption k."""
    assert len(predictions) == len(references), f"{len(predictions)} predictions for {len(references)} references"
    there = [{name for text in texts for name in objects.find(text)} for texts in references]
    said = [objects.find(prediction) for prediction in predictions]
    return ChairSums(
        mentions=np.array([len(names) for names in said], dtype=np.int64),
        invented=np.array([sum(n not in own for n in names) for names, own in zip(said, there, strict=True)], np.int64),
        grounded=np.array([bool(own) for own in there], dtype=bool),
    )


class ChairScore(NamedTuple):
    """What was measured, and a sentence for each condition that could not be."""

    measurements: list[Measurement]
    gaps: list[str]


def score_chair(records: Mapping[Condition, Sequence[Written]], objects: ObjectList, seed: int = 0) -> ChairScore:
    """``chair.s.<condition>`` and ``chair.i.<condition>``.

    CHAIR-s carries Wilson intervals, CHAIR-i bootstrap intervals over captions. Captions that mention no listed object
    at all give no number: a model that says nothing would have none invented. So do references that name none.
    """
    out: list[Measurement] = []
    gaps: list[str] = []
    for condition, rows in records.items():
        if not rows:
            gaps.append(f"CHAIR ({condition} image): not measured, there are no captions")
            continue
        sums = chair([r.prediction for r in rows], [[r.reference] for r in rows], objects)
        n, rate = len(rows), sums.i
        if rate is None or not sums.grounded.any():
            who = "captions mention" if rate is None else "references name"
            gaps.append(
                f"CHAIR ({condition} image): not measured, none of the {n} {who} an object of {objects.source}; "
                "eval.object_list takes a list that fits the data"
            )
            continue
        caveat = (
            f"objects of {objects.source}; {int(sums.grounded.sum())} of {n} references name one, and what a reference "
            "leaves out counts as not there"
        )
        wrong, mentions = int((sums.invented > 0).sum()), int(sums.mentions.sum())
        ci = bootstrap(lambda k, x=sums: x.invented[k].sum(1) / x.mentions[k].sum(1), n, seed)
        told = f"share of captions that name an object the reference does not; {caveat}"
        out.append(share(f"chair.s.{condition}", wrong, n, caveat=told))
        told = f"share of {mentions} object mentions that the reference lacks; {caveat}"
        out.append(measurement(f"chair.i.{condition}", rate, ci, n=n, caveat=told))
    return ChairScore(out, gaps)
