"""Caption metrics as the COCO caption evaluation defines them (Chen et al. 2015): pure functions on token lists.

Exact match, BLEU-1…4, ROUGE-L and CIDEr-D live here; which texts are compared, and with what interval, is
`probes.captions`' business. Every metric gives per-sample numbers (or sums) from which the corpus number is made, so
that a bootstrap can resample them.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_N = 4
EXACT = "case, spacing and closing punctuation ignored"
"""What is said beside an `exact_match`."""

_TINY, _SMALL = 1e-15, 1e-9

_CONTRACTION = re.compile(  # what the Penn Treebank takes apart: don't, dog's, cannot, gonna, lemme
    r"(?<=\w)(?:n't|'(?:s|m|d|re|ve|ll))\b|(?<=\bcan)not\b|(?<=\b(?:gon|wan))na\b|(?<=\bgot)ta\b|(?<=\b(?:lem|gim))me\b"
)
_TOKEN = re.compile(
    r"""https?://\S*[\w/] | [\w.+-]+@[\w-]+(?:\.[\w-]+)+   # addresses
    |n't|'(?:s|m|d|re|ve|ll)\b          # a contraction, split off its word
    |(?:[^\W\d_]\.){2,}                 # u.s.  a.m.
    |(?:mr|mrs|ms|dr|jr|sr)\.(?!\w)
    |\d+(?:[.,:/-]\d+)*(?![-/]?\w)    # 1,000  3.5  10:30  1/2  20-30
    |[\#@]?\w+(?:[-'.&/]\w+)*           # words, with what joins them inside: t-shirt, black/white, #tag
    |[^\w\s]                           # any other character on its own""",
    re.VERBOSE,
)
_DROPPED = frozenset("'`\"“”‘’().?!,:-–—…;[]{}")
WITHOUT_SPACES = re.compile(r"[\u0E00-\u0EFF\u1000-\u109F\u1780-\u17FF\u3040-\u30FF\u3400-\u9FFF\uF900-\uFAFF]")
"""Thai, Lao, Burmese, Khmer, kana and ideographs: words are not set apart there, so their characters are `units`."""


def tokenize(text: str) -> list[str]:
    """Words of a caption: lower-cased Penn-Treebank-like tokens without punctuation.

    COCO runs Stanford's PTBTokenizer (Java) and drops quotes, brackets, dashes and ``. ? ! , : ... ;``. This is the
    same for the ordinary English of captions: contractions are split (``don't`` to ``do n't``, ``dog's`` to
    ``dog 's``), hyphenated words and numbers stay whole, every symbol that is not in the list is a token. It differs
    on purpose where COCO's chain goes wrong (it keeps brackets as ``-lrb-``, keeps ``?!``, loses emoji), and in rare
    spellings (``no. 42``, ``C++``); ``test_tokens_are_those_of_the_coco_tokenizer`` lists all that is known. Scripts
    without spaces come out as one token a run.
    """
    text = unicodedata.normalize("NFC", text).lower().replace("\u2019", "'")
    apart = _CONTRACTION.sub(lambda m: " " + m[0], text)
    return [token for token in _TOKEN.findall(apart) if token not in _DROPPED]


def units(text: str) -> list[str]:
    """Words; characters of those that are written without spaces between them."""
    return [u for word in tokenize(text) for u in (list(word) if WITHOUT_SPACES.search(word) else [word])]


def normalize(text: str) -> str:
    """What "exactly the same caption" means: case, runs of white space, and closing ``. ! ? …`` do not count."""
    return " ".join(unicodedata.normalize("NFC", text).casefold().split()).rstrip(".!?… ")


def exact_match(prediction: str, reference: str) -> bool:
    """Same text after `normalize`."""
    return normalize(prediction) == normalize(reference)


def ngrams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n tokens occurs."""
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


# ---------------------------------------------------------------------------------------------------------------
# BLEU


@dataclass(frozen=True, slots=True)
class BleuSums:
    """What corpus BLEU is made of, by sample: summing rows and calling `bleu_score` gives the corpus number."""

    correct: np.ndarray
    """int64 [S, 4]: n-grams of the prediction that a reference has, clipped."""
    guess: np.ndarray
    """int64 [S, 4]: n-grams of the prediction."""
    length: np.ndarray
    """int64 [S]: tokens of the prediction."""
    reference_length: np.ndarray
    """int64 [S]: tokens of the reference nearest in length (the shorter one on a tie)."""


def bleu_sums(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> BleuSums:
    """Per-sample BLEU sums (Papineni et al. 2002); ``references[k]`` are the token lists of sample k."""
    _same_length(predictions, references)
    correct = np.zeros((len(predictions), MAX_N), dtype=np.int64)
    guess, length, ref_length = np.zeros_like(correct), *np.zeros((2, len(predictions)), dtype=np.int64)
    for k, (prediction, refs) in enumerate(zip(predictions, references, strict=True)):
        length[k] = len(prediction)
        ref_length[k] = min((abs(len(r) - len(prediction)), len(r)) for r in refs)[1]
        for n in range(1, MAX_N + 1):
            allowed: Counter[tuple[str, ...]] = Counter()
            for r in refs:
                allowed |= ngrams(r, n)
            found = ngrams(prediction, n)
            guess[k, n - 1] = sum(found.values())
            correct[k, n - 1] = sum((found & allowed).values())
    return BleuSums(correct, guess, length, ref_length)


def bleu_score(correct: np.ndarray, guess: np.ndarray, length: np.ndarray, reference_length: np.ndarray) -> np.ndarray:
    """BLEU-1…4 in [0, 1] of summed sums: [..., 4], [..., 4], [...], [...] -> [..., 4].

    The two tiny numbers are the COCO code's. They leave a residue instead of a 0 where no n-gram of an order matches
    (below 0.001 as a rule), and up to 0.03 for BLEU-4 where no prediction has four words.
    """
    precision = (correct + _TINY) / (guess + _SMALL)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    log_mean = np.cumsum(np.log(precision), axis=-1) / np.arange(1, MAX_N + 1)
    brevity = np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)
    return np.exp(log_mean) * brevity[..., None]


# ---------------------------------------------------------------------------------------------------------------
# ROUGE-L


def lcs_length(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    The rows of its table differ by 0 or 1 from cell to cell, so that one is an integer's bits and the next one an
    addition (Hyyrö 2004): 64 cells at a time.
    """
    where: dict[str, int] = {}
    for j, y in enumerate(b):
        where[y] = where.get(y, 0) | 1 << j
    every = (1 << len(b)) - 1
    row = every  # a 0 where the cell is larger than its left neighbour
    for x in a:
        match = row & where.get(x, 0)
        row = ((row + match) | (row - match)) & every
    return len(b) - row.bit_count()


def rouge_l(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], beta: float = 1.2
) -> list[float]:
    """ROUGE-L F-score of every sample in [0, 1] (Lin 2004), with COCO's beta of 1.2, which favours recall.

    Precision and recall are each the best over the references, as in the COCO code. The corpus number is the mean.
    An empty prediction scores 0.
    """
    _same_length(predictions, references)
    scores: list[float] = []
    for prediction, refs in zip(predictions, references, strict=True):
        common = [lcs_length(prediction, r) for r in refs]
        precision = max(common) / max(len(prediction), 1)
        recall = max(c / max(len(r), 1) for c, r in zip(common, refs, strict=True))
        both = recall + beta**2 * precision
        scores.append((1 + beta**2) * precision * recall / both if both else 0.0)
    return scores


# ---------------------------------------------------------------------------------------------------------------
# CIDEr-D


def cider_d(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]], sigma: float = 6.0
) -> list[float]:
    """CIDEr-D of every sample, 0 to 10 (Vedantam et al. 2015, the clipped variant of the COCO code).

    Cosine similarity of tf-idf n-gram vectors with the prediction's weights clipped to the reference's, damped by a
    Gaussian of the length difference (sigma 6 n-grams of order 2, as in the code), averaged over n = 1…4 and over the
    references, times 10. Document frequencies come from the references given: **the score depends on the whole set**,
    is 0 for a single sample (every idf is 0), and an n-gram order a caption is too short for counts as 0.
    """
    _same_length(predictions, references)
    log_samples = math.log(len(references)) if references else 0.0
    frequency: Counter[tuple[str, ...]] = Counter()
    for refs in references:
        frequency.update({gram for r in refs for n in range(1, MAX_N + 1) for gram in ngrams(r, n)})

    def vectors(tokens: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {g: count * (log_samples - math.log(max(1, frequency[g]))) for g, count in ngrams(tokens, n).items()}
            for n in range(1, MAX_N + 1)
        ]

    def norm(vector: dict[tuple[str, ...], float]) -> float:
        return math.sqrt(sum(w * w for w in vector.values()))

    scores: list[float] = []
    for prediction, refs in zip(predictions, references, strict=True):
        hypothesis = vectors(prediction)
        total = 0.0
        for r in refs:
            # The COCO code measures length in bigrams; an empty and a one-word caption are both 0 long.
            delta = max(len(prediction) - 1, 0) - max(len(r) - 1, 0)
            penalty = math.exp(-(delta**2) / (2 * sigma**2))
            for h, v in zip(hypothesis, vectors(r), strict=True):
                scale = norm(h) * norm(v)
                if scale > 0:
                    total += penalty * sum(min(w, v.get(g, 0.0)) * v.get(g, 0.0) for g, w in h.items()) / scale
        scores.append(10.0 * total / MAX_N / len(refs))
    return scores


def _same_length(predictions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    assert len(predictions) == len(references), f"{len(predictions)} predictions for {len(references)} references"
    assert all(references), "every sample needs at least one reference"
