"""Fine-tunes a released checkpoint on your own records with LoRA.

    python train.py --config=configs/finetune_lora.py --config.mixture.mine.path=data/mine.jsonl

To mix several sources, write a config that changes this one; see docs/training.md.
"""

from ml_collections import ConfigDict

from janus_jax.training.stages import base_config


def get_config() -> ConfigDict:
    """Returns settings for Janus-Pro-1B, with LoRA in every linear layer of the decoder."""
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
        tokenized=False,  # a small data set: each step computes the image tokens it needs
        remat="full",
        learning_rate=2e-4,
        end_learning_rate=2e-5,
        warmup_steps=20,
    )
    config.mixture = ConfigDict(dict(mine=dict(weight=1.0, format="jsonl", path="data/mine.jsonl")))
    return config
