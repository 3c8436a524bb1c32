"""Tests what the sources of all formats and the writers have in common."""

import concurrent.futures
import dataclasses
import os
import pickle
import sys
import tarfile

import grain
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import (
    FILES,
    assert_same,
    class_records,
    image,
    some_records,
    write_tar,
)

from janus_jax.data.reading import find_files
from janus_jax.data.records import Record
from janus_jax.data.sources import FORMATS, ParquetSource, TarSource, open_source
from janus_jax.data.writers import write_records


@pytest.fixture(params=[*FILES, "class_folder"])
def written(request, tmp_path):
    """Returns (format, path, records) of a file or folder of each format."""
    records = some_records() if request.param in FILES else class_records()
    path = tmp_path / FILES.get(request.param, "classes")
    write_records(request.param, path, records)
    return request.param, path, records


def test_records_come_back_as_they_were_written(written):
    format, path, records = written
    source = open_source(format, path)
    assert len(source) == len(records)
    for found, expected in zip(source, records, strict=True):
        assert_same(found, expected)
    assert repr(source) == f"{FORMATS[format].__name__}({path})"
    left = [name for name in os.listdir(path.parent) if name.startswith(".")]
    assert left == []


def test_places(written):
    format, path, _ = written
    places = {
        "jsonl": [f"{path}:{i + 1}" for i in range(7)],
        "tar": [f"{path}:{i:09d}" for i in range(7)],
        "arrayrecord": [f"{path}:{i}" for i in range(7)],
        "parquet": [f"{path}:{i}" for i in range(7)],
        "class_folder": [
            f"{path}/{name}"
            for name in ("a_cat/000000000.jpg", "a_cat/000000001.npy", "\u732b/000000002.png")
        ],
    }
    assert [record.where for record in open_source(format, path)] == places[format]


def test_places_tell_files_of_one_name_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        for file in FILES.values():
            write_records(file.split(".")[1].replace("_", ""), f"{folder}/{file}", some_records())
        write_records("class_folder", f"{folder}/classes", class_records())
    for format, file in FILES.items():
        source = open_source(format, [f"a/{file}", f"b/{file}"])
        places = [record.where for record in source]
        assert len(set(places)) == 14
        assert all(place.startswith(f"a/{file}:") for place in places[:7])
        assert all(place.startswith(f"b/{file}:") for place in places[7:])
        folder = open_source(format, "b")
        assert [record.where for record in folder] == places[7:]
    assert open_source("class_folder", "b/classes")[0].where == "b/classes/a_cat/000000000.jpg"


@pytest.mark.parametrize("format", FILES)
def test_a_file_given_twice(format, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = FILES[format]
    write_records(format, f"a/{file}", some_records())
    (tmp_path / "link").symlink_to(f"a/{file}")
    for again in (f"a/{file}", tmp_path / "a" / file, "link"):
        with pytest.raises(ValueError, match=f"once.* {again} "):
            open_source(format, [f"a/{file}", again])
    with pytest.raises(ValueError, match=f"once.* a/{file} "):
        open_source(format, [f"a/{file}", "a"])


def test_names_with_a_dot_in_front_are_skipped(tmp_path):
    for name in ("a.jsonl", ".b.jsonl", ".tokenize_images/skipped.jsonl"):
        write_records("jsonl", tmp_path / name, some_records())
    assert find_files(tmp_path, "*.jsonl") == [tmp_path / "a.jsonl"]
    assert len(open_source("jsonl", tmp_path)) == 7


def test_an_index_outside_is_an_error(written):
    format, path, records = written
    source = open_source(format, path)
    for index in (-1, len(records)):
        with pytest.raises(IndexError, match=f"\\[0, {len(records)}\\).* {index}$"):
            source[index]


def test_pickled_sources_read_the_same(written):
    format, path, records = written
    source = open_source(format, path)
    source[0]  # opens files before the source is pickled
    for found, expected in zip(pickle.loads(pickle.dumps(source)), records, strict=True):
        assert_same(found, expected)


def test_threads_read_the_same(written):
    format, path, records = written
    source = open_source(format, path)
    order = np.random.default_rng(0).integers(len(records), size=300).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(source.__getitem__, order))
    for index, record in zip(order, found, strict=True):
        assert_same(record, records[index])


def test_grain_shuffles_them(written):
    format, path, _ = written
    dataset = grain.MapDataset.source(open_source(format, path)).shuffle(seed=0)
    found = sorted(list(dataset.to_iter_dataset()), key=lambda record: record.where)
    expected = sorted(open_source(format, path), key=lambda record: record.where)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("format", FILES)
def test_several_files_are_read_in_order(format, tmp_path):
    records = [Record("text", text=f"text {i}") for i in range(5)]
    suffix = FILES[format].removeprefix("train")
    write_records(format, tmp_path / f"a{suffix}", records[:2])
    write_records(format, tmp_path / f"b{suffix}", [])
    write_records(format, tmp_path / f"c{suffix}", records[2:], first=2)
    (tmp_path / f".hidden{suffix}").write_bytes(b"\x00")
    folder = open_source(format, tmp_path)
    assert [record.text for record in folder] == [record.text for record in records]
    some = open_source(format, [str(tmp_path / f"c{suffix}"), tmp_path / f"a{suffix}"])
    assert [some[i].text for i in (0, 2, 3, 4)] == ["text 2", "text 4", "text 0", "text 1"]
    assert f"c{suffix} and 1 more" in repr(some)


# errors on opening


def test_wrong_formats_options_and_paths(tmp_path):
    rule = "format.*jsonl, tar, arrayrecord, parquet, class_folder"
    with pytest.raises(ValueError, match=f"{rule}.*'csv'"):
        open_source("csv", tmp_path)
    with pytest.raises(ValueError, match=f"{rule}.*'csv'"):
        write_records("csv", tmp_path / "x", [])
    with pytest.raises(ValueError, match=r"options.*jsonl.*'image_rot'"):
        open_source("jsonl", tmp_path, image_rot="x")
    with pytest.raises(ValueError, match=r"cached_groups.* 0\b"):
        ParquetSource(tmp_path, cached_groups=0)


@pytest.mark.parametrize("format", [*FILES, "class_folder"])
def test_nothing_there(format, tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match=f"(neither|none) at {missing}"):
        open_source(format, missing)
    with pytest.raises(ValueError, match=f"record.* {empty}"):
        open_source(format, empty)


@pytest.mark.parametrize("format", FILES)
def test_files_without_a_record(format, tmp_path):
    path = tmp_path / FILES[format]
    write_records(format, path, [])
    with pytest.raises(ValueError, match=f"record.*none.* {path}"):
        open_source(format, path)


@pytest.mark.parametrize("format", ["tar", "arrayrecord", "parquet"])
@pytest.mark.parametrize("damage", ["other", "empty", "truncated"])
def test_files_of_another_format(format, damage, tmp_path):
    path = tmp_path / FILES[format]
    write_records(format, path, some_records())
    whole = path.read_bytes()
    size = 2000 if format == "tar" else len(whole) // 2
    contents = {"other": b"no such thing\n" * 99, "empty": b"", "truncated": whole[:size]}
    path.write_bytes(contents[damage])
    with pytest.raises(ValueError, match=f"{path} .*file: .+") as error:
        open_source(format, path)
    assert "\n" not in str(error.value)


def test_compressed_and_damaged_tars(tmp_path):
    for mode in ("gz", "bz2", "xz"):
        path = tmp_path / f"{mode}.tar"
        with tarfile.open(path, f"w:{mode}") as tar:
            tar.add(__file__, "a.txt")
        with pytest.raises(ValueError, match=f"{path} .*tar file: .* compressed"):
            TarSource(path)
    path = write_tar(tmp_path / "a.tar", {f"{i}.json": b'{"text": "a"}' for i in range(3)})
    raw = bytearray(path.read_bytes())
    raw[1024:1034] = b"damaged!!!"  # second header; tarfile sees the end of the file
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"header.*\b1024\b.*damaged"):
        TarSource(path)


def test_missing_pyarrow_is_reported(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    hint = r"pyarrow.*pip install 'janus_jax\[parquet\]'"
    with pytest.raises(ValueError, match=hint):
        open_source("parquet", tmp_path)
    with pytest.raises(ValueError, match="pyarrow"):
        write_records("parquet", tmp_path / "x", [])


def test_parquet_without_a_known_column(tmp_path):
    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"columns.*image, .* a, b$"):
        ParquetSource(tmp_path)


# writers


@pytest.mark.parametrize("caption", ["a_b", "a/b", ".a", "a" * 300, "a\0b"])
def test_captions_that_are_no_folder(caption, tmp_path):
    record = Record("generation", text=caption, images=(image(1),))
    with pytest.raises(ValueError, match=r"\b255 bytes.*_, /"):
        write_records("class_folder", tmp_path / "x", [record])
    with pytest.raises(ValueError, match=r"generation records.*text"):
        write_records("class_folder", tmp_path / "x", [Record("text", text="a")])
    assert not (tmp_path / "x").exists()


def test_class_folders_are_added_to(tmp_path):
    cat = Record("generation", text="a cat", images=(image(1),))
    write_records("class_folder", tmp_path / "x", [cat, cat])
    write_records("class_folder", tmp_path / "x", [cat], first=2)
    write_records("class_folder", tmp_path / "x", [cat], first=1)
    assert len(open_source("class_folder", tmp_path / "x")) == 3


@pytest.mark.parametrize("format", FILES)
def test_an_interrupted_file_leaves_the_one_before(format, tmp_path):
    path = tmp_path / FILES[format]
    write_records(format, path, some_records())

    def interrupted():
        yield from class_records()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_records(format, path, interrupted())
    if format != "jsonl":  # its images have the same names, so they were replaced
        for found, expected in zip(open_source(format, path), some_records(), strict=True):
            assert_same(found, expected)
    assert set(os.listdir(tmp_path)) <= {path.name, "train.images"}


def test_indices_are_written_in_place_of_an_image(tmp_path):
    indices = np.arange(4, dtype=np.int32)
    both = Record("generation", text="a", images=(image(1),), indices=indices)
    for format in (*FILES, "class_folder"):
        path = tmp_path / FILES.get(format, "classes")
        write_records(format, path, [both])
        (found,) = open_source(format, path)
        assert_same(found, dataclasses.replace(both, images=()))
