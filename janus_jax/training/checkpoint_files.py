"""The folders of a run's checkpoints: which are whole, and what becomes of damaged ones.

Orbax stores no checksums of array data: a flipped bit loads as another weight. So each checkpoint
holds a list of SHA-256 sums, in the format of `sha256sum --check`.
"""

import hashlib
import itertools
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from janus_jax.paths import atomic_write
from janus_jax.processing.json_files import read_json

PARTS = STATE, DATA = "state", "data"  # subfolders of a checkpoint
SUMS = "SHA256SUMS"
METADATA = "_CHECKPOINT_METADATA"
_LINE = re.compile(rf"([0-9a-f]{{64}})  ((?:{'|'.join(PARTS)})/\S+)")


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or damaged, oldest first."""
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def remove_unfinished(folder: Path, step: int | str = "*") -> None:
    """Deletes what saves that were cut short have left, all or those of a step."""
    if jax.process_index() == 0:
        for path in unfinished(folder, step):
            shutil.rmtree(path, ignore_errors=True)


def unfinished(folder: Path, step: int | str) -> list[Path]:
    """The folders in which Orbax writes a checkpoint until it is whole."""
    return list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def write_sums(folder: Path) -> None:
    """Writes FOLDER/SHA256SUMS over all files of PARTS."""
    files = [path for part in PARTS for path in (folder / part).rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    lines = [f"{found}  {name}\n" for name, found in zip(names, _sums(folder, names), strict=True)]
    lines.append(f"# {len(lines)} files\n")  # so that a truncated list is detected
    with atomic_write(folder / SUMS) as file:
        file.write("".join(lines).encode())


def has_sums(folder: Path) -> bool:
    """Whether the checkpoint has a list of sums; those of earlier versions have none."""
    return (folder / SUMS).exists()


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files, such as "state/_METADATA is missing", or None.

    Without a list of sums the content of the files is not checked.
    """
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        return "it is empty" if not any(folder.iterdir()) else f"{missing[0]} is missing"
    if not has_sums(folder):
        return None
    try:
        *listed, last = (folder / SUMS).read_text("ascii").splitlines()
    except (OSError, ValueError):
        return f"{SUMS} cannot be read"
    lines = [_LINE.fullmatch(line) for line in listed]
    if None in lines or last != f"# {len(lines)} files":
        return f"{SUMS} is not a complete list of SHA-256 sums"
    names = [line[2] for line in lines]
    for name, line, found in zip(names, lines, _sums(folder, names), strict=True):
        if found is None:
            return f"{name} is missing or cannot be read"
        if found != line[1]:
            return f"{name} has changed since it was written"
    return None


def set_aside_damaged(folder: Path) -> None:
    """Renames the checkpoints newer than the newest whole one; see `set_aside`.

    Process 0 judges by the files, for all processes, which call this together.
    Raises ValueError if there are checkpoints, and all are damaged.
    """
    failed, whole = {}, None
    if jax.process_index() == 0:
        _set_aside_metadata(folder)
        for step in reversed(steps_in(folder)):
            reason = damage(folder / str(step))
            if reason is None:
                whole = step
                break
            failed[step] = reason
        if failed and whole is not None:
            set_aside(folder, failed, whole)
    lost = bool(failed) and whole is None
    if jax.process_count() > 1:
        lost = bool(multihost_utils.broadcast_one_to_all(np.array(lost)))
    if lost:
        reasons = [f"{step} ({reason})" for step, reason in failed.items()]
        listed = ", ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if reasons[3:] else "")
        raise ValueError(
            f"all checkpoints in {folder} are damaged: {listed or 'see process 0'}; restore one "
            "from a copy, or start a new run in another output folder"
        )


def _set_aside_metadata(folder: Path) -> None:
    """Renames Orbax's notes on a checkpoint where it could not read them; it needs none."""
    for step in steps_in(folder):
        path = folder / str(step) / METADATA
        try:
            if path.exists():
                read_json(path)
        except (ValueError, OSError) as error:
            path.rename(path.with_name(f"{METADATA}.damaged"))
            logging.warning("%s; renamed the file, which is not needed", error)


def set_aside(folder: Path, failed: Mapping[int, str], whole: int) -> None:
    """Renames damaged checkpoints, FOLDER/STEP to FOLDER/STEP.damaged, and says so.

    failed: why, by step. whole: the step that the run resumes from. Their steps are saved again as
    the run comes to them.
    """
    for step, reason in failed.items():
        endings = itertools.chain([""], map(str, itertools.count(2)))
        names = (folder / f"{step}.damaged{ending}" for ending in endings)
        to = next(name for name in names if not name.exists())
        (folder / str(step)).rename(to)
        logging.warning(
            "checkpoint %s is damaged: %s; renamed it to %s, resuming from step %d",
            folder / str(step), reason, to.name, whole,
        )


def _sums(folder: Path, names: Sequence[str]) -> list[str | None]:
    """None where there is no file, or the disk cannot read it."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_sum, [folder / name for name in names]))


def _sum(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:  # the file is not at fault
        raise
    except OSError:
        return None
