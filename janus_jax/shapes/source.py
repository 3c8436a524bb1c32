"""A source of records of rendered scenes, generated on access; nothing is stored on disk.

A record depends only on the path, the options, the seed and the record's index. Held-out
compositions (scenes.py) occur neither in images nor in texts.
"""

import zlib
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten
from janus_jax.data.reading import Source
from janus_jax.data.records import KINDS, Record
from janus_jax.data.sources import FORMATS
from janus_jax.processing.images import encode_png
from janus_jax.shapes import scenes
from janus_jax.shapes.questions import QuestionAnswer, ask_relation, describe, sample_question

TURNS = 3  # questions per image
DESCRIBED = 0.5  # fraction of the text records that are descriptions; the others are captions


class ScenesSource(Source):
    """Records of rendered scenes. The path selects what they contain:

    generation: a caption and its image; all kinds in scenes.CAPTION_KINDS are equally likely.
    generation/KIND, e.g. generation/position: the same with captions of one kind.
    understanding: an image and TURNS questions about it, with their answers.
    text: a sentence that is true of a scene, without the image.

    Location of a record: "scenes:generation:17", counted from 0.
    """

    def __init__(
        self,
        path: str | Path,
        count: int = 100_000,
        seed: int = 0,
        relations: float = 0.0,
    ):
        """Creates the source.

        Args:
            path: one of records.KINDS, or "generation/KIND" as above.
            count: number of records.
            seed: random seed in [0, 2**32).
            relations: fraction of the questions, from 0 to 1, that come from ask_relation if the
                scene has two objects that it can ask about (about half of the scenes do). The
                other questions come from sample_question, which also uses ask_relation. Only for
                the path "understanding".

        Raises:
            ValueError: the path is unknown, an option has a wrong type or range, or `relations` is
                set for another path than "understanding".
        """
        self._name = str(path)
        self._kind, _, caption = self._name.partition("/")
        got = shorten(self._name)
        captioned = self._kind == "generation" and caption in scenes.CAPTION_KINDS
        if self._name not in KINDS and not captioned:
            known = ", ".join([*KINDS, *(f"generation/{kind}" for kind in scenes.CAPTION_KINDS)])
            raise ValueError(f"the path of a scenes source must be one of {known}, got {got}")
        if type(count) is not int or count < 1:
            raise ValueError(f"count must be an integer of at least 1, got {shorten(count)}")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {shorten(seed)}")
        if type(relations) not in (int, float) or not 0 <= relations <= 1:
            raise ValueError(f"relations must be a number from 0 to 1, got {shorten(relations)}")
        if relations and self._kind != "understanding":
            raise ValueError(
                "relations can only be set for the path understanding, "
                f"got {shorten(relations)} for {got}"
            )
        self._seed, self._relations = seed, relations
        self._captions = [caption] if caption else list(scenes.CAPTION_KINDS)
        super().__init__(path, [count])

    def scene(self, index: int) -> scenes.Scene:
        """Returns the scene that the image or the text of a record describes. index: from 0."""
        return self._sample(self._rng(index))[0]

    def _rng(self, index: int) -> np.random.Generator:
        """Returns the generator of one record; it differs between sources of different paths."""
        return np.random.default_rng((zlib.crc32(self._name.encode()), self._seed, index))

    def _sample(self, rng: np.random.Generator) -> tuple[scenes.Scene, str]:
        """Returns a scene and its caption or sentence; "" for the path "understanding"."""
        if self._kind == "understanding":
            return scenes.sample_any(rng), ""
        if self._kind == "text":
            return _sample_sentence(rng)
        kind = self._captions[rng.integers(len(self._captions))]
        scene, prompt = scenes.sample_scene(rng, kind)
        return scene, prompt.text

    def _question(self, rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
        question = ask_relation(rng, scene) if rng.random() < self._relations else None
        return question or sample_question(rng, scene)

    def _where(self, part: int, position: int) -> str:
        return f"scenes:{self._name}:{position}"

    def _read(self, part: int, position: int) -> Record:
        rng = self._rng(position)
        scene, text = self._sample(rng)
        if self._kind == "text":
            return Record("text", text=text)
        images = (encode_png(scenes.draw(scene)),)
        if self._kind == "generation":
            return Record("generation", text=text, images=images)
        turns = tuple(self._question(rng, scene) for _ in range(TURNS))
        return Record("understanding", turns, images=images)


def _sample_sentence(rng: np.random.Generator) -> tuple[scenes.Scene, str]:
    """Samples a scene and a sentence about it: a caption or a description (see DESCRIBED)."""
    if rng.random() >= DESCRIBED:
        scene, prompt = scenes.sample_scene(rng, None)
        return scene, prompt.text
    while True:
        scene = scenes.sample_mixed(rng)
        text = describe(scene)
        if text is not None:
            return scene, text


# The formats of files and folders, and generated scenes.
ALL_FORMATS = FORMATS | {"scenes": ScenesSource}
