"""The distillation loss: against a plain implementation over the whole vocabulary, and however it is divided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from beholder.config import DistillConfig
from beholder.model import losses
from beholder.model.divergence import Full, columns, top_k
from beholder.train import objectives
from beholder.train.objectives import Distill, log_probabilities
from beholder.types import Batch, Supervised, UserError

V, DH = 23, 6
require = objectives._require


class Student(torch.nn.Module):
    """Hidden states that learn, one a token, and a head: what an objective knows of a model."""

    def __init__(self, learns: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.states = torch.nn.Parameter(torch.randn(40, DH))
        self.out = torch.nn.Linear(DH, V, bias=False).requires_grad_(learns)
        self.language = SimpleNamespace(head=self.out, vocab=V, head_learns=learns)

    def supervised(self, batch: Batch) -> Supervised:
        where = batch.supervise.reshape(-1).nonzero().squeeze(1)
        return Supervised(
            self.states[batch.position_ids.reshape(-1)[where]], batch.input_ids.reshape(-1)[where],
            batch.sample_index.reshape(-1)[where],
        )  # fmt: skip


@dataclass
class Said:
    """Samples of several lengths with what two teachers say of their tokens."""

    lengths: tuple[int, ...] = (3, 1, 5)

    def __post_init__(self) -> None:
        draw = torch.Generator().manual_seed(2)
        self.targets = [torch.randint(0, V, (n,), generator=draw) for n in self.lengths]
        self.teachers = [
            [torch.log_softmax(3 * torch.randn(n, V, generator=draw), -1) for n in self.lengths] for _ in range(2)
        ]

    def batch(self, order: tuple[int, ...], form: Any, step: int = 0) -> Batch:
        """The samples in this order in one row; columns are sample by sample, as numbered in ``order`` ascending."""
        named = sorted(order)
        flat = [(named.index(i), t) for i in order for t in range(self.lengths[i])]
        first = [sum(self.lengths[:i]) for i in range(len(self.lengths))]
        places = torch.tensor([[first[i] + t for i in order for t in range(self.lengths[i])]])
        taught: list[Mapping[str, Tensor]] = [
            columns(form(torch.cat([teacher[i] for i in named]))) for teacher in self.teachers
        ]
        return Batch(
            input_ids=torch.cat([self.targets[i] for i in order])[None], position_ids=places,
            supervise=torch.ones_like(places, dtype=torch.bool), sample_index=torch.tensor([[k for k, _ in flat]]),
            image_positions=torch.zeros(0, dtype=torch.int64), image_lengths=torch.zeros(0, dtype=torch.int64),
            image_sample=torch.zeros(0, dtype=torch.int64), images=[], ids=[str(i) for i in named], step=step,
            taught=list(taught),
        )  # fmt: skip


def config(**more: Any) -> DistillConfig:
    teachers = [{"run": "a", "weight": 0.75}, {"run": "b", "weight": 0.25}]
    return DistillConfig.model_validate({"teachers": teachers, **more})


def plain(student: Student, said: Said, alpha: float, t: float) -> Tensor:
    """As the guide writes it, over the whole vocabulary."""
    logits = student.out(student.states[: sum(said.lengths)])
    nll = torch.nn.functional.cross_entropy(logits, torch.cat(said.targets), reduction="sum")
    kl = sum(
        w * torch.nn.functional.kl_div(
            torch.log_softmax(logits / t, -1), torch.log_softmax(torch.cat(teacher) / t, -1), log_target=True,
            reduction="sum",
        )
        for w, teacher in zip((0.75, 0.25), said.teachers, strict=True)
    )  # fmt: skip
    return (1 - alpha) * nll + alpha * t**2 * kl


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("form", ["full", "topk"])
def test_loss_and_gradients_are_those_of_a_plain_softmax(form: str, learns: bool) -> None:
    said, cfg = Said(), config(form=form, **({"k": V} if form == "topk" else {}))
    make = Full if form == "full" else lambda log_p: top_k(log_p, V, cfg.kept_temperatures)
    student, other = Student(learns), Student(learns)
    terms = Distill(cfg, 10)(student, said.batch((0, 1, 2), make))
    terms.total.backward()
    expected = plain(other, said, 0.3, 2.0)
    expected.backward()
    torch.testing.assert_close(terms.total, expected)
    torch.testing.assert_close(student.states.grad, other.states.grad, rtol=1e-4, atol=1e-5)
    if learns:
        torch.testing.assert_close(student.out.weight.grad, other.out.weight.grad, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole_in_any_order() -> None:
    said, objective = Said(), Distill(config(form="full"), 10)
    whole, parts = Student(True), Student(True)
    terms = objective(whole, said.batch((2, 0, 1), Full))
    terms.total.backward()
    found = [objective(parts, said.batch(order, Full)) for order in ((1, 0), (2,))]
    for own in found:
        own.total.backward()
    assert terms.tokens == sum(own.tokens for own in found) == sum(said.lengths)
    for name in objective.parts:
        torch.testing.assert_close(terms.parts[name], sum(own.parts[name] for own in found))
    torch.testing.assert_close(whole.states.grad, parts.states.grad)
    torch.testing.assert_close(whole.out.weight.grad, parts.out.weight.grad)
    torch.testing.assert_close(terms.total, plain(Student(True), said, 0.3, 2.0))


def test_alpha_and_temperature_are_functions_of_the_step() -> None:
    said, cfg = Said(), config(preset="progressive", temperature=3.0, temperature_end=1.0, form="full")
    objective, student = Distill(cfg, 9), Student(False)  # the last of 9 steps is at the end of the schedule
    seen = [objective(student, said.batch((0, 1, 2), Full, step=step)) for step in range(9)]
    assert [round(s.settings["alpha"], 4) for s in seen][::4] == [0.5, 0.35, 0.2]
    assert [s.settings["temperature"] for s in seen] == [3.0, 2.75, 2.5, 2.25, 2.0, 1.75, 1.5, 1.25, 1.0]
    for s in seen:
        torch.testing.assert_close(
            s.total, plain(student, said, s.settings["alpha"], s.settings["temperature"]), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"preset": "hard"}, (0.5, None, 1.0)), ({"preset": "soft"}, (0.2, None, 3.0)),
        ({"preset": "progressive"}, (0.5, 0.2, 2.0)), ({"preset": "soft", "alpha": 0.4}, (0.4, None, 3.0)),
        ({}, (0.3, None, 2.0)),
    ],
)  # fmt: skip
def test_presets_are_the_guides_and_what_is_given_comes_first(given: dict[str, Any], told: tuple[Any, ...]) -> None:
    cfg = config(**given)
    assert (cfg.alpha, cfg.alpha_end, cfg.temperature) == told


@pytest.mark.parametrize("bad", [None, 1, 7])
def test_whether_a_teacher_that_is_asked_is_finite_is_asked_once_whatever_the_chunks(
    bad: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, cfg = Said(), DistillConfig.model_validate({"teachers": [{"run": "a"}], "online": True})
    teacher = Student(False)
    batch = said.batch((0, 1, 2), Full)
    batch.taught = [said.batch((0, 1, 2), Full)]
    with torch.no_grad():
        teacher.out.weight *= 3  # it says something else than the student
    whole = Distill(cfg, 10, [teacher])(Student(False), batch)
    monkeypatch.setattr(losses, "CPU_ROWS", 2)  # five chunks
    asked: list[bool] = []
    monkeypatch.setattr(objectives, "_require", lambda sound, ids: (asked.append(bool(sound)), require(sound, ids)))
    if bad is None:
        terms = Distill(cfg, 10, [teacher])(Student(False), batch)
        torch.testing.assert_close(terms.total, whole.total)
    else:
        with torch.no_grad():
            teacher.states[bad] = float("nan")
        with pytest.raises(UserError, match="no finite log-probabilities"):
            Distill(cfg, 10, [teacher])(Student(False), batch)
    assert asked == [bad is None]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_teacher_without_finite_log_probabilities_is_refused(bad: float) -> None:
    logits = torch.zeros(2, V)
    logits[1] = bad
    with pytest.raises(UserError, match=r"no finite log-probabilities \(samples 'a'\)"):
        log_probabilities(logits, V, ["a"])
