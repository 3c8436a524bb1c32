"""A training step: its state, the gradients of a loss, and AdamW, on all devices of the mesh.

The step knows the loss only as a function of the model and the rows, see `Loss`.

B rows of a batch, A microbatches whose gradients are accumulated.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Collection, Container, Iterator, Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

Params = dict[str, jax.Array]  # by dotted path
Rows = dict[str, jax.Array]  # arrays [B, ...]; the step itself reads only segment_ids
Terms = dict[str, tuple[jax.Array, jax.Array]]  # by name: float32 sum, and the count it is over
# (model, rows of one microbatch) -> terms. Sums and counts are added up over the microbatches. The
# rows of a batch are distributed over the microbatches, so what belongs together, such as the two
# answers of a preference, must be in one row. What a loss needs besides the model, such as rewards,
# log-probabilities of a reference model or seeds of random numbers, are arrays in the rows.
Loss = Callable[[nnx.Module, Rows], Terms]
# Names in the log that a term must not have.
RESERVED = frozenset(
    "loss grad_norm param_norm learning_rate packing_efficiency tokens_per_s mfu".split()
)


# By default, XLA for TPUs writes the machine code of every layer, although most layers do the same.
# With this option, equal operations share their code, which is compiled faster and is smaller.
TPU_OPTIONS = {"xla_tpu_enable_deduplicated_calls": True}
# By default, XLA for GPUs combines the reduce-scatters of the gradients of many layers into one, as
# far as the memory allows. It can then not run beside the backward pass, and the full gradients of
# these layers exist at once.
GPU_OPTIONS = {"xla_gpu_reduce_scatter_combine_threshold_bytes": 0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training step updates.

    Attributes:
        step: number of steps taken, int32 scalar.
        params: the trainable parameters.
        opt_state: the state of the optimizer.
        ema: the exponential moving average of params, or None.
    """

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    ema: optax.Params | None = None


def split_model(model: nnx.Module, trained: str) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Splits a model into its graph, trainable parameters and frozen parameters.

    trained: regular expression matched against the beginning of the dotted parameter path
    (`gen_vq.encoder.conv_in.kernel`). Frozen parameters have no gradient and no optimizer state.
    Raises ValueError if no path matches.
    """
    pattern = re.compile(trained)

    def is_trained(path, _) -> bool:
        return pattern.match(".".join(map(str, path))) is not None

    graph, params, frozen = nnx.split(model, is_trained, ...)
    if not jax.tree.leaves(params):
        raise ValueError(f"no parameter path matches {trained=}")
    return graph, params, frozen


def first_state(
    params: optax.Params, optimizer: optax.GradientTransformation, use_ema: bool = False
) -> TrainState:
    """Returns the state at step 0. use_ema: whether to keep a moving average of params."""
    ema = jax.tree.map(jnp.copy, params) if use_ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema)


def eval_params(state: TrainState) -> optax.Params:
    """Returns the parameters to evaluate, sample from and write: the moving average, if kept."""
    return state.params if state.ema is None else state.ema


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, params: optax.Params, replicated
) -> TrainState:
    """Returns the sharding of every leaf of a state.

    Optimizer state and moving average are sharded as the parameters.

    state: concrete or abstract. params: the sharding of each parameter. replicated: the sharding
    of scalars.
    """
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: replicated,
    )
    return TrainState(replicated, params, opt_state, None if state.ema is None else params)


def apply_gradients(
    state: TrainState,
    grads: optax.Params,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
) -> TrainState:
    """Returns the state after one optimizer step. ema_decay: used if the state has an average."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, ema = optax.apply_updates(state.params, updates), state.ema
    if ema is not None:
        ema = optax.incremental_update(params, ema, 1 - ema_decay)
    return TrainState(state.step + 1, params, opt_state, ema)


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective: the weighted mean of the terms of a loss over a batch.

    It is sum(w * total) / sum(w * count) over the terms that have a weight w. A coefficient between
    two terms belongs into the terms, because a weight also scales the count.

    Attributes:
        build: builds the model from its parameters.
        dtype: dtype of the computation, to which the float32 parameters are cast.
        cast_by_model: paths of the parameters that stay float32; the model casts them.
        loss: computes the terms.
        weights: weights by name of a term. Terms without a weight are only logged.
        accumulate: A.
        shardings: shardings of the trainable parameters, by path.
    Raises:
        ValueError: a weight is negative, or none is positive.
    """

    build: Callable[[Params], nnx.Module]
    dtype: jnp.dtype
    cast_by_model: Container[str]
    loss: Loss
    weights: Mapping[str, float]
    accumulate: int
    shardings: Mapping[str, jax.sharding.Sharding]

    def __post_init__(self):
        if any(weight < 0 for weight in self.weights.values()) or not any(self.weights.values()):
            raise ValueError(f"weights must be at least 0, and one positive, got {self.weights}")

    def terms(self, params: Params, frozen: Params, rows: Rows) -> Terms:
        """Returns the terms of one microbatch. params: float32, by path.

        Raises ValueError if a weight has no term, or if a term has a reserved name.
        """
        copies = {
            path: param if path in self.cast_by_model else param.astype(self.dtype)
            for path, param in params.items()
        }
        terms = self.loss(self.build(copies | frozen), rows)
        if missing := sorted(self.weights.keys() - terms.keys()):
            names = ", ".join(terms)
            raise ValueError(f"weights must be of terms of the loss, {names}, got {missing[0]}")
        if reserved := sorted(RESERVED & terms.keys()):
            raise ValueError(f"a term must not have a reserved name, got {reserved[0]}")
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
            return {path: self._sharded(path, grad) for path, grad in grads.items()}, terms

        grads, terms = self._accumulated(gradient, rows)
        weight = self.weight(terms)
        return jax.tree.map(lambda grad: grad / weight, grads), terms

    def _sharded(self, path: str, grad: jax.Array) -> jax.Array:
        """Returns a gradient, sharded as its parameter; else each device might hold all of it."""
        sharding = self.shardings[path]
        grad = jax.lax.with_sharding_constraint(grad, sharding)
        # On TPU, XLA sums a gradient over all devices and takes each device's shard only where the
        # sum is first used. Without the barrier, this is the optimizer, which waits for the norm of
        # all gradients, so the full gradients of all layers would exist at once.
        return grad if len(sharding.device_set) == 1 else jax.lax.optimization_barrier(grad)

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
        """[B, ...] -> [A, B / A, ...]; each microbatch has rows of every device."""
        size = len(rows) // self.accumulate
        return rows.reshape(size, self.accumulate, *rows.shape[1:]).swapaxes(0, 1)


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """Sets JAX's default dtype promotion rules, which the libraries used in a step rely on.

    With JAX_ENABLE_X64, Optax computes learning rates and bias corrections in float64. Strict
    dtype promotion rejects float64 there, and the gradients of JAX's attention in bfloat16.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def learning_rates(settings) -> optax.Schedule:
    """Returns a linear warm-up from 0, then a cosine from learning_rate to end_learning_rate.

    For a constant rate after the warm-up, as in all stages of Janus-Pro, set both to one value.

    settings: ConfigDict with learning_rate, end_learning_rate, warmup_steps, steps.
    Raises ValueError if the warm-up takes all steps, or if end_learning_rate exceeds
    learning_rate.
    """
    peak, end = settings.learning_rate, settings.end_learning_rate
    warmup_steps, steps = settings.warmup_steps, settings.steps
    if not 0 <= warmup_steps < steps:
        values = f"{warmup_steps=} {steps=}"
        raise ValueError(f"warmup_steps must be at least 0 and less than steps, got {values}")
    if end > peak:
        rule = "end_learning_rate must be at most learning_rate (set both)"
        values = f"end_learning_rate={end} learning_rate={peak}"
        raise ValueError(f"{rule}, got {values}")
    if end < peak:
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, steps, end)
    # The same rates, but the program does not depend on the number of steps: runs that differ only
    # in it share a compiled program.
    constant = optax.constant_schedule(peak)
    if not warmup_steps:
        return constant
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, constant], [warmup_steps])


def make_optimizer(settings) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping by global norm, as in Table 2 of Janus-Pro.

    settings: ConfigDict as for learning_rates, and b1, b2, weight_decay, max_grad_norm.
    Raises ValueError as learning_rates does.
    """
    rate, decay = learning_rates(settings), settings.weight_decay
    return optax.chain(
        optax.clip_by_global_norm(settings.max_grad_norm),
        optax.adamw(rate, b1=settings.b1, b2=settings.b2, weight_decay=decay),
    )


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

    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=(shardings, None),
        compiler_options=compiler_options(shardings.step.device_set),
    )


def compiler_options(devices: Collection[jax.Device]) -> dict[str, bool | int]:
    """Returns the options with which XLA compiles a pass over all layers for these devices."""
    match next(iter(devices)).platform:
        case "tpu":
            return TPU_OPTIONS
        case "gpu" if len(devices) > 1:
            return GPU_OPTIONS
    return {}
