"""Tests of the training images for the image tokenizer and the encoder: content, labels, crops."""

import numpy as np

from janus_jax.shapes import checker, scenes
from janus_jax.shapes.batches import NUM_PATCH_LABELS, labeled_images, scene_images
from janus_jax.shapes.train_vq import random_crops


def test_nothing_held_out_is_shown():
    for image in scene_images(np.random.default_rng(2), 200):
        found = checker.detect(image)
        assert found and not scenes.is_held_out([(d.shape, d.color) for d in found])


def test_labels_say_what_has_its_centre_where():
    images, labels = labeled_images(np.random.default_rng(0), 200, patch=16)
    assert (images.shape, images.dtype) == ((200, 96, 96, 3), np.uint8)
    assert (labels.shape, labels.dtype) == ((200, 36), np.int32)
    assert set(labels.ravel()) == set(range(NUM_PATCH_LABELS)) - held_out_labels()
    known = [(shape, color) for shape in scenes.SHAPES for color in scenes.COLORS]
    for image, row in zip(images, labels.reshape(-1, 6, 6), strict=True):
        labelled = sorted(known[row[place] - 1] for place in zip(*np.nonzero(row), strict=True))
        assert labelled == sorted((one.shape, one.color) for one in checker.detect(image))


def held_out_labels() -> set[int]:
    known = [(shape, color) for shape in scenes.SHAPES for color in scenes.COLORS]
    return {1 + known.index(pair) for pair in scenes.held_out_pairs()}


def test_crops_lie_between_patches():
    """Each pixel encodes its position and its image."""
    y, x = np.mgrid[:96, :96]
    images = np.stack([np.stack([y, x, np.full((96, 96), i)], -1) for i in range(200)])
    crops = random_crops(np.random.default_rng(0), images.astype(np.uint8), 48, 16)
    assert crops.shape == (200, 48, 48, 3) and crops.dtype == np.uint8
    corners = crops[:, 0, 0].astype(int)
    assert {tuple(corner) for corner in corners[:, :2]} == {
        (row, column) for row in range(0, 49, 16) for column in range(0, 49, 16)
    }
    np.testing.assert_array_equal(corners[:, 2], np.arange(200))
    for crop, (row, column, i) in zip(crops, corners, strict=True):
        np.testing.assert_array_equal(crop, images[i, row : row + 48, column : column + 48])


def test_a_crop_of_the_whole_image_is_the_image():
    images = scene_images(np.random.default_rng(0), 2)
    np.testing.assert_array_equal(random_crops(np.random.default_rng(1), images, 96, 16), images)
