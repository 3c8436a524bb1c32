"""SigLIP, the image encoder of the understanding path.

B batch, Y X pixels, P patch size, T patches, W width, N heads.
There is no class token. The released files contain an `attn_pool`, which is not used.
Source: janus/models/siglip_vit.py of the original code.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from janus_jax.models.attention import attention
from janus_jax.models.layers import (
    LayerNorm,
    add_bias,
    block_call,
    gelu,
    linear,
    run_layers,
    saved,
    with_float32_output,
)

LAYER_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the vision transformer.

    image_size, patch_size: height and width in pixels.
    select_layer: -1 runs every block, -2 skips the last one, and so on; the final norm is always
        applied.
    dtype: the compute dtype.
    param_dtype: the dtype of the stored parameters.
    remat: what the backward pass recomputes, one of layers.REMAT_CHOICES.
    scan: whether the blocks run in one loop, see layers.run_layers.
    """

    image_size: int
    patch_size: int
    width: int
    num_layers: int
    num_heads: int
    mlp_dim: int
    select_layer: int = -1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan: bool = False

    @property
    def num_tokens(self) -> int:
        """T, the number of patches, and so of features, of one image."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def siglip_large_patch16_384(cls) -> "SiglipConfig":
        """Returns the sizes of the encoder in every released Janus model."""
        return cls(384, 16, width=1024, num_layers=24, num_heads=16, mlp_dim=4096)


def _linear(cfg: SiglipConfig, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return linear(inputs, outputs, dtype=cfg.dtype, param_dtype=cfg.param_dtype, rngs=rngs)


def _norm(cfg: SiglipConfig, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(
        cfg.width,
        epsilon=LAYER_NORM_EPS,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits that the original code keeps
        rngs=rngs,
    )


class SelfAttention(nnx.Module):
    """Self-attention between all patches of an image."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.num_heads = cfg.num_heads
        self.q_proj = _linear(cfg, cfg.width, cfg.width, rngs)
        self.k_proj = _linear(cfg, cfg.width, cfg.width, rngs)
        self.v_proj = _linear(cfg, cfg.width, cfg.width, rngs)
        self.out_proj = _linear(cfg, cfg.width, cfg.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[B, T, W] to float[B, T, W]."""
        heads = (*x.shape[:2], self.num_heads, -1)
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (saved(project(x)).reshape(heads) for project in projections)
        return self.out_proj(attention(q, k, v).reshape(x.shape))


class MLP(nnx.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.fc1 = _linear(cfg, cfg.width, cfg.mlp_dim, rngs)
        self.fc2 = _linear(cfg, cfg.mlp_dim, cfg.width, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[B, T, W] to float[B, T, W]."""
        with jax.named_scope("mlp"):
            return self.fc2(gelu(saved(self.fc1(x))))


class Block(nnx.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.norm1 = _norm(cfg, rngs)
        self.attn = SelfAttention(cfg, rngs=rngs)
        self.norm2 = _norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    # a scope around the block would not be in the names of its gradient, if it is recomputed
    @jax.named_scope("und_encoder")
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[B, T, W] to float[B, T, W]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def _patch_conv(x: jax.Array, kernel: jax.Array, **options) -> jax.Array:
    """Convolves patches that do not overlap, with stride P.

    x: float[B, Y, X, 3]; kernel: float[P, P, 3, W]; options: of conv_general_dilated.
    Returns float[B, Y / P, X / P, W].
    """
    axes = ("NHWC", "HWIO", "NHWC")
    steps = kernel.shape[:2]
    return jax.lax.conv_general_dilated(
        x, kernel, steps, "VALID", dimension_numbers=axes, **options
    )


class PatchEmbed(nnx.Conv):
    """A convolution over patches that rounds its output only once, as layers.Linear does."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[B, Y, X, 3] to float[B, Y / P, X / P, W]."""
        x, kernel = x.astype(self.dtype), self.kernel[...].astype(self.dtype)
        out = with_float32_output(_patch_conv, x, kernel)
        return add_bias(out, self.bias[...]).astype(self.dtype)


class Siglip(nnx.Module):
    """The encoder: maps pixels to one feature vector per patch."""

    def __init__(self, cfg: SiglipConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.patch_embed = PatchEmbed(
            3,
            cfg.width,
            (cfg.patch_size, cfg.patch_size),
            strides=cfg.patch_size,
            padding="VALID",
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            rngs=rngs,
        )
        self.pos_embed = nnx.Param(
            nnx.initializers.normal(0.02)(
                rngs.params(), (cfg.num_tokens, cfg.width), cfg.param_dtype
            )
        )
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.num_layers)])
        self.norm = _norm(cfg, rngs)

    def embed(self, pixels: jax.Array) -> jax.Array:
        """Embeds patches and adds the position embeddings: the input of the first block.

        pixels: float[B, Y, X, 3], normalized. Returns float[B, T, W].
        """
        x = self.patch_embed(pixels)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return x + self.pos_embed[...].astype(self.cfg.dtype)[None]

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Encodes images.

        pixels: float[B, Y, X, 3], normalized. Returns float[B, T, W], patches in row-major order.
        """
        call = block_call(Block, self.cfg.remat)
        blocks = self.blocks[: len(self.blocks) + self.cfg.select_layer + 1]
        x, _ = run_layers(
            lambda block, x: (call(block, x), None), blocks, self.embed(pixels), scan=self.cfg.scan
        )
        return self.norm(x)
