"""The interface of a model family: all that the code around the networks must know of them.

Each family is an instance of `Family`, defined in its own file. `registry.py` lists the families
and detects the family of a config.json. A family has

* a table of its parameters (`ParameterTable`): how each is sharded, which precision it needs and
  where its FLOPs count;
* a conversion table for each checkpoint layout (`ConversionTable`): which PyTorch tensor holds
  which parameters;
* functions that build the model, read and write its sizes, and say what an image costs (`Sizes`).

The parameters of a model are named by dotted paths, such as
`language_model.layers.0.mlp.up_proj.kernel`.
"""

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from janus_jax.processing.processor import Processor

DEEPSEEK, TRANSFORMERS = "deepseek", "transformers"  # names of checkpoint layouts
ADAPTER_PATH = re.compile(r"(.*)\.dot_general\.([ab])")  # the path of a LoRA factor of a layer

Shape = tuple[int, ...]


class Precision(enum.Enum):
    """How a parameter is stored, and in which dtype its gradient is summed.

    COMPUTE: stored in the dtype of the computation; in training, cast to it from float32, either
      before the model runs or by its layers (Parameters.cast_by_model).
    FLOAT32_GRADIENT: stored like COMPUTE, but training keeps it in float32. The model casts the
      values it reads, so the gradient, a sum over many tokens or chunks of a row, is summed in
      float32.
    FLOAT32: stored in float32.
    """

    COMPUTE = enum.auto()
    FLOAT32_GRADIENT = enum.auto()
    FLOAT32 = enum.auto()


@dataclasses.dataclass(frozen=True)
class ParameterRow:
    """A row of the table of parameters.

    name: regular expression that matches the rest of the path, after the path of the group. A group
      in it is the number of a layer.
    spec: the mesh axes that the dimensions are sharded over.
    is_matrix: whether activations are multiplied by the parameter, if it has two dimensions or
      more. Embeddings, for example, are only indexed.
    """

    name: str
    spec: PartitionSpec
    is_matrix: bool = True


@dataclasses.dataclass(frozen=True)
class ParameterGroup:
    """The rows of a module, or of all layers of a stack.

    path: path of the module; `{i}` is the number of a layer.
    counted_by: type of the positions that its matrices are applied to, a field of
      training.flops.StepFlops. None: its FLOPs are not counted.
    rows: the parameters.
    precision: the precision that they need.
    """

    path: str
    counted_by: str | None
    rows: tuple[ParameterRow, ...]
    precision: Precision = Precision.COMPUTE

    @property
    def component(self) -> str:
        """The module of the model that the part belongs to, such as `und_encoder`."""
        return self.path.split(".")[0]

    def pattern(self, row: ParameterRow) -> re.Pattern:
        """Returns the regular expression that matches the paths of a row."""
        return re.compile(re.escape(self.path).replace(r"\{i\}", r"(\d+)") + rf"\.(?:{row.name})")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """What the table says about one parameter.

    component, counted_by, precision: as in ParameterGroup. spec, is_matrix: as in ParameterRow.
    depth: place in the data flow: index of the part in the table, and number of the layer.
    """

    component: str
    counted_by: str | None
    precision: Precision
    spec: PartitionSpec
    is_matrix: bool
    depth: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ParameterTable:
    """The parameters of a family. parts: in the order of the data flow."""

    parts: tuple[ParameterGroup, ...]

    def find(self, path: str) -> Parameter:
        """Returns what the table says about a parameter.

        The row of a LoRA adapter's factor is derived from the row of the kernel, float[inputs,
        outputs]: a, float[inputs, rank], is sharded as the inputs are, and b, float[rank, outputs],
        as the outputs are.

        path: the path of the parameter in the model.

        Raises:
          ValueError: not exactly one row matches the path.
        """
        if not (factor := ADAPTER_PATH.fullmatch(path)):
            return self._find_row(path)
        kernel = self._find_row(f"{factor[1]}.kernel")
        inputs, outputs = (*kernel.spec, None, None)[:2]
        spec = PartitionSpec(*((inputs, None) if factor[2] == "a" else (None, outputs)))
        return dataclasses.replace(kernel, spec=spec)

    def place(self, part: str) -> int:
        """Returns the place of a part in the data flow. part: its path."""
        return next(index for index, group in enumerate(self.parts) if group.path == part)

    def _find_row(self, path: str) -> Parameter:
        matches = [
            (match, index, row)
            for pattern, index, row in self._patterns
            if (match := pattern.fullmatch(path))
        ]
        if len(matches) != 1:
            rules = ", ".join(match.re.pattern for match, _, _ in matches) or "none"
            raise ValueError(
                f"exactly one row of the table of parameters must match parameter {path}, "
                f"but {len(matches)} match: {rules}"
            )
        (match, index, row), = matches
        part, layer = self.parts[index], int(match[1]) if match.re.groups else 0
        return Parameter(
            part.component, part.counted_by, part.precision, row.spec, row.is_matrix, (index, layer)
        )

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern, int, ParameterRow]]:
        """The pattern of each row, the index of its part, and the row."""
        parts = enumerate(self.parts)
        return [(part.pattern(row), index, row) for index, part in parts for row in part.rows]


@dataclasses.dataclass(frozen=True)
class Transform:
    """An array operation from a PyTorch tensor to one array per parameter path, and its inverse."""

    from_torch: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    to_torch: Callable[[tuple[np.ndarray, ...]], np.ndarray]


def _split_in_three(x: np.ndarray) -> tuple[np.ndarray, ...]:
    if x.shape[0] % 3:
        raise ValueError(f"expected a number of rows divisible by 3, got {x.shape[0]}")
    return tuple(x.reshape(3, x.shape[0] // 3, *x.shape[1:]))


def _check_rank(x: np.ndarray, rank: int) -> np.ndarray:
    if x.ndim != rank:
        raise ValueError(f"expected {rank} dimensions, got {x.ndim}")
    return x


def _squeeze_leading(x: np.ndarray) -> np.ndarray:
    if x.shape[:1] != (1,):
        raise ValueError(f"expected a leading dimension of size 1, got shape {x.shape}")
    return x[0]


def _squeeze_1x1(x: np.ndarray) -> np.ndarray:
    if _check_rank(x, 4).shape[2:] != (1, 1):
        raise ValueError(f"expected a 1 x 1 kernel, got {x.shape[2:]}")
    return x[:, :, 0, 0]


TRANSFORMS = {
    "same": Transform(lambda x: (x,), lambda a: a[0]),
    "linear": Transform(lambda x: (_check_rank(x, 2).T,), lambda a: a[0].T),
    "conv2d": Transform(
        lambda x: (_check_rank(x, 4).transpose(2, 3, 1, 0),), lambda a: a[0].transpose(3, 2, 0, 1)
    ),
    "pointwise": Transform(
        lambda x: (_squeeze_1x1(x).T,), lambda a: a[0].T[:, :, np.newaxis, np.newaxis]
    ),
    "split_qkv": Transform(
        lambda x: tuple(part.T for part in _split_in_three(_check_rank(x, 2))),
        lambda a: np.concatenate([part.T for part in a]),
    ),
    "split_qkv_bias": Transform(lambda x: _split_in_three(_check_rank(x, 1)), np.concatenate),
    "squeeze_leading": Transform(lambda x: (_squeeze_leading(x),), lambda a: a[0][np.newaxis]),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of a conversion table: PyTorch name template, path templates, transform name.

    In a template `{i}` stands for a layer number and `{p:a|b}` for one of the listed words. A
    placeholder has the same value on both sides.
    """

    torch: str
    paths: tuple[str, ...]
    transform: str

    @property
    def op(self) -> Transform:
        """The transform itself."""
        return TRANSFORMS[self.transform]


@dataclasses.dataclass(frozen=True)
class Skip:
    """Tensors that the model does not use: a regex that matches their PyTorch name, and why."""

    torch: str
    reason: str


@dataclasses.dataclass(frozen=True)
class ConversionTable:
    """The conversion table of one checkpoint layout; interop/rules.py applies it."""

    rules: tuple[Rule, ...]
    skips: tuple[Skip, ...]


class ModelConfig(Protocol):
    """The config of a family's model, a frozen dataclass."""

    def with_dtype(self, dtype, param_dtype=None) -> "ModelConfig":
        """Returns a copy that computes in `dtype` and stores parameters in `param_dtype`."""

    def with_remat(self, remat: str) -> "ModelConfig":
        """Returns a copy with another rematerialization setting."""

    def with_scan(self, stacks: Container[str]) -> "ModelConfig":
        """Returns a copy in which the layers of these Family.stacks run in a loop."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """A layout of PyTorch checkpoint folders.

    read: reads the sizes of a model from the contents of config.json.
    write: returns the contents of config.json from the sizes, the name of the dtype of the weights,
      and the id of `<image_placeholder>` or None.
    table: returns the conversion table of a model.
    unused: returns the tensors, by name, that a folder in this layout must have and the model does
      not use: the path of a parameter of the same dtype, and the shape.
    adapter_prefixes: prefixes that may be missing from the module names of a LoRA adapter, if PEFT
      wrapped only a part of the model; "" is the whole model.
    """

    read: Callable[[Mapping], ModelConfig]
    write: Callable[[Any, str, int | None], dict]
    table: Callable[[Any], ConversionTable]
    unused: Callable[[Any], dict[str, tuple[str, Shape]]] = lambda cfg: {}
    adapter_prefixes: tuple[str, ...] = ("",)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a model that matter outside of the networks.

    image_size: height and width of input images and of generated images, in pixels.
    input_image_tokens: tokens of an image to understand, each with a position in the cache.
    generated_image_tokens: tokens of a generated image, each with a position in the cache.
    codebook_size: number of different tokens of a generated image.
    vocab_size: number of rows of the text embedding.
    max_positions: maximum number of positions of a sequence.
    heads: numbers of attention heads by name; a mesh must divide each of them.
    """

    image_size: int
    input_image_tokens: int
    generated_image_tokens: int
    codebook_size: int
    vocab_size: int
    max_positions: int
    heads: Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class AttentionFlops:
    """The FLOPs of attention in a stack of layers.

    path: path of the stack's ParameterGroup.
    layers: number of layers whose output is used; the FLOPs of further layers do not count.
    counted_by: type of the items that they are counted by, a field of training.flops.StepFlops.
    flops: operations of one layer and one item in the forward pass.
    """

    path: str
    layers: int
    counted_by: str
    flops: float


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """A family of models: one set of networks in several sizes.

    config_class: class of the model's config.
    build: returns a model from its config and `rngs`.
    parameter_table: the table of its parameters.
    stacks: the stacks of equal layers: path -> attribute of the config, such as
      "language_model.num_hidden_layers", with the number of layers.
    image_codec: the component that turns images into tokens and back. Training stages never train
      it, and do not need it if the tokens of all images are stored.
    layouts: the layouts of PyTorch checkpoints, by name.
    check: raises ValueError if sizes in a config do not fit each other.
    sizes: returns the sizes that matter outside of the networks.
    attention_flops: returns the FLOPs of attention, by stack.
    processor: reads the processor of a checkpoint folder, given the contents of its config.json.
    released: functions that return the configs of the released models, by name.
    """

    config_class: type
    build: Callable[..., nnx.Module]
    parameter_table: ParameterTable
    stacks: Mapping[str, str]
    image_codec: str
    layouts: Mapping[str, Layout]
    check: Callable[[Any], None]
    sizes: Callable[[Any], Sizes]
    attention_flops: Callable[[Any], tuple[AttentionFlops, ...]]
    processor: Callable[[Path, Mapping], Processor]
    released: Mapping[str, Callable[[], ModelConfig]] = dataclasses.field(default_factory=dict)
