"""Encoding images to image tokens, and decoding image tokens to pixels.

B or N images, T image tokens, S height and width in pixels. All computation is float32, because in
bfloat16 the decoded images show bands.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from janus_jax import checks, sharding
from janus_jax.generation import chunks, finite
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.vq import VQ
from janus_jax.processing.images import (
    ImageSource,
    image_list,
    load_image,
    preprocess_generation,
)

# With its lowest effort, O0, XLA compiles float32 convolutions of the image tokenizer for TPUs in a
# tenth of the time. The number of the level works with all versions of JAX.
TPU_OPTIONS = {"optimization_level": 9}


class Decoded(NamedTuple):
    """Image tokens and the images decoded from them.

    indices: int32[B, T].
    pixels: uint8[B, S, S, 3].
    finite: bool[B], whether all decoded values of the image were finite.
    """

    indices: jax.Array
    pixels: jax.Array
    finite: jax.Array


@functools.partial(jax.jit, static_argnames="mesh")
def encode_pixels(vq: VQ, pixels: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """Encodes a batch of images in one call: float32[B, S, S, 3] in [-1, 1] -> int32[B, T]."""
    with jax.default_matmul_precision("highest"):
        return sharding.replicate(vq.encode(pixels), mesh)


def check_encoded(indices: np.ndarray, vq: VQ) -> np.ndarray:
    """Returns the indices unchanged, after checking them.

    indices: what encode_pixels returned.

    Raises:
        ValueError: if the latents were NaN or infinite.
    """
    if (indices >= vq.cfg.codebook_size).any():
        raise finite.not_finite_error("VQ encoder latents", {"gen_vq": vq})
    return indices


def decode_pixels(
    vq: VQ, indices: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Decodes image tokens: int32[B, T] -> uint8[B, S, S, 3].

    Also returns bool[B], whether all decoded values of an image were finite.

    Each device decodes one image at a time, because the activations are large: 75 MB per layer for
    384 x 384 pixels. The pixels of an image therefore do not depend on the batch or the mesh.
    """

    def decode(vq: VQ, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda row: _decode_image(vq, row), indices)

    if mesh is None:
        return decode(vq, indices)
    batch = P(sharding.BATCH_AXES)
    return jax.shard_map(decode, mesh=mesh, in_specs=(P(), batch), out_specs=batch)(vq, indices)


def _decode_image(vq: VQ, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Decodes one image: int32[T] -> uint8[S, S, 3], and whether all values were finite."""
    with jax.default_matmul_precision("highest"):
        pixels = vq.decode(indices[None])[0]
    return to_uint8(pixels), jnp.all(jnp.isfinite(pixels))


def to_uint8(pixels: jax.Array) -> jax.Array:
    """Maps float32 in [-1, 1] to uint8, clipping and truncating as the original code does."""
    return jnp.clip((pixels + 1) / 2 * 255, 0, 255).astype(jnp.uint8)


def decode_batch(vq: VQ, indices: jax.Array, mesh: Mesh | None = None) -> Decoded:
    """Decodes image tokens int32[B, T]; the results are replicated on all devices."""
    (platform,) = {device.platform for device in jax.tree.leaves(vq)[0].sharding.device_set}
    return decode_program(platform)(vq, indices, mesh)


@functools.cache
def decode_program(platform: str) -> Callable:
    """Returns the jitted function of decode_batch for the devices of a platform."""

    def decode(vq: VQ, indices: jax.Array, mesh: Mesh | None) -> Decoded:
        return sharding.replicate(Decoded(indices, *decode_pixels(vq, indices, mesh)), mesh)

    options = TPU_OPTIONS if platform == "tpu" else None
    return jax.jit(decode, static_argnames="mesh", compiler_options=options)


def check_decoded(decoded: Decoded, vq: VQ) -> None:
    """Raises ValueError if decoded pixels were NaN or infinite."""
    if not np.asarray(decoded.finite).all():
        raise finite.not_finite_error("decoded pixels", {"gen_vq": vq})


def encode_images(
    model: Janus, images: Sequence[ImageSource] | ImageSource, mesh: Mesh | None = None
) -> np.ndarray:
    """Implements Pipeline.encode_images. Returns int32[N, T].

    Encodes one image at a time, so that a different number of images needs no new compilation.
    """
    sources = image_list(images)
    checks.check_not_empty("images", sources)
    pixels = [preprocess_generation(load_image(x), model.cfg.image_size) for x in sources]
    rows = [sharding.put_batch(x[None], mesh) for x in pixels]
    encoded = [np.asarray(encode_pixels(model.gen_vq, x, mesh)) for x in rows]
    return check_encoded(np.concatenate(encoded), model.gen_vq)


def decode_indices(model: Janus, indices: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
    """Implements Pipeline.decode_indices; each device decodes one image at a time.

    indices: int[N, T]. Returns uint8[N, S, S, 3]. Raises ValueError, see Pipeline.decode_indices.
    """
    indices = np.asarray(indices)
    _check_indices(indices, model.cfg)
    pixels = []
    for numbers, kept in chunks.padded_chunks(len(indices), sharding.num_batch_shards(mesh)):
        rows = sharding.put_batch(indices[numbers].astype(np.int32), mesh)
        decoded = decode_batch(model.gen_vq, rows, mesh)
        check_decoded(decoded, model.gen_vq)
        pixels.append(np.asarray(decoded.pixels)[:kept])
    return np.concatenate(pixels)


def _check_indices(indices: np.ndarray, cfg: JanusConfig) -> None:
    """Raises ValueError if indices are not integers int[N, T] in the range of the codebook."""
    size, length = cfg.gen_vq.codebook_size, cfg.num_image_tokens
    if indices.ndim != 2 or indices.shape[1] != length or not len(indices):
        raise ValueError(f"indices must be int[N, {length}], got {list(indices.shape)}")
    if indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    if indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"indices must be in [0, {size}), got {indices.min()} to {indices.max()}")
