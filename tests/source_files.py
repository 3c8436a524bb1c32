"""Records, files of records, and assertions about them, for the tests of the sources."""

import io
import json
import re
import tarfile

import numpy as np
from PIL import Image

from janus_jax.data.records import BadRecord, Record

FILES = {
    "jsonl": "train.jsonl",
    "tar": "train.tar",
    "arrayrecord": "train.array_record",
    "parquet": "train.parquet",
}
CONVERSATION = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]


def image(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4 + number, 5), (number, 100, 200)).save(file, kind)
    return file.getvalue()


def some_records() -> list[Record]:
    """Returns records of all kinds, with zero, one and two images."""
    return [
        Record("generation", text="a red fox", images=(image(1),)),
        Record("text", text="two lines,\nwith \u201cquotes\u201d and \U0001f98a"),
        Record("understanding", (("What?", "A fox."),), images=(image(2, "JPEG"),)),
        Record(
            "understanding",
            (("<image>\n<image>\nDiffer?", "Yes."), ("How?", "Color.")),
            images=(image(3, "WEBP"), image(4)),
        ),
        Record("understanding", (("Who are you?", "Janus."),)),
        Record("generation", text=" spaces around ", images=(image(5, "JPEG"),)),
        Record("generation", text="a blue square", indices=np.arange(9, dtype=np.int32) * 70000),
    ]


def class_records() -> list[Record]:
    """Returns records in the order in which their folders and files are read."""
    return [
        Record("generation", text="a cat", images=(image(1, "JPEG"),)),
        Record("generation", text="a cat", indices=np.arange(9, dtype=np.int32)),
        Record("generation", text="\u732b", images=(image(2),)),
    ]


def assert_same(found: Record, expected: Record) -> None:
    assert isinstance(found, Record), found
    for field in ("kind", "turns", "text", "images"):
        assert getattr(found, field) == getattr(expected, field), field
    np.testing.assert_array_equal(found.indices, expected.indices)
    assert expected.indices is None or found.indices.dtype == np.int32


def assert_bad(found, reason: str, where: str, detail: str = "") -> None:
    assert isinstance(found, BadRecord), found
    assert (found.reason, found.where) == (reason, where)
    assert re.search(detail, found.detail), found.detail
    assert found.__traceback__ is None and found.__context__ is None
    assert "\n" not in str(found)


def write_tar(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path
