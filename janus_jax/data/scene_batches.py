"""Batches of drawn scenes for the image tokenizer and the encoder: no file, no epoch.

B batch, S pixels a side.
"""

import numpy as np

from janus_jax.data import scenes

NUM_PATCH_LABELS = 1 + len(scenes.SHAPES) * len(scenes.COLORS)


def sample_scenes(rng: np.random.Generator, batch_size: int) -> list[scenes.Scene]:
    """Training scenes, with or without a caption."""
    return [scenes.sample_any(rng) for _ in range(batch_size)]


def scene_images(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    """Images of training scenes, uint8[B, S, S, 3]."""
    return np.stack([scenes.draw(scene) for scene in sample_scenes(rng, batch_size)])


def labelled_images(
    rng: np.random.Generator, batch_size: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8[B, S, S, 3] and what has its centre in each patch, int32[B, T], row-major.

    patch: pixels a side. Label 0 is nothing, the others below NUM_PATCH_LABELS a shape and color.
    """
    drawn = sample_scenes(rng, batch_size)
    grid = scenes.IMAGE_SIZE // patch
    labels = np.zeros((batch_size, grid, grid), np.int32)
    for row, scene in enumerate(drawn):
        for item in scene.objects:
            labels[row, item.y // patch, item.x // patch] = _patch_label(item)
    return np.stack([scenes.draw(scene) for scene in drawn]), labels.reshape(batch_size, -1)


def _patch_label(item: scenes.Object) -> int:
    colors = list(scenes.COLORS)
    return 1 + scenes.SHAPES.index(item.shape) * len(colors) + colors.index(item.color)
