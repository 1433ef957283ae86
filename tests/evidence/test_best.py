"""The best checkpoint is the one with the lowest loss among those that look and do not babble."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from beholder.config import BestRule
from beholder.evidence import Candidate
from beholder.evidence.best import best_of, choose


def at(step: int, eval_loss: float, delta: float | None = 1.0, collapse: float | None = 0.0) -> Candidate:
    return Candidate(step=step, eval_loss=eval_loss, delta_shuffled=delta, collapse=collapse)


def test_the_lowest_loss_wins_not_the_last_step() -> None:
    best = best_of([at(100, 0.5), at(200, 0.3), at(300, 0.4)])

    assert best is not None and best.step == 200 and best.best


def test_a_lower_loss_that_is_bought_by_looking_less_is_refused_and_told() -> None:
    chosen = choose([at(100, 0.5, delta=2.0), at(200, 0.3, delta=0.9)])

    assert [c.best for c in chosen] == [True, False]
    assert chosen[1].refused == "it looks less than before (+0.9 of at most +2 nats/token)"


def test_a_checkpoint_that_does_not_look_or_babbles_is_refused() -> None:
    blind, babbling = choose([at(1, 0.1, delta=-0.01), at(2, 0.1, collapse=0.6)])

    assert blind.refused == "another sample's image does not make it worse (-0.01 nats/token)"
    assert babbling.refused == "60% of its golden outputs are empty, looping or all alike"
    assert best_of([blind, babbling]) is None


def test_what_must_be_kept_is_measured_by_pruned_candidates_too() -> None:
    told = [at(2, 3.0, 1.0), at(4, 2.5, 0.6), at(6, 2.4, 0.45), at(8, 2.0, 0.32), at(10, 1.5, 0.2)]

    best = best_of(told, on_disk={4, 8, 10})

    assert best is not None and best.step == 4  # by those on disk alone, 10 keeps a third of what 2 had


def test_of_equal_losses_the_later_one_is_the_best() -> None:
    best = best_of([at(200, 0.3), at(100, 0.3)])

    assert best is not None and best.step == 200


def test_what_was_not_measured_refuses_nothing() -> None:
    best = best_of([at(100, 0.3, delta=None, collapse=None)])

    assert best is not None and best.step == 100


@given(
    st.lists(
        st.builds(at, st.integers(1, 50), st.floats(0, 5), st.none() | st.floats(-1, 3), st.none() | st.floats(0, 1)),
        max_size=8,
    )
)
def test_at_most_one_is_best_and_no_allowed_one_is_better(candidates: list[Candidate]) -> None:
    chosen = choose(candidates)

    assert [c.step for c in chosen] == sorted({c.step for c in candidates})
    marked, allowed = [c for c in chosen if c.best], [c for c in chosen if not c.refused]
    assert len(marked) == min(1, len(allowed))
    assert all(marked[0].eval_loss <= c.eval_loss for c in allowed)
    most = max((c.delta_shuffled or 0.0 for c in chosen), default=0.0)
    assert all(c.delta_shuffled is None or c.delta_shuffled >= BestRule().kept * most for c in allowed)
