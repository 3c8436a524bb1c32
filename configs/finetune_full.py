"""Fine-tunes all weights of a released checkpoint, except its image tokenizer, on your own records.

    python train.py --config=configs/finetune_full.py --config.mixture.mine.path=data/mine.jsonl
"""

from ml_collections import ConfigDict

from janus_jax.configs import finetune_lora


def get_config() -> ConfigDict:
    """Returns finetune_lora's settings with a lower learning rate, no LoRA and accumulate=1.

    With accumulate=8, as in finetune_lora, a step needs more memory: 49 GB instead of 34 GB for
    Janus-Pro-1B, according to XLA's plan for a TPU v5p.
    """
    config = finetune_lora.get_config()
    config.update(
        output="runs/finetune_full",
        lora_rank=0,
        accumulate=1,
        learning_rate=2e-5,
        end_learning_rate=2e-6,
    )
    return config
