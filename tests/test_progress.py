"""Tests of progress reports: a bar on a terminal, otherwise lines, and the time left."""

import io

import pytest
import tqdm

from janus_jax.commands.terminal import Progress


@pytest.fixture
def clock(monkeypatch):
    """Returns a function that sets the time for the bars."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(stream, clock, times, units, total, **settings):
    with Progress("loading", "B", stream=stream, **settings) as progress:
        for time, done in zip(times, units, strict=True):
            clock(time)
            progress(done, total)


def test_a_terminal_shows_a_bar_with_units_and_the_time_left(clock):
    out = Terminal()
    report(out, clock, (0, 10, 30), (0, 10**9, 3 * 10**9), 12 * 10**9)
    *bars, cleared, end = out.getvalue().split("\r")[1:]
    assert bars[0].startswith("loading:   0%|") and "0.00/12.0G" in bars[0]
    assert bars[-1].startswith("loading:  25%|##")
    assert bars[-1].endswith("3.00G/12.0G [00:30<01:30, 100MB/s]")
    assert not cleared.strip() and not end and "\n" not in out.getvalue()


def test_a_bar_is_drawn_at_most_twenty_times_a_second_and_when_it_is_full(clock):
    out = Terminal()
    times = [number / 1000 for number in range(101)]
    report(out, clock, times, range(101), 100)
    bars = out.getvalue().split("\r")[1:-2]
    assert len(bars) <= 5 and bars[-1].startswith("loading: 100%|")


def test_the_time_left_leaves_out_what_was_compiled_before(clock):
    out = Terminal()
    report(out, clock, (0, 60, 70), (0, 10, 20), 50, warm_up=2)
    assert out.getvalue().split("\r")[-3].endswith("20.0/50.0 [00:10<00:30, 1.00B/s]")


def test_a_log_gets_a_line_every_half_minute(clock):
    out = io.StringIO()
    report(out, clock, (0, 5, 20, 40, 45, 80), (0, 10, 20, 50, 55, 80), 100)
    assert out.getvalue() == (
        "loading: 50%, 50.0 of 100B, 00:40 left\n"
        "loading: 80%, 80.0 of 100B, 00:20 left\n"
    )


def test_a_task_that_fails_before_its_first_report_prints_nothing():
    out = Terminal()
    with pytest.raises(ValueError), Progress("loading", "B", stream=out):
        raise ValueError
    assert out.getvalue() == ""
