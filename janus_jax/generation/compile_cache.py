"""Compiled programs kept on disk, so that only the first run of a command compiles them."""

import os
from pathlib import Path

import jax

# 0 leaves JAX's own settings alone.
SWITCH = "JANUS_JAX_COMPILE_CACHE"

# Programs quicker to compile than this are not worth a file (JAX's own default is 1).
_SECONDS = 0.2


def cache_dir() -> Path:
    """Where programs are kept by default: $XDG_CACHE_HOME or ~/.cache, janus_jax/xla."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "janus_jax" / "xla"


def enable() -> None:
    """Turns on JAX's persistent compilation cache, unless the user has set one or switched it off.

    A folder that cannot be made leaves it off: a cache is never a reason to fail.
    """
    if os.environ.get(SWITCH) == "0" or jax.config.jax_compilation_cache_dir:
        return
    try:
        folder = cache_dir()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: no home directory
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
