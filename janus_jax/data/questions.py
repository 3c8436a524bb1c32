"""Questions about a drawn scene with short answers from a closed set.

A question is asked only where it has one answer: a noun phrase must fit exactly one object, a
direction must clearly dominate (`scenes.clear_relation`). Yes and no are drawn first and then a
question is sought that has that answer, so that guessing earns one half.
"""

import collections

import numpy as np

from janus_jax.data import scenes
from janus_jax.data.checker import Item

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
DESCRIBE = "Describe the picture."

QuestionAnswer = tuple[str, str]


def sample_question(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """(question, answer); every kind of question that fits the scene is equally likely."""
    for ask in rng.permutation(np.array(ASKERS, dtype=object)):
        found = ask(rng, scene)
        if found is not None:
            return found
    raise ValueError(f"scene must hold 1 to 4 objects, got {len(scene.objects)}")


def ask_shape(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Shape of the only object, or of the only object of a colour."""
    if len(scene.objects) == 1:
        return "What shape is the object?", scene.objects[0].shape
    known = _alone(scene, "color")
    if not known:
        return None
    chosen = scenes.choice(rng, known)
    return f"What shape is the {chosen.color} object?", chosen.shape


def ask_color(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Colour of the only object of a shape."""
    known = _alone(scene, "shape")
    if not known:
        return None
    chosen = scenes.choice(rng, known)
    name = "object" if len(scene.objects) == 1 and rng.random() < 0.5 else chosen.shape
    return f"What color is the {name}?", chosen.color


def ask_count(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Number of all objects."""
    return "How many objects are there?", str(len(scene.objects))


def ask_count_color(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Number of objects of a colour; one time in four of any colour, so often 0."""
    present = [item.color for item in scene.objects]
    color = scenes.choice(rng, list(scenes.COLORS) if rng.random() < 0.25 else present)
    return f"How many {color} objects are there?", str(present.count(color))


def ask_count_shape(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Number of objects of a shape; one time in four of any shape, so often 0."""
    present = [item.shape for item in scene.objects]
    shape = scenes.choice(rng, scenes.SHAPES if rng.random() < 0.25 else present)
    return f"How many {scenes.plural(shape)} are there?", str(present.count(shape))


def ask_presence(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Whether a coloured shape is there; half of the absent ones differ in one word only.

    Absent pairs are those that training could show, so that "never drawn" is not a hint.
    """
    present = {(item.shape, item.color) for item in scene.objects}
    answer = scenes.choice(rng, ("yes", "no"))
    if answer == "yes":
        pair = scenes.choice(rng, sorted(present))
    else:
        absent = [(s, c) for s in scenes.SHAPES for c in scenes.COLORS
                  if (s, c) not in present | scenes.held_out_pairs()]
        near = [(s, c) for s, c in absent if any(s == p or c == q for p, q in present)]
        pair = scenes.choice(rng, near if near and rng.random() < 0.5 else absent)
    return f"Is there {scenes.noun_phrase(Item(*pair))}?", answer


def ask_relation(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Whether one object is in a direction from another; "no" asks for the opposite direction."""
    related = _related(scene)
    if not related:
        return None
    first, second, relation = scenes.choice(rng, related)
    answer = scenes.choice(rng, ("yes", "no"))
    asked = relation if answer == "yes" else OPPOSITE[relation]
    return f"Is the {_name(scene, first)} {asked} the {_name(scene, second)}?", answer


def ask_neighbor(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Shape of the object in a direction from the other; only where there are two."""
    related = _related(scene)
    if len(scene.objects) != 2 or not related:
        return None
    first, second, relation = scenes.choice(rng, related)
    return f"What is {relation} the {_name(scene, second)}?", first.shape


def ask_background(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Name of the background."""
    return "What is the background color?", scene.background


def ask_description(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """The one caption that `describe` gives, where it gives one."""
    text = describe(scene)
    return None if text is None else (DESCRIBE, text)


def describe(scene: scenes.Scene) -> str | None:
    """Canonical caption of the whole scene, or None where two objects stand aslant.

    Two different objects are told by the relation "left of" or "above"; otherwise equal objects
    are counted and the groups named in the order of SHAPES, then COLORS.
    """
    groups = collections.Counter((item.shape, item.color) for item in scene.objects)
    if len(scene.objects) == 2 and len(groups) == 2:
        told = [entry for entry in _related(scene) if entry[2] in ("left of", "above")]
        return " ".join(_told(*told[0])) if told else None
    order = sorted(groups, key=lambda pair: (scenes.SHAPES.index(pair[0]),
                                             list(scenes.COLORS).index(pair[1])))
    phrases = [scenes.noun_phrase(Item(*pair, groups[pair])) for pair in order]
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def _told(first: scenes.Object, second: scenes.Object, relation: str) -> list[str]:
    phrases = [scenes.noun_phrase(Item(item.shape, item.color)) for item in (first, second)]
    return [phrases[0], relation, phrases[1]]


def _related(scene: scenes.Scene) -> list[tuple[scenes.Object, scenes.Object, str]]:
    """(first, second, relation) of ordered pairs that can be named and stand clearly."""
    named = [item for item in scene.objects if _name(scene, item) is not None]
    entries = [(a, b, scenes.clear_relation(a, b)) for a in named for b in named if a is not b]
    return [entry for entry in entries if entry[2] is not None]


def _name(scene: scenes.Scene, item: scenes.Object) -> str | None:
    """Shortest name that fits this object alone: its shape, else colour and shape, else None."""
    if sum(other.shape == item.shape for other in scene.objects) == 1:
        return item.shape
    same = [o for o in scene.objects if (o.shape, o.color) == (item.shape, item.color)]
    return f"{item.color} {item.shape}" if len(same) == 1 else None


def _alone(scene: scenes.Scene, attribute: str) -> list[scenes.Object]:
    """Objects whose attribute no other object shares."""
    counts = collections.Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, attribute)] == 1]


ASKERS = (
    ask_shape, ask_color, ask_count, ask_count_color, ask_count_shape, ask_presence, ask_relation,
    ask_neighbor, ask_background, ask_description,
)
