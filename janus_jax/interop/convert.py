"""Converts checkpoint folders on the host, for `python -m convert` and for the model of a run."""

import collections
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from janus_jax.families.family import TRANSFORMERS, Shape
from janus_jax.families.registry import write_config
from janus_jax.interop import orbax
from janus_jax.interop.files import CONFIG, Report, write_safetensors
from janus_jax.interop.load import Folder, open_folder, table_for
from janus_jax.interop.new_folder import new_folder
from janus_jax.interop.processor_files import check_files, copy_files, translate_files
from janus_jax.interop.rules import Step, export_steps, torch_shape
from janus_jax.interop.stored import StoredParams, stored_params
from janus_jax.paths import write_json
from janus_jax.processing.tokenizer import Tokenizer

Metadata = dict[str, tuple[np.dtype, Shape]]  # by tensor name


def import_folder(
    source: Path,
    target: Path,
    overwrite: bool,
    adapter: Path | None = None,
    progress: Report | None = None,
) -> list[str]:
    """Converts a checkpoint folder of any kind to an Orbax folder.

    Args:
      source: the folder to read.
      target: the folder to write.
      overwrite: whether an existing checkpoint folder is replaced.
      adapter: a LoRA adapter in PEFT's format to merge, or None.
      progress: called with the bytes written so far and the total. Orbax compresses the arrays, so
        the first number may stay below the second.

    Returns:
      Lines of a report for the user.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: as `open_folder`, `make_plan`, `new_folder`.
    """
    _check_target(source, target, adapter)
    folder = _open(source, adapter)
    stored = stored_params(folder)
    orbax.save(
        target,
        {path: stored.read(path) for path in stored.metadata},
        config=folder.config,
        files_from=source,
        unused=stored.unused,
        overwrite=overwrite,
        progress=progress,
    )
    size = sum(math.prod(shape) for _, shape in stored.metadata.values())
    line = f"{target}: {len(stored.metadata)} parameter arrays with {size:,} values"
    line += f"; kept {len(stored.unused)} unused tensors in {orbax.UNUSED}"
    return [line, *_merge_report(adapter)]


def export_folder(
    source: Path,
    target: Path,
    layout: str,
    overwrite: bool,
    adapter: Path | None = None,
    progress: Report | None = None,
) -> list[str]:
    """Converts a checkpoint folder of any kind to PyTorch safetensors in the given layout.

    DeepSeek's class expects tensors that Janus does not use (SigLIP's pooling head, codebook_used).
    In that layout they are copied from the source, or written as zeros if the source has none.

    Args:
      source: the folder to read.
      target: the folder to write.
      layout: DEEPSEEK or TRANSFORMERS.
      overwrite: whether an existing checkpoint folder is replaced.
      adapter: a LoRA adapter in PEFT's format to merge, or None.
      progress: called with the bytes written so far and the total.

    Returns:
      Lines of a report for the user.

    Raises:
      FileNotFoundError, FileExistsError, ValueError: as `open_folder`, `make_plan`, `new_folder`.
    """
    _check_target(source, target, adapter)
    folder = _open(source, adapter)
    report = write_folder(folder, stored_params(folder), target, layout, overwrite, progress)
    return [*report, *_merge_report(adapter)]


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
    """Like export_folder, but takes the parameters from `stored` and all else from `folder`."""
    source = folder.path
    needs_image_token = layout == TRANSFORMERS and folder.layout != layout
    image_token_id = Tokenizer.from_dir(source).image_id if needs_image_token else None
    config = write_config(folder.cfg, folder.config, layout, image_token_id)
    table = table_for(layout, folder.cfg)
    steps = {step.torch: step for step in export_steps(table, stored.metadata)}
    metadata = {name: _tensor_metadata(step, stored.metadata) for name, step in steps.items()}
    copied, zeros = _unused(folder, stored, layout)
    metadata |= {name: (array.dtype, array.shape) for name, array in copied.items()} | zeros

    def read(name: str) -> np.ndarray:
        if name in steps:
            return steps[name].op.to_torch(tuple(map(stored.read, steps[name].paths)))
        return copied[name] if name in copied else np.zeros(zeros[name][1], zeros[name][0])

    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in metadata.values())
    with new_folder(target, overwrite, size) as staging:
        if folder.layout == layout:
            copy_files(source, staging)
        else:
            translate_files(source, staging, layout, folder.cfg)
        write_json(staging / CONFIG, config)
        write_safetensors(staging, dict(sorted(metadata.items())), read, progress=progress)
    return _export_report(target, metadata, stored, copied, zeros)


def _open(source: Path, adapter: Path | None = None) -> Folder:
    folder = open_folder(source, adapter)
    check_files(folder.path)
    return folder


def _check_target(source: Path, target: Path, adapter: Path | None) -> None:
    """Raises ValueError if writing the target would replace a folder that is read."""
    target, inputs = Path(target).resolve(), {"SRC": source, "--adapter": adapter}
    for name, folder in inputs.items():
        folder = None if folder is None else Path(folder).resolve()
        if folder and target in (folder, *folder.parents):
            raise ValueError(f"{name} must not be DST or inside DST, got {folder} and DST {target}")


def _tensor_metadata(step: Step, metadata: Mapping) -> tuple[np.dtype, Shape]:
    """Returns the dtype and shape of a PyTorch tensor from those of its parameters."""
    dtypes = {metadata[path][0] for path in step.paths}
    if len(dtypes) > 1:
        raise ValueError(
            f"the parameters of {step.torch} must have one dtype, got "
            f"{' and '.join(sorted(map(str, dtypes)))}"
        )
    return dtypes.pop(), torch_shape(step, {path: metadata[path][1] for path in step.paths})


def _unused(
    folder: Folder, stored: StoredParams, layout: str
) -> tuple[dict[str, np.ndarray], Metadata]:
    """Returns the unused tensors to copy, and the unused tensors to write as zeros."""
    copied = dict(stored.unused) if folder.layout == layout else {}
    unused = folder.family.layouts[layout].unused(folder.cfg)
    zeros = {
        name: (stored.metadata[path][0], shape)
        for name, (path, shape) in unused.items()
        if name not in copied
    }
    return copied, zeros


def _export_report(
    target: Path, metadata: Metadata, stored: StoredParams, copied: Mapping, zeros: Mapping
) -> list[str]:
    size = sum(math.prod(shape) for _, shape in metadata.values())
    lines = [f"{target}: {len(metadata)} tensors with {size:,} values"]
    if zeros:
        names = " and ".join(sorted({_component(name) for name in zeros}))
        lines.append(f"wrote zeros for {len(zeros)} unused tensors ({names})")
    skipped = [name for name in stored.unused if name not in copied]
    if skipped:
        lines.append(f"skipped {len(skipped)} unused tensors that this layout does not have")
    return lines


def _component(name: str) -> str:
    return "attn_pool" if ".attn_pool." in name else name.rsplit(".", 1)[-1]


def inspect_folder(source: Path) -> list[str]:
    """Describes a folder's weights.

    Returns:
      Lines for the user: components, their parameter counts and dtypes, and unused tensors.
    """
    folder = _open(source)
    stored = stored_params(folder)
    storage = "Orbax" if folder.is_orbax else "PyTorch"
    lines = [f"{source}: {storage} weights, config in the {folder.layout} layout"]
    counts: dict[str, int] = collections.Counter()
    dtypes = collections.defaultdict(set)
    for path, (dtype, shape) in stored.metadata.items():
        component = folder.family.parameter_table.find(path).component
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
        size = sum(stored.unused[name].size for name in names)
        lines.append(f"  not used: {', '.join(names)} ({size:,} values): {reason}")
    return lines
