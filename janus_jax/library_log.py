"""Redirects the logs and output of Orbax and its storage threads to a file during training.

See orbax_errors.py for single calls of Orbax, whose failures become one-line exceptions.
"""

import contextlib
import gc
import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

from janus_jax.orbax_errors import filtered, is_foreign

MAX_PENDING = 1000  # texts kept in memory while the disk is full


class _LibraryLog:
    """Appends texts to a file, which is created with the first text."""

    def __init__(self, path: Path):
        self._path, self._pending, self._lock = path, [], threading.Lock()
        self.used = False

    def write(self, text: str) -> None:
        """Appends a text; keeps it in memory while it cannot be written, as on a full disk."""
        with self._lock:
            self.used = True
            self._pending = [*self._pending[-MAX_PENDING:], text.rstrip() + "\n"]
            self._flush()

    def close(self) -> None:
        """Tries a last time to write the texts in memory."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if not self._pending or self._path.is_fifo():  # opening a FIFO blocks until it has a reader
            return
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._pending)
            file.flush()
            self._pending = []

    def divert(self, record: logging.LogRecord) -> bool:
        """Logging filter: moves warnings and errors of the libraries to the file."""
        from_library = record.name == "asyncio" or not is_foreign(record)
        if record.levelno < logging.WARNING or not from_library:
            return True
        self.write(_FORMAT.format(record))
        return False


_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(pathname)s:%(lineno)d %(message)s")


@contextlib.contextmanager
def library_log(path: Path) -> Iterator[None]:
    """Redirects the libraries' warnings and errors, and tracebacks of other threads, to a file.

    Exceptions in the main thread, and those that a library raises to its caller, are not affected.
    """
    log = _LibraryLog(path)

    def log_thread(args: threading.ExceptHookArgs) -> None:
        log.write("".join(traceback.format_exception(args.exc_value)))

    def log_unraisable(args) -> None:
        log.write(f"ignored in {args.object!r:.80}: {args.exc_value!r}")

    def log_uncaught(kind, value, trace) -> None:  # also called by C++ threads
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, value, trace)
        else:
            log.write("".join(traceback.format_exception(value)))

    previous = threading.excepthook, sys.unraisablehook, sys.excepthook
    hooks = log_thread, log_unraisable, log_uncaught
    threading.excepthook, sys.unraisablehook, sys.excepthook = hooks
    try:
        with filtered(log.divert):
            try:
                yield
            finally:
                if log.used:
                    gc.collect()  # coroutines that were not awaited warn when they are freed
    finally:
        threading.excepthook, sys.unraisablehook, sys.excepthook = previous
        log.close()
