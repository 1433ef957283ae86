"""VQA accuracy as the official evaluation computes it (Antol et al. 2015): its answer normaliser and 10-answer rule.

Pure functions of texts. Oddities of the official code that change numbers are reproduced and named where they happen,
because a score that is nearly the official one cannot be compared with anybody's; `tests/probes/data` holds ten
thousand pairs that the official code itself has scored (`benchmarks/vqa_agreement.py`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

ENOUGH = 3
"""Of the other people, how many must have given an answer for it to count in full."""
MAX_PERIODS = 32
"""The official code hands ``re.UNICODE`` (32) over where the number of replacements goes: no more are made."""

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6",
    "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')
# Meant as a look-behind, "(?!<=\d)" is a look-ahead that always holds: a period goes unless a digit follows. \d is
# ASCII's in the official Python 2.
_PERIOD = re.compile(r"\.(?!\d)", re.ASCII)
_COMMA = re.compile(r"\d,\d", re.ASCII)

# Which spellings the official table knows cannot be derived: "couldn'tve" is in it, "who'dve" too, "she'll" is not.
_CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't", "dont": "don't",
    "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't", "havent": "haven't",
    "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's", "howd": "how'd", "howll": "how'll",
    "hows": "how's", "isnt": "isn't", "itd": "it'd", "itd've": "it'd've", "it'dve": "it'd've", "itll": "it'll",
    "maam": "ma'am", "mightnt": "mightn't", "mightnt've": "mightn't've", "mightn'tve": "mightn't've",
    "mightve": "might've", "mustnt": "mustn't", "mustve": "must've", "neednt": "needn't", "notve": "not've",
    "oclock": "o'clock", "oughtnt": "oughtn't", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "shant": "shan't", "shed've": "she'd've", "she'dve": "she'd've", "shouldve": "should've", "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've", "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've", "somebodyll": "somebody'll",
    "somebodys": "somebody's", "someoned": "someone'd", "someoned've": "someone'd've", "someone'dve": "someone'd've",
    "someonell": "someone'll", "someones": "someone's", "somethingd": "something'd",
    "somethingd've": "something'd've", "something'dve": "something'd've", "somethingll": "something'll",
    "thats": "that's", "thered": "there'd", "thered've": "there'd've", "there'dve": "there'd've",
    "therere": "there're", "theres": "there's", "theyd": "they'd", "theyd've": "they'd've", "they'dve": "they'd've",
    "theyll": "they'll", "theyre": "they're", "theyve": "they've", "twas": "'twas", "wasnt": "wasn't",
    "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't", "whatll": "what'll",
    "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's", "whered": "where'd",
    "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've", "who'dve": "who'd've",
    "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll", "whyre": "why're", "whys": "why's",
    "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't", "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "youd": "you'd",
    "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're", "youve": "you've",
}  # fmt: skip
"""The official table, without its rows that change nothing ("let's", "she's") and those with a capital, which never
match a text in lower case ("Im", "Ive", "I'dve", "Id've")."""


@lru_cache(maxsize=1 << 16)
def normalize_answer(text: str) -> str:
    """``text`` as the official evaluation compares it, where people's answers differ.

    Tabs and line breaks become spaces; punctuation goes or becomes a space (`_without_punctuation`); lower case;
    number words to ten (and "none") become digits; articles go; contractions get their apostrophe.
    """
    return _words(_without_punctuation(_one_line(text)))


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy in [0, 1]: for each person left out, min(1, others who say the same / 3); the mean of these.

    People are told apart by their place among the ``answers``, as the official code does by ``answer_id``. Where all of
    them say the same, letter by letter, nothing is normalised: then "Yes" is not "yes" and "yes." is wrong. That is the
    official code's own rule. Fewer than four answers could never reach 1 by it, so with n of them min(3, n - 1) others
    are enough; for a single answer it is equality after `normalize_answer`.
    """
    assert answers, "a question needs at least one reference answer"
    if len(answers) == 1:
        return float(normalize_answer(prediction) == normalize_answer(answers[0]))
    given, said = [_one_line(a) for a in answers], _one_line(prediction)
    if len(set(given)) > 1:
        given, said = [normalize_answer(a) for a in given], normalize_answer(said)
    hits = [a == said for a in given]
    enough = min(ENOUGH, len(given) - 1)
    return sum(min(1.0, (sum(hits) - hit) / enough) for hit in hits) / len(hits)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _without_punctuation(text: str) -> str:
    """Each mark goes where the text has it beside a space somewhere, and is a space otherwise ("black/white").

    A comma between digits anywhere makes every mark of the text go: "1,000 red-ish" is "1000 redish". Periods go
    unless a digit follows: "3.5" and ".5" stay.
    """
    out = text
    joins = _COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            beside = f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if beside or joins else " ")
    return _PERIOD.sub("", out, count=MAX_PERIODS)


def _words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)
