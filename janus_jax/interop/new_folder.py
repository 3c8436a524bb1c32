"""Writes a folder atomically: it appears under its final name only when it is complete.

These hidden files and folders exist next to FOLDER while a process writes it, or after a process
was killed:
.FOLDER.lock               lock file, held with flock by the process that writes FOLDER
.FOLDER.XXXXXXXX.partial   the new folder so far; after the exchange, the previous FOLDER
.FOLDER.XXXXXXXX.replaced  the previous FOLDER, if the system cannot exchange two folders
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
# After a failed write, threads may still write into the folder: delete it until it has been absent
# for QUIET_SECONDS, for at most MAX_SECONDS.
QUIET_SECONDS, MAX_SECONDS = 0.2, 20
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # Linux constants from fcntl.h and fs.h


@contextlib.contextmanager
def new_folder(
    folder: Path, overwrite: bool = False, size: int = 0, config: str = CONFIG
) -> Iterator[Path]:
    """Yields a temporary sibling that becomes `folder` on success and is deleted after an error.

    Before it writes, it deletes the leftovers of killed processes next to `folder`, and restores a
    `folder` that such a process had moved away.

    Args:
      folder: the folder to write.
      overwrite: whether an existing checkpoint folder is replaced.
      size: bytes that will be written, as far as known.
      config: a folder may be replaced if it holds this file and weights.

    Raises:
      FileExistsError: `folder` exists and `overwrite` is not set.
      OSError: the disk does not have enough free space.
      ValueError: `folder` is a URL, another process is writing it, or it exists and is neither
        empty nor a checkpoint folder.
    """
    check_local("the folder to write", folder)
    folder = Path(folder).resolve()
    _check_replaceable(folder, overwrite, config)
    new = [parent for parent in folder.parents if not parent.exists()]
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _lock(folder) as locked:
            _clean_up(folder, locked)
            _check_replaceable(folder, overwrite, config)
            _check_disk_space(folder, size)
            with _partial(folder) as staging:
                yield staging
                # Checked again, because another program may have created it in the meantime.
                _check_replaceable(folder, overwrite, config)
                _replace(staging, folder)
    finally:
        for parent in new:  # rmdir removes only empty folders: those left by a failure
            with contextlib.suppress(OSError):
                parent.rmdir()


def _check_disk_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder.parent).free
    if size > free:
        raise OSError(
            f"not enough disk space for {folder}: it needs {size_text(size)}, "
            f"{size_text(free)} are free"
        )


def _check_replaceable(folder: Path, overwrite: bool, config: str) -> None:
    """Raises FileExistsError or ValueError if `folder` exists and must not be replaced."""
    if not os.path.lexists(folder):
        return
    if not _is_checkpoint_or_empty(folder, config):
        raise ValueError(
            f"{folder} exists and is not replaced: it must be empty, or a checkpoint folder with "
            f"{config} and weights"
        )
    if not overwrite:
        raise FileExistsError(f"{folder} already exists; pass --overwrite to replace it")


def _is_checkpoint_or_empty(folder: Path, config: str) -> bool:
    if not folder.is_dir():
        return False
    weights = any(path for pattern in WEIGHTS for path in folder.glob(pattern))
    return not any(folder.iterdir()) or ((folder / config).is_file() and weights)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Locks the folder against other writers; yields False if the file system has no locks.

    The lock is released when its process ends, even if it is killed. On a shared file system that
    keeps locks local to a host, it only excludes processes on the same host.
    """
    path = folder.with_name(f".{folder.name}.lock")
    while (file := _acquire(path, folder)) is not None:
        with file:
            if not _is_file_at(file, path):
                continue  # the previous holder of the lock has deleted the file
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return
    yield False


def _acquire(path: Path, folder: Path) -> BinaryIO | None:
    """Opens and locks a file; returns None if the file system has no locks."""
    file = open_lock(path)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return file
    except BlockingIOError:
        file.close()
        raise ValueError(f"another process is writing {folder}; wait until it ends") from None
    except OSError:  # the file system has no locks
        file.close()
        path.unlink(missing_ok=True)
        return None


def _is_file_at(file: BinaryIO, path: Path) -> bool:
    """Returns whether `path` is still the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _clean_up(folder: Path, locked: bool) -> None:
    """Restores the folder if it was moved away; deletes leftovers if the lock is held."""
    pattern = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]{{8}}\.({PARTIAL}|{REPLACED})")
    leftovers = [
        Path(entry) for entry in os.scandir(folder.parent) if pattern.fullmatch(entry.name)
    ]
    moved = [path for path in leftovers if path.suffix == f".{REPLACED}"]
    if moved and not os.path.lexists(folder):
        max(moved, key=lambda path: path.stat().st_mtime).rename(folder)
    for path in leftovers:
        if locked and path.is_dir() and not path.is_symlink():
            _delete(path)


def _sibling(folder: Path, kind: str) -> Path:
    return Path(f"{sibling(folder)}.{kind}")


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    staging = _sibling(folder, PARTIAL)
    staging.mkdir()
    try:
        yield staging
    except BaseException as error:
        _delete_until_gone(staging)
        if isinstance(error, OSError) and error.errno is not None:  # for example a full disk
            error.filename = str(error.filename or folder).replace(str(staging), str(folder))
        raise
    _delete(staging)  # the previous folder, if it was exchanged


def _replace(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    if _exchange(staging, folder):
        return
    old = _sibling(folder, REPLACED)
    try:
        folder.rename(old)
        staging.rename(folder)
    except BaseException:  # the old folder must also be restored after an interrupt
        if not folder.exists():
            old.rename(folder)
        raise
    _delete(old)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two folders atomically; returns False if the system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    return 0 == rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE)


def _renameat2():
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "renameat2", None)  # glibc has it since 2.28, musl does not


def _delete(folder: Path) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:  # an interrupt must not leave a partly deleted folder
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _delete_until_gone(folder: Path) -> None:
    """Deletes a folder repeatedly, because threads of a failed write may still write into it."""
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    end, quiet = time.monotonic() + MAX_SECONDS, 0.0
    while quiet < QUIET_SECONDS and time.monotonic() < end:
        if os.path.lexists(folder):
            _delete(folder)
            quiet = 0.0
        time.sleep(0.01)
        quiet += 0.01
