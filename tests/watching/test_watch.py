"""`beholder watch`: a run's folder read as it grows, the page over HTTP, and that nothing is written."""
# ruff: noqa: E402  (nothing else is worth importing where the extra is not installed)

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
httpx: Any = pytest.importorskip("httpx")

from tests.conftest import TinyParts, make_config
from tests.web.running import KEY, running

from beholder.config.file import dump_config
from beholder.runs import RunDir
from beholder.stages import run_stage
from beholder.types import UserError
from beholder.watching import app as watching
from beholder.watching import so_far
from beholder.watching.so_far import Metrics, SoFar
from beholder.watching.state import album, state

FILES = Path(watching.__file__).parent


@contextmanager
def shown(run: Path, key: str | None = None) -> Iterator[str]:
    with running(watching.build_watch(run, key), key) as (port, _):
        yield f"http://127.0.0.1:{port}"


def line(step: int, **more: Any) -> bytes:
    row = {"step": step, "loss": 4 / step, "step_time_s": 0.1, "epoch": step / 10, "eta_s": 5.0} | more
    return json.dumps(row).encode() + b"\n"


def everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    found = [p for p in (folder, *folder.rglob("*"))]
    return {str(p): (s.st_ino, s.st_size, s.st_mtime_ns) for p in found if (s := p.stat())}


# ---------------------------------------------------------------------------------------------------------------
# metrics.jsonl as it grows


def test_a_log_is_read_from_where_it_was_left_and_a_torn_line_once_it_is_whole(tmp_path: Path) -> None:
    path, metrics = tmp_path / "metrics.jsonl", Metrics()
    assert not metrics.read(path), "it is not there"

    path.write_bytes(line(1) + line(2) + line(3)[:20])
    assert metrics.read(path) and metrics.step == 2
    assert not metrics.read(path), "nothing new"
    with path.open("ab") as file:
        file.write(line(3)[20:] + b"not json\n" + line(4, eval_loss=1.5, eval_examples=7))
    assert metrics.read(path)

    assert (metrics.step, metrics.damaged) == (4, 1)
    assert metrics.series["loss"].curve("train.loss", "nats/token").x == [1, 2, 3, 4]
    assert metrics.evaluated["eval_loss"] == 1.5


def test_a_resumed_run_takes_steps_back_and_a_removed_one_starts_over(tmp_path: Path) -> None:
    run, metrics = RunDir(tmp_path / "run").create(), Metrics()
    for step in range(1, 9):
        run.log({"step": step, "loss": 1.0})
    metrics.read(run.metrics_path)
    run.trim_metrics(5)
    run.log({"step": 6, "loss": 2.0})

    assert metrics.read(run.metrics_path)
    curve = metrics.series["loss"].curve("train.loss", "nats/token")
    assert (curve.x, curve.y[-1], metrics.step) == ([1, 2, 3, 4, 5, 6], 2.0, 6)

    run.metrics_path.unlink()
    assert metrics.read(run.metrics_path) and metrics.step == 0 and not metrics.series


def test_what_is_kept_and_sent_of_a_long_run_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(so_far, "MAX_CHUNK", 300_000)
    path, metrics = tmp_path / "metrics.jsonl", Metrics()
    steps = 12_001
    path.write_bytes(b"".join(line(step, **{f"quick_eval_exact/{step}": 1.0}) for step in range(1, steps + 1)))

    looks = 0
    while metrics.read(path):
        looks += 1

    assert looks > 4 and metrics.step == steps
    assert len(metrics.series) <= so_far.MAX_CURVES
    loss = metrics.series["loss"]
    assert len(loss._groups) <= so_far.MAX_POINTS
    curve = loss.curve("train.loss", "nats/token")
    assert len(curve.x) <= so_far.SENT_POINTS and (curve.x[-1], curve.y[-1]) == (steps, 4 / steps)
    assert sum(n for _, _, n in loss._groups) == steps, "no step is lost"


STRANGE = (
    b"[1]", b'{"step": true, "loss": 1}', b'{"loss": 1}', b'{"step": 1, "loss": "nan"}', b"\xff\xfe", b"[" * 5000,
    b'{"step": 1, "candidate": {"x": 1}, "monitors": {"a": "b"}}',
)  # fmt: skip


@pytest.mark.parametrize("row", STRANGE)
def test_a_strange_line_harms_nothing(tmp_path: Path, row: bytes) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_bytes(row + b"\n" + line(2))
    look = SoFar(folder)

    look.look()

    assert state(look)["progress"]["step"] == 2


@pytest.mark.parametrize("name", ["run.json", "baseline.json", "evidence.json", "config.yaml"])
@pytest.mark.parametrize(
    "content", [b"[]", b"5", b'{"measurements": 5}', b"[" * 20_000, b'{"a":' * 20_000, b"\xff\xfe\0"]
)
def test_a_poisoned_file_is_told_and_harms_nothing(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    (tmp_path / "metrics.jsonl").write_bytes(line(2))
    look = SoFar(tmp_path)

    for _ in range(2):
        look.look()
        told = state(look)

    assert told["progress"]["step"] == 2
    if content != b'{"measurements": 5}' or name != "run.json":  # which is an object
        assert any(w.startswith(f"{name}: ") for w in told["warnings"])


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "qual").mkdir()
    for name in (
        "run.json",
        "baseline.json",
        "evidence.json",
        "config.yaml",
        "metrics.jsonl",
        "qual/step_1_golden4.jsonl",
    ):
        os.mkfifo(tmp_path / name)
    look = SoFar(tmp_path)
    looking = threading.Thread(target=look.look, daemon=True)

    looking.start()
    looking.join(10)

    assert not looking.is_alive(), "somebody waits for who writes into the pipe"
    assert any("baseline.json: it is no file" in w for w in state(look)["warnings"])


def test_a_golden_set_without_end_is_shown_in_bounds(tmp_path: Path, tiny_parts: TinyParts) -> None:
    picture = next(tiny_parts.images.glob("*.png")).name
    cfg = make_config(tiny_parts, tmp_path / "else")
    (tmp_path / "config.yaml").write_text(dump_config(cfg))
    row = {
        "id": "a", "bucket": "b", "gt_text": "x", "pred_text": "word " * 50_000, "label_len": 1, "pred_tokens_len": 1,
        "image_relpath": ", ".join([picture] * 5_000), "hash": "0",
    }  # fmt: skip
    rows = "".join(json.dumps(row | {"id": str(k)}) + "\n" for k in range(30))
    (tmp_path / "qual").mkdir()
    (tmp_path / "qual" / "step_1_golden30.jsonl").write_text(rows)
    look = SoFar(tmp_path)

    look.look()
    told = album(look)

    assert len(told["cards"]) == so_far.NUM_PICTURES
    assert all(len(card["images"]) == so_far.MAX_IMAGES for card in told["cards"])
    assert len(json.dumps(told)) < 5_000_000


# ---------------------------------------------------------------------------------------------------------------
# A run


@pytest.fixture(scope="module")
def trained(tiny_parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run that was trained, and what a page that was open from before its start was told, look after look."""
    folder = tmp_path_factory.mktemp("watched")
    sets = {"train.train_steps": 24, "train.save_every": 8, "eval.golden_size": 4, "output_dir": str(folder / "xyzzy")}
    cfg = make_config(tiny_parts, folder, **sets)
    run, seen, done = Path(cfg.run_dir), [], threading.Event()

    def poll(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as web:
            while not done.wait(0.15):
                told = web.get("/state").json()
                if not seen or told != seen[-1]:
                    seen.append(told)
                assert web.get("/golden").status_code == 200

    with pytest.MonkeyPatch.context() as patch, shown(run) as url:
        patch.setattr(watching, "EVERY_S", 0.0)
        thread = threading.Thread(target=poll, args=(url,))
        thread.start()
        try:
            while not seen and thread.is_alive():  # else the run may have begun before anybody looked
                time.sleep(0.01)
            run_stage(cfg)
            time.sleep(0.5)
        finally:
            done.set()
            thread.join(60)
    return run, seen


def test_a_page_that_was_open_before_follows_a_run_from_start_to_evidence(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    run, seen = trained

    assert seen[0]["there"] is False and "no folder" in seen[0]["told"]
    live = [s for s in seen if s["there"] and s["told"] == "training"]
    assert live and all(g["state"] in ("waits", "passed", "failed") for s in live for g in s["gates"])
    assert any(0 < s["progress"]["step"] < 24 for s in live) and live[-1]["progress"]["total"] == 24
    assert not any(s["verdicts"] for s in live), "verdicts are the evidence's"
    last = seen[-1]
    assert last["ended"] and last["told"] == "finished" and len(last["verdicts"]) == 5
    assert {p["title"] for p in last["plots"]} >= {"Loss", "Gradient norm before clipping"}
    evidence = json.loads((run / "evidence.json").read_text())
    assert {g["name"]: g["state"] == "passed" for g in last["gates"]} == {
        g["name"]: g["passed"] for g in evidence["gates"]
    }


def test_golden_pictures_and_answers_are_there_before_the_evidence_is(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / "evidence.json").unlink()
    look = SoFar(tmp_path / "run")

    look.look()
    told = album(look)

    assert told["steps"] == [8, 15, 16, 24], "every save, and the end of the epoch"
    assert len(told["cards"]) == 4
    for card in told["cards"]:
        assert card["images"] and card["images"][0].startswith("data:image/png;base64,")
        assert all(shown is not None for shown in card["shown"])


def test_looking_writes_and_locks_nothing(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    before = everything(trained[0])
    look = SoFar(trained[0])

    with RunDir(trained[0]).lock():
        while_held = everything(trained[0])
        for _ in range(3):
            look.look()
            state(look)
            album(look)
        assert everything(trained[0]) == while_held

    assert look.changed == 1 and set(everything(trained[0])) == set(before)


def test_a_killed_run_a_broken_file_and_a_link_to_elsewhere_are_told(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    (run / "evidence.json").unlink()
    (run / "evidence.json").symlink_to(trained[0] / "evidence.json")
    (run / "baseline.json").write_text("{")
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    holder = {"pid": ended.pid, "host": os.uname().nodename, "started": 1.0}
    (run / ".lock.json").write_text(json.dumps(holder))
    look = SoFar(run)

    look.look()
    told = state(look)

    assert told["told"].startswith("ended without saying so") and not told["judged"]
    assert any("evidence.json: it is a link to somewhere else" in w for w in told["warnings"])
    assert any(w.startswith("baseline.json: ") for w in told["warnings"])

    shutil.rmtree(run)
    look.look()
    assert state(look)["there"] is False and album(SoFar(run))["cards"] == []


def test_text_of_a_run_cannot_turn_a_page_around(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"run_name": "<b>x</b>\u202e\x1b[0m", "status": "running"}))
    look = SoFar(run)

    look.look()

    assert state(look)["run"].startswith("<b>x</b>") and not re.search(
        "[\u202e\x1b]", json.dumps(state(look), ensure_ascii=False)
    )


# ---------------------------------------------------------------------------------------------------------------
# Over HTTP


def test_only_its_routes_answer_and_no_path_of_a_url_is_a_file(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    with shown(trained[0]) as url, httpx.Client(base_url=url, trust_env=False) as web:
        page = web.get("/")
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert "unsafe" not in page.headers["content-security-policy"]
        for path in ("/run.json", "/state/../run.json", "/..%2f..%2fetc/passwd", "/metrics.jsonl", "/%2e%2e/run.json",
                     "/docs", "/openapi.json", "/metrics"):  # fmt: skip
            answer = web.get(path)
            assert answer.status_code == 404 and answer.json()["error"]["code"] == "unknown_url", path
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert web.request(method, "/state").status_code == 405
        first = web.get("/state")
        again = web.get("/state", headers={"If-None-Match": first.headers["etag"]})
        assert again.status_code == 304 and not again.content
        assert web.get("/state", headers={"Host": "evil.example"}).status_code == 403


def test_with_a_key_the_page_is_open_and_the_run_is_not(trained: tuple[Path, list[dict[str, Any]]]) -> None:
    with shown(trained[0], KEY) as url, httpx.Client(base_url=url, trust_env=False) as web:
        assert [web.get(p).status_code for p in ("/", "/watch.css", "/watch.js", "/health")] == [200] * 4
        assert [web.get(p).status_code for p in ("/state", "/golden", "/nothing")] == [401] * 3
        assert web.get("/state", headers={"Authorization": f"Bearer {KEY}"}).json()["run"] == "tiny"
        assert trained[0].name not in web.get("/").text


def test_a_file_is_no_run_and_others_need_a_key(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give the folder of a run"):
        watching.watch(tmp_path / "file")
    with pytest.raises(UserError, match="so a key is needed"):
        watching.watch(tmp_path, host="0.0.0.0")


def test_the_page_fetches_nothing_from_elsewhere_and_sets_text_as_text() -> None:
    for name in ("watch.html", "watch.css", "watch.js"):
        text = (FILES / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", text), name
    script = (FILES / "watch.js").read_text()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)
    assert "style=" not in (FILES / "watch.html").read_text() and "onclick" not in (FILES / "watch.html").read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_a_browser_draws_it_without_an_error_and_runs_nothing_of_a_run(
    trained: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained[0], run)
    hostile = "<img src=x onerror=\"document.title='ran'\"><script>document.title='ran'</script>"
    (run / "evidence.json").unlink()
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"run_name": hostile, "status": "running", "stopped": hostile}))
    with shown(run) as url:
        done = subprocess.run(
            [str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
             f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=4000", "--dump-dom", url],
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip

    assert "&lt;script&gt;" in done.stdout and "<title>ran" not in done.stdout
    assert done.stdout.count("<svg") >= 3 and done.stdout.count('class="pictures"') == 4
    assert "CONSOLE" not in done.stderr, [text for text in done.stderr.splitlines() if "CONSOLE" in text]


def test_the_command_says_where_and_stops_with_ctrl_c(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "beholder", "watch", str(tmp_path / "none"), "--port", "0"], stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            said = process.stdout.readline()
            found = re.search(r"is shown at (http://127\.0\.0\.1:\d+/)", said)
            assert found, said
            with httpx.Client(trust_env=False) as web:
                assert web.get(found[1] + "state").json()["there"] is False
        finally:
            process.send_signal(2)
        assert process.wait(30) == 0
