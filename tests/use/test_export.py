"""A run as a Hugging Face folder: which class it becomes, that it computes the same without Beholder, and what is left
behind when it does not."""

from __future__ import annotations

import ast
import copy
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from tests.conftest import TinyParts, make_config
from tests.data.test_chat_templates import sentencepiece
from tests.use.talking import untrained_run
from transformers import (
    AddedToken,
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from typer.testing import CliRunner

from beholder.cli import app
from beholder.config import ConnectorConfig, VisionConfig
from beholder.config.file import dump_config, parse_config
from beholder.data.chat import ChatEncoder
from beholder.data.images import ImagePipeline, decode
from beholder.model.adapters import adapter_tensors, load_adapter_tensors
from beholder.model.build import build_vlm
from beholder.model.standard import export_class, keeps_positions
from beholder.prepare.estimate import estimate
from beholder.prepare.tiny import (
    CHATML,
    LlmFamily,
    VisionFamily,
    colour_source,
    tiny_llm,
    tiny_native,
    tiny_tokenizer,
    tiny_vision,
)
from beholder.train import checkpoint
from beholder.types import Example, ImageGeometry, ImageRef, ImageSlot, Turn, UserError
from beholder.use import export as exporting
from beholder.use.export import Exported, export, hf, proof
from beholder.use.exported import CODE
from beholder.use.exported.processing_beholder import BeholderImageProcessor, BeholderProcessor, filled_up
from beholder.use.vlm import load

MakeRun = Callable[..., Path]
LLAVA = {
    "model.connector.resampler.kind": "none", "model.connector.output_norm": "none",
    "model.connector.num_visual_tokens": None, "model.vision.feature_layer": -2,
}  # fmt: skip
IDEFICS3 = {
    "model.connector.resampler.kind": "pixel_shuffle", "model.connector.num_visual_tokens": None,
    "model.connector.projector.kind": "linear", "model.connector.projector.bias": False,
    "model.connector.output_norm": "none",
}  # fmt: skip
BF16 = {"model.llm.precision": "bf16", "model.vision.precision": "bf16", "train.precision": "bf16"}
STUDENT = {"like": "llama", "hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[LlmFamily, VisionFamily], tuple[TinyParts, Any]]:
    folder = tmp_path_factory.mktemp("parts")
    source = colour_source(folder / "data", "jsonl", 24, dialogues=True)
    assert source.image_root is not None
    records, images = Path(source.json_path), Path(source.image_root)
    made: dict[str, Any] = {}

    def make(llm: LlmFamily, vision: VisionFamily) -> tuple[TinyParts, Any]:
        if llm not in made:
            made[llm] = tiny_llm(folder / llm, llm)
        if vision not in made:
            made[vision] = tiny_vision(folder / vision, vision)
        name, weights = made[vision]
        return TinyParts(made[llm], name, records, images), weights

    return make


@pytest.fixture(scope="module")
def make_run(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    def make(llm: LlmFamily, vision: VisionFamily, **sets: Any) -> Path:
        tiny, weights = parts(llm, vision)
        more = {} if weights is None else {"model.vision.weights": weights}
        return untrained_run(tiny, tmp_path_factory.mktemp("run"), **(more | sets))

    return make


def listing(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def same(told: Exported, name: str) -> None:
    assert told.exported_class == name and told.samples == 4
    assert told.max_logit_difference == 0, "the same sums in the same order"
    card = (Path(told.folder) / "README.md").read_text()
    assert f"class `{name}`" in card and "has not been evaluated" in card


# ---------------------------------------------------------------------------------------------------------------
# Each class


@pytest.mark.parametrize(
    ("llm", "vision", "adapter"),
    [("llama", "clip", False), pytest.param("qwen3", "siglip", True, marks=pytest.mark.slow)],
)
def test_a_plain_mlp_on_clip_or_siglip_is_llava_without_code_of_ours(
    make_run: MakeRun, tmp_path: Path, llm: LlmFamily, vision: VisionFamily, adapter: bool
) -> None:
    told = export(make_run(llm, vision, **LLAVA), tmp_path / "out", adapter=adapter)

    same(told, "LlavaForConditionalGeneration")
    assert told.prevents == "" and "modeling_beholder.py" not in told.files
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings["vision_feature_layer"] == -2 and "auto_map" not in settings
    assert settings["vision_feature_select_strategy"] == ("default" if vision == "clip" else "full")
    if adapter:
        kept = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
        assert kept and all(k.startswith("base_model.model.model.language_model.layers.") for k in kept)


@pytest.fixture(scope="module")
def default(make_run: MakeRun) -> Path:
    return make_run("qwen3", "siglip")


@pytest.fixture(scope="module")
def exported(default: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Exported]:
    """By the command."""
    out = tmp_path_factory.mktemp("exported") / "out"
    words = ["export", str(default), "--to", "hf", "--shard", "200KB", "--out", str(out), "--json"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    return out, Exported(**json.loads(told.output))


def test_the_default_connector_brings_one_modelling_file(exported: tuple[Path, Exported], parts: Any) -> None:
    out, told = exported

    same(told, "BeholderForConditionalGeneration")
    assert told.prevents.startswith("model.connector.resampler.kind is perceiver")
    assert "modeling_beholder.py" in told.files
    assert {Path(f).suffix for f in told.files} == {".json", ".jinja", ".py", ".safetensors", ".md"}, (
        "nothing is a pickle"
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    tiny, _ = parts("qwen3", "siglip")
    for path in out.iterdir():
        data = path.read_bytes()
        assert str(tiny.llm.parent).encode() not in data and str(Path.home()).encode() + b"/" not in data, path
        assert b"import beholder" not in data and b"from beholder" not in data, path
    assert sorted(told.files) == sorted(p.name for p in out.iterdir()) and len(told.answers) == 4


def test_what_the_card_says_answers_without_beholder_as_the_run_chats(
    default: Path, exported: tuple[Path, Exported], parts: Any
) -> None:
    tiny, _ = parts("qwen3", "siglip")
    image = sorted(tiny.images.glob("*.png"))[3]
    card = (exported[0] / "README.md").read_text()
    block = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace("picture.png", str(image))
    code = f'import sys\nsys.modules["beholder"] = None\n{block}'
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=exported[0])

    assert done.returncode == 0, done.stderr[-2000:]
    own = load(default, device="cpu").chat("What colour is it?", image, max_new_tokens=32)
    assert ast.literal_eval(done.stdout.splitlines()[-1])[0]["generated_text"].strip() == own


@pytest.mark.slow
def test_a_student_in_16_bits_is_exported_with_what_it_is(
    make_run: MakeRun, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    words = tmp_path_factory.mktemp("words")
    tiny_tokenizer(words, "smollm2")
    run = make_run("qwen3", "siglip", **BF16, **{
        "model.llm.name_or_path": str(words), "model.student": STUDENT, "model.lora": {"enable": False},
        "train.lr.language": 1e-3,
    })  # fmt: skip

    same(export(run, tmp_path / "out"), "BeholderForConditionalGeneration")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize(
    ("llm", "vision", "name", "sets"),
    [
        ("smollm2", "clip", "VipLlava", LLAVA | {"model.connector.vision_ln": True}),
        ("llama", "clip", "Llava", LLAVA | BF16),
        ("llama", "clip", "Llava", LLAVA | {"model.vision.feature_layer": -1, "model.lora.vit_layers": "last-1"}),
        ("llama", "clip", "Llava", LLAVA | BF16 | {
            "model.vision.feature_layer": -1, "model.vision.unfreeze": ["last-1"], "train.lr.vision": 1e-4,
        }),
        ("qwen3", "siglip", "Idefics3", IDEFICS3 | {"model.lora.vit_layers": "last-1"}),
        ("smollm2", "siglip", "Idefics3", IDEFICS3 | BF16 | {"model.connector.resampler.kind": "none"}),
        ("llama", "siglip", "Beholder", IDEFICS3 | {"model.connector.output_norm": "rms"}),
        ("qwen3", "siglip", "Beholder", BF16),
        ("llama", "siglip", "Beholder", {"prompting.template": "conversation", "model.connector.vision_ln": True}),
        ("smollm2", "repvit", "Beholder", {"model.connector.resampler.kind": "grid"}),
        ("llama", "dinov2", "Beholder", {
            "model.connector.resampler.kind": "pixel_shuffle", "model.connector.num_visual_tokens": None,
            "model.connector.projector.kind": "linear",
        }),
        ("llama", "dinov2", "Beholder", {
            "model.connector.resampler.kind": "mean_pool", "model.connector.num_visual_tokens": None,
        }),
    ],
)  # fmt: skip
def test_every_connector_and_tower_computes_the_same(
    make_run: MakeRun, tmp_path: Path, llm: LlmFamily, vision: VisionFamily, name: str, sets: Any, adapter: bool
) -> None:
    told = export(make_run(llm, vision, **sets), tmp_path / "out", adapter=adapter)

    same(told, f"{name}ForConditionalGeneration")


@pytest.mark.slow
def test_idefics3_takes_texts_with_any_number_of_images_at_once(make_run: MakeRun, parts: Any, tmp_path: Path) -> None:
    same(export(make_run("llama", "siglip", **IDEFICS3), tmp_path / "out"), "Idefics3ForConditionalGeneration")
    out = str(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(out, trust_remote_code=True)
    tiny, _ = parts("llama", "siglip")
    images = [str(p) for p in sorted(tiny.images.glob("*.png"))[:3]]
    texts, given = ["<image>\nred?", "<image><image>\nblue?", "no picture"], [images[:1], images[1:], []]

    def encoded(text: Any, images: Any) -> Any:
        return processor(text=text, images=images, return_tensors="pt")

    together = encoded(texts, images)
    assert together["pixel_values"].shape[:2] == (3, 2)
    with torch.inference_mode():
        rows = model(**together).logits[:, -1]
        for row, text, own in zip(rows, texts, given, strict=True):
            alone = model(**encoded([text], own or None)).logits[0, -1]
            assert torch.allclose(row, alone, atol=1e-4), "fp32, padded on the left"


@pytest.mark.slow
@pytest.mark.parametrize("sets", [{}, {"prompting.template": "conversation"}])
def test_a_captioning_run_describes_without_being_asked(make_run: MakeRun, tmp_path: Path, sets: Any) -> None:
    source = colour_source(tmp_path / "captions", "jsonl", 12)
    run = make_run("llama", "siglip", **sets, **{
        "stage": "align", "model.lora": {"enable": False}, "data.json_path": source.json_path,
        "data.image_root": source.image_root, "data.eval_size": 4,
    })  # fmt: skip

    same(export(run, tmp_path / "out"), "BeholderForConditionalGeneration")


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl", "idefics3", "gemma3"])
def test_a_native_run_stays_of_its_class(parts: Any, tmp_path: Path, family: Any, adapter: bool) -> None:
    tiny, _ = parts("llama", "clip")
    raw = {
        "run_name": "native", "output_dir": str(tmp_path / "run"), "device": "cpu", "stage": "instruct",
        "model": {
            "native": {"name_or_path": str(tiny_native(tmp_path / "native", family)), "precision": "fp32"},
            "lora": {"enable": True, "r": 4},
        },
        "data": {"json_path": str(tiny.records), "image_root": str(tiny.images), "eval_size": 8},
        "train": {"train_steps": 4, "micro_batch_size": 4, "precision": "fp32"},
    }  # fmt: skip
    cfg = parse_config(yaml.safe_dump(raw), "native", [])
    run = Path(cfg.run_dir)
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(dump_config(cfg))
    model, _ = build_vlm(cfg.model, compute_precision="fp32", device=torch.device("cpu"), seed=0)
    draw = torch.Generator().manual_seed(1)
    for part in (p for p in model.parts().values() if p.adapters):
        noise = {k: 0.1 * torch.randn(t.shape, generator=draw) for k, t in adapter_tensors(part).items()}
        load_adapter_tensors(part, noise)
    checkpoint.save_checkpoint(
        run / "checkpoints", 1, model.trained_state(), optimizer_state={},
        trainer={"config": cfg.model_dump(mode="json")}, keep=3,
    )  # fmt: skip

    told = export(run, tmp_path / "out", adapter=adapter)

    assert told.max_logit_difference == 0 and told.exported_class.endswith("ForConditionalGeneration")
    assert told.exported_class != "BeholderForConditionalGeneration"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Vision-language model: **native**" in card and "trust_remote_code" not in card


# ---------------------------------------------------------------------------------------------------------------
# What is refused


def test_a_planted_difference_leaves_nothing_behind(
    default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = hf.connector_state

    def planted(model: Any) -> dict[str, torch.Tensor]:
        state = true(model)
        return state | {"projector.fc2.bias": state["projector.fc2.bias"] + 1e-3}

    monkeypatch.setattr(hf, "connector_state", planted)
    with pytest.raises(UserError, match=r"the logits of what was exported differ from the run's by .*nothing was kept"):
        export(default, tmp_path / "out", samples=1)

    assert listing(tmp_path) == []


def test_a_folder_that_needs_beholder_leaves_nothing_behind(
    default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    for file in CODE.glob("*.py"):
        (code / file.name).write_text(file.read_text())
    with (code / "modeling_beholder.py").open("a") as file:
        file.write("\nimport beholder.types\n")
    monkeypatch.setattr(hf, "CODE", code)

    with pytest.raises(UserError, match="cannot be loaded in a process of its own") as e:
        export(default, tmp_path / "out", samples=1)

    assert "beholder" in str(e.value)
    assert listing(tmp_path) == ["code"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_that_is_stopped_leaves_nothing_behind(
    default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, number: int
) -> None:
    """Neither its folders nor the process that asks it."""
    code = tmp_path / "code"
    shutil.copytree(CODE, code)
    stop = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    stop += f"os.kill({os.getpid()}, {int(number)}); time.sleep(60)\n"
    (code / "fresh_check.py").write_text(stop)
    monkeypatch.setattr(proof, "CODE", code)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))  # nohup ignores SIGHUP

    with pytest.raises(SystemExit):
        export(default, tmp_path / "new" / "below" / "out", samples=1)

    assert listing(tmp_path) == ["code", "pid", "scratch"] and listing(tmp_path / "scratch") == []
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_odd_places(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to an empty folder is followed; what cannot be written is told before the work is done."""
    monkeypatch.setattr(exporting, "prove", lambda *given, **more: (0.0, ["x"]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export(default, tmp_path / "link", samples=1)
    export(default, tmp_path / "with blänks\nand a line", samples=1)
    export(default, tmp_path / ("ü" * 120), samples=1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").is_file()
    assert (tmp_path / "with blänks\nand a line" / "config.json").is_file()

    for place, says in (("n" * 300, "cannot write"), ("link/config.json/out", "cannot write"), ("empty", "not empty")):
        with pytest.raises(UserError, match=says):
            export(default, tmp_path / place, samples=1)
    monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(tmp_path / "disk"))
    with pytest.raises(UserError, match="where a disk is mounted"):
        export(default, tmp_path / "disk", samples=1)


def test_a_full_disk_is_told(default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> None:  # as safetensors says it
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(exporting, "write", full)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device; .* MB are free"):
        export(default, tmp_path / "out", samples=1)

    assert listing(tmp_path) == []


def test_of_two_at_once_the_second_is_told_and_takes_nothing(
    default: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(*given: Any, **more: Any) -> tuple[float, list[str]]:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "config.json").write_text("the first's")
        return 0.0, ["x"]

    monkeypatch.setattr(exporting, "prove", meanwhile)
    with pytest.raises(UserError, match=r"cannot write .*out"):
        export(default, tmp_path / "out", samples=1)

    assert listing(tmp_path) == ["out"] and (tmp_path / "out" / "config.json").read_text() == "the first's"


def test_what_cannot_be_exported_is_said_before_anything_is_written(
    make_run: MakeRun, default: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="full is not empty; name a new folder"):
        export(default, full)
    with pytest.raises(UserError, match="samples is 0"):
        export(default, tmp_path / "out", samples=0)
    with pytest.raises(UserError, match="'huge', expected a size such as 500MB"):
        export(default, tmp_path / "out", max_shard_size="huge")
    bare = make_run("llama", "siglip", **{
        "stage": "align", "model.lora": {"enable": False}, "prompting.template": "conversation",
    })  # fmt: skip
    with pytest.raises(UserError, match="has no adapters"):
        export(bare, tmp_path / "out", adapter=True)

    assert listing(tmp_path) == ["full"] and listing(full) == ["mine.txt"]


# ---------------------------------------------------------------------------------------------------------------
# Said beforehand


@pytest.mark.parametrize(
    ("vision", "sets", "expected"),
    [
        ("clip", LLAVA, "LlavaForConditionalGeneration"),
        ("clip", LLAVA | {"model.vision.feature_layer": -1}, "LlavaForConditionalGeneration"),
        ("clip", LLAVA | {"model.connector.vision_ln": True}, "VipLlavaForConditionalGeneration"),
        ("clip", {}, "model.connector.resampler.kind is perceiver"),
        ("clip", LLAVA | {"model.connector.output_norm": "rms"}, "model.connector.output_norm is rms"),
        ("clip", LLAVA | {"model.connector.projector.kind": "linear"}, "model.connector.projector.kind is linear"),
        ("clip", LLAVA | {"model.connector.projector.hidden": 32}, "model.connector.projector.hidden is 32"),
        ("siglip", LLAVA | {"model.vision.feature_layer": -1}, "model.vision.feature_layer is -1"),
        ("siglip", LLAVA | {"model.connector.vision_ln": True}, "model.connector.vision_ln is true"),
        ("dinov2", LLAVA, "is a Dinov2Model"),
        ("siglip", IDEFICS3, "Idefics3ForConditionalGeneration"),
        ("siglip", IDEFICS3 | {"model.connector.resampler.kind": "none"}, "Idefics3ForConditionalGeneration"),
        ("siglip", IDEFICS3 | {"model.connector.projector.bias": True}, "model.connector.projector.bias is true"),
        ("siglip", IDEFICS3 | {"model.connector.output_norm": "rms"}, "model.connector.output_norm is rms"),
        ("siglip", IDEFICS3 | {"model.connector.vision_ln": True}, "model.connector.vision_ln is true"),
        ("siglip", IDEFICS3 | {"model.vision.feature_layer": -2}, "model.vision.feature_layer is -2"),
        ("siglip", IDEFICS3 | {"model.connector.resampler.kind": "grid"}, "model.connector.resampler.kind is grid"),
        ("siglip", IDEFICS3 | {
            "model.connector.projector.kind": "mlp", "model.connector.projector.bias": True,
        }, "model.connector.projector.kind is mlp; linear is Idefics3's"),
        ("clip", IDEFICS3, "is a CLIPVisionModel; Idefics3's tower is SigLIP's"),
    ],
)  # fmt: skip
def test_plan_says_as_what_a_run_exports(
    parts: Any, tmp_path: Path, vision: VisionFamily, sets: Any, expected: str
) -> None:
    tiny, _ = parts("llama", vision)
    told = estimate(make_config(tiny, tmp_path, **sets), measure=False).exports_as

    assert told is not None and expected in told
    assert told.startswith("Beholder") == (not expected.endswith("ForConditionalGeneration")), told


def test_idefics3_is_named_only_where_its_rounding_keeps_every_patch_in_its_place() -> None:
    assert all(map(keeps_positions, (1, 14, 16, 24, 26, 27, 32)))
    assert not any(map(keeps_positions, (25, 29, 31)))

    connector = ConnectorConfig.model_validate(
        {"resampler": {"kind": "pixel_shuffle"}, "projector": {"kind": "linear", "bias": False}, "output_norm": "none"}
    )
    vision = VisionConfig(name_or_path="tower")
    with torch.device("meta"):
        sizes: dict[str, Any] = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        language = LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))
        towers = {
            side: SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=8 * side, patch_size=8)) for side in (25, 26)
        }
    assert export_class(connector, vision, towers[26], language, 676).prevents == ""
    assert "has 25 x 25 patches; Idefics3 finds" in export_class(connector, vision, towers[25], language, 625).prevents


# ---------------------------------------------------------------------------------------------------------------
# Text


@pytest.mark.parametrize("kind", ["mistral", "legacy", "gemma"])
def test_text_after_an_image_goes_on_as_in_training(kind: str) -> None:
    control = ["<|im_start|>", "<|im_end|>"]
    tokenizer = sentencepiece(kind, control, "<s>", "</s>")
    tokenizer.chat_template = CHATML
    encoder = ChatEncoder(
        tokenizer, num_visual_tokens=2, max_seq_len=256, template="chat", instruction="", instruction_multi=""
    )
    parts = ("see ", ImageSlot(0), "the word", ImageSlot(1), " and ")
    asked = Example("a", tuple(ImageRef(root="", path=str(k)) for k in range(2)), (Turn("user", parts),))
    marked = copy.deepcopy(tokenizer)
    marked.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    processor = BeholderProcessor(
        BeholderImageProcessor(), marked, num_visual_tokens=2, before=encoder.im_start_ids, after=encoder.im_end_ids,
        goes_on=True,
    )  # fmt: skip
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "see <image>the word<image> and "}], tokenize=False, add_generation_prompt=True
    )

    encoded = encoder.encode_prompt(asked)

    ids = np.array(processor.encode(text))
    ids[ids == processor.image_token_id] = encoder.reserved_id
    assert ids.tolist() == encoded.ids.tolist()


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def odd_pictures() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    rgb = Image.fromarray(draw.integers(0, 256, (50, 70, 3), dtype=np.uint8))
    grey = draw.integers(0, 65536, (40, 30), dtype=np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    made: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "plain": (rgb, "PNG", {}), "turned": (rgb, "JPEG", {"exif": turned}), "grey": (rgb.convert("L"), "PNG", {}),
        "alpha": (rgb.convert("RGBA"), "PNG", {}), "palette": (rgb.convert("P"), "PNG", {"transparency": 3}),
        "16 bits": (Image.fromarray(grey), "PNG", {}), "cmyk": (rgb.convert("CMYK"), "JPEG", {}),
        "bits": (rgb.convert("1"), "TIFF", {}), "gif": (rgb.quantize(8), "GIF", {}),
    }  # fmt: skip
    made["alpha"][0].putalpha(Image.fromarray(draw.integers(0, 256, (50, 70), dtype=np.uint8)))
    out = {}
    for name, (image, kind, how) in made.items():
        file = io.BytesIO()
        image.save(file, kind, **how)
        out[name] = file.getvalue()
    return out


@pytest.mark.parametrize("name", sorted(odd_pictures()))
@pytest.mark.parametrize(("resize", "resize_to"), [("stretch", 0), ("shortest_edge", 36)])
def test_the_exported_processor_sees_the_same_pixels(name: str, resize: Any, resize_to: int) -> None:
    data = odd_pictures()[name]
    geometry = ImageGeometry(
        28, 32, 1, 1, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), resize=resize, resize_to=resize_to
    )
    theirs = BeholderImageProcessor(
        28, 32, resize, resize_to, image_mean=geometry.mean, image_std=geometry.std, max_megapixels=1
    )

    pixels = ImagePipeline(geometry, 1.0).from_pil(decode(data, name, 1.0))

    assert torch.equal(theirs.pixels(data), pixels)
    assert torch.equal(theirs.pixels(Image.open(io.BytesIO(data))), pixels)


def test_the_exported_processor_refuses_bombs_and_arrays() -> None:
    small = BeholderImageProcessor(max_megapixels=0.001)
    with pytest.raises(ValueError, match=r"the limit is 0\.001 megapixels"):
        small.pixels(odd_pictures()["plain"])
    with pytest.raises(ValueError, match="give encoded bytes, a path or a Pillow image"):
        small.pixels(np.zeros((3, 4, 4)))


def test_pictures_by_text_are_filled_up_and_none_is_taken_for_filling() -> None:
    pixels = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels[1] = 0

    rows = filled_up(pixels.clone(), [1, 0, 2])

    assert rows.shape == (3, 2, 3, 4, 4)
    assert torch.equal(rows[0, 0], pixels[0]) and torch.equal(rows[2, 1], pixels[2])
    real = (rows != 0).flatten(2).any(2)
    assert real.tolist() == [[True, False], [False, False], [True, True]]
    assert float(rows[2, 0].half().abs().sum()) == 2.0**-24, "also in 16 bits"
