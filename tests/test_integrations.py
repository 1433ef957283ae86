"""A run inside other people's programs. Those of lmms-eval need its package, which is not among ours:
``pip install lmms-eval``, or a folder of it in ``PYTHONPATH``."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.conftest import TinyParts
from tests.use.talking import untrained_run

from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError
from beholder.use import export as exporting

ENTRY = EntryPoint("beholder", "beholder.integrations.lmms_eval:manifest", "lmms_eval.models")


def test_the_entry_point_is_declared_and_naming_it_imports_nothing_heavy() -> None:
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared == {"lmms_eval.models": {"beholder": ENTRY.value}}

    code = (
        f"from importlib.metadata import EntryPoint as E; import sys; E('beholder', {ENTRY.value!r}, 'x').load(); "
        "print([m for m in ('torch', 'lmms_eval', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------------------
# lmms-eval


@pytest.fixture(scope="module")
def lmms_eval() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are its own
        return pytest.importorskip("lmms_eval.models", reason="lmms-eval is not installed")


@pytest.fixture(scope="module")
def run(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sets = {"stage": "multi", "prompting.max_images_per_sample": 3, "prompting.max_seq_len": 512}
    return untrained_run(tiny_parts, tmp_path_factory.mktemp("scored"), **sets)


@pytest.fixture(scope="module")
def docs() -> list[dict[str, Any]]:
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(6)]
    return [
        {"text": "What colour?", "images": pictures[:1]},
        {"text": "Is <image> as <image>?", "images": pictures[1:3]},
        {"text": "What is it?", "images": pictures[3:4]},
        {"text": "Say a word.", "images": []},
        {"text": "And these?", "images": pictures[3:6]},
    ]


@pytest.fixture(scope="module")
def models(lmms_eval: Any, run: Path, docs: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The simple and the chat class, as lmms-eval makes them."""
    lmms_eval.MODEL_REGISTRY_V2.register_manifest(ENTRY.load()(), overwrite=True)
    made = []
    for simple in (True, False):
        of = lmms_eval.get_model("beholder", force_simple=simple)
        assert of.is_simple is simple
        model = of.create_from_arg_string(
            f"pretrained={run}", {"batch_size": 2, "device": "cpu", "max_batch_size": None}
        )
        model.task_dict = {"task": {"test": docs}}
        made.append(model)
    return made[0], made[1]


def visuals(doc: dict[str, Any]) -> list[Image.Image]:
    return doc["images"]


def instance(kind: str, *arguments: Any) -> Any:
    from lmms_eval.api.instance import Instance

    place = {"task": "task", "doc_id": arguments[-3], "repeats": 1}
    return Instance(request_type=kind, arguments=arguments, idx=0, metadata=place)


def generating(docs: list[dict[str, Any]], **given: Any) -> list[Any]:
    return [
        instance("generate_until", doc["text"], dict(given), visuals, k, "task", "test") for k, doc in enumerate(docs)
    ]


def in_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    pieces = [{"type": "image", "url": image} for image in doc["images"]]
    return [{"role": "user", "content": [*pieces, {"type": "text", "text": doc["text"]}]}]


def test_answers_are_the_runs_own_whatever_the_batch(models: tuple[Any, Any], docs: list[dict[str, Any]]) -> None:
    simple, chat = models

    told = simple.generate_until(generating(docs, max_new_tokens=6, until=["\n\n"], num_beams=1, do_sample=False))
    plain = [0, 2, 3, 4]  # without marks of images in the text
    in_chat = chat.generate_until(
        [
            instance("generate_until", docs[k]["text"], in_messages, {"max_new_tokens": 6}, k, "task", "test")
            for k in plain
        ]
    )

    assert len(told) == 5 and [told[k] for k in plain] == in_chat
    for k in (0, 2, 4):
        assert told[k] == simple.vlm.chat(docs[k]["text"], docs[k]["images"], max_new_tokens=6)
    marked = [{"role": "user", "content": docs[1]["text"]}]
    assert told[1] == simple.vlm.chat(marked, docs[1]["images"], max_new_tokens=6)


def test_stops_length_and_drawing_are_followed(models: tuple[Any, Any], docs: list[dict[str, Any]]) -> None:
    simple, _ = models

    def told(**given: Any) -> str:
        return simple.generate_until(generating(docs[:1], **given))[0]

    def own(tokens: int) -> str:
        return simple.vlm.chat(docs[0]["text"], docs[0]["images"], max_new_tokens=tokens)

    long = told(max_new_tokens=12)
    assert long == own(12) and told(max_new_tokens=2) == own(2) != long
    drawn = told(max_new_tokens=12, temperature=2)
    assert drawn == told(max_new_tokens=12, temperature=2, do_sample=True) != long, "drawn, with a seed"
    assert told(max_new_tokens=12, temperature=2, do_sample=False) == long
    stop = long[len(long) // 2]
    assert told(max_new_tokens=12, until=stop) == told(max_new_tokens=12, until=["", stop]) != long
    assert told(max_new_tokens=12, until=[stop]) == long[: long.index(stop)].strip()


def test_a_likelihood_is_that_of_the_continuation_alone(models: tuple[Any, Any], docs: list[dict[str, Any]]) -> None:
    simple, _ = models
    targets = [" green", " blue", lambda doc: "red"]
    requests = [instance("loglikelihood", docs[0]["text"], t, visuals, 0, "task", "test") for t in targets]

    told = simple.loglikelihood(requests)

    vlm = simple.vlm
    for (nats, greedy), text in zip(told, ("green", "blue", "red"), strict=True):
        turns = (Turn("user", (ImageSlot(0), "\n", docs[0]["text"])), Turn("assistant", (text,)))
        encoded = vlm.encoder.encode(Example("x", (ImageRef("", "x"),), turns))
        with torch.no_grad():
            logits = exporting._logits(vlm, encoded, [vlm.see(docs[0]["images"][0])]).log_softmax(-1)
        ids, at = torch.from_numpy(encoded.ids), torch.from_numpy(encoded.supervise).nonzero()[:-1, 0]  # less the end
        assert nats == pytest.approx(-float(logits[at - 1, ids[at]].sum()), rel=1e-4)
        assert greedy == bool((logits[at - 1].argmax(-1) == ids[at]).all())


def test_rounds_go_on_until_the_task_ends_them(models: tuple[Any, Any], docs: list[dict[str, Any]]) -> None:
    heard: list[Any] = []

    def simple_round(doc: Any, *, previous_output: Any, round_idx: int, previous_round_info: Any) -> Any:
        heard.append((list(previous_output), round_idx, previous_round_info))
        return doc["images"], f"Then? {previous_output[-1]}", round_idx == 2, previous_output, round_idx

    def chat_round(doc: Any, round_idx: int | None = None, previous_output: Any = None, **_: Any) -> Any:
        if round_idx is None:
            return in_messages(doc)
        return in_messages(doc | {"text": f"Then? {previous_output[-1]}"}), round_idx == 2, previous_output, None

    simple, chat = models
    given = {"max_new_tokens": 4}
    told = simple.generate_until_multi_round(
        [instance("generate_until_multi_round", docs[0]["text"], given, visuals, simple_round, 0, "task", "test")]
    )
    in_chat = chat.generate_until_multi_round(
        [instance("generate_until_multi_round", docs[0]["text"], chat_round, given, 0, "task", "test")]
    )

    assert told == in_chat and len(told[0]) == 2
    assert [(k, info) for _, k, info in heard] == [(1, None), (2, 1)] and heard[1][0] == told[0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_beams": 4}, "num_beams is 4"), ({"until": [1]}, "until is"), ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"repetition_penalty": -1}, "repetition_penalty"), ({"temperature": -1}, "temperature"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_said(models: tuple[Any, Any], docs: list[dict[str, Any]], given: Any, says: str) -> None:
    with pytest.raises(UserError, match=says):
        models[0].generate_until(generating(docs[:1], **given))


def test_a_video_too_many_images_and_processes_are_said(
    models: tuple[Any, Any], docs: list[dict[str, Any]], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simple, chat = models
    asked = instance("generate_until", "x", {}, lambda doc: ["film.mp4"], 0, "task", "test")
    with pytest.raises(UserError, match=r"task test\[0\]: beholder takes images and text, the task has a str"):
        simple.generate_until([asked])
    many = instance("generate_until", "x", {}, lambda doc: docs[4]["images"] * 2, 0, "task", "test")
    with pytest.raises(UserError, match="6 images given, but the run was trained with at most 3"):
        simple.generate_until([many])
    message = {"role": "user", "content": [{"type": "video", "url": "f"}]}
    film = instance("generate_until", "x", lambda doc: [message], {}, 0, "task", "test")
    with pytest.raises(UserError, match="the task has video"):
        chat.generate_until([film])
    with pytest.raises(UserError, match="batch_size is 'auto'"):
        type(simple)(str(run), batch_size="auto", device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="answers in one process"):
        type(simple)(str(run))


TASK = """\
task: beholder_colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {records}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: 4, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: [{{version: 0.0}}]
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_its_evaluator_scores_a_run(
    models: tuple[Any, Any], run: Path, tiny_parts: TinyParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import orjson

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    pictures = sorted(tiny_parts.images.glob("*.png"))[:4]
    answers = [models[0].vlm.chat("What colour?", p, max_new_tokens=4) for p in pictures]
    answers[3] = "something else"
    rows = [{"path": str(p), "answer": a} for p, a in zip(pictures, answers, strict=True)]
    (tmp_path / "rows.jsonl").write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    (tmp_path / "utils.py").write_text(
        "from PIL import Image\n\ndef visuals(doc):\n    return [Image.open(doc['path'])]\n\n"
        "def question(doc, lmms_eval_specific_kwargs=None):\n    return 'What colour?'\n"
    )
    (tmp_path / "task.yaml").write_text(TASK.format(records=tmp_path / "rows.jsonl"))

    from lmms_eval import evaluator  # from here on PIL loads images that are cut off
    from lmms_eval.tasks import TaskManager

    told = evaluator.simple_evaluate(
        model="beholder", model_args=f"pretrained={run}", tasks=["beholder_colours"], batch_size=2, device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), force_simple=True,
    )  # fmt: skip

    assert told["results"]["beholder_colours"]["exact_match,none"] == 0.75
