"""Fine-tunes a released checkpoint on records of your own, by LoRA.

    python train.py --config=configs/finetune_lora.py --config.mixture.mine.path=data/mine.jsonl

A mixture of several sources is a config of your own: docs/training.md.
"""

from ml_collections import ConfigDict

from janus_jax.training.stages import base_config


def get_config() -> ConfigDict:
    """Janus-Pro-1B; adapters in every linear layer of the decoder."""
    config = base_config()
    config.update(
        init="checkpoints/Janus-Pro-1B",
        output="runs/finetune_lora",
        lora_rank=16,
        lora_alpha=32.0,
        steps=1000,
        seq_len=2048,
        max_input_images=3,
        max_generated_images=3,
        batch_size=8,
        streams=1,
        accumulate=8,
        tokenized=False,  # few images: their tokens are computed in every step
        remat="full",
        learning_rate=2e-4,
        end_learning_rate=2e-5,
        warmup_steps=20,
    )
    config.mixture = ConfigDict(dict(mine=dict(weight=1.0, format="jsonl", path="data/mine.jsonl")))
    return config
