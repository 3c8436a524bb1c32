"""Where arrays lie on a grid of devices: mesh axes `data`, `fsdp`, `tensor`, and ONE table.

`data` and `fsdp` share out the batch; `fsdp` and `tensor` share out the parameters, `tensor` by
heads, MLP width and vocabulary. Model code names no axis.
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

_COLUMN, _ROW, _WHOLE = P("fsdp", "tensor"), P("tensor", "fsdp"), P()
_SPLIT_BIAS = P("tensor")

# last names of the layers whose kernels are split by columns, and by rows
_BY_COLUMNS = r"([qkv]_proj|gate_proj|up_proj|fc1|proj|layers\.\d*[02468])"
_BY_ROWS = r"(o_proj|down_proj|out_proj|fc2|layers\.\d*[13579])"

# (pattern of a whole path, spec). A pair of projections is split by the columns of the first and
# the rows of the second, so that its inside stays on one device. The image tokenizer is small,
# and its convolutions are cheapest whole.
PARAMETER_SPECS = (
    (r"language_model\.embed_tokens\.embedding", P("tensor", "fsdp")),
    (r"language_model\.layers\.\d+\.self_attn\.[qkv]_proj\.kernel", _COLUMN),
    (r"language_model\.layers\.\d+\.self_attn\.o_proj\.kernel", _ROW),
    (r"language_model\.layers\.\d+\.mlp\.(gate|up)_proj\.kernel", _COLUMN),
    (r"language_model\.layers\.\d+\.mlp\.down_proj\.kernel", _ROW),
    (r"language_model\.layers\.\d+\.(input|post_attention)_layernorm\.scale", _WHOLE),
    (r"language_model\.norm\.scale", _WHOLE),
    (r"language_model\.lm_head\.kernel", _COLUMN),
    (r"und_encoder\.patch_embed\.(kernel|bias)", _WHOLE),
    (r"und_encoder\.pos_embed", _WHOLE),
    (r"und_encoder\.blocks\.\d+\.attn\.[qkv]_proj\.kernel", _COLUMN),
    (r"und_encoder\.blocks\.\d+\.attn\.[qkv]_proj\.bias", _SPLIT_BIAS),
    (r"und_encoder\.blocks\.\d+\.attn\.out_proj\.kernel", _ROW),
    (r"und_encoder\.blocks\.\d+\.mlp\.fc1\.kernel", _COLUMN),
    (r"und_encoder\.blocks\.\d+\.mlp\.fc1\.bias", _SPLIT_BIAS),
    (r"und_encoder\.blocks\.\d+\.mlp\.fc2\.kernel", _ROW),
    (r"und_encoder\.blocks\.\d+\.(attn\.out_proj|mlp\.fc2)\.bias", _WHOLE),
    (r"und_encoder\.(blocks\.\d+\.norm[12]|norm)\.(scale|bias)", _WHOLE),
    (r"(und|gen)_aligner\.layers\.\d*[02468]\.kernel", _COLUMN),
    (r"(und|gen)_aligner\.layers\.\d*[02468]\.bias", _SPLIT_BIAS),
    (r"(und|gen)_aligner\.layers\.\d*[13579]\.kernel", _ROW),
    (r"(und|gen)_aligner\.layers\.\d*[13579]\.bias", _WHOLE),
    (r"gen_embed\.embedding", _WHOLE),
    (r"gen_head\.proj\.kernel", _COLUMN),
    (r"gen_head\.proj\.bias", _SPLIT_BIAS),
    (r"gen_head\.out\.kernel", _ROW),
    (r"gen_head\.out\.bias", _WHOLE),
    (r"gen_vq\..*", _WHOLE),
    # low-rank adapters (training/lora.py): inputs and outputs as the kernel's, the rank whole
    (rf".*\.{_BY_COLUMNS}\.dot_general\.a", P("fsdp", None)),
    (rf".*\.{_BY_COLUMNS}\.dot_general\.b", P(None, "tensor")),
    (rf".*\.{_BY_ROWS}\.dot_general\.a", P("tensor", None)),
    (rf".*\.{_BY_ROWS}\.dot_general\.b", P(None, "fsdp")),
)


def make_mesh(
    data: int = 1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the first data * fsdp * tensor devices (default: of all that JAX sees).

    Raises:
        ValueError: an axis below 1, or more devices asked for than there are.
    """
    given = zip(AXES, (data, fsdp, tensor), strict=True)
    sizes = {name: check_count(f"mesh axis {name}", size) for name, size in given}
    devices = jax.devices() if devices is None else list(devices)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        stated = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(f"mesh {stated} needs {needed} devices, there are {len(devices)}")
    return jax.make_mesh(
        tuple(sizes.values()),
        AXES,
        axis_types=(AxisType.Auto,) * len(AXES),
        devices=devices[:needed],
    )


def parse_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a flag such as "data=1,fsdp=1,tensor=4"; an axis left out is 1.

    Raises:
        ValueError: an unknown or repeated axis, a size that is no integer; see make_mesh.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in AXES or name in sizes or not size.isdecimal():
            raise ValueError(
                f"a mesh is written data=1,fsdp=1,tensor=1, each axis at most once, got {text!r}"
            )
        sizes[name] = int(size)
    return make_mesh(**sizes, devices=devices)


def spec_for(path: str) -> P:
    """The table's spec of a parameter, its path joined with dots.

    Raises:
        ValueError: no row of the table matches the path, or several do.
    """
    found = [(rule, spec) for rule, spec in PARAMETER_SPECS if re.fullmatch(rule, path)]
    if len(found) != 1:
        rules = ", ".join(rule for rule, _ in found) or "none"
        raise ValueError(
            f"one row of the sharding table must match parameter {path}, "
            f"{len(found)} do: {rules}"
        )
    return found[0][1]


def fit_spec(mesh: Mesh, spec: P, shape: Sequence[int]) -> P:
    """The spec without the axes that do not divide their dimension, which stays whole there.

    Only the number of heads must divide (see check_mesh); for the other sizes a small or oddly
    sized model is worth more than an error, and the numbers are the same.
    """

    def fitting(dimension: int, axes) -> object:
        names = (axes,) if isinstance(axes, str) else axes or ()
        return axes if dimension % math.prod(mesh.shape[name] for name in names) == 0 else None

    if len(spec) > len(shape):
        raise ValueError(f"{spec=} must have no more entries than {tuple(shape)=} has dimensions")
    return P(*(fitting(size, axes) for size, axes in zip(shape, spec, strict=False)))


def sharding_for(mesh: Mesh) -> Callable[[str, Sequence[int]], NamedSharding]:
    """A function (path, shape) -> where that parameter lies on the mesh."""

    def of(path: str, shape: Sequence[int]) -> NamedSharding:
        return NamedSharding(mesh, fit_spec(mesh, spec_for(path), shape))

    return of


def check_devices() -> None:
    """Raises ValueError if JAX finds no device, or none of the platform that is requested."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter without the platform's plugin
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
    """Which extra brings JAX's support for the first of the platforms."""
    extras = {"cuda": "[cuda12] or janus_jax[cuda13]", "tpu": "[tpu]"}
    platform = {"gpu": "cuda"}.get(first := platforms.split(",")[0], first)
    return f"install janus_jax{extras[platform]}, " if platform in extras else ""


def with_auto_axes(mesh: Mesh) -> Mesh:
    """The same devices and axes, laid out by XLA: jax.make_mesh asks for explicit types by default.

    Raises:
        ValueError: it is no mesh, or its axes are not ours.
    """
    if not isinstance(mesh, Mesh) or set(mesh.axis_names) != set(AXES):
        given = f"axes {mesh.axis_names}" if isinstance(mesh, Mesh) else repr(mesh)
        raise ValueError(f"a mesh must have the axes {', '.join(AXES)}, got {given}")
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(AXES))


def check_mesh(mesh: Mesh, cfg: JanusConfig) -> None:
    """Raises ValueError unless the axis `tensor` divides every number of heads."""
    tensor, decoder = mesh.shape["tensor"], cfg.language_model
    heads = {
        "attention heads of the decoder": decoder.num_attention_heads,
        "key/value heads of the decoder": decoder.num_key_value_heads,
        "heads of the vision encoder": cfg.und_encoder.num_heads,
    }
    for name, number in heads.items():
        if number % tensor:
            raise ValueError(f"mesh axis tensor={tensor} must divide the {number} {name}")


def num_batch_shards(mesh: Mesh | None) -> int:
    """Among how many groups of devices a batch is shared out."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh, batch: int | None = None) -> NamedSharding:
    """Of an array with rows in front; whole on every device if the rows cannot be shared out."""
    whole = batch is not None and batch % num_batch_shards(mesh)
    return NamedSharding(mesh, P() if whole else P(BATCH_AXES))


def put_batch(arrays, mesh: Mesh | None):
    """Places a pytree of arrays with rows in front."""
    if mesh is None:
        return jax.device_put(arrays)
    return jax.tree.map(lambda x: jax.device_put(x, batch_sharding(mesh, x.shape[0])), arrays)


def constrain(x: jax.Array, mesh: Mesh | None, spec: P) -> jax.Array:
    """Inside jit: lays x out by the spec (axes that do not divide are left out)."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit_spec(mesh, spec, x.shape)))


def constrain_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside jit: the first axis over `data` and `fsdp`, the others whole."""
    return constrain(x, mesh, P(BATCH_AXES))


def constrain_cache(cache: KVCache, mesh: Mesh | None) -> KVCache:
    """Inside jit: rows over `data` and `fsdp`, heads over `tensor`."""
    lay = functools.partial(constrain, mesh=mesh, spec=P(BATCH_AXES, None, "tensor", None))
    return KVCache(tuple(map(lay, cache.keys)), tuple(map(lay, cache.values)), cache.length)


def replicate(tree, mesh: Mesh | None):
    """Inside jit: whole on every device, so that each process can read it."""
    return jax.tree.map(lambda x: constrain(x, mesh, P()), tree)
