"""From a checkpoint folder of any kind to parameters on devices, one tensor at a time."""

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

from janus_jax import checkpoint
from janus_jax.checks import shorten, shorten_text
from janus_jax.interop import deepseek, transformers
from janus_jax.interop.adapter import Adapter, read_adapter
from janus_jax.interop.adapter_config import check_adapter_beside
from janus_jax.interop.config import DEEPSEEK, TRANSFORMERS, layout_of, read_config
from janus_jax.interop.files import CONFIG
from janus_jax.interop.folders import check_folder
from janus_jax.interop.names import few, listed
from janus_jax.interop.quantised import check_not_quantised
from janus_jax.interop.readers import open_checkpoint, read_safetensors
from janus_jax.interop.rules import Plan, Shape, Table, make_plan, skip_reasons
from janus_jax.interop.tensors import TensorSource
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.models.vq import VQ, VQConfig
from janus_jax.paths import value_errors_of
from janus_jax.processing.json_files import read_json
from janus_jax.progress import Report

FLOAT32_PATHS = r"gen_vq\."  # colours decoded in bfloat16 show bands
ALIGNMENT = 64  # bytes, of jax's CPU buffers
COLUMNS = 16  # copied at a time: a transposed copy is five times as fast as in one go
ShardingFor = Callable[[str, Shape], jax.sharding.Sharding | None]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A checkpoint folder: its config.json, the layout that file has, and the sizes it states.

    adapter: the folder of a LoRA adapter that is merged into the weights where they are read.
    """

    path: Path
    config: Mapping
    layout: str
    cfg: JanusConfig
    orbax: bool
    adapter: Path | None = None


def open_folder(path: Path | str, adapter: Path | str | None = None) -> Folder:
    """Reads a folder's config.json and determines what kind of folder it is.

    adapter: a LoRA adapter in PEFT's format to merge into its weights, or None.

    Raises:
      FileNotFoundError: no folder, or no config.json in it.
      ValueError: JanusFlow, another model, or an unsupported value; an adapter in place of a model,
        or one beside the weights that is not to be merged.
    """
    path = check_folder(path)
    adapter = None if adapter is None else Path(adapter)
    check_adapter_beside(path, adapter)
    config = read_json(path / CONFIG)
    with value_errors_of(path):
        layout, cfg = layout_of(config), read_config(config)
    return Folder(path, config, layout, cfg, checkpoint.is_orbax(path), adapter)


def table_for(layout: str, cfg: JanusConfig) -> Table:
    """Conversion table of a PyTorch layout."""
    return (deepseek if layout == DEEPSEEK else transformers).table(cfg)


def open_adapter(folder: Folder) -> Adapter | None:
    """The folder's adapter matched with its sizes; None if it has none.

    Raises:
      FileNotFoundError, ValueError: as read_adapter.
    """
    if folder.adapter is None:
        return None
    tables = {layout: table_for(layout, folder.cfg) for layout in (DEEPSEEK, TRANSFORMERS)}
    return read_adapter(folder.adapter, tables, param_shapes(folder.cfg))


class OneKey:
    """Stands in for nnx.Rngs where shapes are all that is wanted.

    Counting keys inside a trace takes quadratic time: 11 s instead of 1 s for Janus-Pro-1B.
    """

    def params(self) -> jax.Array:
        return jax.random.key(0)


@functools.lru_cache(maxsize=2)
def abstract(cfg: JanusConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A Janus whose parameters are shapes and dtypes, in its two parts."""
    return nnx.split(nnx.eval_shape(lambda: Janus(cfg, rngs=OneKey())))


LAYERS = ("und_encoder.blocks", "language_model.layers")  # all of a stack have the same shapes


def param_shapes(cfg: JanusConfig) -> dict[str, Shape]:
    """Shape of every parameter of a Janus by path; allocates none.

    Builds one layer of each stack, so that a config that does not fit its weights is refused
    before many layers are built.
    """
    counts = (cfg.und_encoder.num_layers, cfg.language_model.num_hidden_layers)
    _, state = abstract(_one_layer_each(cfg))
    one = {_path(keys): tuple(leaf.shape) for keys, leaf in nnx.to_flat_state(state)}
    shapes = {}
    for stack, paths in itertools.groupby(one, _stack):
        if stack is None:
            shapes |= {path: one[path] for path in paths}
            continue
        rest = [path.removeprefix(f"{stack}.0.") for path in paths]
        for i in range(counts[LAYERS.index(stack)]):
            shapes |= {f"{stack}.{i}.{name}": one[f"{stack}.0.{name}"] for name in rest}
    return shapes


def _stack(path: str) -> str | None:
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
      ValueError: the weights are quantised, or do not fit config.json.
    """
    source = open_checkpoint(folder.path)
    check_not_quantised(folder.config, source)
    table = table_for(folder.layout, folder.cfg)
    return source, make_plan(table, source, param_shapes(folder.cfg))


def check_weights(folder: Folder) -> None:
    """Raises ValueError unless a folder's weights fit its config.json; reads no values."""
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
    """Reads a folder's parameters and places each before the next is read.

    Args:
      folder: PyTorch weights in either layout, or an Orbax folder; an adapter of an opened one is
        merged in float32, before the cast to `dtype`.
      cfg: the sizes, as `open_folder(folder).cfg` gives them.
      sharding_for: sharding of a parameter by path and shape; None is the default device.
      dtype: storage dtype of all parameters but those of float32_paths.
      float32_paths: regular expression, matched from the beginning of a path.
      paths: of the parameters to read; None is all.
      progress: called with the bytes of the folder read so far and in all.

    Returns:
      Arrays by path, for `build_model`.
    """
    opened = folder if isinstance(folder, Folder) else open_folder(folder)
    opened = dataclasses.replace(opened, cfg=cfg)
    adapter = open_adapter(opened)
    exact = re.compile(float32_paths)

    def kind(path: str) -> np.dtype:
        return np.dtype(jnp.float32 if exact.match(path) else dtype)

    if opened.orbax:
        return _restore(opened, sharding_for, kind, paths, progress, adapter)
    source, plan = plan_folder(opened)
    params = {}
    steps = [step for step in plan.steps if paths is None or any(p in paths for p in step.paths)]
    sizes = [source.size(step.torch) for step in steps]
    for step, done in zip(steps, itertools.accumulate(sizes), strict=True):
        for path, view in zip(step.paths, step.op.ours(source.read(step.torch)), strict=True):
            if paths is not None and path not in paths:
                continue
            sharding = sharding_for(path, view.shape)
            if adapter is not None:
                view = adapter.merged(path, view)
            params[path] = _place(view, sharding, kind(path))
        if progress is not None:
            progress(done, sum(sizes))
    return params


def _place(view: np.ndarray, sharding: jax.sharding.Sharding | None, dtype) -> jax.Array:
    """Puts a view of a file on devices; only the parts that they hold are read and cast."""

    def part(index: tuple) -> np.ndarray:
        return _copy(view[index], dtype)

    if sharding is None:
        return jax.block_until_ready(jax.device_put(part(())))
    array = jax.make_array_from_callback(view.shape, sharding, part)
    return jax.block_until_ready(array)  # or copies of many tensors would queue up on the host


def _copy(view: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """C-ordered copy in another dtype, aligned so that a CPU device takes it over as it is.

    It must be a copy for the same reason: the device would keep the file's own memory.
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
    kind: Callable[[str], np.dtype],
    paths: Container[str] | None,
    progress: Report | None,
    adapter: Adapter | None,
) -> dict[str, jax.Array]:
    stored = check_stored(folder)
    here = jnp.zeros(()).sharding  # the default device
    wanted = {
        path: jax.ShapeDtypeStruct(
            shape, kind(path), sharding=sharding_for(path, shape) or here
        )
        for path, shape in param_shapes(folder.cfg).items()
        if paths is None or path in paths
    }
    if adapter is None:
        return checkpoint.restore(folder.path, wanted, progress)
    plain = {path: leaf for path, leaf in wanted.items() if path not in adapter.places}
    sizes = {path: checkpoint.size(stored[path]) for path in wanted}
    done, total = sum(sizes[path] for path in plain), sum(sizes.values())
    report = progress and (lambda read, _: progress(read, total))
    params = checkpoint.restore(folder.path, plain, report)
    for path, array in checkpoint.restore_numpy(folder.path, wanted.keys() - plain.keys()):
        leaf, done = wanted[path], done + sizes[path]
        params[path] = _place(adapter.merged(path, array), leaf.sharding, leaf.dtype)
        if progress is not None:
            progress(done, total)
    return params


def check_stored(folder: Folder) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes in an Orbax folder, which must be those of the model.

    Raises:
      ValueError: missing, unknown or misshapen parameters; the message names a few of each.
    """
    expected, stored = param_shapes(folder.cfg), checkpoint.stored_params(folder.path)
    shared = [path for path in expected if path in stored]
    faults = {
        "missing": [path for path in expected if path not in stored],
        "unknown": [shorten_text(path) for path in stored if path not in expected],
        "of a wrong shape": [
            f"{p} is {shorten(stored[p].shape)}, expected {expected[p]}"
            for p in shared
            if tuple(stored[p].shape) != expected[p]
        ],
    }
    if text := listed(faults):
        raise ValueError(f"{folder.path} does not fit its config.json, parameters {text}")
    return stored


def build_model(cfg: JanusConfig, params: Mapping[str, jax.Array]) -> Janus:
    """A Janus with these arrays as its parameters, without initialising it first.

    Raises:
      ValueError: `params` are not exactly the model's, by path.
    """
    graphdef, state = abstract(cfg)
    astray = sorted({_path(keys) for keys, _ in nnx.to_flat_state(state)} ^ set(params))
    if astray:
        raise ValueError(f"{len(astray)} parameters do not match the model's: {few(astray)}")
    return filled(graphdef, state, lambda path: params[path])


def filled(graphdef: nnx.GraphDef, state: nnx.State, array: Callable[[str], jax.Array]):
    """The module with these arrays, by path, as its parameters. state: abstract."""
    flat = nnx.to_flat_state(state)
    leaves = [(keys, leaf.replace(array(_path(keys)))) for keys, leaf in flat]
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


@functools.lru_cache(maxsize=2)
def _abstract_vq(cfg: VQConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """As abstract, of the image tokenizer alone."""
    return nnx.split(nnx.eval_shape(lambda: VQ(cfg, rngs=OneKey())))


def load_vq(folder: Folder) -> VQ:
    """A folder's image tokenizer alone, on the default device; of an Orbax folder the host reads
    all parameters."""
    stored = stored_params(folder)

    def array(path: str) -> jax.Array:
        return jnp.array(stored.read(f"gen_vq.{path}"), jnp.float32)

    return filled(*_abstract_vq(folder.cfg.gen_vq), array)


@dataclasses.dataclass(frozen=True)
class StoredParams:
    """Parameters of a folder as stored: dtype and shape by path, values when asked for.

    `unused` holds what the model does not use, by PyTorch name; `skipped` says why.
    """

    kinds: Mapping[str, tuple[np.dtype, Shape]]
    read: Callable[[str], np.ndarray]
    unused: Mapping[str, np.ndarray]
    skipped: Mapping[str, str]


def stored_params(folder: Folder) -> StoredParams:
    """Opens a folder's parameters on the host in their own dtypes.

    Values of PyTorch folders are views of the files; an Orbax folder is read whole at the first. An
    adapter is merged in float32 and the sum rounded to the parameter's dtype.
    """
    stored = _stored_orbax(folder) if folder.orbax else _stored_torch(folder)
    adapter = open_adapter(folder)
    if adapter is None:
        return stored

    def read(path: str) -> np.ndarray:
        return adapter.merged(path, stored.read(path)).astype(stored.kinds[path][0], copy=False)

    return dataclasses.replace(stored, read=read)


def _stored_torch(folder: Folder) -> StoredParams:
    source, plan = plan_folder(folder)
    places = {path: (step, i) for step in plan.steps for i, path in enumerate(step.paths)}

    def read(path: str) -> np.ndarray:
        step, i = places[path]
        return step.op.ours(source.read(step.torch))[i]

    shapes = param_shapes(folder.cfg)
    kinds = {path: (source.dtype(step.torch), shapes[path]) for path, (step, _) in places.items()}
    unused = {name: source.read(name) for name in plan.skipped}
    return StoredParams(kinds, read, unused, plan.skipped)


def _stored_orbax(folder: Folder) -> StoredParams:
    stored = check_stored(folder)
    kinds = {path: (np.dtype(leaf.dtype), tuple(leaf.shape)) for path, leaf in stored.items()}
    path = folder.path / checkpoint.UNUSED
    tensors, _ = read_safetensors(path) if path.is_file() else ({}, [])
    unused = {name: tensor.read() for name, tensor in tensors.items()}
    table = table_for(folder.layout, folder.cfg)
    skipped = {name: " ".join(skip_reasons(table, name)) for name in unused}
    arrays = functools.cache(lambda: dict(checkpoint.restore_numpy(folder.path, stored)))
    return StoredParams(kinds, lambda path: arrays()[path], unused, skipped)
