"""Checkpoints of a run: trainable parameters, optimizer state and position in the data.

Orbax stores no checksums of array data, so a flipped bit would load as a different weight.
Therefore each checkpoint contains a list of SHA-256 sums, in the format of `sha256sum --check`.
"""

import contextlib
import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from janus_jax.orbax_errors import first_line, is_disk_full, reraise_as
from janus_jax.paths import atomic_write, read_json, size_text
from janus_jax.training.step import TrainState

PARTS = STATE, DATA = "state", "data"  # subfolders of a checkpoint
SUMS = "SHA256SUMS"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_LINE = re.compile(rf"([0-9a-f]{{64}})  ((?:{'|'.join(PARTS)})/\S+)")


class Checkpoints:
    """The checkpoints of a run, FOLDER/STEP, some of which may be damaged.

    Checkpoints are written in the background; leaving the context waits until they are complete.
    """

    def __init__(self, folder: Path, keep: int):
        """Renames damaged checkpoints that are newer than the newest undamaged one.

        Damaged checkpoints are never deleted, see `rename_damaged`. All processes must call this
        together.

        keep: number of newest checkpoints to keep. Renamed checkpoints do not count.
        Raises ValueError if all checkpoints are damaged.
        """
        self._folder, self._keep = Path(folder).resolve(), keep
        self._step: int | None = None  # of the latest save
        self._bytes = 0  # size of that checkpoint
        remove_unfinished(self._folder)
        rename_damaged_checkpoints(self._folder)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._add_sums),
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=PARTS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            reraise_as(self._write_error, self._manager.close)
        else:  # another error is being raised, maybe by the same save
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that is not known to be damaged."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts saving a checkpoint in the background.

        data: the state of the iterator over this process's rows.
        Raises OSError if the disk has no space for it, or if the previous save failed.
        """
        reraise_as(self._write_error, self._manager.wait_until_finished)
        self._step = int(state.step)
        self.check_disk_space(state)
        parts = dict(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(gather_data_states(data))
        )
        args = ocp.args.Composite(**parts)
        reraise_as(self._write_error, lambda: self._manager.save(self._step, args=args))

    def check_disk_space(self, state: TrainState) -> None:
        """Raises OSError if the disk has no space for a checkpoint of this state."""
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if jax.process_index() == 0 and shutil.disk_usage(self._folder).free < self._bytes:
            raise self._disk_full_error()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores the newest checkpoint.

        Damage to a checkpoint without checksums may only be detected here. A single process then
        restores the previous checkpoint instead.

        abstract: shapes, dtypes and shardings of the state.
        Returns the state, and the state of the iterators over the rows of all processes.
        Raises ValueError if the checkpoint has other parameters, or is damaged.
        """
        failed: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(step, abstract)
            except ValueError as error:
                failed[step] = str(error)
                if jax.process_count() > 1 or has_sums(self._folder / str(step)):
                    break
                continue
            if failed:
                self._manager.close()
                rename_damaged(self._folder, failed, step)
                self._manager = self._open()
            return restored
        newest, reason = next(iter(failed.items()))
        path, older = self._folder / str(newest), [*failed][1:]
        text = f"{path} does not match the parameters that this config trains, or is damaged"
        others = f" (the same is true of steps {older})" if older else ""
        raise ValueError(f"{text}: {reason}{others}")

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Restores one checkpoint. Raises ValueError with the reason if the checkpoint is bad."""
        parts = dict(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        args = ocp.args.Composite(**parts)
        restored = reraise_as(
            lambda error: ValueError(first_line(error)),
            lambda: self._manager.restore(step, args=args),
        )
        data = restored.data
        if not (isinstance(data, dict) and isinstance(data.get("settings"), dict)):
            raise ValueError(f"{DATA}/metadata must be a JSON object with settings")
        return restored.state, data

    def _add_sums(self) -> None:
        """Writes the checksums. Orbax calls this before it gives the checkpoint its name."""
        if jax.process_index() == 0:
            for folder in unfinished(self._folder, self._step):
                write_sums(folder)

    def _write_error(self, error: Exception) -> OSError:
        """Returns the OSError for a failure to write a checkpoint, and removes what was written."""
        if is_disk_full(error):
            failure = self._disk_full_error()
        else:
            folder = self._folder / str(self._step)
            failure = OSError(f"cannot write checkpoint {folder}: {first_line(error)}")
        remove_unfinished(self._folder, self._step)
        return failure

    def _disk_full_error(self) -> OSError:
        free = shutil.disk_usage(self._folder).free
        last = "there is no complete checkpoint yet"
        if self.newest is not None:
            last = f"the last complete checkpoint is step {self.newest}"
        return OSError(
            f"the disk of {self._folder} is full: a checkpoint needs {size_text(self._bytes)}, "
            f"{size_text(free)} are free; {last}; free some space and start the run again"
        )


def gather_data_states(data: dict[str, Any]) -> dict[str, Any]:
    """Merges the states of the streams of all processes; their settings are the same."""
    if jax.process_count() == 1:
        return data
    local = np.frombuffer(json.dumps(data).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(local)))
    length = 1 << int(sizes.max()).bit_length()  # a power of two: each new length is compiled
    padded = np.pad(local, (0, length - len(local)))
    texts = multihost_utils.process_allgather(padded)
    merged: dict[str, Any] = {}
    for text, size in zip(texts, sizes, strict=True):
        merged.update(json.loads(text[:size].tobytes()))
    return merged


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
        path = folder / str(step) / CHECKPOINT_METADATA
        try:
            if path.exists():
                read_json(path)
        except (ValueError, OSError) as error:
            path.rename(path.with_name(f"{CHECKPOINT_METADATA}.damaged"))
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
