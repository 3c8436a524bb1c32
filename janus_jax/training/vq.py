"""Training step of the image tokenizer."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from janus_jax.models.vq import l2_normalise
from janus_jax.training.losses import vq_loss
from janus_jax.training.state import TrainState

USAGE_DECAY = 0.99


def revive_dead_codes(
    codebook: jax.Array, usage: jax.Array, latents: jax.Array, key: jax.Array, threshold: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Moves codes that are hardly used onto latents of the batch that lie far from every code.

    codebook: float32[G, C]; usage: float32[G], a running mean of uses a step;
    latents: float32[n, C], unit vectors. Returns the new codebook and usage (a moved code starts
    at 1). Without this a small codebook collapses to a few dozen codes, and with latents drawn
    evenly all the moved ones go to the plain background.
    """
    nearness = jnp.max(latents @ l2_normalise(codebook).T, axis=-1)
    logits = jnp.log(jnp.maximum(1 - nearness, 1e-6))
    chosen = jax.random.categorical(key, logits, shape=(codebook.shape[0],))
    dead = usage < threshold
    return jnp.where(dead[:, None], latents[chosen], codebook), jnp.where(dead, 1.0, usage)


def make_vq_step(
    graph: nnx.GraphDef, frozen: nnx.State, optimizer: optax.GradientTransformation, cfg
) -> Callable:
    """The jitted step (state, usage, images uint8[B, Y, X, 3]) -> (state, usage, metrics).

    cfg: ConfigDict with seed and steps; quantise_from, the step from which latents are quantised
    (an autoencoder first: codes put on random latents of an untrained encoder hold it back);
    dead_code_usage, uses a step under which a code is moved, in the first half of the steps.
    """

    def loss_fn(params: nnx.State, pixels: jax.Array, quantise: jax.Array):
        return vq_loss(nnx.merge(graph, params, frozen).gen_vq, pixels, quantise)

    def step(state: TrainState, usage: jax.Array, images: jax.Array):
        pixels = images.astype(jnp.float32) / 127.5 - 1.0
        quantise = state.step >= cfg.quantise_from
        grads, aux = jax.grad(loss_fn, has_aux=True)(state.params, pixels, quantise)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        indices, latents = aux.pop("indices"), aux.pop("latents")
        counts = jnp.bincount(indices, length=usage.shape[0])
        usage = USAGE_DECAY * usage + (1 - USAGE_DECAY) * counts
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
        threshold = jnp.where(state.step < cfg.steps // 2, cfg.dead_code_usage, -1.0)
        threshold = jnp.where(quantise, threshold, jnp.inf)
        codebook = params["gen_vq"]["codebook"]
        moved, usage = revive_dead_codes(codebook[...], usage, latents, key, threshold)
        params["gen_vq"]["codebook"] = codebook.replace(moved)
        aux["codes_used"] = jnp.sum(usage > cfg.dead_code_usage)
        return TrainState(state.step + 1, params, opt_state), usage, aux

    return jax.jit(step, donate_argnums=(0, 1))
