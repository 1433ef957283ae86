"""A page for each data layout: how a file of it looks, what the config says, and what the code reads in it.

What is shown is read from `tests/data/formats`, which has a small file of every layout with one bad record in each, by
what reads it in training. So a page cannot say what is not so. By hand there is a title and why one has such files.
"""

from __future__ import annotations

import base64
import csv
import gzip
import json
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from beholder.config import STAGES, SourceConfig
from beholder.data.check import CheckReport, check_data
from beholder.data.images import read_bytes
from beholder.data.sources import instructs, open_sources
from beholder.types import Example, ImageRef, ImageSlot

FORMATS = Path(__file__).resolve().parents[2] / "tests" / "data" / "formats"


@dataclass(frozen=True)
class File:
    """One of the small files, and what a config has to say about it beside its place."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What stands above it on its page."""


@dataclass(frozen=True)
class Layout:
    """One page."""

    name: str
    title: str
    words: str
    files: tuple[File, ...]


GROUPS: dict[str, tuple[Layout, ...]] = {
    "Captions": (
        Layout(
            "json", "JSON and JSON lines",
            "A record is a picture and a caption. The simplest layout; take it when you write a file yourself.",
            (
                File("captions.jsonl", note="A record a line. Any record is read without reading the others."),
                File("captions.jsonl.gz", note="What is gzip'd is unpacked once, into the cache."),
                File("captions.json", note="An array."),
                File("data.json", note="An object that has one array, whatever its name."),
                File("several.jsonl", note="Several captions of a picture are a record each."),
            ),
        ),
        Layout("csv", "CSV", "What spreadsheets export.", (File("captions.csv"),)),
        Layout(
            "renamed", "Columns called otherwise",
            "Your columns have names of their own. `check` names those that it found; `columns` says which is which, "
            "in any layout.",
            (File("renamed.csv", {"columns": {"image": "img_path", "caption": "alt_text"}}),),
        ),
        Layout(
            "open_clip", "open_clip", "What open_clip trains on: tab-separated, `filepath` and `title`.",
            (File("open_clip.tsv"),),
        ),
        Layout(
            "imagefolder", "Hugging Face imagefolder", "A folder of pictures with a `metadata` file in it.",
            (File("imagefolder"), File("imagefolder_csv", note="The same with a table.")),
        ),
        Layout(
            "coco", "COCO captions",
            "`captions_train2017.json` and its like: pictures and annotations apart, a record for each annotation.",
            (File("coco_captions.json"),),
        ),
        Layout(
            "parquet", "Parquet", "What the Hugging Face hub serves: the pictures lie in the file.",
            (
                File("captions.parquet", note="A picture is `{bytes, path}`, as `datasets` writes it."),
                File("bytes.parquet", note="Or bytes alone."),
            ),
        ),
        Layout("arrow", "Arrow", "A folder that `datasets.save_to_disk` wrote.", (File("arrow_folder"),)),
        Layout(
            "webdataset", "WebDataset tar shards",
            "Members of a tar file that share a name are a record: `.txt` and / or `.json`, and pictures.",
            (File("shards.tar"),),
        ),
    ),
    "Conversations": (
        Layout(
            "llava", "LLaVA",
            "LLaVA-Pretrain, LLaVA-Instruct and what imitates them: `conversations` of `from` and `value`, `<image>` "
            "where the picture stands.",
            (File("llava.json"),),
        ),
        Layout(
            "sharegpt", "ShareGPT, LLaMA-Factory", "`messages` of `role` and `content`, pictures under `images`.",
            (File("sharegpt.jsonl"),),
        ),
        Layout(
            "onevision", "LLaVA-OneVision", "LLaVA's turns in parquet, the pictures in the file.",
            (File("onevision.parquet"),),
        ),
        Layout("m4", "M4-Instruct", "Several pictures a record, in LLaVA's turns.", (File("m4.json"),)),
        Layout("mantis", "Mantis-Instruct", "Several pictures a record, in parquet.", (File("mantis.parquet"),)),
        Layout(
            "openai", "OpenAI messages",
            "What OpenAI's API takes and its fine-tuning files hold: contents of parts. Pictures are `data:` URIs; an "
            "address is a reject, for nothing is fetched.",
            (File("openai.jsonl"),),
        ),
        Layout(
            "trl", "TRL", "What TRL's trainers take: image parts stand for `images` in order.",
            (File("trl.jsonl"), File("trl.parquet", note="In parquet, where every part has all fields, null or not.")),
        ),
        Layout(
            "cauldron", "The Cauldron", "`texts` of user and assistant, about `images`.", (File("cauldron.parquet"),)
        ),
        Layout(
            "finevision", "FineVision", "As The Cauldron, with ratings; `min_rating` rejects what is rated lower.",
            (File("finevision.parquet", {"min_rating": {"relevance": 3}}),),
        ),
        Layout("ms_swift", "ms-swift", "`query`, `response`, `history`, `system`.", (File("ms_swift.jsonl"),)),
        Layout("alpaca", "Alpaca", "`instruction`, `input`, `output`.", (File("alpaca.json"),)),
        Layout(
            "unified", "Unified",
            "What `beholder prepare unified` writes of any of these, and what reads as well when you write it.",
            (File("unified.jsonl"),),
        ),
    ),
    "Questions": (
        Layout(
            "questions", "Questions with answers",
            "A question a record, with one answer or those of several people.", (File("questions.jsonl"),),
        ),
        Layout(
            "vqa", "VQA-v2, OK-VQA", "Questions in one file, answers in another, pictures by number.",
            (File("vqa_questions.json", {"image_root": "images", "annotations_path": "vqa_annotations.json"}),),
        ),
        Layout(
            "gqa", "GQA", "Questions by id; pictures by name.",
            (File("gqa.json", {"image_root": "images", "image_pattern": "{image_id}.png"}),),
        ),
        Layout(
            "nlvr2", "NLVR2", "A statement about two pictures, true or false.",
            (File("nlvr2.jsonl", {"image_root": "images"}),),
        ),
    ),
}  # fmt: skip
"""Every page, by the group it stands in."""
LAYOUTS = {layout.name: layout for group in GROUPS.values() for layout in group}


def page(layout: Layout) -> str:
    """The page in Markdown."""
    first, *others = layout.files
    parts = [f"# {layout.title}", layout.words, *_about(first)]
    for file in others:
        parts += [f"## `{file.name}`", file.note, *_also(file, first)]
    parts.append(
        "Which files of a folder are read, what happens to images, and every field that is known: "
        "[Your own data](../data.md)."
    )
    return "\n\n".join(part for part in parts if part) + "\n"


def overview() -> str:
    """The table of all pages."""
    rows = [
        "# Data layouts",
        "Point at a file and it is recognised by looking; `beholder check FILE` says as what. A page for each layout "
        "shows a file of it, the lines of a config, and what is read.\n",
    ]
    for group, layouts in GROUPS.items():
        rows += [f"## {group}", "", "| layout | read as | |", "|---|---|---|"]
        for layout in layouts:
            read_as = ", ".join(dict.fromkeys(f"`{name}`" for f in layout.files for name in checked(f)[1].layouts))
            rows.append(
                f"| [{layout.title}]({layout.name}.md) | {read_as} | {re.split('[.;] ', layout.words)[0].rstrip('.')} |"
            )
        rows.append("")
    return "\n".join(rows)


def checked(file: File) -> tuple[list[Example], CheckReport]:
    """Its good records and what `beholder check` finds, from inside the folder: paths are as a reader has them."""
    with chdir(FORMATS):
        source = SourceConfig(json_path=file.name, **file.settings)
        stage = STAGES["instruct" if instructs(source) else "align"]
        report = check_data([source], stage=stage, max_images=4, verify_images="decode")
        records = open_sources(
            [source], image_token="<image>", max_images=4, on_reject="collect", chat=stage.dialogues
        )  # fmt: skip
        bad = {reject.id for reject in report.rejects}
        return [records[i] for i in range(len(records)) if records[i].id not in bad], report


def _about(file: File) -> Iterator[str]:
    examples, report = checked(file)
    yield "## What is in it"
    yield file.note
    yield from shown(FORMATS / file.name)
    if answers := file.settings.get("annotations_path"):
        yield f"and `{answers}`:"
        yield from shown(FORMATS / answers)
    yield "## In a config"
    source = {"json_path": f"data/{file.name}"} | {
        k: f"data/{v}" if k in ("image_root", "annotations_path") else v for k, v in file.settings.items()
    }
    lines = yaml.safe_dump(source, sort_keys=False).splitlines()
    yield _fenced("yaml", "data:\n  sources:\n    - " + "\n      ".join(lines))
    yield "## What is read"
    yield f"`beholder check` says: read as {_read_as(report)}; {report.accepted} of {report.records} records accepted."
    yield "The first becomes"
    with chdir(FORMATS):
        yield _told(examples[0])
    yield from _rejected(report)


def _also(file: File, first: File) -> Iterator[str]:
    """A file of the same page, as far as it differs from the first."""
    assert file.settings == first.settings, f"{file.name}: {file.settings}"
    report = checked(file)[1]
    yield from shown(FORMATS / file.name)
    yield f"Read as {_read_as(report)}; {report.accepted} of {report.records} records accepted."
    if report.rejects_by_reason.keys() != checked(first)[1].rejects_by_reason.keys():
        yield from _rejected(report)


def _read_as(report: CheckReport) -> str:
    return " and ".join(f"**{name}**" for name in report.layouts)


def _rejected(report: CheckReport) -> Iterator[str]:
    for reject in report.rejects:
        why = reject.detail.replace(f"{FORMATS}{os.sep}", "")
        yield (
            f'!!! failure "A record that cannot be used: `{reject.reason}`"\n'
            f"    record {reject.row} (id {_code(str(reject.id))}): {_code(why)}"
        )


def _told(example: Example) -> str:
    """An example as a table: who says what, pictures where they stand."""
    names = [_name(ref) for ref in example.images]
    rows = ["| | |", "|---|---|"]
    if len(example.turns) < 2:
        rows.append(f"| pictures | {', '.join(names)} |")
    for turn in example.turns:
        said = " ".join(names[p.index] if isinstance(p, ImageSlot) else _code(p) for p in turn.parts)
        rows.append(f"| {turn.role}{' (learned)' if turn.role == 'assistant' else ''} | {said.strip()} |")
    if example.answers:
        rows.append(f"| counts as right | {', '.join(_code(a) for a in dict.fromkeys(example.answers))} |")
    return "\n".join(rows)


def _name(ref: ImageRef) -> str:
    """The picture itself, and where it lies."""
    data = base64.b64encode(read_bytes(ref)).decode()
    where = str(ref.path).replace(f"{FORMATS}{os.sep}", "") + ("" if ref.kind == "file" else ", in the file itself")
    return f'<img class="tile" alt="" src="data:image/png;base64,{data}"> *{where}*'


# ---------------------------------------------------------------------------------------------------------------
# A file for people


def shown(path: Path) -> Iterator[str]:
    """The first records of a file, blocks of Markdown; bytes and long strings in few words."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if path.is_dir():
        yield _fenced("text", "\n".join(f"{path.name}/{p.name}" for p in sorted(path.iterdir())))
        for inner in sorted(path.iterdir()):
            if inner.suffix in (".jsonl", ".csv", ".arrow"):
                yield f"`{inner.name}`:"
                yield from shown(inner)
        return
    match suffix:
        case ".jsonl":
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            yield _fenced("json", _json(json.loads(data.splitlines()[0])))
        case ".json":
            whole = json.loads(path.read_bytes())
            yield _fenced("json", _json(_first(whole)))
        case ".csv" | ".tsv":
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(islice(csv.reader(file, delimiter="," if suffix == ".csv" else "\t"), 3))
            yield _fenced("text", "\n".join(path.read_text(encoding="utf-8").splitlines()[: len(rows)]))
        case ".parquet" | ".arrow":
            if suffix == ".parquet":
                table = pq.read_table(path)
            else:
                with pa.ipc.open_stream(path) as stream:
                    table = stream.read_all()
            yield f"Columns {', '.join(f'`{name}`' for name in table.column_names)}; the first row:"
            yield _fenced("json", _json(table.slice(0, 1).to_pylist()[0]))
        case ".tar":
            with tarfile.open(path) as shard:
                lines = []
                for member in shard.getmembers():
                    file = shard.extractfile(member)
                    assert file is not None
                    data = file.read()
                    text = f"{len(data)} bytes" if member.name.endswith(".png") else data.decode()
                    lines.append(f"{member.name:8} {text}")
            yield _fenced("text", "\n".join(lines))
        case _:
            raise AssertionError(f"{path}: how is a {suffix} file shown?")


def _first(whole: Any) -> Any:
    """Of a file's records the first two, of one that is an array the first."""
    if isinstance(whole, list):
        return whole[:1]
    if isinstance(whole, dict) and len(whole) > 2 and all(isinstance(v, dict) for v in whole.values()):
        return dict(islice(whole.items(), 1))  # GQA: questions by their ids
    return {k: v[:2] if isinstance(v, list) else v for k, v in whole.items()}


def _json(value: Any, indent: int = 0, room: int = 84) -> str:
    """What is short stands on one line; bytes and long strings in few words."""
    value = _short(value)
    line = json.dumps(value, ensure_ascii=False)
    if len(line) + indent <= room or not isinstance(value, dict | list):
        return line
    inner = " " * (indent + 2)
    if isinstance(value, dict):
        entries = [f"{json.dumps(k)}: {_json(v, indent + 2, room - len(k) - 4)}" for k, v in value.items()]
    else:
        entries = [_json(v, indent + 2) for v in value]
    left, right = "{}" if isinstance(value, dict) else "[]"
    return f"{left}\n{inner}" + f",\n{inner}".join(entries) + f"\n{' ' * indent}{right}"


def _short(value: Any) -> Any:
    match value:
        case dict():
            return {k: _short(v) for k, v in value.items()}
        case list():
            return [_short(v) for v in (value if len(value) < 6 else [*value[:2], "…"])]
        case bytes():
            return f"<{len(value)} bytes>"
        case str() if len(value) > 80:
            return value[:40] + "…"
    return value


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _code(text: str) -> str:
    """As it is, in a cell of a table."""
    return f"`{text.strip()}`".replace("|", "\\|").replace("\n", "⏎") if text.strip() else ""
