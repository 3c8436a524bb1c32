"""janus_tiny's third stage: everything but the image tokenizer, from the shipped model.

python train.py --config=configs/janus_tiny_stage3.py --config.steps=20
"""

from ml_collections import ConfigDict

from janus_jax.training.stages import ALL_BUT_TOKENIZER, base_config


def get_config() -> ConfigDict:
    """Rows of 256 tokens, made of scenes that are drawn as they are asked for."""
    config = base_config()
    config.update(
        init="janus_jax/assets/janus_tiny",
        output="runs/janus_tiny_stage3",
        trained=ALL_BUT_TOKENIZER,
        steps=2000,
        length=256,
        max_pictures=2,
        max_drawn=5,
        rows=16,
        streams=2,
        tokenized=False,
        threads=1,
        dtype="float32",
        remat="none",
        chunk=128,
        learning_rate=2e-4,
        end_learning_rate=2e-5,
    )
    config.mixture = ConfigDict(
        dict(
            understanding=dict(weight=5, format="scenes", path="understanding", relations=0.3),
            text=dict(weight=1, format="scenes", path="text"),
            generation=dict(weight=4, format="scenes", path="generation"),
        )
    )
    return config
