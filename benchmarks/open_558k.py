"""Opening and checking 558,000 LLaVA-Pretrain-shaped records: seconds and peak memory. Goal: < 60 s, < 2 GB.

Generates the file (not timed), then opens it and runs hygiene in a fresh process without any cache, so that the figure
is that of a first run; then once more with the caches. No images exist: what is measured is records and captions.

    python benchmarks/open_558k.py [--tokenizer FOLDER] [--records 558000]

Without ``--tokenizer`` a tiny byte-level one is used, which counts about 4 times as many tokens a caption.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COMMON = """
a the of in on with and at an is to for from by man woman person people dog cat car street house room table white black
red blue green brown yellow old young small large little big beautiful modern vintage wooden glass photo image picture
view background sky water beach sea mountain tree flower garden city night day sunset light sitting standing walking
holding wearing playing looking next front top side hand face hair dress shirt book
""".split()  # noqa: SIM905


def generate(path: Path, num_records: int) -> None:
    """Captions with LLaVA-Pretrain's lengths (median 9 words, about 13 tokens), Zipf-like words, 2 % that repeat."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    tail = ["".join(rng.choice(letters, n)) for n in rng.integers(3, 9, 40_000)]
    words = np.array(COMMON + tail)
    weights = np.arange(1, len(words) + 1) ** -1.3
    weights /= weights.sum()
    lengths = np.clip(rng.lognormal(2.2, 0.45, num_records), 1, 70).astype(int)
    drawn = rng.choice(len(words), lengths.sum(), p=weights)
    ends = np.cumsum(lengths)
    repeats = rng.random(num_records) < 0.02
    captions: list[str] = []
    with path.open("w") as file:
        file.write("[\n")
        for i in range(num_records):
            caption = " ".join(words[drawn[ends[i] - lengths[i] : ends[i]]])
            if repeats[i] and captions:
                caption = captions[int(rng.integers(len(captions)))]
            captions.append(caption)
            id = f"{i:09d}"
            human = "Give a brief description of the image.\n<image>" if i % 2 else "<image>\nWhat is this?"
            record = {
                "id": id, "image": f"{i % 659:05d}/{id}.jpg", "blip_caption": caption, "url": f"http://example.org/{id}.jpg",
                "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": caption}],
            }  # fmt: skip
            file.write(json.dumps(record, indent=2) + (",\n" if i < num_records - 1 else "\n]\n"))


def peak_mb() -> float:
    """Peak resident memory of this process, MB (1e6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def made_tokenizer(folder: Path) -> str:
    """A tiny byte-level tokenizer in ``folder``."""
    from beholder.prepare.tiny import tiny_tokenizer

    path = str(folder / "tokenizer")
    tiny_tokenizer(path)
    return path


def measure(path: Path, tokenizer_path: str, label: str) -> None:
    import transformers

    from beholder.config import HygieneLimits, SourceConfig
    from beholder.data.hygiene import apply_hygiene
    from beholder.data.sources import open_sources

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_path)
    before_mb = peak_mb()
    start, cpu_start = time.perf_counter(), time.process_time()
    source = SourceConfig(dataset="llava_pretrain", json_path=str(path))
    records = open_sources([source], image_token="<image>", max_images=2, on_reject="error")
    opened_s = time.perf_counter() - start
    report = apply_hygiene(records, tokenizer, HygieneLimits(), verify_images="none")
    total_s = time.perf_counter() - start
    print(f"{label}: opening {opened_s:.1f} s + hygiene {total_s - opened_s:.1f} s = {total_s:.1f} s "
          f"({time.process_time() - cpu_start:.1f} CPU seconds on {os.cpu_count()} cores); "
          f"peak RSS {peak_mb():,.0f} MB (of which imports and tokenizer {before_mb:,.0f} MB)")  # fmt: skip
    print(f"  {json.dumps(report.counts)}\n  duplicates {json.dumps(report.duplicates)}, "
          f"mean target {report.target_tokens.mean():.1f} tokens")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder with a fast tokenizer")
    parser.add_argument("--records", type=int, default=558_000)
    parser.add_argument("--measure", nargs=2, metavar=("FILE", "LABEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure[0]), args.tokenizer, args.measure[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = args.tokenizer or made_tokenizer(Path(folder))
        path = Path(folder) / "blip_laion_cc_sbu_558k.json"
        start = time.perf_counter()
        generate(path, args.records)
        seconds, size_mb = time.perf_counter() - start, path.stat().st_size / 1e6
        print(f"generated {args.records:,} records, {size_mb:,.0f} MB, in {seconds:.1f} s", flush=True)
        env = {**os.environ, "BEHOLDER_CACHE": str(Path(folder) / "cache")}
        for label in ("first run, no cache", "second run, cached"):
            command = [sys.executable, __file__, "--tokenizer", tokenizer, "--measure", str(path), label]
            subprocess.run(command, check=True, env=env)


if __name__ == "__main__":
    main()
