"""A folder like a released Janus-Pro in all but its values, which are random.

Names, shapes and config are those of the released files, kept in tests/golden, and the tokenizer is
that of Janus-Pro-1B; weights are bfloat16. Needs no torch and, at a time, the memory of one tensor.
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
from janus_jax.processing.json_files import write_json

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
MODELS = ("Janus-Pro-1B", "Janus-Pro-7B")
STD = 0.02  # of all values but the norms' scales, which are around 1
POOL = 2**22 + 15  # random numbers that all tensors are cut from; odd, so that no rows are equal
SEVEN_B_TOKENS = "øöúÿõ÷ûýÀùÁþü"  # added tokens that the 1B tokenizer lacks
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}


@functools.cache
def listing(model: str = MODELS[0], layers: int | None = None) -> dict:
    """'config': a released config.json; 'tensors': shape by name, in the file's order.

    layers: how many of the decoder's layers there are; by default all.
    """
    found = json.loads(gzip.decompress((GOLDEN / "listings" / f"{model}.json.gz").read_bytes()))
    if layers is not None:
        decoder = found["config"]["language_config"]
        if not 1 <= layers <= decoder["num_hidden_layers"]:
            most = decoder["num_hidden_layers"]
            raise ValueError(f"the layers of {model} must be 1 to {most}, got {layers}")
        decoder["num_hidden_layers"] = layers
        layer = re.compile(r"language_model\.model\.layers\.(\d+)\.").match
        for name in list(found["tensors"]):
            if (match := layer(name)) and int(match[1]) >= layers:
                del found["tensors"][name]
    return found


def tokenizer() -> dict:
    """tokenizer.json of Janus-Pro-1B, from that of 7B: fewer added tokens, no BOS by itself."""
    spec = json.loads(lzma.decompress((GOLDEN / "tokenizer_7b.json.xz").read_bytes()))
    first = spec["added_tokens"][0]["id"]
    kept = [token for token in spec["added_tokens"] if token["content"] not in SEVEN_B_TOKENS]
    spec["added_tokens"] = [token | {"id": first + i} for i, token in enumerate(kept)]
    spec["post_processor"] = BYTE_LEVEL | {"use_regex": True}
    return spec


@functools.cache
def _pool() -> np.ndarray:
    normal = np.random.default_rng(0).standard_normal(POOL, np.float32)
    return (STD * normal).astype(BFLOAT16)


def values(name: str, shape: Sequence[int]) -> np.ndarray:
    """bfloat16 values of a tensor, the same at every call."""
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
    """Writes the folder, 4.2 GB if it is the whole Janus-Pro-1B, and returns it.

    weights: 'safetensors' is model.safetensors; 'bin' is pytorch_model.bin, as released.
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
    """Writes config, tokenizer and processor files into a folder."""
    for path in (GOLDEN / "janus_pro_1b").glob("*.json"):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / CONFIG, config)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(), ensure_ascii=False), "utf-8")


def write_torch_file(path: Path, tensors: Mapping[str, list[int]]) -> None:
    """Writes `values` of these names as `torch.save` writes a state dict of bfloat16 tensors."""
    root = path.stem
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", _state_dict_pickle(tensors))
        archive.writestr(f"{root}/byteorder", "little")
        for key, (name, shape) in enumerate(tensors.items()):
            flat = values(name, shape).reshape(-1)
            archive.writestr(f"{root}/data/{key}", flat.view(np.uint8).data)
        archive.writestr(f"{root}/version", "3\n")


def _state_dict_pickle(tensors: Mapping[str, list[int]]) -> bytes:
    """Pickle of {name: tensor}, protocol 2, where tensor i is all of storage i.

    By hand, since pickle looks up every name that it writes, and torch is not there to be found.
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
