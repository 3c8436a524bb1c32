"""Shapes and figures of answers, the same for all implementations, see benchmarks/answer.py."""

import statistics
from collections.abc import Sequence

import numpy as np

from benchmarks.models import shapes, step_bytes
from benchmarks.records import spread
from benchmarks.timing import rate_between
from janus_jax.generation.chunks import bucket_length
from janus_jax.models.janus import JanusConfig

LEAST_TEXT = 20  # tokens of text in a prompt; more if the bucket has room


def prompt(cfg: JanusConfig) -> tuple[np.ndarray, np.ndarray]:
    """Returns the tokens of a conversation, int32[P], and bool[P], where its image goes.

    The prompt fills its bucket, so that no implementation has to handle padding.
    """
    image = cfg.und_encoder.num_tokens
    length = bucket_length(image + LEAST_TEXT)
    rng = np.random.default_rng(0)
    tokens = rng.integers(10, cfg.language_model.vocab_size, length).astype(np.int32)
    mask = np.zeros(length, bool)
    mask[4 : 4 + image] = True
    return tokens, mask


class Times:
    """The times of several runs.

    Attributes:
        seconds: of each run.
        first_token: seconds to the first token, of each run that has several marks.
        step: mean seconds between two tokens after that, likewise.
    """

    def __init__(self):
        self.seconds: list[float] = []
        self.first_token: list[float] = []
        self.step: list[float] = []

    def add(self, start: float, marks: Sequence[float]) -> None:
        """Adds a run. marks: the time after each token, or only that after the last one."""
        self.seconds.append(marks[-1] - start)
        if len(marks) > 1:
            self.first_token.append(marks[0] - start)
            self.step.append(rate_between([(0, marks[0]), (len(marks) - 1, marks[-1])]))


def answer_shapes(cfg: JanusConfig, conversations: int, num_tokens: int) -> dict:
    """Returns the shapes of a run, for the record."""
    return shapes(
        cfg,
        decoder_rows=conversations,
        prompt_tokens=len(prompt(cfg)[0]),
        new_tokens=num_tokens,
        image_size=cfg.image_size,
    )


def answer_figures(
    cfg: JanusConfig, conversations: int, num_tokens: int, times: Times, bandwidth: float
) -> dict:
    """Returns the figures that benchmarks/answer.py describes.

    times: the first run, and then the others. bandwidth: measured, in bytes/s.
    """
    seconds = times.seconds[1:]
    filled = len(prompt(cfg)[0]) + num_tokens / 2
    floor = step_bytes(cfg, "answer", conversations, filled) / bandwidth
    figures = dict(
        tokens_per_s=conversations * num_tokens / statistics.median(seconds),
        run_s=spread(seconds),
    )
    if times.step:
        step = [1e3 * value for value in times.step[1:]]
        figures |= dict(
            first_token_s=spread(times.first_token[1:]),
            step_ms=spread(step),
            floor_ms=1e3 * floor,
            bandwidth_share=1e3 * floor / statistics.median(step),
        )
    return figures | dict(copy_gb_s=bandwidth / 1e9, first_s=times.seconds[0])
