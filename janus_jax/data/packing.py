"""Packs examples of different lengths into rows of one length, several examples per row.

Shapes: T tokens of a row, n images to understand and m images to generate.
"""

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

BY_TOKEN = ("tokens", "image_mask", "gen_mask", "loss_mask", "kind")
# Rows being filled at the same time. More rows waste fewer positions and use more memory.
OPEN_ROWS = 16


def pack_examples(
    examples: grain.IterDataset,
    length: int,
    max_input_images: int,
    max_generated_images: int,
    pad_id: int,
    seed: int,
) -> grain.IterDataset:
    """Packs the examples of ExampleMaker into rows, without splitting an example.

    A row is a dict of
        tokens, segment_ids, positions: int32[T]. The examples of a row are numbered from 1; segment
            0 is padding. Positions start at 0 in each example.
        image_mask, gen_mask, loss_mask: bool[T].
        kind: int8[T].
        pixels: uint8[n, S, S, 3], n = max_input_images.
        generated: [m, ...], m = max_generated_images. Images of both arrays are in the order of
            their tokens in the row; unused entries are zero.
        records: list of str, the location of each example's record.

    Args:
        examples: a stream of examples.
        length: T.
        max_input_images: n.
        max_generated_images: m.
        pad_id: token id of padding.
        seed: random seed for the order in which the open rows are returned. Without shuffling, the
            first of them would be the fullest and hold the longest examples.
    """
    lengths = dict.fromkeys(BY_TOKEN, length)
    lengths |= dict(pixels=max_input_images, generated=max_generated_images)
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
    row["segment_ids"] = row.pop("tokens_segment_ids")
    row["positions"] = row.pop("tokens_positions")
    return row
