"""The folders that a run starts from and writes, and what is asked of a config before it starts,
so that no hours are lost to a wrong one."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp

from janus_jax.data.scenes import IMAGE_SIZE
from janus_jax.interop.files import CONFIG, small_files
from janus_jax.interop.folders import check_folder
from janus_jax.interop.load import Folder, build_model, load_params, open_folder
from janus_jax.interop.processor_files import copy_files
from janus_jax.interop.readers import SAFETENSORS
from janus_jax.interop.save import save_deepseek
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.paths import check_local
from janus_jax.processing.prompt_settings import TEMPLATE_FOLDER


@dataclasses.dataclass(frozen=True)
class Start:
    """The folder that training goes on from, and the folder that its result goes to."""

    source: Folder
    output: str

    @classmethod
    def from_config(cls, cfg) -> "Start":
        """cfg: ConfigDict with init and output.

        Raises FileNotFoundError or ValueError for a folder that cannot be used.
        """
        init = check_init(cfg.init)
        if init.resolve() == Path(cfg.output).resolve():
            raise ValueError(f"init and output must be two folders, got {cfg.init} for both")
        source = open_folder(init)
        if source.cfg.image_size != IMAGE_SIZE:
            sides = f"{source.cfg.image_size} pixels a side at {cfg.init}"
            raise ValueError(f"init must be a model of {IMAGE_SIZE} pixels a side, got {sides}")
        written = {path.name for path in small_files(source.path)} | {TEMPLATE_FOLDER}
        check_output(cfg.output, source.cfg, written)
        return cls(source, cfg.output)

    def load(self) -> Janus:
        """The model of the first folder, in float32."""
        source = self.source
        params = load_params(source.path, source.cfg, lambda path, shape: None, jnp.float32)
        return build_model(source.cfg, params)

    def save(self, model: Janus) -> None:
        """Writes the model and copies the small files of the first folder beside it."""
        save_deepseek(self.output, model, functools.partial(copy_files, self.source.path))


def check_init(init: str) -> Path:
    """Returns the checkpoint folder `init`; "janus_tiny" is the shipped model.

    Raises FileNotFoundError if it is not a checkpoint folder.
    """
    try:
        return check_folder(init)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init must be a checkpoint folder: {error}") from None


def check_counts(cfg, *names: str) -> None:
    """Raises ValueError if a setting of these names, or one that every run has, is below 1."""
    for name in ("steps", "log_every", "save_every", *names):
        if cfg[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {cfg[name]}")
    if cfg.seed < 0:
        raise ValueError(f"seed must be at least 0, got {cfg.seed}")


def check_output(output: str, cfg: JanusConfig, others: Iterable[str]) -> None:
    """May training make the folder `output`, or replace what is there?

    It may replace what an earlier run left: a model of the same sizes, and no other file than
    that one's and `others`.

    Raises:
      ValueError: it may not, or the folder cannot be written.
    """
    check_local("output", output)
    folder = Path(output).resolve()
    there = next(path for path in folder.parents if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"output {output}: {there} is not a folder that can be written to")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output {output} is a file, not a folder")
    names = {path.name for path in folder.iterdir()}
    astray = sorted(names - {CONFIG, SAFETENSORS, *others})
    if astray:
        raise ValueError(f"output {output} holds {astray[0]}, no file of training: not replaced")
    if names and ((CONFIG not in names) or open_folder(folder).cfg != cfg):
        raise ValueError(f"output {output} holds no model of the sizes to train: not replaced")
