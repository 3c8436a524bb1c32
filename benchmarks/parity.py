"""Compares the results on this device with the recordings of the original code.

    python -m benchmarks.parity --output parity.json

Runs the small model of tests/golden/janus in float32 and bfloat16, and compares with what the
original PyTorch code computed with the same weights in float32 on a CPU. In float32, it also
generates images of the same seeds in batches of several sizes; the image tokens must not depend on
the batch. With `--model`, this second check also runs on a model of that size with random weights.

Figures:

error: root mean square of the differences, divided by that of the recording.
largest_difference: largest absolute difference.
equal: fraction of the image tokens that are equal.
ok: whether the result is as required. In float32: differences of at most 1e-4 + 1e-4 * |value|, of
    one level for pixels, and equal tokens. In bfloat16: an error of at most 0.05; the image tokens
    may differ there, because two tokens may be almost equally likely.
"""

from collections.abc import Sequence

from benchmarks import suite
from benchmarks.records import OURS
from janus_jax.commands.terminal import path_arg

MODELS = ("janus_pro_1b", "tiny")
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 2, 5)  # batch sizes of the same images
RECORDED = (
    "image features",
    "text logits",
    "image logits",
    "greedy image tokens",
    "pixels",
    "encoded image tokens",
)


def measurement(**limits: float) -> suite.Measurement:
    """Returns the comparison with the recordings. limits: as in the other benchmarks."""
    cases = [case("small", dtype, check) for dtype in DTYPES for check in RECORDED]
    cases.append(case("small", "float32", same_seeds(BATCHES)))
    return suite.Measurement("parity", "benchmarks.parity_jax", {}, cases, **limits)


def batch_measurement(model: str, batches: Sequence[int], **limits: float) -> suite.Measurement:
    """Returns the check on a model of another size that the batch does not change an image."""
    settings = dict(model=model, batches=list(batches))
    cases = [case(model, "float32", same_seeds(batches))]
    return suite.Measurement("parity", "benchmarks.parity_jax", settings, cases, **limits)


def case(model: str, dtype: str, check: str) -> dict:
    """Returns the case of a check; `small` is the model of the recordings."""
    return dict(model=model, dtype=dtype, check=check, implementation=OURS)


def same_seeds(batches: Sequence[int]) -> str:
    """Returns the name of the check that the batch does not change an image."""
    return f"same seeds in batches of {', '.join(map(str, batches))}"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command: writes the record and prints its table."""
    parser = suite.bare_parser("parity", __doc__.splitlines()[0])
    text = "also check the batches of models of this size, with random weights"
    parser.add_argument("--model", nargs="+", choices=MODELS, default=[], help=text)
    parser.add_argument("--output", type=path_arg, required=True, help="JSON record to write")
    args = parser.parse_args(argv)
    measurements = [measurement(), *(batch_measurement(model, (1, 3)) for model in args.model)]
    suite.run_all(measurements, args.output, None)


if __name__ == "__main__":
    main()
