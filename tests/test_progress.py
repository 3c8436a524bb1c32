"""The progress bar: its times, and what it says where there is no terminal."""

import io

from janus_jax import progress


def test_the_bar_tells_the_time_left_without_the_time_to_compile(monkeypatch):
    now = iter([0.0, 0.0, 30.0, 60.0, 70.0, 80.0, 160.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    out.isatty = lambda: True
    bar = progress.ProgressBar(out)
    for done in (0, 1, 11, 21, 31, 111):
        bar(done, 111)
    lines = [line.rstrip() for line in out.getvalue().split("\r")[1:]]
    assert lines == [
        "drawing [..............................]   0%",
        "drawing [..............................]   0%",
        "drawing [##............................]   9%",
        "drawing [#####.........................]  18%, 1 min 30 s left",
        "drawing [########......................]  27%, 1 min 20 s left",
        "drawing [##############################] 100%, 0 s left",
    ]
    bar.close()
    bar.close()  # the line ends once, wherever the drawing was
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("\n")


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    now = iter([0.0, 0.0, 5.0, 10.0, 20.0, 40.0, 45.0, 80.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    out = io.StringIO()
    bar = progress.ProgressBar(out)
    for done in (0, 10, 20, 30, 50, 55, 90):
        bar(done, 100)
    assert out.getvalue() == "drawing  50%, 50 s left\ndrawing  90%, 10 s left\n"
