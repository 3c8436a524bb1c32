"""From a config to the rows of every step: sources, examples, streams, packing, in one place."""

import dataclasses
from pathlib import Path

import grain
from grain.experimental import ThreadPrefetchIterDataset

from janus_jax.checks import shorten
from janus_jax.data.examples import ExampleMaker
from janus_jax.data.mixture import Part, Streams, open_parts, stream
from janus_jax.data.packing import OPEN_ROWS, packed
from janus_jax.data.skipped import Skipped
from janus_jax.data.sources import open_source
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.processor import Processor

PREFETCHED = 2  # steps whose rows are made ahead


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """What the rows of a run are made of.

    Attributes:
        mixture: the tree of sources (mixture.open_parts).
        seq_len: tokens in a row.
        max_input_images: most images to understand in a row.
        max_generated_images: most images to generate in a row.
        batch_size: rows in a step, on all hosts together.
        streams: parts that the rows come from. All hosts must get the same number of streams, and
            all streams give the same number of rows, in this run and in those that go on from it.
        tokenized: whether images to be generated come as indices.
        max_bad: the part of a source's records that may be bad.
        threads: that read and prepare records, for each stream; the order does not depend on it.
        seed: of the order, and of which captions are dropped.
    """

    mixture: dict
    seq_len: int
    max_input_images: int
    max_generated_images: int
    batch_size: int
    streams: int
    tokenized: bool
    max_bad: float
    threads: int
    seed: int

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "streams", "threads"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                got = shorten(value)
                raise ValueError(f"{name} must be an integer of at least 1, got {got}")
        for name in ("max_input_images", "max_generated_images", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                got = shorten(value)
                raise ValueError(f"{name} must be an integer of at least 0, got {got}")
        if not 0 <= self.max_bad < 1:
            raise ValueError(f"max_bad must be at least 0 and below 1, got {shorten(self.max_bad)}")

    def own_streams(self, host: int, hosts: int) -> range:
        """The streams of one of the hosts.

        Raises:
            ValueError: batch_size, streams and hosts do not divide.
        """
        if not 0 <= host < hosts:
            raise ValueError(f"host must be in [0, {hosts}), got {host}")
        if self.streams % hosts or self.batch_size % self.streams:
            raise ValueError(
                "batch_size must be a multiple of streams and streams of hosts, "
                f"got batch_size={self.batch_size} streams={self.streams} {hosts=}"
            )
        each = self.streams // hosts
        return range(host * each, (host + 1) * each)


def open_rows(
    cfg: RowsConfig,
    processor: Processor,
    model: JanusConfig,
    folder: str | Path,
    host: int = 0,
    hosts: int = 1,
) -> tuple[grain.IterDataset, Skipped]:
    """The rows of every step that one host reads, and what it left out so far.

    An element is a dict of stacked rows (packing.packed). The state of its iterator holds each of
    its streams; a run on other hosts goes on from the states of all.

    Args:
        folder: where bad records are listed, in skipped-HOST.jsonl.
        host, hosts: which of how many.
    Raises:
        ValueError: settings that do not divide, or a wrong mixture. FileNotFoundError: a source
        that is not there.
    """
    own = cfg.own_streams(host, hosts)
    part = open_parts(cfg.mixture, open_source)
    make = _example_maker(cfg, processor, model)
    records = {leaf.name: len(leaf.source) for leaf in part.leaves()}
    skipped = Skipped(Path(folder) / f"skipped-{host:03d}.jsonl", cfg.max_bad, records)
    rows = {index: _rows(cfg, part, index, make, skipped) for index in own}
    streams = Streams(rows, cfg.batch_size // cfg.streams, _settings(cfg, part))
    return ThreadPrefetchIterDataset(streams, prefetch_buffer_size=PREFETCHED), skipped


def _example_maker(cfg: RowsConfig, processor: Processor, model: JanusConfig) -> ExampleMaker:
    return ExampleMaker(
        processor=processor,
        image_size=model.image_size,
        num_generated_tokens=model.num_image_tokens,
        codebook_size=model.gen_vq.codebook_size,
        # positions begin anew in each example, so it is these that the decoder must have
        max_length=min(cfg.seq_len, model.language_model.max_position_embeddings),
        max_input_images=cfg.max_input_images,
        max_generated_images=cfg.max_generated_images,
        tokenized=cfg.tokenized,
    )


def _rows(
    cfg: RowsConfig, part: Part, index: int, make: ExampleMaker, skipped: Skipped
) -> grain.IterDataset:
    """The rows of one stream."""
    options = grain.ReadOptions(num_threads=cfg.threads, prefetch_buffer_size=2 * cfg.threads)
    examples = stream(part, index, cfg.streams, make, cfg.seed).to_iter_dataset(options)
    kept = examples.filter(skipped).map(lambda loaded: loaded.example)
    pad_id = make.processor.tokenizer.pad_id
    seed = (cfg.seed + index) % 2**32
    filled = packed(kept, cfg.seq_len, cfg.max_input_images, cfg.max_generated_images, pad_id, seed)
    # as many as come out at once, so that no step waits while the next ones are filled
    return ThreadPrefetchIterDataset(filled, prefetch_buffer_size=OPEN_ROWS)


def _settings(cfg: RowsConfig, part: Part) -> dict[str, int | bool | str]:
    """What a run may not change when it goes on."""
    names = ("seq_len", "max_input_images", "max_generated_images", "streams", "tokenized", "seed")
    sizes = {f"records of {leaf.name}": len(leaf.source) for leaf in part.leaves()}
    weights = {f"weight of {one.name}": one.weight for one in part.nodes() if one.name}
    return {**{name: getattr(cfg, name) for name in names}, **sizes, **weights}
