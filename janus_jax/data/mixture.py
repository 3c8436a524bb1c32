"""Sources mixed by weight, dealt out to streams of rows, and the rows of a step.

The order of everything depends on the seed and the number of streams alone. Every stream takes each
num_streams-th record of each source, so that no record is in two; a host reads some of the streams,
and which ones may change from run to run, for each stream has a state of its own.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from janus_jax.checks import shorten
from janus_jax.data.records import BadRecord, Record

Example = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Part:
    """A node of the tree of sources.

    Attributes:
        weight: how many records come from here, relative to the other parts of the same node.
        name: where it stands in the tree ("generation/real").
        source: its records, or None for a node with parts.
        parts: what is mixed here.
        question: turns captioned images into answers to this question.
    """

    name: str
    weight: float
    source: Any = None
    parts: tuple["Part", ...] = ()
    question: str | None = None

    def nodes(self) -> Iterator["Part"]:
        """This part and all below it."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    def leaves(self) -> list["Part"]:
        """The parts that have a source."""
        return [part for part in self.nodes() if part.source is not None]


def open_parts(tree: Mapping[str, Any], open_source: Callable, name: str = "") -> Part:
    """The sources that a config names.

    tree: a leaf holds `format`, `path`, and whatever else open_source takes, any other node its
    parts by name; both may hold a `weight` (default 1), and a leaf a `question`.
    Raises ValueError for weights that are not above 0 and nodes without parts; and what open_source
    raises.
    """
    tree = dict(tree.items())
    weight = tree.pop("weight", 1)
    where = name or "the mixture"
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise ValueError(f"weight must be a number above 0, got {shorten(weight)} for {where}")
    if tree.keys() >= {"format", "path"}:
        question = tree.pop("question", None)
        if not (question is None or (isinstance(question, str) and question.strip())):
            raise ValueError(f"question must be a text, got {shorten(question)} for {where}")
        try:
            return Part(name, weight, open_source(**tree), question=question)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    wrong = [key for key, value in tree.items() if not hasattr(value, "items")]
    if wrong or not tree:
        raise ValueError(f"{where} must hold parts, or a format and a path, got {sorted(tree)}")
    prefix = f"{name}/" if name else ""
    # sorted, as a ConfigDict is: the order of the records must not depend on how it was written
    parts = (open_parts(node, open_source, prefix + key) for key, node in sorted(tree.items()))
    return Part(name, weight, parts=tuple(parts))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An example, or the bad record in its place, and the source that it came from."""

    source: str
    example: Example | BadRecord


def stream(
    part: Part, index: int, count: int, make: Callable, seed: int
) -> grain.MapDataset:
    """The endless examples of one of `count` streams, in the ratio of the weights.

    make: (Record or BadRecord, np.random.Generator) -> example or BadRecord.
    Each source is shuffled anew in every epoch.
    """
    if part.parts:
        parts = [stream(child, index, count, make, seed) for child in part.parts]
        return grain.MapDataset.mix(parts, weights=[child.weight for child in part.parts])

    def load(record: Record | BadRecord, rng: np.random.Generator) -> Loaded:
        return Loaded(part.name, make(as_answer(record, part.question), rng))

    # sources of the same size would be shuffled alike by the same seed
    own_seed = (seed + zlib.crc32(part.name.encode())) % 2**32
    records = grain.MapDataset.source(part.source).seed(own_seed).shuffle().repeat()
    return records.random_map(load)[index::count]


def as_answer(record: Record | BadRecord, question: str | None) -> Record | BadRecord:
    """A captioned image as an answer to the question, if there is one."""
    if question is None or isinstance(record, BadRecord) or record.kind != "generation":
        return record
    if not record.images:
        return BadRecord("no image", "a question needs the image, not indices", record.where)
    turns = ((question, record.text),)
    return dataclasses.replace(record, kind="understanding", turns=turns, text="")


class Streams(grain.IterDataset):
    """The rows of some of the streams, as many of each as go into a step.

    An element is a dict of the rows' arrays, stacked, and of lists, one after the other: stream
    after stream. The state holds the settings too, and is refused under others.
    """

    def __init__(
        self, streams: Mapping[int, grain.IterDataset], rows: int, settings: Mapping[str, Any]
    ):
        """rows: of each stream in a step. settings: JSON values that decide what is in the rows."""
        super().__init__()
        self._streams, self._rows, self._settings = dict(streams), rows, dict(settings)

    def __iter__(self) -> "_StreamsIterator":
        iterators = {index: iter(rows) for index, rows in self._streams.items()}
        return _StreamsIterator(iterators, self._rows, self._settings)


class _StreamsIterator(grain.DatasetIterator):
    def __init__(self, iterators: dict[int, grain.DatasetIterator], rows: int, settings: dict):
        super().__init__()
        self._iterators, self._rows, self._settings = iterators, rows, settings

    def __next__(self) -> Example:
        rows = [next(one) for one in self._iterators.values() for _ in range(self._rows)]
        return {name: _stacked([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        states = {str(index): one.get_state() for index, one in self._iterators.items()}
        return {"settings": self._settings, **states}

    def set_state(self, state: dict[str, Any]) -> None:
        """state: of these streams, and maybe of others.

        Raises ValueError for other settings, and for what is no state of these streams.
        """
        before = state["settings"]
        now = self._settings
        changed = [
            f"{name} {before.get(name)} -> {now.get(name)}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            told = ", ".join(changed)
            raise ValueError(f"a run must go on with the data it began with, got {told}")
        for index, one in self._iterators.items():
            try:
                one.set_state(state[str(index)])
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                reason = f"{type(error).__name__} {error}"
                raise ValueError(f"the state of stream {index} is damaged: {reason:.80}") from None

    def close(self) -> None:
        for one in self._iterators.values():
            one.close()


def _stacked(parts: list) -> np.ndarray | list:
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else parts
