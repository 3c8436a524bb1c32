"""Builds the input pipeline of a run: sources, examples, streams, packing, batches of rows."""

import dataclasses
import functools
from pathlib import Path

import grain
from grain.experimental import ThreadPrefetchIterDataset

from janus_jax.checks import shorten
from janus_jax.data.examples import ExampleMaker
from janus_jax.data.mixture import Part, Streams, mixed_examples, open_parts
from janus_jax.data.packing import OPEN_ROWS, Field, pack_examples, row_fields
from janus_jax.data.skipped import Skipped
from janus_jax.data.sources import FORMATS, Formats, open_source
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import sizes_of
from janus_jax.processing.processor import Processor

PREFETCHED_STEPS = 2  # steps whose rows are prepared in advance


@dataclasses.dataclass(frozen=True)
class RowsConfig:
    """Settings of the rows that a run trains on.

    Attributes:
        mixture: the tree of sources (see mixture.open_parts).
        seq_len: tokens in a row.
        max_input_images: maximum number of images to understand in a row.
        max_generated_images: maximum number of images to generate in a row.
        batch_size: rows in a step, over all hosts.
        streams: number of independent streams of rows. Each host reads the same number of streams,
            and each stream provides the same number of rows of a step. A resumed run must use the
            same number.
        tokenized: whether images to generate are given as indices.
        max_bad: maximum fraction of a source's records that may be bad.
        threads: threads per stream that read and prepare records; the order of the records does not
            depend on it.
        seed: random seed for the order of the records and for which captions are dropped.
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

    def fields(self, model_cfg: ModelConfig) -> dict[str, Field]:
        """Returns the arrays of a row. model_cfg: config of the model, for the sizes of images."""
        sizes = sizes_of(model_cfg)
        return row_fields(
            self.seq_len,
            self.max_input_images,
            self.max_generated_images,
            sizes.image_size,
            sizes.generated_image_tokens if self.tokenized else None,
        )

    def own_streams(self, host: int, hosts: int) -> range:
        """Returns the numbers of the streams that a host reads.

        Args:
            host: number of the host, from 0.
            hosts: number of hosts.
        Raises:
            ValueError: batch_size is not a multiple of streams, or streams is not a multiple of
                hosts.
        """
        if not 0 <= host < hosts:
            raise ValueError(f"host must be in [0, {hosts}), got {host}")
        if self.streams % hosts or self.batch_size % self.streams:
            raise ValueError(
                "batch_size must be a multiple of streams, and streams a multiple of hosts, "
                f"got batch_size={self.batch_size} streams={self.streams} {hosts=}"
            )
        per_host = self.streams // hosts
        return range(host * per_host, (host + 1) * per_host)


def open_rows(
    settings: RowsConfig,
    processor: Processor,
    model_cfg: ModelConfig,
    folder: str | Path,
    host: int = 0,
    hosts: int = 1,
    formats: Formats = FORMATS,
) -> tuple[grain.IterDataset, Skipped]:
    """Opens the rows that one host reads, and the filter that skips and counts bad records.

    An element of the dataset is a dict of the stacked rows of one step (see
    packing.row_fields). The state of its iterator contains the state of each stream. A run on
    another number of hosts resumes from the states of all hosts.

    Args:
        settings: settings of the rows.
        processor: writes prompts and preprocesses images.
        model_cfg: config of the model, for its image sizes, codebook and maximum length.
        folder: where bad records are listed, in skipped-HOST.jsonl.
        host: number of this host, from 0.
        hosts: number of hosts.
        formats: the source formats that a mixture may use, by name.
    Raises:
        ValueError: own_streams rejects the settings, or the mixture is invalid.
        FileNotFoundError: a source does not exist.
    """
    own_streams = settings.own_streams(host, hosts)
    part = open_parts(settings.mixture, functools.partial(open_source, formats=formats))
    make_example = _example_maker(settings, processor, model_cfg)
    num_records = {leaf.name: len(leaf.source) for leaf in part.leaves()}
    skipped = Skipped(Path(folder) / f"skipped-{host:03d}.jsonl", settings.max_bad, num_records)
    rows = {
        index: _stream_rows(settings, part, index, make_example, skipped) for index in own_streams
    }
    per_stream = settings.batch_size // settings.streams
    streams = Streams(rows, per_stream, _data_settings(settings, part))
    return ThreadPrefetchIterDataset(streams, prefetch_buffer_size=PREFETCHED_STEPS), skipped


def _example_maker(
    settings: RowsConfig, processor: Processor, model_cfg: ModelConfig
) -> ExampleMaker:
    sizes = sizes_of(model_cfg)
    return ExampleMaker(
        processor=processor,
        image_size=sizes.image_size,
        num_generated_tokens=sizes.generated_image_tokens,
        codebook_size=sizes.codebook_size,
        # Positions start at 0 in each example, so the decoder's limit applies to an example.
        max_length=min(settings.seq_len, sizes.max_positions),
        max_input_images=settings.max_input_images,
        max_generated_images=settings.max_generated_images,
        tokenized=settings.tokenized,
    )


def _stream_rows(
    settings: RowsConfig, part: Part, index: int, make_example: ExampleMaker, skipped: Skipped
) -> grain.IterDataset:
    """Returns the rows of one stream."""
    threads = settings.threads
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    loaded = mixed_examples(part, index, settings.streams, make_example, settings.seed)
    loaded = loaded.to_iter_dataset(options)
    examples = loaded.filter(skipped).map(lambda loaded: loaded.example)
    rows = pack_examples(
        examples,
        settings.seq_len,
        settings.max_input_images,
        settings.max_generated_images,
        make_example.processor.tokenizer.pad_id,
        (settings.seed + index) % 2**32,
    )
    # The packer returns OPEN_ROWS rows at once. The buffer also has room for OPEN_ROWS rows, so
    # that no step waits while the packer fills the next ones.
    return ThreadPrefetchIterDataset(rows, prefetch_buffer_size=OPEN_ROWS)


def _data_settings(settings: RowsConfig, part: Part) -> dict[str, int | bool | str]:
    """Returns the settings that a resumed run must not change."""
    names = ("seq_len", "max_input_images", "max_generated_images", "streams", "tokenized", "seed")
    sizes = {f"records of {leaf.name}": len(leaf.source) for leaf in part.leaves()}
    weights = {f"weight of {node.name}": node.weight for node in part.nodes() if node.name}
    return {**{name: getattr(settings, name) for name in names}, **sizes, **weights}
