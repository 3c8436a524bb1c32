"""A run that is killed repeatedly ends with the weights of an uninterrupted one (slow: minutes)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from janus_jax.interop.load import open_folder
from janus_jax.interop.stored import stored_params

ROOT = Path(__file__).parents[1]
KILLS = 20
STEPS = 200
COMMAND = [
    sys.executable,
    "train.py",
    "--config=tests/stage_configs.py",
    f"--config.steps={STEPS}",
    "--config.save_every=3",
    "--config.mesh=data=2,fsdp=2",
    "--config.batch_size=4",
]
ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
}


def start_run(output: Path, cache: Path) -> subprocess.Popen:
    environment = ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    command = [*COMMAND, f"--config.output={output}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


def lines(folder: Path) -> int:
    """Returns the number of logged steps."""
    path = folder / "metrics.jsonl"
    return path.read_text().count('"learning_rate"') if path.exists() else 0


def weights(folder: Path) -> dict[str, np.ndarray]:
    stored = stored_params(open_folder(folder))
    return {path: stored.read(path) for path in stored.metadata}


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_weights(tmp_path):
    whole, killed, cache = (tmp_path / name for name in ("whole", "killed", "cache"))
    assert start_run(whole, cache).wait(timeout=600) == 0
    rng, kills, saved = random.Random(0), 0, set()
    while kills < KILLS:
        logged = lines(killed)
        process = start_run(killed, cache)
        # some kills come before the first step of a start, some after several checkpoints
        until, steps = time.monotonic() + 300, rng.randrange(8)
        while lines(killed) < logged + steps and process.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3) if steps else rng.uniform(0, 8))
        process.send_signal(signal.SIGKILL)
        done = process.wait(timeout=60)
        assert done == -signal.SIGKILL, f"the run had ended before kill {kills + 1}: more steps"
        kills += 1
        saved |= {path.name for path in (killed / "checkpoints").glob("[0-9]*")}
    assert start_run(killed, cache).wait(timeout=600) == 0
    found, want = weights(killed / "model"), weights(whole / "model")
    assert found.keys() == want.keys()
    for path in want:
        np.testing.assert_array_equal(found[path], want[path], err_msg=path)
    assert lines(killed) == lines(whole) == STEPS
    assert len(saved) > 3, "kills came before anything was saved"
