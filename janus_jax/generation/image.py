"""Drawing images: prompt tokens -> image tokens -> pixels (reference: generation_inference.py).

B images, R rows of an image in the decoder (its prompt, and next to it the prompt without its
words when guidance is on), P prompt length, T image tokens, V codebook size, S pixels a side.
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
from janus_jax.models.janus import Janus
from janus_jax.progress import Report

# Calls of a progress report in the course of one chunk, at most.
_REPORTS = 25


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Requests:
    """What to draw, one entry an image.

    tokens: int32[B, R, P], left-padded.
    token_mask: bool[B, P], True but for the padding on the left; the pads that stand for words in
        a row without them are attended to, as in the reference.
    index: uint32[B], which image of its prompt this is; with the seed, the source of its noise.
    seed: uint32[2], of samplers.seed_words.
    guidance_weight: float32 scalar; None (and R = 1) draws from the prompt alone.
    sampling: how tokens are chosen.
    """

    tokens: jax.Array
    token_mask: jax.Array
    index: jax.Array
    seed: np.ndarray
    guidance_weight: np.float32 | None
    sampling: Sampling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawing:
    """Images under way.

    indices: int32[B, T], of which the first `step` are chosen and all but the last of these read.
    step: int32 scalar.
    context: the decoder's, of B * R rows.
    """

    indices: jax.Array
    step: jax.Array
    context: decoding.Context


def guided_logits(
    model: Janus, hidden: jax.Array, guidance_weight: np.float32 | None
) -> jax.Array:
    """uncond + w (cond - uncond): hidden, float[B * R, D] -> float32[B, V]."""
    logits = model.gen_head(hidden)
    if guidance_weight is None:
        return logits
    cond, uncond = jnp.moveaxis(logits.reshape(-1, 2, logits.shape[-1]), 1, 0)
    return uncond + guidance_weight * (cond - uncond)


@decoding.in_full_float32
def prefill(
    model: Janus, requests: Requests, mesh: Mesh | None = None
) -> tuple[jax.Array, decoding.Context]:
    """Reads the prompts; returns the first token's guided logits, float32[B, V]."""
    _, rows, length = requests.tokens.shape
    embeds = model.language_model.embed(requests.tokens.reshape(-1, length))
    token_mask = jnp.repeat(requests.token_mask, rows, axis=0)
    num_new = model.cfg.num_image_tokens - 1  # the last token is never read
    hidden, context = decoding.prefill(model.language_model, embeds, token_mask, num_new, mesh)
    return guided_logits(model, hidden, requests.guidance_weight), context


@decoding.in_full_float32
def decode_step(
    model: Janus, context: decoding.Context, indices: jax.Array, guidance_weight
) -> tuple[jax.Array, decoding.Context]:
    """Reads one token of every image, int32[B]; returns the next one's guided logits."""
    rows = 1 if guidance_weight is None else 2
    embeds = jnp.repeat(model.embed_image_tokens(indices), rows, axis=0)
    hidden, context = decoding.decode_step(model.language_model, context, embeds)
    return guided_logits(model, hidden, guidance_weight), context


def _choose(requests: Requests, logits: jax.Array, step) -> jax.Array:
    noise = samplers.gumbel_noise(requests.seed, requests.index, step, logits.shape[-1])
    return samplers.pick(logits, noise, requests.sampling)


def begin(model: Janus, requests: Requests, mesh: Mesh | None) -> Drawing:
    """Reads the prompts and chooses the first token of every image."""
    logits, context = prefill(model, requests, mesh)
    indices = jnp.zeros((len(requests.tokens), model.cfg.num_image_tokens), jnp.int32)
    indices = indices.at[:, 0].set(_choose(requests, logits, 0))
    return Drawing(indices, jnp.ones((), jnp.int32), context)


def draw_token(model: Janus, requests: Requests, drawing: Drawing) -> Drawing:
    """Reads the token chosen last and chooses the next."""
    indices, step = drawing.indices, drawing.step
    last = jax.lax.dynamic_index_in_dim(indices, step - 1, axis=1, keepdims=False)
    logits, context = decode_step(model, drawing.context, last, requests.guidance_weight)
    chosen = _choose(requests, logits, step)
    indices = jax.lax.dynamic_update_index_in_dim(indices, chosen, step, axis=1)
    return Drawing(indices, step + 1, context)


@functools.partial(jax.jit, static_argnames="mesh")
def draw(model: Janus, requests: Requests, mesh: Mesh | None = None) -> codec.Decoded:
    """The whole way in one program."""

    def step(drawing: Drawing, _):
        return draw_token(model, requests, drawing), None

    drawing = begin(model, requests, mesh)
    drawing, _ = jax.lax.scan(step, drawing, length=model.cfg.num_image_tokens - 1)
    return codec.with_pixels(model.gen_vq, drawing.indices, mesh)


_begin = jax.jit(begin, static_argnames="mesh")


@functools.partial(jax.jit, donate_argnames="drawing")
def _draw_tokens(model: Janus, requests: Requests, drawing: Drawing, count) -> Drawing:
    return jax.lax.fori_loop(0, count, lambda _, d: draw_token(model, requests, d), drawing)


def draw_reporting(
    model: Janus, requests: Requests, mesh: Mesh | None, report: Callable[[int], None]
) -> codec.Decoded:
    """As draw, in a few calls, so that `report(tokens an image has)` is told in between.

    Not by a callback out of the one program: such a program is never kept in the persistent
    compilation cache, and every run of sample.py would compile it anew.
    """
    total = model.cfg.num_image_tokens
    stride = math.ceil(total / _REPORTS)
    drawing = _begin(model, requests, mesh)
    for done in range(1, total, stride):
        report(done)
        drawing = _draw_tokens(model, requests, drawing, min(stride, total - done))
        drawing.step.block_until_ready()
    return codec.with_pixels(model.gen_vq, drawing.indices, mesh)


def generate(
    model: Janus,
    requests: Requests,
    max_batch: int | None = None,
    mesh: Mesh | None = None,
    progress: Report | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draws any number of images, a chunk at a time, all chunks by the same program.

    Args:
        requests: arrays of the host, B entries.
        max_batch: the most images drawn at once; by default as many as batch_within_memory says.
            On a mesh, at least one for each group of devices that shares out the batch.
        progress: called with the image tokens drawn so far and in all.
    Yields:
        indices int32[b, T] and pixels uint8[b, S, S, 3] of the next b images.
    Raises:
        ValueError: logits or pixels that are not finite.
    """
    total, rows, length = requests.tokens.shape
    per_image = model.cfg.num_image_tokens
    slots = rows * (length + per_image - 1)
    most = max_batch or decoding.batch_within_memory(model.cfg.language_model, slots, mesh)
    size = decoding.chunk_size(total, most, sharding.num_batch_shards(mesh))
    if progress is not None:
        progress(0, total * per_image)
    for start in range(0, total, size):
        yield _draw_chunk(model, requests, start, size, mesh, progress)


def _draw_chunk(
    model: Janus,
    requests: Requests,
    start: int,
    size: int,
    mesh: Mesh | None,
    progress: Report | None,
) -> tuple[np.ndarray, np.ndarray]:
    """The next `size` images from `start` on, or as many as there are."""
    total, per_image = len(requests.tokens), model.cfg.num_image_tokens
    wanted = min(size, total - start)
    # the last chunk is filled up with its last image, whose copies are dropped
    chunk = _take(requests, np.minimum(np.arange(start, start + size), total - 1), mesh)

    def report(done: int) -> None:
        progress(start * per_image + wanted * done, total * per_image)

    if progress is None:
        drawn = draw(model, chunk, mesh)
    else:
        drawn = draw_reporting(model, chunk, mesh, report)
    check_generated(model, requests, drawn)
    indices, pixels = (np.asarray(x)[:wanted] for x in (drawn.indices, drawn.pixels))
    if progress is not None:
        report(per_image)
    return indices, pixels


def check_generated(model: Janus, requests: Requests, drawn: codec.Decoded) -> None:
    """Raises ValueError if logits or pixels were not finite."""
    if (np.asarray(drawn.indices) >= model.cfg.gen_vq.codebook_size).any():
        names, weight = ("language_model", "gen_embed", "gen_aligner", "gen_head"), ""
        if requests.guidance_weight is not None:
            weight = f", or try a guidance_weight nearer to 1 than {requests.guidance_weight:g}"
        modules = {name: getattr(model, name) for name in names}
        raise finite.not_finite("image-token logits", modules, weight)
    codec.check_decoded(drawn, model.gen_vq)


def _take(requests: Requests, index: np.ndarray, mesh: Mesh | None) -> Requests:
    """The images of that index, placed on the devices."""
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
    """Requests for num_images images of each prompt, prompt after prompt.

    Image j of a prompt has the noise of j, whatever the other prompts: a prompt gives in a batch
    what it gives alone, and the same prompt twice gives the same images twice.

    Args:
        prompts: tokens of each prompt with and without its words, equally long.
        guidance_weight: 1 needs no rows without words, and gets none.
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
