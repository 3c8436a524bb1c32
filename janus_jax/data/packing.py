"""Packs examples of different lengths into rows of one length, several examples per row.

Shapes: T tokens of a row, n images to understand and m images to generate, of S pixels a side or N
tokens.
"""

from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

NUMBERED = ("segment_ids", "positions")  # arrays that an example does not have
# Rows being filled at the same time. More rows waste fewer positions and use more memory.
OPEN_ROWS = 16


class Field(NamedTuple):
    """Shape and dtype of an array of a row."""

    shape: tuple[int, ...]
    dtype: type


def row_fields(
    length: int,
    max_input_images: int,
    max_generated_images: int,
    image_size: int,
    num_image_tokens: int | None,
) -> dict[str, Field]:
    """Returns the arrays of a row.

        tokens, segment_ids, positions: int32[T]. The examples of a row are numbered from 1; segment
            0 is padding. Positions start at 0 in each example.
        image_mask, gen_mask, loss_mask: bool[T], see ExampleMaker.
        kind: int8[T], the index of the kind of record in KINDS.
        pixels: uint8[n, S, S, 3], images to understand.
        generated: images to generate, uint8[m, S, S, 3], or their indices, int32[m, N].

    Images are in the order of their tokens in the row; unused entries are zero.

    Args:
        length: T.
        max_input_images: n.
        max_generated_images: m.
        image_size: S.
        num_image_tokens: N, or None if the images to generate are pixels.
    """
    by_token, image = (length,), (image_size, image_size, 3)
    generated = (max_generated_images, *image), np.uint8
    if num_image_tokens is not None:
        generated = (max_generated_images, num_image_tokens), np.int32
    return dict(
        tokens=Field(by_token, np.int32),
        segment_ids=Field(by_token, np.int32),
        positions=Field(by_token, np.int32),
        image_mask=Field(by_token, np.bool_),
        gen_mask=Field(by_token, np.bool_),
        loss_mask=Field(by_token, np.bool_),
        kind=Field(by_token, np.int8),
        pixels=Field((max_input_images, *image), np.uint8),
        generated=Field(*generated),
    )


def pack_examples(
    examples: grain.IterDataset,
    length: int,
    max_input_images: int,
    max_generated_images: int,
    pad_id: int,
    seed: int,
) -> grain.IterDataset:
    """Packs the examples of ExampleMaker into rows, without splitting an example.

    A row is a dict of the arrays of row_fields, and of `records`, a list of str with the location
    of each example's record.

    Args:
        examples: a stream of examples.
        length: T.
        max_input_images: n.
        max_generated_images: m.
        pad_id: token id of padding.
        seed: random seed for the order in which the open rows are returned. Without shuffling, the
            first of them would be the fullest and hold the longest examples.
    """
    fields = row_fields(length, max_input_images, max_generated_images, 0, None)
    # Grain numbers the examples itself
    lengths = {name: fields[name].shape[0] for name in fields if name not in NUMBERED}
    padding = {**dict.fromkeys(lengths, 0), "tokens": pad_id}
    rows = BestFitPackIterDataset(
        examples,
        length_struct=lengths,
        padding_struct=padding,
        num_packing_bins=OPEN_ROWS,
        meta_features=[*(name for name in lengths if name != "tokens"), "records"],
        shuffle_bins=True,
        seed=seed,
    )
    return rows.map(_rename_fields)


def efficiency(segment_ids: np.ndarray) -> float:
    """Returns the fraction of int32[..., T] that is not padding."""
    return float(np.mean(segment_ids > 0))


def _rename_fields(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Replaces Grain's field names by those of this project."""
    for name in NUMBERED:
        row[name] = row.pop(f"tokens_{name}")
    return row
