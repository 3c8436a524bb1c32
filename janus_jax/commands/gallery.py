"""Writes generated images as PNG files with their settings as metadata, and contact sheets."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from janus_jax.paths import atomic_write

_SHEET_SIDE = 4096  # maximum width and height of a contact sheet, in pixels
_GAP = 4  # pixels between images
_NAME_LENGTH = 40  # characters of the prompt in a file name


def file_stem(words: str, seed: int, fields: Sequence[Mapping[str, str]]) -> str:
    """Returns a file name, without suffix, of some words and the seed.

    Letters of all scripts are kept. The name ends with a digest of `fields`, the text fields of the
    images in the file, so that requests which differ only in the end of a long prompt, the model or
    the settings do not overwrite each other's files.
    """
    words = re.sub(r"[^\w]+", "-", words).strip("-").lower()[:_NAME_LENGTH].strip("-")
    digest = hashlib.blake2b(json.dumps(fields, sort_keys=True).encode(), digest_size=3).hexdigest()
    return f"{words or 'image'}-seed{seed}-{digest}"


def save_png(path: Path, pixels: np.ndarray, fields: Mapping[str, str]) -> Path:
    """Writes uint8[H, W, 3] as a PNG file with text fields (iTXt chunks); returns the path."""
    info = PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, value)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
    return path


def _cell_side(size: int, columns: int) -> int:
    return min(size, max(1, _SHEET_SIDE // columns - _GAP))


def contact_sheet(pixels: np.ndarray, columns: int) -> np.ndarray:
    """Arranges images in rows on a white sheet: uint8[N, S, S, 3] -> uint8[Y, X, 3].

    Images are scaled down if the sheet would be wider than 4096 pixels.
    """
    number, size = pixels.shape[:2]
    cell = _cell_side(size, columns)
    rows = math.ceil(number / columns)
    height, width = (n * (cell + _GAP) + _GAP for n in (rows, columns))
    sheet = Image.new("RGB", (width, height), "white")
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        position = (_GAP + column * (cell + _GAP), _GAP + row * (cell + _GAP))
        tile = Image.fromarray(image)
        sheet.paste(tile if cell == size else tile.resize((cell, cell)), position)
    return np.asarray(sheet)


@dataclasses.dataclass
class Gallery:
    """Writes the images of some prompts as PNG files, one by one, and then contact sheets.

    Existing files of the same names, which come from an identical request, are overwritten.

    Attributes:
        folder: output directory; created with the first image.
        num_images: number of images per prompt.
        fields: function (prompt, index of the image within its prompt) -> text fields of the file.
        paths: the files written so far.
    """

    folder: Path
    prompts: Sequence[str]
    num_images: int
    seed: int
    fields: Callable[[str, int], Mapping[str, str]]
    paths: list[Path] = dataclasses.field(default_factory=list)
    _images: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, pixels: np.ndarray) -> None:
        """Writes the next images, uint8[N, S, S, 3], in the order of the prompts."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for image in pixels:
            self._add_one(image)

    def _add_one(self, image: np.ndarray) -> None:
        i, j = divmod(len(self._images), self.num_images)
        self._images.append(image)
        prompt, number = self.prompts[i], f"{i:03d}-" if len(self.prompts) > 1 else ""
        stem = file_stem(prompt, self.seed, [self.fields(prompt, 0)])
        path = self.folder / f"{number}{stem}-{j:02d}.png"
        self.paths.append(save_png(path, image, self.fields(prompt, j)))

    def save_sheets(self) -> None:
        """Writes the contact sheets: one row per prompt, or a square grid for a single prompt.

        Many prompts are split over several sheets of at most 4096 pixels in height, because image
        viewers reject images above about 180 megapixels. One sheet of 553 prompts would be larger.
        """
        prompts, num_images = self.prompts, self.num_images
        columns = num_images if len(prompts) > 1 else math.ceil(math.sqrt(num_images))
        words = "prompts" if len(prompts) > 1 else prompts[0]
        name = file_stem(words, self.seed, [self.fields(prompt, 0) for prompt in prompts])
        rows = max(1, _SHEET_SIDE // (_cell_side(len(self._images[0]), columns) + _GAP))
        starts = range(0, len(self._images), rows * columns)
        for i, start in enumerate(starts):
            images = np.stack(self._images[start : start + rows * columns])
            number = f"-{i:02d}" if len(starts) > 1 else ""
            first = start // num_images
            listed = "\n".join(prompts[first : first + math.ceil(len(images) / num_images)])
            shared = {**self.fields(prompts[first], 0), "prompt": listed}
            shared.pop("image", None)  # the index of a single image
            path = self.folder / f"{name}-sheet{number}.png"
            self.paths.append(save_png(path, contact_sheet(images, columns), shared))
