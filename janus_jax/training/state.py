"""The state of a training run and the optimizer."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx


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


def init_state(
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


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """Sets JAX's default dtype promotion rules, which the libraries used in a step rely on.

    With JAX_ENABLE_X64, Optax computes learning rates and bias corrections in float64. Strict
    dtype promotion rejects both, and also the gradients of JAX's attention in bfloat16.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def learning_rates(cfg) -> optax.Schedule:
    """Returns a linear warm-up from 0, then a cosine from learning_rate to end_learning_rate.

    For a constant rate, as in all stages of Janus-Pro, set both to the same value.

    cfg: ConfigDict with learning_rate, end_learning_rate, warmup_steps, steps.
    Raises ValueError if the warm-up takes all steps, or if end_learning_rate exceeds
    learning_rate.
    """
    if not 0 <= cfg.warmup_steps < cfg.steps:
        values = f"warmup_steps={cfg.warmup_steps} steps={cfg.steps}"
        raise ValueError(f"warmup_steps must be at least 0 and less than steps, got {values}")
    if cfg.end_learning_rate > cfg.learning_rate:
        rule = "end_learning_rate must be at most learning_rate (set both)"
        values = f"end_learning_rate={cfg.end_learning_rate} learning_rate={cfg.learning_rate}"
        raise ValueError(f"{rule}, got {values}")
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps, cfg.steps, cfg.end_learning_rate
    )


def make_optimizer(cfg) -> optax.GradientTransformation:
    """Returns AdamW with gradient clipping by global norm, as in Table 2 of Janus-Pro.

    cfg: ConfigDict as for learning_rates, and b1, b2, weight_decay, max_grad_norm.
    Raises ValueError as learning_rates does.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(learning_rates(cfg), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay),
    )
