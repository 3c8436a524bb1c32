"""VQ-16, the image tokenizer of the generation path.

B batch, Y X pixels, y x grid of latents, C channels, G codebook size.
It always computes in float32: the released weights are bfloat16, but colors that are decoded in
bfloat16 show bands.
Source: janus/models/vq_model.py of the original code.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

GROUP_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Sizes of the image tokenizer.

    codebook_size, codebook_dim: number of codes, and channels of each.
    ch, ch_mult: level i has ch * ch_mult[i] channels. Each level but the last halves the
        resolution in the encoder.
    num_res_blocks: residual blocks per level of the encoder; the decoder has one more.
    z_channels: channels of the encoder's output and of the decoder's input.
    norm_num_groups: groups of every GroupNorm.
    """

    codebook_size: int
    codebook_dim: int
    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    norm_num_groups: int = 32

    @property
    def downsample(self) -> int:
        """Height and width in pixels that one image token covers."""
        return 2 ** (len(self.ch_mult) - 1)

    @classmethod
    def vq_16(cls) -> "VQConfig":
        """Returns the sizes of the tokenizer of Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B."""
        return cls(16384, 8, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=256)


def _norm(cfg: VQConfig, channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    return nnx.GroupNorm(
        channels,
        num_groups=cfg.norm_num_groups,
        epsilon=GROUP_NORM_EPS,
        use_fast_variance=False,
        rngs=rngs,
    )


def _conv3x3(inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (3, 3), padding=1, rngs=rngs)


class ResBlock(nnx.Module):
    """Two convolutions, each after GroupNorm and SiLU, with a residual connection.

    The residual is projected if the number of channels changes.
    """

    def __init__(self, cfg: VQConfig, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.norm1 = _norm(cfg, inputs, rngs)
        self.conv1 = _conv3x3(inputs, outputs, rngs)
        self.norm2 = _norm(cfg, outputs, rngs)
        self.conv2 = _conv3x3(outputs, outputs, rngs)
        if inputs != outputs:
            self.shortcut = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32[B, y, x, inputs] to float32[B, y, x, outputs]."""
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return (self.shortcut(x) if hasattr(self, "shortcut") else x) + h


class AttnBlock(nnx.Module):
    """Attention with one head over all positions of the grid; the scale is C**-0.5."""

    def __init__(self, cfg: VQConfig, channels: int, *, rngs: nnx.Rngs):
        self.norm = _norm(cfg, channels, rngs)
        self.q = nnx.Linear(channels, channels, rngs=rngs)
        self.k = nnx.Linear(channels, channels, rngs=rngs)
        self.v = nnx.Linear(channels, channels, rngs=rngs)
        self.proj_out = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32[B, y, x, C] to float32[B, y, x, C]."""
        h = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        logits = jnp.einsum("BTC,BSC->BTS", self.q(h), self.k(h)) * x.shape[-1] ** -0.5
        h = jnp.einsum("BTS,BSC->BTC", jax.nn.softmax(logits, axis=-1), self.v(h))
        return x + self.proj_out(h).reshape(x.shape)


def _middle(cfg: VQConfig, channels: int, rngs: nnx.Rngs) -> nnx.List:
    return nnx.List(
        [
            ResBlock(cfg, channels, channels, rngs=rngs),
            AttnBlock(cfg, channels, rngs=rngs),
            ResBlock(cfg, channels, channels, rngs=rngs),
        ]
    )


class Level(nnx.Module):
    """The residual blocks of one resolution.

    widths: channels before the first block and after each block.
    with_attn: whether an attention block follows each residual block.
    """

    def __init__(self, cfg: VQConfig, widths: list[int], with_attn: bool, *, rngs: nnx.Rngs):
        pairs = itertools.pairwise(widths)
        self.res = nnx.List([ResBlock(cfg, a, b, rngs=rngs) for a, b in pairs])
        self.attn = nnx.List(
            [AttnBlock(cfg, width, rngs=rngs) for width in widths[1:] if with_attn]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, res in enumerate(self.res):
            x = res(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x


class DownLevel(Level):
    """A level of the encoder; each level but the last halves the resolution."""

    def __init__(self, cfg: VQConfig, inputs: int, outputs: int, last: bool, *, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * cfg.num_res_blocks
        super().__init__(cfg, widths, with_attn=last, rngs=rngs)
        if not last:
            # unlike all other convolutions, padded only on the right and at the bottom
            self.downsample = nnx.Conv(
                outputs, outputs, (3, 3), strides=2, padding=((0, 1), (0, 1)), rngs=rngs
            )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = super().__call__(x)
        return self.downsample(x) if hasattr(self, "downsample") else x


class UpLevel(Level):
    """A level of the decoder, with one block more than a level of the encoder.

    Each level but the last doubles the resolution.
    """

    def __init__(
        self, cfg: VQConfig, inputs: int, outputs: int, first: bool, last: bool, *, rngs: nnx.Rngs
    ):
        widths = [inputs] + [outputs] * (cfg.num_res_blocks + 1)
        super().__init__(cfg, widths, with_attn=first, rngs=rngs)
        if not last:
            self.upsample = _conv3x3(outputs, outputs, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = super().__call__(x)
        if not hasattr(self, "upsample"):
            return x
        return self.upsample(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))


class Encoder(nnx.Module):
    """The convolutional encoder: maps pixels to latents."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        widths = [cfg.ch * m for m in (1, *cfg.ch_mult)]
        last = len(cfg.ch_mult) - 1
        self.conv_in = _conv3x3(3, cfg.ch, rngs)
        self.levels = nnx.List(
            [
                DownLevel(cfg, widths[i], widths[i + 1], i == last, rngs=rngs)
                for i in range(len(cfg.ch_mult))
            ]
        )
        self.mid = _middle(cfg, widths[-1], rngs)
        self.norm_out = _norm(cfg, widths[-1], rngs)
        self.conv_out = _conv3x3(widths[-1], cfg.z_channels, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32[B, Y, X, 3] to float32[B, Y / downsample, X / downsample, z_channels]."""
        x = self.conv_in(x)
        for block in (*self.levels, *self.mid):
            x = block(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """The convolutional decoder: maps latents to pixels."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        widths = [cfg.ch * m for m in (*cfg.ch_mult, cfg.ch_mult[-1])][::-1]
        last = len(cfg.ch_mult) - 1
        self.conv_in = _conv3x3(cfg.z_channels, widths[0], rngs)
        self.mid = _middle(cfg, widths[0], rngs)
        self.levels = nnx.List(
            [
                UpLevel(cfg, widths[i], widths[i + 1], i == 0, i == last, rngs=rngs)
                for i in range(len(cfg.ch_mult))
            ]
        )
        self.norm_out = _norm(cfg, widths[-1], rngs)
        self.conv_out = _conv3x3(widths[-1], 3, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float32[B, y, x, z_channels] to float32[B, y * downsample, x * downsample, 3]."""
        x = self.conv_in(x)
        for block in (*self.mid, *self.levels):
            x = block(x)
        return self.conv_out(nnx.silu(self.norm_out(x)))


def l2_normalize(x: jax.Array) -> jax.Array:
    """Scales x to unit length along the last axis.

    As torch.nn.functional.normalize does, with eps 1e-12: zeros stay zeros.
    """
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class VQ(nnx.Module):
    """The image tokenizer: an encoder, a codebook of l2-normalized codes and a decoder."""

    def __init__(self, cfg: VQConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.encoder = Encoder(cfg, rngs=rngs)
        self.quant_conv = nnx.Linear(cfg.z_channels, cfg.codebook_dim, rngs=rngs)
        self.codebook = nnx.Param(
            nnx.initializers.normal(1.0)(
                rngs.params(), (cfg.codebook_size, cfg.codebook_dim), jnp.float32
            )
        )
        self.post_quant_conv = nnx.Linear(cfg.codebook_dim, cfg.z_channels, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)

    def latents(self, pixels: jax.Array) -> jax.Array:
        """Encodes pixels without quantizing.

        pixels: float32[B, Y, X, 3] in [-1, 1]. Returns float32[B, y, x, codebook_dim].
        """
        return self.quant_conv(self.encoder(pixels))

    def nearest(self, latents: jax.Array) -> jax.Array:
        """Returns the index of the nearest code: float32[..., C] -> int32[...].

        Latents and codes are l2-normalized first. If a latent or any code is NaN or infinite, the
        index is codebook_size. That is out of range, so a lookup of it gives NaN and callers can
        detect it.
        """
        z, codes = l2_normalize(latents), l2_normalize(self.codebook[...])
        products = jnp.einsum("...C,GC->...G", z, codes)
        lengths = jnp.broadcast_to(jnp.sum(codes**2, axis=-1), products.shape)
        distance = jnp.sum(z**2, axis=-1, keepdims=True) + lengths - 2 * products
        finite = jnp.all(jnp.isfinite(z), axis=-1) & jnp.all(jnp.isfinite(codes))
        return jnp.where(finite, jnp.argmin(distance, axis=-1), len(codes)).astype(jnp.int32)

    def lookup(self, indices: jax.Array) -> jax.Array:
        """Looks up l2-normalized codes: int32[...] -> float32[..., codebook_dim]."""
        return l2_normalize(self.codebook[...][indices])

    def pixels(self, quantized: jax.Array) -> jax.Array:
        """Decodes quantized latents: float32[B, y, x, codebook_dim] -> float32[B, Y, X, 3].

        Pixels are about in [-1, 1]; they are not clipped.
        """
        return self.decoder(self.post_quant_conv(quantized))

    def encode(self, pixels: jax.Array) -> jax.Array:
        """Encodes images to tokens.

        pixels: float32[B, Y, X, 3] in [-1, 1]. Returns indices int32[B, y * x], row-major.
        """
        return self.nearest(self.latents(pixels)).reshape(pixels.shape[0], -1)

    def decode(self, indices: jax.Array) -> jax.Array:
        """Decodes tokens to images, without clipping the pixels.

        indices: int32[B, y * y], square grids in row-major order. Returns float32[B, Y, X, 3].
        """
        side = round(indices.shape[1] ** 0.5)
        return self.pixels(self.lookup(indices.reshape(-1, side, side)))
