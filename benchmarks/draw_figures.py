"""The figures of image generation, the same for all implementations, see benchmarks/draw.py."""

import statistics

from benchmarks.models import PROMPT_LENGTH, shapes, step_bytes
from benchmarks.records import spread
from janus_jax.models.janus import JanusConfig

GUIDANCE_WEIGHT, TEMPERATURE = 5.0, 1.0  # the defaults of the original code


def draw_shapes(cfg: JanusConfig, num_images: int) -> dict:
    """Returns the shapes of a run, for the record."""
    return shapes(
        cfg,
        decoder_rows=2 * num_images,
        prompt_tokens=PROMPT_LENGTH,
        image_tokens=cfg.num_image_tokens,
        image_size=cfg.image_size,
    )


def draw_figures(
    cfg: JanusConfig,
    num_images: int,
    first: float,
    seconds: list[float],
    step_seconds: list[float],
    bandwidth: float,
) -> dict:
    """Returns the figures that benchmarks/draw.py describes.

    first: seconds of the first run. seconds, step_seconds: of each further run, of all images and
    of a decode step. bandwidth: measured, in bytes/s.
    """
    filled = PROMPT_LENGTH + cfg.num_image_tokens / 2
    floor = step_bytes(cfg, "draw", 2 * num_images, filled) / bandwidth
    return dict(
        images_per_s=num_images / statistics.median(seconds),
        image_s=spread([value / num_images for value in seconds]),
        step_ms=spread([1e3 * value for value in step_seconds]),
        floor_ms=1e3 * floor,
        bandwidth_share=floor / statistics.median(step_seconds),
        copy_gb_s=bandwidth / 1e9,
        first_s=first,
    )
