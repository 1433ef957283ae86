"""Opening and checking 100,000 records of several pictures, Mantis-shaped parquet with the pictures in it: seconds and
peak memory. Goal: < 60 s, < 2 GB.

Generates the files (not timed), then opens them and runs hygiene in a fresh process without any cache; then once more
with the caches. ``--split`` also makes the split, for which the bytes of every picture are read and hashed. Every
record has 1 to 5 pictures of about 8 KB, half of them shown with others before.

    python benchmarks/open_interleaved.py [--tokenizer FOLDER] [--records 100000] [--split]

Without ``--tokenizer`` a tiny byte-level one is used, which counts about 4 times as many tokens an answer.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from open_558k import COMMON, made_tokenizer, peak_mb

FILE_RECORDS = 10_000
"""Mantis-Instruct's subsets have a few thousand to some ten thousand records a file."""


def generate(folder: Path, num_records: int) -> int:
    """Files of `FILE_RECORDS`, a few turns a record, markers before the first question; gives the number of images."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(0)
    words = np.array(COMMON)

    def picture() -> bytes:
        coarse = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        out = io.BytesIO()
        Image.fromarray(coarse).resize((224, 224), Image.Resampling.BICUBIC).save(out, format="JPEG", quality=80)
        return out.getvalue()

    pool = [picture() for _ in range(200)]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([
        ("id", pa.string()), ("images", pa.list_(image)), ("conversation", pa.list_(turn)), ("source", pa.string()),
    ])  # fmt: skip
    total = 0
    for start in range(0, num_records, FILE_RECORDS):
        path = folder / f"train-{start // FILE_RECORDS:05d}.parquet"
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(start, min(start + FILE_RECORDS, num_records), 500):
                rows = []
                for i in range(first, min(first + 500, num_records)):
                    n = int(rng.integers(1, 6))
                    total += n
                    # A JPEG ends at its end mark: what follows makes the bytes a picture's own.
                    pictures = [
                        pool[int(rng.integers(len(pool)))] + (b"" if rng.random() < 0.5 else f"{i}-{k}".encode())
                        for k in range(n)
                    ]
                    turns = []
                    for t in range(int(rng.integers(1, 4))):
                        said = [" ".join(rng.choice(words, int(rng.integers(4, 16)))) for _ in range(2)]
                        turns += [
                            {"role": "user", "content": "<image> " * n * (t == 0) + said[0]},
                            {"role": "assistant", "content": said[1]},
                        ]
                    images = [{"bytes": p, "path": None} for p in pictures]
                    rows.append({"id": f"made-{i}", "images": images, "conversation": turns, "source": "made"})
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    return total


def measure(folder: Path, tokenizer_path: str, label: str, with_split: bool) -> None:
    import transformers

    from beholder.config import HygieneLimits, SourceConfig
    from beholder.data.hygiene import apply_hygiene
    from beholder.data.sources import open_sources
    from beholder.data.splits import make_split

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    before_mb = peak_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    source = SourceConfig(json_path=str(folder))
    records = open_sources([source], image_token="<image>", max_images=6, on_reject="collect", chat=True)
    opened_s = time.perf_counter() - start
    limits = HygieneLimits(min_tokens=1, max_tokens=None, spam=())
    report = apply_hygiene(records, tokenizer, limits, verify_images="exists")
    total_s = time.perf_counter() - start
    print(f"{label}: opening {opened_s:.1f} s + hygiene {total_s - opened_s:.1f} s = {total_s:.1f} s "
          f"({time.process_time() - cpu_start:.1f} CPU seconds on {os.cpu_count()} cores); "
          f"peak RSS {peak_mb():,.0f} MB (of which imports and tokenizer {before_mb:,.0f} MB)")  # fmt: skip
    print(f"  {json.dumps(report.counts)}", flush=True)
    if with_split:
        split = make_split(
            records, report.accepted, report.target_tokens, mode="ratio", eval_size=None, eval_ratio=0.02,
            len_buckets=[0, 64, 128, 999_999], max_samples=None, seed=1, same_image="content",
        )  # fmt: skip
        print(f"  split: {time.perf_counter() - start - total_s:.1f} s, held out {len(split.eval):,}; peak RSS "
              f"{peak_mb():,.0f} MB", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder with a fast tokenizer")
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--split", action="store_true", help="make the split too")
    parser.add_argument("--measure", nargs=2, metavar=("FOLDER", "LABEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.tokenizer, args.measure[1], args.split)
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or made_tokenizer(Path(folder))
        data = Path(folder) / "mantis"
        data.mkdir()
        start = time.perf_counter()
        images = generate(data, args.records)
        size_mb = sum(p.stat().st_size for p in data.iterdir()) / 1e6
        seconds = time.perf_counter() - start
        print(f"generated {args.records:,} records with {images:,} pictures, {size_mb:,.0f} MB, in {seconds:.1f} s",
              flush=True)  # fmt: skip
        env = {**os.environ, "BEHOLDER_CACHE": str(Path(folder) / "cache")}
        for label in ("first run, no cache", "second run, cached"):
            command = [sys.executable, __file__, "--tokenizer", tokenizer, "--measure", str(data), label]
            subprocess.run([*command, *(["--split"] if args.split else [])], check=True, env=env)


if __name__ == "__main__":
    main()
