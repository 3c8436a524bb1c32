"""Tests of the transparent color of PNG files of all depths, and of scaling to 8 bits."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image
from png_files import GRAY, GRAY_ALPHA, PALETTE, RGB, RGBA, chunk, png_file

from janus_jax.processing import rgb
from janus_jax.processing.images import load_image

WHITE = [255, 255, 255]


def pixels(source) -> list:
    """Returns the RGB values of the first row."""
    return np.asarray(load_image(source))[0].tolist()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def test_of_16_bit_rgb_only_equal_16_bit_colors_are_clear():
    clear = (0x1234, 0xABCD, 0x0001)
    near = [[0x1235, 0xABCD, 0x0001], [0x1234, 0xABCE, 0x0001], [0x1234, 0xABCD, 0x0000]]
    # equal in the 8 bits that Pillow keeps of the transparent color, or in those it compares
    others = [[0x12FF, 0xABFF, 0x00FF], [0x3400, 0xCD00, 0x0100]]
    file = png_file(np.array([[clear, *near, *others, clear]]), 16, RGB, clear)
    color, rest = [0x12, 0xAB, 0x00], [0x34, 0xCD, 0x01]
    expected = [WHITE, *[color] * 4, rest, WHITE]
    assert pixels(file) == expected
    assert pixels(opened(file)) == expected
    used = opened(file)
    assert pixels(used) == expected
    assert used.mode == "RGB" and used.info["transparency"] == clear  # the source is unchanged
    assert pixels(png_file(np.array([[clear]]), 16, RGB)) == [color]


def test_16_bit_rgb_that_the_caller_has_decoded_is_compared_by_its_upper_bits():
    values = np.array([[[0x1234, 0xABCD, 1], [0x3400, 0xCD00, 1]]])
    image = opened(png_file(values, 16, RGB, (0x1234, 0xABCD, 1)))
    image.load()
    assert pixels(image) == [WHITE, [0x34, 0xCD, 0]]


def test_16_bit_rgb_with_a_transparent_color_and_an_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    values = np.array([[[256, 0, 0], [512, 0, 0]], [[257, 0, 0], [768, 0, 0]]])
    more = chunk(b"eXIf", exif.tobytes()[6:])
    image = load_image(png_file(values, 16, RGB, (256, 0, 0), more=more))
    assert np.asarray(image)[..., 0].tolist() == [[1, 255], [3, 2]]


def test_interlaced_16_bit_rgb_with_a_transparent_color():
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, 3))
    file = png_file(values, 16, RGB, tuple(values[3, 7].tolist()), interlaced=True)
    expected = values >> 8
    expected[3, 7] = 255
    np.testing.assert_array_equal(np.asarray(load_image(file)), expected)


@pytest.mark.parametrize(
    ("bits", "color", "values", "clear", "expected"),
    [
        (1, GRAY, [[0, 1]], (1,), [0, 255]),
        (1, GRAY, [[0, 1]], (0,), [255, 255]),
        (2, GRAY, [[0, 1, 2, 3]], (2,), [0, 85, 255, 255]),
        (2, GRAY, [[0, 1, 2, 3]], (0,), [255, 85, 170, 255]),
        (4, GRAY, [[3, 9, 15, 0]], (9,), [51, 255, 255, 0]),
        (4, GRAY, [[3, 9, 15, 0]], (0x1009,), [51, 255, 255, 0]),  # higher bits are ignored
        (8, GRAY, [[3, 9, 153]], (9,), [3, 255, 153]),
        (16, GRAY, [[1000, 1001, 65535]], (1000,), [255, 4, 255]),
        (8, RGB, [[[1, 2, 3], [1, 2, 4]]], (1, 2, 3), [255, 1]),
        (16, GRAY_ALPHA, [[[0x8000, 0], [0x8000, 65535]]], None, [255, 128]),
        (16, RGBA, [[[0x80FF, 0, 0, 0], [0x80FF, 0, 0, 65535]]], None, [255, 128]),
    ],
)
def test_the_transparent_color_of_other_kinds(bits, color, values, clear, expected):
    file = png_file(np.array(values), bits, color, clear)
    assert [pixel[0] for pixel in pixels(file)] == expected
    assert [pixel[0] for pixel in pixels(opened(file))] == expected


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_palette_with_alpha(bits):
    more = chunk(b"PLTE", bytes([10, 20, 30, 40, 50, 60])) + chunk(b"tRNS", b"\xff\x00")
    assert pixels(png_file(np.array([[0, 1, 0]]), bits, PALETTE, more=more)) == [
        [10, 20, 30], WHITE, [10, 20, 30]
    ]  # fmt: skip


def images_of_all_kinds() -> dict[str, Image.Image]:
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (23, 17), np.uint16)
    clear = Image.fromarray(deep)
    clear.info["transparency"] = int(deep[5, 5])
    palette = Image.fromarray(rng.integers(0, 256, (23, 17, 3), np.uint8)).quantize(8)
    palette.info["transparency"] = 3
    return {
        "I;16": Image.fromarray(deep),
        "I;16 with a clear gray": clear,
        "I;16B": Image.frombytes("I;16B", (17, 23), deep.astype(">u2").tobytes()),
        "I": Image.fromarray(rng.integers(-9, 70000, (23, 17), np.int32)),
        "F": Image.fromarray(rng.normal(100, 50, (23, 17)).astype(np.float32)),
        "F with NaN": Image.fromarray(np.where(deep < 3000, np.nan, deep).astype(np.float32)),
        "RGBA": Image.fromarray(rng.integers(0, 256, (23, 17, 4), np.uint8)),
        "P": palette,
    }


@pytest.mark.parametrize("kind", images_of_all_kinds())
def test_bands_are_as_the_whole(kind, monkeypatch):
    image = images_of_all_kinds()[kind]
    whole = np.asarray(load_image(image))
    monkeypatch.setattr(rgb, "_BAND", 40)  # two rows
    np.testing.assert_array_equal(np.asarray(load_image(image)), whole)
    if image.mode in ("I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float64))
        white = next(w for w in (255, 65535, 2**31 - 1) if values.max() <= w)
        expected = np.clip(np.rint(values / white * 255), 0, 255)
        np.testing.assert_array_equal(whole[..., 1], expected)


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_deep_images_take_little_memory(kind):
    image = Image.fromarray(np.ones((2000, 1500), kind))
    tracemalloc.start()
    try:
        load_image(image)
        assert tracemalloc.get_traced_memory()[1] < 2e7  # 24 MB as float64
    finally:
        tracemalloc.stop()
