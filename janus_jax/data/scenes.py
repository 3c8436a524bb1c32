"""Procedurally drawn scenes: coloured shapes on plain backgrounds, with GenEval-like captions.

Held-out rule (one place, used by captions and by the scenes themselves):
* A composition is either one object's (shape, color) pair, or an unordered combination of two
  different pairs that stand in one image.
* 3 of the 24 pairs (1 in 8) are held out: the first three in the order of their SHA-256 digests
  that share neither shape nor colour, so every shape and every colour is still trained on.
* Of the combinations of two remaining pairs, those whose digest is 0 modulo 8 are held out.
* No training scene holds an object of a held-out pair or two objects of a held-out combination,
  whatever its caption says; every relation and every count is trained on. A held-out prompt names
  at least one held-out composition. Prompts that name no colour name no composition, so the kinds
  "single_object" and "two_object" have no held-out prompts.
"""

import dataclasses
import functools
import hashlib
import itertools

import numpy as np
from PIL import Image, ImageDraw

from janus_jax.data.checker import Item, Requirement

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
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "held_out")
MIXED_SCENES = 0.5  # part of the scenes that follow no caption, where any will do
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}

SIZES = (24, 32)  # pixels, side of the bounding square
SNAP = 8  # pixels between possible centres: few variants of a patch make codes easy to learn
GAP = 6  # pixels kept free between bounding squares
MARGIN = 2  # pixels kept free at the image's rim
SUPERSAMPLE = 4
MAX_SLANT = 0.5  # offset across a stated relation, in parts of the offset along it
HELD_OUT_ONE_IN = 8

Pair = tuple[str, str]  # (shape, color)


@dataclasses.dataclass(frozen=True)
class Object:
    """One shape; (x, y) is the centre of its bounding square of `size` pixels, y downwards."""

    shape: str
    color: str
    size: int
    x: int
    y: int


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a plain background (names as in BACKGROUNDS)."""

    background: str
    objects: tuple[Object, ...]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A caption of one of KINDS with what an image of it must show."""

    kind: str
    text: str
    requirement: Requirement


def draw(scene: Scene) -> np.ndarray:
    """The scene as uint8[96, 96, 3], edges anti-aliased."""
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
    """A scene and a caption that is true of it; `kind` None draws one that the split has.

    Prompts that name colours and prompts that name none are drawn equally often where a kind has
    both, for there are far fewer of the latter.
    """
    if kind is None:
        kind = choice(rng, [k for k in KINDS if prompts(split, k)])
    groups = _prompt_groups(split, kind)
    if not groups:
        raise ValueError(f"kind must have prompts in the split, got {kind=} {split=}")
    prompt = choice(rng, choice(rng, groups))
    while True:
        pairs = _fill_colors(rng, prompt.requirement)
        if (split == "held_out") == is_held_out(pairs):
            break
    return _arrange(rng, pairs, prompt.requirement.relation), prompt


def sample_mixed(rng: np.random.Generator, split: str = "train") -> Scene:
    """A scene of 1 to 4 unrelated objects, for questions."""
    _check_split(split)
    count = int(rng.integers(1, 5))
    everything = list(itertools.product(SHAPES, COLORS))
    while True:
        pairs = [choice(rng, everything) for _ in range(count)]
        if (split == "held_out") == is_held_out(pairs):
            return _arrange(rng, pairs, None)


def sample_any(rng: np.random.Generator, split: str = "train") -> Scene:
    """A scene with or without a caption, as questions are asked about."""
    if rng.random() < MIXED_SCENES:
        return sample_mixed(rng, split)
    return sample_scene(rng, None, split)[0]


@functools.cache
def prompts(split: str, kind: str) -> tuple[Prompt, ...]:
    """All distinct prompts of a kind in a split, in a fixed order (rule: module docstring)."""
    _check_split(split)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    everything = [_prompt(kind, *spec) for spec in _specs(kind)]
    return tuple(p for p in everything if (split == "held_out") == _names_held_out(p.requirement))


def is_held_out(pairs: list[Pair]) -> bool:
    """True if objects of these (shape, color) pairs together show a held-out composition."""
    names = sorted(set(pairs))
    if any(pair in held_out_pairs() for pair in names):
        return True
    return any(_combination_held_out(a, b) for a, b in itertools.combinations(names, 2))


@functools.cache
def held_out_pairs() -> frozenset[Pair]:
    """The (shape, color) pairs that no training scene shows."""
    everything = sorted(itertools.product(SHAPES, COLORS), key=lambda pair: _digest(*pair))
    chosen: list[Pair] = []
    for shape, color in everything:
        fresh = all(shape != s and color != c for s, c in chosen)
        if fresh and len(chosen) < len(everything) // HELD_OUT_ONE_IN:
            chosen.append((shape, color))
    return frozenset(chosen)


def noun_phrase(item: Item) -> str:
    """ "a circle", "an orange square", "three crosses"."""
    name = item.shape if item.color is None else f"{item.color} {item.shape}"
    if item.count > 1:
        return f"{COUNT_WORDS[item.count]} {plural(name)}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """ "circles", "red crosses"."""
    return name + ("es" if name.endswith("s") else "s")


def clear_relation(first: Object, second: Object) -> str | None:
    """Where `first` is seen from `second`, or None if no one direction clearly dominates."""
    right, down = first.x - second.x, first.y - second.y
    if abs(down) <= MAX_SLANT * abs(right):
        return "right of" if right > 0 else "left of"
    if abs(right) <= MAX_SLANT * abs(down):
        return "below" if down > 0 else "above"
    return None


def _specs(kind: str):
    """All (items, relation) of a kind."""
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
    joint = f" {relation or 'and'} "
    return Prompt(kind, joint.join(map(noun_phrase, items)), Requirement(items, relation))


@functools.cache
def _prompt_groups(split: str, kind: str) -> tuple[tuple[Prompt, ...], ...]:
    """The prompts without colours and those with, empty groups left out."""
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
    """One pair per object, in the order of the items; objects of one item share a colour."""
    pairs = []
    for item in requirement.items:
        color = item.color or choice(rng, list(COLORS))
        pairs += [(item.shape, color)] * item.count
    return pairs


def _arrange(rng: np.random.Generator, pairs: list[Pair], relation: str | None) -> Scene:
    """Random background, sizes and free places; tries anew where the last object finds none.

    Three objects and more are small ones, or most tries would find no place.
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
    """[`new` at a random free place], or [] if there is none.

    With a relation, the second object goes where the first is `relation` of it.
    """
    x, y = _centres(new.size)
    free = np.ones(x.shape, bool)
    for other in placed:
        apart = (new.size + other.size) // 2 + GAP
        right, down = other.x - x, other.y - y
        free &= (np.abs(right) >= apart) | (np.abs(down) >= apart)
        if relation is not None:
            along, across = (right, down) if relation in ("left of", "right of") else (down, right)
            sign = 1 if relation in ("right of", "below") else -1
            free &= np.abs(across) <= MAX_SLANT * sign * along
    places = np.flatnonzero(free)
    if not len(places):
        return []
    place = places[rng.integers(len(places))]
    return [dataclasses.replace(new, x=int(x[place]), y=int(y[place]))]


@functools.cache
def _centres(size: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y, int[n] each, of all snapped centres that keep an object inside the margin."""
    reach = size // 2 + MARGIN
    line = np.arange(-(-reach // SNAP) * SNAP, IMAGE_SIZE - reach + 1, SNAP)
    x, y = np.meshgrid(line, line)
    return x.ravel(), y.ravel()


@functools.cache
def _sprite(shape: str, size: int) -> np.ndarray:
    """Coverage float32[size, size, 1] of a shape that fills its bounding square."""
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
    """One of a sequence, kept as it is (rng.choice would turn tuples into arrays)."""
    return options[int(rng.integers(len(options)))]


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
