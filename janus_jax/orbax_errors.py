"""Turns Orbax's failures into one-line exceptions, and keeps its messages off the terminal.

When a folder is damaged or a disk is full, Orbax logs and prints hundreds of lines. `call` hides
those of a single call. `library_log` writes those of a whole training run to a file.
"""

import contextlib
import errno
import gc
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from janus_jax.checks import shorten_text

T = TypeVar("T")
# Orbax logs to "absl". asyncio logs errors of tasks that Orbax has abandoned to "asyncio".
LOGGERS = ("absl", "asyncio")
MAX_PENDING = 1000  # texts kept in memory while the disk is full
_FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(pathname)s:%(lineno)d %(message)s")
_ORBAX = os.path.join("orbax", "checkpoint", "")  # part of the paths of its source files
_STORAGE = (_ORBAX, "OCDBT", "TensorStore")  # words of messages about Orbax and its storage
_LATE = "Event loop is closed"  # raised by storage threads that finish after Orbax has given up


def is_foreign(record: logging.LogRecord) -> bool:
    """Returns whether a log record is neither from Orbax nor about one of its tasks."""
    message = record.getMessage()
    return _ORBAX not in record.pathname and not any(name in message for name in _STORAGE)


@contextlib.contextmanager
def filtered(keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Drops the records of LOGGERS for which `keep` returns False."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops log records of Orbax and exceptions of its threads; all other messages pass."""
    thread_hook = threading.excepthook
    threading.excepthook = lambda args: None if _is_orbax(args.exc_traceback) else thread_hook(args)
    try:
        with filtered(is_foreign), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        threading.excepthook = thread_hook


def _is_orbax(trace) -> bool:
    while trace:
        if _ORBAX in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


class _Hook:
    """A sys.unraisablehook that ignores exceptions of Orbax's coroutines and storage threads."""

    def __init__(self, previous: Callable):
        self.previous = previous

    def __call__(self, report) -> None:
        if str(report.exc_value) != _LATE and not _is_orbax(report.exc_traceback):
            self.previous(report)


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an error was caused by a full disk or an exceeded disk quota."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    if error is None:
        return False
    in_message = any(os.strerror(code) in str(error) for code in codes)
    return in_message or getattr(error, "errno", None) in codes or is_disk_full(error.__cause__)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether a device or the host is out of memory.

    The storage library reports a full disk as RESOURCE_EXHAUSTED, too; that is not counted.
    """
    exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return exhausted and not is_disk_full(error)


def first_line(error: BaseException) -> str:
    """Returns the first line of the error at the start of the chain of causes.

    Orbax wraps errors of the storage library in one that lists slices of arrays.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return shorten_text(text.splitlines()[0])


def reraise_as(
    make_error: Callable[[Exception], Exception], function: Callable[[], T]
) -> T:
    """Calls a function that uses Orbax; raises its failure as make_error(failure).

    The failure is not chained, because that would keep Orbax's tasks alive, which print messages
    when they are garbage collected. Out-of-memory errors, of a device or the host, are raised
    unchanged: the files are not at fault.
    """
    try:
        return function()
    except Exception as error:  # Orbax and its storage raise many types, with long messages
        if is_out_of_memory(error):
            raise
        failure = make_error(error)
    raise failure


def call(error_type: type[Exception], what: str, function: Callable[[], T]) -> T:
    """Calls a function that uses Orbax as reraise_as does; hides what Orbax logs and prints.

    The message of the exception is `what` and the first line of the failure.
    """
    hook = sys.unraisablehook
    if not isinstance(hook, _Hook):
        sys.unraisablehook = _Hook(hook)  # kept after a failure: threads report when they finish
    with _quiet():
        try:
            result = reraise_as(
                lambda error: error_type(f"{what}: {first_line(error)}"), function
            )
        except error_type:
            gc.collect()
            logging.getLogger("asyncio").addFilter(_is_foreign_task)  # kept, like the hook above
            raise
        sys.unraisablehook = hook
        return result


def _is_foreign_task(record: logging.LogRecord) -> bool:
    """The same as is_foreign, but a separate function, so that `filtered` does not remove it."""
    return is_foreign(record)


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
