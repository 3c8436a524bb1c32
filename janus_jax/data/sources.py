"""Random-access sources of records for Grain, one class per format.

The formats here read files and folders. A caller can add formats, such as generated scenes. A
source returns a Record, or a BadRecord if the record cannot be used, both with their location.
Images stay encoded, and only the index of the files is kept in memory. A source reopens the file
for each record, so it can be pickled and shared by threads. records.py describes the fields of a
record.
"""

import inspect
import os
from array import array
from collections.abc import Mapping
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
    open_as,
    parse_json,
    parse_npy,
    read_span,
)
from janus_jax.data.records import BadRecord, Record, parse_record
from janus_jax.data.tar import TarSource
from janus_jax.paths import MAX_TEXT_BYTES, os_errors_of, read_bounded

_CHUNK_BYTES = 2**20  # bytes of a line that are read at once


class JsonlSource(Source):
    """Reads one record per line of a file, of several, or of the *.jsonl files of a folder.

    Blank lines are ignored.

    Location of a record: "data/train.jsonl:17", with the line counted from 1, as in editors.
    """

    def __init__(self, path: Paths, image_root: str | Path | None = None):
        """Indexes the lines of the files.

        Args:
            path: a file, several files, or a folder.
            image_root: folder that image paths are relative to; by default that of the JSONL file.
        """
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
        line = span.partition(b"\n")[0]  # the span includes blank lines that follow
        root = Path(file.parent if self._image_root is None else self._image_root)
        return parse_record(parse_json(line), lambda value: image_file(root, value))


def _line_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the offsets of the lines and of the file's end, and the numbers of the lines.

    They are int64[N + 1] and int64[N] for N lines that are not blank. The file is read in chunks,
    as it may be larger than the memory, even if it is a single line.
    """
    offsets, numbers = array("q"), array("q")
    start, end, number, blank = 0, 0, 1, True
    with os_errors_of(path), path.open("rb") as file:
        for chunk in iter(partial(file.readline, _CHUNK_BYTES), b""):
            if blank and not chunk.isspace():
                offsets.append(start)
                numbers.append(number)
                blank = False
            end += len(chunk)
            if chunk.endswith(b"\n"):
                start, number, blank = end, number + 1, True
    offsets.append(end)
    return np.array(offsets, np.int64), np.array(numbers, np.int64)


class ArrayRecordSource(Source):
    """Reads msgpack maps from ArrayRecord files: a file, several, or those of a folder.

    Images are bytes. The files of a folder are *.array_record or *.arrayrecord, optionally followed
    by the number of the shard.

    Location of a record: "data/train.array_record:5", with the record counted from 0.
    """

    def __init__(self, path: Paths):
        from grain.sources import ArrayRecordDataSource  # takes seconds to import

        self._files = find_files(path, "*.array*record*")
        self._readers = [
            open_as("ArrayRecord", file, lambda file: ArrayRecordDataSource(str(file)))
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
            raise BadRecord("malformed", f"not a valid msgpack map: {error}") from None
        return parse_record(fields, image_bytes)


class ClassFolderSource(Source):
    """Reads images at ROOT/CLASS/IMAGE, as in ImageNet, with the name of the class as caption.

    The name of a class is that of its folder with spaces in place of underscores, or comes from
    class_names. The file IMAGE.npy contains the image's indices; it is read in place of the image,
    which need not exist. Classes and images are sorted by name. Names that start with a dot are
    ignored.

    Location of a record: "data/cats/a.jpg".
    """

    def __init__(self, path: str | Path, class_names: str | Path | None = None):
        """Lists the files of all classes.

        Args:
            path: the root folder.
            class_names: a text file with lines "FOLDER NAME, OTHER NAMES"; the first name is used.
        Raises:
            FileNotFoundError: the root folder or the file does not exist.
            ValueError: class_names lacks a folder, or has a line without a name.
        """
        self._root = Path(path)
        if not self._root.is_dir():
            raise FileNotFoundError(f"class_folder needs a folder, found none at {path}")
        folders = sorted(name for name in os.listdir(self._root) if _is_folder(self._root / name))
        names = None if class_names is None else _read_class_names(Path(class_names))
        if names is not None and (unnamed := sorted(set(folders) - set(names))):
            raise ValueError(
                f"class_names {class_names} must name every class, it lacks {unnamed[0]}"
            )
        self._captions = [names[f] if names else f.replace("_", " ") for f in folders]
        self._folders = folders
        self._files = [_class_files(self._root / folder) for folder in folders]
        super().__init__(path, list(map(len, self._files)))

    def _where(self, part: int, position: int) -> str:
        return str(self._root / self._name(part, position))

    def _name(self, part: int, position: int) -> str:
        """Returns the path relative to the root."""
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
    """Returns the sorted names of the images, or of their indices if there are any, as bytes[N].

    An array takes a tenth of the memory of a list of str.
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
    """Returns the first name of each folder."""
    if not path.is_file():
        raise FileNotFoundError(f"class_names must be a text file, found none at {path}")
    names = {}
    raw = read_bounded(path, MAX_TEXT_BYTES)
    text = open_as("UTF-8 text", path, lambda _: raw.decode())
    for number, line in enumerate(text.splitlines(), 1):
        folder, _, rest = line.strip().partition(" ")
        name = rest.partition(",")[0].strip()
        if folder and not name:
            rule = "a line must be the name of a folder, a space and the name of the class"
            raise ValueError(f"{path}:{number}: {rule}, got {shorten(line)}")
        names[folder] = name
    return names


FORMATS = {
    "jsonl": JsonlSource,
    "tar": TarSource,
    "arrayrecord": ArrayRecordSource,
    "parquet": ParquetSource,
    "class_folder": ClassFolderSource,
}


Formats = Mapping[str, type[Source]]  # by name


def open_source(
    format: str, path: Paths, *, formats: Formats = FORMATS, **options
) -> Source:
    """Opens a source.

    Args:
        format: one of `formats`.
        path: see the format's class.
        formats: the classes that can be opened, by name.
        options: other arguments of the format's class.
    Raises:
        ValueError: the format or an option is unknown, a file is not of this format, or there are
            no records.
        FileNotFoundError: the path does not exist.
    """
    if format not in formats:
        raise ValueError(f"the format must be one of {', '.join(formats)}, got {shorten(format)}")
    kind = formats[format]
    try:
        inspect.signature(kind).bind(path, **options)
    except TypeError as error:
        raise ValueError(f"wrong options for a source of the format {format}: {error}") from None
    return kind(path, **options)
