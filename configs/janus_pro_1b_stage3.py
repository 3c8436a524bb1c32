"""Stage 3 of Janus-Pro-1B: supervised fine-tuning of all but the image tokenizer.

    python train.py --config=configs/janus_pro_1b_stage3.py

Settings and folders of data: janus_jax/training/stages.py; docs/training.md.
"""

from janus_jax.training.stages import stage_config


def get_config():
    """As the report's Table 2 says."""
    return stage_config("janus_pro_1b", 3)
