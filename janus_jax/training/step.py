"""One step of training on packed rows: loss, gradients, AdamW, on every device of the mesh.

R rows of a step, A parts of them whose gradients are added up.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from janus_jax.models.janus import Janus
from janus_jax.processing.images import ImageConfig
from janus_jax.training.row_losses import Rows, row_losses
from janus_jax.training.state import TrainState, apply_gradients, default_promotion

Params = dict[str, jax.Array]  # by dotted path

# Gradients of these are sums over many tokens, or over the chunks of a row: the model casts what it
# looks up or multiplies with, so that they are added up in float32.
SUMMED = re.compile(r".*\.embedding$|language_model\.lm_head\.|gen_head\.")
Found = dict[str, tuple[jax.Array, jax.Array]]  # by kind: summed loss, number of targets


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised: the weighted mean of the cross-entropy of all targets of a step.

    Attributes:
        build: makes the model of its parameters.
        dtype: of the copies of the float32 masters that the model computes with.
        images: how images to be looked at are normalised.
        weights: of a target, by kind of record.
        chunk: positions of a row whose logits are there at a time.
        accumulate: A.
        mesh: the devices.
        shardings: of what trains, by path.
    """

    build: Callable[[Params], Janus]
    dtype: jnp.dtype
    images: ImageConfig
    weights: Mapping[str, float]
    chunk: int
    accumulate: int
    mesh: Mesh
    shardings: Mapping[str, jax.sharding.Sharding]

    def losses(self, params: Params, frozen: Params, rows: Rows) -> Found:
        """Losses of one part of the rows; params: the float32 masters."""
        copies = {
            path: param if SUMMED.match(path) else param.astype(self.dtype)
            for path, param in params.items()
        }
        model = self.build(copies | frozen)
        return row_losses(model, rows, self.images, self.chunk, self.mesh)

    def totals(self, params: Params, frozen: Params, rows: Rows) -> Found:
        """Losses of all rows, one part after the other."""
        return self._added_up(lambda part: self.losses(params, frozen, part), rows)

    def gradients(self, params: Params, frozen: Params, rows: Rows) -> tuple[Params, Found]:
        """The gradient of the objective over all rows, and the losses that it is made of."""

        def weighted_sum(params: Params, part: Rows) -> tuple[jax.Array, Found]:
            found = self.losses(params, frozen, part)
            return sum(self.weights[kind] * total for kind, (total, _) in found.items()), found

        def gradient(part: Rows) -> tuple[Params, Found]:
            grads, found = jax.grad(weighted_sum, has_aux=True)(params, part)
            # they lie as the parameters do, or each device might hold them whole
            lay = jax.lax.with_sharding_constraint
            return {path: lay(grad, self.shardings[path]) for path, grad in grads.items()}, found

        grads, found = self._added_up(gradient, rows)
        weight = self.weight(found)
        return jax.tree.map(lambda grad: grad / weight, grads), found

    def mean(self, found: Found) -> jax.Array:
        """The objective, float32 scalar."""
        total = sum(self.weights[kind] * loss for kind, (loss, _) in found.items())
        return total / self.weight(found)

    def weight(self, found: Found) -> jax.Array:
        """What the mean is over: the weights of all targets, float32 scalar."""
        weight = sum(self.weights[kind] * count for kind, (_, count) in found.items())
        return jnp.maximum(weight, 1e-9)  # rows without a target: no loss, no gradient

    def _added_up(self, function: Callable, rows: Rows):
        """The sum of function(part of the rows), a pytree, over the parts."""
        if self.accumulate == 1:
            return function(rows)
        parts = jax.tree.map(self._parts, rows)
        shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(sums, part: Rows):
            return jax.tree.map(jnp.add, sums, function(part)), None

        return jax.lax.scan(add, zeros, parts)[0]

    def _parts(self, rows: jax.Array) -> jax.Array:
        """[R, ...] -> [A, R / A, ...]; the rows of each device give some to each part."""
        each = len(rows) // self.accumulate
        return rows.reshape(each, self.accumulate, *rows.shape[1:]).swapaxes(0, 1)


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    ema_decay: float,
    shardings: TrainState,
) -> Callable[[TrainState, Params, Rows], tuple[TrainState, dict]]:
    """The jitted (state, frozen, rows) -> (state, metrics); the state is given away.

    metrics: dict(sums, counts: by kind; loss, weight (what the loss is a mean over), grad_norm
    (before clipping), param_norm (after the step), learning_rate, places (of the rows), tokens
    (places that are no padding): float32 scalars).
    """

    @default_promotion()
    def step(state: TrainState, frozen: Params, rows: Rows) -> tuple[TrainState, dict]:
        grads, found = objective.gradients(state.params, frozen, rows)
        metrics = dict(
            sums={kind: total for kind, (total, _) in found.items()},
            counts={kind: count for kind, (_, count) in found.items()},
            loss=objective.mean(found),
            weight=objective.weight(found),
            grad_norm=optax.tree.norm(grads),
            learning_rate=schedule(state.step),
            places=jnp.float32(rows["segment_ids"].size),
            tokens=jnp.sum(rows["segment_ids"] > 0, dtype=jnp.float32),
        )
        state = apply_gradients(state, grads, optimizer, ema_decay)
        return state, metrics | dict(param_norm=optax.tree.norm(state.params))

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
