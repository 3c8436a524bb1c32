"""Examples of unequal length -> rows of one length, several examples to a row.

T tokens of a row, n and m images looked at and generated.
"""

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset

BY_TOKEN = ("tokens", "image_mask", "gen_mask", "loss_mask", "kind")
OPEN_ROWS = 16  # rows that are filled at once: more waste less, and hold more images in memory


def packed(
    examples: grain.IterDataset,
    length: int,
    max_input_images: int,
    max_generated_images: int,
    pad_id: int,
    seed: int,
) -> grain.IterDataset:
    """Rows of the examples of ExampleMaker, each example whole and in one row.

    A row is a dict of
        tokens, segment_ids, positions: int32[T]. Examples of a row are numbered from 1, and 0 is
            padding; positions begin at 0 in each example.
        image_mask, gen_mask, loss_mask: bool[T]; kind: int8[T].
        pixels: uint8[n, S, S, 3], n = max_input_images.
        generated: [m, ...], m = max_generated_images. Both in the order of their places in the row,
            then zeros.
        records: list of str, the places of its examples' records.
    seed: of the order in which the open rows come out; the first of them are filled best, and by
        the longest examples.
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
    return rows.map(_named)


def efficiency(segment_ids: np.ndarray) -> float:
    """Part of int32[..., T] that is no padding."""
    return float(np.mean(segment_ids > 0))


def _named(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Grain's names to ours."""
    row["segment_ids"] = row.pop("tokens_segment_ids")
    row["positions"] = row.pop("tokens_positions")
    return row
