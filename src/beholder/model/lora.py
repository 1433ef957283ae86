"""Low-rank adapters (Hu et al. 2021, arXiv:2106.09685) on the language model: the only door to peft.

Which layers get one is resolved here into an explicit list, and refused when a pattern hits nothing or something else.
Attaching, switching off, merging, reading and writing adapters all live here; the base's weights are never changed.
What learns is `plan`'s business, files are `train.checkpoint`'s. Importing it takes seconds (peft brings transformers):
others import it where they use it.
"""

import difflib
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig as PeftLoraConfig
from peft import inject_adapter_in_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from beholder.config import LoraConfig
from beholder.model.language import AdapterSite, LanguageModel
from beholder.model.weights import check_finite, listed, quiet_transformers
from beholder.types import UserError

ADAPTER = "default"
"""The one adapter's name inside PEFT's layers; it is not part of the saved names."""
KEY_PREFIX = "base_model.model."
"""What PEFT puts before the names of the causal language model in its files."""
FIELD = "model.lora.target_modules"


# ---------------------------------------------------------------------------------------------------------------
# Where


def resolve_targets(causal_lm: nn.Module, patterns: Sequence[str], rank: int) -> list[AdapterSite]:
    """The linear layers that ``patterns`` name, in the model's order.

    A pattern is the last parts of a module's name (``q_proj``, ``self_attn.q_proj``) or a regular expression matching
    the whole name below ``causal_lm``. Raises `UserError` when one matches nothing (with the nearest names), something
    that is not a linear layer, or anything outside the layers of the decoder: its embeddings, its head, or, when
    ``causal_lm`` is a whole vision-language model, its tower.
    """
    layers = decoder_layers(causal_lm)
    modules = {name: m for name, m in causal_lm.named_modules() if name}
    adaptable = {n: m for n, m in modules.items() if n.startswith(layers + ".") and isinstance(m, nn.Linear)}
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
                f"{_counted(outside)} there and {inside} inside. Adapters go on their linear maps alone. {advice}."
            )
        odd = [name for name in hits if name not in adaptable]
        if odd:
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(type(modules[o]).__name__ for o in odd).items())
            raise UserError(
                f"{FIELD} {pattern!r} matches {_counted(odd)} ({kinds}), which are no linear layers. "
                f"{_nearest(pattern, adaptable)}"
            )
        wanted.update(hits)
    sites = []
    for name, linear in adaptable.items():
        if name in wanted:
            d_in, d_out = linear.in_features, linear.out_features
            assert isinstance(d_in, int) and isinstance(d_out, int)
            sites.append(AdapterSite(name, d_in, d_out, rank, rank * (d_in + d_out)))
    return sites


def decoder_layers(causal_lm: nn.Module) -> str:
    """Name of the list of decoder layers below ``causal_lm``: ``model.layers``."""
    names = {id(m): name for name, m in causal_lm.named_modules()}
    module: Any
    for module in causal_lm.modules():
        # Towers have the method too, but nothing that gives logits.
        if not hasattr(module, "get_decoder") or module.get_output_embeddings() is None:
            continue
        decoder = module.get_decoder()
        depth = module.config.get_text_config().num_hidden_layers
        for child in decoder.children():
            if isinstance(child, nn.ModuleList) and len(child) == depth:
                return names[id(child)]
    raise UserError(
        f"{type(causal_lm).__name__}: no list of decoder layers was found, so adapters cannot be placed; set "
        "model.lora.enable: false for this language model"
    )


def _expression(pattern: str) -> re.Pattern[str]:
    """The pattern as a regular expression. Raises `UserError` for none, and for one that might search for ever."""
    plain = re.fullmatch(r"[\w.]+", pattern) is not None
    if not plain and len(pattern) > MAX_PATTERN:
        raise UserError(
            f"{FIELD} {pattern[:40]!r}… has {len(pattern)} characters, a regular expression may have {MAX_PATTERN}; "
            "give several shorter ones"
        )
    try:
        expression = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise UserError(
            f"{FIELD} {pattern!r} is neither the last part of a module's name nor a regular expression: {e}"
        ) from e
    if not plain and _ways(pattern) > MAX_WAYS:
        raise UserError(
            f"{FIELD} {pattern!r} repeats or chooses so often that matching a name might take for ever; use less of "
            "*, +, ? and |, or give several patterns"
        )
    return expression


MAX_PATTERN = 200
"""Characters of a regular expression."""
MAX_WAYS = 1_000_000
_LONG = 64
"""About the characters of a module's name: how many ends a ``*`` has to choose from."""
_TOKEN = re.compile(
    r"(?P<open>\((?:\?(?::|<?[=!]))?(?P<special>\??))|(?P<close>\))|(?P<or>\|)"
    r"|(?P<repeat>[*+?]|\{(?:[0-9]+(?:,[0-9]*)?|,[0-9]*)\})(?P<manner>[?+]?)"
    r"|(?P<atom>\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.)",
    re.DOTALL,
)


def _ways(pattern: str) -> int:
    """At most in how many ways a valid expression can try to match a name: `re` goes through all before it says no.

    A group with choices in it that is itself repeated has no such bound, and is refused with a `UserError`.
    """
    # A level for each open group: ways of the branches before, ways of this branch up to its last item, ways of that.
    levels = [[0, 1, 1]]
    in_group = False  # the last item is a group
    for token in _TOKEN.finditer(pattern):
        level = levels[-1]
        if token["special"]:
            raise UserError(
                f"{FIELD} {pattern!r}: of the groups that begin with (? only (?:…) and the looks around (?=, (?!, (?<= "
                "and (?<! are understood here"
            )
        if token["open"]:
            levels.append([0, 1, 1])
        elif token["close"]:
            before, branch, last = levels.pop()
            levels[-1][1:] = levels[-1][1] * levels[-1][2], before + branch * last
        elif token["or"]:
            level[:] = level[0] + level[1] * level[2], 1, 1
        elif token["repeat"]:
            if token["repeat"] == "?":
                level[2] += 1
            elif in_group and level[2] > 1:
                raise UserError(
                    f"{FIELD} {pattern!r}: a repeated group holds a repetition or a choice itself, which might search "
                    r"for ever; repeat a set of characters instead, such as [\w.]+ for (\w|\.)+"
                )
            else:
                level[2] *= _LONG
        else:
            level[1:] = level[1] * level[2], 1
        in_group = token["close"] is not None
    before, branch, last = levels[0]
    return before + branch * last


def _nearest(pattern: str, adaptable: Mapping[str, nn.Module]) -> str:
    counts = Counter(name.rpartition(".")[2] for name in adaptable)
    last = re.split(r"[^\w]+", pattern.rstrip("$"))[-1]
    close = difflib.get_close_matches(last, counts, n=3, cutoff=0.5) or list(counts)
    return "Nearest: " + ", ".join(f"{name} ({counts[name]} modules)" for name in close) + "."


def _counted(names: Sequence[str]) -> str:
    """``model.vision_tower.….q_proj (12)``: names with their layer numbers folded."""
    folded = Counter(re.sub(r"\.\d+(?=\.|$)", ".*", name) for name in names)
    return listed(f"{name} ({n})" if n > 1 else name for name, n in folded.items())


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


# ---------------------------------------------------------------------------------------------------------------
# The layer


class AdaptedLinear(PeftLinear):
    """PEFT's layer; over a base stored in 16 bits, the adapter's two products are computed in these 16 bits.

    PEFT computes them in fp32 and adds them to the rounded output: several passes over fp32 copies of the activations.
    Here the fp32 weights A and B are rounded for the products (which accumulate in fp32), as autocast would, and added
    into the base's output and input gradient in place. It costs a rounding of ``x A`` and of each gradient product
    (2^-9 of the adapter's own contribution in bf16); weights, optimizer and sums over micro-batches stay fp32. Over an
    fp32 base it is PEFT's computation, bit for bit. ``benchmarks/lora_step.py`` prints what it saves.

    While it learns, its scaling is alpha / r; else that times ``model.lora.strength``, which is what its checkpoint's
    ``lora_alpha`` says. Between the base and the trained weights lies a model that has kept more of the base (WiSE-FT,
    Wortsman et al. 2022, arXiv:2109.01903).
    """

    scalings: tuple[float, float]
    """At rest, and while learning."""

    def learn(self, mode: bool) -> None:
        self.scaling[ADAPTER] = self.scalings[mode]
        self.lora_dropout.train(mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base_layer
        half = x.dtype in (torch.bfloat16, torch.float16) and type(base) is nn.Linear and base.weight.dtype == x.dtype
        if self.disable_adapters or self.merged or not half:
            return super().forward(x, *args, **kwargs)
        down, up = _weights(self)
        dropout = self.lora_dropout[ADAPTER]
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return _AdaptedProduct.apply(x, base.weight, base.bias, down, up, self.scaling[ADAPTER], p)  # pyright: ignore[reportReturnType]


class _AdaptedProduct(torch.autograd.Function):
    """``x W' + bias + scaling * dropout(x) A' B'`` with gradients for x, A and B; W and bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float, p: float
    ) -> Tensor:
        ctx.scaling, ctx.p = scaling, p
        rows = x.reshape(-1, x.shape[-1])
        keep = _keep(rows, p) if p else None
        down_16, up_16 = (down / (1 - p)).to(x.dtype), (up * scaling).to(x.dtype)
        narrow = _kept(rows, keep) @ down_16.t()
        out = F.linear(rows, weight, bias)
        out.addmm_(narrow, up_16.t())
        ctx.save_for_backward(rows, weight, narrow, down_16, up_16, keep)
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        rows, weight, narrow, down_16, up_16, keep = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_narrow = grad_rows @ up_16
        grad_up = (narrow.t() @ grad_rows).t().float() * ctx.scaling
        grad_down = (grad_narrow.t() @ _kept(rows, keep)).float() / (1 - ctx.p)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_rows @ weight
            if keep is None:
                grad_x.addmm_(grad_narrow, down_16)
            else:
                grad_x += _kept(grad_narrow @ down_16, keep)
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_down, grad_up, None, None


def _keep(rows: Tensor, p: float) -> Tensor:
    """Which entries dropout leaves, as int16 masks: -1 with probability 1 - p (to 1 / 65,536), else 0.

    On a CPU four entries share a draw of 64 bits, and a mask is applied to the bits of the 16-bit floats: together a
    fifth of the time of torch's dropout, which took a quarter of a step.
    """
    if rows.device.type != "cpu":
        return torch.empty_like(rows, dtype=torch.int16).bernoulli_(1 - p).neg_()
    draws = torch.empty((rows.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = draws.view(torch.int16)[: rows.numel()].view(rows.shape)
    return torch.ge(lanes, round(p * 2**16) - 2**15, out=torch.empty_like(lanes)).neg_()


def _kept(values: Tensor, keep: Tensor | None) -> Tensor:
    return values if keep is None else (values.view(torch.int16) & keep).view(values.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Attach


def attach(language: LanguageModel, cfg: LoraConfig, seed: int) -> list[AdapterSite]:
    """Put an adapter on every layer ``cfg.target_modules`` names; gives them in the model's order.

    A is drawn from ``seed`` alone (U(±1/sqrt(d_in)), PEFT's own), B is 0: the model computes what it did before. The
    adapters' weights are fp32 whatever the base is stored in; the base's are untouched and frozen. Raises `UserError`
    as `resolve_targets` does.
    """
    assert not language.adapters, "the language model has adapters already"
    sites = resolve_targets(language.model, cfg.target_modules, cfg.r)
    config = _peft_config(cfg, sites)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # PEFT draws weights of its own first
        # peft 0.21 asks transformers 5.23 in words that the latter is about to drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        inject_adapter_in_model(config, language.model, adapter_name=ADAPTER)
    placed = _adapted(language)
    assert list(placed) == [s.name for s in sites], "PEFT placed adapters elsewhere than resolved"
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site, layer in zip(sites, placed.values(), strict=True):
            layer.lora_A.float()  # PEFT makes them in the base's precision
            layer.lora_B.float()
            down, up = _weights(layer)
            bound = 1 / math.sqrt(site.d_in)
            down.copy_(torch.empty(down.shape).uniform_(-bound, bound, generator=draw))
            up.zero_()
    language.adapters = sites
    language.adapted = list(placed.values())
    for layer in placed.values():
        layer.scalings = (_alpha_at_rest(cfg) / cfg.r, cfg.alpha / cfg.r)
    language.model.peft_config[ADAPTER].lora_alpha = _alpha_at_rest(cfg)
    language.train(False)
    return sites


def _alpha_at_rest(cfg: LoraConfig) -> int | float:
    """What others must know as alpha to compute what this model does outside training."""
    return cfg.alpha if cfg.strength == 1 else cfg.alpha * cfg.strength


def _peft_config(cfg: LoraConfig, sites: Sequence[AdapterSite]) -> PeftLoraConfig:
    return PeftLoraConfig(
        r=cfg.r, lora_alpha=cfg.alpha, lora_dropout=cfg.dropout, bias=cfg.bias, task_type="CAUSAL_LM",
        target_modules=[s.name for s in sites],
    )  # fmt: skip


def adapter_parameters(language: LanguageModel) -> dict[str, nn.Parameter]:
    """The adapters' weights by their names in ``language.named_parameters()``."""
    ours = {id(w) for layer in _adapted(language).values() for w in _weights(layer)}
    return {name: p for name, p in language.named_parameters() if id(p) in ours}


def _adapted(language: LanguageModel) -> dict[str, AdaptedLinear]:
    return {name: m for name, m in language.model.named_modules() if isinstance(m, AdaptedLinear)}


def _weights(layer: AdaptedLinear) -> tuple[nn.Parameter, nn.Parameter]:
    """(A ``[r, d_in]``, B ``[d_out, r]``)."""
    down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]
    assert isinstance(down, nn.Linear) and isinstance(up, nn.Linear)
    return down.weight, up.weight  # pyright: ignore[reportReturnType]


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` as it was before adapters were attached: same names, same order, none of theirs."""
    layers = [name for name, m in module.named_modules() if isinstance(m, AdaptedLinear)]
    state = dict(module.state_dict())
    if not layers:
        return state
    undone: dict[str, Tensor] = {}
    inside = {f"{layer}.": f"{layer}.base_layer." for layer in layers}
    for key, tensor in state.items():
        layer = next((k for k in _prefixes(key) if k in inside), None)
        if layer is None:
            undone[key] = tensor
        elif key.startswith(inside[layer]):
            undone[layer + key.removeprefix(inside[layer])] = tensor
    return undone


def _prefixes(key: str) -> Iterator[str]:
    """``a.``, ``a.b.`` of ``a.b.c``."""
    return (key[: m.end()] for m in re.finditer(r"\.", key))


# ---------------------------------------------------------------------------------------------------------------
# Off, merged


@contextmanager
def adapters_off(language: LanguageModel) -> Iterator[None]:
    """Inside, the language model computes what the base does, bit for bit; afterwards everything is as before."""
    layers = list(_adapted(language).values())
    assert not any(layer.merged for layer in layers), "merged adapters cannot be switched off"
    were_off = [layer.disable_adapters for layer in layers]
    learned = [[w.requires_grad for w in _weights(layer)] for layer in layers]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, off, flags in zip(layers, were_off, learned, strict=True):
            layer.enable_adapters(not off)
            for weight, flag in zip(_weights(layer), flags, strict=True):  # PEFT couples the two
                weight.requires_grad_(flag)


@contextmanager
def merged(language: LanguageModel) -> Iterator[None]:
    """Inside, the adapters are part of the base's weights (summed in fp32, rounded once), at the strength they have
    outside training; afterwards the base is restored bit for bit from copies, which need the adapted layers' size in
    main memory."""
    layers = list(_adapted(language).values())
    learning = language.learning
    assert not any(layer.merged or layer.disable_adapters for layer in layers), "adapters are merged or off already"
    kept: list[tuple[AdaptedLinear, Tensor]] = []
    try:
        language.train(False)
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
        language.train(learning)


# ---------------------------------------------------------------------------------------------------------------
# In and out


def adapter_tensors(language: LanguageModel) -> dict[str, Tensor]:
    """The adapters' weights under PEFT's file names: ``base_model.model.<module>.lora_A.weight``."""
    return {
        f"{KEY_PREFIX}{name}.lora_{which}.weight": weight.detach()
        for name, layer in _adapted(language).items()
        for which, weight in zip("AB", _weights(layer), strict=True)
    }


@torch.no_grad()
def load_adapter_tensors(language: LanguageModel, tensors: Mapping[str, Tensor]) -> None:
    """Put `adapter_tensors` back, bit for bit. Strict: `UserError` naming the config field for other modules, another
    rank, another base, another type or weights that are not finite; nothing is loaded then."""
    own = adapter_tensors(language)
    complaints: list[str] = []
    missing, unexpected = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    for keys, what in ((unexpected, "the file has adapters on"), (missing, "this config also puts adapters on")):
        if keys:
            modules = {k.removeprefix(KEY_PREFIX).partition(".lora_")[0] for k in keys}
            complaints.append(f"{what} {_counted(sorted(modules))} ({FIELD}, or another model.llm.name_or_path)")
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
        complaints.append(f"{listed(shapes, 3)} (model.llm.name_or_path: adapters of another language model)")
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


def adapter_config(language: LanguageModel) -> dict[str, Any]:
    """``adapter_config.json`` as PEFT writes it, with the explicit list of modules and the base's name."""
    config: PeftLoraConfig = language.model.peft_config[ADAPTER]
    written = config.to_dict()
    # PEFT may have shortened the list to last names, which is the same on this model and not on every other.
    written["target_modules"] = [s.name for s in language.adapters]
    written["base_model_name_or_path"] = language.name
    written["inference_mode"] = True
    written["peft_type"] = "LORA"
    return {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(written.items())}


def save_merged(language: LanguageModel, tokenizer: Any, folder: Path) -> None:
    """A plain Hugging Face folder of the language model with its adapters merged in; loads without peft.

    ``folder`` must not hold anything yet. Raises `UserError` for that and for merged weights that are not finite.
    """
    from transformers import GenerationConfig

    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the merged language model")
    model = language.model
    with merged(language), quiet_transformers():
        check_finite(model, f"{language.name} with its adapters merged")
        blank = model.generation_config
        model.generation_config = GenerationConfig.from_model_config(model.config)
        try:
            model.save_pretrained(folder, state_dict=base_state(model), safe_serialization=True)
        finally:
            model.generation_config = blank
    tokenizer.save_pretrained(folder)
