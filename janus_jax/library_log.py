"""Diverts to a file what Orbax and its storage threads log and print during a training run.

For a single call, which fails with one line, see orbax_errors.py.
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

MOST_PENDING = 1000  # texts held in memory while the disk is full


class _LibraryLog:
    """Appends texts to a file that is created with the first one."""

    def __init__(self, path: Path):
        self._path, self._pending, self._lock = path, [], threading.Lock()
        self.used = False

    def write(self, text: str) -> None:
        """Keeps the text in memory while it cannot be written, as where the disk is full."""
        with self._lock:
            self.used = True
            self._pending = [*self._pending[-MOST_PENDING:], text.rstrip() + "\n"]
            self._flush()

    def close(self) -> None:
        """Tries for the last time to write what is in memory."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        if not self._pending or self._path.is_fifo():  # which would wait for a reader
            return
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.writelines(self._pending)
            file.flush()
            self._pending = []

    def divert(self, record: logging.LogRecord) -> bool:
        """A filter for loggers: drops the libraries' warnings and errors, after writing them."""
        from_library = record.name == "asyncio" or not is_foreign(record)
        if record.levelno < logging.WARNING or not from_library:
            return True
        self.write(_FORMAT.format(record))
        return False


_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(pathname)s:%(lineno)d %(message)s")


@contextlib.contextmanager
def library_log(path: Path) -> Iterator[None]:
    """Appends to a file the libraries' warnings and errors, and tracebacks of other threads.

    Exceptions of the main thread, and those that a library raises to its caller, are not affected.
    """
    log = _LibraryLog(path)

    def of_thread(args: threading.ExceptHookArgs) -> None:
        log.write("".join(traceback.format_exception(args.exc_value)))

    def of_callback(args) -> None:
        log.write(f"ignored in {args.object!r:.80}: {args.exc_value!r}")

    def uncaught(kind, value, trace) -> None:  # C++ threads print through it
        if threading.current_thread() is threading.main_thread():
            sys.__excepthook__(kind, value, trace)
        else:
            log.write("".join(traceback.format_exception(value)))

    before = threading.excepthook, sys.unraisablehook, sys.excepthook
    threading.excepthook, sys.unraisablehook, sys.excepthook = of_thread, of_callback, uncaught
    try:
        with filtered(log.divert):
            try:
                yield
            finally:
                if log.used:
                    gc.collect()  # coroutines that were not awaited complain when they are freed
    finally:
        threading.excepthook, sys.unraisablehook, sys.excepthook = before
        log.close()
