"""Which layers run in a loop in a training step for a TPU. Nothing is compiled."""

import pytest
from compilers import needs_tpu

from janus_jax.aot.topology import described_devices
from janus_jax.aot.training import abstract_program
from janus_jax.devices import known_devices
from janus_jax.models.janus import JanusConfig
from janus_jax.training.stages import ALL_BUT_ENCODERS, ALL_BUT_VQ, base_config

ENCODER, DECODER = "und_encoder.blocks", "language_model.layers"


@needs_tpu
@pytest.mark.parametrize(
    ("settings", "looped"),
    [
        (dict(lora_rank=2), {ENCODER, DECODER}),
        (dict(lora_rank=2, scan="off"), set()),
        (dict(trained=ALL_BUT_ENCODERS), {ENCODER}),
        (dict(trained=ALL_BUT_VQ), set()),
    ],
)
def test_layers_that_are_mostly_frozen_run_in_a_loop(settings, looped):
    config = base_config()
    config.update(settings)
    devices = described_devices(known_devices()["v5e"], 1)
    parameters = abstract_program(config, JanusConfig.janus_tiny(), devices).parameters
    stacked = {path.partition(".*.")[0] for path in parameters.loaded_frozen if ".*." in path}
    assert stacked == looped
