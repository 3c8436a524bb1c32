"""Stage 1 of Janus-1.3B: trains the aligners and the image head on a frozen decoder.

    python train.py --config=configs/janus_1_3b_stage1.py

janus_jax/training/stages.py has the settings, docs/training.md the folders of the data.
"""

from janus_jax.training.stages import stage_config


def get_config():
    """Returns the settings of Table 2 for Janus-Pro-1B, with the known differences."""
    return stage_config("janus_1_3b", 1)
