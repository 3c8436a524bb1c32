"""The error for NaN or infinite results; it names the module and the weights that caused them.

The compiled programs detect such results (samplers.sample_token, VQ.nearest, codec.decode_pixels).
The functions here run on the host, and only after a detection.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

_all_finite = jax.jit(lambda leaves: [jnp.all(jnp.isfinite(leaf)) for leaf in leaves])


def not_finite_error(what: str, modules: Mapping[str, nnx.Module], advice: str = "") -> ValueError:
    """Returns the error to raise if `what` has NaN or infinite values.

    Args:
        what: such as "text logits".
        modules: the modules that computed it, by their name in the model.
        advice: what else the user may change if all weights of the modules are finite.
    """
    problem = f"{what} must be finite, got NaN or infinite values"
    if paths := _non_finite_paths(modules):
        others = len(paths) - 1
        more = f" (and {others} more tensor{'s' * (others > 1)})" * (others > 0)
        cause = f"the weights in {paths[0]}{more} are not finite"
        return ValueError(f"{problem}: {cause}; use an undamaged copy of the checkpoint")
    cause = f"all weights of {', '.join(modules)} are finite, so a value overflowed"
    return ValueError(f"{problem}: {cause}; compare the checkpoint with its source{advice}")


def _non_finite_paths(modules: Mapping[str, nnx.Module]) -> list[str]:
    """Returns the paths of the parameters that have NaN or infinite values."""
    leaves = {
        ".".join(map(str, (name, *path))): leaf[...]
        for name, module in modules.items()
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
    finite = _all_finite(list(leaves.values()))
    return [path for path, is_finite in zip(leaves, finite, strict=True) if not bool(is_finite)]
