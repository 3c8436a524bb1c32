"""Trains the image tokenizer of janus_tiny on synthetic scenes."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.interop.save import save_deepseek
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.shapes import text_tokenizer
from janus_jax.shapes.batches import scene_images
from janus_jax.shapes.folders import TrainingFolders, check_counts, check_replaceable
from janus_jax.shapes.loop import generated_batches, run_steps
from janus_jax.shapes.vq_loss import make_vq_step
from janus_jax.training.step import first_state, make_optimizer, split_model


def train_vq(settings) -> None:
    """Trains `gen_vq` and writes a checkpoint folder to `output`. Other modules are unchanged.

    settings: ConfigDict of configs/janus_tiny_vq.py. `init` is the initial checkpoint folder, or
    empty to start from scratch.
    Raises FileNotFoundError or ValueError if a folder cannot be used or a setting is out of its
    range.
    """
    check_counts(settings, "batch_size", "crop_batch_size", "crop")
    optimizer = make_optimizer(settings)
    sizes, make_model, save_model = _model_functions(settings)
    patch = sizes.gen_vq.downsample
    if settings.crop % patch or settings.crop > sizes.image_size:
        limits = f"a multiple of {patch} and at most {sizes.image_size}"
        raise ValueError(f"crop must be {limits}, got {settings.crop}")
    graph, params, frozen = split_model(make_model(), "gen_vq")
    vq_step = make_vq_step(graph, frozen, optimizer, settings)

    def make_batch(rng: np.random.Generator, step: int) -> tuple[np.ndarray, np.ndarray]:
        if step >= settings.crop_steps:
            images = scene_images(rng, settings.batch_size)
        else:
            images = scene_images(rng, settings.crop_batch_size)
            images = random_crops(rng, images, settings.crop, patch)
        return images, patch_groups(images, patch)

    def step_fn(state, batch):
        train_state, usage, metrics = vq_step(*state, *batch)
        return (train_state, usage), metrics

    def save(state):
        save_model(nnx.merge(graph, state[0].params, frozen))

    # all codes of a trained image tokenizer count as used at first
    usage = jnp.full(sizes.gen_vq.codebook_size, 1.0 if settings.init else 0.0, jnp.float32)
    state = (first_state(params, optimizer), usage)
    run_steps(state, step_fn, generated_batches(make_batch, settings), settings, save)


def _model_functions(settings) -> tuple[JanusConfig, Callable[[], Janus], Callable[[Janus], None]]:
    """Returns the config of the model, a function that makes it, and one that writes it."""
    if settings.init:
        folders = TrainingFolders.from_settings(settings)
        return folders.source.cfg, folders.load, folders.save
    sizes = JanusConfig.janus_tiny()
    check_replaceable(settings.output, sizes, text_tokenizer.FILES)

    def save(model: Janus) -> None:
        save_deepseek(settings.output, model, text_tokenizer.build)

    return sizes, lambda: Janus(sizes, rngs=nnx.Rngs(settings.seed)), save


def random_crops(
    rng: np.random.Generator, images: np.ndarray, side: int, patch: int
) -> np.ndarray:
    """Returns one random square crop per image, aligned to patches of `patch` pixels.

    Early in training, convolutions learn as much from a crop as from the full image, at a lower
    cost.

    images: uint8[B, Y, X, 3]. Returns uint8[B, side, side, 3].
    """
    offsets = [(n - side) // patch + 1 for n in images.shape[1:3]]
    rows, columns = (patch * rng.integers(0, n, len(images)) for n in offsets)
    crops = [
        image[y : y + side, x : x + side]
        for image, y, x in zip(images, rows, columns, strict=True)
    ]
    return np.stack(crops)


def patch_groups(images: np.ndarray, patch: int) -> np.ndarray:
    """Assigns a group number to each patch, the same for patches with identical pixels.

    images: uint8[B, Y, X, 3]; patch: pixels a side. Returns int32[B * y * x], row-major.
    """
    b, y, x, c = images.shape
    grid = images.reshape(b, y // patch, patch, x // patch, patch, c).swapaxes(2, 3)
    rows = np.ascontiguousarray(grid).reshape(-1, patch * patch * c)
    contents = rows.view(np.dtype((np.void, rows.shape[1]))).reshape(-1)
    return np.unique(contents, return_inverse=True)[1].reshape(-1).astype(np.int32)
