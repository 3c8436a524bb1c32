"""A training step on packed rows: loss, gradients and AdamW, on all devices of the mesh.

R rows of a batch, A microbatches whose gradients are accumulated.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from janus_jax.models.janus import Janus
from janus_jax.processing.images import ImageConfig
from janus_jax.training.row_losses import Rows, row_losses
from janus_jax.training.state import TrainState, apply_gradients, default_promotion

Params = dict[str, jax.Array]  # by dotted path
Losses = dict[str, tuple[jax.Array, jax.Array]]  # by kind: summed loss, number of targets


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective: the weighted mean cross-entropy over all targets of a batch.

    Attributes:
        build: builds the model from its parameters.
        dtype: dtype of the computation, to which the float32 parameters are cast.
        float32_gradients: paths of the parameters that are not cast (Precision.FLOAT32_GRADIENT).
        images: normalization of the images to understand.
        weights: weight of a target, by kind of record.
        chunk: number of positions of a row whose logits are computed at a time.
        accumulate: A.
        mesh: the devices.
        shardings: shardings of the trainable parameters, by path.
    """

    build: Callable[[Params], Janus]
    dtype: jnp.dtype
    float32_gradients: Container[str]
    images: ImageConfig
    weights: Mapping[str, float]
    chunk: int
    accumulate: int
    mesh: Mesh
    shardings: Mapping[str, jax.sharding.Sharding]

    def losses(self, params: Params, frozen: Params, rows: Rows) -> Losses:
        """Returns the losses of one microbatch. params: float32, by path."""
        copies = {
            path: param if path in self.float32_gradients else param.astype(self.dtype)
            for path, param in params.items()
        }
        model = self.build(copies | frozen)
        return row_losses(model, rows, self.images, self.chunk, self.mesh)

    def totals(self, params: Params, frozen: Params, rows: Rows) -> Losses:
        """Returns the losses of all rows, computed one microbatch at a time."""
        return self._accumulated(lambda part: self.losses(params, frozen, part), rows)

    def gradients(self, params: Params, frozen: Params, rows: Rows) -> tuple[Params, Losses]:
        """Returns the gradient of the objective over all rows, and the losses."""

        def weighted_sum(params: Params, part: Rows) -> tuple[jax.Array, Losses]:
            losses = self.losses(params, frozen, part)
            return sum(self.weights[kind] * total for kind, (total, _) in losses.items()), losses

        def gradient(part: Rows) -> tuple[Params, Losses]:
            grads, losses = jax.grad(weighted_sum, has_aux=True)(params, part)
            # sharded as the parameters, or each device might hold full gradients
            constrain = jax.lax.with_sharding_constraint
            grads = {path: constrain(grad, self.shardings[path]) for path, grad in grads.items()}
            return grads, losses

        grads, losses = self._accumulated(gradient, rows)
        weight = self.weight(losses)
        return jax.tree.map(lambda grad: grad / weight, grads), losses

    def mean(self, losses: Losses) -> jax.Array:
        """Returns the value of the objective, float32 scalar."""
        total = sum(self.weights[kind] * loss for kind, (loss, _) in losses.items())
        return total / self.weight(losses)

    def weight(self, losses: Losses) -> jax.Array:
        """Returns the total weight of all targets, by which the mean divides, float32 scalar."""
        weight = sum(self.weights[kind] * count for kind, (_, count) in losses.items())
        return jnp.maximum(weight, 1e-9)  # rows without a target have no loss and no gradient

    def _accumulated(self, function: Callable, rows: Rows):
        """Returns the sum of function(microbatch), a pytree, over all microbatches."""
        if self.accumulate == 1:
            return function(rows)
        parts = jax.tree.map(self._microbatches, rows)
        shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums, part: Rows):
            return jax.tree.map(jnp.add, sums, function(part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def _microbatches(self, rows: jax.Array) -> jax.Array:
        """[R, ...] -> [A, R / A, ...]; each microbatch has rows of every device."""
        size = len(rows) // self.accumulate
        return rows.reshape(size, self.accumulate, *rows.shape[1:]).swapaxes(0, 1)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
    shardings: TrainState,
) -> Callable[[TrainState, Params, Rows], tuple[TrainState, dict]]:
    """Returns the jitted step (state, frozen, rows) -> (state, metrics). The state is donated.

    metrics is a dict of float32 scalars:
        sums, counts: dicts by kind of record with the summed loss and the number of targets.
        loss, weight: the objective and the total weight of the targets that it is a mean over.
        grad_norm: before clipping.
        param_norm: after the step.
        learning_rate
        positions, tokens: number of positions in the rows, and of those that are not padding.
    """

    @default_promotion()
    def step(state: TrainState, frozen: Params, rows: Rows) -> tuple[TrainState, dict]:
        grads, losses = objective.gradients(state.params, frozen, rows)
        metrics = dict(
            sums={kind: total for kind, (total, _) in losses.items()},
            counts={kind: count for kind, (_, count) in losses.items()},
            loss=objective.mean(losses),
            weight=objective.weight(losses),
            grad_norm=optax.tree.norm(grads),
            learning_rate=schedule(state.step),
            positions=jnp.float32(rows["segment_ids"].size),
            tokens=jnp.sum(rows["segment_ids"] > 0, dtype=jnp.float32),
        )
        state = apply_gradients(state, grads, optimizer, ema_decay)
        return state, metrics | dict(param_norm=optax.tree.norm(state.params))

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
