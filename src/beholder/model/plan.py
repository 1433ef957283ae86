"""What learns: a declared plan, applied, printed and proven. Freezing, the trainable table, optimizer groups,
fingerprints.

The plan is data, not branches; the table goes into the evidence. The optimizer itself is `train.optim`'s business.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import Tensor, nn

from beholder.config import STAGES, ModelConfig, Stage
from beholder.model.weights import hash_state
from beholder.types import UserError

PARTS = ("vision", "connector", "language", "lora")
"""Whose weights are counted, grouped and hashed apart; ``lora`` are the adapters on ``language``."""


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """What each part of the model does in a stage."""

    vision: Literal["frozen"] = "frozen"
    connector: Literal["full", "frozen"] = "full"
    language: Literal["lora", "frozen"] = "frozen"
    """lora: its adapters learn, its own weights do not."""


def plan_of(cfg: ModelConfig, stage: Stage) -> TrainPlan:
    """What learns in ``stage``. Raises `UserError` for adapters in a stage that does not train them."""
    if cfg.lora.enable and not stage.adapters:
        raise UserError(
            f"model.lora.enable is true, but stage {stage.name} trains the connector alone: set it to false, or "
            f"another stage: {', '.join(name for name, other in STAGES.items() if other.adapters)}"
        )
    return TrainPlan(
        connector="full" if cfg.connector.trainable or stage.connector_learns else "frozen",
        language="lora" if cfg.lora.enable else "frozen",
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
    learns = {"connector": plan.connector == "full", "lora": plan.language == "lora"}
    parts = _parameters(model)
    if learns["lora"] and "lora" not in parts:
        raise UserError("the plan trains adapters, but the language model has none: set model.lora.enable: true")
    for part, named in parts.items():
        for parameter in named.values():
            parameter.requires_grad_(learns.get(part, False))
    model.train()
    return trainable_table(model)


def _parameters(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """Per part that is there, its parameters by their names below ``model``."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for child in ("vision", "connector", "language"):
        module = getattr(model, child)
        if module is not None:
            found[child] = {f"{child}.{name}": p for name, p in module.named_parameters()}
    language: Any = model.language
    if language.adapters:
        from beholder.model.adapters import adapter_parameters

        names = [f"language.{name}" for name in adapter_parameters(language)]
        found["lora"] = {name: found["language"].pop(name) for name in names}
    return found


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
        rate = lr if isinstance(lr, int | float) else lr[part]
        decay = weight_decay if isinstance(weight_decay, int | float) else weight_decay[part]
        for kind, wanted, wd in (("decay", True, float(decay)), ("no_decay", False, 0.0)):
            params = [(n, p) for n, p in named if _decays(n, p) == wanted]
            if params:
                groups.append({"name": f"{part}.{kind}", "params": params, "lr": float(rate), "weight_decay": wd})
    if not groups:
        raise UserError("nothing is trainable: the plan freezes every part, or the connector has no weights")
    return groups


def _decays(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("latents")


def frozen_fingerprint(model: nn.Module) -> dict[str, str]:
    """sha256 of every part without a trainable weight, to be compared before and after training.

    ``language`` are the weights of the base under the names they have without adapters, so attaching does not change
    it; adapters that are frozen too are a part of their own.
    """
    parts = _parameters(model)
    frozen = [part for part in PARTS if part in parts and not any(p.requires_grad for p in parts[part].values())]
    return {part: hash_state(_state(model, part, parts)) for part in frozen}


def _state(model: nn.Module, part: str, parts: Mapping[str, Mapping[str, nn.Parameter]]) -> Mapping[str, Tensor]:
    if part == "lora":
        return {name: p.detach() for name, p in parts["lora"].items()}
    if part == "language" and "lora" in parts:
        from beholder.model.adapters import base_state

        return base_state(model.language)  # pyright: ignore[reportArgumentType]
    return getattr(model, part).state_dict()
