"""Settings as the stage-4 plan and ms-swift call them (``freeze_vit``, ``vit_lr``, ``modules_to_save``, …), put where
they are said here, before anything is checked: a recipe that has them loads, and a run's own config has ours."""

from __future__ import annotations

from typing import Any

from beholder.config.parts import names_modules, no_layers
from beholder.config.tree import SettingPath, Tree, dotted, get_at, show

RATES: dict[SettingPath, SettingPath] = {
    ("train", "learning_rate"): ("train", "lr", "lora"),
    ("train", "vit_lr"): ("train", "lr", "vision"),
    ("train", "aligner_lr"): ("train", "lr", "connector"),
}
FREEZE_LLM, FREEZE_VIT = ("model", "freeze_llm"), ("model", "freeze_vit")
SAVED = ("model", "lora", "modules_to_save")
ALIGNER = ("aligner", "connector", "projector", "merger")
LLM_LAYERS, VIT_LAYERS = ("model", "lora", "llm_layers"), ("model", "lora", "vit_layers")


def translate(tree: Tree) -> None:
    """Others' names in the tree become ours. One whose meaning cannot be had, or that contradicts what else is said, is
    a problem of the tree."""
    for path, ours in RATES.items():
        if _has(tree, path):
            _move(tree, path, ours, _take(tree, path))
    if _has(tree, FREEZE_LLM):
        _freeze_language(tree, _take(tree, FREEZE_LLM))
    if _has(tree, FREEZE_VIT):
        _freeze_tower(tree, _take(tree, FREEZE_VIT))
    if _has(tree, SAVED):
        _save(tree, _take(tree, SAVED))


def _freeze_language(tree: Tree, frozen: Any) -> None:
    if not _is_switch(tree, FREEZE_LLM, frozen):
        return
    student = get_at(tree.data, ("model", "student"))
    if frozen and isinstance(student, dict) and student.get("learns", "all") != "none":
        tree.complain(FREEZE_LLM, "true, but the student's language model learns; say model.student.learns: none")
    elif not frozen and not _adapters(tree):
        tree.complain(FREEZE_LLM, "false, but nothing of it learns; say how much: model.lora.enable and llm_layers")
    elif _adapters(tree):
        _agree(tree, FREEZE_LLM, frozen, LLM_LAYERS, "all")


def _freeze_tower(tree: Tree, frozen: Any) -> None:
    if not _is_switch(tree, FREEZE_VIT, frozen):
        return
    unfrozen = get_at(tree.data, ("model", "vision", "unfreeze"))
    named = get_at(tree.data, ("model", "lora", "target_modules"))
    expression = isinstance(named, list) and any(isinstance(n, str) and not names_modules(n) for n in named)
    if frozen and unfrozen:
        tree.complain(FREEZE_VIT, "true, but model.vision.unfreeze lets some of it learn; say one of the two")
    elif not frozen and not _adapters(tree) and not unfrozen:
        tree.complain(FREEZE_VIT, "false, but nothing of it learns; say how much: model.lora.vit_layers (with "
                      "model.lora.enable), or model.vision.unfreeze")  # fmt: skip
    elif _adapters(tree) and not unfrozen and not (expression and not _has(tree, VIT_LAYERS) and not frozen):
        _agree(tree, FREEZE_VIT, frozen, VIT_LAYERS, None)


def _agree(tree: Tree, path: SettingPath, frozen: bool, layers: SettingPath, default: str | None) -> None:
    """A switch with the setting that says how much."""
    said = _has(tree, layers)
    given = get_at(tree.data, layers) if said else default
    chosen = given is not None and not no_layers(tuple(given) if isinstance(given, list) else given)
    if frozen and not said:
        _move(tree, path, layers, "none")
    elif frozen == chosen:
        told = f"true, but {dotted(layers)} chooses some" if frozen else f"false, but {dotted(layers)} chooses none"
        tree.complain(path, f"{told}; say how much there, last-2 for example, and leave this out")


def _save(tree: Tree, names: Any) -> None:
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        tree.complain(SAVED, f"got {show(names)}; expected a list of names, [aligner] or []", value=True)
        return
    odd = [n for n in names if not any(own in n.lower() for own in ALIGNER)]
    if odd:
        tree.complain(
            SAVED, f"{odd[0]!r} cannot be trained whole here; what can is the aligner ({', '.join(ALIGNER)}), and "
            "modules of the tower under model.vision.unfreeze",
        )  # fmt: skip
    else:
        _move(tree, SAVED, ("model", "connector", "trainable"), bool(names))


def _adapters(tree: Tree) -> bool:
    return get_at(tree.data, ("model", "lora", "enable")) is True


def _is_switch(tree: Tree, path: SettingPath, value: Any) -> bool:
    if not isinstance(value, bool):
        tree.complain(path, f"got {show(value)}; expected true or false", value=True)
    return isinstance(value, bool)


def _has(tree: Tree, path: SettingPath) -> bool:
    around = get_at(tree.data, path[:-1])
    return isinstance(around, dict) and path[-1] in around


def _take(tree: Tree, path: SettingPath) -> Any:
    return get_at(tree.data, path[:-1]).pop(path[-1])


def _move(tree: Tree, path: SettingPath, ours: SettingPath, value: Any) -> None:
    """Under our name, with the place it was written at. What is said under both names is a problem unless it agrees."""
    if _has(tree, ours):
        if get_at(tree.data, ours) != value:
            tree.complain(
                path, f"{dotted(ours)} is the same and says {show(get_at(tree.data, ours))}; keep one of them"
            )
        return
    here: Any = tree.data
    for step in ours[:-1]:
        here = here.setdefault(step, {}) if isinstance(here, dict) else None
    if not isinstance(here, dict):  # said by the section's own complaint
        return
    here[ours[-1]] = value
    tree.marks[ours] = tree.mark(path)
