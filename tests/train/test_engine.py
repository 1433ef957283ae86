"""The loop: one divisor, exact resume, honest stops. Real tiny model, real data, real checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from tiny_run import Outcome, Tiny, exact_log, optimizer_for, settings, train

from beholder.model.plan import frozen_fingerprint
from beholder.prepare.tiny import tiny_llm, tiny_vision
from beholder.runs import RunDir
from beholder.train.checkpoint import latest_checkpoint
from beholder.train.engine import Asked, LoopState, NonFiniteError
from beholder.train.nonfinite import only
from beholder.train.objectives import next_token
from beholder.train.optim import named_parameters, optimizer_tensors
from beholder.train.restore import load_connector
from beholder.types import Batch, ImageRef, LossTerms, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def connector(outcome: Outcome) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in outcome.model.connector.state_dict().items()}


def gradients(outcome: Outcome) -> dict[str, torch.Tensor]:
    """The gradient of the one step that was run: AdamW's first moment is (1 - beta1) of it."""
    return {k: v / 0.1 for k, v in optimizer_tensors(outcome.optimizer).items() if k.endswith("exp_avg")}


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest difference relative to the largest entry, over all tensors."""
    assert a.keys() == b.keys() and a
    return max(float((a[k] - b[k]).abs().max() / a[k].abs().max().clamp(min=1e-12)) for k in a)


def identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- one divisor


@pytest.mark.parametrize("packing", [False, True])
def test_accumulated_gradients_are_those_of_one_large_batch_with_ragged_lengths(
    tiny: Tiny, tmp_path: Path, packing: bool
) -> None:
    """fp32, 8 samples as 1x8, 2x4, 4x2 and 8x1. 2e-5 of a tensor's largest entry is a few roundings of fp32 sums; a
    mean of micro-batch means, which weighs short captions more, is off by a hundred times that (last assertion)."""
    seen: dict[int, dict[str, torch.Tensor]] = {}
    losses: dict[int, float] = {}
    for micro in (8, 4, 2, 1):
        cfg = settings(micro_batch_size=micro, gradient_accum=8 // micro, packing=packing, grad_clip=None)
        outcome = train(tiny, RunDir(tmp_path / str(micro)), cfg, total_steps=1)
        seen[micro], losses[micro] = gradients(outcome), outcome.result.last["loss"]  # type: ignore[index]
    for micro in (4, 2, 1):
        assert distance(seen[8], seen[micro]) < 2e-5
        assert losses[micro] == pytest.approx(losses[8], rel=1e-6)

    def mean_of_means(model: Any, batch: Batch) -> LossTerms:
        terms = next_token(model, batch)
        return LossTerms(terms.total * (100 / terms.tokens), terms.tokens)

    cfg = settings(micro_batch_size=1, gradient_accum=8, packing=packing, grad_clip=None)
    wrong = gradients(train(tiny, RunDir(tmp_path / "wrong"), cfg, total_steps=1, objective=mean_of_means))
    scale = {k: v * (seen[8][k].norm() / v.norm()) for k, v in wrong.items()}
    assert distance(seen[8], scale) > 2e-3


def test_the_logged_loss_is_nats_per_supervised_token_of_the_whole_step(tiny: Tiny, tmp_path: Path) -> None:
    outcome = train(tiny, RunDir(tmp_path), settings(micro_batch_size=3, gradient_accum=2), total_steps=1)
    fresh = tiny.model()
    batches = next(tiny.stream(fresh, settings(micro_batch_size=3, gradient_accum=2)).steps(0, 1))
    with torch.no_grad():
        nll = torch.cat([fresh(b).nll.double() for b in batches])
    record = outcome.result.last
    assert record is not None
    assert record["tokens"] == len(nll) and record["samples"] == 6
    assert record["loss"] == pytest.approx(float(nll.mean()), rel=1e-6)
    assert record["images"] == sum(len(b.images) for b in batches)
    assert record["label_zero_pct"] == 0 and record["truncated_pct"] == 0
    assert record["epoch"] == 6 / 24


def test_only_the_connector_learns_and_frozen_parts_stay_bit_identical(tiny: Tiny, tmp_path: Path) -> None:
    model = tiny.model()
    before = {k: v.clone() for k, v in model.connector.state_dict().items()}
    frozen = frozen_fingerprint(model)
    outcome = train(tiny, RunDir(tmp_path), settings(), total_steps=3, model=model)
    assert frozen_fingerprint(model) == frozen and set(frozen) == {"vision", "language"}
    changed = {k for k, v in connector(outcome).items() if not torch.equal(v, before[k])}
    assert changed == {n for n, _ in model.connector.named_parameters()}


def test_the_loss_falls(tiny: Tiny, tmp_path: Path) -> None:
    """From 6.16 to 5.39 nats; the language model is random and frozen, so it cannot fall far."""
    train(tiny, RunDir(tmp_path), settings(micro_batch_size=8), total_steps=25, multi_image_fraction=0.0)
    losses = [r["loss"] for r in exact_log(RunDir(tmp_path))]
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])


def test_clipping_bounds_the_update_and_logs_the_norm_before_it(tiny: Tiny, tmp_path: Path) -> None:
    free = train(tiny, RunDir(tmp_path / "a"), settings(grad_clip=None), total_steps=1)
    clipped = train(tiny, RunDir(tmp_path / "b"), settings(grad_clip=1e-3), total_steps=1)
    assert free.result.last is not None and clipped.result.last is not None
    assert free.result.last["grad_norm"] == clipped.result.last["grad_norm"] > 1e-3
    norm = torch.stack([g.norm() for g in gradients(clipped).values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


# -- exact resume


def test_straight_run_equals_stopped_and_resumed_run_bit_for_bit_with_dropout(tiny: Tiny, tmp_path: Path) -> None:
    cfg = settings(micro_batch_size=2, gradient_accum=2, save_every=2, keep_checkpoints=2)
    straight = train(tiny, RunDir(tmp_path / "a"), cfg, total_steps=7, dropout=0.2)
    run = RunDir(tmp_path / "b")
    torch.manual_seed(1234)  # nothing may depend on the generator's past

    class Stop(Exception):
        pass

    class StopAfter:
        def on_step(self, step: int, record: dict[str, Any]) -> None:
            if step == 5:
                raise Stop

    with pytest.raises(Stop):
        train(tiny, run, cfg, total_steps=7, dropout=0.2, callbacks=[StopAfter()])
    assert [r["step"] for r in exact_log(run)] == [1, 2, 3, 4, 5]
    resumed = train(tiny, run, cfg, total_steps=7, dropout=0.2)
    assert resumed.result.steps_run == 3 and resumed.saved == [6, 7]
    assert exact_log(run) == exact_log(RunDir(tmp_path / "a"))
    assert identical(connector(straight), connector(resumed))
    assert identical(optimizer_tensors(straight.optimizer), optimizer_tensors(resumed.optimizer))
    again = train(tiny, run, cfg, total_steps=7, dropout=0.2)
    assert (again.result.step, again.result.steps_run, again.result.status) == (7, 0, "succeeded")


def test_dropout_is_on_in_training_and_differs_between_steps_and_seeds(tiny: Tiny, tmp_path: Path) -> None:
    losses = {
        (dropout, seed): train(
            tiny, RunDir(tmp_path / f"{dropout}-{seed}"), settings(lr={"connector": 0.0}), total_steps=1,
            dropout=dropout, seed=seed,
        ).result.last["loss"]  # type: ignore[index]
        for dropout, seed in ((0.0, 1), (0.0, 2), (0.3, 1), (0.3, 2))
    }  # fmt: skip
    assert losses[0.0, 1] == losses[0.0, 2]
    assert len(set(losses.values())) == 3


def test_loader_processes_change_nothing(tiny: Tiny, tmp_path: Path) -> None:
    cfg = settings(micro_batch_size=2, gradient_accum=2)
    alone = train(tiny, RunDir(tmp_path / "a"), cfg, total_steps=4)
    helped = train(tiny, RunDir(tmp_path / "b"), cfg, total_steps=4, num_workers=2)
    assert exact_log(RunDir(tmp_path / "a")) == exact_log(RunDir(tmp_path / "b"))
    assert identical(connector(alone), connector(helped))


def test_a_saved_connector_loads_into_a_fresh_model(tiny: Tiny, tmp_path: Path) -> None:
    outcome = train(tiny, RunDir(tmp_path), settings(), total_steps=2)
    fresh = tiny.model(seed=99)
    load_connector(tmp_path, fresh.connector, fresh.connector_info())
    assert identical(connector(outcome), {k: v for k, v in fresh.connector.state_dict().items()})


def test_a_connector_of_other_parts_or_another_shape_is_refused_with_the_config_field(
    tiny: Tiny, tmp_path: Path
) -> None:
    """The tower and the language model are swapped for others of the same sizes; nothing but their weights differs."""
    train(tiny, RunDir(tmp_path / "run"), settings(), total_steps=1)
    other_llm = replace(tiny, llm=tiny_llm(tmp_path / "other llm", seed=5)).model()
    with pytest.raises(UserError, match=r"language.fingerprint \(model.llm.name_or_path\): checkpoint .*, config "):
        load_connector(tmp_path / "run", other_llm.connector, other_llm.connector_info())
    other_tower = replace(tiny, vision=tiny_vision(tmp_path / "other tower", seed=5)[0]).model()
    with pytest.raises(UserError, match=r"vision.fingerprint \(model.vision.name_or_path\): checkpoint .*, config "):
        load_connector(tmp_path / "run", other_tower.connector, other_tower.connector_info())
    moved = replace(tiny, llm=Path(shutil.copytree(tiny.llm, tmp_path / "moved"))).model()
    load_connector(tmp_path / "run", moved.connector, moved.connector_info())
    plain = tiny.model(vision_ln=False)
    with pytest.raises(UserError, match=r"checkpoint has vision_ln\.\*.*vision_ln: checkpoint true, config false"):
        load_connector(tmp_path / "run", plain.connector, plain.connector_info())
    pooled = tiny.model(resampler={"kind": "grid"})
    with pytest.raises(UserError, match=r'model.connector.resampler.kind: checkpoint "perceiver", config "grid"'):
        load_connector(tmp_path / "run", pooled.connector, pooled.connector_info())


def test_a_run_is_saved_when_due_and_at_the_end_after_its_callbacks_and_its_log(tiny: Tiny, tmp_path: Path) -> None:
    events: list[str] = []
    run = RunDir(tmp_path)

    class Note:
        def on_step(self, step: int, record: dict[str, Any]) -> None:
            assert record["step"] == step and run.metrics()[-1]["step"] == step
            events.append(f"callback {step}")

    train(
        tiny, run, settings(save_every=2), total_steps=3, callbacks=[Note()],
        on_save=lambda step: events.append(f"save {step}"),
    )  # fmt: skip
    assert events == ["callback 1", "callback 2", "save 2", "callback 3", "save 3"]


def test_a_full_disk_while_saving_stops_the_run_and_keeps_the_checkpoints(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path)
    real = os.write

    def full(step: int) -> None:
        if step == 4:
            monkeypatch.setattr(os, "write", lambda fd, data: (_ for _ in ()).throw(OSError(28, "full")))

    with pytest.raises(UserError, match="No space left on device"):
        train(tiny, run, settings(save_every=2), total_steps=6, on_save=full)
    monkeypatch.setattr(os, "write", real)
    assert latest_checkpoint(run.checkpoints) == run.checkpoints / "step_2"
    assert train(tiny, run, settings(save_every=2), total_steps=6).result.step == 6


# -- stops


def test_a_callback_may_ask_for_a_checkpoint_and_for_the_end(tiny: Tiny, tmp_path: Path) -> None:
    class Ask:
        def on_step(self, step: int, record: dict[str, Any]) -> Asked:
            return Asked(keep=step == 1, stop="enough" if step == 3 else "")

    run = RunDir(tmp_path)
    done = train(tiny, run, settings(save_every=100), total_steps=5, callbacks=[Ask()])

    assert (done.result.status, done.result.step, done.result.signal) == ("stopped", 3, None)
    assert done.saved == [1, 3] and [r["step"] for r in exact_log(run)] == [1, 2, 3]


class Signalling:
    """Sends this process a signal at a step: while its gradients are computed, or from a callback after it."""

    def __init__(self, number: int, step: int, *, during: bool, times: int = 1) -> None:
        self.number, self.step, self.during, self.times = number, step, during, times
        self.calls = 0
        self.seen: list[int] = []

    def objective(self, model: Any, batch: Batch) -> LossTerms:
        self.calls += 1
        if self.during and self.calls == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        return next_token(model, batch)

    def on_step(self, step: int, record: dict[str, Any]) -> None:
        self.seen.append(step)
        if not self.during and step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("during", [True, False])
def test_a_signal_finishes_the_step_saves_and_says_so_and_the_resumed_run_is_the_straight_one(
    tiny: Tiny, tmp_path: Path, number: int, during: bool
) -> None:
    handler = signal.getsignal(number)
    straight = train(tiny, RunDir(tmp_path / "a"), settings(), total_steps=4)
    run = RunDir(tmp_path / "b")
    sender = Signalling(number, 2, during=during)
    stopped = train(tiny, run, settings(), total_steps=4, objective=sender.objective, callbacks=[sender])
    assert (stopped.result.status, stopped.result.signal, stopped.result.step) == ("cancelled", number, 2)
    assert stopped.saved == [2] and latest_checkpoint(run.checkpoints) == run.checkpoints / "step_2"
    assert signal.getsignal(number) is handler, "handlers must be put back"
    watcher = Signalling(number, 99, during=False)
    resumed = train(tiny, run, settings(), total_steps=4, callbacks=[watcher])
    assert sender.seen + watcher.seen == [1, 2, 3, 4], "every step's callbacks run exactly once"
    assert resumed.result.status == "succeeded"
    assert exact_log(run) == exact_log(RunDir(tmp_path / "a"))
    assert identical(connector(straight), connector(resumed))


def test_a_signal_in_the_last_step_still_counts(tiny: Tiny, tmp_path: Path) -> None:
    sender = Signalling(signal.SIGTERM, 2, during=False)
    result = train(tiny, RunDir(tmp_path), settings(), total_steps=2, callbacks=[sender]).result
    assert (result.status, result.signal, result.step) == ("cancelled", signal.SIGTERM, 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_training_at_once(tiny: Tiny, tmp_path: Path, number: int) -> None:
    run = RunDir(tmp_path)
    sender = Signalling(number, 3, during=True, times=2)
    handler = signal.getsignal(number)
    with pytest.raises((KeyboardInterrupt, SystemExit)) as e:
        train(tiny, run, settings(), total_steps=4, objective=sender.objective)
    if number == signal.SIGINT:
        assert e.type is KeyboardInterrupt
    else:
        assert isinstance(e.value, SystemExit) and e.value.code == 143
    assert signal.getsignal(number) is handler
    assert [r["step"] for r in exact_log(run)] == [1, 2] and latest_checkpoint(run.checkpoints) is None


def test_outside_the_main_thread_training_works_without_signal_handlers(tiny: Tiny, tmp_path: Path) -> None:
    done: list[Outcome] = []
    thread = threading.Thread(target=lambda: done.append(train(tiny, RunDir(tmp_path), settings(), total_steps=1)))
    thread.start()
    thread.join()
    assert done[0].result.status == "succeeded"


# -- not finite


class OneBadImage:
    """Stored features of which one image's are NaN, as a corrupt store or tower would give."""

    def __init__(self, model: Any, bad: str) -> None:
        self.shape = (model.geometry.num_patches, model.geometry.d_vision)
        self.bad = bad

    def read(self, ref: ImageRef) -> torch.Tensor | None:
        generator = torch.Generator().manual_seed(sum(ref.path.encode()))
        features = torch.randn(self.shape, generator=generator)
        return (features * float("nan") if ref.path == self.bad else features).to(torch.bfloat16)


def sample_of_step(tiny: Tiny, model: Any, cfg: Any, step: int) -> tuple[str, str]:
    """(sample id, image path) of some sample of a step (1-based)."""
    stream = tiny.stream(model, cfg, multi_image_fraction=0.0)
    example = stream.mixture.example_at((step - 1) * stream.samples_per_step + 2)
    return example.id, example.images[0].path


@pytest.mark.parametrize("packing", [False, True])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change_and_names_the_sample(
    tiny: Tiny, tmp_path: Path, packing: bool
) -> None:
    cfg = settings(micro_batch_size=2, gradient_accum=2, save_every=1, packing=packing)
    model, run = tiny.model(), RunDir(tmp_path)
    sample, image = sample_of_step(tiny, model, cfg, 3)
    with pytest.raises(NonFiniteError, match=rf"loss of step 3 is not finite \(samples '{sample}'\)") as e:
        train(tiny, run, cfg, total_steps=5, model=model, features=OneBadImage(model, image), multi_image_fraction=0.0)
    assert (e.value.which, e.value.step, e.value.named) == ("loss", 3, (sample,))
    assert [r["step"] for r in exact_log(run)] == [1, 2]
    saved = tiny.model()
    load_connector(run.path, saved.connector, saved.connector_info())
    assert identical(dict(model.connector.state_dict()), dict(saved.connector.state_dict()))
    assert all(p.grad is None for p in model.parameters())


class Poison(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0] * float("inf")


@pytest.mark.parametrize("packing", [False, True])
def test_a_gradient_that_is_not_finite_stops_and_names_the_sample(tiny: Tiny, tmp_path: Path, packing: bool) -> None:
    cfg = settings(micro_batch_size=4, gradient_accum=2, packing=packing)
    model = tiny.model()
    sample, _ = sample_of_step(tiny, model, cfg, 1)

    def objective(model: Any, batch: Batch) -> LossTerms:
        terms = next_token(model, batch)
        poisoned = Poison.apply(terms.total) if sample in batch.ids else terms.total
        return LossTerms(poisoned, terms.tokens)  # type: ignore[arg-type]

    before = {k: v.clone() for k, v in model.connector.state_dict().items()}
    with pytest.raises(NonFiniteError, match="the gradient of step 1 is not finite") as e:
        train(tiny, RunDir(tmp_path), cfg, total_steps=5, model=model, objective=objective, multi_image_fraction=0.0)
    assert e.value.which == "gradient" and e.value.named == (sample,)
    assert identical(before, dict(model.connector.state_dict()))


@pytest.mark.parametrize(("moment", "value", "which", "stops_at"), [
    ("exp_avg", float("inf"), "weights", 3), ("exp_avg", float("nan"), "weights", 3),
    ("exp_avg_sq", float("inf"), "optimizer state", 4),  # divides the update to 0 for good: found when it is saved
])  # fmt: skip
def test_what_an_update_makes_not_finite_is_never_saved_and_the_same_command_ends_as_the_straight_run(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, value: float, which: str, stops_at: int
) -> None:
    cfg, run = settings(save_every=2), RunDir(tmp_path / "b")
    straight = train(tiny, RunDir(tmp_path / "a"), cfg, total_steps=5)
    made: list[torch.optim.Optimizer] = []
    monkeypatch.setattr(tiny_run, "optimizer_for", lambda *a: (made.append(optimizer_for(*a)), made[-1])[1])

    class Spoil:
        name = ""

        def objective(self, model: Any, batch: Batch) -> LossTerms:
            if len(exact_log(run)) == 2:  # after the save of step 2
                self.name, parameter = next(iter(named_parameters(made[0]).items()))
                made[0].state[parameter][moment].view(-1)[0] = value
            return next_token(model, batch)

    spoil = Spoil()
    with pytest.raises(NonFiniteError, match=f"the {which} that would be saved are not finite") as e:
        train(tiny, run, cfg, total_steps=5, objective=spoil.objective)
    assert (e.value.which, e.value.step) == (which, stops_at)
    assert e.value.named[0].startswith(spoil.name)
    assert latest_checkpoint(run.checkpoints) == run.checkpoints / "step_2"
    resumed = train(tiny, run, cfg, total_steps=5)
    assert exact_log(run) == exact_log(RunDir(tmp_path / "a"))
    assert identical(connector(straight), connector(resumed))


def test_a_sample_taken_out_of_a_packed_batch_has_the_loss_it_has_inside(tiny: Tiny) -> None:
    model, cfg = tiny.model(), settings(micro_batch_size=6, packing=True)
    batch = next(tiny.stream(model, cfg, multi_image_fraction=1.0).steps(0, 1))[0]
    assert batch.input_ids.shape[0] < len(batch.ids)
    with torch.no_grad():
        together = model(batch)
        for i in range(len(batch.ids)):
            alone = model(only(batch, i))
            torch.testing.assert_close(alone.nll, together.nll[together.sample == i], rtol=1e-4, atol=1e-5)


class HalfRange(torch.autograd.Function):
    """Gradients overflow as in fp16 once the loss scale over tokens is above 16."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return torch.where(grads[0].abs() > 16, grads[0] * float("inf"), grads[0])


def test_fp16_repeats_an_overflowing_step_at_a_smaller_scale_and_gives_the_unscaled_result(
    tiny: Tiny, tmp_path: Path
) -> None:
    """Scales are powers of two, so scaling is exact: the weights are those of the fp32 run, bit for bit."""

    def objective(model: Any, batch: Batch) -> LossTerms:
        terms = next_token(model, batch)
        return LossTerms(HalfRange.apply(terms.total), terms.tokens)  # type: ignore[arg-type]

    plain = train(tiny, RunDir(tmp_path / "a"), settings(), total_steps=3)
    scaled = train(tiny, RunDir(tmp_path / "b"), settings(precision="fp16"), total_steps=3, objective=objective)
    last = scaled.result.last
    assert last is not None and last["loss_scale"] / last["tokens"] <= 16 < 4 * last["loss_scale"] / last["tokens"] * 4
    assert identical(connector(plain), connector(scaled))
    state = LoopState.from_dict(json.loads((tmp_path / "b/checkpoints/step_3/trainer.json").read_text())["loop"])
    assert state.loss_scale == last["loss_scale"]


# -- data that cannot be had


@pytest.fixture
def broken(tiny: Tiny, tmp_path: Path) -> Iterator[tuple[Tiny, list[str]]]:
    """The parts with the pictures of two records removed."""
    shutil.copytree(tiny.records.parent, tmp_path / "data")
    own = Tiny(tiny.llm, tiny.vision, tmp_path / "data/records.jsonl", tmp_path / "data/images")
    gone = [json.loads(line) for line in own.records.read_text().splitlines()][3:5]
    for record in gone:
        (own.images / record["images"][0]).unlink()
    yield own, [r["id"] for r in gone]


def test_a_missing_image_stops_the_run_with_the_record_or_is_counted_and_named(
    broken: tuple[Tiny, list[str]], tmp_path: Path
) -> None:
    tiny, gone = broken
    cfg = settings(micro_batch_size=2, gradient_accum=2)
    with pytest.raises(UserError, match=r"records.jsonl"):
        train(tiny, RunDir(tmp_path / "a"), cfg, total_steps=6, multi_image_fraction=0.0)
    run = RunDir(tmp_path / "b")
    train(tiny, run, cfg, total_steps=6, multi_image_fraction=0.0, on_bad_image="skip")
    named = [pair for r in run.metrics() for pair in r.get("rejected", [])]
    assert sorted(i for i, _ in named) == sorted(gone) and all(reason for _, reason in named)
    assert len(named) == 2 and sum(r["samples"] for r in run.metrics() if "loss" in r) == 22


def test_a_step_without_any_usable_sample_changes_no_weight_and_the_run_goes_on(
    broken: tuple[Tiny, list[str]], tmp_path: Path
) -> None:
    tiny, gone = broken
    run = RunDir(tmp_path)
    cfg = settings(micro_batch_size=1)
    outcome = train(tiny, run, cfg, total_steps=24, multi_image_fraction=0.0, on_bad_image="skip")
    empty = [r for r in run.metrics() if r["tokens"] == 0]
    assert sorted(r["rejected"][0][0] for r in empty) == sorted(gone)
    assert all(r["loss"] is None and r["grad_norm"] is None for r in empty)
    updates = {int(v) for k, v in optimizer_tensors(outcome.optimizer).items() if k.endswith("/step")}
    assert updates == {22}


def test_the_optimizer_sees_every_trainable_weight_once(tiny: Tiny) -> None:
    model = tiny.model()
    optimizer = optimizer_for(model, settings())
    held = [n for g in optimizer.param_groups for n in g["param_names"]]
    assert sorted(held) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
