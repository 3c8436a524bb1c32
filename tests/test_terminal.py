"""Tests of signals and warnings of the commands, each run as a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# runs a command like `python -m`, then checks the signal handler and the warning filter
ASK = """
import contextlib, runpy, signal, sys
from PIL import Image
name = sys.argv.pop()
with contextlib.suppress(SystemExit):
    runpy.run_module(name, run_name="__main__")
assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
Image.MAX_IMAGE_PIXELS = 60
Image._decompression_bomb_check((10, 10))
"""
# sends itself SIGTERM while the weights are written
STOP = """
import os, runpy, signal, threading, time
def stop():
    while not any(thread.name == "async_save" for thread in threading.enumerate()):
        time.sleep(1e-4)
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=stop, daemon=True).start()
runpy.run_module("convert", run_name="__main__")
"""


def python(program: str, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", program, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("command", ["sample", "convert", "janus_jax.commands.tokenize_images"])
def test_sigterm_and_large_images(command):
    done = python(ASK, command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1 and "required" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])  # whether every line is written at once
def test_a_closed_pipe_ends_without_a_message(golden, unbuffered):
    command = [sys.executable, "-m", "convert", "inspect", str(golden / "janus")]
    env = os.environ | dict(PYTHONUNBUFFERED=unbuffered)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(command, cwd=ROOT, env=env, **pipes)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1


def test_without_stdout_nothing_is_printed(golden):
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "convert", "inspect"]
    done = subprocess.run([*command, str(golden / "janus")], cwd=ROOT, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")


def test_sigterm_leaves_nothing(golden, tmp_path):
    done = python(STOP, golden / "janus", tmp_path / "new" / "o")
    assert (done.returncode, done.stdout) == (143, "") and list(tmp_path.iterdir()) == []
