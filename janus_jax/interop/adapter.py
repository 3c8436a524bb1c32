"""LoRA adapters in PEFT's format, merged into a model's parameters as they are read.

A module's weight W becomes W + scale * B A (Hu et al., 2021, arXiv 2106.09685), in the shapes of
PyTorch: A is [rank, inputs...] and B [outputs, rank], for convolutions with further axes; for an
embedding A is [rank, rows] and B [width, rank], and the update is (B A)^T.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop.adapter_config import AdapterConfig, read_adapter_config
from janus_jax.interop.config import DEEPSEEK, TRANSFORMERS
from janus_jax.interop.names import PEFT, listed
from janus_jax.interop.readers import DOUBLED, open_checkpoint
from janus_jax.interop.rules import (
    TRANSFORMS,
    Shape,
    Step,
    Table,
    export_steps,
    skip_reasons,
    torch_shape,
)
from janus_jax.interop.tensors import Tensor, TensorSource

ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WEIGHT = ".weight"
LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
BASE = "base_layer.weight"  # PEFT stores an adapted embed_tokens or lm_head whole as well
# Layout of the module names, and the part of the model that PEFT wrapped: all of it, or the decoder
# with or without its head (in transformers' layout the model without its head).
NAMINGS = (
    (DEEPSEEK, ""),
    (TRANSFORMERS, ""),
    (DEEPSEEK, "language_model."),
    (DEEPSEEK, "language_model.model."),
    (TRANSFORMERS, "model."),
)
_NAME = re.compile(
    rf"(?:{re.escape(PEFT)})?(?P<module>.+)\.(?P<part>"
    rf"{'|'.join(map(re.escape, (*LINEAR, *EMBEDDING, BASE)))})"
)

Faults = dict[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Update:
    """The update of one PyTorch tensor of the model, and where that tensor's parameters are.

    down, up: the factors A and B. base: replaces the model's own tensor, unless it is None.
    """

    step: Step
    shape: Shape
    down: Tensor
    up: Tensor
    scale: float
    base: Tensor | None

    def ours(self) -> tuple[np.ndarray, ...]:
        """scale * B A, float32, for each parameter that the tensor holds: views of a new array."""
        rank = len(self.down.read())
        down = np.ascontiguousarray(self.down.read().reshape(rank, -1).T, np.float32)
        up = np.ascontiguousarray(self.up.read().reshape(-1, rank).T, np.float32)
        with np.errstate(over="ignore", invalid="ignore"):  # `merged` refuses what is not finite
            product = down @ up
            product *= np.float32(self.scale)
        embedding = self.step.op is TRANSFORMS["same"]
        return self.step.op.ours(product if embedding else product.T.reshape(self.shape))


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter folder matched with a model: updates by the path of our parameter.

    places: the update and which of its tensor's parameters the path is.
    """

    folder: Path
    places: Mapping[str, tuple[Update, int]]

    def merged(self, path: str, array: np.ndarray) -> np.ndarray:
        """The merged parameter, float32; of a path that has no update `array` itself.

        array: the model's own parameter, in any floating-point type.

        Raises:
          ValueError: the update is too large for float32.
        """
        if path not in self.places:
            return array
        update, i = self.places[path]
        if update.base is not None:
            array = update.step.op.ours(update.base.read())[i]
        merged = update.ours()[i]
        if not np.isfinite(merged).all():
            raise ValueError(f"{self.folder}: the update of {update.step.torch} is not finite")
        return np.add(merged, array, out=merged, dtype=np.float32, casting="same_kind")


def read_adapter(
    folder: Path | str, tables: Mapping[str, Table], shapes: Mapping[str, Shape]
) -> Adapter:
    """Opens an adapter folder and matches every tensor with a module of the model.

    Args:
      folder: adapter_config.json with adapter_model.safetensors or adapter_model.bin.
      tables: conversion table of each layout.
      shapes: shape of each of the model's parameters by path.

    Raises:
      FileNotFoundError: no folder, or a file is missing.
      ValueError: settings that are not supported; tensors that are unknown, missing, misshapen or
        not finite.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    source = open_checkpoint(folder, ADAPTER_WEIGHTS)
    faults: Faults = {}
    for kind, names in source.faults.items():
        _add(faults, kind, names)
    groups = _by_module(source, faults)
    prefix, table, steps = _naming(groups, tables, shapes)
    found = {}
    for module, parts in groups.items():
        if module in steps:
            found[module] = parts
        elif not skip_reasons(table, f"{prefix}{module}{WEIGHT}"):
            _add(faults, "of unknown modules", parts.values())
    _check_targets(config, found, steps, faults)
    updates = []
    for module, parts in found.items():
        updates += _update(module, parts, steps[module], source, config, shapes, faults)
    _raise(folder, faults)
    if not updates:
        raise ValueError(f"the adapter {folder} updates no module of the model")
    places = {path: (u, i) for u in updates for i, path in enumerate(u.step.paths)}
    return Adapter(folder, places)


def _by_module(source: TensorSource, faults: Faults) -> dict[str, dict[str, str]]:
    """Names of the tensors by module and by their part in it."""
    groups: dict[str, dict[str, str]] = {}
    for name in source.names:
        if not (found := _NAME.fullmatch(name)):
            _add(faults, "that are no part of a LoRA update", [name])
            continue
        parts = groups.setdefault(found["module"], {})
        if found["part"] in parts:
            _add(faults, DOUBLED, [name])
        parts[found["part"]] = name
    return groups


def _naming(
    modules: Mapping, tables: Mapping[str, Table], shapes: Mapping[str, Shape]
) -> tuple[str, Table, dict[str, Step]]:
    """The naming that knows most of the modules: prefix, table, and its tensors by module."""
    steps = {layout: export_steps(table, list(shapes)) for layout, table in tables.items()}
    weights = {
        layout: {
            step.torch: step
            for step in found
            if step.torch.endswith(WEIGHT) and len(torch_shape(step, shapes)) > 1
        }
        for layout, found in steps.items()
    }
    candidates = []
    for layout, prefix in NAMINGS:
        named = {
            name[len(prefix) : -len(WEIGHT)]: step
            for name, step in weights[layout].items()
            if name.startswith(prefix)
        }
        candidates.append((prefix, tables[layout], named))
    return max(candidates, key=lambda naming: len(naming[2].keys() & modules.keys()))


def _factors(step: Step) -> tuple[str, str]:
    return EMBEDDING if step.op is TRANSFORMS["same"] else LINEAR


def _check_targets(
    config: AdapterConfig,
    found: Mapping[str, Mapping[str, str]],
    steps: Mapping[str, Step],
    faults: Faults,
) -> None:
    """Compares the modules that have tensors with those that the config names."""
    for module, parts in found.items():
        if module not in config.targets:
            _add(faults, "of modules that target_modules does not name", parts.values())
    for module, step in steps.items():
        if module in found or module in config.targets:
            parts = found.get(module, {})
            lacking = [part for part in _factors(step) if part not in parts]
            _add(faults, "missing", [f"{PEFT}{module}.{part}" for part in lacking])


def _update(
    module: str,
    parts: Mapping[str, str],
    step: Step,
    source: TensorSource,
    config: AdapterConfig,
    shapes: Mapping[str, Shape],
    faults: Faults,
) -> list[Update]:
    """The update of one module; none where its tensors are at fault."""
    factors, shape = _factors(step), torch_shape(step, shapes)
    astray = [name for part, name in parts.items() if part not in (*factors, BASE)]
    _add(faults, "of the wrong kind for their module", astray)
    if astray or not all(part in parts for part in factors):
        return []
    rank = config.rank_of(module)
    expected = {factors[0]: (rank, *shape[1:]), factors[1]: (shape[0], rank), BASE: shape}
    if factors == EMBEDDING:
        expected |= {factors[0]: (rank, shape[0]), factors[1]: (shape[1], rank)}
    elif len(shape) > 2:
        expected[factors[1]] += (1,) * (len(shape) - 2)
    before = sum(map(len, faults.values()))
    for part, name in parts.items():
        _check_tensor(name, source, expected[part], faults)
    if sum(map(len, faults.values())) > before:
        return []
    down, up = (source.tensors[parts[part]] for part in factors)
    base = source.tensors.get(parts.get(BASE))
    return [Update(step, shape, down, up, config.scale_of(module), base)]


def _check_tensor(name: str, source: TensorSource, expected: Shape, faults: Faults) -> None:
    shape, dtype = source.shape(name), source.dtype(name)
    if shape != expected:
        _add(faults, "of a wrong shape", [name], f" is {shorten(shape)}, expected {expected}")
    elif dtype.kind not in "fV":  # ml_dtypes.bfloat16 is of numpy's kind V
        _add(faults, "of a wrong type", [name], f" is {dtype}, expected floating point")
    elif not np.isfinite(source.read(name)).all():
        _add(faults, "with values that are not finite", [name])


def _add(faults: Faults, kind: str, names: Iterable[str], detail: str = "") -> None:
    faults.setdefault(kind, []).extend(f"{shorten_text(name)}{detail}" for name in names)


def _raise(folder: Path, faults: Faults) -> None:
    """Raises ValueError with the count and three examples of each kind of fault."""
    if text := listed(faults):
        rule = "its tensors must be the LoRA updates of the modules in target_modules"
        raise ValueError(f"the adapter {folder} does not fit the model; {rule}: {text}")
