"""Fine-tunes all of a released checkpoint but its image tokenizer on records of your own.

    python train.py --config=configs/finetune_full.py --config.mixture.mine.path=data/mine.jsonl
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    """As finetune_lora, but with a lower learning rate, no adapters and all rows at once.

    One row after the other would take more: 49 GB for Janus-Pro-1B in place of 38, as XLA plans
    them for a TPU v5p.
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
