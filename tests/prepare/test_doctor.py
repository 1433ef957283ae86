"""The machine check: what it calls good, what it warns of, and that it leaves no trace and does not go online."""

from __future__ import annotations

import io
import socket
from pathlib import Path

import pytest
import torch
from rich.console import Console

from beholder.prepare import doctor
from beholder.prepare.doctor import Check, Diagnosis, diagnose


def test_a_diagnosis_covers_the_machine_without_network_or_traces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("doctor went online")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    found = diagnose()
    checks = found.checks

    names = {c.name for c in checks}
    assert {"Python", "packages", "device", "matrix products", "memory", "cache folder", "feature store"} <= names
    assert not [c for c in checks if c.level == "fail"], checks
    assert all(c.advice for c in checks if c.level != "ok")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("version", "level"), [((3, 10), "fail"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "warn")])
def test_a_python_outside_the_tested_range_is_told(version: tuple[int, int], level: str) -> None:
    assert doctor._python(version).level == level


@pytest.mark.parametrize(
    ("installed", "said"),
    [(None, "not installed"), ("2.10.0", "supported: "), ("2.13.0+cpu", "2.13.0+cpu; supported: ")],
)
def test_a_missing_or_unsupported_package_is_named_with_the_remedy(installed: str | None, said: str) -> None:
    required = ["torch>=2.11,!=2.13.0", "numpy>=1.26"]

    checks = list(doctor._packages(required, lambda name: "2.3.1" if name == "numpy" else installed))

    assert len(checks) == 1 and checks[0].level == "fail" and said in checks[0].found
    assert checks[0].advice.startswith('pip install "torch')


def test_a_local_build_of_a_supported_version_is_supported() -> None:
    (check,) = doctor._packages(["torch>=2.11,!=2.13.0"], lambda name: "2.15.0+cu132")

    assert check.level == "ok" and "torch 2.15.0+cu132" in check.found


def test_what_the_package_asks_for_is_known() -> None:
    assert any(r.startswith("torch") for r in doctor.requirements())


def test_an_unwritable_cache_is_a_failure_that_names_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path / "file" / "cache"))

    check = doctor._cache()

    assert check.level == "fail" and "BEHOLDER_CACHE" in check.advice


def test_a_missing_assets_folder_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_ASSETS", "/nowhere/at/all")

    assert doctor._assets().level == "fail"


def test_offline_flags_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor._hub().level == "warn"

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert doctor._hub().level == "ok"


def test_the_feature_store_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path))
    (tmp_path / "features" / "tower").mkdir(parents=True)
    (tmp_path / "features" / "tower" / "shard").write_bytes(b"x" * 20_000_000)

    assert doctor._store().found.startswith("0.02 GB")


def test_a_slow_bf16_is_told_with_the_settings_that_help(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {torch.float32: 100e9, torch.bfloat16: 30e9}
    monkeypatch.setattr(doctor, "matmul_rate", lambda device, dtype, seconds: rates[dtype])

    check = doctor._speed(torch.device("cpu"))

    assert check.level == "warn" and "train.precision=fp32" in check.advice


def test_findings_are_printed_with_the_advice_below() -> None:
    out = io.StringIO()
    checks = [Check("a", "ok", "[fine]"), Check("b", "warn", "hm", "do [this]"), Check("c", "fail", "no", "do that")]

    Diagnosis(tuple(checks)).print(Console(file=out, width=80, color_system=None))

    lines = [line.rstrip() for line in out.getvalue().splitlines() if line.strip()]
    assert lines[0].split() == ["ok", "a", "[fine]"]
    assert lines[-2:] == ["warn b: do [this]", "fail c: do that"]
