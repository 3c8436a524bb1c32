"""What all commands share: the parser of flags, one-line errors, exit statuses and signals."""

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from janus_jax.checks import shorten_text
from janus_jax.orbax_errors import is_out_of_memory


class OneLineParser(argparse.ArgumentParser):
    """An argument parser that reports each error in one line, after the name of the command."""

    def __init__(self, name: str, **settings):
        super().__init__(**settings)
        self._name = name

    def error(self, message: str) -> NoReturn:
        """Exits with status 2. Long words in the message, such as flag values, are shortened."""
        words = (shorten_text(word) for word in message.split())
        exit_with_error(self._name, " ".join(words))


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
        yield
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
