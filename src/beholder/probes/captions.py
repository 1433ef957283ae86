"""How captions are scored. The metric definitions are in `caption_metrics`, what was written comes from `written`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from beholder.evidence import Condition, Histogram, Measurement
from beholder.probes import bootstrap, mean, measurement, share, wilson
from beholder.probes.caption_metrics import (
    EXACT,
    MAX_N,
    bleu_score,
    bleu_sums,
    cider_d,
    exact_match,
    normalize,
    rouge_l,
    tokenize,
)
from beholder.types import UserError

if TYPE_CHECKING:  # scoring what a file holds needs no model
    from beholder.probes.written import Written


def score(
    records: Sequence[Written], seed: int = 0, groups: Mapping[str, Sequence[str | None]] | None = None
) -> list[Measurement]:
    """Every caption metric, ``caption.<metric>.<condition>``, for each condition among the records.

    Exact match and the empty share carry Wilson intervals, corpus BLEU and the means (ROUGE-L, CIDEr-D, length)
    bootstrap intervals. BLEU-n is absent when no reference has n words. ``caption.gain.<condition>`` is how much higher
    CIDEr-D is with the own image than under another condition, paired by sample. ``caption.exact_match.chance`` is what
    always writing the most frequent reference scores: the level of a model that does not look.

    ``groups`` (grouping -> stratum of each record of condition ``correct``, in their order; None: in no stratum) adds
    the exact match of each stratum with the own image; a grouping with a single stratum says nothing new and is left
    out. Raises FloatingPointError naming a metric that is not finite.
    """
    if not records:
        raise UserError("caption: there are no captions to score; were all samples rejected?")
    out: list[Measurement] = []
    for condition in _conditions(records):
        out += _score_condition([r for r in records if r.condition == condition], condition, seed)
    out += _gains(records, seed)
    if groups:
        out += _exact_by_stratum([r for r in records if r.condition == "correct"], groups)
    return [*out, chance(records)]


def _gains(records: Sequence[Written], seed: int) -> list[Measurement]:
    """CIDEr-D with the own image minus that under each other condition, on the same samples; of one sample nothing."""
    by = {c: [r for r in records if r.condition == c] for c in _conditions(records)}
    own = by.pop("correct", [])
    if len(own) < 2:
        return []
    references = [[tokenize(r.reference)] for r in own]
    scores = np.array(cider_d([tokenize(r.prediction) for r in own], references))
    out: list[Measurement] = []
    for condition, others in by.items():
        assert [r.id for r in others] == [r.id for r in own], f"{condition}: captions of other samples"
        lost = scores - np.array(cider_d([tokenize(r.prediction) for r in others], references))
        caveat = "paired: the same samples with the right and the wrong image"
        out.append(measurement(f"caption.gain.{condition}", *mean(lost, seed), n=len(own), caveat=caveat))
    return out


def _exact_by_stratum(records: Sequence[Written], groups: Mapping[str, Sequence[str | None]]) -> list[Measurement]:
    out: list[Measurement] = []
    for by, strata in groups.items():
        assert len(strata) == len(records), f"{by}: {len(strata)} strata for {len(records)} captions"
        hits: dict[str, list[bool]] = {}
        for record, stratum in zip(records, strata, strict=True):
            if stratum is not None:
                hits.setdefault(stratum, []).append(exact_match(record.prediction, record.reference))
        for stratum, right in sorted(hits.items()) if len(hits) > 1 else ():
            out.append(
                share("caption.exact_match.correct", sum(right), len(right), stratum=stratum, by=by, caveat=EXACT)
            )
    return out


def chance(records: Sequence[Written]) -> Measurement:
    """Exact match of always answering the most frequent reference (ties do not matter, only its count does)."""
    first = records[0].condition
    references = Counter(normalize(r.reference) for r in records if r.condition == first)
    return share(
        "caption.exact_match.chance", max(references.values()), references.total(),
        caveat="always writing the most frequent reference; a model that does not look can reach this",
    )  # fmt: skip


def length_histogram(records: Sequence[Written]) -> Histogram:
    """Caption lengths in words: references beside the predictions of each condition."""
    conditions = _conditions(records)
    lengths: dict[str, list[int]] = {
        "reference": [len(tokenize(r.reference)) for r in records if r.condition == conditions[0]]
    }
    for condition in conditions:
        lengths[condition] = [len(tokenize(r.prediction)) for r in records if r.condition == condition]
    top = max(max(values) for values in lengths.values())
    width = max(1, -(-(top + 1) // 24))  # at most 24 bins
    bins = [str(k) if width == 1 else f"{k}-{k + width - 1}" for k in range(0, top + 1, width)]
    series = {key: np.bincount(np.array(v) // width, minlength=len(bins)).tolist() for key, v in lengths.items()}
    return Histogram(name="caption.length", unit="words", bins=bins, series=series)


def _conditions(records: Sequence[Written]) -> list[Condition]:
    """Those among the records, in the order they come."""
    seen: list[Condition] = []
    for r in records:
        if r.condition not in seen:
            seen.append(r.condition)
    return seen


def _score_condition(records: Sequence[Written], condition: Condition, seed: int) -> list[Measurement]:
    n = len(records)
    add = partial(measurement, n=n)
    scores = match_scores([r.prediction for r in records], [[r.reference] for r in records], seed)
    lengths = np.array([len(tokenize(r.prediction)) for r in records], dtype=np.float64)
    different, wanted = (
        len({normalize(text) for text in texts})
        for texts in ([r.prediction for r in records], [r.reference for r in records])
    )
    return [
        *(add(f"caption.{metric}.{condition}", value, ci, caveat=caveat) for metric, value, _, ci, caveat in scores),
        add(f"caption.length.{condition}", *mean(lengths, seed)),
        add(f"caption.distinct.{condition}", different / n,
            caveat=f"{different} different captions; the references have {wanted}"),
        share(f"caption.empty.{condition}", int((lengths == 0).sum()), n),
        share(f"caption.unfinished.{condition}", sum(not r.finished for r in records), n,
              caveat="cut off by max_new_tokens"),
    ]  # fmt: skip


def match_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], seed: int = 0
) -> list[tuple[str, float, str, tuple[float, float] | None, str | None]]:
    """(metric, value, unit, 95 % interval, caveat) of exact match, BLEU-1…4, ROUGE-L and CIDEr-D.

    ``references[k]`` are one or more texts; the same as one of them is an exact match.
    """
    n, out = len(predictions), list[tuple[str, float, str, tuple[float, float] | None, str | None]]()
    said, refs = [tokenize(p) for p in predictions], [[tokenize(r) for r in own] for own in references]

    hits = sum(any(exact_match(p, r) for r in own) for p, own in zip(predictions, references, strict=True))
    out.append(("exact_match", hits / n, "share", wilson(hits, n), EXACT))

    sums = bleu_sums(said, refs)
    whole = bleu_score(sums.correct.sum(0), sums.guess.sum(0), sums.length.sum(0), sums.reference_length.sum(0))
    longest = max(len(r) for own in refs for r in own)
    for order in range(1, min(MAX_N, longest) + 1):
        ci = bootstrap(
            lambda k, order=order: bleu_score(
                sums.correct[k].sum(1), sums.guess[k].sum(1), sums.length[k].sum(1), sums.reference_length[k].sum(1)
            )[:, order - 1],
            n, seed, resamples=200 if n > 2000 else 1000,
        )  # fmt: skip
        out.append((f"bleu{order}", float(whole[order - 1]), "score 0-1", ci, None))

    value, ci = mean(np.array(rouge_l(said, refs)), seed)
    out.append(("rouge_l", value, "score 0-1", ci, None))
    short = sum(max(map(len, own)) < MAX_N for own in refs)
    note = "document frequencies from this set; compare only on the same set"
    if short:
        note += f"; {short} of {n} references have fewer than {MAX_N} words, which caps their score below 10"
    if n > 1:  # one sample has no document frequencies
        value, ci = mean(np.array(cider_d(said, refs)), seed)
        out.append(("cider_d", value, "score 0-10", ci, note))
    return out
