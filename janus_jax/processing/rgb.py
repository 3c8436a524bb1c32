"""Converts any Pillow image to upright 8-bit RGB, as an image viewer shows it.

Pixels are processed in bands of rows, so that little memory is needed besides the input and the
output image.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

_BAND = 2**18  # pixels per band
_Box = tuple[int, int, int, int]

# Candidates for the value of white in integer and float images. White is the smallest that is not
# below the maximum of the image.
_FLOAT_WHITES = (1.0, 255.0, 65535.0, float(2**31 - 1))
_INT_WHITES = _FLOAT_WHITES[1:]

# Factors by which Pillow scales the gray samples of a PNG, but not its transparent value.
_GRAY_SCALES = {"L;2": 85, "L;4": 17}


def to_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, scales 16 bits to 8, and composites transparency on white."""
    image = _upright(_with_exact_transparency(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled_to_8_bit(image)
    if image.has_transparency_data:
        return _assembled("RGB", image.size, lambda box: _on_white(image.crop(box)))
    return image.convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _bands(size: tuple[int, int]) -> Iterator[_Box]:
    width, height = size
    rows = max(1, _BAND // width)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _assembled(
    mode: str, size: tuple[int, int], make: Callable[[_Box], Image.Image]
) -> Image.Image:
    """Assembles an image from bands, each of which `make` returns for its box."""
    whole = Image.new(mode, size)
    for box in _bands(size):
        whole.paste(make(box), box)
    return whole


def _scaled_to_8_bit(image: Image.Image) -> Image.Image:
    """Scales 16-bit, 32-bit and float grayscale to 8 bits; Pillow's conversion clips at 255."""
    transparent = image.info.get("transparency")  # the gray value that is transparent
    white = _white(image)

    def scaled(box: _Box) -> Image.Image:
        values = _values(image, box)
        return _gray(np.clip(np.rint(values / white * 255), 0, 255))

    def alpha(box: _Box) -> Image.Image:
        return _gray(np.where(_values(image, box) == transparent, 0, 255))

    whole = _assembled("L", image.size, scaled)
    if isinstance(transparent, int):
        whole.putalpha(_assembled("L", image.size, alpha))
    return whole


def _gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8))


def _values(image: Image.Image, box: _Box) -> np.ndarray:
    return np.nan_to_num(np.asarray(image.crop(box), np.float64))


def _white(image: Image.Image) -> float:
    if image.mode.startswith("I;16"):
        return 65535.0
    largest = max(_values(image, box).max() for box in _bands(image.size))
    whites = _FLOAT_WHITES if image.mode == "F" else _INT_WHITES
    return next((white for white in whites if largest <= white), largest)


def _with_exact_transparency(image: Image.Image) -> Image.Image:
    """Fixes the transparent color of a PNG for which Pillow compares different value ranges.

    Pillow keeps only the upper 8 bits of 16-bit RGB, and it scales 2-bit and 4-bit gray to 8 bits,
    but leaves the transparent color in the file's range. Other images are returned unchanged.
    """
    key, pixels = image.info.get("transparency"), _png_pixels(image)
    if isinstance(key, int) and pixels in _GRAY_SCALES:
        scale = _GRAY_SCALES[pixels]
        image = image.copy()
        image.info["transparency"] = key % (255 // scale + 1) * scale
    elif isinstance(key, tuple) and pixels == "RGB;16B":
        alpha = _alpha_of_16_bits(image, key)
        image = image.copy()
        del image.info["transparency"]
        image.putalpha(alpha)
    elif isinstance(key, tuple) and not pixels and max(key) > 255:
        # 16-bit RGB that is already decoded, without its lower bits
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    return image


def _png_pixels(image: Image.Image) -> str:
    """Returns Pillow's name of the pixel format of a PNG; "" if decoded, or not a PNG."""
    return image.tile[0].args if isinstance(image, PngImageFile) and image.tile else ""


def _alpha_of_16_bits(image: PngImageFile, key: tuple[int, ...]) -> Image.Image:
    """Returns alpha: 0 where all 16 bits of a pixel equal the transparent color, else 255."""
    low = _low_bytes(image)
    upper, lower = (np.array(half, np.uint8) for half in np.divmod(key, 256))

    def alpha(box: _Box) -> Image.Image:
        differs = np.asarray(image.crop(box)) != upper
        differs |= np.asarray(low.crop(box)) != lower
        return _gray(np.where(differs.any(-1), 255, 0))

    return _assembled("L", image.size, alpha)


def _low_bytes(image: PngImageFile) -> Image.Image:
    """Returns the lower 8 bits of 16-bit RGB, which Pillow drops when it decodes the image."""
    position = image.fp.tell()
    image.fp.seek(0)
    again = PngImageFile(io.BytesIO(image.fp.read()))
    image.fp.seek(position)
    # "L" (little endian) takes the second byte of each sample as the upper one; PNG is big endian,
    # so that this is the lower byte
    again.tile = [tile._replace(args="RGB;16L") for tile in again.tile]
    return again


def _upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; ignores EXIF data that cannot be read."""
    image.load()  # outside of the try block: damaged pixels must raise
    try:
        is_rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if is_rotated else image
    except MemoryError:
        raise
    except Exception:  # Pillow raises errors of many types for damaged EXIF data
        return image
