"""Atomic writing of folders: killed processes, late threads, two processes at once."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from janus_jax.interop import new_folder
from janus_jax.interop.load import open_folder
from janus_jax.interop.stored import stored_params

ROOT = Path(__file__).parents[1]
WRITER = """
import os, signal, sys, time
from pathlib import Path
from janus_jax.interop import new_folder
with new_folder.new_folder(Path(sys.argv[1]), overwrite=True) as beside:
    (beside / "config.json").write_text("new")
    (beside / "model.safetensors").touch()
    print("writing", flush=True)
    if sys.argv[2] == "hangs":
        time.sleep(60)
    rename = Path.rename
    def killed(self, target):
        if self == beside:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(self, target)
    Path.rename = killed
    new_folder._renameat2 = lambda: None
"""


def writer(folder, how):
    command = [sys.executable, "-c", WRITER, str(folder), how]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    return process


def write(folder, text="here", overwrite=True):
    with new_folder.new_folder(folder, overwrite) as beside:
        (beside / "config.json").write_text(text)
        (beside / "model.safetensors").touch()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    folder = tmp_path / "o"
    process = writer(folder, "hangs")
    try:
        partial = next(tmp_path.glob(".o.*.partial"))
        with pytest.raises(ValueError, match=r"process.* \S+/o\b"):
            write(folder)
        assert names(partial) == ["config.json", "model.safetensors"]
    finally:
        process.kill()
        process.wait(timeout=60)
    assert partial.is_dir()
    for name in (".other.0123abcd.partial", ".o.mine", ".o.0123abcd.partial.txt"):
        (tmp_path / name).mkdir()
    write(folder)
    assert names(tmp_path) == [".o.0123abcd.partial.txt", ".o.mine", ".other.0123abcd.partial", "o"]


def test_a_process_killed_between_two_renames_costs_nothing(tmp_path):
    folder = tmp_path / "o"
    write(folder, "old")
    process = writer(folder, "is killed")
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert not folder.exists() and len(names(tmp_path)) == 3
    with pytest.raises(FileExistsError):
        write(folder, overwrite=False)
    assert (folder / "config.json").read_text() == "old" and names(tmp_path) == ["o"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_is_replaced_whole(tmp_path, monkeypatch, exchanged):
    folder, seen = tmp_path / "o", []
    write(folder, "old")
    if not exchanged:
        monkeypatch.setattr(new_folder, "_renameat2", lambda: None)
    delete = new_folder._delete
    monkeypatch.setattr(new_folder, "_delete", lambda f: (seen.append(names(tmp_path)), delete(f)))
    write(folder, "new")
    assert (folder / "config.json").read_text() == "new" and names(tmp_path) == ["o"]
    kinds = [{Path(name).suffix.strip(".") or name for name in there} for there in seen]
    assert kinds[0] == {"lock", "o", "partial" if exchanged else "replaced"}


def test_a_rename_that_fails_restores_the_folder(tmp_path, monkeypatch):
    write(tmp_path / "o", "old")
    monkeypatch.setattr(new_folder, "_renameat2", lambda: None)
    rename = Path.rename

    def fails(self, target):
        if self.suffix == ".partial":
            raise OSError("it cannot be moved")
        rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="it cannot be moved"):
        write(tmp_path / "o", "new")
    assert (tmp_path / "o" / "config.json").read_text() == "old" and names(tmp_path) == ["o"]


def test_a_full_disk_names_the_folder(tmp_path):
    with pytest.raises(OSError, match=r"'\S+/o'"):
        with new_folder.new_folder(tmp_path / "o"):
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match=r"'\S+/o/a'"):
        with new_folder.new_folder(tmp_path / "o") as beside:
            (beside / "a").read_bytes()
    with pytest.raises(OSError, match=r"^told already$"), new_folder.new_folder(tmp_path / "o"):
        raise OSError("told already")


def test_threads_that_outlive_a_failed_write_leave_nothing(tmp_path):
    def write_on(folder):
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            (folder / "params").mkdir(parents=True, exist_ok=True)
            time.sleep(0.05)

    with pytest.raises(OSError, match="full"), new_folder.new_folder(tmp_path / "o") as beside:
        thread = threading.Thread(target=write_on, args=[beside])
        thread.start()
        raise OSError("full")
    thread.join()
    assert names(tmp_path) == []


def test_a_file_system_without_locks_keeps_what_may_be_alive(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(new_folder.fcntl, "flock", flock)
    (tmp_path / ".o.0123abcd.partial").mkdir()
    write(tmp_path / "o")
    assert names(tmp_path) == [".o.0123abcd.partial", "o"]


@pytest.mark.slow
def test_a_conversion_killed_at_any_moment_leaves_a_whole_folder_or_none(golden, tmp_path):
    """Also with --overwrite: the folder is always complete, the next conversion cleans up."""
    command = [sys.executable, "-m", "convert", "export", golden / "janus_small", tmp_path / "o"]
    command = [*map(str, command), "--layout", "deepseek", "--overwrite"]
    began = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - began
    shutil.rmtree(tmp_path / "o")
    for i in range(12):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(seconds * (0.5 + i / 20))
        process.kill()
        process.wait(timeout=60)
        if (tmp_path / "o").exists():
            stored = stored_params(open_folder(tmp_path / "o"))
            assert len(stored.metadata) > 100
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert names(tmp_path) == ["o"]
