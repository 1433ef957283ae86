"""What a part has learned, as a checkpoint keeps it and puts it back: adapters, adapters of earlier runs that were
merged into it, and weights that learn, or have learned, themselves. And how weights come to learn themselves."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from beholder.model.placement import Part, Widened, base_state, choose_modules, inside
from beholder.model.weights import listed
from beholder.types import TrainedPart, UserError


def learn_whole(part: Part, which: Literal["all", "layers", "none"]) -> None:
    """Let a language model that was made for the run learn: all of it, all but embeddings and head, or nothing. Its
    checkpoints hold all of it in any case: nothing else need be there, nor the seed be the same, to have it again."""
    part.unfrozen, whole = learning_modules(part.module, which), learning_modules(part.module, "all")
    if beside := [name for name, _ in part.module.named_parameters() if not inside(name, whole)]:
        raise UserError(
            f"model.student: {part.source} ({type(part.module).__name__}) has weights of its own that are in no module "
            f"({listed(beside, 3)}), so it cannot learn whole; make a student of a family's shape (model.student.like)"
        )
    _widen(part, whole)


def learning_modules(model: Any, which: Literal["all", "layers", "none"]) -> tuple[str, ...]:
    """Names of the modules of a causal language model that together are that much of it."""
    apart = [model.get_input_embeddings(), model.get_output_embeddings()] if which == "layers" else []
    return () if which == "none" else tuple(_besides(model, apart))


def _besides(module: nn.Module, apart: Sequence[nn.Module], before: str = "") -> Iterator[str]:
    """Names of modules that together have all weights but those of the modules ``apart``."""
    for name, child in module.named_children():
        if any(child is m for m in apart) or next(child.parameters(), None) is None:
            continue
        if any(inner is m for inner in child.modules() for m in apart):
            yield from _besides(child, apart, f"{before}{name}.")
        else:
            yield before + name


def unfreeze(part: Part, names: Sequence[str], setting: str = "model.vision.unfreeze") -> None:
    """Let the weights of the named modules learn themselves, in fp32. Raises `UserError` as `choose_modules` does."""
    part.unfrozen = choose_modules(part, names, setting)
    _widen(part, part.unfrozen)


def _widen(part: Part, modules: Sequence[str]) -> None:
    """Modules that no longer are as in their files hold their weights and compute in fp32: an update of 16-bit weights
    would be lost in rounding. What is around them goes on in the part's own precision."""
    for name in modules:
        if inside(name, part.changed):
            continue
        module = part.module.get_submodule(name)
        narrow = next((p.dtype for p in module.parameters() if p.dtype != torch.float32), None)
        for within in [n for n in part.widened if inside(n, [name])]:  # around it everything is fp32 now
            narrow, hooks = part.widened.pop(within)
            for hook in hooks:
                hook.remove()
        module.float()
        if narrow is not None:
            hooks = (
                module.register_forward_pre_hook(_to_float, with_kwargs=True),
                module.register_forward_hook(lambda _m, _x, out, to=narrow: tree_map(lambda t: _cast(t, to), out)),
            )
            part.widened[name] = Widened(narrow, hooks)
        part.changed = (*(c for c in part.changed if not inside(c, [name])), name)


def _to_float(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return tree_map(lambda t: _cast(t, torch.float32), (args, kwargs))


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def learned_state(part: Part) -> dict[str, TrainedPart]:
    """By name of the part in a checkpoint: ``adapter`` and ``merged_1``, … of the language model, ``vision_adapter``
    and ``vision_merged_1``, … of the tower, and ``vision`` and ``language``, the weights that are no longer as in their
    files."""
    state = learned_base(part)
    if part.adapters:
        from beholder.model import adapters

        learned = TrainedPart(adapters.adapter_tensors(part), adapters.adapter_config(part))
        state[f"{_before(part)}adapter"] = learned
    return state


def _before(part: Part) -> str:
    return "" if part.name == "language" else f"{part.name}_"


def learned_base(part: Part) -> dict[str, TrainedPart]:
    """`learned_state` without its adapters: how the base differs from its files."""
    state = {f"{_before(part)}merged_{k}": merged for k, merged in enumerate(part.merged, 1)}
    if part.changed:
        facts = {"modules": list(part.changed), "of": part.source}
        facts |= {"initial": part.initial} if part.initial else {}
        state[part.name] = TrainedPart(_changed(part), facts)
    return state


def _changed(part: Part) -> dict[str, Tensor]:
    """Weights (and statistics, which stay as they are) of the modules that are no longer as in their files; a head that
    is the table of embeddings once."""
    found: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, t in base_state(part).items():
        if inside(name, part.changed) and (not t.numel() or (t.data_ptr(), t.shape) not in seen):
            found[name] = t
            seen.add((t.data_ptr(), t.shape))
    return found


def apply_base(parts: Mapping[str, Part], base: Mapping[str, TrainedPart]) -> None:
    """Make what earlier runs have learned part of the base, in the order of ``base``, before anything new learns. A
    native model's connector is loaded as every connector is."""
    for name, learned in base.items():
        if name == "connector":
            continue
        part = parts["vision" if name.startswith("vision") else "language"]
        if "merged" in name:
            from beholder.model import adapters

            adapters.merge_in(part, learned)
        else:
            modules = learned.facts.get("modules")
            known = {n for n, _ in part.module.named_modules() if n}
            if not isinstance(modules, list) or not modules or not known.issuperset(map(str, modules)):
                raise UserError(
                    f"the weights of {name} that were trained are of modules that {part.source} does not have: "
                    f"{str(modules)[:200]}; they are of another {part.called} ({part.setting})"
                )
            _widen(part, [str(m) for m in modules])
            load_changed(part, learned)
            if isinstance(initial := learned.facts.get("initial"), str):
                part.initial = initial


def narrowed(state: Mapping[str, Tensor], parts: Sequence[Part]) -> dict[str, Tensor]:
    """The state of the model that ``parts`` are parts of, what `unfreeze` made fp32 rounded to what is around it: one
    precision, as others load it."""
    wide = {part.prefix + name: w.around for part in parts for name, w in part.widened.items()}
    types = {key: next((wide[name] for name in wide if inside(key, [name])), None) for key in state}
    return {k: t if (to := types[k]) is None else _cast(t, to) for k, t in state.items()}


@torch.no_grad()
def load_changed(part: Part, learned: TrainedPart) -> None:
    """Put a checkpoint's trained weights back, bit for bit. Raises `UserError` where they do not fit; nothing is loaded
    then."""
    own, tensors = _changed(part), learned.tensors
    wrong = [
        *(f"{k} is missing" for k in own.keys() - tensors.keys()),
        *(f"{k} has no place here" for k in tensors.keys() - own.keys()),
        *(
            f"{k} is {list(tensors[k].shape)} {tensors[k].dtype} in the file, {list(own[k].shape)} {own[k].dtype} here"
            for k in own.keys() & tensors.keys()
            if (tensors[k].shape, tensors[k].dtype) != (own[k].shape, own[k].dtype)
        ),
    ]
    if wrong:
        raise UserError(
            f"the trained weights of the {part.called} do not fit this config ("
            f"{'model.student' if part.name == 'language' else 'model.vision.unfreeze'}, or another {part.setting}): "
            f"{listed(wrong, 4)}"
        )
    if bad := [k for k, t in tensors.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]:
        raise UserError(f"trained weights are NaN or infinite: {listed(bad, 3)}. The run they come from had diverged.")
    for name, weight in own.items():
        weight.copy_(tensors[name])
