"""Tests of reading images of all kinds, and of preprocessing against the reference."""

import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from janus_jax.generation.codec import to_uint8
from janus_jax.processing import images

NAMES = ("img0_50x120", "img1_300x37", "img2_64x64", "img3_1x200")
HALF = images.ImageConfig(image_size=64, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def save(path, image, **options):
    image.save(path, **options)
    return path


def color(image, x=0, y=0):
    return image.getpixel((x, y))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ("half", "clip"))
def test_preprocess_equals_the_recorded_one(golden, name, kind):
    cfg = HALF if kind == "half" else images.ImageConfig(image_size=64)
    pixels = images.preprocess(images.load_image(golden / "preprocess" / f"{name}.png"), cfg)
    expected = np.load(golden / "preprocess.npz")[f"{name.split('_')[0]}_{kind}"]
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected.transpose(1, 2, 0))


def test_resize_to_384_equals_the_recorded_one(golden):
    image = images.load_image(golden / "preprocess" / "img1_300x37.png")
    pixels = images.resize_and_pad(image, dataclasses.replace(HALF, image_size=384))
    expected = np.load(golden / "preprocess.npz")["img1_384_u8"]
    np.testing.assert_array_equal(pixels, expected.transpose(1, 2, 0))


def test_do_normalize_false_only_rescales():
    cfg = images.ImageConfig(image_size=16, do_normalize=False)
    pixels = images.preprocess(Image.new("RGB", (16, 16), (0, 51, 255)), cfg)
    np.testing.assert_allclose(pixels[3, 5], [0, 0.2, 1], rtol=1e-6)


def test_config_of_both_layouts_is_the_same():
    common = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "min_size": 14}
    deepseek = images.ImageConfig.from_dict({**common, "image_size": 64, "do_normalize": False})
    hf = {**common, "size": {"height": 64, "width": 64}, "do_normalize": False, "resample": 3}
    assert images.ImageConfig.from_dict(hf) == deepseek
    assert deepseek == images.ImageConfig(
        image_size=64, image_mean=(0.5,) * 3, image_std=(0.5,) * 3, do_normalize=False
    )


@pytest.mark.parametrize(
    "config, text",
    [
        ({"size": {"height": 64, "width": 32}}, r"square.*\b64\b.*\b32\b"),
        ({}, "image size.*None"),
        ({"image_size": 8}, "min_size=14 image_size=8"),
        ({"image_size": 64, "min_size": "14"}, "min_size.*'14'"),
        ({"image_size": 64, "image_mean": 0.5}, r"image_mean.*\b0\.5"),
        ({"image_size": 64, "image_std": [1, 2]}, r"image_std.*\(1, 2\)"),
        ({"image_size": 64, "image_std": [1, 0, 1]}, r"image_std.*1e-06.*\b0\b"),
        ({"image_size": 64, "rescale_factor": "x"}, "rescale_factor.*'x'"),
    ],
)
def test_config_errors(config, text):
    with pytest.raises(ValueError, match=text):
        images.ImageConfig.from_dict(config)


def test_path_bytes_array_and_pillow_image_agree(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(array))
    for source in (path, str(path), path.read_bytes(), array, Image.fromarray(array)):
        image = images.load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), array)


def test_gray_array_and_alpha_array():
    grey = images.load_image(np.full((2, 3), 77, np.uint8))
    assert grey.size == (3, 2) and color(grey) == (77, 77, 77)
    clear = np.zeros((2, 2, 4), np.uint8)
    assert color(images.load_image(clear)) == (255, 255, 255)


@pytest.mark.parametrize("mode, value", [("RGBA", (255, 0, 0)), ("LA", (0,))])
def test_transparency_is_laid_on_white(tmp_path, mode, value):
    image = Image.new(mode, (3, 1), (*value, 0))
    image.putpixel((1, 0), (*value, 255))
    image.putpixel((2, 0), (*value, 51))
    got = images.load_image(save(tmp_path / "a.png", image))
    solid = value * 3 if mode == "LA" else value
    assert color(got, 0) == (255, 255, 255)
    assert color(got, 1) == solid
    np.testing.assert_allclose(color(got, 2), 255 * 0.8 + 0.2 * np.array(solid), atol=1)


def test_palette_with_and_without_transparency(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    plain = images.load_image(save(tmp_path / "plain.png", image))
    assert (color(plain, 0), color(plain, 1)) == ((10, 20, 30), (200, 100, 50))
    for name in ("clear.png", "clear.gif"):
        clear = images.load_image(save(tmp_path / name, image, transparency=0))
        assert (color(clear, 0), color(clear, 1)) == ((255, 255, 255), (200, 100, 50))


def test_palette_with_alpha_channel():
    image = Image.new("P", (1, 1))
    image.putpalette([10, 20, 30])
    image = image.convert("PA")
    assert color(images.load_image(image)) == (10, 20, 30)
    image.putalpha(0)
    assert color(images.load_image(image)) == (255, 255, 255)


def test_colour_key_of_an_rgb_png(tmp_path):
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    got = images.load_image(save(tmp_path / "a.png", image, transparency=(1, 2, 3)))
    assert (color(got, 0), color(got, 1)) == ((255, 255, 255), (9, 9, 9))


def test_colour_key_of_a_16_bit_png(tmp_path):
    image = Image.fromarray(np.array([[1000, 32896]], np.uint16))
    got = images.load_image(save(tmp_path / "a.png", image, transparency=1000))
    assert (color(got, 0), color(got, 1)) == ((255, 255, 255), (128, 128, 128))


@pytest.mark.parametrize("suffix", ["png", "webp", "jpg"])
def test_exif_that_nobody_can_read_does_not_cost_the_image(tmp_path, suffix):
    image = Image.new("RGB", (16, 8), (0, 128, 0))
    got = images.load_image(save(tmp_path / f"a.{suffix}", image, exif=b"Exif\0\0garbage of some"))
    assert got.size == (16, 8) and np.abs(np.subtract(color(got), (0, 128, 0))).max() <= 2


@pytest.mark.parametrize("mode, value, expected", [("L", 90, 90), ("1", 1, 255), ("1", 0, 0)])
def test_grayscale(tmp_path, mode, value, expected):
    got = images.load_image(save(tmp_path / "a.png", Image.new(mode, (2, 2), value)))
    assert color(got) == (expected,) * 3


@pytest.mark.parametrize("suffix", ("png", "tif"))
def test_16_bit_grayscale_is_scaled_not_clipped(tmp_path, suffix):
    image = Image.fromarray(np.array([[0, 257, 32896, 65535]], np.uint16))
    got = images.load_image(save(tmp_path / f"a.{suffix}", image))
    assert np.asarray(got)[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize(
    "values, expected",
    [
        (np.array([[0, 200]], np.int32), [0, 200]),
        (np.array([[257, 65535]], np.int32), [1, 255]),
        (np.array([[0, 2**31 - 1]], np.int32), [0, 255]),
        (np.array([[-0.5, 0.2, 1.0]], np.float32), [0, 51, 255]),
        (np.array([[0.0, 100.0]], np.float32), [0, 100]),
        (np.array([[0.0, 65535.0]], np.float32), [0, 255]),
        (np.array([[0.0, np.nan, 1.0]], np.float32), [0, 0, 255]),
    ],
)
def test_integer_and_float_images_are_scaled_to_what_holds_them(tmp_path, values, expected):
    got = images.load_image(save(tmp_path / "a.tif", Image.fromarray(values)))
    assert np.asarray(got)[0, :, 0].tolist() == expected


def test_cmyk(tmp_path):
    # No cyan, full magenta and yellow: red.
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    np.testing.assert_allclose(
        color(images.load_image(save(tmp_path / "a.jpg", image, quality=100))), (255, 0, 0), atol=3
    )


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers must rotate the image by 90 degrees clockwise
    got = images.load_image(save(tmp_path / "a.png", image, exif=exif))
    assert got.size == (2, 4)
    assert color(got, 1, 0) == (255, 255, 255)
    assert images.load_image(got).size == (2, 4)


def test_an_image_of_too_many_pixels(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)  # Pillow raises beyond twice that
    Image.new("RGB", (10, 10), "red").save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"\b80 pixels"):
        images.load_image(tmp_path / "a.png")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"image file.*nowhere.png"):
        images.load_image(tmp_path / "nowhere.png")


def test_a_folder_is_no_image_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"image file.*{tmp_path}"):
        images.load_image(tmp_path)


def test_a_broken_image_opened_by_the_caller(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(noise))
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the image: .*truncated"):
        images.load_image(Image.open(path))


def test_unreadable_files_give_one_line_with_their_name(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "png")
    whole = stream.getvalue()
    contents = {"cut.png": whole[:5000], "head.png": whole[:40], "a.jpg": b"hello", "0.png": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    for name in contents:
        with pytest.raises(ValueError) as error:
            images.load_image(tmp_path / name)
        assert f"image {tmp_path / name}: " in str(error.value)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="<5000 bytes>: "):
        images.load_image(whole[:5000])


@pytest.mark.parametrize(
    "array, text",
    [
        (np.zeros((2, 2, 3), np.float32), "float32"),
        (np.zeros((2, 2, 5), np.uint8), r"\[2, 2, 5\]"),
        (np.zeros((0, 2, 3), np.uint8), r"pixel.*\b0\b"),
    ],
)
def test_array_errors(array, text):
    with pytest.raises(ValueError, match=text):
        images.load_image(array)


@pytest.mark.parametrize("size", [(60, 30), (30, 90)])
def test_generation_target_is_resize_then_centre_crop(size):
    array = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    image = Image.fromarray(array)
    got = images.preprocess_generation(image, 20)
    scale = 20 / 30
    whole = image.resize(
        (round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC
    )
    left, top = ((side - 20) // 2 for side in whole.size)
    expected = np.asarray(whole.crop((left, top, left + 20, top + 20)), np.float32) / 127.5 - 1
    assert got.shape == (20, 20, 3) and got.dtype == np.float32
    np.testing.assert_allclose(got, expected, atol=1.01 * 2 / 255)
    assert np.mean(np.abs(got - expected)) < 1e-3


def test_generation_target_range_and_way_back():
    black_white = Image.fromarray(np.array([[0, 255]] * 2, np.uint8)).convert("RGB")
    pixels = images.preprocess_generation(black_white, 2)
    assert pixels.min() == -1 and pixels.max() == 1
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = images.load_image(every)
    back = to_uint8(images.preprocess_generation(image, 16))
    assert np.abs(back[..., 0].astype(int) - every).max() <= 1  # truncation may lose one level


def test_to_uint8_truncates_as_recorded(golden):
    recorded = np.load(golden / "janus_vq.npz")
    pixels = to_uint8(recorded["decoded"].transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(pixels, recorded["decoded_uint8"])
    levels = to_uint8(np.array([-1.5, -1, 0, 0.999, 1, 2]))
    assert levels.tolist() == [0, 0, 127, 254, 255, 255]
