"""What the commands have in common: how they take flags and how they end."""

import argparse
import contextlib
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from janus_jax.checks import shorten_text
from janus_jax.orbax_errors import is_out_of_memory


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors take one line, which starts with the name of the command."""

    def __init__(self, name: str, **settings):
        super().__init__(**settings)
        self._name = name

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2. What the message repeats of the flags is shortened."""
        words = (shorten_text(word) for word in message.split())
        stop(self._name, " ".join(words))


def path_arg(text: str) -> Path:
    """The type of a flag that names a file or folder: an empty text is not the present folder."""
    if not text:
        raise argparse.ArgumentTypeError("a file or folder must be named, got ''")
    return Path(text)


def stop(name: str, message: str, status: int = 2) -> NoReturn:
    """Ends the program with one line on stderr."""
    print(one_line(name, message), file=sys.stderr)
    sys.exit(status)


def one_line(name: str, message: str) -> str:
    """What a command has to say of an error; a word longer than a file's name is shortened."""
    words = (word if len(word) < 256 else shorten_text(word) for word in message.split())
    return f"{name}: {' '.join(words)}"


def set_up_program() -> None:
    """What a command asks of its process before it begins.

    SIGTERM, which schedulers and containers send, ends the program as an error does and not where
    it stands: nothing half written stays behind. Pillow does not warn of images that are large
    and read all the same.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")


@contextlib.contextmanager
def one_line_errors(name: str, *kinds: type[Exception]) -> Iterator[None]:
    """Ends the program in one line and status 2 after what a user can cause.

    That is ValueError, OSError, MemoryError and `kinds`; an interrupt ends it with status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        stop(name, "interrupted", 130)
    except MemoryError as error:
        stop(name, f"out of memory: {error}")
    except (ValueError, OSError, *kinds) as error:
        stop(name, str(error))


@contextlib.contextmanager
def device_memory_errors(advice: str) -> Iterator[None]:
    """Raises XLA's report that a device has no memory left as a MemoryError with advice."""
    try:
        yield
    except RuntimeError as error:  # XLA's errors are RuntimeErrors
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"on the device, {advice}") from error
