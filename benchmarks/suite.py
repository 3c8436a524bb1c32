"""Runs each measurement in a separate process with a time limit.

The processes are separate because JAX and PyTorch keep the memory of a GPU that they have taken.
This process imports neither of them.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.records import Case, Record, failed_checks
from benchmarks.tables import summary
from janus_jax.commands.terminal import (
    OneLineParser,
    error_line,
    one_line_errors,
    path_arg,
    set_up_program,
)

ROOT = Path(__file__).parents[1]
DTYPES = ("bfloat16", "float32")  # that a benchmark can be run in; the first is the default
CUT_OFF = "the run ended before this"
MAX_REASON = 300  # characters
GRACE = 5.0  # seconds between the two signals that end a process
# JAX takes this fraction of a GPU's memory when it starts; the default of 0.75 leaves too little
# for a training step of Janus-Pro-1B on 80 GB.
MEMORY_FRACTION = "0.9"
CACHE_SWITCH = "JANUS_JAX_COMPILE_CACHE"  # 0: programs are not stored, so that first runs compile


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What one process measures.

    Attributes:
        benchmark: the name of the benchmark, to whose record the results are added.
        module: the module with the function measure(record, **settings).
        settings: arguments of this function; JSON.
        cases: the cases that it measures.
        needs: packages that it needs and that may be missing.
        uses_jax: whether it computes with JAX; otherwise JAX stays on the CPU.
        seconds: time limit.
        least: minimum seconds; with less the part is skipped.
    """

    benchmark: str
    module: str
    settings: Mapping
    cases: Sequence[Case]
    needs: Sequence[str] = ()
    uses_jax: bool = True
    seconds: float = math.inf
    least: float = 0.0


class Deadline:
    """A moment in the future."""

    def __init__(self, seconds: float):
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Returns the seconds until then, negative afterwards."""
        return self._end - time.monotonic()


def run(
    measurement: Measurement,
    record: Path,
    deadline: Deadline | None = None,
    log: Path | None = None,
) -> str | None:
    """Runs a measurement; cases without a result get a row that says why.

    Returns the reason if it was not run or failed, otherwise None.

    record: the file of the record.
    deadline: the measurement must end before it. None: no deadline.
    log: a file to which the error output of the process is appended.
    """
    seconds = measurement.seconds
    if deadline is not None:
        seconds = min(seconds, deadline.left())
    if seconds < measurement.least:
        reason = f"{max(seconds, 0):.0f} s were left, at least {measurement.least:.0f} s are needed"
    elif missing := [name for name in measurement.needs if not importlib.util.find_spec(name)]:
        reason = f"not installed: {', '.join(missing)}"
    else:
        skip(measurement, record, CUT_OFF)
        reason = _run_process(measurement, record, seconds, log)
    if reason is not None:
        skip(measurement, record, reason)
    return reason


def skip(measurement: Measurement, path: Path, reason: str) -> None:
    """Adds a row with the reason for each case that has no result yet."""
    record = Record(path, measurement.benchmark)
    for case in measurement.cases:
        record.skip(case, reason)


def _run_process(
    measurement: Measurement, record: Path, seconds: float, log: Path | None
) -> str | None:
    """Runs a measurement in a new process; returns the error, or None if it succeeded.

    The process writes the results to the record. What it prints goes to this process's output.
    """
    command = [sys.executable, "-m", "benchmarks.suite", measurement.module, measurement.benchmark]
    command += [str(record.absolute()), json.dumps(measurement.settings)]
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": MEMORY_FRACTION} | os.environ | {CACHE_SWITCH: "0"}
    if not measurement.uses_jax:
        env["JAX_PLATFORMS"] = "cpu"
    status: int | None = None
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stderr=errors, start_new_session=True
        )
        with ended(process), contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(None if math.isinf(seconds) else seconds)
        errors.seek(0)
        text = errors.read()
    if log is not None:
        with log.open("a", encoding="utf-8") as file:
            file.write(f"{measurement.module} {measurement.settings}\n{text}\n")
    if status is None:
        return f"stopped after {seconds:.0f} s"
    if status == 0:
        return None
    print(text, file=sys.stderr, flush=True)
    return _reason(text) or f"the process ended with status {status}"


def _reason(text: str) -> str:
    """Returns the line of an error output that says why; "" if it is empty.

    It is that of the last exception. JAX writes a note after it, which is no reason.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [""])[-1][:MAX_REASON]


@contextlib.contextmanager
def ended(process: subprocess.Popen) -> Iterator[None]:
    """Ends the process and those that it started, also if this process is interrupted."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if process.poll() is None:
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)


def parser(
    benchmark: str, description: str, models: Sequence[str], implementations: Sequence[str]
) -> OneLineParser:
    """Returns the argument parser of a benchmark, with the arguments that all have."""
    result = bare_parser(benchmark, description)
    text = f"models with random weights, of {', '.join(models)} (default: janus_pro_1b)"
    settings = dict(nargs="+", choices=models, metavar="MODEL", default=["janus_pro_1b"])
    result.add_argument("--model", **settings, help=text)
    text = f"what to measure, of {', '.join(implementations)} (default: all)"
    settings = dict(nargs="+", choices=implementations, metavar="NAME")
    result.add_argument("--implementation", default=list(implementations), **settings, help=text)
    text = "JSON record to write; rows of an earlier run that are not measured again are kept"
    result.add_argument("--output", type=path_arg, required=True, help=text)
    return result


def bare_parser(benchmark: str, description: str) -> OneLineParser:
    """Returns an argument parser without arguments."""
    command = f"python -m benchmarks.{benchmark}"
    return OneLineParser(benchmark, prog=command, description=description)


def positive(text: str) -> int:
    """The argparse type of integers of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer of at least 1, got {text!r}")
    return int(text)


def run_all(measurements: Sequence[Measurement], output: Path, rate: str | None) -> None:
    """Runs the measurements of one benchmark and prints its tables.

    Exits with status 1 if a case was not measured or a check failed, with status 2 if the record
    cannot be written to `output`. rate: see tables.summary.
    """
    benchmark = measurements[0].benchmark
    set_up_program()  # so that SIGTERM also ends the process that measures
    with one_line_errors(benchmark):
        if not output.parent.is_dir():
            raise ValueError(f"the folder of --output {output} does not exist; create it first")
        reasons = [run(measurement, output) for measurement in measurements]
        content = Record(output, benchmark).content
        print(summary(content, rate))
    problems = [f"not measured: {reason}" for reason in reasons if reason is not None]
    exit_if(benchmark, [*problems, *map("check failed: {}".format, failed_checks(content))])


def exit_if(name: str, problems: Sequence[str]) -> None:
    """Prints one line per problem and exits with status 1, if there are any."""
    for problem in problems:
        print(error_line(name, problem), file=sys.stderr)
    if problems:
        sys.exit(1)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures in this process: MODULE BENCHMARK RECORD SETTINGS, as `run` passes them."""
    module, benchmark, record, settings = sys.argv[1:] if argv is None else argv
    measure = importlib.import_module(module).measure
    measure(Record(Path(record), benchmark), **json.loads(settings))


if __name__ == "__main__":
    main()
