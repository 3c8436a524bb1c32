"""Second part of stage 3 of janus_tiny: a lower learning rate and twice the weight of generation.

    python train.py --config=configs/janus_tiny_stage3_refine.py

Starts from the output of configs/janus_tiny_stage3.py:stage2.
"""

from ml_collections import ConfigDict

from janus_jax.configs import janus_tiny_stage3


def get_config() -> ConfigDict:
    """Returns stage 3's settings, changed to recover the quality of the generated images.

    The first part trains the encoder, at a learning rate that harms image generation.
    """
    config = janus_tiny_stage3.get_config("stage2")
    config.update(
        init=f"{config.output}/model",
        output="runs/janus_tiny_stage3_refined",
        seed=1,  # another seed, so that the records differ from those of the first part
        steps=3000,
        learning_rate=5e-4,
    )
    config.mixture.generation.weight *= 2
    return config
