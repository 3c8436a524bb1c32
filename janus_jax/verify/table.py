"""The table of `python -m convert verify`: differences between two implementations, and limits."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from janus_jax.verify.outputs import Greedy, Outputs

# Limits of the relative error ||x - reference|| / ||reference||, where the reference is
# transformers in float32. docs/verify.md has the measurements that they are based on.
FLOAT32_LIMIT = 1e-4
GUIDED_LIMIT = 3e-4  # guidance weight 5 can amplify the errors of the two rows up to 9 times
BFLOAT16_FACTOR = 1.5  # times the error of transformers in bfloat16
GREEDY_FACTOR = 2.0  # the same for generated tokens: their error has more noise (few positions)
MIN_EQUAL_INDICES = 0.99  # share of the VQ tokens

PREPROCESSING = "preprocessing"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row of the table.

    Attributes:
      section: PREPROCESSING or a dtype.
      max_abs: largest absolute difference; NaN if it does not apply.
      relative: ||janus_jax - reference|| / ||reference||; for VQ tokens the share that differs.
      torch_bfloat16: `relative` of transformers in bfloat16, if the limit depends on it.
      limit: largest `relative` that passes.
      note: which tokens are equal.
    """

    section: str
    name: str
    max_abs: float
    relative: float
    torch_bfloat16: float | None
    limit: float
    note: str
    passed: bool


def difference(actual: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Returns the largest absolute difference and the relative error.

    Both are infinite if the shapes differ, and NaN if a value is NaN or infinite.
    """
    if actual.shape != reference.shape:
        return math.inf, math.inf
    error = actual.astype(np.float64) - reference
    norm = max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30)
    return float(np.abs(error).max()), float(np.linalg.norm(error)) / norm


def first_difference(actual: np.ndarray, reference: np.ndarray) -> int | None:
    """Returns the first position at which two token sequences differ; None if they are equal.

    If one sequence is a prefix of the other, this is the length of the shorter one.
    """
    common = min(len(actual), len(reference))
    positions = np.flatnonzero(actual[:common] != reference[:common])
    if len(positions):
        return int(positions[0])
    return None if len(actual) == len(reference) else common


def greedy_difference(actual: Greedy, reference: Greedy) -> tuple[float, float]:
    """Returns `difference` of the logits up to and including the first token that differs.

    Both models have read the same tokens up to there, so these logits are comparable. If they agree
    within the limit, different tokens mean that two logits were nearly equal.
    """
    end = min(len(actual.tokens), len(reference.tokens))
    position = first_difference(actual.tokens, reference.tokens)
    if position is not None:
        end = min(end, position + 1)
    return difference(actual.logits[:end], reference.logits[:end])


def _make_row(
    section: str,
    name: str,
    errors: tuple[float, float],
    torch_bfloat16: float | None = None,
    min_limit: float = FLOAT32_LIMIT,
    factor: float = BFLOAT16_FACTOR,
    note: str = "",
) -> Comparison:
    """Returns a row whose limit is the larger of `min_limit` and `factor` * `torch_bfloat16`."""
    max_abs, relative = errors
    limit = min_limit
    if torch_bfloat16 is not None:
        limit = max(limit, factor * torch_bfloat16)
    passed = relative <= limit  # False if it is NaN
    return Comparison(section, name, max_abs, relative, torch_bfloat16, limit, note, passed)


def _tokens_note(actual: np.ndarray, reference: np.ndarray) -> str:
    position = first_difference(actual, reference)
    if position is None:
        return f"all {len(reference)} equal"
    common = min(len(actual), len(reference))
    equal = np.sum(actual[:common] == reference[:common]) / max(len(actual), len(reference))
    return f"{equal:.0%} equal, first difference at token {position + 1} of {len(reference)}"


def compare_preprocessing(actual: Outputs, reference: Outputs) -> list[Comparison]:
    """Compares prompt tokens, which must be equal, and pixel values."""
    rows = []
    for name, field in (("question tokens", "tokens"), ("image prompt tokens", "image_prompt")):
        pair = getattr(actual.prepared, field), getattr(reference.prepared, field)
        error = 0.0 if first_difference(*pair) is None else math.inf
        note = _tokens_note(*pair)
        rows.append(_make_row(PREPROCESSING, name, (error, error), min_limit=0.0, note=note))
    errors = difference(actual.prepared.pixels, reference.prepared.pixels)
    return [*rows, _make_row(PREPROCESSING, "pixel values", errors)]


def compare_models(
    dtype: str, actual: Outputs, reference: Outputs, baseline: Outputs | None
) -> list[Comparison]:
    """Compares the outputs of a dtype.

    Args:
      actual: janus_jax in this dtype.
      reference: transformers in float32.
      baseline: transformers in bfloat16, if the dtype is bfloat16.
    """

    def compare_field(name: str, field: str) -> Comparison:
        expected = getattr(reference, field)
        errors = difference(getattr(actual, field), expected)
        if baseline is None:
            return _make_row(dtype, name, errors)
        return _make_row(dtype, name, errors, difference(getattr(baseline, field), expected)[1])

    def compare_greedy(name: str, field: str, logits: Comparison, min_limit: float) -> Comparison:
        generated, expected = getattr(actual, field), getattr(reference, field)
        errors, torch_error = greedy_difference(generated, expected), None
        if baseline is not None:
            torch_error = greedy_difference(getattr(baseline, field), expected)[1]
            torch_error = max(torch_error, logits.torch_bfloat16)
        note = _tokens_note(generated.tokens, expected.tokens)
        return _make_row(dtype, name, errors, torch_error, min_limit, GREEDY_FACTOR, note)

    text_logits = compare_field("text logits", "text_logits")
    image_logits = compare_field("image-token logits", "image_logits")
    return [
        compare_field("SigLIP features", "features"),
        compare_field("aligned features", "aligned"),
        *_compare_vq(dtype, actual, reference),
        text_logits,
        image_logits,
        compare_greedy("greedy answer", "answer", text_logits, FLOAT32_LIMIT),
        compare_greedy("greedy image tokens", "image", image_logits, GUIDED_LIMIT),
    ]


def _compare_vq(dtype: str, actual: Outputs, reference: Outputs) -> list[Comparison]:
    """Compares the image tokenizer, which janus_jax computes in float32 with either dtype."""
    share = 0.0
    if actual.indices.shape == reference.indices.shape:
        share = float(np.mean(actual.indices == reference.indices))
    limit = 1 - MIN_EQUAL_INDICES
    note = f"{share:.1%} of {reference.indices.size} equal"
    passed = share >= MIN_EQUAL_INDICES
    return [
        _make_row(dtype, "VQ latents", difference(actual.latents, reference.latents)),
        Comparison(dtype, "VQ tokens", math.nan, 1 - share, None, limit, note, passed),
        _make_row(dtype, "VQ pixels", difference(actual.vq_pixels, reference.vq_pixels)),
    ]


def format_table(rows: Sequence[Comparison]) -> list[str]:
    """Returns the lines of the table; the last line states whether all rows passed."""
    names = ("", "max abs", "relative", "torch bf16", "limit", "result")
    lines, section = ["{:22}{:>10}{:>10}{:>12}{:>10}  {}".format(*names)], None
    for row in rows:
        if row.section != section:
            section = row.section
            lines.append(section)
        columns = (row.max_abs, row.relative, row.torch_bfloat16, row.limit)
        numbers = "{:>10}{:>10}{:>12}{:>10}".format(*map(_format_number, columns))
        result = "ok" if row.passed else "FAILED"
        lines.append(f"  {row.name:20}{numbers}  {result:6}  {row.note}".rstrip())
    return [*lines, _summary(rows)]


def _format_number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.1e}"


def _summary(rows: Sequence[Comparison]) -> str:
    failed = [f"{row.name} ({row.section})" for row in rows if not row.passed]
    if not failed:
        return f"all {len(rows)} rows are within their limits"
    return f"{len(failed)} of {len(rows)} rows exceed their limits: {', '.join(failed)}"
