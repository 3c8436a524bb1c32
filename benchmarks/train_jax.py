"""Measures a training step with janus_jax, see benchmarks/train.py."""

import statistics

import jax
from ml_collections import ConfigDict

from benchmarks.jax_side import device_name, peak_memory, profile, random_array
from benchmarks.models import config, shapes
from benchmarks.packed_rows import random_rows
from benchmarks.records import PACKAGES, Record, spread
from benchmarks.timing import repeated, seconds_of
from benchmarks.train import case
from janus_jax.aot.training import abstract_program
from janus_jax.data.packing import efficiency
from janus_jax.data.records import KINDS
from janus_jax.training.flops import peak_flops, step_flops
from janus_jax.training.program import Program, put_rows
from janus_jax.training.stages import STAGES, stage_config

STAGE = 2


def make_program(model: str, batch_size: int, seq_len: int, remat: str) -> Program:
    """Returns the program of stage 2 on one device, of a model without a checkpoint folder."""
    settings = stage_config("janus_pro_1b", STAGE)
    settings.update(
        batch_size=batch_size, seq_len=seq_len, remat=remat, streams=1, mixture=ConfigDict()
    )
    return abstract_program(settings, config(model, settings.dtype), jax.devices()[:1])


class Training:
    """Takes one step per call, on the same rows."""

    def __init__(self, program: Program):
        parameters, source = program.parameters, program.inputs.source
        ratio = dict(zip(KINDS, STAGES[STAGE].ratio, strict=True))
        fields, batch_size = program.inputs.rows.fields(source.cfg), program.inputs.rows.batch_size
        self.rows = random_rows(fields, source.sizes, batch_size, ratio)
        self._rows = put_rows(self.rows, program.inputs.mesh)
        self._frozen = _random_arrays(parameters.loaded_frozen)
        self._state = program.first_state(_random_arrays(parameters.trained))
        self._step = program.step

    def __call__(self) -> None:
        self._state, metrics = self._step(self._state, self._frozen, self._rows)
        self.loss = float(metrics["loss"])


def _random_arrays(shapes: dict) -> dict[str, jax.Array]:
    named = enumerate(shapes.items())
    return {path: random_array(number, leaf) for number, (path, leaf) in named}


def measure(
    record: Record,
    model: str,
    batch_size: int,
    seq_len: int,
    runs: int,
    remat: str,
    folder: str | None = None,
) -> None:
    """Measures one model. For the arguments see train.measurement."""
    record.describe(device_name(), (*PACKAGES, "optax"))
    program = make_program(model, batch_size, seq_len, remat)
    training = Training(program)
    first, seconds = seconds_of(training), repeated(training, runs)
    parameters, cfg = program.parameters, program.inputs.model_cfg
    flops = step_flops(cfg, parameters.trained, parameters.frozen)(training.rows)
    filled = efficiency(training.rows["segment_ids"])
    figures = dict(
        tokens_per_s=batch_size * seq_len * filled / statistics.median(seconds),
        step_s=spread(seconds),
        tflops=flops / 1e12,
        filled=filled,
        loss=training.loss,
        first_s=first,
    )
    if (peak := peak_flops(jax.devices()[0])) is not None:
        figures["mfu"] = flops / (statistics.median(seconds) * peak)
    name = case(model, "janus_jax", batch_size, seq_len, remat)
    result = dict(figures=figures | peak_memory(), shapes=shapes(cfg))
    record.add(name, **result)  # also counts if the profile fails
    path = folder and f"{folder}/train_{model}"
    record.add(name, **result, profile=profile(training, 1, path))
