"""What a training run carries from step to step."""

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
    """step: int32 scalar; params: the trained part; opt_state: optax's.

    average: the moving average of params, or None where none is kept.
    """

    step: jax.Array
    params: optax.Params
    opt_state: optax.OptState
    average: optax.Params | None = None


def split_model(model: nnx.Module, trained: str) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Graph, trained parameters and frozen parameters of a model.

    trained: regular expression on the dotted parameter path (`gen_vq.encoder.conv_in.kernel`),
    matched from its beginning. Frozen parameters get no gradient and no optimizer state.
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
    params: optax.Params, optimizer: optax.GradientTransformation, averaged: bool = False
) -> TrainState:
    """The state at step 0. averaged: whether a moving average is kept."""
    average = jax.tree.map(jnp.copy, params) if averaged else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def written_params(state: TrainState) -> optax.Params:
    """What is evaluated, sampled from and written: the moving average, where there is one."""
    return state.params if state.average is None else state.average


def state_shardings(
    state: TrainState, optimizer: optax.GradientTransformation, params: optax.Params, whole
) -> TrainState:
    """Where each part of a state lies: optimizer state and average as the parameters.

    state: abstract or not. params: a sharding for each parameter. whole: the sharding of scalars.
    """
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        state.opt_state,
        params,
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, opt_state, None if state.average is None else params)


def apply_gradients(
    state: TrainState,
    grads: optax.Params,
    optimizer: optax.GradientTransformation,
    ema_decay: float = 0.0,
) -> TrainState:
    """The state one step on. ema_decay: of the moving average, where there is one."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params, average = optax.apply_updates(state.params, updates), state.average
    if average is not None:
        average = optax.incremental_update(params, average, 1 - ema_decay)
    return TrainState(state.step + 1, params, opt_state, average)


@contextlib.contextmanager
def default_promotion() -> Iterator[None]:
    """JAX's default rules for dtypes, for steps whose libraries rely on them.

    Under JAX_ENABLE_X64 Optax computes learning rates and bias corrections in float64; strict
    promotion of dtypes refuses both, and the gradients of JAX's attention in bfloat16.
    """
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
    ):
        yield


def learning_rates(cfg) -> optax.Schedule:
    """Warm-up from 0, then a cosine from learning_rate to end_learning_rate; the two are the same
    where the rate is to stay, as in all of Janus-Pro's stages.

    cfg: ConfigDict with learning_rate, end_learning_rate, warmup_steps, steps.
    Raises ValueError if the warm-up takes all steps, or the rate would rise after it.
    """
    if not 0 <= cfg.warmup_steps < cfg.steps:
        asked = f"warmup_steps={cfg.warmup_steps} steps={cfg.steps}"
        raise ValueError(f"warmup_steps must be at least 0 and less than steps, got {asked}")
    if cfg.end_learning_rate > cfg.learning_rate:
        rule = "end_learning_rate must be at most learning_rate (give both)"
        raise ValueError(f"{rule}, got {cfg.end_learning_rate} for {cfg.learning_rate}")
    return optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps, cfg.steps, cfg.end_learning_rate
    )


def make_optimizer(cfg) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, as in Janus-Pro's Table 2.

    cfg: ConfigDict as of learning_rates, with b1, b2, weight_decay, max_grad_norm.
    Raises ValueError as learning_rates.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(learning_rates(cfg), b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay),
    )
