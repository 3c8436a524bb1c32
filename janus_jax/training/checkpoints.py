"""What a run saves to go on from: trained parameters, optimizer state, place in the data."""

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
    set_aside,
    set_aside_damaged,
    unfinished,
    write_sums,
)
from janus_jax.training.state import TrainState


class Checkpoints:
    """Checkpoints of a run, FOLDER/STEP; the newest ones may be damaged.

    Saves go on beside the training; leaving the context waits for them.
    """

    def __init__(self, folder: Path, keep: int):
        """keep: how many of the newest stay. Checkpoints that were set aside do not count.

        Damaged checkpoints newer than the newest whole one are renamed, never deleted: see
        `set_aside`. All processes call this together.

        Raises ValueError if all checkpoints are damaged.
        """
        self._folder, self._keep = Path(folder).resolve(), keep
        self._step: int | None = None  # of the latest save
        self._bytes = 0  # of that checkpoint
        remove_unfinished(self._folder)
        set_aside_damaged(self._folder)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._seal),
        )
        return ocp.CheckpointManager(self._folder, options=options, item_names=PARTS)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            with self._one_error():
                self._manager.close()
        else:  # another error is under way, maybe that of the same save
            with contextlib.suppress(Exception):
                self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint that is not known to be damaged."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to save; data: the state of this host's rows.

        Raises OSError if this one has no room on the disk, or the one before was not written.
        """
        with self._one_error():
            self._manager.wait_until_finished()
        self._step = int(state.step)
        self.check_room(state)
        parts = dict(
            state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(of_all_hosts(data))
        )
        with self._one_error():
            self._manager.save(self._step, args=ocp.args.Composite(**parts))

    def check_room(self, state: TrainState) -> None:
        """Raises OSError if the disk has no room for a checkpoint of this state."""
        self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if jax.process_index() == 0 and shutil.disk_usage(self._folder).free < self._bytes:
            raise self._full()

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint: state with the shardings of `abstract`, and that of all rows.

        One without a list of sums may prove damaged only now: a single process then goes on to the
        one before.

        Raises ValueError if it holds other parameters, or is damaged.
        """
        failed: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                found = self._restore(step, abstract)
            except ValueError as error:
                failed[step] = str(error)
                if jax.process_count() > 1 or has_sums(self._folder / str(step)):
                    break
                continue
            if failed:
                self._manager.close()
                set_aside(self._folder, failed, step)
                self._manager = self._open()
            return found
        newest, reason = next(iter(failed.items()))
        text = f"{self._folder / str(newest)} does not hold what this config trains, or is damaged"
        others = f" (nor do those of steps {[*failed][1:]})" if len(failed) > 1 else ""
        raise ValueError(f"{text}: {reason}{others}")

    def _restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Raises ValueError, with the reason alone, where that is the checkpoint's fault."""
        parts = dict(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=ocp.args.Composite(**parts))
        except Exception as error:  # Orbax and its storage raise many kinds, of many lines
            if is_out_of_memory(error):
                raise  # the checkpoint is not at fault
            reason = first_line(error)
        else:
            if isinstance(found.data, dict) and isinstance(found.data.get("settings"), dict):
                return found.state, found.data
            reason = f"{DATA}/metadata must hold an object with settings"
        raise ValueError(reason)  # without the error before, as in _one_error

    def _seal(self) -> None:
        """Adds the list of sums, before the checkpoint gets its name; called by Orbax."""
        if jax.process_index() == 0:
            for folder in unfinished(self._folder, self._step):
                write_sums(folder)

    @contextlib.contextmanager
    def _one_error(self) -> Iterator[None]:
        """Raises what goes wrong while a checkpoint is written as an OSError of one line."""
        failure: OSError | None = None
        try:
            yield
        except Exception as error:
            if is_disk_full(error):
                failure = self._full()
            elif is_out_of_memory(error):
                raise
            else:
                folder = self._folder / str(self._step)
                failure = OSError(f"cannot write checkpoint {folder}: {first_line(error)}")
        if failure:  # raised here, without the error before, whose frames hold coroutines
            remove_unfinished(self._folder, self._step)
            raise failure

    def _full(self) -> OSError:
        free = shutil.disk_usage(self._folder).free
        last = "there is no whole checkpoint yet"
        if self.newest is not None:
            last = f"the last whole checkpoint is step {self.newest}"
        return OSError(
            f"the disk of {self._folder} is full: a checkpoint needs {size_text(self._bytes)}, "
            f"{size_text(free)} are free; {last}; free some space and start the run again"
        )


def of_all_hosts(data: dict[str, Any]) -> dict[str, Any]:
    """The states of the streams of every host in one; the settings are the same on all."""
    if jax.process_count() == 1:
        return data
    own = np.frombuffer(json.dumps(data).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(own)))
    room = 1 << int(sizes.max()).bit_length()  # of few sizes: each new one is compiled
    padded = np.pad(own, (0, room - len(own)))
    texts = multihost_utils.process_allgather(padded)
    found: dict[str, Any] = {}
    for text, size in zip(texts, sizes, strict=True):
        found.update(json.loads(text[:size].tobytes()))
    return found
