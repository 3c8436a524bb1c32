"""Sharding: the device mesh, and one table that maps parameter paths to mesh axes.

The mesh has the axes `data`, `fsdp` and `tensor`. The batch is sharded over `data` and `fsdp`, the
parameters over `fsdp` and `tensor`; `tensor` shards heads, MLP width and vocabulary. Model code
does not name mesh axes.
"""

import functools
import math
import re
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from janus_jax.checks import check_count
from janus_jax.models.janus import JanusConfig
from janus_jax.models.kv_cache import KVCache

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

_COLUMN, _ROW, _REPLICATED = P("fsdp", "tensor"), P("tensor", "fsdp"), P()
_COLUMN_BIAS = P("tensor")

# Names of the layers whose kernels are sharded by columns, and by rows.
_COLUMN_LAYERS = r"([qkv]_proj|gate_proj|up_proj|lm_head|fc1|proj|layers\.\d*[02468])"
_ROW_LAYERS = r"(o_proj|down_proj|out_proj|out|fc2|layers\.\d*[13579])"

# (regular expression that matches a whole path, spec). Of two successive projections, the first is
# sharded by columns and the second by rows, so that the activations between them stay on one
# device. The image tokenizer is small, and its convolutions are fastest when replicated.
PARAMETER_SPECS = (
    (r"language_model\.embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"language_model\.layers\.\d+\.self_attn\.[qkv]_proj\.kernel", _COLUMN),
    (r"language_model\.layers\.\d+\.self_attn\.o_proj\.kernel", _ROW),
    (r"language_model\.layers\.\d+\.mlp\.(gate|up)_proj\.kernel", _COLUMN),
    (r"language_model\.layers\.\d+\.mlp\.down_proj\.kernel", _ROW),
    (r"language_model\.layers\.\d+\.(input|post_attention)_layernorm\.scale", _REPLICATED),
    (r"language_model\.norm\.scale", _REPLICATED),
    (r"language_model\.lm_head\.kernel", _COLUMN),
    (r"und_encoder\.patch_embed\.(kernel|bias)", _REPLICATED),
    (r"und_encoder\.pos_embed", _REPLICATED),
    (r"und_encoder\.blocks\.\d+\.attn\.[qkv]_proj\.kernel", _COLUMN),
    (r"und_encoder\.blocks\.\d+\.attn\.[qkv]_proj\.bias", _COLUMN_BIAS),
    (r"und_encoder\.blocks\.\d+\.attn\.out_proj\.kernel", _ROW),
    (r"und_encoder\.blocks\.\d+\.mlp\.fc1\.kernel", _COLUMN),
    (r"und_encoder\.blocks\.\d+\.mlp\.fc1\.bias", _COLUMN_BIAS),
    (r"und_encoder\.blocks\.\d+\.mlp\.fc2\.kernel", _ROW),
    (r"und_encoder\.blocks\.\d+\.(attn\.out_proj|mlp\.fc2)\.bias", _REPLICATED),
    (r"und_encoder\.(blocks\.\d+\.norm[12]|norm)\.(scale|bias)", _REPLICATED),
    (r"(und|gen)_aligner\.layers\.\d*[02468]\.kernel", _COLUMN),
    (r"(und|gen)_aligner\.layers\.\d*[02468]\.bias", _COLUMN_BIAS),
    (r"(und|gen)_aligner\.layers\.\d*[13579]\.kernel", _ROW),
    (r"(und|gen)_aligner\.layers\.\d*[13579]\.bias", _REPLICATED),
    (r"gen_embed\.embedding", _REPLICATED),
    (r"gen_head\.proj\.kernel", _COLUMN),
    (r"gen_head\.proj\.bias", _COLUMN_BIAS),
    (r"gen_head\.out\.kernel", _ROW),
    (r"gen_head\.out\.bias", _REPLICATED),
    (r"gen_vq\..*", _REPLICATED),
    # LoRA adapters (training/lora.py): inputs and outputs as those of the kernel, rank not sharded
    (rf".*\.{_COLUMN_LAYERS}\.dot_general\.a", P("fsdp", None)),
    (rf".*\.{_COLUMN_LAYERS}\.dot_general\.b", P(None, "tensor")),
    (rf".*\.{_ROW_LAYERS}\.dot_general\.a", P("tensor", None)),
    (rf".*\.{_ROW_LAYERS}\.dot_general\.b", P(None, "fsdp")),
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Returns a mesh of the first data * fsdp * tensor devices.

    Args:
        data: size of the axis that shards the batch only.
        fsdp: size of the axis that shards the batch and the parameters.
        tensor: size of the axis that shards heads, MLP width and vocabulary; it must divide the
            number of heads of the model.
        devices: the devices to choose from. Default: all devices of JAX's default backend.
    Raises:
        ValueError: if a size is less than 1 or the mesh needs more devices than there are.
    """
    axes = zip(AXES, (data, fsdp, tensor), strict=True)
    sizes = {name: check_count(f"mesh axis {name}", size) for name, size in axes}
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        shape = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {shape} needs {needed} devices, but there are only {len(devices)}")
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:needed],
    )


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that a text such as "data=1,fsdp=1,tensor=4" describes.

    Args:
        text: comma-separated AXIS=SIZE, in any order; an axis that is not named has size 1.
        devices: see make_mesh.
    Raises:
        ValueError: if an axis is unknown or repeated, a size is not an integer, or make_mesh
            rejects the sizes.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal():
            raise ValueError(
                "a mesh must be given as data=1,fsdp=1,tensor=1, each axis at most once, "
                f"got {text!r}"
            )
        sizes[name] = int(size)
    return make_mesh(**sizes, devices=devices)


def spec_for(path: str) -> P:
    """Returns the spec that PARAMETER_SPECS has for a parameter.

    path: the path of the parameter in the model, joined with dots.

    Raises:
        ValueError: if not exactly one row of the table matches the path.
    """
    matches = [(rule, spec) for rule, spec in PARAMETER_SPECS if re.fullmatch(rule, path)]
    if len(matches) != 1:
        rules = ", ".join(rule for rule, _ in matches) or "none"
        raise ValueError(
            f"exactly one row of the sharding table must match parameter {path}, "
            f"but {len(matches)} match: {rules}"
        )
    return matches[0][1]


def fit_spec(mesh: Mesh, spec: P, shape: Sequence[int]) -> P:
    """Returns the spec without mesh axes whose size does not divide the array dimension.

    Such a dimension is not sharded. Only the numbers of heads must be divisible (see check_mesh).
    For all other sizes, models with small or odd dimensions should work rather than fail, and
    sharding does not change the results.

    Raises:
        ValueError: if the spec has more entries than the shape has dimensions.
    """

    def divisible(dimension: int, axes) -> object:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if dimension % math.prod(mesh.shape[name] for name in names) == 0 else None

    if len(spec) > len(shape):
        raise ValueError(
            f"spec {spec} must have no more entries than shape {tuple(shape)} has dimensions"
        )
    return P(*(divisible(size, axes) for size, axes in zip(shape, spec, strict=False)))


def sharding_for(mesh: Mesh) -> Callable[[str, Sequence[int]], NamedSharding]:
    """Returns a function (path, shape) -> sharding of that parameter on the mesh."""

    def parameter_sharding(path: str, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(mesh, fit_spec(mesh, spec_for(path), shape))

    return parameter_sharding


def check_devices() -> None:
    """Raises ValueError if JAX finds no device, or none of the requested platform."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # AssertionError if a plugin is missing
        reason = str(error).partition(" (set JAX_PLATFORMS")[0]
        reason = f" ({reason})" if reason else ""
        requested = jax.config.jax_platforms
        if not requested:
            raise ValueError(f"JAX cannot use any device{reason}") from error
        raise ValueError(
            f"JAX_PLATFORMS={requested} was requested, but JAX found no {requested} device{reason}"
            f"; {_remedy(requested)}unset JAX_PLATFORMS to let JAX choose, or set it to cpu"
        ) from error


def _remedy(platforms: str) -> str:
    """Returns advice to install the extra of janus_jax for the first of the platforms.

    The advice is an empty string for platforms without an extra.
    """
    extras = {"cuda": "[cuda12] or janus_jax[cuda13]", "tpu": "[tpu]"}
    platform = {"gpu": "cuda"}.get(first := platforms.split(",")[0], first)
    return f"install janus_jax{extras[platform]}, " if platform in extras else ""


def with_auto_axes(mesh: Mesh) -> Mesh:
    """Returns a copy of the mesh whose axes all have type Auto.

    jax.make_mesh creates axes of type Explicit by default; here XLA chooses the shardings of
    intermediate values.

    Raises:
        ValueError: if `mesh` is not a Mesh with the axes data, fsdp and tensor.
    """
    if not isinstance(mesh, Mesh) or set(mesh.axis_names) != set(AXES):
        got = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else repr(mesh)
        raise ValueError(f"a mesh must have the axes {', '.join(AXES)}, got {got}")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(mesh: Mesh, cfg: JanusConfig) -> None:
    """Raises ValueError if the size of the axis `tensor` does not divide a number of heads."""
    tensor, decoder = mesh.shape["tensor"], cfg.language_model
    heads = {
        "attention heads of the decoder": decoder.num_attention_heads,
        "key/value heads of the decoder": decoder.num_key_value_heads,
        "heads of the vision encoder": cfg.und_encoder.num_heads,
    }
    for name, count in heads.items():
        if count % tensor:
            raise ValueError(f"mesh axis tensor={tensor} must divide the {count} {name}")


def num_batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of shards of a batch: data * fsdp, or 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh, batch: int | None = None) -> NamedSharding:
    """Returns the sharding of an array whose first axis is the batch.

    The array is replicated if `batch`, the size of that axis, is given and not divisible by the
    number of shards.
    """
    replicated = batch is not None and batch % num_batch_shards(mesh)
    return NamedSharding(mesh, P() if replicated else P(BATCH_AXES))


def put_batch(arrays, mesh: Mesh | None):
    """Puts a pytree of arrays, whose first axis is the batch, on the devices."""
    if mesh is None:
        return jax.device_put(arrays)
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.shape[0])), arrays)


def constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    """Constrains the sharding of x, inside jit; drops mesh axes that do not divide it.

    Returns x itself without a mesh.
    """
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(mesh, spec, x.shape)))


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains x to be sharded over the batch, its first axis, inside jit."""
    return constrain(x, mesh, P(BATCH_AXES))


def constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Constrains the cache to be sharded over the batch and the heads, inside jit."""
    shard = functools.partial(constrain, mesh=mesh, spec=P(BATCH_AXES, None, "tensor", None))
    return KVCache(tuple(map(shard, cache.keys)), tuple(map(shard, cache.values)), cache.lengths)


def replicate(tree, mesh: Mesh | None):
    """Constrains a pytree to be replicated, inside jit, so that every process can read it."""
    return jax.tree.map(lambda x: constrain(x, mesh, P()), tree)
