"""The error for results that are not finite: it names the part of the model and the weights.

The programs detect such results (samplers.pick, VQ.nearest, codec.decode_pixels). The functions
here run on the host, and only after that.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

_all_finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def not_finite(what: str, modules: Mapping[str, nnx.Module], advice: str = "") -> ValueError:
    """The error to raise where `what` has NaN or infinite values.

    Args:
        what: such as "text logits".
        modules: what it was computed with, by name in the model.
        advice: what else to change if all their weights are finite.
    """
    found = f"{what} must be finite, got NaN or infinite values"
    if damaged := _damaged(modules):
        others = len(damaged) - 1
        more = f" (and {others} more tensor{'s' * (others > 1)})" * (others > 0)
        which = f"the weights in {damaged[0]}{more} are not finite"
        return ValueError(f"{found}: {which}; use an undamaged copy of the checkpoint")
    which = f"all weights of {', '.join(modules)} are finite, so a value overflowed"
    return ValueError(f"{found}: {which}; compare the checkpoint with its source{advice}")


def _damaged(modules: Mapping[str, nnx.Module]) -> list[str]:
    """Paths of the parameters that are not finite."""
    leaves = {
        ".".join(map(str, (name, *path))): leaf[...]
        for name, module in modules.items()
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
    finite = _all_finite(list(leaves.values()))
    return [path for path, own in zip(leaves, finite, strict=True) if not bool(own)]
