"""Saves a model in memory as a checkpoint folder in DeepSeek's layout."""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.families.family import DEEPSEEK
from janus_jax.families.registry import write_config
from janus_jax.interop.files import CONFIG, write_safetensors
from janus_jax.interop.load import table_for
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.rules import export_steps, torch_shape
from janus_jax.paths import write_json


def save_deepseek(
    folder: Path | str,
    model: nnx.Module,
    write_small_files: Callable[[Path], None],
) -> None:
    """Writes a model's parameters, in bfloat16, and config; replaces an existing checkpoint folder.

    model: has its config in `cfg`.
    write_small_files: writes the tokenizer and processor files into the given folder.
    """
    params = {".".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(nnx.state(model))}
    shapes = {path: value.shape for path, value in params.items()}
    table = table_for(DEEPSEEK, model.cfg)
    steps = {step.torch: step for step in export_steps(table, list(params))}
    dtype = np.dtype(jnp.bfloat16)

    def read(name: str) -> np.ndarray:
        parts = (np.asarray(params[path]).astype(dtype) for path in steps[name].paths)
        return steps[name].op.to_torch(tuple(parts))

    with new_folder(Path(folder), overwrite=True) as staging:
        write_small_files(staging)
        write_json(staging / CONFIG, write_config(model.cfg, None, DEEPSEEK))
        metadata = {name: (dtype, torch_shape(step, shapes)) for name, step in steps.items()}
        write_safetensors(staging, metadata, read)
