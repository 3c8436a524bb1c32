"""Tests that a damaged Orbax folder raises a one-line exception and that nothing is logged."""

import errno
import gc
import logging
import os
import random
import shutil
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from janus_jax import orbax_errors
from janus_jax.interop import orbax


@pytest.fixture(scope="module")
def whole(golden, tmp_path_factory):
    """A small Orbax folder."""
    folder = tmp_path_factory.mktemp("orbax") / "o"
    params = {f"a.p{i}": np.full((64, 8), i, np.float32) for i in range(8)}
    orbax.save(folder, params, config={}, files_from=golden / "janus_small")
    return folder


@pytest.fixture
def damaged(whole, tmp_path, caplog, capfd, monkeypatch):
    """Reads a changed copy of the folder: expects a one-line exception and no other output."""
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)
    monkeypatch.setattr(threading, "excepthook", reports.append)

    def read_damaged(change):
        folder = tmp_path / "o"
        shutil.copytree(whole, folder)
        change(folder / "params")
        caplog.clear()
        capfd.readouterr()
        with pytest.raises(ValueError) as error:
            list(orbax.restore_numpy(folder, [f"a.p{i}" for i in range(8)]))
        gc.collect()
        assert (caplog.records, reports, capfd.readouterr().err) == ([], [], "")
        assert error.value.__context__ is None or error.value.__suppress_context__
        text = str(error.value)
        assert text.startswith(f"{folder / 'params'} is damaged") and "\n" not in text
        assert len(text) < 2 * len(str(folder)) + 250
        return text

    return read_damaged


def data_files(params):
    files = [path for path in params.rglob("d/*") if path.is_file()]
    assert files
    return files


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"tree_metadata": 1}'])
def test_a_list_of_parameters_that_cannot_be_read(damaged, text):
    message = damaged(lambda params: (params / "_METADATA").write_text(text))
    assert "list of parameters" in message


def test_a_list_of_parameters_that_is_missing_or_no_file(damaged, tmp_path):
    assert "no _METADATA in " in damaged(lambda params: (params / "_METADATA").unlink())
    shutil.rmtree(tmp_path / "o")

    def fifo(params):
        (params / "_METADATA").unlink()
        os.mkfifo(params / "_METADATA")

    assert "_METADATA" in damaged(fifo)


@pytest.mark.parametrize("kind", ["half", "missing", "zeros"])
def test_data_that_cannot_be_read(damaged, kind):
    def change(params):
        for path in data_files(params):
            size = path.stat().st_size
            if kind == "missing":
                path.unlink()
            else:
                path.write_bytes(bytes(size) if kind == "zeros" else path.read_bytes()[: size // 2])

    damaged(change)


def test_parameters_placed_on_devices_say_the_same(damaged, whole, tmp_path, caplog):
    stored = orbax.stored_shapes(whole)
    here = jnp.zeros(()).sharding
    wanted = {p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=here) for p, s in stored.items()}
    np.testing.assert_array_equal(orbax.restore(whole, wanted)["a.p3"], np.full((64, 8), 3))
    folder = tmp_path / "m"
    shutil.copytree(whole, folder)
    contents = {path: path.read_bytes() for path in data_files(folder / "params")}
    refused = 0
    for path, data in contents.items():  # some files are used for writing only and are not read
        path.write_bytes(data[: len(data) // 2])
        try:
            orbax.restore(folder, wanted)
        except ValueError as error:
            assert "params is damaged" in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(data)
    gc.collect()
    assert refused and not caplog.records


@pytest.mark.slow
def test_a_flipped_bit_is_refused_by_name_or_changes_nothing(whole, tmp_path, caplog, capfd):
    """Other names or shapes of parameters are errors of the model, not damage of the folder."""
    folder, rng = tmp_path / "o", random.Random(0)
    shutil.copytree(whole, folder)
    files = [path for path in (folder / "params").rglob("*") if path.stat().st_size > 0]
    files = [path for path in files if path.is_file()]
    stored, values = orbax.stored_shapes(folder), orbax.restore_numpy(folder)
    capfd.readouterr()
    for _ in range(200):
        path = rng.choice([*files, folder / "params" / "_METADATA"])
        data = path.read_bytes()
        flipped = bytearray(data)
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        try:
            if orbax.stored_shapes(folder) == stored:
                found = orbax.restore_numpy(folder)
                assert all(np.array_equal(found[name], values[name]) for name in stored)
        except ValueError as error:
            assert f"{folder / 'params'} is damaged" in str(error) and "\n" not in str(error)
        path.write_bytes(data)
    gc.collect()
    assert not caplog.records and capfd.readouterr().err == ""


def test_other_messages_of_a_program_pass(caplog, monkeypatch):
    reports = []
    monkeypatch.setattr(sys, "unraisablehook", reports.append)

    def fails():
        logging.getLogger("absl").error("mine")
        logging.getLogger("asyncio").error("future: <Task coro=<read() at /orbax/checkpoint/a.py>>")
        raise RuntimeError("first\nsecond")

    with pytest.raises(OSError, match=r"^it failed: first$"):
        orbax_errors.call(OSError, "it failed", fails)
    assert [record.getMessage() for record in caplog.records] == ["mine"]
    late = RuntimeError("Event loop is closed")
    for error in (late, RuntimeError("mine")):
        sys.unraisablehook(types.SimpleNamespace(exc_value=error, exc_traceback=None))
    assert [str(report.exc_value) for report in reports] == ["mine"]


def test_nothing_stays_after_a_success(monkeypatch):
    hooks = sys.unraisablehook, threading.excepthook
    assert orbax_errors.call(OSError, "", lambda: 3) == 3
    assert (sys.unraisablehook, threading.excepthook) == hooks
    assert orbax_errors.is_foreign not in logging.getLogger("absl").filters


def test_memory_that_runs_out_is_no_damage():
    def fails():
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        orbax_errors.call(OSError, "", fails)


def test_a_full_disk_is_not_out_of_memory():
    """The storage library reports a full disk as RESOURCE_EXHAUSTED, too."""
    full = ValueError("RESOURCE_EXHAUSTED: Error writing \"x\": No space left on device")
    wrapped = OSError("not written")
    wrapped.__cause__ = full
    for error in (full, wrapped, OSError(errno.EDQUOT, "")):
        assert orbax_errors.is_disk_full(error) and not orbax_errors.is_out_of_memory(error)
    device = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
    for error in (device, MemoryError()):
        assert orbax_errors.is_out_of_memory(error) and not orbax_errors.is_disk_full(error)
