"""Detects colored shapes in an image and checks them against a requirement, from pixels alone.

The checker shares no code and no constants with the renderer in `scenes.py`, except the classes
`Item` and `Requirement`, which state what a prompt requires. Foreground pixels are those that
differ from the border of the image. Colors are classified by hue angle, and shapes by their overlap
with masks built from the area and centroid of each blob. The check is strict, as in GenEval: all
required objects must be present, no other object may be, and a relation must hold clearly.
"""

import dataclasses

import numpy as np
from scipy import ndimage

from janus_jax.shapes.scenes import Item, Requirement

BORDER = 2  # width in pixels of the border from which the background color is estimated
FOREGROUND_DISTANCE = 80.0  # RGB distance to the background, about half that of a full object
MIN_AREA = 60  # pixels; smaller blobs are reconstruction artifacts, not objects
MIN_CHROMA = 50.0  # max - min of the RGB channels; a pixel below it has no named color
MIN_SAME_HUE = 0.7  # fraction of a blob's interior pixels that must have the same color
MIN_OVERLAP = 0.7  # minimum intersection over union with the best shape mask
RELATION_MARGIN = 16.0  # minimum distance in pixels between centers along the relation's axis

# Hue angles in degrees: the middle of the range that people call by each name.
HUES = {"red": 0.0, "orange": 30.0, "yellow": 54.0, "green": 130.0, "blue": 225.0, "purple": 285.0}
# FILL: fraction of the bounding square that the shape covers. DROP: distance of the centroid below
# the center of the square, as a fraction of the side.
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}
DROP = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Detection:
    """One detected blob.

    `shape` and `color` are "unknown" if no name fits. (x, y) is the center of the bounding square
    in pixels, with x to the right and y down. `area` is in pixels.
    """

    shape: str
    color: str
    x: float
    y: float
    area: int


def background(image: np.ndarray) -> str:
    """Returns the background of uint8[Y, X, 3]: "white", "black" or "gray" (in no valid scene)."""
    level = float(_background_rgb(image.astype(np.float32)).mean())
    if level > 230:
        return "white"
    return "gray" if level > 110 else "black"


def detect(image: np.ndarray) -> list[Detection]:
    """Returns the objects in uint8[Y, X, 3], ordered by their first pixel in row-major order.

    Raises:
        ValueError: the image has another dtype or shape.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"expected uint8[Y, X, 3], got {image.dtype}{list(image.shape)}")
    pixels = image.astype(np.float32)
    difference = pixels - _background_rgb(pixels)
    distance = np.sqrt(np.einsum("yxc,yxc->yx", difference, difference))
    mask = distance > FOREGROUND_DISTANCE
    interior = ndimage.binary_erosion(mask)  # pixels whose four neighbors are in the mask, too
    labels, _ = ndimage.label(mask)  # 4-connected, numbered in the order of the first pixels
    areas = np.bincount(labels.ravel())  # areas[0] is that of the background
    blobs = 1 + np.flatnonzero(areas[1:] >= MIN_AREA)
    return [_describe(pixels, interior, *np.nonzero(labels == blob)) for blob in blobs]


def satisfies(requirement: Requirement, detections: list[Detection]) -> bool:
    """Returns True if the detections match the requirement exactly and the relation holds."""
    matches = [[d for d in detections if _matches(d, item)] for item in requirement.items]
    if [len(m) for m in matches] != [item.count for item in requirement.items]:
        return False
    if len(detections) != sum(item.count for item in requirement.items):
        return False
    if requirement.relation is None:
        return True
    return holds(requirement.relation, matches[0][0], matches[1][0])


def holds(relation: str, first: Detection, second: Detection) -> bool:
    """Returns True if `first` is clearly in the direction `relation` from `second`.

    The offset along the axis of the relation must be at least RELATION_MARGIN and larger than the
    offset across it.
    """
    right, down = first.x - second.x, first.y - second.y
    along = {"left of": -right, "right of": right, "above": -down, "below": down}
    if relation not in along:
        raise ValueError(f"relation must be one of {sorted(along)}, got {relation!r}")
    across = abs(down) if relation in ("left of", "right of") else abs(right)
    return along[relation] >= RELATION_MARGIN and along[relation] > across


def _matches(detection: Detection, item: Item) -> bool:
    return detection.shape == item.shape and item.color in (None, detection.color)


def _background_rgb(pixels: np.ndarray) -> np.ndarray:
    rim = [pixels[:BORDER], pixels[-BORDER:], pixels[:, :BORDER], pixels[:, -BORDER:]]
    return np.median(np.concatenate([part.reshape(-1, 3) for part in rim]), axis=0)


def _describe(
    pixels: np.ndarray, interior: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> Detection:
    """Returns the detection for the blob at pixel coordinates `rows` and `columns`, int[n] each.

    The color is taken from the interior, because edge pixels are blended with the background.
    """
    shape, x, y = _shape(rows, columns)
    inside = interior[rows, columns]
    selected = inside if inside.any() else slice(None)
    return Detection(shape, _color(pixels[rows, columns][selected]), x, y, len(rows))


def _color(rgb: np.ndarray) -> str:
    """Returns the color name of pixels float[n, 3].

    This is the most frequent hue, or "unknown" if fewer than MIN_SAME_HUE of the pixels have it.
    """
    high, low = rgb.max(axis=1), rgb.min(axis=1)
    chroma = high - low
    colored = chroma >= MIN_CHROMA
    if colored.mean() < MIN_SAME_HUE:
        return UNKNOWN
    red, green, blue = rgb[colored].T
    chroma = chroma[colored]
    sector = rgb[colored].argmax(axis=1)
    sixths = np.choose(sector, [(green - blue) / chroma, (blue - red) / chroma + 2,
                                (red - green) / chroma + 4])
    difference = np.abs(60.0 * sixths[:, None] - np.array(list(HUES.values()))) % 360.0
    nearest = np.minimum(difference, 360.0 - difference).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(HUES))
    if votes.max() < MIN_SAME_HUE * len(rgb):
        return UNKNOWN
    return list(HUES)[int(votes.argmax())]


def _shape(rows: np.ndarray, columns: np.ndarray) -> tuple[str, float, float]:
    """Returns the name and the center (x, y) of the shape whose mask overlaps the blob best.

    The side of each candidate is computed from the area of the blob and its position from the
    centroid. Blur changes these far less than it changes the outermost pixels.
    """
    area, x, y = len(rows), columns.mean() + 0.5, rows.mean() + 0.5
    best, name, center = MIN_OVERLAP, UNKNOWN, y
    for shape, fill in FILL.items():
        side = np.sqrt(area / fill)
        middle = y - DROP[shape] * side
        reach = np.arange(-np.ceil(side), np.ceil(side) + 1)
        v = 2 * (np.floor(middle) + reach + 0.5 - middle)[:, None] / side
        u = 2 * (np.floor(x) + reach + 0.5 - x)[None, :] / side
        own_u = 2 * (columns + 0.5 - x) / side
        own_v = 2 * (rows + 0.5 - middle) / side
        shared = np.count_nonzero(_inside(shape, own_u, own_v))
        overlap = shared / (area + np.count_nonzero(_inside(shape, u, v)) - shared)
        if overlap > best:
            best, name, center = overlap, shape, middle
    return name, float(x), float(center)


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Returns True where (u, v) lies in the shape.

    u points right and v down from the center, in units of half a side.
    """
    if shape == "circle":
        return u * u + v * v <= 1
    box = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    if shape == "triangle":
        return box & (2 * np.abs(u) <= 1 + v)
    if shape == "cross":
        return box & (np.minimum(np.abs(u), np.abs(v)) <= 1 / 3)
    return box
