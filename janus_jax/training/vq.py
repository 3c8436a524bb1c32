"""Training step of the image tokenizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from janus_jax.models.vq import l2_normalise
from janus_jax.training.losses import vq_loss
from janus_jax.training.state import TrainState, apply_gradients

USAGE_DECAY = 0.99
MERGE_DISTANCE = 0.01  # squared, between unit vectors


def move_spare_codes(
    codebook: jax.Array, usage: jax.Array, latents: jax.Array, key: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Moves codes that can be spared onto latents of the batch that lie far from every code.

    codebook: float32[G, C]; usage: float32[G], a running mean of uses a step;
    latents: float32[n, C], unit vectors. Spared are codes used less than `threshold`, and those
    within MERGE_DISTANCE of one that is used more; none if the threshold is negative. Returns the
    new codebook and usage (a moved code starts at 1).

    Without this a small codebook collapses to a few dozen codes, with latents drawn evenly all
    the moved ones go to the plain background, and without the merging that background is written
    in dozens of codes that mean the same.
    """
    codes = l2_normalise(codebook)
    nearness = jnp.max(latents @ codes.T, axis=-1)
    logits = jnp.log(jnp.maximum(1 - nearness, 1e-6))
    chosen = jax.random.categorical(key, logits, shape=(codebook.shape[0],))
    close = 2 - 2 * codes @ codes.T < MERGE_DISTANCE
    rank = jnp.argsort(jnp.argsort(-usage))
    crowded = jnp.any(close & (rank[None, :] < rank[:, None]), axis=1)
    dead = (usage < threshold) | (crowded & (threshold > 0))
    return jnp.where(dead[:, None], latents[chosen], codebook), jnp.where(dead, 1.0, usage)


def make_vq_step(
    graph: nnx.GraphDef, frozen: nnx.State, optimizer: optax.GradientTransformation, cfg
) -> Callable:
    """The jitted step (state, usage, images, patch_groups) -> (state, usage, metrics).

    images: uint8[B, Y, X, 3]; patch_groups: int32[B * y * x], see losses.vq_loss.
    cfg: ConfigDict with seed and steps; quantise_from, the step from which latents are quantised
    (an autoencoder first: codes put on random latents of an untrained encoder hold it back);
    dead_code_usage, uses a step under which a code is moved, in the first three quarters of
    the steps.
    """

    def loss_fn(params: nnx.State, pixels: jax.Array, groups: jax.Array, quantise: jax.Array):
        return vq_loss(nnx.merge(graph, params, frozen).gen_vq, pixels, groups, quantise)

    def step(state: TrainState, usage: jax.Array, images: jax.Array, patch_groups: jax.Array):
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        quantise = state.step >= cfg.quantise_from
        grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, pixels, patch_groups, quantise)
        after = apply_gradients(state, grads, optimizer)
        indices, latents = aux.pop("indices"), aux.pop("latents")
        counts = jnp.bincount(indices, length=usage.shape[0])
        usage = USAGE_DECAY * usage + (1 - USAGE_DECAY) * counts
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        threshold = jnp.where(state.step < 3 * cfg.steps // 4, cfg.dead_code_usage, -1.0)
        threshold = jnp.where(quantise, threshold, jnp.inf)
        codebook = after.params["gen_vq"]["codebook"]
        moved, usage = move_spare_codes(codebook[...], usage, latents, key, threshold)
        after.params["gen_vq"]["codebook"] = codebook.replace(moved)
        aux["codes_used"] = jnp.sum(usage > cfg.dead_code_usage)
        return after, usage, aux

    return jax.jit(step, donate_argnums=(0, 1))
