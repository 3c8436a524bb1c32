"""Code that all sources of records share: numbering, locations, and reading parts of a record."""

import abc
import io
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_jax.checks import error_text, shorten, shorten_text
from janus_jax.data.records import BadRecord, Record, check_object
from janus_jax.paths import MAX_FILE_BYTES, MAX_TEXT_BYTES, load_json, os_errors_of, read_bounded
from janus_jax.processing.images import load_image

Paths = str | Path | Sequence[str | Path]
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"
)  # fmt: skip
UNREAD_SUFFIXES = (
    ".heic", ".svg", ".mp4", ".webm", ".mov", ".avi", ".mkv", ".wav", ".mp3", ".flac", ".ogg"
)  # fmt: skip
INDICES_SUFFIX = ".npy"


class Source(abc.ABC):
    """Random access to records in parts (files, row groups, classes), numbered from 0 overall."""

    def __init__(self, path: Paths, counts: Sequence[int]):
        """Initializes the numbering of the records.

        Args:
            path: the files or the folder, for messages.
            counts: number of records in each part.
        Raises:
            ValueError: there are no records.
        """
        self._path = path
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if not len(self):
            raise ValueError(
                f"a source must have at least one record, got none in {_path_text(path)}"
            )

    @abc.abstractmethod
    def _read(self, part: int, position: int) -> Record:
        """Reads one record. Raises BadRecord if it cannot be used."""

    @abc.abstractmethod
    def _where(self, part: int, position: int) -> str:
        """Returns a record's location for messages: the file as given, and the place in it."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_path_text(self._path)})"

    def __getitem__(self, index: int) -> Record | BadRecord:
        """Returns a record. If it cannot be used, a BadRecord is returned, not raised."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"an index of {self} must be in [0, {len(self)}), got {index}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        position = index - int(self._starts[part])
        where = self._where(part, position)
        try:
            return replace(self._read(part, position), where=where)
        except BadRecord as error:  # a copy, as the traceback would keep its frames in memory
            return BadRecord(error.reason, error.detail, where)
        except OSError:  # an error of the file that contains the records, not of one record
            raise
        except Exception as error:  # such as MemoryError, if a record states a huge size
            return BadRecord("malformed", error_text(error), where)


def find_files(path: Paths, pattern: str) -> list[Path]:
    """Returns the files of a source.

    Args:
        path: a file, several files, or a folder.
        pattern: glob pattern of the files of a folder, which are sorted by name.
    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: a folder has no such file, or a file is given twice.
    """
    if isinstance(path, (str, Path)):
        return _files_at(Path(path), pattern)
    files = [file for one in path for file in _files_at(Path(one), pattern)]
    seen = set()
    for file in files:
        if (resolved := file.resolve()) in seen:
            raise ValueError(f"each file of a source must be given once, got {file} twice")
        seen.add(resolved)
    return files


def _files_at(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"a source must be a file or folder, found neither at {path}")
    files = sorted(file for file in path.glob(pattern) if not file.name.startswith("."))
    if not files:
        raise ValueError(f"a source must have at least one record, found no {pattern} in {path}")
    for file in files:
        if not file.is_file():
            raise ValueError(f"a source must consist of regular files, {file} is not one")
    return files


def _path_text(path: Paths) -> str:
    if isinstance(path, (str, Path)):
        return str(path)
    return f"{path[0]} and {len(path) - 1} more" if path else "no path"


def open_as(kind: str, path: Path, read: Callable[[Path], Any]) -> Any:
    """Returns read(path).

    Args:
        kind: name of the file format, for the error message.
        path: the file.
        read: opens or parses the file.
    Raises:
        ValueError: the file is not of this format. The message is a single line.
        OSError: the operating system cannot read the file.
    """
    try:
        return read(path)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        if getattr(error, "errno", None):  # an error of the disk; pyarrow's own have no errno
            raise
        reason = " ".join(str(error).split()) or "it is truncated"
        raise ValueError(f"{path} is not a valid {kind} file: {reason}") from None


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Reads `size` bytes of a file from a byte offset."""
    with os_errors_of(path), path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def check_text_size(size: int) -> None:
    """Raises BadRecord if a text has more than MAX_TEXT_BYTES bytes."""
    if size > MAX_TEXT_BYTES:
        raise BadRecord("malformed", f"a text must have at most {MAX_TEXT_BYTES} bytes, got more")


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises BadRecord."""
    check_text_size(len(raw))
    try:
        value = load_json(raw.strip(), object_pairs_hook=_unique_fields)
    except ValueError as error:
        raise BadRecord("malformed", f"not valid JSON: {error}") from None
    check_object(value)
    return value


def _unique_fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Makes a dict. Raises ValueError for a repeated field; Python would keep its last value."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object must have each field once, got {shorten(repeated)} twice")
    return fields


def parse_npy(raw: bytes) -> np.ndarray:
    """Parses the array of a .npy file without unpickling. Raises BadRecord."""
    try:
        return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # the header is Python source, so parsing can raise many errors
        raise BadRecord("malformed", f"not a valid .npy file: {shorten_text(str(error))}") from None


def image_bytes(value: Any) -> bytes:
    """Returns an image that is given as bytes. Raises BadRecord for any other value."""
    if not isinstance(value, bytes):
        got = type(value).__name__
        raise BadRecord("malformed", f"an image must be the bytes of an image file, got {got}")
    return value


def image_file(root: Path, value: Any) -> bytes:
    """Reads an image that is given as a path relative to root. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord("malformed", f"an image must be a path, got {type(value).__name__}")
    path = root / value
    try:
        return read_bounded(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise BadRecord("missing file", f"no image at {root / shorten_text(value)}") from None
    except ValueError as error:  # not a regular file, too large, or not a valid path
        reason = "missing file" if path.is_dir() else "unreadable file"
        raise BadRecord(reason, str(error)) from None
    except OSError as error:
        detail = f"{root / shorten_text(value)}: {error.strerror}"
        raise BadRecord("unreadable file", detail) from None


def prepare_image(encoded: bytes, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """Decodes an image file and returns prepare(image).

    Raises:
        BadRecord: for any error. Even if the memory is exhausted, only this record is affected.
    """
    try:
        return prepare(load_image(encoded))
    except Exception as error:
        raise BadRecord("unreadable image", error_text(error)) from None
