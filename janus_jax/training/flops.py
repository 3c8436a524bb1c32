"""What a step of training needs in floating-point operations, and what devices can do at most.

Model FLOPs utilisation, MFU = FLOPs of a step / (its seconds * number of devices * peak_flops).
Counted, a multiplication and an addition as two:
* each matrix of p parameters: 2 p for every place that goes through it; as much again for its own
  gradient where it is trained, and as much again for its input's where something before it is;
* attention, in a layer of width D: 4 D for every pair of a query and a key that it may see, which
  are n (n + 1) / 2 for an example of n tokens and n^2 for an image of n patches; backward twice
  that.
Places are tokens for the decoder, patches of the images looked at for SigLIP and its aligner,
tokens of generated images for theirs, and targets for the two heads. Not counted: padding, images'
places that are empty, what is computed a second time to save memory, norms and activations, and the
image tokenizer, whose work can be done before. So the figure errs on the low side.
"""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np

from janus_jax.models.janus import JanusConfig

# bfloat16 products, dense, of one device as JAX sees it, by its device_kind. Sources: Google's
# pages on each TPU version, NVIDIA's data sheets (their figures with sparsity, halved).
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

# (beginning of a parameter's path, what goes through its matrices), in the order of the data; a
# number in the path is that of a layer.
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
_UND_BLOCK, _DECODER_LAYER = 1, 7  # rows of the table with attention
_NO_PRODUCT = ("embedding", "pos_embed")  # looked up or added
_NO_PART = "gen_vq."

Leaf = jax.Array | jax.ShapeDtypeStruct
Place = tuple[int, int]  # row of the table, number of the layer


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """FLOPs of one step for one of each of these, forward and backward.

    Attributes:
        token: of the decoder, without attention.
        pair: a token and one that it attends to.
        patch: of an image looked at, SigLIP's attention included.
        generated: a token of a generated image, on its way into the decoder.
        text_target, image_target: of the two heads.
    """

    token: float
    pair: float
    patch: float
    generated: float
    text_target: float
    image_target: float

    def __call__(self, rows: Mapping[str, np.ndarray]) -> float:
        """FLOPs of a step with these rows of data/packing.py."""
        real = rows["segment_ids"] > 0
        numbers = dict(
            token=real.sum(),
            pair=((rows["positions"] + 1) * real).sum(),  # positions begin at 0 in each example
            patch=rows["image_mask"].sum(),
            generated=rows["gen_mask"].sum(),
            text_target=rows["loss_mask"].sum(),
            image_target=rows["gen_mask"].sum(),
        )
        return sum(getattr(self, name) * float(number) for name, number in numbers.items())


def step_flops(
    cfg: JanusConfig, params: Mapping[str, Leaf], frozen: Mapping[str, Leaf]
) -> StepFlops:
    """What a step costs that trains `params`, with `frozen` as the rest of the model.

    Both by dotted path; they may be abstract. Matrices added to a layer (LoRA's) count with it. A
    layer's parameters count as one place: the gradient of an input that only the same layer needs
    is not counted.
    Raises ValueError for a parameter of an unknown part.
    """
    trained, rest = _matrices(params, cfg), _matrices(frozen, cfg)
    first = min(place for place, _ in trained)
    costs = dict.fromkeys((field.name for field in dataclasses.fields(StepFlops)), 0.0)
    for matrices, own in ((trained, 1), (rest, 0)):
        for place, size in matrices:
            costs[_PARTS[place[0]][1]] += 2 * size * (1 + own + (place > first))
    decoder, tower = cfg.language_model, cfg.und_encoder
    pair = 4.0 * decoder.num_attention_heads * decoder.head_dim
    for layer in range(decoder.num_hidden_layers):
        costs["pair"] += pair * (3 if (_DECODER_LAYER, layer) >= first else 1)
    for block in range(_used_blocks(cfg)):
        pairs = 4.0 * tower.width * tower.num_tokens
        costs["patch"] += pairs * (3 if (_UND_BLOCK, block) >= first else 1)
    return StepFlops(**costs)


def peak_flops(device: jax.Device) -> float | None:
    """Products in bfloat16 that one device can do, in FLOP/s; None where that is not known here."""
    return _PEAKS.get(device.device_kind)


def _used_blocks(cfg: JanusConfig) -> int:
    return cfg.und_encoder.num_layers + cfg.und_encoder.select_layer + 1


def _matrices(params: Mapping[str, Leaf], cfg: JanusConfig) -> list[tuple[Place, int]]:
    """Place and size of each parameter that takes part; size 0 where there is no product."""
    found = []
    for path, leaf in params.items():
        if path.startswith(_NO_PART):
            continue
        place = _place(path)
        if place[0] == _UND_BLOCK and place[1] >= _used_blocks(cfg):
            continue
        product = len(leaf.shape) > 1 and path.split(".")[-1] not in _NO_PRODUCT
        found.append((place, math.prod(leaf.shape) if product else 0))
    return found


def _place(path: str) -> Place:
    for row, (beginning, _) in enumerate(_PARTS):
        if match := re.match(beginning, path):
            return row, int(match[1]) if match.lastindex else 0
    raise ValueError(f"a parameter must be of a known part of Janus, got {path}")
