"""Evidence by place of an image: an honest model passes its gates, whoever ignores a place or the order fails them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from tests.evidence.test_catalogue import strangers
from tests.stages.torchrun import on_two_processes
from typer.testing import CliRunner

from beholder.cli import app as cli
from beholder.config import RunConfig
from beholder.config.file import parse_config
from beholder.config.stages import SLOT_GATES
from beholder.data.collate import collate
from beholder.evidence import GateResult, load_evidence
from beholder.evidence.gates import judge
from beholder.model.fusion import scatter_images
from beholder.model.vlm import VisionLanguageModel
from beholder.prepare.tiny import tiny_llm, tiny_vision
from beholder.runs import RunDir
from beholder.stages import panel, run_stage
from beholder.stages.measured import Measured
from beholder.stages.remeasure import ablate_slots
from beholder.stages.session import Session, open_session
from beholder.train.distributed import joined
from beholder.types import Batch

COLOURS = {"red": (230, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 230), "white": (245, 245, 245)}
STEPS = 350


def write_records(folder: Path, split: str, groups: int, seed: int) -> Path:
    """Plain pictures in one of four colours, and questions that name a place or ask for one: for every place of the
    same two or three pictures."""
    rng, names = random.Random(seed), {}
    for colour, rgb in COLOURS.items():
        for j in range(8):
            picture = Image.new("RGB", (32, 32), rgb)
            picture.putpixel((j, 0 if split == "train" else 1), (0, 0, 0))
            names.setdefault(colour, []).append(f"{split}-{colour}{j}.png")
            picture.save(folder / names[colour][-1])
    lines = []
    for g in range(groups):
        shown = [rng.choice([*COLOURS]) for _ in range(2 + g % 2)]
        images = [rng.choice(names[c]) for c in shown]
        places = range(1, len(shown) + 1)
        asked = [(f"color in image {k}?", shown[k - 1]) for k in places]
        asked += [(f"which image is {shown[k - 1]}?", str(k)) for k in places if shown.count(shown[k - 1]) == 1]
        for k, (question, answer) in enumerate(asked):
            turns = [
                {"role": "user", "content": "<image>\n" * len(shown) + question},
                {"role": "assistant", "content": answer},
            ]
            lines.append({"id": f"{split}{g}-{k}", "images": images, "messages": turns})
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_config(folder: Path, train: int = 800, test: int = 60) -> RunConfig:
    base = {
        "run_name": "slots", "output_dir": str(folder / "run"), "device": "cpu", "stage": "multi",
        "model": {
            "llm": {"name_or_path": str(tiny_llm(folder / "llm")), "precision": "fp32"},
            "vision": {"name_or_path": tiny_vision(folder / "vision")[0], "precision": "fp32"},
            "connector": {"num_visual_tokens": 1, "resampler": {"depth": 1, "num_heads": 4}},
            "lora": {"enable": True, "r": 2},
        },
        "data": {
            name: [{"json_path": str(write_records(folder, split, groups, seed)), "image_root": str(folder)}]
            for name, split, groups, seed in (("sources", "train", train, 1), ("eval_sources", "test", test, 2))
        },
        "prompting": {"max_seq_len": 160},
        "features": {"dir": str(folder / "features")},
        "train": {"train_steps": 4, "micro_batch_size": 4, "precision": "fp32", "num_threads": 1},
        "eval": {"batch_size": 64, "answer_tokens": 8, "slot_samples": 120, "moved_samples": 160},
    }  # fmt: skip
    return parse_config(yaml.safe_dump(base), "slots", [])


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """A session whose model has learned, in every weight, to answer about any place."""
    folder = tmp_path_factory.mktemp("slots")
    cfg = make_config(folder)
    with joined("cpu") as dist, torch.random.fork_rng(), open_session(cfg, RunDir(cfg.run_dir), dist) as session:
        torch.manual_seed(0)
        session.fill_features(0, len(session.data.train))
        teach(session, STEPS)
        yield session


def teach(session: Session, steps: int) -> None:
    model, train = session.model, session.data.train
    builder = session.data.builder(session.store, train=True, cfg=session.cfg)
    samples = [builder.build(train.example_at(p)) for p in range(len(train))]
    layout = replace(session.data.layout, packing=False)
    learned = [p.requires_grad_(True) for p in (*model.connector.parameters(), *model.language.parameters())]
    optimizer = torch.optim.AdamW(learned, lr=3e-3, betas=(0.9, 0.98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    model.train()
    for step in range(steps):
        batch = collate([samples[(48 * step + k) % len(samples)] for k in range(48)], layout)
        loss = model(batch).nll.sum() / batch.num_targets
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        rate.step()
    model.train(False)


def measured(session: Session) -> tuple[Measured, dict[str, GateResult]]:
    m = Measured(0, session.eval_losses())
    panel.every_slot(session, m)
    return m, {g.name: g for g in judge(SLOT_GATES, m.measurements)}


Choose = Callable[[torch.Tensor], torch.Tensor]


def planted(choose: Choose) -> Callable[[VisionLanguageModel, Batch], torch.Tensor]:
    """An `embed` that shows the language model, in every place of a sample, what ``choose`` makes of its images."""

    def embed(self: VisionLanguageModel, batch: Batch) -> torch.Tensor:
        tokens = self.visual_tokens(batch.images)
        seen = tokens.clone()
        for sample in range(len(batch.ids)):
            own = batch.image_sample == sample
            seen[own] = choose(tokens[own])
        return scatter_images(self.language.embed(batch.input_ids), batch.image_positions, seen.flatten(0, 1))

    return embed


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_an_honest_model_passes_and_each_planted_liar_fails_its_gate(
    honest: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    m, gates = measured(honest)
    assert [g.name for g in gates.values() if not g.passed] == [], {n: g.value for n, g in gates.items()}
    assert not m.inapplicable
    value = {(x.name, x.stratum): x for x in m.measurements}
    assert value["slots.accuracy", "image 1 of 3"].n >= 20 and value["slots.follows", None].n >= 20
    for n in (2, 3):
        for k in range(1, n + 1):
            cell = f"image {k} of {n}"
            assert value["slots.right.correct", cell].value > value["slots.right.shuffled", cell].value
            # As much text costs what an absent picture costs: it is no longer sequence that did it.
            assert value["slots.delta.text", cell].value > 0.1

    monkeypatch.setattr(VisionLanguageModel, "embed", planted(lambda own: own[-1:].expand_as(own)))
    m, gates = measured(honest)
    failed = {name: g.stratum for name, g in gates.items() if not g.passed}
    assert failed.keys() >= {"every_slot_counts", "slot_spread", "no_last_image_bias"}
    assert failed["every_slot_counts"] != "image 3 of 3"
    value = {(x.name, x.stratum): x.value for x in m.measurements}
    assert value["slots.delta.shuffled", "image 1 of 3"] == pytest.approx(0, abs=1e-5)
    assert value["slots.delta.shuffled", "image 3 of 3"] > 0.1 and value["slots.last_bias", None] > 0.3

    # A bag of images has to learn to be one: then it needs every image, in every place alike.
    monkeypatch.setattr(VisionLanguageModel, "embed", planted(lambda own: own.mean(0, keepdim=True).expand_as(own)))
    teach(honest, 100)
    m, gates = measured(honest)
    assert not gates["follows_the_swap"].passed and not gates["minds_the_order"].passed
    assert gates["every_slot_counts"].passed
    follows = next(x for x in m.measurements if x.name == "slots.follows")
    assert follows.value < 0.5


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps on random parts."""
    cfg = make_config(tmp_path_factory.mktemp("untrained"), train=8, test=24)
    run_stage(cfg)
    return Path(cfg.run_dir)


def test_a_run_of_several_images_has_the_evidence_by_place_and_ablate_tells_the_same(untrained: Path) -> None:
    evidence = load_evidence(untrained)
    found = [m for m in evidence.measurements if m.name.startswith("slots.")]

    assert strangers(found) == []
    assert any("Starts from no earlier run" in gap and "stage instruct" in gap for gap in evidence.gaps)
    assert {g.name for g in evidence.gates} >= SLOT_GATES.keys() and "every_slot_counts" in {
        g.name for g in evidence.failed_gates
    }
    assert {m.stratum for m in found if m.by == "slot"} == {
        f"image {k} of {n}" for n in (2, 3) for k in range(1, n + 1)
    }
    answer = ablate_slots(str(untrained))
    # stored features and batches are the same ones
    assert [m.model_dump() for m in answer.measurements] == [m.model_dump() for m in found]
    out = io.StringIO()
    answer.print(Console(file=out, width=250))
    assert "slot: image 2 of 3" in out.getvalue() and "gate every_slot_counts FAILED" in out.getvalue()


def test_what_is_too_little_to_judge_is_said(untrained: Path) -> None:
    few = ablate_slots(str(untrained), num_samples=8, overrides=["eval.moved_samples=6"])
    none = ablate_slots(str(untrained), overrides=["eval.moved_samples=0", "eval.slot_samples=0"])

    told = " ".join(few.findings)
    assert "Places with too few samples to judge: image 1 of 2 (4)" in told
    # the data have enough of them, so a setting that takes fewer waives no gate
    assert told.count("raise eval.moved_samples (6)") == 3 and "not judged, of" not in told
    for gate in ("slot_spread", "no_last_image_bias", "minds_the_order", "follows_the_swap"):
        assert f"gate {gate} FAILED: {gate} ({SLOT_GATES[gate].measure}: not measured)" in told
    assert "no group has 20 samples" in told  # the gate on every place does not pass for want of samples
    assert not none.measurements
    told = " ".join(none.findings)
    assert "(eval.slot_samples is 0)" in told and "(eval.moved_samples is 0)" in told


def test_slots_and_words_are_two_questions(untrained: Path) -> None:
    done = CliRunner().invoke(cli, ["ablate", str(untrained), "--slots", "--words"])

    assert done.exit_code != 0 and "remove --words" in str(done.exception) + done.output


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_measure_places_as_one_does(untrained: Path) -> None:
    done = on_two_processes("ablate", untrained, "--slots", "--json")

    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads(done.stdout)
    alone = [m for m in load_evidence(untrained).measurements if m.name.startswith("slots.")]
    assert [(m["name"], m["stratum"], m["n"]) for m in shared["measurements"]] == [
        (m.name, m.stratum, m.n) for m in alone
    ]
    for m, own in zip(shared["measurements"], alone, strict=True):
        assert m["value"] == pytest.approx(own.value, rel=1e-4, abs=1e-4)
