"""A full disk: the error names the file, and nothing half written stays behind."""

import errno
import os

import numpy as np
import pytest
from limits import full_disk
from source_files import FILES

from janus_jax.commands import gallery
from janus_jax.data.mixture import Loaded
from janus_jax.data.records import BadRecord, Record
from janus_jax.data.skipped import Skipped
from janus_jax.data.writers import write_records
from janus_jax.interop.files import write_safetensors_file
from janus_jax.paths import atomic_write, os_errors_of, write_json

RECORDS = [
    Record("generation", text="a", images=(os.urandom(5000),)),
    Record("generation", text="b", images=(os.urandom(5000),)),
]
PIXELS = np.zeros((8, 8, 3), np.uint8)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def save_indices(path) -> None:
    with atomic_write(path) as file:
        np.savez(file, indices=np.arange(10_000))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.png", lambda path: gallery.save_png(path, PIXELS, {"a": "b" * 9999})),
        ("a.npz", save_indices),
        ("a.json", lambda path: write_json(path, {"a": "b" * 9999})),
        *((file, lambda path, format=format: write_records(format, path, RECORDS))
          for format, file in FILES.items() if format != "jsonl"),
    ],
)  # fmt: skip
def test_the_file_is_named_and_not_there(name, write, tmp_path):
    with full_disk(at=100), pytest.raises(OSError) as error:
        write(tmp_path / name)
    assert "File too large" in str(error.value)
    assert str(tmp_path / name) in str(error.value) and "/." not in str(error.value)
    assert files(tmp_path) == []
    (tmp_path / name).write_text("before")
    with full_disk(at=100), pytest.raises(OSError):
        write(tmp_path / name)
    assert (tmp_path / name).read_text() == "before"


@pytest.mark.parametrize(
    ("format", "name", "written"),
    [("jsonl", "a.jsonl", "a.images/000000000.0.jpg"), ("class_folder", "a", "a/a/000000000.jpg")],
)
def test_the_image_beside_is_named(format, name, written, tmp_path):
    with full_disk(at=100), pytest.raises(OSError, match=f"'{tmp_path}/{written}'"):
        write_records(format, tmp_path / name, RECORDS)
    assert files(tmp_path) == []


def test_weights_and_the_list_of_skipped_records_are_named(tmp_path):
    tensors = {"a": (np.dtype(np.float32), (99,))}
    path = tmp_path / "model.safetensors"
    with full_disk(at=200), pytest.raises(OSError, match=f"'{path}'"):
        write_safetensors_file(path, tensors, lambda name: np.zeros(99, np.float32))
    skipped = Skipped(tmp_path / "skipped.jsonl", 1.0, {"": 9})
    bad = Loaded("", BadRecord("malformed", "a" * 500, "a.tar:1"))
    with full_disk(at=10), pytest.raises(OSError, match=f"'{tmp_path}/skipped.jsonl'"):
        skipped(bad)


def test_a_file_that_cannot_be_made_is_named_as_it_would_be(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"'{tmp_path}/none/a.png'"):
        gallery.save_png(tmp_path / "none" / "a.png", PIXELS, {})
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError, match=f"'{tmp_path}/a.png'"):
        gallery.save_png(tmp_path / "a.png", PIXELS, {})
    assert os.listdir(tmp_path) == ["a.png"]


def test_errors_that_have_a_name_keep_it():
    with pytest.raises(OSError, match="'b'"), os_errors_of("a"):
        raise OSError(errno.EIO, "Input/output error", "b")
    with pytest.raises(OSError, match="a: of a library"), os_errors_of("a"):
        raise OSError("of a library")
    with pytest.raises(RuntimeError, match="of another kind"), os_errors_of("a"):
        raise RuntimeError("of another kind")


def test_other_errors_of_what_gives_the_records_pass(tmp_path):
    def records():
        yield RECORDS[0]
        raise RuntimeError("writing failed elsewhere")

    with pytest.raises(RuntimeError, match="writing failed elsewhere"):
        write_records("arrayrecord", tmp_path / "a.array_record", records())
