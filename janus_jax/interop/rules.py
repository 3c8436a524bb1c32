"""Applies conversion tables between PyTorch tensors and janus_jax parameters, in both directions.

Each row (families.family.Rule) holds a PyTorch tensor name, the paths of the parameters stored in
that tensor, and the transform between them. Reading matches PyTorch names, writing matches
parameter paths, and both use the same rows. PyTorch stores linear kernels as [out, in] and
convolution kernels as OIHW; janus_jax uses [in, out] and HWIO.
"""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.families.family import ConversionTable, Shape, Transform
from janus_jax.interop.tensors import TensorSource, abbreviate, hint, summarize_problems


@dataclasses.dataclass(frozen=True)
class Step:
    """The conversion of one PyTorch tensor: its name, its parameters' paths, and the transform."""

    torch: str
    paths: tuple[str, ...]
    op: Transform


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tensors to convert, and the tensors to skip with the reason."""

    steps: tuple[Step, ...]
    skipped: Mapping[str, str]


PLACEHOLDER = re.compile(r"\{(\w+)(?::([^}]*))?\}")


@functools.cache
def _regex(template: str) -> re.Pattern:
    parts, end = [], 0
    for match in PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : match.start()]))
        parts.append(f"(?P<{match[1]}>{match[2] or '0|[1-9][0-9]*'})")
        end = match.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _match(templates: Sequence[str], name: str) -> dict[str, str] | None:
    """Returns the placeholders' values in the first template that matches; None if none does."""
    for template in templates:
        match = _regex(template).fullmatch(name)
        if match:
            return match.groupdict()
    return None


def find_steps(table: ConversionTable, name: str) -> list[Step]:
    """Returns one step per rule that matches a PyTorch name; a valid table has at most one."""
    steps = []
    for rule in table.rules:
        values = _match([rule.torch], name)
        if values is not None:
            steps.append(Step(name, tuple(_fill(p, values) for p in rule.paths), rule.op))
    return steps


def skip_reasons(table: ConversionTable, name: str) -> list[str]:
    """Returns the reasons of the skip rows that match a PyTorch name."""
    return [skip.reason for skip in table.skips if re.fullmatch(skip.torch, name)]


def _steps_for_path(table: ConversionTable, path: str) -> dict[str, Step]:
    """Returns the steps, by PyTorch name, that write a parameter; a valid table has exactly one."""
    steps = {}
    for rule in table.rules:
        values = _match(rule.paths, path)
        if values is not None:
            name = _fill(rule.torch, values)
            steps[name] = Step(name, tuple(_fill(p, values) for p in rule.paths), rule.op)
    return steps


def export_steps(table: ConversionTable, paths: Collection[str]) -> list[Step]:
    """Returns the steps, sorted by PyTorch name, that write exactly these parameters.

    Raises:
      ValueError: no row, or more than one, writes a parameter, or a row also needs a parameter that
        is not in `paths`.
    """
    steps, problems = {}, []
    for path in paths:
        writers = _steps_for_path(table, path)
        if len(writers) != 1:
            problems.append(f"{path} ({len(writers)} rows)")
        steps.update(writers)
    problems += sorted({p for step in steps.values() for p in step.paths} - set(paths))
    if problems:
        raise ValueError(f"{len(problems)} parameters cannot be written: {abbreviate(problems)}")
    return [steps[name] for name in sorted(steps)]


def torch_shape(step: Step, shapes: Mapping[str, Shape]) -> Shape:
    """Returns a PyTorch tensor's shape from those of its parameters; allocates no data."""
    return step.op.to_torch(tuple(_shape_only(shapes[path]) for path in step.paths)).shape


def make_plan(table: ConversionTable, source: TensorSource, expected: Mapping[str, Shape]) -> Plan:
    """Matches every stored tensor with the table and every parameter with a tensor.

    expected: shape of each of the model's parameters by path.

    Raises:
      ValueError: tensors are unknown, missing, duplicated, or have a wrong shape or dtype. The
        message is one line with the count and the first names of each kind.
    """
    problems = {kind: list(map(shorten_text, names)) for kind, names in source.problems.items()}
    steps, skipped = [], {}
    for name in source.names:
        matches, reasons = find_steps(table, name), skip_reasons(table, name)
        if len(matches) + len(reasons) > 1:
            problems.setdefault("matched by two rows", []).append(name)
        elif reasons:
            skipped[name] = reasons[0]
        elif not matches or not all(path in expected for path in matches[0].paths):
            problems.setdefault("unknown", []).append(shorten_text(name))
        else:
            steps.append(matches[0])
    _check_targets(table, steps, expected, problems)
    for step in steps:
        _check_tensor(step, source, expected, problems)
    if text := summarize_problems(problems):
        text += hint(source.names)
        raise ValueError(f"the tensors in {source.folder} do not match its config.json: {text}")
    return Plan(tuple(steps), skipped)


def _check_targets(
    table: ConversionTable,
    steps: list[Step],
    expected: Mapping[str, Shape],
    problems: dict[str, list[str]],
) -> None:
    """Adds parameters that no tensor, or more than one, sets."""
    writers: dict[str, list[str]] = {}
    for step in steps:
        for path in step.paths:
            writers.setdefault(path, []).append(step.torch)
    duplicates = [f"{p} by {' and '.join(names)}" for p, names in writers.items() if len(names) > 1]
    missing = {next(iter(_steps_for_path(table, p)), p): None for p in expected if p not in writers}
    reported = {name for names in problems.values() for name in names}
    problems["set twice"] = duplicates
    problems["missing"] = [name for name in missing if name not in reported]


def _check_tensor(
    step: Step, source: TensorSource, expected: Mapping[str, Shape], problems: dict[str, list[str]]
) -> None:
    """Adds a tensor that has a wrong shape or a wrong dtype."""
    shape, dtype = source.shape(step.torch), source.dtype(step.torch)
    try:
        shapes = [part.shape for part in step.op.from_torch(_shape_only(shape))]
    except ValueError:
        shapes = []
    if shapes != [expected[path] for path in step.paths]:
        text = f"{step.torch} is {shorten(shape)}, expected {torch_shape(step, expected)}"
        problems.setdefault("with a wrong shape", []).append(text)
    if dtype.kind not in "fV":  # ml_dtypes.bfloat16 has NumPy's kind V
        text = f"{step.torch} is {dtype}, expected floating point"
        problems.setdefault("with a wrong dtype", []).append(text)


def _shape_only(shape: Shape) -> np.ndarray:
    """Returns an array of this shape on one byte of memory, to compute shapes of transforms."""
    return np.broadcast_to(np.zeros((), np.uint8), shape)
