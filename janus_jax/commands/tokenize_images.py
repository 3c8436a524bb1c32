"""python -m janus_jax.commands.tokenize_images: precomputes the tokens of images to generate.

Training on precomputed tokens does not run the image tokenizer. Every generation record is written
with `indices` in place of its image. Other records, and those that already have indices, are
copied.

The output is a folder of shards with the same number of source records each (for class_folder, a
folder of files named after the numbers of the records). For each finished shard there is a report
in the folder .tokenize_images, and an interrupted run resumes after the last one. Skipped records
are listed in that folder, too.
"""

import argparse
import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from janus_jax import checks
from janus_jax.commands.shards import Shards, SkippedEntry, by_reason
from janus_jax.commands.terminal import (
    OneLineParser,
    Progress,
    device_memory_errors,
    one_line_errors,
    set_up_program,
)
from janus_jax.data.reading import Source, prepare_image
from janus_jax.data.records import BadRecord, Record
from janus_jax.data.skipped import too_many, too_many_error
from janus_jax.data.sources import open_source
from janus_jax.processing.images import preprocess_generation
from janus_jax.shapes.source import ALL_FORMATS

if TYPE_CHECKING:
    from janus_jax.models.vq import VQ

_THREADS = 16  # threads that read and decode images while the device encodes others

_EXAMPLE = """example:
  python -m janus_jax.commands.tokenize_images --model deepseek-ai/Janus-Pro-1B \\
      --source tar:photos --output arrayrecord:photos_tokens
"""


def _parser() -> OneLineParser:
    parser = OneLineParser(
        "tokenize_images",
        prog="python -m janus_jax.commands.tokenize_images",
        description="Replace the images of generation records by their tokens. "
        "To resume an interrupted run, run the same command again.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, formats = parser.add_argument, ", ".join(ALL_FORMATS)
    location = dict(required=True, type=_format_and_path)
    add("--model", required=True, metavar="PATH", help="checkpoint folder or Hugging Face hub id")
    source_help = f"records to read; FORMAT is one of {formats}"
    add("--source", **location, metavar="FORMAT:PATH", help=source_help)
    output_help = "folder to write the records with tokens to; FORMAT as above except scenes"
    add("--output", **location, metavar="FORMAT:FOLDER", help=output_help)
    batch_help = "number of images to encode at once (default: 64)"
    add("--batch_size", type=int, default=64, metavar="N", help=batch_help)
    shard_help = "number of source records per shard (default: 1000)"
    add("--shard_size", type=int, default=1000, metavar="N", help=shard_help)
    max_bad_help = "maximum fraction of the records that may be skipped (default: 0.05)"
    add("--max_bad", type=float, default=0.05, metavar="FRACTION", help=max_bad_help)
    root_help = "folder that image paths are relative to (jsonl; default: that of the file)"
    add("--image_root", metavar="FOLDER", help=root_help)
    names_help = 'text file with lines "FOLDER NAME, ..." (class_folder; default: folder names)'
    add("--class_names", metavar="FILE", help=names_help)
    add("--count", type=int, metavar="N", help="number of records (scenes; default: 100000)")
    add("--seed", type=int, metavar="N", help="random seed (scenes; default: 0)")
    return parser


def _format_and_path(text: str) -> tuple[str, Path]:
    format, colon, path = text.partition(":")
    if not (format in ALL_FORMATS and colon and path):
        rule = f"must be FORMAT:PATH, with FORMAT one of {', '.join(ALL_FORMATS)}"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    return format, Path(path)


class ImageEncoder:
    """Encodes images in batches: add them one by one, then get all tokens at once.

    All batches have the same size, so one program is compiled. The next batch is collected while
    the device encodes the previous one.
    """

    def __init__(self, vq: "VQ", image_size: int, batch_size: int):
        self.image_size = image_size
        self._vq, self._batch_size = vq, batch_size
        self._pending: list[np.ndarray] = []
        self._encoded: list[Any] = []

    def add(self, pixels: np.ndarray) -> None:
        """Adds an image, float32[S, S, 3] in [-1, 1]."""
        self._pending.append(pixels)
        if len(self._pending) == self._batch_size:
            self._encode()

    def finish(self) -> np.ndarray:
        """Returns the tokens of all images added since the last call, int32[N, T], in order.

        Raises ValueError if latents of the image tokenizer are NaN or infinite.
        """
        from janus_jax.generation.codec import check_encoded

        number = len(self._encoded) * self._batch_size + len(self._pending)
        if self._pending:
            self._encode()
        encoded, self._encoded = self._encoded, []
        indices = np.concatenate([np.asarray(part) for part in encoded] or [[]])[:number]
        return check_encoded(indices, self._vq)

    def _encode(self) -> None:
        from janus_jax.generation.codec import encode_pixels

        if self._encoded:  # wait, so that batches do not queue up in memory
            self._encoded[-1].block_until_ready()
        shape = self._batch_size, self.image_size, self.image_size, 3
        batch = np.zeros(shape, np.float32)
        batch[: len(self._pending)] = self._pending
        self._pending = []
        self._encoded.append(encode_pixels(self._vq, batch))


def _read(
    source: Source, numbers: range, image_size: int
) -> Iterator[tuple[Record | BadRecord, np.ndarray | None]]:
    """Returns the records with these numbers, and the pixels of those that must be encoded."""
    import grain  # takes seconds to import

    prepare = functools.partial(preprocess_generation, size=image_size)

    def read(number: int) -> tuple[Record | BadRecord, np.ndarray | None]:
        record = source[number]
        if isinstance(record, BadRecord) or record.kind != "generation" or not record.images:
            return record, None
        try:
            return record, prepare_image(record.images[0], prepare)
        except BadRecord as bad:
            return BadRecord(bad.reason, bad.detail, record.where), None

    options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * _THREADS)
    dataset = grain.MapDataset.range(numbers.start, numbers.stop).map(read)
    return iter(dataset.to_iter_dataset(options))


def tokenize(
    source: Source, numbers: range, encoder: ImageEncoder
) -> tuple[list[Record], int, list[BadRecord]]:
    """Tokenizes the records with these numbers.

    Returns the records with tokens, the number of encoded images, and the skipped records.
    """
    records, encoded, bad = [], [], []  # encoded: positions in records
    for record, pixels in _read(source, numbers, encoder.image_size):
        if isinstance(record, BadRecord):
            bad.append(record)
            continue
        if pixels is not None:
            encoded.append(len(records))
            encoder.add(pixels)
        records.append(record)
    for position, indices in zip(encoded, encoder.finish(), strict=True):
        records[position] = dataclasses.replace(records[position], images=(), indices=indices)
    return records, len(encoded), bad


def _fingerprint(vq: "VQ") -> str:
    """Returns a hash of the parameters of an image tokenizer."""
    import jax

    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(vq):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:12]


def _source_options(args: argparse.Namespace) -> dict[str, str | int]:
    names = ("image_root", "class_names", "count", "seed")
    given = {name: getattr(args, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def run(args: argparse.Namespace) -> str:
    """Runs the command and returns a one-line summary."""
    from janus_jax import sharding
    from janus_jax.generation.loading import enable_compile_cache
    from janus_jax.interop.folders import find_folder
    from janus_jax.interop.load import load_component, open_folder

    sharding.check_devices()
    for name in ("batch_size", "shard_size"):
        checks.check_count(f"--{name}", getattr(args, name))
    if not 0 <= args.max_bad < 1:
        raise ValueError(f"--max_bad must be at least 0 and below 1, got {args.max_bad}")
    options = _source_options(args)
    format, path = args.source
    source = open_source(format, path, formats=ALL_FORMATS, **options)
    output = Shards(*args.output, args.shard_size)
    output.check()
    enable_compile_cache()
    model = open_folder(find_folder(args.model))
    vq = load_component(model, model.family.image_codec)
    manifest = {
        "model": f"{model.path.resolve().name} with the image tokenizer {_fingerprint(vq)}",
        "source": f"{format}:{path.resolve()}",
        "records": len(source),
        **options,
        "format": output.format,
        "shard_size": output.shard_size,
    }
    encoder = ImageEncoder(vq, model.sizes.image_size, args.batch_size)
    # The estimated time left ignores the first shard, which includes compilation.
    with output.lock(), Progress("tokenizing", " records", warm_up=1) as progress:
        output.start(manifest)
        return _tokenize_all(source, encoder, output, args.max_bad, progress)


def _tokenize_all(
    source: Source, encoder: ImageEncoder, output: Shards, max_bad: float, progress: Progress
) -> str:
    starts, skipped = range(0, len(source), output.shard_size), []
    for shard, start in enumerate(starts):
        numbers = range(start, min(start + output.shard_size, len(source)))
        if (report := output.report(shard)) is not None:
            skipped += report["skipped"]
            continue
        with device_memory_errors("while encoding; a smaller --batch_size needs less"):
            records, encoded, bad = tokenize(source, numbers, encoder)
        skipped += (entries := [_skipped_entry(record) for record in bad])
        _check_skipped(output, skipped, len(source), max_bad)
        output.write(shard, records, encoded, entries)
        progress(numbers.stop, len(source))
    _check_skipped(output, skipped, len(source), max_bad)
    return output.finish(len(starts), skipped)


def _skipped_entry(bad: BadRecord) -> SkippedEntry:
    return dict(record=bad.where, reason=bad.reason, detail=bad.detail)


def _check_skipped(
    output: Shards, skipped: Sequence[SkippedEntry], num_records: int, max_bad: float
) -> None:
    """Raises ValueError if more than max_bad of all records of the source are skipped.

    Unlike in training, the fraction among the records read so far does not matter: records are read
    in the order of the files, in which bad records are often adjacent, and skipping one is cheap.
    """
    if too_many(len(skipped), num_records, max_bad):
        population = f"the {num_records} records of --source"
        where = f"{output.list_skipped(skipped)}; repair them, or raise --max_bad"
        raise too_many_error(max_bad, by_reason(skipped), population, where)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. An error that a user can cause prints one line and exits with status 2."""
    args = _parser().parse_args(argv)
    with one_line_errors("tokenize_images"):
        print(run(args))


if __name__ == "__main__":
    set_up_program()
    main()
