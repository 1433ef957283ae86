"""What a causal language model's family cannot do, told in one sentence and before anything is trained: attention
kernels, soft caps, adapters instead of a model, tables of positions. What a loaded model computes is proven in
`language`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from beholder.config import LlmConfig, RunConfig
from beholder.model.weights import adapter_refusal, first_line
from beholder.types import UserError

_RUNNING_FAULTS = (
    AttributeError, AssertionError, KeyError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError,
    ArithmeticError,
)  # fmt: skip
"""What another's model code comes to when it is used in a way it does not know."""


@contextmanager
def kernel_at_hand(cfg: LlmConfig, section: str = "model.llm") -> Iterator[None]:
    """A family without the attention kernel asked for says so in transformers' words; here, what to set instead."""
    try:
        yield
    except UserError as e:
        why = "" if e.__cause__ is None else first_line(e.__cause__)  # pyright: ignore[reportArgumentType]
        if cfg.attn_implementation == "eager" or "does not support" not in why or "ttention" not in why:
            raise
        raise UserError(
            f"{section}.name_or_path {cfg.name_or_path!r} with {section}.attn_implementation "
            f"{cfg.attn_implementation}: {why.partition(' yet')[0]}. Set {section}.attn_implementation: eager"
        ) from e


def check_soft_cap(config: Any, cfg: LlmConfig, section: str = "model.llm") -> None:
    """Refuse a soft cap on attention scores under sdpa, which has none. Told from the config: transformers before 5.18
    lets it pass and leaves the cap out."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and cfg.attn_implementation == "sdpa":
        raise UserError(
            f"{section}.name_or_path {cfg.name_or_path!r} caps its attention scores (attn_logit_softcapping {cap:g}), "
            f"which {section}.attn_implementation sdpa cannot. Set {section}.attn_implementation: eager"
        )


def check_no_adapter(name: str, what: str) -> None:
    """Refuse a folder of adapters: transformers would load its base with them beside it, and every number of ours
    would be about a base that is none. ``what`` is the setting."""
    if (Path(name) / "adapter_config.json").is_file():
        raise adapter_refusal(name, what)


@contextmanager
def running(name: str, model: object, native: str | None = None) -> Iterator[None]:
    """What another's model code raises over embeddings and positions, as one sentence that names the family.
    ``native``: what of a native model is run, its processor or the model."""
    try:
        yield
    except UserError:
        raise
    except _RUNNING_FAULTS as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            raise
        if native is not None:
            raise UserError(
                f"model.native.name_or_path {name!r}: {native} ({type(model).__name__}) fails on a made-up image: "
                f"{type(e).__name__}: {first_line(e)}. Its settings, its weights and this version of transformers do "
                "not go together; get its files again, or give another model"
            ) from e
        raise UserError(
            f"{name} ({type(model).__name__}) cannot be run from embeddings and positions: {type(e).__name__}: "
            f"{first_line(e)}. This family cannot be used; give another language model (model.llm.name_or_path)"
        ) from e


class Limits(NamedTuple):
    """Lengths beyond which a model has nothing; None where it computes what it needs (rotary, and most biases),
    whatever length it was trained at."""

    positions: int | None
    """Positions of a sample: the rows of its table."""
    row: int | None
    """Positions of a packed row, however they are numbered: the side of its stored mask."""


NO_LIMITS = Limits(None, None)


def limits_of(causal_lm: nn.Module) -> Limits:
    """Told from what the model holds; works on the meta device too.

    A table is a module or buffer with a row for each of the config's positions (OPT keeps two more): GPT-2, GPT-Neo,
    GPT-J, CodeGen, OPT, BioGPT. GPT-Neo also keeps its causal mask.
    """
    config: Any = causal_lm.config
    config = config.get_text_config()
    if config.model_type == "mpt":  # its bias is computed for so many, and nothing of that length is kept
        return Limits(config.max_seq_len, config.max_seq_len)
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int):
        return NO_LIMITS
    tokens = causal_lm.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    rows = [m.num_embeddings for m in causal_lm.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    masks: list[int] = []
    for module in causal_lm.modules():
        if hasattr(module, "make_weights"):  # fairseq's sinusoids, which grow
            continue
        for buffer in module.buffers(recurse=False):
            if buffer.ndim == 2:
                rows.append(buffer.shape[0])
            elif buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2] == stated:
                masks.append(stated)
    return Limits(stated if any(stated <= n <= stated + 2 for n in rows) else None, min(masks, default=None))


def check_limits(limits: Limits, cfg: RunConfig) -> None:
    """Refuse samples and packed rows that are longer than the language model can take."""
    name, longest = cfg.model.llm.name_or_path, cfg.prompting.max_seq_len
    if cfg.model.student is not None:
        name = "the student (model.student)"
    if limits.positions is not None and longest > limits.positions:
        raise UserError(
            f"prompting.max_seq_len is {longest}, but {name} has a table of {limits.positions} positions and none "
            f"beyond; set prompting.max_seq_len: {limits.positions} or lower"
        )
    row = cfg.train.pack_len or longest
    if cfg.train.packing and limits.row is not None and row > limits.row:
        raise UserError(
            f"train.pack_len is {row}, but {name} has a mask for rows of {limits.row} positions; set train.pack_len: "
            f"{limits.row} or lower"
        )
