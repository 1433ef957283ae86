"""Stage multi on records of 1 to 4 pictures: which one goes where, packed or not, one process or two, killed or not."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import TinyParts, make_config
from tests.stages.dying import dying_at
from tests.stages.torchrun import on_two_processes

from beholder.config import RunConfig
from beholder.config.file import dump_config, parse_config
from beholder.config.tree import ConfigError
from beholder.data import build_data
from beholder.data.collate import Layout
from beholder.evidence import load_evidence
from beholder.model.build import build_vlm
from beholder.prepare.tiny import colour_source
from beholder.runs import sha256_file
from beholder.stages import run_stage
from beholder.types import Batch, ImageInput, Status

MakeStage = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def stage(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> MakeStage:
    """``stage(folder, **sets)``: stage multi on Mantis-shaped parquet and JSON with one picture, mixed 3 to 1."""
    folder = tmp_path_factory.mktemp("several")
    several = colour_source(folder / "several", "parquet", 64, dialogues=True, most_images=4, seed=1)
    single = colour_source(folder / "single", "llava_instruct", 24, dialogues=True, seed=2)
    sources = [
        {
            "name": name,
            "json_path": s.json_path,
            "weight": weight,
            **({"image_root": s.image_root} if s.image_root else {}),
        }
        for name, s, weight in (("several", several, 3), ("single", single, 1))
    ]
    return functools.partial(make_config, tiny_parts, **{
        "stage": "multi", "model.lora.enable": True, "model.lora.r": 4, "model.lora.dropout": 0.0,
        "data.json_path": None, "data.image_root": None, "data.sources": sources, "data.eval_size": 12,
        "prompting.max_seq_len": 1024, "train.lr.lora": 1e-2, "eval.answer_tokens": 4, "eval.caption_samples": 2,
        "eval.golden_size": 0, "eval.audit_turns": 0, "ablation.num_samples": 4,
    })  # fmt: skip


def opened(cfg: RunConfig) -> tuple[Any, Any]:
    """(model whose adapters do something, data)."""
    model, tokenizer = build_vlm(cfg.model, compute_precision="fp32", device=torch.device("cpu"), seed=cfg.seed)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(5)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.05 * torch.randn(p.shape, generator=draw))
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("connector") or "lora_" in name)
    return model, build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens)


def test_the_kth_picture_of_a_record_fills_the_kth_place(stage: MakeStage, tmp_path: Path) -> None:
    """From the record's list over sequence, batch and features to the embeddings the language model is given (S3-1)."""
    model, data = opened(stage(tmp_path))
    examples = [data.train.example_at(p) for p in range(24)]
    assert {len(e.images) for e in examples} == {1, 2, 3, 4}
    builder = data.builder(None, train=False, cfg=stage(tmp_path))

    batch = builder.batch(examples, Layout(True, 1024, 8))

    embedded = model.embed(batch).flatten(0, 1)
    places = iter(batch.image_positions.split(batch.image_lengths.tolist()))
    for example, owner in zip(examples, range(len(examples)), strict=True):
        before = -1
        for ref in example.images:
            place = next(places)
            alone = model.visual_tokens([ImageInput(pixels=data.pipeline(ref))])[0]
            torch.testing.assert_close(embedded[place], alone, rtol=1e-5, atol=1e-6)
            assert int(place[0]) > before and (batch.sample_index.flatten()[place] == owner).all()
            before = int(place[-1])


def test_packing_changes_neither_losses_nor_gradients_with_one_to_four_pictures_a_sample(
    stage: MakeStage, tmp_path: Path
) -> None:
    cfg = stage(tmp_path)
    model, data = opened(cfg)
    examples = [data.train.example_at(p) for p in range(16)]
    assert {len(e.images) for e in examples} == {1, 2, 3, 4}
    builder = data.builder(None, train=False, cfg=cfg)

    def learned(packing: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], Batch]:
        model.zero_grad()
        batch = builder.batch(examples, Layout(packing, 1024, 8))
        losses = model(batch)
        losses.nll.sum().backward()
        by_sample = torch.stack([losses.nll[losses.sample == i].sum() for i in range(len(examples))])
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return by_sample.detach(), grads, batch

    padded, padded_grads, in_rows = learned(False)
    packed, packed_grads, shared = learned(True)

    assert shared.input_ids.shape[0] < in_rows.input_ids.shape[0] == len(examples)
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-5)
    assert packed_grads.keys() == padded_grads.keys() and any("lora_A" in n for n in packed_grads)
    for name, grad in padded_grads.items():  # fp32 sums in another order, relative to the gradient's size
        torch.testing.assert_close(packed_grads[name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()), msg=name)


def test_a_killed_run_of_a_weighted_mixture_resumes_bit_for_bit_and_tells_its_shares(
    stage: MakeStage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"model.lora.dropout": 0.1}
    run_stage(stage(tmp_path / "straight", **more))
    with dying_at(3):
        run_stage(stage(tmp_path / "killed", **more))
    capsys.readouterr()
    run_stage(stage(tmp_path / "killed", **more))

    straight, killed = (tmp_path / n / "run" for n in ("straight", "killed"))
    assert losses_of(straight) == losses_of(killed) and len(losses_of(killed)) == 4
    for name in ("connector.safetensors", "adapter_model.safetensors", "optimizer.safetensors"):
        assert sha256_file(straight / "checkpoints/step_4" / name) == sha256_file(killed / "checkpoints/step_4" / name)
    told = load_evidence(killed).summary["Mixture"]
    assert told == load_evidence(straight).summary["Mixture"] and f"[mixture] {told}" in capsys.readouterr().out
    _, data = opened(stage(tmp_path / "killed", **more))
    seen = [data.train.example_at(p).source for p in range(4 * 4)]
    single = sum(s == "single" for s in seen)
    assert 0 < single < 16
    assert f"several 75.0% asked, {1 - single / 16:.1%} seen ({16 - single})" in told
    assert f"single 25.0% asked, {single / 16:.1%} seen ({single})" in told


def test_records_with_too_many_pictures_or_other_markers_are_rejected_counted_and_named(
    stage: MakeStage, tiny_parts: TinyParts, tmp_path: Path
) -> None:
    names = sorted(p.name for p in tiny_parts.images.glob("*.png"))

    def record(images: int, markers: int) -> str:
        turns = [
            {"role": "user", "content": "<image>\n" * markers + "How many?"},
            {"role": "assistant", "content": "x"},
        ]
        shown = [names.pop() for _ in range(images)]  # every record has pictures of its own
        return json.dumps({"id": f"{images} for {markers}", "images": shown, "messages": turns})

    path = tmp_path / "records.jsonl"
    good = [record(k % 4 + 1, k % 4 + 1).replace("How many", f"How many, {k}") for k in range(12)]
    path.write_text("\n".join([*good, record(5, 5), record(3, 2), record(2, 3)]), encoding="utf-8")
    cfg = stage(tmp_path, **{
        "data.sources": [{"name": "made", "json_path": str(path), "image_root": str(tiny_parts.images), "weight": 1}],
        "data.eval_size": 4, "prompting.max_images_per_sample": 4,
    })  # fmt: skip

    _, data = opened(cfg)

    assert data.counts.rejects == {"too_many_images": 1, "image_count": 2}
    said = {r.id: r.detail for r in data.rejects}
    assert said["5 for 5"] == "line 13: 5 images, prompting.max_images_per_sample is 4"
    assert "3 images" in said["3 for 2"] and "2 images" in said["2 for 3"]


@pytest.mark.parametrize("weight", [0, -1, float("inf")])
def test_a_weight_that_is_no_share_is_refused_with_its_place(weight: float) -> None:
    text = f"""
run_name: x
stage: multi
model: {{llm: {{name_or_path: a/b}}, vision: {{name_or_path: c/d}}, lora: {{enable: true}}}}
data: {{sources: [{{json_path: a.json, weight: {str(weight).replace("inf", ".inf")}}}]}}
"""
    with pytest.raises(
        ConfigError, match=r"x\.yaml:5:\d+: data\.sources\.0\.weight: (got .*expected a number above 0|.inf is not a)"
    ):
        parse_config(text, "x.yaml")


def losses_of(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r["loss"]) for r in lines if "loss" in r]


def test_two_processes_learn_what_one_does(stage: MakeStage, tmp_path: Path) -> None:
    """Each takes half of every step, so how many pictures a process has differs from step to step."""
    run_stage(stage(tmp_path / "one"))
    config = tmp_path / "two.yaml"
    config.write_text(dump_config(stage(tmp_path / "two")), encoding="utf-8")
    done = on_two_processes("run", config)

    # torchrun makes 1 of every exit code, also of that for gates, which four steps do not pass
    assert (tmp_path / "two/run/evidence.json").is_file(), done.stderr[-4000:]
    assert load_evidence(tmp_path / "two/run").status == Status.SUCCEEDED
    one, two = (losses_of(tmp_path / n / "run") for n in ("one", "two"))
    assert [s for s, _ in one] == [s for s, _ in two] == [1, 2, 3, 4]
    # fp32 sums in another order, through four optimizer steps
    assert [x for _, x in two] == pytest.approx([x for _, x in one], rel=1e-4)
