"""Two processes with four devices each train as one process does; stopping and failures."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import multihost_worker
import numpy as np
import pytest
from jax.experimental import multihost_utils
from stage_configs import train_stage

from janus_jax.interop.load import open_folder
from janus_jax.interop.stored import stored_params
from janus_jax.training.distributed import check_processes, check_shared, initialize
from janus_jax.training.metrics import Log

pytestmark = pytest.mark.usefixtures("quick_compiles")  # as in the processes

ROOT = Path(__file__).parents[1]
WORKER = "tests/multihost_worker.py"
SECONDS = 600  # timeout of a process


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def environment(**more: str) -> dict[str, str]:
    flags = "--xla_force_host_platform_device_count=4"
    # on a busy machine the threads of a process may reach a collective at very different times
    flags += " --xla_cpu_collective_call_terminate_timeout_seconds=600"
    settings = dict(
        JAX_PLATFORMS="cpu",
        XLA_FLAGS=flags,
        JAX_DEFAULT_MATMUL_PRECISION="highest",
        JAX_DISABLE_MOST_OPTIMIZATIONS="1",  # compiling is most of the time
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]),
    )
    return os.environ | settings | more


def by_flags(port: int, process: int) -> tuple[list[str], dict[str, str]]:
    """Returns flags and environment of a process that is started with --coordinator."""
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--process_id={process}"]
    return flags, {}


def by_slurm(port: int, process: int) -> tuple[list[str], dict[str, str]]:
    """Returns flags and environment of a process that Slurm starts."""
    variables = dict(
        SLURM_JOB_ID="1",
        SLURM_STEP_NODELIST="localhost,other",
        SLURM_NTASKS="2",
        SLURM_PROCID=str(process),
        SLURM_LOCALID="0",
        JAX_COORDINATOR_PORT=str(port),
    )
    return ["--distributed"], variables


@contextlib.contextmanager
def two_processes(
    output: Path, slurm: bool = False, fails: str = "", **settings
) -> Iterator[list[subprocess.Popen]]:
    """Starts processes 0 and 1 of a run into `output`, and kills them when the context ends.

    slurm: whether they find each other through Slurm's variables instead of flags.
    """
    command = [sys.executable, WORKER, f"--config={WORKER}:{output}"]
    command += [f"--config.{name}={value}" for name, value in settings.items()]
    port, started = free_port(), []
    try:
        for process in range(2):
            flags, variables = by_slurm(port, process) if slurm else by_flags(port, process)
            settings = dict(cwd=ROOT, env=environment(FAILS=fails, **variables))
            with open(f"{output}.{process}.log", "w") as file:
                one = subprocess.Popen([*command, *flags], stdout=file, stderr=file, **settings)
            started.append(one)
        yield started
    finally:
        for one in started:
            one.kill()
            one.wait()


def ended(processes: list[subprocess.Popen], output: Path) -> list[tuple[int, str]]:
    """Waits for the processes; returns their exit statuses and output."""
    for one in processes:
        one.wait(SECONDS)
    said = [Path(f"{output}.{process}.log").read_text() for process in range(2)]
    return [(one.returncode, text) for one, text in zip(processes, said, strict=True)]


def assert_good(processes: list[subprocess.Popen], output: Path) -> None:
    for status, said in ended(processes, output):
        assert status == 0, said[-3000:]


def losses(output: Path) -> dict[int, float]:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def records(output: Path, processes: int) -> dict[int, list[list[str]]]:
    """Returns the records of each row by step, those of process 0 first."""
    found: dict[int, list[list[str]]] = {}
    for process in range(processes):
        for line in (output / f"records-{process}.jsonl").read_text().splitlines():
            step, rows = json.loads(line)
            found[step] = found.get(step, []) + rows
    return found


def saved_steps(output: Path) -> list[int]:
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir())


def train_here(output: Path, **settings) -> None:
    """Trains in this process, which has eight devices."""
    config = multihost_worker.get_config(str(output))
    config.update(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "step", multihost_worker.noting(output))
        train_stage(config)


def assert_same_run(one: Path, processes: int, other: Path, steps: range) -> None:
    """Compares losses and records; the other run is of one process."""
    found, expected = losses(one), losses(other)
    np.testing.assert_allclose(
        [found[step] for step in steps], [expected[step] for step in steps], rtol=1e-5
    )
    found, expected = records(one, processes), records(other, 1)
    assert [found[step] for step in steps] == [expected[step] for step in steps]
    assert all(len(found[step]) == 8 for step in steps)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of two processes, stopped by a SIGTERM to one of them."""
    output = tmp_path_factory.mktemp("runs") / "stopped"
    with two_processes(output, mesh="data=2,fsdp=4", steps=1000) as processes:
        until = time.monotonic() + SECONDS
        while not (output / "records-0.jsonl").exists():
            assert time.monotonic() < until
            assert processes[0].poll() is None and processes[1].poll() is None, ended(
                processes, output
            )
            time.sleep(0.1)
        processes[1].send_signal(signal.SIGTERM)
        assert_good(processes, output)
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory, stopped) -> Path:
    """An uninterrupted run on one device, three steps longer than the stopped one."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    train_here(output, mesh="data=1", steps=saved_steps(stopped)[-1] + 3, save_every=2, keep=1000)
    return output


def test_a_sigterm_to_one_of_two_processes_stops_both_at_one_step(stopped):
    (last,) = saved_steps(stopped)
    assert list(losses(stopped)) == list(range(1, last + 1))
    assert list(records(stopped, 2)) == list(range(1, last + 1))
    assert 1 < last < 1000 and not (stopped / "model").exists()


def test_two_processes_have_the_losses_and_records_of_one(stopped, whole):
    assert_same_run(stopped, 2, whole, range(1, saved_steps(stopped)[-1] + 1))


def test_one_process_continues_from_two(stopped, whole, tmp_path):
    """With eight devices."""
    (last,) = saved_steps(stopped)
    shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")
    shutil.copy(stopped / "run.json", tmp_path)
    train_here(tmp_path, mesh="fsdp=8", steps=last + 3)
    assert list(losses(tmp_path)) == list(range(last + 1, last + 4))
    assert_same_run(tmp_path, 1, whole, range(last + 1, last + 4))


def test_two_processes_continue_from_one_and_write_the_model(whole, tmp_path):
    """Started by Slurm, on another mesh; a damaged checkpoint is skipped."""
    output, last = tmp_path / "run", saved_steps(whole)[-1]
    shutil.copytree(whole / "checkpoints" / "2", output / "checkpoints" / "2")
    (output / "checkpoints" / "4").mkdir()
    shutil.copy(whole / "run.json", output)
    settings = dict(mesh="data=2,fsdp=4", steps=last)
    with two_processes(output, slurm=True, **settings) as processes:
        assert_good(processes, output)
    assert list(losses(output)) == list(range(3, last + 1))
    assert (output / "checkpoints" / "4.damaged").is_dir()
    assert_same_run(output, 2, whole, range(3, last + 1))
    one, other = (stored_params(open_folder(folder / "model")) for folder in (output, whole))
    for path in one.metadata:
        np.testing.assert_allclose(one.read(path), other.read(path), atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_two_processes_sample_as_one(tmp_path):
    """Compares the losses on held-out records and the generated images."""
    settings = dict(steps=1, eval_every=1, eval_batches=1, sample_every=1)
    one, other = tmp_path / "one", tmp_path / "other"
    with two_processes(one, mesh="fsdp=8", **settings) as processes:
        assert_good(processes, one)
    train_here(other, mesh="data=1", **settings)
    asked, expected = (
        json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
        for folder in (one, other)
    )
    assert asked == pytest.approx(expected, rel=1e-5) and "eval/generation" in asked
    drawn = Path("samples") / "0000001" / "prompt-0.png"
    assert (one / drawn).read_bytes() == (other / drawn).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_takes_the_other_along(failing, tmp_path):
    output = tmp_path / "run"
    settings = dict(mesh="fsdp=8", trained=r"gen_head\.")
    with two_processes(output, fails=str(failing), **settings) as processes:
        found = ended(processes, output)
    status, said = found[failing]
    assert status == 2
    message = f"train.py: records must be good, got bad ones in process {failing}"
    assert said.splitlines()[-1] == message
    assert found[1 - failing][0] != 0


@pytest.mark.slow
def test_each_process_must_have_rows_of_its_own(tmp_path):
    output = tmp_path / "run"
    with two_processes(output, mesh="tensor=4") as processes:
        for status, said in ended(processes, output):
            # process 1 may exit because of process 0 before it reports the error
            assert status < 0 or (status == 2 and re.search(r"mesh.*\b2\b", said))


def test_a_mesh_for_one_process_is_any(tmp_path):
    check_processes(jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), devices=jax.devices()[:1]))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("here:1", 2, None, False), "together.*coordinator=here:1, num_processes=2$"),
        ((None, None, 0, False), "together.* process_id=0$"),
        (("here:1", 2, 2, False), r"\[0, num_processes\).*process_id=2 num_processes=2"),
        (("here", 2, 0, False), "coordinator.*HOST:PORT.*'here'"),
        ((":80", 2, 0, False), "coordinator.*HOST:PORT.*':80'"),
        (("here:x", 2, 0, False), "coordinator.*HOST:PORT.*'here:x'"),
        (("here:1", 2, 0, True), "distributed.*coordinator=here:1"),
    ],
)
def test_flags_that_do_not_go_together(flags, message):
    with pytest.raises(ValueError, match=message):
        initialize(*flags)


def test_an_output_folder_that_is_not_shared(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    other = np.array(500)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, other]))
    check_shared(500)
    with pytest.raises(ValueError, match=r"output.*: none, 500"):
        check_shared(None)


def test_others_that_have_no_marker(monkeypatch):
    def unknown():
        raise ValueError("coordinator_address should be defined.")  # as JAX does

    monkeypatch.setattr(jax.distributed, "initialize", unknown)
    with pytest.raises(ValueError, match=r"distributed.*Cloud TPU.*none"):
        initialize(None, None, None, True)


def test_a_port_in_use_is_reported():
    with socket.create_server(("", 0)) as taken:
        address = f"localhost:{taken.getsockname()[1]}"
        with pytest.raises(OSError, match=f"coordinator={address}: "):
            initialize(address, 2, 0, False)


def test_one_process_joins_no_others():
    initialize(None, None, None, False)
    assert not jax.distributed.is_initialized()
