"""Floating-point operations of a training step, and peak rates of devices.

Model FLOPs utilization, MFU = FLOPs of a step / (its seconds * number of devices * peak_flops).

A multiplication and an addition count as two operations. Counted are:
* A matrix with p parameters: 2 p for every position that it is applied to in the forward pass. In
  the backward pass 2 p more for the gradient of the matrix if it is trainable, and 2 p more for the
  gradient of its input if anything before it is trainable.
* Attention in a layer of width D: 4 D for every pair of a query and a key that it may attend to,
  and twice as much in the backward pass. An example of n tokens has n (n + 1) / 2 pairs, an image
  of n patches has n^2.

The positions are tokens for the decoder, patches of input images for SigLIP and its aligner, tokens
of generated images for the generation embedding and aligner, and targets for the two heads.

Not counted are padding, unused image slots, recomputation, norms and activations, and the image
tokenizer, whose tokens can be precomputed. The MFU is therefore a lower bound.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import numpy as np

from janus_jax.devices import facts_of
from janus_jax.families.family import ModelConfig
from janus_jax.families.registry import family_of

Leaf = jax.Array | jax.ShapeDtypeStruct
Depth = tuple[int, int]  # place in the data flow, see families.family.Parameter


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of a step, forward and backward, for one item of each type.

    Attributes:
        token: a token in the decoder, without attention.
        pair: a token and one that it attends to, in the decoder.
        patch: a patch of an input image, including SigLIP's attention.
        generated: a token of a generated image, in the generation embedding and aligner.
        text_target, image_target: a target in the text head and in the image head.
    """

    token: float
    pair: float
    patch: float
    generated: float
    text_target: float
    image_target: float

    def __call__(self, rows: Mapping[str, np.ndarray]) -> float:
        """Returns the FLOPs of a step with these rows (data/packing.py)."""
        token_mask = rows["segment_ids"] > 0
        counts = dict(
            token=token_mask.sum(),
            pair=((rows["positions"] + 1) * token_mask).sum(),  # positions start at 0 per example
            patch=rows["image_mask"].sum(),
            generated=rows["gen_mask"].sum(),
            text_target=rows["loss_mask"].sum(),
            image_target=rows["gen_mask"].sum(),
        )
        return sum(getattr(self, name) * float(count) for name, count in counts.items())


def step_flops(
    cfg: ModelConfig, params: Mapping[str, Leaf], frozen: Mapping[str, Leaf]
) -> StepFlops:
    """Returns the FLOPs of a step.

    Matrices added to a layer by LoRA count as part of it. All parameters of a layer have the same
    depth: the gradient of an input that is only needed within the same layer is not counted.

    params: trainable parameters by dotted path. frozen: frozen parameters. Both may be abstract.
    Raises ValueError for a parameter that is not in the table of the model's family.
    """
    trained, rest = _matrices(params, cfg), _matrices(frozen, cfg)
    first = min(depth for _, depth, _ in trained)
    costs = dict.fromkeys((field.name for field in dataclasses.fields(StepFlops)), 0.0)
    for matrices, trainable in ((trained, 1), (rest, 0)):
        for positions, depth, size in matrices:
            costs[positions] += 2 * size * (1 + trainable + (depth > first))
    family = family_of(cfg)
    for attention in family.attention_flops(cfg):
        place = family.parameter_table.place(attention.path)
        for layer in range(attention.layers):
            passes = 3 if (place, layer) >= first else 1
            costs[attention.counted_by] += passes * attention.flops
    return StepFlops(**costs)


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak bfloat16 rate of a device in FLOP/s, or None if it is not known."""
    facts = facts_of(device.device_kind)
    return facts and facts.peak_flops


def _matrices(params: Mapping[str, Leaf], cfg: ModelConfig) -> list[tuple[str, Depth, int]]:
    """Returns type of positions, depth and size of each parameter that counts.

    The size is 0 if the parameter is not in a matrix product. Layers whose output is not used do
    not count.
    """
    family = family_of(cfg)
    table, stacks = family.parameter_table, family.attention_flops(cfg)
    used = {table.place(stack.path): stack.layers for stack in stacks}
    matrices = []
    for path, leaf in params.items():
        row = table.find(path)
        place, layer = row.depth
        if row.counted_by is None or layer >= used.get(place, math.inf):
            continue
        size = math.prod(leaf.shape) if row.is_matrix and len(leaf.shape) > 1 else 0
        matrices.append((row.counted_by, row.depth, size))
    return matrices
