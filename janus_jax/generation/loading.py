"""Loading a checkpoint: finding its folder, choosing a dtype, checking its processor files."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax import checks, sharding
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import family_of, sizes_of
from janus_jax.interop.folders import BUNDLED_FOLDER, check_folder, suggestion
from janus_jax.interop.load import ShardingFor
from janus_jax.interop.processor_files import GENERATION
from janus_jax.processing.json_files import read_json_if_any
from janus_jax.processing.processor import Processor
from janus_jax.processing.prompt_settings import PREPROCESSOR, PROCESSOR
from janus_jax.processing.tokenizer import TOKENIZER

TINY = BUNDLED_FOLDER

# float16 is not supported: activations of Janus exceed its largest value, which leads to NaN.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# The files of a hub repository that a checkpoint needs, in either layout.
_HUB_FILES = ("*.json", "*.jinja", "*.safetensors", "*.bin")


def check_dtype(dtype, mesh: Mesh | None = None) -> jnp.dtype:
    """Returns the dtype in which to store and compute: float32 or bfloat16.

    dtype: a name or a type. None is bfloat16 on TPU and GPU, and float32 on CPU, where bfloat16 is
        not faster.
    mesh: its devices determine the default; without a mesh, JAX's default backend does.

    Raises:
        ValueError: if dtype is neither float32 nor bfloat16.
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
    """Returns the folder of a checkpoint.

    path_or_hub_id: a folder, or a hub id, whose snapshot is downloaded unless it is a local path.
        None is the model in this package. So is "janus_tiny", unless there is a file or folder of
        that name.

    Raises:
        FileNotFoundError: if there is no such folder, and the hub cannot be reached or has no such
            repository.
        ValueError: if path_or_hub_id is an empty string.
    """
    if path_or_hub_id is None:
        return TINY
    if path_or_hub_id == "":
        raise ValueError("expected a checkpoint folder or a Hugging Face hub id, got ''")
    folder, name = Path(path_or_hub_id), str(path_or_hub_id)
    return _fetch(name) if _is_hub_id(name) else check_folder(folder, hub_ids=True)


def find_adapter(path_or_hub_id: str | Path | None) -> Path | None:
    """Returns the folder of a LoRA adapter, or None if no adapter is given.

    path_or_hub_id: a folder, or a hub id, whose snapshot is downloaded unless it is a local path.

    Raises:
        FileNotFoundError: if a hub id does not exist or the hub cannot be reached.
        ValueError: if path_or_hub_id is an empty string.
    """
    if path_or_hub_id is None:
        return None
    if path_or_hub_id == "":
        raise ValueError("adapter must be a folder or a Hugging Face hub id, got ''")
    name = str(path_or_hub_id)
    return _fetch(name) if _is_hub_id(name) else Path(path_or_hub_id)


def _is_hub_id(name: str) -> bool:
    """Returns whether a name has the form OWNER/NAME and is not a local path."""
    return not os.path.exists(name) and bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name))


def _fetch(name: str) -> Path:
    """Downloads the snapshot of a hub repository; raises FileNotFoundError if that fails."""
    import huggingface_hub  # slow to import, and used only here

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # offline, unknown, gated: the library has many classes
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise FileNotFoundError(
            f"{name} is not a local folder and cannot be downloaded from the Hugging Face hub: "
            f"{reason.rstrip('.')}" + suggestion(name, hub_ids=True)
        ) from error


def display_name(path_or_hub_id: str | Path | None, adapter: str | Path | None) -> str:
    """Returns the name of a loaded model for the metadata of its images."""
    name = TINY.name if path_or_hub_id is None else str(path_or_hub_id)
    return name if adapter is None else f"{name} with adapter {adapter}"


def parameter_shardings(mesh: Mesh | None, cfg: ModelConfig) -> ShardingFor:
    """Returns a function (path, shape) -> sharding of a parameter.

    Without a mesh, the function returns None, which means the default device.

    Raises:
        ValueError: if the axis `tensor` of the mesh does not divide every number of heads.
    """
    if mesh is None:
        return lambda path, shape: None
    family = family_of(cfg)
    sharding.check_mesh(mesh, family.sizes(cfg).heads)
    return sharding.sharding_for(mesh, family.parameters)


# ImageDefaults field -> key in generation_config.json, which is the name in transformers.
GENERATION_KEYS = {"guidance_weight": "guidance_scale", "temperature": "temperature"}


class ImageDefaults(NamedTuple):
    """Default settings of a checkpoint for image generation.

    The values here, for checkpoints that do not set their own, are those of the original code
    (generation_inference.py).
    """

    guidance_weight: float = 5.0
    temperature: float = 1.0

    @classmethod
    def from_dir(cls, folder: Path) -> "ImageDefaults":
        """Reads the keys GENERATION_KEYS of generation_config.json, if the file exists.

        Raises:
            ValueError: if a value is not a number, is infinite or vanishes in float32, or if the
                temperature is below 0.
        """
        path = folder / GENERATION
        config = read_json_if_any(path)
        numbers = {
            field: checks.check_float32(f"{key} in {path}", config[key])
            for field, key in GENERATION_KEYS.items()
            if config.get(key) is not None
        }
        defaults = cls(**numbers)
        if (temperature := defaults.temperature) < 0:
            raise ValueError(f"temperature in {path} must be at least 0, got {temperature}")
        return defaults


def check_processor(folder: str | Path, processor: Processor, cfg: ModelConfig) -> None:
    """Raises ValueError if the processor files of a folder do not fit its model.

    Token ids must be in the vocabulary, and image size and tokens per image must be those of cfg.
    """
    folder, largest, sizes = Path(folder), processor.tokenizer.largest_id, sizes_of(cfg)
    if largest >= sizes.vocab_size:
        raise ValueError(
            f"{folder / TOKENIZER} has token ids up to {largest}, but the vocabulary size in "
            f"config.json is {sizes.vocab_size}"
        )
    size, tokens = processor.image_config.image_size, processor.num_image_tokens
    if (size, tokens) != (sizes.image_size, sizes.input_image_tokens):
        raise ValueError(
            f"{folder}: {PREPROCESSOR} and {PROCESSOR} set an image size of {size} pixels and "
            f"{tokens} tokens per image, but config.json expects {sizes.image_size} pixels and "
            f"{sizes.input_image_tokens} tokens"
        )
