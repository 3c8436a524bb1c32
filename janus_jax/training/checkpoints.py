"""Checkpoints of a run: trainable parameters, optimizer state and position in the data."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from janus_jax.orbax_errors import first_line, is_disk_full, is_out_of_memory
from janus_jax.paths import size_text
from janus_jax.training.checkpoint_files import (
    DATA,
    PARTS,
    has_sums,
    remove_unfinished,
    rename_damaged,
    rename_damaged_checkpoints,
    unfinished,
    write_sums,
)
from janus_jax.training.step import TrainState


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
            with self._one_line_errors():
                self._manager.close()
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
        with self._one_line_errors():
            self._manager.wait_until_finished()
        self._step = int(state.step)
        self.check_disk_space(state)
        parts = dict(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(gather_data_states(data))
        )
        with self._one_line_errors():
            self._manager.save(self._step, args=ocp.args.Composite(**parts))

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
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**parts))
        except Exception as error:  # Orbax and its storage raise many types, with long messages
            if is_out_of_memory(error):
                raise  # not a problem of the checkpoint
            reason = first_line(error)
        else:
            data = restored.data
            if isinstance(data, dict) and isinstance(data.get("settings"), dict):
                return restored.state, data
            reason = f"{DATA}/metadata must be a JSON object with settings"
        raise ValueError(reason)  # not chained, as in _one_line_errors

    def _add_sums(self) -> None:
        """Writes the checksums. Orbax calls this before it gives the checkpoint its name."""
        if jax.process_index() == 0:
            for folder in unfinished(self._folder, self._step):
                write_sums(folder)

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turns an error while writing a checkpoint into an OSError with a one-line message."""
        failure: OSError | None = None
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                failure = self._disk_full_error()
            elif is_out_of_memory(error):
                raise
            else:
                folder = self._folder / str(self._step)
                failure = OSError(f"cannot write checkpoint {folder}: {first_line(error)}")
        if failure:  # not chained: the frames of the original error hold coroutines
            remove_unfinished(self._folder, self._step)
            raise failure

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
