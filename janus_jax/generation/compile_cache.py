"""JAX's persistent compilation cache, so that only the first run of a command compiles."""

import os
from pathlib import Path

import jax

# Environment variable; the value 0 leaves JAX's settings unchanged.
SWITCH = "JANUS_JAX_COMPILE_CACHE"

# Programs that compile faster than this are not stored (JAX's default is 1 second).
_MIN_COMPILE_SECONDS = 0.2


def cache_dir() -> Path:
    """Returns the cache folder: janus_jax/xla in $XDG_CACHE_HOME, or else in ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "janus_jax" / "xla"


def enable() -> None:
    """Enables JAX's persistent compilation cache in cache_dir().

    Does nothing if JAX already has a cache folder, if the environment variable
    JANUS_JAX_COMPILE_CACHE is 0, or if the folder cannot be created.
    """
    if os.environ.get(SWITCH) == "0" or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
