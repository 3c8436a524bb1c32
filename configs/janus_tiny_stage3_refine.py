"""Stage 3 of janus_tiny, second part: slower, and with as many more images as in stage 2.

    python train.py --config=configs/janus_tiny_stage3_refine.py

Goes on from what configs/janus_tiny_stage3.py:stage2 has written.
"""

from ml_collections import ConfigDict

from configs import janus_tiny_stage3


def get_config() -> ConfigDict:
    """The first part taught the encoder, at a rate that drawing suffered from."""
    config = janus_tiny_stage3.get_config("stage2")
    config.update(
        init=f"{config.output}/model",
        output="runs/janus_tiny_stage3_refined",
        seed=1,  # or the same records would come again, in the same order
        steps=3000,
        learning_rate=5e-4,
    )
    config.mixture.generation.weight *= 2
    return config
