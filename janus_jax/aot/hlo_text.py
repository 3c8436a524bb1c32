"""Reads the text of a compiled program: computations, instructions and shapes.

The text is what `compiled.as_text()` returns, XLA's optimized HLO for TPU, CUDA or CPU:

    %body (arg: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
      %arg = (s32[], /*index=1*/bf16[8,128]{1,0:T(8,128)S(1)}) parameter(0)
      %dot.1 = bf16[8,128]{1,0} fusion(%x, %w), kind=kLoop, calls=%fused, metadata={op_name="..."}
      ROOT %tuple = (s32[], bf16[8,128]{1,0}) tuple(%i, %dot.1)
    }

Reading the text needs neither JAX nor the compiler. Sizes are those of the program of one device.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_NAME = r"%?([^\s=(),{}]+)"
_COMPUTATION = re.compile(rf"(ENTRY )?{_NAME} \(.*\{{$")
_INSTRUCTION = re.compile(rf"  (ROOT )?{_NAME} = (.*)$", re.DOTALL)
_CALL = re.compile(r"(.*?) ([a-z][\w\-]*)\((.*)$", re.DOTALL)
_OPERAND = re.compile(r"%([^\s=(),{}]+)")
_ROLES = (
    "calls|to_apply|body|condition|true_computation|false_computation|called_computations|"
    "branch_computations"
)
_CALLED = re.compile(rf"(?:^|[\s,])({_ROLES})=(\{{[^}}]*\}}|%[^\s,]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ARRAY_OR_PAREN = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^}]*)\})?|[()]")
# Attributes that other code reads; an instruction that lacks them is read as opaque.
_REQUIRED = {
    "get-tuple-element": re.compile(r".*\bindex=\d", re.DOTALL),
    "parameter": re.compile(r"\d+\)"),
    "while": re.compile(r".*\bcondition=%.*\bbody=%", re.DOTALL),
}
_ANYTHING = re.compile("")
_BITS = re.compile(r"[a-z]+(\d+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """The shape of an array.

    dtype: XLA's name, such as bf16, f32, s4 or pred.
    dims: the dimensions.
    layout: the text of the layout, such as 1,0:T(8,128)(2,1)S(1): the order of the dimensions, the
        tiles of a TPU and the memory space.
    """

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def matrix_dims(self) -> tuple[int, ...]:
        """The dimensions greater than 1, sorted: the same for every transpose of a matrix."""
        return tuple(sorted(dim for dim in self.dims if dim > 1))

    @property
    def memory_space(self) -> int:
        """0 for the main memory of the device; others are faster, such as 1 for a TPU's VMEM."""
        found = re.search(r"S\((\d+)\)", self.layout)
        return int(found[1]) if found else 0

    @property
    def bits(self) -> int:
        """Bits of an element: those of the dtype, but at least 8 unless the layout states E(4).

        Tokens and opaque values take no memory.
        """
        if packed := re.search(r"E\((\d+)\)", self.layout):
            return int(packed[1])
        named = _BITS.match(self.dtype)
        return max(int(named[1]), 8) if named else {"pred": 8}.get(self.dtype, 0)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without the padding to the tiles of a TPU."""
        return -(-self.size * self.bits // 8)


Shape = Array | tuple["Shape", ...]


def parse_shape(text: str) -> Shape:
    """Reads a shape: `bf16[2,128]{1,0}`, or a tuple `(s32[], (f32[8], u8[0]))`, maybe nested.

    A bounded dynamic dimension `<=8` counts as its bound.
    """
    stack: list[list[Shape]] = [[]]
    for found in _ARRAY_OR_PAREN.finditer(text):
        if found[0] == "(":
            stack.append([])
        elif found[0] == ")" and len(stack) > 1:
            elements = tuple(stack.pop())
            stack[-1].append(elements)
        elif found[1]:
            dims = tuple(int(re.sub(r"\D", "", dim) or 0) for dim in found[2].split(",") if dim)
            stack[-1].append(Array(found[1], dims, found[3] or ""))
    return stack[0][0] if stack[0] else ()


def arrays(shape: Shape) -> Iterator[Array]:
    """Yields the arrays of a shape, in order."""
    if isinstance(shape, Array):
        yield shape
        return
    for element in shape:
        yield from arrays(element)


def num_bytes(shape: Shape) -> int:
    """Returns the bytes of all arrays of a shape."""
    return sum(array.bytes for array in arrays(shape))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction.

    name: its name in its computation, without the percent sign.
    opcode: such as fusion or all-gather-start; "opaque" if the text has an unknown form.
    operands: names of instructions of the same computation.
    literal: the text between the parentheses: the number of a parameter, the value of a constant.
    attributes: the text behind the parentheses.
    shape_text: the text of the shape of the result.
    is_root: whether its result is that of the computation.
    """

    name: str
    opcode: str
    operands: tuple[str, ...] = ()
    literal: str = ""
    attributes: str = ""
    shape_text: str = ""
    is_root: bool = False

    @functools.cached_property
    def shape(self) -> Shape:
        """Shape of the result."""
        return parse_shape(self.shape_text)

    @functools.cached_property
    def op_name(self) -> str:
        """Path of the JAX operation, such as jit(f)/while/body/attention/dot_general, or ""."""
        found = _OP_NAME.search(self.attributes)
        return re.sub(r"\\(.)", r"\1", found[1]) if found else ""

    @property
    def target(self) -> str:
        """The function that a custom call calls, or ""."""
        found = _TARGET.search(self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of the computations that it calls, by role: body, condition, to_apply, ..."""
        found = _CALLED.findall(self.attributes)
        return {role: tuple(_OPERAND.findall(names)) for role, names in found}

    def attribute(self, name: str) -> str:
        """Returns the number or word of an attribute, such as index=3 or kind=kLoop, or ""."""
        found = re.search(rf"(?:^|[\s,]){name}=([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A sequence of instructions, by name, in the order in which they are scheduled."""

    name: str
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        """The instruction whose result is that of the computation."""
        last = None
        for last in self.instructions.values():
            if last.is_root:
                return last
        return last

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions whose results an instruction of this computation reads."""
        found = (self.instructions.get(name) for name in instruction.operands)
        return [operand for operand in found if operand is not None]

    def parameters(self) -> list[Instruction]:
        """Returns the parameters, in the order in which they are passed."""
        found = [i for i in self.instructions.values() if i.opcode == "parameter"]
        return sorted(found, key=lambda parameter: int(parameter.literal))


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A compiled program: its computations by name, and the one that is run."""

    computations: dict[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction, *roles: str) -> list[Computation]:
        """Returns the computations that an instruction calls in the given roles; default: all."""
        return [
            self.computations[name]
            for role, names in instruction.called.items()
            if not roles or role in roles
            for name in names
        ]

    def all_instructions(self) -> Iterator[Instruction]:
        """Yields the instructions of all computations."""
        for computation in self.computations.values():
            yield from computation.instructions.values()


def parse(text: str) -> HloModule:
    """Reads the text of a compiled program.

    An instruction of an unknown form becomes one with the opcode "opaque".

    Raises:
        ValueError: if the text has no entry computation, or lacks a computation that is called.
    """
    computations, entry = {}, None
    for header, lines in _blocks(text):
        instructions = map(_instruction, _joined(lines))
        computation = Computation(header[2], {i.name: i for i in instructions})
        computations[computation.name] = computation
        entry = computation if header[1] else entry
    if entry is None:
        raise ValueError(f"expected the text of a compiled program, with ENTRY, got {text[:80]!r}")
    module = HloModule(computations, entry)
    called = {
        name for i in module.all_instructions() for names in i.called.values() for name in names
    }
    if missing := called - computations.keys():
        raise ValueError(f"the text of the program lacks the computations {sorted(missing)}")
    return module


def _blocks(text: str) -> Iterator[tuple[re.Match, list[str]]]:
    """Yields the header of each computation, and the lines between its braces."""
    header, lines = None, []
    for line in text.splitlines():
        if header is None:
            header, lines = _COMPUTATION.match(line), []
        elif line == "}" or line.startswith("}, execution_thread="):
            yield header, lines
            header = None
        else:
            lines.append(line)


def _joined(lines: list[str]) -> Iterator[str]:
    """Joins the lines of each instruction: strings in its attributes may contain line breaks."""
    parts: list[str] = []
    for line in lines:
        if parts and _INSTRUCTION.match(line):
            yield "\n".join(parts)
            parts = []
        parts.append(line)
    if parts:
        yield "\n".join(parts)


def _instruction(text: str) -> Instruction:
    named = _INSTRUCTION.match(text)
    if not named:
        return Instruction(name=text.strip(), opcode="opaque")
    call = _CALL.match(named[3])
    if not call or not _REQUIRED.get(call[2], _ANYTHING).match(call[3]):
        return Instruction(named[2], "opaque", is_root=bool(named[1]))
    inside, attributes = _split_call(call[3])
    literal = call[2] in ("constant", "parameter", "iota")
    return Instruction(
        name=named[2],
        opcode=call[2],
        operands=() if literal else tuple(_OPERAND.findall(inside)),
        literal=inside,
        attributes=attributes.lstrip(", "),
        shape_text=call[1],
        is_root=bool(named[1]),
    )


def _split_call(text: str) -> tuple[str, str]:
    """Splits `operands), attributes` at the parenthesis that closes the operands."""
    depth = 1
    for found in re.finditer(r'"(?:[^"\\]|\\.)*"|[()]', text):
        depth += {"(": 1, ")": -1}.get(found[0], 0)
        if depth == 0:
            return text[: found.start()], text[found.end() :]
    return text, ""
