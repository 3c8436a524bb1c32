"""Folders and files of records, and drawn scenes, as random-access sources for Grain, a class a
format.

Every source gives Records, or BadRecords where there is nothing to train on, both with the place
they come from; images stay encoded. Only the index of the files is kept in memory; what a record
holds is read when it is asked for, from a file opened for that, so that a source may be pickled
and shared by threads. What is in a record: records.py.
"""

import inspect
import os
from array import array
from functools import partial
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten
from janus_jax.data.parquet import ParquetSource
from janus_jax.data.reading import (
    IMAGE_SUFFIXES,
    INDICES_SUFFIX,
    Paths,
    Source,
    find_files,
    image_bytes,
    image_file,
    opened,
    parse_json,
    parse_npy,
    read_span,
)
from janus_jax.data.records import BadRecord, Record, parse_record
from janus_jax.data.scene_records import ScenesSource
from janus_jax.data.tar import TarSource
from janus_jax.paths import MAX_TEXT_BYTES, os_errors_of, read_bounded

_PIECE = 2**20  # bytes of a line that are read at once


class JsonlSource(Source):
    """A record a line, in a file, several, or the *.jsonl of a folder. Blank lines do not count.

    Place: "data/train.jsonl:17", counted from 1 as editors do.
    """

    def __init__(self, path: Paths, image_root: str | Path | None = None):
        """image_root: what the paths of images start from; None is the folder of their file."""
        self._files = find_files(path, "*.jsonl")
        self._image_root = image_root
        indices = [_line_index(file) for file in self._files]
        self._offsets = [offsets for offsets, _ in indices]
        self._lines = [lines for _, lines in indices]
        super().__init__(path, [len(lines) for lines in self._lines])

    def _where(self, part: int, position: int) -> str:
        return f"{self._files[part]}:{self._lines[part][position]}"

    def _read(self, part: int, position: int) -> Record:
        file, (start, end) = self._files[part], self._offsets[part][position : position + 2]
        span = read_span(file, start, min(end - start, MAX_TEXT_BYTES + 1))
        line = span.partition(b"\n")[0]  # blank lines may follow
        root = Path(file.parent if self._image_root is None else self._image_root)
        return parse_record(parse_json(line), lambda value: image_file(root, value))


def _line_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """int64[N + 1]: where each line begins, and the file's end. int64[N]: the numbers of the lines.

    Read in pieces: the file may be larger than the memory, and be a single line.
    """
    offsets, numbers = array("q"), array("q")
    start, end, number, blank = 0, 0, 1, True
    with os_errors_of(path), path.open("rb") as file:
        for piece in iter(partial(file.readline, _PIECE), b""):
            if blank and not piece.isspace():
                offsets.append(start)
                numbers.append(number)
                blank = False
            end += len(piece)
            if piece.endswith(b"\n"):
                start, number, blank = end, number + 1, True
    offsets.append(end)
    return np.array(offsets, np.int64), np.array(numbers, np.int64)


class ArrayRecordSource(Source):
    """msgpack maps with the bytes of images, in a file, several, or the *.array_record of a
    folder (as *.arrayrecord, and with a number of the shard after it).

    Place: "data/train.array_record:5", counted from 0.
    """

    def __init__(self, path: Paths):
        from grain.sources import ArrayRecordDataSource  # takes seconds to import

        self._files = find_files(path, "*.array*record*")
        self._readers = [
            opened(file, "an ArrayRecord", lambda file: ArrayRecordDataSource(str(file)))
            for file in self._files
        ]
        super().__init__(path, list(map(len, self._readers)))

    def _where(self, part: int, position: int) -> str:
        return f"{self._files[part]}:{position}"

    def _read(self, part: int, position: int) -> Record:
        import msgpack

        try:
            fields = msgpack.unpackb(self._readers[part][position])
        except (ValueError, RuntimeError) as error:  # RuntimeError: a checksum does not match
            raise BadRecord("malformed", f"not a msgpack map: {error}") from None
        return parse_record(fields, image_bytes)


class ClassFolderSource(Source):
    """Images of root/CLASS/IMAGE, as ImageNet has them; the caption is the name of the class.

    The name is that of the folder with spaces for underscores, or as class_names says. A file
    IMAGE.npy holds the image's indices, beside the image or instead of it. Classes and
    images are sorted by name; names that begin with a dot are left out.

    Place: "data/cats/a.jpg".
    """

    def __init__(self, path: str | Path, class_names: str | Path | None = None):
        """class_names: a text file of lines "FOLDER NAME, OTHER NAMES"; the first name is used.

        Raises ValueError for a folder that it does not name.
        """
        self._root = Path(path)
        if not self._root.is_dir():
            raise FileNotFoundError(f"a class folder must be a folder, there is none at {path}")
        folders = sorted(name for name in os.listdir(self._root) if _is_folder(self._root / name))
        names = None if class_names is None else _read_class_names(Path(class_names))
        if names is not None and (astray := sorted(set(folders) - set(names))):
            raise ValueError(f"class_names {class_names} must name every class, not {astray[0]}")
        self._captions = [names[f] if names else f.replace("_", " ") for f in folders]
        self._folders = folders
        self._files = [_class_files(self._root / folder) for folder in folders]
        super().__init__(path, list(map(len, self._files)))

    def _where(self, part: int, position: int) -> str:
        return str(self._root / self._name(part, position))

    def _name(self, part: int, position: int) -> str:
        """The path from the root."""
        return f"{self._folders[part]}/{os.fsdecode(self._files[part][position])}"

    def _read(self, part: int, position: int) -> Record:
        fields = {"caption": self._captions[part]}
        name = self._name(part, position)
        if name.endswith(INDICES_SUFFIX):
            fields["indices"] = parse_npy(image_file(self._root, name))
        else:
            fields["image"] = name
        return parse_record(fields, lambda value: image_file(self._root, value))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _class_files(folder: Path) -> np.ndarray:
    """Names of images, or of their indices where there are such: bytes[N], sorted.

    As one array, they take a tenth of the memory that a list of str does.
    """
    visible = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    indexed = {Path(name).stem for name in visible if name.endswith(INDICES_SUFFIX)}
    return np.array(
        [
            os.fsencode(name)
            for name in visible
            if name.endswith(INDICES_SUFFIX)
            or (Path(name).suffix.lower() in IMAGE_SUFFIXES and Path(name).stem not in indexed)
        ]
    )


def _read_class_names(path: Path) -> dict[str, str]:
    """The first name of each folder."""
    if not path.is_file():
        raise FileNotFoundError(f"class_names must be a text file, there is none at {path}")
    names = {}
    raw = read_bounded(path, MAX_TEXT_BYTES)
    text = opened(path, "a UTF-8 text", lambda _: raw.decode())
    for number, line in enumerate(text.splitlines(), 1):
        folder, _, rest = line.strip().partition(" ")
        name = rest.partition(",")[0].strip()
        if folder and not name:
            rule = "a line must be a folder's name and, after a space, that of the class"
            raise ValueError(f"{path}:{number}: {rule}, got {shorten(line)}")
        names[folder] = name
    return names


FORMATS = {
    "jsonl": JsonlSource,
    "tar": TarSource,
    "arrayrecord": ArrayRecordSource,
    "parquet": ParquetSource,
    "class_folder": ClassFolderSource,
    "scenes": ScenesSource,
}


def open_source(format: str, path: Paths, **options) -> Source:
    """The source of a format, one of FORMATS; options: see its class.

    Raises:
        ValueError: another format or option, no record, or a file of another format.
        FileNotFoundError: nothing is at the path.
    """
    if format not in FORMATS:
        raise ValueError(f"the format must be one of {', '.join(FORMATS)}, got {shorten(format)}")
    kind = FORMATS[format]
    try:
        inspect.signature(kind).bind(path, **options)
    except TypeError as error:
        raise ValueError(f"a source of the format {format} takes other options: {error}") from None
    return kind(path, **options)
