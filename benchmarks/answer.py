"""Measures answers to questions about an image: time to the first token, and tokens per second.

    python -m benchmarks.answer --model janus_pro_1b --conversations 1 8 --output answer.json

Implementations:

janus_jax: for one conversation what sample.py runs, a jitted call per token; for several what
    Pipeline.answer runs, one program with a loop over the tokens.
torch_eager: JanusForConditionalGeneration of `transformers` with a cache that grows with every
    token, without compilation.

All use random weights, one image and the same number of tokens of text per conversation, greedy
decoding, and no end of the answer before its maximum length.

Figures:

tokens_per_s: new tokens of all conversations, divided by the median seconds of a run.
run_s: seconds of a run.
first_token_s: seconds from the call to the first token on the host, for one conversation: the
    vision encoder, the prefill and the text head.
step_ms: milliseconds between two tokens after that, for one conversation.
floor_ms: milliseconds to read what a decode step must read. Counts the weights once and the average
    filled cache, at the measured bandwidth. The weights are those of the decoder and the text head.
bandwidth_share: floor_ms / step_ms.
copy_gb_s, peak_gb, first_s: as in benchmarks/draw.py.
"""

from collections.abc import Sequence

from benchmarks import suite
from benchmarks.suite import DTYPES

MODELS = ("janus_pro_1b", "janus_pro_7b", "tiny")
IMPLEMENTATIONS = ("janus_jax", "torch_eager")
MAX_TOKENS = 2048  # of an answer; all models have at least 4096 positions
RATE = "tokens_per_s"


def measurement(
    model: str,
    implementation: str,
    conversations: Sequence[int],
    dtype: str = DTYPES[0],
    num_tokens: int = 128,
    runs: int = 3,
    **limits: float,
) -> suite.Measurement:
    """Returns the measurement of one model and implementation.

    conversations: batch sizes. dtype: of the model. num_tokens: of an answer. runs: of each batch
    size, after a first one. limits: `seconds` and `least` of suite.Measurement.
    """
    is_torch = implementation != "janus_jax"
    return suite.Measurement(
        benchmark="answer",
        module=f"benchmarks.answer_{'torch' if is_torch else 'jax'}",
        settings=dict(
            model=model,
            conversations=list(conversations),
            dtype=dtype,
            num_tokens=num_tokens,
            runs=runs,
        ),
        cases=[case(model, dtype, number, num_tokens, implementation) for number in conversations],
        needs=("torch", "transformers") if is_torch else (),
        uses_jax=not is_torch,
        **limits,
    )


def case(
    model: str, dtype: str, conversations: int, num_tokens: int, implementation: str
) -> dict:
    """Returns the case of a row."""
    sizes = dict(model=model, dtype=dtype, conversations=conversations, num_tokens=num_tokens)
    return sizes | dict(implementation=implementation)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command: writes the record and prints its tables."""
    parser = suite.parser("answer", __doc__.splitlines()[0], MODELS, IMPLEMENTATIONS)
    text = "conversations to answer at once (default: 1)"
    parser.add_argument("--conversations", nargs="+", type=suite.positive, default=[1], help=text)
    text = "tokens of an answer (default: 128)"
    parser.add_argument("--num_tokens", type=suite.positive, default=128, help=text)
    text = "dtype of the model (default: bfloat16)"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=text)
    text = "runs after the first (default: 3)"
    parser.add_argument("--runs", type=suite.positive, default=3, help=text)
    args = parser.parse_args(argv)
    if args.num_tokens > MAX_TOKENS:
        parser.error(f"--num_tokens must be at most {MAX_TOKENS}, got {args.num_tokens}")
    shape = (args.conversations, args.dtype, args.num_tokens, args.runs)
    measurements = [
        measurement(model, implementation, *shape)
        for model in args.model
        for implementation in args.implementation
    ]
    suite.run_all(measurements, args.output, RATE)


if __name__ == "__main__":
    main()
