"""Batches of rendered scenes for training the image tokenizer and the understanding encoder.

Scenes are generated on the fly: there are no files and no epochs. B is the batch size, S the image
side in pixels, T the number of patches.
"""

import numpy as np

from janus_jax.shapes import scenes

NUM_PATCH_LABELS = 1 + len(scenes.SHAPES) * len(scenes.COLORS)


def sample_scenes(rng: np.random.Generator, batch_size: int) -> list[scenes.Scene]:
    """Samples scenes of the training split with scenes.sample_any."""
    return [scenes.sample_any(rng) for _ in range(batch_size)]


def scene_images(rng: np.random.Generator, batch_size: int) -> np.ndarray:
    """Returns images of training scenes, uint8[B, S, S, 3]."""
    return np.stack([scenes.draw(scene) for scene in sample_scenes(rng, batch_size)])


def labeled_images(
    rng: np.random.Generator, batch_size: int, patch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns images, uint8[B, S, S, 3], and a label for each patch, int32[B, T], row-major.

    The label names the object whose center lies in the patch: 0 means no object, and each value
    from 1 to NUM_PATCH_LABELS - 1 is one combination of shape and color.

    Args:
        rng: source of randomness.
        batch_size: B.
        patch: side of a patch in pixels.
    """
    batch = sample_scenes(rng, batch_size)
    grid = scenes.IMAGE_SIZE // patch
    labels = np.zeros((batch_size, grid, grid), np.int32)
    for row, scene in enumerate(batch):
        for item in scene.objects:
            labels[row, item.y // patch, item.x // patch] = _patch_label(item)
    return np.stack([scenes.draw(scene) for scene in batch]), labels.reshape(batch_size, -1)


def _patch_label(item: scenes.Object) -> int:
    colors = list(scenes.COLORS)
    return 1 + scenes.SHAPES.index(item.shape) * len(colors) + colors.index(item.color)
