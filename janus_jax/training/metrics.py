"""What one sees of a run: lines of progress, metrics.jsonl and TensorBoard's event files."""

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

from janus_jax.data.records import KINDS
from janus_jax.paths import atomic_write, file_size, os_errors_of, write_all, write_file

METRICS = "metrics.jsonl"
EVENTS = "tensorboard"
FLUSH_SECONDS = 10  # what a killed run may lose of TensorBoard's files
NAMED_RECORDS = 8

SkippedCounts = Mapping[str, Mapping[str, int]]  # numbers of bad records by source and reason


@dataclasses.dataclass
class _Interval:
    """What has been added up since the last line.

    began: when, by time.monotonic; None where that would count the compilation.
    """

    began: float | None
    steps: int = 0
    sums: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    loss: float = 0.0
    weight: float = 0.0
    grad_norm: float = 0.0
    tokens: float = 0.0
    places: float = 0.0
    flops: float = 0.0

    def add(self, metrics: Mapping, flops: float) -> None:
        """metrics: numbers of one step, as of Log.step."""
        self.steps += 1
        self.sums.update(metrics["sums"])
        self.counts.update(metrics["counts"])
        self.loss += metrics["loss"] * metrics["weight"]
        self.weight += metrics["weight"]
        self.grad_norm += metrics["grad_norm"]
        self.tokens += metrics["tokens"]
        self.places += metrics["places"]
        self.flops += flops

    def means(self) -> dict[str, float]:
        """Losses as means over targets, and the mean norm; kinds without a target left out."""
        return dict(
            loss=self.loss / self.weight,
            **_means(self.sums, self.counts),
            grad_norm=self.grad_norm / self.steps,
        )


class Log:
    """Writes what a run reports, checks that it is finite, and closes its files as a context.

    Names in metrics.jsonl and TensorBoard are the same: of a line of progress step, loss,
    understanding, text, generation (means over the targets since the last line; kinds without any
    left out), grad_norm (mean over steps), learning_rate (of this step), packing_efficiency (part
    of the rows' places that is no padding), and, but for the first line, before which the step was
    compiled, tokens_per_s, mfu (see flops.py) and seconds_left. Tokens per second and MFU are of
    all the time since the last line, also where evaluation or a save took part of it; the time left
    goes by the whole run so far. After a line of progress follows, if it has changed, how many
    records of process 0 were left out so far, skipped/SOURCE/REASON.

    Process 0 writes; the others only check.
    """

    def __init__(
        self,
        folder: str | Path,
        steps: int,
        log_every: int,
        peak_flops: float | None,
        first: int,
        skipped: Callable[[], SkippedCounts],
    ):
        """folder: of the run. steps: at which the run ends.

        peak_flops: of all devices together, in FLOP/s; None leaves out the MFU.
        first: the step that the run goes on from, 0 at its start. What a killed run logged of later
            steps, after its last checkpoint, is taken out.
        skipped: gives the bad records so far.
        """
        self._steps, self._log_every, self._first = steps, log_every, first
        self._peak_flops, self._folder = peak_flops, Path(folder)
        self._left_out = skipped
        self._skipped_text: dict[str, SkippedCounts] = {}  # by prefix
        self._started: float | None = None
        self._interval = _Interval(None)
        self._file = self._writer = None
        if jax.process_index() == 0:
            folder = self._folder
            folder.mkdir(parents=True, exist_ok=True)
            _cut(folder / METRICS, first)
            self._file = (folder / METRICS).open("ab", buffering=0)
            self._writer = SummaryWriter(
                str(folder / EVENTS),
                purge_step=first + 1,
                flush_secs=FLUSH_SECONDS,
                filename_suffix=f".{first}",  # names go by the second and are written over
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
        """Takes in a step and, every log_every steps, at the first and the last, reports.

        metrics: of the jitted step, on the devices; it is waited for, so hand them in when the next
            step is under way.
        records: of the rows of the step on this process, by row.
        flops: of these rows, as of flops.StepFlops; other processes are taken to have as many.
        Raises FloatingPointError unless loss, grad_norm and param_norm are finite.
        """
        metrics = jax.tree.map(float, jax.device_get(dict(metrics)))
        self._check_finite(step, metrics, records)
        now = time.monotonic()
        self._interval.add(metrics, flops * jax.process_count())
        last = step == self._steps
        if self._started is None or step % self._log_every == 0 or last:
            self._report(step, metrics["learning_rate"], now)
            self.skipped(step, self._left_out(), "skipped")
        if self._started is None:
            self._started = now

    def scalars(self, step: int, values: Mapping[str, float], prefix: str) -> None:
        """Reports results of another kind, such as an evaluation's, as `prefix/name`.

        Raises FloatingPointError if one is not finite.
        """
        values = {f"{prefix}/{name}": float(value) for name, value in values.items()}
        if not all(map(math.isfinite, values.values())):
            raise FloatingPointError(f"{prefix} must be finite, got {_text(values)} at step {step}")
        self._write(step, values, _text(values))

    def skipped(self, step: int, counts: SkippedCounts, prefix: str) -> None:
        """Reports the numbers of bad records as `prefix/source/reason`, if they have changed."""
        if counts == self._skipped_text.get(prefix, {}):
            return
        self._skipped_text[prefix] = counts
        values = {
            "/".join(filter(None, (source, reason.replace(" ", "_")))): number
            for source, reasons in counts.items()
            for reason, number in reasons.items()
        }
        self.scalars(step, values, prefix)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Shows images, uint8[N, Y, X, 3], in TensorBoard."""
        if self._writer is not None:
            self._writer.add_images(name, images, step, dataformats="NHWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text (Markdown) in TensorBoard."""
        if self._writer is not None:
            self._writer.add_text(name, text, step)

    def _check_finite(
        self, step: int, metrics: Mapping, records: Sequence[Sequence[str]]
    ) -> None:
        """Names the records of a bad step, some of them in the message and all in a file."""
        judged = {name: metrics[name] for name in ("loss", "grad_norm", "param_norm")}
        if all(map(math.isfinite, judged.values())):
            return
        values = _text({**judged, **_means(metrics["sums"], metrics["counts"])})
        named = list(itertools.chain.from_iterable(records))
        path = self._folder / f"not_finite-{step}-{jax.process_index():03d}.txt"
        lines = "".join(f"{record}\n" for record in named)
        write_file(path, lines.encode("utf-8", "surrogateescape"))
        shown = ", ".join(named[:NAMED_RECORDS])
        more = f" and {len(named) - NAMED_RECORDS} more" if len(named) > NAMED_RECORDS else ""
        raise FloatingPointError(
            f"loss, gradients and parameters must be finite, got {values} at step {step}, "
            f"of records {shown}{more}, listed in {path}"
        )

    def _report(self, step: int, learning_rate: float, now: float) -> None:
        interval, self._interval = self._interval, _Interval(now)
        values = {
            **interval.means(),
            "learning_rate": learning_rate,
            "packing_efficiency": interval.tokens / interval.places,
        }
        text = _text(values)
        if interval.began is not None:
            seconds = max(now - interval.began, 1e-9)
            values["tokens_per_s"] = interval.tokens / seconds
            text += f"  {values['tokens_per_s']:.0f} tokens/s"
            if self._peak_flops is not None:
                values["mfu"] = interval.flops / seconds / self._peak_flops
                text += f"  MFU {values['mfu']:.1%}"
            each = (now - self._started) / (step - self._first - 1)
            values["seconds_left"] = each * (self._steps - step)
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


def _cut(path: Path, first: int) -> None:
    """Leaves in the file what was logged up to step `first`; a line that was cut short goes too.

    Raises ValueError if another line is not one of this log, or if it is no regular file.
    """
    if not path.exists():
        return
    file_size(path)  # a FIFO would wait for ever to be opened
    lines = path.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    steps = [_step_of(line, f"{path}, line {number}") for number, line in enumerate(whole, 1)]
    kept = [line for line, step in zip(whole, steps, strict=True) if step <= first]
    if kept != lines:  # in one piece: this run may be killed as well
        with atomic_write(path) as file:
            file.write(b"".join(kept))


def _step_of(line: bytes, where: str) -> int:
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    if type(step) is not int:
        rule = "must be a JSON object with the integer `step`; remove this line or move the file"
        raise ValueError(f"{where}: {rule} to resume the run")
    return step


def _means(sums: Mapping[str, float], counts: Mapping[str, float]) -> dict[str, float]:
    return {kind: sums[kind] / counts[kind] for kind in KINDS if counts[kind]}


def _text(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())
