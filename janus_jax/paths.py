"""Files and folders: checked before they are read or written, and written whole or not at all."""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

MAX_FILE_BYTES = 2**30  # of an image or another file that is read whole
MAX_TEXT_BYTES = 2**26  # of a text that is read whole: a record, a list of prompts


def check_local(name: str, path: str | Path) -> None:
    """Raises ValueError for gs://... and the like, of which Path makes a folder here."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{name} must be a place on a disk of this machine, got {path}")


def check_regular(path: str | Path, most: int = MAX_FILE_BYTES) -> int:
    """The bytes of a file that can be read to its end.

    Raises:
        ValueError: it is a device, a pipe or a socket, or has more than `most` bytes.
        OSError: it is not there, or a folder.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("expected a regular file, got a device, a pipe or a socket")
    if status.st_size > most:
        raise ValueError(f"a file must have at most {most} bytes, got {status.st_size}")
    return status.st_size


def read_regular(path: str | Path, most: int = MAX_FILE_BYTES) -> bytes:
    """The bytes of a file; raises what check_regular raises."""
    size = check_regular(path, most)
    with naming(path), open(path, "rb") as file:
        return file.read(size)  # and no more, should it grow


def sibling(path: Path) -> Path:
    """A hidden name beside `path` that nothing has yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Adds a file's name to an OSError that has none, as those of read, write and close."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # of a library, with a text only
            raise OSError(f"{path}: {error}") from error
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` when it is complete, and leaves nothing otherwise.

    Raises OSError with the name of the file if, for example, the disk is full.
    """
    beside = sibling(path)
    try:
        with naming(path), beside.open("xb") as file:
            yield file
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(beside):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Keeps other processes that ask for the same lock from writing to a folder.

    The lock is a file in the folder, `name` its path from there, and is not removed; a process
    that ends releases it, however it ends.
    Raises ValueError if another process holds the lock.
    """
    lock = folder / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "a folder must be written to by one run at a time"
            raise ValueError(f"{rule}, another one has {folder}") from None
        yield
