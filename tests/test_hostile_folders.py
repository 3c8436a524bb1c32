"""Weights and JSON files that are damaged, too large or not regular: one-line errors."""

import json
import logging
import os
import random
import re
import shutil
import struct
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from janus_jax.data.skipped import Skipped
from janus_jax.interop.load import open_folder, plan_folder
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.readers import MAX_HEADER, open_checkpoint, read_safetensors
from janus_jax.orbax_errors import library_log
from janus_jax.paths import MAX_JSON_BYTES, locked, read_json
from janus_jax.training.metrics import Log


def refusal(call, path, kind=ValueError):
    began = time.monotonic()
    with pytest.raises(kind) as error:
        call(path)
    message = str(error.value)
    assert "\n" not in message and len(message) < len(str(path)) + 400
    assert time.monotonic() - began < 20
    return message


def make_safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_a_header_has_at_most_the_bytes_that_the_library_allows(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MAX_HEADER + 1))
        file.truncate(10**11)  # sparse
    assert re.search(f"{path} .*header", refusal(read_safetensors, path))
    with pytest.raises(safetensors.SafetensorError), safetensors.safe_open(path, "np"):
        pass


@pytest.mark.parametrize(
    "fields",
    [
        {"dtype": "F32", "shape": "12", "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": "08"},
        {"dtype": "F32", "shape": [10**4000, 10**4000], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [1] * 65 + [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]},
        {"dtype": "x" * 10**5, "shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_sizes_that_no_tensor_has(tmp_path, fields):
    path = make_safetensors(tmp_path / "model.safetensors", {"a": fields}, bytes(8))
    assert str(path) in refusal(read_safetensors, path)


def test_long_names_are_cut(tmp_path):
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    for header in ({"n" * 10**5: {}}, {"n" * 10**5: fields}):
        path = make_safetensors(tmp_path / "model.safetensors", header, bytes(12))
        assert str(path) in refusal(read_safetensors, path)


NO_JSON = [b"[" * 10**5, b'{"a":' * 10**5, b'{"a": 1' + b"0" * 10**4, b"\xff"]


@pytest.mark.parametrize("text", NO_JSON)
def test_headers_and_files_that_are_no_json(tmp_path, text):
    path = make_safetensors(tmp_path / "model.safetensors", text)
    assert str(path) in refusal(read_safetensors, path)
    (tmp_path / "config.json").write_bytes(text)
    assert str(tmp_path / "config.json") in refusal(read_json, tmp_path / "config.json")


def test_a_flipped_bit_of_a_header_is_refused_or_renames(tmp_path):
    """The conversion plan refuses other names; offsets and shapes have only one valid value."""
    path = tmp_path / "model.safetensors"
    state = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    safetensors.numpy.save_file(state, path)
    whole = path.read_bytes()

    def values():
        tensors, _ = read_safetensors(path)
        return sorted((t.offset, t.dtype.str, t.shape) for t in tensors.values())

    before, equal = values(), 0
    bits = range(8 * (8 + int.from_bytes(whole[:8], "little")))
    for bit in random.Random(0).sample(bits, 400):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert values() == before, bit
            equal += 1
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), bit
    assert equal < 150


def not_regular(path, kind):
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else path.parent / "absent")
    return FileNotFoundError if kind == "dangling link" else ValueError


KINDS = ("fifo", "folder", "device", "dangling link")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_are_no_regular_file_are_not_opened(tmp_path, name, kind):
    error = not_regular(tmp_path / name, kind)
    message = refusal(open_checkpoint, tmp_path, error)
    found = "folder" if kind == "folder" else "FIFO, socket or device"
    pattern = {
        FileNotFoundError: f"{name}.*{tmp_path}.*link",
        ValueError: f"{tmp_path / name}.*regular.*{found}",
    }[error]
    assert re.search(pattern, message)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_or_a_shard_that_is_no_regular_file_is_not_opened(tmp_path, kind):
    index = tmp_path / "model.safetensors.index.json"
    error = not_regular(index, kind)
    assert "model.safetensors.index.json" in refusal(open_checkpoint, tmp_path, error)
    index.rmdir() if kind == "folder" else index.unlink()
    index.write_text(json.dumps({"weight_map": {"a": "1.safetensors"}}))
    error = not_regular(tmp_path / "1.safetensors", kind)
    assert "1.safetensors" in refusal(open_checkpoint, tmp_path, error)


@pytest.mark.parametrize("kind", KINDS)
def test_json_that_is_no_regular_file_is_not_opened(tmp_path, kind):
    error = not_regular(tmp_path / "config.json", kind)
    assert "config.json" in refusal(read_json, tmp_path / "config.json", error)


def test_json_of_any_size_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{}")
    os.truncate(path, 10**11)  # sparse
    limit = rf"{path}.*\b{MAX_JSON_BYTES}\b.*\b{10**11}\b"
    assert re.search(limit, refusal(read_json, path))


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "a/b", "n" * 10**5, "é" * 128])
def test_an_index_that_names_no_file_beside_it(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    assert re.search(f"{index} .*folder.*'", refusal(open_checkpoint, tmp_path))


def test_absent_shards_are_counted(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    names = {f"t{i}": f"{i:04d}\0.safetensors" for i in range(1000)}
    index.write_text(json.dumps({"weight_map": names}))
    message = refusal(open_checkpoint, tmp_path, FileNotFoundError)
    assert re.match(rf"1000 .*\b1000 .*{index}", message)
    assert "'0000\\x00.safetensors', " in message and message.endswith(", ...")


def test_a_file_that_became_shorter_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(9999)}, path)
    tensor = open_checkpoint(tmp_path).tensors["a"]
    os.truncate(path, 999)
    with pytest.raises(ValueError, match=f"{path} .*changed"):
        tensor.read()


def mutate(rng, data, end):
    """Flips a bit, deletes bytes, or inserts bytes that have a meaning in JSON."""
    data, at, kind = bytearray(data), rng.randrange(min(end, len(data))), rng.randrange(3)
    if kind == 0:
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at : at + rng.randrange(1, 9)]
    else:
        data[at:at] = bytes(rng.choice(b'0129-.,:{}[]"ae') for _ in range(rng.randrange(1, 4)))
    return data


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_mutated_folders_are_refused_by_name_or_read_as_they_were(golden, tmp_path, count):
    """Changes bits, lengths and JSON values of config.json and the weights' header."""
    folder = tmp_path / "m"
    shutil.copytree(golden / "janus_small", folder)
    files = [folder / "config.json", folder / "model.safetensors"]
    whole = {path: path.read_bytes() for path in files}
    header = 8 + int.from_bytes(whole[files[1]][:8], "little")

    def plan():
        source, plan = plan_folder(open_folder(folder))
        return {s.torch: (source.tensors[s.torch].offset, s.paths) for s in plan.steps}

    before, rng, refused = plan(), random.Random(0), 0
    for _ in range(count):
        path = rng.choice(files)
        path.write_bytes(mutate(rng, whole[path], header))
        try:
            assert plan() == before
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            assert str(folder) in str(error) and "\n" not in str(error)
        path.write_bytes(whole[path])
    assert refused > count / 3


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_a_lock_that_is_no_regular_file_is_not_opened(tmp_path, kind):
    other, lock = tmp_path / "other", tmp_path / "run" / "lock"
    other.write_text("what somebody needs")
    lock.parent.mkdir()
    make = {"link": lambda: lock.symlink_to(other), "FIFO": lambda: os.mkfifo(lock)}
    make.get(kind, lock.mkdir)()
    with pytest.raises(OSError, match=f"'{lock}'"), locked(lock.parent, "lock"):
        pass
    lock.rename(tmp_path / ".model.lock")
    with pytest.raises(OSError, match=r"\.model\.lock'"), new_folder(tmp_path / "model"):
        pass
    assert other.read_text() == "what somebody needs"


@pytest.mark.parametrize("kind", ["FIFO", "folder"])
def test_logs_of_a_run_that_are_no_regular_files_are_not_opened(tmp_path, kind):
    for name in ("metrics.jsonl", "skipped-000.jsonl"):
        (os.mkfifo if kind == "FIFO" else os.mkdir)(tmp_path / name)
    with pytest.raises(ValueError, match=r"metrics.jsonl.*regular"):
        Log(tmp_path, 9, 1, None, 0, dict)
    with pytest.raises(ValueError, match=r"skipped-000.jsonl.*regular"):
        Skipped(tmp_path / "skipped-000.jsonl", 0.1, {"a": 3})


def test_a_log_of_libraries_that_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "libraries.log")
    with library_log(tmp_path / "libraries.log"):
        where = "absl", logging.ERROR, "/x/orbax/checkpoint/a.py", 1
        logging.getLogger("absl").handle(logging.LogRecord(*where, "full", (), None))
