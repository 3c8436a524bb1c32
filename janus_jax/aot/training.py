"""Compiles what train.py runs: the training step of a config."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from janus_jax.aot.compiled import CompiledPart, compile_part, device_bytes
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import family_of
from janus_jax.interop.load import DTYPES, HasConfig
from janus_jax.processing.images import ImageConfig
from janus_jax.sharding import check_mesh, make_mesh, parse_mesh
from janus_jax.training.program import Program, row_shapes
from janus_jax.training.settings import (
    Inputs,
    check_settings,
    lora_config,
    no_progress,
    rows_config,
)


@dataclasses.dataclass(frozen=True)
class ModelWithoutFolder(HasConfig):
    """Stands for the checkpoint folder and the processor of a run that only is compiled.

    cfg: the config of the model.
    """

    cfg: ModelConfig

    @property
    def image_config(self) -> ImageConfig:
        """The preprocessing of images, with the mean and the deviation of the released models."""
        half = (0.5, 0.5, 0.5)
        return ImageConfig(self.sizes.image_size, image_mean=half, image_std=half)


def abstract_program(settings, cfg: ModelConfig, devices: Sequence[jax.Device]) -> Program:
    """Returns the program of a run without its files: neither checkpoint nor data are opened.

    settings: ConfigDict of stages.base_config. An empty mesh puts all devices on fsdp.
    cfg: the config of the model to start from.
    devices: the devices to compile for.

    Raises:
        ValueError: as Inputs.from_settings and Program.
    """
    check_settings(settings)
    mesh = make_mesh(fsdp=len(devices), devices=devices)
    if settings.mesh:
        mesh = parse_mesh(settings.mesh, devices)
    check_mesh(mesh, family_of(cfg).sizes(cfg).heads)
    model = ModelWithoutFolder(cfg)
    inputs = Inputs(
        settings=settings,
        source=model,
        processor=model,
        model_cfg=cfg.with_dtype(DTYPES[settings.dtype]).with_remat(settings.remat),
        mesh=mesh,
        rows=rows_config(settings, mesh),
        lora=lora_config(settings),
        formats={},
        progress=no_progress,
    )
    return Program(inputs)


def held_bytes(program: Program) -> dict[str, int]:
    """Returns the bytes of the arrays on each device during a step, by purpose."""
    state = program.abstract_state
    parts = dict(
        params=state.params,
        optimizer=state.opt_state,
        ema=state.ema,
        frozen=program.parameters.loaded_frozen,
        batch=row_shapes(program.inputs),
    )
    return {name: device_bytes(tree) for name, tree in parts.items() if jax.tree.leaves(tree)}


def compile_step(program: Program) -> Iterator[CompiledPart]:
    """Compiles the programs of a training step, in the order in which they run.

    Their inputs are not counted, see held_bytes.

    Raises:
        DoesNotFitError: the compiler says that the memory of the device is too small.
    """
    for name, lower in program.lowerings():
        yield compile_part(name, lower, inputs=())
