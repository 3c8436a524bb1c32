"""One table converts both ways: a row names a PyTorch tensor, our path and the transform between.

Names are templates: `{i}` stands for a layer number, `{p:a|b}` for one of the words (listed on both
sides); a placeholder of one side has the same value on the other. Reading matches PyTorch names,
writing matches our paths, and both use the same rows. PyTorch keeps linear kernels [out, in] and
convolutions OIHW; ours are [in, out] and HWIO.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop.names import advice, few, listed
from janus_jax.interop.tensors import TensorSource

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transform:
    """Array op from PyTorch's layout to one array for each of our paths, and its inverse."""

    ours: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    torch: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def _thirds(x: np.ndarray) -> tuple[np.ndarray, ...]:
    if x.shape[0] % 3:
        raise ValueError(f"{x.shape[0]} rows do not split in 3")
    return tuple(x.reshape(3, x.shape[0] // 3, *x.shape[1:]))


def _rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"{x.ndim} dimensions, expected {rank}")
    return x


def _first(x: np.ndarray) -> np.ndarray:
    if x.shape[:1] != (1,):
        raise ValueError(f"shape {x.shape} has no leading 1")
    return x[0]


def _unit_kernel(x: np.ndarray) -> np.ndarray:
    if _rank(x, 4).shape[2:] != (1, 1):
        raise ValueError(f"kernel of {x.shape[2:]}, expected (1, 1)")
    return x[:, :, 0, 0]


TRANSFORMS = {
    "same": Transform(lambda x: (x,), lambda a: a[0]),
    "linear": Transform(lambda x: (_rank(x, 2).T,), lambda a: a[0].T),
    "conv2d": Transform(
        lambda x: (_rank(x, 4).transpose(2, 3, 1, 0),), lambda a: a[0].transpose(3, 2, 0, 1)
    ),
    "pointwise": Transform(
        lambda x: (_unit_kernel(x).T,), lambda a: a[0].T[:, :, np.newaxis, np.newaxis]
    ),
    "split_qkv": Transform(
        lambda x: tuple(part.T for part in _thirds(_rank(x, 2))),
        lambda a: np.concatenate([part.T for part in a]),
    ),
    "split_qkv_bias": Transform(lambda x: _thirds(_rank(x, 1)), np.concatenate),
    "squeeze_leading": Transform(lambda x: (_first(x),), lambda a: a[0][np.newaxis]),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """One row: PyTorch name template, our path templates, name of the transform."""

    torch: str
    paths: tuple[str, ...]
    transform: str

    @property
    def op(self) -> Transform:
        """The transform of that name."""
        return TRANSFORMS[self.transform]


@dataclasses.dataclass(frozen=True)
class Skip:
    """A tensor that the model does not use: a regex over its PyTorch name, and why."""

    torch: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of one checkpoint layout."""

    rules: tuple[Rule, ...]
    skips: tuple[Skip, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One PyTorch tensor and the parameters it holds."""

    torch: str
    paths: tuple[str, ...]
    op: Transform


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do with every tensor: convert it, or leave it out for a reason."""

    steps: tuple[Step, ...]
    skipped: Mapping[str, str]


PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")


@functools.cache
def _regex(template: str) -> re.Pattern:
    parts, end = [], 0
    for found in PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : found.start()]))
        parts.append(f"(?P<{found[1]}>{found[2] or '0|[1-9][0-9]*'})")
        end = found.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda found: values[found[1]], template)


def _match(templates: Sequence[str], name: str) -> dict[str, str] | None:
    for template in templates:
        found = _regex(template).fullmatch(name)
        if found:
            return found.groupdict()
    return None


def find_steps(table: Table, name: str) -> list[Step]:
    """Every way the rules read a PyTorch tensor; exactly one in a sound table."""
    steps = []
    for rule in table.rules:
        values = _match([rule.torch], name)
        if values is not None:
            steps.append(Step(name, tuple(_fill(p, values) for p in rule.paths), rule.op))
    return steps


def skip_reasons(table: Table, name: str) -> list[str]:
    """Reasons of the skip rows that name a PyTorch tensor."""
    return [skip.reason for skip in table.skips if re.fullmatch(skip.torch, name)]


def _writers(table: Table, path: str) -> dict[str, Step]:
    """PyTorch tensors, by name, that hold a parameter; exactly one in a sound table."""
    found = {}
    for rule in table.rules:
        values = _match(rule.paths, path)
        if values is not None:
            name = _fill(rule.torch, values)
            found[name] = Step(name, tuple(_fill(p, values) for p in rule.paths), rule.op)
    return found


def export_steps(table: Table, paths: Collection[str]) -> list[Step]:
    """PyTorch tensors, in order of name, that hold exactly these parameters.

    Raises:
      ValueError: parameters that no row, or more than one, writes.
    """
    steps, faults = {}, []
    for path in paths:
        found = _writers(table, path)
        if len(found) != 1:
            faults.append(f"{path} ({len(found)} rows)")
        steps.update(found)
    absent = sorted({p for step in steps.values() for p in step.paths} - set(paths))
    if faults or absent:
        astray = faults + absent
        raise ValueError(f"{len(astray)} parameters that cannot be written: {few(astray)}")
    return [steps[name] for name in sorted(steps)]


def torch_shape(step: Step, shapes: Mapping[str, Shape]) -> Shape:
    """Shape of a PyTorch tensor from those of our parameters; allocates no elements."""
    return step.op.torch(tuple(_hollow(shapes[path]) for path in step.paths)).shape


def make_plan(table: Table, source: TensorSource, expected: Mapping[str, Shape]) -> Plan:
    """Matches every stored tensor with the table and every parameter with a tensor.

    expected: shape of each of the model's parameters by path.

    Raises:
      ValueError: one line that counts all unknown, missing, doubled and misshapen tensors and
        names a few of each.
    """
    faults = {kind: list(map(shorten_text, names)) for kind, names in source.faults.items()}
    steps, skipped = [], {}
    for name in source.names:
        found, reasons = find_steps(table, name), skip_reasons(table, name)
        if len(found) + len(reasons) > 1:
            faults.setdefault("matched by two rows", []).append(name)
        elif reasons:
            skipped[name] = reasons[0]
        elif not found or not all(path in expected for path in found[0].paths):
            faults.setdefault("unknown", []).append(shorten_text(name))
        else:
            steps.append(found[0])
    _check_targets(table, steps, expected, faults)
    for step in steps:
        _check_tensor(step, source, expected, faults)
    if text := listed(faults):
        text += advice(source.names)
        raise ValueError(f"{source.folder} does not fit its config.json, tensors {text}")
    return Plan(tuple(steps), skipped)


def _check_targets(
    table: Table, steps: list[Step], expected: Mapping[str, Shape], faults: dict[str, list[str]]
) -> None:
    writers: dict[str, list[str]] = {}
    for step in steps:
        for path in step.paths:
            writers.setdefault(path, []).append(step.torch)
    doubled = [f"{p} by {' and '.join(names)}" for p, names in writers.items() if len(names) > 1]
    missing = {next(iter(_writers(table, p)), p): None for p in expected if p not in writers}
    named = {name for names in faults.values() for name in names}
    faults["set twice"] = doubled
    faults["missing"] = [name for name in missing if name not in named]


def _check_tensor(
    step: Step, source: TensorSource, expected: Mapping[str, Shape], faults: dict[str, list[str]]
) -> None:
    shape, dtype = source.shape(step.torch), source.dtype(step.torch)
    try:
        ours = [part.shape for part in step.op.ours(_hollow(shape))]
    except ValueError:
        ours = []
    if ours != [expected[path] for path in step.paths]:
        wanted = torch_shape(step, expected)
        text = f"{step.torch} is {shorten(shape)}, expected {wanted}"
        faults.setdefault("of a wrong shape", []).append(text)
    if dtype.kind not in "fV":  # ml_dtypes.bfloat16 is of numpy's kind V
        text = f"{step.torch} is {dtype}, expected floating point"
        faults.setdefault("of a wrong type", []).append(text)


def _hollow(shape: Shape) -> np.ndarray:
    """An array of this shape on one byte of memory: transforms of it tell shapes."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)
