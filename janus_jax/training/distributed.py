"""Several processes that train one model: how they find each other, and how one that fails ends.

Each has some of the mesh's devices and reads its own part of every step's rows.
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
    """Joins the other processes, if there are any; comes before anything asks for a device.

    Args:
        coordinator: HOST:PORT where process 0 is found.
        num_processes, process_id: how many there are, and which one this is.
        detect: JAX knows all that from its surroundings: Cloud TPU, Slurm, Open MPI, Kubernetes.
    Raises:
        ValueError: values that do not go together. OSError: process 0 cannot listen at the port.
    A process that finds no process 0 within 300 s is aborted by JAX.
    """
    given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
    told = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
    if detect:
        if told:
            raise ValueError(f"distributed must be given alone, got {told} too")
        settings = {}
    elif not told:
        return
    else:
        if None in given.values():
            raise ValueError(f"{', '.join(given)} must be given together, got only {told}")
        _check(coordinator, num_processes, process_id)
        # or Slurm would have a say in which devices this process uses
        settings = dict(
            coordinator_address=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            cluster_detection_method="deactivate",
        )
    try:
        jax.distributed.initialize(**settings)
    except ValueError as error:  # only JAX knows whether it is in such surroundings
        where = "on Cloud TPU, Slurm, Open MPI or Kubernetes"
        raise ValueError(f"distributed must be used {where}, got none of them: {error}") from error


def _check(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if not 0 <= process_id < num_processes:
        asked = f"process_id={process_id} num_processes={num_processes}"
        raise ValueError(f"process_id must be in [0, num_processes), got {asked}")
    if process_id == 0:
        try:
            socket.create_server(("", int(port))).close()  # JAX 0.12 dies of a port in use
        except OSError as error:
            rule = "process 0 must be able to listen at the coordinator's port"
            raise OSError(f"{rule}, got {error.strerror} for {coordinator}") from error


def check_processes(mesh: Mesh) -> None:
    """Raises ValueError unless the mesh gives every process rows that no other process has, and all
    of them the same number."""
    parts, number = num_batch_shards(mesh), jax.process_count()
    rows = collections.defaultdict(set)
    for device, (part,) in batch_sharding(mesh).devices_indices_map((parts,)).items():
        rows[device.process_index].add(part.indices(parts)[0])
    # all parts are somewhere: if these numbers add up to all of them, none is in two places
    if [len(rows[process]) for process in range(number)] != [parts / number] * number:
        sizes = ",".join(f"{name}={size}" for name, size in mesh.shape.items())
        rule = f"mesh must give each of {number} processes rows of its own"
        raise ValueError(f"{rule}, data * fsdp a multiple of {number}, got {sizes}")


def check_shared(newest: int | None) -> None:
    """newest: the step of the newest checkpoint that this process sees, if any.

    Raises ValueError unless all processes see the same one: they would go on from several steps.
    """
    if jax.process_count() == 1:
        return
    seen = multihost_utils.process_allgather(np.array(-1 if newest is None else newest)).tolist()
    if len(set(seen)) > 1:
        told = ", ".join("none" if step < 0 else str(step) for step in seen)
        rule = "all processes must see one and the same output folder"
        raise ValueError(f"{rule}, got one with these newest checkpoints: {told}")


@contextlib.contextmanager
def leaves_at_once() -> Iterator[None]:
    """Ends this process, if it fails, without JAX's wait for the others at exit.

    They wait for this one inside a step, and would for as long as it is there (the wait ends after
    300 s); once it is gone they end too.
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
