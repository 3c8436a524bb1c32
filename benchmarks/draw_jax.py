"""Measures image generation with janus_jax, see benchmarks/draw.py."""

import time

import jax
import numpy as np

from benchmarks.draw import case
from benchmarks.draw_figures import GUIDANCE_WEIGHT, TEMPERATURE, draw_figures, draw_shapes
from benchmarks.jax_side import (
    copy_bandwidth,
    device_name,
    peak_memory,
    profile,
    random_model,
)
from benchmarks.models import PROMPT_LENGTH, config
from benchmarks.records import Record
from benchmarks.timing import rate_between, repeated, seconds_of
from janus_jax.generation import image, samplers
from janus_jax.generation.requests import Requests
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.sharding import put_batch


def make_requests(cfg: JanusConfig, num_images: int) -> Requests:
    """Returns requests for images of a random prompt that fills its bucket, without padding."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, cfg.language_model.vocab_size, PROMPT_LENGTH).tolist()
    sampling = samplers.make_sampling(TEMPERATURE, None, None, cfg.gen_vq.codebook_size)
    return image.make_requests([(tokens, tokens)], num_images, 0, GUIDANCE_WEIGHT, sampling, 0)


class Drawing:
    """Generates images as sample.py does, and notes when which image token was there.

    Attributes:
        step_seconds: one entry per call, the mean seconds of a decode step.
    """

    def __init__(self, model: Janus, requests: Requests):
        self._model, self._requests = model, requests
        self.step_seconds: list[float] = []

    def __call__(self) -> None:
        number, marks = len(self._requests.tokens), []

        def report(done: int, total: int) -> None:
            marks.append((done // number, time.perf_counter()))

        list(image.generate(self._model, self._requests, number, progress=report))
        # the first two reports come before the token loop, the last one after the image tokenizer
        self.step_seconds.append(rate_between(marks[2:-1]))


def measure(
    record: Record,
    model: str,
    num_images: list[int],
    dtype: str,
    runs: int,
    folder: str | None = None,
) -> None:
    """Measures one model. For the arguments see draw.jax_measurement."""
    record.describe(device_name())
    cfg, bandwidth = config(model, dtype), copy_bandwidth()
    network = random_model(cfg)
    for number in num_images:
        requests = make_requests(cfg, number)
        drawing = Drawing(network, requests)
        first = seconds_of(drawing)
        drawing.step_seconds.clear()
        seconds = repeated(drawing, runs)
        name = case(model, dtype, number, "janus_jax")
        figures = draw_figures(cfg, number, first, seconds, drawing.step_seconds, bandwidth)
        result = dict(figures=figures | peak_memory(), shapes=draw_shapes(cfg, number))
        record.add(name, **result)  # also counts if the profile fails
        path = folder and f"{folder}/draw_{model}_{number}"
        record.add(name, **result, profile=_profile(network, requests, path))


def _profile(model: Janus, requests: Requests, folder: str | None) -> dict:
    """Profiles the first decode steps, with the program that `Drawing` has compiled."""
    steps = image.steps_per_report(model.cfg.num_image_tokens)
    batch = image.begin_batch(model, put_batch(requests, None), None)

    def run() -> None:
        jax.block_until_ready(image.advance_batch(model, batch, 1, steps))

    return profile(run, steps, folder)
