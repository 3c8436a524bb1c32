"""Training with several processes: initialization, checks and exit after a failure.

Each process has some of the devices of the mesh and reads its own rows of every batch.
"""

import collections
import contextlib
import os
import socket
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from janus_jax.sharding import batch_sharding, num_batch_shards


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, detect: bool
) -> None:
    """Connects to the other processes, if any. Must be called before JAX uses a device.

    JAX aborts a process that cannot connect to process 0 within 300 s.

    Args:
        coordinator: HOST:PORT of process 0, or None.
        num_processes: number of processes, or None.
        process_id: index of this process, or None.
        detect: let JAX detect these values on Cloud TPU, Slurm, Open MPI or Kubernetes.
    Raises:
        ValueError: the arguments cannot be combined, or nothing was detected.
        OSError: process 0 cannot listen on the port.
    """
    values = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    given = ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)
    if detect:
        if given:
            raise ValueError(f"distributed cannot be combined with other flags, got {given}")
        settings = {}
    elif not given:
        return
    else:
        if None in values.values():
            raise ValueError(f"{', '.join(values)} must be given together, got only {given}")
        _check_values(coordinator, num_processes, process_id)
        # otherwise Slurm would influence which devices this process uses
        settings = dict(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:  # only JAX knows whether it runs on one of these
        rule = "distributed requires Cloud TPU, Slurm, Open MPI or Kubernetes, detected none"
        raise ValueError(f"{rule}: {error}") from error


def _check_values(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        values = f"process_id={process_id} num_processes={num_processes}"
        raise ValueError(f"process_id must be in [0, num_processes), got {values}")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()  # JAX 0.12 crashes if it is in use
        except OSError as error:
            reason = f"process 0 cannot listen on the port of coordinator={coordinator}"
            raise OSError(f"{reason}: {error.strerror}; choose another port") from error


def check_processes(mesh: Mesh) -> None:
    """Raises ValueError unless the mesh divides a batch into equal, disjoint parts per process."""
    parts, number = num_batch_shards(mesh), jax.process_count()
    rows = collections.defaultdict(set)
    for device, (part,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        rows[device.process_index].add(part.indices(parts)[0])
    # Every part is on at least one process, so equal shares mean that no two processes share one.
    if [len(rows[process]) for process in range(number)] != [parts / number] * number:
        sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
        rule = f"mesh must give each of the {number} processes its own rows"
        raise ValueError(f"{rule}: data * fsdp must be a multiple of {number}, got {sizes}")


def check_shared(newest: int | None) -> None:
    """Checks that all processes see the same output folder, so that they resume from one step.

    newest: the step of the newest checkpoint that this process sees, if any.
    Raises ValueError if the processes see different ones.
    """
    if jax.process_count() == 1:
        return
    seen = multihost_utils.process_allgather(np.array(-1 if newest is None else newest)).tolist()
    if len(set(seen)) > 1:
        steps = ", ".join("none" if step < 0 else str(step) for step in seen)
        rule = "all processes must see the same output folder"
        raise ValueError(f"{rule}, but their newest checkpoints are: {steps}")


@contextlib.contextmanager
def exit_without_waiting() -> Iterator[None]:
    """On an error, ends this process at once, without JAX's wait for the other processes at exit.

    The other processes wait for this one inside a step, and exit when it has exited. JAX would
    wait for them for up to 300 s.
    """
    try:
        yield
    except BaseException as error:
        if not jax.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        logging.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) else 1)
