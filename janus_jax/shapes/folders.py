"""Folders of the tasks "vq" and "encoder", and checks of their configs before training starts."""

import dataclasses
import functools
import os
from collections.abc import Iterable
from pathlib import Path

import jax.numpy as jnp

from janus_jax.interop.files import CONFIG, small_files
from janus_jax.interop.load import Folder, build_model, load_params, open_folder
from janus_jax.interop.processor_files import copy_files
from janus_jax.interop.readers import SAFETENSORS
from janus_jax.interop.save import save_deepseek
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.paths import check_local
from janus_jax.processing.prompt_settings import TEMPLATE_FOLDER
from janus_jax.shapes.scenes import IMAGE_SIZE
from janus_jax.training.settings import check_init


@dataclasses.dataclass(frozen=True)
class TrainingFolders:
    """The initial checkpoint folder and the output folder of a task.

    Attributes:
        source: the initial checkpoint folder.
        output: path of the output folder.
    """

    source: Folder
    output: str

    @classmethod
    def from_settings(cls, settings) -> "TrainingFolders":
        """Checks the folders of a run.

        settings: ConfigDict with init and output.
        Raises FileNotFoundError or ValueError if a folder cannot be used.
        """
        init = check_init(settings.init)
        if init.resolve() == Path(settings.output).resolve():
            got = f"got {settings.init} for both"
            raise ValueError(f"init and output must be different folders, {got}")
        source = open_folder(init)
        if source.cfg.image_size != IMAGE_SIZE:
            size = f"{source.cfg.image_size} pixels a side in {settings.init}"
            rule = f"init must be a model for images of {IMAGE_SIZE} pixels a side"
            raise ValueError(f"{rule}, got {size}")
        written = {path.name for path in small_files(source.path)} | {TEMPLATE_FOLDER}
        check_replaceable(settings.output, source.cfg, written)
        return cls(source, settings.output)

    def load(self) -> Janus:
        """Loads the initial model in float32."""
        source = self.source
        params = load_params(source, jnp.float32)
        return build_model(source.cfg, params)

    def save(self, model: Janus) -> None:
        """Writes the model and copies the small files of the initial checkpoint."""
        save_deepseek(self.output, model, functools.partial(copy_files, self.source.path))


def check_counts(settings, *names: str) -> None:
    """Raises ValueError if a count is below 1: steps, log_every, save_every or one of `names`."""
    for name in ("steps", "log_every", "save_every", *names):
        if settings[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {settings[name]}")
    if settings.seed < 0:
        raise ValueError(f"seed must be at least 0, got {settings.seed}")


def check_replaceable(output: str, cfg: JanusConfig, others: Iterable[str]) -> None:
    """Checks that training may create the folder `output` or replace it.

    An existing folder may be replaced if it is empty, or if it has a model of the same sizes from
    an earlier run and no other files.

    Args:
        output: path of the folder.
        cfg: sizes of the model to write.
        others: names of the other files that the run writes.
    Raises:
        ValueError: the folder may not be replaced, or cannot be written.
    """
    check_local("output", output)
    folder = Path(output).resolve()
    parent = next(path for path in folder.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"cannot write to output {output}: {parent} is not a writable folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"output must be a folder, got the file {output}")
    consequence = "it will not be replaced; choose another output"
    names = {path.name for path in folder.iterdir()}
    unexpected = sorted(names - {CONFIG, SAFETENSORS, *others})
    if unexpected:
        reason = f"contains {unexpected[0]}, which training does not write"
        raise ValueError(f"output {output} {reason}; {consequence}")
    if names and ((CONFIG not in names) or open_folder(folder).cfg != cfg):
        reason = "does not contain a model with the sizes to be trained"
        raise ValueError(f"output {output} {reason}; {consequence}")
