"""Measures image generation: seconds per image, and the share of the memory bandwidth.

    python -m benchmarks.draw --model janus_pro_7b --num_images 1 16 --output draw.json

Implementations:

janus_jax: what sample.py runs, with the token loop in a few jitted calls.
torch_eager: the algorithm of the original code in PyTorch, with modules of `transformers`: no
    compilation, and a cache that grows with every token (benchmarks/draw_torch.py).
torch_compiled: the same loop with a static cache, and with the decode step compiled by
    torch.compile(mode="reduce-overhead").

All use random weights, prompts of the same length, two decoder rows per image (guidance weight 5)
and temperature 1. The image tokenizer is float32 in janus_jax; in PyTorch it has the dtype of the
decoder, as in the original code. Times include the prefill, the decoding to pixels and the copy to
the host.

Figures:

images_per_s: images divided by the median seconds of a run.
image_s: seconds of a run divided by the number of images.
step_ms: milliseconds of a decode step in these runs, the mean over nearly all steps.
floor_ms: milliseconds to read what a decode step must read. Counts the weights once and the average
    filled cache, at the measured bandwidth. The weights are those of the decoder, the image head
    and the generation aligner.
bandwidth_share: floor_ms / step_ms.
copy_gb_s: the bandwidth of large copies on the device, bytes read and written, measured in the same
    process.
peak_gb: peak memory of the device in the process so far.
first_s: seconds of the warm-up run, which is not in the other figures. In janus_jax it is a whole
    run and includes the compilation; in PyTorch it is one of a few tokens, and in torch_compiled it
    includes the compilation.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import suite
from benchmarks.suite import DTYPES

MODELS = ("janus_pro_1b", "janus_pro_7b", "tiny")
TORCH = ("torch_eager", "torch_compiled")
IMPLEMENTATIONS = ("janus_jax", *TORCH)
RATE = "images_per_s"


def jax_measurement(
    model: str,
    num_images: Sequence[int],
    dtype: str = DTYPES[0],
    runs: int = 3,
    folder: Path | None = None,
    **limits: float,
) -> suite.Measurement:
    """Returns the measurement of janus_jax with one model.

    num_images: batch sizes. dtype: of the decoder. runs: of each batch size, after a first one.
    folder: where profiles are kept. limits: `seconds` and `least` of suite.Measurement.
    """
    settings = dict(model=model, num_images=list(num_images), dtype=dtype, runs=runs)
    return suite.Measurement(
        benchmark="draw",
        module="benchmarks.draw_jax",
        settings=settings | dict(folder=folder and str(folder)),
        cases=[case(model, dtype, number, "janus_jax") for number in num_images],
        **limits,
    )


def torch_measurement(
    model: str,
    num_images: Sequence[int],
    implementations: Sequence[str] = TORCH,
    dtype: str = DTYPES[0],
    runs: int = 3,
    backend: str = "inductor",
    **limits: float,
) -> suite.Measurement:
    """Returns the measurement of PyTorch with one model; its implementations share a process.

    backend: of torch.compile. The others are those of jax_measurement.
    """
    settings = dict(model=model, num_images=list(num_images), dtype=dtype, runs=runs)
    return suite.Measurement(
        benchmark="draw",
        module="benchmarks.draw_torch",
        settings=settings | dict(implementations=list(implementations), backend=backend),
        cases=[
            case(model, dtype, number, name) for name in implementations for number in num_images
        ],
        needs=("torch", "transformers"),
        uses_jax=False,
        **limits,
    )


def case(model: str, dtype: str, num_images: int, implementation: str) -> dict:
    """Returns the case of a row."""
    return dict(model=model, dtype=dtype, num_images=num_images, implementation=implementation)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command: writes the record and prints its tables."""
    parser = suite.parser("draw", __doc__.splitlines()[0], MODELS, IMPLEMENTATIONS)
    text = "images to generate at once (default: 1)"
    parser.add_argument("--num_images", nargs="+", type=suite.positive, default=[1], help=text)
    text = "dtype of the decoder (default: bfloat16)"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=text)
    text = "runs after the first (default: 3)"
    parser.add_argument("--runs", type=suite.positive, default=3, help=text)
    args = parser.parse_args(argv)
    measurements, names = [], [name for name in TORCH if name in args.implementation]
    for model in args.model:
        if "janus_jax" in args.implementation:
            measurements.append(jax_measurement(model, args.num_images, args.dtype, args.runs))
        if names:
            shape = (args.num_images, names, args.dtype, args.runs)
            measurements.append(torch_measurement(model, *shape))
    suite.run_all(measurements, args.output, RATE)


if __name__ == "__main__":
    main()
