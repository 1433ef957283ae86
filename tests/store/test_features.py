"""The feature store returns what the tower would give, or nothing; whatever happens to the process or the files."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from beholder.config import FeaturesConfig, RunConfig
from beholder.data import build_data
from beholder.data.images import ImagePipeline
from beholder.model.build import build_vlm
from beholder.model.plan import TrainPlan, apply_train_plan
from beholder.model.vision import load_vision
from beholder.stages import run_stage
from beholder.stages.remeasure import evaluate_run
from beholder.store import hashes as hashes_module
from beholder.store import rows
from beholder.store.features import FeatureStore, FillReport, store_dir
from beholder.train.objectives import next_token
from beholder.types import ImageGeometry, ImageRef, UserError

PATCHES, WIDTH, SIDE = 4, 24, 4
ROW = PATCHES * WIDTH * 2
GEOMETRY = ImageGeometry(SIDE, SIDE, PATCHES, WIDTH, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PIPELINE = ImagePipeline(GEOMETRY, max_megapixels=1)
fork = multiprocessing.get_context("fork")


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """A tower of one fixed matrix: different images give different features, batches give what singles give."""
    weights = torch.randn(3 * SIDE * SIDE, PATCHES * WIDTH, generator=torch.Generator().manual_seed(0))
    flat = pixels.flatten(1).float() / 255
    return torch.stack([row @ weights for row in flat]).view(-1, PATCHES, WIDTH)


def expected(ref: ImageRef) -> torch.Tensor:
    return encode(PIPELINE(ref)[None])[0].bfloat16()


def make_images(root: Path, num: int, first: int = 0) -> list[ImageRef]:
    root.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + num):
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{i}.png")
    return [ImageRef(str(root), f"{i}.png") for i in range(first, first + num)]


def open_store(folder: Path, tower: str = "tower", pipeline: str = "pipeline", max_bytes: int = 10**8) -> FeatureStore:
    return FeatureStore(
        folder, tower_fingerprint=tower, pipeline_fingerprint=pipeline, shape=(PATCHES, WIDTH),
        max_bytes=max_bytes,
    )  # fmt: skip


def fill(store: FeatureStore, refs: list[ImageRef], encode: Callable = encode, **kwargs: Any) -> FillReport:
    options: dict[str, Any] = {"batch_size": 3, "num_threads": 1} | kwargs
    return store.fill(refs, encode, PIPELINE, **options)


def right_or_absent(store: FeatureStore, refs: list[ImageRef]) -> int:
    """Number of stored images; fails when one of them is not exactly what the tower gives."""
    stored = 0
    for ref in refs:
        features = store.read(ref)
        if features is not None:
            assert torch.equal(features, expected(ref))
            stored += 1
    return stored


def shard_files(store: FeatureStore) -> list[Path]:
    return sorted(store.rows.folder.glob("shard-*.bin"))


def run_forked(work: Callable[[], object]) -> ForkProcess:
    def quiet() -> None:
        work()
        os._exit(0)  # not pytest's own exit handlers

    process = fork.Process(target=quiet)
    process.start()
    return process


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # forked children cannot use the parent's thread pool
    yield
    torch.set_num_threads(before)


# -- what is stored is what the tower gives


def test_read_gives_the_towers_features_in_bf16_and_a_second_fill_computes_nothing(tmp_path):
    refs = make_images(tmp_path / "images", 8)
    store = open_store(tmp_path / "store")
    calls: list[tuple[int, int]] = []

    first = fill(store, refs, progress=lambda done, total: calls.append((done, total)))
    second = fill(open_store(tmp_path / "store"), refs, encode=lambda pixels: pytest.fail("computed again"))

    assert (first.computed, first.reused, first.over_cap, first.rejects) == (8, 0, 0, [])
    assert (second.computed, second.reused) == (0, 8)
    assert right_or_absent(store, refs) == 8
    features = store.read(refs[0])
    assert features is not None and features.dtype == torch.bfloat16 and features.shape == (PATCHES, WIDTH)
    assert calls[-1] == (8, 8) and [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert store.bytes_used == first.bytes_used == 8 * ROW == sum(f.stat().st_size for f in shard_files(store))


def test_what_read_returns_belongs_to_the_caller(tmp_path):
    refs = make_images(tmp_path / "images", 1)
    store = open_store(tmp_path / "store")
    fill(store, refs)

    features = store.read(refs[0])
    assert features is not None
    features.zero_()

    assert right_or_absent(store, refs) == 1


def test_other_weights_other_preprocessing_and_other_content_each_miss(tmp_path):
    refs = make_images(tmp_path / "images", 2)
    fill(open_store(tmp_path / "store"), refs)

    assert open_store(tmp_path / "store").read(refs[0]) is not None
    assert open_store(tmp_path / "store", tower="other").read(refs[0]) is None
    assert open_store(tmp_path / "store", pipeline="other").read(refs[0]) is None
    assert open_store(tmp_path / "store").read(make_images(tmp_path / "images", 1, first=50)[0]) is None


def test_the_same_bytes_under_another_name_hit_and_are_stored_once(tmp_path):
    refs = make_images(tmp_path / "images", 2)
    copies = [ImageRef(str(tmp_path / "moved"), "deep/" + ref.path) for ref in refs]
    (tmp_path / "moved").mkdir()
    shutil.copytree(tmp_path / "images", tmp_path / "moved" / "deep")
    store = open_store(tmp_path / "store")

    report = fill(store, [refs[0], copies[0], refs[1], refs[1]])

    assert (report.computed, report.reused, len(store)) == (2, 2, 2)
    assert right_or_absent(store, copies) == 2


def test_a_rewritten_file_misses_even_with_its_old_size_and_modification_time(tmp_path):
    (ref,) = make_images(tmp_path / "images", 1)
    path = tmp_path / "images" / ref.path
    Image.new("RGB", (SIDE, SIDE), "red").save(path, format="BMP")
    before = path.stat()
    store = open_store(tmp_path / "store")
    fill(store, [ref])
    assert right_or_absent(store, [ref]) == 1

    Image.new("RGB", (SIDE, SIDE), "blue").save(path, format="BMP")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert store.read(ref) is None and open_store(tmp_path / "store").read(ref) is None
    assert fill(store, [ref]).computed == 1
    assert right_or_absent(store, [ref]) == 1


def test_unchanged_files_are_not_read_again_once_their_hash_is_known(tmp_path, monkeypatch):
    refs = make_images(tmp_path / "images", 3)
    monkeypatch.setattr(hashes_module, "_RACY_NS", 0)  # these files are younger than the caution allows
    fill(open_store(tmp_path / "store"), refs)
    monkeypatch.setattr(hashes_module, "content_hash", lambda ref: pytest.fail(f"{ref} was hashed again"))

    other_tower = open_store(tmp_path / "store", tower="other")
    assert fill(open_store(tmp_path / "store"), refs).reused == 3
    assert fill(other_tower, refs).computed == 3
    assert right_or_absent(open_store(tmp_path / "store"), refs) == 3


def test_a_file_hashed_right_after_a_change_is_hashed_again(tmp_path, monkeypatch):
    refs = make_images(tmp_path / "images", 1)
    fill(open_store(tmp_path / "store"), refs)
    hashed: list[ImageRef] = []
    real = hashes_module.content_hash
    monkeypatch.setattr(hashes_module, "content_hash", lambda ref: hashed.append(ref) or real(ref))

    assert open_store(tmp_path / "store").read(refs[0]) is not None
    assert hashed == refs


def test_a_path_that_leaves_its_root_is_not_answered_from_the_store(tmp_path):
    refs = make_images(tmp_path / "images", 1)
    (tmp_path / "narrow").mkdir()
    outside = ImageRef(str(tmp_path / "narrow"), f"../images/{refs[0].path}")
    store = open_store(tmp_path / "store")
    fill(store, refs)

    assert store.read(refs[0]) is not None
    assert store.read(outside) is None
    with pytest.raises(UserError, match="outside_root"):
        fill(store, [outside])


# -- bad input


def test_bad_images_stop_the_fill_or_are_named_and_counted(tmp_path):
    refs = make_images(tmp_path / "images", 4)
    (tmp_path / "images" / refs[1].path).write_bytes(b"")
    (tmp_path / "images" / refs[2].path).unlink()

    with pytest.raises(UserError, match=r"1\.png"):
        fill(open_store(tmp_path / "one"), refs)
    report = fill(open_store(tmp_path / "two"), refs, on_bad_image="skip")

    assert report.computed == 2
    assert [(Path(name).name, why.split("[")[-1]) for name, why in report.rejects] == [
        ("1.png", "empty_image]"), ("2.png", "missing_image]"),
    ]  # fmt: skip
    assert open_store(tmp_path / "two").read(refs[2]) is None


def test_features_that_are_not_finite_are_refused_by_name(tmp_path):
    refs = make_images(tmp_path / "images", 3)

    def overflowing(pixels: torch.Tensor) -> torch.Tensor:
        features = encode(pixels)
        features[1, 0, 0] = float("inf")
        return features

    store = open_store(tmp_path / "store")
    with pytest.raises(UserError, match=r"1\.png: the vision tower gave values that are not finite"):
        fill(store, refs, encode=overflowing)
    assert len(store) == 0


def test_an_unusable_folder_says_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"features\.dir"):
        open_store(tmp_path / "file" / "store")


def test_a_damaged_index_is_named_and_not_overwritten(tmp_path):
    store = open_store(tmp_path / "store")
    index = store.rows.folder / "index.sqlite"
    store.close()
    index.write_bytes(b"not a database at all" * 100)

    with pytest.raises(UserError, match="delete that folder"):
        open_store(tmp_path / "store")
    assert index.read_bytes().startswith(b"not a database")


def test_a_full_disk_is_an_error_that_keeps_what_was_stored(tmp_path, monkeypatch):
    refs = make_images(tmp_path / "images", 40)
    monkeypatch.setattr(rows, "STEP_BYTES", 4 * ROW)
    store = open_store(tmp_path / "store")
    fill(store, refs[:4])

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The index must still fit: only the shard grows past this.
        limit = max(f.stat().st_size for f in store.rows.folder.iterdir()) + 200 * 1024
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        big = FeatureStore(
            tmp_path / "store", tower_fingerprint="t", pipeline_fingerprint="p", shape=(512, 1024),
            max_bytes=10**9,
        )  # fmt: skip
        try:
            big.fill(refs, lambda pixels: torch.zeros(len(pixels), 512, 1024), PIPELINE, batch_size=3)
        except UserError as e:
            assert "no room on the disk" in str(e) and "features.max_gb" in str(e)
            assert len(big) == 0
            os._exit(7)

    process = run_forked(limited)
    process.join(60)

    assert process.exitcode == 7
    assert right_or_absent(store, refs) == 4
    assert fill(store, refs).computed == 36


# -- the cap


def test_the_cap_is_kept_and_what_does_not_fit_is_counted(tmp_path):
    refs = make_images(tmp_path / "images", 10)
    store = open_store(tmp_path / "store", max_bytes=6 * ROW + ROW // 2)

    report = fill(store, refs, batch_size=4)
    again = fill(store, refs, encode=lambda pixels: pytest.fail("there is no room for it"))
    wider = fill(open_store(tmp_path / "store"), refs)

    assert (report.computed, report.over_cap, report.reused) == (6, 4, 0)
    assert "do not fit" in report.summary
    assert (again.computed, again.over_cap, again.reused) == (0, 4, 6)
    assert sum(f.stat().st_size for f in shard_files(store)) == 10 * ROW and wider.computed == 4
    assert right_or_absent(store, refs) == 10


def test_several_writers_together_stay_under_the_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "STEP_BYTES", 3 * ROW)
    monkeypatch.setattr(rows, "SHARD_BYTES", 5 * ROW)
    refs = make_images(tmp_path / "images", 40)
    cap = 17 * ROW
    open_store(tmp_path / "store")

    processes = [
        run_forked(lambda part=refs[i::3]: fill(open_store(tmp_path / "store", max_bytes=cap), part)) for i in range(3)
    ]
    for process in processes:
        process.join(60)

    store = open_store(tmp_path / "store", max_bytes=cap)
    assert [p.exitcode for p in processes] == [0, 0, 0]
    assert store.bytes_used <= cap and sum(f.stat().st_size for f in shard_files(store)) <= cap
    fill(store, refs)  # whatever one writer had reserved and given back is used now
    assert right_or_absent(store, refs) == 17


# -- crashes, damage, other processes


def test_a_killed_fill_leaves_nothing_wrong_and_the_next_one_completes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "STEP_BYTES", 4 * ROW)
    monkeypatch.setattr(rows, "SHARD_BYTES", 16 * ROW)
    refs = make_images(tmp_path / "images", 120)
    rng = random.Random(0)
    store = open_store(tmp_path / "store", max_bytes=120 * ROW)
    amounts = [0]

    def unhurried(pixels: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return encode(pixels)

    for _ in range(10):
        process = run_forked(lambda: fill(open_store(tmp_path / "store", max_bytes=120 * ROW), refs, unhurried))
        deadline = time.monotonic() + 30
        target = min(110, amounts[-1] + rng.randint(1, 8))
        while len(store) < target and time.monotonic() < deadline:
            pass
        time.sleep(rng.uniform(0, 0.005))  # random phase: in the tower, in a write, in a transaction
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        amounts.append(right_or_absent(open_store(tmp_path / "store"), refs))
        assert amounts[-1] >= amounts[-2]

    assert 0 < amounts[5] < 120, "the kills were meant to fall into the middle"
    report = fill(store, refs)
    assert report.computed == 120 - amounts[-1] and report.reused == amounts[-1]
    assert right_or_absent(store, refs) == 120
    assert store.bytes_used <= 120 * ROW  # a dead writer's reservation is taken over: none of the cap is lost


@pytest.mark.parametrize("at", ["pwrite", "fsync", "posix_fallocate", "ftruncate"])
def test_a_kill_between_any_two_steps_of_a_write_is_survived(tmp_path, monkeypatch, at):
    """Not by chance: dies right before and right after each system call of the protocol, at each of its uses."""
    refs = make_images(tmp_path / "images", 7)

    def die_at(call: int, after: bool) -> None:
        real, count = getattr(os, at), [0]

        def deadly(*args):
            count[0] += 1
            if count[0] == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            if count[0] == call and at == "pwrite":  # half a row: the tear itself
                real(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args)
            if count[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, at, deadly)
        fill(open_store(tmp_path / "store"), refs)

    killed = 0
    for call in (1, 2, 3):
        for after in (False, True):
            process = run_forked(lambda call=call, after=after: die_at(call, after))
            process.join(60)
            killed += process.exitcode == -signal.SIGKILL
            right_or_absent(open_store(tmp_path / "store"), refs)
    store = open_store(tmp_path / "store")
    fill(store, refs)

    assert killed >= 1
    assert right_or_absent(store, refs) == 7
    assert store.bytes_used == 7 * ROW and sum(f.stat().st_size for f in shard_files(store)) == 7 * ROW


def test_processes_that_fill_the_same_images_at_once_store_each_exactly_once(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "SHARD_BYTES", 8 * ROW)
    refs = make_images(tmp_path / "images", 60)

    def work(seed: int) -> None:
        mine = refs[:]
        random.Random(seed).shuffle(mine)
        fill(open_store(tmp_path / "store"), mine)

    processes = [run_forked(lambda seed=seed: work(seed)) for seed in range(4)]
    for process in processes:
        process.join(60)

    store = open_store(tmp_path / "store")
    assert [p.exitcode for p in processes] == [0, 0, 0, 0]
    assert len(store) == 60 and right_or_absent(store, refs) == 60
    assert fill(store, refs).reused == 60


def test_ranks_share_the_work_without_overlap(tmp_path):
    refs = make_images(tmp_path / "images", 11)
    store = open_store(tmp_path / "store")

    reports = [fill(store, refs, rank=rank, world_size=3) for rank in range(3)]

    assert [r.computed for r in reports] == [4, 4, 3] and sum(r.reused for r in reports) == 0
    assert right_or_absent(store, refs) == 11


class _Reads(torch.utils.data.Dataset):
    def __init__(self, store: FeatureStore, refs: list[ImageRef]) -> None:
        self.store, self.refs = store, refs

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, i: int) -> torch.Tensor:
        features = self.store.read(self.refs[i])
        assert features is not None
        return features


def test_loader_workers_read_while_the_parent_goes_on_reading(tmp_path):
    refs = make_images(tmp_path / "images", 12)
    store = open_store(tmp_path / "store")
    fill(store, refs)
    assert right_or_absent(store, refs) == 12  # the parent's files are open when the workers are forked

    loader = torch.utils.data.DataLoader(_Reads(store, refs), 2, num_workers=2, multiprocessing_context="fork")
    for i, batch in enumerate(loader):
        assert torch.equal(batch, torch.stack([expected(r) for r in refs[2 * i : 2 * i + 2]]))
        assert right_or_absent(store, refs[i : i + 1]) == 1

    copy = pickle.loads(pickle.dumps(store))  # how a spawned worker gets it
    assert right_or_absent(copy, refs) == 12


def open_files(below: Path) -> list[str]:
    return sorted(f.path for f in psutil.Process().open_files() if Path(f.path).is_relative_to(below))


def test_a_store_closes_its_files_when_it_is_left_and_when_nobody_holds_it(tmp_path):
    refs = make_images(tmp_path / "images", 3)
    with open_store(tmp_path / "store") as store:
        fill(store, refs)
        assert open_files(tmp_path)
    assert open_files(tmp_path) == []

    assert right_or_absent(store, refs) == 3, "a closed store opens its files again"
    assert open_files(tmp_path)
    del store
    assert open_files(tmp_path) == []  # Python 3.13 warns of a database that is not closed


def test_a_worker_closes_what_it_opened_and_not_what_it_inherited(tmp_path):
    refs = make_images(tmp_path / "images", 3)
    held = [open_store(tmp_path / "store")]
    fill(held[0], refs)
    with held[0].rows.index.query() as parents:
        pass

    def work() -> None:
        assert right_or_absent(held[0], refs) == 3
        with held[0].rows.index.query() as own:
            assert own is not parents
        held.clear()
        with pytest.raises(sqlite3.ProgrammingError, match="closed"):
            own.execute("SELECT 1")
        parents.total_changes  # noqa: B018  (raises where a connection is closed; nothing may be asked of it here)

    process = run_forked(work)
    process.join()

    assert process.exitcode == 0
    assert right_or_absent(held[0], refs) == 3


def test_a_flipped_byte_is_never_returned_and_the_next_fill_repairs_it(tmp_path):
    refs = make_images(tmp_path / "images", 5)
    store = open_store(tmp_path / "store")
    fill(store, refs)
    (shard,) = shard_files(store)
    data = bytearray(shard.read_bytes())
    data[2 * ROW + 17] ^= 0x10
    shard.write_bytes(data)

    assert right_or_absent(store, refs) == 4
    assert store.rows.corrupt_rows == 1
    report = fill(store, refs)
    assert (report.computed, report.reused) == (1, 4)
    assert right_or_absent(store, refs) == 5 and store.bytes_used == 5 * ROW


def test_rows_that_were_swapped_are_never_returned(tmp_path):
    refs = make_images(tmp_path / "images", 2)
    store = open_store(tmp_path / "store")
    fill(store, refs)
    with store.rows.index.transaction() as db:  # an index that points to the other image's row
        db.execute("UPDATE rows SET row = row + 10")
        db.execute("UPDATE rows SET row = 11 - row")

    assert right_or_absent(store, refs) == 0 and store.rows.corrupt_rows == 2


@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_a_shard_cut_short_or_deleted_is_computed_again(tmp_path, damage):
    refs = make_images(tmp_path / "images", 5)
    store = open_store(tmp_path / "store")
    fill(store, refs)
    assert right_or_absent(store, refs) == 5  # mapped: reading behind the new end would be a bus error
    (shard,) = shard_files(store)
    if damage == "cut":
        os.truncate(shard, 2 * ROW + 5)
    else:
        shard.unlink()
        store = open_store(tmp_path / "store")

    assert right_or_absent(store, refs) == (2 if damage == "cut" else 0)
    fill(store, refs)
    assert right_or_absent(open_store(tmp_path / "store"), refs) == 5


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("fill"), st.integers(0, 9), st.integers(1, 10)),
            st.tuples(st.just("flip"), st.integers(0, 10**6), st.integers(0, 7)),
            st.tuples(st.just("cut"), st.integers(0, 10**6), st.just(0)),
            st.tuples(st.just("rewrite"), st.integers(0, 9), st.integers(0, 10**6)),
        ),
        max_size=6,
    )
)
def test_whatever_happens_to_its_files_a_store_answers_right_or_not_at_all(tmp_path_factory, steps):
    folder = tmp_path_factory.mktemp("property")
    refs = make_images(folder / "images", 10)
    store = open_store(folder / "store")
    for what, a, b in steps:
        shards = [f for f in shard_files(store) if f.stat().st_size]
        if what == "fill":
            fill(store, refs[a : a + b])
        elif what == "rewrite":
            make_images(folder / "other", 1, first=b + 100)
            shutil.copy(folder / "other" / f"{b + 100}.png", folder / "images" / refs[a].path)
        elif shards:
            shard = shards[a % len(shards)]
            at = a % shard.stat().st_size
            if what == "cut":
                os.truncate(shard, at)
            else:
                data = bytearray(shard.read_bytes())
                data[at] ^= 1 << b
                shard.write_bytes(data)
        right_or_absent(store, refs)
    right_or_absent(store, refs)  # meets every damaged row, so that the fill computes it again
    fill(store, refs)

    assert right_or_absent(store, refs) == 10


# -- training with it


def train(cfg: RunConfig, store: FeatureStore | None, steps: int = 6) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses per token of each step and the trained connector, through the run's own stream."""
    model, tokenizer = build_vlm(cfg.model, compute_precision=cfg.train.precision, device=torch.device("cpu"), seed=0)
    apply_train_plan(model, TrainPlan())
    data = build_data(cfg, tokenizer, model.geometry, model.num_visual_tokens)
    if store is not None:
        assert model.vision is not None
        store.fill(data.train_refs(0, len(data.train)), model.vision, data.pipeline, batch_size=5)
        model.drop_vision()  # every image must come from the store now
    optimizer = torch.optim.AdamW(model.connector.parameters(), lr=3e-3)
    losses = []
    for batches in data.stream(store, cfg, rank=0, world_size=1).steps(0, steps):
        terms = [next_token(model, batch) for batch in batches]
        tokens = sum(t.tokens for t in terms)
        total = torch.stack([t.total for t in terms]).sum() / tokens
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total.detach()))
    return losses, {name: p.detach().clone() for name, p in model.connector.named_parameters()}


def test_a_run_leaves_no_file_of_its_store_open(tmp_path, tiny_config):
    cfg = tiny_config(tmp_path, **{"train.train_steps": 1, "eval.caption_samples": 0})
    gc.disable()  # not when the collector happens to come by
    try:
        run_stage(cfg)
        assert (tmp_path / "features").is_dir() and open_files(tmp_path) == []
        evaluate_run(cfg.run_dir)
        assert open_files(tmp_path) == []
    finally:
        gc.enable()


def real_store(cfg: RunConfig, folder: Path) -> FeatureStore:
    tower = load_vision(cfg.model.vision, torch.device("cpu"))
    pipeline = ImagePipeline(tower.geometry, cfg.data.max_megapixels)
    return FeatureStore(
        folder, tower_fingerprint=tower.fingerprint(), pipeline_fingerprint=pipeline.fingerprint,
        shape=(tower.geometry.num_patches, tower.geometry.d_vision), max_bytes=10**9,
    )  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_with_the_store_is_training_without_it(tmp_path, tiny_config, precision):
    cfg = tiny_config(tmp_path, **{
        "model.vision.precision": precision, "train.train_steps": 6, "train.gradient_accum": 2,
    })  # fmt: skip

    with_store, learnt = train(cfg, real_store(cfg, tmp_path / "store"))
    without, reference = train(cfg, None)

    assert abs(without[-1] - without[0]) > 0.02, "nothing was learnt, so agreement would say nothing"
    # A tower in bf16 gives bf16 numbers, and storing them loses nothing (measured: equal to the last bit); a kernel
    # that rounds differently in batches of another size may cost a little. A tower in fp32 loses up to 2**-9 of a
    # feature's size: measured 1.3e-5 of the loss and 3e-3 of the farthest weight, over six steps at a large rate.
    assert with_store == pytest.approx(without, rel={"bf16": 1e-5, "fp32": 1e-4}[precision])
    off = {n: float((learnt[n] - reference[n]).norm() / reference[n].norm()) for n in learnt if reference[n].any()}
    assert max(off.values()) < 2e-2


def test_stored_features_are_the_towers_up_to_bf16(tmp_path, tiny_config):
    cfg = tiny_config(tmp_path)
    store = real_store(cfg, tmp_path / "store")
    tower = load_vision(cfg.model.vision, torch.device("cpu"))
    pipeline = ImagePipeline(tower.geometry, cfg.data.max_megapixels)
    refs = [ImageRef(cfg.data.image_root or "", name) for name in sorted(os.listdir(cfg.data.image_root))[:6]]

    store.fill(refs, tower, pipeline, batch_size=4)

    for ref in refs:
        stored, fresh = store.read(ref), tower(pipeline(ref)[None])[0]
        assert stored is not None
        # bf16 has 8 significant bits: half a unit in the last place is 2**-9 of the value.
        torch.testing.assert_close(stored.float(), fresh, rtol=2**-8, atol=1e-6)


def test_a_tower_with_other_weights_has_another_fingerprint_and_misses(tmp_path, tiny_config):
    from beholder.prepare.tiny import tiny_vision

    cfg = tiny_config(tmp_path)
    other = tiny_config(tmp_path, **{"model.vision.name_or_path": tiny_vision(tmp_path / "other", seed=1)[0]})
    rounded = tiny_config(tmp_path, **{"model.vision.precision": "bf16"})
    layer = tiny_config(tmp_path, **{"model.vision.feature_layer": -2})

    folders = {real_store(c, tmp_path / "store").rows.folder for c in (cfg, other, rounded, layer)}

    assert len(folders) == 4 and real_store(cfg, tmp_path / "store").rows.folder in folders


# -- where it lies


def test_store_dir_follows_the_config_then_the_environment_then_the_users_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("BEHOLDER_CACHE", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    assert store_dir(FeaturesConfig(dir="~/mine")) == tmp_path / "home" / "mine"
    assert store_dir(FeaturesConfig()) == tmp_path / "features"
    monkeypatch.delenv("BEHOLDER_CACHE")
    assert store_dir(FeaturesConfig()) == tmp_path / "home" / ".cache" / "beholder" / "features"
