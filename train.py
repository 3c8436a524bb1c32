"""Trains a Janus model: python train.py --config=configs/janus_tiny_stage3.py --config.steps=100.

Run `python train.py --help` for all flags; the code is in janus_jax/commands/train.py.
"""

from janus_jax.commands.train import main

if __name__ == "__main__":
    main()
