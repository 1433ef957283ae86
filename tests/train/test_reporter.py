"""What is printed: the seed's lines word for word when output is not a terminal, a bar when it is."""

from __future__ import annotations

import io
import re
from typing import Any

from rich.console import Console

from beholder.train.reporter import Reporter, duration


def record(step: int) -> dict[str, Any]:
    return {
        "step": step, "loss": 2.5, "lr.connector": 1e-4, "grad_norm": 0.7, "samples_per_s": 4.0, "tokens_per_s": 250.0,
        "data_wait_share": 0.03,
    }  # fmt: skip


def run(reporter: Reporter, steps: int, *, start: int = 0, step_time_s: float = 0.5) -> None:
    with reporter:
        reporter.start(start)
        for s in range(start + 1, steps + 1):
            reporter.time(step_time_s)
            reporter.step(record(s))


def lines(**options: Any) -> tuple[Reporter, io.StringIO]:
    out = io.StringIO()
    return Reporter(console=Console(file=out, width=40, soft_wrap=True), **options), out


def test_a_line_stays_one_whatever_is_in_it_and_a_table_stands_below() -> None:
    report, out = lines(total_steps=1, steps_per_epoch=1, samples_per_step=1)

    report.line("finding", "a\n[gate] passed \x1b[2J", "x  1\ny  2")

    assert out.getvalue() == "[finding] a\\u000a[gate] passed \\u001b[2J\nx  1\ny  2\n"


def test_lines_are_spelled_like_the_seeds() -> None:
    reporter, out = lines(total_steps=3675, steps_per_epoch=1225, samples_per_step=4, full_train_samples=546965)
    reporter.data(full_len=558128, subset_train=4900, subset_eval=100, full_train=546965)
    run(reporter, 123, step_time_s=0.846)
    reporter.eval(3.9716, step=200)
    reporter.eval(3.58, epoch=0)
    text = out.getvalue().splitlines()
    assert text[0] == "[data] full_len=558128 subset_train=4900 subset_eval=100 full_train=546965"
    assert "[estimate] avg_step=0.846s full_epoch≈32.13h full_total≈96.40h" in text
    assert "[progress] epoch=0 step=123/1225 (10%)" in text
    assert text[-2:] == ["[eval] step=200 loss=3.9716", "[eval] epoch=0 loss=3.5800"]


def test_progress_is_printed_once_per_share_of_an_epoch_and_counts_epochs_like_the_seed() -> None:
    reporter, out = lines(total_steps=40, steps_per_epoch=20, samples_per_step=1, log_every=1000)
    run(reporter, 40)
    seen = re.findall(r"epoch=(\d) step=(\d+)/20 \((\d+)%\)", out.getvalue())
    assert [int(s) for _, s, _ in seen] == list(range(2, 21, 2)) * 2
    assert seen[9] == ("0", "20", "100") and seen[10] == ("1", "2", "10")


def test_a_resumed_run_does_not_repeat_earlier_progress() -> None:
    reporter, out = lines(total_steps=40, steps_per_epoch=20, samples_per_step=1, log_every=1000)
    run(reporter, 40, start=37)
    assert re.findall(r"step=(\d+)/20", out.getvalue()) == ["18", "20"]


def test_the_average_leaves_the_warm_up_step_out_and_gives_the_remaining_time() -> None:
    reporter, _ = lines(total_steps=100, steps_per_epoch=100, samples_per_step=1)
    assert reporter.eta_s(0) is None
    reporter.time(60.0)
    assert reporter.eta_s(1) is None
    for _ in range(4):
        reporter.time(0.5)
    assert reporter.eta_s(5) == 95 * 0.5
    assert (duration(3909.2), duration(309)) == ("1:05:09", "5:09")


def test_other_processes_print_nothing() -> None:
    reporter, out = lines(total_steps=40, steps_per_epoch=20, samples_per_step=1, log_every=1, enabled=False)
    reporter.data(full_len=1, subset_train=1, subset_eval=0)
    run(reporter, 40)
    reporter.eval(1.0, step=1)
    assert out.getvalue() == ""


def test_a_terminal_gets_a_bar_with_eta_instead_of_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, width=160, force_terminal=True)
    reporter = Reporter(total_steps=40, steps_per_epoch=20, samples_per_step=1, log_every=1, console=console)
    assert reporter.live
    run(reporter, 40)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert "40/40" in text and "ETA 0:00" in text and "loss=2.5000" in text
    assert "[progress]" not in text and "[estimate]" not in text


def test_a_loss_that_could_not_be_had_is_not_shown_as_a_number() -> None:
    reporter, out = lines(total_steps=4, steps_per_epoch=4, samples_per_step=1, log_every=1)
    with reporter:
        reporter.start(0)
        for s in (1, 2):
            reporter.time(0.1)
            reporter.step({**record(s), "loss": None, "grad_norm": None})
    assert "loss=n/a" in out.getvalue()
