"""What a question about a picture asks for, by its words: the seed's mix of kinds for the golden set (S2-5).

A rule of patterns and no model, so that a set chosen today is chosen the same way next year. It is meant for balance,
not for judgement: it reads English, and a question that asks for two things gets the first kind that fits.
"""

from __future__ import annotations

import re
from typing import Literal

Category = Literal["describe", "count", "colour", "spatial", "OCR", "reasoning", "other"]

# "Answer the question using a single word or phrase." asks for a form, not for words in the picture.
_FORM = re.compile(
    r"\b(?:an?|one|two|three|single|few|own)\s+(?:short\s+)?(?:words?|letters?)\b(?:\s+or\s+(?:short\s+)?phrase)?"
)

_RULES: tuple[tuple[Category, str], ...] = (
    (
        "describe",
        r"\b(?:describ\w+|descriptions?|summar\w+|caption)\b.*\b(?:image|picture|photo\w*|scene|view)\b"
        r"|\b(?:explain|explanation|content|elements|features|aspects)\b.*\b(?:image|picture|photo\w*|scene)\b"
        r"|\bwhat(?:'s| is| are)? (?:\w+ )?(?:in|on|happening in|going on in|shown in|depicted in|visible in) "
        r"(?:this|the) (?:image|picture|photo\w*|scene)\s*\??$"
        r"|\bwhat (?:do|can) you see\b|\bwhat does (?:this|the) (?:image|picture|photo\w*) show\b",
    ),
    (
        "OCR",
        r"\b(?:text|written|writing|words?|letters?|spell(?:s|ed)?|printed|titled?|slogan|logo|brand|inscription"
        r"|licen[cs]e plate|number plate|jersey number)\b"
        r"|\b(?:read|reads)(?: on| in|\s*\??$)|\bwhat (?:does|do|did) .*\b(?:say|read)\b|\bwhat time\b",
    ),
    ("count", r"\bhow many\b|\bcount\b|\b(?:the|total|what) (?:total )?number of\b"),
    ("colour", r"\bcolou?r(?:s|ed|ful)?\b|\b(?:hue|shade) of\b"),
    (
        "spatial",
        r"\bwhere\b|\b(?:position|locat|situat|arrang|orient)\w*|\b(?:left|right)(?: of| side|most|-hand|\s*\?|$)"
        r"|\b(?:to|on|at|in) the (?:left|right|top|bottom|middle|cent(?:er|re)|corner|background|foreground)\b"
        r"|\b(?:next to|beside|behind|in front of|above|below|under|underneath|beneath|between|on top of|inside|near"
        r"|nearest|closest|farthest|furthest|facing|background|foreground|direction|far (?:away|from))\b",
    ),
    (
        "reasoning",
        r"\b(?:why|reasons?|explain|purpose|infer\w*|suggest\w*|impl(?:y|ies|ied)|might|could|likely|probably|would"
        r"|should|what if|benefits?|challenges?|concerns?|factors?|significance|advice|conclu\w+|possible|potential)\b"
        r"|\bhow (?:does|do|did|can|is|are|has|have)\b|\bwhat makes\b",
    ),
    ("describe", r"\b(?:describ\w+|descriptions?|summar\w+)\b"),
)
_PATTERNS: tuple[tuple[Category, re.Pattern[str]], ...] = tuple((kind, re.compile(pattern)) for kind, pattern in _RULES)


def category(question: str) -> Category:
    """The kind of a question, by the first that fits:

    1. ``describe``: wants the whole picture told (describe, summarise, explain … the image; what do you see);
    2. ``OCR``: wants something read (text, written, word, sign says, brand, licence plate, what time);
    3. ``count``: how many, count, number of;
    4. ``colour``: names colour;
    5. ``spatial``: where, left/right/top/…, next to, behind, in front of, background, direction, …;
    6. ``reasoning``: why, how does, reason, might, could, likely, would, should, suggest, purpose, benefit, …;
    7. ``describe`` again, for a part of the picture; everything else is ``other``.

    Case does not matter, and what is said about the form of the answer ("in one word") is not looked at.
    """
    text = _FORM.sub(" ", " ".join(question.lower().replace("\u2019", "'").split()))
    for kind, pattern in _PATTERNS:
        if pattern.search(text):
            return kind
    return "other"
