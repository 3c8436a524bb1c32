"""Trains the image tokenizer of janus_tiny further on whole images, which corrects its colors.

    python train.py --config=configs/janus_tiny_vq_refine.py

Takes about 10 minutes on 2 CPU cores. Starts from runs/janus_tiny_vq and writes
runs/janus_tiny_vq_refined.
"""

from ml_collections import ConfigDict

from janus_jax.configs import janus_tiny_vq


def get_config() -> ConfigDict:
    """Returns janus_tiny_vq's settings, with fewer steps and quantization from the first step."""
    config = janus_tiny_vq.get_config()
    config.update(
        init="runs/janus_tiny_vq",
        output="runs/janus_tiny_vq_refined",
        seed=1,
        steps=1500,
        crop_steps=0,
        quantise_from=0,
        learning_rate=2e-3,
    )
    return config
