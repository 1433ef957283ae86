"""Where learning happens: parts that can learn in pieces, and selectors (which layers, which modules) resolved into one
explicit list, counted, and refused when they hit nothing or something else."""

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from beholder.config import Layers, LoraConfig, names_modules, no_layers, no_pattern
from beholder.model.weights import listed
from beholder.types import TrainedPart, UserError

ALL_LINEAR = "all-linear"
"""Every linear map of the chosen layers: linear layers, and the 1 x 1 convolutions of convolutional towers."""


@runtime_checkable
class Adapted(Protocol):
    """A layer with an adapter, as far as its part knows it (`model.adapted_linear`)."""

    scalings: tuple[float, float]
    """At rest, and while learning."""

    def learn(self, mode: bool) -> None: ...


@dataclass(frozen=True, slots=True)
class AdapterSite:
    """One layer with an adapter: ``name`` below the part's module, the shape of its weight as a matrix (of a
    convolution: what one output sees), what is added."""

    name: str
    d_in: int
    d_out: int
    rank: int
    params: int


class Widened(NamedTuple):
    """A module that holds its weights in fp32 inside of one of another precision."""

    around: torch.dtype
    hooks: tuple[RemovableHandle, ...]
    """They cast what goes in and out."""


@dataclass(slots=True)
class Part:
    """A part of a model that can learn in pieces: its module, its layers in order, and what was done to it."""

    name: str
    """``language`` or ``vision``."""
    source: str
    """What it was loaded from, for messages."""
    module: nn.Module
    """All names are below it."""
    blocks: tuple[str, ...]
    """Its layers, first to last: decoder layers, or a tower's blocks. None where no list of them was found."""
    prefix: str = ""
    """What stands before the names in the model that they are part of; empty where the part is a model of its own."""
    try_out: Callable[[], object] | None = None
    """One forward pass of it."""
    adapters: list[AdapterSite] = field(default_factory=list)
    """What `model.adapters.attach` put on it."""
    adapted: list[Adapted] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """What others must know to compute with the adapters: ``adapter_config.json``."""
    merged: list[TrainedPart] = field(default_factory=list)
    """Adapters of earlier runs that `model.adapters.merge_in` made part of its weights, in this order."""
    changed: tuple[str, ...] = ()
    """Modules whose weights are no longer as in its files, because they learn, or have learned in an earlier run,
    themselves."""
    unfrozen: tuple[str, ...] = ()
    """Those of them that learn in this run."""
    initial: str = ""
    """Of a joined model's language model: `model.weights.sketch_module` of what it was before it learned itself, by
    which a connector knows it. Of one that was made it is in its checkpoints: another seed would make another."""
    learning: bool = False
    widened: dict[str, Widened] = field(default_factory=dict)
    """Modules that compute in another precision than what is around them (`model.learned`)."""

    @property
    def lowest(self) -> str | None:
        """`lowest_of` what learns in it."""
        return lowest_of(self, [*(site.name for site in self.adapters), *self.unfrozen])

    @property
    def called(self) -> str:
        return "language model" if self.name == "language" else "vision tower"

    @property
    def setting(self) -> str:
        """The setting that says where it comes from."""
        if self.prefix:
            return "model.native.name_or_path"
        return "model.llm.name_or_path" if self.name == "language" else "model.vision.name_or_path"

    @property
    def where(self) -> str:
        """The settings that say where its adapters go."""
        prefix = "" if self.name == "language" else "vit_"
        return f"model.lora.{prefix}target_modules"

    def learn(self, mode: bool) -> None:
        """Adapters follow ``mode``: their dropouts, and their strength."""
        self.learning = mode
        for layer in self.adapted:
            layer.learn(mode)


@dataclass(frozen=True, slots=True)
class Selector:
    """Which layers, and which modules of them."""

    modules: tuple[str, ...]
    layers: Layers = "all"
    field: str = "model.lora.target_modules"
    """The setting that names the modules, for messages."""
    layers_field: str = "model.lora.llm_layers"


def selectors(cfg: LoraConfig, parts: Mapping[str, Part]) -> dict[str, Selector]:
    """Where adapters go, by part: ``target_modules`` x ``llm_layers`` on the language model, ``vit_target_modules`` x
    ``vit_layers`` on the tower.

    An expression of `tower_expressions` belongs to the tower, and says its layers itself unless ``vit_layers`` does.
    Raises `UserError` as that does, and for such an expression where the tower's own settings say something else.
    """
    theirs = tower_expressions(cfg, parts)
    language = Selector(tuple(p for p in cfg.target_modules if p not in theirs), cfg.llm_layers)
    layers: Layers = cfg.vit_layers if cfg.vit_layers is not None else "all" if theirs else "none"
    vision = Selector(cfg.vit_target_modules, layers, "model.lora.vit_target_modules", "model.lora.vit_layers")
    if theirs:
        alone = f"{language.field} {theirs[0]!r} names modules of the vision tower alone"
        if no_layers(layers):
            raise UserError(
                f"{alone}, but {vision.layers_field} is {_told(layers)}, so it would go nowhere; take one of them out"
            )
        if vision.modules != LoraConfig.model_fields["vit_target_modules"].default:
            raise UserError(
                f"{alone}, and {vision.field} ({', '.join(vision.modules)}) names others; say in one of them where the "
                "tower's adapters go"
            )
        vision = Selector(theirs, layers, language.field, vision.layers_field)
    wanted = {"language": language, "vision": vision}
    return {name: s for name, s in wanted.items() if name in parts and s.modules and not no_layers(s.layers)}


def tower_expressions(cfg: LoraConfig, parts: Mapping[str, Part]) -> tuple[str, ...]:
    """The regular expressions in ``target_modules`` that name modules of the tower alone. Raises `UserError` for one
    that names modules of both, where both are parts of one model."""
    tower, field = parts.get("vision"), "model.lora.target_modules"
    found: list[str] = []
    if tower is None:
        return ()
    for pattern in cfg.target_modules:
        there = [] if names_modules(pattern) else list(_named(tower, pattern, field))
        here = list(_named(parts["language"], pattern, field)) if there and "language" in parts else []
        if here and there and tower.prefix:
            raise UserError(
                f"{field} {pattern!r} crosses towers: it matches {counted(here)} of the language model and "
                f"{counted(there)} of the vision tower. Say which is meant, such as "
                f"{_narrower(pattern, parts['language'])!r}; the tower has model.lora.vit_target_modules of its own"
            )
        if there and not here:
            found.append(pattern)
    return tuple(found)


def resolve_targets(part: Part, selector: Selector, rank: int) -> list[AdapterSite]:
    """The layers of ``part`` that ``selector`` names, in the model's order.

    A pattern is the last parts of a module's name (``q_proj``, ``self_attn.q_proj``), ``all-linear``, or a regular
    expression matching the whole name or its last parts. Linear layers (GPT-2's transposed ``Conv1D`` among them) and
    convolutions can be adapted. Raises `UserError` when a pattern matches nothing (with the nearest names), something
    that cannot be adapted, or, where all layers are meant, anything outside of them: embeddings, the head, another
    part; and for layers that there are not.
    """
    blocks = choose(part, selector.layers, selector.layers_field)
    modules = {name: m for name, m in part.module.named_modules() if name}
    adaptable = {n: s for n, m in modules.items() if inside(n, part.blocks) and (s := matrix_shape(m))}
    if not adaptable:
        raise UserError(
            f"{type(part.module).__name__} has no linear layers in {_root(part)}, so adapters cannot be placed; set "
            f"{_off(part)} for this {part.called}"
        )
    wanted: set[str] = set()
    for pattern in selector.modules:
        if pattern == ALL_LINEAR:
            wanted.update(n for n in adaptable if inside(n, blocks) and _is_linear(modules[n]))
            continue
        hits = list(_named(part, pattern, selector.field))
        if not hits:
            raise UserError(f"{selector.field} {pattern!r} matches no module. {_nearest(pattern, adaptable)}")
        outside = [name for name in hits if not inside(name, part.blocks)]
        if outside and (selector.layers == "all" or len(outside) == len(hits)):
            within = len(hits) - len(outside)
            advice = f"Say it more narrowly, such as {_narrower(pattern, part)!r}" if within else "Take it out"
            raise UserError(
                f"{selector.field} {pattern!r} reaches outside the {part.called}'s layers ({_root(part)}): it "
                f"matches {counted(outside)} there and {within} inside. Adapters go on their linear maps alone. "
                f"{advice}."
            )
        chosen = [name for name in hits if inside(name, blocks)]
        if not chosen:
            raise UserError(
                f"{selector.field} {pattern!r} matches nothing in the layers that {selector.layers_field} "
                f"({_told(selector.layers)}) chooses: {listed(blocks)}. It matches {counted(hits)} elsewhere"
            )
        odd = [name for name in chosen if name not in adaptable]
        if odd:
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(type(modules[o]).__name__ for o in odd).items())
            raise UserError(
                f"{selector.field} {pattern!r} matches {counted(odd)} ({kinds}), which are no linear layers. "
                f"{_nearest(pattern, adaptable)}"
            )
        wanted.update(chosen)
    if not wanted:
        raise UserError(
            f"{selector.field} {ALL_LINEAR}: the layers that {selector.layers_field} ({_told(selector.layers)}) "
            f"chooses have no linear maps. {_nearest('', adaptable)}"
        )
    return [
        AdapterSite(name, d_in, d_out, rank, rank * (d_in + d_out))
        for name, (d_in, d_out) in adaptable.items()
        if name in wanted
    ]


def choose(part: Part, layers: Layers, setting: str) -> tuple[str, ...]:
    """Names of the chosen layers of ``part``, first to last. Raises `UserError` for more than there are."""
    if not part.blocks:
        raise UserError(
            f"{part.source} ({type(part.module).__name__}): no list of {_layers(part)} was found, so adapters cannot "
            f"be placed; set {_off(part)} for this {part.called}"
        )
    depth = len(part.blocks)
    if isinstance(layers, str):
        end, _, number = layers.partition("-")
        asked = {"all": depth, "none": 0}.get(end)
        asked = int(number) if asked is None else asked
        if asked > depth:
            raise UserError(f"{setting} is {layers}, but {part.source} has {depth} {_layers(part)}: {_some(part)}")
        return part.blocks[:asked] if end == "first" else part.blocks[depth - asked :]
    if beyond := [k for k in layers if k >= depth]:
        raise UserError(
            f"{setting} names {', '.join(map(str, beyond))}, but {part.source} has {depth} {_layers(part)}, 0 to "
            f"{depth - 1}: {_some(part)}"
        )
    return tuple(part.blocks[k] for k in sorted(set(layers)))


def choose_modules(part: Part, names: Sequence[str], setting: str) -> tuple[str, ...]:
    """The named modules of ``part`` with weights, none inside another: stages, blocks, norms, ``last-K`` or
    ``first-K`` blocks. Raises `UserError` for a name that is none, with the nearest."""
    modules = {name: m for name, m in part.module.named_modules() if name}
    found: list[str] = []
    for name in names:
        if re.fullmatch(r"(last|first)-\d+", name):
            found += choose(part, name, setting)
        elif name in modules:
            found.append(name)
        else:
            close = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or list(part.blocks[-3:])
            raise UserError(
                f"{setting} {name!r} is no module of {part.source} ({type(part.module).__name__}). Nearest: "
                f"{', '.join(close)}; or last-K, of {len(part.blocks)} {_layers(part)}"
            )
    found = [n for n in modules if n in found and next(modules[n].parameters(), None) is not None]
    if not found:
        raise UserError(f"{setting}: {', '.join(names)} of {part.source} has no weights, so nothing would learn")
    return tuple(n for n in found if not inside(n, [m for m in found if m != n]))


def inside(name: str, modules: Sequence[str]) -> bool:
    """Whether ``name`` is one of these modules or of something in them."""
    return any(name.startswith(f"{module}.") or name == module for module in modules)


def lowest_of(part: Part, learns: Sequence[str]) -> str | None:
    """The lowest layer that holds any of the modules that learn: what goes into it is the same at every pass. None
    where there are none, or one lies outside of the layers."""

    def touched(name: str) -> str | None:
        return next((b for b in part.blocks if inside(name, [b]) or inside(b, [name])), None)

    found = {touched(name) for name in learns}
    return None if None in found else next((b for b in part.blocks if b in found), None)


def state_below(part: Part, block: str) -> dict[str, Tensor]:
    """`base_state` without a layer and those above it: what decides, with a sample, what goes into it."""
    above = part.blocks[part.blocks.index(block) :]
    return {name: t for name, t in base_state(part).items() if not inside(name, above)}


class Reached(Exception):
    """Ends a forward pass where enough is known."""

    def __init__(self, given: Tensor) -> None:
        super().__init__("reached")
        self.given = given


def input_of(part: Part, block: str, run: Callable[[], object]) -> Tensor:
    """What goes into a layer in a forward pass, which ends there."""

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        where = _tensor_in(args, kwargs)
        raise Reached(args[0] if where is None else kwargs[where])

    hook = part.module.get_submodule(block).register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
    try:
        run()
    except Reached as reached:
        return reached.given
    finally:
        hook.remove()
    raise AssertionError(f"{part.source} never calls {block}")


@contextmanager
def given_to(part: Part, block: str, value: Tensor) -> Iterator[None]:
    """Inside, the layer is given ``value`` in place of what comes from below."""

    def put(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        where = _tensor_in(args, kwargs)
        return ((value, *args[1:]), kwargs) if where is None else (args, {**kwargs, where: value})

    hook = part.module.get_submodule(block).register_forward_pre_hook(put, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _tensor_in(args: Any, kwargs: Any) -> str | None:
    """Under which name a layer is given its input; None: as its first argument."""
    return None if args and isinstance(args[0], Tensor) else next(k for k, v in kwargs.items() if isinstance(v, Tensor))


def base_state(part: Part) -> dict[str, Tensor]:
    """The state of the part's module as it was before adapters were attached: same names and order, none of theirs."""
    return without_adapters(part.module, [site.name for site in part.adapters])


def without_adapters(module: nn.Module, adapted: Sequence[str]) -> dict[str, Tensor]:
    """The state of ``module`` as it was before those layers of it were adapted."""
    layers = [f"{name}." for name in adapted]
    undone: dict[str, Tensor] = {}
    for key, tensor in module.state_dict().items():
        layer = next((layer for layer in layers if key.startswith(layer)), None)
        if layer is None:
            undone[key] = tensor
        elif key.startswith(f"{layer}base_layer."):
            undone[layer + key.removeprefix(f"{layer}base_layer.")] = tensor
    return undone


# ---------------------------------------------------------------------------------------------------------------
# What a pattern names


def _named(part: Part, pattern: str, setting: str) -> Iterator[str]:
    """Names of the modules of ``part`` that a pattern matches, whole or their last parts, with what stands before them
    in the whole model."""
    expression = _expression(pattern, setting)
    for name, _ in part.module.named_modules():
        full = part.prefix + name
        if name and (full == pattern or full.endswith("." + pattern) or expression.fullmatch(full)):
            yield name


def _expression(pattern: str, setting: str) -> re.Pattern[str]:
    """The pattern as a regular expression for the last parts of a name. How long it may search is the business of the
    person who wrote it."""
    whole = rf"(?:.*\.)?(?:{pattern.removeprefix('^')})"
    if (why := no_pattern(pattern) or no_pattern(whole)) is not None:  # alone first: a stray bracket is told as written
        raise UserError(
            f"{setting} {pattern[:200]!r} is neither the last part of a module's name nor a regular expression: {why}"
        )
    return re.compile(whole)


def matrix_shape(module: nn.Module) -> tuple[int, int] | None:
    """(d_in, d_out) of what can be adapted, as a matrix; GPT-2 has a kind of linear layer of its own."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, nn.Conv2d):
        return module.weight[0].numel(), module.out_channels
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        return weight.shape[0], weight.shape[1]
    return None


def _is_linear(module: nn.Module) -> bool:
    """Whether it maps channels linearly, each position by itself."""
    return not isinstance(module, nn.Conv2d) or (module.kernel_size == (1, 1) and module.groups == 1)


# ---------------------------------------------------------------------------------------------------------------
# The layers of a model


def language_part(causal_lm: nn.Module, source: str = "", *, whole: bool = False) -> Part:
    """A causal language model as a part; without layers where no list of them is found. ``whole``: it sees as well, and
    the part is its decoder alone."""
    source = source or type(causal_lm).__name__
    layers = decoder_layers(causal_lm)
    found = (
        () if layers is None else tuple(f"{layers}.{k}" for k in range(len(causal_lm.get_submodule(layers)._modules)))
    )
    if not whole:
        return Part("language", source, causal_lm, found)
    decoder = decoder_of(causal_lm)
    prefix = next(name for name, m in causal_lm.named_modules() if m is decoder) + "."
    return Part("language", source, decoder, tuple(block.removeprefix(prefix) for block in found), prefix)


def tower_part(backbone: nn.Module, source: str = "", prefix: str = "") -> Part:
    """A vision tower as a part; without layers where no list of them is found."""
    return Part("vision", source or type(backbone).__name__, backbone, tower_blocks(backbone), prefix)


def decoder_of(causal_lm: Any) -> nn.Module:
    """The part that gives hidden states. Llama 4's text model does not name its own, and gives itself."""
    decoder = causal_lm.get_decoder()
    return getattr(causal_lm, "model", decoder) if decoder is causal_lm else decoder


def decoder_layers(causal_lm: nn.Module) -> str | None:
    """Name of the list of decoder layers below ``causal_lm`` (``model.layers``), None where there is none."""
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
    return None


_BLOCKS = re.compile(r"blocks?|stages?|layers?|layer\d+|features|network")
"""What lists of blocks, and of stages that hold such lists, are called in transformers and timm."""


def tower_blocks(backbone: nn.Module) -> tuple[str, ...]:
    """Names of a tower's blocks, first to last: ``vision_model.encoder.layers.0``, ``blocks.0`` of a timm ViT,
    ``blocks.3.1`` of an EfficientNet, ``stages.2.blocks.0`` of a RepViT; () where no list of them is found."""
    found = _lists(backbone, "")
    queue = list(backbone.named_children())
    while not found and queue:  # vision_model.encoder.layers
        name, module = queue.pop(0)
        found = _lists(module, f"{name}.")
        queue += [(f"{name}.{n}", m) for n, m in module.named_children()]
    blocks: list[str] = []
    for name, module in found:
        # a stage is a list of blocks, or holds one
        inner = _items(module, name) if isinstance(module, nn.Sequential) else _lists(module, f"{name}.")
        blocks += [n for n, _ in inner] or [name]
    return tuple(blocks)


def _lists(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """What is in the lists of blocks that a module has as children."""
    return [
        item
        for name, child in module.named_children()
        if _BLOCKS.fullmatch(name) and isinstance(child, nn.ModuleList | nn.Sequential)
        for item in _items(child, prefix + name)
    ]


def _items(module: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """Blocks have modules of their own; a stage's norm or activation is none."""
    return [(f"{name}.{n}", m) for n, m in module.named_children() if next(m.children(), None) is not None]


# ---------------------------------------------------------------------------------------------------------------
# In words


def _root(part: Part) -> str:
    """``model.layers``: what the names of the layers begin with."""
    first, last = part.blocks[0].split("."), part.blocks[-1].split(".")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(first[:-1], last[:-1], strict=False))
    return ".".join(a for a, _ in shared) or f"{part.blocks[0]} to {part.blocks[-1]}"


def _layers(part: Part) -> str:
    return "decoder layers" if part.name == "language" else "blocks"


def _off(part: Part) -> str:
    return "model.lora.enable: false" if part.name == "language" else "model.lora.vit_layers: none"


def _some(part: Part) -> str:
    few = part.blocks if len(part.blocks) <= 4 else (*part.blocks[:2], "…", part.blocks[-1])
    return ", ".join(few)


def _told(layers: Layers) -> str:
    return layers if isinstance(layers, str) else f"[{', '.join(map(str, layers))}]"


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


def _narrower(pattern: str, part: Part) -> str:
    tail = pattern if re.fullmatch(r"[\w.]+", pattern) else "q_proj"
    return rf"{re.escape(_root(part))}\..*\.{re.escape(tail)}"


def render_sites(sites: Sequence[AdapterSite]) -> str:
    """The resolved list as a table to print: modules of one name and shape together, counted, and the total."""
    groups = Counter((s.name.rpartition(".")[2], s.d_in, s.d_out, s.rank) for s in sites)
    lines = [f"{'adapter on':<16}{'modules':>9}{'shape':>16}{'rank':>6}{'parameters':>14}"]
    for (last, d_in, d_out, rank), count in groups.items():
        lines.append(f"{last:<16}{count:>9}{f'{d_in} x {d_out}':>16}{rank:>6}{count * rank * (d_in + d_out):>14,}")
    lines.append(f"{'total':<16}{len(sites):>9}{'':>16}{'':>6}{sum(s.params for s in sites):>14,}")
    return "\n".join(lines)
