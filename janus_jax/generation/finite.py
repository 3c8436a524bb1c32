"""The error for NaN or infinite results; it names the module and the weights that caused them.

The compiled programs detect such results (samplers.sample_token, VQ.nearest, codec.decode_pixels).
The functions here run on the host, and only after a detection.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.models.janus import Janus

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


def check_features(model: Janus, pixels: jax.Array, mesh: Mesh | None) -> None:
    """Raises ValueError if the features of the images in prompts are NaN or infinite.

    Computes the features again, to name the module that failed first: features that are not finite
    make the logits of their row not finite.

    pixels: float32[B, n, S, S, 3], on the devices.
    """
    if not pixels.shape[1]:
        return
    encoded, aligned = _finite_features(model, pixels, mesh)
    if not encoded:
        raise not_finite_error("SigLIP features", {"und_encoder": model.und_encoder})
    if not aligned:
        raise not_finite_error("aligned image features", {"und_aligner": model.und_aligner})


@functools.partial(jax.jit, static_argnames="mesh")
def _finite_features(
    model: Janus, pixels: jax.Array, mesh: Mesh | None
) -> tuple[jax.Array, jax.Array]:
    """Returns whether all SigLIP features, and all aligned features, are finite: bool scalars."""
    encoded = model.und_encoder(pixels.reshape(-1, *pixels.shape[2:]))
    features = encoded, model.und_aligner(encoded)
    return sharding.replicate(tuple(jnp.all(jnp.isfinite(x)) for x in features), mesh)


def _non_finite_paths(modules: Mapping[str, nnx.Module]) -> list[str]:
    """Returns the paths of the parameters that have NaN or infinite values."""
    leaves = {
        ".".join(map(str, (name, *path))): leaf[...]
        for name, module in modules.items()
        for path, leaf in nnx.to_flat_state(nnx.state(module))
    }
    finite = _all_finite(list(leaves.values()))
    return [path for path, is_finite in zip(leaves, finite, strict=True) if not bool(is_finite)]
