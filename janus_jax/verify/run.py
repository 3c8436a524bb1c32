"""Compares a checkpoint in janus_jax with the same checkpoint in `transformers`."""

import dataclasses
import gc
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import numpy as np
from PIL import Image

from janus_jax.families.family import TRANSFORMERS
from janus_jax.interop.convert import export_folder
from janus_jax.interop.load import open_folder, param_shapes
from janus_jax.paths import size_text
from janus_jax.verify.outputs import Outputs, Request, compute_outputs
from janus_jax.verify.table import Comparison, compare_models, compare_preprocessing

INSTALL = 'pip install torch "transformers>=5.12,<6" (a CPU build of torch is enough)'
PACKAGES = ("janus_jax", "jax", "transformers", "torch")

Notify = Callable[[str], None]  # is called with the name of each step before it runs


def check_installed() -> None:
    """Raises ImportError with the install command if torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"verify needs torch and transformers: {INSTALL}; the import failed: {error}"
        ) from error


def builtin_image() -> Image.Image:
    """Returns 640 x 480 pixels: color gradients, a red disc, a blue square and stripes."""
    y, x = np.mgrid[:480, :640]
    pixels = np.stack([x * 255 // 639, y * 255 // 479, (x + y) * 255 // 1118], axis=-1)
    pixels[(x - 200) ** 2 + (y - 220) ** 2 < 110**2] = (220, 30, 30)
    pixels[(abs(x - 450) < 90) & (abs(y - 260) < 90)] = (30, 60, 220)
    pixels[(y > 420) & (x // 16 % 2 == 0)] = (250, 250, 250)
    return Image.fromarray(pixels.astype(np.uint8))


def fit_image(image: Image.Image, size: int) -> Image.Image:
    """Crops an image to its center square if the implementations would resize it differently.

    DeepSeek's code and janus_jax truncate the sides of the resized image to integers, and
    `transformers` rounds them. All other images are returned unchanged.

    size: pixels a side of the model's input.
    """
    sides = [side / max(image.size) * size for side in image.size]
    if [int(side) for side in sides] == [round(side) for side in sides]:
        return image
    short = min(image.size)
    left, top = ((side - short) // 2 for side in image.size)
    return image.crop((left, top, left + short, top + short))


def check_reference(reference: Path | None) -> None:
    """Raises ValueError if `transformers` cannot load the folder; None is accepted."""
    folder = None if reference is None else open_folder(reference)
    if folder is not None and (folder.is_orbax or folder.layout != TRANSFORMERS):
        kind = "an Orbax folder" if folder.is_orbax else f"the layout of {folder.layout}"
        raise ValueError(
            f"--reference {reference} must be PyTorch weights in the layout of transformers, got "
            f"{kind}; `convert export --layout transformers` writes such a folder"
        )


@contextmanager
def _reference_folder(model: Path, reference: Path | None, report: Notify) -> Iterator[Path]:
    """Yields a folder that `transformers` can load: `reference`, `model` or a temporary export.

    Raises:
      ValueError: the layout of transformers cannot express the model.
    """
    folder = open_folder(model)
    if reference is not None:
        yield reference
    elif folder.layout == TRANSFORMERS and not folder.is_orbax:
        yield model
    else:
        with tempfile.TemporaryDirectory(prefix="janus_verify_") as temporary:
            target = Path(temporary) / model.name
            kind = "Orbax weights" if folder.is_orbax else f"{folder.layout} layout"
            report(f"exporting {model} ({kind}) to the layout of transformers in {target}")
            export_folder(model, target, TRANSFORMERS, overwrite=False)
            yield target


def memory_text(model: Path) -> str:
    """Returns an estimate of the host memory that verification needs."""
    number = sum(math.prod(shape) for shape in param_shapes(open_folder(model).cfg).values())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (
        f"host memory: needs about {size_text(4 * number)} for {number:,} parameters in float32, "
        f"and up to 4 GB more at full size; this host has {size_text(total)}"
    )


def verify(
    model: Path, reference: Path | None, request: Request, dtypes: Sequence[str], report: Notify
) -> list[Comparison]:
    """Compares a folder with a reference, with one model in memory at a time.

    Args:
      model: a checkpoint folder in any layout.
      reference: the folder that `transformers` loads, in its layout. None uses `model` or an export
        of it.
      request: what both compute; at most all tokens of an image are generated.
      dtypes: of "float32" and "bfloat16".
      report: is called with the name of each step before it runs.

    Raises:
      FileNotFoundError, ValueError: a folder cannot be loaded, or an implementation failed.
    """
    cfg = open_folder(model).cfg
    image = fit_image(request.image, cfg.image_size)
    if image is not request.image:
        report("cropping the image to its center square (see docs/verify.md)")
    num_image_tokens = min(request.num_image_tokens, cfg.num_image_tokens)
    request = dataclasses.replace(request, image=image, num_image_tokens=num_image_tokens)
    baseline = None
    with _reference_folder(model, reference, report) as folder:
        expected = _run("transformers", folder, "float32", request, None, report)
        if "bfloat16" in dtypes:
            baseline = _run("transformers", folder, "bfloat16", request, expected, report)
    rows = []
    for dtype in dtypes:
        actual = _run("janus_jax", model, dtype, request, expected, report)
        rows = rows or compare_preprocessing(actual, expected)
        rows += compare_models(dtype, actual, expected, baseline if dtype == "bfloat16" else None)
    return rows


def _run(
    package: str,
    folder: Path,
    dtype: str,
    request: Request,
    reference: Outputs | None,
    report: Notify,
) -> Outputs:
    """Loads a model, computes its outputs and frees it.

    Raises:
      ValueError: for any exception of the package, so that the exit status is not 1.
    """
    if package == "transformers":
        from janus_jax.verify.torch_model import TorchJanus as Implementation
    else:
        from janus_jax.verify.jax_model import JaxJanus as Implementation
    # janus_jax always computes the image tokenizer in float32, so bfloat16 needs no baseline.
    with_vq = package == "janus_jax" or dtype == "float32"
    report(f"{package}, {dtype}: loading")
    try:
        model = Implementation(folder, dtype)
        return compute_outputs(
            model, request, reference, lambda step: report(f"{package}, {dtype}: {step}"), with_vq
        )
    except (ValueError, OSError, MemoryError):
        raise
    except Exception as error:
        text = f"{package} failed with {type(error).__name__}: {error}"
        raise ValueError(text) from error
    finally:
        model = None
        gc.collect()


def versions() -> str:
    """Returns the names and versions of the packages that are compared."""
    names = []
    for name in PACKAGES:
        try:
            names.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:  # a clone that is not installed
            names.append(name)
    return ", ".join(names)
