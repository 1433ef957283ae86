"""A stage from start to evidence, in this process, on tiny real parts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.conftest import MakeConfig, TinyParts
from tests.evidence.test_catalogue import strangers
from tests.stages.dying import dying_at
from tests.stages.torchrun import on_two_processes

from beholder.evidence import load_evidence
from beholder.model import language
from beholder.model.plan import param_groups
from beholder.prepare.preview import preview_config
from beholder.runs import RunDir, sha256_file
from beholder.stages import run_stage
from beholder.stages.begin import as_read_now
from beholder.stages.remeasure import evaluate_run
from beholder.train.nonfinite import NonFiniteError
from beholder.types import Status, UserError
from beholder.use.vlm import load


def connector_of(run: Path, step: int) -> str:
    return sha256_file(run / "checkpoints" / f"step_{step}" / "connector.safetensors")


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def test_a_run_leaves_what_the_spec_promises(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outcome = run_stage(tiny_config(tmp_path))

    run = tmp_path / "run"
    assert outcome.status == Status.SUCCEEDED and outcome.step == 4
    files = "config.yaml run.json metrics.jsonl metrics.json evidence.json report.html report.md"
    for name in files.split():
        assert (run / name).stat().st_size > 0, name
    assert [p.name for p in (run / "splits").iterdir()] == ["split_seed42_eval12.json"]
    assert (run / "qual" / "step_2_golden3.jsonl").exists() and (run / "qual" / "step_4_golden3.jsonl").exists()
    assert json.loads((run / "run.json").read_text())["status"] == "succeeded"
    assert [step for step, _ in losses_of(run)] == [1, 2, 3, 4]


def test_only_the_connector_learned_and_text_is_bit_equal(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))

    evidence = load_evidence(tmp_path / "run")
    assert evidence.text_only is not None and evidence.text_only.equal and evidence.text_only.logits > 0
    rows = {r.part: r for r in evidence.trainable}
    assert rows["connector"].trainable == rows["connector"].params > 0
    for frozen in ("vision", "language"):
        assert rows[frozen].trainable == 0 and rows[frozen].intact is True
    early, late = (load_file(tmp_path / f"run/checkpoints/step_{n}/connector.safetensors") for n in (2, 4))
    assert early.keys() == late.keys() and any((early[k] != late[k]).any() for k in early)


def test_evidence_has_baseline_ablation_captions_and_counts(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))

    evidence = load_evidence(tmp_path / "run")
    names = """
        eval.loss eval.perplexity ablation.loss.correct ablation.loss.shuffled ablation.loss.zero
        ablation.ratio.shuffled caption.exact_match.correct caption.exact_match.zero caption.rouge_l.correct
        caption.exact_match.chance"""
    for name in names.split():
        assert evidence.get(name) is not None, name
    baseline = evidence.get_baseline("eval.loss")
    assert baseline is not None and baseline.n == 12
    assert evidence.data.eval == 12 and evidence.data.train + 12 <= evidence.data.records
    assert evidence.samples and evidence.samples[0].images[0].startswith("data:image/")
    assert {p.step for p in evidence.samples[0].predictions if p.condition == "correct"} == {2, 4}


def test_resumed_from_a_checkpoint_equals_the_straight_run(tiny_config: MakeConfig, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_stage(tiny_config(straight))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("beholder.stages.run.measure", _crash)  # dies after step 4 of 4 …
        with pytest.raises(RuntimeError, match="planted"):
            run_stage(tiny_config(resumed))
    assert json.loads((resumed / "run" / "run.json").read_text())["status"] == "failed"
    shutil.rmtree(resumed / "run" / "checkpoints" / "step_4")  # … and its last checkpoint never made it

    run_stage(tiny_config(resumed))

    assert connector_of(resumed / "run", 4) == connector_of(straight / "run", 4)
    assert losses_of(resumed / "run") == losses_of(straight / "run")
    baselines = [load_evidence(p / "run").get_baseline("eval.loss") for p in (straight, resumed)]
    assert baselines[0] is not None and baselines[0] == baselines[1]


def _crash(*_: object, **__: object) -> None:
    raise RuntimeError("planted")


def test_a_checkpoint_older_than_a_setting_goes_on_with_what_was_done_before(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_stage(tiny_config(tmp_path, **{"train.save_every": 2}))
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step_2" / "trainer.json").read_text())["config"]
    assert saved["model"]["lora"].pop("strength") == 1.0

    assert as_read_now(saved)["model"]["lora"]["strength"] == 1.0
    saved["model"]["lora"]["gone"] = 3
    assert as_read_now(saved) == saved, "a setting that is gone is told by the comparison"


def test_all_missing_files_are_named_at_once_and_no_folder_is_left(tiny_config: MakeConfig, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, **{
        "data.json_path": str(tmp_path / "gone.jsonl"), "data.image_root": str(tmp_path / "nowhere"),
        "model.llm.name_or_path": "nobody/never-fetched",
    })  # fmt: skip

    with pytest.raises(UserError, match=r"no file \S*gone\.jsonl; no folder \S*nowhere"):
        run_stage(cfg)
    assert not (tmp_path / "run").exists()


def test_evaluate_measures_the_same_numbers_again(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))
    first = load_evidence(tmp_path / "run")

    evaluate_run(str(tmp_path / "run"))

    again = load_evidence(tmp_path / "run")
    assert again.metrics() == pytest.approx(first.metrics(), rel=1e-6)
    assert again.baseline == first.baseline and again.status == Status.SUCCEEDED


def test_a_finished_run_is_not_done_again(tiny_config: MakeConfig, tmp_path: Path) -> None:
    first = run_stage(tiny_config(tmp_path))
    page = (tmp_path / "run" / "report.html").stat().st_mtime_ns

    outcome = run_stage(tiny_config(tmp_path))

    assert outcome.again and outcome.evidence == first.evidence
    assert (tmp_path / "run" / "report.html").stat().st_mtime_ns == page


def test_evaluate_refuses_settings_that_were_trained_with(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))

    with pytest.raises(UserError, match=r"train\.lr\.connector: only how a run is measured can be changed"):
        evaluate_run(str(tmp_path / "run"), ["train.lr.connector=1.0"])


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_run_whose_rotary_frequencies_were_rounded_does_not_go_on_without_rounding(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    cfg = tiny_config(tmp_path, **{"model.llm.precision": precision, "eval.golden_size": 0})
    with monkeypatch.context() as patch, dying_at(3):
        patch.setattr(language, "computed_in", lambda _: "")  # as checkpoints of earlier versions, which say nothing
        run_stage(cfg)

    if precision == "fp32":  # nothing was rounded
        assert run_stage(cfg).status == Status.SUCCEEDED
        return
    with pytest.raises(UserError, match=r"rotary frequencies to bfloat16 .* going on would mix the two"):
        run_stage(cfg)
    found = evaluate_run(str(tmp_path / "run")).evidence
    assert found is not None and any("rotary frequencies to bfloat16" in gap for gap in found.gaps)


def test_resume_refuses_another_config_and_never_refuses_a_used_folder(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))

    with pytest.raises(UserError, match=r"train\.lr\.connector: 0\.001 → 0\.5"):
        run_stage(tiny_config(tmp_path, **{"train.lr.connector": 0.5}))
    with pytest.raises(UserError, match="--resume is never"):
        run_stage(tiny_config(tmp_path), resume="never")


def test_a_run_whose_every_checkpoint_is_damaged_is_refused_and_nothing_of_it_is_touched(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_stage(tiny_config(tmp_path))
    run = tmp_path / "run"
    shutil.copytree(run / "checkpoints" / "step_2", tmp_path / "step_2")
    for weights in run.glob("checkpoints/step_*/connector.safetensors"):
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    for resume in ("auto", "never"):
        with pytest.raises(UserError, match=r"(?s)every one was tried:.*step_4: .*step_2: .*To start afresh choose"):
            run_stage(tiny_config(tmp_path), resume=resume)

    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    outcome = run_stage(tiny_config(tmp_path), resume=str(tmp_path / "step_2"))  # a copy from elsewhere saves it
    assert outcome.step == 4 and load_evidence(run).status == Status.SUCCEEDED


def test_a_run_folder_that_cannot_be_or_is_taken_away_is_an_error_of_the_command(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"File name too long\. Set a shorter run_name or output_dir"):
        run_stage(tiny_config(tmp_path, output_dir=str(tmp_path / ("x" * 300))))

    real = RunDir.sync_metrics

    def remove(run: RunDir) -> None:  # the first save is under way
        real(run)
        shutil.rmtree(run.path)

    monkeypatch.setattr(RunDir, "sync_metrics", remove)
    with pytest.raises(UserError, match=r"cannot write .*checkpoints: No such file or directory.*removed meanwhile"):
        run_stage(tiny_config(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops_itself_and_says_so(
    tiny_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = tiny_config(tmp_path, **{"train.grad_clip": None, "train.warmup_ratio": 0.0, "train.save_every": 10})
    # more than a config may say
    monkeypatch.setattr("beholder.stages.run.param_groups", lambda model, _, decays: param_groups(model, 1e30, decays))
    with pytest.raises(NonFiniteError, match="not finite"):
        run_stage(cfg)

    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "stopped_by_guardrail"


def test_a_missing_image_is_an_error_that_names_the_record(
    tiny_config: MakeConfig, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    records = tmp_path / "records.jsonl"
    lines = tiny_parts.records.read_text().splitlines()
    broken = {**json.loads(lines[5]), "images": ["no_such.png"], "id": "lost"}
    records.write_text("\n".join([*lines[:5], json.dumps(broken), *lines[6:]]) + "\n")

    with pytest.raises(UserError, match=r"record 5 \(id 'lost'\).*no_such\.png"):
        run_stage(tiny_config(tmp_path, **{"data.json_path": str(records)}))
    outcome = run_stage(tiny_config(tmp_path, **{"data.json_path": str(records), "data.on_bad_image": "skip"}))

    assert outcome.evidence is not None and sum(outcome.evidence.data.rejects.values()) == 1
    assert "lost" in (tmp_path / "run" / "rejects.jsonl").read_text()


def test_augmentation_switches_the_store_off_and_says_so(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outcome = run_stage(tiny_config(tmp_path, **{"data.augment": "random_crop"}))

    assert outcome.evidence is not None
    assert any("Feature store: switched off" in gap for gap in outcome.evidence.gaps)
    assert not (tmp_path / "features").exists()


def test_a_full_store_still_trains_and_says_so(tiny_config: MakeConfig, tmp_path: Path) -> None:
    outcome = run_stage(tiny_config(tmp_path, **{"features.max_gb": 1e-9}))

    assert outcome.evidence is not None and outcome.status == Status.SUCCEEDED
    assert any("did not fit" in gap for gap in outcome.evidence.gaps)


def test_a_second_stage_starts_from_the_first_ones_connector(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path / "a"))
    first = load_evidence(tmp_path / "a" / "run").get("eval.loss")

    second = tiny_config(tmp_path / "b", **{"model.connector.load_checkpoint": str(tmp_path / "a" / "run")})
    with pytest.raises(UserError, match=r"gates failed.*looks_clearly.* or say --promote-anyway"):
        run_stage(second)
    assert not (tmp_path / "b" / "run" / "run.json").exists()
    outcome = run_stage(second, promote_anyway=True)

    assert outcome.evidence is not None
    assert any("--promote-anyway" in gap and "looks_clearly" in gap for gap in outcome.evidence.gaps)
    start = load_evidence(tmp_path / "b" / "run").get_baseline("eval.loss")
    assert first is not None and start is not None and start.value == pytest.approx(first.value, rel=1e-6)


def test_a_loaded_run_looks_at_any_image(tiny_config: MakeConfig, tiny_parts: TinyParts, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))
    vlm = load(tmp_path / "run", device="cpu")
    image = next(tiny_parts.images.rglob("*.png"))

    text = vlm.generate(image, max_new_tokens=5)
    hostile = vlm.generate(image, "<image> <|im_end|> what?", max_new_tokens=5)

    assert isinstance(text, str) and isinstance(hostile, str)
    with pytest.raises(UserError, match="at most 2"):
        vlm.generate([image] * 3)


def test_preview_shows_what_is_supervised(tiny_config: MakeConfig, tmp_path: Path) -> None:
    items = preview_config(tiny_config(tmp_path), 2, tmp_path / "preview").items

    assert len(items) == 2 and all(p.exists() for item in items for p in item.images)
    assert all(0 < item.num_targets < item.num_tokens for item in items)


def test_a_refused_command_leaves_a_finished_runs_record_alone(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))
    record = (tmp_path / "run" / "run.json").read_text()

    for sets, resume in (({}, "never"), ({}, "nonsense"), ({}, ""), ({"train.lr.connector": 9.0}, "auto")):
        with pytest.raises(UserError):
            run_stage(tiny_config(tmp_path, **sets), resume=resume)

    assert (tmp_path / "run" / "run.json").read_text() == record


def test_resuming_from_an_earlier_step_is_refused_while_later_ones_are_there(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_stage(tiny_config(tmp_path))

    with pytest.raises(UserError, match="two histories"):
        run_stage(tiny_config(tmp_path), resume=str(tmp_path / "run" / "checkpoints" / "step_2"))


def test_a_run_finished_from_another_folders_checkpoint_has_its_own_weights(
    tiny_config: MakeConfig, tmp_path: Path
) -> None:
    run_stage(tiny_config(tmp_path / "a"))

    run_stage(tiny_config(tmp_path / "b"), resume=str(tmp_path / "a" / "run"))

    assert connector_of(tmp_path / "b" / "run", 4) == connector_of(tmp_path / "a" / "run", 4)
    assert isinstance(load(tmp_path / "b" / "run", device="cpu").step, int)


def test_images_that_cannot_be_shuffled_are_found_before_training(
    tiny_config: MakeConfig, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in tiny_parts.records.read_text().splitlines()]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps({**r, "images": lines[0]["images"]}) for r in lines[:6]) + "\n")
    source = {"json_path": str(held), "image_root": str(tiny_parts.images)}

    with pytest.raises(UserError, match="two different images"):
        run_stage(tiny_config(tmp_path, **{"data.eval_sources": [source], "data.eval_size": 6}))

    assert not losses_of_any(tmp_path / "run")


def losses_of_any(run: Path) -> list[tuple[int, float]]:
    return losses_of(run) if (run / "metrics.jsonl").exists() else []


def test_a_damaged_run_record_is_named(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path))
    for content, match in (("[]", "not an object"), ('{"status": "bogus"}', "status is 'bogus'")):
        (tmp_path / "run" / "run.json").write_text(content)
        with pytest.raises(UserError, match=match):
            evaluate_run(str(tmp_path / "run"))


def test_a_held_out_image_that_is_gone_is_counted_under_skip_and_the_run_ends_well(
    tiny_config: MakeConfig, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    lines = [json.loads(line) for line in tiny_parts.records.read_text().splitlines()]
    held = tmp_path / "held.jsonl"
    held.write_text("\n".join(json.dumps(r) for r in [*lines[:8], {**lines[8], "images": ["gone.png"]}]) + "\n")
    source = {"json_path": str(held), "image_root": str(tiny_parts.images)}

    outcome = run_stage(
        tiny_config(tmp_path, **{"data.eval_sources": [source], "data.on_bad_image": "skip", "data.eval_size": 9,
                                 "data.verify_images": "none"})
    )  # fmt: skip

    assert outcome.evidence is not None and outcome.evidence.data.eval == 8
    assert outcome.evidence.data.rejects["missing_image"] == 1
    assert "gone.png" in (tmp_path / "run" / "rejects.jsonl").read_text()


@pytest.mark.slow  # test_multi has two processes on more than this
def test_two_processes_run_the_stage_of_one(tiny_config: MakeConfig, tmp_path: Path) -> None:
    from beholder.config.file import dump_config

    run_stage(tiny_config(tmp_path / "one"))
    config = tmp_path / "two.yaml"
    config.write_text(dump_config(tiny_config(tmp_path / "two")))

    done = on_two_processes("run", config)

    # Four steps of random parts fail their gates: code 3 on the main process, which torchrun reports as its own 1.
    assert done.returncode == 1 and re.search(r"exitcode\s*: 3\b", done.stderr), done.stderr[-3000:]
    assert "GATES FAILED" in done.stdout and "Traceback (most recent call last)" not in done.stdout
    records = [load_evidence(tmp_path / n / "run") for n in ("one", "two")]
    untrained = [r.get_baseline("eval.loss") for r in records]
    assert untrained[0] is not None and untrained[1] is not None
    assert untrained[0].value == pytest.approx(
        untrained[1].value, rel=1e-6
    )  # the same weights: only the sharing differs
    assert [g.name for g in records[0].gates] == [g.name for g in records[1].gates]
    one, two = (load_evidence(tmp_path / n / "run").metrics() for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert {k: two[k] for k in two if "loss" in k} == pytest.approx({k: one[k] for k in one if "loss" in k}, rel=1e-4)
    logs = [losses_of(tmp_path / n / "run") for n in ("one", "two")]
    assert [s for s, _ in logs[0]] == [s for s, _ in logs[1]]
    assert [v for _, v in logs[0]] == pytest.approx([v for _, v in logs[1]], rel=1e-5)


def test_evaluations_come_when_they_are_due(tiny_config: MakeConfig, tmp_path: Path) -> None:
    run_stage(tiny_config(tmp_path, **{
        "train.train_steps": 12, "train.full_eval_every": 5, "train.quick_eval_size": 4, "train.quick_eval_steps": 2,
        "ablation.run_every": 6, "eval.run_golden_every": 4, "data.split_mode": "stratified_len",
    }))  # fmt: skip

    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    at = {key: sorted({r["step"] for r in rows if key in r}) for key in
          ("eval_loss", "quick_eval_loss", "eval_loss_long", "ablation.delta.zero")}  # fmt: skip
    assert at["eval_loss"] == [5, 6, 10, 12]  # the ablation needs the losses; the last is the run's own
    assert at["eval_loss_long"] == [5, 6, 10]
    assert at["quick_eval_loss"] == [2, 4, 8]  # a full one takes a quick one's place
    assert at["ablation.delta.zero"] == [6]
    assert [p.name for p in sorted((tmp_path / "run" / "qual").glob("*golden*"))] == [
        "step_12_golden3.jsonl", "step_4_golden3.jsonl", "step_8_golden3.jsonl",
    ]  # fmt: skip


def test_every_epoch_means_every_pass_over_the_data(tiny_config: MakeConfig, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, **{
        "train.train_steps": 40, "train.full_eval_every": "epoch", "eval.run_golden_every": "epoch",
        "data.eval_size": 12, "train.save_every": 1000,
    })  # fmt: skip
    evidence = run_stage(cfg).evidence

    assert evidence is not None
    per_epoch = evidence.data.train / 4
    due = [step for step in range(1, 41) if int(step / per_epoch) > int((step - 1) / per_epoch)]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert due and sorted({r["step"] for r in rows if "eval_loss" in r}) == sorted({*due, 40})
    steps = sorted(int(p.name.split("_")[1]) for p in (tmp_path / "run" / "qual").glob("*golden*"))
    assert steps == sorted({*due, 40})


def test_an_alignment_says_which_evidence_of_questions_captions_have(
    tiny_config: MakeConfig, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    """Short captions stand in contrast pairs; cells, blindness and a learner of words need questions."""
    records = [json.loads(line) for line in tiny_parts.records.read_text(encoding="utf-8").splitlines()]
    for k, record in enumerate(records):
        record["caption"] = ("a red square", "a blue circle", "a green star")[k % 3]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    more = {"data.eval_size": 30, "eval.caption_samples": 30, "data.hygiene.min_tokens": 1}

    short = run_stage(tiny_config(tmp_path / "short", **{"data.json_path": str(path)}, **more)).evidence
    plain = run_stage(tiny_config(tmp_path / "plain")).evidence

    assert short is not None and plain is not None
    pairs = short.get("pairs.right.correct")
    assert pairs is not None and pairs.n > 100 and short.get("pairs.right.zero") is not None
    assert strangers(short.measurements) == []
    for what in ("Four cells", "Two kinds of blindness", "Learner of words"):
        told = [gap for gap in plain.gaps if gap.startswith(f"{what}: not measured, ")]
        assert len(told) == 1 and "caption" in told[0]
