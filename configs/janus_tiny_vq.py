"""Trains the image tokenizer of janus_tiny.

    python train.py --config=configs/janus_tiny_vq.py

Takes about 20 minutes on 2 CPU cores. Writes runs/janus_tiny_vq, where
configs/janus_tiny_vq_refine.py starts.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns settings for two phases: `crop_steps` steps on crops, then steps on whole images.

    The model is trained as an autoencoder without quantization for the first `quantise_from` steps.
    """
    return ConfigDict(
        dict(
            task="vq",
            init="",
            output="runs/janus_tiny_vq",
            seed=0,
            steps=4500,
            batch_size=16,
            crop=48,
            crop_batch_size=32,
            crop_steps=3000,
            quantise_from=500,
            dead_code_usage=0.02,
            learning_rate=4e-3,
            end_learning_rate=1e-4,
            warmup_steps=50,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            max_grad_norm=1.0,
            log_every=100,
            save_every=500,
        )
    )
