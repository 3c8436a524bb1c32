"""A folder that appears under its name when it is complete, and not before.

Hidden names beside FOLDER while a process writes it, or after a process was killed:
.FOLDER.lock               held with flock by the process that writes FOLDER
.FOLDER.XXXXXXXX.partial   what it has written so far; after the exchange, what FOLDER was before
.FOLDER.XXXXXXXX.replaced  what FOLDER was before, where the system cannot exchange two folders
"""

import atexit
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from janus_jax.interop.files import CONFIG, PARAMS
from janus_jax.paths import check_local, open_lock, sibling, size_text

WEIGHTS = ("*.safetensors", "*.bin", PARAMS)
PARTIAL, REPLACED = "partial", "replaced"
QUIET_SECONDS, MOST_SECONDS = 0.2, 20  # of waiting for threads that outlive a failed write
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, fs.h


@contextlib.contextmanager
def new_folder(
    folder: Path, overwrite: bool = False, size: int = 0, config: str = CONFIG
) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` on success and disappears on any error.

    Before that, what killed processes left beside `folder` is removed, and a `folder` that such a
    process had moved away is restored.

    size: bytes about to be written, as far as known. config: the file that, beside weights, marks
    a folder that may be replaced.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is not set.
      OSError: the disk has no room.
      ValueError: `folder` is not on a disk, another process is writing it, or it is there and
        neither empty nor a checkpoint folder.
    """
    check_local("the folder to write", folder)
    folder = Path(folder).resolve()
    _check_replaced(folder, overwrite, config)
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder) as locked:
            _clean_up(folder, locked)
            _check_replaced(folder, overwrite, config)
            _check_room(folder, size)
            with _partial(folder) as beside:
                yield beside
                # again: another program may have put something there meanwhile
                _check_replaced(folder, overwrite, config)
                _replace(beside, folder)
    finally:
        for parent in new:  # empty after a failure, and only then
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        needs = f"it needs {size_text(size)}, {size_text(free)} are free"
        raise OSError(f"no room on the disk for {folder}: {needs}")


def _check_replaced(folder: Path, overwrite: bool, config: str) -> None:
    """Raises FileExistsError or ValueError if there is something that must not be replaced."""
    if not os.path.lexists(folder):
        return
    if not _is_checkpoint_or_empty(folder, config):
        raise ValueError(
            f"{folder} exists and is never replaced: only an empty folder is, or a checkpoint "
            f"folder, which holds {config} and weights"
        )
    if not overwrite:
        raise FileExistsError(f"{folder} exists (--overwrite replaces it)")


def _is_checkpoint_or_empty(folder: Path, config: str) -> bool:
    if not folder.is_dir():
        return False
    weights = any(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return not any(folder.iterdir()) or ((folder / config).is_file() and weights)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Keeps other processes from writing to the folder; gives whether the file system can.

    The lock ends with its process, however that ends. Where a shared file system keeps locks to
    one host, it keeps out processes of that host only.
    """
    path = folder.with_name(f".{folder.name}.lock")
    while (file := _locked(path, folder)) is not None:
        with file:
            if not _is_at(file, path):
                continue  # the process that held the lock has removed the file
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return
    yield False


def _locked(path: Path, folder: Path) -> BinaryIO | None:
    file = open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is writing {folder}; wait until it ends") from None
    except OSError:  # this file system has no locks
        file.close()
        path.unlink(missing_ok=True)
        return None


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clean_up(folder: Path, locked: bool) -> None:
    """Restores the folder if it was moved away; with the lock held, removes what is left over."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.({PARTIAL}|{REPLACED})")
    left = [Path(entry) for entry in os.scandir(folder.parent) if pattern.fullmatch(entry.name)]
    moved = [path for path in left if path.suffix == f".{REPLACED}"]
    if moved and not os.path.lexists(folder):
        max(moved, key=lambda path: path.stat().st_mtime).rename(folder)
    for path in left:
        if locked and path.is_dir() and not path.is_symlink():
            _delete(path)


def _sibling(folder: Path, kind: str) -> Path:
    return Path(f"{sibling(folder)}.{kind}")


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    beside = _sibling(folder, PARTIAL)
    beside.mkdir()
    try:
        yield beside
    except BaseException as error:
        _delete_for_good(beside)
        if isinstance(error, OSError) and error.errno is not None:  # such as a full disk
            error.filename = str(error.filename or folder).replace(str(beside), str(folder))
        raise
    _delete(beside)  # what was there before, if anything


def _replace(beside: Path, folder: Path) -> None:
    if not folder.exists():
        beside.rename(folder)
        return
    if _exchange(beside, folder):
        return
    old = _sibling(folder, REPLACED)
    try:
        folder.rename(old)
        beside.rename(folder)
    except BaseException:  # after an interrupt, too, the old folder must be back
        if not folder.exists():
            old.rename(folder)
        raise
    _delete(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders in one step, so that a kill leaves either; False if it cannot be."""
    rename = _renameat2()
    if rename is None:
        return False
    return 0 == rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def _renameat2():
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "renameat2", None)  # glibc from 2.28, musl has none


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # an interrupt must not leave a part of the folder
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _delete_for_good(folder: Path) -> None:
    """Deletes a folder into which threads of a failed write may write on, until it stays away."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    end, quiet = time.monotonic() + MOST_SECONDS, 0.0
    while quiet < QUIET_SECONDS and time.monotonic() < end:
        if os.path.lexists(folder):
            _delete(folder)
            quiet = 0.0
        time.sleep(0.01)
        quiet += 0.01
