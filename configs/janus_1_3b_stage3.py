"""Stage 3 of Janus-1.3B: supervised fine-tuning of all but the image tokenizer.

    python train.py --config=configs/janus_1_3b_stage3.py

Settings and folders of data: janus_jax/training/stages.py; docs/training.md.
"""

from janus_jax.training.stages import stage_config


def get_config():
    """As Janus-Pro's Table 2 says for the 1B, with what is known to differ."""
    return stage_config("janus_1_3b", 3)
