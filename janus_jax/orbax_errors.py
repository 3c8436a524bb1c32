"""Turns Orbax's failures into one-line exceptions.

When a folder is damaged or a disk is full, Orbax logs and prints hundreds of lines.
"""

import contextlib
import errno
import gc
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from janus_jax.checks import shorten_text

T = TypeVar("T")
# Orbax logs to "absl". asyncio logs errors of tasks that Orbax has abandoned to "asyncio".
LOGGERS = ("absl", "asyncio")
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


def _is_orbax(traceback) -> bool:
    while traceback:
        if _ORBAX in traceback.tb_frame.f_code.co_filename:
            return True
        traceback = traceback.tb_next
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


def call(error_type: type[Exception], what: str, function: Callable[[], T]) -> T:
    """Calls a function that uses Orbax; raises its failures as one-line exceptions.

    The message of the exception is `what` and the first line of the failure. The failure is not
    chained, because that would keep Orbax's tasks alive, which print messages when they are garbage
    collected. Out-of-memory errors, of a device or the host, are raised unchanged.
    """
    hook = sys.unraisablehook
    if not isinstance(hook, _Hook):
        sys.unraisablehook = _Hook(hook)  # kept after a failure: threads report when they finish
    with _quiet():
        try:
            result = function()
        except Exception as error:
            if is_out_of_memory(error):
                raise  # the folder is not at fault
            text = first_line(error)
        else:
            sys.unraisablehook = hook
            return result
        gc.collect()
    logging.getLogger("asyncio").addFilter(_is_foreign_task)  # kept, like the hook above
    raise error_type(f"{what}: {text}")


def _is_foreign_task(record: logging.LogRecord) -> bool:
    """The same as is_foreign, but a separate function, so that `filtered` does not remove it."""
    return is_foreign(record)
