"""Stage 3 of janus_tiny: all but the image tokenizer, with more questions than pictures.

    python train.py --config=configs/janus_tiny_stage3.py --config.steps=20

Goes on from the shipped model; --config.init=runs/janus_tiny_stage2/model from one of your own.
"""

from ml_collections import ConfigDict

from configs.janus_tiny_stage1 import tiny_stage


def get_config() -> ConfigDict:
    """Rows of 256 tokens, made of scenes that are drawn as they are asked for."""
    config = tiny_stage(3)
    config.update(
        init="janus_jax/assets/janus_tiny",
        steps=1500,
        learning_rate=3e-4,
        end_learning_rate=2e-5,
    )
    return config
