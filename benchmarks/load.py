"""Measures how long sample.py takes from the shell prompt to the images, and a model to load.

    python -m benchmarks.load --model janus_pro_1b --output load.json

Models: `janus_tiny` is the shipped model, `small` that of tests/golden/janus. For the others, a
folder with random weights and the layout of the released model (bfloat16 safetensors) is written
first. The files were just written or read, so they are in the cache of the operating system.

Cases:

sample.py, cold: `python sample.py --prompt ...`, which generates four images, while the folder of
    compiled programs is empty.
sample.py, warm: the same command again, several times.
load: a Python process that only loads the model in bfloat16: janus_jax.load in `janus_jax`,
    JanusForConditionalGeneration.from_pretrained in `torch_eager`. Both read the same folder, which
    has the layout of `transformers`. Not measured for `janus_tiny`: the layout of `transformers`
    cannot represent it.

Figures:

seconds: from the start of the process to its end.
gb_per_s: of `load`, gigabytes of weights divided by the median seconds.
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
MODELS = ("janus_tiny", "small", *FOLDERS)
GOLDEN = suite.ROOT / "tests" / "golden" / "janus"
LOADS = {
    "janus_jax": "import sys, janus_jax; janus_jax.load(sys.argv[1], dtype='bfloat16')",
    "torch_eager": (
        "import sys, torch, transformers; device = 'cuda' if torch.cuda.is_available() else 'cpu';"
        "load = transformers.JanusForConditionalGeneration.from_pretrained;"
        "load(sys.argv[1], dtype=torch.bfloat16).to(device)"
    ),
}
IMPLEMENTATIONS = tuple(LOADS)
RATE = "gb_per_s"
PROMPT = "a red circle"
# Environment variables that would make a cold start warm, or a warm start cold.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "JANUS_JAX_COMPILE_CACHE")
DEVICE = "import jax; print(jax.devices()[0].device_kind)"


def measurement(
    model: str,
    implementations: Sequence[str] = IMPLEMENTATIONS,
    runs: int = 3,
    **limits: float,
) -> suite.Measurement:
    """Returns the measurement of one model.

    runs: of all but the cold start. limits: `seconds` and `least` of suite.Measurement.
    """
    cases = [case(model, f"sample.py, {start}", "janus_jax") for start in ("cold", "warm")]
    if model == "janus_tiny":
        implementations = ()
    cases += [case(model, "load", name) for name in implementations]
    return suite.Measurement(
        benchmark="load",
        module="benchmarks.load",
        settings=dict(model=model, implementations=list(implementations), runs=runs),
        cases=cases,
        **limits,
    )


def case(model: str, what: str, implementation: str) -> dict:
    """Returns the case of a row."""
    return dict(model=model, what=what, implementation=implementation)


def measure(record: Record, model: str, implementations: list[str], runs: int) -> None:
    """Measures one model. For the arguments see measurement."""
    record.describe(_python(["-c", DEVICE]).strip(), (*PACKAGES, "torch", "transformers"))
    with tempfile.TemporaryDirectory() as name:
        folder = _write_folder(Path(name), model)
        command = ["sample.py", "--prompt", PROMPT, "--output_dir", str(Path(name) / "images")]
        if folder is not None:
            command += ["--model", str(folder)]
        cache = {"XDG_CACHE_HOME": str(Path(name) / "cache")}

        def sample() -> None:
            _python(command, **cache)

        record.add(case(model, "sample.py, cold", "janus_jax"), dict(seconds=seconds_of(sample)))
        figures = dict(seconds=spread(repeated(sample, runs)))
        record.add(case(model, "sample.py, warm", "janus_jax"), figures)
        if implementations:
            folder = _exported(folder, Path(name))
        for implementation in implementations:
            figures = _load_figures(implementation, folder, runs)
            record.add(case(model, "load", implementation), figures)


def _write_folder(parent: Path, model: str) -> Path | None:
    """Returns the folder of a model, written if necessary; None for the shipped model."""
    if model in FOLDERS:
        return synthetic.write_folder(parent / model, model=FOLDERS[model])
    return GOLDEN if model == "small" else None


def _exported(folder: Path, parent: Path) -> Path:
    """Converts a folder to the layout of `transformers`."""
    stored, exported = parent / "orbax", parent / "transformers"
    _python(["-m", "convert", str(folder), str(stored)])
    _python(["-m", "convert", "export", str(stored), str(exported), "--layout", "transformers"])
    return exported


def _load_figures(implementation: str, folder: Path, runs: int) -> dict:
    """Measures loading a folder in new processes."""
    seconds = repeated(lambda: _python(["-c", LOADS[implementation], str(folder)]), runs)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    found = spread(seconds)
    return dict(seconds=found, gb_per_s=size / 1e9 / found["median"])


def _python(arguments: Sequence[str], **variables: str) -> str:
    """Runs Python, without the caches of this process, and returns its standard output.

    Raises:
        ValueError: it fails.
    """
    env = {name: value for name, value in os.environ.items() if name not in CACHES} | variables
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=suite.ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command: writes the record and prints its tables."""
    parser = suite.parser("load", __doc__.splitlines()[0], MODELS, IMPLEMENTATIONS)
    text = "runs of all but the cold start (default: 3)"
    parser.add_argument("--runs", type=suite.positive, default=3, help=text)
    args = parser.parse_args(argv)
    measurements = [measurement(model, args.implementation, args.runs) for model in args.model]
    suite.run_all(measurements, args.output, RATE)


if __name__ == "__main__":
    main()
