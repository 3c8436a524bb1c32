"""Image generation: prompt tokens -> image tokens -> pixels.

B images, R rows per image in the decoder (the prompt, and with guidance also the unconditional
prompt), P prompt length, T image tokens, D model width, V codebook size, S height and width in
pixels.
Source: generation_inference.py of the original code.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.generation import codec, decoding, finite, samplers
from janus_jax.generation.samplers import Sampling
from janus_jax.interop.files import Report
from janus_jax.models.janus import Janus
from janus_jax.models.kv_cache import KVCache

# Maximum number of progress reports per chunk.
_MAX_REPORTS = 25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch of images to generate.

    tokens: int32[B, R, P], the left-padded prompts.
    token_mask: bool[B, P], False for the padding on the left. The pad tokens that replace the words
        of an unconditional prompt are attended to, as in the original code.
    index: uint32[B], the number of the image among the images of its prompt. Together with the
        seed it determines the noise of the image.
    seed: uint32[2], as samplers.seed_words returns it.
    guidance_weight: float32 scalar; None (with R = 1) generates without guidance.
    sampling: how tokens are sampled.
    """

    tokens: jax.Array
    token_mask: jax.Array
    index: jax.Array
    seed: np.ndarray
    guidance_weight: np.float32 | None
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """The state of the token loop.

    indices: int32[B, T]; the first `step` tokens are sampled, the others are 0. The decoder has
        read all sampled tokens but the last.
    step: int32 scalar, number of tokens sampled so far.
    cache: what the decoder has read, B * R rows.
    """

    indices: jax.Array
    step: jax.Array
    cache: KVCache


def guided_logits(
    model: Janus, hidden: jax.Array, guidance_weight: np.float32 | None
) -> jax.Array:
    """Computes image-token logits with classifier-free guidance: uncond + w (cond - uncond).

    hidden: float[B * R, D]; with guidance R = 2, and the cond and uncond rows alternate.
    guidance_weight: w, or None for R = 1 and no guidance.
    Returns float32[B, V].
    """
    logits = model.gen_head(hidden)
    if guidance_weight is None:
        return logits
    cond, uncond = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
    return uncond + guidance_weight * (cond - uncond)


@decoding.full_float32_matmuls
def prefill(
    model: Janus, requests: Requests, mesh: Mesh | None = None
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder over the prompts.

    Returns the guided logits of the first image token, float32[B, V], and the cache.
    """
    _, rows, length = requests.tokens.shape
    embeds = model.language_model.embed(requests.tokens.reshape(-1, length))
    token_mask = jnp.repeat(requests.token_mask, rows, axis=0)
    num_new = model.cfg.num_image_tokens - 1  # the decoder does not read the last token
    hidden, cache = decoding.prefill(model.language_model, embeds, token_mask, num_new, mesh)
    return guided_logits(model, hidden, requests.guidance_weight), cache


@decoding.full_float32_matmuls
def decode_step(
    model: Janus, cache: KVCache, indices: jax.Array, guidance_weight
) -> tuple[jax.Array, KVCache]:
    """Runs the decoder over one image token per image.

    indices: int32[B].
    Returns the guided logits of the next token, float32[B, V], and the new cache.
    """
    rows = 1 if guidance_weight is None else 2
    embeds = jnp.repeat(model.embed_image_tokens(indices), rows, axis=0)
    hidden, cache = decoding.decode_step(model.language_model, cache, embeds)
    return guided_logits(model, hidden, guidance_weight), cache


def _sample(requests: Requests, logits: jax.Array, step) -> jax.Array:
    """Samples token number `step` of every image: float32[B, V] -> int32[B]."""
    noise = samplers.gumbel_noise(requests.seed, requests.index, step, logits.shape[-1])
    return samplers.sample_token(logits, noise, requests.sampling)


def init_state(model: Janus, requests: Requests, mesh: Mesh | None) -> DecodeState:
    """Runs the prefill and samples the first token of every image."""
    logits, cache = prefill(model, requests, mesh)
    indices = jnp.zeros((len(requests.tokens), model.cfg.num_image_tokens), jnp.int32)
    indices = indices.at[:, 0].set(_sample(requests, logits, 0))
    return DecodeState(indices, jnp.ones((), jnp.int32), cache)


def generate_next_token(model: Janus, requests: Requests, state: DecodeState) -> DecodeState:
    """Runs one decode step on the last token of every image and samples the next token."""
    indices, step = state.indices, state.step
    last = jax.lax.dynamic_index_in_dim(indices, step - 1, axis=1, keepdims=False)
    logits, cache = decode_step(model, state.cache, last, requests.guidance_weight)
    sampled = _sample(requests, logits, step)
    indices = jax.lax.dynamic_update_index_in_dim(indices, sampled, step, axis=1)
    return DecodeState(indices, step + 1, cache)


@functools.partial(jax.jit, static_argnames="mesh")
def generate_batch(model: Janus, requests: Requests, mesh: Mesh | None = None) -> codec.Decoded:
    """Generates a batch of images in one program, from the prompt to the pixels."""

    def body(state: DecodeState, _):
        return generate_next_token(model, requests, state), None

    state = init_state(model, requests, mesh)
    state, _ = jax.lax.scan(body, state, length=model.cfg.num_image_tokens - 1)
    return codec.decode_batch(model.gen_vq, state.indices, mesh)


_init_state = jax.jit(init_state, static_argnames="mesh")


@functools.partial(jax.jit, donate_argnames="state")
def _generate_tokens(model: Janus, requests: Requests, state: DecodeState, count) -> DecodeState:
    """Generates the next `count` tokens of every image."""
    return jax.lax.fori_loop(0, count, lambda _, s: generate_next_token(model, requests, s), state)


def generate_batch_with_progress(
    model: Janus, requests: Requests, mesh: Mesh | None, report: Callable[[int], None]
) -> codec.Decoded:
    """Generates the same images as generate_batch, in several calls, and reports progress.

    report: called between the calls with the number of tokens that each image has so far.

    It does not use a single program with a callback, because JAX never stores programs with
    callbacks in its persistent compilation cache: every run of sample.py would compile again.
    """
    total = model.cfg.num_image_tokens
    stride = math.ceil(total / _MAX_REPORTS)
    state = _init_state(model, requests, mesh)
    for done in range(1, total, stride):
        report(done)
        state = _generate_tokens(model, requests, state, min(stride, total - done))
        state.step.block_until_ready()
    return codec.decode_batch(model.gen_vq, state.indices, mesh)


def generate(
    model: Janus,
    requests: Requests,
    max_batch: int | None = None,
    mesh: Mesh | None = None,
    progress: Report | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Generates any number of images, chunk by chunk. All chunks use the same compiled program.

    Args:
        requests: NumPy arrays, B images.
        max_batch: maximum number of images in a chunk; default: decoding.default_max_batch. With a
            mesh, a chunk has at least one image for each batch shard.
        mesh: the devices to use; None is the device that holds the model.
        progress: called with the number of image tokens generated so far and the total number.
    Yields:
        The indices int32[b, T] and pixels uint8[b, S, S, 3] of the next b images.
    Raises:
        ValueError: if logits or pixels are NaN or infinite.
    """
    total, rows, length = requests.tokens.shape
    num_tokens = model.cfg.num_image_tokens
    slots = rows * (length + num_tokens - 1)
    max_size = max_batch or decoding.default_max_batch(model.cfg.language_model, slots, mesh)
    size = decoding.chunk_size(total, max_size, sharding.num_batch_shards(mesh))
    if progress is not None:
        progress(0, total * num_tokens)
    for start in range(0, total, size):
        yield _generate_chunk(model, requests, start, size, mesh, progress)


def _generate_chunk(
    model: Janus,
    requests: Requests,
    start: int,
    size: int,
    mesh: Mesh | None,
    progress: Report | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Generates `size` images from number `start` on, or as many as remain."""
    total, num_tokens = len(requests.tokens), model.cfg.num_image_tokens
    num_images = min(size, total - start)
    # the last chunk is padded with copies of its last image, which are dropped afterwards
    chunk = _select(requests, np.minimum(np.arange(start, start + size), total - 1), mesh)

    def report(done: int) -> None:
        progress(start * num_tokens + num_images * done, total * num_tokens)

    if progress is None:
        decoded = generate_batch(model, chunk, mesh)
    else:
        decoded = generate_batch_with_progress(model, chunk, mesh, report)
    check_generated(model, requests, decoded)
    indices, pixels = (np.asarray(x)[:num_images] for x in (decoded.indices, decoded.pixels))
    if progress is not None:
        report(num_tokens)
    return indices, pixels


def check_generated(model: Janus, requests: Requests, decoded: codec.Decoded) -> None:
    """Raises ValueError if logits or pixels were NaN or infinite."""
    if (np.asarray(decoded.indices) >= model.cfg.gen_vq.codebook_size).any():
        names, advice = ("language_model", "gen_embed", "gen_aligner", "gen_head"), ""
        if requests.guidance_weight is not None:
            advice = f", or try a guidance_weight closer to 1 than {requests.guidance_weight:g}"
        modules = {name: getattr(model, name) for name in names}
        raise finite.not_finite_error("image-token logits", modules, advice)
    codec.check_decoded(decoded, model.gen_vq)


def _select(requests: Requests, index: np.ndarray, mesh: Mesh | None) -> Requests:
    """Returns the requests with the given numbers, on the devices."""
    rows = (requests.tokens[index], requests.token_mask[index], requests.index[index])
    tokens, token_mask, index = sharding.put_batch(rows, mesh)
    return dataclasses.replace(requests, tokens=tokens, token_mask=token_mask, index=index)


def make_requests(
    prompts: Sequence[tuple[Sequence[int], Sequence[int]]],
    num_images: int,
    seed: int,
    guidance_weight: float,
    sampling: Sampling,
    pad_id: int,
) -> Requests:
    """Makes the requests for num_images images of each prompt, in the order of the prompts.

    The noise of an image depends on the seed and on its number among the images of its prompt, not
    on the other prompts. A prompt therefore gives the same images alone and in a batch, and a
    repeated prompt gives the same images again.

    Args:
        prompts: for each prompt, its tokens and those of the unconditional prompt, of equal length.
        guidance_weight: w in uncond + w (cond - uncond); with 1 the unconditional rows are omitted.
        pad_id: the token that pads the prompts on the left.
    """
    rows = 1 if guidance_weight == 1 else 2
    length = decoding.bucket_length(max(len(tokens) for tokens, _ in prompts))
    tokens = np.full((len(prompts), rows, length), pad_id, np.int32)
    token_mask = np.zeros((len(prompts), length), bool)
    for i, pair in enumerate(prompts):
        tokens[i, :, length - len(pair[0]) :] = pair[:rows]
        token_mask[i, length - len(pair[0]) :] = True
    return Requests(
        tokens=np.repeat(tokens, num_images, axis=0),
        token_mask=np.repeat(token_mask, num_images, axis=0),
        index=np.tile(np.arange(num_images, dtype=np.uint32), len(prompts)),
        seed=samplers.seed_words(seed),
        guidance_weight=np.float32(guidance_weight) if rows == 2 else None,
        sampling=sampling,
    )
