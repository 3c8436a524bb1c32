"""A source of records that reads Parquet files as they are on the Hugging Face hub."""

import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any

from janus_jax.checks import shorten, shorten_text
from janus_jax.data.reading import Paths, Source, find_files, image_bytes, open_as
from janus_jax.data.records import FIELDS, BadRecord, Record, parse_record
from janus_jax.data.unread import must_not_ignore

# A row group is refused if it unpacks to more than both limits: a small file must not fill the
# memory. Text compresses by a factor of about 10, images hardly at all.
MAX_SMALL_GROUP = 2**28  # bytes after unpacking
MAX_RATIO = 100  # bytes after unpacking for each byte in the file


def import_pyarrow(name: str) -> ModuleType:
    """Imports a module of pyarrow, an optional dependency. Raises ValueError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError:
        hint = "install it with pip install 'janus_jax[parquet]'"
        raise ValueError(f"the format parquet needs pyarrow; {hint}") from None


class ParquetSource(Source):
    """Reads the rows of a Parquet file, of several, or of the *.parquet files of a folder.

    A column has the name of the record's field. Two kinds of other columns are read as well:
    those with a name that a record must not have, and those that contain text or bytes, which may
    be an image or its path. unread.py decides whether they make the record bad. Other columns are
    ignored. An image is either bytes, or a struct {bytes, path} in which bytes are not null.

    Parquet is read one row group at a time. A record outside the recently read row groups costs
    reading and decompressing its whole group, often 100 images or more. Reading in order is as fast
    as with any other format. For shuffled reading, write small row groups (writers.py: 16 rows), or
    convert the records to ArrayRecord or tar shards.

    Location of a record: "data/train.parquet:5", with the row counted from 0.
    """

    def __init__(self, path: Paths, cached_groups: int = 8):
        """Opens the files and reads their metadata.

        Args:
            path: a file, several files, or a folder.
            cached_groups: number of row groups kept in memory. Threads may decode as many more at
                the same time.
        """
        if cached_groups < 1:
            raise ValueError(f"cached_groups must be at least 1, got {cached_groups}")
        parquet = import_pyarrow("pyarrow.parquet")
        self._files = find_files(path, "*.parquet")
        self._groups, counts = [], []  # (index of the file, of its group, of the group's first row)
        self._metadata, self._columns = [], []
        for number, file in enumerate(self._files):
            with open_as("Parquet", file, parquet.ParquetFile) as table:
                metadata, schema = table.metadata, table.schema_arrow
            self._metadata.append(metadata)
            if not set(FIELDS) & set(schema.names):
                known, got = ", ".join(FIELDS), shorten_text(", ".join(schema.names))
                raise ValueError(f"{file} must have at least one of the columns {known}, got {got}")
            self._columns.append([field.name for field in schema if _is_read(field)])
            first = 0
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group, first))
                counts.append(metadata.row_group(group).num_rows)
                first += counts[-1]
        self._cache = _Cache(cached_groups)
        super().__init__(path, counts)

    def _where(self, part: int, position: int) -> str:
        number, _, first = self._groups[part]
        return f"{self._files[number]}:{first + position}"

    def _read(self, part: int, position: int) -> Record:
        try:
            table = self._cache.get(part, lambda: self._read_group(part))
        except (ValueError, OSError) as error:  # pyarrow raises either for damaged data
            if getattr(error, "errno", None):  # the file was removed, or the disk failed
                raise
            reason = shorten_text(str(error))
            raise BadRecord("malformed", f"the row group cannot be read: {reason}") from None
        return parse_record(table.slice(position, 1).to_pylist()[0], _image)

    def _read_group(self, part: int):
        parquet = import_pyarrow("pyarrow.parquet")
        number, group, _ = self._groups[part]
        file, metadata, names = self._files[number], self._metadata[number], self._columns[number]
        leaves = _leaves(metadata.row_group(group), names)
        _check_unpacked_size(leaves)
        # A value that the file stores once for many rows stays a single value in memory.
        dictionaries = [leaf.path_in_schema for leaf in leaves if _has_dictionary(leaf)]
        with parquet.ParquetFile(file, metadata=metadata, read_dictionary=dictionaries) as table:
            return table.read_row_group(group, columns=names)


def _is_read(field) -> bool:
    """Returns whether a column is a field of records, or must be checked by unread.py."""
    return field.name in FIELDS or must_not_ignore(field.name) or _may_hold_media(field.type)


def _may_hold_media(kind) -> bool:
    """Returns whether values of an Arrow type are or contain text or bytes."""
    types = import_pyarrow("pyarrow.types")
    if types.is_dictionary(kind):
        return _may_hold_media(kind.value_type)
    if types.is_nested(kind):
        return any(_may_hold_media(kind.field(i).type) for i in range(kind.num_fields))
    return not (types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind))


def _leaves(group, names: Sequence[str]) -> list:
    """Returns the metadata of the stored columns of a row group; a struct has one per field."""
    leaves = map(group.column, range(group.num_columns))
    starts = tuple(f"{name}." for name in names)
    return [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(starts)]


def _check_unpacked_size(leaves: Sequence) -> None:
    """Raises ValueError if a small row group would unpack to a large part of the memory."""
    stored = sum(leaf.total_compressed_size for leaf in leaves)
    unpacked = sum(max(leaf.total_uncompressed_size, 8 * leaf.num_values) for leaf in leaves)
    if unpacked > MAX_SMALL_GROUP and unpacked > MAX_RATIO * stored:
        limit = f"the limits are {MAX_SMALL_GROUP} bytes and a factor of {MAX_RATIO}"
        raise ValueError(f"it unpacks from {stored} to {unpacked} bytes, {limit}")


def _has_dictionary(leaf) -> bool:
    """Returns whether values are dictionary-encoded, and Arrow can keep them so in memory."""
    is_encoded = {"RLE_DICTIONARY", "PLAIN_DICTIONARY"} & set(leaf.encodings)
    fits = leaf.total_uncompressed_size < 2**31  # Arrow's limit for a dictionary
    return bool(is_encoded) and fits and leaf.physical_type == "BYTE_ARRAY"


def _image(value: Any) -> bytes:
    if not isinstance(value, Mapping):
        return image_bytes(value)
    if value.get("bytes") is None:
        path = shorten(value.get("path"))
        raise BadRecord("missing file", f"the image has no bytes, only the path {path}")
    return image_bytes(value["bytes"])


class _Cache:
    """Keeps the most recently used values. Threads that need the same value compute it once."""

    def __init__(self, size: int):
        self._size = size
        self._lock = threading.Lock()
        self._values: OrderedDict[int, Future] = OrderedDict()  # the most recent one is last

    def __reduce__(self):
        return type(self), (self._size,)

    def get(self, key: int, make: Callable[[], Any]) -> Any:
        with self._lock:
            value = self._values.pop(key, None)
            is_new = value is None
            value = Future() if is_new else value
            self._values[key] = value
            if len(self._values) > self._size:
                self._values.popitem(last=False)
        if is_new:
            self._compute(key, value, make)
        return value.result()

    def _compute(self, key: int, value: Future, make: Callable[[], Any]) -> None:
        try:
            value.set_result(make())
        except BaseException as error:  # also an interrupt, as other threads wait for the result
            with self._lock:
                self._values.pop(key, None)
            value.set_exception(error)
