"""Drawn scenes as a source of records: made when they are asked for, with nothing on disk.

A record depends on what is given, the seed and the record's number alone. Held-out compositions
(scenes.py) are never shown nor named.
"""

import zlib
from pathlib import Path

import numpy as np

from janus_jax.checks import shorten
from janus_jax.data import scenes
from janus_jax.data.questions import QuestionAnswer, ask_relation, describe, sample_question
from janus_jax.data.reading import Source
from janus_jax.data.records import KINDS, Record
from janus_jax.processing.images import encode_png

TURNS = 3  # questions about one image
DESCRIBED = 0.5  # part of the sentences that describe a scene; the others are captions


class ScenesSource(Source):
    """What the path names:

    generation: a caption of one of scenes.KINDS, all as often, and its image.
    generation/position, and so on: the same with captions of one kind.
    understanding: an image and TURNS questions about it, with their answers.
    text: a sentence that is true of a scene, without the image.

    Place: "scenes:generation:17", counted from 0.
    """

    def __init__(
        self,
        path: str | Path,
        count: int = 100_000,
        seed: int = 0,
        relations: float = 0.0,
    ):
        """Raises ValueError for another path, and for options that the path has no use for.

        Args:
            path: one of records.KINDS, or a kind of captions as above.
            count: of the records.
            seed: below 2**32; with another one all records are others.
            relations: from 0 to 1, the part of the questions that ask_relation asks, where the
                scene has two objects to ask it about (about half of the scenes do). The others are
                drawn by sample_question, which asks it too. For understanding.
        """
        self._name = str(path)
        self._kind, _, caption = self._name.partition("/")
        captioned = self._kind == "generation" and caption in scenes.KINDS
        if self._name not in KINDS and not captioned:
            known = ", ".join([*KINDS, *(f"generation/{kind}" for kind in scenes.KINDS)])
            got = shorten(self._name)
            raise ValueError(f"the path of scenes must be one of {known}, got {got}")
        if type(count) is not int or count < 1:
            raise ValueError(f"count must be an integer of at least 1, got {shorten(count)}")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {shorten(seed)}")
        if type(relations) not in (int, float) or not 0 <= relations <= 1:
            raise ValueError(f"relations must be a number from 0 to 1, got {shorten(relations)}")
        if relations and self._kind != "understanding":
            raise ValueError(f"relations must be left to understanding, got it for {self._kind}")
        self._seed, self._relations = seed, relations
        self._captions = [caption] if caption else list(scenes.KINDS)
        super().__init__(path, [count])

    def scene(self, index: int) -> scenes.Scene:
        """What the image of a record shows, or its sentence tells of. index: from 0."""
        return self._drawn(self._rng(index))[0]

    def _rng(self, index: int) -> np.random.Generator:
        """One for each record; sources of other paths do not share its scenes."""
        return np.random.default_rng((zlib.crc32(self._name.encode()), self._seed, index))

    def _drawn(self, rng: np.random.Generator) -> tuple[scenes.Scene, str]:
        """A scene and what is said of it: a caption, a sentence, or nothing yet."""
        if self._kind == "understanding":
            return scenes.sample_any(rng), ""
        if self._kind == "text":
            return _told(rng)
        kind = self._captions[rng.integers(len(self._captions))]
        scene, prompt = scenes.sample_scene(rng, kind)
        return scene, prompt.text

    def _question(self, rng: np.random.Generator, scene: scenes.Scene) -> QuestionAnswer:
        found = ask_relation(rng, scene) if rng.random() < self._relations else None
        return found or sample_question(rng, scene)

    def _where(self, part: int, position: int) -> str:
        return f"scenes:{self._name}:{position}"

    def _read(self, part: int, position: int) -> Record:
        rng = self._rng(position)
        scene, text = self._drawn(rng)
        if self._kind == "text":
            return Record("text", text=text)
        images = (encode_png(scenes.draw(scene)),)
        if self._kind == "generation":
            return Record("generation", text=text, images=images)
        turns = tuple(self._question(rng, scene) for _ in range(TURNS))
        return Record("understanding", turns, images=images)


def _told(rng: np.random.Generator) -> tuple[scenes.Scene, str]:
    """A scene and a sentence about it."""
    if rng.random() >= DESCRIBED:
        scene, prompt = scenes.sample_scene(rng, None)
        return scene, prompt.text
    while True:
        scene = scenes.sample_mixed(rng)
        text = describe(scene)
        if text is not None:
            return scene, text
