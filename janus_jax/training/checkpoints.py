"""What a run saves to go on from: trained parameters, optimizer state, place in the data."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from janus_jax.training.state import TrainState


class Checkpoints:
    """Whole checkpoints of a run, FOLDER/STEP; one that was cut short is not seen.

    Saves go on beside the training; leaving the context waits for them.
    """

    def __init__(self, folder: Path, keep: int):
        """keep: how many of the newest stay."""
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._folder = Path(folder).resolve()
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_names=("state", "data")
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest whole checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Begins to save; data: the state of this host's rows."""
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(of_all_hosts(data))
            ),
        )

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint: state with the shardings of `abstract`, and that of all rows.

        Raises ValueError if it holds other parameters, or is damaged.
        """
        try:
            found = self._manager.restore(
                self.newest,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore()
                ),
            )
        except Exception as error:  # Orbax and its storage raise many kinds, of many lines
            if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
                raise  # no fault of the checkpoint's
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(
                f"{self._folder / str(self.newest)} does not hold what this config trains, "
                f"or is damaged: {reason}"
            ) from error
        return found.state, found.data


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
