"""Finds the loops of a compiled program, and how often each part of it runs."""

import dataclasses
import math
import re
from collections.abc import Iterator

from janus_jax.aot.hlo_text import Computation, HloModule, Instruction

# The scope of one decode step in generation/decoding.py.
DECODE_SCOPE = "decode_step"

_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Instructions that pass an array on.
_PASS = ("bitcast", "copy", "copy-start", "copy-done", "opt-barrier")


@dataclasses.dataclass(frozen=True)
class Loop:
    """A while loop.

    instruction: the while instruction.
    caller: the computation that contains it.
    body, condition: what it runs in every iteration.
    trip_count: the number of iterations, or None if it depends on data or is not found.
    """

    instruction: Instruction
    caller: Computation
    body: Computation
    condition: Computation
    trip_count: int | None


@dataclasses.dataclass(frozen=True)
class Visit:
    """A computation at one place where it is called.

    computation: the computation.
    loops: the loops around it, the outermost first.
    """

    computation: Computation
    loops: tuple[Loop, ...] = ()

    def is_inside(self, loop: Loop | None) -> bool:
        """Returns whether the computation runs in every iteration of the loop."""
        return loop is not None and any(x.instruction is loop.instruction for x in self.loops)

    def times(self, outside: Loop | None = None) -> int:
        """Returns how often it runs in one run of the program.

        A loop whose number of iterations is not known counts as one iteration.

        outside: a loop of which one iteration counts, instead of the program.
        """
        loops = list(self.loops)
        if self.is_inside(outside):
            names = [loop.instruction for loop in loops]
            loops = loops[names.index(outside.instruction) + 1 :]
        return math.prod(1 if loop.trip_count is None else loop.trip_count for loop in loops)


def in_scope(op_name: str, scope: str) -> bool:
    """Returns whether a path of an operation contains a named scope.

    Transformations wrap scopes: `jit(f)/transpose(jvp(scope))/dot_general` is in the scope, too.
    XLA joins the paths of operations that it combined with colons or semicolons.
    """
    return re.search(rf"(?:^|[/(:;]){re.escape(scope)}(?:[/):;]|$)", op_name) is not None


def walk(module: HloModule, start: Computation | None = None) -> Iterator[Visit]:
    """Yields each computation at each place where it is called, callers first.

    Branches of a conditional are all visited. Functions that an instruction applies to single
    elements, such as the sum of a reduction, are not.

    start: the computation to start from; default: the whole program.
    """
    yield from _walk(module, Visit(start or module.entry))


def _walk(module: HloModule, visit: Visit) -> Iterator[Visit]:
    yield visit
    for instruction in visit.computation.instructions.values():
        if instruction.opcode == "while":
            loop = loop_of(module, visit.computation, instruction)
            inside = (*visit.loops, loop)
            yield from _walk(module, Visit(loop.condition, inside))
            yield from _walk(module, Visit(loop.body, inside))
        else:
            for called in run_by(module, instruction):
                yield from _walk(module, Visit(called, visit.loops))


def run_by(module: HloModule, instruction: Instruction) -> list[Computation]:
    """Returns the computations that an instruction other than a loop runs once, or not at all."""
    if instruction.opcode in ("call", "conditional"):
        return module.called(instruction)
    if instruction.opcode.endswith(("-done", "-update")):  # what was started is named again
        return []
    return module.called(instruction, "calls", "called_computations")


def loop_of(module: HloModule, caller: Computation, instruction: Instruction) -> Loop:
    """Returns the loop of a while instruction."""
    (body,), (condition,) = (
        module.called(instruction, "body"),
        module.called(instruction, "condition"),
    )
    count = _trip_count(caller, instruction, body, condition)
    return Loop(instruction, caller, body, condition, count)


def token_loop(module: HloModule, scope: str = DECODE_SCOPE) -> Loop | None:
    """Returns the loop that generates one token per iteration, or None without such a loop.

    It is the outermost loop whose body has operations in the scope of a decode step. Loops inside
    that scope are skipped.
    """
    for visit in walk(module):
        for instruction in visit.computation.instructions.values():
            if instruction.opcode != "while" or in_scope(instruction.op_name, scope):
                continue
            loop = loop_of(module, visit.computation, instruction)
            if _has_scope(module, loop.body, scope):
                return loop
    return None


def _has_scope(module: HloModule, computation: Computation, scope: str) -> bool:
    return any(
        in_scope(instruction.op_name, scope)
        for visit in walk(module, computation)
        for instruction in visit.computation.instructions.values()
    )


def _trip_count(
    caller: Computation, instruction: Instruction, body: Computation, condition: Computation
) -> int | None:
    """Returns the trip count that XLA states, or that of a loop from one constant to another.

    The compiler for TPU states none. Such a loop has the condition i < end and adds a constant to
    i, an element of the tuple that the loop passes on: 1, or more if the compiler unrolled it.
    """
    if known := _TRIP_COUNT.search(instruction.attributes):
        return int(known[1])
    test = condition.root
    if test.opcode != "compare" or test.attribute("direction") != "LT":
        return None
    compared = condition.operands(test)
    if len(compared) != 2:
        return None
    passed = _Passed(caller, instruction, body)
    counter, end = (_source(condition, operand) for operand in compared)
    index = counter.attribute("index")
    step = passed.step(index) if index else None
    first, last = passed.element(index) if step else None, passed.value(condition, end)
    if first is None or last is None:
        return None
    return max(-((first - last) // step), 0)


@dataclasses.dataclass(frozen=True)
class _Passed:
    """The integers in the tuple that a loop passes from each iteration to the next.

    caller, instruction: the while instruction. body: what it runs.
    """

    caller: Computation
    instruction: Instruction
    body: Computation

    def element(self, index: str) -> int | None:
        """Returns the value of an element before the loop, or None if it is not a constant."""
        first = self.caller.operands(self.instruction)[0]
        if first.opcode != "tuple":
            return None
        element = self.caller.instructions[first.operands[int(index)]]
        return _constant(_source(self.caller, element))

    def value(self, computation: Computation, instruction: Instruction) -> int | None:
        """Returns the value that an instruction of the body or the condition always has, or None.

        It is a constant, or an element of the tuple that the body does not change.
        """
        source = _source(computation, instruction)
        if source.opcode != "get-tuple-element":
            return _constant(source)
        index = source.attribute("index")
        kept = self._next(index)
        is_kept = kept is not None and kept.attribute("index") == index
        return self.element(index) if is_kept else None

    def step(self, index: str) -> int | None:
        """Returns the positive constant that the body adds to an element, or None."""
        total = self._next(index)
        if total is None or total.opcode != "add":
            return None
        terms = [_source(self.body, term) for term in self.body.operands(total)]
        others = [term for term in terms if term.attribute("index") != index]
        step = self.value(self.body, others[0]) if len(others) == 1 else None
        return step if step is not None and step > 0 else None

    def _next(self, index: str) -> Instruction | None:
        """Returns the instruction that computes an element for the next iteration."""
        root = self.body.root
        if root.opcode != "tuple":
            return None
        return _source(self.body, self.body.instructions[root.operands[int(index)]])


def _source(computation: Computation, instruction: Instruction) -> Instruction:
    """Returns the instruction whose result is passed on, through copies and bitcasts."""
    while instruction.opcode in _PASS and computation.operands(instruction):
        instruction = computation.operands(instruction)[0]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    is_integer = instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal)
    return int(instruction.literal) if is_integer else None
