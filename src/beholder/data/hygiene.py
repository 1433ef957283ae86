"""Vets every structurally good record: caption length, spam, duplicates, images, caps. Counts and names all it rejects.

Nothing is repaired and nothing is swapped for another record. The order of the checks is part of the result: a
record is rejected for the first reason that applies, duplicates are looked for among what is left, caps count what is
accepted.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from beholder.config import HygieneLimits
from beholder.data import index
from beholder.data.images import ImageError, ImageFacts, check_exists, inspect
from beholder.data.sources import Records, Reject
from beholder.types import ImageRef, UserError

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""

HISTOGRAM_EDGES = (0, 1, 5, 10, 15, 20, 30, 40, 60, 80, 120, 250, 500)
_CACHE_FROM = 10_000
"""Token counts of fewer texts are not worth a file."""
_WORD = re.compile(r"\w+")


@dataclass
class HygieneReport:
    """What hygiene found in one set of records."""

    accepted: np.ndarray
    """int64: indices into the records, increasing"""
    rejects: list[Reject]
    """What hygiene rejected; structural rejects are in ``Records.rejects``."""
    target_tokens: np.ndarray
    """int32 [len(records)]: length of every record's target, end token not counted"""
    counts: dict[str, int]
    """records, accepted, and one entry per reject reason"""
    duplicates: dict[str, int]
    """exact / near: captions, or whole conversations about an image, that repeat an earlier one, rejected or not"""
    length_histogram: list[tuple[int, int, int]]
    """(from, to inclusive, records) of all records; the last ``to`` is the longest target"""
    unit: Literal["tokens", "words"] = "tokens"
    """words when there was no tokenizer; the length limits were then not applied"""
    image_facts: list[ImageFacts] | None = None
    """One entry per different image reference that decodes; None unless ``verify_images`` was decode"""


def apply_hygiene(
    records: Records,
    tokenizer: Any,
    cfg: HygieneLimits,
    *,
    verify_images: Literal["none", "exists", "decode"] = "exists",
    max_megapixels: float = 50.0,
    on_bad_image: Literal["error", "skip"] = "error",
    progress: Progress | None = None,
) -> HygieneReport:
    """Check all records. Reasons, in order: empty_caption, too_short, too_long, spam, an `ImageError` reason,
    duplicate_exact, duplicate_near, source_cap.

    ``tokenizer`` None: lengths are counted in words and the limits, which are in tokens, are not applied.
    Raises `UserError` naming the first bad images when ``on_bad_image`` is error.
    """
    texts, compared, missing = _read(records, verify_images == "exists", progress)
    tokens = count_tokens(texts, tokenizer, progress) if tokenizer is not None else _count_words(texts)
    reasons: dict[int, tuple[str, str]] = {}

    spam = _SpamFilter(cfg.spam)
    for i, (text, num) in enumerate(zip(texts, tokens.tolist(), strict=True)):
        if not text or text.isspace():
            reasons[i] = "empty_caption", "the target text is empty"
        elif tokenizer is not None and num < cfg.min_tokens:
            reasons[i] = "too_short", f"{num} tokens, hygiene.min_tokens is {cfg.min_tokens}: {_clip(text)}"
        elif tokenizer is not None and cfg.max_tokens is not None and num > cfg.max_tokens:
            reasons[i] = "too_long", f"{num} tokens, hygiene.max_tokens is {cfg.max_tokens}: {_clip(text)}"
        elif phrase := spam.find(text):
            reasons[i] = "spam", f"contains {phrase!r}: {_clip(text)}"

    left = [i for i in range(len(records)) if i not in reasons]
    facts: dict[ImageRef, ImageFacts | ImageError] = {}
    bad_images = {i: missing[i] for i in left if i in missing}
    if verify_images == "decode":
        bad_images = _undecodable(records, left, max_megapixels, facts, progress)
    if bad_images and on_bad_image == "error":
        named = "\n".join(f"  {records[i].where}: {e}" for i, e in islice(bad_images.items(), 5))
        more = f"\n  and {len(bad_images) - 5} more" if len(bad_images) > 5 else ""
        raise UserError(f"{len(bad_images)} of {len(left)} records have an image that cannot be used; repair them, or "
                        f"set data.on_bad_image: skip to reject, count and name them:\n{named}{more}")  # fmt: skip
    reasons.update((i, (e.reason, str(e))) for i, e in bad_images.items())

    left = [i for i in left if i not in reasons]
    if progress:
        progress("duplicates", 0, len(left))
    exact, near = find_duplicates([compared[i] for i in left], cfg.near_threshold)
    for kind, found in (("duplicate_exact", exact), ("duplicate_near", near)):
        if cfg.duplicates == "reject_near" or (cfg.duplicates == "reject_exact" and kind == "duplicate_exact"):
            for j, first in found.items():
                reasons[left[j]] = kind, f"repeats record {records[left[first]].id!r}: {_clip(texts[left[j]])}"
    if progress:
        progress("duplicates", len(left), len(left))

    left = [i for i in left if i not in reasons]
    reasons.update(_over_cap(records, left, cfg.source_cap))

    rejects = [_reject(records, i, *reasons[i]) for i in sorted(reasons)]
    accepted = np.array([i for i in left if i not in reasons], np.int64)
    return HygieneReport(
        accepted=accepted,
        rejects=rejects,
        target_tokens=tokens,
        counts={"records": len(records), "accepted": len(accepted), **Counter(r.reason for r in rejects)},
        duplicates={"exact": len(exact), "near": len(near)},
        length_histogram=length_histogram(tokens),
        unit="tokens" if tokenizer is not None else "words",
        image_facts=[f for f in facts.values() if isinstance(f, ImageFacts)] if verify_images == "decode" else None,
    )


def _reject(records: Records, i: int, reason: str, detail: str) -> Reject:
    example = records[i]
    return Reject(example.id, example.row, example.file, reason, detail)


def _clip(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "…")


def length_histogram(tokens: np.ndarray) -> list[tuple[int, int, int]]:
    """(from, to inclusive, records), empty tail left out."""
    if not len(tokens):
        return []
    longest = int(tokens.max())
    edges = [e for e in HISTOGRAM_EDGES if e <= longest] + [longest + 1]
    counts = np.histogram(tokens, bins=np.array(edges))[0].tolist()
    return [(low, high - 1, n) for (low, high), n in zip(pairwise(edges), counts, strict=True)]


# ---------------------------------------------------------------------------------------------------------------
# Lengths


def count_tokens(texts: Sequence[str], tokenizer: Any, progress: Progress | None = None) -> np.ndarray:
    """int32 [len(texts)]: tokens of each text, control tokens in it counted as the ordinary text they are.

    Nothing is added around a text. Fast tokenizers work on a private copy, so padding or truncation set on the given
    one neither counts nor changes. Large results are cached by tokenizer and texts.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ids = (tokenizer(t, add_special_tokens=False, split_special_tokens=True)["input_ids"] for t in texts)
        return np.array([len(i) for i in ids], np.int32)
    definition = backend.to_str()
    key = ""
    if len(texts) >= _CACHE_FROM:
        digest = hashlib.sha256(definition.encode())
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\xff")
        key = index.cache_key("tokens", 1, digest.hexdigest())
        if (cached := index.cache_load(key)) is not None and cached[0]["tokens"].shape == (len(texts),):
            return cached[0]["tokens"]
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(definition)
    own.no_padding()
    own.no_truncation()
    own.encode_special_tokens = True
    counts = np.empty(len(texts), np.int32)
    step = 8192
    for start in range(0, len(texts), step):
        batch = own.encode_batch_fast(list(texts[start : start + step]), add_special_tokens=False)
        counts[start : start + len(batch)] = [len(e) for e in batch]
        if progress:
            progress("lengths", start + len(batch), len(texts))
    if key:
        index.cache_save(key, {"tokens": counts}, None)
    return counts


def _count_words(texts: Sequence[str]) -> np.ndarray:
    return np.array([len(_WORD.findall(t)) for t in texts], np.int32)


# ---------------------------------------------------------------------------------------------------------------
# Spam


class _SpamFilter:
    """Finds one of the phrases as whole words, in any case and with any white space between its words."""

    def __init__(self, phrases: Sequence[str]) -> None:
        phrases = [p for p in phrases if p.strip()]
        # The plain search for a phrase's first word is 20 times faster than the expression and nearly always says no.
        self.first_words = tuple({p.casefold().split()[0] for p in phrases})
        bodies = "|".join(r"\s+".join(map(re.escape, p.casefold().split())) for p in phrases)
        self.pattern = re.compile(rf"(?<!\w)(?:{bodies})(?!\w)")

    def find(self, text: str) -> str | None:
        low = text.casefold()
        for word in self.first_words:
            if word in low:
                match = self.pattern.search(low)
                return match[0] if match else None
        return None


# ---------------------------------------------------------------------------------------------------------------
# Images


def _read(
    records: Records, exist: bool, progress: Progress | None
) -> tuple[list[str], list[str], dict[int, ImageError]]:
    """(target texts, compared texts, record → its first image that is not there) in one pass over the records: reading
    one costs more than all that is done with it. ``exist`` False: images are not looked for."""
    texts: list[str] = []
    compared: list[str] = []

    def images() -> Iterator[tuple[int, tuple[ImageRef, ...]]]:
        for i, (text, whole, refs) in enumerate(records.contents()):
            texts.append(text)
            compared.append(whole)
            yield i, refs if exist else ()

    return texts, compared, _first_bad(images(), check_exists, records.num_images, progress if exist else None)


def _undecodable(
    records: Records,
    indices: Sequence[int],
    max_megapixels: float,
    facts: dict[ImageRef, ImageFacts | ImageError],
    progress: Progress | None,
) -> dict[int, ImageError]:
    """Record → what is wrong with its first bad image."""
    check = partial(_check_decodes, max_megapixels=max_megapixels, facts=facts)
    return _first_bad(records.images_of(indices), check, records.num_images, progress)


def _first_bad(
    images: Iterator[tuple[int, tuple[ImageRef, ...]]],
    check: Callable[[Iterator[ImageRef]], Iterator[ImageError | None]],
    total: int,
    progress: Progress | None,
) -> dict[int, ImageError]:
    bad: dict[int, ImageError] = {}
    waiting: deque[int] = deque()  # record of each image that was handed out and is not yet judged

    def refs() -> Iterator[ImageRef]:
        for i, own in images:
            waiting.extend([i] * len(own))
            yield from own

    for done, error in enumerate(check(refs()), 1):
        i = waiting.popleft()
        if error is not None:
            bad.setdefault(i, error)
        if progress and done % 1000 == 0:
            progress("images", done, total)
    if progress:
        progress("images", total, total)
    return bad


def _check_decodes(
    refs: Iterator[ImageRef], max_megapixels: float, facts: dict[ImageRef, ImageFacts | ImageError]
) -> Iterator[ImageError | None]:
    """Decode every different image once, on all cores (decoders release the interpreter lock), and fill ``facts``."""

    def look(ref: ImageRef) -> ImageFacts | ImageError:
        try:
            return inspect(ref, max_megapixels)
        except ImageError as e:
            return e

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while batch := list(islice(refs, 256)):
            new = [r for r in dict.fromkeys(batch) if r not in facts]
            facts.update(zip(new, pool.map(look, new), strict=True))
            for ref in batch:
                fact = facts[ref]
                yield fact if isinstance(fact, ImageError) else None


# ---------------------------------------------------------------------------------------------------------------
# Caps


def _over_cap(records: Records, left: Sequence[int], source_cap: int | None) -> dict[int, tuple[str, str]]:
    """Records beyond ``source_cap`` of a source value, or beyond the ``cap`` of their config entry; the first stay."""
    over: dict[int, tuple[str, str]] = {}
    caps = [s.cap for s in records.sources]
    if source_cap is None and not any(caps):
        return over
    by_name, by_origin = Counter[int](), Counter[int]()
    for i in left:
        name, origin = int(records.source_ids[i]), int(records.origins[i])
        cap = caps[origin]
        if source_cap is not None and by_name[name] >= source_cap:
            over[i] = "source_cap", f"hygiene.source_cap is {source_cap} for {records.source_names[name]!r}"
        elif cap is not None and by_origin[origin] >= cap:
            over[i] = "source_cap", f"cap is {cap} for {records.sources[origin].json_path}"
        else:
            by_name[name] += 1
            by_origin[origin] += 1
    return over


# ---------------------------------------------------------------------------------------------------------------
# Duplicates


def find_duplicates(texts: Sequence[str], threshold: float) -> tuple[dict[int, int], dict[int, int]]:
    """(exact, near): index of a text → index of the earlier text it repeats.

    exact: the same text up to white space at the ends. near: the Jaccard similarity of the sets of case-folded words is
    at least ``threshold``. Candidates come from MinHash signatures in LSH bands (Broder 1997; Leskovec et al., Mining
    of Massive Datasets, ch. 3), whose parameters are chosen to miss at most 1 pair in 1,000 at the threshold, and each
    candidate's similarity is then computed exactly. The first occurrence is kept: a text counts as near only to a text
    that is kept. Scripts without spaces form one word a phrase, so there near means equal up to punctuation.
    """
    exact: dict[int, int] = {}
    near: dict[int, int] = {}
    first_text: dict[str, int] = {}
    first_set: dict[object, int] = {}
    vocabulary: dict[str, int] = {}
    sets: list[np.ndarray] = []
    owners: list[int] = []  # text of each set
    for i, text in enumerate(texts):
        text = text.strip()
        if (first := first_text.setdefault(text, i)) != i:
            exact[i] = first
            continue
        words = sorted({vocabulary.setdefault(w, len(vocabulary)) for w in _WORD.findall(text.casefold())})
        ids = np.array(words, np.int32)
        if (first := first_set.setdefault(ids.tobytes() or text, i)) != i:
            near[i] = first
            continue
        # A different set is at best one word larger: below this size none can reach the threshold (at 0.9: 9 words).
        if words and len(words) / (len(words) + 1) >= threshold - 1e-9:
            sets.append(ids)
            owners.append(i)
    dropped = _similar_to_kept(sets, len(vocabulary), threshold)
    near.update((owners[j], owners[k]) for j, k in dropped.items())
    # What repeats a dropped text repeats the text that one repeats, so that every named original is a kept one.
    near = {i: near.get(first, first) for i, first in near.items()}
    exact = {i: near.get(first, first) for i, first in exact.items()}
    return exact, dict(sorted(near.items()))


_NUM_HASHES = 96
_MAX_BUCKET = 64
"""In a bucket with more sets, each is compared with this many of the earliest, so that time stays linear."""


def _similar_to_kept(sets: Sequence[np.ndarray], num_words: int, threshold: float) -> dict[int, int]:
    """Set → the earliest set before it with Jaccard similarity >= threshold that has no such set itself."""
    n = len(sets)
    if n < 2 or threshold >= 1:  # equal sets were grouped before
        return {}
    rows = max((r for r in range(1, 17) if _recall(threshold, r) >= 0.999), default=1)
    sizes = np.array([len(s) for s in sets], np.int64)
    flat, offsets = np.concatenate(sets), np.concatenate([[0], np.cumsum(sizes)[:-1]])
    rng = np.random.default_rng(0)
    bits = _bitmaps(flat, sizes)
    candidates = [np.zeros(0, np.int64)]
    for _ in range(_NUM_HASHES // rows):
        band = np.zeros(n, np.uint64)
        for _ in range(rows):
            order = rng.integers(0, 2**32, num_words, np.uint32)
            smallest = np.minimum.reduceat(order[flat], offsets)
            band = (band ^ smallest) * np.uint64(0x9E3779B97F4A7C15)
            band ^= band >> np.uint64(29)
        candidates.append(_bucket_pairs(band, sizes, bits, threshold))
    pairs = np.unique(np.concatenate(candidates))
    similar: dict[int, int] = {}
    for later, earlier in zip((pairs // n).tolist(), (pairs % n).tolist(), strict=True):  # by later, then by earlier
        if later in similar or earlier in similar:
            continue
        common = len(np.intersect1d(sets[later], sets[earlier], assume_unique=True))
        if common >= threshold * (sizes[later] + sizes[earlier] - common) - 1e-9:
            similar[later] = earlier
    return similar


def _recall(threshold: float, rows: int) -> float:
    """Probability that two sets at the threshold share a bucket in at least one band."""
    return 1 - (1 - threshold**rows) ** (_NUM_HASHES // rows)


def _bitmaps(flat: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """uint64 [n, 4]: of each set the bits that its words stand for, one of 256 a word."""
    bits = np.zeros((len(sizes), 4), np.uint64)
    owner, bit = np.repeat(np.arange(len(sizes)), sizes), flat % 256
    np.bitwise_or.at(bits, (owner, bit // 64), np.uint64(1) << (bit % 64).astype(np.uint64))
    return bits


def _bucket_pairs(band: np.ndarray, sizes: np.ndarray, bits: np.ndarray, threshold: float) -> np.ndarray:
    """``later * n + earlier`` for sets in one bucket, unless their sizes or bitmaps alone rule the threshold out.

    Different sets of a and b > a words share at most a of b; of a words both, at most a - 1 of a + 1. A bit that is set
    in one bitmap alone is a word of one set alone at least, and of those there are at most (1 - t) / (1 + t) (a + b).
    """
    n = len(band)
    order = np.argsort(band, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], band[order][1:] != band[order][:-1]]))
    lengths = np.diff(np.concatenate([starts, [n]]))
    found = [np.zeros(0, np.int64)]
    shared = lengths > 1
    for start, length in zip(starts[shared].tolist(), lengths[shared].tolist(), strict=True):
        members = order[start : start + length].astype(np.int64)  # increasing: the sort is stable
        first = members[:_MAX_BUCKET]
        later, earlier = np.repeat(members, len(first)), np.tile(first, length)
        small, large = np.minimum(sizes[later], sizes[earlier]), np.maximum(sizes[later], sizes[earlier])
        best = np.where(small == large, (small - 1) / (small + 1), small / large)
        keep = (later > earlier) & (best >= threshold - 1e-9)
        later, earlier = later[keep], earlier[keep]
        apart = np.bitwise_count(bits[later] ^ bits[earlier]).sum(1, dtype=np.int64)
        keep = apart <= (1 - threshold) / (1 + threshold) * (sizes[later] + sizes[earlier]) + 1e-6
        found.append(later[keep] * n + earlier[keep])
    return np.concatenate(found)
