"""Trains a Janus: python train.py --config=configs/janus_tiny.py --config.steps=100."""

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "Experiment.", lock_config=True)
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"arguments must be flags, got {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    cfg = _CONFIG.value
    logging.info("config\n%s", cfg)
    if cfg.task == "tokenizer":
        from janus_jax.training.tokenizer import train_tokenizer as train
    else:
        from janus_jax.training.decoder import train_decoder as train
    train(cfg)


if __name__ == "__main__":
    app.run(main)
