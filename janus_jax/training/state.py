"""What a training run carries from step to step."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax
from flax import nnx


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """step: int32 scalar; params: the trained part, nnx.State; opt_state: optax's."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState


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


def init_state(params: nnx.State, optimizer: optax.GradientTransformation) -> TrainState:
    """The state at step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def apply_gradients(
    state: TrainState, grads: nnx.State, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state one step on."""
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)


def make_optimizer(cfg) -> optax.GradientTransformation:
    """AdamW after clipping by global norm, as in Janus-Pro's Table 2, with a cosine decay.

    cfg: ConfigDict with learning_rate, end_learning_rate, warmup_steps, steps, b1, b2,
    weight_decay, clip.
    Raises ValueError if the warm-up takes all steps.
    """
    if not 0 <= cfg.warmup_steps < cfg.steps:
        asked = f"warmup_steps={cfg.warmup_steps} steps={cfg.steps}"
        raise ValueError(f"warmup_steps must be at least 0 and less than steps, got {asked}")
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.learning_rate, cfg.warmup_steps, cfg.steps, cfg.end_learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.adamw(schedule, b1=cfg.b1, b2=cfg.b2, weight_decay=cfg.weight_decay),
    )
