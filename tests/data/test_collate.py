"""Layout invariants, and the training stream as a pure function of the step."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from beholder.data.chat import ChatEncoder
from beholder.data.collate import (
    WINDOW,
    Layout,
    Sample,
    SampleBuilder,
    TrainStream,
    collate,
    collate_window,
    eval_batches,
    pack,
)
from beholder.data.images import ImageError, ImagePipeline
from beholder.data.mixture import Mixture
from beholder.prepare.tiny import tiny_tokenizer
from beholder.types import Batch, Encoded, Example, ImageGeometry, ImageInput, ImageRef, ProcessError, Turn, UserError

# Python 3.12 warns whenever a process with threads forks; the loader processes touch nothing that threads hold.
# torch warns of more workers than cores, which is what a test about worker counts wants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

N = 4
PADDED, PACKED = Layout(False, 256, 8), Layout(True, 256, 8)


# ---------------------------------------------------------------------------------------------------------------
# Layout


def sample(number: int, length: int, images: int = 0) -> Sample:
    """Ids that say which sample and place they are, so that a misplaced one shows."""
    rng = np.random.default_rng(number)
    images = min(images, max(0, (length - 2) // (N + 1)))
    starts = [1 + k * (N + 1) for k in range(images)]
    spans = tuple((start, start + N - (number + k) % 3) for k, start in enumerate(starts))  # of different lengths
    supervise = np.arange(length) >= rng.integers(0, length)
    for start, stop in spans:
        supervise[start:stop] = False
    ids = number * 1000 + np.arange(length, dtype=np.int64)
    inputs = [
        ImageInput(pixels=torch.tensor([number, k, 0], dtype=torch.uint8).view(3, 1, 1).repeat(1, 2, 2))
        for k in range(images)
    ]
    return f"s{number}", Encoded(ids, supervise, spans, truncated=bool(rng.integers(0, 2))), inputs


def assert_laid_out(batch: Batch, samples: Sequence[Sample], layout: Layout) -> None:
    """Everything `types.Batch` promises, checked cell by cell."""
    rows, width = batch.input_ids.shape
    assert width % layout.pad_to_multiple_of == 0
    covered = torch.zeros(rows, width, dtype=torch.bool)
    for i, (_, encoded, _) in enumerate(samples):
        cells = (batch.sample_index == i).nonzero().tolist()
        length = len(encoded.ids)
        assert len(cells) == length, "no token lost, none twice"
        row, start = cells[0]
        assert cells == [[row, start + t] for t in range(length)], "in one piece, in one row"
        here = slice(start, start + length)
        assert batch.input_ids[row, here].tolist() == encoded.ids.tolist()
        assert batch.supervise[row, here].tolist() == encoded.supervise.tolist()
        assert batch.position_ids[row, here].tolist() == list(range(length))
        assert not covered[row, here].any(), "no overlap"
        covered[row, here] = True
    assert torch.equal(~covered, batch.sample_index == -1)
    assert not batch.supervise[~covered].any()
    for row in range(rows):
        padding = (~covered[row]).nonzero().flatten().tolist()
        assert padding == list(range(width - len(padding), width)), "padding ends the row"
        assert batch.position_ids[row][~covered[row]].tolist() == list(range(len(padding))), "a sample of its own"
        used = width - len(padding)
        assert used <= (layout.pack_len if layout.packing else max(len(e.ids) for _, e, _ in samples))

    flat_ids, owners = batch.input_ids.flatten(), batch.sample_index.flatten()
    assert len(batch.images) == len(batch.image_lengths) == len(batch.image_sample)
    positions = batch.image_positions.split(batch.image_lengths.tolist())  # fails where the lengths are not all of them
    at = 0
    for i, (_, encoded, inputs) in enumerate(samples):
        for (start, stop), image in zip(encoded.image_spans, inputs, strict=True):
            assert flat_ids[positions[at]].tolist() == encoded.ids[start:stop].tolist()
            assert (owners[positions[at]] == i).all() and batch.image_sample[at] == i
            assert batch.images[at] is image
            at += 1
    assert at == len(batch.images)
    assert batch.ids == [name for name, _, _ in samples]
    assert batch.num_tokens == sum(len(e.ids) for _, e, _ in samples)
    assert batch.num_targets == sum(e.num_targets for _, e, _ in samples)
    assert batch.truncated == sum(e.truncated for _, e, _ in samples)


@settings(max_examples=200, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 60), st.integers(0, 3)), min_size=1, max_size=12),
    packing=st.booleans(), pack_len=st.integers(60, 150), multiple=st.sampled_from([1, 8, 64]),
)  # fmt: skip
def test_any_samples_are_laid_out_whole_apart_and_restarting(
    shapes: list[tuple[int, int]], packing: bool, pack_len: int, multiple: int
) -> None:
    samples = [sample(i, length, images) for i, (length, images) in enumerate(shapes)]
    layout = Layout(packing, pack_len, multiple)

    batch = collate(samples, layout)

    assert_laid_out(batch, samples, layout)
    if not packing:
        assert len(batch.input_ids) == len(samples)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=30), capacity=st.integers(50, 200))
def test_packing_uses_as_few_rows_as_first_fit_decreasing_and_rows_no_longer(lengths: list[int], capacity: int) -> None:
    left: list[int] = []  # first-fit-decreasing, once more
    for length in sorted(lengths, reverse=True):
        for r, room in enumerate(left):
            if room >= length:
                left[r] -= length
                break
        else:
            left.append(capacity - length)

    rows = pack(lengths, capacity)

    loads = [sum(lengths[i] for i in row) for row in rows]
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert len(rows) == len(left)
    assert max(loads, default=0) <= max((capacity - room for room in left), default=0)
    assert pack(lengths, capacity) == rows


def test_rows_are_balanced_rather_than_filled_one_by_one() -> None:
    assert sorted(sum([100] * len(row)) for row in pack([100] * 6, 500)) == [300, 300]  # not 500 and 100


def test_a_sample_longer_than_a_packed_row_is_named() -> None:
    with pytest.raises(UserError, match=r"sample 's1' has 30 tokens, but train\.pack_len is 20"):
        collate([sample(0, 5), sample(1, 30)], Layout(True, 20, 8))
    assert collate([sample(0, 5), sample(1, 30)], Layout(False, 20, 8)).input_ids.shape == (2, 32)


def test_no_samples_make_one_row_of_padding() -> None:
    for layout in (PADDED, PACKED):
        batch = collate([], layout)

        assert batch.input_ids.shape == (1, 8) and batch.num_tokens == batch.num_targets == 0
        assert batch.position_ids.tolist() == [list(range(8))]
        assert (
            batch.images == [] and batch.image_positions.shape == batch.image_lengths.shape == (0,) and batch.ids == []
        )


# ---------------------------------------------------------------------------------------------------------------
# Builder and stream


class Listed:
    """The part of `Records` that is needed here, in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)
        self.fingerprint = "f" * 64

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def target_texts(self, indices: Sequence[int] | None = None) -> list[str]:
        return [self.examples[i].target_text for i in (range(len(self)) if indices is None else indices)]


class Stored:
    """A feature reader that holds the images whose number is even."""

    def read(self, ref: ImageRef) -> torch.Tensor | None:
        number = int(Path(ref.path).stem)
        return torch.full((9, 5), number, dtype=torch.bfloat16) if number % 2 == 0 else None


GEOMETRY = ImageGeometry(8, 8, 9, 5, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for i in range(23):
        noise = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> ChatEncoder:
    return ChatEncoder(
        tiny_tokenizer(tmp_path_factory.mktemp("tok")), num_visual_tokens=N, max_seq_len=256, template="caption",
        instruction="Describe.", instruction_multi="Describe each.",
    )  # fmt: skip


def examples(root: Path, count: int = 23) -> Listed:
    return Listed([
        Example(f"e{i}", (ImageRef(str(root), f"{i}.png"),), (Turn("assistant", ("a " * (i % 7) + f"picture {i}",)),),
                file="data.jsonl", row=i)
        for i in range(count)
    ])  # fmt: skip


def builder(
    encoder: ChatEncoder, *, augment: Literal["none", "random_crop"] = "none", stored: bool = False, skip: bool = False
) -> SampleBuilder:
    return SampleBuilder(
        encoder, ImagePipeline(GEOMETRY, 10.0, augment), Stored() if stored else None,
        on_bad_image="skip" if skip else "error", augment_seed=None if augment == "none" else 42,
    )  # fmt: skip


def stream(source: Listed, make: SampleBuilder, layout: Layout = PACKED, **overrides: Any) -> TrainStream:
    given: dict[str, Any] = {"micro_batch_size": 3, "gradient_accum": 2} | overrides
    fraction = given.pop("multi_image_fraction", 0.3)
    mixture = Mixture(source, np.arange(len(source)), seed=1, multi_image_fraction=fraction)
    return TrainStream(mixture, make, layout, **given)


def content(batch: Batch) -> Any:
    """A batch as plain values, without how long it took."""
    b = batch
    tensors = (
        b.input_ids,
        b.position_ids,
        b.supervise,
        b.sample_index,
        b.image_positions,
        b.image_lengths,
        b.image_sample,
    )
    images = [[None if t is None else (str(t.dtype), t.tolist()) for t in (i.features, i.pixels)] for i in batch.images]
    return [t.tolist() for t in tensors], images, batch.ids, batch.truncated, batch.rejected


def per_sample(batches: Sequence[Batch]) -> list[Any]:
    """Each sample's ids, mask and images, whatever row it lies in; sorted by content."""
    out = []
    for batch in batches:
        for i, name in enumerate(batch.ids):
            mine = batch.sample_index == i
            images = [im for im, owner in zip(batch.images, batch.image_sample.tolist(), strict=True) if owner == i]
            pixels = [t.tolist() for im in images for t in (im.features, im.pixels) if t is not None]
            out.append((name, batch.input_ids[mine].tolist(), batch.supervise[mine].tolist(), pixels))
    return sorted(out, key=repr)


def test_stored_features_are_used_and_the_rest_is_decoded(encoder: ChatEncoder, root: Path) -> None:
    make = builder(encoder, stored=True)

    _, _, even = make.build(examples(root)[4])
    _, _, odd = make.build(examples(root)[5])

    assert even[0].pixels is None and even[0].features is not None and even[0].features.tolist() == [[4.0] * 5] * 9
    assert odd[0].features is None and odd[0].pixels is not None
    assert torch.equal(odd[0].pixels, ImagePipeline(GEOMETRY, 10.0)(ImageRef(str(root), "5.png")))


def test_augmentation_depends_on_seed_epoch_sample_and_image_alone(encoder: ChatEncoder, root: Path) -> None:
    make, example = builder(encoder, augment="random_crop"), examples(root)[3]
    twice = replace(example, images=example.images * 2)

    def pixels(e: Example, epoch: int) -> list[Any]:
        return [None if i.pixels is None else i.pixels.tolist() for i in make.images(e, epoch)]

    assert pixels(example, 0) == pixels(example, 0)
    assert pixels(example, 0) != pixels(example, 1)
    assert pixels(example, 0) != pixels(replace(example, id="other"), 0)
    assert pixels(twice, 0)[0] == pixels(example, 0)[0] != pixels(twice, 0)[1]
    assert builder(encoder).images(example, 0)[0].pixels is not None
    with pytest.raises(AssertionError, match="augmentation"):
        SampleBuilder(encoder, ImagePipeline(GEOMETRY, 10.0), Stored(), on_bad_image="error", augment_seed=1)


def test_a_bad_image_stops_naming_the_record_or_is_counted_and_never_replaced(encoder: ChatEncoder, root: Path) -> None:
    chosen = [examples(root)[i] for i in range(4)]
    chosen[2] = replace(chosen[2], images=(ImageRef(str(root), "gone.png"),))

    with pytest.raises(ImageError, match=r"gone\.png.*needed by data\.jsonl: record 2 \(id 'e2'\)") as caught:
        builder(encoder).batch(chosen, PADDED)
    batch = builder(encoder, skip=True).batch(chosen, PADDED)

    assert caught.value.reason == "missing_image"
    assert batch.ids == ["e0", "e1", "e3"]
    assert [name for name, _ in batch.rejected] == ["e2"] and "gone.png" in batch.rejected[0][1]


@pytest.mark.parametrize("skip", [True, False])
def test_a_sample_that_cannot_be_laid_out_is_named_and_counted_and_does_not_end_a_run(
    encoder: ChatEncoder, root: Path, skip: bool
) -> None:
    silent = replace(examples(root)[1], turns=())

    batch = builder(encoder, skip=skip).batch([examples(root)[0], silent], PADDED)

    assert batch.ids == ["e0"]
    (rejected,) = batch.rejected
    assert rejected[0] == "e1" and rejected[1].startswith("cannot_encode: data.jsonl: record 1 ")


@pytest.mark.parametrize("policy", ["truncate_answer", "reject"])
def test_samples_that_are_too_long_are_named_and_counted_in_training_and_evaluation(
    encoder: ChatEncoder, root: Path, policy: Literal["truncate_answer", "reject"]
) -> None:
    """One record must not end a run: the answer is cut or its sample rejected, a prompt that is too long rejected."""
    prompt = len(encoder.encode_prompt(examples(root)[0]).ids)
    tight = ChatEncoder(
        encoder.tokenizer, num_visual_tokens=N, max_seq_len=prompt + 12, template="caption",
        instruction="Describe.", instruction_multi="Describe every one of these images at length.", too_long=policy,
    )  # fmt: skip
    source = Listed([examples(root)[i] for i in range(7)])
    source.examples[1] = replace(source.examples[1], images=source.examples[1].images * 2)
    make = builder(tight, augment="random_crop")

    trained = [b for step in stream(source, make, num_workers=1, multi_image_fraction=0.0).steps(0, 7) for b in step]
    evaluated = list(eval_batches(source.examples, builder(tight), PADDED, 3))

    long = {"e2", "e3", "e4", "e5", "e6"}  # "a " k times, "picture k" and the end token: 10 + 2 k
    expected = {"e1"} | (long if policy == "reject" else set())
    for batches, times in ((evaluated, 1), (trained, 6)):
        rejected = [r for b in batches for r in b.rejected]
        assert sorted(name for name, _ in rejected) == sorted([*expected] * times)
        assert all(reason.startswith(f"too_long: data.jsonl: record {name[1:]} ") for name, reason in rejected)
        assert sum(len(b.ids) for b in batches) == times * (7 - len(expected))
        assert sum(b.truncated for b in batches) == (0 if policy == "reject" else times * len(long))


def test_eval_batches_keep_the_order_and_lose_nothing(encoder: ChatEncoder, root: Path) -> None:
    chosen = list(examples(root).examples)
    whole = per_sample(list(eval_batches(chosen, builder(encoder), PADDED, 23)))

    for layout in (PADDED, PACKED):
        for size in (1, 4, 5, 100):
            batches = list(eval_batches(chosen, builder(encoder), layout, size))
            assert [name for b in batches for name in b.ids] == [e.id for e in chosen]
            assert per_sample(batches) == whole


@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["augmented", "stored"])
def test_the_stream_does_not_depend_on_the_worker_count(
    encoder: ChatEncoder, root: Path, layout: Layout, kind: str
) -> None:
    make = builder(encoder, augment="random_crop") if kind == "augmented" else builder(encoder, stored=True)
    alone = list(stream(examples(root), make, layout).steps(2, 7))

    for options in ({"num_workers": 1}, {"num_workers": 3, "prefetch_factor": 1, "persistent_workers": False}):
        shared = list(stream(examples(root), make, layout, **options).steps(2, 7))
        assert [[content(b) for b in step] for step in shared] == [[content(b) for b in step] for step in alone]


def test_a_step_is_the_same_wherever_the_stream_starts(encoder: ChatEncoder, root: Path) -> None:
    """Resume is starting elsewhere; 23 samples and 6 a step, so steps straddle epochs."""
    make = builder(encoder, augment="random_crop")
    straight = [[content(b) for b in step] for step in stream(examples(root), make).steps(0, 12)]

    for start in (1, 4, 11):
        resumed = [[content(b) for b in step] for step in stream(examples(root), make).steps(start, 12)]
        assert resumed == straight[start:]
    assert list(stream(examples(root), make).steps(5, 5)) == []


@pytest.mark.parametrize("world_size", [2, 3, 4, 6])
@pytest.mark.parametrize("micro", [(1, 6), (2, 3), (6, 1)])
@pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])
def test_processes_share_a_step_without_changing_it(
    encoder: ChatEncoder, root: Path, world_size: int, micro: tuple[int, int], layout: Layout
) -> None:
    make = builder(encoder, augment="random_crop")
    options: dict[str, Any] = {"layout": layout, "micro_batch_size": micro[0], "gradient_accum": micro[1]}
    alone = list(stream(examples(root), make, **options).steps(3, 6))
    ranks = [stream(examples(root), make, **options, rank=r, world_size=world_size) for r in range(world_size)]
    shares = [list(s.steps(3, 6)) for s in ranks]

    for number, step in enumerate(alone):
        together = [batch for share in shares for batch in share[number]]
        assert per_sample(together) == per_sample(step)
        if not layout.packing:
            assert len({len(share[number]) for share in shares}) == 1, "as many backward passes on every rank"
            assert all(len(batch.ids) <= micro[0] for batch in together)
        sizes = [sum(len(b.ids) for b in share[number]) for share in shares]
        assert max(sizes) - min(sizes) <= 1


def test_one_process_gets_exactly_the_micro_batches_it_asked_for(encoder: ChatEncoder, root: Path) -> None:
    one = stream(examples(root), builder(encoder), PADDED, multi_image_fraction=0.0)

    steps = list(one.steps(0, 8))

    assert [[len(b.ids) for b in step] for step in steps] == [[3, 3]] * 8
    first_epoch = [name for step in steps for b in step for name in b.ids][:23]
    assert sorted(first_epoch) == sorted(e.id for e in examples(root).examples)


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    micro=st.integers(1, 12),
    layout=st.builds(Layout, st.booleans(), st.integers(60, 200), st.sampled_from([1, 8])),
)
def test_a_window_becomes_micro_batches_of_about_the_size_asked_for(
    lengths: list[int], micro: int, layout: Layout
) -> None:
    window = [sample(i, n, images=i % 3) for i, n in enumerate(lengths)]

    batches = collate_window(window, layout, micro)

    assert sorted(name for b in batches for name in b.ids) == sorted(name for name, _, _ in window)
    for batch in batches:
        assert_laid_out(batch, [s for s in window if s[0] in batch.ids], layout)
    if not layout.packing:
        assert [len(b.ids) for b in batches] == [
            len(window[i : i + micro]) for i in range(0, max(1, len(window)), micro)
        ]
        return
    rows = [b.input_ids.shape[0] for b in batches]
    assert sum(rows) == max(1, len(pack(lengths, layout.pack_len)))
    assert max(rows) <= max(1, micro), "no more than as many rows as samples were asked for"
    assert max(rows) <= max(1, sum(rows) * micro // len(lengths)), "no more than their share of the rows"
    if micro >= len(lengths):
        assert len(batches) == 1


def test_micro_batches_of_one_sample_are_packed_over_the_step(encoder: ChatEncoder, root: Path) -> None:
    options: dict[str, Any] = {"micro_batch_size": 1, "gradient_accum": 20, "multi_image_fraction": 0.0}
    (nothing,) = collate_window([], PACKED, 1)
    assert nothing.ids == [] and nothing.input_ids.shape[0] == 1, "a process without samples still takes part"
    single = next(stream(examples(root), builder(encoder), PADDED, **options).steps(0, 1))
    packed = next(stream(examples(root), builder(encoder), PACKED, **options).steps(0, 1))

    assert len(single) == 20 and per_sample(packed) == per_sample(single)
    assert all(b.input_ids.shape[0] == 1 and b.input_ids.shape[1] <= PACKED.pack_len for b in packed)
    assert len(packed) < 20 / 3


def test_a_large_step_is_packed_in_windows(encoder: ChatEncoder, root: Path) -> None:
    large = stream(examples(root), builder(encoder), micro_batch_size=4, gradient_accum=25, multi_image_fraction=0.0)

    sizes = [len(large.positions(3, w)) for w in range(large.windows_per_step)]
    (step,) = large.steps(3, 4)

    assert sizes == [50, 50] and WINDOW == 64
    assert sum(len(b.ids) for b in step) == 100
    assert np.concatenate([large.positions(3, w) for w in range(2)]).tolist() == list(range(300, 400))


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (3, 12), (0.5, 2), (0.01, 1), (6, 23), (0.1 * 60, 23)])
def test_steps_cover_the_epochs_asked_for(encoder: ChatEncoder, root: Path, epochs: float, steps: int) -> None:
    assert stream(examples(root), builder(encoder)).steps_for(epochs) == steps


def test_more_processes_than_samples_are_refused(encoder: ChatEncoder, root: Path) -> None:
    with pytest.raises(UserError, match="is 6 samples a step, fewer than the 7 processes"):
        stream(examples(root), builder(encoder), rank=0, world_size=7)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_in_a_worker_keeps_its_message(encoder: ChatEncoder, root: Path, num_workers: int) -> None:
    source = examples(root)
    source.examples[9] = replace(source.examples[9], images=(ImageRef(str(root), "gone.png"),))
    broken = stream(source, builder(encoder), num_workers=num_workers, multi_image_fraction=0.0)

    before = _children()
    with pytest.raises(UserError) as caught:
        list(broken.steps(0, 4))

    assert "gone.png" in str(caught.value) and "data.jsonl: record 9 (id 'e9')" in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert _children() <= before, "nobody is left behind"


def test_a_bug_in_a_worker_is_not_mistaken_for_bad_input(encoder: ChatEncoder, root: Path) -> None:
    make = builder(encoder)
    make.pipeline = _buggy

    before = _children()
    with pytest.raises(ZeroDivisionError, match="in DataLoader worker process"):
        list(stream(examples(root), make, num_workers=1).steps(0, 1))
    assert _children() <= before


def _buggy(ref: ImageRef, key: str | None) -> torch.Tensor:
    raise ZeroDivisionError(ref.path)


def test_skipped_samples_travel_with_the_batch_through_workers(encoder: ChatEncoder, root: Path) -> None:
    source = examples(root)
    source.examples[9] = replace(source.examples[9], images=(ImageRef(str(root), "gone.png"),))
    skipping = stream(source, builder(encoder, skip=True), num_workers=2, multi_image_fraction=0.0)

    batches = [b for step in skipping.steps(0, 4) for b in step]

    assert sum(len(b.ids) + len(b.rejected) for b in batches) == 24
    assert {name for b in batches for name, _ in b.rejected} == {"e9"}
    assert all(b.load_s > 0 for b in batches)


def test_signals_to_the_group_leave_the_trainer_time_to_finish_its_step(encoder: ChatEncoder, root: Path) -> None:
    """Ctrl-C and a scheduler's SIGTERM also reach the loader processes; the trainer must not be disturbed by that."""
    before = _children()
    steps = stream(examples(root), builder(encoder), PADDED, num_workers=2).steps(0, 500)
    next(steps)
    workers = _children() - before
    assert len(workers) == 2

    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
    for _ in range(20):  # more than was ready: they still deliver
        assert len(next(steps)) == 2
    steps.close()  # type: ignore[attr-defined]

    assert not any(_alive(w) for w in workers)


def test_a_loader_process_that_hangs_or_is_killed_ends_the_run_with_the_samples_that_were_due(
    encoder: ChatEncoder, root: Path
) -> None:
    make, before = builder(encoder), _children()
    make.pipeline = _stuck
    steps = stream(
        examples(root), make, PADDED, num_workers=1, timeout_s=1.0, multi_image_fraction=0.0
    ).steps(3, 500)  # fmt: skip
    began = time.monotonic()
    with pytest.raises(
        ProcessError, match=r"gave no batch of step 4 \(samples 'e\d+', .*for 1 s: one hangs.*same command"
    ):
        next(steps)
    assert time.monotonic() - began < 6 and _children() <= before, "nobody is waited for or left behind"

    steps = stream(examples(root), make, PADDED, num_workers=1, timeout_s=60.0, multi_image_fraction=0.0).steps(3, 500)

    def kill_it() -> None:
        while not (workers := _children() - before):
            time.sleep(0.05)
        time.sleep(0.5)
        workers.pop().kill()

    began = time.monotonic()
    killer = threading.Thread(target=kill_it)
    killer.start()
    with pytest.raises(ProcessError, match=r"killed while the batch of step 4 \(samples 'e\d+'.*data.num_workers"):
        next(steps)
    killer.join()
    assert time.monotonic() - began < 8 and _children() <= before


def _stuck(ref: ImageRef, key: str | None) -> torch.Tensor:
    time.sleep(3600)
    raise AssertionError


def _children() -> set[psutil.Process]:
    return {p for p in psutil.Process().children(recursive=True) if _alive(p)}


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_builder_travels_to_a_process_that_shares_nothing(encoder: ChatEncoder, root: Path) -> None:
    make = builder(encoder, augment="random_crop")

    copy = pickle.loads(pickle.dumps(make))

    chosen = examples(root).examples[:3]
    assert content(copy.batch(chosen, PACKED, 2)) == content(make.batch(chosen, PACKED, 2))


@pytest.mark.gpu
def test_batches_of_workers_are_pinned(encoder: ChatEncoder, root: Path) -> None:
    (step,) = stream(examples(root), builder(encoder, stored=True), num_workers=1, pin_memory=True).steps(0, 1)

    for batch in step:
        assert batch.input_ids.is_pinned()
        assert all(t.is_pinned() for i in batch.images for t in (i.features, i.pixels) if t is not None)
