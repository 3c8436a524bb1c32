"""What `python -m convert` does: folders in, folders out, on the host, without a device mesh."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from janus_jax import checkpoint
from janus_jax.interop import deepseek
from janus_jax.interop.config import DEEPSEEK, TRANSFORMERS
from janus_jax.interop.config_writing import write_config
from janus_jax.interop.files import CONFIG, write_safetensors
from janus_jax.interop.load import (
    Folder,
    StoredParams,
    open_folder,
    stored_params,
    table_for,
)
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.processor_files import check_files, copy_files, translate_files
from janus_jax.interop.rules import Shape, export_steps, torch_shape
from janus_jax.processing.json_files import write_json
from janus_jax.processing.tokenizer import Tokenizer
from janus_jax.progress import Report

Kinds = dict[str, tuple[np.dtype, Shape]]


def import_folder(
    source: Path,
    target: Path,
    overwrite: bool,
    adapter: Path | None = None,
    progress: Report | None = None,
) -> list[str]:
    """Writes an Orbax folder from any readable one; returns what to tell the user.

    adapter: a LoRA adapter in PEFT's format to merge, or None.
    progress: called with the bytes written so far and in all. Orbax compresses them, so that the
      first number may stay below the second.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: as `open_folder`, `make_plan`, `new_folder`.
    """
    _check_apart(source, target, adapter)
    folder = _open(source, adapter)
    stored = stored_params(folder)
    checkpoint.save(
        target,
        {path: stored.read(path) for path in stored.kinds},
        config=folder.config,
        files_from=source,
        unused=stored.unused,
        overwrite=overwrite,
        progress=progress,
    )
    numbers = sum(math.prod(shape) for _, shape in stored.kinds.values())
    said = f"{target}: {len(stored.kinds)} parameters, {numbers:,} numbers"
    return [f"{said}; {len(stored.unused)} unused tensors kept beside", *_merge_report(adapter)]


def export_folder(
    source: Path,
    target: Path,
    layout: str,
    overwrite: bool,
    adapter: Path | None = None,
    progress: Report | None = None,
) -> list[str]:
    """Writes PyTorch safetensors in a layout from any readable folder; returns what to say.

    The tensors that DeepSeek's class expects and Janus does not use (SigLIP's pooling head,
    codebook_used) come from the source; zeros are written for those that it lacks.
    adapter: a LoRA adapter in PEFT's format to merge, or None.
    progress: called with the bytes written so far and in all.
    """
    _check_apart(source, target, adapter)
    folder = _open(source, adapter)
    said = write_folder(folder, stored_params(folder), target, layout, overwrite, progress)
    return [*said, *_merge_report(adapter)]


def _merge_report(adapter: Path | None) -> list[str]:
    return [] if adapter is None else [f"merged the LoRA adapter {adapter}"]


def write_folder(
    folder: Folder,
    stored: StoredParams,
    target: Path,
    layout: str,
    overwrite: bool,
    progress: Report | None = None,
) -> list[str]:
    """As export_folder, with `stored` for the parameters and `folder` for all else."""
    source = folder.path
    stated_anew = layout == TRANSFORMERS and folder.layout != layout
    image_token_id = Tokenizer.from_dir(source).image_id if stated_anew else None
    config = write_config(folder.cfg, folder.config, layout, image_token_id)
    steps = {step.torch: step for step in export_steps(table_for(layout, folder.cfg), stored.kinds)}
    kinds = {name: _kind(step, stored.kinds) for name, step in steps.items()}
    kept, zeros = _unused(folder, stored, layout)
    kinds |= {name: (array.dtype, array.shape) for name, array in kept.items()} | zeros

    def read(name: str) -> np.ndarray:
        if name in steps:
            return steps[name].op.torch(tuple(map(stored.read, steps[name].paths)))
        return kept[name] if name in kept else np.zeros(zeros[name][1], zeros[name][0])

    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in kinds.values())
    with new_folder(target, overwrite, size) as beside:
        if folder.layout == layout:
            copy_files(source, beside)
        else:
            translate_files(source, beside, layout, folder.cfg)
        write_json(beside / CONFIG, config)
        write_safetensors(beside, dict(sorted(kinds.items())), read, progress=progress)
    return _export_report(target, kinds, stored, kept, zeros)


def _open(source: Path, adapter: Path | None = None) -> Folder:
    folder = open_folder(source, adapter)
    check_files(folder.path)
    return folder


def _check_apart(source: Path, target: Path, adapter: Path | None) -> None:
    target, read = Path(target).resolve(), {"SRC": source, "--adapter": adapter}
    for name, folder in read.items():
        folder = None if folder is None else Path(folder).resolve()
        if folder and target in (folder, *folder.parents):
            raise ValueError(f"{name} {folder} is DST or inside it: {target}")


def _kind(step, kinds: Mapping[str, tuple[np.dtype, Shape]]) -> tuple[np.dtype, Shape]:
    dtypes = {kinds[path][0] for path in step.paths}
    if len(dtypes) > 1:
        raise ValueError(f"{step.torch} would mix {' and '.join(sorted(map(str, dtypes)))}")
    return dtypes.pop(), torch_shape(step, {path: kinds[path][1] for path in step.paths})


def _unused(
    folder: Folder, stored: StoredParams, layout: str
) -> tuple[dict[str, np.ndarray], Kinds]:
    """Unused tensors that go along, and those to be written as zeros."""
    kept = dict(stored.unused) if folder.layout == layout else {}
    zeros = {}
    if layout == DEEPSEEK:
        dtype = stored.kinds["und_encoder.pos_embed"][0]
        shapes = deepseek.unused_shapes(folder.cfg)
        zeros = {name: (dtype, shape) for name, shape in shapes.items() if name not in kept}
    return kept, zeros


def _export_report(
    target: Path, kinds: Kinds, stored: StoredParams, kept: Mapping, zeros: Mapping
) -> list[str]:
    numbers = sum(math.prod(shape) for _, shape in kinds.values())
    said = [f"{target}: {len(kinds)} tensors, {numbers:,} numbers"]
    if zeros:
        names = " and ".join(sorted({_component(name) for name in zeros}))
        said.append(f"wrote zeros for {len(zeros)} tensors that nothing reads ({names})")
    dropped = [name for name in stored.unused if name not in kept]
    if dropped:
        said.append(f"left out {len(dropped)} unused tensors that this layout does not have")
    return said


def _component(name: str) -> str:
    return "attn_pool" if ".attn_pool." in name else name.rsplit(".", 1)[-1]


def inspect_folder(source: Path) -> list[str]:
    """Lines that say what a folder holds: components, numbers, dtypes, and what is skipped."""
    folder = _open(source)
    stored = stored_params(folder)
    kind = "Orbax" if folder.orbax else "PyTorch"
    lines = [f"{source}: {kind} weights, config in the {folder.layout} layout"]
    counts: dict[str, int] = collections.Counter()
    dtypes = collections.defaultdict(set)
    for path, (dtype, shape) in stored.kinds.items():
        component = path.split(".")[0]
        counts[component] += math.prod(shape)
        dtypes[component].add(str(dtype))
    counts["total"] = sum(counts.values())
    dtypes["total"] = set().union(*dtypes.values())
    for component, count in counts.items():
        lines.append(f"  {component:<16}{count:>15,}  {', '.join(sorted(dtypes[component]))}")
    reasons = collections.defaultdict(list)
    for name in stored.unused:
        reasons[stored.skipped[name]].append(name)
    for reason, names in reasons.items():
        numbers = sum(stored.unused[name].size for name in names)
        lines.append(f"  not used: {', '.join(names)} ({numbers:,} numbers): {reason}")
    return lines
