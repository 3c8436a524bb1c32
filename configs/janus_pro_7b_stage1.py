"""Stage 1 of Janus-Pro-7B: adapters and image head, on a frozen decoder.

    python train.py --config=configs/janus_pro_7b_stage1.py

Settings and folders of data: janus_jax/training/stages.py; docs/training.md.
"""

from janus_jax.training.stages import stage_config


def get_config():
    """As the report's Table 2 says."""
    return stage_config("janus_pro_7b", 1)
