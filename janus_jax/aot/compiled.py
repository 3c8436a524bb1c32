"""Compiles a jitted function for devices that need not be present, and states what it needs."""

import dataclasses
import math
import re
import time

import jax
from jax.stages import Compiled, Lowered

from janus_jax.orbax_errors import is_out_of_memory

# In XLA's messages about a program that does not fit, the size that it needs comes first.
_SIZE = re.compile(r"\b(\d+(?:\.\d+)?)([KMGT])\b")
_UNITS = dict(K=2**10, M=2**20, G=2**30, T=2**40)
# Without a device there is no autotuning, and XLA takes its default tiles for a matrix product in
# Triton, even if the product cannot have them. XLA then refuses the program with this message.
_NO_TILES = "output tile sizes"
_WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}


class DoesNotFitError(ValueError):
    """A compiler refused a program because the memory of the device is too small for it.

    part: name of the program. needed_bytes: the size that the compiler stated; None if it stated
      none.
    """

    def __init__(self, part: str, message: str):
        super().__init__(f"the program {part!r} does not fit: {message.splitlines()[0]}")
        size = _SIZE.search(message)
        self.part = part
        self.needed_bytes = int(float(size[1]) * _UNITS[size[2]]) if size else None


@dataclasses.dataclass(frozen=True)
class CompiledPart:
    """One of the compiled programs of a job, such as the prompt or the token loop of an image.

    All sizes are in bytes on each device.

    name: what the program does.
    trace_s, compile_s: seconds to trace it to StableHLO, and to compile that.
    cpu_s: CPU seconds of all threads while it was compiled, which depend less on other processes.
    is_decode_step: whether it decodes tokens: one, or one in each iteration of its token loop.
    inputs: its arguments other than parameters.
    temporaries: what XLA plans for intermediate values.
    outputs: its results, without those that replace a donated argument.
    code: the machine code in device memory.
    options: the options of the compiler that it needed, by name.
    compiled: the compiled program.
    """

    name: str
    trace_s: float
    compile_s: float
    cpu_s: float
    inputs: int
    temporaries: int
    outputs: int
    code: int
    options: dict[str, bool]
    compiled: Compiled
    is_decode_step: bool

    @property
    def added(self) -> int:
        """Bytes that running the program needs in addition to the parameters."""
        return self.inputs + self.temporaries + self.outputs + self.code

    @property
    def results(self):
        """The shapes of the results, with the shardings that the compiler chose."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            self.compiled.out_info,
        )


def compile_part(name: str, lower, inputs, is_decode_step: bool = False) -> CompiledPart:
    """Compiles a program.

    name: what the program does.
    lower: returns the lowered program.
    inputs: shapes of its arguments other than parameters, with shardings.
    is_decode_step: whether it decodes tokens.

    Raises:
        DoesNotFitError: the compiler says that the memory of the device is too small.
        ValueError: the compiler refuses the program for another reason.
    """
    start = time.monotonic()
    lowered: Lowered = lower()
    traced, cpu = time.monotonic(), time.process_time()
    try:
        compiled, options = _compile(lowered)
    except RuntimeError as error:  # XLA's errors are RuntimeErrors
        message = str(error)
        if is_out_of_memory(error) and "hbm" in message.lower():
            raise DoesNotFitError(name, message) from error
        reason = message.splitlines()[0]
        raise ValueError(f"XLA cannot compile the program {name!r}: {reason}") from error
    end = time.monotonic()
    sizes = compiled.memory_analysis()
    return CompiledPart(
        name=name,
        trace_s=traced - start,
        compile_s=end - traced,
        cpu_s=time.process_time() - cpu,
        inputs=device_bytes(inputs),
        temporaries=sizes.temp_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        options=options,
        compiled=compiled,
        is_decode_step=is_decode_step,
    )


def _compile(lowered: Lowered) -> tuple[Compiled, dict[str, bool]]:
    """Compiles a program. Returns it, and the options of the compiler that it needed."""
    try:
        return lowered.compile(), {}
    except RuntimeError as error:
        if _NO_TILES not in str(error):
            raise
    return lowered.compile(compiler_options=_WITHOUT_TRITON), _WITHOUT_TRITON


def device_bytes(tree) -> int:
    """Returns the bytes of a tree of arrays or shapes with shardings on one device."""
    leaves = jax.tree.leaves(tree)
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in leaves]
    sizes = zip(map(math.prod, shapes), leaves, strict=True)
    return sum(size * leaf.dtype.itemsize for size, leaf in sizes)
