"""Monitors: what a run is watched with, so that it is stopped before it forgets or no longer looks (S4-2).

Every score here is a function of texts, labels or losses alone; what is shown to the model is `stages.monitors`'.

- **irrelevant.pass**: answers about unrelated images that say so, by a phrase or a regular expression.
- **ood.hallucination**: assertions about images unlike the training's that are not so, over all that were asked for.
  A description asserts what is not so when it names an object of the list that is not among what the image shows
  (CHAIR-s, Rohrbach et al. 2018, arXiv:1809.02156), or is word for word an answer of the training data that names
  nothing the image shows. A polled answer does when it says yes to an object that is not there (POPE, Li et al. 2023,
  arXiv:2305.10355); the objects are those the training texts name, which a model that does not look sees everywhere.
- **ood.blind**: descriptions that are empty, near-empty (a single letter or ideograph), or the same, up to case,
  spacing and closing punctuation, as that of an image which shows something else.
- **sane.captions**: descriptions, in any language, that are not empty, do not loop, come to an end, are in the script
  that was asked for, and are not the text that most images get.
- **jitter.consistency**: answers that stay near-identical (at most one word in five differs) when a little is cut off
  the edges of the image, which decides nothing about it.
- **gap.generalisation**: held-out loss minus the loss on as many training samples, measured the same way.
"""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from beholder.config import NEGATION, folded, in_script
from beholder.evidence import Measurement
from beholder.probes import bootstrap, measurement, ratio_of_sums, share, strata
from beholder.probes.caption_metrics import WITHOUT_SPACES, normalize, tokenize, units
from beholder.probes.collapse import loops, nearly
from beholder.probes.hallucination import ObjectList, plural
from beholder.probes.loss import SampleLoss
from beholder.probes.wrong_images import reassign
from beholder.types import UserError

NEAR_EMPTY = 1
"""Letters, digits or ideographs of a text that says next to nothing."""
SAME_FOR_ALL = 0.5
"""Share of the images that get one text from which it is the same for all of them."""
MIN_ALIKE = 4
"""Fewer descriptions are not compared with one another."""
NOTHING_SHOWN = (
    "no record says what its image shows, so nothing that is said of one is known to be invented; give each that is "
    'known its labels, "shows": ["chat", "screenshot"], in a record file (docs/data.md, "Monitors")'
)
CROPS = ((0.0, 0.0), (1.0, 1.0), (0.5, 0.5))
"""Which corner is kept, as shares of what is cut off: left and top of each crop."""
CROPPED_SIDE = 0.94
"""Of either side, what a crop keeps: 12 % of the area is cut off."""


# ---------------------------------------------------------------------------------------------------------------
# Irrelevant images


@dataclass(frozen=True)
class Phrase:
    """What says that an image has nothing to do with the task."""

    phrase: str
    pattern: str | None = None
    negation: str | None = NEGATION
    """What takes the phrase back, with {phrase} in its place; a pattern says that itself."""

    def said_in(self, text: str) -> bool:
        """Whether the text says so; width of characters (NFKC), case and spacing do not count for a phrase, and what
        takes it back does."""
        if self.pattern is not None:
            return re.search(self.pattern, text) is not None
        phrase, whole = folded(self.phrase), folded(text)
        if phrase in whole and self.negation is not None:
            whole = re.sub(self.negation.replace("{phrase}", re.escape(phrase)), "", whole, flags=re.IGNORECASE)
        return phrase in whole

    @property
    def words(self) -> str:
        return f"/{self.pattern}/" if self.pattern is not None else f"“{self.phrase}”"


def irrelevant(outputs: Sequence[str], kinds: Sequence[str], phrase: Phrase) -> list[Measurement]:
    """``irrelevant.pass`` over all images and by kind of image; Wilson intervals."""
    passed = [phrase.said_in(text) for text in outputs]
    caveat = f"answers that say {phrase.words}"
    return _shares("irrelevant.pass", passed, kinds, caveat)


# ---------------------------------------------------------------------------------------------------------------
# Images unlike the training's


@dataclass(frozen=True)
class Trained:
    """What the training texts say: what a model that has stopped looking would say of any image."""

    answers: frozenset[str] = frozenset()
    """Whole answers as `normalize` makes them, without a plain yes or no, which asserts nothing by itself."""
    objects: tuple[str, ...] = ()
    """Listed objects that they name, most frequent first."""


def trained(answers: Sequence[str], texts: Sequence[str], objects: ObjectList) -> Trained:
    """``answers``: of the training samples; ``texts``: all that is said in them, by anyone."""
    said = {normalize(a) for a in answers} - {"", "yes", "no"}
    named = Counter(name for text in texts for name in set(objects.find(text)))
    return Trained(frozenset(said), tuple(sorted(named, key=lambda n: (-named[n], n))))


def invents(text: str, shows: Sequence[str], known: Trained, objects: ObjectList, phrase: Phrase | None) -> str:
    """What the text asserts that is not so, in words; empty when nothing."""
    if phrase is not None and phrase.said_in(text):
        return ""
    there = {name for label in shows for name in objects.find(label)}
    absent = [name for name in objects.find(text) if name not in there]
    if absent:
        return f"names {absent[0]}"
    if normalize(text) in known.answers and not any(mentions(text, label) for label in shows):
        return "is an answer of the training data"
    return ""


def mentions(text: str, label: str) -> bool:
    """Whether the text has the label: as whole words, in the plural too; without spaces between them, as written."""
    if WITHOUT_SPACES.search(label):
        return folded(label) in folded(text)
    words = tokenize(text)
    for form in (label, plural(label)):
        own = tokenize(form)
        if own and any(words[i : i + len(own)] == own for i in range(len(words) - len(own) + 1)):
            return True
    return False


def asked_about(id: str, shows: Sequence[str], known: Trained, objects: ObjectList) -> str | None:
    """The object an image is polled about: one that it does not show, of those that the training texts name, else of
    the list's; which of them, its id decides. None where there is none, or what it shows is not known."""
    if not shows:
        return None
    there = {name for label in shows for name in objects.find(label)} | set(shows)
    absent = [name for name in (known.objects or objects.names) if name not in there]
    return absent[zlib.crc32(id.encode()) % len(absent)] if absent else None


@dataclass(frozen=True)
class Described:
    """Images with what the model wrote about them."""

    ids: Sequence[str]
    shows: Sequence[Sequence[str]]
    """What each shows; empty: not known."""
    kinds: Sequence[str]
    texts: Sequence[str]
    finished: Sequence[bool]
    polled: Sequence[bool | None] = field(default_factory=tuple)
    """Whether it said yes to what is not there; None: not asked. Empty: none was asked."""


def hallucination(
    d: Described, known: Trained, objects: ObjectList, phrase: Phrase | None, seed: int = 0
) -> tuple[list[Measurement], list[str]]:
    """``ood.hallucination`` over all assertions, overall and by kind of image, with ``ood.invents`` (descriptions
    alone) and ``ood.says_yes`` (polled answers alone); and for each image what it asserts that is not so.

    Images of which it is not known what they show are left out: what is said of them may be so. The interval of the
    whole resamples images, so that what is said of one image stays together. Raises `UserError` where none is known.
    """
    told = [i for i, shows in enumerate(d.shows) if shows]
    if not told:
        raise UserError(NOTHING_SHOWN)
    found = [invents(d.texts[i], d.shows[i], known, objects, phrase) for i in told]
    polled = [d.polled[i] for i in told] if d.polled else [None] * len(told)
    wrong = np.array([bool(f) + (p is True) for f, p in zip(found, polled, strict=True)], dtype=np.float64)
    asked = np.array([1 + (p is not None) for p in polled], dtype=np.float64)
    about = f"{int(wrong.sum())} of {int(asked.sum())} descriptions and polled answers; objects of {objects.source}"
    if unknown := len(d.shows) - len(told):
        about += f"; {unknown} images are left out, what they show is not known"
    out: list[Measurement] = []
    for kind, k in _parts([d.kinds[i] for i in told]):
        value, ci = ratio_of_sums(wrong[k], asked[k], seed)
        out.append(
            measurement(
                "ood.hallucination", value, ci, n=len(k), stratum=kind, by=None if kind is None else "image",
                caveat=about if kind is None else None,
            )
        )  # fmt: skip
    out.append(share("ood.invents", sum(map(bool, found)), len(told), caveat="descriptions alone"))
    answered = [p for p in polled if p is not None]
    if answered:
        out.append(share("ood.says_yes", sum(answered), len(answered), caveat="polled about an object that is absent"))
    words = {
        i: "; ".join(filter(None, [f, "says yes to what is absent" if p else ""]))
        for i, f, p in zip(told, found, polled, strict=True)
    }
    return out, [words.get(i, "") for i in range(len(d.shows))]


def blind(d: Described, phrase: Phrase | None, seed: int = 0) -> tuple[list[Measurement], list[str]]:
    """``ood.blind``, and for each image how it is: ``empty``, ``near-empty``, ``same as for another image``, or not.

    Each image is compared with one that shows something else, drawn once by ``seed``; images of which it is not known
    are compared with any other. What says that the image is irrelevant may be the same for all.
    """
    texts = [normalize(t) for t in d.texts]
    labels = [tuple(sorted(s)) or (f"#{i}",) for i, s in enumerate(d.shows)]
    try:
        pick = reassign(len(texts), lambda place, item: labels[place] != labels[item], seed)
    except UserError:  # they all show the same: nothing can be compared
        pick = None
    told: list[str] = []
    for i, text in enumerate(d.texts):
        letters = len(_letters(text))
        how = "empty" if not letters else "near-empty" if letters <= NEAR_EMPTY else ""
        excused = phrase is not None and phrase.said_in(text)
        if not how and pick is not None and not excused and texts[i] == texts[pick[i]]:
            how = "same as for another image"
        told.append(how)
    counts = Counter(filter(None, told))
    caveat = ", ".join(f"{n} {how}" for how, n in sorted(counts.items())) or "none was seen"
    if pick is None:
        caveat += "; all images show the same, so none was compared with another"
    return [share("ood.blind", sum(map(bool, told)), len(told), caveat=caveat)], told


def sanity(d: Described, script: str | None, phrase: Phrase | None) -> tuple[list[Measurement], list[str]]:
    """``sane.captions``, and for each description what is wrong with it; empty: nothing."""
    texts = [normalize(t) for t in d.texts]
    counts = Counter(texts)
    different = len({tuple(sorted(s)) for s in d.shows if s}) != 1
    told: list[str] = []
    for raw, text, ended in zip(d.texts, texts, d.finished, strict=True):
        why = insane(raw, ended, script)
        excused = phrase is not None and phrase.said_in(raw)
        if not why and different and not excused and len(texts) >= MIN_ALIKE:
            why = "the same for most images" if counts[text] > SAME_FOR_ALL * len(texts) else ""
        told.append(why)
    reasons = Counter(filter(None, told))
    caveat = ", ".join(f"{n} {why}" for why, n in sorted(reasons.items())) or "all are"
    return [share("sane.captions", sum(not w for w in told), len(told), caveat=caveat)], told


def insane(text: str, finished: bool, script: str | None = None) -> str:
    """What is wrong with one description, in any language; empty: nothing."""
    letters = _letters(text)
    if not letters:
        return "empty"
    if loops(text):
        return "loops"
    if not finished:
        return "does not end"
    if script is not None:
        alphabetic = [c for c in letters if c.isalpha()]
        own = sum(in_script(c, script) for c in alphabetic)
        if 2 * own < len(alphabetic) or not alphabetic:
            return f"not in {script} script"
    return ""


# ---------------------------------------------------------------------------------------------------------------
# The same image, a little less of it; the same loss, on training samples


def crop_box(width: int, height: int, keep: tuple[float, float]) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a crop of `CROPS`."""
    cut_x, cut_y = width - max(1, round(width * CROPPED_SIDE)), height - max(1, round(height * CROPPED_SIDE))
    left, top = round(cut_x * keep[0]), round(cut_y * keep[1])
    return left, top, left + width - cut_x, top + height - cut_y


def near_identical(a: str, b: str) -> bool:
    """Whether two texts have the same words in any order but for one in five (of fewer than five: none); characters
    stand for words in scripts without spaces."""
    if normalize(a) == normalize(b):
        return True
    one, two = Counter(units(a)), Counter(units(b))
    return bool(nearly(max(one.total(), two.total()), (one & two).total()))


def consistency(own: Sequence[str], cropped: Sequence[Sequence[str]], seed: int = 0) -> list[Measurement]:
    """``jitter.consistency``: of all pairs of an answer and one under a crop, those that are near-identical. The
    interval resamples samples. ``cropped``: a list a crop, each aligned with ``own``."""
    same = np.array([[near_identical(a, b) for a, b in zip(own, texts, strict=True)] for texts in cropped])
    hits = same.sum(0).astype(np.float64)
    value, ci = ratio_of_sums(hits, np.full(len(own), float(len(cropped))), seed)
    caveat = f"answers near-identical under {len(cropped)} crops that keep {CROPPED_SIDE:.0%} of either side"
    return [measurement("jitter.consistency", value, ci, n=len(own), caveat=caveat)]


def gap(held_out: Sequence[SampleLoss], training: Sequence[SampleLoss], seed: int = 0) -> list[Measurement]:
    """``gap.generalisation``: held-out minus training loss, nats per token; ``gap.training_loss`` beside it.

    As many samples of either. Both are drawn anew in each resample; which is paired with which means nothing.
    """
    n = min(len(held_out), len(training))
    (a, x), (b, y) = (
        (np.array([r.nll for r in rows[:n]]), np.array([float(r.tokens) for r in rows[:n]]))
        for rows in (held_out, training)
    )
    loss, ci = ratio_of_sums(b, y, seed)
    value = float(a.sum() / x.sum()) - loss
    interval = bootstrap(lambda k: a[k].sum(1) / x[k].sum(1) - b[k].sum(1) / y[k].sum(1), n, seed)
    caveat = "held-out minus training samples, measured the same way, without dropout; the first that are trained on"
    return [
        measurement("gap.generalisation", value, interval, n=n, caveat=caveat),
        measurement("gap.training_loss", loss, ci, n=n, caveat="the training samples of the gap"),
    ]


CROSSED = ("own.trained", "ood.trained", "own.plain", "ood.plain")
"""Image and text: the sample's own or an unlike one, what it was trained to say or a passage of plain text."""


def crossed(
    on: Mapping[str, Sequence[SampleLoss]], off: Mapping[str, Sequence[SampleLoss]], seed: int = 0
) -> list[Measurement]:
    """``cross.<image>.<text>``: the loss with the adapters over that without them, on the same samples.

    Shifts of the image, of the text and of both are told apart (FRAMES-VQA, arXiv:2505.21755). Below 1 on own images
    and trained texts is what was learned; below 1 on trained texts with an unlike image was learned by heart, without
    looking; above 1 on plain text is forgetting, and where the image is unlike as well it is forgetting on both sides.
    """
    out: list[Measurement] = []
    for cell in CROSSED:
        if not on[cell]:
            continue
        top, bottom = (np.array([x.nll for x in rows[cell]]) for rows in (on, off))
        tokens = sum(x.tokens for x in on[cell])
        value, ci = ratio_of_sums(top, bottom, seed)
        out.append(measurement(f"cross.{cell}", value, ci, n=len(top), caveat=f"adapters on over off, {tokens} tokens"))
    return out


# ---------------------------------------------------------------------------------------------------------------
# Texts


def says(pattern: str, text: str) -> bool:
    """Whether the text begins so; width of characters and case do not count."""
    return re.match(pattern, unicodedata.normalize("NFKC", text), re.IGNORECASE) is not None


def _letters(text: str) -> str:
    """Letters, ideographs and digits of any script."""
    return "".join(c for c in text if unicodedata.category(c)[0] in "LN")


def _parts(kinds: Sequence[str]) -> list[tuple[str | None, list[int]]]:
    """All, then each kind of image where there are several."""
    named = [(name, k.tolist()) for _, name, k in strata.parts([kind or None for kind in kinds], "image")]
    return [(None, list(range(len(kinds)))), *named]


def _shares(name: str, hits: Sequence[bool], kinds: Sequence[str], caveat: str) -> list[Measurement]:
    return [
        share(
            name, sum(hits[i] for i in k), len(k), stratum=kind, by=None if kind is None else "image",
            caveat=caveat if kind is None else None,
        )
        for kind, k in _parts(kinds)
    ]  # fmt: skip
