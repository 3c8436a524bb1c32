"""A Janus of a few thousand random numbers, for tests of training steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from janus_jax.interop.load import abstract
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.kv_cache import KVCache
from janus_jax.models.llama import LlamaConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig

CODES = 12


def empty_cache(cfg: LlamaConfig, batch_size: int, size: int) -> KVCache:
    """Returns a cache of `batch_size` rows with `size` slots, none of which is valid."""
    shape = (batch_size, size, cfg.num_key_value_heads, cfg.head_dim)
    slots = tuple(jnp.zeros(shape, cfg.dtype) for _ in range(cfg.num_hidden_layers))
    return KVCache(slots, slots, jnp.zeros(batch_size, jnp.int32))


def tiny_config() -> JanusConfig:
    """4-pixel images of 4 tokens to draw and 4 to read, one block a tower."""
    return JanusConfig(
        und_encoder=SiglipConfig(4, 2, width=8, num_layers=1, num_heads=2, mlp_dim=16),
        und_aligner_depth=1,
        gen_vq=VQConfig(
            CODES, 4, ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=6, norm_num_groups=2
        ),
        gen_aligner_depth=1,
        gen_head_width=8,
        language_model=LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
            max_position_embeddings=64,
        ),
    )


@functools.cache
def tiny_params() -> tuple[nnx.GraphDef, nnx.State]:
    """A graph and random parameters in NumPy: the buffers that a step is given are lost."""
    graph, shapes = abstract(tiny_config())
    rng = np.random.default_rng(0)

    def fill(leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return 1 + 0.1 * noise if leaf.ndim == 1 else noise / leaf.shape[-2] ** 0.5

    return graph, jax.tree.map(fill, shapes)


def tiny_model() -> Janus:
    graph, state = tiny_params()
    return nnx.merge(graph, jax.tree.map(jnp.array, state))
