"""Tests how files of each format are read, and which errors in them are detected."""

import concurrent.futures
import io
import json
import os
import pickle

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from source_files import CONVERSATION, assert_bad, assert_same, image, write_tar

from janus_jax.data.records import BadRecord, Record
from janus_jax.data.sources import JsonlSource, ParquetSource, TarSource, open_source
from janus_jax.data.writers import ROW_GROUP, write_records

# JSONL


def test_jsonl_lines_are_counted_as_editors_do(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "first"}\r\n\n   \n{"text": "second"\n[1]\n"x"\n'
        b'{"text": "\\ud800"}\n{"text": "\xff"}\n' + b"[" * 99999 + b'\n{"text": "last"}'
    )
    source = JsonlSource(path)
    assert len(source) == 8
    assert source[0].text == "first" and source[0].where == f"{path}:1"
    assert_bad(source[1], "malformed", f"{path}:4", "JSON")
    assert_bad(source[2], "malformed", f"{path}:5", "object.*list")
    assert_bad(source[3], "malformed", f"{path}:6", "object.*str")
    assert_bad(source[4], "malformed", f"{path}:7", r"text.*string.*'\\ud800'")
    assert_bad(source[5], "malformed", f"{path}:8", "JSON")
    assert_bad(source[6], "malformed", f"{path}:9", "JSON")
    assert source[7].text == "last" and source[7].where == f"{path}:10"


# tar shards


def test_tar_members_are_grouped_by_the_name_up_to_the_first_dot(tmp_path):
    indices = io.BytesIO()
    np.save(indices, np.arange(4))
    write_tar(
        tmp_path / "a.tar",
        {
            "dir.x/1.jpg": image(1),
            "README": b"nothing",
            "2.1.png": image(2),
            "dir.x/1.txt": b" a fox\n",
            "2.0.JPEG": image(3),
            "2.json": json.dumps(
                {"images": ["elsewhere/p.png", "q.jpg"], "conversations": CONVERSATION}
            ).encode(),
            "3.npy": indices.getvalue(),
            "3.json": b'{"caption": "the .txt is meant", "image": "x.jpg", "text": "this neither"}',
            "3.txt": b"a hare",
        },
    )
    first, second, third = TarSource(tmp_path / "a.tar")
    assert first.where == f"{tmp_path}/a.tar:dir.x/1"
    assert_same(first, Record("generation", text="a fox", images=(image(1),)))
    images = (image(2), image(3))
    assert_same(second, Record("understanding", (("?", "!"),), images=images))
    indices = np.arange(4, dtype=np.int32)
    assert_same(third, Record("generation", text="a hare", indices=indices))


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def test_bad_tar_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickled = io.BytesIO()
    np.save(pickled, np.array([Evil()], object), allow_pickle=True)
    members = {
        "0.txt": b"a",
        "1.json": b"{",
        "2.json": b"[1]",
        "3.txt": b"\xff",
        "4.npy": b"\x93NUMPY\x01\x00\x10\x00{'shape': (1,",
        "5.npy": pickled.getvalue(),
        "6.json": b'{"text": "a"}',
        "6.b.json": b'{"text": "b"}',
        "7.json": json.dumps({"images": ["a", "b"], "conversations": CONVERSATION}).encode(),
        "7.jpg": image(1),
        "8.json": b'{"caption": "a", "image": "x.jpg"}',
        "9.txt": b" ",
    }
    members |= {"4.txt": b"a", "5.txt": b"a"}
    bad = list(TarSource(write_tar(tmp_path / "a.tar", members)))
    expected = [
        ("malformed", r"image.*\b0\b"),
        ("malformed", "JSON"),
        ("malformed", "object.*list"),
        ("malformed", "UTF-8"),
        ("malformed", ".npy"),
        ("malformed", ".npy.*Object arrays"),
        ("malformed", r".json.*\b2\b"),
        ("missing file", r"\b2 images.*\.json.*\b1\b"),
        ("missing file", r"\b1 images.*\.json.*\b0\b"),
        ("empty caption", ""),
    ]
    for i, (found, (reason, detail)) in enumerate(zip(bad, expected, strict=True)):
        assert_bad(found, reason, f"{tmp_path}/a.tar:{i}", detail)
    assert not (tmp_path / "made_by_a_pickle").exists()


# ArrayRecord


def test_bad_arrayrecord_entries(tmp_path):
    path = tmp_path / "a.array_record-00000-of-00001"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    entries = [b"\xc1", msgpack.packb([1]), msgpack.packb({1: 2}), b"\x81\xa4text"]
    entries += [msgpack.packb({"caption": "a", "image": "a.png"}), msgpack.packb({"text": b"a"})]
    for entry in entries:
        writer.write(entry)
    writer.close()
    invalid = "msgpack"
    expected = [invalid, "object.*list", invalid, invalid]
    expected += ["image.*str", "text.*b'a'"]
    for i, (bad, detail) in enumerate(
        zip(open_source("arrayrecord", tmp_path), expected, strict=True)
    ):
        assert_bad(bad, "malformed", f"{path}:{i}", detail)


def test_a_damaged_arrayrecord_chunk_is_one_bad_record(tmp_path):
    path = tmp_path / "a.array_record"
    records = [Record("text", text=f"{i} {os.urandom(500).hex()}") for i in range(4)]
    write_records("arrayrecord", path, records)
    raw = bytearray(path.read_bytes())
    raw[1000:1010] = b"damaged!!!"
    path.write_bytes(raw)
    found = list(open_source("arrayrecord", path))
    bad = [record for record in found if isinstance(record, BadRecord)]
    assert len(bad) == 1 and "mismatch" in bad[0].detail


# Parquet


def test_bad_parquet_rows_and_null_columns(tmp_path):
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    rows = [
        {"caption": "a", "image": {"bytes": None, "path": "x.png"}, "id": 1},
        {"caption": "a", "image": None, "id": 2},
        {"messages": said, "image": {"bytes": image(1), "path": None}, "conversations": None},
        {"text": "b"},
        {"id": 5, "text": None},
    ]
    names = ("id", "caption", "image", "messages", "conversations", "text")
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource(tmp_path)
    assert_bad(source[0], "missing file", f"{tmp_path}/a.parquet:0", "x.png")
    assert_bad(source[1], "malformed", f"{tmp_path}/a.parquet:1", r"image.*\b0\b")
    assert_same(source[2], Record("understanding", (("?", "!"),), images=(image(1),)))
    assert_same(source[3], Record("text", text="b"))
    assert_bad(source[4], "malformed", f"{tmp_path}/a.parquet:4", "messages, caption and text")


def test_a_parquet_row_group_is_decoded_once(tmp_path, monkeypatch):
    records = [Record("text", text=f"text {i}") for i in range(4 * ROW_GROUP)]
    write_records("parquet", tmp_path / "a.parquet", records)
    source = ParquetSource(tmp_path, cached_groups=4)
    assert source[ROW_GROUP + 3].where == f"{tmp_path}/a.parquet:{ROW_GROUP + 3}"
    decoded, read_group = [], source._read_group

    def counted(part):
        decoded.append(part)
        return read_group(part)

    monkeypatch.setattr(source, "_read_group", counted)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        texts = [record.text for record in pool.map(source.__getitem__, range(len(source)))]
    assert texts == [record.text for record in records]
    assert sorted(decoded) == [0, 2, 3]  # group 1 was read before


def test_the_last_parquet_row_groups_are_kept(tmp_path, monkeypatch):
    records = [Record("text", text=f"text {i}") for i in range(3 * ROW_GROUP)]
    write_records("parquet", tmp_path / "a.parquet", records)
    source = ParquetSource(tmp_path, cached_groups=2)
    decoded, read_group = [], source._read_group
    monkeypatch.setattr(
        source, "_read_group", lambda part: decoded.append(part) or read_group(part)
    )
    for part in (0, 1, 0, 2, 0, 1):
        assert source[part * ROW_GROUP].text == f"text {part * ROW_GROUP}"
    assert decoded == [0, 1, 2, 1]


def test_a_damaged_parquet_row_group_is_bad_records(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [os.urandom(100).hex() for _ in range(2 * ROW_GROUP)]
    write_records("parquet", path, [Record("text", text=text) for text in texts])
    raw = bytearray(path.read_bytes())
    raw[4:40] = b"\xff" * 36
    path.write_bytes(raw)
    source = ParquetSource(path)
    assert_bad(source[0], "malformed", f"{tmp_path}/a.parquet:0", "row group")
    assert_bad(source[1], "malformed", f"{tmp_path}/a.parquet:1")
    assert source[ROW_GROUP].text == texts[ROW_GROUP]
    path.unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickle.dumps(source))[0]


# class folders


def test_class_names_and_indices(tmp_path):
    root, names = tmp_path / "train", tmp_path / "names.txt"
    for name in ("n02/b.JPEG", "n02/a.png", "n02/notes.txt", "n02/.c.png", "n01/x.jpg", ".n/x.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(1))
    np.save(root / "n01" / "x.npy", np.arange(4))
    (root / "n02" / "bad.npy").write_bytes(b"x")
    (root / "readme.jpg").write_bytes(b"in no class")
    names.write_text("n01 tench, Tinca tinca\n\nn02  great white shark, man-eater\nn03 c\n")
    source = open_source("class_folder", root, class_names=names)
    places = ["n01/x.npy", "n02/a.png", "n02/b.JPEG", "n02/bad.npy"]
    assert [record.where for record in source] == [f"{root}/{place}" for place in places]
    shark = Record("generation", text="great white shark", images=(image(1),))
    indices = np.arange(4, dtype=np.int32)
    assert_same(source[0], Record("generation", text="tench", indices=indices))
    assert_same(source[1], shark)
    assert_same(source[2], shark)
    assert_bad(source[3], "malformed", f"{root}/n02/bad.npy", ".npy")
    assert open_source("class_folder", root)[1].text == "n02"
    (root / "n02" / "a.png").unlink()
    assert_bad(source[1], "missing file", f"{root}/n02/a.png")


def test_wrong_class_names(tmp_path):
    (tmp_path / "train" / "n1").mkdir(parents=True)
    (tmp_path / "train" / "n1" / "a.png").write_bytes(image(1))
    names = tmp_path / "names.txt"
    with pytest.raises(FileNotFoundError, match=f"class_names.*{names}"):
        open_source("class_folder", tmp_path / "train", class_names=names)
    names.write_text("n2 a cat\n")
    with pytest.raises(ValueError, match=rf"class_names {names} .*\bn1$"):
        open_source("class_folder", tmp_path / "train", class_names=names)
    names.write_text("n2 a cat\nn1\n")
    with pytest.raises(ValueError, match=f"{names}:2: .*line.*folder"):
        open_source("class_folder", tmp_path / "train", class_names=names)
