"""The image tokenizer at work: images -> image tokens -> pixels.

B or N images, T image tokens, S pixels a side. Always in float32: bands would show in bfloat16.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from janus_jax import checks, sharding
from janus_jax.generation import finite
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.vq import VQ
from janus_jax.processing.images import (
    ImageSource,
    image_list,
    load_image,
    preprocess_generation,
)


class Decoded(NamedTuple):
    """Images and their tokens.

    indices: int32[B, T]. pixels: uint8[B, S, S, 3]. finite: bool[B], whether what was decoded was.
    """

    indices: jax.Array
    pixels: jax.Array
    finite: jax.Array


@functools.partial(jax.jit, static_argnames="mesh")
def encode_pixels(vq: VQ, pixels: jax.Array, mesh: Mesh | None = None) -> jax.Array:
    """float32[B, S, S, 3] in [-1, 1] -> int32[B, T], all at once."""
    with jax.default_matmul_precision("highest"):
        return sharding.replicate(vq.encode(pixels), mesh)


def check_encoded(indices: np.ndarray, vq: VQ) -> np.ndarray:
    """What encode_pixels gave, as it is.

    Raises:
        ValueError: latents were not finite.
    """
    if (indices >= vq.cfg.codebook_size).any():
        raise finite.not_finite("VQ encoder latents", {"gen_vq": vq})
    return indices


def decode_pixels(
    vq: VQ, indices: jax.Array, mesh: Mesh | None = None
) -> tuple[jax.Array, jax.Array]:
    """Indices int32[B, T] -> pixels uint8[B, S, S, 3], truncated as in the reference.

    Also returns bool[B], whether all decoded values of an image were finite.

    One image at a time on each device: its activations are large (75 MB a layer at 384 pixels),
    and an image comes out the same whatever the others and the mesh.
    """

    def decode(vq: VQ, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.map(lambda row: _decode_one(vq, row), indices)

    if mesh is None:
        return decode(vq, indices)
    batch = P(sharding.BATCH_AXES)
    return jax.shard_map(decode, mesh=mesh, in_specs=(P(), batch), out_specs=batch)(vq, indices)


def _decode_one(vq: VQ, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32[T] -> uint8[S, S, 3], and whether all values were finite."""
    with jax.default_matmul_precision("highest"):
        pixels = vq.decode(indices[None])[0]
    return to_uint8(pixels), jnp.all(jnp.isfinite(pixels))


def to_uint8(pixels: jax.Array) -> jax.Array:
    """float32 in [-1, 1], any shape -> uint8 of it; clipped and truncated, as in the reference."""
    return jnp.clip((pixels + 1) / 2 * 255, 0, 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnames="mesh")
def with_pixels(vq: VQ, indices: jax.Array, mesh: Mesh | None = None) -> Decoded:
    """Indices int32[B, T] with their pixels, whole on every device."""
    return sharding.replicate(Decoded(indices, *decode_pixels(vq, indices, mesh)), mesh)


def check_decoded(decoded: Decoded, vq: VQ) -> None:
    """Raises ValueError if pixels were not finite."""
    if not np.asarray(decoded.finite).all():
        raise finite.not_finite("decoded pixels", {"gen_vq": vq})


def to_indices(
    model: Janus, images: Sequence[ImageSource] | ImageSource, mesh: Mesh | None = None
) -> np.ndarray:
    """See Pipeline.encode_images; one at a time, so another number of images compiles nothing."""
    sources = image_list(images)
    checks.check_not_empty("images", sources)
    pixels = [preprocess_generation(load_image(x), model.cfg.image_size) for x in sources]
    rows = [sharding.put_batch(x[None], mesh) for x in pixels]
    encoded = [np.asarray(encode_pixels(model.gen_vq, x, mesh)) for x in rows]
    return check_encoded(np.concatenate(encoded), model.gen_vq)


def to_pixels(model: Janus, indices: np.ndarray, mesh: Mesh | None = None) -> np.ndarray:
    """See Pipeline.decode_indices; one at a time on each device, as to_indices."""
    indices = np.asarray(indices)
    _check_indices(indices, model.cfg)
    # the last call is filled up with the last image, whose copies are dropped
    step, last, decoded = sharding.num_batch_shards(mesh), len(indices) - 1, []
    for start in range(0, len(indices), step):
        rows = indices[np.minimum(np.arange(start, start + step), last)].astype(np.int32)
        part = with_pixels(model.gen_vq, sharding.put_batch(rows, mesh), mesh)
        check_decoded(part, model.gen_vq)
        decoded.append(np.asarray(part.pixels))
    return np.concatenate(decoded)[: len(indices)]


def _check_indices(indices: np.ndarray, cfg: JanusConfig) -> None:
    size, length = cfg.gen_vq.codebook_size, cfg.num_image_tokens
    if indices.ndim != 2 or indices.shape[1] != length or not len(indices):
        raise ValueError(f"indices must be int[N, {length}], got {list(indices.shape)}")
    if indices.dtype.kind not in "iu":
        raise ValueError(f"indices must be integers, got {indices.dtype}")
    if indices.min() < 0 or indices.max() >= size:
        raise ValueError(f"indices must be in [0, {size}), got {indices.min()} to {indices.max()}")
