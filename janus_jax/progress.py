"""Progress reports on stderr: a tqdm bar on a terminal, a line every half minute elsewhere."""

import shutil
import sys
from collections.abc import Callable

from tqdm import tqdm

Report = Callable[[int, int], None]  # takes what is done so far and the total, in any unit

_LOG_INTERVAL = 30.0  # seconds between two lines of a log
_BAR_INTERVAL = 0.05  # seconds between two states of a bar: a folder may have 1000 tensors
_LOG_FORMAT = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {remaining} left"


class _LogBar(tqdm):
    """For a file or a pipe: prints each report on a line of its own."""

    monitor_interval = 0  # no thread: a log needs no refresh between two reports

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints the report; an empty message, which would clear a bar, prints nothing."""
        if msg is None:
            print(self, file=self.fp, flush=True)


class Progress:
    """Reports how much of a task is done and the time left. A context manager.

    >>> with Progress("loading", "B") as report:
    >>>     report(done, total)

    The bar appears with the first report and disappears at the end.
    """

    def __init__(self, description: str, unit: str, warm_up: int = 0, stream=None):
        """unit: of `done` and `total`. warm_up: the time left is computed from the reports after
        this many, because a program may still be compiling before them."""
        self._settings = dict(desc=description, unit=unit, file=stream or sys.stderr)
        self._warm_up = warm_up
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """done, total: in units."""
        if self._bar is None:
            self._bar = self._open(total)
        due = self._warm_up > 0 or done >= total  # whenever the bar was last drawn
        if self._warm_up:
            self._warm_up -= 1
            self._bar.initial = done
            self._bar.unpause()
        self._bar.update(done - self._bar.n)
        if due and self._terminal():
            self._bar.refresh()

    def _terminal(self) -> bool:
        return self._settings["file"].isatty()

    def _open(self, total: int) -> tqdm:
        # smoothing 0: the time left follows the average speed
        settings = dict(total=total, unit_scale=True, smoothing=0, leave=False, **self._settings)
        if self._terminal():
            # stated, because tqdm shows nothing on a terminal that gives its size as 0 x 0
            columns, lines = shutil.get_terminal_size()
            settings.update(ncols=columns, nrows=lines)
            return tqdm(miniters=1, mininterval=_BAR_INTERVAL, **settings)
        pause = dict(delay=_LOG_INTERVAL, mininterval=_LOG_INTERVAL, miniters=1)
        return _LogBar(bar_format=_LOG_FORMAT, **pause, **settings)
