"""Stage 3 of Janus-1.3B: supervised fine-tuning of everything except the image tokenizer.

    python train.py --config=configs/janus_1_3b_stage3.py

janus_jax/training/stages.py has the settings, docs/training.md the folders of the data.
"""

from janus_jax.training.stages import stage_config


def get_config():
    """Returns the settings of Table 2 for Janus-Pro-1B, with the known differences."""
    return stage_config("janus_1_3b", 3)
