"""Set up a run from its config: devices, parameters and the jitted step."""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.data.loading import RowsConfig
from janus_jax.data.records import KINDS
from janus_jax.data.sources import FORMATS, Formats
from janus_jax.interop.files import Report
from janus_jax.interop.folders import check_folder, check_processor
from janus_jax.interop.load import (
    DTYPES,
    FLOAT32_PATHS,
    Folder,
    abstract,
    check_weights,
    load_params,
    merge_params,
    open_folder,
)
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.remat import REMAT_CHOICES
from janus_jax.paths import check_local
from janus_jax.processing.processor import Processor
from janus_jax.sharding import (
    batch_sharding,
    check_mesh,
    make_mesh,
    num_batch_shards,
    parse_mesh,
    sharding_for,
)
from janus_jax.training.lora import ADAPTERS, LoRAConfig, add_adapters
from janus_jax.training.stages import ALL_BUT_TOKENIZER, base_config
from janus_jax.training.state import (
    TrainState,
    init_state,
    learning_rates,
    make_optimizer,
    state_shardings,
)
from janus_jax.training.step import Objective, Params, make_step

MODEL = "model"  # folder of the trained model in a run's output

Shapes = dict[str, jax.ShapeDtypeStruct]  # with shardings


def no_progress(description: str) -> contextlib.AbstractContextManager[None]:
    """Reports nothing."""
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Setup:
    """A validated config. Creating it loads no weights.

    Attributes:
        cfg: ConfigDict of stages.base_config.
        source: the initial checkpoint folder.
        processor: the processor of the initial checkpoint.
        model_cfg: the sizes of its model, with the dtypes to train in.
        mesh: the devices.
        rows: how the rows of a batch are made.
        lora: the adapters to train instead of the weights, or None.
        formats: the formats of sources that the mixtures may name.
        progress: makes the report of a task, for example a progress bar, from its description.
    """

    cfg: Any
    source: Folder
    processor: Processor
    model_cfg: JanusConfig
    mesh: Mesh
    rows: RowsConfig
    lora: LoRAConfig | None
    formats: Formats
    progress: Callable[[str], contextlib.AbstractContextManager[Report | None]]

    @classmethod
    def from_config(cls, cfg, formats: Formats = FORMATS, progress=no_progress) -> "Setup":
        """Checks the config.

        cfg: ConfigDict of stages.base_config.
        formats: the formats of sources that the mixtures may name.
        progress: see the attribute; by default nothing is reported.
        Raises FileNotFoundError or ValueError if it cannot be trained.
        """
        check_settings(cfg)
        init = check_init(cfg.init)
        check_local("output", cfg.output)
        if not cfg.output or (Path(cfg.output).exists() and not Path(cfg.output).is_dir()):
            raise ValueError(f"output must be a writable folder, got {cfg.output!r}")
        if init.resolve() == (Path(cfg.output) / MODEL).resolve():
            raise ValueError(f"init must not be the model folder in output, got {cfg.init}")
        source, processor = open_folder(init), Processor.from_dir(init)
        check_processor(init, processor, source.cfg)
        mesh = parse_mesh(cfg.mesh) if cfg.mesh else make_mesh(fsdp=jax.device_count())
        check_mesh(mesh, source.cfg)
        model_cfg = source.cfg.with_dtype(DTYPES[cfg.dtype]).with_remat(cfg.remat)
        lora = None
        if cfg.lora_rank and cfg.trained != ALL_BUT_TOKENIZER:
            rule = "trained cannot be combined with LoRA; set lora_rank=0 or remove trained"
            raise ValueError(f"{rule}, got lora_rank={cfg.lora_rank} trained={cfg.trained!r}")
        if cfg.lora_rank:
            lora = LoRAConfig(cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
        rows = rows_config(cfg, mesh)
        check_weights(source)  # before a model with the sizes in config.json is built
        setup = cls(cfg, source, processor, model_cfg, mesh, rows, lora, formats, progress)
        trained, frozen = setup.shapes
        if cfg.reinit:
            check_reinit(cfg.reinit, trained, frozen)
        return setup

    @property
    def trained(self) -> re.Pattern:
        """A pattern that matches the beginning of the paths of trainable parameters."""
        return re.compile(ADAPTERS if self.lora else self.cfg.trained)

    @functools.cached_property
    def model(self) -> tuple[nnx.GraphDef, nnx.State]:
        """The graph and the abstract state of the model, including adapters."""
        graph, state = abstract(self.model_cfg)
        if not self.lora:
            return graph, state
        model = nnx.merge(graph, state)
        add_adapters(model, self.lora, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        return graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)

    @functools.cached_property
    def shapes(self) -> tuple[Shapes, Shapes]:
        """Shapes, dtypes and shardings of the trainable and of the frozen parameters, by path.

        Trainable parameters and the image tokenizer are float32, other frozen parameters cfg.dtype.
        Parameters that no step uses are in neither dict.

        Raises ValueError if no parameter is trainable, or if one of the image tokenizer is.
        """
        sharding, pattern = sharding_for(self.mesh), self.trained
        tokenizer = re.compile(FLOAT32_PATHS)
        trained, frozen = {}, {}
        for path, leaf in flat(self.model[1]):
            is_trained = bool(pattern.match(path))
            is_float32 = is_trained or tokenizer.match(path)
            shape = jax.ShapeDtypeStruct(
                leaf.shape,
                jnp.float32 if is_float32 else DTYPES[self.cfg.dtype],
                sharding=sharding(path, leaf.shape),
            )
            (trained if is_trained else frozen)[path] = shape
        if not trained:
            raise ValueError(f"no parameter path matches trained={pattern.pattern!r}")
        if any(map(tokenizer.match, trained)):
            rule = "trained must match no parameter of the image tokenizer, gen_vq"
            raise ValueError(f"{rule}, got {pattern.pattern!r}")
        if self.rows.tokenized:  # the image tokens are precomputed
            frozen = {path: leaf for path, leaf in frozen.items() if not tokenizer.match(path)}
        return trained, frozen

    def load_frozen(self) -> Params:
        """Loads the frozen parameters from the initial checkpoint."""
        return self._load(self.shapes[1], DTYPES[self.cfg.dtype])

    def load_trained(self) -> Params:
        """Loads or initializes the trainable parameters, in float32."""
        trained = self.shapes[0]
        new = {path: leaf for path, leaf in trained.items() if self._is_reinitialized(path)}
        stored = trained.keys() - new.keys()
        if not stored:
            return self._init_params(new)
        return self._load(stored, jnp.float32) | self._init_params(new)

    def _load(self, paths: Container[str], dtype) -> Params:
        """Loads parameters from the initial checkpoint; process 0 reports the bytes read."""
        sharding = sharding_for(self.mesh)
        with self.progress(f"loading {self.cfg.init}") as report:
            report = report if jax.process_index() == 0 else None
            return load_params(
                self.source.path, self.source.cfg, sharding, dtype, paths=paths, progress=report
            )

    def _is_reinitialized(self, path: str) -> bool:
        """Whether a parameter is initialized at random: adapters and matches of `reinit`."""
        reinit = self.cfg.reinit
        return bool(re.match(ADAPTERS, path) or (reinit and re.match(reinit, path)))

    def _init_params(self, shapes: Shapes) -> Params:
        """Initializes parameters at random."""
        if not shapes:
            return {}

        def make() -> Params:
            rngs = nnx.Rngs(self.cfg.seed)
            model = Janus(self.model_cfg, rngs=rngs)
            if self.lora:
                add_adapters(model, self.lora, rngs=rngs)
            values = dict(flat(nnx.state(model)))
            return {path: values[path].astype(leaf.dtype) for path, leaf in shapes.items()}

        shardings = {path: leaf.sharding for path, leaf in shapes.items()}
        return jax.jit(make, out_shardings=shardings)()

    def build(self) -> Callable[[Params], Janus]:
        """Returns a function that builds the model from parameters by path.

        Parameters that no step uses stay abstract.
        """
        graph, state = self.model
        leaves = dict(flat(state))

        def make(params: Params) -> Janus:
            return merge_params(graph, state, lambda path: params.get(path, leaves[path]))

        return make

    def objective(self) -> Objective:
        """Returns the training objective."""
        return Objective(
            build=self.build(),
            dtype=DTYPES[self.cfg.dtype],
            images=self.processor.image_config,
            weights=self.cfg.loss_weights.to_dict(),
            chunk=self.cfg.chunk,
            accumulate=self.cfg.accumulate,
            mesh=self.mesh,
            shardings={path: leaf.sharding for path, leaf in self.shapes[0].items()},
        )

    def abstract_state(self) -> TrainState:
        """Returns the state with shapes, dtypes and shardings instead of arrays."""
        optimizer, trained = make_optimizer(self.cfg), self.shapes[0]
        use_ema = self.cfg.ema_decay > 0
        state = jax.eval_shape(lambda params: init_state(params, optimizer, use_ema), trained)
        shardings = {path: leaf.sharding for path, leaf in trained.items()}
        replicated = NamedSharding(self.mesh, PartitionSpec())
        shardings = state_shardings(state, optimizer, shardings, replicated)
        return jax.tree.map(lambda leaf, spec: leaf.update(sharding=spec), state, shardings)

    def first_state(self, params: Params) -> TrainState:
        """Returns the state at step 0. `params` are donated."""
        optimizer, use_ema = make_optimizer(self.cfg), self.cfg.ema_decay > 0
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state())
        make = jax.jit(
            lambda params: init_state(params, optimizer, use_ema),
            donate_argnums=0,
            out_shardings=shardings,
        )
        return make(params)

    def step(self) -> Callable:
        """Returns the jitted step of make_step."""
        return make_step(
            self.objective(),
            make_optimizer(self.cfg),
            learning_rates(self.cfg),
            self.cfg.ema_decay,
            jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state()),
        )


def put_rows(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays from the rows of this process. Entries that are lists are omitted."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in rows.items()
        if isinstance(values, np.ndarray)
    }


def flat(state: nnx.State) -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the value of every leaf; values may be abstract."""
    for keys, leaf in nnx.to_flat_state(state):
        yield ".".join(map(str, keys)), leaf.get_value()


def rows_config(cfg, mesh: Mesh) -> RowsConfig:
    """Returns the settings of the rows.

    Raises ValueError if the rows cannot be divided among the devices and processes.
    """
    settings = {field.name: cfg[field.name] for field in dataclasses.fields(RowsConfig)}
    rows = RowsConfig(**settings | dict(mixture=cfg.mixture.to_dict()))
    parts = num_batch_shards(mesh) * cfg.accumulate
    if rows.batch_size % parts:
        rule = f"batch_size must be a multiple of data * fsdp * accumulate = {parts}"
        raise ValueError(f"{rule}, got {rows.batch_size}")
    rows.own_streams(jax.process_index(), jax.process_count())
    return rows


def check_init(init: str) -> Path:
    """Returns the checkpoint folder `init`; "janus_tiny" is the shipped model.

    Raises FileNotFoundError if it is not a checkpoint folder.
    """
    try:
        return check_folder(init)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init must be a checkpoint folder: {error}") from None


def check_reinit(reinit: str, trained: Iterable[str], frozen: Iterable[str]) -> None:
    """Raises ValueError unless `reinit` matches a trainable parameter and no frozen one.

    trained, frozen: parameter paths.
    """
    if not any(re.match(reinit, path) for path in trained):
        raise ValueError(f"no trainable parameter matches {reinit=}")
    frozen_matches = [path for path in frozen if re.match(reinit, path)]
    if frozen_matches:
        rule = "reinit must not match a frozen parameter"
        raise ValueError(f"{rule}, got {reinit!r}, which matches {frozen_matches[0]}")


def check_settings(cfg) -> None:
    """Raises ValueError for a number out of its range, or a name that is not a valid choice."""
    if unknown := sorted(set(cfg) - set(base_config())):
        raise ValueError(f"the config has settings that do not exist: {', '.join(unknown)}")
    counts = ("steps", "log_every", "save_every", "keep", "accumulate", "chunk", "eval_batches")
    minimums = dict.fromkeys(counts, 1)
    minimums |= dict.fromkeys(("seed", "lora_rank", "eval_every", "sample_every"), 0)
    for name, minimum in minimums.items():
        if cfg[name] < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {cfg[name]}")
    for name in ("ema_decay", "b1", "b2"):
        if not 0 <= cfg[name] < 1:
            raise ValueError(f"{name} must be at least 0 and below 1, got {cfg[name]}")
    if not 0 < cfg.max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm must be positive and finite, got {cfg.max_grad_norm}")
    for name in ("learning_rate", "end_learning_rate", "weight_decay"):
        if not 0 <= cfg[name] < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {cfg[name]}")
    if cfg.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got {cfg.seed}")
    learning_rates(cfg)  # raises if the settings of the schedule do not fit together
    if cfg.eval_every and not cfg.eval_mixture:
        raise ValueError(f"eval_every={cfg.eval_every} requires eval_mixture, got none")
    if cfg.sample_every and not (cfg.prompts or cfg.questions):
        raise ValueError(f"sample_every={cfg.sample_every} requires prompts or questions, got none")
    for name, choices in dict(dtype=DTYPES, model_dtype=DTYPES, remat=REMAT_CHOICES).items():
        if cfg[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {cfg[name]!r}")
    weights = cfg.loss_weights.to_dict()
    if weights.keys() != set(KINDS):
        raise ValueError(f"loss_weights must have the keys {', '.join(KINDS)}, got {weights}")
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(f"loss_weights must be at least 0, and one positive, got {weights}")
    for pair in cfg.questions:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"questions must be pairs (image path, question), got {pair!r}")
    for name in ("trained", "reinit", "lora_targets"):
        try:
            re.compile(cfg[name])
        except re.error as error:
            rule = "must be a regular expression"
            raise ValueError(f"{name} {rule}, got {cfg[name]!r}: {error}") from None
