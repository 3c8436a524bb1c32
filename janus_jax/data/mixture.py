"""Mixes sources by weight, distributes their records to streams of rows, and batches the rows.

The order of all records depends only on the seed and the number of streams. Each stream takes every
num_streams-th record of each source, so no record belongs to two streams. A host reads some of the
streams. Each stream has its own state, so another host may read it after the run is resumed.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np

from janus_jax.checks import shorten
from janus_jax.data.records import BadRecord, Example, Record


@dataclasses.dataclass(frozen=True)
class Part:
    """A node of the tree of sources.

    Attributes:
        name: path of the node in the tree ("generation/real").
        weight: how many records come from this node, relative to the other children of its parent.
        source: the records of a leaf; None for a node with parts.
        parts: the children of the node.
        question: if set, captioned images of this source become answers to this question.
    """

    name: str
    weight: float
    source: Any = None
    parts: tuple["Part", ...] = ()
    question: str | None = None

    def nodes(self) -> Iterator["Part"]:
        """Iterates over this node and all nodes below it."""
        yield self
        for part in self.parts:
            yield from part.nodes()

    def leaves(self) -> list["Part"]:
        """Returns the nodes that have a source."""
        return [part for part in self.nodes() if part.source is not None]


def open_parts(tree: Mapping[str, Any], open_source: Callable, name: str = "") -> Part:
    """Opens the sources of a mixture.

    Args:
        tree: the mixture of a config. A leaf has `format`, `path`, and other arguments of
            open_source. Any other node has its parts by name. Both may have a `weight` (default 1),
            and a leaf may have a `question`.
        open_source: called with the fields of each leaf except `weight` and `question`.
        name: path of the tree in the mixture.
    Raises:
        ValueError: a weight is not above 0, a node has no parts, or open_source raises it. Other
            errors of open_source pass through.
    """
    tree = dict(tree.items())
    weight = tree.pop("weight", 1)
    where = name or "the mixture"
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        raise ValueError(
            f"weight must be a finite number above 0, got {shorten(weight)} for {where}"
        )
    if tree.keys() >= {"format", "path"}:
        question = tree.pop("question", None)
        if not (question is None or (isinstance(question, str) and question.strip())):
            got = f"{shorten(question)} for {where}"
            raise ValueError(f"question must be a non-empty string, got {got}")
        try:
            return Part(name, weight, open_source(**tree), question=question)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    not_nodes = [key for key, value in tree.items() if not hasattr(value, "items")]
    if not_nodes or not tree:
        raise ValueError(
            f"{where} must have either named parts, or a format and a path, got {sorted(tree)}"
        )
    prefix = f"{name}/" if name else ""
    # Sorted, as in a ConfigDict: the order of the records must not depend on how the config was
    # written.
    parts = (open_parts(node, open_source, prefix + key) for key, node in sorted(tree.items()))
    return Part(name, weight, parts=tuple(parts))


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An example or a bad record, and the name of its source."""

    source: str
    example: Example | BadRecord


def mixed_examples(
    part: Part, index: int, count: int, make_example: Callable, seed: int
) -> grain.MapDataset:
    """Returns the endless examples of one stream, in the ratio of the weights.

    Each source is reshuffled in every epoch.

    Args:
        part: the tree of sources.
        index: number of the stream, from 0.
        count: number of streams.
        make_example: maps (Record or BadRecord, np.random.Generator) to an example or a BadRecord.
        seed: random seed.
    """
    if part.parts:
        parts = [mixed_examples(child, index, count, make_example, seed) for child in part.parts]
        return grain.MapDataset.mix(parts, weights=[child.weight for child in part.parts])

    def load(record: Record | BadRecord, rng: np.random.Generator) -> Loaded:
        return Loaded(part.name, make_example(_caption_to_answer(record, part.question), rng))

    # With the same seed, sources of the same size would be shuffled in the same order.
    own_seed = (seed + zlib.crc32(part.name.encode())) % 2**32
    records = grain.MapDataset.source(part.source).seed(own_seed).shuffle().repeat()
    return records.random_map(load)[index::count]


def _caption_to_answer(record: Record | BadRecord, question: str | None) -> Record | BadRecord:
    """Turns a captioned image into an understanding record if the source has a question."""
    if question is None or isinstance(record, BadRecord) or record.kind != "generation":
        return record
    if not record.images:
        detail = "a source with a question requires images, got only indices"
        return BadRecord("no image", detail, record.where)
    turns = ((question, record.text),)
    return dataclasses.replace(record, kind="understanding", turns=turns, text="")


class Streams(grain.IterDataset):
    """Batches rows of several streams.

    An element is a dict with the rows of one step, stream after stream: arrays are stacked, and
    lists are collected in a list. The state also contains the settings, and setting the state of
    a run with other settings is an error.
    """

    def __init__(
        self, streams: Mapping[int, grain.IterDataset], rows: int, settings: Mapping[str, Any]
    ):
        """Initializes the data set.

        Args:
            streams: the rows of each stream, by the number of the stream.
            rows: rows of each stream in a step.
            settings: JSON values that determine the contents of the rows.
        """
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
        rows = [next(iterator) for iterator in self._iterators.values() for _ in range(self._rows)]
        return {name: _stack([row[name] for row in rows]) for name in rows[0]}

    def get_state(self) -> dict[str, Any]:
        states = {str(index): iterator.get_state() for index, iterator in self._iterators.items()}
        return {"settings": self._settings, **states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores a state, which must contain these streams and may contain others.

        Raises:
            ValueError: the state has other settings, or is damaged.
        """
        saved, current = state["settings"], self._settings
        changes = [
            f"{name} {saved.get(name)} -> {current.get(name)}"
            for name in sorted(saved.keys() | current.keys())
            if saved.get(name) != current.get(name)
        ]
        if changes:
            rule = "a resumed run must use the data and settings that it started with"
            raise ValueError(f"{rule}, got {', '.join(changes)}")
        for index, iterator in self._iterators.items():
            try:
                iterator.set_state(state[str(index)])
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                reason = f"{type(error).__name__} {error}"
                raise ValueError(f"the state of stream {index} is damaged: {reason:.80}") from None

    def close(self) -> None:
        for iterator in self._iterators.values():
            iterator.close()


def _stack(parts: list) -> np.ndarray | list:
    return np.stack(parts) if isinstance(parts[0], np.ndarray) else parts
