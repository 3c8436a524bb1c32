"""Orbax's failures in one line: a damaged folder or a full disk makes it log and print hundreds."""

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
LOGGERS = ("absl", "asyncio")  # Orbax logs to the first, and its abandoned tasks to the second
_ORBAX = os.path.join("orbax", "checkpoint", "")  # in the names of its files
_STORAGE = (_ORBAX, "OCDBT", "TensorStore")  # in messages about tasks of Orbax or its storage
_LATE = "Event loop is closed"  # raised by storage threads that finish after Orbax has given up


def is_foreign(record: logging.LogRecord) -> bool:
    """Whether it is neither logged by Orbax nor about one of its tasks."""
    message = record.getMessage()
    return _ORBAX not in record.pathname and not any(name in message for name in _STORAGE)


@contextlib.contextmanager
def filtered(keep: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Drops the records of LOGGERS for which `keep` is false."""
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
    """Drops what Orbax logs and what its threads raise; all other messages of a program pass."""
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
    """sys.unraisablehook without what Orbax's coroutines and storage threads could not raise."""

    def __init__(self, before: Callable):
        self.before = before

    def __call__(self, report) -> None:
        if str(report.exc_value) != _LATE and not _is_orbax(report.exc_traceback):
            self.before(report)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether it came from a disk, or a user's share of one, that is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if error is None:
        return False
    named = any(os.strerror(code) in str(error) for code in full)
    return named or getattr(error, "errno", None) in full or is_disk_full(error.__cause__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or the host; a full disk has XLA's name for it, too."""
    exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)
    return exhausted and not is_disk_full(error)


def first_line(error: BaseException) -> str:
    """Of what was raised first: Orbax wraps the storage's report in one that names slices."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return shorten_text(text.splitlines()[0])


def call(kind: type[Exception], what: str, function: Callable[[], T]) -> T:
    """Calls Orbax; a failure becomes an exception of one line: `what` and how the failure begins.

    The failure itself is not chained: it would keep Orbax's tasks alive, which report when they
    are collected. Memory that runs out, on a device or the host, is raised as it is.
    """
    hook = sys.unraisablehook
    if not isinstance(hook, _Hook):
        sys.unraisablehook = _Hook(hook)  # stays after a failure: threads report when they finish
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
    logging.getLogger("asyncio").addFilter(_is_foreign_task)  # stays, as the hook above does
    raise kind(f"{what}: {text}")


def _is_foreign_task(record: logging.LogRecord) -> bool:
    """is_foreign, under a name of its own, which `filtered` does not remove."""
    return is_foreign(record)
