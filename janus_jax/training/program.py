"""The programs of a run: its state, its objective, and the jitted programs of a step."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from janus_jax.data.records import KINDS
from janus_jax.data.sources import FORMATS, Formats
from janus_jax.interop.load import DTYPES
from janus_jax.sharding import batch_sharding
from janus_jax.training.image_tokens import make_tokenize
from janus_jax.training.parameters import Parameters, Shapes
from janus_jax.training.row_losses import row_losses
from janus_jax.training.settings import Inputs, no_progress
from janus_jax.training.step import (
    Objective,
    Params,
    Rows,
    TrainState,
    first_state,
    learning_rates,
    make_optimizer,
    make_step,
    state_shardings,
)


class Program:
    """The training programs of a run. Creating it loads no weights and compiles nothing.

    Attributes:
        inputs: the settings and what they name.
        parameters: the parameters.
        objective: the training objective.
    """

    def __init__(self, inputs: Inputs):
        """Raises ValueError as Parameters does."""
        settings = inputs.settings
        self.inputs, self.parameters = inputs, Parameters(inputs)
        self._optimizer, self._use_ema = make_optimizer(settings), settings.ema_decay > 0
        self.objective = Objective(
            build=self.parameters.build,
            dtype=DTYPES[settings.dtype],
            cast_by_model=self.parameters.cast_by_model(),
            loss=functools.partial(
                row_losses,
                images=inputs.processor.image_config,
                chunk=settings.chunk,
                mesh=inputs.mesh,
            ),
            weights={kind: settings.loss_weights[kind] for kind in KINDS},
            accumulate=settings.accumulate,
            shardings=_shardings(self.parameters.trained),
        )

    @classmethod
    def from_settings(
        cls, settings, formats: Formats = FORMATS, progress=no_progress
    ) -> "Program":
        """Checks the settings, see Inputs.from_settings, and which parameters they train."""
        return cls(Inputs.from_settings(settings, formats, progress))

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """The state with shapes, dtypes and shardings instead of arrays."""
        trained = self.parameters.trained
        state = jax.eval_shape(self._first_state, trained)
        replicated = NamedSharding(self.inputs.mesh, PartitionSpec())
        shardings = state_shardings(state, self._optimizer, _shardings(trained), replicated)
        return jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), state, shardings)

    def first_state(self, params: Params) -> TrainState:
        """Returns the state at step 0. `params` are donated."""
        shardings = _shardings(self.abstract_state)
        return jax.jit(self._first_state, donate_argnums=0, out_shardings=shardings)(params)

    def _first_state(self, params: Params) -> TrainState:
        return first_state(params, self._optimizer, self._use_ema)

    @functools.cached_property
    def step(self) -> Callable:
        """The jitted step (state, frozen, rows) -> (state, metrics), see make_step."""
        settings = self.inputs.settings
        schedule, shardings = learning_rates(settings), _shardings(self.abstract_state)
        return make_step(
            self.objective, self._optimizer, schedule, settings.ema_decay, shardings
        )

    @functools.cached_property
    def tokenize(self) -> Callable | None:
        """The jitted encoder of images to generate, see make_tokenize; None without such images."""
        rows, codec = self.inputs.rows, self.inputs.source.family.image_codec
        if rows.tokenized or not rows.max_generated_images:
            return None

        def build(params: Params):
            return getattr(self.parameters.build(params), codec)

        return make_tokenize(build, self.inputs.mesh)

    def put_rows(self, frozen: Params, batch: Mapping[str, np.ndarray]) -> Rows:
        """Returns the global rows that the loss takes: with tokens as the images to generate.

        frozen: the frozen parameters. batch: the rows of this process.
        """
        rows = put_rows(batch, self.inputs.mesh)
        if self.tokenize is None:
            return rows
        codec = self.parameters.image_codec(frozen)
        indices = self.tokenize(codec, rows["generated"], rows["gen_mask"])
        return rows | dict(generated=indices)

    def lowerings(self) -> Iterator[tuple[str, Callable[[], jax.stages.Lowered]]]:
        """Yields the name of each program of a step and a function that lowers it, in order.

        The devices need not be present.
        """
        frozen, rows = self.parameters.loaded_frozen, row_shapes(self.inputs)
        if self.tokenize is not None:
            codec = self.parameters.image_codec(frozen)
            images = rows["generated"], rows["gen_mask"]
            yield "image_tokens", functools.partial(self.tokenize.lower, codec, *images)
            tokenized = dataclasses.replace(self.inputs.rows, tokenized=True)
            rows = row_shapes(dataclasses.replace(self.inputs, rows=tokenized))
        yield "step", functools.partial(self.step.lower, self.abstract_state, frozen, rows)


def _shardings(tree):
    """Returns the sharding of each leaf."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def put_rows(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays from the rows of this process. Entries that are lists are omitted."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, values)
        for name, values in rows.items()
        if isinstance(values, np.ndarray)
    }


def row_shapes(inputs: Inputs) -> Shapes:
    """Returns the shapes of a batch of rows as read, of all processes (data/packing.py)."""
    sharding, rows = batch_sharding(inputs.mesh), inputs.rows
    return {
        name: jax.ShapeDtypeStruct((rows.batch_size, *shape), dtype, sharding=sharding)
        for name, (shape, dtype) in rows.fields(inputs.source.cfg).items()
    }
