"""The training loop of the tasks "tokenizer" and "encoder". The stages use the one in run.py."""

import time
from collections.abc import Callable, Iterable

import grain
import jax
import numpy as np
from absl import logging


def generated_batches(make_batch: Callable, cfg):
    """Returns an iterable over the batches of all steps, generated a few steps ahead.

    Each batch depends only on the seed and the step.

    make_batch: (np.random.Generator, step) -> batch. cfg: ConfigDict with seed and steps.
    """

    def make(step: int):
        return make_batch(np.random.default_rng((cfg.seed, step)), step)

    steps = grain.MapDataset.range(cfg.steps).map(make)
    return steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def run_steps(state, step_fn: Callable, batches: Iterable, cfg, save: Callable):
    """Trains for cfg.steps steps and returns the final state.

    Args:
        step_fn: (state, batch) -> (state, metrics).
        cfg: ConfigDict with steps, log_every and save_every.
        save: called with the state every save_every steps and after the last step.
    Raises:
        FloatingPointError: a logged metric, or a state to be saved, is NaN or infinite.
    """
    logging.info("config\n%s", cfg)
    start = time.monotonic()
    for step, batch in enumerate(batches, 1):
        state, metrics = step_fn(state, batch)
        if step % cfg.log_every == 0 or step == cfg.steps:
            _log(step, cfg.steps, jax.device_get(metrics), time.monotonic() - start)
        if step % cfg.save_every == 0 or step == cfg.steps:
            _check_finite(jax.device_get(state), step)
            save(state)
    return state


def _log(step: int, steps: int, metrics: dict, seconds: float) -> None:
    text = "  ".join(f"{name} {float(value):.4f}" for name, value in sorted(metrics.items()))
    left = seconds / step * (steps - step)
    logging.info("step %d/%d  %s  %.0f s, %.0f s left", step, steps, text, seconds, left)
    if not all(np.isfinite(value) for value in metrics.values()):
        raise FloatingPointError(f"metrics must be finite, got {text} at step {step}")


def _check_finite(state, step: int) -> None:
    """Keeps a bad state from overwriting the previously saved one."""
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state)):
        values = f"NaN or infinite values at step {step}"
        raise FloatingPointError(f"parameters must be finite, got {values}; not saved")
