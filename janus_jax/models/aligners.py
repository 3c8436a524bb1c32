"""Layers between the encoders or image tokens and the decoder.

Source: janus/models/projector.py and janus/models/modeling_vlm.py of the original code.
"""

import itertools

import jax
from flax import nnx

from janus_jax.models.linear import Head, gelu, linear


class Aligner(nnx.Module):
    """An MLP with exact GELU that maps image features or codes to the width of the decoder."""

    def __init__(
        self, inputs: int, width: int, depth: int, *, dtype, param_dtype, rngs: nnx.Rngs
    ):
        sizes = [inputs] + [width] * depth
        pairs = itertools.pairwise(sizes)
        types = dict(dtype=dtype, param_dtype=param_dtype)
        self.layers = nnx.List([linear(a, b, **types, rngs=rngs) for a, b in pairs])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., inputs] to float[..., width]."""
        x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = layer(gelu(x))
        return x


class GenHead(nnx.Module):
    """An MLP that maps hidden states to logits over the codebook (image-token logits)."""

    def __init__(self, inputs: int, width: int, codes: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        types = dict(dtype=dtype, param_dtype=param_dtype)
        self.proj = linear(inputs, width, **types, rngs=rngs)
        self.out = linear(width, codes, **types, rngs=rngs, layer=Head)

    def __call__(self, hidden: jax.Array) -> jax.Array:
        """Maps float[..., D] to float32[..., codebook_size]."""
        return self.out(gelu(self.proj(hidden)))
