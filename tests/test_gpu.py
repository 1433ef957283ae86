"""`benchmarks/gpu.py`: its equality checks on a GPU, the whole of it dry on a CPU, and that it can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu
from align_step import SEED_STEP_S

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("what", gpu.CHECKS)
def test_on_a_gpu(what: str, tmp_path: Path) -> None:
    try:
        print(gpu.CHECKS[what](gpu.Bench(tmp_path / "own", tmp_path / "parts", torch.device("cuda"))))
    except gpu.Missing as e:
        pytest.skip(str(e))


@pytest.mark.slow
def test_dry_it_runs_whole_without_what_a_gpu_machine_may_lack(tmp_path: Path) -> None:
    """A minute or two: every line but those for a GPU alone."""
    lacking = (
        "resvg_py",
        "gguf",
        "typer",
        "beartype",
        "pytest",
        "hypothesis",
        "sacrebleu",
        "sentencepiece",
    )
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({lacking!r}))\n"
        f"import gpu; sys.exit(gpu.main(['--dry', '--out', {str(tmp_path / 'out')!r}]))"
    )
    path = os.pathsep.join(map(str, (ROOT / "src", ROOT / "benchmarks")))
    env = {**os.environ, "PYTHONPATH": path, "BEHOLDER_CACHE": str(tmp_path / "cache")}

    result = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)

    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    rows = {(r["part"], r["what"]): r for r in record["rows"]}
    assert len(rows) == len(gpu.CHECKS) + 2 + 1 + len(gpu.native_cases(dry=True)) + 3 + len(gpu.cases(dry=True))
    not_here = [what for (_, what), r in rows.items() if r["result"] == "not here"]
    assert all("flash" in what or "flex" in what for what in not_here) and len(not_here) == 3
    assert {r["result"] for r in rows.values()} == {"ok", "not here"}
    timed = [("speed", c) for c in gpu.cases(dry=True)] + [("native", c) for c in gpu.native_cases(dry=True)]
    for part, case in timed:
        numbers = rows[part, case.name]["numbers"]
        assert numbers["samples_per_s"] == pytest.approx(case.batch / numbers["step_s"])
        assert 0 < numbers["matrix_share"] < 2 and numbers["supervised_tokens_per_s"] > 0 and numbers["peak_gb"] > 0
    table = (tmp_path / "out" / "gpu.md").read_text().splitlines()
    assert len(table) == 4 + len(rows) and str(SEED_STEP_S) in table[2]
    assert all(line.count("|") == table[2].count("|") for line in table[2:])


def test_one_failure_is_a_row_and_the_rest_goes_on_within_its_time(tmp_path: Path) -> None:
    sheet = gpu.Sheet(tmp_path, CPU, minutes=1)

    def fails() -> str:
        raise RuntimeError("CUDA error | of a\nkind")

    def absent() -> str:
        raise gpu.Missing("no such package")

    started = time.perf_counter()
    went = [
        sheet.row("a", "fails", fails, 5), sheet.row("a", "absent", absent, 5),
        sheet.row("a", "hangs", lambda: str(time.sleep(60)), 1), sheet.row("a", "works", lambda: "fine", 5),
    ]  # fmt: skip
    sheet.total_s = 0
    went.append(sheet.row("a", "late", lambda: "never done", 5))

    assert time.perf_counter() - started < 30
    assert went == [False, False, False, True, False]
    results = [r["result"] for r in json.loads((tmp_path / "gpu.json").read_text())["rows"]]
    assert results == ["FAILED", "not here", "no time", "ok", "no time"]
    assert "| a | fails | FAILED |" in (tmp_path / "gpu.md").read_text()
    assert "RuntimeError: CUDA error / of a kind |" in (tmp_path / "gpu.md").read_text()


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")

    with pytest.raises(SystemExit):
        gpu.main([])

    assert "--dry" in capsys.readouterr().err


def test_samples_that_see_each_other_are_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu.Bench(tmp_path / "own", tmp_path / "parts", CPU)
    gpu.packed_is_unpacked(bench, "eager")
    real = gpu.collate

    def leaking(samples: Any, layout: Any) -> Any:
        batch = real(samples, layout)
        counting = torch.arange(batch.position_ids.shape[1]).expand_as(batch.position_ids)
        # Only what attention sees: which tokens are targets still goes by the restarts.
        return replace(batch, position_ids=counting) if layout.packing else batch

    monkeypatch.setattr(gpu, "collate", leaking)
    with pytest.raises(AssertionError, match="apart by"):
        gpu.packed_is_unpacked(bench, "eager")
