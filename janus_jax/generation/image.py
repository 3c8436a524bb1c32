"""Image generation: prompt tokens -> image tokens -> pixels.

B images, R rows per image in the decoder (the prompt, and with guidance also the unconditional
prompt), P prompt length, T image tokens, S height and width in pixels.
Source: generation_inference.py of the original code.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.generation import chunks, codec, decoding, finite
from janus_jax.generation.decoding import DecodeState, TokenKind
from janus_jax.generation.requests import Requests, make_choice
from janus_jax.generation.samplers import Sampling
from janus_jax.interop.files import Report
from janus_jax.models.janus import Janus

IMAGE_KIND = TokenKind(
    head=lambda model, hidden: model.gen_head(hidden),
    embed=lambda model, indices: model.embed_image_tokens(indices),
)

# Maximum number of progress reports per chunk.
_MAX_REPORTS = 25

BatchState = tuple[DecodeState, jax.Array]  # the state, and int32[B, T] with the tokens so far


def _begin(model: Janus, requests: Requests, mesh: Mesh | None) -> BatchState:
    """Runs the prefill and chooses the first token of every image."""
    num_tokens = model.cfg.num_image_tokens
    state = decoding.begin(model, IMAGE_KIND, requests, num_tokens, mesh)
    indices = jnp.zeros((len(requests.tokens), num_tokens), jnp.int32)
    return state, indices.at[:, 0].set(state.token)


def _advance(model: Janus, batch: BatchState, start, steps: int) -> BatchState:
    """Generates the tokens start to start + steps - 1 of every image.

    `steps` is static. If the number of iterations were only known on the device, a GPU would send
    the condition of the loop to the host after every token.
    """

    def body(step, batch: BatchState) -> BatchState:
        return decoding.advance_column(model, IMAGE_KIND, start + step, *batch)

    return jax.lax.fori_loop(0, steps, body, batch)


begin_batch = jax.jit(_begin, static_argnames="mesh")
advance_batch = jax.jit(_advance, static_argnames="steps", donate_argnames="batch")


def generate_batch(
    model: Janus,
    requests: Requests,
    mesh: Mesh | None = None,
    report: Callable[[int], None] | None = None,
) -> codec.Decoded:
    """Generates a batch of images, from the prompt to the pixels.

    The prompt, the loop over the image tokens and the image tokenizer are separate programs, so
    that XLA can compile the image tokenizer with less effort than the loop.

    report: called with the number of tokens that each image has so far. The loop is then split into
        several calls. It has no callback, because JAX never stores programs with callbacks in its
        persistent compilation cache: every run of sample.py would compile again.
    """
    total = model.cfg.num_image_tokens
    steps = max(1, total - 1) if report is None else steps_per_report(total)
    batch = begin_batch(model, requests, mesh)
    for done in range(1, total, steps):
        if report is not None:
            batch[1].block_until_ready()
            report(done)
        batch = advance_batch(model, batch, done, steps)
    indices = batch[1]
    del batch  # frees the cache, so that the image tokenizer can use its memory
    return codec.decode_batch(model.gen_vq, indices, mesh)


def steps_per_report(total: int) -> int:
    """Returns the number of tokens between two reports on images of `total` tokens.

    It divides total - 1, the number of tokens after the prompt, so that all calls use one program.
    """
    rest = max(1, total - 1)
    return next(n for n in range(math.ceil(rest / _MAX_REPORTS), rest + 1) if rest % n == 0)


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
        max_batch: maximum number of images in a chunk; default: chunks.default_max_batch. With a
            mesh, a chunk has at least one image for each batch shard.
        mesh: the devices to use; None is the device that holds the model.
        progress: called with the number of image tokens generated so far and the total number.
    Yields:
        The indices int32[b, T] and pixels uint8[b, S, S, 3] of the next b images.
    Raises:
        ValueError: if image features, logits or pixels are NaN or infinite.
    """
    total, rows, length = requests.tokens.shape
    num_tokens = model.cfg.num_image_tokens
    slots = rows * (length + num_tokens - 1)
    split = chunks.equal_chunks(total, slots, max_batch, model.cfg.language_model, mesh)

    def report_chunk(start: int, kept: int, done: int) -> None:
        progress(start * num_tokens + kept * done, total * num_tokens)

    if progress is not None:
        progress(0, total * num_tokens)
    for numbers, kept in split:
        report = progress and functools.partial(report_chunk, int(numbers[0]), kept)
        indices, pixels = _generate_chunk(model, requests.select(numbers), mesh, report)
        yield indices[:kept], pixels[:kept]


def _generate_chunk(
    model: Janus, requests: Requests, mesh: Mesh | None, report: Callable[[int], None] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Generates one chunk; requests are NumPy arrays, report as in generate_batch."""
    arrays = sharding.put_batch(requests, mesh)
    decoded = generate_batch(model, arrays, mesh, report)
    check_generated(model, requests, decoded, mesh)
    indices, pixels = np.asarray(decoded.indices), np.asarray(decoded.pixels)
    if report is not None:
        report(model.cfg.num_image_tokens)
    return indices, pixels


def check_generated(
    model: Janus, requests: Requests, decoded: codec.Decoded, mesh: Mesh | None = None
) -> None:
    """Raises ValueError if image features, logits or pixels were NaN or infinite.

    requests: NumPy arrays.
    """
    failed = (np.asarray(decoded.indices) >= model.cfg.gen_vq.codebook_size).any(axis=1)
    if failed.any():
        finite.check_features(model, sharding.put_batch(requests.pixels, mesh), mesh)
        names, advice = ("language_model", "gen_embed", "gen_aligner", "gen_head"), ""
        if requests.choice.guidance_weight is not None:
            weight = requests.choice.guidance_weight[failed][0]
            advice = f", or try a guidance_weight closer to 1 than {weight:g}"
        modules = {name: getattr(model, name) for name in names}
        raise finite.not_finite_error("image-token logits", modules, advice)
    codec.check_decoded(decoded, model.gen_vq)


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
        sampling: the settings of every image, as samplers.make_sampling returns them.
        pad_id: the token that pads the prompts.
    Returns:
        NumPy arrays.
    """
    rows = 1 if guidance_weight == 1 else 2
    lengths = np.array([len(tokens) for tokens, _ in prompts], np.int32)
    tokens = np.full((len(prompts), rows, chunks.bucket_length(lengths.max())), pad_id, np.int32)
    for i, pair in enumerate(prompts):
        tokens[i, :, : lengths[i]] = pair[:rows]
    tokens = np.repeat(tokens, num_images, axis=0)
    index = np.tile(np.arange(num_images, dtype=np.uint32), len(prompts))
    return Requests(
        tokens=tokens,
        lengths=np.repeat(lengths, num_images),
        image_mask=np.zeros(tokens.shape, bool),
        pixels=np.zeros((len(tokens), 0, 0, 0, 3), np.float32),
        choice=make_choice(index, seed, sampling, guidance_weight if rows == 2 else None),
    )
