"""Looks over the machine before a run does: versions, device, speed, memory, disks, caches, offline flags.

Nothing is downloaded, no network is touched, and nothing is left behind. Each finding says what to do when it is not
right.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from beholder.config import FeaturesConfig
from beholder.runs import cache_dir, version_of
from beholder.store.features import store_dir
from beholder.train.distributed import pick_device

Level = Literal["ok", "warn", "fail"]

TESTED_PYTHON = ((3, 11), (3, 13))
"""First and last minor version the tests run on."""
MIN_RAM_GB, MIN_DISK_GB = 4.0, 5.0
"""What the quickstart needs, with room to spare."""


@dataclass(frozen=True)
class Check:
    """One finding. warn: it works, but not as well as it could. fail: a run would not start."""

    name: str
    level: Level
    found: str
    advice: str = ""


def _judge(name: str, good: bool, found: str, advice: str, level: Level = "warn") -> Check:
    return Check(name, "ok", found) if good else Check(name, level, found, advice)


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found, in the order a person would ask."""

    checks: tuple[Check, ...]

    @property
    def failed(self) -> bool:
        return any(c.level == "fail" for c in self.checks)

    def print(self, console: Console) -> None:
        """The findings as a table, then what to do about those that are not right."""
        colour = {"ok": "green", "warn": "yellow", "fail": "bold red"}
        table = Table(show_header=False, box=None, pad_edge=False)
        for check in self.checks:
            table.add_row(f"[{colour[check.level]}]{check.level}[/]", escape(check.name), escape(check.found))
        console.print(table)
        for check in self.checks:
            if check.level != "ok" and check.advice:
                label = f"[{colour[check.level]}]{check.level}[/]"
                console.print(f"\n{label} {escape(check.name)}: {escape(check.advice)}", soft_wrap=True)

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(c) for c in self.checks]


def diagnose() -> Diagnosis:
    """Every check. Takes a second or two (two small matrix products are timed)."""
    device = torch.device(pick_device("auto").type)
    software = _python(), *_packages(), _torchvision(), _describe(device), _speed(device), _attention()
    return Diagnosis((*software, _ram(), _shared_memory(), *_disks(), _cache(), _store(), _assets(), _hub()))


# ---------------------------------------------------------------------------------------------------------------
# Software


def _python(version: tuple[int, int] | None = None) -> Check:
    version = version or sys.version_info[:2]
    first, last = TESTED_PYTHON
    text = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    asked = f"Beholder is tested on Python {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    if version < first:
        return Check("Python", "fail", text, f"{asked}; make an environment with one of them.")
    return _judge("Python", version <= last, text, f"{asked}; if something is odd, try one of them.")


def requirements() -> list[str]:
    """What the package asks for, from its installed metadata; nothing where it is not installed."""
    try:
        return [r for r in importlib.metadata.requires("beholder") or () if "extra ==" not in r]
    except importlib.metadata.PackageNotFoundError:
        return []


def _packages(
    required: list[str] | None = None, installed: Callable[[str], str | None] = version_of
) -> Iterator[Check]:
    required = requirements() if required is None else required
    if not required:
        yield Check("packages", "warn", "unknown", "The package's own metadata is missing; install it with pip.")
        return
    good: list[str] = []
    for text in required:
        requirement = Requirement(text)
        version = installed(requirement.name)
        pip = f'pip install "{requirement.name}{requirement.specifier}"'
        if version is None:
            yield Check(requirement.name, "fail", "not installed", pip)
        # A local label such as +cu130 says which build, not which version.
        elif not requirement.specifier.contains(Version(version).base_version, prereleases=True):
            yield Check(requirement.name, "fail", f"{version}; supported: {requirement.specifier}", pip)
        elif requirement.name in ("torch", "torchvision", "transformers", "timm"):
            good.append(f"{requirement.name} {version}")
    if good:
        yield Check("packages", "ok", ", ".join(good))


def _torchvision() -> Check:
    """timm imports torchvision, and a torchvision built for another torch fails only when it is imported."""
    name = "torchvision with timm"
    try:
        importlib.import_module("torchvision")
        importlib.import_module("timm")
    except Exception as e:  # any failure of someone else's import is the finding
        advice = (
            "Install the torchvision that belongs to your torch, from the same index: pip install torch torchvision"
        )
        return Check(name, "fail", f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}", advice)
    return Check(name, "ok", "imports")


def _attention() -> Check:
    flash = [n for n in ("flash_attn", "flash_attn_interface") if importlib.util.find_spec(n) is not None]
    return Check("attention", "ok", "sdpa, eager" + (f", {', '.join(flash)}" if flash else "; no flash-attn package"))


# ---------------------------------------------------------------------------------------------------------------
# Device


def _describe(device: torch.device) -> Check:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(0)
        count = torch.cuda.device_count()
        text = f"{count} x {properties.name}, {properties.total_memory / 1e9:.0f} GB"
        return Check("device", "ok", text)
    if device.type == "mps":
        return Check("device", "ok", "Apple GPU (mps)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"CPU, {cores} cores, {threads} torch threads"
    if threads > cores:
        advice = f"More threads than cores slow each other down: set OMP_NUM_THREADS={cores}."
        return Check("device", "warn", text, advice)
    unseen = bool(torch.version.cuda and shutil.which("nvidia-smi"))
    advice = "torch does not see the GPU: compare `nvidia-smi` with torch.version.cuda."
    return _judge("device", not unseen, text, advice)


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of a matrix product on ``device``: the best of several runs, so that other load counts little."""
    n = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    (a @ b).sum().item()  # warm-up: thread pools and kernel selection
    best, end = math.inf, time.perf_counter() + seconds
    repeats = 20 if device.type == "cuda" else 1
    while time.perf_counter() < end:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            torch.mm(a, b)
        wait()
        best = min(best, (time.perf_counter() - start) / repeats)
    return 2.0 * n**3 / best


def _speed(device: torch.device) -> Check:
    bf16, fp32 = (matmul_rate(device, dtype, 0.2) / 1e9 for dtype in (torch.bfloat16, torch.float32))
    return _judge(
        "matrix products", bf16 >= 0.8 * fp32, f"bf16 {bf16:,.0f}, fp32 {fp32:,.0f} GFLOP/s",
        "bf16 is slower than fp32 here. Runs are quicker with --set train.precision=fp32 --set "
        "model.llm.precision=fp32 --set model.vision.precision=fp32, at twice the memory.",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------
# Memory and disks


def memory_limit() -> int | None:
    """Bytes a container may use, when it is told less than the machine has."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal() and int(text) < psutil.virtual_memory().total:
            return int(text)
    return None


def _ram() -> Check:
    memory = psutil.virtual_memory()
    limit = memory_limit()
    free = memory.available if limit is None else min(memory.available, limit)
    text = f"{free / 1e9:.1f} GB free of {(limit or memory.total) / 1e9:.1f} GB" + (" (container)" if limit else "")
    advice = f"The quickstart wants {MIN_RAM_GB:g} GB. `beholder plan CONFIG` estimates a run's."
    return _judge("memory", free >= MIN_RAM_GB * 1e9, text, advice)


def _shared_memory(folder: str = "/dev/shm") -> Check:
    if not Path(folder).is_dir():
        return Check("shared memory", "ok", "not limited")
    total = shutil.disk_usage(folder).total
    return _judge(
        "shared memory", total >= 256e6, f"{total / 1e9:.2f} GB",
        "Loader processes hand batches over through it: give the container more (--shm-size=1g) or keep "
        "data.num_workers: 0.",
    )  # fmt: skip


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _disks() -> Iterator[Check]:
    for name, folder in (("disk of the cache", cache_dir()), ("disk of this folder", Path.cwd())):
        free = shutil.disk_usage(_existing(folder)).free
        advice = f"Free some space ({folder}), or point BEHOLDER_CACHE to another disk."
        yield _judge(name, free >= MIN_DISK_GB * 1e9, f"{free / 1e9:.1f} GB free", advice)


def _cache() -> Check:
    folder = cache_dir()
    try:
        with tempfile.TemporaryFile(dir=_existing(folder)) as file:
            file.write(b"x")
    except OSError:
        advice = "Set BEHOLDER_CACHE to a folder you can write to."
        return Check("cache folder", "fail", f"{folder}: not writable", advice)
    return Check("cache folder", "ok", str(folder) + ("" if folder.exists() else " (made on first use)"))


def _store() -> Check:
    folder = store_dir(FeaturesConfig())
    used = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        try:
            used += path.stat().st_blocks * 512 if path.is_file() else 0  # shards are sparse files
        except OSError:
            continue
    free = shutil.disk_usage(_existing(folder)).free
    advice = "It holds more than is left on the disk; deleting it is safe."
    return _judge("feature store", used <= free, f"{used / 1e9:.2f} GB in {folder}", advice)


def _assets() -> Check:
    given = os.environ.get("BEHOLDER_ASSETS")
    if not given:
        return Check("quickstart parts", "ok", "downloaded on first use (BEHOLDER_ASSETS is not set)")
    there = Path(given).expanduser().is_dir()
    text = f"BEHOLDER_ASSETS={given}" + ("" if there else ": no such folder")
    advice = "Point it to the folder with the three wheel files, or unset it."
    return _judge("quickstart parts", there, text, advice, "fail")


def _hub() -> Check:
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    flags = [n for n in names if os.environ.get(n, "").upper() in ("1", "ON", "YES", "TRUE")]
    text = f"offline ({', '.join(flags)})" if flags else "may be asked (no offline flag; not contacted now)"
    advice = "Hub names load only if they are in the local cache; folders and files always do."
    return _judge("model hub", not flags, text, advice)
