"""Stage 2 of janus_tiny: trains everything except the encoder and the image tokenizer.

    python train.py --config=configs/janus_tiny_stage2.py

Starts from runs/janus_tiny_stage1 and reads the same image tokens.
"""

from ml_collections import ConfigDict

from janus_jax.configs.janus_tiny_stage1 import read_tokens, tiny_stage


def get_config() -> ConfigDict:
    """Returns settings for a long run: in this stage the model learns to generate images."""
    config = tiny_stage(2)
    read_tokens(config)
    config.update(
        init="runs/janus_tiny_stage1/model",
        steps=12_000,
        learning_rate=3e-3,
        end_learning_rate=3e-4,
        warmup_steps=200,
    )
    return config
