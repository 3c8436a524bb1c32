"""Reads and writes files safely: checks of paths, atomic writes, locks, small JSON files."""

import contextlib
import fcntl
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from janus_jax.checks import shorten_text

MAX_FILE_BYTES = 2**30  # limit for images and other files that are read into memory
MAX_TEXT_BYTES = 2**26  # limit for texts: a record, a file of prompts
MAX_JSON_BYTES = 2**25  # Janus's tokenizer.json has 5 MB; parsed, JSON needs up to 25 times that


def check_local(name: str, path: str | Path) -> None:
    """Raises ValueError for a URL such as gs://..., which Path would take for a local folder."""
    if re.match(r"[a-z][a-z0-9+.-]+:/", str(path)):
        raise ValueError(f"{name} must be a local path, got {path}")


def file_size(path: Path) -> int:
    """Returns the size of a regular file in bytes.

    Call this before opening a file, because opening a FIFO blocks until it has a writer.

    Raises:
        FileNotFoundError: the file does not exist, or is a symbolic link to a missing file.
        ValueError: the path is a folder, a FIFO, a socket or a device.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        link = " (a symbolic link to a missing file)" if path.is_symlink() else ""
        raise FileNotFoundError(f"no {path.name} in {path.parent}{link}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "folder" if stat.S_ISDIR(status.st_mode) else "FIFO, socket or device"
        raise ValueError(f"{path} must be a regular file, got a {kind}")
    return status.st_size


def bounded_size(path: Path, max_bytes: int) -> int:
    """Returns the size of a regular file in bytes.

    Raises:
        ValueError: the file is larger than `max_bytes`, or not a regular file.
        FileNotFoundError: as file_size.
    """
    size = file_size(path)
    if size > max_bytes:
        raise ValueError(f"{path} must have at most {max_bytes} bytes, got {size}")
    return size


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file of at most `max_bytes`; raises as bounded_size, and OSError."""
    size = bounded_size(path, max_bytes)
    with os_errors_of(path), path.open("rb") as file:
        return file.read(size)  # at most the checked size, even if the file has grown


def size_text(number: int) -> str:
    """Formats a number of bytes for a message."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def sibling(path: Path) -> Path:
    """Returns the path of a new hidden file in the same folder as `path`."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}")


@contextlib.contextmanager
def os_errors_of(path: str | Path) -> Iterator[None]:
    """Adds the path of a file to an OSError that has none, such as those of read and write."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a library with a message only
            raise OSError(f"{path}: {error}") from error
        if error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def value_errors_of(path: str | Path) -> Iterator[None]:
    """Prefixes the message of a ValueError with the path of the file that is read."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for writing that appears at `path` only when it is complete.

    The data goes to a temporary file, which replaces `path` at the end. If the body raises, the
    temporary file is removed and an existing file at `path` is not changed.

    Raises:
        OSError: with the path of the file, for example if the disk is full.
    """
    temporary = sibling(path)
    try:
        with os_errors_of(path), temporary.open("xb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename == str(temporary):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically; creates its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        file.write(data)


def write_all(file: io.RawIOBase, data: bytes) -> None:
    """Writes all data to an unbuffered file, whose write() may write only a part of it."""
    while data:
        data = data[file.write(data) :]


def open_lock(path: Path) -> BinaryIO:
    """Opens a lock file; creates it if it does not exist.

    Raises OSError if the path is a symbolic link, which could point to any file, or a FIFO, which
    would block until it has a reader.
    """

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)

    return open(path, "ab", opener=opener)


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Holds an exclusive lock on a folder, so that only one process writes to it.

    Args:
        name: path of the lock file, relative to the folder. The file is not removed at the end; the
            operating system releases the lock when the process exits, even if it is killed.
    Raises:
        ValueError: another process holds the lock.
        OSError: as open_lock.
    """
    lock = folder / name
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open_lock(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by another run; wait until it ends, or use another folder"
            ) from None
        yield


def load_json(text: str | bytes, **settings) -> Any:
    """Parses JSON like json.loads, but raises ValueError, too, if values are nested too deeply."""
    try:
        return json.loads(text, **settings)
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, is too large, is not JSON, or is not an object.
    """
    bounded_size(path, MAX_JSON_BYTES)
    try:
        value = load_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        reason = shorten_text(str(error))
        raise ValueError(f"{path} is not valid JSON: {reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object, got a {type(value).__name__}")
    return value


def read_json_if_any(path: Path) -> dict[str, Any]:
    """Like read_json, but returns an empty dict if the file does not exist."""
    return read_json(path) if os.path.lexists(path) else {}


def write_json(path: Path, value: Mapping) -> None:
    """Writes an object as UTF-8 JSON for humans: indented by 2, without escaping non-ASCII."""
    try:
        data = json.dumps(value, indent=2, ensure_ascii=False).encode()
    except UnicodeError:  # lone surrogates must be escaped
        data = json.dumps(value, indent=2).encode()
    with atomic_write(path) as file:
        file.write(data + b"\n")
