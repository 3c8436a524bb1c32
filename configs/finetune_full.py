"""Fine-tunes all of a released checkpoint but its image tokenizer on records of your own.

    python train.py --config=configs/finetune_full.py --config.mixture.mine.path=data/mine.jsonl
"""

from ml_collections import ConfigDict

from configs import finetune_lora


def get_config() -> ConfigDict:
    """As finetune_lora, but with a lower learning rate and no adapters."""
    config = finetune_lora.get_config()
    config.update(
        output="runs/finetune_full",
        lora_rank=0,
        learning_rate=2e-5,
        end_learning_rate=2e-6,
    )
    return config
