"""The log of a run: progress lines, metrics.jsonl and TensorBoard event files."""

import collections
import dataclasses
import datetime
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging
from tensorboardX import SummaryWriter

from janus_jax.paths import atomic_write, file_size, os_errors_of, write_all, write_file

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
FLUSH_SECONDS = 10  # a killed run loses the TensorBoard events since the last flush
MAX_RECORDS_IN_MESSAGE = 8

SkippedCounts = Mapping[str, Mapping[str, int]]  # numbers of bad records by source and reason


@dataclasses.dataclass
class _Interval:
    """Sums over the steps since the last progress line.

    start: time.monotonic() at the beginning; None if the interval includes compilation.
    """

    start: float | None
    steps: int = 0
    sums: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    loss: float = 0.0
    weight: float = 0.0
    grad_norm: float = 0.0
    tokens: float = 0.0
    positions: float = 0.0
    flops: float = 0.0

    def add(self, metrics: Mapping, flops: float) -> None:
        """Adds one step. metrics: as for Log.step, as Python numbers."""
        self.steps += 1
        self.sums.update(metrics["sums"])
        self.counts.update(metrics["counts"])
        self.loss += metrics["loss"] * metrics["weight"]
        self.weight += metrics["weight"]
        self.grad_norm += metrics["grad_norm"]
        self.tokens += metrics["tokens"]
        self.positions += metrics["positions"]
        self.flops += flops

    def means(self) -> dict[str, float]:
        """Returns the mean of the objective and of the terms of the loss, and the mean norm."""
        return dict(
            loss=self.loss / self.weight,
            **_means(self.sums, self.counts),
            grad_norm=self.grad_norm / self.steps,
        )


class Log:
    """Logs metrics and checks that they are finite. As a context it closes its files.

    metrics.jsonl and TensorBoard have the same names. A progress line has

        step
        loss: the training objective, mean over what its weights count since the last line.
        TERM: mean of each term of the loss, for example `text`, over what it counts; terms whose
            count is 0 are omitted.
        grad_norm: mean over the steps since the last line.
        learning_rate: of this step.
        packing_efficiency: fraction of the positions that are not padding.
        tokens_per_s, mfu (see flops.py): over the time since the last line, including evaluation
            and saving.
        seconds_left: estimated from the average speed of the run.

    The first line has no tokens_per_s, mfu and seconds_left, because it includes compilation. If
    the numbers of records skipped by process 0 have changed, another line follows with
    skipped/SOURCE/REASON.

    Only process 0 writes; the other processes only check.
    """

    def __init__(
        self,
        folder: str | Path,
        steps: int,
        log_every: int,
        peak_flops: float | None,
        start_step: int,
        get_skipped: Callable[[], SkippedCounts],
        terms: Sequence[str] = (),
    ):
        """Opens the log.

        folder: output folder of the run.
        steps: last step of the run.
        log_every: steps between progress lines.
        peak_flops: peak of all devices together in FLOP/s, or None to omit the MFU.
        start_step: the step that the run resumes from, or 0. Lines of later steps, which a killed
            run logged after its last checkpoint, are removed.
        get_skipped: returns the numbers of skipped records so far.
        terms: names of terms of the loss in the order of a line; others follow them.
        """
        self._steps, self._log_every, self._start_step = steps, log_every, start_step
        self._peak_flops, self._folder = peak_flops, Path(folder)
        self._get_skipped = get_skipped
        self._terms = {name: position for position, name in enumerate(terms)}
        self._logged_skipped: dict[str, SkippedCounts] = {}  # by prefix
        self._started: float | None = None
        self._interval = _Interval(None)
        self._file = self._writer = None
        if jax.process_index() == 0:
            folder = self._folder
            folder.mkdir(parents=True, exist_ok=True)
            _truncate(folder / METRICS, start_step)
            self._file = (folder / METRICS).open("ab", buffering=0)
            self._writer = SummaryWriter(
                str(folder / EVENTS),
                purge_step=start_step + 1,
                flush_secs=FLUSH_SECONDS,
                # file names have a resolution of one second, and existing files are overwritten
                filename_suffix=f".{start_step}",
            )

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()
            self._writer.close()

    def step(
        self, step: int, metrics: Mapping, records: Sequence[Sequence[str]], flops: float
    ) -> None:
        """Adds a step. Writes a line at the first step, every log_every steps and at the last.

        metrics: output of the jitted step. The call waits until they are computed, so call it
            when the next step is already running.
        records: names of the records in this process's rows, by row.
        flops: FLOPs of these rows (flops.StepFlops); other processes are assumed to need as many.
        Raises FloatingPointError if loss, grad_norm or param_norm is NaN or infinite.
        """
        metrics = jax.tree.map(float, jax.device_get(dict(metrics)))
        for name in ("sums", "counts"):
            metrics[name] = self._in_order(metrics[name])
        self._check_finite(step, metrics, records)
        now = time.monotonic()
        self._interval.add(metrics, flops * jax.process_count())
        last = step == self._steps
        if self._started is None or step % self._log_every == 0 or last:
            self._report(step, metrics["learning_rate"], now)
            self.skipped(step, self._get_skipped(), "skipped")
        if self._started is None:
            self._started = now

    def _in_order(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sorts terms for a line: jitted functions return dicts in alphabetical order."""
        last = len(self._terms)
        return dict(sorted(values.items(), key=lambda item: self._terms.get(item[0], last)))

    def scalars(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Logs other values, such as evaluation results, as `prefix/name`.

        Raises FloatingPointError if one is NaN or infinite.
        """
        values = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(f"{prefix} must be finite, got {_text(values)} at step {step}")
        self._write(step, values, _text(values))

    def skipped(self, step: int, counts: SkippedCounts, prefix: str) -> None:
        """Logs the numbers of skipped records as `prefix/source/reason`, if they have changed."""
        if counts == self._logged_skipped.get(prefix, {}):
            return
        self._logged_skipped[prefix] = counts
        values = {
            "/".join(filter(None, (source, reason.replace(" ", "_")))): number
            for source, reasons in counts.items()
            for reason, number in reasons.items()
        }
        self.scalars(step, values, prefix)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Logs images, uint8[N, Y, X, 3], to TensorBoard."""
        if self._writer is not None:
            self._writer.add_images(name, images, step, dataformats="NHWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Logs a text (Markdown) to TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def _check_finite(
        self, step: int, metrics: Mapping, records: Sequence[Sequence[str]]
    ) -> None:
        """Raises if a step is not finite. Lists all its records in a file, some in the message."""
        checked = {name: metrics[name] for name in ("loss", "grad_norm", "param_norm")}
        checked |= _means(metrics["sums"], metrics["counts"])
        if all(map(math.isfinite, checked.values())):
            return
        values = _text(checked)
        names = list(itertools.chain.from_iterable(records))
        path = self._folder / f"not_finite-{step}-{jax.process_index():03d}.txt"
        lines = "".join(f"{name}\n" for name in names)
        write_file(path, lines.encode("utf-8", "surrogateescape"))
        listed = ", ".join(names[:MAX_RECORDS_IN_MESSAGE])
        rest = len(names) - MAX_RECORDS_IN_MESSAGE
        more = f" and {rest} more" if rest > 0 else ""
        raise FloatingPointError(
            f"loss, gradients and parameters must be finite, got {values} at step {step}; "
            f"records in the batch: {listed}{more}; all are listed in {path}"
        )

    def _report(self, step: int, learning_rate: float, now: float) -> None:
        interval, self._interval = self._interval, _Interval(now)
        values = {
            **interval.means(),
            "learning_rate": learning_rate,
            "packing_efficiency": interval.tokens / interval.positions,
        }
        text = _text(values)
        if interval.start is not None:
            seconds = max(now - interval.start, 1e-9)
            values["tokens_per_s"] = interval.tokens / seconds
            text += f"  {values['tokens_per_s']:.0f} tokens/s"
            if self._peak_flops is not None:
                values["mfu"] = interval.flops / seconds / self._peak_flops
                text += f"  MFU {values['mfu']:.1%}"
            seconds_per_step = (now - self._started) / (step - self._start_step - 1)
            values["seconds_left"] = seconds_per_step * (self._steps - step)
            text += f"  {datetime.timedelta(seconds=round(values['seconds_left']))} left"
        self._write(step, values, text)

    def _write(self, step: int, values: Mapping[str, float], text: str) -> None:
        if self._file is None:
            return
        logging.info("step %d/%d  %s", step, self._steps, text)
        line = json.dumps({"step": step, **values}, allow_nan=False).encode() + b"\n"
        with os_errors_of(self._folder / METRICS):
            write_all(self._file, line)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)


def _truncate(path: Path, last_step: int) -> None:
    """Removes lines of steps after `last_step`, and an incomplete last line.

    Raises ValueError if another line is not one of this log, or if it is not a regular file.
    """
    if not path.exists():
        return
    file_size(path)  # raises for a FIFO, which would block when opened
    lines = path.read_bytes().splitlines(keepends=True)
    complete = [line for line in lines if line.endswith(b"\n")]
    steps = [_step_of(line, f"{path}, line {number}") for number, line in enumerate(complete, 1)]
    kept = [line for line, step in zip(complete, steps, strict=True) if step <= last_step]
    if kept != lines:  # atomically: this run may be killed as well
        with atomic_write(path) as file:
            file.write(b"".join(kept))


def _step_of(line: bytes, where: str) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    if type(step) is not int:
        rule = "must be a JSON object with an integer `step`"
        raise ValueError(f"{where}: {rule}; to resume, remove this line or move the file")
    return step


def _means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    return {name: sums[name] / counts[name] for name in sums if counts[name]}


def _text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
