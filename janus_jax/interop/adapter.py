"""LoRA adapters in PEFT's format, merged into a model's parameters while they are read.

A module's weight W becomes W + scale * B A (Hu et al., 2021, arXiv 2106.09685). In PyTorch's shapes
A is [rank, inputs, ...] and B is [outputs, rank, ...], with further axes for convolutions. For an
embedding A is [rank, rows] and B is [width, rank], and the update is scale * (B A)^T.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.families.family import TRANSFORMS, ConversionTable, Shape
from janus_jax.interop.adapter_config import AdapterConfig, read_adapter_config
from janus_jax.interop.readers import DUPLICATES, open_checkpoint
from janus_jax.interop.rules import Step, export_steps, skip_reasons, torch_shape
from janus_jax.interop.tensors import PEFT, Tensor, TensorSource, summarize_problems

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT = ".weight"
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BASE = "base_layer.weight"  # PEFT also stores the full weight of an adapted embed_tokens or lm_head
_NAME = re.compile(
    rf"(?:{re.escape(PEFT)})?(?P<module>.+)\.(?P<part>"
    rf"{'|'.join(map(re.escape, (*LINEAR, *EMBEDDING, BASE)))})"
)

Problems = dict[str, list[str]]
Tables = Sequence[tuple[ConversionTable, Sequence[str]]]


@dataclasses.dataclass(frozen=True)
class Update:
    """The LoRA update of one PyTorch tensor of the model.

    step: the tensor's conversion to parameters. shape: the tensor's shape, in PyTorch's layout.
    down, up: the factors A and B. scale: multiplies their product.
    base: a tensor that replaces the model's own, or None.
    """

    step: Step
    shape: Shape
    down: Tensor
    up: Tensor
    scale: float
    base: Tensor | None

    def deltas(self) -> tuple[np.ndarray, ...]:
        """Returns scale * B A in float32, as one view per parameter in the tensor."""
        rank = len(self.down.read())
        down = np.ascontiguousarray(self.down.read().reshape(rank, -1).T, np.float32)
        up = np.ascontiguousarray(self.up.read().reshape(-1, rank).T, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # `merged` checks for NaN and infinity
            product = down @ up
            product *= np.float32(self.scale)
        embedding = self.step.op is TRANSFORMS["same"]
        return self.step.op.from_torch(product if embedding else product.T.reshape(self.shape))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA adapter folder matched with a model.

    updates: by parameter path, the update of the PyTorch tensor that holds the parameter, and the
      parameter's index within that tensor.
    """

    folder: Path
    updates: Mapping[str, tuple[Update, int]]

    def merged(self, path: str, array: np.ndarray) -> np.ndarray:
        """Returns the merged parameter in float32, or `array` itself if the path has no update.

        array: the model's own parameter, in any floating-point dtype.

        Raises:
          ValueError: the update has NaN or infinite values in float32.
        """
        if path not in self.updates:
            return array
        update, i = self.updates[path]
        if update.base is not None:
            array = update.step.op.from_torch(update.base.read())[i]
        merged = update.deltas()[i]
        if not np.isfinite(merged).all():
            raise ValueError(
                f"{self.folder}: the LoRA update of {update.step.torch} has NaN or infinite values "
                "in float32"
            )
        return np.add(merged, array, out=merged, dtype=np.float32, casting="same_kind")


def read_adapter(folder: Path | str, tables: Tables, shapes: Mapping[str, Shape]) -> Adapter:
    """Opens a LoRA adapter folder and matches every tensor with a module of the model.

    Args:
      folder: holds adapter_config.json with adapter_model.safetensors or adapter_model.bin.
      tables: the conversion table of each layout, with its adapter_prefixes.
      shapes: shape of each of the model's parameters by path.

    Raises:
      FileNotFoundError: the folder or a file is missing.
      ValueError: a setting is not supported, or tensors are unknown, missing, of a wrong shape or
        dtype, or have NaN or infinite values.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    source = open_checkpoint(folder, ADAPTER_WEIGHTS)
    problems: Problems = {}
    for kind, names in source.problems.items():
        _add(problems, kind, names)
    groups = _group_by_module(source, problems)
    prefix, table, steps = _best_naming(groups, tables, shapes)
    adapted = {}
    for module, parts in groups.items():
        if module in steps:
            adapted[module] = parts
        elif not skip_reasons(table, f"{prefix}{module}{WEIGHT}"):
            _add(problems, "for unknown modules", parts.values())
    _check_targets(config, adapted, steps, problems)
    updates = []
    for module, parts in adapted.items():
        updates += _update(module, parts, steps[module], source, config, shapes, problems)
    _raise(folder, problems)
    if not updates:
        raise ValueError(f"the LoRA adapter {folder} updates no module of the model")
    return Adapter(folder, {path: (u, i) for u in updates for i, path in enumerate(u.step.paths)})


def _group_by_module(source: TensorSource, problems: Problems) -> dict[str, dict[str, str]]:
    """Groups tensor names by module and by their part (A, B or base) in it."""
    groups: dict[str, dict[str, str]] = {}
    for name in source.names:
        if not (match := _NAME.fullmatch(name)):
            _add(problems, "not part of a LoRA update", [name])
            continue
        parts = groups.setdefault(match["module"], {})
        if match["part"] in parts:
            _add(problems, DUPLICATES, [name])
        parts[match["part"]] = name
    return groups


def _best_naming(
    modules: Mapping, tables: Tables, shapes: Mapping[str, Shape]
) -> tuple[str, ConversionTable, dict[str, Step]]:
    """Finds the table and the prefix that match the most modules.

    Returns:
      The prefix, the table, and the conversion steps by module name.
    """
    candidates = []
    for table, prefixes in tables:
        weights = {
            step.torch: step
            for step in export_steps(table, list(shapes))
            if step.torch.endswith(WEIGHT) and len(torch_shape(step, shapes)) > 1
        }
        for prefix in prefixes:
            steps = {
                name[len(prefix) : -len(WEIGHT)]: step
                for name, step in weights.items()
                if name.startswith(prefix)
            }
            candidates.append((prefix, table, steps))
    candidates.sort(key=lambda candidate: len(candidate[0]))  # the whole model is preferred
    return max(candidates, key=lambda candidate: len(candidate[2].keys() & modules.keys()))


def _factors(step: Step) -> tuple[str, str]:
    return EMBEDDING if step.op is TRANSFORMS["same"] else LINEAR


def _check_targets(
    config: AdapterConfig,
    adapted: Mapping[str, Mapping[str, str]],
    steps: Mapping[str, Step],
    problems: Problems,
) -> None:
    """Compares the modules that have tensors with those that target_modules names."""
    for module, parts in adapted.items():
        if module not in config.targets:
            _add(problems, "for modules that target_modules does not name", parts.values())
    for module, step in steps.items():
        if module in adapted or module in config.targets:
            parts = adapted.get(module, {})
            missing = [part for part in _factors(step) if part not in parts]
            _add(problems, "missing", [f"{PEFT}{module}.{part}" for part in missing])


def _update(
    module: str,
    parts: Mapping[str, str],
    step: Step,
    source: TensorSource,
    config: AdapterConfig,
    shapes: Mapping[str, Shape],
    problems: Problems,
) -> list[Update]:
    """Returns the update of one module, or an empty list if its tensors have problems."""
    factors, shape = _factors(step), torch_shape(step, shapes)
    unexpected = [name for part, name in parts.items() if part not in (*factors, BASE)]
    _add(problems, "of the wrong kind for their module", unexpected)
    if unexpected or not all(part in parts for part in factors):
        return []
    rank = config.rank_of(module)
    expected = {factors[0]: (rank, *shape[1:]), factors[1]: (shape[0], rank), BASE: shape}
    if factors == EMBEDDING:
        expected |= {factors[0]: (rank, shape[0]), factors[1]: (shape[1], rank)}
    elif len(shape) > 2:
        expected[factors[1]] += (1,) * (len(shape) - 2)
    before = sum(map(len, problems.values()))
    for part, name in parts.items():
        _check_tensor(name, source, expected[part], problems)
    if sum(map(len, problems.values())) > before:
        return []
    down, up = (source.tensors[parts[part]] for part in factors)
    base = source.tensors.get(parts.get(BASE))
    return [Update(step, shape, down, up, config.scale_of(module), base)]


def _check_tensor(name: str, source: TensorSource, expected: Shape, problems: Problems) -> None:
    shape, dtype = source.shape(name), source.dtype(name)
    if shape != expected:
        _add(problems, "with a wrong shape", [name], f" is {shorten(shape)}, expected {expected}")
    elif dtype.kind not in "fV":  # ml_dtypes.bfloat16 has NumPy's kind V
        _add(problems, "with a wrong dtype", [name], f" is {dtype}, expected floating point")
    elif not np.isfinite(source.read(name)).all():
        _add(problems, "with NaN or infinite values", [name])


def _add(problems: Problems, kind: str, names: Iterable[str], detail: str = "") -> None:
    problems.setdefault(kind, []).extend(f"{shorten_text(name)}{detail}" for name in names)


def _raise(folder: Path, problems: Problems) -> None:
    """Raises ValueError with the count and three examples of each kind of problem, if any."""
    if text := summarize_problems(problems):
        raise ValueError(
            f"the tensors of the LoRA adapter {folder} do not match the model and target_modules: "
            f"{text}"
        )
