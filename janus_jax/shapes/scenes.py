"""Procedural scenes: colored shapes on plain backgrounds, with captions like those of GenEval.

Held-out rule, used both for captions and for the scenes themselves:
* A composition is either the (shape, color) pair of one object, or an unordered combination of two
  different pairs that occur in the same image.
* 3 of the 24 pairs (1 in 8) are held out. Pairs are sorted by SHA-256 digest, and the first three
  that share neither shape nor color are taken, so every shape and every color occurs in training.
* A combination of two remaining pairs is held out if its digest is 0 modulo 8.
* No training scene contains an object of a held-out pair or two objects of a held-out combination,
  whatever its caption says. Every relation and every count occurs in training. A held-out prompt
  names at least one held-out composition. Prompts without colors name no composition, so the kinds
  "single_object" and "two_object" have no held-out prompts.
"""

import dataclasses
import functools
import hashlib
import itertools

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (222, 32, 44),
    "orange": (250, 132, 16),
    "yellow": (250, 220, 36),
    "green": (36, 168, 68),
    "blue": (36, 84, 224),
    "purple": (156, 48, 196),
}
BACKGROUNDS = {"white": (255, 255, 255), "black": (20, 20, 20)}
RELATIONS = ("left of", "right of", "above", "below")
CAPTION_KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "held_out")
MIXED_SCENES = 0.5  # fraction of the scenes from sample_any that are not built from a caption
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}

SIZES = (24, 32)  # side of the bounding square in pixels
SNAP = 8  # spacing of object centers in pixels: fewer distinct patches make codes easier to learn
GAP = 6  # minimum distance between bounding squares in pixels
MARGIN = 2  # minimum distance to the image border in pixels
SUPERSAMPLE = 4
MAX_SLANT = 0.5  # largest offset across the axis of a relation, relative to the offset along it
HELD_OUT_ONE_IN = 8

Pair = tuple[str, str]  # (shape, color)


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape. (x, y) is the center of its bounding square of side `size`, in pixels, y down."""

    shape: str
    color: str
    size: int
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a plain background. `background` is a key of BACKGROUNDS."""

    background: str
    objects: tuple[Object, ...]


@dataclasses.dataclass(frozen=True)
class Item:
    """`count` objects of one shape and color. `color` None means any color."""

    shape: str
    color: str | None
    count: int = 1


@dataclasses.dataclass(frozen=True)
class Requirement:
    """The objects that an image must show. Other objects are not allowed.

    `relation` ("left of", "right of", "above" or "below") is the direction of items[0] from
    items[1]. If it is set, both items have count 1.
    """

    items: tuple[Item, ...]
    relation: str | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption of one of CAPTION_KINDS, with the requirement that an image of it must satisfy."""

    kind: str
    text: str
    requirement: Requirement


def draw(scene: Scene) -> np.ndarray:
    """Renders a scene as uint8[96, 96, 3] with anti-aliased edges."""
    image = np.empty((IMAGE_SIZE, IMAGE_SIZE, 3), np.float32)
    image[:] = BACKGROUNDS[scene.background]
    for item in scene.objects:
        top, left = item.y - item.size // 2, item.x - item.size // 2
        window = image[top : top + item.size, left : left + item.size]
        coverage = _sprite(item.shape, item.size)
        window += coverage * (np.asarray(COLORS[item.color], np.float32) - window)
    return (image + 0.5).astype(np.uint8)


def sample_scene(
    rng: np.random.Generator, kind: str | None, split: str = "train"
) -> tuple[Scene, Prompt]:
    """Samples a prompt of a kind, and a scene that satisfies it.

    If `kind` is None, it is sampled from the kinds that have prompts in the split. If a kind has
    prompts with colors and prompts without, both groups are sampled with equal probability,
    because there are far fewer prompts without colors.

    Raises:
        ValueError: the kind has no prompts in the split, or the kind or split is unknown.
    """
    if kind is None:
        kind = choice(rng, [k for k in CAPTION_KINDS if prompts(split, k)])
    groups = _prompt_groups(split, kind)
    if not groups:
        raise ValueError(f"expected a kind with prompts in the split, got {kind=} {split=}")
    prompt = choice(rng, choice(rng, groups))
    while True:
        pairs = _fill_colors(rng, prompt.requirement)
        if (split == "held_out") == is_held_out(pairs):
            break
    return _arrange(rng, pairs, prompt.requirement.relation), prompt


def sample_mixed(rng: np.random.Generator, split: str = "train") -> Scene:
    """Samples a scene of 1 to 4 objects without a caption."""
    _check_split(split)
    count = int(rng.integers(1, 5))
    everything = list(itertools.product(SHAPES, COLORS))
    while True:
        pairs = [choice(rng, everything) for _ in range(count)]
        if (split == "held_out") == is_held_out(pairs):
            return _arrange(rng, pairs, None)


def sample_any(rng: np.random.Generator, split: str = "train") -> Scene:
    """Samples a scene for questions: from sample_mixed or from sample_scene (see MIXED_SCENES)."""
    if rng.random() < MIXED_SCENES:
        return sample_mixed(rng, split)
    return sample_scene(rng, None, split)[0]


@functools.cache
def prompts(split: str, kind: str) -> tuple[Prompt, ...]:
    """Returns all distinct prompts of a kind in a split, in a fixed order.

    The module docstring defines the splits.
    """
    _check_split(split)
    if kind not in CAPTION_KINDS:
        raise ValueError(f"kind must be one of {CAPTION_KINDS}, got {kind!r}")
    everything = [_prompt(kind, *spec) for spec in _specs(kind)]
    return tuple(p for p in everything if (split == "held_out") == _names_held_out(p.requirement))


def is_held_out(pairs: list[Pair]) -> bool:
    """Returns True if objects of these (shape, color) pairs form a held-out composition."""
    names = sorted(set(pairs))
    if any(pair in held_out_pairs() for pair in names):
        return True
    return any(_combination_held_out(a, b) for a, b in itertools.combinations(names, 2))


@functools.cache
def held_out_pairs() -> frozenset[Pair]:
    """Returns the (shape, color) pairs that occur in no training scene."""
    everything = sorted(itertools.product(SHAPES, COLORS), key=lambda pair: _digest(*pair))
    chosen: list[Pair] = []
    for shape, color in everything:
        distinct = all(shape != s and color != c for s, c in chosen)
        if distinct and len(chosen) < len(everything) // HELD_OUT_ONE_IN:
            chosen.append((shape, color))
    return frozenset(chosen)


def noun_phrase(item: Item) -> str:
    """Returns e.g. "a circle", "an orange square" or "three crosses"."""
    name = item.shape if item.color is None else f"{item.color} {item.shape}"
    if item.count > 1:
        return f"{COUNT_WORDS[item.count]} {plural(name)}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """Returns e.g. "circles" or "red crosses"."""
    return name + ("es" if name.endswith("s") else "s")


def clear_relation(first: Object, second: Object) -> str | None:
    """Returns the direction of `first` from `second`, or None if no direction clearly dominates."""
    right, down = first.x - second.x, first.y - second.y
    if abs(down) <= MAX_SLANT * abs(right):
        return "right of" if right > 0 else "left of"
    if abs(right) <= MAX_SLANT * abs(down):
        return "below" if down > 0 else "above"
    return None


def _specs(kind: str):
    """Returns all (items, relation) tuples of a kind."""
    pairs = list(itertools.product(SHAPES, COLORS))
    bare = [(shape, None) for shape in SHAPES]
    two_bare = list(itertools.permutations(bare, 2))
    two_colored = list(itertools.permutations(pairs, 2))
    if kind == "single_object":
        return [((Item(*name),), None) for name in bare]
    if kind == "two_object":
        return [((Item(*a), Item(*b)), None) for a, b in two_bare]
    if kind == "counting":
        return [((Item(*name, n),), None) for name in bare + pairs for n in (2, 3, 4)]
    if kind == "colors":
        return [((Item(*name),), None) for name in pairs]
    if kind == "position":
        return [((Item(*a), Item(*b)), relation)
                for a, b in two_bare + two_colored for relation in RELATIONS]
    return [((Item(*a), Item(*b)), None) for a, b in two_colored]


def _prompt(kind: str, items: tuple[Item, ...], relation: str | None) -> Prompt:
    conjunction = f" {relation or 'and'} "
    return Prompt(kind, conjunction.join(map(noun_phrase, items)), Requirement(items, relation))


@functools.cache
def _prompt_groups(split: str, kind: str) -> tuple[tuple[Prompt, ...], ...]:
    """Returns the prompts without colors and those with colors, omitting empty groups."""
    named: dict[bool, list[Prompt]] = {False: [], True: []}
    for prompt in prompts(split, kind):
        named[prompt.requirement.items[0].color is not None].append(prompt)
    return tuple(tuple(group) for group in named.values() if group)


def _names_held_out(requirement: Requirement) -> bool:
    return is_held_out([(i.shape, i.color) for i in requirement.items if i.color is not None])


def _combination_held_out(first: Pair, second: Pair) -> bool:
    return _digest(*min(first, second), *max(first, second)) % HELD_OUT_ONE_IN == 0


@functools.cache
def _digest(*words: str) -> int:
    return int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:8], "big")


def _fill_colors(rng: np.random.Generator, requirement: Requirement) -> list[Pair]:
    """Returns one pair per object, in the order of the items; an item has a single color."""
    pairs = []
    for item in requirement.items:
        color = item.color or choice(rng, list(COLORS))
        pairs += [(item.shape, color)] * item.count
    return pairs


def _arrange(rng: np.random.Generator, pairs: list[Pair], relation: str | None) -> Scene:
    """Samples the background, the sizes and the positions; starts over if an object does not fit.

    Scenes of three or more objects use the smaller size only, because most attempts would fail
    otherwise.
    """
    background = choice(rng, list(BACKGROUNDS))
    sizes = SIZES if len(pairs) < 3 else SIZES[:1]
    while True:
        placed: list[Object] = []
        for shape, color in pairs:
            placed += _place(rng, placed, Object(shape, color, choice(rng, sizes), 0, 0), relation)
        if len(placed) == len(pairs):
            return Scene(background, tuple(placed))


def _place(
    rng: np.random.Generator, placed: list[Object], new: Object, relation: str | None
) -> list[Object]:
    """Returns [`new` at a random free position], or [] if there is none.

    With a relation, the second object is placed so that the first is `relation` of it.
    """
    x, y = _centers(new.size)
    free = np.ones(x.shape, bool)
    for other in placed:
        min_distance = (new.size + other.size) // 2 + GAP
        right, down = other.x - x, other.y - y
        free &= (np.abs(right) >= min_distance) | (np.abs(down) >= min_distance)
        if relation is not None:
            along, across = (right, down) if relation in ("left of", "right of") else (down, right)
            sign = 1 if relation in ("right of", "below") else -1
            free &= np.abs(across) <= MAX_SLANT * sign * along
    candidates = np.flatnonzero(free)
    if not len(candidates):
        return []
    index = candidates[rng.integers(len(candidates))]
    return [dataclasses.replace(new, x=int(x[index]), y=int(y[index]))]


@functools.cache
def _centers(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns x and y, int[n] each, of all grid positions where an object respects MARGIN."""
    reach = size // 2 + MARGIN
    line = np.arange(-(-reach // SNAP) * SNAP, IMAGE_SIZE - reach + 1, SNAP)
    x, y = np.meshgrid(line, line)
    return x.ravel(), y.ravel()


@functools.cache
def _sprite(shape: str, size: int) -> np.ndarray:
    """Returns the coverage, float32[size, size, 1], of a shape that fills its bounding square."""
    side = size * SUPERSAMPLE
    mask = Image.new("L", (side, side), 0)
    pen, last = ImageDraw.Draw(mask), side - 1
    low, high = round(side / 3), side - round(side / 3) - 1
    if shape == "circle":
        pen.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        pen.rectangle((0, 0, last, last), fill=255)
    elif shape == "triangle":
        pen.polygon(((last / 2, 0), (last, last), (0, last)), fill=255)
    else:
        pen.rectangle((low, 0, high, last), fill=255)
        pen.rectangle((0, low, last, high), fill=255)
    small = mask.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, np.float32)[..., None] / 255


def choice(rng: np.random.Generator, options):
    """Returns a random element of a sequence. rng.choice would convert tuples to arrays."""
    return options[int(rng.integers(len(options)))]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
