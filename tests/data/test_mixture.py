"""The order of training is a bijection, is pinned, and is a pure function of the position."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beholder.data.mixture import Mixture, join, permute
from beholder.types import Example, ImageRef, ImageSlot, Turn, UserError


class Listed:
    """The part of `Records` that is needed here, in memory."""

    def __init__(self, examples: Sequence[Example], fingerprint: str = "f", origins: Sequence[int] = ()) -> None:
        self.examples = list(examples)
        self.fingerprint = fingerprint
        self.origins = np.array(origins or [0] * len(self.examples))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def target_texts(self, indices: Sequence[int] | None = None) -> list[str]:
        return [self.examples[i].target_text for i in (range(len(self)) if indices is None else indices)]


def captioned(count: int) -> Listed:
    return Listed(
        [Example(str(i), (ImageRef("r", f"{i}.png"),), (Turn("assistant", (f"caption {i}",)),)) for i in range(count)]
    )


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000), fingerprint=st.text(max_size=9))
def test_the_order_is_a_bijection(n: int, seed: int, epoch: int, fingerprint: str) -> None:
    order = permute(n, seed, epoch, fingerprint, np.arange(n))

    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 15, 16, 17, 255, 256, 257, 65_535, 65_536, 65_537, 558_128])
def test_the_order_is_a_bijection_around_powers_of_two_and_at_full_size(n: int) -> None:
    assert np.array_equal(np.sort(permute(n, 42, 0, "x", np.arange(n))), np.arange(n))


def test_a_position_alone_goes_where_it_goes_among_others() -> None:
    together = permute(1000, 7, 3, "data", np.arange(1000))

    assert [int(permute(1000, 7, 3, "data", np.array([p]))[0]) for p in range(1000)] == together.tolist()
    assert permute(1000, 7, 3, "data", np.arange(6).reshape(2, 3)).tolist() == together[:6].reshape(2, 3).tolist()
    assert permute(1000, 7, 3, "data", np.array([], dtype=np.int64)).shape == (0,)


@pytest.mark.parametrize(("arguments", "first"), [
    ((5, 42, 0, "x"), [4, 2, 0, 3, 1]),
    ((10, 42, 0, "beholder"), [1, 9, 8, 6, 5, 3, 0, 4, 2, 7]),
    ((10, 42, 1, "beholder"), [8, 2, 5, 4, 0, 1, 3, 6, 9, 7]),
    ((10, 43, 0, "beholder"), [5, 3, 0, 6, 2, 9, 8, 1, 7, 4]),
    ((1000, 42, 3, "beholder"), [959, 468, 797, 274, 265, 929, 233, 635, 232, 772]),
])  # fmt: skip
def test_the_order_is_pinned(arguments: tuple[int, int, int, str], first: list[int]) -> None:
    """If this fails, runs in flight would resume on other samples: do not change the numbers, change the code back."""
    n = arguments[0]

    assert permute(*arguments, np.arange(n))[:10].tolist() == first


def test_the_order_looks_random() -> None:
    """Each element lands in each of 10 tenths equally often over seeds; neighbours do not stay neighbours."""
    n, seeds = 100, 400
    orders = np.stack([permute(n, seed, 0, "x", np.arange(n)) for seed in range(seeds)])

    counts = np.stack([np.bincount(column // 10, minlength=10) for column in orders.T])
    chi2 = ((counts - seeds / 10) ** 2 / (seeds / 10)).sum(axis=1)  # 9 degrees of freedom per position
    neighbours = np.mean(np.abs(np.diff(orders, axis=1)) == 1)

    # Sum of 100 chi-square variables with 9 degrees of freedom: mean 900, standard deviation 42.
    assert 700 < chi2.sum() < 1100
    assert abs(neighbours - 2 / n) < 0.006


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order() -> None:
    mixture = Mixture(captioned(50), np.arange(10, 40), seed=3)

    epochs = [[int(mixture.example_at(e * 30 + p).id) for p in range(30)] for e in range(3)]

    assert all(sorted(e) == list(range(10, 40)) for e in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [mixture.epoch_of(p) for p in (0, 29, 30, 59, 60)] == [0, 0, 1, 1, 2]
    assert [mixture.index_at(p) for p in range(30, 60)] == epochs[1]


def test_order_and_fingerprint_follow_data_indices_and_seed() -> None:
    examples = captioned(20)
    base = Mixture(examples, np.arange(20), seed=1)
    same = Mixture(captioned(20), list(range(20)), seed=1)
    others = [
        Mixture(examples, np.arange(20), seed=2), Mixture(examples, np.arange(19), seed=1),
        Mixture(Listed(examples.examples, "other"), np.arange(20), seed=1),
        Mixture(examples, np.arange(20), seed=1, multi_image_fraction=0.5),
    ]  # fmt: skip

    assert same.fingerprint == base.fingerprint
    assert [same.index_at(p) for p in range(80, 100)] == [base.index_at(p) for p in range(80, 100)]
    assert len({base.fingerprint, *(m.fingerprint for m in others)}) == 5
    assert all([m.index_at(p) for p in range(19)] != [base.index_at(p) for p in range(19)] for m in others[:3])


def test_joined_samples_have_both_images_in_order_and_both_captions() -> None:
    a, b = captioned(2).examples

    both = join(a, b)

    assert both.id == "0+1"
    assert both.images == (a.images[0], b.images[0])
    assert both.target_text == "Image 1: caption 0 Image 2: caption 1"


def test_the_multi_image_fraction_is_met_without_moving_anything_else() -> None:
    examples = captioned(3000)
    plain = Mixture(examples, np.arange(3000), seed=5)
    mixed = Mixture(examples, np.arange(3000), seed=5, multi_image_fraction=0.2)
    joined = 0

    for p in range(3000):
        before, after = plain.example_at(p), mixed.example_at(p)
        if len(after.images) == 2:
            joined += 1
            first, second = after.id.split("+")
            assert first == before.id != second
            assert after == join(examples[int(first)], examples[int(second)])
        else:
            assert after == before
        assert mixed.example_at(p) == after, "a pure function of the position"

    assert abs(joined / 3000 - 0.2) < 4 * (0.2 * 0.8 / 3000) ** 0.5


def test_only_single_captioned_images_are_joined() -> None:
    examples = captioned(40).examples
    examples[3] = Example("two", (ImageRef("r", "a"), ImageRef("r", "b")), (Turn("assistant", ("x",)),))
    rounds = (Turn("user", (ImageSlot(0), "?")), Turn("assistant", ("x",)))
    examples[5] = Example("talk", (ImageRef("r", "a"),), rounds * 2)
    mixture = Mixture(Listed(examples), np.arange(40), seed=0, multi_image_fraction=1.0)

    seen = Counter(name for p in range(400) for name in mixture.example_at(p).id.split("+"))
    ids = {mixture.example_at(p).id for p in range(400)}

    assert {"two", "talk"} <= ids
    assert seen["two"] == seen["talk"] == 10, "once an epoch, never as a partner"
    assert all("+" in i for i in ids - {"two", "talk"})


def test_nothing_to_train_on_and_nothing_to_join_are_errors() -> None:
    with pytest.raises(UserError, match="no training sample"):
        Mixture(captioned(3), np.zeros(0, dtype=np.int64), seed=0)
    with pytest.raises(UserError, match="multi_image_fraction"):
        Mixture(captioned(3), np.array([1]), seed=0, multi_image_fraction=0.1)


# ---------------------------------------------------------------------------------------------------------------
# Weights


def weighted(weights: Sequence[float], *, sizes: Sequence[int] = (30, 500, 7), seed: int = 3) -> Mixture:
    origins = [k for k, n in enumerate(sizes) for _ in range(n)]
    return Mixture(Listed(captioned(sum(sizes)).examples, origins=origins), np.arange(sum(sizes)), seed=seed,
                   weights=weights)  # fmt: skip


def origin_of(mixture: Mixture, position: int) -> int:
    return int(mixture.examples.origins[mixture.index_at(position)])


def test_every_thousand_positions_hold_the_sources_exactly_by_weight() -> None:
    mixture = weighted([2, 1, 1])

    drawn = [origin_of(mixture, p) for p in range(2500)]

    for block in (drawn[:1000], drawn[1000:2000]):
        assert [block.count(k) for k in range(3)] == [500, 250, 250]
    assert [drawn.count(k) for k in range(3)] == mixture.shares(2500)
    assert len({tuple(drawn[k : k + 5]) for k in range(0, 100, 5)}) > 10, "mixed, not in stretches"


def test_each_source_runs_through_epochs_of_its_own() -> None:
    mixture = weighted([1, 1, 1])
    drawn = [mixture.index_at(p) for p in range(3000)]

    for start, size in ((0, 30), (30, 500), (530, 7)):
        own = [i for i in drawn if start <= i < start + size]
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(start, start + size))


def test_a_weighted_position_is_the_same_whenever_it_is_asked_for() -> None:
    straight, back = weighted([3, 1, 1]), weighted([3, 1, 1])
    wanted = [straight.index_at(p) for p in range(2100)]

    assert [back.index_at(p) for p in reversed(range(2100))] == wanted[::-1]
    assert back.fingerprint == straight.fingerprint != weighted([2, 1, 1]).fingerprint
    assert weighted([6, 2, 2]).fingerprint == straight.fingerprint, "the same shares"


def test_weights_that_do_not_go_into_a_thousand_are_rounded_by_the_largest_remainders() -> None:
    assert weighted([1, 1, 1]).shares(1000) == [334, 333, 333]


@pytest.mark.parametrize(("weights", "sizes", "message"), [
    ([5000, 1, 1], (30, 500, 7), r"data\.sources\.1\.weight is less than a 1000th"),
    ([1, 1, 1], (30, 0, 7), r"data\.sources\.1 has a weight, but none of its records is left"),
])  # fmt: skip
def test_a_weight_that_gives_nothing_is_named(weights: list[float], sizes: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        weighted(weights, sizes=sizes)


def test_joined_captions_come_from_one_source_so_the_shares_stay_true() -> None:
    origins = [k for k, n in enumerate((30, 500, 7)) for _ in range(n)]
    records = Listed(captioned(537).examples, origins=origins)
    mixture = Mixture(records, np.arange(537), seed=3, multi_image_fraction=1.0, weights=[2, 1, 1])

    pairs = [[int(i) for i in mixture.example_at(p).id.split("+")] for p in range(1000)]

    assert all(len(pair) == 2 and origins[pair[0]] == origins[pair[1]] for pair in pairs)
    seen = [origins[i] for pair in pairs for i in pair]
    assert [seen.count(k) for k in range(3)] == [2 * n for n in mixture.shares(1000)]


def test_what_weights_repeat_comes_once_where_samples_are_read_for_what_they_say() -> None:
    mixture = weighted([1, 1, 8], sizes=(30, 40, 7))

    once = [int(e.id) for e in mixture.each_once()]

    assert len(once) == len(set(once)) < 77 and {70, 71, 72, 73, 74, 75, 76} <= set(once)
    assert once == list(dict.fromkeys(mixture.index_at(p) for p in range(77))), "in the order of training"
    plain = Mixture(captioned(20), np.arange(20), seed=1)
    assert [e.id for e in plain.each_once()] == [plain.example_at(p).id for p in range(20)]
