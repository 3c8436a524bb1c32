"""Tests of numbers in processor files that underflow in float32, and of unsupported settings."""

import json
import re

import pytest

from janus_jax.generation.loading import ImageDefaults
from janus_jax.interop.files import small_files
from janus_jax.processing.processor import Processor

NAN, INF = float("nan"), float("inf")


@pytest.fixture
def refused(golden, tmp_path):
    """Sets keys in a file of the golden checkpoint; returns the error message without the path."""
    for path in small_files(golden / "janus"):
        (tmp_path / path.name).write_bytes(path.read_bytes())

    def load(name, **values):
        path = tmp_path / name
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(config | values))
        with pytest.raises(ValueError) as error:
            Processor.from_dir(tmp_path)
            ImageDefaults.from_dir(tmp_path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
        return str(error.value).replace(f"{path}: ", "").replace(f" in {path}", "")

    return load


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"image_std": [1e-300] * 3}, "image_std.*underflow.* 1e-300"),
        ({"image_std": [0.5, 0.5, 0]}, r"image_std.* 1e-06 .* 1e6.* 0\b"),
        ({"image_std": [0.5, 0.5, 1e-9]}, r"image_std.* 1e-06 .* 1e6.* 1e-09\b"),
        ({"image_std": [0.5, NAN, 0.5]}, "image_std.* nan"),
        ({"image_std": [0.5, True, 0.5]}, "image_std.* True"),
        ({"image_mean": [1e-300, 0, 0]}, "image_mean.*underflow.* 1e-300"),
        ({"image_mean": [1e300, 0, 0]}, r"image_mean.*finite.* 1e\+300\b"),
        ({"image_mean": [-1e7, 0, 0]}, r"image_mean.* -1e\+06 .* 1e6.* -1000"),
        ({"rescale_factor": 1e-300}, "rescale_factor.*underflow.* 1e-300"),
        ({"rescale_factor": 0}, r"rescale_factor.* 1e-06 .* 1e6.* 0\b"),
        ({"rescale_factor": INF}, "rescale_factor.* inf"),
        ({"rescale_factor": 10**400}, r"rescale_factor.*finite.* \d+ bits"),
        ({"min_size": 0}, r"min_size.* 0\b"),
        ({"min_size": 65}, "image_size.* min_size=65"),
        ({"image_size": True}, "image size.* True"),
        ({"image_size": 2**31}, r"image_size.* 2\*\*31.* 2147483648\b"),
        ({"image_size": {"height": 64, "width": 32}}, "image size.*square.*{"),
    ],
)  # fmt: skip
def test_image_settings(refused, values, expected):
    assert re.search(expected, refused("preprocessor_config.json", **values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 1e-300}, r"temperature.*underflow.* 1e-300\b"),
        ({"guidance_scale": -1e-40}, r"guidance_scale.*underflow.* -1e-40\b"),
        ({"guidance_scale": 1e39}, r"guidance_scale.* 1e\+39\b"),
    ],
)
def test_image_settings_of_a_checkpoint(refused, values, expected):
    assert re.search(expected, refused("generation_config.json", **values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_resize": False}, "do_resize.* true.* False"),
        ({"do_rescale": False}, "do_rescale.* true.* False"),
        ({"do_pad": False}, "do_pad.* true.* False"),
        ({"resample": 2}, r"resample.*\b3\b.* 2\b"),
    ],
)
def test_what_transformers_would_do_otherwise(refused, golden, tmp_path, values, expected):
    values |= {"image_processor_type": "JanusImageProcessor"}
    assert re.search(expected, refused("preprocessor_config.json", **values))
    # DeepSeek's class does not have these keys
    path = tmp_path / "preprocessor_config.json"
    stated = json.loads(path.read_text()) | {"image_processor_type": "VLMImageProcessor"}
    path.write_text(json.dumps(stated))
    assert Processor.from_dir(tmp_path) == Processor.from_dir(golden / "janus")


def test_patches_that_cannot_be_counted(golden, tmp_path):
    for path in small_files(golden / "janus"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "processor_config.json").unlink()
    for vision in ({"patch_size": 0}, {"params": {"patch_size": "16"}}, [], None):
        (tmp_path / "config.json").write_text(json.dumps({"vision_config": vision}))
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json.*patch_size"):
            Processor.from_dir(tmp_path)
