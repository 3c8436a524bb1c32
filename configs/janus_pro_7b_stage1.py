"""Stage 1 of Janus-Pro-7B: trains the aligners and the image head on a frozen decoder.

    python train.py --config=configs/janus_pro_7b_stage1.py

janus_jax/training/stages.py has the settings, docs/training.md the folders of the data.
"""

from janus_jax.training.stages import stage_config


def get_config():
    """Returns the settings of Table 2 of the Janus-Pro report."""
    return stage_config("janus_pro_7b", 1)
