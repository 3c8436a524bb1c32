"""Finds the smallest change that makes a job fit the memory of its devices."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

from janus_jax.aot.jobs import Draw, Job, Train
from janus_jax.aot.measure import Measurement, measure, report_nothing
from janus_jax.aot.topology import GPUS_PER_HOST, num_devices, smallest_topology

# The largest share of a GPU's memory for JAX; CUDA needs the rest.
MAX_GPU_MEMORY_FRACTION = 0.95
MAX_TRIES = 5  # changes that are compiled; each may take minutes


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a job.

    text: how a user makes it, such as "--max_batch 4".
    job: the changed job. memory_fraction: as for measure.
    scale: the estimated `added` memory after the change, divided by that before.
    """

    text: str
    job: Job
    memory_fraction: float
    scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Advice:
    """A change that was compiled and fits, or None if none of those tried does.

    tried: the changes that were compiled.
    """

    change: Change | None
    tried: tuple[str, ...]


def find_change(
    measured: Measurement, memory_fraction: float, report: Callable[[str], None] = report_nothing
) -> Advice:
    """Returns the smallest change that makes a job fit.

    Changes are estimated, and those that seem to fit are compiled, from the smallest one on.
    report: is called with a line of text before each change is compiled, and after each program.
    """
    tried = []
    for change in possible_changes(measured, memory_fraction):
        if not _seems_to_fit(measured, change):
            continue
        if len(tried) == MAX_TRIES:
            break
        tried.append(change.text)
        report(f"does not fit; trying {change.text}")
        if _fits(change, report):
            return Advice(change, tuple(tried))
    return Advice(None, tuple(tried))


def _fits(change: Change, report: Callable[[str], None]) -> bool:
    """Compiles a changed job. Returns whether it fits; a program that XLA refuses does not."""
    try:
        return measure(change.job, change.memory_fraction, report).fits
    except ValueError as error:
        report(str(error))
        return False


def _seems_to_fit(measured: Measurement, change: Change) -> bool:
    """Estimates whether a changed job fits."""
    try:
        held = sum(change.job.held().values())
    except ValueError:  # the mesh does not divide the heads or the batch
        return False
    available = change.job.facts.memory_bytes
    if change.job.facts.platform == "cuda":
        available *= change.memory_fraction
    return held + measured.added * change.scale <= available


def possible_changes(measured: Measurement, memory_fraction: float) -> Iterator[Change]:
    """Yields changes from small to large; some may not be possible."""
    job = measured.job
    change = functools.partial(Change, memory_fraction=memory_fraction)
    if job.facts.platform == "cuda" and memory_fraction < MAX_GPU_MEMORY_FRACTION:
        fraction = MAX_GPU_MEMORY_FRACTION
        text = f"--memory_fraction {fraction} (to run: XLA_PYTHON_CLIENT_MEM_FRACTION={fraction})"
        yield Change(text, job, fraction)
    if isinstance(job, Draw):
        for batch in range(job.batch - 1, 0, -1):
            changed = dataclasses.replace(job, max_batch=batch)
            if changed.batch == batch:  # others are rounded to equal chunks
                yield change(f"--max_batch {batch}", changed, scale=batch / job.batch)
    if isinstance(job, Train):
        yield from _train_changes(job, change)
    else:
        yield from _tensor_changes(job, change)


def _tensor_changes(job: Job, change) -> Iterator[Change]:
    """Yields meshes with more devices on the axis `tensor`."""
    tensor = job.mesh_sizes.get("tensor", 1)
    for times in (2, 4, 8, 16):
        mesh = job.mesh_sizes | dict(tensor=tensor * times)
        yield from _larger(job, mesh, change, 1 / times)


def _train_changes(job: Train, change) -> Iterator[Change]:
    """Yields more rematerialization, smaller microbatches, and more devices on the axis `fsdp`."""
    settings = {}
    if job.config.remat != "full":
        settings["remat"] = "full"
        yield change("--config.remat=full", _with(job, settings), scale=0.5)
    accumulate = job.config.accumulate
    while job.config.batch_size % (accumulate * 2) == 0:
        accumulate *= 2
        settings["accumulate"] = accumulate
        words = " ".join(f"--config.{name}={value}" for name, value in settings.items())
        yield change(words, _with(job, settings), scale=job.config.accumulate / accumulate)
    fsdp = job.mesh_sizes.get("fsdp", 1)
    for times in (2, 4, 8, 16):
        mesh = job.mesh_sizes | dict(fsdp=fsdp * times)
        yield from _larger(job, mesh, change, 1 / times)


def _with(job: Train, settings: dict) -> Train:
    """Returns the job with other settings."""
    config = job.config.copy_and_resolve_references()
    config.update(settings)
    return dataclasses.replace(job, config=config)


def _larger(job: Job, mesh: dict[str, int], change, scale: float) -> Iterator[Change]:
    """Yields the job on a larger mesh, if there are as many devices."""
    text = ",".join(f"{axis}={size}" for axis, size in mesh.items())
    larger = dataclasses.replace(job, mesh=text)
    in_config = isinstance(job, Train) and job.config.mesh
    words = f"--config.mesh={text}" if in_config else f"--mesh {text}"
    if job.facts.platform == "cuda":
        if larger.num_devices <= GPUS_PER_HOST * 8:
            yield change(words, larger, scale=scale)
        return
    if larger.num_devices > num_devices(job.facts, job.facts.topologies[-1]):
        return
    if job.topology and num_devices(job.facts, job.topology) < larger.num_devices:
        topology = smallest_topology(job.facts, larger.num_devices)
        larger = dataclasses.replace(larger, topology=topology)
        words += f" --topology {topology}"
    yield change(words, larger, scale=scale)
