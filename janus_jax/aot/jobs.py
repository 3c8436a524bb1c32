"""Jobs to compile: image generation, an answer to a question, training; on described devices."""

import abc
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from janus_jax import sharding
from janus_jax.aot import generation, training
from janus_jax.aot.compiled import CompiledPart, device_bytes
from janus_jax.aot.topology import described_devices, smallest_topology
from janus_jax.devices import DeviceFacts
from janus_jax.families.family import ModelConfig, Sizes
from janus_jax.families.registry import family_of


@dataclasses.dataclass(frozen=True)
class Step:
    """What a device must read for one token of all requests of a batch, in bytes.

    weights: the weights that it multiplies by: decoder and head, and for image tokens the
      generation aligner.
    cache: the filled part of the cache, on average over the tokens.
    """

    weights: int
    cache: float

    @property
    def bytes(self) -> float:
        """The sum of both."""
        return self.weights + self.cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job(abc.ABC):
    """A job on devices that need not be present.

    facts: the kind of device.
    cfg: the config of the model.
    mesh: the mesh as text, such as "tensor=4"; "" is one device without a mesh.
    topology: the TPU slice; "" is the smallest one with enough devices.
    """

    facts: DeviceFacts
    cfg: ModelConfig
    mesh: str = ""
    topology: str = ""

    @property
    def name(self) -> str:
        """The name of the job on the command line."""
        return type(self).__name__.lower()

    @property
    def mesh_sizes(self) -> dict[str, int]:
        """The sizes of the axes that `mesh` names."""
        return sharding.mesh_sizes(self.mesh) if self.mesh else {}

    @property
    def num_devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.mesh_sizes.values())

    @property
    def sizes(self) -> Sizes:
        """The sizes of the model that matter outside of the networks."""
        return family_of(self.cfg).sizes(self.cfg)

    @property
    def slice(self) -> str:
        """The TPU slice, also if `topology` does not name it; "" for GPUs."""
        if self.facts.platform == "cuda":
            return ""
        return self.topology or smallest_topology(self.facts, self.num_devices)

    @functools.cached_property
    def devices(self) -> list:
        """The devices, which JAX only describes."""
        return described_devices(self.facts, self.num_devices, self.topology)

    def build_mesh(self) -> Mesh | None:
        """Returns the mesh of the described devices, or None for one device without a mesh."""
        if not self.mesh:
            return None
        sharding.check_heads(self.mesh_sizes.get("tensor", 1), self.sizes.heads)
        return sharding.parse_mesh(self.mesh, self.devices)

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the job works on, for the report."""

    @abc.abstractmethod
    def held(self) -> dict[str, int]:
        """Returns the bytes that each device holds before the programs run, by purpose."""

    @abc.abstractmethod
    def compile(self) -> Iterator[CompiledPart]:
        """Compiles the programs of the job one after the other.

        Raises:
            DoesNotFitError: the compiler says that the memory of the device is too small.
            ValueError: the mesh does not fit the model, or XLA refuses a program for another
                reason.
        """

    def step(self) -> Step | None:
        """Returns what one decode step must read, or None for a job without decode steps."""
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Generation(Job):
    """Common to the jobs that generate tokens. prompt_length: tokens of the prompt."""

    prompt_length: int

    @functools.cached_property
    def target(self) -> generation.Target:
        """The model on the devices."""
        return generation.Target(self.cfg, self.devices[0], self.build_mesh())

    def check_length(self, num_tokens: int) -> None:
        """Raises ValueError if the prompt and the new tokens are too long for the model."""
        length, limit = self.prompt_length + num_tokens, self.sizes.max_positions
        if length > limit:
            raise ValueError(
                f"--prompt_length plus the new tokens must be at most {limit}, got {length}"
            )

    def held(self) -> dict[str, int]:
        return dict(parameters=generation.parameter_bytes(self.target))

    def _step(self, batch: int, rows: int, num_tokens: int) -> Step:
        """Returns what one decode step must read.

        batch: number of requests. rows: decoder rows of a request. num_tokens: new tokens.
        """
        filled = self.prompt_length + num_tokens / 2
        weights = generation.weight_shapes(self.target, self.name)
        cache = generation.cache_bytes(self.target, batch, rows, filled)
        return Step(device_bytes(list(weights.values())), cache)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw(_Generation):
    """Generates images of one prompt with guidance, as sample.py does.

    num_images: number of images. max_batch: maximum number to generate at a time; None: as many as
      image.generate chooses.
    """

    num_images: int = 1
    max_batch: int | None = None

    def __post_init__(self):
        self.check_length(self.sizes.generated_image_tokens)

    @property
    def batch(self) -> int:
        """The number of images that are generated at a time."""
        counts = self.num_images, self.prompt_length, self.max_batch
        return generation.batch_size(self.target, *counts)

    @property
    def settings(self) -> dict[str, Any]:
        return dict(
            num_images=self.num_images, batch=self.batch, prompt_length=self.prompt_length
        )

    def compile(self) -> Iterator[CompiledPart]:
        return generation.compile_draw(self.target, self.prompt_length, self.batch)

    def step(self) -> Step:
        return self._step(self.batch, rows=2, num_tokens=self.sizes.generated_image_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(_Generation):
    """Answers a question about images, as sample.py does.

    num_images: number of images in the prompt, whose tokens count as part of prompt_length.
    max_new_tokens: maximum number of tokens of the answer.
    """

    num_images: int = 1
    max_new_tokens: int = 256

    def __post_init__(self):
        self.check_length(self.max_new_tokens)
        image_tokens = self.num_images * self.sizes.input_image_tokens
        if self.prompt_length < image_tokens:
            raise ValueError(
                f"--prompt_length must be at least {image_tokens}, the tokens of the images "
                f"(--num_images {self.num_images}), got {self.prompt_length}"
            )

    @property
    def settings(self) -> dict[str, Any]:
        names = ("num_images", "prompt_length", "max_new_tokens")
        return {name: getattr(self, name) for name in names}

    def compile(self) -> Iterator[CompiledPart]:
        counts = self.prompt_length, self.num_images, self.max_new_tokens
        return generation.compile_answer(self.target, *counts)

    def step(self) -> Step:
        return self._step(batch=1, rows=1, num_tokens=self.max_new_tokens)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Job):
    """A step of a training run, as train.py does. config: the ConfigDict of the run."""

    config: Any

    @functools.cached_property
    def program(self) -> training.Program:
        """The program of the run."""
        config = self.config.copy_and_resolve_references()
        config.mesh = self.mesh  # that of --mesh or --count, if the config has none
        return training.abstract_program(config, self.cfg, self.devices)

    @property
    def settings(self) -> dict[str, Any]:
        names = ("batch_size", "accumulate", "seq_len", "remat", "scan", "trained", "lora_rank")
        return {name: self.config[name] for name in names}

    def held(self) -> dict[str, int]:
        return training.held_bytes(self.program)

    def compile(self) -> Iterator[CompiledPart]:
        return training.compile_step(self.program)
