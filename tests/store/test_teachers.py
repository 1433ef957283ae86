"""What is kept of a teacher: right, whole, and of that teacher alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from beholder.config import DistillConfig
from beholder.model.divergence import Full, columns, sampled, top_k
from beholder.store.teachers import TOKENS, TeacherCache, TeacherKey, seconds_a_token
from beholder.types import Example, Turn, UserError

V = 50
KEY = TeacherKey("teacher", "a" * 64, "", "b" * 64, V)


def config(folder: Path, **more: Any) -> DistillConfig:
    own = {"teachers": [{"run": "teacher"}], "dir": str(folder), "k": 5} | more
    if own.get("form", "topk") != "topk":
        del own["k"]
    return DistillConfig.model_validate(own)


def sample(number: int) -> tuple[Example, np.ndarray]:
    targets = np.random.default_rng(number).integers(0, V, 1 + number % (2 * TOKENS + 1))
    return Example(f"s{number}", (), (Turn("user", (f"question {number}",)),)), targets


def said(number: int, cfg: DistillConfig, vocab: int = V) -> dict[str, torch.Tensor]:
    _, targets = sample(number)
    draw = torch.Generator().manual_seed(number)
    log_p = torch.log_softmax(3 * torch.randn(len(targets), vocab, generator=draw), -1)
    if cfg.form == "topk":
        return columns(top_k(log_p, cfg.k, cfg.kept_temperatures))
    return columns(Full(log_p) if cfg.form == "full" else sampled(log_p, cfg.draws, cfg.temperature, draw))


def fill(cache: TeacherCache, cfg: DistillConfig, numbers: range) -> None:
    with cache.writer() as writer:
        for number in numbers:
            if not cache.has(*sample(number)):
                cache.put(writer, [sample(number)], [said(number, cfg, cache.key.vocab)])


@pytest.mark.parametrize("form", ["topk", "sampled", "full"])
def test_what_is_kept_is_what_was_said_to_16_bits(form: str, tmp_path: Path) -> None:
    cfg = config(tmp_path, form=form)
    with TeacherCache(cfg, KEY) as cache:
        fill(cache, cfg, range(12))
        examples, targets = zip(*map(sample, (7, 0, 3)), strict=True)
        found = cache.taught(examples, targets)
        for name, column in found.items():
            expected = torch.cat([said(number, cfg)[name].float() for number in (7, 0, 3)])
            torch.testing.assert_close(column.float(), expected, rtol=1e-3, atol=1e-3)
            assert name != "ids" or torch.equal(column.long(), expected.long())
        assert cache.taught([], []).keys() == found.keys()


@pytest.mark.parametrize(
    ("form", "vocab", "number"),
    [("topk", 50, 5 * 4 + 2 * 4), ("topk", 100_000, 5 * 6 + 2 * 4), ("sampled", 50, 12 * 2 + 4), ("full", 50, 100)],
)
def test_bytes_of_a_token_are_as_documented(form: str, vocab: int, number: int, tmp_path: Path) -> None:
    with TeacherCache(config(tmp_path, form=form), TeacherKey("t", "a", "", "b", vocab)) as cache:
        assert cache.type.itemsize == number and cache.rows.row_bytes == TOKENS * number


def test_samples_without_rows_are_named_and_so_is_what_differs(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with TeacherCache(cfg, KEY) as cache:
        with pytest.raises(UserError, match=r"2 samples have no rows .*'s1', 's2'.*Nothing is kept there yet"):
            cache.taught(*zip(*map(sample, (1, 2)), strict=True))
        fill(cache, cfg, range(4))
        with pytest.raises(UserError, match=r"1 samples have no rows .*'s9'.*the data, or how it is laid out"):
            cache.taught(*zip(*map(sample, (1, 9)), strict=True))
        example, targets = sample(3)
        with pytest.raises(UserError, match="'s3'"):
            cache.taught([example], [targets[::-1].copy() + 1])
    for other, told in (
        (TeacherKey("x", "c" * 64, "", "b" * 64, V), r"the teacher \(its weights\)\."),
        (TeacherKey("x", "a" * 64, "jinja", "b" * 64, V), "the teacher's template"),
        (TeacherKey("x", "a" * 64, "", "d" * 64, V), "the student's tokenizer"),
        (TeacherKey("x", "a" * 64, "", "b" * 64, V + 1), r"vocabulary \(50 there, 51 here\)"),
    ):
        with TeacherCache(cfg, other) as cache, pytest.raises(UserError, match=f"differs in .*{told}"):
            cache.taught(*zip(sample(1), strict=True))


def test_a_k_larger_than_the_vocabulary_and_a_full_disk_cap_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"distill.k is 51, but the student's vocabulary has 50 tokens"):
        TeacherCache(config(tmp_path, k=51), KEY)
    cfg = config(tmp_path, max_gb=1e-6)
    with TeacherCache(cfg, KEY) as cache, pytest.raises(UserError, match=r"distill.max_gb = 1e-06 GB is full"):
        fill(cache, cfg, range(30))


def test_damaged_rows_are_forgotten_all_at_once_and_told_and_made_anew(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with TeacherCache(cfg, KEY) as cache:
        fill(cache, cfg, range(30))
        (shard,) = cache.rows.folder.glob("shard-*.bin")
    shard.write_bytes(bytes(255 - b for b in shard.read_bytes()))
    with TeacherCache(cfg, KEY) as cache:
        assert not any(cache.has(*sample(k)) for k in range(30))
        with pytest.raises(UserError, match=r"rows were damaged on the disk, and are forgotten\. Make them with"):
            cache.taught(*zip(*map(sample, range(30)), strict=True))
        fill(cache, cfg, range(30))
        found = cache.taught(*zip(*map(sample, range(30)), strict=True))
        assert torch.equal(found["ids"].long(), torch.cat([said(k, cfg)["ids"] for k in range(30)]))


def test_a_full_disk_is_no_damage(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    with TeacherCache(cfg, KEY) as cache:
        fill(cache, cfg, range(3))
        with cache.rows.index.query() as db:
            db.execute("PRAGMA max_page_count = 1")  # no less than there are
        with pytest.raises(UserError, match=r"no room on the disk for its index .*What is stored already stays"):
            fill(cache, cfg, range(2000))
        with cache.rows.index.query() as db:
            db.execute("PRAGMA max_page_count = 1000000")
        assert all(cache.has(*sample(k)) for k in range(3))
        (cache.rows.folder / "costs.jsonl").mkdir()
        with pytest.raises(UserError, match=r"cannot write .*costs.jsonl"):
            cache.note_cost(1, 1.0)


def test_two_writers_at_once_leave_every_row_once(tmp_path: Path) -> None:
    """Each other sample is asked by both: what the first one has put counts."""
    cfg = config(tmp_path)
    with TeacherCache(cfg, KEY) as one, TeacherCache(cfg, KEY) as two, one.writer() as first, two.writer() as second:
        for k in range(60):
            for cache, writer in ((one, first), (two, second)):
                cache.put(writer, [sample(k)], [said(k, cfg)])
        assert len(one.rows) == sum(-(-len(sample(k)[1]) // TOKENS) for k in range(60))
        found = two.taught(*zip(*map(sample, range(60)), strict=True))
        assert torch.equal(found["ids"].long(), torch.cat([said(k, cfg)["ids"] for k in range(60)]))


def test_lines_of_what_rows_have_cost_that_say_nothing_are_left_out(tmp_path: Path) -> None:
    lines = ['{"tokens": 4, "seconds": 2}', '{"tokens": 1e400, "seconds": 1}', '{"tokens": -3, "seconds": 1}',
             '{"tokens": 5, "seconds": NaN}', '{"tokens": 5, "seconds": "x"}', "[]", '{"tokens": 4']  # fmt: skip
    (tmp_path / "costs.jsonl").write_text("\n".join(lines))
    assert seconds_a_token(tmp_path) == 0.5


FILLER = """
    import sys
    from pathlib import Path
    from tests.store.test_teachers import KEY, config, fill
    from beholder.store.teachers import TeacherCache
    cfg = config(Path(sys.argv[1]))
    with TeacherCache(cfg, KEY) as cache:
        print("begun", flush=True)
        fill(cache, cfg, range(int(sys.argv[2])))
"""


@pytest.mark.slow
def test_twenty_kills_leave_no_mixed_missing_or_repeated_row(tmp_path: Path) -> None:
    """Killed at any instant, what is there is right, and the next call makes the rest."""
    number = 6000
    draw = np.random.default_rng(0)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{root / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    cfg, kills, sizes = config(tmp_path), 0, [0]
    while kills < 20:
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(FILLER), str(tmp_path), str(number)], stdout=subprocess.PIPE,
            env=environment, cwd=root,
        )  # fmt: skip
        with child:
            assert child.stdout is not None and child.stdout.readline() == b"begun\n"
            time.sleep(float(draw.uniform(0.0, 0.25)))
            child.send_signal(signal.SIGKILL)
        kills += 1
        assert child.returncode == -signal.SIGKILL, "it was to be killed at work"
        with TeacherCache(cfg, KEY) as cache:
            whole = [k for k in range(number) if cache.has(*sample(k))]
            for k in whole[:: max(1, len(whole) // 40)]:
                example, targets = sample(k)
                found = cache.taught([example], [targets])
                assert torch.equal(found["ids"].long(), said(k, cfg)["ids"])
            sizes.append(len(cache.rows))
    assert sizes == sorted(sizes) and sizes[1] > 0
    with TeacherCache(cfg, KEY) as cache:
        fill(cache, cfg, range(number))
        assert len(cache.rows) == sum(-(-len(sample(k)[1]) // TOKENS) for k in range(number))
        examples, targets = zip(*map(sample, range(number)), strict=True)
        found = cache.taught(examples, targets)
        expected = torch.cat([said(k, cfg)["ids"] for k in range(number)])
        assert torch.equal(found["ids"].long(), expected) and cache.rows.corrupt_rows == 0
