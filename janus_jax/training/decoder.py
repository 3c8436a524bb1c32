"""Trains a small Janus around a finished image tokenizer, on drawn scenes and questions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from janus_jax.data.scene_batches import decoder_batch
from janus_jax.models.janus import Janus
from janus_jax.models.vq import l2_normalise
from janus_jax.processing.processor import Processor
from janus_jax.training.folders import Start, check_counts
from janus_jax.training.loop import drawn_batches, run_steps
from janus_jax.training.losses import generation_loss, understanding_loss
from janus_jax.training.state import (
    TrainState,
    apply_gradients,
    init_state,
    make_optimizer,
    split_model,
)

TRAINED = r"(?!gen_vq\.)"  # the tokenizer stays as it is, as in all of Janus's stages


def train_decoder(cfg) -> None:
    """Trains everything but the tokenizer and writes a checkpoint folder to cfg.output.

    cfg: ConfigDict of configs/janus_tiny_decoder.py. cfg.init is a folder with a trained
    tokenizer; what else it holds is trained on.
    Raises FileNotFoundError or ValueError for a folder that cannot be used or a setting out of
    its range.
    """
    check_counts(cfg, "generation_batch_size", "understanding_batch_size")
    optimizer = make_optimizer(cfg)
    start = Start.from_config(cfg)
    model = start.load()
    if cfg.embed_codes:
        # the codes' distances are a better start than noise
        codes = l2_normalise(model.gen_vq.codebook[...])
        model.gen_embed.embedding = nnx.Param(codes * codes.shape[-1] ** 0.5)
    graph, trained, frozen = split_model(model, TRAINED)
    step_fn = make_decoder_step(graph, frozen, optimizer, cfg)
    make_batch = decoder_batch(Processor.from_dir(cfg.init), cfg)

    def save(state: TrainState) -> None:
        start.save(nnx.merge(graph, state.params, frozen), cfg.guidance_weight)

    state = init_state(trained, optimizer)
    run_steps(state, step_fn, drawn_batches(make_batch, cfg), cfg, save)


def make_decoder_step(
    graph: nnx.GraphDef, frozen: nnx.State, optimizer: optax.GradientTransformation, cfg
) -> Callable:
    """The jitted step (state, batch) -> (state, metrics).

    batch: dict(generation=..., understanding=...) of SceneBatches. The loss is the sum of the two
    paths', generation weighted by cfg.generation_weight.
    """

    def loss_fn(params: nnx.State, batch: dict):
        model: Janus = nnx.merge(graph, params, frozen)
        drawn = batch["generation"]
        pixels = drawn["images"].astype(jnp.float32) / 127.5 - 1.0
        indices = jax.lax.stop_gradient(model.gen_vq.encode(pixels))
        generation = generation_loss(model, drawn["tokens"], drawn["token_mask"], indices)
        understanding = understanding_loss(model, batch["understanding"])
        metrics = dict(generation=generation, understanding=understanding)
        return cfg.generation_weight * generation + understanding, metrics

    def step(state: TrainState, batch: dict):
        grads, metrics = jax.grad(loss_fn, has_aux=True)(state.params, batch)
        return apply_gradients(state, grads, optimizer), metrics

    return jax.jit(step, donate_argnums=0)
