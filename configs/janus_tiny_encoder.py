"""Pretrains the understanding encoder of janus_tiny, before the decoder learns to use it.

    python train.py --config=configs/janus_tiny_encoder.py

Takes about 5 minutes on 2 CPU cores. Starts from runs/janus_tiny_vq_refined and writes
runs/janus_tiny_encoder.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns settings to classify which shape and color has its center in each patch."""
    return ConfigDict(
        dict(
            task="encoder",
            init="runs/janus_tiny_vq_refined",
            output="runs/janus_tiny_encoder",
            seed=0,
            steps=1500,
            batch_size=64,
            learning_rate=2e-3,
            end_learning_rate=1e-5,
            warmup_steps=50,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            log_every=50,
            save_every=500,
        )
    )
