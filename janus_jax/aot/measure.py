"""Compiles a job and collects the facts about it that a report states."""

import collections
import dataclasses
import importlib.metadata
from collections.abc import Callable
from typing import Any

import jax

from janus_jax.aot import hlo_facts, hlo_loops, hlo_weights
from janus_jax.aot.compiled import CompiledPart, DoesNotFitError
from janus_jax.aot.hlo_text import HloModule, parse
from janus_jax.aot.jobs import Job, Step

GPU_MEMORY_FRACTION = 0.75  # what JAX allocates of a GPU's memory by default
_WEIGHT_ARGUMENTS = ("model", "leaves")  # of image.advance_batch and text.advance_answers
_COMPILERS = {"tpu": ("libtpu",), "cuda": ("jax-cuda12-pjrt", "jax-cuda13-pjrt")}


@dataclasses.dataclass(frozen=True)
class PartFacts:
    """Facts about one of the compiled programs of a job.

    name, trace_s, compile_s, cpu_s, options: as in CompiledPart.
    added: bytes that running it needs on each device in addition to what is held.
    temporaries, code: how much of that is for intermediate values and for machine code.
    attention: the attention kernels of each part of the model, see hlo_facts.attention_kernels.
    collectives: kind -> (number, bytes on each device), of one run of the program or, for a program
      with a token loop, of one token.
    kernels: number of kernels of one token on a GPU, by kind; None without decode steps or a GPU.
    weight_copies: number of copies and conversions of weights, by description. Those before the
      token loop run once in each call of the program, the others for every token. None for a
      program without decode steps.
    """

    name: str
    trace_s: float
    compile_s: float
    cpu_s: float
    options: dict[str, bool]
    added: int
    temporaries: int
    code: int
    attention: dict[str, tuple[str, ...]]
    collectives: dict[str, tuple[int, int]]
    kernels: dict[str, int] | None = None
    weight_copies: dict[str, int] | None = None


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is known about a job after its programs were compiled.

    job: the job.
    held: bytes on each device before the programs run, by purpose.
    parts: the programs.
    available: bytes of the device's memory that may be used.
    step: what one decode step must read, or None.
    error: why a program could not be compiled, or None.
    """

    job: Job
    held: dict[str, int]
    parts: tuple[PartFacts, ...]
    available: int
    step: Step | None
    error: DoesNotFitError | None = None

    @property
    def added(self) -> int:
        """The largest number of bytes that one of the programs needs in addition to `held`."""
        sizes = [part.added for part in self.parts]
        if self.error is not None:
            sizes.append(max(0, (self.error.needed_bytes or 0) - sum(self.held.values())))
        return max(sizes, default=0)

    @property
    def total(self) -> int:
        """Bytes that the job needs on each device."""
        return sum(self.held.values()) + self.added

    @property
    def fits(self) -> bool:
        """Whether the job fits the memory."""
        return self.error is None and self.total <= self.available

    @property
    def floor_ms(self) -> float | None:
        """Milliseconds in which the device can read what a decode step must read."""
        if self.step is None:
            return None
        return 1000 * self.step.bytes / self.job.facts.memory_bytes_per_s


def report_nothing(text: str) -> None:
    """Ignores a line of text."""


def measure(
    job: Job,
    memory_fraction: float = GPU_MEMORY_FRACTION,
    report: Callable[[str], None] = report_nothing,
) -> Measurement:
    """Compiles the programs of a job and returns the facts.

    memory_fraction: share of a GPU's memory that JAX may use. A TPU's is all available.
    report: is called with a line of text after each program.

    Raises:
        ValueError: see Job.compile. A program that does not fit is the `error` of the result.
    """
    held, parts, error = job.held(), [], None
    available = job.facts.memory_bytes
    if job.facts.platform == "cuda":
        available = int(available * memory_fraction)
    try:
        for part in job.compile():
            parts.append(part_facts(job, part))
            report(f"compiled the program {part.name!r} in {part.compile_s:.0f} s")
    except DoesNotFitError as refused:
        error = refused
    return Measurement(job, held, tuple(parts), available, job.step(), error)


def part_facts(job: Job, part: CompiledPart) -> PartFacts:
    """Reads the facts from the text of a compiled program."""
    module = parse(part.compiled.as_text())
    facts = PartFacts(
        name=part.name,
        trace_s=part.trace_s,
        compile_s=part.compile_s,
        cpu_s=part.cpu_s,
        options=part.options,
        added=part.added,
        temporaries=part.temporaries,
        code=part.code,
        attention=hlo_facts.attention_kernels(module),
        collectives=hlo_facts.summarize(hlo_facts.collective_ops(module)),
    )
    if not part.is_decode_step:
        return facts
    return dataclasses.replace(facts, **_token_facts(job, module))


def _token_facts(job: Job, module: HloModule) -> dict[str, Any]:
    """Returns the facts about one token. A program without a loop computes one token."""
    loop = hlo_loops.token_loop(module)
    collectives = hlo_facts.collective_ops(module, loop)
    if loop is not None:
        collectives = [each for each in collectives if each.in_token_loop]
    kernels = None
    if job.facts.platform == "cuda" and loop is None:
        kernels = dict(hlo_facts.kernels(module, module.entry))
    elif job.facts.platform == "cuda":
        kernels = dict(hlo_facts.loop_kernels(module, loop))
    copies = hlo_weights.weight_copies(module, loop, prefix=_WEIGHT_ARGUMENTS)
    if loop is not None:
        copies = [copy for copy in copies if copy.place != hlo_weights.ELSEWHERE]
    return dict(
        collectives=hlo_facts.summarize(collectives),
        kernels=kernels,
        weight_copies=dict(collections.Counter(map(_copy_text, copies))),
    )


def _copy_text(copy: hlo_weights.WeightCopy) -> str:
    """Describes a copy of a weight in a few words, equal for all layers."""
    size = ",".join(map(str, copy.array.dims))
    verb = "conversion" if copy.is_conversion else "copy"
    places = {
        hlo_weights.IN_LOOP: ", for every token",
        hlo_weights.BEFORE_LOOP: ", in each call before its token loop",
        hlo_weights.ELSEWHERE: "",
    }
    place = places[copy.place]
    return f"{verb} to {copy.array.dtype}[{size}]{place}"


def versions(platform: str) -> dict[str, str]:
    """Returns the versions of jax and of the compiler for a platform."""
    found = {"jax": jax.__version__}
    for name in _COMPILERS[platform]:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
