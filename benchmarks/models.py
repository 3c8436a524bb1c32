"""The models that the benchmarks run, with random weights: sizes, and what a decode step reads."""

import dataclasses

import jax
import jax.numpy as jnp

from janus_jax.aot import generation
from janus_jax.aot.compiled import device_bytes
from janus_jax.interop.load import DTYPES
from janus_jax.models.janus import JanusConfig
from janus_jax.models.siglip import SiglipConfig

PROMPT_LENGTH = 32  # tokens of the prompt of an image


def _tiny() -> JanusConfig:
    """Returns a model that `transformers` can represent, with images of 64 pixels, 16 tokens."""
    cfg = JanusConfig.janus_tiny()
    return dataclasses.replace(
        cfg,
        und_encoder=SiglipConfig(64, 16, width=64, num_layers=2, num_heads=4, mlp_dim=128),
        gen_vq=dataclasses.replace(cfg.gen_vq, ch=32, ch_mult=(1, 1, 1, 1, 1), norm_num_groups=32),
        language_model=dataclasses.replace(cfg.language_model, num_hidden_layers=2),
    )


# The default configs are those of the original models; `tiny` is for runs on the CPU.
SIZES = {
    "janus_pro_1b": JanusConfig.janus_pro_1b,
    "janus_pro_7b": JanusConfig.janus_pro_7b,
    "tiny": _tiny,
}


def config(name: str, dtype: str = "bfloat16") -> JanusConfig:
    """Returns the config of a model that computes in `dtype` and stores its weights in it."""
    return SIZES[name]().with_dtype(DTYPES[dtype])


def shapes(cfg: JanusConfig, **others: int) -> dict[str, int | str]:
    """Returns the sizes of the decoder and its dtype, for records. others: further sizes."""
    decoder = cfg.language_model
    return dict(
        dtype=jnp.dtype(decoder.dtype).name,
        layers=decoder.num_hidden_layers,
        width=decoder.hidden_size,
        mlp_width=decoder.intermediate_size,
        heads=decoder.num_attention_heads,
        **others,
    )


def step_bytes(cfg: JanusConfig, kind: str, rows: int, filled: float) -> float:
    """Returns the bytes that one decode step must read: the weights, and the valid slots.

    kind: "draw" or "answer". rows: of the batch. filled: mean number of valid slots of a row.
    """
    target = generation.Target(cfg, jax.devices()[0])
    weights = device_bytes(list(generation.weight_shapes(target, kind).values()))
    return weights + generation.cache_bytes(target, rows, 1, filled)
