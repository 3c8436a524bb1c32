"""Damaged and hostile .bin files: each is refused with a one-line error, or read correctly.

The test process has limits on time and memory; a file that exhausts them fails its test.
"""

import io
import pickle
import random
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
from limits import bounded

from janus_jax.interop.torch_pickle import read_torch_file
from janus_jax.interop.torch_zip import locate_members

SECONDS, MEMORY = 20, 600 * 10**6  # limits for one file


def values(path):
    with bounded(SECONDS, MEMORY):
        tensors = read_torch_file(path)
        return {name: (t.dtype, t.shape, t.read().tobytes()) for name, t in tensors.items()}


def refusal(path):
    with pytest.raises(ValueError) as error:
        values(path)
    message = str(error.value)
    assert f" {path}: " in message and "\n" not in message
    assert len(message) < len(str(path)) + 300
    return message


@pytest.fixture
def saved(tmp_path):
    """A small file written by torch with several storages, one of them empty."""
    path = tmp_path / "m.bin"
    state = {"a": torch.arange(12.0).reshape(3, 4).T, "b": torch.ones(5).bfloat16()}
    torch.save({**state, "empty": torch.zeros(0, 2)}, path)
    return path


def flips(path):
    """(byte, bit) of everything in a file except tensor data."""
    data = [m for name, m in locate_members(path).items() if "/data/" in name]
    spans = [range(member.offset, member.offset + member.size) for member in data]
    size = path.stat().st_size
    return [(i, bit) for i in range(size) if not any(i in s for s in spans) for bit in range(8)]


def check_flips(path, chosen):
    whole, before, equal = path.read_bytes(), values(path), 0
    for byte, bit in chosen:
        flipped = bytearray(whole)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            assert values(path) == before, (byte, bit)
            equal += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), (byte, bit)
    path.write_bytes(whole)
    return equal


def test_a_flipped_bit_is_refused_or_changes_nothing(saved):
    equal = check_flips(saved, random.Random(0).sample(flips(saved), 200))
    assert 20 < equal < 100  # padding, timestamps, and members that are not read


@pytest.mark.slow
def test_every_flipped_bit_is_refused_or_changes_nothing(saved):
    chosen = flips(saved)
    assert len(chosen) > 12_000
    check_flips(saved, chosen)


def test_a_flipped_length_in_a_local_header_is_refused(saved):
    """Each of these changes shifts a tensor's data within the file."""
    with zipfile.ZipFile(saved) as archive:
        header = next(i.header_offset for i in archive.infolist() if i.filename.endswith("data/0"))
    whole = saved.read_bytes()
    for bit in range(32):
        flipped = bytearray(whole)
        flipped[header + 26 + bit // 8] ^= 1 << bit % 8
        saved.write_bytes(flipped)
        assert re.search("zip (header|descriptor).*'m/data/0'", refusal(saved))


def members_of(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write(path, members, compressed=()):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            method = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            archive.writestr(name, data, method)


def with_pickle(path, data):
    write(path, {**members_of(path), "m/data.pkl": data})
    return path


@pytest.mark.parametrize("name", ["m/byteorder", "m/data.pkl", "m/data/0"])
def test_compressed_members_are_not_unpacked(saved, name):
    write(saved, {**members_of(saved), name: bytes(10**7)}, compressed=[name])
    assert saved.stat().st_size < 10**5
    assert f"'{name}' is compressed" in refusal(saved)


@pytest.mark.parametrize("name", ["m/byteorder", "m/data.pkl"])
def test_members_of_any_size_are_not_read(saved, name):
    write(saved, {**members_of(saved), name: bytes(2**24 + 1)})
    assert f"'{name}' has {2**24 + 1} bytes" in refusal(saved)


def test_overlapping_members_are_refused(saved):
    """The directory refers to the same data twice, like a zip bomb."""
    write(saved, members_of(saved))
    data = bytearray(saved.read_bytes())
    with zipfile.ZipFile(saved) as archive:
        first, second = archive.getinfo("m/data/0"), archive.getinfo("m/data/1")
    entry = data.rindex(b"m/data/1") - 46
    struct.pack_into("<I", data, entry + 42, first.header_offset)
    saved.write_bytes(data)
    assert f"got {first.header_offset}" in refusal(saved)
    struct.pack_into("<I", data, entry + 42, second.header_offset)
    saved.write_bytes(data)
    assert values(saved)


def test_a_directory_of_any_size_is_not_read(saved):
    data = saved.read_bytes()
    with saved.open("wb") as file:
        file.write(data[:64])
        file.truncate(2**31)  # sparse
        file.seek(0, io.SEEK_END)
        file.write(struct.pack("<4s4H2IH", b"PK\x05\x06", 0, 0, 1, 1, 2**31 - 64, 64, 0))
    assert f"directory has {2**31 - 64} bytes" in refusal(saved)


def test_sizes_beyond_32_bits_in_the_extra_field(saved, tmp_path):
    members = members_of(saved)
    path = tmp_path / "streamed.bin"
    with path.open("wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(data)
    assert values(path) == values(saved)


def test_files_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.arange(3.0)}, tmp_path / "m.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    np.testing.assert_array_equal(read_torch_file(tmp_path / "m.bin")["a"].read(), [0, 1, 2])


PUSHED = b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00at"
DOUBLED = b"\x80\x02)" + b"q\x00h\x00\x86" * 100
HOSTILE = {
    "memo index": b"\x80\x02)r\xff\xff\xff\x7f.",
    "memo index in text": b")p99999999999999999999\n.",
    "doubled persistent id": DOUBLED + b"Q.",
    "doubled key": b"\x80\x02}" + DOUBLED[2:] + b"Ns.",
    "doubled name": b"\x80\x04\x8c\x05torch" + DOUBLED[2:] + b"\x93.",
    "doubled value": b"\x80\x02}X\x01\x00\x00\x00a" + DOUBLED[2:] + b"s.",
    "doubled shape": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + DOUBLED[2:] + b"\x85R.",
    "doubled argument": b"\x80\x02ccollections\nOrderedDict\n" + DOUBLED[2:] + b"\x85R.",
    "nested tuples": b"\x80\x02)" + b"\x85" * 10**5 + b"Q.",
    "nested lists": b"\x80\x02" + b"]" * 10**5 + b"a" * 10**5 + b".",
    "its own item": b"\x80\x02]q\x00h\x00aQ.",
    "many values": b"\x80\x02" + b"}" * 2**21 + b".",
    "many marks": b"\x80\x02" + b"(" * 2**21 + b".",
    "long integer": b"\x80\x02\x8b\xff\xff\xff\x7f\x01.",
    "long text": b"\x80\x02X\xff\xff\xff\xff.",
    "longer text": b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f.",
    "bytearray": b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
    "frame": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
    "digits": b"I" + b"9" * 10**5 + b"\n.",
    "quoted": b"S" + b"9" * 10**5 + b"\n.",
    "extension": b"\x80\x02\x82\x01.",
    "new object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "unmarked": b"\x80\x02t.",
    "empty stack": b"\x80\x02q\x00.",
    "not in memo": b"\x80\x02h\x07.",
    "no value": b".",
    "tensor alone": PUSHED + b".",
    "persistent text": b"Pstorage\n.",
    "bytes that are no text": b"\x80\x02X\x01\x00\x00\x00\xff.",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_take_bounded_time_and_memory(saved, kind):
    refusal(with_pickle(saved, HOSTILE[kind]))


def tensor_pickle(shape, strides=(1,), offset=0, size=12):
    """Pickles {"a": a tensor of storage 0} from substitute classes."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), offset, shape, strides, False, {})
            return torch._utils._rebuild_tensor_v2, arguments

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Storage):
                return ("storage", torch.FloatStorage, "0", "cpu", size)

    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": Tensor()})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [
        ((2**40,), (0,), "larger than the file"),
        ((0, 2**62, 2**62), (1, 1, 1), "shape: (0, 4611686018427387904, 46"),
        ((1,) * 65, (1,) * 65, "shape: (1, 1, 1"),
        ((2**70,), (0,), "shape: (1180591620717411303424,)"),
        ((-1,), (1,), "shape: (-1,)"),
        ((True,), (1,), "shape: (True,)"),
        ("ab", (1, 1), "shape: 'ab'"),
        ((2,), (2**40,), "4398046511108 bytes"),
        ((2,), (1, 1), "strides (1, 1)"),
        ((2,), (-1,), "strides (-1,)"),
        ((2,), (2**70,), "strides (1180591620717411303424,)"),
    ],
)
def test_sizes_that_no_tensor_has(saved, shape, strides, message):
    assert message in refusal(with_pickle(saved, tensor_pickle(shape, strides)))
    assert values(with_pickle(saved, tensor_pickle((2, 3), (4, 1))))["a"][1] == (2, 3)


def test_long_names_are_cut(saved):
    name = "n" * 10**5
    message = refusal(with_pickle(saved, pickle.dumps({name: 1})))
    assert re.search(r"'n{20,80}\.\.\.n*': int$", message), message


def test_mutated_pickles_are_refused_or_read(saved):
    """The pickle has no checksum here; it must be refused or give tensors inside the file."""
    rng, members = random.Random(0), members_of(saved)
    data, refused = members["m/data.pkl"], 0
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            at = rng.randrange(len(mutated))
            end = at + rng.randrange(4)
            mutated[at:end] = bytes(rng.randrange(256) for _ in range(rng.randrange(4)))
        write(saved, members | {"m/data.pkl": bytes(mutated)})
        try:
            values(saved)
        except ValueError as error:
            refused += 1
            assert str(saved) in str(error) and "\n" not in str(error)
    assert refused > 200
