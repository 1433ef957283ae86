"""The config reader: what loads, what is refused, where each complaint points, and that everything is said at once."""

from __future__ import annotations

import copy
import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.config import STAGES, DistillConfig, RunConfig, section
from beholder.config.data import SourceConfig
from beholder.config.file import (
    ConfigError,
    config_hash,
    diff_configs,
    dump_config,
    json_schema,
    load_config,
    parse_config,
    without_inert,
)
from beholder.config.inert import inert_settings
from beholder.config.parts import StudentConfig
from beholder.config.section import Inert, Section, items_of, section_of
from beholder.config.wording import annotation_at, expected
from beholder.model.plan import plan_of
from beholder.types import ConfigNote, DatasetKind, UserError

SEED_STAGE2 = Path(__file__).parents[2] / "configs" / "stage2_sft_single.yaml"
"""The YAML block of the stage-2 seed document, section 8, as it stands there."""
WHOLE = (SEED_STAGE2, *(SEED_STAGE2.parent / "quickstart" / f"{n}.yaml" for n in ("distill", "sweep", "footprint")))
"""Configs with sections that others have not."""

MINIMAL = """\
run_name: r
model:
  llm: {name_or_path: a/b}
  vision: {name_or_path: c/d}
data:
  json_path: x.jsonl
"""

TAUGHT = f"{MINIMAL}stage: distill\ndistill: {{teachers: [{{run: t}}]}}\n"


def problems(text: str, overrides: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "c.yaml", overrides)
    return str(caught.value).splitlines()


def one(text: str, *overrides: str) -> str:
    found = problems(text, overrides)
    assert len(found) == 1, found
    return found[0]


# ---------------------------------------------------------------------------------------------------------------
# What loads


def test_the_seeds_stage_2_block_loads_unchanged() -> None:
    cfg = load_config(SEED_STAGE2)

    assert cfg.stage_name == "instruct"
    assert cfg.model.llm.attn_implementation == "flash_attention_2"
    assert cfg.model.connector.load_checkpoint == "outputs/stage1_align_p11/checkpoint_16000.pt"
    assert cfg.model.lora.target_modules[-1] == "down_proj" and cfg.model.lora.alpha == 32
    assert cfg.data.len_buckets == (0, 64, 128, 999999) and cfg.data.max_samples is None
    assert cfg.train.lr.connector == 1e-4 and cfg.train.lr.lora == 5e-5 and cfg.train.train_steps is None
    assert cfg.train.full_eval_every == "epoch" and cfg.ablation.num_samples == 256
    assert cfg.eval.golden_generate.temperature == 0.0


def test_a_minimal_config_has_every_default() -> None:
    cfg = parse_config(MINIMAL)

    assert cfg == RunConfig.model_validate(yaml.safe_load(MINIMAL))
    assert cfg.run_dir == "outputs/r" and cfg.stage_name == "align" and cfg.template == "caption"


@pytest.mark.parametrize(
    ("spelling", "value"),
    [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("1E-4", 1e-4), ("+1e-04", 1e-4), (".5", 0.5), ("1", 1.0), ("0x10", 16.0)],
)
def test_numbers_are_read_as_yaml_1_2_writes_them(spelling: str, value: float) -> None:
    assert (
        parse_config(f"{MINIMAL}train: {{weight_decay: {{connector: {spelling}}}}}").train.weight_decay.connector
        == value
    )


@pytest.mark.parametrize("text", ["no", "off", "Yes", "12:30", "2024-01-01", "1_000", "y", "0o9", "1e", "<<"])
def test_yaml_1_1_surprises_stay_text(text: str) -> None:
    assert parse_config(MINIMAL.replace("run_name: r", f"run_name: {text}")).run_name == text


def test_anchors_stand_for_what_they_name() -> None:
    text = MINIMAL.replace("json_path: x.jsonl", "sources: [&s {json_path: x.jsonl}]\n  eval_sources: [*s]")

    cfg = parse_config(text)

    assert cfg.data.sources == cfg.data.eval_sources


def test_a_byte_order_mark_and_windows_line_ends_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())

    assert load_config(path) == parse_config(MINIMAL)


# ---------------------------------------------------------------------------------------------------------------
# What is refused, and where the complaint points


def test_every_mistake_of_a_file_is_told_at_once_with_its_place() -> None:
    text = SEED_STAGE2.read_text()
    for right, wrong in {
        "r: 16": "r: '16'",
        "train_steps: null": "train_stpes: null",
        "bf16\n  grad_clip: 1.0": "bf17\n  grad_clip: abc",
        "max_seq_len: 2048": "max_seq_len: 2048\n  max_seq_len: 3",
        'full_eval_every: "epoch"': "full_eval_every: epohc",
        "  lr:\n    connector: 1.0e-4\n    lora: 5.0e-5": "  lr: 1e-4\n  batch_size: 4",
        "num_latents: 64": "num_latents: 32",
        "name_or_path: google": "name: google",
        "pin_memory: true": "pin_memory: off",
        "eval_size: 2000": "eval_size: 2e3",
    }.items():
        assert right in text
        text = text.replace(right, wrong)
    lines = text.splitlines()

    found = problems(text)

    expected = {
        "model.vision.name_or_path": "missing; expected text",
        "model.vision.name": "no such setting in model.vision; nearest: name_or_path",
        "model.connector": "num_visual_tokens is 64 but resampler.num_latents is 32",
        "model.lora.r": "got the text '16'; expected a whole number above 0 and of at most 65536; write 16 without",
        "data.eval_size": "got the number 2000.0; expected a whole number above 0 and of at most 1000000000 or null; "
        "write 2000",
        "data.pin_memory": "got the text 'off'; expected true or false",
        "prompting.max_seq_len": "given twice; first in line",
        "train.train_stpes": "no such setting in train; nearest: train_steps",
        "train.precision": "got the text 'bf17'; expected bf16 or fp32 or fp16; nearest: bf16",
        "train.grad_clip": "got the text 'abc'; expected a number above 0 and of at most 1000000 or null",
        "train.lr": "got the number 0.0001; expected a section with connector, lora",
        "train.batch_size": "nearest: micro_batch_size; or batch_size exists as eval.batch_size",
        "train.full_eval_every": "expected epoch or end or never or a whole number above 0 and of at most "
        "1000000000; nearest: epoch",
    }
    assert len(found) == len(expected), found
    for line in found:
        match = re.fullmatch(r"c\.yaml:(\d+):(\d+): ([\w.]+): (.*)", line)
        assert match, line
        row, column, path, said = int(match[1]), int(match[2]), match[3], match[4]
        assert expected[path] in said
        at = lines[row - 1][column - 1 :]
        key = path.rsplit(".", 1)[-1]
        if path == "model.vision.name_or_path":
            assert at.startswith("vision:")
        elif path == "model.connector":
            assert at.startswith("num_visual_tokens: 64")
        elif path in ("model.vision.name", "train.train_stpes", "train.batch_size", "prompting.max_seq_len"):
            assert at.startswith(f"{key}:")
        else:  # a wrong value: the place is the value's own
            assert lines[row - 1].strip().startswith(f"{key}:") and not at.startswith(key)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "seed: '32'",
            "got the text '32'; expected a whole number of at least 0 and of at most 4294967295; "
            "write 32 without quotes",
        ),
        ("seed: 1_000", "write 1000 without quotes or separators"),
        ("seed: 1.5", "got the number 1.5; expected a whole number"),
        ("seed: true", "got true; expected a whole number"),
        ("seed: null", "got null; expected a whole number"),
        ("seed: [1]", "got a list of 1; expected a whole number"),
        ("device: cuda:0", "expected auto or cpu or cuda or mps; nearest: cuda"),
        ("train: {packing: 1}", "got 1; expected true or false"),
        ("train: {packing: yes}", "got the text 'yes'; expected true or false"),
        ("train: {micro_batch_size: 0}", "got 0; expected a whole number above 0"),
        ("train: {warmup_ratio: 1.5}", "expected a number of at least 0 and of at most 1"),
        ("train: {warmup_ratio: .inf}", ".inf is not a finite number"),
        ("train: {warmup_ratio: .nan}", ".nan is not a finite number"),
        ("train: {warmup_ratio: 1e999}", "1e999 is not a finite number"),
        ("train: {betas: [0.9]}", "got a list of 1; expected a list of 2 values"),
        ("train: {betas: [0.9, 0.99, 0.999]}", "got a list of 3; expected a list of 2 values"),
        ("train: {betas: 0.9}", "got the number 0.9; expected a list of 2 values"),
        ("train:", "got null; expected a section with num_epochs,"),
        ("train: [1]", "got a list of 1; expected a section with"),
        ("optimizer: adam", "no such setting in the config; valid here: run_name, seed,"),
        ("num_latents: 4", "num_latents exists as model.connector.resampler.num_latents"),
        ("? [a]\n: 1", "a key must be a name"),
        ("~: 1", "a key must be a name"),
        ("seed: !!python/object/apply:os.system ['true']", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("seed: !!int abc", "'abc' cannot be read as"),
        ("run_names: a\nseed: !mine 3", "the tag '!mine'"),
    ],
)
def test_a_wrong_value_says_what_was_got_and_what_is_expected(line: str, said: str) -> None:
    found = problems(MINIMAL + line)

    assert any(said in problem for problem in found), found


@pytest.mark.parametrize("name", ["a/b", "..", ".hidden", "a\\b", "''"])
def test_a_run_name_cannot_leave_the_outputs_folder(name: str) -> None:
    assert "run_name" in one(MINIMAL.replace("run_name: r", f"run_name: {name}"))


def test_all_impossible_combinations_are_told_at_once() -> None:
    text = MINIMAL.replace(
        "json_path: x.jsonl",
        "split_mode: stratified_len\n  len_buckets: [3, 1]\n  eval_sources: [{json_path: e}]\n"
        "  multi_image_fraction: 0.5\n",
    )

    found = problems(text + "prompting: {max_images_per_sample: 1}\nmodel.x: 1\n")

    assert [re.sub(r"^c.yaml:(\d+):\d+: ", r"\1: ", f)[:60] for f in found] == [
        "5: data: give exactly one of json_path and sources",
        "6: data: split_mode is stratified_len but eval_sources are g",
        "6: data: split_mode stratified_len needs eval_size",
        "7: data: len_buckets must be at least two increasing numbers",
        "9: data.multi_image_fraction needs prompting.max_images_per_",
        "12: model.x: no such setting in the config; nearest: model",
    ]


def test_a_wrong_value_does_not_start_a_chain_of_consequences() -> None:
    text = MINIMAL + "  split_mode: stratified_len\n  eval_size: '5'\n"

    assert "eval_size: got the text '5'" in one(text)


def test_a_wrong_value_does_not_hide_an_impossible_combination_elsewhere() -> None:
    found = problems(MINIMAL + "  eval_size: 3\n  eval_ratio: 0.1\nseed: x\n")

    assert len(found) == 2 and "eval_ratio or eval_size, not both" in found[0] and "seed" in found[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "missing; expected"),
        ("[1, 2]", "got a list of 2; expected settings"),
        ("hello", "got the text 'hello'; expected settings"),
        ("a: [1", "not valid YAML"),
        ("a: \t1\n\tb: 2", "not valid YAML"),
        ("a: 1\n---\nb: 2", "expected a single document"),
        ("a: *nope", "undefined alias"),
        ("a: \x01", "not valid YAML: special characters are not allowed"),
    ],
)
def test_text_that_is_no_config_is_refused_with_its_place(text: str, said: str) -> None:
    assert any((said in line and line.startswith("c.yaml:1:")) or said in line for line in problems(text))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: None, "No such file"),
        (lambda p: p.mkdir(), "Is a directory"),
        (lambda p: p.write_bytes(b"run_name: \xff\xfe"), "byte 0xff is not UTF-8"),
        (lambda p: p.write_bytes(b"x" * 5_000_000), "too large for a config"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, make: Any, said: str) -> None:
    path = tmp_path / "c.yaml"
    make(path)

    with pytest.raises(UserError, match=said) as caught:
        load_config(path)

    assert str(path) in str(caught.value)


_yaml = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@given(replacement=_yaml, seed=st.integers(0, 10_000), twice=st.booleans(), base=st.sampled_from(WHOLE))
def test_whatever_stands_anywhere_the_answer_is_a_config_or_a_complaint(
    replacement: Any, seed: int, twice: bool, base: Path
) -> None:
    data = yaml.safe_load(base.read_text())
    pick = random.Random(seed)
    for _ in range(1 + twice):
        here: Any = data
        while True:
            key = pick.choice(list(here) if isinstance(here, dict) else range(len(here)))
            if not isinstance(here[key], dict | list) or not here[key] or pick.random() < 0.3:
                break
            here = here[key]
        if isinstance(here, dict) and pick.random() < 0.3:
            here[f"{key}_x"] = here.pop(key)
            continue
        here[key] = copy.deepcopy(replacement)  # the same one twice could end up inside itself
    text = yaml.safe_dump(data)

    try:
        cfg = parse_config(text)
    except ConfigError as e:
        assert e.problems and all(p.text and p.line >= 1 for p in e.problems)
    else:
        assert parse_config(dump_config(cfg)) == cfg


def test_what_is_wrong_beside_a_wrong_item_is_told_too() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL, overrides=["data.eval_sources=[null, {'': null}]"])

    told = str(caught.value)
    assert "data.eval_sources.0: got null" in told and "data.eval_sources.1.: no such setting" in told


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_answered_with_a_complaint(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(text)


# ---------------------------------------------------------------------------------------------------------------
# --set


def test_overrides_reach_every_kind_of_setting() -> None:
    cfg = parse_config(MINIMAL, overrides=[
        "train.lr.connector=2e-4", "data.json_path=null", "run_name=other",
        "data.sources=[{json_path: a, cap: 5}, {json_path: b}]", "data.sources.1.cap=7",
        "data.hygiene.spam=[]", "model.connector={num_visual_tokens: 16}", "prompting.instruction=What is it?",
    ])  # fmt: skip

    assert cfg.train.lr.connector == 2e-4 and cfg.run_name == "other"
    assert [s.cap for s in cfg.data.sources] == [5, 7] and cfg.data.json_path is None
    assert cfg.data.hygiene.spam == () and cfg.model.connector.num_visual_tokens == 16
    assert cfg.prompting.instruction == "What is it?"


def test_a_later_override_wins_and_an_override_replaces_a_wrong_value_of_the_file() -> None:
    cfg = parse_config(MINIMAL + "seed: wrong\n", overrides=["seed=1", "seed=2"])

    assert cfg.seed == 2


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["train.learning_rate=1e-4"], ["train.lr.lora=1e-4"]),
        (["train.vit_lr=3e-4", "model.lora.vit_layers=last-2"],
         ["train.lr.vision=3e-4", "model.lora.vit_layers=last-2"]),
        (["train.aligner_lr=2e-4"], ["train.lr.connector=2e-4"]),
        (["model.freeze_llm=true", "model.freeze_vit=false", "model.lora.vit_layers=last-4"],
         ["model.lora.llm_layers=none", "model.lora.vit_layers=last-4"]),
        (["model.freeze_llm=false", "model.freeze_vit=true", "model.lora.llm_layers=last-2"],
         ["model.lora.llm_layers=last-2", "model.lora.vit_layers=none"]),
        (["model.freeze_vit=false", r"model.lora.target_modules=['blocks\\.2\\..*']"],
         [r"model.lora.target_modules=['blocks\\.2\\..*']"]),
        (["model.lora.modules_to_save=[aligner]"], ["model.connector.trainable=true"]),
        (["model.lora.modules_to_save=[]"], ["model.connector.trainable=false"]),
        (["train.vit_lr=3e-4", "train.lr.vision=3e-4", "model.lora.vit_layers=last-2"],
         ["train.lr.vision=3e-4", "model.lora.vit_layers=last-2"]),
    ],
)  # fmt: skip
def test_the_stage_4_plans_own_settings_say_what_ours_say(theirs: list[str], ours: list[str]) -> None:
    on = ["stage=instruct", "model.lora.enable=true"]
    cfg = parse_config(MINIMAL, overrides=[*on, *theirs])

    assert cfg == parse_config(MINIMAL, overrides=[*on, *ours])
    assert "freeze_" not in dump_config(cfg) and parse_config(dump_config(cfg)) == cfg


@pytest.mark.parametrize(("more", "learns"), [([], False), (["model.lora.modules_to_save=[aligner]"], True)])
def test_a_native_models_connector_learns_where_it_is_said(more: list[str], learns: bool) -> None:
    text = (
        "run_name: r\nstage: instruct\nmodel: {native: {name_or_path: x}, lora: {enable: true}}\ndata: {json_path: a}\n"
    )
    cfg = parse_config(text, overrides=[*more, *(["train.aligner_lr=2e-4"] if learns else [])])

    assert cfg.model.connector.trainable is learns and parse_config(dump_config(cfg)) == cfg
    assert cfg.train.lr.connector == (2e-4 if learns else 1e-4)
    assert plan_of(cfg.model, cfg.stage_record).connector == ("full" if learns else "frozen")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["model.freeze_llm=1"], "--set model.freeze_llm: got 1; expected true or false"),
        (["model.freeze_llm=true", "model.lora.llm_layers=last-2"], "true, but model.lora.llm_layers chooses some"),
        (
            ["model.freeze_llm=false", "model.lora.llm_layers=none", "model.lora.vit_layers=last-1"],
            "false, but model.lora.llm_layers chooses none",
        ),
        (["model.freeze_vit=false"], "false, but model.lora.vit_layers chooses none; say how much there"),
        (["model.freeze_vit=true", "model.lora.vit_layers=last-2"], "true, but model.lora.vit_layers chooses some"),
        (["model.freeze_vit=true", "model.vision.unfreeze=[last-1]"], "true, but model.vision.unfreeze lets some"),
        (["model.lora.modules_to_save=[lm_head]"], "'lm_head' cannot be trained whole here; what can is the aligner"),
        (["model.lora.modules_to_save=aligner"], "got the text 'aligner'; expected a list of names"),
        (["train.vit_lr=1e-4", "train.lr.vision=2e-4", "model.lora.vit_layers=all"], "train.lr.vision is the same"),
        (["train.vit_lr=1e-4"], "has no effect here: the vision tower is frozen"),
        (["train.vit_lr=fast", "model.lora.vit_layers=all"], "got the text 'fast'; expected a number"),
        (["train=3"], "got 3; expected a section"),
    ],
)
def test_a_plans_setting_that_contradicts_ours_is_refused(given: list[str], said: str) -> None:
    assert said in one(MINIMAL, "stage=instruct", "model.lora.enable=true", *given)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("model.freeze_aligner", "no such setting in model; here it is model.connector.trainable: false for true"),
        ("model.lora.lora_rank", "here it is model.lora.r"),
        ("train.lr.vit_lr", "here it is train.lr.vision"),
    ],
)
def test_a_setting_as_ms_swift_calls_it_is_answered_with_what_says_it_here(key: str, said: str) -> None:
    assert said in one(MINIMAL, f"{key}=true")


def test_layers_may_be_kept_in_a_study_whose_tower_learns_in_some_runs_only() -> None:
    sets = ["stage=instruct", "model.lora.enable=true", "model.connector.trainable=false", "features.layers=true",
            "model.connector.load_checkpoint=x", "model.lora.vit_layers=last-2"]  # fmt: skip
    assert "features.layers: has no effect here" in one(MINIMAL, *sets)
    cfg = parse_config(MINIMAL, overrides=[*sets, "footprint={vision_blocks: [0, 2]}"])
    assert cfg.features.layers
    point = cfg.model_copy(update={"footprint": None})
    assert "layers: true" not in dump_config(point), "the tower of this one learns"


@pytest.mark.parametrize("value", ["last-2", "first-1", "none", "last-0", "[0, 3]"])
def test_layers_are_chosen_in_words_or_by_number(value: str) -> None:
    cfg = parse_config(MINIMAL, overrides=["model.lora.enable=true", f"model.lora.llm_layers={value}",
                                           "model.lora.vit_layers=last-1"])  # fmt: skip

    assert cfg.tower_may_learn
    assert parse_config(dump_config(cfg)) == cfg


@pytest.mark.parametrize("value", ["last", "last-", "-2", "top-3", "[-1]", "2", "last-99999"])
def test_other_words_for_layers_are_refused_with_those_that_there_are(value: str) -> None:
    said = one(MINIMAL, "model.lora.enable=true", f"model.lora.llm_layers={value}")

    assert "expected all, none, last-K, first-K or a list, each a whole number" in said


def test_adapters_on_no_layer_and_a_rate_for_a_frozen_tower_are_refused() -> None:
    on = "model.lora.enable=true"
    assert "choose no layer" in one(MINIMAL, on, "model.lora.llm_layers=none")
    assert "the vision tower is frozen" in one(MINIMAL, on, "train.lr.vision=1e-3")
    assert "the tower gets no adapters" in one(MINIMAL, on, "model.lora.vit_target_modules=[qkv]")
    parse_config(MINIMAL, overrides=[on, "train.lr.vision=1e-3", r"model.lora.target_modules=['blocks\.2\..*']"])
    said = one(
        MINIMAL,
        on,
        "train.lr.vision=1e-3",
        r"model.lora.target_modules=['blocks\.2\..*']",
        "model.lora.vit_layers=none",
    )
    assert "the vision tower is frozen" in said
    parse_config(MINIMAL, overrides=["model.vision.unfreeze=[last-1]", "train.lr.vision=1e-3"])


def test_kept_layers_need_that_nothing_before_them_learns() -> None:
    on = ("model.lora.enable=true", "model.lora.llm_layers=last-1", "features.layers=true")

    assert "features.layers has no effect here" in one(MINIMAL, *on).replace(": has", " has")
    assert parse_config(MINIMAL, overrides=[*on, "model.connector.trainable=false"]).features.layers


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr.conector=1", "--set train.lr.conector: no such setting in train.lr; nearest: connector"),
        ("train.micro_batch_size='8'", "--set train.micro_batch_size: got the text '8'; expected a whole number"),
        ("train.micro_batch_size=", "--set train.micro_batch_size: got null; expected a whole number"),
        ("seed=[1", "--set seed: '[1': not valid YAML"),
        ("seed", "--set seed: 'seed' is not KEY=VALUE"),
        ("a..b=1", "--set a..b: 'a..b=1' is not KEY=VALUE"),
        ("=1", "is not KEY=VALUE"),
        ("run_name.x=1", "--set run_name.x: run_name is not a section (it is the text 'r')"),
        ("train.betas.5=1", "--set train.betas.5"),
        ("run_name=1e5", """of at most 200 characters; write '"1e5"' in quotes"""),
        ("data.eval_sources=[{}]", "--set data.eval_sources: data.eval_sources.0.json_path: missing"),
        ("data.len_buckets=[0, x]", "--set data.len_buckets: data.len_buckets.1: got the text 'x'"),
        ("sweep={grid: 3}", "--set sweep: sweep.grid: got 3; expected a section with names of your own"),
        ("distill.teachers=null", "--set distill.teachers: got null; expected a list, each a section with run, native"),
        ("distill.teachers=[]", "--set distill.teachers: got a list of 0; expected a list"),
        ("distill.teachers=[3]", "distill.teachers.0: got 3; expected a section with run, native"),
        ("distill.teachers=[{}]", "distill.teachers.0: give run, a run folder, or native"),
        ("distill.teachers=[{run: a, native: b}]", "distill.teachers.0: give run, a run folder, or native"),
        ("distill.teachers=[{run: a, weight: 0}]", "distill.teachers.0.weight: got 0; expected a number above 0"),
        ("distill.teachers=[{run: a, nativ: b}]", "distill.teachers.0.nativ: no such setting in distill.teachers.0"),
        ("distill.teachers=[{run: a, revision: b}]", "teachers.0: revision and chat_template are for native teachers"),
        (
            "distill.teachers=[{run: a, weight: 0.5}]",
            "the weights of the teachers are 0.5 = 0.5; they must",
        ),
    ],
)
def test_an_override_is_checked_like_the_file_and_named(override: str, said: str) -> None:
    assert said in one(TAUGHT if override.startswith("distill.") else MINIMAL, override)


# ---------------------------------------------------------------------------------------------------------------
# Settings without effect

_NO_EFFECT = [
    ("train: {lr: {lora: 4.0e-5}}", "train.lr.lora"),
    ("train: {weight_decay: {lora: 0.1}}", "train.weight_decay.lora"),
    ("train: {quick_eval_size: 5}", "train.quick_eval_size"),
    ("train: {quick_eval_steps: 5}", "train.quick_eval_steps"),
    ("train: {num_epochs: 2, train_steps: 5}", "train.num_epochs"),
    ("train: {lr_scheduler: constant, min_lr_ratio: 0.5}", "train.min_lr_ratio"),
    ("prompting: {max_images_per_sample: 1, instruction_multi: x}", "prompting.instruction_multi"),
]
_NO_EFFECT_DATA = [
    ("prefetch_factor: 3", "data.prefetch_factor"),
    ("persistent_workers: false", "data.persistent_workers"),
    ("split_mode: none\n  eval_size: 5", "data.eval_size"),
    ("split_mode: none\n  eval_ratio: 0.5", "data.eval_ratio"),
    ("dataset: webdataset\n  image_root: x", "data.image_root"),
    ("eval_sources: [{dataset: webdataset, json_path: p, image_root: x}]", "data.eval_sources.0.image_root"),
]
_NO_EFFECT_MODEL = [
    ("lora: {r: 8}", "model.lora.r"),
    ("connector: {resampler: {kind: grid, depth: 3}}", "model.connector.resampler.depth"),
    ("connector: {resampler: {kind: none, latent_std: 0.5}}", "model.connector.resampler.latent_std"),
    ("connector: {projector: {kind: linear, hidden: 8}}", "model.connector.projector.hidden"),
    ("connector: {projector: {bias: false}}", "model.connector.projector.bias"),
]


@pytest.mark.parametrize(
    ("more", "template"),
    [
        ("stage: multi\n", "chat"),
        ("stage: multi\nprompting: {template: conversation}\n", "conversation"),
        ("prompting: {template: conversation}\n", "conversation"),
    ],
)  # fmt: skip
def test_captions_are_not_joined_where_samples_have_questions_of_their_own(more: str, template: str) -> None:
    """A joined sample has neither of the two questions."""
    text = more + MINIMAL + "  multi_image_fraction: 0.5\n"
    if "multi\n" in more:
        text = text.replace("data:", "  lora: {enable: true}\ndata:")

    assert f"joins two captions under prompting.template caption; under {template} samples have" in one(text)
    parse_config(MINIMAL + "  multi_image_fraction: 0.5\n")


@pytest.mark.parametrize(
    ("text", "path"),
    [(MINIMAL + line, path) for line, path in _NO_EFFECT]
    + [(f"{MINIMAL}  {line}\n", path) for line, path in _NO_EFFECT_DATA]
    + [(MINIMAL.replace("data:", f"  {line}\ndata:"), path) for line, path in _NO_EFFECT_MODEL]
    + [
        (MINIMAL.replace("c/d}", "c/d, weights: w.safetensors}"), "model.vision.weights"),
        (MINIMAL.replace("run_name", "stage: align\nrun_name").replace("data:", "  lora: {enable: true}\ndata:"),
         "model.lora.enable"),
    ],
)  # fmt: skip
def test_a_setting_that_does_nothing_here_is_an_error(text: str, path: str) -> None:
    found = one(text)

    assert f": {path}: has no effect here: " in found
    row, column = (int(n) for n in found.split(":")[1:3])
    assert text.splitlines()[row - 1][column - 1 :].startswith(path.rsplit(".", 1)[-1])


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("train: {quick_eval_size: 5, quick_eval_steps: 0}", "train.quick_eval_size"),
        ("train: {packing: false, pack_len: 64}", "train.pack_len"),
        ("eval: {golden_size: 0, golden_seed: 3, golden_set_path: a}", "eval.golden_set_path eval.golden_seed"),
        ("eval: {golden_size: 0, golden_generate: {temperature: 0.5}}", "eval.golden_generate.temperature"),
        ("eval: {golden_size: 5, run_golden_every: never}", "eval.golden_size"),
        ("eval: {golden_generate: {temperature: 0, top_p: 0.5}}", "eval.golden_generate.top_p"),
        ("eval: {caption_samples: 0, clip_model: a}", "eval.clip_model"),
        ("features: {enabled: false, max_gb: 1}", "features.max_gb"),
        ("model: {lora: {enable: false, target_modules: [q_proj], r: 8}}", "model.lora.r model.lora.target_modules"),
        ("data: {num_workers: 0, prefetch_factor: 3}", "data.prefetch_factor"),
    ],
)
def test_what_lies_beneath_a_switch_that_was_written_off_is_told_and_loads(text: str, paths: str) -> None:
    data = yaml.safe_load(MINIMAL)
    for name, more in yaml.safe_load(text).items():
        data[name] = {**data.get(name, {}), **more}

    with pytest.warns(ConfigNote) as told:
        cfg = parse_config(yaml.safe_dump(data), "c.yaml")

    said = [str(w.message) for w in told]
    assert sorted(line.split(": ")[1] for line in said) == sorted(paths.split())
    assert all(line.startswith("c.yaml:") and ": has no effect here: " in line for line in said)
    assert parse_config(dump_config(cfg)) == cfg


def _rules() -> list[tuple[str, type[Section], Inert]]:
    """Every rule: the setting or section it stands at, the section around that, the rule."""
    places: list[tuple[str, type[Any]]] = [("", RunConfig)]
    for s in section.settings(RunConfig):
        for found in (section_of(s.info.annotation), section_of(items_of(s.info.annotation))):
            places += [] if found is None else [(f"{s.path}.", found)]
    return [
        (prefix + name, schema, rule)
        for prefix, schema in places
        for name, info in schema.model_fields.items()
        for rule in info.metadata
        if isinstance(rule, Inert)
    ]


def test_every_rule_names_settings_that_exist() -> None:
    named = {s.path for s in section.settings(RunConfig)}
    rules = _rules()
    assert len(rules) > 40
    for _, schema, rule in rules:
        for name in rule.because.split():
            assert name[1:] in schema.model_fields if name.startswith(".") else name in named, name


def _switched() -> Iterator[tuple[str, dict[str, Any]]]:
    """A run's own config, every setting at its default and written out, with one switch or two set to each value that
    could make others do nothing."""
    free: dict[str, list[Any]] = {
        "model.vision.name_or_path": ["a/b", "timm/x"], "train.train_steps": [5],
        "prompting.max_images_per_sample": [1],
        "data.sources": [[{"json_path": "s"}]], "data.eval_sources": [[{"json_path": "s"}]],
    }  # fmt: skip
    switches = sorted({
        (path.rpartition(".")[0] if name.startswith(".") else "") + name
        for path, _, rule in _rules() for name in rule.because.split()
    })  # fmt: skip
    infos = {s.path: s.info for s in section.settings(RunConfig)}
    for stage in ([], ["model.lora.enable=true", "prompting.max_images_per_sample=1"]):
        whole = parse_config(MINIMAL, overrides=stage).model_dump(mode="json")
        del whole["gates"]  # no setting of theirs has a rule
        for switch in switches:
            if switch not in infos or switch.startswith(("model.student.", "distill.")):  # sections of their own: below
                continue
            options = section.options_of(infos[switch].annotation)
            values = free.get(switch) or [v for o in options if get_origin(o) is Literal for v in get_args(o)]
            values += [v for v in (False, True) if bool in options] + ([0] if int in options else [])
            for value in values:
                data = copy.deepcopy(whole)
                *above, last = switch.split(".")
                functools.reduce(dict.__getitem__, above, data)[last] = value
                if switch == "data.sources":
                    data["data"]["json_path"] = None
                yield f"{switch}={value}", data
        for kind in get_args(DatasetKind):
            data = copy.deepcopy(whole)
            data["data"]["json_path"] = None
            source = SourceConfig(json_path="x").model_dump(mode="json")
            data["data"]["sources"] = data["data"]["eval_sources"] = [{**source, "dataset": kind}]
            yield f"data.sources.dataset={kind}", data
        data = copy.deepcopy(whole)
        data["eval"] |= {"caption_samples": 0, "qa_samples": 0}
        yield "eval.qa_samples=0, and no captions", data
        data = copy.deepcopy(whole)
        data["model"] |= {"native": {"name_or_path": "a/b"}, "llm": None, "vision": None}
        data["model"]["lora"]["enable"], data["stage"] = True, "instruct"
        data["prompting"] |= {"template": "chat", "max_images_per_sample": 1}
        del data["model"]["connector"]["trainable"]  # whose default is another there
        yield "model.native", data
        data = copy.deepcopy(whole)
        data["model"]["student"] = StudentConfig(cut=(0,), learns="none").model_dump(mode="json")
        yield "model.student.cut", data
        for own in ({"online": True}, {"form": "sampled"}, {"form": "topk"}):
            data = copy.deepcopy(whole)
            made = DistillConfig.model_validate({"teachers": ({"run": "r"},), **own})
            data["distill"], data["stage"] = made.model_dump(mode="json"), "distill"
            data["model"]["lora"]["enable"], data["prompting"]["template"] = True, "chat"
            data["prompting"]["max_images_per_sample"] = 1
            yield f"distill {own}", data
        data = copy.deepcopy(whole)
        data["train"] |= {"quick_eval_size": 0, "quick_eval_steps": 0}
        yield "no quick evaluation", data


def test_at_its_default_a_setting_that_does_nothing_is_silent_whatever_was_switched_off() -> None:
    idled: set[str] = set()
    for what, data in _switched():
        try:
            cfg = parse_config(yaml.safe_dump(data), what)  # a note would be an error here
        except ConfigError as e:
            # What is set above may itself do nothing there: `stage: align` beside adapters is a mistake.
            idle = {p.path for p in e.problems if "no effect" in p.text}
            assert idle <= {what.partition("=")[0], "model.lora.enable"}, str(e)
            continue
        idled |= {re.sub(r"\.\d+\.", ".", ".".join(map(str, i.path))) for i in inert_settings(cfg)}

    for path, _, _ in _rules():
        assert any(p == path or p.startswith(f"{path}.") for p in idled), f"{path}: nothing above switches it off"


def test_saying_what_is_the_case_anyway_is_no_error() -> None:
    text = MINIMAL.replace("data:", "  lora: {enable: false}\ndata:") + "train: {pack_len: null, train_steps: null}\n"

    assert parse_config(text) == parse_config(MINIMAL)


def test_a_switch_on_the_command_line_may_idle_settings_of_the_file() -> None:
    text = MINIMAL + "  num_workers: 8\n  prefetch_factor: 4\ntrain: {num_epochs: 3}\n"

    cfg = parse_config(text, overrides=["data.num_workers=0", "train.train_steps=5"])

    assert cfg.data.num_workers == 0 and cfg.data.prefetch_factor == 2 and cfg.train.num_epochs == 1
    assert parse_config(dump_config(cfg)) == cfg
    assert "--set data.prefetch_factor: has no effect here" in one(text, "data.num_workers=0", "data.prefetch_factor=3")


def test_a_setting_without_effect_is_told_beside_other_mistakes() -> None:
    found = problems(MINIMAL + "train: {lr_scheduler: constant, min_lr_ratio: 0.5, sed: 3}\nseed: x\n")

    assert len(found) == 3


# ---------------------------------------------------------------------------------------------------------------
# Dump, hash, difference, schema


def test_a_dump_says_everything_that_counts_and_loads_back_equal() -> None:
    cfg = load_config(SEED_STAGE2)

    text = dump_config(cfg)

    assert parse_config(text) == cfg
    written = {p for p, _ in _leaves(yaml.safe_load(text))}
    idle = {".".join(map(str, i.path)) for i in inert_settings(cfg)}
    every = {p for p, _ in _leaves(cfg.model_dump(mode="json"))}
    # A gate is written as a person would write it: what says nothing is left out.
    unsaid = {p for p in every - written if p.startswith("gates.")}
    assert written == every - idle - unsaid
    for name, gate in cfg.gates.items():
        said = yaml.safe_load(text)["gates"][name]
        assert said["measure"] == gate.measure and {"above", "at_least", "at_most"} & set(said)


def test_a_gate_keeps_what_the_config_does_not_change() -> None:
    cfg = parse_config(MINIMAL + "gates: {looks_clearly: {above: 20}}\n", overrides=["gates.frozen.enable=false"])

    own = STAGES["align"].gates["looks_clearly"]
    assert cfg.gates["looks_clearly"] == own.model_copy(update={"above": 20.0})
    assert not cfg.gates["frozen"].enable and cfg.gates["frozen"].measure == "frozen.changed"
    assert list(cfg.gates) == list(STAGES["align"].gates)
    assert parse_config(dump_config(cfg)) == cfg


def test_a_bound_that_was_taken_away_stays_away() -> None:
    cfg = parse_config(MINIMAL + "gates: {learned: {above: null, at_least: 0.5}}\n")

    assert cfg.gates["learned"].above is None
    assert parse_config(dump_config(cfg)) == cfg


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gates: {learned: {abov: 1}}", "gates.learned.abov: no such setting in gates.learned; nearest: above"),
        ("gates: {mine: {above: 1}}", "gates.mine has no measure"),
        ("gates: {mine: {measure: eval.loss}}", "gates.mine has no bound"),
        ("gates: {learned: {above: null}}", "gates.learned has no bound"),
        ("gates: 3", "expected a section with names of your own"),
        ("sweep: {grid: {}}", "grid is empty"),
        ("sweep: {grid: {train.lr.connector: []}}", "grid train.lr.connector has no values"),
        ("sweep: {grid: {seed: [1, 1]}}", "grid seed has a value twice"),
    ],
)
def test_wrong_gates_and_sweeps_are_told(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL + text + "\n")

    assert said in str(caught.value)


@pytest.mark.parametrize(
    "awkward",
    ["null", "true", "1e5", "1e-4", "0x1f", "012", "~", "", "a: b", "# x", "é\n\u2028", "'", " lead", "*a", "no"],
)
def test_awkward_texts_survive_a_dump(awkward: str) -> None:
    base = parse_config(MINIMAL)
    cfg = base.model_copy(update={"prompting": base.prompting.model_copy(update={"instruction": awkward})})

    assert parse_config(dump_config(cfg)).prompting.instruction == awkward


def test_the_hash_is_the_settings_and_nothing_else() -> None:
    cfg = parse_config(MINIMAL)
    lines = MINIMAL.splitlines(keepends=True)
    reordered = "# comment\n" + "".join(lines[4:] + lines[:4])

    assert config_hash(parse_config(reordered)) == config_hash(cfg) == config_hash(parse_config(dump_config(cfg)))
    assert re.fullmatch("[0-9a-f]{64}", config_hash(cfg))
    assert config_hash(parse_config(MINIMAL, overrides=["seed=43"])) != config_hash(cfg)
    # An idle setting, set from Python where nothing stops it, does not make another run.
    idle = cfg.model_copy(update={"train": cfg.train.model_copy(update={"packing": False, "pack_len": 9})})
    plain = cfg.model_copy(update={"train": cfg.train.model_copy(update={"packing": False})})
    assert config_hash(idle) == config_hash(plain) and without_inert(idle) == plain


def test_a_difference_names_the_setting_and_both_values() -> None:
    a = parse_config(MINIMAL)
    b = parse_config(MINIMAL, overrides=["train.lr.connector=2e-4", "data.len_buckets=[0, 5, 9]", "output_dir=o"])

    assert diff_configs(a, a) == []
    assert diff_configs(a, b) == [
        ("output_dir", None, "o"),
        ("data.len_buckets", [0, 10, 20, 9999], [0, 5, 9]),
        ("train.lr.connector", 1e-4, 2e-4),
    ]


def test_the_json_schema_describes_every_setting() -> None:
    schema = json_schema()

    assert schema["$schema"].endswith("2020-12/schema")
    json.dumps(schema)
    described = dict(_flat(schema))
    assert "Peak learning rate of the connector." in described["train.lr.connector"]
    assert "llm" in schema["$defs"]["ModelConfig"]["required"]


def _leaves(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for key, value in data.items():
        out += _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return out


def _flat(schema: dict[str, Any], node: dict[str, Any] | None = None, prefix: str = "") -> list[tuple[str, str]]:
    node = schema if node is None else node
    out: list[tuple[str, str]] = []
    for name, value in node.get("properties", {}).items():
        out.append((prefix + name, value.get("description", "")))
        if "$ref" in value:
            out += _flat(schema, schema["$defs"][value["$ref"].rsplit("/", 1)[-1]], f"{prefix}{name}.")
    return out


@pytest.mark.parametrize("text", ["a: &x\n  b: *x\n", "x: " + "[" * 3000, MINIMAL + "train: {betas: &b [0.9, *b]}\n"])
def test_what_is_nested_without_end_is_told_and_no_traceback(text: str) -> None:
    assert "nested too deeply" in one(text)


def test_an_override_that_contains_itself_is_told() -> None:
    assert "nested too deeply" in one(MINIMAL, "train.betas=&b [*b]")


@pytest.mark.parametrize(("setting", "most"), [
    ("train.num_threads=1000000", 1024), ("data.num_workers=100000", 512), ("train.micro_batch_size=80000", 65536),
    ("data.prefetch_factor=1000000", 1024), ("eval.batch_size=1000000", 65536), ("train.num_epochs=1e300", 1000000),
    ("train.train_steps=99999999999999999999999", 10**9), ("features.max_gb=1e30", 1000000),
    ("model.connector.resampler.depth=100000", 1024), ("ablation.num_samples=18446744073709551616", 10**9),
])  # fmt: skip
def test_a_number_that_only_a_slip_of_the_finger_makes_is_refused_with_the_most_there_is(
    setting: str, most: int
) -> None:
    path = setting.partition("=")[0]
    assert re.search(
        rf"--set {re.escape(path)}: got .*; expected .* of at most {most:g}\b|{most}", one(MINIMAL, setting)
    )


def test_every_count_of_the_schema_has_a_bound() -> None:
    """The next setting, too: without one, a number beyond 63 bits reaches numpy and torch."""
    told = {s.path: expected(annotation_at(tuple(s.path.split(".")))) for s in section.settings(RunConfig)}
    counts = {path: words for path, words in told.items() if "a whole number" in words}
    assert len(counts) > 40
    unbound = {path for path, words in counts.items() if "of at most" not in words}
    assert unbound == {"scales", "sweep.grid", "distillation.arms"}, (
        "what these hold is given to other settings, which have theirs"
    )
    assert told["train.num_threads"] == "a whole number above 0 and of at most 1024 or null"
    assert told["train.keep_checkpoints"] == "a whole number of at least 2 and of at most 1000000000"


def _numbers(schema: dict[str, Any], node: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every number of a JSON schema, those in lists and below names of the user's own too."""
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if node.get("type") in ("number", "integer"):
        yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from _numbers(schema, inner, f"{path}.{name}".lstrip("."))
    inside = [*node.get("anyOf", ()), *node.get("prefixItems", ()), node.get("items"), node.get("additionalProperties")]
    for inner in inside:
        yield from _numbers(schema, inner, path) if isinstance(inner, dict) else ()


def test_every_number_of_the_schema_has_both_bounds() -> None:
    schema = RunConfig.model_json_schema()
    numbers = list(_numbers(schema, schema))
    ends = ({"minimum", "exclusiveMinimum"}, {"maximum", "exclusiveMaximum"})
    unbound = {path for path, node in numbers if not all(end & set(node) for end in ends)}

    assert len(numbers) > 80 and {"train.lr.lora", "gates.at_least", "data.sources.min_rating"} <= dict(numbers).keys()
    assert unbound == {"scales", "sweep.grid", "footprint.points.set", "distillation.arms"}, (
        "these are given to other settings"
    )


@pytest.mark.parametrize("setting", [
    "train.lr.connector=1e9", "train.weight_decay.lora=1e9", "train.grad_clip=1e30",
    "eval.golden_generate.temperature=1e6", "gates.learned.above=1e30", "model.connector.resampler.latent_std=1e9",
])  # fmt: skip
def test_a_number_that_no_training_has_is_refused(setting: str) -> None:
    assert re.search(r"expected a number .*of at most [0-9]", one(MINIMAL, setting))


@pytest.mark.parametrize("setting", [
    "prompting.image_token=''", "prompting.image_token=' '", "model.llm.name_or_path=''", "model.vision.weights=' '",
    "data.json_path=''", "eval.golden_set_path=''", "output_dir=''",
])  # fmt: skip
def test_a_blank_text_that_would_be_found_everywhere_or_opened_is_refused(setting: str) -> None:
    path = setting.partition("=")[0]
    assert any(
        f"{path}: got" in line and "expected text that is not blank" in line for line in problems(MINIMAL, (setting,))
    )


def test_a_run_name_that_no_disk_takes_is_refused() -> None:
    assert "expected a plain name without slashes, of at most 200 char" in one(MINIMAL, f"run_name={'x' * 300}")
    with pytest.raises(UserError, match=r"train\.betas"):
        parse_config(MINIMAL, overrides=["train.betas=[0.9,1]"])


@pytest.mark.parametrize(("label", "why"), [("Image: ", "every image has the same"), ("Image {n}: ", "'n'")])
def test_a_label_that_tells_no_images_apart_is_refused(label: str, why: str) -> None:
    found = problems(f"stage: multi\nmodel: {{lora: {{enable: true}}}}\nprompting: {{image_label: '{label}'}}\n")

    assert any("prompting.image_label" in text and why in text for text in map(str, found)), found


def test_guardrails_stand_where_their_monitor_is_on_and_only_in_stages_that_train_adapters(tmp_path: Path) -> None:
    """The stage's own by default, changed by name, others added; a resolved config says them all and loads back."""
    from beholder.config import GUARDRAILS
    from beholder.config.file import dump_config, parse_config
    from beholder.prepare.tiny import smoke_config

    base = """
run_name: x
model: {llm: {name_or_path: smollm2}, vision: {name_or_path: siglip}, lora: {enable: LORA}}
data: {json_path: a.jsonl, eval_size: 10}
"""
    watched = "eval: {ood: {path: set}, irrelevant: {path: set}, gap_samples: 8}\n"

    def read(text: str, lora: bool = True) -> RunConfig:
        return parse_config((base + text).replace("LORA", str(lora).lower()), "x.yaml")

    assert read("").guardrails == {} and read(watched, lora=False).guardrails == {}
    assert read(watched).guardrails == GUARDRAILS and read(watched).guards == GUARDRAILS
    own = (
        "guardrails: {hallucination: {rises: 0.3}, caption_sanity: {enable: false}, "
        "mine: {measure: ood.blind, above: 0.5}}\n"
        "gates: {sees: {measure: ood.blind, at_most: 0.2}}\n"
    )
    cfg = read(watched + own)
    assert cfg.guardrails["hallucination"].rises == 0.3 and cfg.guardrails["hallucination"].best_rises == 0.1
    assert list(cfg.guards) == ["irrelevant_pass", "hallucination", "generalisation_gap", "mine"]
    assert parse_config(dump_config(cfg), "again") == cfg
    named = read(watched + "guardrails: {hallucination: {}}\n", lora=False)
    assert named.guardrails == {"hallucination": GUARDRAILS["hallucination"]}
    small = smoke_config(cfg, tmp_path)
    assert small.guardrails == {} and small.eval.ood.path is None and "sees" not in small.gates


WATCHED_RUN = MINIMAL + "stage: instruct\neval: {ood: {path: set}, irrelevant: {path: set}, gap_samples: 8}\n"
ON = "model.lora.enable=true"


@pytest.mark.parametrize(("rule", "said"), [
    ("measure: ood.blind, above: 5", "above is 5, but ood.blind is a share"),
    ("measure: ood.blind, above: 1", "above is 1, but ood.blind is a share"),
    ("measure: sane.captions, below: -0.1", "below is -0.1, but sane.captions is a share"),
    ("measure: ood.blind, rises: 1.5", "rises is 1.5, but ood.blind is a share"),
    ("measure: sane.captions, falls: 1", "falls is 1, but sane.captions is a share"),
    ("measure: gap.generalisation, above: 0.2, below: 0.5", "above is 0.2 and below 0.5"),
])  # fmt: skip
def test_a_guardrail_that_never_stops_a_run_or_always_does_is_refused(rule: str, said: str) -> None:
    told = one(WATCHED_RUN + f"guardrails: {{mine: {{{rule}}}}}\n", ON)

    assert "guardrails.mine" in told and said in told


def test_a_guardrail_may_have_any_bound_on_what_is_no_share_and_a_band_on_a_share() -> None:
    rules = "a: {measure: gap.generalisation, above: 5, rises: 2}, b: {measure: ood.blind, above: 0.5, below: 0.2}"
    cfg = parse_config(WATCHED_RUN + f"guardrails: {{{rules}}}\n", overrides=[ON])

    assert {"a", "b"} <= set(cfg.guards)


@pytest.mark.parametrize(("value", "said"), [
    ("eval.strengths=[0.5,0.5]", "strengths is [0.5, 0.5], which has 0.5 twice"),
    ("model.lora.llm_layers=[1,1]", "llm_layers is [1, 1], which has 1 twice"),
    ("model.lora.vit_layers=[0,2,0]", "vit_layers is [0, 2, 0], which has 0 twice"),
    ("ablation.conditions=[zero,zero]", "conditions is ['zero', 'zero'], which has 'zero' twice"),
    ("eval.irrelevant.phrase='  '", "phrase '  ' is blank"),
    ("eval.irrelevant.phrase='\u3000'", "is blank"),
    ("eval.irrelevant.pattern=''", "pattern '' matches the empty text"),
    ("eval.irrelevant.pattern='(off)?'", "pattern '(off)?' matches the empty text"),
    ("eval.irrelevant.pattern=.", "pattern '.' matches ' '"),
    ("eval.ood.yes=''", "yes '' matches the empty text"),
    ("eval.irrelevant.pattern='a{99999999999}'", "is not a regular expression"),
    (f"eval.ood.yes='{'(' * 3000}{')' * 3000}'", "is not a regular expression: it is nested too deeply"),
])  # fmt: skip
def test_what_switches_a_monitor_off_in_effect_or_stands_twice_is_refused(value: str, said: str) -> None:
    told = one(WATCHED_RUN, ON, value)

    assert said in told and len(told) < 1000


def test_an_empty_list_of_layers_is_no_layer() -> None:
    on, empty = "model.lora.enable=true", "model.lora.llm_layers=[]"
    assert "choose no layer" in one(MINIMAL, on, empty)
    assert "choose no layer" in one(MINIMAL, on, empty, "model.lora.vit_layers=[]")
