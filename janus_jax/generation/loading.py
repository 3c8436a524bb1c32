"""What `load` needs besides a checkpoint: the compilation cache, shardings, default settings."""

import os
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from janus_jax import checks, sharding
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import family_of
from janus_jax.interop.folders import BUNDLED
from janus_jax.interop.load import ShardingFor, on_default_device
from janus_jax.interop.processor_files import GENERATION
from janus_jax.paths import read_json_if_any

# Environment variable; the value 0 leaves JAX's settings unchanged.
CACHE_SWITCH = "JANUS_JAX_COMPILE_CACHE"

# Programs that compile faster than this are not stored (JAX's default is 1 second).
_MIN_COMPILE_SECONDS = 0.2


def _cache_dir() -> Path:
    """Returns the cache folder: janus_jax/xla in $XDG_CACHE_HOME, or else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "janus_jax" / "xla"


def enable_compile_cache() -> None:
    """Enables JAX's persistent compilation cache, so that only the first run of a command compiles.

    Does nothing if JAX already has a cache folder, if the environment variable
    JANUS_JAX_COMPILE_CACHE is 0, or if the folder cannot be created.
    """
    if os.environ.get(CACHE_SWITCH) == "0" or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = _cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)


def display_name(path_or_hub_id: str | Path | None, adapter: str | Path | None) -> str:
    """Returns the name of a loaded model for the metadata of its images."""
    name = BUNDLED if path_or_hub_id is None else str(path_or_hub_id)
    return name if adapter is None else f"{name} with adapter {adapter}"


def parameter_shardings(mesh: Mesh | None, cfg: ModelConfig) -> ShardingFor:
    """Returns a function (path, shape) -> sharding of a parameter.

    Without a mesh, all parameters are on the default device.

    Raises:
        ValueError: if the axis `tensor` of the mesh does not divide every number of heads.
    """
    if mesh is None:
        return on_default_device
    family = family_of(cfg)
    sharding.check_mesh(mesh, family.sizes(cfg).heads)
    return sharding.sharding_for(mesh, family.parameter_table)


# ImageDefaults field -> key in generation_config.json, which is the name in transformers.
GENERATION_KEYS = {"guidance_weight": "guidance_scale", "temperature": "temperature"}


class ImageDefaults(NamedTuple):
    """Default settings of a checkpoint for image generation.

    The values here, for checkpoints that do not set their own, are those of the original code
    (generation_inference.py).
    """

    guidance_weight: float = 5.0
    temperature: float = 1.0

    def resolve(self, guidance_weight: float | None, temperature: float | None) -> "ImageDefaults":
        """Returns the settings of a request, with the defaults in place of None."""
        return type(self)(
            self.guidance_weight if guidance_weight is None else guidance_weight,
            self.temperature if temperature is None else temperature,
        )

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
