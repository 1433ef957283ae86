"""Collapse of what a model writes, from the texts alone: empty, looping, all alike, or the same for every image.

A loss does not show these. Each symptom is judged against the references of the same samples, so that a data set
whose captions are short, repetitive or all alike is not blamed on the model: writing exactly the references has no
symptom. Only texts come in; who generated them and what a gate makes of the shares is decided elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from beholder.evidence import Measurement
from beholder.probes import joined, share, wilson
from beholder.probes.caption_metrics import normalize, tokenize
from beholder.types import Example

Name = Literal["empty", "loop", "template", "image_independent"]

MIN_PAIRS = 10
"""Fewer outputs that can be compared under two images say nothing about image independence."""

MAX_COMPARED = 2000
"""Outputs that are compared pairwise; of more, a random part is. 2,000 different captions of 5 to 25 words take 1.5 s
on one shared core, 4,000 would take 5.7 s."""

_CAUSES: dict[Name, tuple[str, str, str, str]] = {
    "empty": (
        "outputs without a word, where the reference has one",
        "Empty outputs",
        "have no word",
        "Usual causes: the end token comes first because targets are empty or not supervised (beholder preview shows "
        "what is), or the connector's output is far out of the embeddings' scale.",
    ),
    "loop": (
        "outputs that end in a repetition, where the reference does not",
        "Loops",
        "repeat the same words until they are cut off",
        "Usual causes: too few steps, a learning rate that is too high, or an end token that is not supervised "
        "(beholder preview shows it). A repetition penalty would only hide it.",
    ),
    "template": (
        "largest group of near-identical outputs, without those whose references are alike too",
        "One template",
        "are the same text or nearly so, where the references are not",
        "Usual causes: the connector passes nothing on (look at ablation.delta.shuffled), or too few steps. Look at "
        "the connector's initial scale and learning rate, and train longer.",
    ),
    "image_independent": (
        "same text when another image is shown",
        "Independent of the image",
        "are word for word the same when another image is shown",
        "The model answers from the prompt alone. Usual causes: an answer that the text gives away (beholder audit), "
        "or a connector that passes nothing on. A low loss does not contradict this.",
    ),
}
"""What is counted; and of a finding its title, what the outputs do, and advice."""


@dataclass(frozen=True, slots=True)
class Symptom:
    """One kind of collapse: how many outputs show it, and which."""

    name: Name
    count: int
    """Outputs that show it."""
    n: int
    """Outputs that were judged, at least 1."""
    indices: tuple[int, ...]
    """The outputs that show it, as indices into what was given, ascending."""
    ids: tuple[str, ...]
    """The same by sample id."""
    example: str = ""
    """One of them; of a template, the text that most of them are."""
    note: str = ""
    """What ``n`` is, where it is not simply every output."""

    @property
    def share(self) -> float:
        return self.count / self.n

    @property
    def ci95(self) -> tuple[float, float]:
        """Wilson interval over the judged outputs."""
        return wilson(self.count, self.n)


def symptoms(
    outputs: Sequence[str],
    references: Sequence[str],
    others: Sequence[str] | None = None,
    seed: int = 0,
    *,
    other_references: Sequence[str | None] | None = None,
    ids: Sequence[str] | None = None,
) -> list[Symptom]:
    """Every symptom that can be judged, found or not: ``empty``, ``loop``, ``template``, ``image_independent``.

    All sequences are aligned: ``outputs[i]`` is what the model wrote for the sample whose reference is
    ``references[i]``. Words are those of the caption metrics: lower-cased, without punctuation.

    - **empty**: outputs without a word, where the reference has one.
    - **loop**: outputs that end in a repetition (`loops`), where the reference does not.
    - **template**: the outputs that are near-identical to one of them, without those whose references are
      near-identical to one another as well; the text for which this is most counts. Near-identical means the same words
      in any order, up to 1 in 5 of them changed (of a text with fewer than 5 words: none). Empty outputs are left to
      ``empty``. ``seed`` draws the part that is compared when there are more than `MAX_COMPARED`.
    - **image_independent**: outputs that are the same text, up to case, spacing and closing punctuation, as in
      ``others``, what the model wrote for the same samples when shown another image. Near-identical would be too
      much: "a red bird in a tree" and "a blue bird in a tree" may be all that an image decides. ``other_references``
      (`references_shown`) says what would have been right for the other image; pairs for which it is not known (None)
      or the same as for the own one are left out, and without it no pair is. The symptom is absent without
      ``others`` and when fewer than `MIN_PAIRS` pairs are left.
    """
    assert outputs, "there are no outputs to judge"
    for given in (references, others, other_references, ids):
        assert given is None or len(given) == len(outputs), f"{len(given)} texts for {len(outputs)} outputs"
    names = [str(i) for i in range(len(outputs))] if ids is None else ids
    words, expected = list(map(tokenize, outputs)), list(map(tokenize, references))
    every = len(outputs)

    def symptom(name: Name, found: Sequence[int], n: int, example: int | None = None, note: str = "") -> Symptom:
        first = found[0] if found and example is None else example
        text = outputs[first] if found and first is not None else ""
        return Symptom(name, len(found), n, tuple(found), tuple(names[i] for i in found), text, note)

    empty = [i for i in range(every) if not words[i] and expected[i]]
    looping = [i for i in range(every) if loops(outputs[i]) and not loops(references[i])]

    compared, note = list(range(every)), ""
    if every > MAX_COMPARED:
        compared = sorted(np.random.default_rng(seed).choice(every, MAX_COMPARED, replace=False).tolist())
        note = f"a random {MAX_COMPARED} of {every} outputs were compared with one another"
    alike, centre = _template([words[i] for i in compared], [expected[i] for i in compared])
    found = [
        symptom("empty", empty, every),
        symptom("loop", looping, every),
        symptom(
            "template", [compared[k] for k in alike], len(compared), None if centre is None else compared[centre], note
        ),
    ]

    if others is not None:
        own, wrong = list(map(normalize, outputs)), list(map(normalize, others))
        pairs = [i for i in range(every) if words[i] or tokenize(others[i])]  # both empty: `empty` tells it
        note = "counted whether or not the other image has the same reference, which was not told"
        if other_references is not None:
            known = [i for i in pairs if other_references[i] is not None]
            pairs = [i for i in known if normalize(other_references[i] or "") != normalize(references[i])]
            note = f"judged where the two images' references differ, {len(pairs)} of {every} outputs"
        if len(pairs) >= MIN_PAIRS:
            found.append(symptom("image_independent", [i for i in pairs if own[i] == wrong[i]], len(pairs), note=note))
    return found


def references_shown(examples: Sequence[Example], shown: Sequence[Example]) -> list[str | None]:
    """What would have been right for each of ``shown``, the examples with one another's images (`wrong_images`).

    It is the last answer of the example that has this image and the same turns before that answer: what another image's
    *other question* has for an answer says nothing. None when there is no such example. Where the same image and
    question have several references, the own one counts if it is among them. Give the examples as the template asks
    them (`data.chat.ChatEncoder.apply_template`), or instructions that the model never sees tell them apart.
    """
    assert len(examples) == len(shown), f"{len(shown)} shown examples for {len(examples)}"
    known: dict[tuple[object, object], list[str]] = {}
    for example in examples:
        known.setdefault((example.images, _asked(example)), []).append(example.answer_text)
    out: list[str | None] = []
    for example, other in zip(examples, shown, strict=True):
        texts = known.get((other.images, _asked(example)), [])
        own = normalize(example.answer_text)
        out.append(next((t for t in texts if normalize(t) == own), texts[0] if texts else None))
    return out


def measurements(found: Sequence[Symptom]) -> list[Measurement]:
    """``collapse.<symptom>`` for each, and ``collapse.worst``, the largest share, whose caveat says which it is."""
    worst = max(found, key=lambda s: s.share)
    which = worst.name if worst.count else f"none of {', '.join(s.name for s in found)} was seen"
    told = [(s.name, s, joined(_CAUSES[s.name][0], s.note)) for s in found]
    return [
        share(f"collapse.{name}", s.count, s.n, caveat=caveat) for name, s, caveat in (*told, ("worst", worst, which))
    ]


def findings(found: Sequence[Symptom], limit: float) -> list[str]:
    """A sentence for each symptom whose share is above ``limit``, most frequent first: cause, number, what to do."""
    lines: list[str] = []
    for s in sorted((s for s in found if s.share > limit), key=lambda s: -s.share):
        _, title, what, advice = _CAUSES[s.name]
        low, high = s.ci95
        shown = ", ".join(s.ids[:3]) + (", …" if s.count > 3 else "")
        quoted = f', such as "{_short(s.example)}"' if s.name != "empty" else ""
        lines.append(
            f"{title}: {s.count} of {s.n} outputs ({s.share:.0%}, 95 % interval {low:.0%} to {high:.0%}) "
            f"{what}{quoted} (samples {shown}{f'; {s.note}' if s.note else ''}). {advice}"
        )
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Definitions


def loops(text: str) -> bool:
    """Whether the text ends in a repetition.

    It does when its last words are a run of k words repeated at least two and a half times in a row, the last time
    possibly cut off, and at least 3 of them repeat the word k places earlier: ``a a a a``, ``the cat and the cat and
    the cat``, but not ``very very good``, ``bye bye`` or ``New York, New York``. Characters without their spaces count
    as well, from 8 repetitions of at most 8 characters on: ``!!!!!!!!``, ``hahahahahahahaha``, scripts without spaces.
    """
    words = tokenize(text)
    if any(
        2 * (tail := _repeated_tail(words, k)) >= 5 * k and tail - k >= 3 for k in range(1, 2 * len(words) // 5 + 1)
    ):
        return True
    characters = "".join(text.split())[-128:]
    return any(_repeated_tail(characters, k) >= 8 * k for k in range(1, min(8, len(characters) // 8) + 1))


def _repeated_tail(items: Sequence[str], period: int) -> int:
    """Length of the longest end of ``items`` in which each item equals the one ``period`` places earlier."""
    start = len(items) - period
    while start > 0 and items[start - 1] == items[start - 1 + period]:
        start -= 1
    return len(items) - start


def near_identical(texts: Sequence[str]) -> list[int]:
    """Indices of the largest group of texts that are near-identical (see `symptoms`) to one of them.

    Texts without a word are in no group. Neighbours of one text, not chains: a chain of small changes would join
    texts that have nothing in common.
    """
    words = list(map(tokenize, texts))
    kinds, distinct = _distinct(words)
    if not distinct:
        return []
    near = _near(distinct)
    sizes = near @ np.bincount(kinds[kinds >= 0], minlength=len(distinct))
    centre = int(sizes.argmax())
    return [i for i, kind in enumerate(kinds) if kind >= 0 and near[centre, kind]]


def _template(outputs: Sequence[list[str]], references: Sequence[list[str]]) -> tuple[list[int], int | None]:
    """Outputs that are alike although their references are not, and one that has the text they are like."""
    out, out_texts = _distinct(outputs)
    ref, ref_texts = _distinct(references)
    # A reference without a word is like no other; it still is one, so that its output can be blamed.
    wordless = ref < 0
    ref[wordless] = len(ref_texts)
    if not out_texts:
        return [], None
    spoke = out >= 0
    near_out, near_ref = _near(out_texts), np.pad(_near(ref_texts), (0, 1))
    # O kinds of outputs, R kinds of references; float32 counts are exact here and its products fast.
    pairs_OR = np.zeros((len(out_texts), len(ref_texts) + 1), dtype=np.float32)
    np.add.at(pairs_OR, (out[spoke], ref[spoke]), 1)
    members_OR = near_out.astype(np.float32) @ pairs_OR  # references of the outputs near each kind of output
    excused_OR = members_OR @ near_ref.astype(np.float32)  # those of them near each kind of reference
    blamed_O = members_OR.sum(1) - excused_OR.max(1)
    centre = int(blamed_O.argmax())
    excuse = int(excused_OR[centre].argmax())
    alike = np.flatnonzero(spoke & near_out[centre, out] & ~near_ref[excuse, ref]).tolist()
    return alike, next((i for i in alike if out[i] == centre), None)


def _distinct(texts: Sequence[list[str]]) -> tuple[np.ndarray, list[tuple[str, ...]]]:
    """Which of the different bags of words each text is (int64 [S], -1 without words), and the bags."""
    numbers: dict[tuple[str, ...], int] = {}
    kinds = [numbers.setdefault(tuple(sorted(words)), len(numbers)) if words else -1 for words in texts]
    return np.array(kinds, dtype=np.int64), list(numbers)


def _near(bags: Sequence[tuple[str, ...]]) -> np.ndarray:
    """bool [K, K]: which bags of words differ in at most 1 of 5 words, by matrix products over the vocabulary."""
    length = np.array([len(bag) for bag in bags])
    # The second "a" of a (sorted) bag is a word of its own: then common words are a product of 0/1 vectors.
    marks = [[(word, k - bisect_left(bag, word)) for k, word in enumerate(bag)] for bag in bags]
    vocabulary: dict[tuple[str, int], int] = {}
    columns = [
        np.array([vocabulary.setdefault(mark, len(vocabulary)) for mark in row], dtype=np.int64) for row in marks
    ]
    common = np.zeros((len(bags), len(bags)), dtype=np.float32)
    width = 4096  # columns at a time, to bound memory for large vocabularies
    for start in range(0, len(vocabulary), width):
        block = np.zeros((len(bags), min(width, len(vocabulary) - start)), dtype=np.float32)
        for k, column in enumerate(columns):
            inside = column[(column >= start) & (column < start + width)]
            block[k, inside - start] = 1
        common += block @ block.T
    return nearly(np.maximum(length[:, None], length[None, :]), common)


def nearly(words: Any, common: Any) -> Any:
    """Whether texts differ in at most 1 of 5 words: ``words`` of the longer, ``common`` to both; numbers or arrays."""
    return 5 * (words - common) <= words


def _asked(example: Example) -> object:
    """Everything before the last answer."""
    last = example.turns[-1:]
    return example.turns[:-1] if last and last[0].role == "assistant" else example.turns


def _short(text: str, limit: int = 80) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1].rstrip() + "…"
