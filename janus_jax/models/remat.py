"""What the backward pass computes again instead of keeping it from the forward pass."""

from collections.abc import Callable

import jax
from flax import nnx

from janus_jax.models.linear import LINEAR_OUTPUT

POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": jax.checkpoint_policies.nothing_saveable,
}
REMAT_CHOICES = ("none", *POLICIES)


def block_call(block: type[nnx.Module], remat: str) -> Callable:
    """A block's __call__: "none" keeps everything, "dots" the linear layers' outputs (attention
    and what is computed element by element comes again), "full" only what goes into the block.
    """
    if remat == "none":
        return block.__call__
    return nnx.remat(block.__call__, policy=POLICIES[remat])
