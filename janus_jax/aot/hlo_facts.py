"""Facts from the text of a compiled program: kernels, collectives and attention kernels."""

import collections
import dataclasses
import math
import re

from janus_jax.aot.hlo_loops import Loop, Visit, in_scope, loop_of, run_by, walk
from janus_jax.aot.hlo_text import Computation, HloModule, Instruction, Shape, num_bytes

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Instructions that no kernel runs: they pass values on, or are constants of the program.
_NO_KERNEL = {
    "add-dependency",
    "after-all",
    "async-update",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
_NO_KERNEL_TARGETS = {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound", "Sharding"}
# What a custom call or the backend config of a fusion names -> the kind of kernel.
_LIBRARIES = (
    ("__cudnn$fmha", "cuDNN attention"),
    ("__cudnn", "cuDNN"),
    ("__cublas", "cuBLAS"),
    ("__triton_nested_gemm", "Triton matmul"),
    ("__triton_gemm", "Triton matmul"),
    ("triton", "Triton"),
    ("mosaic_gpu", "Mosaic GPU"),
    ("tpu_custom_call", "Pallas"),
)
# {{0,1},{2,3}} or [2,2]<=[4]: two groups of two devices; or the same by the axes of a mesh
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\]\s*\{(.*?)\})")
_AXIS_SIZE = re.compile(r"('[^']*')=(\d+)")
_AXIS = re.compile(r"('[^']*')(?::\(\d+\)(\d+))?")  # with the size of a part of an axis


def kernels(module: HloModule, computation: Computation) -> collections.Counter[str]:
    """Counts the kernels that a GPU launches in one execution of a computation, by kind.

    A fusion, a library call, a copy, a collective and any other instruction that computes something
    count as one kernel each. Instructions that only pass values on do not count. Calls and command
    buffers are followed. A conditional counts as the branch with most kernels. A loop counts as
    often as it runs, or once if that depends on data. A library call counts as one kernel even if
    the library launches several, as it does to sort.

    Kinds: "Triton matmul", "Triton", "cuBLAS", "cuDNN", "cuDNN attention", "Mosaic GPU", "fusion",
    the name of another custom call or custom fusion, or the opcode. For TPU and CPU the numbers are
    not those of launches.
    """
    counts: collections.Counter[str] = collections.Counter()
    for instruction in computation.instructions.values():
        counts += _kernels_of(module, computation, instruction)
    return counts


def loop_kernels(module: HloModule, loop: Loop) -> collections.Counter[str]:
    """Counts the kernels of one iteration of a loop, see `kernels`.

    If the number of iterations depends on data, the condition is computed on the device and counts,
    too.
    """
    counts = kernels(module, loop.body)
    return counts if loop.trip_count is not None else counts + kernels(module, loop.condition)


def _kernels_of(
    module: HloModule, caller: Computation, instruction: Instruction
) -> collections.Counter[str]:
    opcode = instruction.opcode
    if opcode in _NO_KERNEL or opcode.endswith("-done"):
        return collections.Counter()
    if opcode == "while":
        loop = loop_of(module, caller, instruction)
        once = loop_kernels(module, loop)
        return collections.Counter({kind: n * (loop.trip_count or 1) for kind, n in once.items()})
    if opcode == "conditional":
        branches = [kernels(module, branch) for branch in run_by(module, instruction)]
        return max(branches, key=lambda counts: counts.total(), default=collections.Counter())
    if opcode in ("call", "async-start"):
        inside = (kernels(module, called) for called in run_by(module, instruction))
        return sum(inside, collections.Counter())
    if instruction.target in _NO_KERNEL_TARGETS:
        return collections.Counter()
    return collections.Counter([kernel_kind(instruction)])


def kernel_kind(instruction: Instruction) -> str:
    """Returns the kind of the kernel that runs an instruction, see `kernels`."""
    name = instruction.target
    if instruction.attribute("kind") == "kCustom":
        found = re.search(r'"kind":\s*"(\w+)"', instruction.attributes)
        name = found[1] if found else ""
    for part, kind in _LIBRARIES:
        if part in name:
            return kind
    return name or instruction.opcode.removesuffix("-start")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation at one place of a program.

    kind: one of COLLECTIVES.
    bytes: the bytes of its operands or of its results on one device, whichever is more. That is
        the whole array for an all-gather (its result) and a reduce-scatter (its operand). With n
        devices in a ring, each sends (n - 1) / n of this, and twice as much for an all-reduce.
    devices: n, the number of devices in a group, or None if the text does not state it.
    times: how often it runs, see Visit.times: in one iteration of the token loop if it is inside,
        otherwise in one run of the program.
    in_token_loop: whether it runs for every token.
    op_name: path of the JAX operation.
    """

    kind: str
    bytes: int
    devices: int | None
    times: int
    in_token_loop: bool
    op_name: str


def collective_ops(module: HloModule, token_loop: Loop | None = None) -> list[Collective]:
    """Returns the collectives of a program, in the order of the text of each computation.

    An asynchronous collective counts once, where it starts. Collectives within fusions count, too,
    and those in all branches of a conditional.
    """
    found = []
    for visit in walk(module):
        for instruction in visit.computation.instructions.values():
            kind = _collective_kind(visit.computation, instruction)
            if kind in COLLECTIVES and not _is_continued(visit.computation, instruction):
                found.append(_collective(kind, instruction, visit, token_loop))
    return found


def _collective_kind(computation: Computation, instruction: Instruction) -> str:
    """Returns the opcode of a collective. A TPU has fusions of an all-reduce and a slice of it."""
    root = computation.root
    is_sliced = root.opcode == "dynamic-slice" and root.operands[0] == instruction.name
    if instruction.opcode == "all-reduce" and is_sliced:
        return "reduce-scatter"
    return instruction.opcode.removesuffix("-start")


def _is_continued(computation: Computation, instruction: Instruction) -> bool:
    """Returns whether an instruction continues a collective that another fusion starts.

    On a TPU, a chain of fusions may compute something else beside a collective. Each of them
    contains the collective, and only the first starts it.
    """
    if "chain_id=" not in instruction.attributes:
        return False
    targets = {x.target for x in computation.instructions.values() if x.opcode == "custom-call"}
    return "AsyncCollectiveStart" not in targets


def _collective(
    kind: str, instruction: Instruction, visit: Visit, token_loop: Loop | None
) -> Collective:
    operands = sum(num_bytes(x.shape) for x in visit.computation.operands(instruction))
    return Collective(
        kind=kind,
        bytes=max(operands, num_bytes(_result(kind, instruction))),
        devices=_group_size(instruction.attributes),
        times=visit.times(token_loop),
        in_token_loop=visit.is_inside(token_loop),
        op_name=instruction.op_name,
    )


def _result(kind: str, instruction: Instruction) -> Shape:
    """Returns the shape of the result of a collective.

    If it is asynchronous, it starts with a tuple of its operands, its results and more, except for
    an all-reduce.
    """
    is_started = instruction.opcode.endswith("-start") and kind != "all-reduce"
    return instruction.shape[1] if is_started else instruction.shape


def _group_size(attributes: str) -> int | None:
    """Reads the number of devices in a group from replica_groups, or returns None."""
    found = _GROUPS.search(attributes)
    if not found:
        return None
    listed, size, mesh, axes = found.groups()
    if mesh is not None:
        sizes = dict(_AXIS_SIZE.findall(mesh))
        return math.prod(int(part or sizes[axis]) for axis, part in _AXIS.findall(axes))
    return int(size) if size else len(listed.split(","))


def summarize(found: list[Collective]) -> dict[str, tuple[int, int]]:
    """Returns kind -> (how often it runs, bytes in total).

    All must be inside the token loop, or all outside of it, because `times` of a Collective is per
    token inside and per run outside.
    """
    totals: dict[str, tuple[int, int]] = {}
    for collective in found:
        count, size = totals.get(collective.kind, (0, 0))
        moved = collective.times * collective.bytes
        totals[collective.kind] = count + collective.times, size + moved
    return totals


# The named scopes of the parts of a program that contain attention.
PARTS = ("und_encoder", "prefill", "decode_step")
_ATTENTION_SCOPE = "attention"


def attention_kernels(module: HloModule) -> dict[str, tuple[str, ...]]:
    """Returns the attention kernels of each part of a program that contains attention.

    Parts: "und_encoder", "prefill", "decode_step", or "decoder" outside of these scopes, as in
    training; with " backward" for the gradient, including what it recomputes.
    Kernels: "splash attention", "cuDNN", another Pallas or Triton kernel with its name, or "XLA"
    for matrix products of XLA in the scope `attention`. A part may have several, for example if its
    layers differ.
    """
    found: dict[str, set[str]] = {}
    for instruction in module.all_instructions():
        if kernel := _attention_kernel(instruction):
            found.setdefault(_part(instruction.op_name), set()).add(kernel)
    return {part: tuple(sorted(kernels)) for part, kernels in sorted(found.items())}


def _part(op_name: str) -> str:
    inside = [part for part in PARTS if in_scope(op_name, part)]
    part = inside[0] if inside else "decoder"
    return f"{part} backward" if "transpose(" in op_name else part


def _attention_kernel(instruction: Instruction) -> str | None:
    name = f"{instruction.name} {instruction.op_name}"
    if instruction.opcode == "custom-call":
        kind = kernel_kind(instruction)
        if kind == "cuDNN attention":
            return "cuDNN"
        is_attention = in_scope(instruction.op_name, _ATTENTION_SCOPE)
        if kind in ("Pallas", "Triton", "Mosaic GPU") and is_attention:
            return "splash attention" if "splash" in name else f"{kind} {instruction.name}"
    # XLA computes a small product of the gradient of splash attention
    is_product = instruction.op_name.endswith("/dot_general") and "splash" not in name
    return "XLA" if is_product and in_scope(instruction.op_name, _ATTENTION_SCOPE) else None
