"""Reads an image of coloured shapes and judges it against a requirement, from pixels alone.

It shares no code and no numbers with the drawing in `scenes.py`, which only states what a prompt
asks for in the words of this file, `Item` and `Requirement`: foreground is what differs from
the image's own border, colours are told apart by hue angle, shapes by overlap with masks built
from each blob's measured area and centroid. Judgement is strict, as in GenEval: every counted
object must be there, nothing else may be, and a relation must hold clearly.
"""

import dataclasses

import numpy as np

BORDER = 2  # pixels at the rim that tell the background
FOREGROUND_DISTANCE = 80.0  # RGB distance from the background, about half of a full object's
MIN_AREA = 60  # pixels; smaller blobs are specks of a reconstruction, not objects
MIN_CHROMA = 50.0  # max - min of the RGB channels below which a blob has no named colour
MIN_SAME_HUE = 0.7  # part of a blob's core that must agree on its colour
MIN_OVERLAP = 0.7  # intersection over union with the best shape mask
RELATION_MARGIN = 16.0  # pixels between centres along the stated axis

# Hue angles in degrees: the middle of what people call by these names.
HUES = {"red": 0.0, "orange": 30.0, "yellow": 54.0, "green": 130.0, "blue": 225.0, "purple": 285.0}
# Part of the bounding square that the shape fills, and how far below the square's middle its
# centroid lies (parts of the side).
FILL = {"circle": np.pi / 4, "square": 1.0, "triangle": 0.5, "cross": 5 / 9}
DROP = {"circle": 0.0, "square": 0.0, "triangle": 1 / 6, "cross": 0.0}
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Item:
    """`count` objects of one shape; `color` None means any colour."""

    shape: str
    color: str | None
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Requirement:
    """What an image must show, and nothing besides.

    `relation` ("left of", "right of", "above", "below") says where items[0] is seen from items[1];
    both then have count 1.
    """

    items: tuple[Item, ...]
    relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Detection:
    """One blob: names ("unknown" where nothing fits), centre of its bounding square and area in
    pixels, x to the right and y downwards."""

    shape: str
    color: str
    x: float
    y: float
    area: int


def background(image: np.ndarray) -> str:
    """Background name of uint8[Y, X, 3]: "white", "black", or "gray", which no scene has."""
    level = float(_background_rgb(image.astype(np.float32)).mean())
    if level > 230:
        return "white"
    return "gray" if level > 110 else "black"


def detect(image: np.ndarray) -> list[Detection]:
    """Objects in uint8[Y, X, 3], in reading order of their topmost pixels."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"need uint8[Y, X, 3], got {image.dtype}{list(image.shape)}")
    pixels = image.astype(np.float32)
    difference = pixels - _background_rgb(pixels)
    distance = np.sqrt(np.einsum("yxc,yxc->yx", difference, difference))
    mask = distance > FOREGROUND_DISTANCE
    interior = _interior(mask)
    blobs = [blob for blob in _components(mask) if len(blob[0]) >= MIN_AREA]
    return [_describe(pixels, interior, rows, columns) for rows, columns in blobs]


def satisfies(requirement: Requirement, detections: list[Detection]) -> bool:
    """True if the detections are exactly what is required and the relation clearly holds."""
    matches = [[d for d in detections if _matches(d, item)] for item in requirement.items]
    if [len(m) for m in matches] != [item.count for item in requirement.items]:
        return False
    if len(detections) != sum(item.count for item in requirement.items):
        return False
    if requirement.relation is None:
        return True
    return holds(requirement.relation, matches[0][0], matches[1][0])


def holds(relation: str, first: Detection, second: Detection) -> bool:
    """True if `first` is `relation` `second`: clearly so, and more than along the other axis."""
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
    """Detection of the blob at pixel coordinates int[n] `rows`, `columns`.

    Its colour is that of its interior, for the rim is blended with the background.
    """
    shape, x, y = _shape(rows, columns)
    core = interior[rows, columns]
    pick = core if core.any() else slice(None)
    return Detection(shape, _color(pixels[rows, columns][pick]), x, y, len(rows))


def _interior(mask: np.ndarray) -> np.ndarray:
    """bool[Y, X]: pixels of the mask whose four neighbours are in it too."""
    around = np.pad(mask, 1)
    return mask & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]


def _color(core: np.ndarray) -> str:
    """Colour name of float[n, 3]: the hue most pixels agree on, if enough of them do."""
    high, low = core.max(axis=1), core.min(axis=1)
    chroma = high - low
    colored = chroma >= MIN_CHROMA
    if colored.mean() < MIN_SAME_HUE:
        return UNKNOWN
    red, green, blue = core[colored].T
    chroma = chroma[colored]
    sector = core[colored].argmax(axis=1)
    turns = np.choose(sector, [(green - blue) / chroma, (blue - red) / chroma + 2,
                               (red - green) / chroma + 4])
    apart = np.abs(60.0 * turns[:, None] - np.array(list(HUES.values()))) % 360.0
    nearest = np.minimum(apart, 360.0 - apart).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(HUES))
    if votes.max() < MIN_SAME_HUE * len(core):
        return UNKNOWN
    return list(HUES)[int(votes.argmax())]


def _shape(rows: np.ndarray, columns: np.ndarray) -> tuple[str, float, float]:
    """Name and centre (x, y) of the shape whose mask overlaps the blob best.

    Each candidate's side follows from the blob's area and its place from the centroid, which blur
    moves far less than the blob's outermost pixels.
    """
    area, x, y = len(rows), columns.mean() + 0.5, rows.mean() + 0.5
    best, name, centre = MIN_OVERLAP, UNKNOWN, y
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
            best, name, centre = overlap, shape, middle
    return name, float(x), float(centre)


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """True where (u right, v down), in half sides from the middle, lies in the shape."""
    if shape == "circle":
        return u * u + v * v <= 1
    box = (np.abs(u) <= 1) & (np.abs(v) <= 1)
    if shape == "triangle":
        return box & (2 * np.abs(u) <= 1 + v)
    if shape == "cross":
        return box & (np.minimum(np.abs(u), np.abs(v)) <= 1 / 3)
    return box


def _components(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """4-connected blobs of bool[Y, X] as (rows, columns), joined run by run."""
    height, width = mask.shape
    padded = np.zeros((height, width + 2), np.int8)
    padded[:, 1:-1] = mask
    steps = np.diff(padded, axis=1)
    run_rows, starts = np.nonzero(steps == 1)
    ends = np.nonzero(steps == -1)[1]
    labels = _join_runs(run_rows.tolist(), starts.tolist(), ends.tolist())
    lengths = ends - starts
    rows, columns = np.nonzero(mask)  # row-major, so the pixels come run after run
    pixel_labels = np.repeat(labels, lengths)
    return [(rows[pick], columns[pick])
            for pick in (pixel_labels == label for label in np.unique(labels))]


def _join_runs(run_rows: list[int], starts: list[int], ends: list[int]) -> np.ndarray:
    """int[runs]: the first run of the blob that each run belongs to."""
    parent = list(range(len(run_rows)))

    def root(run: int) -> int:
        while parent[run] != run:
            run = parent[run]
        return run

    above = 0  # first run of the row above that may still touch the current run
    for run, row in enumerate(run_rows):
        while run_rows[above] < row - 1 or (run_rows[above] < row and ends[above] <= starts[run]):
            above += 1
        other = above
        while run_rows[other] == row - 1 and starts[other] < ends[run]:
            first, second = sorted((root(run), root(other)))
            parent[second] = first
            other += 1
    return np.array([root(run) for run in range(len(parent))], np.int64)
