"""The model card of an export: the hub takes its metadata, what failed comes first, nothing of this machine stands in
it, and what other people wrote stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from tests.conftest import TinyParts
from tests.report.conftest import gate, make_evidence, make_instruct_evidence, measurement
from tests.use.talking import untrained_run

from beholder.config import DistillConfig, StudentConfig
from beholder.evidence import DataFacts, Evidence, GuardrailStop
from beholder.train.trained import TrainedRun, open_trained
from beholder.types import Status, UserError
from beholder.use.export.card import as_transformers, evidence_of, hub_name, model_card

__all__ = ["make_evidence", "make_instruct_evidence"]

OWN = as_transformers(
    "BeholderForConditionalGeneration", "model.connector.resampler.kind is perceiver", native=False, adapters=True,
    beside=None, samples=4, difference=0.0,
)  # fmt: skip
Make = Callable[..., Evidence]


@pytest.fixture(scope="module")
def opened(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    return open_trained(untrained_run(tiny_parts, tmp_path_factory.mktemp("carded")), torch.device("cpu"))


def with_model(run: TrainedRun, **model: Any) -> TrainedRun:
    """The run with other names of its parts."""
    return replace(run, cfg=run.cfg.model_copy(update={"model": run.cfg.model.model_copy(update=model)}))


def named(run: TrainedRun, llm: str, vision: str, weights: str | None = None) -> TrainedRun:
    m = run.cfg.model
    return with_model(
        run, llm=m.llm.model_copy(update={"name_or_path": llm}),
        vision=m.vision.model_copy(update={"name_or_path": vision, "weights": weights}),
    )  # fmt: skip


def metadata(text: str) -> dict[str, Any]:
    """As the hub's own library reads it, its results checked."""
    read = ModelCard(text)
    block = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])  # type: ignore[index]
    assert read.data.to_dict() == block, "nothing is lost on the way through it"
    if "model-index" in block:
        assert model_index_to_eval_results(block["model-index"])[1] == ModelCardData(**block).eval_results
    return block


def heads(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("#")]


def html(text: str) -> str:
    """What a person would see, as GitHub and the hub render it."""
    return MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(ModelCard(text).text)


# ---------------------------------------------------------------------------------------------------------------
# Metadata


def test_the_hub_takes_the_metadata(opened: TrainedRun, make_instruct_evidence: Make) -> None:
    e = make_instruct_evidence(step=opened.step)
    told = metadata(model_card(named(opened, "Qwen/Qwen3-8B-Base", "google/siglip-so400m-patch14-384"), e, OWN))

    assert told["library_name"] == "transformers" and told["pipeline_tag"] == "image-text-to-text"
    assert told["base_model"] == ["Qwen/Qwen3-8B-Base", "google/siglip-so400m-patch14-384"]
    assert told["license"] == "other" and "language" not in told and told["tags"][-1] == "instruct"
    _, results = model_index_to_eval_results(told["model-index"])
    by_name = {r.metric_type: r.metric_value for r in results}
    right = e.get("answer.accuracy.correct")
    assert right is not None and by_name["accuracy"] == right.value and {"exact_match", "f1", "loss"} <= by_name.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 9}, {"step": 2, "adapter_strength": 0.5}, {"step": 2, "status": Status.CANCELLED},
        {"step": 2, "gates": [gate("looks_shuffled", -0.1, passed=False)]}, {"step": 2, "gates": []},
    ],
)  # fmt: skip
def test_only_what_passed_and_is_of_these_weights_is_a_result(
    opened: TrainedRun, make_evidence: Make, changes: dict[str, Any]
) -> None:
    assert opened.step == 2
    assert "model-index" in metadata(model_card(opened, make_evidence(step=2), OWN))
    assert "model-index" not in metadata(model_card(opened, make_evidence(**changes), OWN))


def test_a_place_is_no_base_model(opened: TrainedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "llm").mkdir(parents=True)
    run = named(opened, "data/llm", "timm/tf_efficientnet_lite0", str(tmp_path / "tower.safetensors"))

    text = model_card(run, None, OWN)

    assert "base_model" not in metadata(text)
    assert "data/llm" not in text and str(tmp_path) not in text and "**llm**" in text
    whole = metadata(model_card(named(opened, "data/llm", "timm/tf_efficientnet_lite0"), None, OWN))
    assert whole["base_model"] == ["timm/tf_efficientnet_lite0.in1k"], "timm's own weights have a name on the hub"


@pytest.mark.parametrize(
    ("name", "can_be"),
    [
        ("Qwen/Qwen3-8B", True), ("gpt2", True), ("models/a/b", False), ("/models/x", False), ("./x", False),
        ("~/x", False), ("a/b.gguf", False), ("a b/c", False), ("a/--b", False), ("../x", False),
    ],
)  # fmt: skip
def test_what_can_be_a_name_on_the_hub(name: str, can_be: bool) -> None:
    assert hub_name(name) == can_be


# ---------------------------------------------------------------------------------------------------------------
# Licences


def folder_of(place: Path, readme: str = "", terms: bool = False) -> str:
    place.mkdir()
    (place / "README.md").write_text(readme)
    if terms:
        (place / "LICENSE").write_text("terms")
    return str(place)


@pytest.mark.parametrize(
    ("llm", "vision", "whole", "says"),
    [
        ("---\nlicense: mit\n---\n", "---\nlicense: mit\n---\n", "mit", "| mit | the README of its folder |"),
        ("---\nlicense: mit\n---\n", "---\nlicense: apache-2.0\n---\n", "other", "| apache-2.0 |"),
        ("---\ntags: [x]\nlicense: other\nlicense_name: own-terms\n---\n", "", "other", "| own-terms |"),
        ("license: mit\n", "---\nlicense: mit\n---\n", "other", "| not known | nothing that came with it says |"),
        ("---\nlicense: [mit]\n---\n", "---\nlicense: *a\n---\n", "other", "| not known |"),
    ],
)  # fmt: skip
def test_a_licence_is_that_of_all_parts_or_other(
    opened: TrainedRun, tmp_path: Path, llm: str, vision: str, whole: str, says: str
) -> None:
    run = named(opened, folder_of(tmp_path / "llm", llm), folder_of(tmp_path / "vision", vision))

    text = model_card(run, None, OWN)

    assert metadata(text)["license"] == whole and says in text.replace("\\", "")
    assert ("| not known |" in text) == ("Not known: the licence of" in text)
    assert (whole == "other") == ("is given as `other`" in text)


def test_terms_and_a_gguf_files_own_word_are_named(opened: TrainedRun, tmp_path: Path) -> None:
    from gguf import GGUFWriter

    vision = folder_of(tmp_path / "vision", terms=True)
    file = tmp_path / "model.gguf"
    writer = GGUFWriter(str(file), "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    text = model_card(named(opened, str(file), vision), None, OWN)

    assert "| apache-2.0 | its GGUF file |" in text and "| not known | LICENSE in its folder |" in text


# ---------------------------------------------------------------------------------------------------------------
# What is said


def test_a_run_that_was_not_evaluated_says_so_first(opened: TrainedRun) -> None:
    assert evidence_of(opened) is None
    text = model_card(opened, None, OWN)

    assert text.split(f"# {opened.cfg.run_name}\n\n")[1].startswith("> **This model has not been evaluated.**")
    assert not any("look at the image" in h for h in heads(text)) and "How many samples were taken" in text
    assert "## How to load it" in heads(text) and "| connector |" in text


def test_a_failed_gate_is_said_before_anything_else(opened: TrainedRun, make_evidence: Make) -> None:
    failed = [
        gate("looks_clearly", 1.002, "> 1.05", passed=False, measure="ablation.ratio.shuffled", unit="ratio"),
        gate("no_collapse", None, "≤ 0.5", passed=False, measure="collapse.never"), gate("learned", 4.0),
    ]  # fmt: skip
    text = model_card(opened, make_evidence(step=2, gates=failed), OWN).replace("\\", "")

    first = text.split(f"# {opened.cfg.run_name}\n\n")[1].split("\n\n")[0]
    assert first.startswith("> **This model did not pass its checks.** Can I promote it? No: 1 of 3 gates failed")
    assert "**looks_clearly**, not shown: why looks_clearly." in first and "1.002×" in first
    assert "must be &gt; 1.05×" in first and "**no_collapse**, not judged" in first and "learned**" not in first


def test_what_stopped_a_run_and_figures_of_other_weights_are_said_first(
    opened: TrainedRun, make_evidence: Make
) -> None:
    stop = GuardrailStop(
        name="hallucination", measure="ood.hallucination", step=4, value=0.4, bound=0.2, told="too high"
    )
    e = make_evidence(step=9, status=Status.STOPPED_BY_GUARDRAIL, stopped=stop)

    first = model_card(opened, e, OWN).split("## ")[0].replace("\\", "")

    assert "The figures are of step 9, what was exported is step 2." in first
    assert "Stopped by its guardrail hallucination" in first and "No: it did not succeed." in first


def test_it_tells_what_the_report_tells(opened: TrainedRun, make_instruct_evidence: Make) -> None:
    e = make_instruct_evidence(step=2)
    more = [measurement("blind.gain", 0.417, half=0.02), measurement("blind.leak", 0.3, half=0.02)]
    e = e.model_copy(update={"measurements": [*e.measurements, *more]})

    text = model_card(opened, e, OWN).replace("\\", "")

    assert [h for h in heads(text) if h.startswith("## ")] == [
        "## What it is made of", "## What it was trained on", "## Does it look at the image? Yes, it looks.",
        "## Where does it fail? Nothing stands out.", "## Gates", "## Intended use", "## Limits", "## Licences",
        "## How to load it", "## How it was exported",
    ]  # fmt: skip
    assert "| easy-vqa train | 3,980 |" in text and "| too_short | 12 |" in text
    assert "The whole run: 420 optimizer steps, 3,840 samples seen" in text
    assert "| connector | 21,300,000 | 21,300,000 | float32 |" in text and "bit-identical" in text
    assert "| ✓ passed | retained | why retained |" in text and "≤ 1.02×" in text
    assert "| all questions | | ✓ looks | 97.4 % (95.9–98.9 %) |" in text.replace("  ", " ")
    assert "- Gain: +41.7 points" in text
    assert "Leak: +30.0" in text and "- Gap: CLIPScore was not measured" in text
    assert "the same answers as the run's" in text and "differ by at most 0 " in text
    assert "trust_remote_code=True" in text and "It answers questions about a picture" in text


def test_several_images_teachers_and_students_are_told(opened: TrainedRun, make_instruct_evidence: Make) -> None:
    base = make_instruct_evidence(step=2)
    slots = [
        measurement(name, 0.9, unit, 0.02, n=60, stratum=f"image {k} of 2")
        for k in (1, 2)
        for name, unit in (("slots.accuracy", "share"), ("slots.delta.shuffled", "nats/token"))
    ]
    cfg = opened.cfg
    multi = cfg.model_copy(update={
        "stage": "multi", "prompting": cfg.prompting.model_copy(update={"max_images_per_sample": 4}),
    })  # fmt: skip
    text = model_card(
        replace(opened, cfg=multi), base.model_copy(update={"measurements": [*base.measurements, *slots]}), OWN
    )
    assert "| 2 images | 90.0 % (88.0–92.0 %), n = 60; +0.90 nats/token" in text
    assert "It answers questions about up to 4 pictures" in text and metadata(text)["tags"][-1] == "multi"

    taught = cfg.model_copy(update={
        "stage": "distill", "distill": DistillConfig.model_validate({"teachers": [{"run": "outputs/private/big"}]}),
    })  # fmt: skip
    run = with_model(replace(opened, cfg=taught), student=StudentConfig(like="llama", hidden=32, layers=2, heads=4))
    text = model_card(named(run, "Qwen/Qwen3-8B", "google/siglip-so400m-patch14-384"), base, OWN)
    assert "- Teachers: big\n" in text and "in the shape of a llama, from random weights" in text
    assert metadata(text)["base_model"] == ["google/siglip-so400m-patch14-384"], "of the other it has the words alone"
    assert "It is a student" in text


def test_captions_adapters_beside_and_native_classes_are_told_apart(opened: TrainedRun, make_evidence: Make) -> None:
    align = replace(opened, cfg=opened.cfg.model_copy(update={"stage": "align"}))
    assert "It describes a picture" in model_card(align, make_evidence(), OWN)
    beside = as_transformers(
        "LlavaForConditionalGeneration", "", native=False, adapters=True, beside="adapter", samples=1, difference=0
    )
    text = model_card(opened, None, beside)
    assert 'PeftModel.from_pretrained(ask.model, "./adapter")' in text and "modeling_beholder" not in text
    native = as_transformers(
        "Qwen3VLForConditionalGeneration", "", native=True, adapters=False, beside=None, samples=1, difference=0
    )
    assert "trust_remote_code" not in model_card(opened, None, native)


# ---------------------------------------------------------------------------------------------------------------
# What is not said

HOSTILE = [
    "<script>alert(1)</script>", "a | b | c", "`code` **bold** [x](javascript:alert(2)) ![y](http://example.org/z.png)",
    "line\n# heading\n\n- item\n> quote\n---\n", "\x1b[31mred\x1b[0m \u202egnp.exe\u200b", "<!-- --> $x$ ~~s~~ &amp;",
    "https://example.org/login www.example.org",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_others_wrote_stays_text(opened: TrainedRun, make_instruct_evidence: Make, text: str) -> None:
    base = make_instruct_evidence()
    e = make_instruct_evidence(
        step=2, run_name=text, summary={"Mixture": text}, findings=[text], gaps=[text],
        data=base.data.model_copy(update={"sources": {text: 3}, "rejects": {text: 1}, "eval_origin": text}),
        gates=[gate(text, 0.1, passed=False, why=text, note=text, stratum=text)],
        measurements=[*base.measurements, *(m.model_copy(update={"stratum": text}) for m in base.measurements if m.by)],
    )  # fmt: skip
    run = replace(opened, cfg=opened.cfg.model_copy(update={"run_name": text}))
    plain = replace(opened, cfg=opened.cfg.model_copy(update={"run_name": "plain"}))
    harmless = e.model_copy(update={"run_name": "plain"})

    shown = model_card(run, e, OWN)

    metadata(shown)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f\u200b\u202a-\u202e\u2066-\u2069]", shown)
    tags = re.findall(r"<(\w+)", html(shown))
    assert set(tags) <= {
        "h1", "h2", "p", "blockquote", "strong", "em", "ul", "li", "table", "thead", "tbody", "tr", "th", "td", "code",
        "pre", "a",
    }, set(tags)  # fmt: skip
    links = re.findall(r'href="([^"]*)"', html(shown)) + re.findall(r"(?<!\\)(?:https?://|[wW]{3}\.)\S*", shown)
    assert all(link.startswith("https://huggingface.co/") for link in links), links
    assert tags.count("h1") == 1 and tags.count("h2") == re.findall(
        r"<(\w+)", html(model_card(plain, harmless, OWN))
    ).count("h2")


def test_places_of_this_machine_are_left_out(opened: TrainedRun, make_evidence: Make, tmp_path: Path) -> None:
    secret = "https://user:secret@example.org/data/part-1.parquet?token=hf_abcdef"
    places = [
        "/home/somebody/runs/align",
        str(tmp_path / "x y"),
        str(Path.cwd() / "a"),
        opened.cfg.model.llm.name_or_path,
    ]
    e = make_evidence(
        step=2, gaps=[f"Golden captions: {p}/step_1.jsonl is not there." for p in places] + [f"not read: {secret}"],
        findings=["yes/no questions and and/or are no places", r"C:\Users\somebody\data.json"],
        data=DataFacts(records=5, train=3, eval=2, sources={"/data/a.json": 1, "/other/a.json": 2, secret: 3}),
    )  # fmt: skip
    run_folder = tmp_path / "run"
    (run_folder / "checkpoints" / "step_2").mkdir(parents=True)
    (run_folder / "evidence.json").write_text(e.to_json())
    (run_folder / "config.yaml").write_text("")
    run = replace(opened, checkpoint=run_folder / "checkpoints" / "step_2")
    m = opened.cfg.model
    run = with_model(run, connector=m.connector.model_copy(update={"load_checkpoint": "outputs/private/first"}))

    text = model_card(run, evidence_of(run), OWN)

    for gone in (
        "somebody", "secret", "hf_", "?token", "example.org", str(tmp_path), str(Path.cwd()), str(Path.home()) + "/",
        str(Path(opened.cfg.model.llm.name_or_path).parent), "private", "/data", "/other",
    ):  # fmt: skip
        assert gone not in text.replace("\\", ""), gone
    plain = text.replace("\\", "")
    assert "yes/no questions and and/or are no places" in plain and "an earlier run: first" in plain
    assert "| a.json | 3 |" in plain and "| part-1.parquet | 3 |" in plain
    assert "- Gap: Golden captions: step_1.jsonl is not there." in plain


def test_evidence_that_cannot_be_read_is_an_error(opened: TrainedRun, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints" / "step_2").mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    (folder / "evidence.json").write_text(json.dumps({"schema_version": 1}))
    with pytest.raises(UserError, match="not an evidence record"):
        evidence_of(replace(opened, checkpoint=folder / "checkpoints" / "step_2"))
