"""Images as PNG files that say how they were made, and a contact sheet of all of them."""

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

_SHEET_SIDE = 4096  # the most pixels a contact sheet is wide
_GAP = 4
_NAME_LENGTH = 40


def file_stem(words: str, seed: int, made: Sequence[Mapping[str, str]]) -> str:
    """A file name that tells some words and the seed; other scripts than Latin are kept.

    made: text fields of what is shown. A digest of them ends the name, so that another long prompt
    that begins alike, another model or other settings replace nothing.
    """
    words = re.sub(r"[^\w]+", "-", words).strip("-").lower()[:_NAME_LENGTH].strip("-")
    digest = hashlib.blake2b(json.dumps(made, sort_keys=True).encode(), digest_size=3).hexdigest()
    return f"{words or 'image'}-seed{seed}-{digest}"


def save_png(path: Path, pixels: np.ndarray, fields: Mapping[str, str]) -> Path:
    """Writes uint8[H, W, 3] with text fields, which any PNG reader shows; returns the path."""
    info = PngInfo()
    for name, value in fields.items():
        info.add_itxt(name, value)
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", pnginfo=info)
    return path


def _cell_side(size: int, columns: int) -> int:
    return min(size, max(1, _SHEET_SIDE // columns - _GAP))


def contact_sheet(pixels: np.ndarray, columns: int) -> np.ndarray:
    """All images on one white sheet, row by row: uint8[N, S, S, 3] -> uint8[Y, X, 3].

    Images are shrunk where the sheet would be more than 4096 pixels wide.
    """
    number, size = pixels.shape[:2]
    cell = _cell_side(size, columns)
    rows = math.ceil(number / columns)
    height, width = (n * (cell + _GAP) + _GAP for n in (rows, columns))
    sheet = Image.new("RGB", (width, height), "white")
    for i, image in enumerate(pixels):
        row, column = divmod(i, columns)
        place = (_GAP + column * (cell + _GAP), _GAP + row * (cell + _GAP))
        tile = Image.fromarray(image)
        sheet.paste(tile if cell == size else tile.resize((cell, cell)), place)
    return np.asarray(sheet)


@dataclasses.dataclass
class Gallery:
    """The images of some prompts as PNG files, each written as it comes, and contact sheets.

    Files of the same names, which were made alike, are replaced.

    num_images: images of each prompt. fields: text fields of (prompt, number of the image
    within its prompt). paths: the files that are written.
    """

    folder: Path
    prompts: Sequence[str]
    num_images: int
    seed: int
    fields: Callable[[str, int], Mapping[str, str]]
    paths: list[Path] = dataclasses.field(default_factory=list)
    _shown: list[np.ndarray] = dataclasses.field(default_factory=list)

    def add(self, pixels: np.ndarray) -> None:
        """Writes the next images, uint8[N, S, S, 3], prompt after prompt."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for image in pixels:
            self._add_one(image)

    def _add_one(self, image: np.ndarray) -> None:
        i, j = divmod(len(self._shown), self.num_images)
        self._shown.append(image)
        prompt, number = self.prompts[i], f"{i:03d}-" if len(self.prompts) > 1 else ""
        stem = file_stem(prompt, self.seed, [self.fields(prompt, 0)])
        path = self.folder / f"{number}{stem}-{j:02d}.png"
        self.paths.append(save_png(path, image, self.fields(prompt, j)))

    def save_sheets(self) -> None:
        """A sheet with a row for each of several prompts, or several sheets rather than a tall one.

        Image viewers refuse images of some 180 megapixels, which 553 prompts would make.
        """
        prompts, each = self.prompts, self.num_images
        columns = each if len(prompts) > 1 else math.ceil(math.sqrt(each))
        words = "prompts" if len(prompts) > 1 else prompts[0]
        name = file_stem(words, self.seed, [self.fields(prompt, 0) for prompt in prompts])
        rows = max(1, _SHEET_SIDE // (_cell_side(len(self._shown[0]), columns) + _GAP))
        starts = range(0, len(self._shown), rows * columns)
        for i, start in enumerate(starts):
            shown = np.stack(self._shown[start : start + rows * columns])
            number = f"-{i:02d}" if len(starts) > 1 else ""
            first = start // each
            told = "\n".join(prompts[first : first + math.ceil(len(shown) / each)])
            shared = {**self.fields(prompts[first], 0), "prompt": told}
            shared.pop("image", None)  # the number of one image
            path = self.folder / f"{name}-sheet{number}.png"
            self.paths.append(save_png(path, contact_sheet(shown, columns), shared))
