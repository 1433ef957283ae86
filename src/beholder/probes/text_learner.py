"""What is learnable blind (E-4): a learner that sees the words alone is trained on the questions, k-fold.

A model that was never trained on the questions understates what they give away (arXiv:2511.04655), so one is trained:
a multinomial logistic regression on the words and pairs of words of the question and, marked as such, of the turns
before it. Its held-out accuracy bounds from below what the data tell without an image, and its weights say by which
words.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
import torch

from beholder.data.images import ImageError, content_hash
from beholder.evidence import Measurement
from beholder.probes import drawn, measurement, ratio_of_sums
from beholder.probes.answers import SHORT_WORDS, references_of, usual_answer
from beholder.probes.strata import MIN_SAMPLES, groups_of, parts, questions
from beholder.probes.vqa import vqa_accuracy
from beholder.types import Example, ImageRef, UserError

ContentKey = Callable[[ImageRef], str]

FOLDS = 5
MAX_QUESTIONS = 40_000
"""Questions learned from; of more, as many are drawn."""
MAX_GRAMS, MAX_ANSWERS = 20_000, 200
"""The most frequent words and pairs of words, and answers; a rarer answer is never given, so always wrong."""
MOST_STEPS = 60
TOLD_WORDS = 8
GIVEN_AWAY = 0.5
"""Share of right answers, lower end of its interval, from which a group of questions is a finding."""
EARLIER = "earlier: "


@dataclass(frozen=True, slots=True)
class Asked:
    """One question with a short answer."""

    grams: tuple[str, ...]
    question: str
    answer: str
    """The usual one, normalised."""
    references: tuple[str, ...]
    kind: str | None
    owner: str
    """What it shares with other questions: its images. All of one owner are in one fold."""


@dataclass(frozen=True, slots=True)
class Telling:
    """A word, or two in a row, that spoke for a right answer to a question the learner had not seen."""

    gram: str
    answer: str
    weight: float
    """Mean log-odds it added for the answer over the second best."""
    n: int
    """Right answers it was part of."""

    def __str__(self) -> str:
        return f"“{self.gram}” → {self.answer} ({self.weight:+.1f} nats, {self.n:,} times)"


@dataclass(frozen=True)
class Learned:
    measurements: list[Measurement]
    words: list[Telling]
    """Most telling first."""
    findings: list[str]
    gaps: list[str]
    seconds: float


def asked_of(examples: Sequence[Example], owners: Sequence[str]) -> tuple[list[Asked], int]:
    """Every question of the examples that has a short answer, and how many have a longer one."""
    kinds = groups_of(examples, [""] * len(examples))["question"]
    out: list[Asked] = []
    longer = 0
    for example, own, owner in zip(examples, kinds, owners, strict=True):
        answered = [t.text for t in example.turns if t.role == "assistant"]
        before: list[str] = []
        for k, (question, answer) in enumerate(zip(questions(example), answered, strict=True)):
            references = references_of(example) if k == len(answered) - 1 else (answer,)
            usual = usual_answer(references)
            if question.strip() and usual:
                if (k == len(answered) - 1 and example.answers) or len(usual.split()) <= SHORT_WORDS:
                    grams = (*_grams(question), *(EARLIER + g for text in before for g in _grams(text)))
                    text = " ".join(question.casefold().split())
                    out.append(Asked(tuple(dict.fromkeys(grams)), text, usual, references, own[k], owner))
                else:
                    longer += 1
            before += [question, answer]
    return out, longer


def owners_of(examples: Sequence[Example], content_key: ContentKey = content_hash) -> tuple[list[str], int]:
    """What each shares with other questions: its images, told apart by their content; itself without any. And how many
    images could not be read: where they lie tells them apart. Files of a size that no other has are not read."""
    keys: dict[ImageRef, str] = {}
    lost = 0
    refs = dict.fromkeys(ref for example in examples for ref in example.images)
    sizes = {ref: _size(ref) for ref in refs}
    files = Counter(sizes[ref] for ref in {(ref.root, ref.path): ref for ref in refs}.values())
    for ref in refs:
        if sizes[ref] is not None and files[sizes[ref]] == 1:
            keys[ref] = f"{sizes[ref]} bytes"
            continue
        try:
            keys[ref] = content_key(ref)
        except ImageError:
            keys[ref] = f"{ref} {ref.offset} {ref.item}"
            lost += 1
    return ["/".join(sorted(keys[ref] for ref in e.images)) or e.id for e in examples], lost


def _size(ref: ImageRef) -> int | None:
    """Bytes of an image that is a file of its own."""
    if ref.kind != "file":
        return None
    try:
        return os.stat(os.path.join(ref.root, ref.path)).st_size
    except (OSError, ValueError):
        return None


def numbered(owners: Sequence[str]) -> np.ndarray:
    """Each owner's number among the different ones by name, from 0. int64."""
    number = {owner: k for k, owner in enumerate(sorted(set(owners)))}
    return np.array([number[owner] for owner in owners], dtype=np.int64)


def folds_of(owner: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """The fold of each; all of one of the `numbered` owners are in one fold."""
    return (rng.permutation(owner.max() + 1) % folds)[owner]


def learn(
    examples: Sequence[Example], folds: int = FOLDS, seed: int = 0, *, content_key: ContentKey = content_hash
) -> Learned:
    """``learner.accuracy`` and ``learner.majority`` over questions held out in turn, overall and by kind of question.

    ``majority`` answers with what is most often right for the very same question among those to learn from, else for
    its kind. Questions about the same images are in one fold, and drawn together for the intervals. Raises UserError
    for fewer than `MIN_SAMPLES` images with a short answer.
    """
    started = time.perf_counter()
    owners, lost = owners_of(examples, content_key)
    asked, longer = asked_of(examples, owners)
    rng = np.random.default_rng(seed)
    gaps = [] if not longer else [
        f"Blind learner: {longer:,} of {longer + len(asked):,} answers are longer than {SHORT_WORDS} words and were "
        "left out; they are not right or wrong as a whole."
    ]  # fmt: skip
    if lost:
        gaps.append(
            f"Blind learner: {lost:,} images could not be read; where they lie, and not what they show, says which "
            "questions are about the same ones."
        )
    if len(asked) > MAX_QUESTIONS:
        gaps.append(f"Blind learner: {MAX_QUESTIONS:,} of {len(asked):,} questions were drawn.")
        asked = drawn(asked, MAX_QUESTIONS, rng)
    owner = numbered([a.owner for a in asked])
    if (different := len(np.unique(owner))) < MIN_SAMPLES:
        raise UserError(
            f"blind learner: only {different} samples have a question with a short answer (at most {SHORT_WORDS} "
            f"words); {MIN_SAMPLES} are needed to learn from some and hold out others"
        )
    fold = folds_of(owner, folds, rng)
    table = _Table(asked)
    right, usual = np.zeros(len(asked)), np.zeros(len(asked))
    added: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for f in range(folds):
        train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
        weights, bias = table.fit(train)
        given, second = table.best_two(weights, bias)
        said = _majority([asked[k] for k in train])
        for k in test.tolist():
            row = int(table.row[k])
            first, other = int(given[row]), int(second[row])
            right[k] = vqa_accuracy(table.answers[first], asked[k].references)
            usual[k] = vqa_accuracy(said(asked[k]), asked[k].references)
            if right[k] > 0.5:
                for g in table.grams_of[row]:
                    cell = added[g, first]
                    cell[0] += float(weights[g, first] - weights[g, other])
                    cell[1] += 1
    words = sorted(added.items(), key=lambda item: (-item[1][0], item[0]))[:TOLD_WORDS]
    telling = [
        Telling(table.grams[g], table.answers[c], total / n, int(n)) for (g, c), (total, n) in words if total > 0
    ]
    caveats = (
        "trained on other questions of this data, no image",
        "the most frequent answer to the same question, else to its kind",
    )
    shares = {"accuracy": (right, caveats[0]), "majority": (usual, caveats[1])}
    measured = _measure([a.kind for a in asked], owner, shares, seed)
    return Learned(measured, telling, _findings(measured, telling), gaps, time.perf_counter() - started)


class _Table:
    """Distinct questions as rows: what is learned from them does not grow with how often they are asked."""

    def __init__(self, asked: Sequence[Asked]) -> None:
        rows: dict[tuple[str, ...], int] = {}
        self.row = np.array([rows.setdefault(a.grams, len(rows)) for a in asked])
        often = Counter(chain.from_iterable(a.grams for a in asked))
        self.grams = [g for g, n in _most(often, MAX_GRAMS) if n > 1]
        self.answers = [a for a, _ in _most(Counter(a.answer for a in asked), MAX_ANSWERS)]
        number = {g: k for k, g in enumerate(self.grams)}
        self.grams_of = [[number[g] for g in grams if g in number] for grams in rows]
        self._flat = torch.tensor(list(chain.from_iterable(self.grams_of)), dtype=torch.int64)
        lengths = [0, *(len(g) for g in self.grams_of)]
        self._starts = torch.tensor(np.cumsum(lengths)[:-1], dtype=torch.int64)
        place = {a: k for k, a in enumerate(self.answers)}
        self._label = np.array([place.get(a.answer, -1) for a in asked])

    def _logits(self, weights: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return bias + torch.nn.functional.embedding_bag(self._flat, weights, self._starts, mode="sum")

    def fit(self, members: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [grams, answers] and bias: the summed log-likelihood with a squared norm's half as penalty, which has
        one optimum; nothing is drawn."""
        known = members[self._label[members] >= 0]
        counts = Counter(zip(self.row[known].tolist(), self._label[known].tolist(), strict=True))
        rows, labels = (torch.tensor(column) for column in zip(*counts, strict=True))
        times = torch.tensor(list(counts.values()), dtype=torch.float32)
        asked = torch.zeros(len(self.grams_of)).index_add_(0, rows, times)
        weights = torch.zeros(max(len(self.grams), 1), len(self.answers), requires_grad=True)
        bias = torch.zeros(len(self.answers), requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights, bias], max_iter=MOST_STEPS, history_size=5, line_search_fn="strong_wolfe"
        )

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            logits = self._logits(weights, bias)
            nll = (asked * logits.logsumexp(1)).sum() - (times * logits[rows, labels]).sum()
            total = nll + weights.square().sum() / 2
            weights.grad, bias.grad = torch.autograd.grad(total, [weights, bias])
            return total

        optimizer.step(loss)
        return weights.detach(), bias.detach()

    def best_two(self, weights: torch.Tensor, bias: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The answer to each row, and the one that comes second."""
        with torch.no_grad():
            order = self._logits(weights, bias).topk(min(2, len(self.answers)), dim=1).indices.numpy()
        return order[:, 0], order[:, -1]


def _grams(text: str) -> list[str]:
    words = re.findall(r"\w+", text.casefold())
    return [*words, *(f"{a} {b}" for a, b in pairwise(words))]


def _most(counted: Counter[str], limit: int) -> list[tuple[str, int]]:
    """Most frequent first, equal ones by name: the same on every machine."""
    return sorted(counted.items(), key=lambda pair: (-pair[1], pair[0]))[:limit]


class _majority:
    """The usual answer to the very question, else to its kind, else to any."""

    def __init__(self, asked: Iterable[Asked]) -> None:
        counted: dict[tuple[str, str | None], Counter[str]] = defaultdict(Counter)
        for a in asked:
            for key in (("question", a.question), ("kind", a.kind), ("any", None)):
                counted[key][a.answer] += 1
        self._usual = {key: _most(own, 1)[0][0] for key, own in counted.items()}

    def __call__(self, a: Asked) -> str:
        keys = (("question", a.question), ("kind", a.kind), ("any", None))
        return next(self._usual[key] for key in keys if key in self._usual)


def by_kind(
    examples: Sequence[Example], owner: np.ndarray, shares: Mapping[str, tuple[np.ndarray, str]], seed: int = 0
) -> list[Measurement]:
    """``learner.<name>`` over samples with one answer each, overall and by kind of question, from (right, caveat);
    ``owner``: as `numbered` says."""
    kinds = [own[-1] for own in groups_of(examples, [""] * len(examples))["question"]]
    return _measure(kinds, owner, shares, seed)


def _measure(
    kinds: Sequence[str | None], owner: np.ndarray, shares: Mapping[str, tuple[np.ndarray, str]], seed: int
) -> list[Measurement]:
    """Overall and by kind; an interval resamples images, whose questions are drawn together."""
    groups: list[tuple[str | None, str | None, np.ndarray]] = [(None, None, np.arange(len(kinds)))]
    out: list[Measurement] = []
    for by, name, own in [*groups, *parts(kinds, "question")]:
        _, place = np.unique(owner[own], return_inverse=True)
        if place.max() + 1 < MIN_SAMPLES:
            continue
        asks = np.bincount(place).astype(np.float64)
        for what, (right, caveat) in shares.items():
            share = ratio_of_sums(np.bincount(place, weights=right[own]), asks, seed)
            out.append(measurement(f"learner.{what}", *share, n=len(own), by=by, stratum=name, caveat=caveat))
    return out


def gain_over(right: Measurement, learner: Measurement) -> Measurement:
    """How much oftener answers with their images are right (``answer.accuracy.correct``) than the learner's.

    Held-out and training questions are different ones, so the ends of both intervals are added in quadrature (Newcombe
    1998, Statistics in Medicine 17:873, method 10).
    """
    value, ends = right.value - learner.value, None
    if right.ci95 is not None and learner.ci95 is not None:
        (low, high), (least, most) = right.ci95, learner.ci95
        ends = (
            value - math.hypot(right.value - low, most - learner.value),
            value + math.hypot(high - right.value, learner.value - least),
        )
    return Measurement(
        name="learner.gain", value=value, unit="share", better="higher", n=right.n, ci95=ends,
        caveat="answers to held-out questions with their images, over what was learned from training questions' words",
    )  # fmt: skip


def _findings(measured: Sequence[Measurement], words: Sequence[Telling]) -> list[str]:
    found = [m for m in measured if m.name == "learner.accuracy" and m.ci95 is not None and m.ci95[0] > GIVEN_AWAY]
    if not found:
        return []
    told = ", ".join(
        f"{'all questions' if m.stratum is None else repr(m.stratum)} {m.value:.1%} (n={m.n:,})"
        for m in sorted(found, key=lambda m: (m.stratum is not None, -m.value))[:6]
    )
    by = f" What gives them away: {'; '.join(map(str, words[:5]))}." if words else ""
    return [
        f"Learnable without an image: trained on the words alone, a learner gives right answers to {told}.{by} "
        "Accuracy on them says little about sight: balance the answers of each question, or judge by contrast pairs."
    ]
