from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

from beholder.probes import caption_metrics as metrics

WORDS = st.lists(
    st.sampled_from(["a", "the", "red", "blue", "big", "square", "circle", "on", "left", "of", "two"]), max_size=9
)
PAIRS = st.lists(st.tuples(WORDS, WORDS.filter(bool)), min_size=1, max_size=6)


VECTORS = json.loads((Path(__file__).parent / "data" / "coco_vectors.json").read_text("utf-8"))
"""Scores by pycocoevalcap, the official implementation; its field ``how`` says how they were made."""


def split(*texts: str) -> list[list[str]]:
    return [text.split() for text in texts]


def bleu(predictions: list[list[str]], references: list[list[list[str]]]) -> list[float]:
    s = metrics.bleu_sums(predictions, references)
    return metrics.bleu_score(s.correct.sum(0), s.guess.sum(0), s.length.sum(0), s.reference_length.sum(0)).tolist()


# ---------------------------------------------------------------------------------------------------------------
# The official implementation


@pytest.mark.parametrize("tokens", ["split", "ptb"])
def test_scores_are_those_of_the_official_implementation(tokens: str):
    if tokens == "split":
        predictions = [p["prediction"].lower().split() for p in VECTORS["pairs"]]
        references = [[r.lower().split() for r in p["references"]] for p in VECTORS["pairs"]]
    else:
        predictions = [p["prediction"].split() for p in VECTORS["ptb_tokens"]]
        references = [[r.split() for r in p["references"]] for p in VECTORS["ptb_tokens"]]
    official: dict[str, Any] = VECTORS[tokens]

    s = metrics.bleu_sums(predictions, references)
    each = metrics.bleu_score(s.correct, s.guess, s.length, s.reference_length)
    rouge, cider = metrics.rouge_l(predictions, references), metrics.cider_d(predictions, references)

    # Measured: 2e-15.
    assert len(predictions) == len(VECTORS["pairs"]) >= 60
    assert bleu(predictions, references) == pytest.approx(official["bleu"]["corpus"], abs=1e-9)
    np.testing.assert_allclose(each.T, official["bleu"]["each"], atol=1e-9, rtol=0)
    assert rouge == pytest.approx(official["rouge_l"]["each"], abs=1e-9)
    assert cider == pytest.approx(official["cider_d"]["each"], abs=1e-9)
    assert np.mean(rouge) == pytest.approx(official["rouge_l"]["corpus"], abs=1e-9)
    assert np.mean(cider) == pytest.approx(official["cider_d"]["corpus"], abs=1e-9)


DIFFERENT = {
    # On purpose: lower-casing hides brackets and "?!" from COCO's list of punctuation, and Java loses emoji.
    "one (1) apple [red]": "one 1 apple red",
    "an apple (red)": "an apple red",
    "?!": "",
    "two 😀 faces": "two 😀 faces",
    "😀 😀": "😀 😀",
    "flag: Côte d’Ivoire": "flag côte d'ivoire",
    # Rare spellings that are not worth a rule.
    "bus no. 42 in the U.S.": "bus no 42 in the u.s.",
    "C++ & C# books": "c + + & c # books",
    "books on c++ and c#": "books on c + + and c #",
    "rock 'n' roll o'clock": "rock n roll o'clock",
    "a_b c=d e+f #tag @home *star*": "a_b c = d e + f #tag @home * star *",
    "she said she's late; it's 5 o'clock, y'all": "she said she 's late it 's 5 o'clock y'all",
}
"""Every text of the vectors that the PTBTokenizer takes apart otherwise, and what it is here."""


def test_tokens_are_those_of_the_coco_tokenizer():
    texts = [t for p in VECTORS["pairs"] for t in (p["prediction"], *p["references"])]
    official = [t for p in VECTORS["ptb_tokens"] for t in (p["prediction"], *p["references"])]

    ours = [" ".join(metrics.tokenize(text)) for text in texts]

    assert {t: o for t, o, ptb in zip(texts, ours, official, strict=True) if o != ptb} == DIFFERENT
    assert len(texts) == len(official) == 189


# ---------------------------------------------------------------------------------------------------------------
# Tokenisation and exact match


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A red square, on white.", "a red square on white"),
        ("A dog's t-shirt doesn't fit!", "a dog 's t-shirt does n't fit"),
        ("It’s 3.5 m (1,000 cm) & more…", "it 's 3.5 m 1,000 cm & more"),
        ("the 'big' -- \"blue\" one; [two]", "the big blue one two"),
        ("", ""),
        ("?!", ""),
        ("Straße 猫", "straße 猫"),
    ],
)
def test_tokens_are_lower_case_words_without_punctuation(text: str, tokens: str):
    assert metrics.tokenize(text) == tokens.split()


@pytest.mark.parametrize("other", ["A blue square", " a  BLUE\nsquare. ", "a blue square!", "A blue square..."])
def test_exact_match_ignores_case_spacing_and_closing_punctuation(other: str):
    assert metrics.exact_match(other, "A blue square.")


@pytest.mark.parametrize("other", ["A blue squares.", "blue square", "", "A blue, square."])
def test_exact_match_is_strict_about_everything_else(other: str):
    assert not metrics.exact_match(other, "A blue square.")


# ---------------------------------------------------------------------------------------------------------------
# BLEU


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_bleu_equals_sacrebleu_without_tokenisation_and_smoothing(pairs: list[tuple[list[str], list[str]]]):
    predictions, references = [p for p, _ in pairs], [[r] for _, r in pairs]
    texts, refs = [" ".join(p) for p in predictions], [[" ".join(r[0]) for r in references]]

    ours = bleu(predictions, references)

    for n, score in enumerate(ours, start=1):
        oracle = BLEU(tokenize="none", smooth_method="none", max_ngram_order=n, force=True).corpus_score(texts, refs)
        if oracle.score > 0:
            assert score == pytest.approx(oracle.score / 100, abs=1e-8)  # COCO's 1e-9 in every denominator
        else:
            assert score < 0.04  # its residue where an order has no match


def test_bleu_takes_the_reference_nearest_in_length_and_clips_over_all_references():
    prediction, references = split("the the the cat"), [split("the cat sat on the mat", "a cat the one")]

    one, two, *_ = bleu(prediction, references)

    # Unigrams: "the" is clipped to 2, "cat" counts: 3 of 4. Bigrams "the the" x2, "the cat": 1 of 3. Length 4 = 4.
    assert one == pytest.approx(3 / 4)
    assert two == pytest.approx(math.sqrt(3 / 4 * 1 / 3))


def test_bleu_of_sums_is_not_the_mean_of_sentence_scores():
    predictions, references = split("a red square", "x"), [split("a red square"), split("y")]

    assert bleu(predictions, references)[0] == pytest.approx(3 / 4)


# ---------------------------------------------------------------------------------------------------------------
# ROUGE-L


@settings(max_examples=60, deadline=None)
@given(PAIRS)
def test_rouge_l_equals_rouge_score_at_its_beta_and_at_cocos(pairs: list[tuple[list[str], list[str]]]):
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    f1 = metrics.rouge_l([p for p, _ in pairs], [[r] for _, r in pairs], beta=1.0)
    coco = metrics.rouge_l([p for p, _ in pairs], [[r] for _, r in pairs])

    for k, (prediction, reference) in enumerate(pairs):
        oracle = scorer.score(" ".join(reference), " ".join(prediction))["rougeL"]
        p, r = oracle.precision, oracle.recall
        assert f1[k] == pytest.approx(oracle.fmeasure, abs=1e-12)
        assert coco[k] == pytest.approx((1 + 1.44) * p * r / (r + 1.44 * p) if p else 0.0, abs=1e-12)


def test_rouge_l_takes_best_precision_and_best_recall_over_references():
    [score] = metrics.rouge_l(split("a b c d"), [split("a b c d e f g h", "a b")])

    # Precision 4/4 with the first reference, recall 2/2 with the second: COCO takes each at its best.
    assert score == pytest.approx(1.0)


# ---------------------------------------------------------------------------------------------------------------
# CIDEr-D


def test_cider_d_equals_a_value_computed_by_hand():
    """Two samples; "a" is in both references (idf log 2/2 = 0), every other n-gram in one (idf log 2/1 = L).

    Prediction 1 "a red dog" for "a red cat". Weights are L times the count, and L cancels in the cosine:
    n=1: prediction {red, dog}, reference {red, cat}: 1 / (sqrt 2 · sqrt 2) = 1/2
    n=2: {a red, red dog} and {a red, red cat}: 1/2
    n=3: {a red dog} and {a red cat}: 0;  n=4: none: 0.
    Equal lengths, so no penalty: 10 · (1/2 + 1/2) / 4 = 2.5.

    Prediction 2 "a blue" for "a blue cup now": lengths in bigrams 1 and 3, penalty exp(-4/72).
    n=1: {blue} and {blue, cup, now}: 1 / (1 · sqrt 3);  n=2: {a blue} and {a blue, blue cup, cup now}: 1 / sqrt 3
    n=3, n=4: none. 10 · exp(-4/72) · (2 / sqrt 3) / 4.
    """
    references = [split("a red cat"), split("a blue cup now")]

    scores = metrics.cider_d(split("a red dog", "a blue"), references)

    assert scores == pytest.approx([2.5, 10 * math.exp(-4 / 72) * 2 / math.sqrt(3) / 4], abs=1e-12)


def test_cider_d_clips_repeated_words():
    references = [split("a red cat"), split("one blue cup")]

    [honest, _] = metrics.cider_d(split("red cat", "x"), references)
    [stuffed, _] = metrics.cider_d(split("red red red cat cat cat", "x"), references)

    assert stuffed < honest


def test_cider_d_averages_over_references_and_a_perfect_long_caption_scores_ten():
    long, other = (
        ["two", "small", "red", "cups", "on", "one", "table"],
        ["an", "old", "grey", "cat", "in", "the", "sun"],
    )

    perfect, _ = metrics.cider_d([long, other], [[long], [other]])
    half, _ = metrics.cider_d([long, other], [[long, ["nothing", "in", "common", "here", "at", "all"]], [other]])

    assert perfect == pytest.approx(10.0)
    assert half == pytest.approx(5.0)


def test_empty_predictions_score_zero_everywhere():
    references = [split("a red cat"), split("a blue cup")]

    assert bleu([[], []], references) == [0.0] * 4
    assert metrics.rouge_l([[], []], references) == [0.0, 0.0]
    assert metrics.cider_d([[], []], references) == [0.0, 0.0]
