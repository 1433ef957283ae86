"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on a part of a model, the language model or the vision tower:
the only door to peft.

Which layers get one is resolved in `placement`, the layers themselves are `adapted_linear`'s and `adapted_conv`'s.
Attaching, switching off, merging, reading and writing adapters all live here; the base's weights are never changed but
by `merge_in`, before anything learns. What learns is `plan`'s business, files are `train.checkpoint`'s. Importing it
takes seconds (peft brings transformers): others import it where they use it.
"""

import json
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from beholder.config import LoraConfig
from beholder.model.adapted_conv import AdaptedConv
from beholder.model.adapted_linear import ADAPTER, AdaptedLinear, adapter_weights
from beholder.model.language import LanguageModel
from beholder.model.learned import narrowed
from beholder.model.placement import (
    AdapterSite,
    Part,
    Selector,
    counted,
    folded,
    inside,
    matrix_shape,
    resolve_targets,
    selectors,
    without_adapters,
)
from beholder.model.weights import check_finite, first_line, listed, quiet_transformers
from beholder.types import TrainedPart, UserError

KEY_PREFIX = "base_model.model."
"""What PEFT puts before the names of the causal language model in its files."""


# ---------------------------------------------------------------------------------------------------------------
# Attach


def attach(part: Part, cfg: LoraConfig, seed: int, selector: Selector | None = None) -> list[AdapterSite]:
    """Put an adapter on every layer that ``selector`` names, or ``cfg`` for this part; gives them in the model's order.

    A is drawn from ``seed`` alone (U(±1/sqrt(d_in)), PEFT's own), B is 0: the model computes what it did before. The
    adapters' weights are fp32 whatever the base is stored in; the base's are untouched and frozen. Raises `UserError`
    as `resolve_targets` does, and for layers that the model never calls.
    """
    assert not part.adapters, f"the {part.name} part has adapters already"
    selector = selector or selectors(cfg, {part.name: part})[part.name]
    sites = resolve_targets(part, selector, cfg.r)
    if both := [s.name for s in sites if inside(s.name, part.unfrozen)]:
        raise UserError(
            f"{selector.field}: {counted(both)} would get adapters, and model.vision.unfreeze lets their weights learn "
            "themselves; choose one of the two for each layer"
        )
    config = _peft_config(part, cfg, sites)
    # What others must know to merge; here each layer knows it of itself.
    config.fan_in_fan_out = all(isinstance(part.module.get_submodule(s.name), Conv1D) for s in sites)
    config._register_custom_module({nn.Linear: AdaptedLinear, Conv1D: AdaptedLinear, nn.Conv2d: AdaptedConv})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # PEFT draws weights of its own first
        # peft 0.21 asks transformers 5.23 in words that the latter is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        try:
            inject_adapter_in_model(config, part.module, adapter_name=ADAPTER)
        except ValueError as e:
            raise _misplaced(part, selector, sites, first_line(e)) from e
    placed = _adapted(part)
    if list(placed) != [s.name for s in sites] or config.target_parameters:
        lost = [s.name for s in sites if s.name not in placed]
        raise _misplaced(part, selector, sites, f"{counted(lost)} would get none")
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site, layer in zip(sites, placed.values(), strict=True):
            layer.lora_A.float()  # PEFT makes them in the base's precision
            layer.lora_B.float()
            down, up = adapter_weights(layer)
            bound = 1 / math.sqrt(site.d_in)
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=draw))
            up.zero_()
    for layer in placed.values():
        layer.scalings = (alpha_at_rest(cfg.alpha, cfg.strength) / cfg.r, cfg.alpha / cfg.r)
    part.adapters, part.adapted = sites, list(placed.values())
    config.lora_alpha = alpha_at_rest(cfg.alpha, cfg.strength)  # pyright: ignore[reportAttributeAccessIssue] (PEFT takes fractions)
    part.facts = _facts(part, config)
    part.learn(False)
    _check_reached(part, selector)
    return sites


def _misplaced(part: Part, selector: Selector, sites: Sequence[AdapterSite], why: str) -> UserError:
    """PEFT renames targets in families whose experts transformers keeps fused, and would do so again wherever the
    checkpoint is loaded."""
    return UserError(
        f"{selector.field}: on {part.source} ({type(part.module).__name__}) PEFT does not put adapters on "
        f"{counted([s.name for s in sites])} as named: {why}. Where experts are fused it takes names that end like "
        "theirs (gate_proj, up_proj, down_proj) for them. Name fewer layers, such as q_proj, o_proj"
    )


@torch.no_grad()
def _check_reached(part: Part, selector: Selector) -> None:
    """Refuse layers whose weights the model reads without calling them (Mamba's ``out_proj`` and ``dt_proj``): their
    adapters would learn nothing and be merged all the same. An expert that no token chose is no such layer, where
    another of its kind was called."""
    placed = _adapted(part)
    called: set[str] = set()
    hooks = [m.register_forward_hook(lambda *_, n=name: called.add(n)) for name, m in placed.items()]
    assert part.try_out is not None
    try:
        part.try_out()
    except (AttributeError, IndexError, TypeError, ValueError) as e:
        raise UserError(
            f"{selector.field}: {part.source} ({type(part.module).__name__}) does not run with adapters on "
            f"{counted(list(placed))}: {first_line(e)}. One of these gives something else than a product (Llama 4's "
            "router does). Name fewer layers, such as q_proj, o_proj"
        ) from e
    finally:
        for hook in hooks:
            hook.remove()
    if idle := sorted({folded(n) for n in placed} - {folded(n) for n in called}):
        raise UserError(
            f"{selector.field}: {part.source} ({type(part.module).__name__}) never calls {listed(idle)}, but reads the "
            "weights directly, so adapters there would learn nothing; take them out"
        )


def alpha_at_rest(alpha: int, strength: float) -> int | float:
    """What others must know as alpha to compute what a model does outside training."""
    return alpha if strength == 1 else alpha * strength


def trained_alpha(part: Part) -> int:
    """The alpha that a part's adapters learn with, whatever the strength that they are used at."""
    return round(part.adapted[0].scalings[1] * part.facts["r"])


def _peft_config(part: Part, cfg: LoraConfig, sites: Sequence[AdapterSite]) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, bias=cfg.bias,
        task_type="CAUSAL_LM" if part.name == "language" else None, target_modules=[s.name for s in sites],
    )  # fmt: skip


def adapter_parameters(part: Part) -> dict[str, nn.Parameter]:
    """The adapters' weights by their names below the part's module."""
    ours = {id(w) for layer in _adapted(part).values() for w in adapter_weights(layer)}
    return {name: p for name, p in part.module.named_parameters() if id(p) in ours}


def _adapted(part: Part) -> dict[str, AdaptedLinear | AdaptedConv]:
    return {name: m for name, m in part.module.named_modules() if isinstance(m, AdaptedLinear | AdaptedConv)}


# ---------------------------------------------------------------------------------------------------------------
# Off, merged


@contextmanager
def adapters_off(part: Part) -> Iterator[None]:
    """Inside, the part computes what its base does, bit for bit; afterwards everything is as before."""
    layers = list(_adapted(part).values())
    assert not any(layer.merged for layer in layers), "merged adapters cannot be switched off"
    were_off = [layer.disable_adapters for layer in layers]
    learned = [[w.requires_grad for w in adapter_weights(layer)] for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, off, flags in zip(layers, were_off, learned, strict=True):
            layer.enable_adapters(not off)
            for weight, flag in zip(adapter_weights(layer), flags, strict=True):  # PEFT couples the two
                weight.requires_grad_(flag)


@contextmanager
def at_strength(part: Part, strength: float) -> Iterator[None]:
    """Inside, the adapters are used at that share of what they learned (``model.lora.strength``): a point on the line
    from the base, 0, to the trained weights, 1. Nothing is trained there."""
    layers, learning = list(_adapted(part).values()), part.learning
    before = [layer.scalings for layer in layers]
    try:
        for layer, (_, trained) in zip(layers, before, strict=True):
            layer.scalings = (trained * strength, trained)
        part.learn(False)
        yield
    finally:
        for layer, scalings in zip(layers, before, strict=True):
            layer.scalings = scalings
        part.learn(learning)


@contextmanager
def merged(part: Part) -> Iterator[None]:
    """Inside, the adapters are part of the base's weights (summed in fp32, rounded once), at the strength they have
    outside training; afterwards the base is restored bit for bit from copies, which need the adapted layers' size in
    main memory."""
    layers = list(_adapted(part).values())
    learning = part.learning
    assert not any(layer.merged or layer.disable_adapters for layer in layers), "adapters are merged or off already"
    kept: list[tuple[AdaptedLinear | AdaptedConv, Tensor]] = []
    try:
        part.learn(False)
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight
                assert isinstance(weight, Tensor)
                kept.append((layer, weight.detach().to("cpu", copy=True)))
                layer.merge(safe_merge=False)
        yield
    finally:
        with torch.no_grad():
            for layer, copy in kept:
                weight = layer.get_base_layer().weight
                assert isinstance(weight, Tensor)
                weight.copy_(copy)
                layer.merged_adapters.clear()
        part.learn(learning)


@torch.no_grad()
def merge_in(part: Part, learned: TrainedPart) -> None:
    """Make adapters of an earlier run part of the base's weights for good, as `merged` does for a while: summed in
    fp32, rounded once, at the strength that their config says.

    Raises `UserError` for anything but plain LoRA, for adapters that do not fit this part, and for weights that are
    not finite, or would not be once merged; nothing is changed then.
    """
    assert not part.adapters, "adapters are merged before new ones are attached"
    facts, tensors = learned.facts, learned.tensors
    odd, rank, alpha = _not_plain(facts), facts.get("r"), facts.get("lora_alpha")
    if not _within(rank, "r") or not _within(alpha, "alpha"):
        odd.append(f"r is {rank!r:.40} and lora_alpha {alpha!r:.40}")
    if odd:
        raise UserError(f"the adapters cannot be merged: {', '.join(odd)}; only plain LoRA can (model.lora.adapters)")
    assert isinstance(rank, int) and isinstance(alpha, int | float)
    if not tensors:
        raise UserError("the adapters cannot be merged: their file holds none (model.lora.adapters)")
    before = KEY_PREFIX + part.prefix
    names = sorted({key.removeprefix(before).partition(".lora_")[0] for key in tensors})
    layers = {
        name: m for name, m in part.module.named_modules()
        if name in names and isinstance(m, nn.Linear | Conv1D | nn.Conv2d)
    }  # fmt: skip
    pairs = {n: [tensors.get(f"{before}{n}.lora_{which}.weight") for which in "AB"] for n in names}
    wrong = [n for n in names if n not in layers or not _fits(layers[n], pairs[n], rank)]
    if wrong or len(tensors) != 2 * len(names):
        raise UserError(
            f"the adapters cannot be merged into {part.source}: those on {counted(wrong or names)} do not fit it; "
            f"they are of another {part.called} ({part.setting})"
        )
    if bad := [k for k, t in tensors.items() if not bool(torch.isfinite(t).all())]:
        raise UserError(f"adapter weights are NaN or infinite: {listed(bad, 3)}. The run they come from had diverged.")
    lying = all(isinstance(layer, Conv1D) for layer in layers.values())
    if (said := facts.get("fan_in_fan_out", lying)) is not lying:
        raise UserError(f"the adapters cannot be merged: fan_in_fan_out is {said!r:.40}, of these layers it is {lying}")

    def summed(name: str) -> Tensor:
        layer = layers[name]
        down, up = (t.to(layer.weight.device).flatten(1) for t in pairs[name] if t is not None)
        delta = up @ down
        delta = delta.T if isinstance(layer, Conv1D) else delta.view(layer.weight.shape)
        return (layer.weight + delta * (alpha / rank)).to(layer.weight.dtype)

    # Twice, as the product costs little and copies of all layers would not fit.
    if bad := [name for name in layers if not bool(torch.isfinite(summed(name)).all())]:
        raise UserError(
            f"the adapters cannot be merged into {part.source}: its weights would be NaN or infinite in "
            f"{listed(bad, 3)} (in {str(layers[bad[0]].weight.dtype).removeprefix('torch.')}). The run they come from "
            "had diverged, or their files are damaged; start from another"
        )
    for name, layer in layers.items():
        layer.weight.copy_(summed(name))
    part.merged.append(learned)


_NO_MATTER = {
    "r", "lora_alpha", "fan_in_fan_out", "task_type", "peft_type", "target_modules", "base_model_name_or_path",
    "revision", "peft_version", "lora_dropout", "inference_mode", "qalora_group_size",
}  # fmt: skip
"""Entries of ``adapter_config.json`` that need not be PEFT's defaults for plain LoRA."""


def _not_plain(facts: Mapping[str, Any]) -> list[str]:
    """What makes adapters something else than LoRA on the layers that they name: whatever is not PEFT's default."""
    needed = {"use_rslora": False, "use_dora": False, "rank_pattern": {}, "alpha_pattern": {}, "bias": "none"}
    plain = {**json.loads(json.dumps(PeftLoraConfig().to_dict(), default=str)), **needed, "peft_type": "LORA"}
    missing = object()
    odd = {k: facts.get(k) for k in ("peft_type", *needed) if facts.get(k) != plain[k]}
    for key in facts.keys() - _NO_MATTER:
        value, default = facts[key], plain.get(key, missing)
        # An entry of another version of PEFT changes nothing while it is off; a number alone switches nothing on.
        unknown = default is missing and (value is True or (bool(value) and isinstance(value, list | dict)))
        if unknown or (default is not missing and (value or None) != (default or None)):
            odd[key] = value
    return [f"{key} is {value!r:.60}" for key, value in sorted(odd.items())]


def _within(value: object, setting: str) -> bool:
    """Whether it is a number that the setting of `LoraConfig` can be; alpha comes times a strength."""
    if isinstance(value, bool) or not isinstance(value, int if setting == "r" else int | float):
        return False
    return 0 < value <= min(m.le for m in LoraConfig.model_fields[setting].metadata if hasattr(m, "le"))


def _fits(layer: nn.Module, pair: Sequence[Tensor | None], rank: int) -> bool:
    down, up = pair
    shape = matrix_shape(layer)
    if down is None or up is None or shape is None or min(down.ndim, up.ndim) < 2:
        return False
    return (
        down.dtype == up.dtype == torch.float32
        and tuple(down.flatten(1).shape) == (rank, shape[0]) and tuple(up.flatten(1).shape) == (shape[1], rank)
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# In and out


def adapter_tensors(part: Part) -> dict[str, Tensor]:
    """The adapters' weights under PEFT's file names: ``base_model.model.<module>.lora_A.weight``."""
    return {
        f"{KEY_PREFIX}{part.prefix}{name}.lora_{which}.weight": weight.detach()
        for name, layer in _adapted(part).items()
        for which, weight in zip("AB", adapter_weights(layer), strict=True)
    }


@torch.no_grad()
def load_adapter_tensors(part: Part, tensors: Mapping[str, Tensor]) -> None:
    """Put `adapter_tensors` back, bit for bit. Strict: `UserError` naming the config field for other modules, another
    rank, another base, another type or weights that are not finite; nothing is loaded then."""
    own = adapter_tensors(part)
    complaints: list[str] = []
    missing, unexpected = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    for keys, what in ((unexpected, "the file has adapters on"), (missing, "this config also puts adapters on")):
        if keys:
            modules = {k.removeprefix(KEY_PREFIX).partition(".lora_")[0] for k in keys}
            complaints.append(f"{what} {counted(sorted(modules))} ({part.where}, or another {part.setting})")
    ranks, shapes = set(), []
    for key in sorted(own.keys() & tensors.keys()):
        theirs, ours = tuple(tensors[key].shape), tuple(own[key].shape)
        if theirs == ours:
            continue
        side = 0 if ".lora_A." in key else 1
        if len(theirs) == 2 and theirs[1 - side] == ours[1 - side]:
            ranks.add((theirs[side], ours[side]))
        else:
            shapes.append(f"{key} is {list(theirs)} in the file, {list(ours)} here")
    complaints += [f"model.lora.r: the file {a}, this config {b}" for a, b in sorted(ranks)]
    if shapes:
        complaints.append(f"{listed(shapes, 3)} ({part.setting}: adapters of another {part.called})")
    types = sorted({str(tensors[k].dtype).removeprefix("torch.") for k in own.keys() & tensors.keys()} - {"float32"})
    if types:
        complaints.append(f"its weights are {', '.join(types)}, not float32")
    if complaints:
        raise UserError("the adapters do not fit this config:\n  " + "\n  ".join(complaints))
    bad = [k for k, t in tensors.items() if not bool(torch.isfinite(t).all())]
    if bad:
        raise UserError(f"adapter weights are NaN or infinite: {listed(bad, 3)}. The run they come from had diverged.")
    for key, weight in own.items():
        weight.copy_(tensors[key])


def adapter_config(part: Part) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT writes it, with the explicit list of modules and the base's name."""
    # On the plain base they would compute something else, so a merged one gets a name that nothing is loaded by.
    more = f" with the adapters of {len(part.merged)} earlier runs merged" if part.merged else ""
    return {**part.facts, "base_model_name_or_path": part.source + more}


def _facts(part: Part, config: PeftLoraConfig) -> dict[str, Any]:
    written = config.to_dict()
    # PEFT may have shortened the list to last names, which is the same on this model and not on every other.
    written["target_modules"] = [part.prefix + s.name for s in part.adapters]
    written["inference_mode"] = True
    written["peft_type"] = "LORA"
    return {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(written.items())}


def save_merged(language: LanguageModel, tokenizer: Any, folder: Path, eyes: Sequence[Part] = ()) -> None:
    """A plain Hugging Face folder of the language model with its adapters merged in; loads without peft. ``eyes``:
    parts of a native model besides, which is written whole.

    ``folder`` must not hold anything yet. Raises `UserError` for that and for merged weights that are not finite.
    """
    from transformers import GenerationConfig

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the merged language model")
    model, parts = language.model, [language.part, *eyes]
    with ExitStack() as stack, quiet_transformers():
        for part in parts:
            if part.adapters:
                stack.enter_context(merged(part))
        state = without_adapters(model, [part.prefix + site.name for part in parts for site in part.adapters])
        state = narrowed(state, eyes)
        check_finite(model, f"{language.name} with its adapters merged")
        blank = model.generation_config
        model.generation_config = GenerationConfig.from_model_config(model.config)
        try:
            model.save_pretrained(folder, state_dict=state, safe_serialization=True)
        finally:
            model.generation_config = blank
    tokenizer.save_pretrained(folder)
