"""A checkpoint that cannot be written ends the run with a one-line error; earlier ones are kept."""

import errno
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from stage_configs import small_config, train_stage

from janus_jax.training import checkpoints
from janus_jax.training.metrics import METRICS, Log

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parents[1]
SETTINGS = dict(trained=r"gen_head\.", steps=3, save_every=1)
FULL = r"{}/checkpoints .*full.* 0\.1 MB.* \S+ [GM]B .*{}"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_room_for_a_checkpoint_is_checked_before_the_first_step(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=FULL.format(tmp_path, "no complete checkpoint")):
        train_stage(small_config(tmp_path, **SETTINGS))
    assert not names(tmp_path / "checkpoints") and METRICS not in names(tmp_path)


def test_the_disk_is_full_while_a_checkpoint_is_written(tmp_path, monkeypatch, capfd):
    write = checkpoints.write_sums

    def write_first(folder: Path) -> None:
        """Called in the thread that writes the checkpoint, for its last file."""
        if folder.name.startswith("1."):
            write(folder)
        else:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_sums", write_first)
    last = r"last complete checkpoint .*\b1\b"
    with pytest.raises(OSError, match=FULL.format(tmp_path, last)):
        train_stage(small_config(tmp_path, **SETTINGS))
    assert names(tmp_path / "checkpoints") == ["1"] and not (tmp_path / "model").exists()
    said, log = capfd.readouterr().err, (tmp_path / "libraries.log").read_text()
    assert "Traceback" not in said and "Traceback" in log and "No space left" in log


def test_a_log_that_cannot_be_written_is_named(tmp_path):
    with Log(tmp_path, 9, 1, None, 0, dict) as log:
        log.scalars(1, dict(loss=1.0), "eval")
        log._file.close()
        log._file = open("/dev/full", "wb", buffering=0)
        with pytest.raises(OSError, match=f"'{tmp_path}/{METRICS}'"):
            log.scalars(2, dict(loss=1.0), "eval")


SMALL_DISK = """
mount -t tmpfs -o size={} tmpfs {folder}
python train.py --config=tests/stage_configs.py --config.output={folder}/run --config.steps=8 \\
    '--config.trained=gen_head\\.' --config.save_every=1 --config.keep=9 2> {folder}.err
echo $? $(ls {folder}/run/checkpoints)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
@pytest.mark.parametrize("size", ["150k", "330k", "480k", "640k", "900k"])
def test_a_small_disk(size, tmp_path):
    """Depending on its size, the disk is full before, during or after writing a checkpoint."""
    folder = tmp_path / "disk"
    folder.mkdir()
    script = SMALL_DISK.format(size, folder=folder)
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    status, *steps = map(int, done.stdout.split())
    *_, last = said = Path(f"{folder}.err").read_text().splitlines()
    assert status == 2 and steps == list(range(1, len(steps) + 1))
    assert last.startswith("train.py: ") and "Traceback" not in "".join(said)
    assert re.search(rf"disk of .*last complete checkpoint .*\b{steps[-1]}\b", last)
