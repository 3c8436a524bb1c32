"""Janus and Janus-Pro: one decoder for image understanding and image generation.

B batch, T sequence length, N image features of a row, D model width.
Source: janus/models/modeling_vlm.py and projector.py of the original code.
"""

import dataclasses
import itertools
from collections.abc import Container

import jax
import jax.numpy as jnp
from flax import nnx

from janus_jax.models.layers import Head, embed_lookup, gelu, linear
from janus_jax.models.llama import Llama, LlamaConfig
from janus_jax.models.masked import put_masked
from janus_jax.models.siglip import Siglip, SiglipConfig
from janus_jax.models.vq import VQ, VQConfig


@dataclasses.dataclass(frozen=True)
class JanusConfig:
    """Sizes of a Janus model.

    und_encoder, gen_vq, language_model: configs of the SigLIP encoder, the image tokenizer and the
        decoder.
    und_aligner_depth, gen_aligner_depth: number of linear layers of each aligner.
    gen_head_width: hidden width of the image head.
    """

    und_encoder: SiglipConfig
    und_aligner_depth: int
    gen_vq: VQConfig
    gen_aligner_depth: int
    gen_head_width: int
    language_model: LlamaConfig

    @property
    def image_size(self) -> int:
        """Height and width in pixels of input images and of generated images."""
        return self.und_encoder.image_size

    @property
    def gen_grid(self) -> int:
        """Height and width of the grid of image tokens."""
        return self.image_size // self.gen_vq.downsample

    @property
    def num_image_tokens(self) -> int:
        """Number of image tokens of one generated image."""
        return self.gen_grid**2

    def with_dtype(self, dtype, param_dtype=None) -> "JanusConfig":
        """Returns a copy that computes in `dtype` and stores parameters in `param_dtype`.

        param_dtype defaults to dtype. The image tokenizer stays in float32.
        """
        types = dict(dtype=dtype, param_dtype=dtype if param_dtype is None else param_dtype)
        return dataclasses.replace(
            self,
            und_encoder=dataclasses.replace(self.und_encoder, **types),
            language_model=dataclasses.replace(self.language_model, **types),
        )

    def with_remat(self, remat: str) -> "JanusConfig":
        """Returns a copy with another rematerialization setting, one of layers.REMAT_CHOICES."""
        return dataclasses.replace(
            self,
            und_encoder=dataclasses.replace(self.und_encoder, remat=remat),
            language_model=dataclasses.replace(self.language_model, remat=remat),
        )

    def with_scan(self, stacks: Container[str]) -> "JanusConfig":
        """Returns a copy in which the layers of these stacks run in a loop, and no others.

        stacks: paths of lists of layers: und_encoder.blocks, language_model.layers.
        """
        encoder, decoder = self.und_encoder, self.language_model
        return dataclasses.replace(
            self,
            und_encoder=dataclasses.replace(encoder, scan="und_encoder.blocks" in stacks),
            language_model=dataclasses.replace(decoder, scan="language_model.layers" in stacks),
        )

    @classmethod
    def janus_1_3b(cls) -> "JanusConfig":
        """Returns the sizes of deepseek-ai/Janus-1.3B, which are those of Janus-Pro-1B."""
        return cls.janus_pro_1b()

    @classmethod
    def janus_pro_1b(cls) -> "JanusConfig":
        """Returns the sizes of deepseek-ai/Janus-Pro-1B."""
        return _released(hidden_size=2048, intermediate_size=5632, layers=24, heads=16)

    @classmethod
    def janus_pro_7b(cls) -> "JanusConfig":
        """Returns the sizes of deepseek-ai/Janus-Pro-7B."""
        return _released(hidden_size=4096, intermediate_size=11008, layers=30, heads=32)

    @classmethod
    def janus_tiny(cls) -> "JanusConfig":
        """Returns the sizes of the model in this package: 96 x 96 pixel images of 36 tokens."""
        return cls(
            und_encoder=SiglipConfig(96, 16, width=128, num_layers=4, num_heads=4, mlp_dim=512),
            und_aligner_depth=2,
            gen_vq=VQConfig(
                codebook_size=1024,
                codebook_dim=16,
                ch=8,
                ch_mult=(1, 2, 4, 8, 8),
                num_res_blocks=1,
                z_channels=64,
                norm_num_groups=8,
            ),
            gen_aligner_depth=2,
            gen_head_width=128,
            language_model=LlamaConfig(
                vocab_size=448,
                hidden_size=128,
                intermediate_size=352,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
                rms_norm_eps=1e-6,
                rope_theta=10000.0,
                max_position_embeddings=4096,
            ),
        )


def _released(hidden_size: int, intermediate_size: int, layers: int, heads: int) -> JanusConfig:
    decoder = LlamaConfig(
        vocab_size=102400,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        max_position_embeddings=16384,
    )
    return JanusConfig(
        und_encoder=SiglipConfig.siglip_large_patch16_384(),
        und_aligner_depth=2,
        gen_vq=VQConfig.vq_16(),
        gen_aligner_depth=2,
        gen_head_width=hidden_size,
        language_model=decoder,
    )


def merge_features(embeds: jax.Array, image_mask: jax.Array, features: jax.Array) -> jax.Array:
    """Replaces embeddings by image features where image_mask is True, in order.

    embeds: float[B, T, D].
    image_mask: bool[B, T], with at most N True values per row.
    features: float[B, N, D]; the n-th True position of a row gets feature n of that row.
    Returns float[B, T, D] in the dtype of embeds.
    """
    placed = put_masked(features.astype(embeds.dtype), image_mask)
    return jnp.where(image_mask[..., None], placed, embeds)


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


class Janus(nnx.Module):
    """The whole model: SigLIP encoder, image tokenizer, aligners, image head and decoder."""

    def __init__(self, cfg: JanusConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        decoder = cfg.language_model
        width = decoder.hidden_size
        types = dict(dtype=decoder.dtype, param_dtype=decoder.param_dtype)
        codes, code_dim = cfg.gen_vq.codebook_size, cfg.gen_vq.codebook_dim
        self.und_encoder = Siglip(cfg.und_encoder, rngs=rngs)
        self.und_aligner = Aligner(
            cfg.und_encoder.width, width, cfg.und_aligner_depth, **types, rngs=rngs
        )
        self.gen_vq = VQ(cfg.gen_vq, rngs=rngs)
        self.gen_embed = nnx.Embed(
            codes,
            code_dim,
            embedding_init=nnx.initializers.normal(1.0),
            **types,
            rngs=rngs,
        )
        self.gen_aligner = Aligner(code_dim, width, cfg.gen_aligner_depth, **types, rngs=rngs)
        self.gen_head = GenHead(width, cfg.gen_head_width, codes, **types, rngs=rngs)
        self.language_model = Llama(decoder, rngs=rngs)

    def encode_images(self, pixels: jax.Array) -> jax.Array:
        """Encodes images for understanding: normalized float[B, Y, X, 3] -> float[B, N, D]."""
        return self.und_aligner(self.und_encoder(pixels))

    def embed_image_tokens(self, indices: jax.Array) -> jax.Array:
        """Embeds image tokens for the decoder: int32[...] -> float[..., D].

        The codes are not l2-normalized here, unlike those that VQ decodes.
        """
        return self.gen_aligner(embed_lookup(self.gen_embed, indices))
