"""Records written as the sources of sources.py read them."""

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
ROW_GROUP = 16  # rows: who reads them shuffled decodes a whole group for each
_NAME_BYTES = 255  # of a file's name, on most file systems


def write_records(
    format: str, path: str | Path, records: Iterable[Record], first: int = 0
) -> None:
    """Writes one file, beside and then renamed, and replaces one that is there.

    jsonl writes images first, into a folder NAME.images beside the file NAME.jsonl. For
    class_folder the path is a folder, to which a file is added for each record; its records must
    be of the generation kind.

    Args:
        format: one of those of sources.open_source.
        path: the file; folders above it are made.
        first: number of the first record, after which files and members of tar shards are named;
            a file of the same name is replaced.
    Raises:
        ValueError: another format, or a record that class_folder cannot hold.
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
            fields = record_fields(record, _put_beside(folder, number))
            file.write(_json(fields) + b"\n")


def _put_beside(folder: Path, number: int) -> Callable[[bytes], str]:
    """What writes the images of a record and gives their paths from the folder above."""
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
    """What the names of a record's members end with, and what the members hold."""
    fields = record_fields(record, lambda image: None)
    images = fields.pop("images", [None] if "image" in fields else [])
    fields.pop("image", None)
    members = []
    if fields.pop("indices", None) is not None:
        members.append((INDICES_SUFFIX, _npy(record.indices)))
    caption = fields.get("caption", "")
    if caption and caption == caption.strip():  # else .txt would lose the white space around it
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
        # groups of one, so that a shuffled reader decodes nothing but what it asks for
        with contextlib.closing(ArrayRecordWriter(file.name, "group_size:1")) as writer:
            for record in records:
                writer.write(msgpack.packb(record_fields(record, bytes)))


@contextlib.contextmanager
def _os_errors(name: str) -> Iterator[None]:
    """Raises an ArrayRecordWriter's RuntimeError about the file that it writes as an OSError."""
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
        while held := list(itertools.islice(records, ROW_GROUP)):
            rows = [record_fields(record, lambda data: {"bytes": data}) for record in held]
            writer.write_table(arrow.Table.from_pylist(rows, schema))


def _write_class_folder(path: Path, records: Iterable[Record], first: int) -> None:
    for number, record in enumerate(records, first):
        if record.kind != "generation":
            rule = "class_folder holds captions and images alone"
            raise ValueError(f"{rule}, got {record.kind} {record.where}".strip())
        folder = record.text.replace(" ", "_")
        fits = folder.replace("_", " ") == record.text and len(folder.encode()) <= _NAME_BYTES
        if not fits or folder.startswith(".") or "/" in folder or "\0" in folder:
            rule = "a caption for class_folder must do as a folder's name and have no / or _"
            raise ValueError(f"{rule}, got {shorten(record.text)} {record.where}".strip())
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
    """The end of an image file's name, which sources go by to tell that it is an image."""
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
