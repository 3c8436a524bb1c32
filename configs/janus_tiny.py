"""The model that ships: decoder and adapters between a finished encoder and tokenizer.

    python train.py --config=configs/janus_tiny_vq.py
    python train.py --config=configs/janus_tiny_vq_refine.py
    python train.py --config=configs/janus_tiny_encoder.py
    python train.py --config=configs/janus_tiny.py

The last takes half an hour on 2 CPU cores. Goes on from runs/janus_tiny_encoder and writes
runs/janus_tiny, in DeepSeek's layout; janus_jax/assets/janus_tiny is a copy of it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Generation and understanding mixed in every step."""
    return ConfigDict(
        dict(
            task="decoder",
            init="runs/janus_tiny_encoder",
            output="runs/janus_tiny",
            embed_codes=True,
            seed=0,
            steps=4200,
            generation_batch_size=32,
            understanding_batch_size=32,
            generation_weight=1.0,
            guidance_weight=1.0,  # chosen by benchmarks/score_scenes.py on prompts of its own
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
