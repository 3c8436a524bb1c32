"""Run one training stage, from its newest checkpoint or from the start to the last step.

Files in the output folder:

run.json             the settings that the run was started with
checkpoints/STEP     checkpoints to resume from
metrics.jsonl        logged metrics; the same values are in tensorboard/
samples/STEP         generated images and answers
skipped-HOST.jsonl   skipped records, by process; those of the evaluation are in eval/
libraries.log        warnings and tracebacks of the storage libraries, if there were any
adapter              the LoRA adapter, written when a LoRA run finishes
model                the trained model, written when the run finishes
"""

import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from janus_jax.checks import shorten_text
from janus_jax.data.skipped import Skipped
from janus_jax.data.sources import FORMATS, Formats
from janus_jax.interop.adapter import Adapter
from janus_jax.interop.adapter_writing import write_adapter
from janus_jax.interop.convert import write_folder
from janus_jax.interop.load import DTYPES, open_adapter, param_shapes, table_for
from janus_jax.interop.stored import stored_params
from janus_jax.orbax_errors import library_log
from janus_jax.paths import locked, read_json, write_json
from janus_jax.training.checkpoints import Checkpoints, steps_in
from janus_jax.training.distributed import check_processes, check_shared
from janus_jax.training.evaluation import (
    Callback,
    evaluation_callback,
    held_out_rows,
    sampling_callback,
)
from janus_jax.training.flops import peak_flops, step_flops
from janus_jax.training.lora import lora_factors
from janus_jax.training.metrics import Log
from janus_jax.training.program import Program
from janus_jax.training.settings import MODEL, Inputs, no_progress
from janus_jax.training.step import Params, TrainState, eval_params

SETTINGS, CHECKPOINTS, LOCK, LIBRARY_LOG = "run.json", "checkpoints", ".lock", "libraries.log"
ADAPTER_FOLDER = "adapter"  # folder of a LoRA run's adapter, next to MODEL
# Settings that may change when a run resumes. All but `steps` leave the result the same: the
# cosine schedule of the learning rate ends at the last step.
CHANGEABLE = frozenset(
    "output steps mesh threads accumulate chunk remat scan log_every save_every keep eval_every"
    " eval_batches eval_mixture sample_every prompts questions max_bad model_dtype".split()
)


def train_stage(settings, formats: Formats = FORMATS, progress=no_progress) -> None:
    """Trains with the settings, and resumes from the newest checkpoint in `output` if any.

    On SIGTERM it saves a checkpoint and returns.

    Args:
        settings: ConfigDict of stages.base_config.
        formats: the source formats that a mixture may use, by name.
        progress: called with the description of a task; returns a context manager that yields the
            function to report progress to, or None.
    Raises:
        FileNotFoundError, ValueError: a setting, a folder or a source cannot be used, or too many
            records are bad.
        FloatingPointError: the loss, a gradient or a weight is NaN or infinite. Checkpoints saved
            before are not affected.
    """
    program = Program.from_settings(settings, formats, progress)
    inputs, output = program.inputs, Path(settings.output)
    check_processes(inputs.mesh)
    with contextlib.ExitStack() as stack:
        should_stop = stack.enter_context(stop_signal())
        stack.enter_context(lock_folder(output))
        stack.enter_context(library_log(output / LIBRARY_LOG))
        rows, skipped = inputs.open_rows(output)
        newest = max(steps_in(output / CHECKPOINTS), default=None)
        check_shared(newest)
        check_run_settings(settings, newest)
        checkpoints = stack.enter_context(Checkpoints(output / CHECKPOINTS, settings.keep))
        if newest is None:
            skipped.forget()  # listed by an earlier start; the records may have been fixed since
        iterator = stack.enter_context(contextlib.closing(iter(rows)))
        state, frozen = init_or_restore(program, checkpoints, iterator)
        if int(state.step) < settings.steps:
            checkpoints.check_disk_space(state)
        log = stack.enter_context(open_log(program, output, int(state.step), skipped))
        loop = Loop(
            step=stage_step(program, frozen),
            log=log.step,
            save=lambda _, state: checkpoints.save(state, iterator.get_state()),
            save_every=settings.save_every,
            callbacks=make_callbacks(program, frozen, log, output, int(state.step)),
            should_stop=should_stop,
        )
        state = loop.run(state, iterator, int(state.step), settings.steps)
        if int(state.step) == settings.steps:
            save_model(inputs, state, output / MODEL)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing to the folder. The lock ends with the process.

    Raises ValueError if another run is writing to the folder.
    """
    if jax.process_index():  # process 0 holds the lock for all processes
        yield
        return
    with locked(folder, LOCK):
        yield


def check_run_settings(settings, newest: int | None) -> None:
    """Writes the settings of a new run to run.json, or compares those of a resumed run with it.

    newest: the step of the newest checkpoint; before the first checkpoint settings may change.
    Raises ValueError if the settings differ, or if the folder is not that of a run.
    """
    if jax.process_index():  # process 0 checks for all processes
        return
    output, now = Path(settings.output), json.loads(settings.to_json_best_effort())
    now = {name: value for name, value in now.items() if name not in CHANGEABLE}
    before = read_json(output / SETTINGS) if (output / SETTINGS).is_file() else None
    is_run_folder = before is None or "init" in before
    if is_run_folder and newest is None and not (output / MODEL).exists():
        write_json(output / SETTINGS, now)
        return
    if not is_run_folder or newest is None or before is None:
        rule = f"output must be a new folder, or that of a run with {SETTINGS} and checkpoints"
        raise ValueError(f"{rule}, got {output}")
    names = sorted(before.keys() & now.keys())  # a later version may have other settings
    texts = {n: [shorten_text(str(value)) for value in (before[n], now[n])] for n in names}
    changed = [f"{n} {' -> '.join(texts[n])}" for n in names if before[n] != now[n]]
    if changed:
        rule = f"a resumed run must use the settings in {output / SETTINGS}"
        raise ValueError(f"{rule}, got {', '.join(changed)} (to use these, choose a new output)")


def init_or_restore(
    program: Program, checkpoints: Checkpoints, rows: grain.DatasetIterator
) -> tuple[TrainState, Params]:
    """Returns the initial or the restored state, and the frozen parameters.

    If the state is restored, `rows` is set to the position in the data stored with it.
    """
    parameters, steps = program.parameters, program.inputs.settings.steps
    if checkpoints.newest is None:
        return program.first_state(parameters.load_trained()), parameters.load_frozen()
    if checkpoints.newest > steps:
        least = f"at least {checkpoints.newest}, the step of the newest checkpoint"
        raise ValueError(f"steps must be {least}, got {steps}")
    state, data = checkpoints.restore(program.abstract_state)
    rows.set_state(data)
    logging.info("resuming from step %d", int(state.step))
    return state, parameters.load_frozen()


def open_log(program: Program, output: Path, start_step: int, skipped: Skipped) -> Log:
    """Opens the log of a run. start_step: the step that the run resumes from, or 0."""
    settings, devices = program.inputs.settings, program.inputs.mesh.devices
    peak = peak_flops(devices.flat[0])
    total = None if peak is None else peak * devices.size
    steps, log_every, terms = settings.steps, settings.log_every, tuple(program.objective.weights)
    return Log(output, steps, log_every, total, start_step, lambda: skipped.counts, terms)


def make_callbacks(
    program: Program, frozen: Params, log: Log, output: Path, start_step: int
) -> list[tuple[int, Callback]]:
    """Returns pairs (interval in steps, callback): evaluation and samples, if configured.

    start_step: as for open_log.
    """
    settings, callbacks = program.inputs.settings, []
    if settings.eval_every:
        rows, skipped = held_out_rows(program.inputs, output)
        if start_step == 0:
            skipped.forget()
        evaluate = evaluation_callback(program, frozen, log, rows, skipped)
        callbacks.append((settings.eval_every, evaluate))
    if settings.sample_every:
        sample = sampling_callback(program, frozen, log, output)
        callbacks.append((settings.sample_every, sample))
    return callbacks


@dataclasses.dataclass(frozen=True)
class Loop:
    """The training loop of all tasks.

    Attributes:
        step: (state, batch) -> (state, what to log). The state may be donated.
        log: log(number, *what to log). It raises if a step is not finite. It is called while the
            next step runs, and before the state is saved or given to a callback.
        save: (number, state) -> None.
        save_every: steps between two calls of `save`; the last step is always saved.
        callbacks: pairs (interval in steps, callback); the callbacks also run after the last step.
        should_stop: (number) -> whether to save and stop after this step.
    """

    step: Callable[[Any, Any], tuple[Any, tuple]]
    log: Callable[..., None]
    save: Callable[[int, Any], None]
    save_every: int
    callbacks: Sequence[tuple[int, Callable[[int, Any], None]]] = ()
    should_stop: Callable[[int], bool] = lambda number: False

    def run(self, state, batches: Iterator, start: int, steps: int):
        """Trains from step `start` to step `steps`, or until should_stop; returns the state."""
        pending = None  # a step is logged while the next one runs
        for number in range(start + 1, steps + 1):
            state, entry = self.step(state, next(batches))
            if pending:
                self.log(*pending)
            pending = number, *entry
            stopping, at_end = self.should_stop(number), number == steps
            due = [call for every, call in self.callbacks if at_end or number % every == 0]
            due = [] if stopping and not at_end else due  # the machine may be shut down soon
            save = stopping or at_end or number % self.save_every == 0
            if due or save:
                self.log(*pending)
                pending = None
            if save:
                self.save(number, state)
            for call in due:  # after saving, because a callback may fail
                call(number, state)
            if stopping:
                logging.info("received SIGTERM: saved a checkpoint at step %d", number)
                break
        return state


def stage_step(program: Program, frozen: Params) -> Callable:
    """Returns the step of a stage for Loop. It logs (metrics, records, flops), see Log.step."""
    inputs, parameters = program.inputs, program.parameters
    flops = step_flops(inputs.source.cfg, parameters.trained, parameters.frozen)

    def step(state: TrainState, batch: dict) -> tuple[TrainState, tuple]:
        state, metrics = program.step(state, frozen, program.put_rows(frozen, batch))
        return state, (metrics, batch["records"], flops(batch))

    return step


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step: whether all processes stop after it, because of SIGTERM.

    Preemptible machines receive SIGTERM. With several processes JAX handles the signal, so that all
    of them stop at the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    event = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield lambda step: event.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


def save_model(inputs: Inputs, state: TrainState, folder: Path) -> None:
    """Writes the trained model as a checkpoint folder, in the layout of the initial one.

    Frozen parts are copied unchanged. Adapters are merged. If the state has an exponential moving
    average, it is written instead of the last weights.
    """
    # adapters are merged in float32 and rounded afterwards
    dtype = jnp.float32 if inputs.lora else DTYPES[inputs.settings.model_dtype]
    trained = {}
    for path, array in eval_params(state).items():  # all processes gather each array together
        value = on_host(array.astype(dtype))
        if jax.process_index() == 0:
            trained[path] = value
    if jax.process_index() == 0:
        write_model(inputs, trained, folder)
    multihost_utils.sync_global_devices("model")  # at exit JAX waits at most 300 s for process 0


def write_model(inputs: Inputs, trained: dict[str, np.ndarray], folder: Path) -> None:
    """Writes the model folder, and for LoRA first the adapter folder next to it.

    Modules with a trained parameter are written in model_dtype, the others in their stored dtype.

    trained: trained arrays by path.
    """
    adapter = None
    if inputs.lora:
        adapter = save_adapter(inputs, trained, folder.with_name(ADAPTER_FOLDER))
    stored, dtype = stored_params(inputs.source), np.dtype(DTYPES[inputs.settings.model_dtype])
    find = inputs.source.family.parameter_table.find
    components = {find(path).component for path in trained}

    def read(path: str) -> np.ndarray:
        """Reads one array at a time: the adapted kernels of a 7B model in float32 are 24 GB."""
        if path in trained:
            return trained[path]
        array = stored.read(path)
        if adapter is not None:
            array = adapter.merged(path, array)
        return array.astype(dtype) if find(path).component in components else array

    metadata = {
        path: (dtype if find(path).component in components else kind, shape)
        for path, (kind, shape) in stored.metadata.items()
    }
    changed = dataclasses.replace(stored, metadata=metadata, read=read)
    for line in write_folder(inputs.source, changed, folder, inputs.source.layout, overwrite=True):
        logging.info(line)


def save_adapter(inputs: Inputs, trained: dict[str, np.ndarray], folder: Path) -> Adapter:
    """Writes the adapter in PEFT's format, with the module names of the initial checkpoint.

    Returns the adapter as read back from the folder, so that `model` is identical to what others
    get when they merge it.
    """
    source, alpha, init = inputs.source, inputs.lora.alpha, inputs.settings.init
    table, shapes = table_for(source.layout, source.cfg), param_shapes(source.cfg)
    write_adapter(folder, table, shapes, lora_factors(trained), alpha, init)
    logging.info("%s: adapters of %d layers", folder, len(trained) // 2)
    return open_adapter(dataclasses.replace(source, adapter=folder))


def on_host(array: jax.Array) -> np.ndarray:
    """Returns the full array on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
