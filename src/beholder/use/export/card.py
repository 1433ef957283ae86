"""The model card of an export: its ``README.md``, from the run's ``evidence.json`` and config.

What failed comes first. Figures and sentences are the report's own (`report.verdicts`, `report.markdown`). A card is
passed on: places of this machine are left out, and names and texts of other people stay text.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # pyright: ignore[reportPrivateImportUsage]

from beholder.config import RunConfig
from beholder.evidence import Evidence, load_evidence
from beholder.model.native import NativeModel
from beholder.report import content, markdown
from beholder.report.markdown import escaped, table
from beholder.report.verdicts import gate_rows, verdicts
from beholder.report.words import count, listed, metric_name, plural
from beholder.runs import atomic_write, version_of
from beholder.train.trained import TrainedRun
from beholder.types import printable

NAME = "README.md"
MOST_METADATA = 1_000_000
"""Bytes of a part's own README that are read for its licence."""
_KNOWN = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 "
    "bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 "
    "cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 "
    "cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 "
    "gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl "
    "apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl "
    "lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 "
    "grok2-community gemma"
)
LICENCES = frozenset(_KNOWN.split())
"""Those that the hub takes for ``license`` (https://huggingface.co/docs/hub/repositories-licenses)."""
RESULTS = {
    "answer.accuracy.correct": "accuracy", "answer.exact.correct": "exact_match",
    "caption.exact_match.correct": "exact_match", "caption.cider_d.correct": "cider",
    "caption.rouge_l.correct": "rouge", "pope.f1.correct": "f1", "eval.loss": "loss",
}  # fmt: skip
"""Measurements that a ``model-index`` can name, with the hub's metric."""


@dataclass(frozen=True)
class ExportedAs:
    """What an export became, in words: what only its own format knows of it."""

    library: str
    """``library_name`` of the hub."""
    told: tuple[str, ...]
    """What lies in the folder, a Markdown sentence each."""
    load: str
    """How it is opened, Markdown."""
    compared: str
    """What comparing it with the run gave, a Markdown sentence."""
    unlike: str = ""
    """Why the run's figures are not its own; empty where they are."""


def as_transformers(
    name: str, prevents: str, *, native: bool, adapters: bool, beside: str | None, samples: int, difference: float
) -> ExportedAs:
    """A Hugging Face folder of class ``name``.

    ``prevents``: why it is no class of transformers' own. ``beside``: the folder of its ``adapters`` below it; None
    where they are merged, or there are none. ``samples``, ``difference``: what it was compared on, and the largest of
    logits.
    """
    whose = f", whose code lies in `modeling_beholder.py`: {escaped(prevents)}" if prevents else ""
    where = f"lie beside their base, in `{beside}/`" if beside else "are part of the weights"
    told = (f"It is of class `{name}`{whose}.", *((f"Its adapters {where}.",) if adapters else ()))
    trust = "" if native else ", trust_remote_code=True"
    load = [
        "Python, with transformers alone:", "", "```python", "from transformers import pipeline", "",
        f'ask = pipeline("image-text-to-text", model="."{trust})  # this folder, or where it lies on the hub',
        'parts = [{"type": "image", "url": "picture.png"}, {"type": "text", "text": "What colour is it?"}]',
        'print(ask(text=[{"role": "user", "content": parts}], max_new_tokens=32, return_full_text=False))', "```",
    ]  # fmt: skip
    if beside:
        load += [
            "", "That is the base. With what the adapters learned:", "", "```python", "from peft import PeftModel", "",
            f'ask.model = PeftModel.from_pretrained(ask.model, "./{beside}")', "```",
        ]  # fmt: skip
    if not native:
        code = "The model's code and its processor's lie" if prevents else "Its processor's code lies"
        load += ["", f"{code} in this folder, which is what `trust_remote_code=True` allows: read it first."]
    compared = (
        f"It was loaded in a fresh process, without Beholder, by transformers {version_of('transformers')}, and asked "
        f"{plural(samples, 'held-out sample')}: the same ids of every prompt, logits that differ by at most "
        f"{difference:g} (both in fp32), and the same answers as the run's."
    )
    return ExportedAs("transformers", told, "\n".join(load), compared)


def as_gguf(
    model: str, mmproj: str, *, stored: str, pictures: Sequence[str], adapters: bool, read_again: tuple[int, int],
    compared_by: str, samples: int, difference: float, allowed: float, same: int | None,
) -> ExportedAs:  # fmt: skip
    """Files ``model`` and ``mmproj`` of llama.cpp, matrices kept as ``stored``.

    ``pictures``: where llama.cpp prepares them otherwise. ``read_again``: tensors and keys that were. ``compared_by``:
    what loaded them, empty where nothing could; it was asked ``samples``, and came within ``difference`` of
    ``allowed`` nats of log-probabilities, with the ``same`` answers.
    """
    told = (
        f"`{model}` is the language model, `{mmproj}` tower and projector; matrices are {stored}.",
        *(("Its adapters are part of the weights.",) if adapters else ()),
        *map(sentence, pictures),
    )
    load = "\n".join((
        "With llama.cpp, in this folder:", "", "```sh",
        f'llama-mtmd-cli -m {model} --mmproj {mmproj} --jinja --temp 0 --image picture.png -p "What colour is it?"',
        f"llama-server -m {model} --mmproj {mmproj} --jinja", "```",
    ))  # fmt: skip
    tensors, keys = read_again
    compared = f"{count(tensors)} tensors and {count(keys)} keys were read from the disk again as they were meant. "
    compared += (
        f"It was loaded in a fresh process, without Beholder, by {escaped(compared_by)}, and asked "
        f"{plural(samples, 'held-out sample')}: log-probabilities that differ from the run's by at most "
        f"{difference:.2g} nats (allowed {allowed:.2g}), and the same answer to {same} of them."
        if compared_by
        else "llama.cpp itself was not asked."
    )
    return ExportedAs("llama.cpp", told, load, compared)


def sentence(told: str) -> str:
    """What a terminal is told in a line, as a sentence of Markdown."""
    return f"{escaped(told[:1].upper() + told[1:])}."


def evidence_of(run: TrainedRun) -> Evidence | None:
    """What the run was measured to do, without pictures and without places of this machine; None where it was not
    measured yet. Raises `UserError` for an ``evidence.json`` that cannot be read."""
    if not (run.folder / "evidence.json").exists():
        return None
    e = load_evidence(run.folder)
    left_out = {"samples", "curves", "histograms", "words", "provenance", "config_yaml"}
    told = e.model_dump(exclude=left_out) | {"config_yaml": ""}
    return Evidence.model_validate(_placeless(told, _places(run)))


def write_card(folder: Path, run: TrainedRun, evidence: Evidence | None, exported: ExportedAs) -> None:
    """Write the card of ``run`` into the ``folder`` of its export. ``evidence``: as `evidence_of` gives it."""
    atomic_write(folder / NAME, model_card(run, evidence, exported))


def model_card(run: TrainedRun, evidence: Evidence | None, exported: ExportedAs) -> str:
    """The text of the card: the hub's metadata as YAML, then Markdown."""
    parts = list(parts_of(run.cfg))
    same = evidence is not None and not _not_these(run, evidence, exported)
    metadata = _metadata(run.cfg, parts, evidence if same else None, exported)
    block = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=10_000)
    lines = ["---", block.rstrip(), "---", "", f"# {escaped(run.cfg.run_name)}", "", *_first(run, evidence, exported)]
    lines += _made_of(run, evidence, parts)
    lines += _trained_on(run, evidence)
    if evidence is not None:
        said = {v.key: v for v in verdicts(evidence)}
        for key, tables in (("look", markdown.looking(evidence)), ("fail", markdown.failing(evidence))):
            v = said[key]
            lines += [f"## {v.question} {escaped(v.answer)}", "", escaped(v.why), "", *tables]
        lines += _gates(evidence)
    lines += _use(run)
    lines += _limits(run, evidence)
    lines += _licences(parts)
    lines += ["## How to load it", "", exported.load, ""]
    lines += ["## How it was exported", "", *(f"- {text}" for text in exported.told), f"- {exported.compared}"]
    lines += [
        f"- Beholder {escaped(str(version_of('beholder')))} wrote it, from step {count(run.step)} of the run.",
        "",
    ]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# The parts and their licences


@dataclass(frozen=True, slots=True)
class BasePart:
    """A model that the run was built on."""

    role: Literal["Vision-language model", "Language model", "Tokenizer", "Vision tower"]
    name: str
    """Hub name, else the last part of its place."""
    hub: str | None
    """Its name on the hub; None for what came from a place of this machine."""
    revision: str | None
    licence: str | None
    """As its own metadata has it; None where nothing says it."""
    said_by: str


def parts_of(cfg: RunConfig) -> Iterator[BasePart]:
    """What the run's model was built on, each with what it says of its licence."""
    model = cfg.model
    if model.native is not None:
        yield _part("Vision-language model", model.native.name_or_path, model.native.revision)
        return
    made = model.student is not None and model.student.like is not None
    yield _part("Tokenizer" if made else "Language model", model.llm.name_or_path, model.llm.revision)
    if model.vision.name_or_path.startswith("timm/"):
        yield _timm(model.vision.name_or_path.removeprefix("timm/"), model.vision.weights)
    else:
        yield _part("Vision tower", model.vision.name_or_path, model.vision.revision)


def _part(role: Any, name: str, revision: str | None) -> BasePart:
    hub = name if hub_name(name) else None
    if hub is None:
        return BasePart(role, _last(name), None, None, *_licence_beside(Path(name)))
    readme = try_to_load_from_cache(hub, NAME, revision=revision)
    found = _licence_in(Path(readme)) if isinstance(readme, str) else None
    return BasePart(role, hub, hub, revision, found, "its model card" if found else "")


def _timm(name: str, weights: str | None) -> BasePart:
    """Whose weights a file holds, the file does not say: timm's licence is of those that it fetches itself."""
    if weights is not None:
        return BasePart("Vision tower", f"timm/{name}", None, None, *_licence_beside(Path(weights)))
    from timm.models import get_pretrained_cfg

    known = get_pretrained_cfg(name)
    hub = None if known is None or not known.hf_hub_id else str(known.hf_hub_id)
    licence = None if known is None else known.license
    return BasePart("Vision tower", hub or f"timm/{name}", hub, None, licence, "timm" if licence else "")


def hub_name(name: str) -> bool:
    """Whether ``name`` can be one on the hub, and is not a file or folder here."""
    if Path(name).expanduser().exists() or name.endswith((".gguf", ".safetensors")):
        return False
    with suppress(HFValidationError):
        validate_repo_id(name)
        return not name.startswith((".", "~"))
    return False


def _licence_beside(place: Path) -> tuple[str | None, str]:
    """(licence, what says it) of a folder or file: its README's metadata, a GGUF file's own, or that a file of terms
    lies there, whose text says which."""
    folder = place if place.is_dir() else place.parent
    if found := _licence_in(folder / NAME):
        return found, "the README of its folder"
    if place.suffix == ".gguf" and (found := _licence_of_gguf(place)):
        return found, "its GGUF file"
    terms = [p.name for p in (sorted(folder.glob("LICEN[CS]E*")) if folder.is_dir() else ()) if p.is_file()]
    return None, f"{terms[0]} in its folder" if terms else ""


def _licence_in(readme: Path) -> str | None:
    """``license`` of a README's metadata, ``license_name`` where that is ``other``. One line is read, not the YAML:
    the file is anybody's."""
    if not readme.is_file():
        return None
    with readme.open("rb") as file:
        text = file.read(MOST_METADATA).decode("utf-8", "replace").lstrip("\ufeff")
    block = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
    line = r"^(license|license_name):[ \t]*[\"']?([\w.+-]+)[\"']?[ \t]*\r?$"
    said = dict(re.findall(line, block[1] if block else "", re.MULTILINE))
    licence = said.get("license")
    return said.get("license_name") if licence == "other" else licence


def _licence_of_gguf(file: Path) -> str | None:
    field = importlib.import_module("gguf").GGUFReader(str(file)).get_field("general.license")
    said = None if field is None else field.contents()
    return said if isinstance(said, str) and re.fullmatch(r"[\w.+-]+", said) else None


def _licence(parts: Sequence[BasePart]) -> str:
    """The parts' own where they all have one and the same that the hub knows; else ``other``."""
    found = {(p.licence or "").lower() for p in parts}
    return found.pop() if len(found) == 1 and found <= LICENCES else "other"


# ---------------------------------------------------------------------------------------------------------------
# The hub's metadata


def _metadata(
    cfg: RunConfig, parts: Sequence[BasePart], measured: Evidence | None, exported: ExportedAs
) -> dict[str, Any]:
    """``measured``: the evidence, where it is about what is exported."""
    bases = [p.hub for p in parts if p.hub is not None and p.role != "Tokenizer"]
    facts: dict[str, Any] = {"library_name": exported.library, "pipeline_tag": "image-text-to-text"}
    facts["license"] = _licence(parts)
    if bases:  # of two the hub would think that they were merged
        facts |= {"base_model": bases, "base_model_relation": "finetune"}
    facts["tags"] = ["beholder", "vision-language-model", cfg.stage_name]
    results = [] if measured is None else _results(measured)
    if results:
        facts["model-index"] = [{"name": printable(cfg.run_name, one_line=True), "results": results}]
    return facts


def _results(e: Evidence) -> list[dict[str, Any]]:
    """Of a run that passed its gates: tables of results show no gate, so a number of one that did not would mislead."""
    if not e.promotable:
        return []
    metrics = [
        {"type": kind, "name": metric_name(e, name), "value": m.value}
        for name, kind in RESULTS.items()
        if (m := e.get(name)) is not None
    ]
    sources = listed([printable(s, one_line=True) for s in e.data.sources]) or "the run's data"
    held_out = {"type": "held-out", "name": f"{plural(e.data.eval, 'held-out sample')}; trained on {sources}"}
    task = {"type": "image-text-to-text", "name": "Image-Text-to-Text"}
    return [{"task": task, "dataset": held_out, "metrics": metrics}] if metrics else []


# ---------------------------------------------------------------------------------------------------------------
# The body


def _not_these(run: TrainedRun, e: Evidence, exported: ExportedAs) -> list[str]:
    """Why the figures are not about what is exported; empty where they are."""
    out = [exported.unlike] if exported.unlike else []
    if e.step is not None and e.step != run.step:
        out.append(f"The figures are of step {count(e.step)}, what was exported is step {count(run.step)}.")
    strength = run.cfg.model.lora.strength
    if run.model.adapters and strength != e.adapter_strength:
        out.append(
            f"The figures are of adapters at {e.adapter_strength:g} of their strength, what was exported has them at "
            f"{strength:g}."
        )
    return out


def _first(run: TrainedRun, e: Evidence | None, exported: ExportedAs) -> list[str]:
    """What must be known before anything else: what failed, or that nothing was measured."""
    if e is None:
        return [
            "> **This model has not been evaluated.** Its run holds no evidence, so nothing is known of whether it "
            "looks at the image, or of where it fails. `beholder evaluate` measures it.", "",
        ]  # fmt: skip
    promote = next(v for v in verdicts(e) if v.key == "promote")
    lines = [f"> **{escaped(text)}**\n" for text in _not_these(run, e, exported)]
    lines += [f"> **{escaped(text)}**\n" for text in content.warnings(e)]
    if e.failed_gates or not e.gates:
        failed = "did not pass its checks" if e.failed_gates else "was not judged"
        lines += [f"> **This model {failed}.** {promote.question} {escaped(f'{promote.answer} {promote.why}')}", ">"]
        for row in gate_rows(e):
            if row.state != "passed":
                shown = "not judged" if row.state == "unknown" else "not shown"
                why = f"{shown}: {row.gate.why}. " if row.gate.why else ""
                told = f"{row.what}{f', {row.where}' if row.where else ''}: {row.number} {row.unit}".rstrip()
                told += f" ({row.interval})" if row.interval else ""
                lines.append(f"> - **{escaped(row.gate.name)}**, {escaped(f'{why}{told}, must be {row.bound}')}")
        lines.append("")
    else:
        lines += [f"{promote.question} **{escaped(promote.answer)}**", ""]
    return [*lines, *table(["number", "value", ""], [list(row) for row in content.key_numbers(e)])]


def _made_of(run: TrainedRun, e: Evidence | None, parts: Sequence[BasePart]) -> list[str]:
    cfg, model = run.cfg, run.model
    lines = ["## What it is made of", ""]
    for p in parts:
        at = f" at revision {escaped(p.revision)}" if p.revision else ""
        named = f"[{escaped(p.name)}](https://huggingface.co/{p.hub})" if p.hub else f"**{escaped(p.name)}**"
        lines.append(f"- {p.role}: {named}{at}")
    student = cfg.model.student
    if student is not None and student.like is not None:
        lines.append(f"- Language model: made for this run in the shape of a {student.like}, from random weights")
    elif student is not None:
        lines.append(f"- Of the language model, a few layers: {escaped(str(student.cut))}")
    if isinstance(model, NativeModel):
        lines.append("- Tower and connector are its own; an image takes as many places as its size asks for")
    else:
        c, g = cfg.model.connector, model.geometry
        lines.append(
            f"- Connector: {c.resampler.kind}, then {c.projector.kind}; {g.num_patches} patches of an image become "
            f"{plural(model.num_visual_tokens, 'position')} of the language model"
        )
    if cfg.distill is not None and cfg.distill.taught:
        lines.append(f"- Teachers: {escaped(', '.join(_name(t.name) for t in cfg.distill.teachers))}")
    if (start := cfg.model.connector.load_checkpoint) is not None:
        lines.append(f"- It goes on from an earlier run: {escaped(_run_name(start))}")
    if e is not None and e.adapters:
        lines.append(f"- Adapters: {escaped(content.footprint_told(e))}")
    lines.append("")
    if e is not None:
        return [*lines, *markdown.learned(e)]
    state = model.trained_state()
    rows = [[part, count(sum(t.numel() for t in own.tensors.values()))] for part, own in state.items()]
    return [*lines, *table(["what its checkpoints hold", "parameters"], rows)]


def _trained_on(run: TrainedRun, e: Evidence | None) -> list[str]:
    cfg = run.cfg
    told = f"Stage {cfg.stage_name}; what was exported is its checkpoint after step {count(run.step)}."
    lines = ["## What it was trained on", "", told, ""]
    if e is None:
        sources = [s.name or _last(s.json_path).partition(".")[0] for s in cfg.data.train_sources]
        return [*lines, f"Sources: {escaped(', '.join(sources))}. How many samples were taken was not recorded.", ""]
    c = e.cost
    took = [f"The whole run: {plural(c.steps, 'optimizer step')}"]
    took += [] if c.samples is None else [f"{count(c.samples)} samples seen"]
    took += [] if c.epochs is None else [f"{c.epochs:.3g} epochs"]
    took += [] if c.target_tokens is None else [f"{count(c.target_tokens)} supervised tokens"]
    lines += [f"{', '.join(took)}.", "", *markdown.data(e)]
    if mixed := e.summary.get("Mixture"):
        lines += [f"Mixture: {escaped(mixed)}.", ""]
    v = next(v for v in verdicts(e) if v.key == "learn")
    return [*lines, f"{v.question} {escaped(v.answer)} {escaped(v.why)}", ""]


def _gates(e: Evidence) -> list[str]:
    rows = markdown.judged(e)
    return ["## Gates", "", *rows] if rows else []


def _use(run: TrainedRun) -> list[str]:
    cfg = run.cfg
    most = cfg.max_images
    pictures = "a picture" if most == 1 else f"up to {most} pictures"
    if cfg.stage_record.writes == "caption":
        does = (
            f"It describes {pictures}, in the manner of the captions it was trained on. It was not taught to answer "
            "questions or to hold a conversation."
        )
    else:
        does = (
            f"It answers questions about {pictures}, in the manner of the answers it was trained on, laid out by the "
            "chat template that comes with it."
        )
    if cfg.distill is not None:
        does += " It is a student: what it says is meant to be near what its teachers say, right or wrong."
    return [
        "## Intended use", "", does, "",
        "It is meant for pictures and requests like those of its training data, and for research on how such models "
        "come to look. It is not meant to decide about people, or for anything where a wrong answer does harm: nothing "
        "here has measured that.", "",
    ]  # fmt: skip


def _limits(run: TrainedRun, e: Evidence | None) -> list[str]:
    cfg, model = run.cfg, run.model
    told: list[str] = []
    if e is not None:
        where = e.data.eval_origin.rstrip(".")
        told.append(
            f"Unless a table says otherwise, figures are from at most {plural(e.data.eval, 'held-out sample')} of its "
            f"own data{f' ({where})' if where else ''}: of other pictures they say nothing."
        )
    if not isinstance(model, NativeModel):
        g = model.geometry
        how = "stretched to" if g.resize == "stretch" else f"brought to a short side of {g.resize_to} and cropped to"
        told.append(f"A picture is {how} {g.width} × {g.height} pixels; details that this loses are not seen.")
    longest = count(cfg.prompting.max_seq_len)
    told.append(f"In training a sample had at most {plural(cfg.max_images, 'image')} and {longest} tokens.")
    told.append(
        "What its parts learned before this run, errors and prejudices among it, is still in them; no filter and no "
        "training for safety was added."
    )
    told.append("Text that spells a control token of the tokenizer is read as one; take it out of what others write.")
    told += [f"Gap: {gap}" for gap in ([] if e is None else e.gaps)]
    return ["## Limits", "", *(f"- {escaped(text)}" for text in told), ""]


def _licences(parts: Sequence[BasePart]) -> list[str]:
    rows = [[p.role, p.name, p.licence or "not known", p.said_by or "nothing that came with it says"] for p in parts]
    lines = ["## Licences", "", *table(["part", "", "licence", "as said by"], rows)]
    unknown = [p.name for p in parts if p.licence is None]
    if unknown:
        lines += [
            f"Not known: the licence of {escaped(listed(unknown))}. So the whole’s is given as `other`. Find it "
            "out before you pass this on.", "",
        ]  # fmt: skip
    elif _licence(parts) == "other":
        lines += ["The parts' licences are not one that the hub has a name for, so the whole is given as `other`.", ""]
    return [*lines, "The data's own licences are not recorded in a run, and are not part of this.", ""]


# ---------------------------------------------------------------------------------------------------------------
# Places of this machine


def _last(name: str) -> str:
    """The last part of a path or address, without what follows a question mark."""
    return re.split(r"[/\\]", re.split(r"[?#]", name)[0].rstrip("/\\"))[-1] or "?"


def _name(name: str) -> str:
    return name if hub_name(name) else _last(name)


def _run_name(place: str) -> str:
    """Of a run folder or one of its checkpoints."""
    path = Path(place)
    return _last(str(path.parent.parent)) if path.parent.name == "checkpoints" else _last(place)


def _places(run: TrainedRun) -> list[str]:
    """Paths of this machine that a text might name, the longest first."""
    found = {str(Path.cwd()), str(Path.home()), str(run.folder), str(run.checkpoint)}
    for text in _texts(run.cfg.model_dump(mode="json")):
        path = re.search(r"[/\\]", text) and not re.search(r"\s", text) and not hub_name(text)
        if path or text.startswith(("/", "~", "./", "../")):
            found.add(text)
    return sorted((f for f in found if len(f) > 1), key=len, reverse=True)


def _texts(value: Any) -> Iterator[str]:
    """Every text below a value of JSON, names left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


_ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*://[^\s'\"<>]+")
_ABSOLUTE = re.compile(r"(?<![\w:/.~])(?:~?/|[A-Za-z]:\\)(?:[^\s/\\'\"<>:|]+[/\\])+[^\s/\\'\"<>:|,;]*")


def _placeless(value: Any, places: Sequence[str]) -> Any:
    """The same with the last part of every path and address in its texts alone."""
    if isinstance(value, str):
        for place in places:
            value = value.replace(place, _last(place))
        return _ABSOLUTE.sub(lambda m: _last(m[0]), _ADDRESS.sub(lambda m: _last(m[0]), value))
    if isinstance(value, dict):
        out: dict[str, Any] = {}
        for key, item in value.items():
            name, item = _placeless(key, places), _placeless(item, places)
            out[name] = out[name] + item if name in out else item  # counts of two sources that end alike
        return out
    if isinstance(value, list | tuple):
        return [_placeless(item, places) for item in value]
    return value
