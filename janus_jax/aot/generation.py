"""Compiles what sample.py runs: the programs that generate images and that answer a question.

B images, P prompt length, T image tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, Sharding, SingleDeviceSharding

from janus_jax import sharding
from janus_jax.aot.compiled import CompiledPart, compile_part, device_bytes
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import family_of
from janus_jax.generation import chunks, codec, image, text
from janus_jax.generation.loading import ImageDefaults
from janus_jax.generation.requests import Requests
from janus_jax.generation.samplers import make_sampling
from janus_jax.interop.load import abstract, leaves_by_path, merge_params
from janus_jax.processing.processor import Batch

# The positions that the matrices of a decode step are applied to, see ParameterGroup.counted_by.
_READ_BY_IMAGE_TOKEN = ("token", "generated", "image_target")
_READ_BY_TEXT_TOKEN = ("token", "text_target")


@dataclasses.dataclass(frozen=True)
class Target:
    """A model on devices to compile for.

    cfg: the config of the model, with its dtypes.
    device: the device that holds the model if there is no mesh.
    mesh: the devices over which the model is sharded, or None.
    """

    cfg: ModelConfig
    device: jax.Device
    mesh: Mesh | None = None

    @functools.cached_property
    def model(self) -> nnx.Module:
        """The model, with shapes and shardings instead of arrays."""
        graph, state = abstract(self.cfg)
        shapes = dict(leaves_by_path(state))
        return merge_params(graph, state, lambda path: self._place(path, shapes[path]))

    def _place(self, path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        where = SingleDeviceSharding(self.device)
        if self.mesh is not None:
            table = family_of(self.cfg).parameter_table
            where = sharding.sharding_for(self.mesh, table)(path, leaf.shape)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    def _batch_sharding(self, size: int) -> Sharding:
        """The sharding of an array with a batch of a size, as sharding.put_batch places it."""
        if self.mesh is None:
            return SingleDeviceSharding(self.device)
        return sharding.batch_sharding(self.mesh, size)

    def batch_shapes(self, arrays):
        """Returns the shapes of a tree of NumPy arrays whose first axis is the batch."""

        def shape(array) -> jax.ShapeDtypeStruct:
            where = self._batch_sharding(array.shape[0])
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=where)

        return jax.tree.map(shape, arrays)


def image_requests(cfg: ModelConfig, prompt_length: int, batch: int) -> Requests:
    """Returns requests for `batch` images of one prompt, with guidance, as NumPy arrays."""
    prompt = np.ones(prompt_length, np.int32)
    sampling = make_sampling(1.0, None, None, family_of(cfg).sizes(cfg).codebook_size)
    weight = ImageDefaults().guidance_weight
    return image.make_requests([(prompt, prompt)], batch, 0, weight, sampling, pad_id=0)


def batch_size(target: Target, num_images: int, prompt_length: int, max_batch: int | None) -> int:
    """Returns B, the number of images that image.generate generates at a time."""
    rows, tokens = 2, family_of(target.cfg).sizes(target.cfg).generated_image_tokens
    slots = rows * (chunks.bucket_length(prompt_length) + tokens - 1)
    decoder = target.cfg.language_model
    numbers, _ = next(chunks.equal_chunks(num_images, slots, max_batch, decoder, target.mesh))
    return len(numbers)


def compile_draw(target: Target, prompt_length: int, batch: int) -> Iterator[CompiledPart]:
    """Compiles the programs that generate a batch of images, in the order in which they run.

    batch: B, see batch_size.

    Raises:
        DoesNotFitError, ValueError: see Job.compile.
    """
    model, mesh = target.model, target.mesh
    requests = target.batch_shapes(image_requests(target.cfg, prompt_length, batch))
    begin = functools.partial(image.begin_batch.lower, model, requests, mesh=mesh)
    prompt = compile_part("prompt", begin, requests)
    yield prompt
    state, sizes = prompt.results, family_of(target.cfg).sizes(target.cfg)
    steps = image.steps_per_report(sizes.generated_image_tokens)
    advance = functools.partial(image.advance_batch.lower, model, state, 1, steps)
    yield compile_part("tokens", advance, state, is_decode_step=True)
    indices = state[1]
    program = codec.decode_program(target.device.platform)
    decode = functools.partial(program.lower, model.gen_vq, indices, mesh)
    yield compile_part("pixels", decode, indices)


def answer_requests(target: Target, prompt_length: int, num_images: int) -> Requests:
    """Returns the shapes of a request for one answer to a prompt with images."""
    cfg, sizes = target.cfg, family_of(target.cfg).sizes(target.cfg)
    length, size = chunks.bucket_length(prompt_length), sizes.image_size
    mask = np.zeros((1, length), bool)
    mask[:, : num_images * sizes.input_image_tokens] = True
    batch = Batch(
        tokens=np.ones((1, length), np.int32),
        token_mask=np.ones((1, length), bool),
        image_mask=mask,
        pixels=np.zeros((1, num_images, size, size, 3), np.float32),
    )
    sampling = make_sampling(0.0, None, None, cfg.language_model.vocab_size)
    return target.batch_shapes(text.make_requests(batch, 0, sampling, eos_id=1))


def compile_answer(
    target: Target, prompt_length: int, num_images: int, max_new_tokens: int
) -> Iterator[CompiledPart]:
    """Compiles the programs that stream an answer, in the order in which they run.

    prompt_length: P, with the tokens of the images. num_images: number of images in the prompt.

    Raises:
        DoesNotFitError, ValueError: see Job.compile.
    """
    model, mesh = target.model, target.mesh
    requests = answer_requests(target, prompt_length, num_images)
    begin = text.begin_answers.lower
    lower = functools.partial(begin, model, requests, max_new_tokens, mesh=mesh)
    prompt = compile_part("prompt", lower, requests)
    yield prompt
    state = prompt.results
    leaves, treedef = jax.tree.flatten(model)
    lower = functools.partial(text.advance_answers.lower, treedef, leaves, state)
    yield compile_part("token", lower, state, is_decode_step=True)


def weight_shapes(target: Target, kind: str) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the weights, by path, that the device must read for each new token.

    Embeddings, of which a token reads one row, are skipped.

    kind: "draw" or "answer".
    """
    table = family_of(target.cfg).parameter_table
    read_by = _READ_BY_IMAGE_TOKEN if kind == "draw" else _READ_BY_TEXT_TOKEN
    shapes = dict(leaves_by_path(nnx.state(target.model)))
    rows = {path: table.find(path) for path in shapes}
    return {
        path: leaf
        for path, leaf in shapes.items()
        if rows[path].counted_by in read_by and rows[path].is_matrix
    }


def cache_bytes(target: Target, batch: int, rows: int, filled: float) -> float:
    """Returns the bytes of keys and values on each device that a decode step must read.

    batch: B. rows: decoder rows of a request. filled: number of filled positions of a row.
    """
    decoder = target.cfg.language_model
    width = 2 * decoder.num_key_value_heads * decoder.head_dim * jnp.dtype(decoder.dtype).itemsize
    shards = sharding.num_tensor_shards(target.mesh)
    if (batch * rows) % (batch_shards := sharding.num_batch_shards(target.mesh)) == 0:
        shards *= batch_shards  # otherwise all of them hold all rows
    return decoder.num_hidden_layers * width * batch * rows * filled / shards


def parameter_bytes(target: Target) -> int:
    """Returns the bytes of all parameters of the model on each device."""
    return device_bytes(nnx.state(target.model))
