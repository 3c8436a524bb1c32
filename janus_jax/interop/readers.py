"""Opens the weight files of a PyTorch checkpoint folder and reads their headers.

Quantized weights are refused; the error names the key of config.json or the tensor found.
"""

import collections
import dataclasses
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop.tensors import (
    BFLOAT16,
    Tensor,
    TensorSource,
    abbreviate,
    is_shape,
    wrapper_prefix,
)
from janus_jax.interop.torch_pickle import read_torch_file
from janus_jax.paths import bounded_size, load_json, read_json

SAFETENSORS_DTYPES = {
    "BF16": BFLOAT16,
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
DUPLICATES = "stored twice"  # the kind of problem in TensorSource.problems
SAFETENSORS = "model.safetensors"
TORCH_BIN = "pytorch_model.bin"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf")  # supported or not
MAX_HEADER = 100_000_000  # bytes; the safetensors library has the same limit
MAX_WEIGHTS = 2**63 - 1  # bytes of a file; only its header is read at once
_LFS_POINTER = b"version https://git-lfs"  # replaces each large file in a clone without Git LFS
# Keys of config.json: transformers, MLX, older versions of compressed-tensors.
QUANTIZATION_KEYS = ("quantization_config", "quantization", "compression_config")
DECODER_SECTIONS = ("language_config", "text_config")
QUANTIZED_DTYPES = ("F8_", "F6_", "F4", "U16", "U32")  # of safetensors; MLX packs bits in U32
# Names of the tensors that each method stores in addition to a weight, or instead of it.
QUANTIZATION_TENSORS = {
    "bitsandbytes, 4 bits": re.compile(
        r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
    ),
    "bitsandbytes, 8 bits": re.compile(r".*\.(SCB|weight_format)"),
    "GPTQ or AWQ": re.compile(r".*\.(qweight|qzeros|g_idx)"),
    "fp8 or compressed-tensors": re.compile(
        r".*\.(weight_scale|weight_scale_inv|weight_packed|weight_zero_point|input_scale)"
    ),
    "MLX": re.compile(r".*\.(scales|biases)"),
}
FLOAT_WEIGHTS_ONLY = (
    "only float32, float16 and bfloat16 weights are supported: use the original checkpoint, such "
    "as deepseek-ai/Janus-Pro-7B, or dequantize this one and save it as bfloat16"
)

GGUF_UNSUPPORTED = (
    "GGUF files are not supported; use a checkpoint folder such as deepseek-ai/Janus-Pro-1B"
)

Contents = tuple[dict[str, Tensor], list[str]]  # tensors by name, and names stored twice


def open_checkpoint(
    folder: Path | str, names: tuple[str, str] = (SAFETENSORS, TORCH_BIN)
) -> TensorSource:
    """Opens a folder's weights: safetensors before `.bin`, a single file before an index.

    names: the names of the safetensors file and of the `.bin` file.

    Raises:
      FileNotFoundError: the folder does not exist or holds no weights, or the index names a missing
        shard.
      ValueError: a file is truncated, damaged or not a regular file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for name, read in zip(names, (read_safetensors, _read_torch), strict=True):
        index = folder / f"{name}.index.json"
        if os.path.lexists(folder / name):
            tensors, duplicates = _read_file(folder / name, read)
            problems = {DUPLICATES: duplicates} if duplicates else {}
            return _strip_wrapper_prefix(TensorSource(folder, tensors, problems))
        if os.path.lexists(index):
            return _strip_wrapper_prefix(_open_shards(folder, index, read))
    expected = ", ".join(f"{name}[.index.json]" for name in names)
    raise FileNotFoundError(
        f"{folder} has no weights: expected one of {expected}{_describe_other_weights(folder)}"
    )


def _describe_other_weights(folder: Path) -> str:
    """Lists a folder's weight files with other names or formats, and what to do about them."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in WEIGHT_SUFFIXES)
    if not names:
        return ""
    found = f", found {abbreviate(list(map(shorten_text, names)))}"
    if any(name.lower().endswith(".gguf") for name in names):
        return f"{found}; {GGUF_UNSUPPORTED}"
    shards = all("-of-" in name for name in names)
    return found + ("; shards need the index file that was saved with them" if shards else "")


def _strip_wrapper_prefix(source: TensorSource) -> TensorSource:
    """Removes a wrapper's prefix if all tensor names have it."""
    prefix = wrapper_prefix(source.names)
    if not prefix:
        return source
    tensors = {name.removeprefix(prefix): tensor for name, tensor in source.tensors.items()}
    return dataclasses.replace(source, tensors=tensors)


def _read_file(path: Path, read: Callable[[Path], Contents]) -> Contents:
    bounded_size(path, MAX_WEIGHTS)
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not a weights file; run `git lfs pull`")
    return read(path)


def _read_torch(path: Path) -> Contents:
    return read_torch_file(path), []


def read_safetensors(path: Path) -> Contents:
    """Reads a safetensors file's header: its tensors by name, and names that it stores twice.

    Format: uint64 header size, JSON header (name -> dtype, shape, data_offsets), tensor data.

    Raises:
      ValueError: the file is truncated or damaged, or a dtype is not supported.
    """
    size = bounded_size(path, MAX_WEIGHTS)
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if 8 + header_size > size:
            raise ValueError(
                f"{path} is truncated: its header needs {header_size} bytes, the file has {size}"
            )
        if header_size > MAX_HEADER:
            raise ValueError(
                f"{path} must have a header of at most {MAX_HEADER} bytes, got {header_size}"
            )
        raw = file.read(header_size)
    header, duplicates = _parse_header(path, raw)
    tensors = {
        name: _locate(path, name, fields, 8 + header_size)
        for name, fields in header.items()
        if name != "__metadata__"
    }
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise ValueError(f"{path} is truncated: its tensors need {end} bytes, the file has {size}")
    if not duplicates:  # the conversion plan reports duplicates, with all other problems
        _check_contiguous(path, tensors, 8 + header_size, size)
    return tensors, duplicates


def _check_contiguous(path: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    """Raises ValueError unless the tensors fill the file from `start` without gaps or overlaps."""
    spans = sorted((tensor.offset, tensor.end, name) for name, tensor in tensors.items())
    for begin, end, name in [*spans, (size, size, "the end of the file")]:
        if begin != start:
            raise ValueError(
                f"{path} has a damaged safetensors header: {shorten_text(name)} must be at byte "
                f"{start}, directly after the data before it, got {begin}"
            )
        start = end


def _parse_header(path: Path, raw: bytes) -> tuple[dict, list[str]]:
    """Parses a safetensors header; also returns the keys that it holds twice."""
    duplicates: list[str] = []

    def to_dict(pairs: list[tuple[str, object]]) -> dict:
        counts = collections.Counter(name for name, _ in pairs)
        duplicates.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    try:
        header = load_json(raw, object_pairs_hook=to_dict)
    except ValueError as error:
        raise ValueError(f"{path} has a damaged safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has a damaged safetensors header: not a JSON object")
    return header, duplicates


def _locate(path: Path, name: str, fields: dict, data_start: int) -> Tensor:
    """Returns the tensor that an entry of a safetensors header describes."""
    short_name = shorten_text(name)

    def damaged() -> ValueError:
        return ValueError(
            f"{path} has a damaged safetensors header at {short_name}: {shorten(fields)}"
        )

    try:
        dtype_name, shape = fields["dtype"], tuple(fields["shape"])
        start, end = fields["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise damaged() from None
    if not isinstance(dtype_name, str) or dtype_name not in SAFETENSORS_DTYPES:
        found = f"{short_name} has dtype {shorten(dtype_name)}"
        if str(dtype_name).startswith(QUANTIZED_DTYPES):
            raise ValueError(f"{path} holds quantized weights ({found}); {FLOAT_WEIGHTS_ONLY}")
        raise ValueError(f"{path}: {found}, expected one of {', '.join(SAFETENSORS_DTYPES)}")
    dtype = SAFETENSORS_DTYPES[dtype_name]
    if not is_shape(shape, dtype) or not is_shape((start,), dtype) or not is_shape((end,), dtype):
        raise damaged()
    size = dtype.itemsize * math.prod(shape)
    if end - start != size:
        raise ValueError(
            f"{path}: {short_name} of shape {shorten(shape)} needs {size} bytes, has {end - start}"
        )
    return Tensor(path, data_start + start, dtype, shape)


def _is_file_name(name: str) -> bool:
    """Returns whether `name` is a file name without folders (Path("..").name is "..")."""
    plain = name not in ("", "..") and Path(name).name == name
    return plain and len(name.encode(errors="replace")) <= 255


def _open_shards(
    folder: Path, index: Path, read: Callable[[Path], Contents]
) -> TensorSource:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ValueError(f"{index} must have a weight_map from tensor names to file names")
    files = sorted(set(weight_map.values()))
    if elsewhere := [shorten(name) for name in files if not _is_file_name(name)]:
        raise ValueError(f"{index} must name files in its own folder, got {abbreviate(elsewhere)}")
    if missing := [shorten(name) for name in files if not (folder / name).exists()]:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(files)} shards named in {index} are missing: "
            f"{abbreviate(missing)}"
        )
    tensors: dict[str, Tensor] = {}
    duplicates, unlisted = [], []
    for file in files:
        in_shard, twice = _read_file(folder / file, read)
        duplicates += twice
        for name, tensor in in_shard.items():
            if name in tensors:
                duplicates.append(name)
            elif name not in weight_map:
                unlisted.append(name)
            tensors.setdefault(name, tensor)
    misplaced = [n for n, f in weight_map.items() if n not in tensors or tensors[n].file.name != f]
    problems = {
        DUPLICATES: duplicates,
        "missing in the shard that the index names": [n for n in misplaced if n not in duplicates],
        "stored but not in the index": unlisted,
    }
    return TensorSource(folder, tensors, {kind: names for kind, names in problems.items() if names})


def check_not_quantized(config: Mapping, source: TensorSource) -> None:
    """Raises ValueError if the weights are quantized.

    A quantization key in config.json alone is not an error: the weights may be plain floats.
    """
    key = _quantization_key(config)
    tensor = _quantized_name(source) or (key and _non_float_weight(source))
    if tensor:
        reason = f"{key}; {tensor}" if key else tensor
        raise ValueError(
            f"{source.folder} holds quantized weights ({reason}); {FLOAT_WEIGHTS_ONLY}"
        )


def _quantization_key(config: Mapping) -> str:
    """Describes the first quantization key in config.json; '' if there is none."""
    sections = {"": config} | {f"{key}.": config.get(key) for key in DECODER_SECTIONS}
    for prefix, section in sections.items():
        for key in QUANTIZATION_KEYS:
            value = section.get(key) if isinstance(section, Mapping) else None
            if value is not None:
                method = value.get("quant_method") if isinstance(value, Mapping) else None
                suffix = "" if method is None else f" with quant_method {shorten(method)}"
                return f"config.json has {prefix}{key}{suffix}"
    return ""


def _quantized_name(source: TensorSource) -> str:
    """Describes the first tensor that has a name of a quantization method; '' if none has."""
    for method, pattern in QUANTIZATION_TENSORS.items():
        for name in source.names:
            if pattern.fullmatch(name):
                return f"tensor {shorten_text(name)} is a tensor of {method}"
    return ""


def _non_float_weight(source: TensorSource) -> str:
    """Describes the first weight that is not floating point; '' if there is none."""
    for name in source.names:
        if source.dtype(name).kind not in "fV" and name.endswith(".weight"):
            return f"tensor {shorten_text(name)} is {source.dtype(name)}"
    return ""
