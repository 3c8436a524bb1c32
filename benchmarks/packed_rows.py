"""Packed rows of random examples, in the ratio of a stage, without records or a tokenizer."""

from collections.abc import Iterator, Mapping

import numpy as np

from janus_jax.data.packing import Field
from janus_jax.data.records import KINDS
from janus_jax.families.family import Sizes

TEXT = (8, 120)  # lowest and highest number of text tokens of a question, an answer or a caption
PLAIN_TEXT = (100, 1500)  # and of an example of plain text


def random_rows(
    fields: Mapping[str, Field], sizes: Sizes, batch_size: int, ratio: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Returns the arrays of a batch of rows (data/packing.py), filled with random examples.

    fields: shapes and dtypes of a row. sizes: of the model. ratio: of the kinds of examples; each
    row is filled until the next example does not fit.

    Raises:
        ValueError: the first example of a row does not fit.
    """
    rng = np.random.default_rng(0)
    rows = {
        name: np.zeros((batch_size, *field.shape), field.dtype) for name, field in fields.items()
    }
    rows["tokens"][:] = rng.integers(1, sizes.vocab_size, rows["tokens"].shape)
    rows["generated"][:] = rng.integers(0, sizes.codebook_size, rows["generated"].shape)
    rows["pixels"][:] = rng.integers(0, 256, rows["pixels"].shape)
    for row in range(batch_size):
        _fill({name: values[row] for name, values in rows.items()}, sizes, ratio, rng)
    if not rows["segment_ids"].any(axis=1).all():
        length = rows["tokens"].shape[1]
        longest = max(PLAIN_TEXT[1], 2 * TEXT[1] + sizes.input_image_tokens)
        raise ValueError(
            f"expected a seq_len that fits an example, got {length}; {longest} fits every example"
        )
    return rows


def _fill(row: Mapping[str, np.ndarray], sizes: Sizes, ratio, rng: np.random.Generator) -> None:
    """Fills the masks, numbers and positions of one row in place."""
    start, counts = 0, dict(image_mask=0, gen_mask=0)
    limits = dict(image_mask=len(row["pixels"]), gen_mask=len(row["generated"]))
    for segment, (kind, parts) in enumerate(_examples(sizes, ratio, rng), 1):
        end = start + sum(length for _, length in parts)
        images = [mask for mask, _ in parts if mask in limits]
        if end > len(row["tokens"]) or any(counts[mask] >= limits[mask] for mask in images):
            return
        row["segment_ids"][start:end] = segment
        row["positions"][start:end] = np.arange(end - start)
        row["kind"][start:end] = KINDS.index(kind)
        for mask, length in parts:
            if mask is not None:
                row[mask][start : start + length] = True
            if mask in counts:
                counts[mask] += 1
            start += length


def _examples(
    sizes: Sizes, ratio, rng: np.random.Generator
) -> Iterator[tuple[str, list[tuple[str | None, int]]]]:
    """Yields the kinds of endless examples, and their parts: the mask that is True, the length."""

    def text(low: int, high: int) -> int:
        return int(rng.integers(low, high))

    kinds, weights = list(ratio), np.array(list(ratio.values())) / sum(ratio.values())
    while True:
        kind = str(rng.choice(kinds, p=weights))
        if kind == "text":
            yield kind, [(None, 1), ("loss_mask", text(*PLAIN_TEXT))]
        elif kind == "understanding":
            image = ("image_mask", sizes.input_image_tokens)
            yield kind, [image, (None, text(*TEXT)), ("loss_mask", text(*TEXT))]
        else:
            yield kind, [(None, text(*TEXT)), ("gen_mask", sizes.generated_image_tokens)]
