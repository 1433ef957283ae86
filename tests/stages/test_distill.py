"""Stage distill: what is kept of a teacher, learning from it, and asking it online, on tiny real parts."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.conftest import TinyParts, make_config
from tests.stages.conftest import settings
from tests.stages.test_instruct import losses_of
from tests.stages.torchrun import on_two_processes

from beholder.config import DistillConfig, RunConfig
from beholder.config.file import dump_config, load_config
from beholder.evidence import load_evidence
from beholder.prepare.estimate import estimate
from beholder.prepare.tiny import smoke_config, tiny_native
from beholder.runs import RunDir, sha256_file
from beholder.stages import run_stage, teachers
from beholder.stages.session import Session, open_session
from beholder.stages.teachers import cache_teachers
from beholder.store.teachers import INDEX, TeacherCache
from beholder.train.distributed import joined
from beholder.types import UserError

ROOT = Path(__file__).parents[2]


def parts_of(run: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "sft_loss", "distill_loss", "teacher_kl", "alpha", "temperature")
    return [{n: r[n] for n in names} for r in rows if "sft_loss" in r]


def test_the_loss_is_the_weighted_sum_and_every_part_is_in_the_log(student, tmp_path: Path) -> None:
    cfg = student(**{"distill.alpha_end": 0.1, "distill.form": "full"})
    cache_teachers(cfg)
    outcome = run_stage(cfg, promote_anyway=True)
    rows = parts_of(outcome.folder)
    assert [round(r["alpha"], 6) for r in rows] == [0.3, 0.2, 0.1]
    for r in rows:
        assert r["loss"] == pytest.approx((1 - r["alpha"]) * r["sft_loss"] + r["alpha"] * r["distill_loss"], rel=1e-5)
        assert r["distill_loss"] == pytest.approx(4 * r["teacher_kl"], rel=1e-6)
        assert r["teacher_kl"] > 0
    found = {m.name: m for m in load_evidence(outcome.folder).measurements if m.stratum is None}
    assert found["teacher.kl"].value > 0 and found["teacher.kl"].n == 12


def test_a_teacher_that_is_asked_gives_the_losses_of_one_that_is_kept(student) -> None:
    online = run_stage(student("online", **{"distill.online": True}), promote_anyway=True)
    kept = student("kept", **{"distill.form": "full"})
    cache_teachers(kept)
    cached = run_stage(kept, promote_anyway=True)
    for a, b in zip(parts_of(online.folder), parts_of(cached.folder), strict=True):  # kept in 16 bits
        assert a == pytest.approx(b, rel=2e-3, abs=2e-4)


@pytest.mark.slow
def test_without_a_say_of_the_teacher_it_learns_as_in_stage_instruct(
    student, tiny_parts: TinyParts, questions: Path, aligned: Path, tmp_path: Path
) -> None:
    alone = run_stage(student("alone", **{"distill.alpha": 0.0}), promote_anyway=True)
    own = settings(questions, aligned) | {
        "model.lora.dropout": 0.0, "train.train_steps": 3, "eval.caption_samples": 0, "eval.answer_tokens": 64,
    }  # fmt: skip
    plain = run_stage(make_config(tiny_parts, tmp_path / "plain", **own), promote_anyway=True)
    assert dict(losses_of(alone.folder)) == pytest.approx(dict(losses_of(plain.folder)), rel=1e-6)


def test_what_is_kept_is_reused_and_what_is_missing_is_named(
    student, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = student()
    with pytest.raises(UserError, match=r"samples have no rows of the teacher .*Nothing is kept there yet"):
        run_stage(cfg, promote_anyway=True)
    assert not any((tmp_path / "student").glob("features/**/shard-*")), "told before the tower has seen a picture"
    first = cache_teachers(cfg).teachers[0]

    def loaded(*_: object) -> None:
        raise AssertionError("a teacher was loaded")

    monkeypatch.setattr(teachers, "open_teacher", loaded)
    again = cache_teachers(cfg).teachers[0]
    assert first.reused == 0 and again.reused == again.samples == first.samples and again.tokens == 0
    assert run_stage(cfg, promote_anyway=True).step == 3

    with pytest.raises(UserError, match=r"differs in distill.k or distill.draws \(8 there, 4 here\)"):
        run_stage(student("other", **{"distill.k": 4}), promote_anyway=True)
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert run_stage(student("moved", **{"distill.teachers": [{"run": str(moved)}]}), promote_anyway=True).step == 3
    other = changed_copy(teacher, tmp_path / "another")
    with pytest.raises(UserError, match=r"differs in the teacher \(its weights\)"):
        run_stage(student("else", **{"distill.teachers": [{"run": str(other)}]}), promote_anyway=True)


def changed_copy(run: Path, to: Path) -> Path:
    """The same model, which counts as another: its manifest is written otherwise."""
    shutil.copytree(run, to)
    for manifest in (to / "checkpoints").glob("step_*/MANIFEST.json"):
        manifest.write_text(manifest.read_text() + " ")
    return to


@pytest.mark.slow
def test_two_teachers_that_say_the_same_are_one_whatever_their_weights(student, teacher: Path, tmp_path: Path) -> None:
    other = changed_copy(teacher, tmp_path / "other")
    both = [{"run": str(teacher), "weight": 0.6}, {"run": str(other), "weight": 0.4}]
    found = []
    for name, own in (("one", [{"run": str(teacher)}]), ("two", both)):
        cfg = student(name, **{"distill.teachers": own})
        assert len(cache_teachers(cfg).teachers) == len(own)
        found.append(parts_of(run_stage(cfg, promote_anyway=True).folder))
    for a, b in zip(*found, strict=True):
        assert a == pytest.approx(b, rel=1e-4)


@pytest.mark.parametrize("vocabulary", ["equal", pytest.param("shared", marks=pytest.mark.slow)])
def test_a_native_teacher_is_kept_and_asked_alike(vocabulary: str, tmp_path: Path) -> None:
    """A made student, taught by a whole model of another class; shared: by one with another tokenizer."""
    asked = smoke_config(load_config(ROOT / "configs" / "quickstart" / "distill.yaml"), tmp_path / "parts", steps=2)
    own = asked.learnt_from.model_dump() | {"online": False, "dir": str(tmp_path / "cache"), "k": 200}
    if vocabulary == "shared":
        native = str(tiny_native(tmp_path / "qwen", "qwen3_vl"))
        own |= {"vocabulary": "shared", "teachers": ({"native": native, "precision": "fp32"},)}
    kept = asked.model_copy(update={
        "distill": DistillConfig.model_validate(own), "output_dir": str(tmp_path / "kept"),
    })  # fmt: skip
    cache_teachers(kept)
    rows = parts_of(run_stage(kept).folder)
    assert all(math.isfinite(r["loss"]) and r["teacher_kl"] > 0 for r in rows) and len(rows) == 2
    if vocabulary == "equal":
        for a, b in zip(rows, parts_of(run_stage(asked).folder), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)


def test_other_tokenizers_are_refused_with_the_first_ids_that_differ(tmp_path: Path) -> None:
    cfg = smoke_config(load_config(ROOT / "configs" / "quickstart" / "distill.yaml"), tmp_path / "parts", steps=2)
    native = str(tiny_native(tmp_path / "qwen", "qwen3_vl"))
    own = cfg.learnt_from.model_dump() | {"teachers": ({"native": native, "precision": "fp32"},)}
    with pytest.raises(UserError, match=r"different tokenizers: \d+ ids differ \(\d+: '<.*distill.vocabulary: shared"):
        run_stage(cfg.model_copy(update={"distill": DistillConfig.model_validate(own)}))


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_teacher(student, teacher: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(teacher, own)
    cfg = student("run", **{
        "train.train_steps": 4, "train.save_every": 2, "distill.teachers": [{"run": str(own)}],
    })  # fmt: skip
    cache_teachers(cfg)
    run_stage(cfg, promote_anyway=True)
    shutil.rmtree(Path(cfg.run_dir) / "checkpoints" / "step_4")
    for name in ("evidence.json", "checkpoints/best.json"):
        (Path(cfg.run_dir) / name).unlink(missing_ok=True)
    shutil.rmtree(own)
    changed_copy(teacher, own)
    with pytest.raises(UserError, match="teacher 1"):
        run_stage(cfg)


def test_resume_is_bit_identical(student) -> None:
    cfg = student("whole", **{"train.train_steps": 4, "train.save_every": 2})
    cache_teachers(cfg)
    whole = run_stage(cfg, promote_anyway=True)
    broken = student("broken", **{"train.train_steps": 4, "train.save_every": 2})
    shutil.copytree(whole.folder, broken.run_dir)
    for name in ("step_4", "best.json"):
        target = Path(broken.run_dir) / "checkpoints" / name
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    for name in ("evidence.json", "report.html"):
        (Path(broken.run_dir) / name).unlink()
    run_stage(broken)
    for name in ("adapter_model.safetensors", "connector.safetensors"):
        one, two = (Path(x.run_dir) / "checkpoints/step_4" / name for x in (cfg, broken))
        assert sha256_file(one) == sha256_file(two)


@pytest.mark.parametrize(
    ("sets", "told"),
    [
        ({"distill.k": 60_000}, "distill.k is 60000, but the student's vocabulary has"),
        ({"distill.teachers": [{"run": "nowhere"}]}, "distill.teachers: the run nowhere: there is no checkpoint at"),
        ({"data.augment": "random_crop"}, "what is kept of a teacher is about the images as they are"),
    ],
)
def test_wrong_input_is_refused(student, sets: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        cache_teachers(student(**sets))


@pytest.mark.slow
def test_packed_is_padded_and_parts_are_the_whole(student) -> None:
    cache_teachers(student())
    padded = run_stage(student("padded", **{"train.packing": False}), promote_anyway=True)
    packed = run_stage(student("packed", **{"train.packing": True}), promote_anyway=True)
    parts = run_stage(
        student("parts", **{"train.micro_batch_size": 1, "train.gradient_accum": 4, "train.packing": False}),
        promote_anyway=True,
    )
    for other in (packed, parts):
        for a, b in zip(parts_of(padded.folder), parts_of(other.folder), strict=True):
            assert a == pytest.approx(b, rel=1e-4)


def test_a_teacher_is_asked_in_its_own_way_about_training_and_held_out_samples_alike(student) -> None:
    cfg = student(**{"prompting.system": "Answer in one word."})
    with student_at(cfg) as session:
        teacher = teachers.open_teacher(cfg.learnt_from.teachers[0], cfg, session.model.device)
        (example, targets), *_ = teachers.needed(session)
        held_out = session.data.encoder.apply_template(example)  # as all held-out samples are
        assert held_out.turns[0].role == "system" and example.turns[0].role == "user"
        own, other = (teacher.asked.batch([e], [targets]).input_ids for e in (example, held_out))
    assert own.tolist() == other.tolist()


@pytest.mark.slow
def test_what_cannot_be_read_of_a_teachers_losses_is_made_anew_and_breaks_no_run(student, tmp_path: Path) -> None:
    cfg = student()
    (file,) = Path(cache_teachers(cfg).teachers[0].folder).glob("held_out_*.json")
    whole = file.read_text(encoding="utf-8")
    for broken in ("[]", whole[:-9], json.dumps({c: own[:2] for c, own in json.loads(whole).items()})):
        file.write_text(broken, encoding="utf-8")
        outcome = run_stage(student(f"run{len(broken)}"), promote_anyway=True)
        assert "the teacher's held-out losses cannot be read" in " ".join(load_evidence(outcome.folder).gaps)
        cache_teachers(cfg)
        assert file.read_text(encoding="utf-8") == whole


def test_what_is_answered_stands_alone_on_standard_output(student, capsys: pytest.CaptureFixture[str]) -> None:
    cache_teachers(student())
    told = capsys.readouterr()
    assert not told.out and "[teacher]" in told.err


@contextmanager
def student_at(cfg: RunConfig) -> Iterator[Session]:
    with joined(cfg.device, cfg.train.timeout_s) as dist, open_session(cfg, RunDir(cfg.run_dir), dist) as session:
        yield session


def test_a_plan_says_what_asking_the_teachers_costs(student, teacher: Path) -> None:
    cfg = student()
    planned = estimate(cfg)
    kept = cache_teachers(cfg).teachers[0]
    with student_at(cfg) as session, TeacherCache(cfg.learnt_from, teachers.keys(session)[0]) as cache:
        real = len(cache.rows) * (cache.rows.row_bytes + INDEX)
    assert planned.teacher_bytes == pytest.approx(real, rel=0.2) and kept.samples == 24
    assert planned.seconds["teachers"] > 0 and "teachers" not in planned.flops_per_step
    assert planned.seconds["total"] == pytest.approx(
        sum(planned.seconds[x] for x in ("features", "teachers", "training"))
    )
    asked = estimate(student("online", **{"distill.online": True}))
    assert asked.teacher_bytes is None and "teachers" not in asked.seconds
    assert asked.memory[f"teacher {teacher}"] > 1e5
    assert asked.flops_per_step["teachers"] > 0
    gone = estimate(student("gone", **{"distill.teachers": [{"run": "nowhere"}]}))
    assert gone.teacher_bytes and "teachers" not in gone.seconds
    assert "time and memory of the teacher nowhere: there is no checkpoint" in " ".join(gone.gaps)
    assert "teacher-cache will refuse it" in " ".join(estimate(student("small", **{"distill.max_gb": 1e-6})).gaps)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("online", [False, True])
def test_two_processes_learn_from_a_teacher_as_one_does(student, online: bool, tmp_path: Path) -> None:
    sets = {"distill.online": online, "distill.alpha_end": 0.9}
    one, two = student("one", **sets), student("two", **sets)
    if not online:
        cache_teachers(one)
    config = tmp_path / "two.yaml"
    config.write_text(dump_config(two), encoding="utf-8")
    run_stage(one, promote_anyway=True)

    done = on_two_processes("run", config, "--promote-anyway")

    assert "exitcode  : 3" in done.stderr, done.stdout + done.stderr  # three steps on random parts pass no gates
    for a, b in zip(parts_of(Path(one.run_dir)), parts_of(Path(two.run_dir)), strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-6)
    alone, shared = (load_evidence(Path(cfg.run_dir)) for cfg in (one, two))
    for name in ("eval.loss", "teacher.kl", "transfer.student.delta"):
        x, y = alone.get(name), shared.get(name)
        assert x is not None and y is not None and y.n == x.n and y.value == pytest.approx(x.value, rel=1e-3, abs=1e-4)
