"""Reads images, and resizes and normalizes them for the understanding and generation paths.

Arrays have the channels last. `preprocess` gives the same values as DeepSeek's `VLMImageProcessor`.
"""

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from janus_jax.checks import check_count, check_float32, error_text, shorten, shorten_text
from janus_jax.paths import MAX_FILE_BYTES, bounded_size
from janus_jax.processing.rgb import to_rgb

ImageSource = str | os.PathLike | bytes | Image.Image | np.ndarray

# The file formats that are decoded. Pillow has more, some of which start other programs (EPS) or
# accept any bytes (TGA). JPEG includes MPO, and PPM includes PGM, PBM and PFM.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_SIDE = 2**16 - 1  # pixels, as in JPEG; resizing needs memory in proportion to a side
MAX_ASPECT = 1000  # long side / short side


def _from_array(array: np.ndarray) -> Image.Image:
    channels = array.shape[2:] if array.ndim == 3 else ()
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or channels not in ((), (3,), (4,)):
        raise ValueError(
            "an image array must be uint8 [H, W], [H, W, 3] or [H, W, 4], "
            f"got {array.dtype} {list(array.shape)}"
        )
    if not array.size:
        raise ValueError(f"an image must have at least one pixel, got {list(array.shape)}")
    return Image.fromarray(array)


def _check_sides(size: tuple[int, int]) -> None:
    """Raises ValueError if a side is too long or the aspect ratio too extreme."""
    if max(size) > MAX_SIDE or max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"the sides of an image must have at most {MAX_SIDE} pixels and an aspect ratio of at "
            f"most {MAX_ASPECT}, got {size[0]} x {size[1]}"
        )


def _decode(image: Image.Image) -> Image.Image:
    """Decodes an image to RGB.

    Raises ValueError for any error, because Pillow's decoders raise many types on damaged data.
    """
    try:
        _check_sides(image.size)
        return to_rgb(image)
    except MemoryError:
        width, height = image.size
        raise ValueError(f"not enough memory to decode {width} x {height} pixels") from None
    except Exception as error:
        raise ValueError(error_text(error)) from error


def _open(source: str | os.PathLike | bytes) -> Image.Image:
    from_bytes = isinstance(source, bytes)
    name = f"<{len(source)} bytes>" if from_bytes else os.fspath(source)
    if not from_bytes and (not os.path.exists(source) or os.path.isdir(source)):
        raise FileNotFoundError(f"image file not found: {shorten_text(name) or repr(name)}")
    if not from_bytes:
        bounded_size(Path(source), MAX_FILE_BYTES)
    try:
        file = io.BytesIO(source) if from_bytes else source
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            return _decode(image)
    except Image.UnidentifiedImageError:
        expected = f"expected {', '.join(IMAGE_FORMATS[:-1])} or {IMAGE_FORMATS[-1]}"
        raise ValueError(f"cannot read image {name}: unknown format, {expected}") from None
    except Exception as error:  # Image.open reads the header, which may be damaged, too
        raise ValueError(f"cannot read image {name}: {error_text(error)}") from error


def load_image(source: ImageSource) -> Image.Image:
    """Loads an image as upright 8-bit RGB.

    The EXIF orientation is applied, and transparent parts are composited on white. 16-bit grayscale
    is scaled so that 65535 becomes white. In 32-bit integer and float images white is the smallest
    of 1 (floats only), 255, 65535 and 2**31 - 1 that is not below the maximum of the image.

    Files must be in one of IMAGE_FORMATS and have at most MAX_FILE_BYTES. Pillow refuses images of
    more than twice its MAX_IMAGE_PIXELS (178 956 970 pixels).

    Args:
        source: a path, the bytes of an image file, a Pillow image, or an array
            uint8[H, W], uint8[H, W, 3] or uint8[H, W, 4] (the fourth channel is alpha).
    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is truncated, not a regular file or not an image; a side is longer than
            MAX_SIDE or the aspect ratio above MAX_ASPECT, which is checked before decoding; there
            is not enough memory; the array has another dtype or shape; or the source has another
            type.
    """
    if isinstance(source, Image.Image):
        try:
            return _decode(source)
        except ValueError as error:  # an image that is opened but not decoded may be damaged
            raise ValueError(f"cannot read the image: {error}") from error
    if isinstance(source, (str, os.PathLike, bytes)):
        return _open(source)
    array = np.asarray(source)
    if not array.ndim:
        expected = "a path, the bytes of a file, a Pillow image or an array"
        raise ValueError(f"an image must be {expected}, got {type(source).__name__}")
    return _decode(_from_array(array))


def image_list(images: Sequence[ImageSource] | ImageSource | None) -> list[ImageSource]:
    """Returns a list of images from a list, a tuple, an array [N, H, W, C], one image or None."""
    if images is None:
        return []
    is_list = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    return list(images) if is_list else [images]


def split_images(images: Sequence | None, num_conversations: int) -> list[list[ImageSource]]:
    """Returns one list of images per conversation; empty lists if `images` is None.

    Raises:
        ValueError: `images` is not a list with one item per conversation.
    """
    if images is None:
        return [[]] * num_conversations
    if not isinstance(images, (list, tuple)) or len(images) != num_conversations:
        got = len(images) if isinstance(images, (list, tuple)) else type(images).__name__
        raise ValueError(
            f"images must have one list per conversation, {num_conversations} in all, got {got}"
        )
    return [image_list(item) for item in images]


# Keys of transformers' `JanusImageProcessor` that are not implemented, with the only supported
# value. `resample` 3 is bicubic.
_FIXED = {"do_resize": True, "do_rescale": True, "do_pad": True, "resample": 3}


def _check_numbers(name: str, values: Sequence, smallest: float) -> None:
    """Raises ValueError if a value is outside [smallest, 1e6] or underflows in float32."""
    for value in values:
        check_float32(name, value)
        if not smallest <= value <= 1e6:
            got = shorten(value)
            raise ValueError(f"{name} must be a number from {smallest:g} to 1e6, got {got}")


def _check_fixed(config: dict[str, Any]) -> None:
    if config.get("image_processor_type") == "VLMImageProcessor":
        return  # DeepSeek's class has none of these keys
    for name, supported in _FIXED.items():
        if (value := config.get(name, supported)) not in (supported, None):
            raise ValueError(f"{name} must be {json.dumps(supported)}, got {shorten(value)}")


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Preprocessing of images for the understanding encoder (preprocessor_config.json).

    The defaults are those of DeepSeek's `VLMImageProcessor` (CLIP's mean and standard deviation).
    All released checkpoints set both to 0.5.
    """

    image_size: int
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    min_size: int = 14
    do_normalize: bool = True
    rescale_factor: float = 1 / 255

    def __post_init__(self):
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3:
                raise ValueError(f"{name} must be a list of three numbers, got {shorten(values)}")
        _check_numbers("image_mean", self.image_mean, -1e6)
        _check_numbers("image_std", self.image_std, 1e-6)
        _check_numbers("rescale_factor", [self.rescale_factor], 1e-6)
        if type(self.do_normalize) is not bool:
            got = shorten(self.do_normalize)
            raise ValueError(f"do_normalize must be true or false, got {got}")
        for name in ("image_size", "min_size"):
            check_count(name, getattr(self, name))
        if not 0 < self.min_size <= self.image_size:
            raise ValueError(
                "min_size must be between 1 and image_size, "
                f"got min_size={self.min_size} image_size={self.image_size}"
            )

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "ImageConfig":
        """Creates the config from the JSON of one of two image processor classes.

        These are DeepSeek's `VLMImageProcessor` and transformers' `JanusImageProcessor`.

        Raises:
            ValueError: the image size is missing or not square, or a value is not supported.
        """
        _check_fixed(config)
        size = config.get("image_size", config.get("size"))
        if isinstance(size, dict):
            if size.get("height") != size.get("width"):
                raise ValueError(f"the image size must be square, got {shorten(size)}")
            size = size.get("height")
        if type(size) is not int:
            got = shorten(size)
            raise ValueError(f"the image size must be an integer, got {got}")
        names = ("image_mean", "image_std", "min_size", "do_normalize", "rescale_factor")
        values = {name: config[name] for name in names if config.get(name) is not None}
        for name in ("image_mean", "image_std"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        return cls(image_size=size, **values)

    @property
    def pad_color(self) -> tuple[int, ...]:
        """The mean as a uint8 color. (The `background_color` of the files is unused.)"""
        return tuple(int(value * 255) for value in self.image_mean)


def resize_and_pad(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Resizes the long side to S = `image_size` and pads to a square: uint8[S, S, 3].

    The padding has the color of the mean. Resized sides are truncated to integers and at least
    `min_size`, as in the reference (`transformers` rounds them).
    """
    long_side = max(image.size)
    width, height = (
        max(int(side / long_side * config.image_size), config.min_size) for side in image.size
    )
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (config.image_size, config.image_size), config.pad_color)
    square.paste(resized, ((config.image_size - width) // 2, (config.image_size - height) // 2))
    return np.asarray(square)


def preprocess(image: Image.Image, config: ImageConfig) -> np.ndarray:
    """Prepares an RGB image for the understanding encoder: float32[S, S, 3].

    Source: `VLMImageProcessor` of the original code.
    """
    pixels = resize_and_pad(image, config)
    pixels = (pixels.astype(np.float64) * config.rescale_factor).astype(np.float32)
    if not config.do_normalize:
        return pixels
    return (pixels - np.float32(config.image_mean)) / np.float32(config.image_std)


def crop_square(image: Image.Image, size: int) -> np.ndarray:
    """Resizes the short side to `size` and crops the center: uint8[size, size, 3].

    Both happen in one bicubic resize, so that a very long image needs no more memory than a square
    one.
    Source: Janus report, section 3.1.
    """
    short_side = min(image.size)
    left, top = ((side - short_side) / 2 for side in image.size)
    box = (left, top, left + short_side, top + short_side)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=box))


def preprocess_generation(image: Image.Image, size: int) -> np.ndarray:
    """Prepares an RGB image for the image tokenizer: float32[size, size, 3] in [-1, 1]."""
    return from_uint8(crop_square(image, size))


def from_uint8(pixels):
    """Maps uint8 to float32 in [-1, 1], for NumPy's and for JAX's arrays.

    `to_uint8` in generation/codec.py maps back. It truncates, as the original code does, so some
    values become one lower.
    """
    return pixels.astype(np.float32) / 127.5 - 1.0


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes pixels, uint8[Y, X, 3], as a PNG file with fast, weak compression."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return file.getvalue()
