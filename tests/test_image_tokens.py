"""The tokens that the images to generate have in training, computed before the step."""

import jax
import numpy as np
import pytest

import janus_jax
from janus_jax.sharding import batch_sharding, parse_mesh
from janus_jax.training.image_tokens import encode_generated, make_tokenize

pytestmark = pytest.mark.usefixtures("quick_compiles")


@pytest.fixture(scope="module")
def janus():
    return janus_jax.load(dtype="float32")


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
def test_each_device_computes_the_tokens_of_its_rows(janus, mesh):
    """They are those that encode_images computes for all images together."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 2, 96, 96, 3), np.uint8)
    pixels[0, 0] = 0  # a black image is an image
    gen_mask = np.zeros((4, 100), bool)
    for row, number in enumerate((2, 0, 1, 2)):  # of images
        gen_mask[row, 7 : 7 + 36 * number] = True
    want = np.array(janus.encode_images(pixels.reshape(-1, 96, 96, 3))).reshape(4, 2, 36)
    want[1], want[2, 1] = 0, 0
    mesh = parse_mesh(mesh)
    leaves, tree = jax.tree.flatten(janus.model.gen_vq)
    tokenize = make_tokenize(lambda leaves: jax.tree.unflatten(tree, leaves), mesh)
    found = tokenize(leaves, *jax.device_put((pixels, gen_mask), batch_sharding(mesh)))
    assert found.dtype == np.int32 and found.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(found, want)


def test_tokens_are_chosen_in_full_precision(janus):
    """As tokenize_images does, whatever the step's own precision."""
    pixels, gen_mask = np.zeros((1, 1, 96, 96, 3), np.uint8), np.ones((1, 36), bool)
    with jax.default_matmul_precision("bfloat16"):
        encode = jax.make_jaxpr(lambda *images: encode_generated(janus.model.gen_vq, *images))
        text = str(encode(pixels, gen_mask))
    assert "HIGHEST" in text and "BF16" not in text and "Precision.DEFAULT" not in text
