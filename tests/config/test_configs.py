"""Every config that is shipped: it loads, says what it costs, holds the seed's numbers, and runs on tiny parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml
from tests.evidence.test_catalogue import strangers

from beholder.config import RunConfig
from beholder.config.file import diff_configs, dump_config, load_config, parse_config, scale_overrides
from beholder.prepare.estimate import estimate
from beholder.prepare.packages import PARTS, assets_in
from beholder.prepare.quickstart import recipe
from beholder.prepare.tiny import smoke_config
from beholder.stages import run_stage
from beholder.types import Status, UserError

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
RECIPES = sorted((ROOT / "src" / "beholder" / "prepare" / "recipes").glob("*.yaml"))
SEED_STAGE2 = Path(__file__).parents[2] / "configs" / "stage2_sft_single.yaml"

# What `quickstart` fills in: places of the downloaded parts.
PLACES = ["data.sources=[{json_path: train, image_root: t}]", "data.eval_sources=[{json_path: test, image_root: t}]"]


def load(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    needs_places = yaml.safe_load(path.read_text())["data"].get("sources") == []
    return load_config(path, [*(PLACES if needs_places else []), *overrides])


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=lambda p: p.stem)
def test_a_shipped_config_loads_and_its_resolved_form_is_the_same_run(path: Path) -> None:
    cfg = load(path)

    assert parse_config(dump_config(cfg)) == cfg
    assert cfg.run_name in (path.stem, path.stem.removesuffix(f"_{cfg.stage_name}"), f"{path.parent.name}_{path.stem}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_shipped_config_opens_with_command_time_and_expected_numbers(path: Path) -> None:
    header = path.read_text().split("\nrun_name:")[0]

    for heading in ("# Command   beholder ", "# Needs ", "# Time ", "# Expect "):
        assert heading in header, f"{path.name} has no {heading!r}"
    assert path.relative_to(ROOT).as_posix() in header


def test_the_seeds_stage_2_has_a_golden_set_of_64_asked_greedily() -> None:
    cfg = load_config(SEED_STAGE2)

    assert cfg.golden_size == 64 and cfg.eval.golden_generate.max_new_tokens == 128
    assert cfg.data.len_buckets == (0, 64, 128, 999999) and cfg.eval.golden_generate.temperature == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stage1_align", {
            "model.connector.num_visual_tokens": 64, "model.connector.vision_ln": True, "prompting.max_seq_len": 1536,
            "train.lr.connector": 1e-4, "train.weight_decay.connector": 0.01, "train.warmup_ratio": 0.02,
            "train.lr_scheduler": "cosine", "train.min_lr_ratio": 0.1, "train.grad_clip": 1.0,
            "prompting.max_images_per_sample": 2,
            "eval.golden_size": 32, "eval.golden_generate.top_p": 0.9, "eval.golden_generate.max_new_tokens": 64,
        }),
        ("stage1_align_trial", {
            "data.max_samples": 5000, "data.eval_ratio": 0.02, "train.micro_batch_size": 4, "train.num_epochs": 3,
            "prompting.max_seq_len": 512, "train.quick_eval_steps": 200, "train.quick_eval_size": 100,
            "train.progress_percent": 0.1, "train.tqdm_disable": True, "data.image_root": "data/llava_pretrain",
        }),
        ("stage1_align_p11", {
            "data.max_samples": 18000, "data.eval_size": 2000, "data.split_mode": "stratified_len",
            "data.len_buckets": [0, 10, 20, 9999], "eval.golden_size": 64, "eval.golden_seed": 123,
            "eval.golden_set_path": "data/golden/stage1_llava_pretrain_golden64.jsonl", "train.num_epochs": 4,
            "train.micro_batch_size": 4, "train.gradient_accum": 4, "train.lr.connector": 1e-4,
            "train.weight_decay.connector": 0.0, "train.precision": "bf16", "train.save_every": 1000,
            "train.full_eval_every": "epoch", "train.quick_eval_size": 200, "train.quick_eval_steps": 200,
            "model.connector.resampler.num_latents": 64, "model.connector.vision_ln": False,
            "eval.run_golden_every": "save", "train.tqdm_disable": True, "train.progress_percent": 0.1,
        }),
    ],
)  # fmt: skip
def test_the_stage_1_configs_hold_the_seeds_numbers(name: str, expected: dict[str, object]) -> None:
    cfg = load_config(ROOT / "configs" / f"{name}.yaml")
    written = yaml.safe_load(dump_config(cfg).replace("1e-", "1.0e-"))

    assert cfg.model.llm.name_or_path == "Qwen/Qwen3-8B-Base"
    assert cfg.model.vision.name_or_path == "google/siglip-so400m-patch14-384"
    for path, value in expected.items():
        found = written
        for step in path.split("."):
            found = found[step]
        assert found == value, path


def test_the_full_run_has_the_seeds_effective_batch_and_length() -> None:
    cfg = load_config(ROOT / "configs" / "stage1_align.yaml")

    assert cfg.effective_batch == 512
    # "150k-250k steps" of the seed's micro-batches of 4 on its 546,965 training samples
    assert 150_000 <= cfg.train.num_epochs * 546_965 / 4 <= 250_000


LONG = {
    "configs/quickstart/footprint.yaml", "configs/native/qwen3_vl_footprint.yaml", "configs/stage4_footprint.yaml",
    "configs/distill.yaml", "configs/stage3_sft_multi.yaml",
}  # fmt: skip
"""Smoke runs that take long and go through what another one, or a study's own test, goes through."""


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, marks=[pytest.mark.slow] * (str(p.relative_to(ROOT)) in LONG))
        for p in CONFIGS + RECIPES
        if p.name != "quickstart_multi.yaml"  # configs/quickstart/multi.yaml is the same run
    ],
    ids=lambda p: p.stem,
)
def test_a_shipped_config_runs_end_to_end_on_tiny_parts(path: Path, tmp_path: Path) -> None:
    cfg = smoke_config(load(path), tmp_path)

    outcome = run_stage(cfg)

    check_run(cfg, outcome, tmp_path)


# The pairs of parts the project promises, each on another kind of data set, all through the same config.
PAIRS = [
    ("Qwen/Qwen3-8B-Base", "google/siglip-so400m-patch14-384", "jsonl", "mean_pool"),
    ("HuggingFaceTB/SmolLM2-135M", "timm/repvit_m0_9", "webdataset", "perceiver"),
    ("meta-llama/Llama-3.2-1B", "openai/clip-vit-large-patch14", "parquet", "grid"),
    ("Qwen/Qwen3-0.6B", "facebook/dinov2-base", "llava_pretrain", "pixel_shuffle"),
]


@pytest.mark.parametrize(("llm", "vision", "kind", "resampler"), PAIRS, ids=lambda v: v.split("/")[-1])
def test_every_pair_of_parts_runs_through_the_same_config(
    llm: str, vision: str, kind: str, resampler: str, tmp_path: Path
) -> None:
    recipe = yaml.safe_dump({
        "run_name": "pair",
        "model": {
            "llm": {"name_or_path": llm}, "vision": {"name_or_path": vision},
            "connector": {"resampler": {"kind": resampler}},
        },
        "data": {"dataset": kind, "json_path": "x", "eval_size": 16, "multi_image_fraction": 0.3},
        "train": {"train_steps": 2, "micro_batch_size": 4, "packing": resampler != "grid"},
        "eval": {"golden_size": 2, "caption_samples": 2},
    })  # fmt: skip
    cfg = smoke_config(parse_config(recipe), tmp_path, num_records=40, steps=2)

    outcome = run_stage(cfg)

    check_run(cfg, outcome, tmp_path)


def check_run(cfg: RunConfig, outcome: object, folder: Path) -> None:
    """The run succeeded, learned the connector (and adapters) alone, and left what a run folder must have."""
    from beholder.stages import Outcome

    assert isinstance(outcome, Outcome) and outcome.evidence is not None
    evidence, run = outcome.evidence, folder / "run"
    assert evidence.status is Status.SUCCEEDED
    assert outcome.step == cfg.train.train_steps
    rows = {row.part: row for row in evidence.trainable}
    learns = cfg.model.native is None and cfg.model.connector.trainable  # a native model's is part of its tower
    assert rows["connector"].trainable == (rows["connector"].params if learns else 0)
    if cfg.model.lora.enable:
        assert rows["lora"].trainable == rows["lora"].params > 0
    whole = cfg.model.language_learns
    assert rows["language"].trainable == (rows["language"].params if whole else 0)
    assert bool(rows["vision"].trainable) == bool(cfg.model.vision.unfreeze)
    for part in ("vision",) if whole else ("vision", "language"):
        assert rows[part].sha256_before == rows[part].sha256_after is not None
    assert strangers([*evidence.baseline, *evidence.measurements]) == []
    names = {m.name for m in evidence.measurements}
    assert {"eval.loss", "ablation.loss.correct", "ablation.loss.shuffled", "ablation.loss.zero"} <= names
    for file in ("config.yaml", "run.json", "metrics.jsonl", "evidence.json", "report.html", "report.md"):
        assert (run / file).stat().st_size > 0, file
    assert load_config(run / "config.yaml") == cfg
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == list(range(1, outcome.step + 1))
    assert list((run / "checkpoints").glob("step_*/MANIFEST.json"))


def test_the_stage_2_config_is_the_seeds_block_with_every_number_in_effect() -> None:
    cfg = load_config(SEED_STAGE2)

    assert cfg.stage_name == "instruct" and cfg.template == "chat" and cfg.effective_batch == 16
    assert (cfg.train.lr.connector, cfg.train.lr.lora) == (1e-4, 5e-5)
    assert (cfg.train.weight_decay.connector, cfg.train.weight_decay.lora) == (0.01, 0.0)
    assert (cfg.model.lora.r, cfg.model.lora.alpha, cfg.model.lora.dropout) == (16, 32, 0.05)
    assert cfg.data.len_buckets == (0, 64, 128, 999999) and cfg.prompting.max_seq_len == 2048
    assert cfg.eval.golden_generate.temperature == 0 and cfg.eval.golden_generate.max_new_tokens == 128
    assert (cfg.hygiene.min_tokens, cfg.hygiene.spam) == (1, ())  # an answer may be one word


def test_the_distillation_config_holds_the_guides_numbers_and_its_student() -> None:
    """About 37 million weights, about 23 million of which learn; the guide's warm-up is 1,000 steps."""
    cfg = load_config(ROOT / "configs" / "distill.yaml")

    assert (cfg.effective_batch, cfg.train.num_epochs, cfg.train.grad_clip) == (64, 5, 1)
    assert cfg.prompting.max_seq_len == 512
    assert cfg.train.lr.model_dump() == {"connector": 2e-4, "language": 2e-4, "vision": 1e-5, "lora": 5e-5}
    assert [s.weight for s in cfg.data.sources] == [150, 100, 50]
    samples = 150_000 + 100_000 + 9_009
    assert cfg.train.warmup_ratio * cfg.train.num_epochs * samples / 64 == pytest.approx(1000, rel=0.02)

    table = estimate(cfg, measure=False).trainable

    rows = {row.part: row for row in table.rows}
    assert table.params == pytest.approx(37e6, rel=0.05) and table.trainable == pytest.approx(23e6, rel=0.05)
    assert rows["language"].trainable == rows["language"].params and rows["language"].dtype == "float32"
    assert 0 < rows["vision"].trainable < 0.1 * rows["vision"].params, "frozen below the last block"


@pytest.mark.parametrize(("scale", "expected"), [
    ("smoke", {"max_samples": 2000, "eval_size": 200, "train_steps": 200, "save_every": 200}),
    ("trial", {"max_samples": 20_000, "eval_size": 2000, "train_steps": None, "save_every": 1000}),
    ("full", {"max_samples": None, "eval_size": 2000, "train_steps": None, "save_every": 1000}),
])  # fmt: skip
def test_the_runbooks_scales_are_the_seeds(scale: str, expected: dict[str, object]) -> None:
    cfg = load_config(SEED_STAGE2, scale_overrides(load_config(SEED_STAGE2), scale))

    found = {"max_samples": cfg.data.max_samples, "eval_size": cfg.data.eval_size}
    assert found | {"train_steps": cfg.train.train_steps, "save_every": cfg.train.save_every} == expected


def test_an_unknown_scale_names_those_there_are() -> None:
    with pytest.raises(UserError, match="no such scale; this config has smoke, trial, full"):
        scale_overrides(load_config(SEED_STAGE2), "huge")


@pytest.mark.parametrize("path", CONFIGS + RECIPES, ids=lambda p: p.stem)
def test_every_scale_of_a_shipped_config_loads(path: Path) -> None:
    cfg = load(path)

    for scale in cfg.scales:
        load(path, scale_overrides(cfg, scale))


def test_the_quickstarts_third_part_stands_among_the_configs_as_it_is_run() -> None:
    home = Path("data/quickstart")
    run = recipe(assets_in({part.name: home / part.name for part in PARTS}), Path("outputs/quickstart"), part="multi")

    shipped = load_config(ROOT / "configs/quickstart/multi.yaml", [f"eval.object_list={run.eval.object_list}"])

    assert diff_configs(run, shipped) == []
