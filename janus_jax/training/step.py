"""One step of training on packed rows: loss, gradients, AdamW, on every device of the mesh.

R rows of a step, A parts of them whose gradients are added up.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from janus_jax.models.janus import Janus
from janus_jax.processing.images import ImageConfig
from janus_jax.training.row_losses import Rows, row_losses
from janus_jax.training.state import TrainState, apply_gradients

Params = dict[str, jax.Array]  # by dotted path
Found = dict[str, tuple[jax.Array, jax.Array]]  # by kind: summed loss, number of targets


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the weighted mean of the cross-entropy of all targets of a step.

    Attributes:
        build: makes the model of its parameters.
        dtype: of the copies of the float32 masters that the model computes with.
        images: how pictures to be looked at are normalised.
        weights: of a target, by kind of record.
        chunk: positions of a row whose logits are there at a time.
        accumulate: A.
        mesh: the devices.
    """

    build: Callable[[Params], Janus]
    dtype: jnp.dtype
    images: ImageConfig
    weights: Mapping[str, float]
    chunk: int
    accumulate: int
    mesh: Mesh

    def losses(self, params: Params, frozen: Params, rows: Rows) -> Found:
        """Losses of one part of the rows; params: the float32 masters."""
        copies = jax.tree.map(lambda param: param.astype(self.dtype), params)
        model = self.build(copies | frozen)
        return row_losses(model, rows, self.images, self.chunk, self.mesh)

    def gradients(self, params: Params, frozen: Params, rows: Rows) -> tuple[Params, Found]:
        """The gradient of the objective over all rows, and the losses that it is made of."""

        def weighted_sum(params: Params, part: Rows) -> tuple[jax.Array, Found]:
            found = self.losses(params, frozen, part)
            return sum(self.weights[kind] * total for kind, (total, _) in found.items()), found

        gradient = jax.grad(weighted_sum, has_aux=True)

        def add(sums, part: Rows):
            return jax.tree.map(jnp.add, sums, gradient(params, part)), None

        if self.accumulate == 1:
            grads, found = gradient(params, rows)
        else:
            parts = jax.tree.map(self._parts, rows)
            first = jax.tree.map(lambda x: x[0], parts)
            shapes = jax.eval_shape(gradient, params, first)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            (grads, found), _ = jax.lax.scan(add, zeros, parts)
        number = self._mean_of(found)[1]
        return jax.tree.map(lambda grad: grad / number, grads), found

    def mean(self, found: Found) -> jax.Array:
        """The objective, float32 scalar."""
        total, number = self._mean_of(found)
        return total / number

    def _mean_of(self, found: Found) -> tuple[jax.Array, jax.Array]:
        total = sum(self.weights[kind] * loss for kind, (loss, _) in found.items())
        number = sum(self.weights[kind] * count for kind, (_, count) in found.items())
        return total, jnp.maximum(number, 1e-9)  # rows without a target: no loss, no gradient

    def _parts(self, rows: jax.Array) -> jax.Array:
        """[R, ...] -> [A, R / A, ...]; the rows of each device give some to each part."""
        each = len(rows) // self.accumulate
        return rows.reshape(each, self.accumulate, *rows.shape[1:]).swapaxes(0, 1)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    average_decay: float,
    shardings: TrainState,
) -> Callable[[TrainState, Params, Rows], tuple[TrainState, dict]]:
    """The jitted (state, frozen, rows) -> (state, metrics); the state is given away.

    metrics: dict(sums, counts: by kind; loss, grad_norm, learning_rate, tokens: float32 scalars).
    The norm is that before clipping; tokens are places of the rows that are no padding.
    """

    def step(state: TrainState, frozen: Params, rows: Rows) -> tuple[TrainState, dict]:
        grads, found = objective.gradients(state.params, frozen, rows)
        metrics = dict(
            sums={kind: total for kind, (total, _) in found.items()},
            counts={kind: count for kind, (_, count) in found.items()},
            loss=objective.mean(found),
            grad_norm=optax.tree.norm(grads),
            learning_rate=schedule(state.step),
            tokens=jnp.sum(rows["segment_ids"] > 0, dtype=jnp.float32),
        )
        return apply_gradients(state, grads, optimizer, average_decay), metrics

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
