"""What a causal language model's family cannot do, told in one sentence and before anything is trained: attention
kernels, soft caps, adapters instead of a model, tables of positions. What a loaded model computes is proven in
`language`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beholder.config import LlmConfig
from beholder.model.weights import first_line
from beholder.types import UserError

KERNEL = "model.llm.attn_implementation"

_RUNNING_FAULTS = (
    AttributeError, AssertionError, KeyError, IndexError, TypeError, ValueError, RuntimeError, NotImplementedError,
)  # fmt: skip
"""What another's model code comes to when it is used in a way it does not know."""


@contextmanager
def kernel_at_hand(cfg: LlmConfig) -> Iterator[None]:
    """A family without the attention kernel asked for says so in transformers' words; here, what to set instead."""
    try:
        yield
    except UserError as e:
        why = "" if e.__cause__ is None else first_line(e.__cause__)  # pyright: ignore[reportArgumentType]
        if cfg.attn_implementation == "eager" or "does not support" not in why or "ttention" not in why:
            raise
        raise UserError(
            f"model.llm.name_or_path {cfg.name_or_path!r} with {KERNEL} {cfg.attn_implementation}: "
            f"{why.partition(' yet')[0]}. Set {KERNEL}: eager"
        ) from e


def check_soft_cap(config: Any, cfg: LlmConfig) -> None:
    """Refuse a soft cap on attention scores under sdpa, which has none. Told from the config: transformers before 5.18
    lets it pass and leaves the cap out."""
    cap = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    if cap is not None and cfg.attn_implementation == "sdpa":
        raise UserError(
            f"model.llm.name_or_path {cfg.name_or_path!r} caps its attention scores (attn_logit_softcapping {cap:g}), "
            f"which {KERNEL} sdpa cannot. Set {KERNEL}: eager"
        )


def check_no_adapter(name: str, what: str) -> None:
    """Refuse a folder of adapters: transformers would load its base with them beside it, and every number of ours
    would be about a base that is none. ``what`` is the setting."""
    if (Path(name) / "adapter_config.json").is_file():
        raise adapter_refusal(name, what)


def adapter_refusal(name: str, what: str) -> UserError:
    return UserError(
        f"{what} {name!r} is a PEFT adapter (adapter_config.json), not a model. Merge it into its base first and give "
        f"that folder: AutoPeftModelForCausalLM.from_pretrained({name!r}).merge_and_unload().save_pretrained(FOLDER), "
        "its tokenizer beside it"
    )


@contextmanager
def running(name: str, model: nn.Module) -> Iterator[None]:
    """What another's model code raises over embeddings and positions, as one sentence that names the family."""
    try:
        yield
    except UserError:
        raise
    except _RUNNING_FAULTS as e:
        if isinstance(e, torch.OutOfMemoryError) or "allocate memory" in str(e):
            raise
        raise UserError(
            f"{name} ({type(model).__name__}) cannot be run from embeddings and positions: {type(e).__name__}: "
            f"{first_line(e)}. This family cannot be used; give another language model (model.llm.name_or_path)"
        ) from e


def position_limit(causal_lm: nn.Module) -> int | None:
    """How many positions a sample may have before the model looks beyond a table of them; None where positions are
    computed (rotary, and most biases), whatever length the model was trained at. Works on the meta device too.

    A table is a module or buffer with a row for each of the config's positions (OPT keeps two more): GPT-2, GPT-Neo,
    GPT-J, CodeGen, OPT, BioGPT.
    """
    config: Any = causal_lm.config
    config = config.get_text_config()
    if config.model_type == "mpt":  # its bias is computed for so many, and nothing of that length is kept
        return int(config.max_seq_len)
    stated = getattr(config, "max_position_embeddings", None)
    if not isinstance(stated, int):
        return None
    tokens = causal_lm.get_input_embeddings()  # pyright: ignore[reportCallIssue]
    rows = [m.num_embeddings for m in causal_lm.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    for module in causal_lm.modules():
        if hasattr(module, "make_weights"):  # fairseq's sinusoids, which grow
            continue
        rows += [b.shape[0] for b in module.buffers(recurse=False) if b.ndim == 2]
    return stated if any(stated <= n <= stated + 2 for n in rows) else None


def check_positions(limit: int | None, max_seq_len: int, name: str) -> None:
    """Refuse samples longer than the language model's table of positions."""
    if limit is not None and max_seq_len > limit:
        raise UserError(
            f"prompting.max_seq_len is {max_seq_len}, but {name} has a table of {limit} positions and none beyond; set "
            f"prompting.max_seq_len: {limit} or lower"
        )
