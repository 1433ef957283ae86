"""What learns: a declared plan, applied, printed and proven. Freezing, the trainable table, optimizer groups,
fingerprints.

The plan is data, not branches; the table goes into the evidence. The optimizer itself is `train.optim`'s business.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from beholder.config import STAGES, ModelConfig, Stage
from beholder.model.placement import Part, inside, without_adapters
from beholder.model.weights import hash_state
from beholder.types import UserError

PARTS = ("vision", "connector", "language", "lora", "vision_lora")
"""Whose weights are counted, grouped and hashed apart; ``lora`` are the adapters on ``language``, ``vision_lora`` those
on ``vision``."""

_ADAPTERS = {"language": "lora", "vision": "vision_lora"}
_SETTINGS = {"vision_lora": "vision"}
"""Under which name a part's learning rate and weight decay are set, where it is not its own."""


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What each part of the model does in a stage."""

    vision: Literal["pieces", "frozen"] = "frozen"
    """pieces: its adapters and its unfrozen modules learn, the rest of it does not."""
    connector: Literal["full", "frozen"] = "full"
    language: Literal["lora", "full", "frozen"] = "frozen"
    """lora: its adapters learn, its own weights do not. full: its own weights do (`model.learned.learn_whole`)."""


def plan_of(cfg: ModelConfig, stage: Stage) -> TrainPlan:
    """What learns in ``stage``. Raises `UserError` for adapters in a stage that does not train them."""
    if cfg.lora.enable and not stage.adapters:
        raise UserError(
            f"model.lora.enable is true, but stage {stage.name} trains the connector alone: set it to false, or "
            f"another stage: {', '.join(name for name, other in STAGES.items() if other.adapters)}"
        )
    if cfg.language_learns and not stage.adapters:
        raise UserError(f"stage {stage.name} trains the connector alone: set model.student.learns: none")
    adapters = cfg.lora.enable and cfg.lora.may_reach_tower
    return TrainPlan(
        vision="pieces" if cfg.vision.unfreeze or adapters else "frozen",
        connector="full" if cfg.connector.trainable or stage.connector_learns else "frozen",
        language="full" if cfg.language_learns else "lora" if cfg.lora.enable else "frozen",
    )


@dataclass(frozen=True, slots=True)
class TrainableRow:
    part: str
    params: int
    trainable: int
    dtype: str


@dataclass(frozen=True, slots=True)
class TrainableTable:
    """Parameters per part. ``str()`` gives a table to print, ``to_json()`` the record for the evidence."""

    rows: tuple[TrainableRow, ...]

    @property
    def params(self) -> int:
        return sum(r.params for r in self.rows)

    @property
    def trainable(self) -> int:
        return sum(r.trainable for r in self.rows)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(r) for r in self.rows]

    def __str__(self) -> str:
        rows = [*self.rows, TrainableRow("total", self.params, self.trainable, "")]
        lines = [f"{'part':<12}{'parameters':>16}{'trainable':>16}{'share':>9}  dtype"]
        lines += [
            f"{r.part:<12}{r.params:>16,}{r.trainable:>16,}{r.trainable / max(r.params, 1):>9.2%}  {r.dtype}"
            for r in rows
        ]
        return "\n".join(lines)


def apply_train_plan(model: nn.Module, plan: TrainPlan) -> TrainableTable:
    """Set ``requires_grad`` of every parameter as the plan declares, check it, and return the table.

    ``model`` has the children ``vision`` (may be None), ``connector`` and ``language``. Trainable weights must be fp32.
    """
    pieces, own = plan.vision == "pieces", {"vision": plan.vision == "pieces", "language": plan.language == "full"}
    learns = {"connector": plan.connector == "full", "lora": plan.language == "lora", "vision_lora": pieces}
    parts = _parameters(model)
    if learns["lora"] and not {"lora", "vision_lora"} & parts.keys():
        raise UserError("the plan trains adapters, but the model has none: set model.lora.enable: true")
    for part, named in parts.items():
        for parameter in named.values():
            parameter.requires_grad_(learns.get(part, False))
    for child in (child for child, learning in own.items() if learning):
        if (part := _part(model, child)) is not None:
            for name in part.unfrozen:
                part.module.get_submodule(name).requires_grad_(True)
    model.train()
    return trainable_table(model)


def _parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Per part that is there, its parameters by their names below ``model``."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for child in ("vision", "connector", "language"):
        module = getattr(model, child)
        if module is not None:
            found[child] = {f"{child}.{name}": p for name, p in module.named_parameters()}
    between = {id(p) for p in found["connector"].values()}  # a native model's lies within its eyes
    if "vision" in found:
        found["vision"] = {name: p for name, p in found["vision"].items() if id(p) not in between}
    for child in ("language", "vision"):
        part = _part(model, child)
        if part is not None and part.adapters:
            from beholder.model.adapters import adapter_parameters

            ours = {id(p) for p in adapter_parameters(part).values()}
            names = [name for name, p in found[child].items() if id(p) in ours]
            found[_ADAPTERS[child]] = {name: found[child].pop(name) for name in names}
    return found


def _part(model: nn.Module, name: str) -> Part | None:
    return getattr(getattr(model, name), "part", None)


def trainable_table(model: nn.Module) -> TrainableTable:
    """The table of what is trainable now."""
    rows = []
    for part, named in _parameters(model).items():
        params = list(named.values())
        learns = [p for p in params if p.requires_grad]
        assert all(str(p.dtype) == "torch.float32" for p in learns), f"trainable weights of {part} are not fp32"
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in params})
        rows.append(
            TrainableRow(part, sum(p.numel() for p in params), sum(p.numel() for p in learns), " ".join(dtypes) or "-")
        )
    return TrainableTable(tuple(rows))


def param_groups(
    model: nn.Module, lr: float | Mapping[str, float], weight_decay: float | Mapping[str, float]
) -> list[dict[str, Any]]:
    """Optimizer groups of the trainable weights: ``<part>.decay`` (matrices) and ``<part>.no_decay`` (weight decay 0).

    ``lr`` and ``weight_decay`` are one number, or one per part (``{"connector": 1e-4}``). Norms, biases and the
    perceiver's latents are not decayed: pulling them to 0 only shrinks what normalisation undoes, or erases what tells
    latents apart. Each group has ``name``, ``params`` as (name, tensor) pairs (torch keeps the names), ``lr`` and
    ``weight_decay``. Raises `UserError` when nothing is trainable.
    """
    groups: list[dict[str, Any]] = []
    for part, parameters in _parameters(model).items():
        named = [(n, p) for n, p in parameters.items() if p.requires_grad]
        if not named:
            continue
        setting = _SETTINGS.get(part, part)
        rate = lr if isinstance(lr, int | float) else lr[setting]
        decay = weight_decay if isinstance(weight_decay, int | float) else weight_decay[setting]
        for kind, wanted, wd in (("decay", True, float(decay)), ("no_decay", False, 0.0)):
            params = [(n, p) for n, p in named if _decays(n, p) == wanted]
            if params:
                groups.append(
                    {
                        "name": f"{part.replace('_', '.')}.{kind}",
                        "params": params,
                        "lr": float(rate),
                        "weight_decay": wd,
                    }
                )
    if not groups:
        raise UserError("nothing is trainable: the plan freezes every part, or the connector has no weights")
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("latents")


def frozen_fingerprint(model: nn.Module) -> dict[str, str]:
    """sha256 of what does not learn of every part, to be compared before and after training.

    ``language`` and ``vision`` are the weights of the base under the names they have without adapters, so attaching
    does not change it; those that `Part.unfrozen` leaves alone. Adapters that are frozen too are a part of
    their own.
    """
    parts = _parameters(model)
    states = {part: _frozen_state(model, part, named) for part, named in parts.items()}
    return {part: hash_state(states[part]) for part in PARTS if states.get(part)}


def _frozen_state(model: nn.Module, part: str, named: Mapping[str, nn.Parameter]) -> Mapping[str, Tensor]:
    own = _part(model, part) if part in _ADAPTERS else None
    if own is not None:
        child = getattr(model, part)  # with what is in it besides the part itself: a native model's head, or projector
        before = next(name for name, m in child.named_modules() if m is own.module) + "."
        state = without_adapters(child, [before + site.name for site in own.adapters])
        elsewhere = [before + name for name in own.unfrozen]
        elsewhere += getattr(model.connector, "within", ()) if part == "vision" else ()
        return {n: t for n, t in state.items() if not inside(n, elsewhere)}
    if any(p.requires_grad for p in named.values()):
        return {}
    return (
        {n: p.detach() for n, p in named.items()} if part in _ADAPTERS.values() else getattr(model, part).state_dict()
    )
