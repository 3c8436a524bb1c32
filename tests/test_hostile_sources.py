"""Tests files of records that state huge or negative sizes, and paths to endless files."""

import io
import json
import os
import tarfile
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from limits import bounded
from source_files import CONVERSATION, assert_bad, assert_same, image, write_lines, write_tar

from janus_jax.data import reading, sources
from janus_jax.data import tar as tar_files
from janus_jax.data.records import Record
from janus_jax.data.sources import JsonlSource, TarSource, open_source
from janus_jax.data.writers import write_records

HUGE = 2**40
TEXT = b'{"text": "a"}'


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields) -> bytes:
    """Returns the header of a member, which may state any size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT)


def content(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: str, data: bytes = TEXT) -> bytes:
    return header(name, len(data)) + content(data)


def write(path, *blocks: bytes):
    path.write_bytes(b"".join(blocks) + bytes(1024))
    return path


@pytest.mark.parametrize("size", [-512, -513, -1024, -2000, -HUGE])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z", tarfile.DIRTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_negative_size_ends(size, kind, tmp_path):
    """A negative size leads back to the member's own header or to an earlier one."""
    wrong = header("1.json", size, kind)
    path = write(tmp_path / "a.tar", member("0.json"), wrong, member("2.json"))
    rule = r"tar.*header.*\b1024\b.*(negative size|damaged)"
    with pytest.raises(ValueError, match=rule):
        TarSource(path)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [HUGE, 2**80, -5000])
def test_a_name_or_header_of_a_huge_size(size, kind, tmp_path):
    path = write(tmp_path / "a.tar", member("0.json"), header("x", size, kind), member("1.json"))
    with pytest.raises(ValueError, match=f"{path} .*tar file: .+") as error:
        TarSource(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", ["-1024", str(HUGE), "1" * 5000, "x"])
def test_sizes_in_pax_headers(size, tmp_path):
    fields = f" size={size}\n".encode()
    record = str(len(fields) + len(str(len(fields) + 4))).encode() + fields
    extended = header("x", len(record), tarfile.XHDTYPE) + content(record)
    path = write(tmp_path / "a.tar", member("0.json"), extended, member("1.json"), member("2.json"))
    try:
        assert all(isinstance(record, Record) for record in TarSource(path))  # the size is ignored
    except ValueError as error:
        assert str(error).startswith(f"{path} ") and "tar file: " in str(error)


def test_a_chain_of_headers(tmp_path):
    """Each header belongs to the next one."""
    longname = header("x", 5, tarfile.GNUTYPE_LONGNAME) + content(b"name\0")
    path = write(tmp_path / "a.tar", longname * 2000, member("0.json"))
    with pytest.raises(ValueError, match=f"{path} .*recursion depth"):
        TarSource(path)


def test_a_long_name_is_kept_once(tmp_path):
    long = tarfile.TarInfo(f"{'x' * 30_000}.txt").tobuf(tarfile.GNU_FORMAT)
    path = write(tmp_path / "a.tar", long, *(member(f"{i}.json") for i in range(1000)))
    tracemalloc.start()
    source = TarSource(path)
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == 1001 and source[1].where == f"{path}:0"
    assert source[0].where == f"{path}:{'x' * 30_000}"
    assert kept < 500_000 and most < 5_000_000  # 30 MB if all names were padded to the longest


def test_a_member_longer_than_the_file(tmp_path):
    for size in (513, HUGE, 2**70):
        path = write(tmp_path / "a.tar", member("0.json"), header("1.json", size))
        path.write_bytes(path.read_bytes()[: 1536 + 512])
        with pytest.raises(ValueError, match=f"{path} .*tar file: .+"):
            TarSource(path)


def test_sparse_members_and_links_are_bad_records(tmp_path):
    sparse = header("1.jpg", 512, tarfile.GNUTYPE_SPARSE)
    sparse = sparse[:483] + b"\x80" + HUGE.to_bytes(11, "big") + sparse[495:]  # unpacked size
    checksum = sum(sparse[:148]) + 8 * 32 + sum(sparse[156:])
    sparse = sparse[:148] + b"%06o\0 " % checksum + sparse[156:]
    said = json.dumps({"conversations": CONVERSATION}).encode()
    path = write(
        tmp_path / "a.tar",
        *(member("0.json"), member("1.json", said), sparse + content(image(1))),
        *(member("2.jpg", image(2)), member("2.txt", b"a fox")),
        *(member("3.json", said), header("3.jpg", 0, tarfile.LNKTYPE, linkname="2.jpg")),
        *(member("4.json", said), header("4.jpg", 0, tarfile.SYMTYPE, linkname="/etc/passwd")),
        *(header("5.jpg", 0, tarfile.DIRTYPE), member("5.json")),
        *(header("6.npy", 0, tarfile.FIFOTYPE), member("6.txt")),
    )
    found = list(TarSource(path))
    assert_same(found[0], Record("text", text="a"))
    assert_same(found[2], Record("generation", text="a fox", images=(image(2),)))
    assert_same(found[5], Record("text", text="a"))
    for number in (1, 3, 4, 6):
        detail = "member.*regular file"
        assert_bad(found[number], "malformed", f"{path}:{number}", detail)


def test_names_and_pax_headers_as_tar_writes_them(tmp_path):
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path, name = tmp_path / f"{format}.tar", "\u732b" * 70 + "/" + "n" * 140
        with tarfile.open(path, "w", format=format) as tar:
            info = tarfile.TarInfo(f"{name}.json")
            info.size, info.pax_headers = len(TEXT), {"comment": "c" * 20_000}
            tar.addfile(info, io.BytesIO(TEXT))
        (record,) = TarSource(path)
        assert (record.text, record.where) == ("a", f"{path}:{name}")


def test_members_that_are_larger_than_any_image(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_files, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 500)
    path = write_tar(
        tmp_path / "a.tar",
        {
            "0.json": TEXT,
            "1.jpg": bytes(600),
            "1.png": bytes(600),
            "1.txt": b"a",
            "2.txt": b"a" * 501,
            "3.json": b" " * 501,
        },
    )
    found = list(TarSource(path))
    assert found[0].text == "a"
    rule = r"members.*\b1000\b.*\b1201\b"
    assert_bad(found[1], "malformed", f"{path}:1", rule)
    for number in (2, 3):
        rule = r"text.*\b500\b.*more"
        assert_bad(found[number], "malformed", f"{path}:{number}", rule)


def test_truncated_tars_are_refused(tmp_path):
    """Every truncated tar is refused, unless it ends with a complete member."""
    path = write_tar(tmp_path / "a.tar", {f"{i}.json": TEXT for i in range(3)})
    whole = path.read_bytes()
    for size in (1, 100, 511, 512, 520, 1023, 1024 + 100, 1024 + 512, 2048 + 600):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path} .*tar file: .+"):
            TarSource(path)
    path.write_bytes(whole[:2048])
    assert len(TarSource(path)) == 2


# JSONL


def test_a_line_that_never_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "_CHUNK_BYTES", 16)
    monkeypatch.setattr(reading, "MAX_TEXT_BYTES", 100)
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT + b"\n" + b" " * 300 + b"\n" + bytes(101) + b"\n" + TEXT + b"\n" + TEXT)
    source = JsonlSource(path)
    assert [source[i].text for i in (0, 2, 3)] == ["a"] * 3
    assert [record.where for record in source] == [f"{path}:{line}" for line in (1, 3, 4, 5)]
    rule = r"text.*\b100\b.*more"
    assert_bad(source[1], "malformed", f"{path}:3", rule)


def test_images_at_paths_that_never_end(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with (tmp_path / "sparse.png").open("wb") as file:
        file.truncate(100 * 2**30)
    paths = ["pipe.png", "/dev/zero", "sparse.png", "none.png", "a.jsonl/a.png", ".", "no\0path"]
    source = JsonlSource(
        write_lines(tmp_path / "a.jsonl", *({"caption": "a", "image": path} for path in paths))
    )
    regular, kind = ".*regular.*", "FIFO"
    details = [
        f"{tmp_path}/pipe.png {regular} {kind}",
        f"/dev/zero {regular} {kind}",
        rf"{tmp_path}/sparse.png .*\b{100 * 2**30}\b",
        f"no image at {tmp_path}/none.png",
        f"no image at {tmp_path}/a.jsonl/a.png",
        f"{tmp_path} {regular} folder",
        "null",
    ]
    for number, (record, detail) in enumerate(zip(source, details, strict=True), 1):
        missing = detail.startswith("no") or detail.endswith("folder")
        reason = "missing file" if missing else "unreadable file"
        assert_bad(record, reason, f"{tmp_path}/a.jsonl:{number}", detail)


@pytest.mark.parametrize("format", ["jsonl", "tar", "arrayrecord", "parquet"])
def test_sources_that_are_no_regular_files(format, tmp_path):
    path = tmp_path / f"a.{dict(arrayrecord='array_record').get(format, format)}"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"regular files.*{path}"):
        open_source(format, tmp_path)
    with pytest.raises(FileNotFoundError, match=f"neither.*{path}"):
        open_source(format, path)


def test_a_parquet_file_whose_footer_is_damaged(tmp_path):
    """pyarrow raises OSError for a damaged footer."""
    path = tmp_path / "a.parquet"
    write_records("parquet", path, [Record("text", text="a")])
    raw = bytearray(path.read_bytes())
    start = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    raw[start : start + 8] = b"\x0f" * 8
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"{path} .*Parquet file: .+") as error:
        open_source("parquet", path)
    assert "\n" not in str(error.value)


def test_small_parquet_files_that_unpack_to_a_lot(tmp_path):
    """A text stored once for many rows takes its memory once; other such groups are refused."""
    long, path = "a" * 10**6, tmp_path / "a.parquet"
    said = [{"role": "user", "content": long}, {"role": "assistant", "content": "b"}]
    for table in ({"text": [long] * 500}, {"messages": [said] * 500}):
        pq.write_table(pa.table(table), path)
        assert path.stat().st_size < 10**5
        source = open_source("parquet", path)
        with bounded(30, 2**28):
            assert long in (source[400].text or source[400].turns[0][0])
    indices = pa.array([[0] * 100_000] * 400, pa.list_(pa.int32()))
    columns = {"caption": ["a"] * 400, "indices": indices}
    for table, plain in ((columns, False), ({"text": [f"{i}{long}" for i in range(300)]}, True)):
        pq.write_table(pa.table(table), path, compression="zstd", use_dictionary=not plain)
        assert path.stat().st_size < 10**6
        source = open_source("parquet", path)
        with bounded(30, 2**28):
            assert_bad(source[7], "malformed", f"{path}:7", "unpacks")


def test_class_folders_with_files_that_never_end(tmp_path, monkeypatch):
    (tmp_path / "cat").mkdir()
    for name in ("a.png", "b.npy"):
        os.mkfifo(tmp_path / "cat" / name)
    for record, name in zip(open_source("class_folder", tmp_path), ("a.png", "b.npy"), strict=True):
        assert_bad(record, "unreadable file", f"{tmp_path}/cat/{name}", "regular")
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 10)
    (tmp_path / "names.txt").write_text("cat Felis catus\n")
    with pytest.raises(ValueError, match=r"names.txt.*\b10\b.*\b16\b"):
        open_source("class_folder", tmp_path, class_names=tmp_path / "names.txt")


def test_a_record_that_exhausts_the_memory_is_a_bad_one(tmp_path, monkeypatch):
    def exhausted(fields, read_image):
        raise MemoryError

    source = JsonlSource(write_lines(tmp_path / "a.jsonl", {"text": "a"}))
    monkeypatch.setattr(sources, "parse_record", exhausted)
    assert_bad(source[0], "malformed", f"{tmp_path}/a.jsonl:1", "MemoryError")


def test_a_npy_file_that_states_a_huge_shape(tmp_path):
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<i4", "fortran_order": False, "shape": (HUGE,)}
    )
    path = write_tar(tmp_path / "a.tar", {"0.npy": file.getvalue() + bytes(16), "0.txt": b"a"})
    assert_bad(TarSource(path)[0], "malformed", f"{path}:0", ".npy")
