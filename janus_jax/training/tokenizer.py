"""Trains the image tokenizer of a small Janus on drawn scenes."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.data import tiny_tokenizer
from janus_jax.data.scene_batches import scene_pictures
from janus_jax.interop.save import save_deepseek
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.training.loop import drawn_batches, run_steps
from janus_jax.training.state import init_state, make_optimizer, split_model
from janus_jax.training.vq import make_vq_step


def train_tokenizer(cfg) -> None:
    """Trains `gen_vq` from scratch and writes a checkpoint folder with it to cfg.output.

    cfg: ConfigDict of configs/janus_tiny_vq.py. The other parts stay as initialised.
    """
    model = Janus(JanusConfig.janus_tiny(), rngs=nnx.Rngs(cfg.seed))
    graph, params, frozen = split_model(model, "gen_vq")
    optimizer = make_optimizer(cfg)
    vq_step = make_vq_step(graph, frozen, optimizer, cfg)

    patch = model.cfg.gen_vq.downsample

    def make_batch(rng: np.random.Generator, step: int) -> np.ndarray:
        if step >= cfg.crop_steps:
            return scene_pictures(rng, cfg.batch_size)
        return random_crops(rng, scene_pictures(rng, cfg.crop_batch_size), cfg.crop, patch)

    def step_fn(state, images):
        train_state, usage, metrics = vq_step(*state, images)
        return (train_state, usage), metrics

    def save(state):
        trained = nnx.merge(graph, state[0].params, frozen)
        save_deepseek(cfg.output, trained, tiny_tokenizer.build)

    state = (init_state(params, optimizer), jnp.zeros(model.cfg.gen_vq.codebook_size))
    state = run_steps(state, step_fn, drawn_batches(make_batch, cfg), cfg, save)
    save(jax.block_until_ready(state))


def random_crops(
    rng: np.random.Generator, images: np.ndarray, side: int, patch: int
) -> np.ndarray:
    """One square crop an image, cut between patches of `patch` pixels.

    images: uint8[B, Y, X, 3]. Returns uint8[B, side, side, 3]. Early on a crop teaches a
    convolution as much as the whole picture, for a part of the work.
    """
    places = [(n - side) // patch + 1 for n in images.shape[1:3]]
    rows, columns = (patch * rng.integers(0, n, len(images)) for n in places)
    crops = [
        image[y : y + side, x : x + side]
        for image, y, x in zip(images, rows, columns, strict=True)
    ]
    return np.stack(crops)
