"""Rematerialization: what the backward pass recomputes instead of saving it."""

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
    """Returns the __call__ of a block class, wrapped according to `remat`.

    remat: which values are saved for the backward pass; all others are recomputed.
        "none": everything.
        "dots": the inputs of the block and the outputs of its linear layers; attention and
            elementwise operations are recomputed.
        "full": only the inputs of the block.
    """
    if remat == "none":
        return block.__call__
    return nnx.remat(block.__call__, policy=POLICIES[remat])
