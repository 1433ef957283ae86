"""A language model made for a run (``model.student``): of a family's shape with random weights, or cut from another's
layers. How it is run is `language`'s business, that it learns `learned`'s and `plan`'s.

Random weights come from the seed alone. What is cut has the class and the settings of the whole model with fewer
layers, so whatever a family makes of a layer's number it makes of the new one; `language.load_language` then holds it
to the same checks as any other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beholder.config import LlmConfig, ModelConfig, StudentConfig
from beholder.model.families import check_soft_cap, kernel_at_hand
from beholder.model.language import empty_language, load_tokenizer, read_config, read_language
from beholder.model.placement import Part, choose, decoder_layers
from beholder.model.weights import listed, loading
from beholder.types import UserError

_WHAT = "model.student: a language model"


def make_student(cfg: StudentConfig, llm: LlmConfig, tokenizer: Any, seed: int, *, held: bool) -> tuple[Any, str]:
    """(causal language model in fp32, its name). ``held``: a checkpoint holds its weights, which will be put in place;
    nothing is read from the model that it was cut from but its configuration.

    Raises `UserError` for layers that there are not, a table with fewer rows than the tokenizer has ids, and files of
    the whole model as `read_language` does.
    """
    config, chosen = _config(cfg, llm, tokenizer)
    with kernel_at_hand(llm), loading(_WHAT, "Give other sizes."), torch.random.fork_rng(devices=[]):
        from transformers import AutoModelForCausalLM

        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=llm.attn_implementation,
            trust_remote_code=llm.trust_remote_code,
        )  # fmt: skip
    if chosen and not held:
        _fill(model, read_language(llm, torch.float32), chosen, llm.name_or_path)
    return model, _name(cfg, llm, chosen)


def empty_of(cfg: ModelConfig) -> Any:
    """The language model that ``cfg`` has, on the meta device: a student, or the one that is named."""
    return empty_language(cfg.llm) if cfg.student is None else empty_student(cfg.student, cfg.llm)


def empty_student(cfg: StudentConfig, llm: LlmConfig, *, config: Any = None, beside: Path | None = None) -> Any:
    """`make_student` on the meta device. ``config``: of the model that it is cut from; ``beside``: as `load_tokenizer`
    has it. The tokenizer need not be at hand where ``vocab`` is given. Raises `UserError` as `make_student` does."""
    tokenizer = None
    if cfg.like is not None:
        try:
            tokenizer = load_tokenizer(llm, beside=beside)
        except UserError:
            if cfg.vocab is None:
                raise
    config, _ = _config(cfg, llm, tokenizer, config)
    kernel = {"attn_implementation": "sdpa"} if llm.attn_implementation == "sdpa" else {}
    with kernel_at_hand(llm), loading(_WHAT, "Give other sizes."), torch.device("meta"):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_config(config, trust_remote_code=llm.trust_remote_code, **kernel)


def check_budget(most: int | None, params: Mapping[str, int]) -> None:
    """Refuse parts with more weights together than ``most``."""
    total = sum(params.values())
    if most is None or total <= most:
        return
    table = "\n".join(f"  {part:<12}{count:>16,}" for part, count in params.items())
    largest = max(params, key=lambda part: params[part])
    lower = {
        "language": "model.student's hidden, layers or vocab",
        "vision": "take a smaller tower (model.vision.name_or_path)",
        "connector": "model.connector's resampler.dim, resampler.depth or projector.hidden",
    }  # fmt: skip
    raise UserError(
        f"the student has {total:,} weights, {total - most:,} more than model.student.max_params {most:,}:\n{table}\n"
        f"Most are the {largest}'s; lower {lower.get(largest, 'it')}, or raise max_params."
    )


def _config(
    cfg: StudentConfig, llm: LlmConfig, tokenizer: Any, whole: Any = None
) -> tuple[Any, tuple[int, ...]]:  # fmt: skip
    """(configuration of the model to be made, the layers of another that it has)."""
    if cfg.like is not None:
        return _shaped(cfg, llm, tokenizer), ()
    assert cfg.cut is not None
    config = read_config(llm) if whole is None else whole
    check_soft_cap(config, llm)
    text = config.get_text_config()
    depth = text.num_hidden_layers
    numbers = Part("language", llm.name_or_path, nn.Module(), tuple(map(str, range(depth))))
    chosen = tuple(map(int, choose(numbers, cfg.cut, "model.student.cut")))
    for name, value in list(vars(text).items()):  # layer_types, no_rope_layers: one entry a layer
        if "layer" in name and isinstance(value, list | tuple) and len(value) == depth:
            setattr(text, name, type(value)(value[k] for k in chosen))
    text.num_hidden_layers = len(chosen)
    return config, chosen


def _shaped(cfg: StudentConfig, llm: LlmConfig, tokenizer: Any) -> Any:
    """The configuration of a family's model of these sizes."""
    from transformers import GPT2Config, LlamaConfig

    ids = 1 + max(tokenizer.get_vocab().values()) if tokenizer is not None else None
    rows = cfg.vocab or ids
    assert rows is not None
    if ids is not None and rows < ids:
        raise UserError(
            f"model.student.vocab is {rows:,}, but the tokenizer of {llm.name_or_path} has ids up to {ids - 1:,}; give "
            f"{ids:,} or more, or leave it out"
        )
    hidden, heads = cfg.hidden, cfg.heads
    assert hidden is not None and heads is not None and cfg.layers is not None
    shared: dict[str, Any] = {
        "vocab_size": rows, "tie_word_embeddings": cfg.tie_embeddings, "pad_token_id": None,
        "bos_token_id": getattr(tokenizer, "bos_token_id", None),
        "eos_token_id": getattr(tokenizer, "eos_token_id", None),
    }  # fmt: skip
    if cfg.like == "gpt2":
        return GPT2Config(
            n_embd=hidden, n_layer=cfg.layers, n_head=heads, n_inner=cfg.intermediate or 4 * hidden,
            n_positions=cfg.positions, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shared,
        )  # fmt: skip
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=cfg.layers, num_attention_heads=heads,
        num_key_value_heads=cfg.kv_heads or heads, intermediate_size=cfg.intermediate or round(8 * hidden / 3),
        max_position_embeddings=cfg.positions, **shared,
    )  # fmt: skip


@torch.no_grad()
def _fill(model: nn.Module, whole: nn.Module, chosen: tuple[int, ...], name: str) -> None:
    """Put the weights of ``whole`` into ``model``: of the chosen layers, and of all that is no layer."""
    theirs, own = whole.state_dict(), model.state_dict()
    old, new = decoder_layers(whole), decoder_layers(model)
    if old is None or new is None:
        raise UserError(f"model.student.cut: no list of decoder layers was found in {name} ({type(whole).__name__})")
    pairs = {key: key for key in own if not key.startswith(f"{new}.")}
    for k, number in enumerate(chosen):
        before = f"{new}.{k}."
        pairs |= {key: f"{old}.{number}.{key.removeprefix(before)}" for key in own if key.startswith(before)}
    for key, source in pairs.items():
        if source in theirs and theirs[source].shape == own[key].shape:
            own[key].copy_(theirs[source])
    # afterwards, so that a head that is the table in one of them only is found
    odd = [k for k, source in pairs.items() if source not in theirs or not torch.equal(own[k], theirs[source])]
    if odd:
        raise UserError(
            f"model.student.cut: {name} ({type(whole).__name__}) cannot be cut: with fewer layers its class has other "
            f"weights ({listed(odd, 3)}); make a student of a family's shape (model.student.like)"
        )


def _name(cfg: StudentConfig, llm: LlmConfig, chosen: tuple[int, ...]) -> str:
    if cfg.like is not None:
        return f"{cfg.like} of {cfg.layers} layers, {cfg.hidden} wide"
    return f"{llm.name_or_path}, layers {', '.join(map(str, chosen))}"
