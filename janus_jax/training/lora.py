"""LoRA: low-rank adapters for frozen linear layers (Hu et al., 2021, arXiv 2106.09685).

The kernel W of an adapted layer, float[inputs, outputs], acts as W + alpha / rank * a @ b. The
adapter wraps the layer's dot_general, so its parameters have the paths `...q_proj.dot_general.a`
and `.b`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.families.family import ADAPTER_PATH, Family
from janus_jax.families.registry import family_of
from janus_jax.models.layers import Linear, Product, flat_matmul

# Matches the full paths of adapter parameters, the trainable parameters of a LoRA run.
ADAPTERS = rf"{ADAPTER_PATH.pattern}$"


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Settings of LoRA.

    Attributes:
        rank: rank of the adapters.
        alpha: a @ b is multiplied by alpha / rank.
        targets: regular expression that must match the full dotted path of a linear layer, e.g.
            r"language_model\\.layers\\.\\d+\\.self_attn\\.[qkvo]_proj".
    Raises:
        ValueError: a setting is out of its range.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank!r}")
        finite = type(self.alpha) in (int, float) and math.isfinite(self.alpha)
        if not finite or self.alpha <= 0:
            raise ValueError(f"alpha must be a positive number, got {self.alpha!r}")
        try:
            re.compile(self.targets)
        except (re.error, TypeError) as error:
            got = f"got {self.targets!r}: {error}"
            raise ValueError(f"targets must be a regular expression, {got}") from None

    @property
    def scale(self) -> float:
        """The factor of a @ b."""
        return self.alpha / self.rank


class LoRADot(nnx.Module):
    """Adds a low-rank update to the `dot_general` of a linear layer.

    Attributes:
        dot_general: the layer's own dot_general.
        a: float32[inputs, rank], initialized uniformly in [-1 / sqrt(inputs), 1 / sqrt(inputs)],
            as in the authors' code (the paper says Gaussian, without a standard deviation).
        b: float32[rank, outputs], initialized to zeros, so a new adapter has no effect.
    """

    def __init__(self, layer: Linear, settings: LoRAConfig, *, rngs: nnx.Rngs):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.dot_general = layer.dot_general
        self.scale = settings.scale
        self.a = nnx.Param(uniform(rngs.params(), (layer.in_features, settings.rank), jnp.float32))
        self.b = nnx.Param(jnp.zeros((settings.rank, layer.out_features), jnp.float32))

    def __call__(self, x: jax.Array, kernel: jax.Array, product: Product) -> jax.Array:
        """float[..., inputs], float[inputs, outputs] -> float[..., outputs]; see layers.Linear."""
        a, b = (factor[...].astype(x.dtype) for factor in (self.a, self.b))
        update = product(flat_matmul(x, a), b)
        return self.dot_general(x, kernel, product) + self.scale * update


def add_adapters(model: nnx.Module, settings: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Adds an adapter to every linear layer that settings.targets matches, in place.

    The model may be abstract (nnx.eval_shape); the adapters have values even then. The outputs of
    the model do not change until `b` is trained.
    Raises ValueError if no linear layer matches, or if a matching layer cannot be adapted.
    """
    layers = {
        path: module
        for keys, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
        and re.fullmatch(settings.targets, path := ".".join(map(str, keys)))
    }
    if not layers:
        raise ValueError(f"targets must match a linear layer, got {settings.targets!r}")
    for path, layer in layers.items():
        if reason := _not_adaptable(path, layer, family_of(model.cfg)):
            rule = "targets must only match layers that can be adapted"
            raise ValueError(f"{rule}, got {settings.targets!r}: {path} {reason}")
    for layer in layers.values():
        adapter = LoRADot(layer, settings, rngs=rngs)
        layer.dot_general = nnx.data(adapter)  # replaces a function, which is static


def _not_adaptable(path: str, layer: nnx.Linear, family: Family) -> str | None:
    """Returns why a layer cannot be adapted, or None if it can."""
    if family.parameter_table.find(f"{path}.kernel").component == family.image_codec:
        return "belongs to the image tokenizer, which is never trained"
    if isinstance(layer.dot_general, LoRADot):
        return "already has an adapter"
    return None


def lora_factors(params: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns (a, b) of every adapted layer, by the path of its kernel.

    params: adapter parameters by dotted path.
    """
    factors = {}
    for path in params:
        layer, factor = ADAPTER_PATH.fullmatch(path).groups()
        if factor == "a":
            factors[f"{layer}.kernel"] = params[path], params[f"{layer}.dot_general.b"]
    return factors
