"""The decoder of Janus: DeepSeek-LLM, a Llama whose head is not tied to the embeddings.

B batch, T query length, S key/cache length, D model width, N query heads, K key/value heads,
H head dim, F MLP width, V vocabulary.
It computes what LlamaForCausalLM of transformers does, which the original code runs.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from janus_jax.models.attention import attention
from janus_jax.models.kv_cache import KVCache, write_slots
from janus_jax.models.layers import (
    Head,
    Linear,
    RMSNorm,
    block_call,
    embed_lookup,
    linear,
    run_layers,
    saved,
)

Angles = tuple[jax.Array, jax.Array]  # cosines and sines
LayerCache = tuple[jax.Array, jax.Array, jax.Array]  # keys, values, lengths


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of the decoder, with the field names of transformers' LlamaConfig.

    dtype: the compute dtype.
    param_dtype: the dtype of the stored parameters.
    remat: what the backward pass recomputes, one of layers.REMAT_CHOICES.
    scan: whether the layers run in one loop if there is no cache, see layers.run_layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    remat: str = "none"
    scan: bool = False

    @property
    def head_dim(self) -> int:
        """H, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads


def rope_angles(positions: jax.Array, head_dim: int, theta: float) -> Angles:
    """Returns the cosines and sines of the rotary embedding, float32[B, T, 1, H / 2] each.

    positions: int32[B, T].
    The angles are float32 for every compute dtype: in bfloat16, positions 256 and 257 are equal.
    """
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency[None, None, None]
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Applies the rotary embedding to x: float[B, T, heads, H] -> the same shape and dtype.

    Element i is paired with element i + H / 2, as in Llama.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _linear(
    cfg: LlamaConfig, inputs: int, outputs: int, rngs: nnx.Rngs, layer: type[Linear] = Linear
) -> Linear:
    types = dict(dtype=cfg.dtype, param_dtype=cfg.param_dtype)
    return linear(inputs, outputs, use_bias=False, **types, rngs=rngs, layer=layer)


def _norm(cfg: LlamaConfig, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(
        cfg.hidden_size,
        epsilon=cfg.rms_norm_eps,
        dtype=cfg.dtype,
        param_dtype=cfg.param_dtype,
        rngs=rngs,
    )


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary position embeddings."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        query_width = cfg.num_attention_heads * cfg.head_dim
        key_width = cfg.num_key_value_heads * cfg.head_dim
        self.head_dim = cfg.head_dim
        self.q_proj = _linear(cfg, cfg.hidden_size, query_width, rngs)
        self.k_proj = _linear(cfg, cfg.hidden_size, key_width, rngs)
        self.v_proj = _linear(cfg, cfg.hidden_size, key_width, rngs)
        self.o_proj = _linear(cfg, query_width, cfg.hidden_size, rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        segment_ids: jax.Array | None = None,
        layer_cache: LayerCache | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes causal attention over the new positions and, if given, the cache.

        x: float[B, T, D].
        angles: what rope_angles returns.
        segment_ids: int32[B, T], the examples of packed rows; only without a cache.
        layer_cache: the keys and values of this layer, float[B, S, K, H] each, and the lengths of
            the rows, int32[B]; the new keys and values are written behind them. Without a cache,
            S = T.
        Returns float[B, T, D] and the keys and values attended to, float[B, S, K, H] each.
        """
        heads = (*x.shape[:2], -1, self.head_dim)
        q = apply_rope(saved(self.q_proj(x)).reshape(heads), *angles)
        k = apply_rope(saved(self.k_proj(x)).reshape(heads), *angles)
        v = saved(self.v_proj(x)).reshape(heads)
        q_start = None
        if layer_cache is not None:
            keys, values, q_start = layer_cache
            k, v = write_slots(keys, k, q_start), write_slots(values, v, q_start)
        out = attention(q, k, v, causal=True, q_start=q_start, segment_ids=segment_ids)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), k, v


@jax.checkpoint
def _silu_gate(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns silu(gate) * up, computed in float32 and rounded once.

    For the backward pass only gate and up are saved.
    """
    return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(up.dtype)


class MLP(nnx.Module):
    """The SwiGLU feed-forward network."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.gate_proj = _linear(cfg, cfg.hidden_size, cfg.intermediate_size, rngs)
        self.up_proj = _linear(cfg, cfg.hidden_size, cfg.intermediate_size, rngs)
        self.down_proj = _linear(cfg, cfg.intermediate_size, cfg.hidden_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps float[..., D] to float[..., D]."""
        with jax.named_scope("mlp"):
            gate, up = saved(self.gate_proj(x)), saved(self.up_proj(x))
            return self.down_proj(_silu_gate(gate, up))


class Block(nnx.Module):
    """A pre-norm transformer block: attention and MLP, each with a residual connection."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.input_layernorm = _norm(cfg, rngs)
        self.self_attn = SelfAttention(cfg, rngs=rngs)
        self.post_attention_layernorm = _norm(cfg, rngs)
        self.mlp = MLP(cfg, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        angles: Angles,
        segment_ids: jax.Array | None = None,
        layer_cache: LayerCache | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps float[B, T, D] to float[B, T, D]; also returns the keys and values.

        See SelfAttention for the arguments.
        """
        out, k, v = self.self_attn(self.input_layernorm(x), angles, segment_ids, layer_cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), k, v


class Llama(nnx.Module):
    """The decoder: maps embeddings to hidden states, of which `lm_head` computes text logits."""

    def __init__(self, cfg: LlamaConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.embed_tokens = nnx.Embed(
            cfg.vocab_size,
            cfg.hidden_size,
            dtype=cfg.dtype,
            param_dtype=cfg.param_dtype,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )
        self.layers = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.num_hidden_layers)])
        self.norm = _norm(cfg, rngs)
        self.lm_head = _linear(cfg, cfg.hidden_size, cfg.vocab_size, rngs, layer=Head)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Embeds text tokens: int32[B, T] -> float[B, T, D]."""
        return embed_lookup(self.embed_tokens, tokens)

    def __call__(
        self,
        embeds: jax.Array,
        *,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        cache: KVCache | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs the decoder over T new positions; each attends to itself and to earlier ones.

        embeds: float[B, T, D].
        positions: int32[B, T], the RoPE positions. Default: the positions that follow those in the
            cache, or 0 to T - 1 without a cache.
        segment_ids: int32[B, T], the examples of packed rows, which do not attend to each other;
            only without a cache.
        cache: keys and values of earlier positions; the new ones are written behind them.
        Returns the hidden states after the final norm, float[B, T, D], and the keys and values of
        all positions so far (S = T without a cache).
        """
        batch, length = embeds.shape[:2]
        start = jnp.zeros(batch, jnp.int32) if cache is None else cache.lengths
        if positions is None:
            positions = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None]
        angles = rope_angles(positions, self.cfg.head_dim, self.cfg.rope_theta)
        block, x = block_call(Block, self.cfg.remat), embeds.astype(self.cfg.dtype)

        def call(layer: Block, x: jax.Array, layer_cache: LayerCache | None = None):
            x, k, v = block(layer, x, angles, segment_ids, layer_cache)
            return x, (k, v)

        if cache is None:
            x, slots = run_layers(call, self.layers, x, scan=self.cfg.scan)
        else:
            caches = [(k, v, start) for k, v in zip(cache.keys, cache.values, strict=True)]
            x, slots = run_layers(call, self.layers, x, inputs=caches)
        keys, values = zip(*slots, strict=True)
        return self.norm(x), KVCache(keys, values, start + length)
