"""Whether the language model still writes plain text as it did before its adapters learned (S2-5).

The same texts are scored twice by the same function, with the adapters off (the base, bit for bit) and on: the loss
says how well text is still predicted, the divergence how far the predictions have moved, for better or worse. The texts
are the package's own (``retention.txt``) or the user's; no image takes part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from beholder.evidence import Measurement
from beholder.probes import Measurable, joined, measurement, measuring, ratio_of_sums
from beholder.types import UserError

TEXTS = "retention.txt"
MAX_TOKENS = 1024
"""A longer passage is read up to here."""
STYLED = 16
"""Tokens of a passage after which its style is known (`measure`)."""
NUM_POSITIONS = 64
"""Positions whose logits exist at a time: 40 MB a copy at a vocabulary of 152,000."""
BASE_LOSS = (1.0, 5.0)
"""Nats per token between which a working language model is on the package's texts: SmolLM2-135M, small and mostly
English, is at 3.0. Below, it has read them; above, weights, tokenizer or precision are not what they should be."""

_ESCAPE = re.compile(r"\\([nt\\])")
_ESCAPED = {"n": "\n", "t": "\t", "\\": "\\"}


class Language(Protocol):
    """The part of `model.language.LanguageModel` that is needed here."""

    vocab: int

    def embed(self, ids: Tensor, /) -> Tensor: ...
    def hidden(self, inputs_embeds: Tensor, position_ids: Tensor, /) -> Tensor: ...
    def head(self, hidden: Tensor, /) -> Tensor: ...


class AdaptedModel(Measurable, Protocol):
    """The part of `model.vlm.VisionLanguageModel` that is needed here."""

    @property
    def device(self) -> torch.device: ...
    @property
    def language(self) -> Language: ...
    def adapters_off(self) -> AbstractContextManager[None]: ...


def load_texts(path: str | Path | None = None) -> list[str]:
    r"""The passages of a UTF-8 text file, one a line; ``None``: the package's own, some forty.

    In a line ``\n`` is a line break, ``\t`` a tab and ``\\`` a backslash, so that code fits into one. Empty lines and
    lines that begin with ``# `` are no passages. Raises UserError for a file that cannot be read or holds none.
    """
    source = files("beholder") / "probes" / TEXTS if path is None else Path(path)
    try:
        lines = source.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"eval.retention_path {str(path)!r} cannot be read ({e}); give a UTF-8 text file with a passage a line"
        ) from e
    texts = [_ESCAPE.sub(lambda m: _ESCAPED[m[1]], line.strip()) for line in lines]
    texts = [text for text, line in zip(texts, lines, strict=True) if text and not line.startswith("# ")]
    if not texts:
        raise UserError(f"eval.retention_path {str(path)!r} holds no passage; expected one a line")
    return texts


def measure(model: AdaptedModel, tokenizer: Any, texts: Sequence[str], *, seed: int = 0) -> list[Measurement]:
    """``retention.loss_base``, ``.loss``, ``.loss_ratio`` (on / off), ``.loss_ratio_styled`` and ``.kl`` of the texts.

    Losses are nats per token over all tokens but each text's first; KL(base || adapted) is the mean over the same
    places, over the whole vocabulary. Intervals resample texts. Raises UserError for a text of fewer than two tokens.

    ``loss_ratio_styled`` is corrected for style: the same ratio over the tokens after each text's first `STYLED` alone.
    A model that learned to answer shortly, in chat turns, expects that from the first token on; what it loses there is
    format, not knowledge (arXiv:2505.02486). Given the first words of a passage both models know that plain text goes
    on, so what is still lost is. The texts, the passes and the places are the same, so the two ratios compare; a prompt
    in the trained format would ask for another text and mix what it asks with what it costs. Absent when no text is
    longer.
    """
    rows, cut = [], 0
    with measuring(model):
        for text in texts:
            ids = [int(i) for i in tokenizer(text)["input_ids"]]
            if len(ids) < 2:
                raise UserError(
                    f"retention: the text {text[:40]!r} has {len(ids)} token; a passage needs two or more, one to read "
                    "and one to predict"
                )
            cut += len(ids) > MAX_TOKENS
            rows.append(_compare(model, ids[:MAX_TOKENS]))
    columns = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    tokens, base, adapted, kl, late_tokens, late_base, late_adapted = columns
    n, about = len(texts), f"{int(tokens.sum())} tokens of {len(texts)} texts"
    about += f"; {cut} of them read up to {MAX_TOKENS} tokens" if cut else ""

    late = late_tokens > 0
    styled = [
        measurement(
            "retention.loss_ratio_styled", *ratio_of_sums(late_adapted[late], late_base[late], seed),
            n=int(late.sum()), caveat=f"after the first {STYLED} tokens of each text: {int(late_tokens.sum())} tokens",
        )
        for _ in range(bool(late.any()))
    ]  # fmt: skip
    whole = [
        measurement(f"retention.{name}", *ratio_of_sums(top, bottom, seed), n=n, caveat=joined(caveat, about))
        for name, top, bottom, caveat in (
            ("loss_base", base, tokens, "adapters off"),
            ("loss", adapted, tokens, "adapters on"),
            ("loss_ratio", adapted, base, "adapters on over off, the same texts"),
            ("kl", kl, tokens, "KL(base || adapted): how far the predictions have moved"),
        )
    ]
    return whole + styled


def findings(measured: Sequence[Measurement]) -> list[str]:
    """A warning when the base itself is not where a working language model is on the package's texts (`BASE_LOSS`).

    A ratio to a broken base says nothing.
    """
    low, high = BASE_LOSS
    below, above = "it may have been trained on them", "weights, tokenizer or precision may not be what they should be"
    return [
        f"On plain text the base language model's loss is {m.value:.3g} nats/token, expected {low:g} to {high:g}: "
        f"{below if m.value < low else above}, and what its adapters keep of it says little."
        for m in measured
        if m.name == "retention.loss_base" and not low <= m.value <= high
    ]


def _compare(model: AdaptedModel, ids: Sequence[int]) -> tuple[int, float, float, float, int, float, float]:
    """(tokens predicted, base nll, adapted nll, KL) of one text, and the first three of its tokens after the first
    `STYLED`; summed in fp64, never all its logits at once."""
    language = model.language
    row = torch.tensor([ids], dtype=torch.int64, device=model.device)
    positions = torch.arange(len(ids), device=row.device)[None]

    def hidden() -> Tensor:
        return language.hidden(language.embed(row), positions)[0, :-1]

    with model.adapters_off():
        base = hidden()
    adapted, targets = hidden(), row[0, 1:]
    sums, late = torch.zeros(3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for k in range(0, len(targets), NUM_POSITIONS):
        part = slice(k, k + NUM_POSITIONS)
        # The head has no adapter, so one and the same head reads both. fp32 within a position (fp64 would take ten
        # times as long, and the logits have the 8 or 24 bits of the model), fp64 over positions.
        log_p, log_q = (
            torch.log_softmax(language.head(h[part])[:, : language.vocab].float(), dim=-1) for h in (base, adapted)
        )
        own = targets[part, None]
        per_token = [-log_p.gather(1, own)[:, 0], -log_q.gather(1, own)[:, 0], (log_p.exp() * (log_p - log_q)).sum(1)]
        found = torch.stack(per_token).cpu().double()
        sums += found.sum(1)
        late += found[:2, max(0, STYLED - 1 - k) :].sum(1)  # target i is token i + 1 of the text
    before, after, kl = sums.tolist()
    num_late = max(0, len(ids) - STYLED)
    # rounding may leave -1e-7 where little moved
    return len(targets), before, after, max(kl, 0.0), num_late, *late.tolist()
