"""Loss and training step of the image tokenizer. B batch."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from janus_jax.models.vq import VQ, l2_normalize
from janus_jax.processing.images import from_uint8
from janus_jax.training.step import TrainState, apply_gradients, default_promotion

COMMITMENT = 0.25  # as in VQ-VAE, VQGAN and the reference's quantizer
USAGE_DECAY = 0.99
MERGE_DISTANCE = 0.01  # squared, between unit vectors


def vq_loss(
    vq: VQ, pixels: jax.Array, patch_groups: jax.Array, quantize: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the sum of the reconstruction, codebook, commitment and locality losses.

    The reconstruction loss is L1 + L2. Gradients pass straight through the quantization.

    The locality loss is the fraction of the variance of the latents that lies within groups of
    patches with identical pixels. The encoder sees the entire image. Without this loss, it encodes
    information about distant objects in the tokens of plain background, which looks random to a
    decoder that predicts them one by one.

    Args:
        pixels: float32[B, Y, X, 3] in [-1, 1].
        patch_groups: int32[B * y * x], the same number for patches with identical pixels.
        quantize: bool scalar; False decodes the latents without quantizing them.
    Returns:
        The loss, and a dict with its terms, `latents` (unit vectors, float32[B * y * x, C]) and
        `indices` (int32[B * y * x]).
    """
    z = l2_normalize(vq.latents(pixels))
    indices = vq.nearest(z)
    codes = vq.lookup(indices)
    straight_through = z + jax.lax.stop_gradient(codes - z)
    reconstruction = vq.pixels(jnp.where(quantize, straight_through, z))
    l1 = jnp.mean(jnp.abs(reconstruction - pixels))
    l2 = jnp.mean((reconstruction - pixels) ** 2)
    codebook = jnp.mean(jnp.sum((jax.lax.stop_gradient(z) - codes) ** 2, axis=-1))
    commitment = jnp.mean(jnp.sum((z - jax.lax.stop_gradient(codes)) ** 2, axis=-1))
    latents = z.reshape(-1, z.shape[-1])
    total = jnp.mean(jnp.sum((latents - jnp.mean(latents, axis=0, keepdims=True)) ** 2, axis=-1))
    locality = variance_within(latents, patch_groups) / (total + 1e-6)
    aux = dict(
        l1=l1,
        l2=l2,
        commitment=commitment,
        locality=locality,
        latents=latents,
        indices=indices.reshape(-1),
    )
    quantized = jnp.where(quantize, codebook + COMMITMENT * commitment, 0.0)
    return l1 + l2 + locality + quantized, aux


def variance_within(vectors: jax.Array, groups: jax.Array) -> jax.Array:
    """Returns the mean squared distance of vectors to the mean of their group, float32 scalar.

    vectors: float32[n, C]; groups: int32[n], each below n.
    """
    sums = jax.ops.segment_sum(vectors, groups, len(groups))
    counts = jax.ops.segment_sum(jnp.ones_like(groups, jnp.float32), groups, len(groups))
    means = (sums / jnp.maximum(counts, 1)[:, None])[groups]
    return jnp.mean(jnp.sum((vectors - means) ** 2, axis=-1))


def reset_dead_codes(
    codebook: jax.Array, usage: jax.Array, latents: jax.Array, key: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Replaces dead and duplicate codes by latents of the batch that are far from every code.

    Dead codes are used less than `threshold`. Duplicates are within MERGE_DISTANCE of a code that
    is used more. If the threshold is negative, no code is replaced.

    Without this, a small codebook collapses to a few dozen codes. If the latents were sampled
    uniformly, all replaced codes would go to the plain background. Without merging duplicates,
    the background would be encoded by dozens of codes with the same meaning.

    Args:
        codebook: float32[G, C].
        usage: float32[G], running mean of the uses per step.
        latents: float32[n, C], unit vectors.
    Returns:
        The new codebook and usage; the usage of a replaced code is set to 1.
    """
    codes = l2_normalize(codebook)
    nearness = jnp.max(latents @ codes.T, axis=-1)
    logits = jnp.log(jnp.maximum(1 - nearness, 1e-6))
    chosen = jax.random.categorical(key, logits, shape=(codebook.shape[0],))
    close = 2 - 2 * codes @ codes.T < MERGE_DISTANCE
    rank = jnp.argsort(jnp.argsort(-usage))
    duplicate = jnp.any(close & (rank[None, :] < rank[:, None]), axis=1)
    dead = (usage < threshold) | (duplicate & (threshold > 0))
    return jnp.where(dead[:, None], latents[chosen], codebook), jnp.where(dead, 1.0, usage)


def make_vq_step(
    graph: nnx.GraphDef, frozen: nnx.State, optimizer: optax.GradientTransformation, settings
) -> Callable:
    """Returns the jitted step (state, usage, images, patch_groups) -> (state, usage, metrics).

    Args:
        settings: ConfigDict with
            seed, steps
            quantise_from: the step from which latents are quantized. Before it, the model is an
                autoencoder: codes set to the latents of an untrained encoder slow down training.
            dead_code_usage: codes with fewer uses per step are replaced, in the first three
                quarters of the steps.
    The step takes images: uint8[B, Y, X, 3], and patch_groups: int32[B * y * x], see vq_loss.
    """

    def loss_fn(params: nnx.State, pixels: jax.Array, groups: jax.Array, quantize: jax.Array):
        return vq_loss(nnx.merge(graph, params, frozen).gen_vq, pixels, groups, quantize)

    @default_promotion()
    def step(state: TrainState, usage: jax.Array, images: jax.Array, patch_groups: jax.Array):
        pixels = from_uint8(images)
        quantize = state.step >= settings.quantise_from
        grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, pixels, patch_groups, quantize)
        after = apply_gradients(state, grads, optimizer)
        indices, latents = aux.pop("indices"), aux.pop("latents")
        counts = jnp.bincount(indices, length=usage.shape[0]).astype(usage.dtype)
        usage = USAGE_DECAY * usage + (1 - USAGE_DECAY) * counts
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        threshold = jnp.where(state.step < 3 * settings.steps // 4, settings.dead_code_usage, -1.0)
        threshold = jnp.where(quantize, threshold, jnp.inf)
        codebook = after.params["gen_vq"]["codebook"]
        new_codebook, usage = reset_dead_codes(codebook[...], usage, latents, key, threshold)
        after.params["gen_vq"]["codebook"] = codebook.replace(new_codebook)
        aux["codes_used"] = jnp.sum(usage > settings.dead_code_usage)
        return after, usage, aux

    return jax.jit(step, donate_argnums=(0, 1))
