"""A training step: gradients of a loss, accumulation and AdamW, on all devices of the mesh.

The step knows the loss only as a function of the model and the rows, see `Loss`.

R rows of a batch, A microbatches whose gradients are accumulated.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from janus_jax.models.janus import Janus
from janus_jax.training.state import TrainState, apply_gradients, default_promotion

Params = dict[str, jax.Array]  # by dotted path
Rows = dict[str, jax.Array]  # arrays [R, ...]; the step itself reads only segment_ids
Terms = dict[str, tuple[jax.Array, jax.Array]]  # by name: float32 sum, and the count it is over
# (model, rows of one microbatch) -> terms. Sums and counts are added up over the microbatches. The
# rows of a batch are distributed over the microbatches, so what belongs together, such as the two
# answers of a preference, must be in one row.
Loss = Callable[[Janus, Rows], Terms]

# The gradients of these parameters are sums over many tokens, or over the chunks of a row. The
# parameters stay float32, and the model casts what it reads from them, so that the sums are
# computed in float32.
FLOAT32_GRADIENTS = re.compile(r".*\.embedding$|language_model\.lm_head\.|gen_head\.")


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective: the weighted mean of the terms of a loss over a batch.

    It is sum(weight * sum) / sum(weight * count) over the terms that have a weight.

    Attributes:
        build: builds the model from its parameters.
        dtype: dtype of the computation, to which the float32 parameters are cast.
        loss: computes the terms.
        weights: weights by name of a term. Terms without a weight are only logged.
        accumulate: A.
        shardings: shardings of the trainable parameters, by path.
    """

    build: Callable[[Params], Janus]
    dtype: jnp.dtype
    loss: Loss
    weights: Mapping[str, float]
    accumulate: int
    shardings: Mapping[str, jax.sharding.Sharding]

    def terms(self, params: Params, frozen: Params, rows: Rows) -> Terms:
        """Returns the terms of one microbatch. params: float32, by path.

        Raises ValueError if a weight has no term.
        """
        copies = {
            path: param if FLOAT32_GRADIENTS.match(path) else param.astype(self.dtype)
            for path, param in params.items()
        }
        terms = self.loss(self.build(copies | frozen), rows)
        if missing := sorted(self.weights.keys() - terms.keys()):
            names = ", ".join(terms)
            raise ValueError(f"weights must be of terms of the loss, {names}, got {missing[0]}")
        return terms

    def totals(self, params: Params, frozen: Params, rows: Rows) -> Terms:
        """Returns the terms of all rows, computed one microbatch at a time."""
        return self._accumulated(lambda part: self.terms(params, frozen, part), rows)

    def gradients(self, params: Params, frozen: Params, rows: Rows) -> tuple[Params, Terms]:
        """Returns the gradient of the objective over all rows, and the terms."""

        def weighted_sum(params: Params, part: Rows) -> tuple[jax.Array, Terms]:
            terms = self.terms(params, frozen, part)
            return self._weighted(terms, 0), terms

        def gradient(part: Rows) -> tuple[Params, Terms]:
            grads, terms = jax.grad(weighted_sum, has_aux=True)(params, part)
            # sharded as the parameters, or each device might hold full gradients
            constrain = jax.lax.with_sharding_constraint
            grads = {path: constrain(grad, self.shardings[path]) for path, grad in grads.items()}
            return grads, terms

        grads, terms = self._accumulated(gradient, rows)
        weight = self.weight(terms)
        return jax.tree.map(lambda grad: grad / weight, grads), terms

    def mean(self, terms: Terms) -> jax.Array:
        """Returns the value of the objective, float32 scalar."""
        return self._weighted(terms, 0) / self.weight(terms)

    def weight(self, terms: Terms) -> jax.Array:
        """Returns the total weight, by which the mean divides, float32 scalar."""
        # rows without a target have no loss and no gradient
        return jnp.maximum(self._weighted(terms, 1), 1e-9)

    def _weighted(self, terms: Terms, index: int) -> jax.Array:
        """Returns the weighted total of the sums (index 0) or of the counts (index 1)."""
        weights = self.weights
        return sum(weights[name] * term[index] for name, term in terms.items() if name in weights)

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
        sums, counts: dicts by name of a term with its sum and count.
        loss, weight: the objective and the total weight that it is a mean over.
        grad_norm: before clipping.
        param_norm: after the step.
        learning_rate
        positions, tokens: number of positions in the rows, and of those that are not padding.
    """

    @default_promotion()
    def step(state: TrainState, frozen: Params, rows: Rows) -> tuple[TrainState, dict]:
        grads, terms = objective.gradients(state.params, frozen, rows)
        metrics = dict(
            sums={name: total for name, (total, _) in terms.items()},
            counts={name: count for name, (_, count) in terms.items()},
            loss=objective.mean(terms),
            weight=objective.weight(terms),
            grad_norm=optax.tree.norm(grads),
            learning_rate=schedule(state.step),
            positions=jnp.float32(rows["segment_ids"].size),
            tokens=jnp.sum(rows["segment_ids"] > 0, dtype=jnp.float32),
        )
        state = apply_gradients(state, grads, optimizer, ema_decay)
        return state, metrics | dict(param_norm=optax.tree.norm(state.params))

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
