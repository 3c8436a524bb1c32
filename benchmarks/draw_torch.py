"""Measures image generation with PyTorch, see benchmarks/draw.py."""

import functools

import numpy as np
import torch
import transformers

from benchmarks.draw import case
from benchmarks.draw_figures import GUIDANCE_WEIGHT, TEMPERATURE, draw_figures, draw_shapes
from benchmarks.models import PROMPT_LENGTH, config
from benchmarks.records import Record
from benchmarks.timing import rate_between, repeated, seconds_of
from benchmarks.torch_side import (
    DEVICE,
    PACKAGES,
    compiled,
    copy_bandwidth,
    device_name,
    now,
    peak_memory,
    random_model,
    takes_cache,
)

WARM_UP = 8  # image tokens of a warm-up run


class Drawing:
    """Generates images, with the algorithm of generation_inference.py of the original code.

    The rows of the decoder alternate between the prompt and the unconditional prompt.

    Attributes:
        tokens: the prompts, int[2B, P].
        step_seconds: one entry per call, the mean seconds of a decode step.
    """

    def __init__(self, model: transformers.JanusForConditionalGeneration, num_images: int):
        """model: has random weights, so the prompt is the same in all rows."""
        self._model, self._decoder = model, model.model.language_model
        self._num_images, self._num_tokens = num_images, model.config.vision_config.num_image_tokens
        self._cache_argument = takes_cache(self._decoder)
        shape = (2 * num_images, PROMPT_LENGTH)
        self.tokens = torch.ones(shape, dtype=torch.long, device=DEVICE)
        self.step_seconds: list[float] = []

    def new_cache(self) -> transformers.Cache:
        """Returns the cache for one call: empty, and it grows with every token."""
        return transformers.DynamicCache(config=self._decoder.config)

    def step(self, embeds: torch.Tensor, positions: torch.Tensor, cache) -> torch.Tensor:
        """Runs the decoder and the image head: [2B, T, D] -> guided logits [B, V]."""
        arguments = {"position_ids": positions, "use_cache": True, self._cache_argument: cache}
        hidden = self._decoder(inputs_embeds=embeds, **arguments).last_hidden_state
        logits = self._model.model.generation_head(hidden[:, -1])
        cond, uncond = logits[0::2], logits[1::2]
        return uncond + GUIDANCE_WEIGHT * (cond - uncond)

    def decode_step(self, token: torch.Tensor, positions: torch.Tensor, cache) -> torch.Tensor:
        """Runs one more position: tokens int[B] -> guided logits [B, V]."""
        embeds = self._model.prepare_embeddings_for_image_generation(token.repeat_interleave(2))
        return self.step(embeds[:, None], positions, cache)

    def __call__(self, number: int | None = None) -> np.ndarray:
        """Generates images and returns their tokens, int[B, T].

        number: of image tokens to generate, the others stay 0. Default: all.
        """
        cache, shape = self.new_cache(), (self._num_images, self._num_tokens)
        number = self._num_tokens if number is None else number
        indices = torch.zeros(shape, dtype=torch.long, device=DEVICE)
        positions = torch.arange(PROMPT_LENGTH, device=DEVICE)[None]
        embeds, marks = self._decoder.embed_tokens(self.tokens), []
        logits = self.step(embeds, positions, cache)
        positions = positions[:, -1:].clone()
        for column in range(number):
            if column:
                positions += 1
                logits = self.decode_step(indices[:, column - 1], positions, cache)
            probs = torch.softmax(logits / TEMPERATURE, dim=-1)
            indices[:, column] = torch.multinomial(probs, num_samples=1)[:, 0]
            if column in (1 + number // 24, number - 1):
                marks.append((column, now()))
        self.step_seconds.append(rate_between(marks))
        pixels = self._model.decode_image_tokens(indices).float().cpu().numpy()
        np.clip((pixels + 1) / 2 * 255, 0, 255).astype(np.uint8)
        return indices.cpu().numpy()


class CompiledDrawing(Drawing):
    """The same with a cache of fixed size and a compiled decode step. The prefill is not compiled.

    The cache is emptied before each call, so that the compiled step stays valid.
    """

    def __init__(
        self, model: transformers.JanusForConditionalGeneration, num_images: int, backend: str
    ):
        super().__init__(model, num_images)
        slots = PROMPT_LENGTH + self._num_tokens
        self._cache = transformers.StaticCache(config=self._decoder.config, max_cache_len=slots)
        self._compiled = compiled(super().decode_step, backend)

    def new_cache(self) -> transformers.Cache:
        self._cache.reset()
        return self._cache

    def decode_step(self, token: torch.Tensor, positions: torch.Tensor, cache) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self._compiled(token.clone(), positions, cache)  # always aligned in the same way


def measure(
    record: Record,
    model: str,
    num_images: list[int],
    implementations: list[str],
    dtype: str,
    runs: int,
    backend: str,
) -> None:
    """Measures one model. For the arguments see draw.torch_measurement."""
    record.describe(device_name(), PACKAGES)
    cfg, bandwidth = config(model, dtype), copy_bandwidth()
    network = random_model(cfg)
    for name in implementations:
        for number in num_images:
            torch.compiler.reset()
            is_compiled = name == "torch_compiled"
            drawing = (
                CompiledDrawing(network, number, backend)
                if is_compiled
                else Drawing(network, number)
            )
            # the contexts that the original code and the generate method of transformers use
            with torch.no_grad() if is_compiled else torch.inference_mode():
                first = seconds_of(functools.partial(drawing, WARM_UP))
                drawing.step_seconds.clear()
                seconds = repeated(drawing, runs)
            figures = draw_figures(cfg, number, first, seconds, drawing.step_seconds, bandwidth)
            figures |= peak_memory()
            shapes = draw_shapes(cfg, number)
            record.add(case(model, dtype, number, name), figures, shapes=shapes)
