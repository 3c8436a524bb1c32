"""Comparison of a checkpoint with the same model in transformers: `python -m convert verify`."""
