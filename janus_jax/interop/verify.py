"""Compares a checkpoint in janus_jax with the same checkpoint in `transformers`.

This is what `python -m convert verify` runs. It is above `generation` in the order of imports.
"""

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from janus_jax.interop.config import TRANSFORMERS
from janus_jax.interop.export import export_folder
from janus_jax.interop.load import open_folder, param_shapes
from janus_jax.interop.verify_outputs import Greedy, Outputs, Request, compute_outputs
from janus_jax.paths import size_text

INSTALL = 'pip install "torch>=2.6" "transformers>=5.12,<6" (CPU builds are sufficient)'
PACKAGES = ("janus_jax", "jax", "transformers", "torch")

# Limits of the relative error, ||ours - reference|| / ||reference||: docs/verify.md has the
# measurements that they are chosen from.
FLOAT32_LIMIT = 1e-4
GUIDED_LIMIT = 3e-4  # guidance weight 5 amplifies the errors of two rows up to 9 times
BFLOAT16_FACTOR = 1.5  # times the error of transformers in bfloat16
EQUAL_INDICES = 0.99  # share of the image's VQ tokens

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    section: "preprocessing" or the dtype.
    largest: largest absolute difference. relative: ||ours - reference|| / ||reference||.
    torch: `relative` of transformers in bfloat16, where it decides the limit.
    limit: of `relative`.
    note: about tokens.
    """

    section: str
    name: str
    largest: float
    relative: float
    torch: float | None
    limit: float
    note: str
    passed: bool


@dataclasses.dataclass(frozen=True)
class Options:
    """See `python -m convert verify --help`.

    image: RGB. num_image_tokens: at most; a model may have fewer.
    """

    image: Image.Image
    question: str
    prompt: str
    max_new_tokens: int
    num_image_tokens: int
    dtypes: Sequence[str]


def check_installed() -> None:
    """Raises ModuleNotFoundError, with what to install, without torch or transformers."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ModuleNotFoundError(
            f"verify needs torch and transformers: {INSTALL}; importing them failed: {error}"
        ) from error


def builtin_image() -> Image.Image:
    """640 x 480 pixels: colour gradients, a red disc, a blue square and stripes."""
    y, x = np.mgrid[:480, :640]
    pixels = np.stack([x * 255 // 639, y * 255 // 479, (x + y) * 255 // 1118], axis=-1)
    pixels[(x - 200) ** 2 + (y - 220) ** 2 < 110**2] = (220, 30, 30)
    pixels[(abs(x - 450) < 90) & (abs(y - 260) < 90)] = (30, 60, 220)
    pixels[(y > 420) & (x // 16 % 2 == 0)] = (250, 250, 250)
    return Image.fromarray(pixels.astype(np.uint8))


def fit_image(image: Image.Image, size: int) -> tuple[Image.Image, bool]:
    """The image, cropped to its centre square if its sides would be resized differently.

    DeepSeek's code truncates the resized sides to integers, and janus_jax does the same;
    `transformers` rounds them.

    Returns:
      The image, and whether it was cropped.
    """
    scaled = [side / max(image.size) * size for side in image.size]
    if [int(side) for side in scaled] == [round(side) for side in scaled]:
        return image, False
    side = min(image.size)
    left, top = ((full - side) // 2 for full in image.size)
    return image.crop((left, top, left + side, top + side)), True


def check_reference(reference: Path | None) -> None:
    """Raises ValueError for a folder that `transformers` cannot load."""
    opened = None if reference is None else open_folder(reference)
    if opened is not None and (opened.orbax or opened.layout != TRANSFORMERS):
        kind = "an Orbax folder" if opened.orbax else f"the layout of {opened.layout}"
        raise ValueError(
            f"--reference {reference} must be PyTorch weights in the layout of transformers, got "
            f"{kind}; `convert export --layout transformers` writes such a folder"
        )


@contextmanager
def reference_folder(folder: Path, reference: Path | None, report: Report) -> Iterator[Path]:
    """A folder that `transformers` can load: `reference`, `folder` itself, or a temporary export.

    Raises:
      ValueError: `folder` cannot be exported.
    """
    if reference is not None:
        yield reference
        return
    opened = open_folder(folder)
    if opened.layout == TRANSFORMERS and not opened.orbax:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="janus_verify_") as temporary:
        target = Path(temporary) / folder.name
        kind = "Orbax folder" if opened.orbax else f"{opened.layout} layout"
        report(f"{folder} ({kind}) is exported to the layout of transformers in {target}")
        export_folder(folder, target, TRANSFORMERS, overwrite=False)
        yield target


def memory_text(folder: Path) -> str:
    """An estimate of the host memory that a comparison needs."""
    number = sum(math.prod(shape) for shape in param_shapes(open_folder(folder).cfg).values())
    return (
        f"host memory: about {size_text(4 * number)} for {number:,} parameters in float32, and up "
        "to 4 GB for activations at full size; one model is in memory at a time, and a check of "
        "bfloat16 needs float32, too"
    )


def verify(
    folder: Path, reference: Path | None, options: Options, report: Report
) -> list[Row]:
    """Compares a folder with a reference; torch runs first, and its models are freed.

    Args:
      folder: a checkpoint in any layout.
      reference: the folder that `transformers` loads, in its layout; None is `folder` itself or its
        export.
      report: called with each step before it runs.

    Raises:
      FileNotFoundError, ValueError: a folder cannot be read.
    """
    cfg = open_folder(folder).cfg
    image, cropped = fit_image(options.image, cfg.image_size)
    if cropped:
        report("the image is cropped to its centre square (see docs/verify.md)")
    num_image_tokens = min(options.num_image_tokens, cfg.num_image_tokens)
    request = Request(
        image, options.question, options.prompt, options.max_new_tokens, num_image_tokens
    )
    with reference_folder(folder, reference, report) as torch_folder:
        exact = _run_torch(torch_folder, "float32", request, None, report)
        rough = None
        if "bfloat16" in options.dtypes:
            rough = _run_torch(torch_folder, "bfloat16", request, exact, report)
    rows = []
    for dtype in options.dtypes:
        ours = _run_jax(folder, dtype, request, exact, report)
        if not rows:
            rows = compare_prepared(ours, exact)
        rows += compare(dtype, ours, exact, rough if dtype == "bfloat16" else None)
    return rows


def _run_torch(folder, dtype: str, request: Request, exact: Outputs | None, report) -> Outputs:
    import torch

    from janus_jax.interop.verify_torch import TorchJanus

    report(f"transformers, {dtype}: loading")
    with torch.inference_mode():
        model = TorchJanus(folder, dtype)
        with_vq = exact is None  # no limit is derived from an image tokenizer in bfloat16
        outputs = compute_outputs(
            model, request, exact, lambda step: report(f"transformers, {dtype}: {step}"), with_vq
        )
    del model
    gc.collect()
    return outputs


def _run_jax(folder, dtype: str, request: Request, exact: Outputs, report) -> Outputs:
    from janus_jax.interop.verify_jax import JaxJanus

    report(f"janus_jax, {dtype}: loading")
    model = JaxJanus(folder, dtype)
    outputs = compute_outputs(
        model, request, exact, lambda step: report(f"janus_jax, {dtype}: {step}")
    )
    del model
    gc.collect()
    return outputs


def difference(ours: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """The largest absolute difference, and ||ours - reference|| / ||reference||.

    Both are infinite if the shapes differ, and NaN if a value is.
    """
    if ours.shape != reference.shape:
        return math.inf, math.inf
    change = ours.astype(np.float64) - reference
    norm = max(float(np.linalg.norm(reference.astype(np.float64))), 1e-30)
    return float(np.abs(change).max()), float(np.linalg.norm(change)) / norm


def first_difference(ours: np.ndarray, reference: np.ndarray) -> int | None:
    """The first position at which two rows of tokens differ, in length or value; None if equal."""
    common = min(len(ours), len(reference))
    differing = np.flatnonzero(ours[:common] != reference[:common])
    if len(differing):
        return int(differing[0])
    return None if len(ours) == len(reference) else common


def compare_prepared(ours: Outputs, exact: Outputs) -> list[Row]:
    """The rows of preprocessing: tokens must be equal."""
    section, rows = "preprocessing", []
    for name, field in (("question tokens", "tokens"), ("image prompt tokens", "image_prompt")):
        own, expected = (getattr(outputs.prepared, field) for outputs in (ours, exact))
        position = first_difference(own, expected)
        note = _tokens_note(position, len(expected))
        error = 0.0 if position is None else math.inf
        rows.append(Row(section, name, error, error, None, 0.0, note, position is None))
    errors = difference(ours.prepared.pixels, exact.prepared.pixels)
    return [*rows, _row(section, "pixel values", errors, None, FLOAT32_LIMIT)]


def compare(dtype: str, ours: Outputs, exact: Outputs, rough: Outputs | None) -> list[Row]:
    """The rows of a dtype.

    exact: transformers in float32. rough: transformers in bfloat16, if `ours` is in bfloat16.
    """
    rows = []
    for name, field in (
        ("SigLIP features", "features"),
        ("aligned features", "aligned"),
        ("text logits", "text_logits"),
        ("image-token logits", "image_logits"),
    ):
        errors = difference(getattr(ours, field), getattr(exact, field))
        torch = None
        if rough is not None:
            torch = difference(getattr(rough, field), getattr(exact, field))[1]
        rows.append(_row(dtype, name, errors, torch, FLOAT32_LIMIT))
    rows[2:2] = _compare_vq(dtype, ours, exact)
    for name, field, limit in (
        ("greedy answer", "answer", FLOAT32_LIMIT),
        ("greedy image tokens", "image", GUIDED_LIMIT),
    ):
        expected = getattr(exact, field)
        errors, position = _greedy_difference(getattr(ours, field), expected)
        torch = None
        if rough is not None:
            torch = _greedy_difference(getattr(rough, field), expected)[0][1]
        note = _tokens_note(position, len(expected.tokens))
        rows.append(_row(dtype, name, errors, torch, limit, note))
    return rows


def _compare_vq(dtype: str, ours: Outputs, exact: Outputs) -> list[Row]:
    """The image tokenizer, which janus_jax computes in float32 with either dtype."""
    latents = difference(ours.latents, exact.latents)
    pixels = difference(ours.vq_pixels, exact.vq_pixels)
    equal = 0.0
    if ours.indices.shape == exact.indices.shape:
        equal = float(np.mean(ours.indices == exact.indices))
    note = f"{equal:.1%} of {exact.indices.size} equal, limit {EQUAL_INDICES:.0%}"
    passed, unequal = equal >= EQUAL_INDICES, 1 - equal
    tokens = Row(dtype, "VQ tokens", math.nan, unequal, None, 1 - EQUAL_INDICES, note, passed)
    return [
        _row(dtype, "VQ latents", latents, None, FLOAT32_LIMIT),
        tokens,
        _row(dtype, "VQ pixels", pixels, None, FLOAT32_LIMIT),
    ]


def _greedy_difference(ours: Greedy, exact: Greedy) -> tuple[tuple[float, float], int | None]:
    """Differences of the logits up to the first token that differs, and the token's position.

    Up to there both have read the same tokens. Where the logits agree within the limit, another
    token can only be chosen if two logits are nearly equal.
    """
    position = first_difference(ours.tokens, exact.tokens)
    end = min(len(ours.tokens), len(exact.tokens))
    end = end if position is None else min(end, position + 1)
    return difference(ours.logits[:end], exact.logits[:end]), position


def _tokens_note(position: int | None, number: int) -> str:
    if position is None:
        return f"all {number} equal"
    return f"first difference at token {position + 1} of {number}"


def _row(section, name: str, errors, torch: float | None, least: float, note: str = "") -> Row:
    """least: the limit, which may be exceeded if transformers in bfloat16 exceeds it."""
    largest, relative = errors
    limit = least if torch is None else max(least, BFLOAT16_FACTOR * torch)
    # a comparison with NaN is False
    return Row(section, name, largest, relative, torch, limit, note, relative <= limit)


def versions() -> str:
    """Names and versions of the packages that are compared."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # a clone on the path
            found.append(name)
    return ", ".join(found)


def table(rows: Sequence[Row]) -> list[str]:
    """The lines of the table, and whether all rows passed."""
    names = ("", "largest", "relative", "torch bf16", "limit", "result")
    lines, section = ["{:22}{:>10}{:>10}{:>12}{:>10}  {}".format(*names)], None
    for row in rows:
        if row.section != section:
            lines.append(row.section)
            section = row.section
        numbers = [_number(x) for x in (row.largest, row.relative, row.torch, row.limit)]
        result = "ok" if row.passed else "FAILED"
        cells = "  {:20}{:>10}{:>10}{:>12}{:>10}  {:6}".format(row.name, *numbers, result)
        lines.append(f"{cells}  {row.note}".rstrip())
    return [*lines, verdict(rows)]


def _number(x: float | None) -> str:
    return "" if x is None or math.isnan(x) else f"{x:.1e}"


def verdict(rows: Sequence[Row]) -> str:
    """Which rows failed, in one line."""
    failed = [f"{row.name} ({row.section})" for row in rows if not row.passed]
    if not failed:
        return f"all {len(rows)} rows are within their limits"
    return f"{len(failed)} of {len(rows)} rows exceed their limits: {', '.join(failed)}"
