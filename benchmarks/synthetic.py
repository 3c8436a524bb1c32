"""Writes a checkpoint folder like that of a released Janus-Pro, with random weights.

Tensor names, shapes and config are those of the released files, which are recorded in tests/golden.
The tokenizer is that of Janus-Pro-1B, and the weights are bfloat16. Does not need torch; only one
tensor is in memory at a time.
"""

import functools
import gzip
import json
import lzma
import math
import pickle
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from janus_jax.interop.files import CONFIG, write_safetensors
from janus_jax.interop.readers import TORCH_BIN
from janus_jax.interop.tensors import BFLOAT16
from janus_jax.paths import write_json

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MODELS = ("Janus-Pro-1B", "Janus-Pro-7B")
STD = 0.02  # standard deviation of all weights; scales of norms have mean 1
POOL = 2**22 + 15  # random numbers that all tensors reuse; odd, so that no two rows are equal
SEVEN_B_TOKENS = "øöúÿõ÷ûýÀùÁþü"  # added tokens of the 7B tokenizer that 1B does not have
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}


@functools.cache
def listing(model: str = MODELS[0], layers: int | None = None) -> dict:
    """Returns a dict of 'config', a released config.json, and 'tensors', name -> shape.

    Tensors are in the order of the released file. layers: number of decoder layers (default: all).

    Raises:
      ValueError: `layers` is out of range.
    """
    recorded = json.loads(gzip.decompress((GOLDEN / "listings" / f"{model}.json.gz").read_bytes()))
    if layers is not None:
        decoder = recorded["config"]["language_config"]
        if not 1 <= layers <= decoder["num_hidden_layers"]:
            limit = decoder["num_hidden_layers"]
            raise ValueError(f"layers of {model} must be from 1 to {limit}, got {layers}")
        decoder["num_hidden_layers"] = layers
        layer = re.compile(r"language_model\.model\.layers\.(\d+)\.").match
        for name in list(recorded["tensors"]):
            if (match := layer(name)) and int(match[1]) >= layers:
                del recorded["tensors"][name]
    return recorded


def tokenizer() -> dict:
    """Returns tokenizer.json of Janus-Pro-1B, derived from that of 7B.

    It has fewer added tokens and does not add a BOS token.
    """
    spec = json.loads(lzma.decompress((GOLDEN / "tokenizer_7b.json.xz").read_bytes()))
    first = spec["added_tokens"][0]["id"]
    tokens = [token for token in spec["added_tokens"] if token["content"] not in SEVEN_B_TOKENS]
    spec["added_tokens"] = [token | {"id": first + i} for i, token in enumerate(tokens)]
    spec["post_processor"] = BYTE_LEVEL | {"use_regex": True}
    return spec


@functools.cache
def _pool() -> np.ndarray:
    normal = np.random.default_rng(0).standard_normal(POOL, np.float32)
    return (STD * normal).astype(BFLOAT16)


def values(name: str, shape: Sequence[int]) -> np.ndarray:
    """Returns the bfloat16 values of a tensor, the same ones in every call."""
    start = zlib.crc32(name.encode()) % POOL
    flat = np.resize(np.roll(_pool(), -start), math.prod(shape))
    if "norm" in name and name.endswith(".weight"):
        flat = (1 + flat.astype(np.float32)).astype(BFLOAT16)
    return flat.reshape(shape)


def write_folder(
    folder: Path,
    weights: str = "safetensors",
    model: str = MODELS[0],
    layers: int | None = None,
) -> Path:
    """Writes the folder (4.2 GB for the whole Janus-Pro-1B) and returns its path.

    weights: 'safetensors' writes model.safetensors, 'bin' pytorch_model.bin as released.
    model, layers: see listing.
    """
    folder.mkdir(parents=True)
    config, tensors = listing(model, layers).values()
    write_small_files(folder, config)
    if weights == "bin":
        write_torch_file(folder / TORCH_BIN, tensors)
    else:
        kinds = {name: (BFLOAT16, tuple(shape)) for name, shape in tensors.items()}
        write_safetensors(folder, kinds, lambda name: values(name, tensors[name]))
    return folder


def write_small_files(folder: Path, config: Mapping) -> None:
    """Writes the config, tokenizer and processor files into a folder."""
    for path in (GOLDEN / "janus_pro_1b").glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / CONFIG, config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False), "utf-8")


def write_torch_file(path: Path, tensors: Mapping[str, list[int]]) -> None:
    """Writes tensors with random `values` as `torch.save` writes a bfloat16 state dict."""
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _state_dict_pickle(tensors))
        archive.writestr(f"{root}/byteorder", "little")
        for key, (name, shape) in enumerate(tensors.items()):
            flat = values(name, shape).reshape(-1)
            archive.writestr(f"{root}/data/{key}", flat.view(np.uint8).data)
        archive.writestr(f"{root}/version", "3\n")


def _state_dict_pickle(tensors: Mapping[str, list[int]]) -> bytes:
    """Returns the pickle, protocol 2, of {name: tensor}, where tensor i is the whole of storage i.

    The opcodes are written directly, because the pickle module imports every class that it names
    and torch may not be installed.
    """
    parts = [pickle.PROTO + b"\x02", _global("collections", "OrderedDict"), pickle.EMPTY_TUPLE]
    parts += [pickle.REDUCE, pickle.MARK]
    for key, (name, shape) in enumerate(tensors.items()):
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        storage = [_text("storage"), _global("torch", "BFloat16Storage"), _text(str(key))]
        storage += [_text("cpu"), _integer(math.prod(shape))]
        no_hooks = _global("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
        arguments = [_tuple(storage) + pickle.BINPERSID, _integer(0)]
        arguments += [_tuple(map(_integer, shape)), _tuple(map(_integer, strides))]
        arguments += [pickle.NEWFALSE, no_hooks]
        rebuild = _global("torch._utils", "_rebuild_tensor_v2")
        parts += [_text(name), rebuild, _tuple(arguments), pickle.REDUCE]
    return b"".join([*parts, pickle.SETITEMS, pickle.STOP])


def _global(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def _text(text: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(text.encode())) + text.encode()


def _integer(number: int) -> bytes:
    return pickle.BININT + struct.pack("<i", number)


def _tuple(parts) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE
