"""A run as files of llama.cpp's: that llama.cpp computes the same, what is refused by name, and what is left behind.

llama.cpp comes with the binding xllamacpp (MIT, a wheel); without it the tests that ask it are skipped, and the export
says that nobody asked.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tests.conftest import TinyParts, make_config
from tests.data.test_chat_templates import sentencepiece
from tests.use.talking import untrained_run
from tests.use.test_export import BF16, LLAVA, listing
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from beholder.cli import app
from beholder.prepare.estimate import estimate
from beholder.prepare.tiny import CHATML, CONTROL, colour_source, tiny_llm, tiny_tokenizer, tiny_vision
from beholder.types import UserError
from beholder.use import export as exporting
from beholder.use.export import Exported, export, gguf_proof
from beholder.use.export import gguf as writing
from beholder.use.export.vocabulary import _PRE, pre_tokenizer, tokenizer_prevents

asks_llama = pytest.mark.skipif(
    importlib.util.find_spec(gguf_proof.BINDING) is None, reason="llama.cpp's binding is not installed"
)
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def make_run(tmp_path_factory: pytest.TempPathFactory) -> MakeRun:
    """A run of stage instruct on SigLIP that GGUF can express, from a folder of a language model or a family of one."""
    folder = tmp_path_factory.mktemp("parts")
    source = colour_source(folder / "data", "jsonl", 24, dialogues=True)
    assert source.image_root is not None
    records, images = Path(source.json_path), Path(source.image_root)
    towers: dict[str, str] = {}

    def make(llm: Any, vision: Any = "siglip", **sets: Any) -> Path:
        if vision not in towers:
            towers[vision] = tiny_vision(folder / vision, vision)[0]
        own = llm if isinstance(llm, Path) else tiny_llm(folder / llm, llm)
        parts = TinyParts(own, towers[vision], records, images)
        return untrained_run(parts, tmp_path_factory.mktemp("run"), **(LLAVA | sets))

    return make


@pytest.fixture(scope="module")
def run(make_run: MakeRun) -> Path:
    return make_run("qwen3")


def asked(told: Exported) -> None:
    """What every export says that llama.cpp was asked about."""
    assert told.compared_by.startswith("llama.cpp (xllamacpp ") and told.samples == 4
    assert 0 < told.max_logit_difference <= told.allowed_difference
    assert sorted(told.files) == ["README.md", "mmproj.gguf", "model.gguf"] and len(told.answers) == 4


# ---------------------------------------------------------------------------------------------------------------
# What llama.cpp makes of it


@asks_llama
def test_llama_cpp_computes_what_the_run_computes(run: Path, tmp_path: Path) -> None:
    """By the command."""
    words = ["export", str(run), "--to", "gguf", "--out", str(tmp_path / "out"), "--json"]
    told = CliRunner().invoke(app, words)

    assert told.exit_code == 0, told.output
    made = Exported(**json.loads(told.output))
    asked(made)
    assert made.stored == "f32" and made.exported_class == "qwen3 and janus_pro"
    assert made.allowed_difference < 0.03, "in f32 only GELU is rounded"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: llama.cpp\n" in card and f"by {made.compared_by}, and asked 4 held-out samples" in card
    for file in made.files:
        assert str(run.parent).encode() not in (tmp_path / "out" / file).read_bytes()


def other_llm(folder: Path, kind: str) -> Path:
    """A tiny language model of a class that `tiny_llm` has not, or with other rotary positions."""
    import torch
    import transformers

    if kind == "llama3":
        rope = {
            "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
        return tiny_llm(folder, "llama", rope_parameters=rope)
    tokenizer = tiny_tokenizer(folder, "qwen3")
    settings: dict[str, Any] = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.12,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "Mistral":
        settings |= {"sliding_window": None, "head_dim": 32}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith(".bias"):
                bias.normal_(0, 0.3)
    model.save_pretrained(folder)
    return folder


EYES = {"model.lora.vit_layers": "last-1", "model.vision.feature_layer": -1}


@asks_llama
@pytest.mark.slow
@pytest.mark.parametrize(
    ("llm", "sets", "dtype"),
    [
        ("llama", {}, "f32"), ("llama", {}, "f16"), ("llama", {}, "bf16"), ("llama3", {}, "f32"),
        ("smollm2", BF16, None), ("smollm2", BF16, "f32"), ("Mistral", {}, "f32"), ("Qwen2", {}, "f32"),
        ("qwen3", EYES, "f32"), ("qwen3", EYES | BF16, None), ("qwen3", EYES | BF16, "f32"),
        ("qwen3", {"model.connector.projector.hidden": 40}, "f32"),
        ("llama", {"prompting.template": "conversation"}, "f32"),
    ],
)  # fmt: skip
def test_every_class_and_precision_computes_the_same(
    make_run: MakeRun, tmp_path: Path, llm: str, sets: Any, dtype: Any
) -> None:
    own = other_llm(tmp_path / "llm", llm) if llm in ("llama3", "Mistral", "Qwen2") else llm

    told = export(make_run(own, **sets), tmp_path / "out", to="gguf", dtype=dtype)

    asked(told)
    assert told.stored == (dtype or "bf16")
    if told.stored == "f32":
        # worst seen 0.011 (Mistral); CLIP's class token in place of a patch is 2 nats off
        assert told.max_logit_difference < 0.02


@asks_llama
@pytest.mark.slow
def test_a_captioning_run_describes_in_llama_cpp_without_being_asked(make_run: MakeRun, tmp_path: Path) -> None:
    source = colour_source(tmp_path / "captions", "jsonl", 12)
    run = make_run("llama", **{
        "stage": "align", "model.lora": {"enable": False}, "data.json_path": source.json_path,
        "data.image_root": source.image_root, "data.eval_size": 4,
    })  # fmt: skip

    asked(export(run, tmp_path / "out", to="gguf"))


def byte_level(folder: Path, name: str) -> Any:
    """A small BPE tokenizer that cuts text into words as ``name`` does, with merges learned from this file."""
    from tokenizers import Tokenizer, decoders, models, trainers
    from transformers import PreTrainedTokenizerFast

    steps, whole = _PRE[name]
    inner = Tokenizer(models.BPE(ignore_merges=whole))
    told = json.loads(inner.to_str())
    steps = [s | {"trim_offsets": True} if s["type"] == "ByteLevel" else s for s in steps]
    told["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    inner = Tokenizer.from_str(json.dumps(told))
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=sorted(alphabet), special_tokens=list(CONTROL), show_progress=False
    )
    inner.train([__file__], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL),
    )  # fmt: skip
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(str(folder))
    return tokenizer


TEXTS = [
    "12345 things, 7 of them I'VE seen; they'll say \"no\"!\n\n\n  Then   spaces\t\ttabs \r\n",
    "ünïcödé 無関係图片 🚀👩‍🚀 1½²",
    "def f(x):\n    return x**2  # code_with_names\n\n", "<|im_start|>user\nhello<|im_end|>", " leading and trailing ",
]  # fmt: skip
TOKENIZE = """
import json, sys, urllib.request
sys.path.append(sys.argv[1])
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_gpu_layers, params.n_ctx, params.warmup = sys.argv[2], 0, 64, False
server = xllamacpp.Server(params)
ids = []
for text in json.loads(sys.argv[3]):
    body = json.dumps({"content": text, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    ids.append(json.load(opener.open(request))["tokens"])
print(json.dumps(ids))
"""


@asks_llama
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_PRE))
def test_llama_cpp_reads_text_as_the_tokenizer_does(make_run: MakeRun, tmp_path: Path, name: str) -> None:
    llm = tiny_llm(tmp_path / "llm", "llama", vocab_size=640)
    tokenizer = byte_level(llm, name)
    assert pre_tokenizer(tokenizer) == name
    brackets = {"prompting.im_start": "<|im_start|>", "prompting.im_end": "<|im_end|>"}

    export(make_run(llm, **brackets), tmp_path / "out", to="gguf")

    where = gguf_proof.binding()
    words = [sys.executable, "-I", "-c", TOKENIZE, str(where), str(tmp_path / "out" / "model.gguf"), json.dumps(TEXTS)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    assert theirs == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


# ---------------------------------------------------------------------------------------------------------------
# Read again


def test_without_the_binding_every_tensor_and_key_is_read_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_proof, "BINDING", "no_such_binding")
    told = export(run, tmp_path / "out", to="gguf", dtype="bf16")

    assert told.compared_by == "" and told.samples == 0 and told.answers == []
    model, eyes = (gguf.GGUFReader(tmp_path / "out" / f"{name}.gguf") for name in ("model", "mmproj"))
    # the reader names the header's version and two counts as fields too
    keys_written = len(model.fields) + len(eyes.fields) - 2 * 3
    assert told.read_again == (len(model.tensors) + len(eyes.tensors), keys_written)
    keys = {k: f.contents() for k, f in (model.fields | eyes.fields).items()}
    assert keys["tokenizer.ggml.pre"] == "gpt-2" and keys["clip.projector_type"] == "janus_pro"
    assert keys["clip.vision.block_count"] == 1, "feature_layer -2 of two layers has been through one"
    assert len(keys["tokenizer.ggml.tokens"]) == 320 and keys["tokenizer.ggml.tokens"][319] == "[PAD319]"
    kinds = {t.name: t.tensor_type.name for t in [*model.tensors, *eyes.tensors]}
    assert kinds["blk.0.attn_q.weight"] == kinds["mm.0.weight"] == "BF16"
    assert kinds["output_norm.weight"] == kinds["v.patch_embd.weight"] == kinds["v.position_embd.weight"] == "F32"


def test_a_byte_that_the_disk_turned_leaves_nothing_behind(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = writing.write_gguf

    def turned(given: Any, model: Any, folder: Path, stored: Any) -> Any:
        meant = true(given, model, folder, stored)
        with (folder / "mmproj.gguf").open("r+b") as file:
            file.seek(-200, 2)
            byte = file.read(1)
            file.seek(-200, 2)
            file.write(bytes([byte[0] ^ 1]))
        return meant

    monkeypatch.setattr(exporting, "write_gguf", turned)
    with pytest.raises(UserError, match=r"mmproj.gguf: the tensor \S+ is another one on the disk, so nothing was kept"):
        export(run, tmp_path / "out", to="gguf")

    assert listing(tmp_path) == []


@asks_llama
def test_a_planted_difference_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = writing.connector_state

    def planted(model: Any) -> dict[str, Any]:
        state = true(model)
        return state | {"projector.fc2.bias": state["projector.fc2.bias"] + 0.05}

    monkeypatch.setattr(writing, "connector_state", planted)
    with pytest.raises(UserError, match=r"what llama.cpp reads differ from the run's by .* nats .*nothing was kept"):
        export(run, tmp_path / "out", to="gguf", samples=1)

    assert listing(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------
# What is refused, and said beforehand


@pytest.mark.parametrize(
    ("vision", "sets", "expected"),
    [
        ("siglip", LLAVA, "yes"),
        ("siglip", LLAVA | {"model.vision.feature_layer": -1}, "yes"),
        ("siglip", {}, "no, because model.connector.resampler.kind is perceiver"),
        ("siglip", LLAVA | {"model.connector.output_norm": "rms"}, "no, because model.connector.output_norm is rms"),
        ("siglip", LLAVA | {"model.connector.vision_ln": True}, "no, because model.connector.vision_ln is true"),
        ("siglip", LLAVA | {"model.connector.projector.kind": "linear"}, "no, because model.connector.projector.kind"),
        ("clip", LLAVA, "no, because model.vision.name_or_path is a CLIPVisionModel, of which .*#25814"),
        ("dinov2", LLAVA, "no, because model.vision.name_or_path is a Dinov2Model"),
    ],
)  # fmt: skip
def test_plan_says_whether_a_run_exports_to_gguf(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, vision: Any, sets: Any, expected: str
) -> None:
    source = colour_source(tmp_path / "data", "jsonl", 8)
    assert source.image_root is not None
    parts = TinyParts(
        tiny_llm(tmp_path / "llm", "llama"), tiny_vision(tmp_path / vision, vision)[0], Path(source.json_path),
        Path(source.image_root),
    )  # fmt: skip
    told = estimate(make_config(parts, tmp_path, **sets), measure=False).exports_to_gguf

    assert told is not None
    assert re.match(expected, told), told


def test_what_gguf_has_not_is_refused_by_name(make_run: MakeRun, run: Path, tmp_path: Path) -> None:
    for sets, says in (
        ({"to": "gguf", "adapter": True}, "--to gguf merges adapters"),
        ({"to": "gguf", "max_shard_size": "1GB"}, "--to gguf writes one file of each part"),
        ({"dtype": "f16"}, "--dtype says how --to gguf keeps matrices"),
    ):
        with pytest.raises(UserError, match=says):
            export(run, tmp_path / "out", **sets)
    with pytest.raises(
        UserError, match=r"cannot be exported to GGUF: model\.vision\.name_or_path is a CLIPVisionModel"
    ):
        export(make_run("llama", "clip"), tmp_path / "out", to="gguf")

    assert listing(tmp_path) == []


def test_tokenizers_that_llama_cpp_would_read_otherwise_are_named(tmp_path: Path) -> None:
    pieces = sentencepiece("mistral", list(CONTROL), "<s>", "</s>")
    words = byte_level(tmp_path, "smollm")
    assert tokenizer_prevents(words) == ""
    words.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()

    assert "SentencePiece's BPE, not byte-level BPE" in tokenizer_prevents(pieces)
    assert "cuts text into words by [{" in tokenizer_prevents(words)
    with pytest.raises(UserError, match="the run cannot be exported to GGUF: the tokenizer cuts text"):
        pre_tokenizer(words)


def test_text_that_reads_otherwise_beside_an_image_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    """``]`` and a line's end are one token to a Llama 3, but the run was trained on two."""
    llm = tiny_llm(tmp_path / "llm", "llama", vocab_size=640)
    tokenizer = byte_level(llm, "llama-bpe")
    assert len(tokenizer("]\n")["input_ids"]) == 1, "this file has many"

    with pytest.raises(UserError, match=r"gives other ids than in training.*prompting\.im_start"):
        export(make_run(llm), tmp_path / "out", to="gguf")

    assert listing(tmp_path) == ["llm"]


def test_numbers_that_f16_cannot_hold_are_named(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = writing.connector_state
    monkeypatch.setattr(
        writing, "connector_state", lambda m: {k: 1e6 * t if t.dim() == 2 else t for k, t in true(m).items()}
    )
    with pytest.raises(UserError, match=r"mm\.\d\.weight has numbers that f16 cannot hold"):
        export(run, tmp_path / "out", to="gguf", dtype="f16")

    assert listing(tmp_path) == []
