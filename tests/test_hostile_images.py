"""Images that would exhaust memory or time, and other files, each raise a ValueError."""

import io
import os
import warnings

import numpy as np
import pytest
from PIL import Image
from png_files import RGB, png_file

from janus_jax.data.reading import prepare_image
from janus_jax.data.records import BadRecord
from janus_jax.paths import MAX_FILE_BYTES
from janus_jax.processing import images, rgb
from janus_jax.processing.images import load_image

PIXEL = np.zeros((1, 1, 3), int)


@pytest.fixture
def undecoded(monkeypatch):
    """Fails the test if an image is decoded."""
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
    "size", [(178_000_000, 1), (1, 178_000_000), (65_536, 2000), (1001, 1), (2, 2002)]
)
def test_sides_that_no_image_has(size, undecoded):
    rule = r"<\d+ bytes>: .*sides.*\b65535\b.*\b1000\b"
    rule += rf".*\b{size[0]} x {size[1]}\b"
    with pytest.raises(ValueError, match=rule):
        load_image(png_file(PIXEL, 8, RGB, size=size))


def test_a_decompression_bomb(undecoded):
    with pytest.raises(ValueError, match=r"\b400000000\b.*\b178956970\b"):
        load_image(png_file(PIXEL, 8, RGB, size=(20_000, 20_000)))


@pytest.mark.parametrize("size", [(1000, 1), (65_535, 66)])
def test_the_longest_sides(size):
    image = load_image(Image.new("L", size))
    assert image.size == size
    assert images.crop_square(image, 8).shape == (8, 8, 3)
    assert images.resize_and_pad(image, images.ImageConfig(image_size=16)).shape == (16, 16, 3)


def test_sides_of_arrays_and_of_images_that_the_caller_opened(undecoded):
    with pytest.raises(ValueError, match=r"sides.*\b2000 x 1\b"):
        load_image(np.zeros((1, 2000), np.uint8))
    with pytest.raises(ValueError, match=r"the image: .*sides.*\b1 x 2000\b"):
        load_image(Image.new("L", (1, 2000)))


def test_too_little_memory_is_the_fault_of_the_image(monkeypatch):
    def exhausted(image):
        raise MemoryError

    monkeypatch.setattr(rgb, "_upright", exhausted)
    file = png_file(PIXEL, 8, RGB, size=(3, 2))
    with pytest.raises(ValueError, match=r"<\d+ bytes>: .*memory.*\b3 x"):
        load_image(file)
    with pytest.raises(ValueError, match=r"the image: .*memory.*\b3 x"):
        load_image(Image.open(io.BytesIO(file)))


@pytest.mark.parametrize("error", [MemoryError(), ZeroDivisionError("of a bug"), ValueError("a")])
def test_whatever_a_record_does_is_its_own_fault(error):
    def prepare(image):
        raise error

    with pytest.raises(BadRecord) as bad:
        prepare_image(png_file(PIXEL, 8, RGB), prepare)
    assert bad.value.reason == "unreadable image"
    assert bad.value.detail in ("MemoryError", "of a bug", "a")


def test_warnings_of_large_images_that_are_errors(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="decompression bomb"):
            load_image(png_file(PIXEL, 8, RGB, size=(3, 2)))


# formats


def encoded(format: str, **settings) -> bytes:
    file = io.BytesIO()
    image = Image.new("RGB", (8, 6), (200, 100, 50))
    image.save(file, format, **settings)
    return file.getvalue()


@pytest.mark.parametrize("format", [*images.IMAGE_FORMATS, "MPO"])
def test_formats_that_are_read(format):
    settings = {"MPO": dict(save_all=True, append_images=[Image.new("RGB", (8, 6))])}
    image = load_image(encoded(format, **settings.get(format, {})))
    assert image.size == (8, 6)
    assert np.abs(np.subtract(image.getpixel((3, 3)), (200, 100, 50))).max() < 9


@pytest.mark.parametrize("format", ["EPS", "TGA", "PCX", "ICNS", "SGI", "PDF"])
def test_other_formats_are_refused(format, tmp_path):
    (tmp_path / "a").write_bytes(encoded(format))
    rule = "format.*PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF, JPEG2000 or PPM"
    for source in (tmp_path / "a", encoded(format)):
        with pytest.raises(ValueError, match=rf"(<\d+ bytes>|{tmp_path / 'a'}): .*{rule}"):
            load_image(source)


def test_no_program_is_started_for_postscript(monkeypatch, tmp_path):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript ran"))
    head = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    with pytest.raises(ValueError, match=r"format.*PNG"):
        load_image(head)


# paths


def test_paths_that_are_no_regular_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in ("/dev/zero", "/dev/null", tmp_path / "pipe.png", tmp_path / "link.png"):
        with pytest.raises(ValueError, match=f"{path} .*regular.*FIFO"):
            load_image(path)


def test_a_file_too_large_to_be_an_image(tmp_path):
    with (tmp_path / "a.webp").open("wb") as file:
        file.write(encoded("WEBP"))
        file.truncate(100 * 2**30)
    rule = rf"{file.name} .*\b{MAX_FILE_BYTES}\b.*\b{100 * 2**30}\b"
    with pytest.raises(ValueError, match=rule):
        load_image(file.name)
