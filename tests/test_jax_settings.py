"""Results do not depend on x64 or on strict promotion of dtypes and ranks, which users may set."""

import contextlib
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from stage_configs import small_config, train_stage

from janus_jax import load

pytestmark = pytest.mark.usefixtures("quick_compiles")


@contextlib.contextmanager
def other_settings():
    """What a program may have set that uses this package."""
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        yield


def train(output):
    """Metrics and weights of three steps; the last two change the weights."""
    settings = dict(trained=r"gen_head\.", steps=3, warmup_steps=1, end_learning_rate=1e-4)
    train_stage(small_config(output, ema_decay=0.5, **settings))
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    kept = [{k: v for k, v in line.items() if not k.endswith(("_s", "_left"))} for line in lines]
    return kept, load_file(output / "model" / "model.safetensors")


def test_training_is_the_same_to_the_bit(tmp_path):
    expected_metrics, expected = train(tmp_path / "default")
    with other_settings():
        metrics, weights = train(tmp_path / "other")
    assert metrics == expected_metrics
    assert weights.keys() == expected.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def ask(pipeline):
    """An image, and an answer about it."""
    image = pipeline.generate_images("a red circle", seed=3, num_images=1)
    sampling = dict(max_new_tokens=3, temperature=1.0, top_k=20, top_p=0.9, seed=3)
    return image, pipeline.answer("What is it?", [image.pixels[0]], **sampling)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images_and_answers_are_the_same(golden, dtype):
    small = load(golden / "janus_small", dtype=dtype)
    image, answer = ask(small)
    with other_settings():
        image_here, answer_here = ask(small)
    np.testing.assert_array_equal(image_here.indices, image.indices)
    np.testing.assert_array_equal(image_here.pixels, image.pixels)
    assert answer_here == answer
