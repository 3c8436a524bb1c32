"""Measures how long sample.py takes from the shell prompt to the images, cold and warm.

    python -m benchmarks.load --model janus_pro_1b --output load.json

Runs `python sample.py --prompt ...`, which generates four images, on a folder with random weights
in the layout of the released model (bfloat16 safetensors), which is written first; for `janus_tiny`
on the shipped model. The files of the model were just written or read, so they are in the cache of
the operating system.

Starts:

cold: the folder of compiled programs is empty.
warm: the same command again. The median of several runs.

Figures:

start_s: seconds from the start of the process to its end.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import suite, synthetic
from benchmarks.records import PACKAGES, Record, spread
from benchmarks.timing import repeated, seconds_of

FOLDERS = {"janus_pro_1b": "Janus-Pro-1B", "janus_pro_7b": "Janus-Pro-7B"}
MODELS = ("janus_tiny", *FOLDERS)
STARTS = ("cold", "warm")
PROMPT = "a red circle"
# Environment variables that would make the cold start a warm one, or the warm start a cold one.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "JANUS_JAX_COMPILE_CACHE")
DEVICE = "import jax; print(jax.devices()[0].device_kind)"


def measurement(model: str, runs: int = 3, **limits: float) -> suite.Measurement:
    """Returns the measurement of one model.

    runs: of the warm start. limits: `seconds` and `least` of suite.Measurement.
    """
    return suite.Measurement(
        benchmark="load",
        module="benchmarks.load",
        settings=dict(model=model, runs=runs),
        cases=[dict(model=model, start=start, implementation="janus_jax") for start in STARTS],
        **limits,
    )


def measure(record: Record, model: str, runs: int) -> None:
    """Measures one model. runs: of the warm start."""
    done = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, check=True)
    record.describe(done.stdout.decode().strip(), PACKAGES)
    with tempfile.TemporaryDirectory() as name:
        folder, command = Path(name), [sys.executable, "sample.py", "--prompt", PROMPT]
        command += ["--output_dir", str(folder / "images")]
        if model in FOLDERS:
            synthetic.write_folder(folder / model, model=FOLDERS[model])
            command += ["--model", str(folder / model)]
        env = {name: value for name, value in os.environ.items() if name not in CACHES}
        env["XDG_CACHE_HOME"] = str(folder / "cache")

        def sample() -> None:
            done = subprocess.run(command, cwd=suite.ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"sample.py failed: {done.stderr.strip()}")

        case = dict(model=model, implementation="janus_jax")
        record.add(case | dict(start="cold"), dict(start_s=seconds_of(sample)))
        seconds = repeated(sample, runs)
        record.add(case | dict(start="warm"), dict(start_s=spread(seconds)))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command: writes the record and prints its table."""
    parser = suite.parser("load", __doc__.splitlines()[0], MODELS, ("janus_jax",))
    text = "runs of the warm start (default: 3)"
    parser.add_argument("--runs", type=int, default=3, help=text)
    args = parser.parse_args(argv)
    suite.run_all([measurement(model, args.runs) for model in args.model], args.output, None)


if __name__ == "__main__":
    main()
