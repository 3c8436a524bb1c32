"""Decoder and adapters of janus_tiny, between a finished encoder and tokenizer: the first part.

    python train.py --config=configs/janus_tiny_decoder.py

Half an hour on 2 CPU cores. Goes on from runs/janus_tiny_encoder and writes
runs/janus_tiny_decoder.
"""

from ml_collections import ConfigDict

from janus_jax.data.scenes import KINDS


def get_config() -> ConfigDict:
    """Generation and understanding mixed in every step."""
    return ConfigDict(
        dict(
            task="decoder",
            init="runs/janus_tiny_encoder",
            output="runs/janus_tiny_decoder",
            embed_codes=True,
            seed=0,
            steps=4200,
            generation_batch_size=32,
            understanding_batch_size=32,
            generation_weight=1.0,
            guidance_weight=1.0,
            caption_weights={kind: 1 for kind in KINDS},
            prompt_length=16,
            conversation_length=120,
            learning_rate=1.5e-3,
            end_learning_rate=5e-5,
            warmup_steps=100,
            b1=0.9,
            b2=0.95,
            weight_decay=0.0,
            clip=1.0,
            log_every=50,
            save_every=500,
        )
    )
