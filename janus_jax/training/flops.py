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
import re
from collections.abc import Mapping

import jax
import numpy as np

from janus_jax.models.janus import JanusConfig

# Peak FLOP/s of dense bfloat16 matrix products of one JAX device, by device_kind. Sources: Google's
# pages on each TPU version, and NVIDIA's data sheets (values with sparsity, halved).
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
}

# (beginning of a parameter path, type of the positions that its matrices are applied to), in the
# order of the data flow. The group in the pattern is the number of the layer.
_PARTS = (
    (r"und_encoder\.(?:patch_embed|pos_embed)\b", "patch"),
    (r"und_encoder\.blocks\.(\d+)\.", "patch"),
    (r"und_encoder\.norm\.", "patch"),
    (r"und_aligner\.layers\.(\d+)\.", "patch"),
    (r"gen_embed\.", "generated"),
    (r"gen_aligner\.layers\.(\d+)\.", "generated"),
    (r"language_model\.embed_tokens\.", "token"),
    (r"language_model\.layers\.(\d+)\.", "token"),
    (r"language_model\.norm\.", "token"),
    (r"language_model\.lm_head\.", "text_target"),
    (r"gen_head\.proj\.", "image_target"),
    (r"gen_head\.out\.", "image_target"),
)
_UND_BLOCK, _DECODER_LAYER = 1, 7  # indices in _PARTS of the parts with attention
_NO_PRODUCT = ("embedding", "pos_embed")  # only indexed or added
_NOT_COUNTED = "gen_vq."

Leaf = jax.Array | jax.ShapeDtypeStruct
Depth = tuple[int, int]  # index in _PARTS, number of the layer


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
    cfg: JanusConfig, params: Mapping[str, Leaf], frozen: Mapping[str, Leaf]
) -> StepFlops:
    """Returns the FLOPs of a step.

    Matrices added to a layer by LoRA count as part of it. All parameters of a layer have the same
    depth: the gradient of an input that is only needed within the same layer is not counted.

    params: trainable parameters by dotted path. frozen: frozen parameters. Both may be abstract.
    Raises ValueError for a parameter that belongs to no known part of the model.
    """
    trained, rest = _matrices(params, cfg), _matrices(frozen, cfg)
    first = min(depth for depth, _ in trained)
    costs = dict.fromkeys((field.name for field in dataclasses.fields(StepFlops)), 0.0)
    for matrices, trainable in ((trained, 1), (rest, 0)):
        for depth, size in matrices:
            costs[_PARTS[depth[0]][1]] += 2 * size * (1 + trainable + (depth > first))
    decoder, tower = cfg.language_model, cfg.und_encoder
    pair = 4.0 * decoder.num_attention_heads * decoder.head_dim
    for layer in range(decoder.num_hidden_layers):
        costs["pair"] += pair * (3 if (_DECODER_LAYER, layer) >= first else 1)
    for block in range(_used_blocks(cfg)):
        pairs = 4.0 * tower.width * tower.num_tokens
        costs["patch"] += pairs * (3 if (_UND_BLOCK, block) >= first else 1)
    return StepFlops(**costs)


def peak_flops(device: jax.Device) -> float | None:
    """Returns the peak bfloat16 rate of a device in FLOP/s, or None if it is not known."""
    return _PEAKS.get(device.device_kind)


def _used_blocks(cfg: JanusConfig) -> int:
    """Returns the number of SigLIP blocks whose output is used."""
    return cfg.und_encoder.num_layers + cfg.und_encoder.select_layer + 1


def _matrices(params: Mapping[str, Leaf], cfg: JanusConfig) -> list[tuple[Depth, int]]:
    """Returns depth and size of each counted parameter; size 0 if it is not in a matrix product."""
    matrices = []
    for path, leaf in params.items():
        if path.startswith(_NOT_COUNTED):
            continue
        depth = _depth(path)
        if depth[0] == _UND_BLOCK and depth[1] >= _used_blocks(cfg):
            continue
        in_product = len(leaf.shape) > 1 and path.split(".")[-1] not in _NO_PRODUCT
        matrices.append((depth, math.prod(leaf.shape) if in_product else 0))
    return matrices


def _depth(path: str) -> Depth:
    for index, (pattern, _) in enumerate(_PARTS):
        if match := re.match(pattern, path):
            return index, int(match[1]) if match.lastindex else 0
    raise ValueError(f"cannot count FLOPs: no known part of Janus has the parameter {path}")
