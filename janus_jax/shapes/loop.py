"""Batches and log of the tasks "vq" and "encoder", which generate their data on the fly."""

import time
from collections.abc import Callable, Iterable

import grain
import jax
import numpy as np
from absl import logging

from janus_jax.training.run import Loop


def generated_batches(make_batch: Callable, settings):
    """Returns an iterable over the batches of all steps, generated a few steps ahead.

    Each batch depends only on the seed and the step.

    make_batch: (np.random.Generator, step) -> batch. settings: ConfigDict with seed and steps.
    """

    def make(step: int):
        return make_batch(np.random.default_rng((settings.seed, step)), step)

    steps = grain.MapDataset.range(settings.steps).map(make)
    return steps.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4))


def run_steps(state, step: Callable, batches: Iterable, settings, save: Callable):
    """Trains for settings.steps steps and returns the final state.

    Args:
        step: (state, batch) -> (state, metrics).
        settings: ConfigDict with steps, log_every and save_every.
        save: called with the state every save_every steps and after the last step.
    Raises:
        FloatingPointError: a logged metric, or a state to be saved, is NaN or infinite.
    """
    logging.info("config\n%s", settings)
    start, steps = time.monotonic(), settings.steps

    def logged_step(state, batch):
        state, metrics = step(state, batch)
        return state, (metrics,)

    def log(number: int, metrics: dict) -> None:
        if number % settings.log_every == 0 or number == steps:
            _log(number, steps, jax.device_get(metrics), time.monotonic() - start)

    def save_finite(number: int, state) -> None:
        _check_finite(jax.device_get(state), number)
        save(state)

    loop = Loop(logged_step, log, save_finite, settings.save_every)
    return loop.run(state, iter(batches), 0, steps)


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
