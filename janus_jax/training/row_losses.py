"""Log-probabilities and cross-entropy of the targets of packed rows.

Each head is only applied to the positions of its targets. `row_losses` is the loss of the stages;
another loss on packed rows, such as that of preferences or rewards, starts from `target_log_probs`.

B rows, T tokens of a row, D model width, V size of the vocabulary or codebook, n input images and m
images to generate per row, S pixels a side, N tokens of a generated image.

Source: the Janus and Janus-Pro reports. The loss is the next-token cross-entropy of answers, of all
tokens of plain text, and of the tokens of generated images.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from janus_jax.data.records import KINDS
from janus_jax.models.janus import Janus, merge_features
from janus_jax.models.masked import put_masked
from janus_jax.processing.images import ImageConfig
from janus_jax.sharding import constrain_rows
from janus_jax.training.cross_entropy import cross_entropies
from janus_jax.training.row_shards import on_row_shards
from janus_jax.training.step import Rows, Terms


class TargetLogProbs(NamedTuple):
    """The log-probabilities of the targets of packed rows.

    A position predicts the next token of its example: entry [b, t] is about the token at t + 1. The
    segment id of an entry is thus that of position t. The first token of an example is no target.

    Attributes:
        log_probs: float32[B, T]; 0 where there is no target.
        text_mask: bool[B, T], True where the target is a text token.
        gen_mask: bool[B, T], True where the target is a token of an image to generate.
    """

    log_probs: jax.Array
    text_mask: jax.Array
    gen_mask: jax.Array


def row_losses(
    model: Janus, rows: Rows, images: ImageConfig, chunk: int, mesh: Mesh | None = None
) -> Terms:
    """Computes the summed cross-entropy and the number of targets of each kind of record.

    Args: as for target_log_probs.
    Returns:
        dict(understanding=(sum, count), text=..., generation=...) of float32 scalars.
    """
    log_probs, text_mask, gen_mask = target_log_probs(model, rows, images, chunk, mesh)
    losses, totals, kinds = -log_probs, {}, _shift_left(rows["kind"])
    for number, kind in enumerate(KINDS):
        mask = (kinds == number) & (text_mask | gen_mask)
        totals[kind] = jnp.sum(jnp.where(mask, losses, 0.0)), jnp.sum(mask, dtype=jnp.float32)
    return totals


def target_log_probs(
    model: Janus, rows: Rows, images: ImageConfig, chunk: int, mesh: Mesh | None = None
) -> TargetLogProbs:
    """Computes the log-probability of each target, at temperature 1 and without guidance.

    Args:
        rows: packed rows (data/packing.py), with the tokens of the images to generate.
        images: normalization of the input images.
        chunk: number of positions of a row whose logits, float32[B, chunk, V], are computed at a
            time.
        mesh: the devices that the rows are sharded over.
    """
    decoder = model.language_model
    indices = rows["generated"].reshape(len(rows["generated"]), -1)
    embeds = embed_rows(model, rows, indices, images)
    # shard input and output of the decoder by rows; XLA might shard them like the parameters
    hidden, _ = decoder(
        constrain_rows(embeds, mesh),
        positions=rows["positions"],
        segment_ids=rows["segment_ids"],
    )
    hidden = constrain_rows(hidden, mesh)

    def head_losses(path: str, *rows: jax.Array) -> jax.Array:
        function = functools.partial(cross_entropies, chunk=chunk)
        return on_row_shards(function, model, path, decoder.cfg.dtype, mesh, *rows)

    text_mask, gen_mask = (_shift_left(rows[name]) for name in ("loss_mask", "gen_mask"))
    text_targets = _shift_left(rows["tokens"])
    losses = head_losses("language_model.lm_head", hidden, text_targets, text_mask)
    if indices.shape[1]:
        image_targets = _shift_left(put_masked(indices, rows["gen_mask"]))
        losses += head_losses("gen_head", hidden, image_targets, gen_mask)
    return TargetLogProbs(-losses, text_mask, gen_mask)


def embed_rows(model: Janus, rows: Rows, indices: jax.Array, images: ImageConfig) -> jax.Array:
    """Returns the decoder input, float[B, T, D].

    indices: int32[B, m * N], the tokens of the images to generate.
    """
    embeds = model.language_model.embed(rows["tokens"])
    pixels = rows["pixels"]
    if pixels.shape[1]:
        scaled = normalize(pixels.reshape(-1, *pixels.shape[2:]), images)
        features = model.encode_images(scaled)
        features = features.reshape(len(embeds), -1, features.shape[-1])
        embeds = merge_features(embeds, rows["image_mask"], features)
    if indices.shape[1]:
        generated = model.embed_image_tokens(indices)
        embeds = merge_features(embeds, rows["gen_mask"], generated)
    return embeds


def normalize(pixels: jax.Array, images: ImageConfig) -> jax.Array:
    """Normalizes pixels as processing.images.preprocess does, uint8[..., 3] -> float32[..., 3]."""
    scaled = pixels.astype(jnp.float32) * images.rescale_factor
    if not images.do_normalize:
        return scaled
    channels = functools.partial(jnp.array, dtype=jnp.float32, ndmin=scaled.ndim)
    mean, std = channels(images.image_mean), channels(images.image_std)
    return (scaled - mean) / std


def _shift_left(values: jax.Array) -> jax.Array:
    """Returns the value of the next position, 0 for the last one. [B, T] -> [B, T]."""
    return jnp.pad(values[:, 1:], ((0, 0), (0, 1)))
