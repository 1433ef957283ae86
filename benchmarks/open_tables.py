"""Opening and checking 100,000 rows with pictures, as parquet and as an Arrow folder: seconds and peak memory.

Generates the files (not timed): pictures of about 20 kB each, as `datasets` writes them, in row groups of 100 rows,
then in a single one. Each is opened in a fresh process without any cache; then 2,000 pictures are read in a random
order and all of them in their own.

    python benchmarks/open_tables.py [--rows 100000] [--picture-kb 20]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

GROUP = 100


def batches(rows: int, num_bytes: int) -> Iterator[Any]:
    rng = np.random.default_rng(0)
    for start in range(0, rows, GROUP):
        pictures = rng.integers(0, 256, (min(GROUP, rows - start), num_bytes), np.uint8)
        cells = [{"bytes": b"\x89PNG\r\n" + p.tobytes(), "path": f"{start + k}.png"} for k, p in enumerate(pictures)]
        yield pa.RecordBatch.from_pylist([
            {"id": str(start + k), "image": cell, "caption": f"a picture of number {start + k} among many"}
            for k, cell in enumerate(cells)
        ])  # fmt: skip


def generate(folder: Path, rows: int, num_bytes: int) -> dict[str, Path]:
    paths = {name: folder / name for name in ("rows.parquet", "one_group.parquet", "arrow")}
    paths["arrow"].mkdir()
    schema = next(batches(1, 1)).schema
    file = "data-00000-of-00001.arrow"
    (paths["arrow"] / "state.json").write_text(json.dumps({"_data_files": [{"filename": file}]}))
    with (
        pq.ParquetWriter(paths["rows.parquet"], schema, compression="none") as parquet,
        pa.OSFile(str(paths["arrow"] / file), "wb") as sink,
        pa.ipc.new_stream(sink, schema) as stream,
    ):
        for batch in batches(rows, num_bytes):
            parquet.write_batch(batch, row_group_size=GROUP)
            stream.write_batch(batch)
    with pa.memory_map(str(paths["arrow"] / file)) as mapped:
        whole = pa.ipc.open_stream(mapped).read_all()
        pq.write_table(whole, paths["one_group.parquet"], compression="none", row_group_size=rows)
    return paths


def memory_mb(fact: str) -> float:
    """RssAnon: resident memory that no file backs (mapped files can be dropped). VmHWM: the peak of all of it."""
    with open("/proc/self/status") as file:
        facts = dict(line.split(":", 1) for line in file)
    return int(facts[fact].split()[0]) * 1024 / 1e6


def measure(path: Path, label: str) -> None:
    from beholder.config import HygieneLimits, SourceConfig
    from beholder.data.hygiene import apply_hygiene
    from beholder.data.images import read_bytes
    from beholder.data.sources import open_sources

    def clock(what: str) -> None:
        nonlocal start, cpu_start
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
        told = f"{memory_mb('RssAnon'):6,.0f} MB held, peak with mapped files {memory_mb('VmHWM'):6,.0f} MB"
        print(f"{label}: {what:32} {seconds:6.1f} s ({cpu:5.1f} CPU seconds), {told}", flush=True)
        start, cpu_start = time.perf_counter(), time.process_time()

    start, cpu_start = time.perf_counter(), time.process_time()
    records = open_sources([SourceConfig(json_path=str(path))], image_token="<image>", max_images=1, on_reject="error")
    clock(f"open {len(records):,} rows")
    apply_hygiene(records, None, HygieneLimits(), verify_images="exists")
    clock("check")
    for i in np.random.default_rng(1).permutation(len(records))[:2000]:
        read_bytes(records[int(i)].images[0])
    clock("2,000 pictures in random order")
    for _, refs in records.images_of():
        read_bytes(refs[0])
    clock("all pictures in order")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--picture-kb", type=float, default=20)
    parser.add_argument("--measure", nargs=2, metavar=("PATH", "LABEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.measure[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = generate(Path(folder), args.rows, round(args.picture_kb * 1000))
        print(f"{args.rows:,} rows, {paths['rows.parquet'].stat().st_size / 1e9:.2f} GB each", flush=True)
        for label, path in paths.items():
            env = {**os.environ, "BEHOLDER_CACHE": str(Path(folder) / "cache" / label)}
            subprocess.run([sys.executable, __file__, "--measure", str(path), label], check=True, env=env)


if __name__ == "__main__":
    main()
