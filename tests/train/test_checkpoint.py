"""Checkpoints: whole or absent, verified before use, strict in what they fit, never a pickle."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_run import fill_disk, vouch_for
from torch import nn

from beholder.config import RunConfig, settings
from beholder.config.section import section_of
from beholder.model.connector import LinearProjector
from beholder.model.placement import Part
from beholder.train import checkpoint as ck
from beholder.train import restore
from beholder.train.checkpoint import (
    best_checkpoint,
    checkpoint_to_resume,
    latest_checkpoint,
    problem,
    resolve_checkpoint,
    save_checkpoint,
    set_best,
)
from beholder.train.optim import build_optimizer, optimizer_tensors
from beholder.train.restore import load_connector, load_for_resume
from beholder.train.same_run import check_same_config, check_same_fingerprints, may_change
from beholder.types import TrainedPart, UserError

INFO: dict[str, Any] = {
    "num_visual_tokens": 4, "num_patches": 16, "d_vision": 8, "d_text": 6, "vision_ln": False,
    "resampler": "perceiver", "projector": "mlp", "output_norm": "rms",
    "language": {"name": "Qwen/Qwen3-8B-Base"},
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Parts(nn.Module):
    """A module with the connector's first names; the real one is checkpointed in test_engine."""

    def __init__(self, *, vision_ln: bool = False, num_latents: int = 4, d_text: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        if vision_ln:
            self.vision_ln = nn.LayerNorm(8)
        self.resampler = nn.ParameterDict({"latents": nn.Parameter(torch.randn(num_latents, 8))})
        self.projector = nn.Linear(8, d_text)


def bare(connector: nn.Module) -> Any:
    """A model with this connector and a language model without adapters."""
    parts = {"language": Part("language", "lm", nn.Identity(), ())}
    return SimpleNamespace(connector=connector, connector_info=lambda: INFO, parts=lambda: parts)


def learned(tensors: dict[str, torch.Tensor], info: dict[str, Any]) -> dict[str, TrainedPart]:
    return {"connector": TrainedPart(tensors, info)}


def write(folder: Path, step: int, module: nn.Module | None = None, *, keep: int = 3, **info: Any) -> Path:
    module = module or Parts()
    return save_checkpoint(
        folder, step, learned(module.state_dict(), {**INFO, **info}),
        optimizer_state={"w/step": torch.tensor(float(step))},
        trainer={"config": {"seed": 1}, "config_hash": "c0ffee", "data_cursor": step * 8}, keep=keep,
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_checkpoint_is_safetensors_and_json_with_a_manifest_of_hashes(tmp_path: Path) -> None:
    path = write(tmp_path, 7)
    assert path == tmp_path / "step_7"
    assert names(path) == [
        "MANIFEST.json", "connector.json", "connector.safetensors", "optimizer.safetensors", "trainer.json",
    ]  # fmt: skip
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert (manifest["step"], manifest["config_hash"], manifest["data_cursor"]) == (7, "c0ffee", 56)
    assert problem(path) is None and latest_checkpoint(tmp_path) == path


def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path: Path) -> None:
    def optimizer_of(module: nn.Module) -> torch.optim.Optimizer:
        params = list(module.named_parameters())
        return build_optimizer([{"name": "connector", "params": params, "lr": 0.1, "weight_decay": 0.0}], (0.9, 0.999))

    module = Parts()
    optimizer = optimizer_of(module)
    for p in module.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    path = save_checkpoint(
        tmp_path, 1, learned(module.state_dict(), INFO), optimizer_state=optimizer_tensors(optimizer),
        trainer={"config": {}, "loop": {"x": 1}}, keep=2,
    )  # fmt: skip
    other = Parts()
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other_optimizer = optimizer_of(other)
    state = load_for_resume(path, bare(other), other_optimizer)
    assert state.step == 1 and state.trainer["loop"] == {"x": 1}
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )
    then, now = optimizer_tensors(optimizer), optimizer_tensors(other_optimizer)
    assert then.keys() == now.keys() and all(torch.equal(then[k], now[k]) for k in then)


def test_tensors_that_share_memory_are_saved_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    path = save_checkpoint(
        tmp_path, 1, learned({"a": base, "b": base.T, "c": base[1]}, {}), optimizer_state={}, trainer={}, keep=2,
    )  # fmt: skip
    loaded = restore._read_tensors(path / "connector.safetensors")
    assert torch.equal(loaded["b"], base.T) and torch.equal(loaded["c"], base[1])


# -- which one is the best


def test_a_run_folder_means_its_best_checkpoint_and_resuming_its_latest(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 6):
        write(folder, step)
    assert best_checkpoint(folder) is None and resolve_checkpoint(tmp_path) == folder / "step_6"

    set_best(folder, 4, {"eval_loss": 0.5})

    assert best_checkpoint(folder) == resolve_checkpoint(tmp_path) == resolve_checkpoint(folder) == folder / "step_4"
    assert resolve_checkpoint(folder / "step_2") == folder / "step_2"
    assert latest_checkpoint(folder) == resolve_checkpoint(tmp_path, prefer="latest") == folder / "step_6"
    assert json.loads((folder / "best.json").read_text()) == {"eval_loss": 0.5, "step": 4}


def test_the_best_checkpoint_survives_pruning_besides_the_newest(tmp_path: Path) -> None:
    write(tmp_path, 1, keep=2)
    write(tmp_path, 2, keep=2)
    set_best(tmp_path, 1, {})

    for step in (3, 4, 5):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["best.json", "step_1", "step_4", "step_5"]

    set_best(tmp_path, 4, {})  # the mark moves on, and what it spared goes with the next save
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["best.json", "step_4", "step_5", "step_6"]


def test_only_a_whole_checkpoint_can_be_marked_and_the_old_mark_stays(tmp_path: Path) -> None:
    write(tmp_path, 1)
    flip_a_byte(write(tmp_path, 2) / "connector.safetensors")
    set_best(tmp_path, 1, {})

    with pytest.raises(UserError, match=r"step 3 cannot be marked as the best.*no MANIFEST"):
        set_best(tmp_path, 3, {})
    with pytest.raises(UserError, match=r"connector\.safetensors does not have the content"):
        set_best(tmp_path, 2, {})

    assert best_checkpoint(tmp_path) == tmp_path / "step_1"


def test_a_mark_on_a_missing_or_damaged_step_is_an_error_naming_it_and_what_is_there(tmp_path: Path) -> None:
    for step in (1, 2):
        write(tmp_path, step)
    set_best(tmp_path, 1, {})
    flip_a_byte(tmp_path / "step_1" / "connector.safetensors")
    with pytest.raises(UserError, match=r"best\.json marks step_1 .* \(sha256 differs\)"):
        resolve_checkpoint(tmp_path)

    shutil.rmtree(tmp_path / "step_1")
    with pytest.raises(
        UserError, match=r"marks step_1 .* it does not exist\. Name one of those that are there \(step_2\)"
    ):
        best_checkpoint(tmp_path)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_2"


@pytest.mark.parametrize("content", ["{", "[]", '{"step": "4"}', "{}"])
def test_a_damaged_mark_is_an_error_and_does_not_hinder_saving(tmp_path: Path, content: str) -> None:
    write(tmp_path, 1)
    (tmp_path / "best.json").write_text(content)

    with pytest.raises(UserError, match=r"best\.json cannot be read"):
        resolve_checkpoint(tmp_path)
    assert write(tmp_path, 2) == latest_checkpoint(tmp_path)


# -- which one is the latest


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda p: flip_a_byte(p / "connector.safetensors"), "connector.safetensors does not have the content"),
        (lambda p: (p / "optimizer.safetensors").write_bytes(b""), "optimizer.safetensors has 0 bytes instead of"),
        (lambda p: (p / "trainer.json").unlink(), "trainer.json is missing"),
        (lambda p: (p / "MANIFEST.json").unlink(), "it has no MANIFEST.json"),
        (lambda p: (p / "MANIFEST.json").write_text('{"format": "beh'), "MANIFEST.json is damaged"),
        (lambda p: (p / "MANIFEST.json").write_text("[]"), "MANIFEST.json is damaged"),
        (lambda p: (p / "MANIFEST.json").write_text("[" * 99_999), "MANIFEST.json is damaged (RecursionError"),
        (lambda p: (p / "MANIFEST.json").write_text('{"format": "x/9", "files": {}}'), "its format is 'x/9'"),
    ],
)
def test_a_spoiled_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, spoil: Any, reason: str) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    spoil(tmp_path / "step_2")
    warnings: list[str] = []
    assert latest_checkpoint(tmp_path, warn=warnings.append) == tmp_path / "step_1"
    assert len(warnings) == 1 and reason in warnings[0] and "step_2" in warnings[0]
    with pytest.raises(UserError, match="step_2 cannot be used"):
        resolve_checkpoint(tmp_path / "step_2")


def test_where_no_checkpoint_verifies_each_is_named_and_nothing_is_taken_for_a_fresh_folder(tmp_path: Path) -> None:
    assert checkpoint_to_resume(tmp_path) is None and checkpoint_to_resume(tmp_path / "nowhere") is None
    for step in (1, 2):
        flip_a_byte(write(tmp_path, step) / "connector.safetensors")
    said = r"every one was tried:\n  step_2: connector.safetensors does not.*\n  step_1: connector.*\n.*run_name"
    with pytest.raises(UserError, match=said):
        checkpoint_to_resume(tmp_path, warn=lambda message: None)
    with pytest.raises(UserError, match=said):
        resolve_checkpoint(tmp_path, warn=lambda message: None)


def test_a_manifest_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"]["../../secret"] = manifest["files"]["trainer.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "outside the folder" in (problem(path) or "")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[]", r"holds \[\], expected a JSON object"),
        ("\x80", "is not a JSON file"),
        ("[" * 99_999, "is not a JSON file"),
    ],
)
def test_a_file_of_another_shape_is_an_error_naming_it_though_the_manifest_vouches_for_it(
    tmp_path: Path, content: str, says: str
) -> None:
    path = write(tmp_path, 5)
    vouch_for(path, "trainer.json", content)
    vouch_for(path, "connector.json", content)

    with pytest.raises(UserError, match=rf"trainer\.json {says}"):
        restore.read_trainer(path)
    with pytest.raises(UserError, match=rf"connector\.json {says}"):
        load_connector(path, Parts(), INFO)


@pytest.mark.parametrize(("content", "says"), [
    ('{"config": {}}', "step is null"), ('{"step": 5}', "config is null"),
    ('{"step": 5, "config": []}', r"config is \["),
])  # fmt: skip
def test_a_trainer_file_has_a_step_and_a_config(tmp_path: Path, content: str, says: str) -> None:
    path = write(tmp_path, 5)
    vouch_for(path, "trainer.json", content)

    with pytest.raises(UserError, match=rf"trainer\.json: {says}"):
        restore.read_trainer(path)


def test_highest_step_is_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (9, 10):
        write(tmp_path, step)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_10"
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_run_checkpoints_and_step_folders_all_resolve(tmp_path: Path) -> None:
    path = write(tmp_path / "checkpoints", 5)
    assert (
        resolve_checkpoint(tmp_path) == resolve_checkpoint(tmp_path / "checkpoints") == resolve_checkpoint(path) == path
    )


def test_unusable_paths_say_what_to_give_instead(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint_16000.pt would be a pickle.*Give the run folder"):
        resolve_checkpoint("outputs/stage1/checkpoint_16000.pt")
    with pytest.raises(UserError, match=r"no usable checkpoint in .*: it holds no step_<n> folder"):
        resolve_checkpoint(tmp_path)
    write(tmp_path, 5)
    with pytest.raises(UserError, match=r"no checkpoint at .*step_6.*There are: step_5"):
        resolve_checkpoint(tmp_path / "step_6")
    with pytest.raises(UserError, match=r"is a file; give the run folder"):
        resolve_checkpoint(tmp_path / "step_5" / "connector.safetensors")
    flip_a_byte(tmp_path / "step_5" / "trainer.json")
    with pytest.raises(UserError, match=r"no usable checkpoint in .*\n  step_5: trainer.json .*sha256 differs"):
        resolve_checkpoint(tmp_path, warn=lambda _: None)


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    torch.save({"a": 1}, tmp_path / "step_1.pt")
    with pytest.raises(UserError, match="neither writes nor loads"):
        resolve_checkpoint(tmp_path / "step_1.pt")


# -- keep and clean


def test_the_newest_are_kept_and_a_broken_one_does_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step_2", "step_3"]
    (tmp_path / "step_3" / "trainer.json").unlink()
    write(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step_2", "step_3", "step_4"]
    write(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step_4", "step_5"]


def test_going_on_from_an_earlier_step_does_not_lose_the_new_work(tmp_path: Path) -> None:
    for step in (10, 20):
        write(tmp_path, step, keep=2)
    write(tmp_path, 6, keep=2)
    assert names(tmp_path) == ["step_10", "step_20", "step_6"]
    changed = Parts()
    with torch.no_grad():
        changed.projector.bias.fill_(3)
    write(tmp_path, 10, changed, keep=2)
    assert float(restore._read_tensors(tmp_path / "step_10" / "connector.safetensors")["projector.bias"][0]) == 3


def test_leftovers_of_dead_writers_are_removed_and_of_living_ones_kept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = os.getppid()
    for name in (f".tmp-3-{dead.pid}", f".prune-1-{dead.pid}", f".tmp-4-{living}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "connector.safetensors").write_bytes(b"x")
    write(tmp_path, 5)
    assert names(tmp_path) == [f".tmp-4-{living}", "step_5"]


def test_a_checkpoint_set_aside_by_a_dead_writer_is_put_back(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write(tmp_path, 5).rename(tmp_path / f".old-5-{dead.pid}")
    write(tmp_path, 6)
    assert names(tmp_path) == ["step_5", "step_6"] and problem(tmp_path / "step_5") is None


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_full_disk_keeps_the_previous_checkpoints_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    for step in (1, 2):
        write(tmp_path, step, keep=2)
    size = sum(f.stat().st_size for f in (tmp_path / "step_2").iterdir())
    with monkeypatch.context() as m:
        fill_disk(m, int(share * size))
        with pytest.raises(UserError, match=r"No space left on device.*Nothing that was saved before is touched"):
            write(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step_1", "step_2"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_2"
    write(tmp_path, 3, keep=2)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_3"


def test_a_real_limit_of_the_operating_system_is_a_user_error_too(tmp_path: Path) -> None:
    """EFBIG from the kernel in a forked process, not from a patched function."""
    write(tmp_path, 1)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (300, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            write(tmp_path, 2)
        except UserError as e:
            code = 0 if "File too large" in str(e) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert names(tmp_path) == ["step_1"] and problem(tmp_path / "step_1") is None


def test_killed_at_every_system_call_of_a_save_the_folder_always_has_a_whole_latest_checkpoint(tmp_path: Path) -> None:
    """SIGKILL before the k-th call of open, write, fsync, mkdir, rename, rmdir or unlink, for every k of a save."""
    calls = ("open", "write", "fsync", "mkdir", "rename", "rmdir", "unlink")
    killed = 0
    for k in range(1, 200):
        folder = tmp_path / str(k)
        for step in (1, 2):
            write(folder, step, keep=2)
        pid = os.fork()
        if pid == 0:
            left = [k]

            def count(real: Any, left: list[int] = left) -> Any:
                def call(*args: Any, **kwargs: Any) -> Any:
                    left[0] -= 1
                    if left[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)

                return call

            for name in calls:
                setattr(os, name, count(getattr(os, name)))
            write(folder, 3, keep=2)
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        killed += 1
        latest = latest_checkpoint(folder, warn=lambda m: pytest.fail(m))
        assert latest is not None and latest.name in ("step_2", "step_3"), k
        assert sum(problem(p) is None for _, p in ck._steps(folder)) >= 2, k
        write(folder, 4, keep=2)
        assert len(names(folder)) == 2 and latest_checkpoint(folder) == folder / "step_4", k
        shutil.rmtree(folder)
    assert killed >= 20, "the sweep did not reach the calls of a save"


# -- strict loading


def test_a_missing_or_extra_layer_norm_is_named_with_its_config_field(tmp_path: Path) -> None:
    with_ln, without = write(tmp_path / "a", 1, Parts(vision_ln=True), vision_ln=True), write(tmp_path / "b", 1)
    with pytest.raises(UserError) as e:
        load_connector(with_ln, Parts(), INFO)
    assert "checkpoint has vision_ln.* (vision_ln.bias, vision_ln.weight), which this config does not build" in str(
        e.value
    )
    assert "model.connector.vision_ln: checkpoint true, config false" in str(e.value)
    with pytest.raises(UserError, match=r"this config builds vision_ln\.\* .* checkpoint does not have") as e:
        load_connector(without, Parts(vision_ln=True), {**INFO, "vision_ln": True})
    assert "model.connector.vision_ln: checkpoint false, config true" in str(e.value)


def test_a_projector_with_an_offset_and_one_without_are_told_apart_by_its_setting(tmp_path: Path) -> None:
    def linear(bias: bool) -> nn.Module:
        return nn.ModuleDict({"projector": LinearProjector(8, 6, bias)})

    path = write(tmp_path, 1, linear(True), projector="linear")
    with pytest.raises(UserError) as e:
        load_connector(path, linear(False), {**INFO, "projector": "linear"})
    assert "checkpoint has projector.fc.bias, which this config does not build (model.connector.projector.bias)" in str(
        e.value
    )
    load_connector(path, linear(True), {**INFO, "projector": "linear"})


def test_another_shape_names_tensor_shapes_and_field(tmp_path: Path) -> None:
    path = write(tmp_path, 1)
    with pytest.raises(UserError) as e:
        load_connector(path, Parts(num_latents=9, d_text=5), {**INFO, "num_visual_tokens": 9, "d_text": 5})
    message = str(e.value)
    assert "resampler.latents is [4, 8] in the checkpoint, [9, 8] here" in message
    assert "num_visual_tokens (model.connector.num_visual_tokens): checkpoint 4, config 9" in message
    assert "d_text (model.llm.name_or_path (width of the language model)): checkpoint 6, config 5" in message


def test_a_connector_for_another_language_model_of_the_same_width_is_refused_and_a_moved_one_is_not(
    tmp_path: Path,
) -> None:
    path = write(tmp_path, 1)
    with pytest.raises(
        UserError, match=r"language.name \(model.llm.name_or_path\): checkpoint 'Qwen/.*', config 'x/Y'"
    ):
        load_connector(path, Parts(), {**INFO, "language": {"name": "x/Y"}})
    load_connector(path, Parts(), {**INFO, "language": {"name": "models/Qwen3-8B-Base"}})


def test_weights_that_are_not_finite_are_refused_and_nothing_is_loaded(tmp_path: Path) -> None:
    spoiled, module = Parts(), Parts()
    with torch.no_grad():
        spoiled.projector.weight[0, 0] = float("nan")
        spoiled.projector.bias.fill_(9)
    path = write(tmp_path, 1, spoiled)
    with pytest.raises(UserError, match=r"NaN or infinite: projector\.weight"):
        load_connector(path, module, INFO)
    assert not bool((module.projector.bias == 9).any())


# -- resume with the same settings


def config(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "run_name": "a", "seed": 1, "train": {"lr": {"connector": 1e-4}, "log_every": 20, "betas": (0.9, 0.999)},
        "data": {"json_path": "a.json", "num_workers": 0}, "eval": {"batch_size": 16},
    }  # fmt: skip
    for dotted, value in changes.items():
        section = base
        *path, last = dotted.split("__")
        for key in path:
            section = section[key]
        section[last] = value
    return base


def test_changed_settings_are_all_listed_old_and_new() -> None:
    with pytest.raises(UserError) as e:
        check_same_config(config(), config(seed=2, train__lr={"connector": 2e-4}, train__log_every=1))
    assert "seed: 1 → 2" in str(e.value) and "train.lr.connector: 0.0001 → 0.0002" in str(e.value)
    assert "log_every" not in str(e.value)


def test_settings_that_move_no_weight_may_change_and_are_told() -> None:
    changes = check_same_config(
        config(), config(train__log_every=1, data__num_workers=4, run_name="b", eval__batch_size=2)
    )
    assert changes == [
        ("data.num_workers", 0, 4), ("eval.batch_size", 16, 2), ("run_name", "a", "b"), ("train.log_every", 20, 1),
    ]  # fmt: skip
    assert check_same_config(config(), json.loads(json.dumps(config()))) == []


def test_data_paths_may_change_only_when_the_data_did_not() -> None:
    with pytest.raises(UserError, match=r"data\.json_path"):
        check_same_config(config(), config(data__json_path="b.json"))
    check_same_config(config(), config(data__json_path="b.json"), same_data=True)


def test_settings_that_one_side_does_not_know_are_listed() -> None:
    with pytest.raises(UserError, match=r"new: \(not a setting\) → 3"):
        check_same_config(config(), {**config(), "new": 3})


def test_what_may_change_on_resume_is_derived_from_the_settings_and_moves_no_weight() -> None:
    paths = [s.path for s in settings(RunConfig) if section_of(s.info.annotation) is None]
    may = {p for p in paths if may_change(p, same_data=True)}
    assert {p for p in may if not p.startswith(("eval.", "ablation.", "sweep.", "footprint.", "distillation."))} == {
        "run_name", "output_dir", "device", "model.connector.load_checkpoint", "data.num_workers",
        "data.prefetch_factor", "data.pin_memory", "data.persistent_workers", "data.verify_images", "features.dir",
        "features.max_gb", "train.num_threads", "model.llm.gradient_checkpointing", "train.save_every",
        "train.keep_checkpoints", "train.log_every", "train.tqdm_disable", "train.progress_percent",
        "train.full_eval_every", "train.quick_eval_size", "train.quick_eval_steps", "train.timeout_s",
        "gates", "guardrails", "scales", "model.native.gradient_checkpointing", "tracking", "distill.dir",
        "distill.max_gb",
        # what lies there is compared by its fingerprint
        "data.json_path", "data.image_root", "data.more_image_roots", "data.sources", "data.eval_sources",
    }  # fmt: skip
    assert {p for p in paths if p.startswith(("eval.", "ablation."))} < may
    assert may_change("gates.looks_clearly.above", same_data=True) and not may_change("unheard.of", same_data=True)


def test_changed_content_behind_an_unchanged_config_is_refused() -> None:
    check_same_fingerprints({"data": "a", "vision": "b"}, {"data": "a", "vision": "b", "language": "c"})
    with pytest.raises(UserError, match=r"data: aaaa → bbbb"):
        check_same_fingerprints({"data": "aaaa"}, {"data": "bbbb"})
