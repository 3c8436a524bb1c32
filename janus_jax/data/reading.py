"""What all sources of records share: numbering, where a record is, and the reading of its parts."""

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
from janus_jax.paths import MAX_FILE_BYTES, MAX_TEXT_BYTES, os_errors_of, read_bounded
from janus_jax.processing.images import load_image
from janus_jax.processing.json_files import parse

Paths = str | Path | Sequence[str | Path]
IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm"
)  # fmt: skip
UNREAD_SUFFIXES = (
    ".heic", ".svg", ".mp4", ".webm", ".mov", ".avi", ".mkv", ".wav", ".mp3", ".flac", ".ogg"
)  # fmt: skip
INDICES_SUFFIX = ".npy"


class Source(abc.ABC):
    """Records in parts (files, row groups, classes), numbered from 0 through all of them."""

    def __init__(self, path: Paths, counts: Sequence[int]):
        """counts: the records in each part. Raises ValueError if there are none."""
        self._path = path
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if not len(self):
            raise ValueError(f"a source must hold a record, there is none in {_named(path)}")

    @abc.abstractmethod
    def _read(self, part: int, position: int) -> Record:
        """Raises BadRecord."""

    @abc.abstractmethod
    def _where(self, part: int, position: int) -> str:
        """The part's file, as it was given, and the place in it, for a person to look up."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_named(self._path)})"

    def __getitem__(self, index: int) -> Record | BadRecord:
        """The record, or why it is none: a BadRecord is returned, not raised."""
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"a record of {self} must be in [0, {len(self)}), got {index}")
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        position = index - int(self._starts[part])
        where = self._where(part, position)
        try:
            return replace(self._read(part, position), where=where)
        except BadRecord as error:  # a new one: the frames of this one would stay in memory
            return BadRecord(error.reason, error.detail, where)
        except OSError:  # of the file that holds the records
            raise
        except Exception as error:  # as MemoryError, for a record that claims to be huge
            return BadRecord("malformed", error_text(error), where)


def find_files(path: Paths, pattern: str) -> list[Path]:
    """The files of a source: a file, several, or those of a folder that the pattern fits, sorted.

    Raises FileNotFoundError for one that is not there, ValueError for a folder without any and for
    a file that is given twice.
    """
    if isinstance(path, (str, Path)):
        return _files_at(Path(path), pattern)
    files = [file for one in path for file in _files_at(Path(one), pattern)]
    seen = set()
    for file in files:
        if (resolved := file.resolve()) in seen:
            raise ValueError(f"a source must be given each file once, got {file} twice")
        seen.add(resolved)
    return files


def _files_at(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"a source must be a file or a folder, there is none at {path}")
    found = sorted(file for file in path.glob(pattern) if not file.name.startswith("."))
    if not found:
        raise ValueError(f"a source must hold a record, there is no {pattern} in {path}")
    for file in found:
        if not file.is_file():
            raise ValueError(f"a source must consist of regular files, {file} is none")
    return found


def _named(path: Paths) -> str:
    if isinstance(path, (str, Path)):
        return str(path)
    return f"{path[0]} and {len(path) - 1} more" if path else "no path"


def opened(path: Path, kind: str, read: Callable[[Path], Any]) -> Any:
    """What read makes of a file; what it raises about the contents, in one line."""
    try:
        return read(path)
    except (ValueError, RuntimeError, MemoryError, OSError) as error:
        if getattr(error, "errno", None):  # of the disk; pyarrow's own have none
            raise
        reason = " ".join(str(error).split()) or "it is truncated"
        raise ValueError(f"{path} must be {kind} file: {reason}") from None


def read_span(path: Path, offset: int, size: int) -> bytes:
    """A part of a file."""
    with os_errors_of(path), path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


def check_text_size(size: int) -> None:
    """Raises BadRecord for a text of more bytes than are read."""
    if size > MAX_TEXT_BYTES:
        raise BadRecord("malformed", f"a text must have at most {MAX_TEXT_BYTES} bytes, got more")


def parse_json(raw: bytes) -> dict[str, Any]:
    """The object in a JSON text. Raises BadRecord."""
    check_text_size(len(raw))
    try:
        value = parse(raw.strip(), object_pairs_hook=_unique)
    except ValueError as error:
        raise BadRecord("malformed", f"not JSON: {error}") from None
    check_object(value)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of an object; of two with one name, Python itself drops the first."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object must have each field once, got {shorten(twice)} twice")
    return fields


def parse_npy(raw: bytes) -> np.ndarray:
    """The array in a .npy file, never a pickle. Raises BadRecord."""
    try:
        return np.lib.format.read_array(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # its header is Python source, which breaks in many ways
        raise BadRecord("malformed", f"not a .npy file: {shorten_text(str(error))}") from None


def image_bytes(value: Any) -> bytes:
    """An image that must be bytes already. Raises BadRecord."""
    if not isinstance(value, bytes):
        got = type(value).__name__
        raise BadRecord("malformed", f"an image must be the bytes of its file, got {got}")
    return value


def image_file(root: Path, value: Any) -> bytes:
    """An image that must be a path from root. Raises BadRecord."""
    if not isinstance(value, str):
        raise BadRecord("malformed", f"an image must be a path, got {type(value).__name__}")
    path = root / value
    try:
        return read_bounded(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise BadRecord("missing file", f"no image at {root / shorten_text(value)}") from None
    except ValueError as error:  # no regular file, or no path at all
        reason = "missing file" if path.is_dir() else "unreadable file"
        raise BadRecord(reason, str(error)) from None
    except OSError as error:
        detail = f"{root / shorten_text(value)}: {error.strerror}"
        raise BadRecord("unreadable file", detail) from None


def prepared_image(encoded: bytes, prepare: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    """What `prepare` makes of an image, given as the bytes of its file.

    Raises BadRecord, whatever happens: an image that exhausts the memory concerns one record.
    """
    try:
        return prepare(load_image(encoded))
    except Exception as error:
        raise BadRecord("unreadable image", error_text(error)) from None
