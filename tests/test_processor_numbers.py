"""Tests of numbers in processor files that underflow in float32, and of unsupported settings."""

import json

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
        ({"image_std": [1e-300] * 3}, "image_std must not underflow in float32, got 1e-300"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std must be a number from 1e-06 to 1e6, got 0"),
        ({"image_std": [0.5, 0.5, 1e-9]}, "image_std must be a number from 1e-06 to 1e6, got 1e-"),
        ({"image_std": [0.5, NAN, 0.5]}, "image_std must be a finite number, got nan"),
        ({"image_std": [0.5, True, 0.5]}, "image_std must be a finite number, got True"),
        ({"image_mean": [1e-300, 0, 0]}, "image_mean must not underflow in float32, got 1e-300"),
        ({"image_mean": [1e300, 0, 0]}, "image_mean must be a finite number, got 1e+300"),
        ({"image_mean": [-1e7, 0, 0]}, "image_mean must be a number from -1e+06 to 1e6, got -1000"),
        ({"rescale_factor": 1e-300}, "rescale_factor must not underflow in float32, got 1e-300"),
        ({"rescale_factor": 0}, "rescale_factor must be a number from 1e-06 to 1e6, got 0"),
        ({"rescale_factor": INF}, "rescale_factor must be a finite number, got inf"),
        ({"rescale_factor": 10**400}, "rescale_factor must be a finite number, got an integer of"),
        ({"min_size": 0}, "min_size must be an integer of at least 1, got 0"),
        ({"min_size": 65}, "min_size must be between 1 and image_size, got min_size=65"),
        ({"image_size": True}, "the image size must be an integer, got True"),
        ({"image_size": 2**31}, "image_size must be below 2**31, got 2147483648"),
        ({"image_size": {"height": 64, "width": 32}}, "the image size must be square, got {"),
    ],
)  # fmt: skip
def test_image_settings(refused, values, expected):
    assert refused("preprocessor_config.json", **values).startswith(expected)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"temperature": 1e-300}, "temperature must not underflow in float32, got 1e-300"),
        ({"guidance_scale": -1e-40}, "guidance_scale must not underflow in float32, got -1e-40"),
        ({"guidance_scale": 1e39}, "guidance_scale must be a finite number, got 1e+39"),
    ],
)
def test_image_settings_of_a_checkpoint(refused, values, expected):
    assert refused("generation_config.json", **values) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"do_resize": False}, "do_resize must be true, got False"),
        ({"do_rescale": False}, "do_rescale must be true, got False"),
        ({"do_pad": False}, "do_pad must be true, got False"),
        ({"resample": 2}, "resample must be 3, got 2"),
    ],
)
def test_what_transformers_would_do_otherwise(refused, golden, tmp_path, values, expected):
    assert refused(
        "preprocessor_config.json", image_processor_type="JanusImageProcessor", **values
    ) == expected
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
        with pytest.raises(ValueError, match=f"{tmp_path}/config.json: patch_size must be at leas"):
            Processor.from_dir(tmp_path)
