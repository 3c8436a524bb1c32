"""What a run takes of the devices' memory, which need not be there."""

import math

import jax
import jax.numpy as jnp

from janus_jax.sharding import batch_sharding
from janus_jax.training.setup import Setup, Shapes


def row_shapes(setup: Setup) -> Shapes:
    """The rows of a step, of all processes (data/packing.py)."""
    rows, size = setup.rows, setup.source.cfg.image_size
    positions = rows.batch_size, rows.seq_len
    generated = rows.batch_size, rows.max_generated_images
    image = (size, size, 3)
    kinds = dict.fromkeys(("tokens", "segment_ids", "positions"), (positions, jnp.int32))
    kinds |= dict.fromkeys(("image_mask", "gen_mask", "loss_mask"), (positions, jnp.bool))
    kinds |= dict(
        kind=(positions, jnp.int8),
        pixels=((rows.batch_size, rows.max_input_images, *image), jnp.uint8),
        generated=((*generated, *image), jnp.uint8),
    )
    if rows.tokenized:
        kinds["generated"] = ((*generated, setup.source.cfg.num_image_tokens), jnp.int32)
    sharding = batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in kinds.items()
    }


def held(setup: Setup) -> dict[str, int]:
    """Bytes that lie on each device during a step, by what they are; without what it takes to
    compute it (step_bytes)."""
    state = setup.abstract_state()
    parts = dict(
        masters=state.params,
        optimizer=state.opt_state,
        average=state.average,
        frozen=setup.shapes[1],
        rows=row_shapes(setup),
    )
    return {name: _bytes(tree) for name, tree in parts.items() if jax.tree.leaves(tree)}


def _bytes(tree) -> int:
    """Of shapes, on one device."""
    leaves = jax.tree.leaves(tree)
    parts = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    return sum(size * leaf.dtype.itemsize for size, leaf in zip(parts, leaves, strict=True))


def step_bytes(setup: Setup) -> int:
    """What a step needs on each device beside what is held, as XLA plans it: temporaries, and
    results that do not take the place of what was given."""
    lowered = setup.step().lower(setup.abstract_state(), setup.shapes[1], row_shapes(setup))
    stats = lowered.compile().memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
