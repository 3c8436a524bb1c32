"""Finds copies and conversions of weights in a compiled program.

A decode step should read each weight once, where it is used. XLA may instead write a weight again
in every step: converted to another dtype, with another layout, or cut out of a stack of layers.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

from janus_jax.aot.hlo_loops import Loop, Visit, loop_of, run_by
from janus_jax.aot.hlo_text import Array, HloModule, Instruction, Shape, arrays

IN_LOOP, BEFORE_LOOP, ELSEWHERE = "token loop", "before the loop", "elsewhere"

# Instructions whose result is their operand, in the same memory.
_ALIASES = {
    "add-dependency",
    "async-done",
    "async-update",
    "bitcast",
    "copy-done",
    "domain",
    "opt-barrier",
    "slice-done",
}
_PRODUCTS = {"dot", "convolution", "ragged-dot"}
_ALIAS_TARGETS = {"ConcatBitcast", "Sharding"}


@dataclasses.dataclass(frozen=True)
class WeightCopy:
    """An instruction that writes an array as large as a matrix that it reads from a weight.

    name, opcode: of the instruction.
    array: what it writes, on one device.
    is_conversion: whether the dtype differs from that of the weight.
    weights: paths of the weights, the op_name of their parameters.
    place: IN_LOOP; BEFORE_LOOP for a copy that is made before the token loop, and which the loop
        reads, so that it takes memory during the whole loop; or ELSEWHERE, such as in the prefill.
    times: how often it runs, see Visit.times: for IN_LOOP in one iteration of the token loop,
        otherwise in one run of the program.
    """

    name: str
    opcode: str
    array: Array
    is_conversion: bool
    weights: tuple[str, ...]
    place: str
    times: int


def weight_copies(
    module: HloModule, token_loop: Loop | None = None, prefix: str | tuple[str, ...] = "model"
) -> list[WeightCopy]:
    """Returns the instructions that copy or convert weights, in the order of the program.

    The weights are followed from the parameters of the program to all instructions that read them,
    through loops, calls and copies. An instruction is listed if it writes a matrix that is as large
    as the weight, or as the last two dimensions of a stack of weights, and is not a product. Only
    the results of a fusion count.
    A prefetch to a faster memory, such as the VMEM of a TPU, is not listed: it reads the weight as
    its use would. A conversion whose result is in that memory is.

    prefix: start, or starts, of the names of the parameters that are weights: an argument of the
        function that was compiled.
    """
    tracer = _Tracer(module, token_loop)
    weights = [_weight(parameter, prefix) for parameter in module.entry.parameters()]
    tracer.run(Visit(module.entry), weights)
    return [tracer.placed(number) for number in range(len(tracer.found))]


@dataclasses.dataclass(frozen=True)
class _Value:
    """An array that holds a weight, a part of it, or a copy.

    paths: the weights.
    unit: number of elements of one matrix of it.
    dtype: its dtype.
    copies: numbers of the copies that it went through.
    """

    paths: frozenset[str]
    unit: int
    dtype: str
    copies: frozenset[int] = frozenset()


# What is known of the result of an instruction: for an array the weight that it holds, or None.
_Known = _Value | None | tuple["_Known", ...]


def _weight(parameter: Instruction, prefix: str | tuple[str, ...]) -> _Value | None:
    shape = parameter.shape
    if not parameter.op_name.startswith(prefix) or not isinstance(shape, Array):
        return None
    if len(shape.matrix_dims) < 2:
        return None
    return _Value(frozenset([parameter.op_name]), math.prod(shape.dims[-2:]), shape.dtype)


def _values(known: _Known) -> Iterator[_Value]:
    """Yields the weights in a result."""
    if isinstance(known, _Value):
        yield known
    elif known is not None:
        for element in known:
            yield from _values(element)


@dataclasses.dataclass(frozen=True)
class _Read:
    """An instruction that reads weights.

    visit: where it runs.
    weights: the weights that it reads.
    other_size: number of elements of the largest array that it reads and that holds no weight.
    """

    visit: Visit
    instruction: Instruction
    weights: tuple[_Value, ...]
    other_size: int


class _Tracer:
    """Follows weights through a program, and collects their copies in `found`."""

    def __init__(self, module: HloModule, token_loop: Loop | None):
        self.module, self.token_loop = module, token_loop
        self.found: list[WeightCopy] = []
        self._read_by_loop: set[int] = set()

    def placed(self, number: int) -> WeightCopy:
        """Returns a copy, with its place."""
        copy = self.found[number]
        if copy.place == ELSEWHERE and number in self._read_by_loop:
            return dataclasses.replace(copy, place=BEFORE_LOOP)
        return copy

    def run(self, visit: Visit, arguments: Sequence[_Known]) -> _Known:
        """Follows the weights among the arguments of a computation; returns those in its result."""
        known: dict[str, _Known] = {}
        for instruction in visit.computation.instructions.values():
            operands = [known.get(name) for name in instruction.operands]
            if instruction.opcode == "parameter":
                known[instruction.name] = arguments[int(instruction.literal)]
            elif any(any(_values(operand)) for operand in operands):
                known[instruction.name] = self._result(visit, instruction, operands)
        root = visit.computation.root
        return known.get(root.name) if root else None

    def _result(self, visit: Visit, instruction: Instruction, operands: list[_Known]) -> _Known:
        """Returns the weights in the result of an instruction that reads at least one."""
        opcode = instruction.opcode
        if opcode == "tuple":
            return tuple(operands)
        if opcode == "get-tuple-element":
            return operands[0][int(instruction.attribute("index"))]
        if opcode in _ALIASES:
            return operands[0]
        if opcode == "while":
            return self._loop(visit, instruction, operands[0])
        if opcode in ("call", "async-start", "conditional"):
            return self._call(visit, instruction, operands)
        if _has_product(self.module, instruction):
            return None
        return self._written(_read(visit, instruction, operands), _result_shape(instruction))

    def _loop(self, visit: Visit, instruction: Instruction, passed: _Known) -> _Known:
        loop = loop_of(self.module, visit.computation, instruction)
        if self.token_loop and instruction is self.token_loop.instruction:
            self._read_by_loop |= {n for value in _values(passed) for n in value.copies}
        for computation in (loop.condition, loop.body):
            self.run(Visit(computation, (*visit.loops, loop)), [passed])
        return passed

    def _call(self, visit: Visit, instruction: Instruction, operands: list[_Known]) -> _Known:
        """Returns the weights in the result of a call, or of the last branch of a conditional."""
        result = None
        for number, called in enumerate(run_by(self.module, instruction)):
            is_branch = instruction.opcode == "conditional"
            arguments = operands[number + 1 : number + 2] if is_branch else operands
            result = self.run(dataclasses.replace(visit, computation=called), arguments)
        return result

    def _written(self, read: _Read, shape: Shape) -> _Known:
        """Returns the weights in what an instruction writes, after noting copies."""
        if not isinstance(shape, Array):
            return tuple(self._written(read, element) for element in shape)
        sources = [value for value in read.weights if value.unit <= shape.size]
        # what also reads another array of this size computes something else, such as a sum of
        # features and position embeddings
        if not sources or len(shape.matrix_dims) < 2 or read.other_size >= shape.size:
            return None
        value = _Value(
            paths=frozenset().union(*(source.paths for source in sources)),
            unit=min(source.unit for source in sources),
            dtype=shape.dtype,
            copies=frozenset().union(*(source.copies for source in sources)),
        )
        is_conversion = all(source.dtype != shape.dtype for source in sources)
        if shape.memory_space and not is_conversion:
            return value
        self.found.append(self._copy(read, shape, is_conversion, value.paths))
        return dataclasses.replace(value, copies=value.copies | {len(self.found) - 1})

    def _copy(
        self, read: _Read, array: Array, is_conversion: bool, paths: frozenset[str]
    ) -> WeightCopy:
        return WeightCopy(
            name=read.instruction.name,
            opcode=read.instruction.opcode,
            array=array,
            is_conversion=is_conversion,
            weights=tuple(sorted(paths)),
            place=IN_LOOP if read.visit.is_inside(self.token_loop) else ELSEWHERE,
            times=read.visit.times(self.token_loop),
        )


def _read(visit: Visit, instruction: Instruction, operands: list[_Known]) -> _Read:
    """Describes an instruction that reads weights. operands: the weights in its operands."""
    named = visit.computation.instructions
    others = [
        array.size
        for name, operand in zip(instruction.operands, operands, strict=True)
        if name in named and not any(_values(operand))
        for array in arrays(named[name].shape)
    ]
    weights = tuple(value for operand in operands for value in _values(operand))
    return _Read(visit, instruction, weights, max(others, default=0))


def _result_shape(instruction: Instruction) -> Shape:
    """Returns the shape of the result; asynchronous copies start with a tuple of more."""
    place = {"copy-start": 0, "slice-start": 1}.get(instruction.opcode)
    return instruction.shape if place is None else instruction.shape[place]


def _has_product(module: HloModule, instruction: Instruction) -> bool:
    """Returns whether an instruction multiplies matrices, or calls a library, which may do so."""
    if instruction.opcode == "custom-call":
        return instruction.target not in _ALIAS_TARGETS
    if instruction.opcode != "fusion":
        return instruction.opcode in _PRODUCTS
    return any(
        _has_product(module, inside)
        for called in run_by(module, instruction)
        for inside in called.instructions.values()
    )
