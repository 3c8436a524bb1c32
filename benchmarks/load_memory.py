"""Measures the host memory that loading a checkpoint folder takes.

    python -m benchmarks.load_memory --output benchmarks/results/load_memory.json
    python -m benchmarks.load_memory --model Janus-Pro-7B --layers 1 \\
        --output benchmarks/results/load_memory_7b_widths.json

Each folder is loaded in a separate process on CPU, where the parameters are in host memory too. The
reported figure is the peak resident memory of that process minus the bytes of the parameters, so it
includes Python, JAX, and the file pages that are mapped while a tensor is copied. Needs Linux.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import synthetic
from janus_jax.commands.terminal import one_line_errors

ROOT = Path(__file__).parents[1]
WEIGHT_FORMATS = ("safetensors", "bin", "orbax")
DTYPES = ("bfloat16", "float32")
PACKAGES = ("jax", "jaxlib", "flax", "orbax-checkpoint", "numpy")
STATUS = Path("/proc/self/status")


def resident_bytes(which: str) -> int:
    """Returns the resident memory of this process in bytes.

    which: 'VmRSS' for the current value, 'VmHWM' for the peak.

    Raises:
      ValueError: /proc/self/status does not exist.
    """
    if not STATUS.is_file():
        raise ValueError(f"cannot measure memory: {STATUS} does not exist; run this on Linux")
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def measure_here(folder: Path, dtype: str) -> dict[str, int]:
    """Loads a folder in this process.

    Returns a dict in bytes: resident memory `before` loading, size of the `parameters`, and `peak`
    resident memory.
    """
    import jax
    from flax import nnx

    import janus_jax

    jax.devices()  # initializes the backend
    before = resident_bytes("VmRSS")
    pipeline = janus_jax.load(folder, dtype=dtype)
    arrays = jax.tree.leaves(nnx.state(pipeline.model))
    parameters = sum(array.nbytes for array in arrays)
    return {"before": before, "parameters": parameters, "peak": resident_bytes("VmHWM")}


def _python(*arguments: str) -> str:
    """Runs a module in a new Python process on CPU and returns its standard output.

    Raises:
      ValueError: the process fails.
    """
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JANUS_JAX_COMPILE_CACHE": "0"}
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise ValueError(f"python -m {' '.join(arguments)} failed: {reason[-1]}")
    return done.stdout


def measure(folder: Path, dtype: str) -> dict[str, float]:
    """Loads a folder in a new process.

    Returns the figures of measure_here in gigabytes (10^9 bytes), and `above_gb`, the peak minus
    the parameters.

    Raises:
      ValueError: the folder cannot be loaded.
    """
    arguments = ("--measure", "--folder", str(folder.resolve()), "--dtype", dtype)
    sizes = json.loads(_python("benchmarks.load_memory", *arguments))
    sizes["above"] = sizes["peak"] - sizes["parameters"]
    return {f"{name}_gb": round(size / 1e9, 3) for name, size in sizes.items()}


def make_folder(parent: Path, kind: str, model: str, layers: int | None) -> Path:
    """Writes a synthetic folder in one of WEIGHT_FORMATS and returns its path.

    model, layers: see synthetic.listing.
    """
    if kind != "orbax":
        return synthetic.write_folder(parent / kind, kind, model, layers)
    source = synthetic.write_folder(parent / "source", model=model, layers=layers)
    _python("convert", str(source), str(parent / kind))
    return parent / kind


def measure_synthetic(
    kinds: Sequence[str], dtypes: Sequence[str], model: str, layers: int | None
) -> list[dict]:
    """Writes the synthetic folder in each format and loads it with each dtype.

    Needs up to 8.4 GB of disk space for Janus-Pro-1B.
    """
    measurements = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as parent:
            folder = make_folder(Path(parent), kind, model, layers)
            for dtype in dtypes:
                measurements.append({"format": kind, "dtype": dtype} | measure(folder, dtype))
                print(json.dumps(measurements[-1]), file=sys.stderr, flush=True)
    return measurements


def report(model: str, measurements: list[dict]) -> dict:
    """Returns the contents of the result file."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    versions["python"] = ".".join(map(str, sys.version_info[:3]))
    return {
        "model": model,
        "meaning": "above_gb = peak resident memory of the process - bytes of the parameters",
        "cpu_cores": len(os.sched_getaffinity(0)),
        "versions": versions,
        "measurements": measurements,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    text = "checkpoint folder (default: create one with random weights in a temporary folder)"
    parser.add_argument("--folder", type=Path, help=text)
    text = "model whose shapes the created folder has (default: Janus-Pro-1B)"
    parser.add_argument("--model", choices=synthetic.MODELS, help=text)
    parser.add_argument("--layers", type=int, help="number of decoder layers (default: all)")
    text = "formats of the created folder (default: all)"
    formats = dict(choices=WEIGHT_FORMATS, default=WEIGHT_FORMATS)
    parser.add_argument("--formats", nargs="+", help=text, **formats)
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to load (default: both in turn)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    return parser


def _run(args: argparse.Namespace) -> dict:
    dtypes = [args.dtype] if args.dtype else DTYPES
    if args.folder is None:
        model = args.model or synthetic.MODELS[0]
        measurements = measure_synthetic(args.formats, dtypes, model, args.layers)
        depth = "" if args.layers is None else f", decoder layers: {args.layers}"
        return report(f"{model} with random weights{depth}", measurements)
    if args.model or args.layers:
        raise ValueError("--model and --layers cannot be combined with --folder; remove them")
    measurements = [{"dtype": dtype} | measure(args.folder, dtype) for dtype in dtypes]
    return report(args.folder.resolve().name, measurements)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command. User errors are reported in one line with exit status 2."""
    args = _parser().parse_args(argv)
    with one_line_errors("load_memory"):
        if args.measure:
            print(json.dumps(measure_here(args.folder, args.dtype)))
            return
        text = json.dumps(_run(args), indent=2) + "\n"
        if args.output:
            args.output.write_text(text, "utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
