"""Device memory that a run needs. The devices need not be present."""

import math

import jax
import jax.numpy as jnp

from janus_jax.sharding import batch_sharding
from janus_jax.training.setup import Setup, Shapes


def row_shapes(setup: Setup) -> Shapes:
    """Returns the shapes of a batch of rows, of all processes (data/packing.py)."""
    rows, sizes = setup.rows, setup.source.sizes
    positions = rows.batch_size, rows.seq_len
    generated = rows.batch_size, rows.max_generated_images
    image = (sizes.image_size, sizes.image_size, 3)
    kinds = dict.fromkeys(("tokens", "segment_ids", "positions"), (positions, jnp.int32))
    kinds |= dict.fromkeys(("image_mask", "gen_mask", "loss_mask"), (positions, jnp.bool))
    kinds |= dict(
        kind=(positions, jnp.int8),
        pixels=((rows.batch_size, rows.max_input_images, *image), jnp.uint8),
        generated=((*generated, *image), jnp.uint8),
    )
    if rows.tokenized:
        kinds["generated"] = ((*generated, sizes.generated_image_tokens), jnp.int32)
    sharding = batch_sharding(setup.mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in kinds.items()
    }


def array_bytes(setup: Setup) -> dict[str, int]:
    """Returns the bytes of the arrays on each device during a step, by purpose.

    Temporary memory of the step is not included, see step_bytes.
    """
    state = setup.abstract_state()
    parts = dict(
        params=state.params,
        optimizer=state.opt_state,
        ema=state.ema,
        frozen=setup.shapes[1],
        batch=row_shapes(setup),
    )
    return {name: _bytes(tree) for name, tree in parts.items() if jax.tree.leaves(tree)}


def _bytes(tree) -> int:
    """Returns the bytes of a tree of shapes on one device."""
    leaves = jax.tree.leaves(tree)
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves]
    return sum(size * leaf.dtype.itemsize for size, leaf in zip(sizes, leaves, strict=True))


def step_bytes(setup: Setup) -> int:
    """Returns the bytes that XLA plans for a step on each device in addition to array_bytes.

    These are temporaries, and results that do not replace donated arguments.
    """
    lowered = setup.step().lower(setup.abstract_state(), setup.shapes[1], row_shapes(setup))
    stats = lowered.compile().memory_analysis()
    return stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
