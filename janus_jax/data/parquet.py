"""Parquet files as the Hugging Face hub has them, as a source of records."""

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any

from janus_jax.checks import shorten, shorten_text
from janus_jax.data.reading import Paths, Source, find_files, image_bytes, opened
from janus_jax.data.records import FIELDS, BadRecord, Record, parse_record
from janus_jax.data.unread import is_kept

MAX_SMALL_GROUP = 2**28  # bytes a row group may unpack to, however few it has in the file
MAX_RATIO = 100  # of a larger one; texts compress about 10 times, images hardly


def import_pyarrow(name: str) -> ModuleType:
    """A module of pyarrow, which comes with an extra. Raises ValueError where it is not there."""
    try:
        return importlib.import_module(name)
    except ImportError:
        asked = "pip install 'janus_jax[parquet]' brings it"
        raise ValueError(f"the format parquet needs pyarrow: {asked}") from None


class ParquetSource(Source):
    """Rows of a Parquet file, of several, or of the *.parquet of a folder.

    A column is named as its field. Columns of other names are read if their name is one that a
    record may not have, or if they hold text or bytes, which may be an image or its path; then
    unread.py decides. Numbers of other names are not read. An image is a struct {bytes, path}
    whose bytes are there, or the bytes.

    What a record costs: Parquet is read a row group at a time, so a record whose row group is not
    among the last ones takes the reading and decompressing of all the group, often a hundred
    images or more. In order it is as cheap as any format; for shuffled reading write small row
    groups (writers.py: 16 rows), or write the records as ArrayRecord or tar shards.

    Place: "data/train.parquet:5", the row counted from 0.
    """

    def __init__(self, path: Paths, cached_groups: int = 8):
        """cached_groups: row groups kept in memory, and threads may be decoding as many again."""
        if cached_groups < 1:
            raise ValueError(f"cached_groups must be at least 1, got {cached_groups}")
        parquet = import_pyarrow("pyarrow.parquet")
        self._files = find_files(path, "*.parquet")
        self._groups, counts = [], []  # (number of the file, of its group, of its first row)
        self._metadata, self._columns = [], []
        for number, file in enumerate(self._files):
            with opened(file, "a Parquet", parquet.ParquetFile) as table:
                metadata, schema = table.metadata, table.schema_arrow
            self._metadata.append(metadata)
            if not set(FIELDS) & set(schema.names):
                known, got = ", ".join(FIELDS), shorten_text(", ".join(schema.names))
                raise ValueError(f"{file} must have columns of {known}, got {got}")
            self._columns.append([field.name for field in schema if _is_read(field)])
            first = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, first))
                counts.append(metadata.row_group(group).num_rows)
                first += counts[-1]
        self._recent = _Recent(cached_groups)
        super().__init__(path, counts)

    def _where(self, part: int, position: int) -> str:
        number, _, first = self._groups[part]
        return f"{self._files[number]}:{first + position}"

    def _read(self, part: int, position: int) -> Record:
        try:
            table = self._recent.get(part, lambda: self._read_group(part))
        except (ValueError, OSError) as error:  # as pyarrow reports damaged data
            if getattr(error, "errno", None):  # the file is gone, the disk has failed
                raise
            reason = shorten_text(str(error))
            raise BadRecord("malformed", f"a damaged row group: {reason}") from None
        return parse_record(table.slice(position, 1).to_pylist()[0], _image)

    def _read_group(self, part: int):
        parquet = import_pyarrow("pyarrow.parquet")
        number, group, _ = self._groups[part]
        file, metadata, names = self._files[number], self._metadata[number], self._columns[number]
        leaves = _leaves(metadata.row_group(group), names)
        _check_unpacked_size(leaves)
        # A value that is stored once for many rows stays one in memory.
        dictionaries = [leaf.path_in_schema for leaf in leaves if _has_dictionary(leaf)]
        with parquet.ParquetFile(file, metadata=metadata, read_dictionary=dictionaries) as table:
            return table.read_row_group(group, columns=names)


def _is_read(field) -> bool:
    """Whether a column is a field of records, or may be one that they may not have."""
    return field.name in FIELDS or is_kept(field.name) or _may_hold_media(field.type)


def _may_hold_media(kind) -> bool:
    """Whether values of a type of Arrow are or contain text or bytes."""
    types = import_pyarrow("pyarrow.types")
    if types.is_dictionary(kind):
        return _may_hold_media(kind.value_type)
    if types.is_nested(kind):
        return any(_may_hold_media(kind.field(i).type) for i in range(kind.num_fields))
    return not (types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind))


def _leaves(group, names: Sequence[str]) -> list:
    """The metadata of the stored columns of a row group: of a struct, one for each part."""
    leaves = map(group.column, range(group.num_columns))
    starts = tuple(f"{name}." for name in names)
    return [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(starts)]


def _check_unpacked_size(leaves: Sequence) -> None:
    """Raises ValueError for a row group that a small file would fill the memory with."""
    stored = sum(leaf.total_compressed_size for leaf in leaves)
    unpacked = sum(max(leaf.total_uncompressed_size, 8 * leaf.num_values) for leaf in leaves)
    if unpacked > MAX_SMALL_GROUP and unpacked > MAX_RATIO * stored:
        least = f"more than {MAX_SMALL_GROUP} and more than {MAX_RATIO} times as many"
        raise ValueError(f"it unpacks from {stored} to {unpacked} bytes, {least}")


def _has_dictionary(leaf) -> bool:
    """Whether values are stored once for many rows, and Arrow can read them so."""
    is_encoded = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & set(leaf.encodings)
    fits = leaf.total_uncompressed_size < 2**31  # Arrow's limit for a dictionary
    return bool(is_encoded) and fits and leaf.physical_type == "BYTE_ARRAY"


def _image(value: Any) -> bytes:
    if not isinstance(value, Mapping):
        return image_bytes(value)
    if value.get("bytes") is None:
        raise BadRecord("missing file", f"no bytes of the image {shorten(value.get('path'))}")
    return image_bytes(value["bytes"])


class _Recent:
    """The last values asked for; one that several threads ask for at once is made once."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Future] = OrderedDict()

    def __reduce__(self):
        return type(self), (self._size,)

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        with self._lock:
            value = self._kept.pop(key, None)
            is_new = value is None
            value = Future() if is_new else value
            self._kept[key] = value  # the newest comes last
            if len(self._kept) > self._size:
                self._kept.popitem(last=False)
        if is_new:
            self._fill(key, value, make)
        return value.result()

    def _fill(self, key: int, value: Future, make: Callable[[], Any]) -> None:
        try:
            value.set_result(make())
        except BaseException as error:  # those who wait must hear of an interrupt too
            with self._lock:
                self._kept.pop(key, None)
            value.set_exception(error)
