"""Writes records in the formats that sources.py reads."""

import contextlib
import io
import itertools
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten
from janus_jax.data.parquet import import_pyarrow
from janus_jax.data.reading import INDICES_SUFFIX
from janus_jax.data.records import Record, record_fields
from janus_jax.paths import atomic_write, write_file

SUFFIXES = dict(jsonl=".jsonl", tar=".tar", arrayrecord=".array_record", parquet=".parquet")
ROW_GROUP = 16  # rows per group; a shuffled reader decodes a whole group for each record
_NAME_BYTES = 255  # maximum length of a file name on most file systems


def write_records(format: str, path: str | Path, records: Iterable[Record], first: int = 0) -> None:
    """Writes records to one file, replacing an existing file atomically.

    jsonl writes the images of NAME.jsonl to the folder NAME.images first. For class_folder, the
    path is a folder, to which one file per record is added; all records must be of the kind
    generation.

    Args:
        format: one of jsonl, tar, arrayrecord, parquet and class_folder.
        path: the file. Missing parent folders are created.
        records: the records to write.
        first: number of the first record. Numbers are the names of image files and of the members
            of tar shards; existing files of the same name are replaced.
    Raises:
        ValueError: the format is unknown, or class_folder cannot represent a record.
    """
    if format not in _WRITERS:
        raise ValueError(f"the format must be one of {', '.join(_WRITERS)}, got {shorten(format)}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _WRITERS[format](path, records, first)


def _write_jsonl(path: Path, records: Iterable[Record], first: int) -> None:
    folder = path.with_name(f"{path.stem}.images")
    with atomic_write(path) as file:
        for number, record in enumerate(records, first):
            fields = record_fields(record, _image_writer(folder, number))
            file.write(_json(fields) + b"\n")


def _image_writer(folder: Path, number: int) -> Callable[[bytes], str]:
    """Returns a function that writes an image of a record and returns its path.

    The path is relative to the parent of the folder.
    """
    count = itertools.count()

    def put(image: bytes) -> str:
        name = f"{number:09d}.{next(count)}{_suffix(image)}"
        write_file(folder / name, image)
        return f"{folder.name}/{name}"

    return put


def _write_tar(path: Path, records: Iterable[Record], first: int) -> None:
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for number, record in enumerate(records, first):
            for suffix, data in _tar_members(record):
                member = tarfile.TarInfo(f"{number:09d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def _tar_members(record: Record) -> list[tuple[str, bytes]]:
    """Returns the suffix and the contents of each member of a record."""
    fields = record_fields(record, lambda image: None)
    images = fields.pop("images", [None] if "image" in fields else [])
    fields.pop("image", None)
    members = []
    if fields.pop("indices", None) is not None:
        members.append((INDICES_SUFFIX, _npy(record.indices)))
    caption = fields.get("caption", "")
    if caption and caption == caption.strip():  # .txt would lose surrounding white space
        members.append((".txt", fields.pop("caption").encode()))
    if fields:
        members.append((".json", _json(fields)))
    for number, image in enumerate(record.images[: len(images)]):
        members.append((f".{number}{_suffix(image)}", image))
    return members


def _write_arrayrecord(path: Path, records: Iterable[Record], first: int) -> None:
    import msgpack
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic_write(path) as file, _os_errors(file.name):
        # With one record per group, a shuffled reader decodes only the records that it reads.
        with contextlib.closing(ArrayRecordWriter(file.name, "group_size:1")) as writer:
            for record in records:
                writer.write(msgpack.packb(record_fields(record, bytes)))


@contextlib.contextmanager
def _os_errors(name: str) -> Iterator[None]:
    """Converts the RuntimeError of an ArrayRecordWriter that cannot write its file to OSError."""
    try:
        yield
    except RuntimeError as error:
        reason, writing, _ = str(error).partition(f"; writing {name}")
        if not writing:
            raise
        raise OSError(reason) from None


def _write_parquet(path: Path, records: Iterable[Record], first: int) -> None:
    arrow, parquet = import_pyarrow("pyarrow"), import_pyarrow("pyarrow.parquet")
    image = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    turn = arrow.struct([("from", arrow.string()), ("value", arrow.string())])
    schema = arrow.schema(
        [
            ("image", image),
            ("images", arrow.list_(image)),
            ("conversations", arrow.list_(turn)),
            ("text", arrow.string()),
            ("caption", arrow.string()),
            ("indices", arrow.list_(arrow.int32())),
        ]
    )
    records = iter(records)
    with atomic_write(path) as file, parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(records, ROW_GROUP)):
            rows = [record_fields(record, lambda data: {"bytes": data}) for record in group]
            writer.write_table(arrow.Table.from_pylist(rows, schema))


def _write_class_folder(path: Path, records: Iterable[Record], first: int) -> None:
    for number, record in enumerate(records, first):
        if record.kind != "generation":
            rule = "class_folder can only hold generation records"
            raise ValueError(f"{rule}, got {record.kind} {record.where}".strip())
        folder = record.text.replace(" ", "_")
        fits = folder.replace("_", " ") == record.text and len(folder.encode()) <= _NAME_BYTES
        if not fits or folder.startswith(".") or "/" in folder or "\0" in folder:
            rule = f"captions must have at most {_NAME_BYTES} bytes and no _, / or leading dot"
            got = f"{shorten(record.text)} {record.where}".strip()
            raise ValueError(f"in a class_folder, {rule}, got {got}")
        if record.indices is None:
            suffix, data = _suffix(record.images[0]), record.images[0]
        else:
            suffix, data = INDICES_SUFFIX, _npy(record.indices)
        write_file(path / folder / f"{number:09d}{suffix}", data)


def _json(fields: dict) -> bytes:
    return json.dumps(fields, ensure_ascii=False).encode()


def _npy(indices: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, indices, allow_pickle=False)
    return file.getvalue()


def _suffix(image: bytes) -> str:
    """Returns the suffix for an image file, by which sources recognize images."""
    if image.startswith(b"\x89PNG"):
        return ".png"
    return ".webp" if image[:4] == b"RIFF" and image[8:12] == b"WEBP" else ".jpg"


_WRITERS = {
    "jsonl": _write_jsonl,
    "tar": _write_tar,
    "arrayrecord": _write_arrayrecord,
    "parquet": _write_parquet,
    "class_folder": _write_class_folder,
}
