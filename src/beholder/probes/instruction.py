"""How well an answer follows its instruction: 0.4 relevance + 0.3 completeness + 0.3 coherence, from texts alone.

No model is asked, so the score is the same on every machine and cannot be talked into anything; for the same reason it
knows words and not meanings. It does not know synonyms ("cycling" for "riding a bike"), does not see that words are in
an order that says nothing, and gives 0.3 for fluent sentences about something else. Read it beside the score without
the image, and for answers of one word read the accuracy, which it then nearly is.

**Units.** A text is a set of units: words in lower case without inflection, numbers as digits, characters in scripts
without spaces, one unit for every word that negates ("not", "nicht", 没, "0") and one for a yes that the text opens
with. Words that are in every sentence (articles, pronouns, forms of "be"; English, Spanish, French, German, Chinese)
are left out unless a reference has no others; of other languages every word counts.

**Weights.** A unit of the reference weighs 1, a number, a negation and an opening yes 2, and what the instruction has
said already 0.1, unless it is what the instruction lets choose between ("red *or* green"). An instruction that the
answer repeats word for word is not part of the answer.

- **Relevance**: does it speak of what reference and instruction speak of? `TOUCHED` of the reference's weight is enough
  to be on the subject; then half of the relevance is the share of what it says that the reference says too. What the
  instruction said counts neither for nor against it.
- **Completeness**: the share that it says of the weight that the reference adds to the instruction. 0 when it says the
  opposite (yes for no, "is" for "is not"); half where a number of the reference is missing and another stands there, or
  where both are said of what was to be chosen between; less where fewer things are listed than were asked for, where
  one word was asked for and a sentence came, and where it was cut off.
- **Coherence**: 0 when it is empty or ends in a repetition (`collapse.loops`); less by what share of it repeats itself,
  where it contradicts itself, where it was cut off, and by what is no readable word. What the reference does as well
  (repeat, have symbols) is not held against it.

With several references the one counts that gives the highest score. A reference itself scores 1.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np

from beholder.evidence import Condition, Measurement
from beholder.probes import joined, mean, measurement
from beholder.probes.answers import SHORT_WORDS, references_of
from beholder.probes.caption_metrics import exact_match, ngrams, units
from beholder.probes.collapse import loops
from beholder.probes.strata import MIN_SAMPLES, parts, questions
from beholder.types import Example

if TYPE_CHECKING:
    from beholder.probes.written import Written

WEIGHTS = {"relevance": 0.4, "completeness": 0.3, "coherence": 0.3}
TOUCHED = 0.5
"""Share of a reference's weight from which an answer is on its subject: the rest is completeness."""
GIVEN, DECISIVE = 0.1, 2.0
"""Weights of what the instruction has said already, and of a number, a negation, a yes."""
CUT = 0.75
"""What an answer keeps of completeness and of coherence when it was cut off."""
UNASKED = 0.8
"""What is kept of completeness by a sentence where one word was asked for."""
REPEATED = 0.2
"""Share of an answer that may repeat itself ("a cat on the left and a dog on the left")."""
READABLE = 0.5
"""Share of an answer's characters that are to be letters or digits."""
LONGEST_WORD = 30

NOT, YES = "¬", "✓"
"""Units: a negation, an opening yes."""

_OPENING_YES = re.compile(
    r"\W*(?:(?:yes|yeah|yep|sí|si|sim|oui|ja|да|نعم)\b|(?:是的|是|对|對|有|会|會|能|はい|네|예)(?=$|\W))"
)
_OPENING_NO = re.compile(r"\W*(?:(?:no|nope|non|não|nein|нет|لا)\b|(?:不是|不|没有|沒有|没|沒|否|いいえ|아니))")
_NEGATIONS = frozenset(
    """
    no not n't never cannot without nobody nothing none neither nor nunca jamás tampoco ningún ninguna non pas jamais
    aucun aucune rien nicht kein keine keinen nie niemand não не нет 不 没 沒 无 無
    """.split()  # noqa: SIM905
)
_FUNCTION = frozenset(
    """
    a an the this that these those it its he she they him her his their them we you i your our my is are was were be
    been being am has have had do does did will would can could may might shall should there here in on at of to with
    by for from as and or but so if than then also too very just some any which who whom whose what where when why how
    because while 's 're 've 'll 'd 'm
    el la los las un una unos unas de del al en y o que es son está están hay su sus con por para se lo le qué cuál cómo
    dónde le les du des et ou est sont il elle ils elles dans sur avec pour qui ce cette ces au aux à
    der die das den dem ein eine einen einem einer und oder ist sind es er sie im auf mit von zu zum zur am welche
    welcher welches was wo wie
    的 了 着 是 在 有 一 个 個 这 這 那 它 他 她 们 們 和 与 與 吗 嗎 呢 吧 啊 里 裡 上 什 么 麼 请 請
    """.split()  # noqa: SIM905
)
_OR = frozenset("or oder ou o 还 還".split())  # noqa: SIM905
_NUMBERS = {
    word: str(number)
    for number, words in {
        0: "zero", 1: "one", 2: "two dos deux zwei 二 两 兩", 3: "three tres trois drei 三",
        4: "four cuatro quatre vier 四", 5: "five cinco cinq fünf 五", 6: "six seis sechs 六",
        7: "seven siete sept sieben 七", 8: "eight ocho huit acht 八", 9: "nine nueve neuf neun 九",
        10: "ten diez dix zehn 十", 11: "eleven", 12: "twelve", 13: "thirteen", 14: "fourteen", 15: "fifteen",
        16: "sixteen", 17: "seventeen", 18: "eighteen", 19: "nineteen", 20: "twenty", 30: "thirty", 40: "forty",
        50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety",
    }.items()
    for word in words.split()
}  # fmt: skip
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,15})?")
_IRREGULAR = {"men": "man", "women": "woman", "children": "child", "people": "person", "feet": "foot", "mice": "mouse"}
_ENDING = re.compile(r"(?<=\w{3})(?:ing|ed|es|s)$")
_LAST_VOWEL = re.compile(r"(?<=\w{3})[aeiouy]$")
_DOUBLED = re.compile(r"([^\W\daeiou_])\1$")

_SENTENCE_END = re.compile(r"(?<!\d)\.(?!\w)|[!?;。！？；\n]+|(?<=\d)\.(?=\s|$)")
_ITEM_END = re.compile(r"[,、，\n]|\b(?:and|und|y|et|plus)\b|和|及")
_LIST = re.compile(
    r"\b(?:list|name|give|mention|enumerate|nombra|enumera|cite|nenne)\W+(?:me\W+|at least\W+|the\W+)*(\w+)"
    r"|(?:列出|说出|說出|写出|列举)(.)"
)
_ONE_WORD = re.compile(r"\b(?:single|one) word\b|\bin a word\b|\buna (?:sola )?palabra\b|\beinem wort\b|一个词")
_ENUMERATED = re.compile(r"(?m)^[^\S\n]*(?:\d{1,2}[.)]|[-*•])\s+")
_HANGING = re.compile(r"[,，、:：(\[—–-]$")
_HANGING_WORDS = frozenset("a an the and or of el la los las un una y le les des et der ein eine und".split())  # noqa: SIM905


@dataclass(frozen=True, slots=True)
class Parts:
    """The three parts of a score, each in 0…1."""

    relevance: float
    completeness: float
    coherence: float

    @property
    def score(self) -> float:
        """Weighted by `WEIGHTS`; 0…1."""
        return min(1.0, sum(weight * getattr(self, name) for name, weight in WEIGHTS.items()))


def judge(instruction: str, references: Sequence[str], answer: str, finished: bool = True) -> Parts:
    """The parts of the score of one answer, as the module defines them. ``finished``: it came to an end by itself."""
    assert references, "an answer is judged against at least one reference"
    distinct = list(dict.fromkeys(references))
    if any(exact_match(answer, r) for r in distinct):
        return Parts(1.0, 1.0, 1.0)
    cut = not finished or _hangs(answer)
    coherence = _coherence(answer, distinct, cut)
    judged = (Parts(*_content(instruction, r, answer, cut), coherence) for r in distinct)
    return max(judged, key=lambda p: p.score)


# ---------------------------------------------------------------------------------------------------------------
# Units


@dataclass(frozen=True, slots=True)
class _Said:
    """A text as units."""

    units: frozenset[str]
    """All that are content."""
    light: frozenset[str]
    """Those that are in every sentence."""
    polarity: bool | None
    """What it opens with: yes, no, or neither."""


@lru_cache(maxsize=1 << 14)
def _unit(word: str) -> str:
    """A word as it is compared: numbers as digits, without inflection where that is easily told."""
    if word in _NEGATIONS:
        return NOT
    number = _NUMBERS.get(word, word.replace(",", ""))
    if _is_number(number):
        return f"{float(number):.15g}" if float(number) else NOT
    word = _IRREGULAR.get(word, word)
    if word in _FUNCTION or not word.isalpha() or len(word) < 4:
        return word
    return _LAST_VOWEL.sub("", _DOUBLED.sub(r"\1", _ENDING.sub("", word)))


def _words(text: str) -> list[str]:
    """Words and characters as they are written, and emoji; without what numbers or marks the items of a list."""
    return [
        u for u in units(_ENUMERATED.sub("", text)) if any(c.isalnum() or unicodedata.category(c) == "So" for c in u)
    ]


def _content_of(words: Sequence[str]) -> list[str]:
    return [_unit(w) for w in words if w not in _FUNCTION or w in _NUMBERS]


@lru_cache(maxsize=1 << 12)
def _said(text: str, without: tuple[str, ...] = ()) -> _Said:
    """``without``: words that are left out where they stand one after another."""
    words = _cut_out(_words(text), without)
    low = unicodedata.normalize("NFC", text).lower()
    content = set(_content_of(words))
    polarity = None
    if opening := _OPENING_YES.match(low):
        content -= {_unit(w) for w in _words(opening[0])}
        content.add(YES)
        polarity = True
    elif _OPENING_NO.match(low):
        content.add(NOT)
        polarity = False
    return _Said(frozenset(content), frozenset(w for w in words if w in _FUNCTION), polarity)


def _cut_out(words: list[str], without: tuple[str, ...]) -> list[str]:
    n = len(without)
    for k in range(len(words) - n + 1 if n else 0):
        if tuple(words[k : k + n]) == without:
            return words[:k] + words[k + n :]
    return words


def _is_number(unit: str) -> bool:
    return _NUMBER.fullmatch(unit) is not None


@lru_cache(maxsize=1 << 14)
def _asked(instruction: str) -> tuple[frozenset[str], frozenset[str]]:
    """What the instruction has said already, and what it lets choose between."""
    words = _words(instruction)
    choices: set[str] = set()
    for k, word in enumerate(words):
        if word in _OR:
            near = 1 if word.isascii() else 2  # characters
            before, after = _content_of(words[:k]), _content_of(words[k + 1 :])
            choices.update(before[-near:], after[:near])
    return frozenset(_content_of(words)) - choices, frozenset(choices)


# ---------------------------------------------------------------------------------------------------------------
# Relevance and completeness


def _content(instruction: str, reference: str, answer: str, cut: bool) -> tuple[float, float]:
    """(relevance, completeness) against one reference."""
    ref = _said(reference)
    asked = tuple(_words(instruction))
    repeated = asked if len(asked) > 2 and _cut_out(_words(reference), asked) == _words(reference) else ()
    own = _said(answer, repeated)
    given, choices = _asked(instruction)
    wanted, said = ref.units, own.units
    if not wanted:  # "it", "on them": then these count
        wanted, said = ref.light, own.light | own.units
    if not wanted or not said:
        return 0.0, 0.0

    def weight(unit: str) -> float:
        if unit in given:
            return GIVEN
        return DECISIVE if unit in (NOT, YES) or _is_number(unit) else 1.0

    opposite, said = _opposite(ref, own, wanted, said, given | choices)
    hits = sum(weight(u) for u in wanted & said)
    touched = hits / sum(map(weight, wanted)) / TOUCHED
    new = wanted - given or wanted
    recall = sum(weight(u) for u in new & said) / sum(map(weight, new))
    strange = len(said - wanted - given - {YES})
    relevance = min(1.0, touched) * (0.5 + 0.5 * (hits / (hits + strange) if hits else 0.0))
    if opposite:
        return relevance / 2, 0.0
    numbers, foreign = ({u for u in unit if _is_number(u)} for unit in (wanted, said - wanted - given))
    hedged = bool(said & choices - wanted) and NOT not in said  # "red or green"
    factor = 0.5 if hedged or (foreign and not numbers <= said) else 1.0
    factor *= CUT if cut else 1.0
    return relevance, recall * factor * _format(instruction, reference, answer)


def _opposite(
    ref: _Said, own: _Said, wanted: frozenset[str], said: frozenset[str], asked: frozenset[str]
) -> tuple[bool, frozenset[str]]:
    """Whether the answer says the opposite, and its units with the yes or no that it says without the word."""
    rest = wanted - {NOT, YES}
    if ref.polarity is None:  # the same statement, with and without a negation
        unsaid = NOT in wanted and NOT not in said
        added = NOT in said and NOT not in wanted and said <= wanted | asked | {NOT}
        return bool(rest) and rest <= said and (unsaid or added), said
    polarity, about = own.polarity, said & (wanted | asked) - {NOT}
    if polarity is None and NOT in said:
        if about or said == {NOT}:
            polarity = False
        else:  # "I do not know" is no no
            said -= {NOT}
    if polarity is None and (new := rest - asked) and new <= said:
        polarity = ref.polarity  # it says all else
    elif polarity is None and about and said <= wanted | asked:
        polarity = True  # it says what was asked about, as it stands
    if polarity is not None:
        said |= {YES if polarity else NOT}
    return polarity is not None and polarity != ref.polarity, said


def _format(instruction: str, reference: str, answer: str) -> float:
    """What is kept where so many things were asked for, or one word."""
    low = unicodedata.normalize("NFC", instruction).lower()
    kept = 1.0
    if (found := _LIST.search(low)) and _is_number(number := _unit(found[1] or found[2])):
        items = {frozenset(_content_of(_words(piece))) for s in _sentences(answer) for piece in _ITEM_END.split(s)}
        items = {frozenset(u for u in item if not _is_number(u)) for item in items} - {frozenset()}
        kept = min(1.0, len(items) / max(float(number), 1.0))
    if _ONE_WORD.search(low) and len(answer.split()) > max(SHORT_WORDS, len(reference.split())):
        kept *= UNASKED
    return kept


# ---------------------------------------------------------------------------------------------------------------
# Coherence


def _coherence(answer: str, references: Sequence[str], cut: bool) -> float:
    words = _words(answer)
    if not any(c.isalnum() for c in answer):
        return 0.0
    if loops(answer) and not any(map(loops, references)):
        return 0.0
    allowed = max(REPEATED, *map(_repeats, references))
    kept = 1.0 - max(0.0, _repeats(answer) - allowed) / (1.0 - allowed) if allowed < 1 else 1.0
    kept *= CUT if cut else 1.0
    kept *= 0.5 if _contradicts_itself(answer) else 1.0
    enough = min(READABLE, *map(_readable, references))
    readable = min(1.0, _readable(answer) / enough) if enough else 1.0
    return kept * readable if words else 0.0


def _sentences(text: str) -> list[str]:
    return [s for s in _SENTENCE_END.split(text) if s.strip()]


def _repeats(text: str) -> float:
    """Share of a text that it has said before: whole sentences, and runs of four words (eight characters)."""
    said = [tuple(_words(s)) for s in _sentences(text)]
    said = [s for s in said if len(s) > 1]
    total, again, seen = sum(map(len, said)), 0, set[tuple[str, ...]]()
    for s in said:
        again += len(s) * (s in seen)
        seen.add(s)
    words = _words(text)
    runs = ngrams(words, 8 if sum(len(w) == 1 for w in words) * 2 > len(words) else 4)
    return max(again / total if total else 0.0, 1 - len(runs) / runs.total() if runs else 0.0)


def _contradicts_itself(text: str) -> bool:
    """It opens one sentence with yes and another with no, or says the same with and without a negation."""
    said = [_said(s) for s in _sentences(text)]
    if {True, False} <= {s.polarity for s in said}:
        return True
    states: dict[frozenset[str], bool] = {}
    for s in said:
        statement = s.units - {NOT, YES}
        if statement and states.setdefault(statement, NOT in s.units) != (NOT in s.units):
            return True
    return False


def _readable(text: str) -> float:
    """Share of the characters that are letters or digits of words that are not too long for one; white space apart."""
    characters = "".join(text.split())
    words = [w for w in _words(text) if len(w) <= LONGEST_WORD]
    good = sum(unicodedata.category(c)[0] in "LNM" for w in words for c in w)
    return good / len(characters) if characters else 0.0


def _hangs(text: str) -> bool:
    """Whether it ends on a comma, a dash, an article, an "and": in the middle of a sentence."""
    text = text.strip()
    words = _words(text)
    return bool(_HANGING.search(text)) or (len(words) > 2 and words[-1] in _HANGING_WORDS and text[-1].isalpha())


# ---------------------------------------------------------------------------------------------------------------
# Measurements


def judge_all(
    instructions: Sequence[str],
    references: Sequence[Sequence[str]],
    answers: Sequence[str],
    finished: Sequence[bool] | None = None,
) -> dict[str, np.ndarray]:
    """``score``, ``relevance``, ``completeness`` and ``coherence`` of every answer, fp64 [n] each."""  # fmt: skip
    ended = [True] * len(answers) if finished is None else finished
    judged = [judge(*row) for row in zip(instructions, references, answers, ended, strict=True)]
    return {name: np.array([getattr(p, name) for p in judged], dtype=np.float64) for name in ("score", *WEIGHTS)}


def rule(references: Sequence[Sequence[str]]) -> str:
    """What the score is of these references, for a caveat."""
    short = sum(all(len(r.split()) <= SHORT_WORDS for r in given) for given in references)
    told = "by words, not by meaning; 0.3 of it is for any readable sentence"
    if short:
        told += (
            f"; {short} of {len(references)} references have at most {SHORT_WORDS} words, where it is nearly the "
            "accuracy"
        )
    return told


def score(
    examples: Sequence[Example],
    by: Mapping[Condition, Sequence[Written]],
    groups: Mapping[str, Sequence[str | None]],
    *,
    seed: int = 0,
) -> list[Measurement]:
    """``instruct.<score|relevance|completeness|coherence>.<condition>`` and ``instruct.gain.<condition>``.

    Gain is the score with the own image minus the one under another condition, paired by sample. For every stratum of
    ``groups`` (stratum of each example's last answer, or None) the scores, the gains, and the parts with the own image.
    ``by[condition][k]`` is what was written for ``examples[k]``. Intervals are bootstrapped over samples.
    """
    assert examples and "correct" in by, "instructions are scored with the own image"
    for condition, records in by.items():
        assert [r.id for r in records] == [e.id for e in examples], f"{condition}: answers to other instructions"
    asked, references = [instruction_of(e) for e in examples], [references_of(e) for e in examples]
    judged = {
        c: judge_all(asked, references, [r.prediction for r in own], [r.finished for r in own]) for c, own in by.items()
    }
    out: list[Measurement] = []
    for by_kind, stratum, k in _parts(len(examples), groups):
        few = f"only {len(k)} answers" if len(k) < MIN_SAMPLES else None
        add = partial(measurement, n=len(k), by=by_kind, stratum=stratum)
        told = joined(rule([references[i] for i in k]), few)
        for name in ("score", *WEIGHTS):
            for condition, own in judged.items():
                if name == "score" or condition == "correct" or stratum is None:
                    out.append(add(f"instruct.{name}.{condition}", *mean(own[name][k], seed), caveat=told))
        for condition, own in judged.items():
            if condition != "correct":
                gain = mean((judged["correct"]["score"] - own["score"])[k], seed)
                paired = joined("paired: the same instructions with the right image and without it", few)
                out.append(add(f"instruct.gain.{condition}", *gain, caveat=paired))
    return out


def instruction_of(example: Example) -> str:
    """What the user said before the last answer."""
    return next(iter(reversed(questions(example))), "")


def _parts(n: int, groups: Mapping[str, Sequence[str | None]]) -> Iterator[tuple[str | None, str | None, np.ndarray]]:
    yield None, None, np.arange(n)
    for grouping, strata in groups.items():
        yield from parts(strata, grouping)
