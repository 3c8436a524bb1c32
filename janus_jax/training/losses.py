"""Losses of the tokenizer and of the two paths through the decoder.

B batch, P prompt length, T sequence length, N image tokens.
"""

import jax
import jax.numpy as jnp
import optax

from janus_jax.models.attention import causal_mask, positions_from_mask
from janus_jax.models.janus import Janus, merge_features
from janus_jax.models.vq import VQ, l2_normalise

COMMITMENT = 0.25  # as in VQ-VAE, VQGAN and the reference's quantizer


def vq_loss(
    vq: VQ, pixels: jax.Array, patch_groups: jax.Array, quantise: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Reconstruction (L1 + L2), codebook, commitment and locality loss; straight-through gradient.

    pixels: float32[B, Y, X, 3] in [-1, 1]; patch_groups: int32[B * y * x], the same number for
    patches of the same pixels; quantise: bool scalar, False decodes the latents as they are.
    Returns the loss and a dict with its parts, `latents` (unit vectors, float32[B * y * x, C])
    and `indices` (int32[B * y * x]).

    Locality is the part of the latents' variance that lies within patches of the same pixels.
    The encoder sees the whole picture; left alone it writes news of far objects into the tokens of
    plain background, at random for a decoder that has to guess them one by one.
    """
    z = l2_normalise(vq.latents(pixels))
    indices = vq.nearest(z)
    codes = vq.lookup(indices)
    straight_through = z + jax.lax.stop_gradient(codes - z)
    reconstruction = vq.pixels(jnp.where(quantise, straight_through, z))
    l1 = jnp.mean(jnp.abs(reconstruction - pixels))
    l2 = jnp.mean((reconstruction - pixels) ** 2)
    codebook = jnp.mean(jnp.sum((jax.lax.stop_gradient(z) - codes) ** 2, axis=-1))
    commitment = jnp.mean(jnp.sum((z - jax.lax.stop_gradient(codes)) ** 2, axis=-1))
    latents = z.reshape(-1, z.shape[-1])
    total = jnp.mean(jnp.sum((latents - jnp.mean(latents, axis=0)) ** 2, axis=-1))
    locality = variance_within(latents, patch_groups) / (total + 1e-6)
    aux = dict(
        l1=l1,
        l2=l2,
        commitment=commitment,
        locality=locality,
        latents=latents,
        indices=indices.reshape(-1),
    )
    return l1 + l2 + locality + quantise * (codebook + COMMITMENT * commitment), aux


def variance_within(vectors: jax.Array, groups: jax.Array) -> jax.Array:
    """Mean squared distance of vectors to the mean of their group, float32 scalar.

    vectors: float32[n, C]; groups: int32[n], each below n.
    """
    sums = jax.ops.segment_sum(vectors, groups, len(groups))
    counts = jax.ops.segment_sum(jnp.ones(len(groups)), groups, len(groups))
    means = (sums / jnp.maximum(counts, 1)[:, None])[groups]
    return jnp.mean(jnp.sum((vectors - means) ** 2, axis=-1))


def generation_loss(
    model: Janus, tokens: jax.Array, token_mask: jax.Array, indices: jax.Array
) -> jax.Array:
    """Mean cross-entropy of the image tokens, through the image head.

    tokens: int32[B, P], left-padded prompts that end in begin-of-image; token_mask: bool[B, P];
    indices: int32[B, N].
    """
    prompt = model.language_model.embed(tokens)
    embeds = jnp.concatenate([prompt, model.embed_image_tokens(indices[:, :-1])], axis=1)
    drawn = embeds.shape[1] - tokens.shape[1]
    mask = jnp.pad(token_mask, ((0, 0), (0, drawn)), constant_values=True)
    hidden, _ = model.language_model(embeds, positions_from_mask(mask), causal_mask(mask))
    logits = model.gen_head(hidden[:, tokens.shape[1] - 1 :])
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, indices))


def understanding_loss(model: Janus, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean cross-entropy of the answers' tokens, through the text head.

    batch: tokens int32[B, T] left-padded, token_mask, image_mask and loss_mask bool[B, T]
    (loss_mask marks the tokens to be predicted), pixels float32[B, 1, Y, X, 3] normalised.
    """
    features = model.encode_images(batch["pixels"][:, 0])
    embeds = model.language_model.embed(batch["tokens"])
    embeds = merge_features(embeds, batch["image_mask"], features)
    mask = batch["token_mask"]
    hidden, _ = model.language_model(embeds, positions_from_mask(mask), causal_mask(mask))
    logits = model.language_model.logits(hidden[:, :-1])
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["tokens"][:, 1:])
    wanted = batch["loss_mask"][:, 1:]
    return jnp.sum(loss * wanted) / jnp.maximum(jnp.sum(wanted), 1)
