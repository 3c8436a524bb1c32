"""The loss of packed rows: every target through its own head, and no head where no target is.

B rows, T tokens of a row, D model width, V vocabulary or codebook; n input images
and m generated images, S pixels a side, N tokens of a generated image. Source: the Janus and
Janus-Pro reports, next-token cross-entropy on answers, on all of plain text, and on the tokens of
generated images.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from janus_jax.data.records import KINDS
from janus_jax.models.attention import segment_mask
from janus_jax.models.janus import Janus, merge_features
from janus_jax.processing.images import ImageConfig
from janus_jax.sharding import constrain_rows

Rows = dict[str, jax.Array]


def row_losses(
    model: Janus, rows: Rows, images: ImageConfig, chunk: int, mesh: Mesh | None = None
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Summed cross-entropy and number of targets of each kind of record: float32 scalars.

    rows: of data/packing.py. images: how images are normalised. chunk: positions of every row
    whose logits, float32[B, chunk, V], are there at a time. mesh: the devices that rows lie on.
    Returns e.g. dict(understanding=(sum, count), text=..., generation=...).
    """
    decoder = model.language_model
    indices = generated_indices(model, rows["generated"])
    embeds = embed_rows(model, rows, indices, images)
    mask = segment_mask(rows["segment_ids"])
    # what the decoder takes and gives lies by rows, or XLA might lay it by the parameters' axes
    hidden, _ = decoder(constrain_rows(embeds, mesh), rows["positions"], mask)
    hidden = constrain_rows(hidden, mesh)
    # a position predicts the token after it; the first of an example is never to be predicted
    text, generated = (_next(rows[name]) for name in ("loss_mask", "gen_mask"))
    losses = cross_entropies(decoder.logits, hidden, _next(rows["tokens"]), text, chunk)
    if indices.shape[1]:
        order = jnp.clip(jnp.cumsum(rows["gen_mask"], axis=1) - 1, 0, indices.shape[1] - 1)
        image_targets = _next(jnp.take_along_axis(indices, order, axis=1))
        losses += cross_entropies(model.gen_head, hidden, image_targets, generated, chunk)
    found, kinds = {}, _next(rows["kind"])
    for number, kind in enumerate(KINDS):
        own = (kinds == number) & (text | generated)
        found[kind] = jnp.sum(jnp.where(own, losses, 0.0)), jnp.sum(own, dtype=jnp.float32)
    return found


def embed_rows(model: Janus, rows: Rows, indices: jax.Array, images: ImageConfig) -> jax.Array:
    """The decoder's input, float[B, T, D]. indices: int32[B, m * N] of the generated images."""
    embeds = model.language_model.embed(rows["tokens"])
    pixels = rows["pixels"]
    if pixels.shape[1]:
        scaled = normalise(pixels.reshape(-1, *pixels.shape[2:]), images)
        features = model.encode_images(scaled)
        features = features.reshape(len(embeds), -1, features.shape[-1])
        embeds = merge_features(embeds, rows["image_mask"], features)
    if indices.shape[1]:
        generated = model.embed_image_tokens(indices)
        embeds = merge_features(embeds, rows["gen_mask"], generated)
    return embeds


def generated_indices(model: Janus, generated: jax.Array) -> jax.Array:
    """uint8[B, m, S, S, 3] or int32[B, m, N] -> int32[B, m * N], without a gradient."""
    if not generated.shape[1]:
        return jnp.zeros((len(generated), 0), jnp.int32)
    if generated.ndim == 3:
        return generated.reshape(len(generated), -1)
    pixels = generated.reshape(-1, *generated.shape[2:]).astype(jnp.float32) / 127.5 - 1
    # as data/tokenize_images.py: products of less precision choose other codes now and then
    with jax.default_matmul_precision("highest"):
        indices = model.gen_vq.encode(pixels)
    return jax.lax.stop_gradient(indices).reshape(len(generated), -1)


def normalise(pixels: jax.Array, images: ImageConfig) -> jax.Array:
    """uint8[..., 3] -> float32, as processing.images.preprocess."""
    scaled = pixels.astype(jnp.float32) * images.rescale_factor
    if not images.do_normalize:
        return scaled
    channels = functools.partial(jnp.array, dtype=jnp.float32, ndmin=scaled.ndim)
    mean, std = channels(images.image_mean), channels(images.image_std)
    return (scaled - mean) / std


def cross_entropies(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    targets: jax.Array,
    wanted: jax.Array,
    chunk: int,
) -> jax.Array:
    """Cross-entropy where it is wanted and 0 elsewhere, float32[B, T].

    head: float[B, C, D] -> float32[B, C, V]. hidden: float[B, T, D]; targets: int32[B, T];
    wanted: bool[B, T].
    The wanted positions of each row are gathered in front and the head goes over `chunk` of them at
    a time, so that logits float32[B, T, V] never exist, forwards or backwards, and chunks without
    any target are passed over.
    """
    length = targets.shape[1]
    chunk = min(chunk, length)
    order = jnp.argsort(~wanted, axis=1, stable=True)
    padded = jnp.pad(order, ((0, 0), (0, -length % chunk)), mode="edge")
    places = jnp.arange(padded.shape[1])[None] < length
    parts = (
        jnp.take_along_axis(hidden, padded[..., None], axis=1),
        jnp.take_along_axis(targets, padded, axis=1),
        jnp.take_along_axis(wanted, padded, axis=1) & places,
    )
    parts = jax.tree.map(lambda part: _chunks(part, chunk), parts)

    @jax.checkpoint
    def one(hidden, targets, wanted):
        def compute():
            logits = head(hidden)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return jnp.where(wanted, losses, 0.0)

        none = functools.partial(jnp.zeros, wanted.shape, jnp.float32)
        return jax.lax.cond(jnp.any(wanted), compute, none)

    _, losses = jax.lax.scan(lambda _, part: (None, one(*part)), None, parts)
    losses = jnp.moveaxis(losses, 0, 1).reshape(len(targets), -1)[:, :length]
    return jnp.zeros_like(losses).at[jnp.arange(len(targets))[:, None], order].set(losses)


def _chunks(part: jax.Array, chunk: int) -> jax.Array:
    """[B, T, ...] -> [T / chunk, B, chunk, ...]."""
    return jnp.moveaxis(part.reshape(len(part), -1, chunk, *part.shape[2:]), 1, 0)


def _next(values: jax.Array) -> jax.Array:
    """What stands one position on; 0 after the last. [B, T] -> [B, T]."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
