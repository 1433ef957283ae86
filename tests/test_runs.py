"""The run folder: nothing half-written, one writer at a time, and a log that a crash and a resume leave exact."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from beholder.prepare import packages
from beholder.runs import (
    RunDir,
    atomic_write,
    hang_up_signals,
    is_held,
    provenance,
    sha256_file,
    stop_signals,
    to_json,
    write_durably,
)
from beholder.store.rows import RowStore
from beholder.types import Status, UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def fail_after(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """Let this process write ``num_bytes`` more through os.write; then the disk is full."""
    left = [num_bytes]
    real = os.write

    def write(fd: int, data: bytes) -> int:
        if fd <= 2:
            return real(fd, data)
        if left[0] <= 0:
            raise OSError(28, "No space left on device")
        written = real(fd, bytes(data)[: left[0]])
        left[0] -= written
        return written

    monkeypatch.setattr(os, "write", write)


def test_atomic_write_replaces_whole_files_and_leaves_nothing_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, "first")
    atomic_write(path, b"second")
    assert path.read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("free", [0, 1, 500, 999])
def test_full_disk_keeps_the_old_content_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, "old")
    with monkeypatch.context() as m:
        fail_after(m, free)
        with pytest.raises(UserError, match=r"cannot write .*No space left.*Free some space"):
            atomic_write(path, b"x" * 1000)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@contextmanager
def read_only() -> Iterator[Path]:
    """A run folder that this process may not write to, also where it is root's."""
    folder, me = Path(tempfile.mkdtemp()), os.geteuid()
    for name in ("checkpoints", "splits", "qual"):
        (folder / "run" / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "run").chmod(0o555)
    try:
        if me == 0:
            os.seteuid(65534)
        yield folder / "run"
    finally:
        os.seteuid(me)
        (folder / "run").chmod(0o755)
        shutil.rmtree(folder)


def test_every_error_of_the_disk_names_the_file_and_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*a: No such file.*was removed meanwhile"):
        write_durably(tmp_path / "nowhere" / "a", b"x")
    with pytest.raises(UserError, match=r"cannot write .*: Is a directory. .*See to the disk"):
        write_durably(tmp_path, b"x")
    with pytest.raises(UserError, match=r"cannot write .*xx … x.*: File name too long. Set a shorter run_name"):
        RunDir(tmp_path / ("x" * 300)).create()
    denied = r"cannot write .*: Permission denied. Nothing .* is touched. Make the folder writable"
    with read_only() as folder:
        for write in (write_durably, atomic_write):
            with pytest.raises(UserError, match=denied):
                write(folder / "a", b"x")
        with pytest.raises(UserError, match=denied):
            RunDir(folder / "inner").create()
        with pytest.raises(UserError, match=denied), RunDir(folder).lock():
            pass


@pytest.mark.parametrize("back", [False, True])
def test_a_run_folder_that_is_removed_under_its_run_is_told_and_not_made_anew(tmp_path: Path, back: bool) -> None:
    run = RunDir(tmp_path / "run")
    with pytest.raises(UserError, match=f"was {'replaced' if back else 'removed'} while its run went on"):
        with run.lock():
            run.log({"step": 1})
            run.path.rename(tmp_path / "elsewhere")  # as a removal, but its inode is not given away again
            if back:
                run.path.mkdir()
            with pytest.raises(UserError, match="while its run went on"):
                run.write_json("a/evidence.json", {})
            run.log({"step": 2})
    assert run.path.exists() == back and not (run.path / "metrics.jsonl").exists()


def test_sha256_file_is_the_hash_of_the_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_json_is_strict_even_for_numbers_json_does_not_know() -> None:
    numpy = pytest.importorskip("numpy")
    value = {"a": float("nan"), "b": [float("inf"), 1.5], "c": numpy.float32(0.5), "d": Path("x"), "e": numpy.arange(2)}
    assert json.loads(to_json(value)) == {"a": "nan", "b": ["inf", 1.5], "c": 0.5, "d": "x", "e": [0, 1]}
    assert float(json.loads(to_json(0.1 + 0.2))) == 0.1 + 0.2


def test_resume_drops_later_steps_and_a_torn_line_and_keeps_the_rest_bit_for_bit(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    losses = {i: 1 / (i + 0.3) for i in range(1, 8)}
    run.log({"event": "start"})
    for i, loss in losses.items():
        run.log({"step": i, "loss": loss})
    with run.metrics_path.open("ab") as f:
        f.write(b'{"step": 8, "lo')
    assert len(run.metrics()) == 8
    assert run.trim_metrics(5) == 3
    assert run.metrics() == [{"event": "start"}, *({"step": i, "loss": losses[i]} for i in range(1, 6))]
    run.log({"step": 6})
    assert run.metrics()[-1] == {"step": 6}
    assert run.trim_metrics(6) == 0


def test_a_spoiled_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    run.metrics_path.write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON line"):
        run.metrics()


def test_status_keeps_the_facts_given_before(tmp_path: Path) -> None:
    run = RunDir(tmp_path).create()
    run.set_status(Status.RUNNING, git="abc")
    run.set_status(Status.SUCCEEDED, seconds=3)
    record = run.read_json("run.json")
    assert (record["status"], record["git"], record["seconds"]) == ("succeeded", "abc", 3)
    with pytest.raises(ValueError, match="fine"):
        run.set_status("fine")  # type: ignore[arg-type]


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; is .* a run folder"):
        run.read_json("run.json")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        run.read_json("run.json")


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file, not a folder"):
        RunDir(tmp_path / "out" / "run").create()


def fork(child: Callable[[Callable[[], None]], None]) -> int:
    """Run ``child(ready)`` in a forked process; returns its pid once it has called ``ready()``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(lambda: os.close(write))
        finally:
            os._exit(0)
    os.close(write)
    assert os.read(read, 1) == b""
    os.close(read)
    return pid


def kill(pid: int) -> None:
    with suppress(ProcessLookupError, ChildProcessError):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_second_process_on_a_run_folder_is_told_who_holds_it_and_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    def child(ready: Callable[[], None]) -> None:
        with RunDir(tmp_path).lock():
            ready()
            time.sleep(60)

    holder = fork(child)
    try:
        started = time.perf_counter()
        with pytest.raises(UserError, match=rf"is in use by process {holder} on .*Two runs cannot share a folder"):
            with RunDir(tmp_path).lock():
                pass
        assert time.perf_counter() - started < 5, "a living holder must be reported at once"
        kill(holder)
        with RunDir(tmp_path).lock():
            assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == os.getpid()
    finally:
        kill(holder)
    assert not (tmp_path / ".lock.json").exists()


def test_the_lock_excludes_a_second_run_of_the_same_process_too(tmp_path: Path) -> None:
    with RunDir(tmp_path).lock():
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            with RunDir(tmp_path).lock():
                pass
    with RunDir(tmp_path).lock():
        pass


WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


@pytest.fixture(params=WITHOUT_LOCKS)
def no_locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that answers flock as network file systems without locks do."""

    def flock(fd: int, how: int) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.usefixtures("no_locks")
def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path: Path) -> None:
    told = rf"{tmp_path} cannot be locked .*no file locks.*output_dir to a folder on a local disk, or .*NFS"

    with pytest.raises(UserError, match=told), RunDir(tmp_path).lock():
        pass
    with pytest.raises(UserError, match=told):
        is_held(tmp_path)


@pytest.mark.usefixtures("no_locks")
def test_the_store_and_the_packages_say_so_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be locked .*Move it, or have this one mounted with locks"):
        RowStore(tmp_path / "s", {}, row_bytes=4, max_bytes=100, name="store", remedy="Move it")
    with pytest.raises(UserError, match=r"cannot be locked .*BEHOLDER_CACHE"), packages._locked(tmp_path / ".l", print):
        pass


def test_a_store_whose_file_system_loses_its_locks_says_so_where_it_fills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = RowStore(tmp_path, {}, row_bytes=4, max_bytes=100, name="store", remedy="Move it")

    def flock(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match="cannot be locked"), store.writer() as writer:
        writer.has_room(1)


def test_another_fault_of_a_lock_is_no_missing_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot write .*Input/output error"), RunDir(tmp_path).lock():
        pass


def test_a_killed_run_whose_loader_processes_still_live_can_be_resumed(tmp_path: Path) -> None:
    """Loader processes are forked while the lock is held and outlive a SIGKILLed trainer by seconds."""

    def child(ready: Callable[[], None]) -> None:
        with RunDir(tmp_path).lock():
            if os.fork() == 0:
                ready()
                time.sleep(2)
                os._exit(0)
            ready()
            time.sleep(60)

    trainer = fork(child)
    kill(trainer)
    with RunDir(tmp_path).lock():
        pass


def test_provenance_says_what_code_ran_on_what(tmp_path: Path) -> None:
    record = provenance(seed=7, device="cpu", data="abc")
    assert record["seed"] == 7 and record["data"] == "abc"
    assert record["versions"]["torch"] and record["hardware"]["cores"] >= 1 and record["hardware"]["ram_gb"] > 0
    assert record["git"] is None or len(record["git"]["commit"]) == 40
    assert platform.node() not in json.dumps({k: v for k, v in record.items() if k != "argv"})


def test_a_hang_up_that_nohup_ignores_is_ignored_and_another_stops_like_a_sigterm() -> None:
    def hung_up() -> int | None:
        try:
            with stop_signals():
                os.kill(os.getpid(), signal.SIGHUP)
        except SystemExit as e:
            return int(str(e.code))
        return None

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert hung_up() == 128 + signal.SIGHUP and hang_up_signals() == [signal.SIGHUP]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert hung_up() is None and hang_up_signals() == []
    finally:
        signal.signal(signal.SIGHUP, before)
