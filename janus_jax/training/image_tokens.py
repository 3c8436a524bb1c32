"""Computes the tokens of the images to generate, in a program that runs before the step.

Compiling the image tokenizer in float32 takes longer than compiling the step. Its program does not
depend on the loss or on the settings of a run, and takes one image at a time, so that neither the
number of rows nor the number of images changes how long it compiles or how much memory it needs.

B rows, T tokens of a row, m images to generate per row, S pixels a side, N tokens of an image.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from janus_jax.processing.images import from_uint8
from janus_jax.sharding import batch_sharding
from janus_jax.training.step import Params

# With XLA's default effort, compiling a float32 convolution of 128 channels for a TPU v5e takes
# over 4 times as long, and the compiler expects the convolution to take 21 % fewer cycles.
TPU_OPTIONS = {"optimization_level": 19}  # O1; JAX 0.10 and 0.12 both know the number


def make_tokenize(build: Callable[[Params], nnx.Module], mesh: Mesh) -> Callable:
    """Returns the jitted function (params, generated, gen_mask) -> indices of encode_generated.

    Each device encodes the images of its own rows.

    build: builds the image tokenizer from its parameters. mesh: the devices.
    params: the parameters of the image tokenizer, on every device. The other arguments and the
    result are sharded by rows.
    """
    rows = batch_sharding(mesh)

    def tokenize(params: Params, generated: jax.Array, gen_mask: jax.Array) -> jax.Array:
        return encode_generated(build(params), generated, gen_mask)

    specs = PartitionSpec(), rows.spec, rows.spec
    local = jax.shard_map(
        tokenize, mesh=mesh, in_specs=specs, out_specs=rows.spec, check_vma=False
    )
    options = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return jax.jit(local, out_shardings=rows, compiler_options=options)


def encode_generated(vq: nnx.Module, generated: jax.Array, gen_mask: jax.Array) -> jax.Array:
    """Encodes the images to generate, one at a time.

    vq: the image tokenizer.
    generated: uint8[B, m, S, S, 3], pixels.
    gen_mask: bool[B, T], True at the image tokens of a row, N for each of its images.
    Returns int32[B, m, N], the tokens; 0 for unused entries, which are not encoded.
    """

    def encode(pixels: jax.Array) -> jax.Array:
        # as in commands/tokenize_images.py: with lower precision, some images get different tokens
        with jax.default_matmul_precision("highest"):
            return vq.encode(from_uint8(pixels)[None])[0]

    images = generated.reshape(-1, *generated.shape[2:])
    tokens = jax.eval_shape(encode, images[0])
    number = jnp.sum(gen_mask, axis=1, dtype=jnp.int32) // tokens.size
    is_used = jnp.arange(generated.shape[1], dtype=jnp.int32)[None] < number[:, None]

    def encode_used(image: tuple[jax.Array, jax.Array]) -> jax.Array:
        pixels, is_used = image
        return jax.lax.cond(is_used, encode, lambda _: jnp.zeros_like(tokens), pixels)

    indices = jax.lax.map(encode_used, (images, is_used.reshape(-1)))
    return indices.reshape(*generated.shape[:2], -1)
