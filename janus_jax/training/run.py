"""A run of one stage: from its newest checkpoint, or its beginning, to its last step.

OUTPUT/run.json             the settings that the run was begun with
OUTPUT/checkpoints/STEP     what the run goes on from when it is started again
OUTPUT/metrics.jsonl        what it logs; the same in OUTPUT/tensorboard
OUTPUT/samples/STEP         images and answers
OUTPUT/skipped-HOST.jsonl   records that were left out; those of evaluation in OUTPUT/eval
OUTPUT/libraries.log        warnings and tracebacks of the storage libraries, if there were any
OUTPUT/model                the trained model, once it has come to its end
"""

import contextlib
import dataclasses
import json
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from janus_jax.checks import shorten_text
from janus_jax.data.loading import open_rows
from janus_jax.data.skipped import Skipped
from janus_jax.interop.adapter import Adapter
from janus_jax.interop.adapter_writing import write_adapter
from janus_jax.interop.export import write_folder
from janus_jax.interop.load import open_adapter, param_shapes, stored_params, table_for
from janus_jax.library_log import library_log
from janus_jax.paths import locked
from janus_jax.processing.json_files import read_json, write_json
from janus_jax.training.checkpoint_files import steps_in
from janus_jax.training.checkpoints import Checkpoints
from janus_jax.training.distributed import check_processes, check_shared
from janus_jax.training.evaluation import Watch, evaluation, held_out_rows, samples
from janus_jax.training.flops import StepFlops, peak_flops, step_flops
from janus_jax.training.lora import factors_of
from janus_jax.training.metrics import Log
from janus_jax.training.setup import DTYPES, MODEL, Params, Setup, put_rows
from janus_jax.training.state import TrainState, written_params

BEGUN, CHECKPOINTS, LOCK, LIBRARIES = "run.json", "checkpoints", ".lock", "libraries.log"
ADAPTER = "adapter"  # of a LoRA run's output, beside MODEL
# What may differ when a run goes on: how long, where, and what is told of it. Of these `steps`
# changes what is learned, for the learning rate then follows the cosine that ends there.
CHANGEABLE = frozenset(
    "output steps mesh threads accumulate chunk remat log_every save_every keep eval_every"
    " eval_batches eval_mixture sample_every prompts questions max_bad model_dtype".split()
)


def train_stage(cfg) -> None:
    """Trains as the config says, from the newest checkpoint in cfg.output if there is one.

    cfg: ConfigDict of stages.base_config. On SIGTERM it saves and returns.

    Raises:
        FileNotFoundError, ValueError: a setting, a folder or a source that cannot be used, or too
            many bad records.
        FloatingPointError: the loss is no number; the newest checkpoint is the last good one.
    """
    setup, output = Setup.from_config(cfg), Path(cfg.output)
    check_processes(setup.mesh)
    hosts = jax.process_index(), jax.process_count()
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop_signal())
        stack.enter_context(alone_in(output))
        stack.enter_context(library_log(output / LIBRARIES))
        rows, skipped = open_rows(setup.rows, setup.processor, setup.source.cfg, output, *hosts)
        newest = max(steps_in(output / CHECKPOINTS), default=None)
        check_shared(newest)
        check_output(cfg, newest)
        checkpoints = stack.enter_context(Checkpoints(output / CHECKPOINTS, cfg.keep))
        if newest is None:
            skipped.forget()  # of a start before, after which they may have been mended
        iterator = stack.enter_context(contextlib.closing(iter(rows)))
        state, frozen = begin(setup, checkpoints, iterator)
        if int(state.step) < cfg.steps:
            checkpoints.check_room(state)
        log = stack.enter_context(open_log(setup, output, int(state.step), skipped))
        costs = step_flops(setup.source.cfg, *setup.shapes)
        watches = watches_of(setup, frozen, log, output, int(state.step))
        run = Run(setup.step(), setup.mesh, frozen, costs, checkpoints, log, watches, stop)
        state = run.steps(state, iterator, cfg.steps, cfg.save_every)
        if int(state.step) == cfg.steps:
            save_model(setup, state, output / MODEL)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other runs from writing to the folder; a process that ends, however, keeps none.

    Raises ValueError if another one writes there.
    """
    if jax.process_index():  # the first one does it for all
        yield
        return
    with locked(folder, LOCK):
        yield


def check_output(cfg, newest: int | None) -> None:
    """Notes the settings of a run that begins; one that goes on must have the same.

    newest: the step of its newest checkpoint; before the first one settings may be mended.
    Raises ValueError for other settings, and for a folder that is no run's.
    """
    if jax.process_index():  # the first one does it for all
        return
    output, now = Path(cfg.output), json.loads(cfg.to_json_best_effort())
    now = {name: value for name, value in now.items() if name not in CHANGEABLE}
    before = read_json(output / BEGUN) if (output / BEGUN).is_file() else None
    ours = before is None or "init" in before
    if ours and newest is None and not (output / MODEL).exists():
        write_json(output / BEGUN, now)
        return
    if not ours or newest is None or before is None:
        rule = f"output must be a new folder, or that of a run with its checkpoints and {BEGUN}"
        raise ValueError(f"{rule}, got {output}")
    names = sorted(before.keys() & now.keys())  # a later version may know other settings
    shown = {n: [shorten_text(str(value)) for value in (before[n], now[n])] for n in names}
    changed = [f"{n} {' -> '.join(shown[n])}" for n in names if before[n] != now[n]]
    if changed:
        rule = f"a run must go on with the settings it began with, those of {output / BEGUN}"
        raise ValueError(f"{rule}, got {', '.join(changed)} (a new run needs another output)")


def begin(
    setup: Setup, checkpoints: Checkpoints, rows: grain.DatasetIterator
) -> tuple[TrainState, Params]:
    """The state to go on from and the frozen parameters; rows are set to where the state was."""
    if checkpoints.newest is None:
        return setup.first_state(setup.load_trained()), setup.load_frozen()
    if checkpoints.newest > setup.cfg.steps:
        stands = f"at least {checkpoints.newest}, where the run stands"
        raise ValueError(f"steps must be {stands}, got {setup.cfg.steps}")
    state, data = checkpoints.restore(setup.abstract_state())
    rows.set_state(data)
    logging.info("resuming from step %d", int(state.step))
    return state, setup.load_frozen()


def open_log(setup: Setup, output: Path, first: int, skipped: Skipped) -> Log:
    """first: the step that the run goes on from."""
    cfg, devices = setup.cfg, setup.mesh.devices
    peak = peak_flops(devices.flat[0])
    total = None if peak is None else peak * devices.size
    return Log(output, cfg.steps, cfg.log_every, total, first, lambda: skipped.counts)


def watches_of(
    setup: Setup, frozen: Params, log: Log, output: Path, first: int
) -> list[tuple[int, Watch]]:
    """What is asked of the run, and every how many steps. first: as of open_log."""
    cfg, found = setup.cfg, []
    if cfg.eval_every:
        rows, skipped = held_out_rows(setup, output)
        if first == 0:
            skipped.forget()
        found.append((cfg.eval_every, evaluation(setup, frozen, log, rows, skipped)))
    if cfg.sample_every:
        found.append((cfg.sample_every, samples(setup, frozen, log, output)))
    return found


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same from step to step."""

    step: Callable
    mesh: Mesh
    frozen: Params
    costs: StepFlops
    checkpoints: Checkpoints
    log: Log
    watches: Sequence[tuple[int, Watch]]
    stop: threading.Event

    def steps(
        self, state: TrainState, rows: grain.DatasetIterator, steps: int, save_every: int
    ) -> TrainState:
        """Runs until so many steps are done, or it is told to stop, and saves; the last state."""
        waiting = None  # a step's metrics are looked at once the next step is under way
        for number in range(int(state.step) + 1, steps + 1):
            batch = next(rows)
            records, costs = batch["records"], self.costs(batch)
            state, metrics = self.step(state, self.frozen, put_rows(batch, self.mesh))
            if waiting:
                self.log.step(*waiting)
            waiting = number, metrics, records, costs
            stopping = self._stopping(number)
            at_end = number == steps
            due = [watch for every, watch in self.watches if at_end or number % every == 0]
            due = [] if stopping and not at_end else due  # there may be little time
            save = stopping or at_end or number % save_every == 0
            if due or save:
                self.log.step(*waiting)  # first of all: what is asked and saved is good
                waiting = None
            if save:
                self.checkpoints.save(state, rows.get_state())
            for watch in due:  # after saving, where the step is also saved: one may fail
                watch(number, state)
            if stopping:
                logging.info("told to stop: saved at step %d", number)
                break
        return state

    def _stopping(self, step: int) -> bool:
        """Whether all processes are to stop after this step."""
        if jax.process_count() == 1:
            return self.stop.is_set()
        return multihost_utils.reached_preemption_sync_point(step)


@contextlib.contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, as machines that are taken away send it.

    With several processes JAX listens for the signal, so that all of them stop at one step.
    """
    event = threading.Event()
    if jax.process_count() > 1:
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def save_model(setup: Setup, state: TrainState, folder: Path) -> None:
    """Writes the trained model as a checkpoint folder, in the layout of the one it began with.

    What did not train is as it was there. Adapters are merged; a moving average goes before the
    last weights.
    """
    # adapters are merged before they are rounded
    dtype = jnp.float32 if setup.lora else DTYPES[setup.cfg.model_dtype]
    trained = {}
    for path, array in written_params(state).items():  # gathered by all processes together
        value = on_host(array.astype(dtype))
        if jax.process_index() == 0:
            trained[path] = value
    if jax.process_index() == 0:
        write_model(setup, trained, folder)
    multihost_utils.sync_global_devices("model")  # at exit the others wait for 300 s at most


def write_model(setup: Setup, trained: dict[str, np.ndarray], folder: Path) -> None:
    """trained: arrays by path. Parts of the model in which something trained are of model_dtype,
    the others as they are stored. Adapters are written first, to a folder of their own beside."""
    adapter = save_adapter(setup, trained, folder.with_name(ADAPTER)) if setup.lora else None
    stored, dtype = stored_params(setup.source), np.dtype(DTYPES[setup.cfg.model_dtype])
    parts = {path.split(".")[0] for path in trained}

    def read(path: str) -> np.ndarray:
        """One array at a time: adapted kernels of a 7B model in float32 are 24 GB."""
        if path in trained:
            return trained[path]
        array = stored.read(path)
        if adapter is not None:
            array = adapter.merged(path, array)
        return array.astype(dtype) if path.split(".")[0] in parts else array

    metadata = {
        path: (dtype if path.split(".")[0] in parts else kind, shape)
        for path, (kind, shape) in stored.metadata.items()
    }
    changed = dataclasses.replace(stored, metadata=metadata, read=read)
    for line in write_folder(setup.source, changed, folder, setup.source.layout, overwrite=True):
        logging.info(line)


def save_adapter(setup: Setup, trained: dict[str, np.ndarray], folder: Path) -> Adapter:
    """Writes the adapters in PEFT's format, with the module names of the folder it began with.

    Returns them as they are read again, so that `model` has what others merge.
    """
    source, shapes = setup.source, param_shapes(setup.source.cfg)
    table = table_for(source.layout, source.cfg)
    write_adapter(folder, table, shapes, factors_of(trained), setup.lora.alpha, setup.cfg.init)
    logging.info("%s: adapters of %d layers", folder, len(trained) // 2)
    return open_adapter(dataclasses.replace(source, adapter=folder))


def on_host(array: jax.Array) -> np.ndarray:
    """The whole array, on every process."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)
