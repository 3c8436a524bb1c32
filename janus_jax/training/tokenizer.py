"""Trains the image tokenizer of a small Janus on drawn scenes."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.data import tiny_tokenizer
from janus_jax.data.scene_batches import scene_images
from janus_jax.interop.save import save_deepseek
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.training.folders import Start, check_counts, check_output
from janus_jax.training.loop import generated_batches, run_steps
from janus_jax.training.state import init_state, make_optimizer, split_model
from janus_jax.training.vq import make_vq_step


def train_tokenizer(cfg) -> None:
    """Trains `gen_vq` and writes a checkpoint folder with it to cfg.output.

    cfg: ConfigDict of configs/janus_tiny_vq.py. cfg.init is the folder to go on from, or empty to
    start from scratch. The other parts stay as they are.
    Raises FileNotFoundError or ValueError for a folder that cannot be used or a setting out of
    its range.
    """
    check_counts(cfg, "batch_size", "crop_batch_size", "crop")
    optimizer = make_optimizer(cfg)
    sizes, make_model, save_model = _start(cfg)
    patch = sizes.gen_vq.downsample
    if cfg.crop % patch or cfg.crop > sizes.image_size:
        limits = f"a multiple of {patch} and at most {sizes.image_size}"
        raise ValueError(f"crop must be {limits}, got {cfg.crop}")
    graph, params, frozen = split_model(make_model(), "gen_vq")
    vq_step = make_vq_step(graph, frozen, optimizer, cfg)

    def make_batch(rng: np.random.Generator, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step >= cfg.crop_steps:
            images = scene_images(rng, cfg.batch_size)
        else:
            images = scene_images(rng, cfg.crop_batch_size)
            images = random_crops(rng, images, cfg.crop, patch)
        return images, patch_groups(images, patch)

    def step_fn(state, batch):
        train_state, usage, metrics = vq_step(*state, *batch)
        return (train_state, usage), metrics

    def save(state):
        save_model(nnx.merge(graph, state[0].params, frozen))

    # codes that were trained count as used until it shows that they are not
    usage = jnp.full(sizes.gen_vq.codebook_size, 1.0 if cfg.init else 0.0, jnp.float32)
    state = (init_state(params, optimizer), usage)
    run_steps(state, step_fn, generated_batches(make_batch, cfg), cfg, save)


def _start(cfg) -> tuple[JanusConfig, Callable[[], Janus], Callable[[Janus], None]]:
    """The model's sizes, what makes it, and what writes it to cfg.output."""
    if cfg.init:
        start = Start.from_config(cfg)
        return start.source.cfg, start.load, start.save
    sizes = JanusConfig.janus_tiny()
    check_output(cfg.output, sizes, tiny_tokenizer.FILES)

    def save(model: Janus) -> None:
        save_deepseek(cfg.output, model, tiny_tokenizer.build)

    return sizes, lambda: Janus(sizes, rngs=nnx.Rngs(cfg.seed)), save


def random_crops(
    rng: np.random.Generator, images: np.ndarray, side: int, patch: int
) -> np.ndarray:
    """One square crop an image, cut between patches of `patch` pixels.

    images: uint8[B, Y, X, 3]. Returns uint8[B, side, side, 3]. Early on a crop teaches a
    convolution as much as the whole image, for a part of the work.
    """
    places = [(n - side) // patch + 1 for n in images.shape[1:3]]
    rows, columns = (patch * rng.integers(0, n, len(images)) for n in places)
    crops = [
        image[y : y + side, x : x + side]
        for image, y, x in zip(images, rows, columns, strict=True)
    ]
    return np.stack(crops)


def patch_groups(images: np.ndarray, patch: int) -> np.ndarray:
    """A number for each patch, the same for patches of the same pixels.

    images: uint8[B, Y, X, 3]; patch: pixels a side. Returns int32[B * y * x], row-major.
    """
    b, y, x, c = images.shape
    grid = images.reshape(b, y // patch, patch, x // patch, patch, c).swapaxes(2, 3)
    rows = np.ascontiguousarray(grid).reshape(-1, patch * patch * c)
    names = rows.view(np.dtype((np.void, rows.shape[1]))).reshape(-1)
    return np.unique(names, return_inverse=True)[1].reshape(-1).astype(np.int32)
