"""The models that the benchmarks run, with random weights: sizes, and what a decode step reads."""

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx

from janus_jax.interop.load import DTYPES, abstract
from janus_jax.models.janus import JanusConfig
from janus_jax.models.siglip import SiglipConfig

PROMPT_LENGTH = 32  # tokens of the prompt of an image
# Modules whose weights one decode step reads. Of the embeddings it reads only a few rows.
IMAGE_STEP = ("language_model.layers", "language_model.norm", "gen_head", "gen_aligner")
TEXT_STEP = ("language_model.layers", "language_model.norm", "language_model.lm_head")


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


def step_bytes(cfg: JanusConfig, parts: Sequence[str], rows: int, filled: float) -> float:
    """Returns the bytes that one decode step must read.

    These are the weights of the modules `parts`, once, and the valid slots of the cache.

    rows: rows of the batch. filled: mean number of valid slots of a row.
    """
    weights = 0
    for keys, leaf in nnx.to_flat_state(abstract(cfg)[1]):
        path = ".".join(map(str, keys))
        if any(path.startswith(f"{part}.") for part in parts):
            array = leaf.get_value()
            weights += math.prod(array.shape) * array.dtype.itemsize
    decoder = cfg.language_model
    width = 2 * decoder.num_key_value_heads * decoder.head_dim * decoder.num_hidden_layers
    return weights + rows * filled * width * jnp.dtype(decoder.dtype).itemsize
