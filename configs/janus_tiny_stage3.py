"""Stage 3 of janus_tiny: all but the image tokenizer, with more questions than images.

    python train.py --config=configs/janus_tiny_stage3.py --config.steps=20

Goes on from the shipped model, or from stage 2, whose tokens it then reads:

    python train.py --config=configs/janus_tiny_stage3.py:stage2
"""

from ml_collections import ConfigDict

from configs.janus_tiny_stage1 import read_tokens, tiny_stage


def get_config(before: str = "") -> ConfigDict:
    """before: "stage2", or nothing for the shipped model."""
    config = tiny_stage(3)
    config.update(
        init="janus_jax/assets/janus_tiny",
        steps=1500,
        learning_rate=3e-4,
        end_learning_rate=2e-5,
    )
    # an answer has few tokens beside an image's 36: counted alike, they are hardly heard
    config.loss_weights.understanding = 5.0
    if before == "stage2":
        read_tokens(config)
        config.update(
            init="runs/janus_tiny_stage2/model",
            output="runs/janus_tiny_stage3_after_stage2",  # the short run has the other folder
            steps=6000,
            learning_rate=1.5e-3,
            warmup_steps=200,
        )
    elif before:
        raise ValueError(f"stage 3 must go on from stage2 or nothing, got {before!r}")
    return config
