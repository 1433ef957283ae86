"""Where adapters go: patterns resolved into one explicit list of layers, counted, and refused when they hit nothing or
something else."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from beholder.model.weights import listed
from beholder.types import UserError

FIELD = "model.lora.target_modules"


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """One linear layer with an adapter: ``name`` below the causal language model, its shape, what is added."""

    name: str
    d_in: int
    d_out: int
    rank: int
    params: int


def resolve_targets(causal_lm: nn.Module, patterns: Sequence[str], rank: int) -> list[AdapterSite]:
    """The linear layers (GPT-2's transposed ``Conv1D`` among them) that ``patterns`` name, in the model's order.

    A pattern is the last parts of a module's name (``q_proj``, ``self_attn.q_proj``) or a regular expression matching
    the whole name below ``causal_lm``. Raises `UserError` when one matches nothing (with the nearest names), something
    that is not a linear layer, or anything outside the layers of the decoder: its embeddings, its head, or, when
    ``causal_lm`` is a whole vision-language model, its tower.
    """
    layers = decoder_layers(causal_lm)
    modules = {name: m for name, m in causal_lm.named_modules() if name}
    adaptable = {n: s for n, m in modules.items() if n.startswith(layers + ".") and (s := _linear_shape(m))}
    if not adaptable:
        raise UserError(
            f"{type(causal_lm).__name__} has no linear layers in {layers}, so adapters cannot be placed; set "
            "model.lora.enable: false for this language model"
        )
    wanted: set[str] = set()
    for pattern in patterns:
        expression = _expression(pattern)
        hits = [n for n in modules if n == pattern or n.endswith("." + pattern) or expression.fullmatch(n)]
        if not hits:
            raise UserError(f"{FIELD} {pattern!r} matches no module. {_nearest(pattern, adaptable)}")
        outside = [name for name in hits if not name.startswith(layers + ".")]
        if outside:
            inside = len(hits) - len(outside)
            advice = f"Say it more narrowly, such as {_narrower(pattern, layers)!r}" if inside else "Take it out"
            raise UserError(
                f"{FIELD} {pattern!r} reaches outside the language model's layers ({layers}): it matches "
                f"{counted(outside)} there and {inside} inside. Adapters go on their linear maps alone. {advice}."
            )
        odd = [name for name in hits if name not in adaptable]
        if odd:
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(type(modules[o]).__name__ for o in odd).items())
            raise UserError(
                f"{FIELD} {pattern!r} matches {counted(odd)} ({kinds}), which are no linear layers. "
                f"{_nearest(pattern, adaptable)}"
            )
        wanted.update(hits)
    return [
        AdapterSite(name, d_in, d_out, rank, rank * (d_in + d_out))
        for name, (d_in, d_out) in adaptable.items()
        if name in wanted
    ]


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of a linear layer, of which GPT-2 has a kind of its own; None for everything else."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return weight.shape[0], weight.shape[1]
    return None


def decoder_of(causal_lm: Any) -> nn.Module:
    """The part that gives hidden states. Llama 4's text model does not name its own, and gives itself."""
    decoder = causal_lm.get_decoder()
    return getattr(causal_lm, "model", decoder) if decoder is causal_lm else decoder


def decoder_layers(causal_lm: nn.Module) -> str:
    """Name of the list of decoder layers below ``causal_lm``: ``model.layers``."""
    names = {id(m): name for name, m in causal_lm.named_modules()}
    module: Any
    for module in causal_lm.modules():
        # Towers have the method too, but nothing that gives logits.
        if not hasattr(module, "get_decoder") or module.get_output_embeddings() is None:
            continue
        decoder = decoder_of(module)
        depth = module.config.get_text_config().num_hidden_layers
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return names[id(child)]
    raise UserError(
        f"{type(causal_lm).__name__}: no list of decoder layers was found, so adapters cannot be placed; set "
        "model.lora.enable: false for this language model"
    )


def _expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression. How long it may search is the business of the person who wrote it."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(
            f"{FIELD} {pattern!r} is neither the last part of a module's name nor a regular expression: {e}"
        ) from e


def _nearest(pattern: str, adaptable: Mapping[str, object]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in adaptable)
    last = re.split(r"[^\w]+", pattern.rstrip("$"))[-1]
    close = difflib.get_close_matches(last, counts, n=3, cutoff=0.5) or list(counts)
    return "Nearest: " + ", ".join(f"{name} ({counts[name]} modules)" for name in close) + "."


def counted(names: Sequence[str]) -> str:
    """``model.vision_tower.….q_proj (12)``: names with their layer numbers folded."""
    counts = Counter(folded(name) for name in names)
    return listed(f"{name} ({n})" if n > 1 else name for name, n in counts.items())


def folded(name: str) -> str:
    """``model.layers.*.mlp.up_proj``: a module's name without its numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _narrower(pattern: str, layers: str) -> str:
    tail = pattern if re.fullmatch(r"[\w.]+", pattern) else "q_proj"
    return rf"{re.escape(layers)}\..*\.{re.escape(tail)}"


def render_sites(sites: Sequence[AdapterSite]) -> str:
    """The resolved list as a table to print: modules of one name and shape together, counted, and the total."""
    groups = Counter((s.name.rpartition(".")[2], s.d_in, s.d_out, s.rank) for s in sites)
    lines = [f"{'adapter on':<16}{'modules':>9}{'shape':>16}{'rank':>6}{'parameters':>14}"]
    for (last, d_in, d_out, rank), count in groups.items():
        lines.append(f"{last:<16}{count:>9}{f'{d_in} x {d_out}':>16}{rank:>6}{count * rank * (d_in + d_out):>14,}")
    lines.append(f"{'total':<16}{len(sites):>9}{'':>16}{'':>6}{sum(s.params for s in sites):>14,}")
    return "\n".join(lines)
