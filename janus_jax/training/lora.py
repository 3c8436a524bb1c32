"""LoRA: low-rank adapters beside frozen linear layers (Hu et al., 2021, arXiv 2106.09685).

A layer's kernel W, float[inputs, outputs], acts as W + alpha / rank * a @ b. Parameter paths:
`...q_proj.dot_general.a` and `.b`, as a layer's adapter sits where its product is made.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.models.linear import flat_matmul, matmul

# whole paths of the adapters' parameters: what split_model is to train
ADAPTERS = r".*\.dot_general\.[ab]$"

# these layers are never called: their kernels are read, and an adapter would change nothing
_READ_ONLY = ("language_model.lm_head", "gen_head.out")


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """What is adapted, and how.

    targets: regular expression on the dotted path of a linear layer, matched whole, e.g.
    r"language_model\\.layers\\.\\d+\\.self_attn\\.[qkvo]_proj".
    Raises ValueError for a setting out of its range.
    """

    rank: int
    alpha: float
    targets: str

    def __post_init__(self):
        if type(self.rank) is not int or self.rank < 1:
            raise ValueError(f"rank must be an integer of at least 1, got {self.rank!r}")
        number = type(self.alpha) in (int, float) and math.isfinite(self.alpha)
        if not number or self.alpha <= 0:
            raise ValueError(f"alpha must be a number above 0, got {self.alpha!r}")
        try:
            re.compile(self.targets)
        except (re.error, TypeError) as error:
            got = f"got {self.targets!r}: {error}"
            raise ValueError(f"targets must be a regular expression, {got}") from None

    @property
    def scale(self) -> float:
        """What a @ b is multiplied by."""
        return self.alpha / self.rank


class LoRADot(nnx.Module):
    """The product of an adapted layer, in place of linear.matmul.

    a: float32[inputs, rank], uniform within 1 / sqrt(inputs) of 0, as in the authors' code (the
    paper says Gaussian and no spread). b: float32[rank, outputs], zeros: nothing is changed yet.
    """

    def __init__(self, inputs: int, outputs: int, cfg: LoRAConfig, *, rngs: nnx.Rngs):
        uniform = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        self.scale = cfg.scale
        self.a = nnx.Param(uniform(rngs.params(), (inputs, cfg.rank), jnp.float32))
        self.b = nnx.Param(jnp.zeros((cfg.rank, outputs), jnp.float32))

    def __call__(self, x: jax.Array, kernel: jax.Array, float32_output: bool) -> jax.Array:
        """float[..., inputs] and float[inputs, outputs] -> float[..., outputs], as matmul."""
        a, b = (factor[...].astype(x.dtype) for factor in (self.a, self.b))
        low = matmul(flat_matmul(x, a), b, float32_output)
        return matmul(x, kernel, float32_output) + self.scale * low


def add_adapters(model: nnx.Module, cfg: LoRAConfig, *, rngs: nnx.Rngs) -> None:
    """Gives every linear layer that cfg.targets matches an adapter, in place.

    The model may be one of shapes alone (nnx.eval_shape); the adapters then have values. Its
    outputs stay what they were until `b` is trained.
    Raises ValueError if no linear layer matches, or one that cannot be adapted.
    """
    layers = {
        path: module
        for keys, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear)
        and re.fullmatch(cfg.targets, path := ".".join(map(str, keys)))
    }
    if not layers:
        raise ValueError(f"targets must match a linear layer, got {cfg.targets!r}")
    for path, layer in layers.items():
        if reason := _why_not(path, layer):
            rule = "targets must match no layer that cannot be adapted"
            raise ValueError(f"{rule}, got {cfg.targets!r}: {path} {reason}")
    for layer in layers.values():
        adapter = LoRADot(layer.in_features, layer.out_features, cfg, rngs=rngs)
        layer.dot_general = nnx.data(adapter)  # a function before, which is no data


def _why_not(path: str, layer: nnx.Linear) -> str | None:
    if path in _READ_ONLY:
        return "is a head whose kernel is read without a call"
    if path.startswith("gen_vq."):
        return "is of the tokenizer, which is never trained"
    if isinstance(layer.dot_general, LoRADot):
        return "has an adapter already"
    return None


def factors_of(params: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """a and b of every adapted layer, by the path of its kernel.

    params: the adapters' parameters by dotted path.
    """
    found = {}
    for path in params:
        if layer := re.fullmatch(r"(.*)\.dot_general\.a", path):
            found[f"{layer[1]}.kernel"] = params[path], params[f"{layer[1]}.dot_general.b"]
    return found
