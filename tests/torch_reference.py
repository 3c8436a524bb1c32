"""Models for the module tests: a tiny random Janus of transformers, the same weights in janus_jax,
and the golden checkpoint in janus_jax."""

import functools
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
)

from janus_jax.interop.load import ConstantRngs, build_model, load_params, open_folder
from janus_jax.models.janus import Janus, merge_features

GOLDEN = Path(__file__).parent / "golden"
IMAGE_TOKEN = 95


def random_weights(module: torch.nn.Module) -> torch.nn.Module:
    """Fills all parameters so that activations stay near 1 and no bias or norm is trivial."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in module.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if name.endswith("bias"):
            weight.data = 0.2 * noise
        elif weight.ndim == 1:
            weight.data = 1 + 0.2 * noise
        elif "embed" in name and "patch_embed" not in name:
            weight.data = noise
        else:
            weight.data = noise * weight[0].numel() ** -0.5
    return module.eval().requires_grad_(False)


def torch_janus() -> JanusForConditionalGeneration:
    """Two blocks per stack, two query heads per key head, 16 x 16 pixel images of 4 x 4 tokens."""
    text = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=3e-6,
        rope_theta=5000.0,
        max_position_embeddings=64,
    )
    vision = JanusVisionConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        image_size=16,
        patch_size=4,
        mlp_ratio=2.0,
        projection_dim=32,
        num_image_tokens=16,
    )
    vq = JanusVQVAEConfig(
        num_embeddings=40,
        latent_channels=12,
        base_channels=32,
        channel_multiplier=[1, 2, 2],
        num_res_blocks=1,
        projection_dim=32,
        image_token_embed_dim=32,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq,
        image_token_id=IMAGE_TOKEN,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return random_weights(JanusForConditionalGeneration(config))


def to_numpy(x) -> np.ndarray:
    """Converts a torch or JAX array to NumPy."""
    return x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def channels_last(x) -> np.ndarray:
    """Converts [B, C, Y, X] of torch or a recording to [B, Y, X, C]."""
    return np.moveaxis(to_numpy(x), 1, -1)


def channels_first(x) -> torch.Tensor:
    """Converts [B, Y, X, C] to torch [B, C, Y, X]."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def uniform(*shape: int, seed: int = 0) -> np.ndarray:
    """Returns random float32 in [-1, 1)."""
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def assert_close(name: str, ours, theirs, atol: float, rtol: float = 0.0) -> None:
    """Asserts equality to atol + rtol * |theirs|; prints the largest difference (pytest -rP)."""
    ours, theirs = to_numpy(ours), to_numpy(theirs)
    assert ours.shape == theirs.shape, f"{name}: {ours.shape=} {theirs.shape=}"
    print(f"{name}: largest difference {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, atol=atol, rtol=rtol, err_msg=name)


def call(module: nnx.Module, *args):
    """Calls module(*args) under jit."""
    return jax.jit(type(module).__call__)(module, *args)


def rebuilt(model, cfg):
    """Returns a model of another config with the same weights, cast to the dtypes of cfg."""
    graph, wanted = nnx.split(nnx.eval_shape(lambda: type(model)(cfg, rngs=ConstantRngs())))

    def cast(old, new):
        return np.asarray(old).astype(new.dtype)

    return nnx.merge(graph, jax.tree.map(cast, nnx.state(model), wanted))


def counting(batch: int, length: int) -> np.ndarray:
    """Returns positions 0..T-1 for every row, int32[B, T]."""
    return np.tile(np.arange(length, dtype=np.int32), (batch, 1))


@jax.jit
def read_with_images(model: Janus, tokens, pixels):
    """Computes text logits of rows whose IMAGE_TOKENs stand for images, pixels [B, n, S, S, 3]."""
    rows = tokens.shape[0]
    features = model.encode_images(pixels.reshape(-1, *pixels.shape[2:]))
    features = features.reshape(rows, -1, features.shape[-1])
    embeds = model.language_model.embed(tokens)
    embeds = merge_features(embeds, tokens == IMAGE_TOKEN, features)
    hidden, _ = model.language_model(embeds)
    return model.language_model.lm_head(hidden)


def two_images_a_row() -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens [2, 40] with two images of 16 tokens per row, and the pixels."""
    tokens = np.random.default_rng(3).integers(0, 95, (2, 40)).astype(np.int32)
    for row, starts in enumerate(((1, 20), (4, 23))):
        for start in starts:
            tokens[row, start : start + 16] = IMAGE_TOKEN
    return tokens, uniform(2, 2, 16, 16, 3, seed=4)


def load_janus(folder: Path) -> Janus:
    """Loads a checkpoint folder through the converter, in float32."""
    opened = open_folder(folder)
    return build_model(opened.cfg, load_params(opened, jnp.float32))


@functools.cache
def tiny_pair() -> tuple[JanusForConditionalGeneration, Janus]:
    """Returns a torch model and ours with the same random weights, saved and converted."""
    theirs = torch_janus()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load_janus(Path(folder))


@functools.cache
def golden_janus(config: str = "config.json") -> Janus:
    """Loads the golden checkpoint with its config.json or config_variant.json."""
    with tempfile.TemporaryDirectory() as folder:
        for name, target in (("config.json", config), ("model.safetensors", "model.safetensors")):
            shutil.copy(GOLDEN / "janus" / target, Path(folder) / name)
        return load_janus(Path(folder))
