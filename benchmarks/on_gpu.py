"""Runs all measurements on one GPU within a time limit; benchmarks/on_gpu.sh calls this.

The order is that of importance: correctness, image generation and its ratios to PyTorch, answers,
training, starts, then the rest if time is left. A measurement that no longer fits is skipped, and
its rows say so. If a check of parity fails, the exit status is 1.
"""

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import answer, draw, load, parity, suite, train
from benchmarks.records import failed_checks, read_record
from benchmarks.tables import summary
from janus_jax.commands.terminal import (
    OneLineParser,
    exit_with_error,
    one_line_errors,
    set_up_program,
)
from janus_jax.paths import atomic_write, write_file

SECONDS = 520.0  # the rest of nine minutes is for ending the last process and the summary
SUMMARY, LOG, PROFILES = "summary.md", "log.txt", "profiles.tar.gz"
RATES = dict(parity=None, draw=draw.RATE, answer=answer.RATE, train=train.RATE, load=load.RATE)
PROFILE_BYTES = 64 * 2**20  # of the profiles that are kept; compressed, they take about a tenth
COMPILED_FIRST = draw.TORCH[::-1]  # the harder comparison; what is cut off is the last row
START = 60.0  # seconds in which JAX must find the GPU; a driver that hangs would use up all time
BACKEND = "import jax; print(jax.default_backend())"


def plan(profiles: Path) -> list[suite.Measurement]:
    """Returns the measurements, most important first. profiles: where profiles are kept."""
    one, seven = "janus_pro_1b", "janus_pro_7b"
    return [
        # the limits of these seven add up to SECONDS; finding the GPU takes time of the last one
        parity.measurement(seconds=60, least=30),
        draw.jax_measurement(one, (1, 16), folder=profiles, seconds=75, least=40),
        draw.jax_measurement(seven, (1, 16), folder=profiles, seconds=95, least=50),
        draw.torch_measurement(seven, (1, 16), COMPILED_FIRST, runs=1, seconds=125, least=50),
        answer.measurement(one, "janus_jax", (1, 8), seconds=45, least=30),
        train.measurement(one, "janus_jax", folder=profiles, seconds=80, least=60),
        load.measurement("janus_tiny", runs=1, seconds=40, least=20),
        # after the parts above, which may need less than their limits: the ratios to PyTorch have
        # been measured with 7B, and this may take as long as the last three parts together
        draw.torch_measurement(one, (1, 16), COMPILED_FIRST, runs=1, seconds=180, least=45),
        answer.measurement(one, "torch_eager", (1, 8), seconds=50, least=25),
        train.measurement(one, "torch_eager", runs=3, seconds=60, least=30),
        parity.batch_measurement(one, (1, 3), seconds=90, least=50),
        answer.measurement(seven, "janus_jax", (1,), seconds=60, least=40),
        load.measurement(one, runs=1, seconds=250, least=150),
    ]


def tiny_plan(profiles: Path) -> list[suite.Measurement]:
    """Returns the same kinds of measurements with tiny shapes, for a machine without a GPU."""
    shape = dict(batch_size=1, seq_len=128, runs=1)
    return [
        parity.measurement(),
        draw.jax_measurement("tiny", (1, 2), runs=1, folder=profiles),
        draw.torch_measurement("tiny", (1, 2), COMPILED_FIRST, runs=1, backend="aot_eager"),
        answer.measurement("tiny", "janus_jax", (1, 2), num_tokens=4, runs=1),
        train.measurement("tiny", "janus_jax", folder=profiles, **shape),
        load.measurement("small", runs=1),
        answer.measurement("tiny", "torch_eager", (1, 2), num_tokens=4, runs=1),
        train.measurement("tiny", "torch_eager", **shape),
        parity.batch_measurement("tiny", (1, 3)),
    ]


def run(
    measurements: Iterable[suite.Measurement], out: Path, profiles: Path, deadline: suite.Deadline
) -> None:
    """Runs the measurements one after the other and writes the files in `out` after each."""
    for measurement in measurements:
        names = f"{measurement.module} {json.dumps(measurement.settings)}"
        print(f"{deadline.left():.0f} s left: {names}", flush=True)
        try:
            suite.run(measurement, _record(out, measurement.benchmark), deadline, out / LOG)
        finally:
            write_summary(out)
            _pack(profiles, out / PROFILES)


def skip_all(measurements: Iterable[suite.Measurement], out: Path, reason: str) -> None:
    """Writes rows that say why nothing was measured."""
    for measurement in measurements:
        suite.skip(measurement, _record(out, measurement.benchmark), reason)
    write_summary(out)


def _record(out: Path, benchmark: str) -> Path:
    return out / f"{benchmark}.json"


def _records(out: Path) -> dict[str, dict]:
    """Returns the contents of all records by benchmark."""
    paths = {name: _record(out, name) for name in RATES}
    return {name: read_record(path) for name, path in paths.items() if path.exists()}


def failed(out: Path) -> list[str]:
    """Returns the cases of all records in which a result is not as required."""
    return [case for content in _records(out).values() for case in failed_checks(content)]


def write_summary(out: Path) -> None:
    """Writes the tables of all records."""
    parts = [summary(content, RATES[name]) for name, content in _records(out).items()]
    write_file(out / SUMMARY, "\n".join(parts).encode())


def _pack(profiles: Path, target: Path) -> None:
    """Packs the profiles, smallest first, up to PROFILE_BYTES."""
    files = sorted(profiles.rglob("*.xplane.pb"), key=lambda path: path.stat().st_size)
    size = 0
    with atomic_write(target) as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in files:
            size += path.stat().st_size
            if size <= PROFILE_BYTES:
                archive.add(path, path.relative_to(profiles))


def has_gpu(seconds: float = START) -> bool:
    """Whether JAX can be imported and finds an accelerator within some seconds."""
    process = subprocess.Popen(
        [sys.executable, "-c", BACKEND],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        with suite.ended(process):
            text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return process.returncode == 0 and text.split()[-1:] not in ([], ["cpu"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command; exits with status 1 if there is no GPU or a check fails."""
    text = __doc__.splitlines()[0]
    parser = OneLineParser("on_gpu", prog="benchmarks/on_gpu.sh", description=text)
    parser.add_argument("out", type=Path, help="folder for the records; existing rows are kept")
    text = f"benchmarks to run, of {', '.join(RATES)} (default: all)"
    parser.add_argument("benchmarks", nargs="*", help=text)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, for a CPU")
    text = "time limit of all measurements in seconds (default: %(default)s)"
    parser.add_argument("--seconds", type=float, default=SECONDS, help=text)
    args = parser.parse_intermixed_args(argv)  # flags may come first
    if unknown := sorted(set(args.benchmarks) - RATES.keys()):
        parser.error(f"benchmarks must be of {', '.join(RATES)}, got {unknown[0]}")
    with one_line_errors("on_gpu"):
        _measure_all(args)
    suite.exit_if("on_gpu", [f"check failed: {case}" for case in failed(args.out)])


def _measure_all(args: argparse.Namespace) -> None:
    """Runs the benchmarks that the flags select and prints the summary."""
    deadline = suite.Deadline(args.seconds)
    args.out.mkdir(parents=True, exist_ok=True)
    _records(args.out)  # a file that is not a record ends the run now rather than later
    set_up_program()
    with tempfile.TemporaryDirectory() as folder:
        measurements = (tiny_plan if args.tiny else plan)(Path(folder))
        names = args.benchmarks or RATES
        measurements = [entry for entry in measurements if entry.benchmark in names]
        if not args.tiny and not has_gpu():
            skip_all(measurements, args.out, "JAX found no GPU")
            exit_with_error("on_gpu", "JAX found no GPU; install JAX for CUDA, or use --tiny", 1)
        run(measurements, args.out, Path(folder), deadline)
    print((args.out / SUMMARY).read_text("utf-8"))


if __name__ == "__main__":
    main()
