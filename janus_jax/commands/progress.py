"""Progress reports on stderr: a tqdm bar on a terminal, otherwise a line every 30 seconds."""

import shutil
import sys

from tqdm import tqdm

_LOG_INTERVAL = 30.0  # seconds between lines of a log
_BAR_INTERVAL = 0.05  # minimum seconds between updates of a bar; a folder may have 1000 tensors
_LOG_FORMAT = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {remaining} left"


class _LogBar(tqdm):
    """Progress for a file or a pipe: prints each report on its own line."""

    monitor_interval = 0  # no monitor thread: a log needs no refresh between reports

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Prints the report; an empty message, which would clear a bar, prints nothing."""
        if msg is None:
            print(self, file=self.fp, flush=True)


class Progress:
    """Context manager that reports the progress of a task and the time left.

    >>> with Progress("loading", "B") as report:
    >>>     report(done, total)

    The bar appears with the first report and is removed at the end.
    """

    def __init__(self, description: str, unit: str, warm_up: int = 0, stream=None):
        """
        Args:
            description: name of the task, printed in front of the bar.
            unit: unit of `done` and `total`, for example "B".
            warm_up: number of reports at the start that are ignored when the time left is
                estimated, because a program may still be compiling.
            stream: where to print; by default stderr.
        """
        self._settings = dict(desc=description, unit=unit, file=stream or sys.stderr)
        self._warm_up = warm_up
        self._bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, done: int, total: int) -> None:
        """Reports that `done` of `total` units are done."""
        if self._bar is None:
            self._bar = self._open(total)
        refresh = self._warm_up > 0 or done >= total  # even if the last update was just now
        if self._warm_up:
            self._warm_up -= 1
            self._bar.initial = done
            self._bar.unpause()
        self._bar.update(done - self._bar.n)
        if refresh and self._is_terminal():
            self._bar.refresh()

    def _is_terminal(self) -> bool:
        return self._settings["file"].isatty()

    def _open(self, total: int) -> tqdm:
        # smoothing=0: the time left is estimated from the average speed
        settings = dict(total=total, unit_scale=True, smoothing=0, leave=False, **self._settings)
        if self._is_terminal():
            # the size is passed because tqdm shows nothing on a terminal that reports 0 x 0
            columns, lines = shutil.get_terminal_size()
            settings.update(ncols=columns, nrows=lines)
            return tqdm(miniters=1, mininterval=_BAR_INTERVAL, **settings)
        pause = dict(delay=_LOG_INTERVAL, mininterval=_LOG_INTERVAL, miniters=1)
        return _LogBar(bar_format=_LOG_FORMAT, **pause, **settings)
