"""Compares results with the recordings of the original code, see benchmarks/parity.py."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.jax_side import device_name, random_model
from benchmarks.models import PROMPT_LENGTH, config
from benchmarks.parity import BATCHES, DTYPES, RECORDED, case, same_seeds
from benchmarks.records import Record
from benchmarks.suite import ROOT
from janus_jax import load
from janus_jax.generation import codec, decoding, image, samplers
from janus_jax.generation.pipeline import Pipeline
from janus_jax.generation.requests import Requests
from janus_jax.models.janus import Janus

GOLDEN = ROOT / "tests" / "golden"
PROMPT, SEED = "A close-up photo of a red cat, studio light.", 3
BFLOAT16_LIMIT = 0.05

Prompt = tuple[Sequence[int], Sequence[int]]  # tokens of the prompt and the unconditional prompt


def measure(record: Record, model: str | None = None, batches: Sequence[int] = ()) -> None:
    """Compares with the recordings, or checks the batches of a model with random weights."""
    record.describe(device_name())
    if model is not None:
        network, tokens = random_model(config(model, "float32")), list(range(1, PROMPT_LENGTH + 1))
        figures = _same(network, (tokens, tokens), batches)
        record.add(case(model, "float32", same_seeds(batches)), figures)
        return
    for dtype in DTYPES:
        pipeline = load(GOLDEN / "janus", dtype=dtype)
        for check, function in _checks(pipeline).items():
            record.add(case("small", dtype, check), _compare(*function(), dtype))
        if dtype == "float32":
            figures = _same(pipeline.model, pipeline.image_prompt(PROMPT), BATCHES)
            record.add(case("small", dtype, same_seeds(BATCHES)), figures)


def _compare(found, expected, dtype: str) -> dict:
    """Returns the figures of one comparison."""
    found, expected = np.asarray(found), np.asarray(expected)
    if expected.dtype.kind in "iu" and expected.dtype != np.uint8:
        equal = float(np.mean(found == expected))
        return dict(equal=equal) | (dict(ok=equal == 1) if dtype == "float32" else {})
    found, precise = found.astype(np.float64), expected.astype(np.float64)
    difference = np.abs(found - precise)
    error = float(np.sqrt(np.mean(difference**2) / np.mean(precise**2)))
    if expected.dtype == np.uint8:  # the image tokenizer is float32 in both
        ok = bool(difference.max() <= 1)
    elif dtype == "float32":
        ok = bool((difference <= 1e-4 + 1e-4 * np.abs(precise)).all())
    else:
        ok = error <= BFLOAT16_LIMIT
    return dict(error=error, largest_difference=float(difference.max()), ok=ok)


def _checks(pipeline: Pipeline) -> dict[str, Callable[[], tuple]]:
    """Returns, for each check, a function that returns the result and the recording."""
    model = pipeline.model
    images, vq, text = (_recording(name) for name in ("t2i", "vq", "llm"))
    vision = _recording("vision")

    def encoded():
        pixels = np.moveaxis(vq["pixel_values"], 1, -1)
        return codec.encode_pixels(model.gen_vq, pixels), vq["indices"].astype(np.int32)

    def greedy():
        generated = pipeline.generate_images(PROMPT, num_images=2, temperature=0)
        return generated.indices, images["greedy_tokens"].astype(np.int32)

    def pixels():
        tokens = images["forced_tokens"]
        return pipeline.decode_indices(tokens), images["forced_uint8"]

    functions = (
        lambda: (_image_features(model, vision["pixel_values"]), vision["aligned"]),
        lambda: (_text_logits(model, text["plain_input_ids"]), text["plain_logits"]),
        lambda: (_image_logits(pipeline, images["forced_tokens"]), images["forced_cfg_logits"]),
        greedy,
        pixels,
        encoded,
    )
    return dict(zip(RECORDED, functions, strict=True))


def _recording(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"janus_{name}.npz") as arrays:
        return dict(arrays)


def _jitted(function: Callable, **options) -> Callable:
    """Returns the jitted function, with full-precision products if the model is float32."""
    return jax.jit(decoding.full_float32_matmuls(function), **options)


def _image_features(model: Janus, pixels: np.ndarray):
    return _jitted(lambda model, x: model.encode_images(x))(model, np.moveaxis(pixels, 1, -1))


def _text_logits(model: Janus, tokens: np.ndarray):
    def logits(model, tokens):
        decoder = model.language_model
        return decoder.lm_head(decoder(decoder.embed(tokens))[0])

    return _jitted(logits)(model, tokens.astype(np.int32))


def _image_logits(pipeline: Pipeline, tokens: np.ndarray) -> np.ndarray:
    """Returns the guided logits of each step under given image tokens: float32[T, B, V]."""
    model, (batch, number) = pipeline.model, tokens.shape
    requests = _requests(model, pipeline.image_prompt(PROMPT), batch, 0.0)
    begin = jax.jit(decoding.prefill, static_argnames=("kind", "num_tokens"))
    advance = jax.jit(decoding.decode_step, static_argnames="kind")
    state, logits = begin(model, image.IMAGE_KIND, requests, number)
    seen = [logits]
    for step in range(number - 1):
        state = dataclasses.replace(state, token=jnp.asarray(tokens[:, step], jnp.int32))
        state, logits = advance(model, image.IMAGE_KIND, state)
        seen.append(logits)
    return np.stack(seen)


def _requests(model: Janus, prompt: Prompt, num_images: int, temperature: float) -> Requests:
    sampling = samplers.make_sampling(temperature, None, None, model.cfg.gen_vq.codebook_size)
    return image.make_requests([prompt], num_images, SEED, 5.0, sampling, 0)


def _same(model: Janus, prompt: Prompt, batches: Sequence[int]) -> dict:
    """Returns how far images depend on the batch size; compares with those of the first size."""
    requests = _requests(model, prompt, max(batches), 1.0)
    parts = [list(image.generate(model, requests, max_batch=size)) for size in batches]
    first, *others = (np.concatenate([indices for indices, _ in part]) for part in parts)
    equal = float(np.mean([other == first for other in others]))
    return dict(equal=equal, ok=equal == 1)
