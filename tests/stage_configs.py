"""Configs of small runs for tests: a small checkpoint and short rows of synthetic scenes."""

import functools
from pathlib import Path

from ml_collections import ConfigDict

from janus_jax.shapes.source import ALL_FORMATS
from janus_jax.training import run
from janus_jax.training.program import Program
from janus_jax.training.stages import base_config

SMALL = Path(__file__).parent / "golden" / "janus_small"

# with the scenes that small_config trains on
train_stage = functools.partial(run.train_stage, formats=ALL_FORMATS)
make_program = functools.partial(Program.from_settings, formats=ALL_FORMATS)


def get_config() -> ConfigDict:
    """The config of train.py --config=tests/stage_configs.py."""
    return small_config(Path("runs/small"))


def small_config(output: Path, **changed) -> ConfigDict:
    """Returns a float32 config for one device, with changed settings."""
    config = base_config()
    config.update(
        init=str(SMALL),
        output=str(output),
        steps=4,
        seq_len=192,
        max_input_images=1,
        max_generated_images=3,
        batch_size=2,
        streams=2,
        tokenized=False,
        max_bad=0.5,
        threads=1,
        mesh="data=1",
        dtype="float32",
        remat="none",
        chunk=64,
        learning_rate=1e-3,
        end_learning_rate=1e-3,
        log_every=1,
        save_every=100,
        model_dtype="float32",
    )
    scenes = {
        kind: dict(format="scenes", path=kind) for kind in ("understanding", "text", "generation")
    }
    config.mixture = ConfigDict(scenes)
    config.update(changed)
    return config
