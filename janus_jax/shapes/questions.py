"""Questions about a rendered scene, with short answers from a closed set.

A question is asked only if it has exactly one answer: a noun phrase must fit exactly one object,
and one direction must clearly dominate (`scenes.clear_relation`). For yes/no questions the answer
is sampled first and then a question with that answer, so guessing scores one half.

Each `ask_*` function returns (question, answer), or None if the question does not apply to the
scene.
"""

import collections

import numpy as np

from janus_jax.shapes import scenes

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
DESCRIBE = "Describe the picture."

QuestionAnswer = tuple[str, str]


def sample_question(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Returns (question, answer). All types of question that apply to the scene are equally likely.

    Raises:
        ValueError: the scene has no objects or more than four.
    """
    for ask in rng.permutation(np.array(ASKERS, dtype=object)):
        result = ask(rng, scene)
        if result is not None:
            return result
    raise ValueError(f"expected a scene of 1 to 4 objects, got {len(scene.objects)}")


def ask_shape(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Asks for the shape of the only object, or of the only object of a color."""
    if len(scene.objects) == 1:
        return "What shape is the object?", scene.objects[0].shape
    unique = _unique_by(scene, "color")
    if not unique:
        return None
    chosen = scenes.choice(rng, unique)
    return f"What shape is the {chosen.color} object?", chosen.shape


def ask_color(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Asks for the color of the only object of a shape."""
    unique = _unique_by(scene, "shape")
    if not unique:
        return None
    chosen = scenes.choice(rng, unique)
    name = "object" if len(scene.objects) == 1 and rng.random() < 0.5 else chosen.shape
    return f"What color is the {name}?", chosen.color


def ask_count(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Asks for the number of objects."""
    return "How many objects are there?", str(len(scene.objects))


def ask_count_color(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Asks for the number of objects of a color.

    With probability 1/4 the color is sampled from all colors, so the answer is often 0.
    """
    present = [item.color for item in scene.objects]
    color = scenes.choice(rng, list(scenes.COLORS) if rng.random() < 0.25 else present)
    return f"How many {color} objects are there?", str(present.count(color))


def ask_count_shape(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Asks for the number of objects of a shape.

    With probability 1/4 the shape is sampled from all shapes, so the answer is often 0.
    """
    present = [item.shape for item in scene.objects]
    shape = scenes.choice(rng, scenes.SHAPES if rng.random() < 0.25 else present)
    return f"How many {scenes.plural(shape)} are there?", str(present.count(shape))


def ask_presence(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Asks whether the scene has an object of a given shape and color.

    If the answer is "no", half of the questions change only one word of an object in the scene.
    Absent pairs are never held-out pairs, so a pair that training never shows gives no hint.
    """
    present = {(item.shape, item.color) for item in scene.objects}
    answer = scenes.choice(rng, ("yes", "no"))
    if answer == "yes":
        pair = scenes.choice(rng, sorted(present))
    else:
        absent = [(s, c) for s in scenes.SHAPES for c in scenes.COLORS
                  if (s, c) not in present | scenes.held_out_pairs()]
        similar = [(s, c) for s, c in absent if any(s == p or c == q for p, q in present)]
        pair = scenes.choice(rng, similar if similar and rng.random() < 0.5 else absent)
    return f"Is there {scenes.noun_phrase(scenes.Item(*pair))}?", answer


def ask_relation(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Asks whether one object is in a direction from another.

    If the answer is "no", the question names the opposite direction.
    """
    related = _related(scene)
    if not related:
        return None
    first, second, relation = scenes.choice(rng, related)
    answer = scenes.choice(rng, ("yes", "no"))
    direction = relation if answer == "yes" else OPPOSITE[relation]
    return f"Is the {_name(scene, first)} {direction} the {_name(scene, second)}?", answer


def ask_neighbor(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Asks for the shape of the object in a direction from the other, in scenes of two objects."""
    related = _related(scene)
    if len(scene.objects) != 2 or not related:
        return None
    first, second, relation = scenes.choice(rng, related)
    return f"What is {relation} the {_name(scene, second)}?", first.shape


def ask_background(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
    """Asks for the background color."""
    return "What is the background color?", scene.background


def ask_description(rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer | None:
    """Asks for the description that `describe` returns."""
    text = describe(scene)
    return None if text is None else (DESCRIBE, text)


def describe(scene: scenes.Scene) -> str | None:
    """Returns the canonical caption of the whole scene, or None if there is none.

    Two different objects are described by the relation "left of" or "above"; there is no caption if
    neither direction clearly dominates. In all other scenes, equal objects are counted, and the
    groups are listed in the order of SHAPES, then COLORS.
    """
    groups = collections.Counter((item.shape, item.color) for item in scene.objects)
    if len(scene.objects) == 2 and len(groups) == 2:
        relations = [entry for entry in _related(scene) if entry[2] in ("left of", "above")]
        return _relation_phrase(*relations[0]) if relations else None
    order = sorted(groups, key=lambda pair: (scenes.SHAPES.index(pair[0]),
                                             list(scenes.COLORS).index(pair[1])))
    phrases = [scenes.noun_phrase(scenes.Item(*pair, groups[pair])) for pair in order]
    return " and ".join(part for part in (", ".join(phrases[:-1]), phrases[-1]) if part)


def _relation_phrase(first: scenes.Object, second: scenes.Object, relation: str) -> str:
    phrases = [scenes.noun_phrase(scenes.Item(item.shape, item.color)) for item in (first, second)]
    return f"{phrases[0]} {relation} {phrases[1]}"


def _related(scene: scenes.Scene) -> list[tuple[scenes.Object, scenes.Object, str]]:
    """Returns (first, second, relation) for each ordered pair of objects in a clear relation.

    Both objects must have a name that fits no other object.
    """
    named = [item for item in scene.objects if _name(scene, item) is not None]
    entries = [(a, b, scenes.clear_relation(a, b)) for a in named for b in named if a is not b]
    return [entry for entry in entries if entry[2] is not None]


def _name(scene: scenes.Scene, item: scenes.Object) -> str | None:
    """Returns the shortest name that fits only this object: shape, or color and shape, or None."""
    if sum(other.shape == item.shape for other in scene.objects) == 1:
        return item.shape
    same = [o for o in scene.objects if (o.shape, o.color) == (item.shape, item.color)]
    return f"{item.color} {item.shape}" if len(same) == 1 else None


def _unique_by(scene: scenes.Scene, attribute: str) -> list[scenes.Object]:
    """Returns the objects whose attribute differs from that of all other objects."""
    counts = collections.Counter(getattr(item, attribute) for item in scene.objects)
    return [item for item in scene.objects if counts[getattr(item, attribute)] == 1]


ASKERS = (
    ask_shape, ask_color, ask_count, ask_count_color, ask_count_shape, ask_presence, ask_relation,
    ask_neighbor, ask_background, ask_description,
)
