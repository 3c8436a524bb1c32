"""Checkpoint folders of a run: checksums, and handling of damaged checkpoints.

Orbax stores no checksums of array data, so a flipped bit would load as a different weight.
Therefore each checkpoint contains a list of SHA-256 sums, in the format of `sha256sum --check`.
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
    """Returns the steps of the checkpoints in a folder, including damaged ones, oldest first."""
    names = [path.name for path in folder.glob("*") if path.is_dir()]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def remove_unfinished(folder: Path, step: int | str = "*") -> None:
    """Deletes the folders of interrupted saves, of all steps or of one."""
    if jax.process_index() == 0:
        for path in unfinished(folder, step):
            shutil.rmtree(path, ignore_errors=True)


def unfinished(folder: Path, step: int | str) -> list[Path]:
    """Returns the temporary folders in which Orbax writes a checkpoint until it is complete."""
    return list(folder.glob(f"{step}.orbax-checkpoint-tmp*"))


def write_sums(folder: Path) -> None:
    """Writes FOLDER/SHA256SUMS with the checksums of all files in the subfolders PARTS."""
    files = [path for part in PARTS for path in (folder / part).rglob("*") if path.is_file()]
    names = sorted(path.relative_to(folder).as_posix() for path in files)
    digests = zip(_digests(folder, names), names, strict=True)
    lines = [f"{digest}  {name}\n" for digest, name in digests]
    lines.append(f"# {len(lines)} files\n")  # so that a truncated list is detected
    with atomic_write(folder / SUMS) as file:
        file.write("".join(lines).encode())


def has_sums(folder: Path) -> bool:
    """Whether the checkpoint has checksums; those of earlier versions have none."""
    return (folder / SUMS).exists()


def find_damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint ("state/_METADATA is missing"), or None.

    Without checksums the content of the files is not checked.
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
    for name, line, digest in zip(names, lines, _digests(folder, names), strict=True):
        if digest is None:
            return f"{name} is missing or cannot be read"
        if digest != line[1]:
            return f"{name} has changed since it was written"
    return None


def rename_damaged_checkpoints(folder: Path) -> None:
    """Renames the checkpoints that are newer than the newest undamaged one.

    See `rename_damaged`. All processes must call this together; process 0 checks the files.
    Raises ValueError if there are checkpoints and all of them are damaged.
    """
    failed, undamaged = {}, None
    if jax.process_index() == 0:
        _rename_unreadable_metadata(folder)
        for step in reversed(steps_in(folder)):
            reason = find_damage(folder / str(step))
            if reason is None:
                undamaged = step
                break
            failed[step] = reason
        if failed and undamaged is not None:
            rename_damaged(folder, failed, undamaged)
    all_damaged = bool(failed) and undamaged is None
    if jax.process_count() > 1:
        all_damaged = bool(multihost_utils.broadcast_one_to_all(np.array(all_damaged)))
    if all_damaged:
        reasons = [f"{step} ({reason})" for step, reason in failed.items()]
        listed = ", ".join(reasons[:3]) + (f" and {len(reasons) - 3} more" if reasons[3:] else "")
        raise ValueError(
            f"all checkpoints in {folder} are damaged: {listed or 'see process 0'}; restore one "
            "from a backup, or start a new run in another output folder"
        )


def _rename_unreadable_metadata(folder: Path) -> None:
    """Renames unreadable metadata files of Orbax, which it does not need to restore."""
    for step in steps_in(folder):
        path = folder / str(step) / METADATA
        try:
            if path.exists():
                read_json(path)
        except (ValueError, OSError) as error:
            path.rename(path.with_name(f"{METADATA}.damaged"))
            logging.warning("%s; renamed the file, which is not needed", error)


def rename_damaged(folder: Path, failed: Mapping[int, str], resume_step: int) -> None:
    """Renames damaged checkpoints, FOLDER/STEP to FOLDER/STEP.damaged, and logs a warning.

    The run saves these steps again when it reaches them.

    failed: reasons by step. resume_step: the step that the run resumes from.
    """
    for step, reason in failed.items():
        endings = itertools.chain([""], map(str, itertools.count(2)))
        names = (folder / f"{step}.damaged{ending}" for ending in endings)
        new_path = next(name for name in names if not name.exists())
        (folder / str(step)).rename(new_path)
        logging.warning(
            "checkpoint %s is damaged: %s; renamed it to %s, resuming from step %d",
            folder / str(step), reason, new_path.name, resume_step,
        )


def _digests(folder: Path, names: Sequence[str]) -> list[str | None]:
    """Returns the checksums of files, None for those that are missing or unreadable."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(_digest, [folder / name for name in names]))


def _digest(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError:  # not damage
        raise
    except OSError:
        return None
