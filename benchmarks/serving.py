"""What `beholder serve` gives beside a plain loop: requests/s and the wait for an answer at 1, 8 and 32 clients, and
its memory under load.

    beholder export outputs/quickstart/instruct --out /tmp/exported
    python benchmarks/serving.py outputs/quickstart/instruct /tmp/exported
    python benchmarks/serving.py outputs/quickstart/instruct /tmp/exported --minutes 10        (memory)

The run's held-out questions with their pictures, greedy answers of at most ``--max-tokens`` tokens. The server is a
process of its own and is asked over HTTP; the loop is transformers' ``generate`` on the export, one question after
another, in this process. They take turns, round by round, so only one of them works at a time. Answers of server and
loop are compared (the export computes in its own precision, batches round otherwise: equal in fp32 only).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from beholder.train.trained import open_trained
from beholder.use.export import AskedSample, askable, held_out
from beholder.use.parity import messages

Asked = list[tuple[float, str]]
"""Of each question: seconds until the answer was there, and the answer."""


def questions(run: str, count: int) -> list[AskedSample]:
    opened = open_trained(run, torch.device("cpu"))
    return askable(opened, count, held_out(opened))


def start(run: str, max_waiting: int) -> tuple[subprocess.Popen[str], str]:
    """The server's process and its address."""
    command = [sys.executable, "-m", "beholder", "serve", run, "--port", "0", "--max-waiting", str(max_waiting)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    for line in server.stdout:
        if found := re.search(r"answers at (http\S+)", line):
            return server, found[1]
    raise SystemExit(f"beholder serve ended with {server.wait()}")


def ask_server(url: str, bodies: Sequence[bytes], clients: int) -> Asked:
    """Every client asks its share, one question after another on one connection."""
    at = urlsplit(url)

    def client(mine: Sequence[bytes]) -> Asked:
        link = http.client.HTTPConnection(at.netloc, timeout=600)
        found: Asked = []
        for body in mine:
            began = time.perf_counter()
            link.request("POST", f"{at.path}/chat/completions", body, {"Content-Type": "application/json"})
            answer = link.getresponse()
            told = json.loads(answer.read())
            if answer.status != 200:
                raise SystemExit(f"{answer.status}: {told}")
            found.append((time.perf_counter() - began, told["choices"][0]["message"]["content"]))
        link.close()
        return found

    with ThreadPoolExecutor(clients) as pool:
        shares = list(pool.map(client, [bodies[k::clients] for k in range(clients)]))
    return [shares[k % clients][k // clients] for k in range(len(bodies))]


def plain_loop(export: str, max_tokens: int) -> Callable[[Sequence[AskedSample]], Asked]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(export, trust_remote_code=True)
    model: Any = AutoModelForImageTextToText.from_pretrained(export, trust_remote_code=True, dtype="auto").eval()

    @torch.no_grad()
    def ask(samples: Sequence[AskedSample]) -> Asked:
        found: Asked = []
        for sample in samples:
            began = time.perf_counter()
            text = processor.apply_chat_template(sample.messages, add_generation_prompt=True, tokenize=False)
            inputs = processor(images=sample.images, text=text, return_tensors="pt")
            ids = model.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
            new = ids[0, inputs["input_ids"].shape[1] :]
            found.append((time.perf_counter() - began, processor.decode(new, skip_special_tokens=True).strip()))
        return found

    return ask


def resident_mb(pid: int) -> float:
    """Resident memory of a process (Linux)."""
    told = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", told)
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("export")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=96, help="of each case in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--minutes", type=float, default=0.0, help="of load at the most clients, for memory")
    args = parser.parse_args()
    samples = questions(args.run, args.requests)
    about = {"model": Path(args.run).name, "max_tokens": args.max_tokens}
    server, url = start(args.run, max(args.clients))
    try:
        link = http.client.HTTPConnection(urlsplit(url).netloc)
        link.request("GET", "/v1/models")
        about["model"] = json.loads(link.getresponse().read())["data"][0]["id"]
        bodies = [json.dumps({**about, "messages": messages(s)}).encode() for s in samples]
        loop = plain_loop(args.export, args.max_tokens)
        cases: dict[str, Callable[[], Asked]] = {"plain loop": lambda: loop(samples)}
        cases |= {f"{n} clients": lambda n=n: ask_server(url, bodies, n) for n in args.clients}
        took: dict[str, list[float]] = {name: [] for name in cases}
        waits: dict[str, list[float]] = {name: [] for name in cases}
        said: dict[str, list[str]] = {}
        ask_server(url, bodies[:8], 4)
        loop(samples[:4])
        for _ in range(args.rounds):
            for name, case in cases.items():
                began = time.perf_counter()
                found = case()
                took[name].append(time.perf_counter() - began)
                waits[name] += [seconds for seconds, _ in found]
                said[name] = [text for _, text in found]
        print(f"{len(samples)} questions, {args.rounds} rounds, torch {torch.__version__}, {os.cpu_count()} cores")
        print(f"{'':<12} requests/s   p50 s   p95 s   x the loop   answers as the loop's")
        for name in cases:
            ratio = statistics.median(a / b for a, b in zip(took["plain loop"], took[name], strict=True))
            equal = sum(a == b for a, b in zip(said[name], said["plain loop"], strict=True))
            ways = statistics.quantiles(waits[name], n=20)
            print(
                f"{name:<12} {len(samples) / statistics.median(took[name]):>10.2f} {ways[9]:>7.2f} {ways[18]:>7.2f} "
                f"{ratio:>12.2f} {equal:>12} of {len(samples)}"
            )
        if args.minutes:
            print(f"\nmemory of the server at {max(args.clients)} clients (MiB resident)")
            end, began = time.monotonic() + 60 * args.minutes, time.monotonic()
            asked = 0
            print(f"  {0:>5.1f} min {resident_mb(server.pid):>8.0f}")
            while time.monotonic() < end:
                asked += len(ask_server(url, bodies, max(args.clients)))
                print(
                    f"  {(time.monotonic() - began) / 60:>5.1f} min {resident_mb(server.pid):>8.0f}  {asked:,} requests"
                )
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
