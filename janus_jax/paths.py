"""Files and folders: checked before they are read or written, and written whole or not at all."""

import contextlib
import fcntl
import io
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


def file_size(path: Path) -> int:
    """Bytes of a regular file; ask before opening, for opening a FIFO waits for a writer.

    Raises:
        FileNotFoundError: there is no such file, or the path is a link to a missing file.
        ValueError: it is a folder, a FIFO, a socket or a device.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        link = ": the link there leads to a missing file" if path.is_symlink() else ""
        raise FileNotFoundError(f"no {path.name} in {path.parent}{link}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "FIFO, socket or device"
        raise ValueError(f"{path} must be a regular file, got a {kind}")
    return status.st_size


def bounded_size(path: Path, most: int) -> int:
    """Bytes of a regular file; raises ValueError for more than `most`, and what file_size does."""
    size = file_size(path)
    if size > most:
        raise ValueError(f"{path} must have at most {most} bytes, got {size}")
    return size


def read_bounded(path: Path, most: int) -> bytes:
    """The bytes of a regular file; raises what bounded_size does, and OSError."""
    size = bounded_size(path, most)
    with os_errors_of(path), path.open("rb") as file:
        return file.read(size)  # no more than was checked, even if the file has grown


def size_text(number: int) -> str:
    """A number of bytes, for a message."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def sibling(path: Path) -> Path:
    """A hidden name beside `path` that nothing has yet."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def os_errors_of(path: str | Path) -> Iterator[None]:
    """Adds a file's name to an OSError that has none, as those of read, write and close."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library, with a text only
            raise OSError(f"{path}: {error}") from error
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def value_errors_of(path: str | Path) -> Iterator[None]:
    """Puts the path of the file that is read in front of a ValueError's text."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under `path` when it is complete, and leaves nothing otherwise.

    Raises OSError with the name of the file if, for example, the disk is full.
    """
    beside = sibling(path)
    try:
        with os_errors_of(path), beside.open("xb") as file:
            yield file
        os.replace(beside, path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(beside):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_file(path: Path, data: bytes) -> None:
    """Writes a file whole, and makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)


def write_all(file: io.RawIOBase, data: bytes) -> None:
    """Writes to a file without a buffer, which on a disk that is nearly full takes a part only."""
    while data:
        data = data[file.write(data) :]


def open_lock(path: Path) -> BinaryIO:
    """A file to lock, which is made where there is none.

    Raises OSError if it is no regular file: a link may lead to any other file, and opening a FIFO
    waits for a reader.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    return open(path, "ab", opener=opener)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Keeps other processes that ask for the same lock from writing to a folder.

    The lock is a file in the folder, `name` its path from there, and is not removed; a process
    that ends releases it, however it ends.
    Raises ValueError if another process holds the lock, and what open_lock does.
    """
    lock = folder / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            rule = "a folder must be written to by one run at a time"
            raise ValueError(f"{rule}, another one has {folder}") from None
        yield
