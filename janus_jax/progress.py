"""What a command says while it works: one line of a terminal, replaced as it goes on."""

import time


class ProgressBar:
    """How far the drawing is and how long it will take: on one line of a terminal.

    Elsewhere, as in a log file, a line now and then.
    """

    WIDTH = 30
    PAUSE = 30.0  # seconds between lines of a log
    COMPILING = 2  # calls after which a program may still be compiled, which says nothing of speed

    def __init__(self, stream):
        self._stream = stream
        self._calls = 0
        self._start = (0.0, 0)
        self._terminal = stream.isatty()
        self._open = False  # whether there is a line that something may be added to
        self._said = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """To be called with the image tokens drawn so far and in all."""
        now = time.monotonic()
        if self._calls <= self.COMPILING:
            self._start = now, done
        self._calls += 1
        since, before = self._start
        line = f"{100 * done // total:3d}%"
        if done > before:
            left = (now - since) / (done - before) * (total - done)
            line += f", {_duration(left)} left"
        if self._terminal:
            filled = self.WIDTH * done // total
            bar = "#" * filled + "." * (self.WIDTH - filled)
            show_status(self._stream, f"drawing [{bar}] {line}")
            self._open = True
        elif now - self._said >= self.PAUSE:
            self._said = now
            print(f"drawing {line}", file=self._stream, flush=True)

    def close(self) -> None:
        """Whatever comes next has a line of its own."""
        if self._open:
            print(file=self._stream)
        self._open = False


def show_status(stream, line: str) -> None:
    """Replaces the last line of a terminal; an empty line leaves nothing of it."""
    stream.write(f"\r{line:<70}" if line else f"\r{'':70}\r")
    stream.flush()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
