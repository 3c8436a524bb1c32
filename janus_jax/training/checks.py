"""What is asked of a config before training starts, so that no hours are lost to a wrong one."""

import os
from collections.abc import Iterable
from pathlib import Path

from janus_jax.interop.files import CONFIG
from janus_jax.interop.load import open_folder
from janus_jax.interop.readers import SAFETENSORS
from janus_jax.models.janus import JanusConfig


def check_counts(cfg, *names: str) -> None:
    """Raises ValueError if a setting of these names, or one that every run has, is below 1."""
    for name in ("steps", "log_every", "save_every", *names):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {cfg[name]}")
    if cfg.seed < 0:
        raise ValueError(f"seed must be at least 0, got {cfg.seed}")


def check_output(output: str, cfg: JanusConfig, small_files: Iterable[str]) -> None:
    """May training make the folder `output`, or replace what is there?

    It may replace what an earlier run left: a model of the same sizes, and no other file than
    that one's and `small_files`.

    Raises:
      ValueError: it may not, or the folder cannot be written.
    """
    folder = Path(output).resolve()
    there = next(path for path in folder.parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"output {output}: {there} is not a folder that can be written to")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output {output} is a file, not a folder")
    names = {path.name for path in folder.iterdir()}
    astray = sorted(names - {CONFIG, SAFETENSORS, *small_files})
    if astray:
        raise ValueError(f"output {output} holds {astray[0]}, no file of training: not replaced")
    if names and ((CONFIG not in names) or open_folder(folder).cfg != cfg):
        raise ValueError(f"output {output} holds no model of the sizes to train: not replaced")
