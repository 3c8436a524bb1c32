"""What all commands share: parser of flags, one-line errors, exit statuses, signals, progress.

Progress is a tqdm bar on a terminal, otherwise a line every 30 seconds, both on stderr.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from janus_jax.checks import shorten_text
from janus_jax.orbax_errors import is_out_of_memory

_LOG_INTERVAL = 30.0  # seconds between lines of a log
_BAR_INTERVAL = 0.05  # minimum seconds between updates of a bar; a folder may have 1000 tensors
_LOG_FORMAT = "{desc}: {percentage:.0f}%, {n_fmt} of {total_fmt}{unit}, {remaining} left"


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports each error in one line, after the name of the command."""

    def __init__(self, name: str, **settings):
        super().__init__(**settings)
        self._name = name

    def error(self, message: str) -> NoReturn:
        """Exits with status 2. Long words in the message, such as flag values, are shortened."""
        words = (shorten_text(word) for word in message.split())
        exit_with_error(self._name, " ".join(words))

    def flag_names(self) -> list[str]:
        """Returns the names of all flags, such as "--seed"."""
        options = (option for action in self._actions for option in action.option_strings)
        return [option for option in options if option.startswith("--")]


def path_arg(text: str) -> Path:
    """The argparse type of paths; rejects an empty string, which Path takes for "."."""
    if not text:
        raise argparse.ArgumentTypeError("expected the path of a file or folder, got ''")
    return Path(text)


def exit_with_error(name: str, message: str, status: int = 2) -> NoReturn:
    """Prints one line to stderr and exits."""
    print(error_line(name, message), file=sys.stderr)
    sys.exit(status)


def program_name(command: str) -> str:
    """Returns the name that error messages start with: "convert" for "python -m convert"."""
    return command.rpartition(" ")[2]


def error_line(name: str, message: str) -> str:
    """Formats an error of the command `name` as one line and shortens very long words."""
    words = (word if len(word) < 256 else shorten_text(word) for word in message.split())
    return f"{name}: {' '.join(words)}"


def set_up_program() -> None:
    """Sets up signals and warnings of the process. Commands call it before they start.

    SIGTERM, which schedulers and containers send, raises SystemExit instead of killing the process,
    so that partly written files are removed. Pillow's warning about large images is disabled, as
    these images are read anyway.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")


@contextlib.contextmanager
def one_line_errors(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turns exceptions that a user can cause into a one-line message and exit status 2.

    These are ValueError, OSError, MemoryError and `kinds`. KeyboardInterrupt exits with status 130.
    If the reader of stdout has closed it, such as `head`, the program exits without a message.
    """
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:  # which it is if the shell closed it
                sys.stdout.flush()  # at exit, Python would report a closed pipe with a message
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        sys.exit(1)
    except KeyboardInterrupt:
        exit_with_error(name, "interrupted", 130)
    except MemoryError as error:
        exit_with_error(name, f"out of memory: {error}")
    except (ValueError, OSError, *kinds) as error:
        exit_with_error(name, str(error))


@contextlib.contextmanager
def device_memory_errors(advice: str) -> Iterator[None]:
    """Re-raises XLA's error that a device is out of memory as a MemoryError with advice."""
    try:
        yield
    except RuntimeError as error:  # XLA's errors are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"on the device, {advice}") from error


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
    ...     report(done, total)

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
