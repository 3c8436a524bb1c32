"""Writes a LoRA adapter in PEFT's format from the factors of janus_jax's linear layers."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from janus_jax.families.family import ConversionTable, Shape
from janus_jax.interop.adapter import ADAPTER_WEIGHTS, LINEAR, WEIGHT
from janus_jax.interop.files import ADAPTER_CONFIG, write_safetensors_file
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.rules import export_steps
from janus_jax.interop.tensors import PEFT
from janus_jax.paths import write_json

Factors = tuple[np.ndarray, np.ndarray]  # a float32[inputs, rank], b float32[rank, outputs]


def write_adapter(
    target: Path,
    table: ConversionTable,
    shapes: Mapping[str, Shape],
    factors: Mapping[str, Factors],
    alpha: float,
    base: str,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors; replaces an adapter folder.

    A PyTorch tensor that holds n adapted layers (DeepSeek's fused qkv) gets one update of n times
    the rank: A stacks their rows; B is block diagonal, with zeros in the rows of layers without
    LoRA factors. Its alpha is also n times as large, so that the scale stays the same.

    Args:
      target: the folder to write.
      table: conversion table of the layout whose module names are written.
      shapes: shape of each of the model's parameters by path.
      factors: LoRA factors by the path of their kernel; all have the same rank.
      alpha: the kernel is replaced by kernel + alpha / rank * a @ b.
      base: folder or hub id of the model that the adapter was trained on.

    Raises:
      OSError, ValueError: as new_folder.
    """
    tensors, multiples = {}, {}
    for step in export_steps(table, list(shapes)):
        if adapted := [path for path in step.paths if path in factors]:
            module = step.torch.removesuffix(WEIGHT)
            multiples[module] = len(adapted)
            pair = _fuse([factors.get(p) for p in step.paths], [shapes[p] for p in step.paths])
            names = (f"{PEFT}{module}.{part}" for part in LINEAR)
            tensors |= dict(zip(names, pair, strict=True))
    rank = next(iter(factors.values()))[0].shape[1]
    config = _config(multiples, rank, alpha, base)
    metadata = {name: (tensor.dtype, tensor.shape) for name, tensor in sorted(tensors.items())}
    size = sum(tensor.nbytes for tensor in tensors.values())
    with new_folder(target, overwrite=True, size=size, config=ADAPTER_CONFIG) as staging:
        write_json(staging / ADAPTER_CONFIG, config)
        write_safetensors_file(staging / ADAPTER_WEIGHTS[0], metadata, tensors.__getitem__)


def _fuse(parts: Sequence[Factors | None], shapes: Sequence[Shape]) -> Factors:
    """Returns A and B, in PyTorch's shapes, of a tensor that holds several layers.

    parts: the factors of each layer, or None if it has none. shapes: shapes of the layers' kernels.
    """
    down = np.concatenate([part[0].T for part in parts if part is not None])
    up = np.zeros((sum(outputs for _, outputs in shapes), len(down)), np.float32)
    row = column = 0
    for part, (_, outputs) in zip(parts, shapes, strict=True):
        if part is not None:
            rank = len(part[1])
            up[row : row + outputs, column : column + rank] = part[1].T
            column += rank
        row += outputs
    return down.astype(np.float32), up


def _config(multiples: Mapping[str, int], rank: int, alpha: float, base: str) -> dict:
    """Returns the contents of adapter_config.json. multiples: adapted layers per module."""
    alpha = int(alpha) if alpha == int(alpha) else alpha
    fused = {module: count for module, count in multiples.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "rank_pattern": {module: count * rank for module, count in fused.items()},
        "alpha_pattern": {module: count * alpha for module, count in fused.items()},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted(multiples),
    }
