"""Makes the small files beside it, one of every layout that is read, with real pictures of 6 x 6 pixels.

    PYTHONPATH=src python tests/data/formats/make.py

Each holds three records: two good ones, and one that is not (a number where a text belongs, or no picture).
"""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

HERE = Path(__file__).parent
COLOURS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (30, 60, 210), "white": (250, 250, 250)}


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (6, 6), COLOURS[colour]).save(out, "PNG")
    return out.getvalue()


def uri(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(colour)).decode()


def lines(records: list[Any]) -> bytes:
    return b"".join(json.dumps(r).encode() + b"\n" for r in records)


def array(records: list[Any]) -> bytes:
    return json.dumps(records, indent=1).encode()


def table(delimiter: str) -> Callable[[list[Any]], bytes]:
    def write(records: list[Any]) -> bytes:
        out = io.StringIO()
        rows = csv.DictWriter(out, list(records[0]), delimiter=delimiter, lineterminator="\n")
        rows.writeheader()
        rows.writerows({k: v if isinstance(v, str) else json.dumps(v) for k, v in r.items()} for r in records)
        return out.getvalue().encode()

    return write


def parquet(records: list[Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), out)
    return out.getvalue()


def arrow(records: list[Any]) -> bytes:
    out = io.BytesIO()
    whole = pa.Table.from_pylist(records)
    with pa.ipc.new_stream(out, whole.schema) as stream:
        stream.write_table(whole, max_chunksize=2)
    return out.getvalue()


def tar(records: list[Any]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as shard:
        for name, data in records:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return out.getvalue()


def two(make: Callable[[str, str], Any], bad: Any) -> list[Any]:
    """A good record of each of two pictures, and the bad one."""
    return [make("red", "a red tile"), make("blue", "a blue tile"), bad]


def said(user: Any, text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": text}]


def spoken(user: str, text: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": user}, {"from": "gpt", "value": text}]


def cell(colour: str | None) -> dict[str, Any]:
    return {"bytes": png(colour) if colour else None, "path": f"{colour}.png" if colour else None}


def layouts() -> dict[str, bytes]:
    """File → its bytes."""
    asks = "What is it?"
    captions = two(lambda c, t: {"image": f"images/{c}.png", "caption": t}, {"image": "images/red.png", "caption": 3})
    turns = two(
        lambda c, t: {"image": f"images/{c}.png", "conversations": spoken(f"<image>\n{asks}", t)},
        {"image": "images/red.png", "conversations": spoken("<image><image>", "x")},
    )
    inline = two(
        lambda c, t: {"messages": said([{"type": "image_url", "image_url": {"url": uri(c)}},
                                        {"type": "text", "text": asks}], [{"type": "text", "text": t}])},
        {"messages": said([{"type": "image"}, {"type": "text", "text": asks}], "x")},
    )  # fmt: skip
    ordered = two(
        lambda c, t: {"images": [f"images/{c}.png", "images/white.png"],
                      "messages": said([{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}], t)},
        {"images": ["images/red.png"], "messages": said([{"type": "video"}], "x")},
    )  # fmt: skip
    interleaved = two(
        lambda c, t: {"id": c, "images": [cell(c), cell("white")], "source": "tiles",
                      "conversation": said("<image> <image> Compare.", t)},
        {"id": "bad", "images": [cell("red")], "source": "tiles", "conversation": said("<image><image>", "x")},
    )  # fmt: skip
    fine = two(
        lambda c, t: {"images": [cell(c)], "texts": [{"user": asks, "assistant": t}], "source": "tiles",
                      "relevance_ratings": [4], "relevance_min": 4},
        {"images": [cell("red")], "texts": [{"user": asks, "assistant": "x"}], "source": "tiles",
         "relevance_ratings": [1], "relevance_min": 1},
    )  # fmt: skip
    files = {
        "captions.json": array(captions),
        "captions.jsonl": lines(captions),
        "captions.jsonl.gz": gzip.compress(lines(captions), mtime=0),
        "captions.csv": table(",")([{"image": f"images/{c}.png", "caption": t} for c, t in (
            ("red", "a red tile, shiny"), ("blue", 'a "blue" tile'), ("gone", "a caption without its picture"))]),
        "data.json": json.dumps({"version": 1, "data": captions}).encode(),
        "several.jsonl": lines([{"image": f"images/{c}.png", "caption": [f"a {c} tile", f"{c} all over"]} for c in
                                ("red", "blue")] + [{"image": "images/red.png", "caption": []}]),
        "imagefolder/metadata.jsonl": lines([{"file_name": "red.png", "text": "a red tile"},
                                             {"file_name": "blue.png", "text": "a blue tile"},
                                             {"file_name": "../images/red.png", "text": "from outside"}]),
        "imagefolder_csv/metadata.csv": table(",")([{"file_name": f"{c}.png", "text": f"a {c} tile"} for c in
                                                    ("red", "blue", "gone")]),
        "open_clip.tsv": table("\t")([{"filepath": f"images/{c}.png", "title": f"a {c} tile"} for c in
                                      ("red", "blue", "gone")]),
        "coco_captions.json": json.dumps({
            "info": {}, "licenses": [{"id": 1}],
            "images": [{"id": 1, "file_name": "images/red.png"}, {"id": 2, "file_name": "images/blue.png"}],
            "annotations": [{"id": 10, "image_id": 1, "caption": "a red tile"},
                            {"id": 11, "image_id": 1, "caption": "red all over"},
                            {"id": 12, "image_id": 3, "caption": "of no image"}],
        }).encode(),
        "captions.parquet": parquet([{"image": cell(c), "caption": t} for c, t in
                                     (("red", "a red tile"), ("blue", "a blue tile"), (None, "nothing"))]),
        "bytes.parquet": parquet([{"image": png(c) if c else None, "text": t} for c, t in
                                  (("red", "a red tile"), ("blue", "a blue tile"), (None, "nothing"))]),
        "arrow_folder/data-00000-of-00001.arrow": arrow([
            {"image": cell(c), "caption": t}
            for c, t in (("red", "a red tile"), ("blue", "a blue tile"), (None, "-"))]),
        "arrow_folder/state.json": json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}).encode(),
        "arrow_folder/dataset_info.json": b"{}",
        "shards.tar": tar([("0.png", png("red")), ("0.txt", b"a red tile"), ("1.png", png("blue")),
                           ("1.json", json.dumps({"conversations": spoken("<image>?", "blue")}).encode()),
                           ("2.txt", b"no picture")]),
        "llava.json": array(turns),
        "onevision.parquet": parquet([{"id": c, "image": cell(c), "conversations": spoken(f"<image>\n{asks}", c),
                                       "data_source": "tiles"} for c in ("red", "blue")] +
                                     [{"id": "bad", "image": cell("red"), "data_source": "tiles",
                                       "conversations": spoken("<image><image>", "x")}]),
        "m4.json": array([{"sample_id": k, "image": [f"images/{c}.png" for c in colours], "metadata": {"dataset": "m4"},
                           "conversations": spoken("<image> <image> Same?", "no")}
                          for k, colours in enumerate((("red", "blue"), ("blue", "green"), ("red",)))]),
        "mantis.parquet": parquet(interleaved),
        "sharegpt.jsonl": lines([{"images": [f"images/{c}.png"], "messages": [
            {"role": "system", "content": "Be brief."}, *said("<image>?", c)]} for c in ("red", "blue")] +
            [{"images": ["images/red.png"], "messages": [{"role": "tool", "content": "x"}]}]),
        "openai.jsonl": lines(inline),
        "trl.jsonl": lines(ordered),
        "trl.parquet": parquet([{"images": [cell(c), cell("white")],
                                 "messages": said([{"type": "image", "text": None}, {"type": "text", "text": "and"},
                                                   {"type": "image", "text": None}], [{"type": "text", "text": c}])}
                                for c in ("red", "blue")] +
                               [{"images": [cell("red")], "messages": said([{"type": "image", "text": None}] * 2,
                                                                           [{"type": "text", "text": "x"}])}]),
        "cauldron.parquet": parquet(two(
            lambda c, t: {"images": [cell(c), cell("white")], "texts": [
                {"user": asks, "assistant": t, "source": "tiles"},
                {"user": "Sure?", "assistant": "Yes.", "source": "tiles"}]},
            {"images": [], "texts": [{"user": asks, "assistant": "x", "source": "tiles"}]})),
        "finevision.parquet": parquet(fine),
        "ms_swift.jsonl": lines(two(
            lambda c, t: {"query": "And <image> this?", "response": t, "history": [["Hello.", "Hi."]],
                          "system": "Be brief.", "images": [f"images/{c}.png"]},
            {"query": "<image><image>?", "response": "x", "images": ["images/red.png"]})),
        "alpaca.json": array(two(
            lambda c, t: {"instruction": asks, "input": "Briefly.", "output": t, "images": [f"images/{c}.png"]},
            {"instruction": asks, "input": "", "output": 3, "images": ["images/red.png"]})),
        "unified.jsonl": lines(two(
            lambda c, t: {"image": f"images/{c}.png", "instruction": asks, "response": t, "metadata": {"source": "x"}},
            {"image": "https://example.org/red.png", "instruction": asks, "response": "x", "metadata": {}})),
        "questions.jsonl": lines([
            {"question_id": 1, "image": "images/red.png", "question": "Which colour?", "answer": "red",
             "answer_type": "other", "question_type": "which colour"},
            {"question_id": 2, "image": "images/blue.png", "question": "Which colour?",
             "answers": [{"answer": "blue"}] * 6 + [{"answer": "navy"}] * 4, "multiple_choice": ["blue", "red"]},
            {"question_id": 3, "image": "images/red.png", "question": "Which colour?", "answers": []}]),
        "nlvr2.jsonl": lines([
            {"identifier": "dev-1-0-0", "sentence": "Both are red.", "label": "False"},
            {"identifier": "dev-1-0-1", "sentence": "One is red.", "label": "True"},
            {"identifier": "dev-1-0-2", "sentence": "None is red.", "label": "perhaps"}]),
        "vqa_questions.json": json.dumps({"questions": [
            {"question_id": k, "image_id": k, "question": "Which colour?"} for k in (1, 2, 3)]}).encode(),
        "vqa_annotations.json": json.dumps({"annotations": [
            {"question_id": k, "image_id": k, "answers": [{"answer": c}] * 10}
            for k, c in ((1, "red"), (2, "blue"))]}).encode(),
        "gqa.json": json.dumps({
            "1": {"question": "Which colour?", "imageId": "red", "answer": "red"},
            "2": {"question": "Which colour?", "imageId": "blue", "answer": "blue"},
            "3": {"question": "Which colour?", "imageId": "blue"}}).encode(),
        "renamed.csv": table(",")([{"img_path": f"images/{c}.png", "alt_text": f"a {c} tile"} for c in
                                   ("red", "blue", "gone")]),
    }  # fmt: skip
    pictures = {f"{folder}/{c}.png": png(c) for folder in ("images", "imagefolder", "imagefolder_csv") for c in
                ("red", "blue")}  # fmt: skip
    pictures |= {f"images/{c}.png": png(c) for c in ("green", "white")}
    pictures |= {f"images/dev-1-0-img{k}.png": png(c) for k, c in enumerate(("red", "green"))}
    pictures |= {f"images/{k:012d}.jpg": png(c) for k, c in ((1, "red"), (2, "blue"))}
    return files | pictures


if __name__ == "__main__":
    for name, data in layouts().items():
        (HERE / name).parent.mkdir(parents=True, exist_ok=True)
        (HERE / name).write_bytes(data)
