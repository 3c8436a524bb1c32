"""Measures answers with PyTorch, see benchmarks/answer.py."""

import time

import torch
import transformers

from benchmarks.answer import case
from benchmarks.answer_figures import Times, answer_figures, answer_shapes, prompt
from benchmarks.models import config
from benchmarks.records import Record
from benchmarks.torch_side import (
    DEVICE,
    IMAGE_TOKEN,
    PACKAGES,
    copy_bandwidth,
    device_name,
    now,
    peak_memory,
    random_model,
    takes_cache,
)
from janus_jax.models.janus import JanusConfig


def _inputs(
    cfg: JanusConfig, conversations: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the tokens int[B, P], with the image tokens in place, and the pixels [B, 3, S, S]."""
    tokens, mask = prompt(cfg)
    tokens = torch.tensor(tokens, dtype=torch.long, device=DEVICE)
    tokens[torch.tensor(mask, device=DEVICE)] = IMAGE_TOKEN
    size = cfg.image_size
    pixels = torch.rand((conversations, 3, size, size), dtype=dtype, device=DEVICE)
    return tokens.repeat(conversations, 1), 2 * pixels - 1


@torch.inference_mode()
def generate(
    model: transformers.JanusForConditionalGeneration,
    tokens: torch.Tensor,
    pixels: torch.Tensor,
    num_tokens: int,
) -> tuple[list[float], list[torch.Tensor]]:
    """Generates answers.

    Returns the time after each token, for a batch after the last one, and the tokens, int[B, 1]
    each.
    """
    cache = transformers.DynamicCache(config=model.config.text_config)
    arguments = {takes_cache(model): cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=tokens, pixel_values=pixels, **arguments).logits
    marks, answer = [], []
    for step in range(num_tokens):
        if step:
            logits = model(input_ids=tokens, **arguments).logits
        tokens = torch.argmax(logits[:, -1:], dim=-1)
        answer.append(tokens)
        if len(tokens) == 1:
            int(tokens[0, 0])
            marks.append(time.perf_counter())
    return marks or [now()], answer


def measure(
    record: Record, model: str, conversations: list[int], dtype: str, num_tokens: int, runs: int
) -> None:
    """Measures one model. For the arguments see answer.measurement."""
    record.describe(device_name(), PACKAGES)
    cfg, bandwidth = config(model, dtype), copy_bandwidth()
    network = random_model(cfg)
    for number in conversations:
        inputs, times = _inputs(cfg, number, network.dtype), Times()
        for _ in range(1 + runs):
            times.add(now(), generate(network, *inputs, num_tokens)[0])
        figures = answer_figures(cfg, number, num_tokens, times, bandwidth) | peak_memory()
        name = case(model, dtype, number, num_tokens, "torch_eager")
        record.add(name, figures, shapes=answer_shapes(cfg, number, num_tokens))
