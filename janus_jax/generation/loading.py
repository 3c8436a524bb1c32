"""What a checkpoint is loaded from and as: its folder, its dtype, processor files that fit."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax import checks, sharding
from janus_jax.interop.folders import SHIPPED_FOLDER, check_folder, suggestion
from janus_jax.interop.load import ShardingFor
from janus_jax.interop.processor_files import GENERATION
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.json_files import read_json_if_any
from janus_jax.processing.processor import Processor
from janus_jax.processing.prompt_settings import PREPROCESSOR, PROCESSOR
from janus_jax.processing.tokenizer import TOKENIZER

TINY = SHIPPED_FOLDER

# float16 is left out: Janus's activations pass its largest number, and the result is NaN.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What a checkpoint needs of a hub repository, in either layout.
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin")


def check_dtype(dtype, mesh: Mesh | None = None) -> jnp.dtype:
    """The compute and storage type: float32 or bfloat16, by name or as a type; None is the default.

    The default is bfloat16 on TPU and GPU, and float32 on CPU, which is no faster in bfloat16.
    It goes by the devices of the mesh, or else by JAX's default.

    Raises:
        ValueError: another dtype.
    """
    if dtype is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {name}"
            + (", in which activations overflow" if name == "float16" else "")
        )
    return jnp.dtype(DTYPES[name])


def find_folder(path_or_hub_id: str | Path | None) -> Path:
    """The checkpoint folder: the path itself, a hub snapshot, or the shipped model.

    None and "janus_tiny" are the shipped model, the latter unless there is a folder of that name.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has none or cannot be reached.
        ValueError: it is an empty text, which is no name for the folder one is in.
    """
    if path_or_hub_id is None:
        return TINY
    if path_or_hub_id == "":
        raise ValueError("a folder or a hub id must be given, got ''")
    folder, name = Path(path_or_hub_id), str(path_or_hub_id)
    return _fetch(name) if _is_hub_id(name) else check_folder(folder, fetches=True)


def find_adapter(path_or_hub_id: str | Path | None) -> Path | None:
    """The folder of a LoRA adapter: the path itself or a hub snapshot; None is none.

    Raises:
        FileNotFoundError: the hub has none or cannot be reached.
        ValueError: it is an empty text.
    """
    if path_or_hub_id is None:
        return None
    if path_or_hub_id == "":
        raise ValueError("an adapter must be a folder or a hub id, got ''")
    name = str(path_or_hub_id)
    return _fetch(name) if _is_hub_id(name) else Path(path_or_hub_id)


def _is_hub_id(name: str) -> bool:
    return not os.path.exists(name) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def _fetch(name: str) -> Path:
    import huggingface_hub  # slow to import, and needed here only

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, unknown, gated: the library has a class for each
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FileNotFoundError(
            f"{name} is no folder here, and cannot be fetched from the Hugging Face hub: "
            f"{reason.rstrip('.')}"
            + suggestion(name, fetches=True)
        ) from error


def shown_name(path_or_hub_id: str | Path | None, adapter: str | Path | None) -> str:
    """What a loaded model is called in the metadata of its images."""
    name = TINY.name if path_or_hub_id is None else str(path_or_hub_id)
    return name if adapter is None else f"{name} with adapter {adapter}"


def placement(mesh: Mesh | None, cfg: JanusConfig) -> ShardingFor:
    """The sharding of each parameter; without a mesh None, which is the default device.

    Raises:
        ValueError: the mesh does not divide the heads.
    """
    if mesh is None:
        return lambda path, shape: None
    sharding.check_mesh(mesh, cfg)
    return sharding.sharding_for(mesh)


# what generation_config.json calls them, as transformers does
STATED = {"guidance_weight": "guidance_scale", "temperature": "temperature"}


class DrawingDefaults(NamedTuple):
    """How a checkpoint draws where nothing else is asked.

    Where it states nothing, as the original code does (generation_inference.py).
    """

    guidance_weight: float = 5.0
    temperature: float = 1.0

    @classmethod
    def from_dir(cls, folder: Path) -> "DrawingDefaults":
        """Reads generation_config.json, where STATED has the names.

        Raises:
            ValueError: one is not a number that float32 keeps, or the temperature is below 0.
        """
        path = folder / GENERATION
        stated = read_json_if_any(path)
        found = {own: stated[name] for own, name in STATED.items() if stated.get(name) is not None}
        where = {own: f"{STATED[own]} in {path}" for own in found}
        defaults = cls(**{own: checks.check_kept_number(where[own], found[own]) for own in found})
        if (temperature := defaults.temperature) < 0:
            raise ValueError(f"temperature in {path} must be at least 0, got {temperature}")
        return defaults


def check_processor(folder: str | Path, processor: Processor, cfg: JanusConfig) -> None:
    """Raises ValueError unless a folder's processor files prepare what its model takes."""
    folder, largest = Path(folder), processor.tokenizer.largest_id
    if largest >= cfg.language_model.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER} has ids up to {largest}, "
            f"config.json a vocabulary of {cfg.language_model.vocab_size}"
        )
    size, tokens = processor.image_config.image_size, processor.num_image_tokens
    if (size, tokens) != (cfg.image_size, cfg.und_encoder.num_tokens):
        raise ValueError(
            f"{folder}: {PREPROCESSOR} and {PROCESSOR} prepare images of {size} pixels and "
            f"{tokens} tokens, config.json takes {cfg.image_size} pixels and "
            f"{cfg.und_encoder.num_tokens} tokens"
        )
