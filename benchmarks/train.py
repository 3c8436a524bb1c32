"""Measures a training step: tokens per second, and the share of the peak rate of the device.

    python -m benchmarks.train --model janus_pro_1b --output train.json

The step is that of stage 2 (configs/janus_pro_1b_stage2.py) on one device, with random weights and
packed rows of 4096 tokens. The rows hold random examples of understanding, text and generation in
the ratio of the stage; images to generate are given as image tokens. Neither reading records nor
checkpoints take part.

Implementations:

janus_jax: the step of train.py.
torch_eager: LlamaForCausalLM of `transformers` with the sizes of the decoder, on rows of text that
    fill the same number of positions: one row at a time, causal attention over the whole row,
    autocast to bfloat16, activation checkpointing in every layer and fused AdamW. It does less work
    than stage 2: no vision encoder, no aligners and no image head.

Figures:

tokens_per_s: positions of the rows that are not padding, divided by the median seconds of a step.
step_s: seconds of a step.
mfu: FLOPs of the step / (median seconds * peak rate of the device in bfloat16); the FLOPs are
    counted as in janus_jax/training/flops.py, which train.py logs. Only for devices whose peak rate
    is known.
tflops: the FLOPs of the step in units of 10^12.
filled: share of the positions that are not padding.
loss: of the last step.
first_s: seconds of the first step; in janus_jax it includes the compilation.
peak_gb: peak memory of the device in the process so far.
"""

from collections.abc import Sequence
from pathlib import Path

from benchmarks import suite

MODELS = ("janus_pro_1b", "tiny")
IMPLEMENTATIONS = ("janus_jax", "torch_eager")
RATE = "tokens_per_s"
REMAT_CHOICES = ("none", "dots", "full")  # those of models/layers.py, which imports JAX
NEEDS = dict(janus_jax=("grain", "ml_collections"), torch_eager=("torch", "transformers"))


def measurement(
    model: str,
    implementation: str,
    batch_size: int = 4,
    seq_len: int = 4096,
    remat: str = "dots",
    runs: int = 5,
    folder: Path | None = None,
    **limits: float,
) -> suite.Measurement:
    """Returns the measurement of one model and implementation.

    batch_size: rows. seq_len: tokens of a row. remat: what the backward pass recomputes, as in a
    config. runs: steps, after a first one. folder: where the profile of janus_jax is kept. limits:
    `seconds` and `least` of suite.Measurement.
    """
    is_torch = implementation != "janus_jax"
    settings = dict(model=model, batch_size=batch_size, seq_len=seq_len, runs=runs)
    if not is_torch:
        settings |= dict(remat=remat, folder=folder and str(folder))
    return suite.Measurement(
        benchmark="train",
        module=f"benchmarks.train_{'torch' if is_torch else 'jax'}",
        settings=settings,
        cases=[case(model, implementation, batch_size, seq_len, None if is_torch else remat)],
        needs=NEEDS[implementation],
        uses_jax=not is_torch,
        **limits,
    )


def case(
    model: str, implementation: str, batch_size: int, seq_len: int, remat: str | None = None
) -> dict:
    """Returns the case of a measurement. remat: of janus_jax; PyTorch recomputes every layer."""
    result = dict(model=model, stage=2, rows=batch_size, seq_len=seq_len)
    return result | (dict(remat=remat) if remat else {}) | dict(implementation=implementation)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command: writes the record and prints its tables."""
    parser = suite.parser("train", __doc__.splitlines()[0], MODELS, IMPLEMENTATIONS)
    number = suite.positive
    parser.add_argument("--batch_size", type=number, default=4, help="rows of a step (default: 4)")
    text = "tokens of a row (default: 4096)"
    parser.add_argument("--seq_len", type=number, default=4096, help=text)
    text = "what the backward pass recomputes (default: dots)"
    parser.add_argument("--remat", choices=REMAT_CHOICES, default="dots", help=text)
    parser.add_argument("--runs", type=number, default=5, help="steps after the first (default: 5)")
    args = parser.parse_args(argv)
    shape = (args.batch_size, args.seq_len, args.remat, args.runs)
    measurements = [
        measurement(model, implementation, *shape)
        for model in args.model
        for implementation in args.implementation
    ]
    suite.run_all(measurements, args.output, RATE)


if __name__ == "__main__":
    main()
