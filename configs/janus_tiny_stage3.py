"""Stage 3 of janus_tiny: trains everything except the image tokenizer, mostly on questions.

    python train.py --config=configs/janus_tiny_stage3.py --config.steps=20

Starts from the shipped model and needs no data. With `:stage2` it starts from
runs/janus_tiny_stage2 and reads the image tokens of stage 2:

    python train.py --config=configs/janus_tiny_stage3.py:stage2
"""

from ml_collections import ConfigDict

from janus_jax.configs.janus_tiny_stage1 import read_tokens, tiny_stage


def get_config(start: str = "") -> ConfigDict:
    """Returns the settings of stage 3.

    start: "stage2" to start from stage 2, or "" to start from the shipped model.
    """
    config = tiny_stage(3)
    config.update(
        init="janus_tiny",
        steps=1500,
        learning_rate=3e-4,
        end_learning_rate=2e-5,
    )
    # An answer has few tokens, an image 36; without this weight the answers barely affect the loss.
    config.loss_weights.understanding = 5.0
    if start == "stage2":
        read_tokens(config)
        config.update(
            init="runs/janus_tiny_stage2/model",
            output="runs/janus_tiny_stage3_after_stage2",  # differs from that without :stage2
            steps=6000,
            learning_rate=1.5e-3,
            warmup_steps=200,
        )
    elif start:
        raise ValueError(f"the argument after the colon must be stage2 or nothing, got {start!r}")
    return config
