"""The parameters of a run: which are trained, how they are stored, and their first values."""

import re
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from janus_jax.families.family import ModelConfig, Precision
from janus_jax.interop.load import (
    DTYPES,
    abstract,
    leaves_by_path,
    load_params,
    merge_params,
)
from janus_jax.sharding import sharding_for
from janus_jax.training.lora import ADAPTERS, LoRAConfig, add_adapters
from janus_jax.training.settings import Inputs
from janus_jax.training.stacked import (
    same_in_all_layers,
    stack_params,
    stack_shapes,
    stack_size,
    stacked_groups,
    unstack_params,
)
from janus_jax.training.step import Params

Shapes = dict[str, jax.ShapeDtypeStruct]  # by path, with shardings


class Parameters:
    """The trainable and the frozen parameters of a run. Creating it loads no weights.

    Attributes:
        inputs: the settings and what they name.
        table: the table of parameters of the model's family.
        trained, frozen: shapes, dtypes and shardings, by path. Trainable parameters and the image
            tokenizer are float32, other frozen parameters settings.dtype. Parameters that no step
            uses are in neither dict.
        loaded_frozen: the same for what load_frozen returns.
    """

    def __init__(self, inputs: Inputs, can_loop: bool = True):
        """Determines which parameters are trained.

        can_loop: whether layers may run in a loop; decode steps must not.
        Raises ValueError if no parameter is trainable, if one of the image tokenizer is, or if
        `reinit` does not fit them.
        """
        self.inputs, self.table = inputs, inputs.source.family.parameter_table
        self._graph, self._state = abstract_model(inputs.model_cfg, inputs.lora)
        self.trained, self.frozen = self._split()
        self._loops = self._stacks_to_loop() if can_loop else []
        if self._loops:
            cfg = inputs.model_cfg.with_scan(self._loops)
            self._graph, self._state = abstract_model(cfg, inputs.lora)
        self._groups = stacked_groups(self.frozen, self._loops)
        self.loaded_frozen = stack_shapes(self.frozen, self._groups)
        if inputs.settings.reinit:
            check_reinit(inputs.settings.reinit, self.trained, self.frozen)

    def _split(self) -> tuple[Shapes, Shapes]:
        inputs, dtype = self.inputs, DTYPES[self.inputs.settings.dtype]
        pattern = re.compile(ADAPTERS if inputs.lora else inputs.settings.trained)
        sharding = sharding_for(inputs.mesh, self.table)
        trained, frozen = {}, {}
        for path, leaf in leaves_by_path(self._state):
            is_trained = bool(pattern.match(path))
            is_float32 = is_trained or self.table.find(path).precision is Precision.FLOAT32
            shape = jax.ShapeDtypeStruct(
                leaf.shape,
                jnp.float32 if is_float32 else dtype,
                sharding=sharding(path, leaf.shape),
            )
            (trained if is_trained else frozen)[path] = shape
        if not trained:
            raise ValueError(f"no parameter path matches trained={pattern.pattern!r}")
        if any(map(self._is_vq, trained)):
            vq = inputs.source.family.image_codec
            rule = f"trained must match no parameter of the image tokenizer, {vq}"
            raise ValueError(f"{rule}, got {pattern.pattern!r}")
        if inputs.rows.tokenized:  # the image tokens are precomputed
            frozen = {path: leaf for path, leaf in frozen.items() if not self._is_vq(path)}
        return trained, frozen

    def _stacks_to_loop(self) -> list[str]:
        """Returns the stacks whose layers run in a loop, according to settings.scan.

        XLA compiles the body of a loop once, but stacking the parameters of the layers takes time
        to compile, too, and memory, unless they are stacked when they are loaded.
        """
        scan, family = self.inputs.settings.scan, self.inputs.source.family
        is_tpu = self.inputs.mesh.devices.flat[0].platform == "tpu"
        if scan == "off" or (scan == "auto" and not is_tpu):
            return []
        stacks = [s for s in family.stacks if same_in_all_layers(self.trained, self.frozen, s)]
        if scan == "on":
            return stacks
        return [s for s in stacks if stack_size(self.trained, s) < stack_size(self.frozen, s)]

    def _is_vq(self, path: str) -> bool:
        """Whether a parameter belongs to the image tokenizer."""
        return self.table.find(path).component == self.inputs.source.family.image_codec

    def image_codec(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Returns those of the parameters, by path, that belong to the image tokenizer."""
        return {path: params[path] for path in self.frozen if self._is_vq(path)}

    def cast_by_model(self) -> frozenset[str]:
        """Returns the paths of the trainable parameters that the model gets in float32.

        They are those with Precision.FLOAT32_GRADIENT, and the matrices of layers: each layer casts
        its own, so that with remat, copies of all of them never exist at once. Layers that run in
        a loop get copies, because stacking the float32 matrices would take twice the memory.
        """
        return frozenset(filter(self._is_cast_by_model, self.trained))

    def _is_cast_by_model(self, path: str) -> bool:
        stacks = self.inputs.source.family.stacks.keys() - set(self._loops)
        if any(path.startswith(f"{stack}.") for stack in stacks) and self.trained[path].ndim > 1:
            return True
        return self.table.find(path).precision is Precision.FLOAT32_GRADIENT

    def load_frozen(self) -> Params:
        """Loads the frozen parameters from the initial checkpoint.

        Those of layers that run in a loop are stacked, see unstack.
        """
        frozen = self._load(self.frozen, DTYPES[self.inputs.settings.dtype])
        return stack_params(frozen, self.loaded_frozen, self._groups)

    def unstack(self, frozen: Params) -> Params:
        """Returns the frozen parameters by their paths in the model. Outside of jit, it copies."""
        return unstack_params(frozen, self._groups)

    def load_trained(self) -> Params:
        """Loads or initializes the trainable parameters, in float32."""
        new = {path: leaf for path, leaf in self.trained.items() if self._is_reinitialized(path)}
        stored = self.trained.keys() - new.keys()
        if not stored:
            return self._initialize(new)
        return self._load(stored, jnp.float32) | self._initialize(new)

    def _load(self, paths: Container[str], dtype) -> Params:
        """Loads parameters from the initial checkpoint; process 0 reports the bytes read."""
        inputs, sharding = self.inputs, sharding_for(self.inputs.mesh, self.table)
        with inputs.progress(f"loading {inputs.settings.init}") as report:
            report = report if jax.process_index() == 0 else None
            return load_params(inputs.source, dtype, sharding, paths, report)

    def _is_reinitialized(self, path: str) -> bool:
        """Whether a parameter is initialized at random: adapters and matches of `reinit`."""
        reinit = self.inputs.settings.reinit
        return bool(re.match(ADAPTERS, path) or (reinit and re.match(reinit, path)))

    def _initialize(self, shapes: Shapes) -> Params:
        """Initializes parameters at random."""
        if not shapes:
            return {}
        inputs = self.inputs

        def make() -> Params:
            rngs = nnx.Rngs(inputs.settings.seed)
            model = inputs.source.family.build(inputs.model_cfg, rngs=rngs)
            if inputs.lora:
                add_adapters(model, inputs.lora, rngs=rngs)
            values = dict(leaves_by_path(nnx.state(model)))
            return {path: values[path].astype(leaf.dtype) for path, leaf in shapes.items()}

        shardings = {path: leaf.sharding for path, leaf in shapes.items()}
        return jax.jit(make, out_shardings=shardings)()

    def build(self, params: Params) -> nnx.Module:
        """Builds the model from parameters by path. Parameters that are not given stay abstract."""
        leaves = dict(leaves_by_path(self._state)) | self.unstack(params)
        return merge_params(self._graph, self._state, leaves.__getitem__)


def abstract_model(
    cfg: ModelConfig, lora: LoRAConfig | None
) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the graph and the abstract state of the model, including adapters."""
    graph, state = abstract(cfg)
    if not lora:
        return graph, state
    model = nnx.merge(graph, state)
    add_adapters(model, lora, rngs=nnx.Rngs(0))
    graph, state = nnx.split(model)
    return graph, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def check_reinit(reinit: str, trained: Iterable[str], frozen: Iterable[str]) -> None:
    """Raises ValueError unless `reinit` matches a trainable parameter and no frozen one.

    trained, frozen: parameter paths.
    """
    if not any(re.match(reinit, path) for path in trained):
        raise ValueError(f"no trainable parameter matches {reinit=}")
    frozen_matches = [path for path in frozen if re.match(reinit, path)]
    if frozen_matches:
        rule = "reinit must not match a frozen parameter"
        raise ValueError(f"{rule}, got {reinit!r}, which matches {frozen_matches[0]}")
