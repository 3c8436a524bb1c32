"""Loads checkpoint folders of any kind and places parameters on devices one tensor at a time."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop import deepseek, orbax, transformers
from janus_jax.interop.adapter import Adapter, read_adapter
from janus_jax.interop.adapter_config import check_unmerged_adapter
from janus_jax.interop.config import DEEPSEEK, TRANSFORMERS, layout_of, read_config
from janus_jax.interop.files import CONFIG, Report
from janus_jax.interop.folders import check_folder
from janus_jax.interop.names import abbreviate, summarize_problems
from janus_jax.interop.quantised import check_not_quantised
from janus_jax.interop.readers import open_checkpoint, read_safetensors
from janus_jax.interop.rules import Plan, Shape, Table, make_plan, skip_reasons
from janus_jax.interop.tensors import TensorSource
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.vq import VQ, VQConfig
from janus_jax.paths import value_errors_of
from janus_jax.processing.json_files import read_json

FLOAT32_PATHS = r"gen_vq\."  # images decoded in bfloat16 show color banding
ALIGNMENT = 64  # bytes; the alignment of JAX's CPU buffers
# float16 is not supported: activations of Janus exceed its largest value, which leads to NaN.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
COLUMNS = 16  # copied at a time, which makes a transposed copy five times as fast
ShardingFor = Callable[[str, Shape], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checkpoint folder.

    config: contents of config.json. layout: that of config.json. cfg: the model's sizes.
    orbax: whether the weights are stored in Orbax.
    adapter: folder of a LoRA adapter that is merged into the weights as they are read, or None.
    """

    path: Path
    config: Mapping
    layout: str
    cfg: JanusConfig
    orbax: bool
    adapter: Path | None = None


def open_folder(path: Path | str, adapter: Path | str | None = None) -> Folder:
    """Reads a folder's config.json and determines what kind of folder it is.

    adapter: a LoRA adapter in PEFT's format to merge into the weights, or None.

    Raises:
      FileNotFoundError: the folder or its config.json is missing.
      ValueError: the config is of JanusFlow or another model, or has an unsupported value; the
        folder is a LoRA adapter, or holds one in addition to the weights that will not be merged.
    """
    path = check_folder(path)
    adapter = None if adapter is None else Path(adapter)
    check_unmerged_adapter(path, adapter)
    config = read_json(path / CONFIG)
    with value_errors_of(path):
        layout, cfg = layout_of(config), read_config(config)
    return Folder(path, config, layout, cfg, orbax.is_orbax(path), adapter)


def table_for(layout: str, cfg: JanusConfig) -> Table:
    """Returns the conversion table of a PyTorch layout."""
    return (deepseek if layout == DEEPSEEK else transformers).table(cfg)


def open_adapter(folder: Folder) -> Adapter | None:
    """Opens the LoRA adapter of a folder and matches it with the model; None if there is none.

    Raises:
      FileNotFoundError, ValueError: as read_adapter.
    """
    if folder.adapter is None:
        return None
    tables = {layout: table_for(layout, folder.cfg) for layout in (DEEPSEEK, TRANSFORMERS)}
    return read_adapter(folder.adapter, tables, param_shapes(folder.cfg))


class ConstantRngs:
    """Replaces nnx.Rngs when only shapes are needed; returns the same key every time.

    The counter of nnx.Rngs takes quadratic time inside a trace: 11 s instead of 1 s for
    Janus-Pro-1B.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=2)
def abstract(cfg: JanusConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the graph and state of a Janus whose parameters are only shapes and dtypes."""
    return nnx.split(nnx.eval_shape(lambda: Janus(cfg, rngs=ConstantRngs())))


LAYERS = ("und_encoder.blocks", "language_model.layers")  # layers of a stack have equal shapes


def param_shapes(cfg: JanusConfig) -> dict[str, Shape]:
    """Returns the shape of each parameter of a Janus by path; allocates no parameters.

    Builds only one layer of each stack, so that a config with many layers that does not match its
    weights is refused quickly.
    """
    counts = (cfg.und_encoder.num_layers, cfg.language_model.num_hidden_layers)
    _, state = abstract(_one_layer_each(cfg))
    one = {_path(keys): tuple(leaf.shape) for keys, leaf in nnx.to_flat_state(state)}
    shapes = {}
    for stack, paths in itertools.groupby(one, _stack):
        if stack is None:
            shapes |= {path: one[path] for path in paths}
            continue
        names = [path.removeprefix(f"{stack}.0.") for path in paths]
        for i in range(counts[LAYERS.index(stack)]):
            shapes |= {f"{stack}.{i}.{name}": one[f"{stack}.0.{name}"] for name in names}
    return shapes


def _stack(path: str) -> str | None:
    """Returns the layer stack that a parameter path is in, or None."""
    return next((stack for stack in LAYERS if path.startswith(f"{stack}.")), None)


def _one_layer_each(cfg: JanusConfig) -> JanusConfig:
    return dataclasses.replace(
        cfg,
        und_encoder=dataclasses.replace(cfg.und_encoder, num_layers=1),
        language_model=dataclasses.replace(cfg.language_model, num_hidden_layers=1),
    )


def _path(keys: tuple) -> str:
    return ".".join(map(str, keys))


def plan_folder(folder: Folder) -> tuple[TensorSource, Plan]:
    """Opens a PyTorch folder's weights and matches them with the model.

    Raises:
      ValueError: the weights are quantized, or do not fit config.json.
    """
    source = open_checkpoint(folder.path)
    check_not_quantised(folder.config, source)
    table = table_for(folder.layout, folder.cfg)
    return source, make_plan(table, source, param_shapes(folder.cfg))


def check_weights(folder: Folder) -> None:
    """Raises ValueError unless a folder's weights match its config.json; reads no values."""
    if folder.orbax:
        check_stored(folder)
    else:
        plan_folder(folder)


def load_params(
    folder: Folder | Path | str,
    cfg: JanusConfig,
    sharding_for: ShardingFor,
    dtype,
    float32_paths: str = FLOAT32_PATHS,
    paths: Container[str] | None = None,
    progress: Report | None = None,
) -> dict[str, jax.Array]:
    """Reads a folder's parameters; places each on the devices before it reads the next.

    Args:
      folder: a folder with PyTorch weights in either layout, or an Orbax folder. A LoRA adapter in
        `Folder.adapter` is merged in float32, before the cast to `dtype`.
      cfg: the model config, usually `open_folder(folder).cfg`.
      sharding_for: returns the sharding of a parameter from its path and shape; None means the
        default device.
      dtype: dtype of all parameters except those that match float32_paths.
      float32_paths: regular expression, matched at the beginning of a path.
      paths: paths of the parameters to read; None means all.
      progress: called with the bytes of the folder read so far and the total.

    Returns:
      Arrays by path, for `build_model`.
    """
    opened = folder if isinstance(folder, Folder) else open_folder(folder)
    opened = dataclasses.replace(opened, cfg=cfg)
    adapter = open_adapter(opened)
    float32_pattern = re.compile(float32_paths)

    def dtype_of(path: str) -> np.dtype:
        return np.dtype(jnp.float32 if float32_pattern.match(path) else dtype)

    if opened.orbax:
        return _restore(opened, sharding_for, dtype_of, paths, progress, adapter)
    source, plan = plan_folder(opened)
    params = {}
    steps = [step for step in plan.steps if paths is None or any(p in paths for p in step.paths)]
    sizes = [source.size(step.torch) for step in steps]
    for step, done in zip(steps, itertools.accumulate(sizes), strict=True):
        for path, view in zip(step.paths, step.op.from_torch(source.read(step.torch)), strict=True):
            if paths is not None and path not in paths:
                continue
            sharding = sharding_for(path, view.shape)
            if adapter is not None:
                view = adapter.merged(path, view)
            params[path] = _place(view, sharding, dtype_of(path))
        if progress is not None:
            progress(done, sum(sizes))
    return params


def _place(view: np.ndarray, sharding: jax.sharding.Sharding | None, dtype) -> jax.Array:
    """Casts a view of a file and places it on devices; reads only the shards of local devices."""

    def shard(index: tuple) -> np.ndarray:
        return _copy(view[index], dtype)

    if sharding is None:
        return jax.block_until_ready(jax.device_put(shard(())))
    array = jax.make_array_from_callback(view.shape, sharding, shard)
    # Blocks, because otherwise copies of many tensors would accumulate on the host.
    return jax.block_until_ready(array)


def _copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a C-ordered copy in another dtype, aligned so that a CPU device can keep it.

    It must not be a view, because the CPU device would then use the memory-mapped file itself.
    """
    size = dtype.itemsize * view.size
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    copy = raw[start : start + size].view(dtype).reshape(view.shape)
    if view.ndim < 2:
        copy[...] = view
        return copy
    for start in range(0, view.shape[-1], COLUMNS):
        columns = slice(start, start + COLUMNS)
        copy[..., columns] = view[..., columns]
    return copy


def _restore(
    folder: Folder,
    sharding_for: ShardingFor,
    dtype_of: Callable[[str], np.dtype],
    paths: Container[str] | None,
    progress: Report | None,
    adapter: Adapter | None,
) -> dict[str, jax.Array]:
    """Implements load_params for an Orbax folder."""
    stored = check_stored(folder)
    default_sharding = jnp.zeros(()).sharding  # the default device
    abstract_params = {
        path: jax.ShapeDtypeStruct(
            shape, dtype_of(path), sharding=sharding_for(path, shape) or default_sharding
        )
        for path, shape in param_shapes(folder.cfg).items()
        if paths is None or path in paths
    }
    if adapter is None:
        return orbax.restore(folder.path, abstract_params, progress)
    unchanged = {p: leaf for p, leaf in abstract_params.items() if p not in adapter.updates}
    sizes = {path: orbax.size(stored[path]) for path in abstract_params}
    done, total = sum(sizes[path] for path in unchanged), sum(sizes.values())
    report = progress and (lambda read, _: progress(read, total))
    params = orbax.restore(folder.path, unchanged, report)
    updated = abstract_params.keys() - unchanged.keys()
    for path, array in orbax.restore_numpy(folder.path, updated):
        leaf, done = abstract_params[path], done + sizes[path]
        params[path] = _place(adapter.merged(path, array), leaf.sharding, leaf.dtype)
        if progress is not None:
            progress(done, total)
    return params


def check_stored(folder: Folder) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes stored in an Orbax folder after checking them with the model.

    Raises:
      ValueError: parameters are missing, unknown or have a wrong shape; the message has the count
        and the first names of each kind.
    """
    expected, stored = param_shapes(folder.cfg), orbax.stored_params(folder.path)
    shared = [path for path in expected if path in stored]
    problems = {
        "missing": [path for path in expected if path not in stored],
        "unknown": [shorten_text(path) for path in stored if path not in expected],
        "with a wrong shape": [
            f"{p} is {shorten(stored[p].shape)}, expected {expected[p]}"
            for p in shared
            if tuple(stored[p].shape) != expected[p]
        ],
    }
    if text := summarize_problems(problems):
        raise ValueError(f"the parameters in {folder.path} do not match its config.json: {text}")
    return stored


def build_model(cfg: JanusConfig, params: Mapping[str, jax.Array]) -> Janus:
    """Builds a Janus from parameter arrays, without initializing parameters first.

    Raises:
      ValueError: the paths in `params` are not exactly those of the model's parameters.
    """
    graphdef, state = abstract(cfg)
    mismatched = sorted({_path(keys) for keys, _ in nnx.to_flat_state(state)} ^ set(params))
    if mismatched:
        raise ValueError(
            f"{len(mismatched)} parameters do not match the model's: {abbreviate(mismatched)}"
        )
    return merge_params(graphdef, state, lambda path: params[path])


def merge_params(graphdef: nnx.GraphDef, state: nnx.State, array: Callable[[str], jax.Array]):
    """Builds a module from an abstract state and arrays. array: returns a parameter by path."""
    flat = nnx.to_flat_state(state)
    leaves = [(keys, leaf.replace(array(_path(keys)))) for keys, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


@functools.lru_cache(maxsize=2)
def _abstract_vq(cfg: VQConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Like `abstract`, for the image tokenizer alone."""
    return nnx.split(nnx.eval_shape(lambda: VQ(cfg, rngs=ConstantRngs())))


def load_vq(folder: Folder) -> VQ:
    """Loads only the image tokenizer of a folder, in float32 on the default device.

    For an Orbax folder this reads all parameters into host memory.
    """
    stored = stored_params(folder)

    def array(path: str) -> jax.Array:
        return jnp.array(stored.read(f"gen_vq.{path}"), jnp.float32)

    return merge_params(*_abstract_vq(folder.cfg.gen_vq), array)


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """Parameters of a folder in their stored dtypes.

    metadata: dtype and shape by path. read: returns the values of a path.
    unused: tensors that the model does not use, by PyTorch name. skipped: the reason for each.
    """

    metadata: Mapping[str, tuple[np.dtype, Shape]]
    read: Callable[[str], np.ndarray]
    unused: Mapping[str, np.ndarray]
    skipped: Mapping[str, str]


def stored_params(folder: Folder) -> StoredParams:
    """Opens a folder's parameters on the host in their stored dtypes.

    Values of a PyTorch folder are views of its memory-mapped files. For an Orbax folder, the first
    read loads all parameters into host memory. A LoRA adapter is merged in float32, and the sum is
    rounded to the parameter's dtype.
    """
    stored = _stored_orbax(folder) if folder.orbax else _stored_torch(folder)
    adapter = open_adapter(folder)
    if adapter is None:
        return stored

    def read(path: str) -> np.ndarray:
        return adapter.merged(path, stored.read(path)).astype(stored.metadata[path][0], copy=False)

    return dataclasses.replace(stored, read=read)


def _stored_torch(folder: Folder) -> StoredParams:
    source, plan = plan_folder(folder)
    steps = {path: (step, i) for step in plan.steps for i, path in enumerate(step.paths)}

    def read(path: str) -> np.ndarray:
        step, i = steps[path]
        return step.op.from_torch(source.read(step.torch))[i]

    shapes = param_shapes(folder.cfg)
    metadata = {path: (source.dtype(step.torch), shapes[path]) for path, (step, _) in steps.items()}
    unused = {name: source.read(name) for name in plan.skipped}
    return StoredParams(metadata, read, unused, plan.skipped)


def _stored_orbax(folder: Folder) -> StoredParams:
    stored = check_stored(folder)
    metadata = {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in stored.items()}
    path = folder.path / orbax.UNUSED
    tensors, _ = read_safetensors(path) if path.is_file() else ({}, [])
    unused = {name: tensor.read() for name, tensor in tensors.items()}
    table = table_for(folder.layout, folder.cfg)
    skipped = {name: " ".join(skip_reasons(table, name)) for name in unused}
    arrays = functools.cache(lambda: dict(orbax.restore_numpy(folder.path, stored)))
    return StoredParams(metadata, lambda path: arrays()[path], unused, skipped)


def check_dtype(dtype, mesh: Mesh | None = None) -> jnp.dtype:
    """Returns the dtype in which to store and compute: float32 or bfloat16.

    dtype: a name or a type. None is bfloat16 on TPU and GPU, and float32 on CPU, where bfloat16 is
        not faster.
    mesh: its devices determine the default; without a mesh, JAX's default backend does.

    Raises:
        ValueError: if dtype is neither float32 nor bfloat16.
    """
    if dtype is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    name = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    if name not in DTYPES:
        raise ValueError(
            f"dtype must be one of {', '.join(DTYPES)}, got {name}"
            + (", in which activations overflow" if name == "float16" else "")
        )
    return jnp.dtype(DTYPES[name])
