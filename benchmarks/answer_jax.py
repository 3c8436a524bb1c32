"""Measures answers with janus_jax, see benchmarks/answer.py."""

import time

import jax
import numpy as np

from benchmarks.answer import case
from benchmarks.answer_figures import Times, answer_figures, answer_shapes, prompt
from benchmarks.jax_side import copy_bandwidth, device_name, peak_memory, random_model
from benchmarks.models import config
from benchmarks.records import Record
from janus_jax.generation import samplers, text
from janus_jax.generation.requests import Requests, make_choice
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.sharding import put_batch

NO_EOS = -1  # no token, so that every answer has its maximum length


def make_requests(cfg: JanusConfig, conversations: int) -> Requests:
    """Returns the requests on the device."""
    tokens, mask = (np.tile(row, (conversations, 1, 1)) for row in prompt(cfg))
    size, vocab_size = cfg.image_size, cfg.language_model.vocab_size
    pixels = np.random.default_rng(1).uniform(-1, 1, (conversations, 1, size, size, 3))
    sampling = samplers.make_sampling(0.0, None, None, vocab_size)
    index = np.zeros(conversations, np.uint32)
    requests = Requests(
        tokens=tokens,
        lengths=np.full(conversations, tokens.shape[-1], np.int32),
        image_mask=mask,
        pixels=pixels.astype(np.float32),
        choice=make_choice(index, 0, sampling, eos_id=NO_EOS),
    )
    return jax.block_until_ready(put_batch(requests, None))


def _answer(model: Janus, requests: Requests, num_tokens: int) -> list[float]:
    """Generates answers. Returns the time after each token; for a batch after the last one."""
    if len(requests.tokens) == 1:
        return [time.perf_counter() for _ in text.stream(model, requests, num_tokens)]
    np.asarray(text.generate_tokens(model, requests, num_tokens))
    return [time.perf_counter()]


def measure(
    record: Record, model: str, conversations: list[int], dtype: str, num_tokens: int, runs: int
) -> None:
    """Measures one model. For the arguments see answer.measurement."""
    record.describe(device_name())
    cfg, bandwidth = config(model, dtype), copy_bandwidth()
    network = random_model(cfg)
    for number in conversations:
        requests, times = make_requests(cfg, number), Times()
        for _ in range(1 + runs):
            times.add(time.perf_counter(), _answer(network, requests, num_tokens))
        figures = answer_figures(cfg, number, num_tokens, times, bandwidth) | peak_memory()
        name = case(model, dtype, number, num_tokens, "janus_jax")
        record.add(name, figures, shapes=answer_shapes(cfg, number, num_tokens))
