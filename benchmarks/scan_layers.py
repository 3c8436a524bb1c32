"""The decoder's layers written out one by one, as they are, against one layer that is scanned.

    python -m benchmarks.scan_layers --output benchmarks/results/scan_layers.jsonl
    pip install "libtpu==0.0.42.*"     # and for a TPU that is not there, without running:
    python -m benchmarks.scan_layers --device v5p --output benchmarks/results/scan_layers.jsonl

A forward and backward pass through the decoder's layers alone, with the gradient of all of their
weights. On a TPU the layers are Janus-Pro-1B's, on this machine a twelfth as wide.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# jax's TPU compiler would look for the machine that it is on
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from janus_jax.models.attention import segment_mask
from janus_jax.models.janus import JanusConfig
from janus_jax.models.llama import Block, LlamaConfig, rope_angles
from janus_jax.models.remat import block_call

ROWS, LENGTH, RUNS = 1, 2048, 5


def block_state(cfg: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A block without values."""
    return nnx.split(nnx.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(0))))


def written_out(cfg: LlamaConfig) -> tuple[Callable, list]:
    """The layers as a function (weights, x, angles, mask) -> x, and the shapes of the weights."""
    graph, state = block_state(cfg)
    run = block_call(Block, cfg.remat)

    def layers(weights, x, angles, mask):
        for one in weights:
            x, _, _ = run(nnx.merge(graph, one), x, angles, mask, None)
        return x

    return layers, [state] * cfg.num_hidden_layers


def scanned(cfg: LlamaConfig) -> tuple[Callable, nnx.State]:
    """The same with all layers' weights in one array each, float[layers, ...]."""
    graph, state = block_state(cfg)
    run = block_call(Block, cfg.remat)

    def layers(weights, x, angles, mask):
        def body(x, one):
            return run(nnx.merge(graph, one), x, angles, mask, None)[0], None

        return jax.lax.scan(body, x, weights)[0]

    shape = (cfg.num_hidden_layers,)
    return layers, jax.tree.map(lambda w: jax.ShapeDtypeStruct(shape + w.shape, w.dtype), state)


def gradients(layers: Callable, cfg: LlamaConfig) -> Callable:
    """(weights, x, segments) -> the gradient of a sum over what the layers give."""

    def total(weights, x, segments):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
        angles = rope_angles(positions, cfg.head_dim, cfg.rope_theta)
        return jnp.sum(layers(weights, x, angles, segment_mask(segments)).astype(jnp.float32))

    return jax.jit(jax.grad(total))


def measure(make: Callable, cfg: LlamaConfig, chip: jax.Device | None) -> dict:
    """Seconds of tracing and compiling, gigabytes beside the weights and, here, seconds of a step.

    chip: a device that is not there, or None for this machine.
    """
    layers, weights = make(cfg)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, cfg.hidden_size), cfg.dtype)
    shapes = weights, x, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    if chip:
        lies = SingleDeviceSharding(chip)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies), shapes
        )
    began = time.monotonic()
    lowered = gradients(layers, cfg).lower(*shapes)
    traced = time.monotonic()
    compiled = lowered.compile()
    found = dict(
        trace_s=round(traced - began, 2),
        compile_s=round(time.monotonic() - traced, 2),
        temporaries_gb=round(compiled.memory_analysis().temp_size_in_bytes / 1e9, 3),
    )
    return found if chip else found | dict(step_s=step_seconds(compiled, shapes))


def step_seconds(compiled: Callable, shapes: tuple) -> float:
    """Median of RUNS runs after the first one."""
    weights, x, segments = shapes
    weights, x = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), (weights, x))
    given = weights, x, jnp.ones(segments.shape, segments.dtype)
    times = []
    for _ in range(RUNS + 1):
        began = time.monotonic()
        jax.block_until_ready(compiled(*given))
        times.append(time.monotonic() - began)
    return round(statistics.median(times[1:]), 3)


def compare(device: str) -> dict:
    """The record of one device: "" is this machine."""
    cfg, chip = JanusConfig.janus_pro_1b().language_model, None
    if device:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=f"{device}:2x2")
        cfg, chip = dataclasses.replace(cfg, dtype=jnp.bfloat16), chips.devices[0]
    else:
        small = dict(hidden_size=160, intermediate_size=448, num_attention_heads=4)
        cfg = dataclasses.replace(cfg, **small, num_key_value_heads=4)
    cfg = dataclasses.replace(cfg, param_dtype=cfg.dtype)
    ways = {
        f"{make.__name__}, remat {remat}": measure(
            make, dataclasses.replace(cfg, remat=remat), chip
        )
        for remat in ("none", "full")
        for make in (written_out, scanned)
    }
    return dict(
        device=device or jax.devices()[0].device_kind,
        cores=os.cpu_count(),
        jax=jax.__version__,
        layers=cfg.num_hidden_layers,
        width=cfg.hidden_size,
        batch_size=ROWS,
        seq_len=LENGTH,
        dtype=jnp.dtype(cfg.dtype).name,
        ways=ways,
    )


def main() -> None:
    """Prints the record, and adds it to the file that --output names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="", help="kind of TPU, as v5p (default: this machine)")
    parser.add_argument("--output", type=Path, help="JSON lines; a line is added")
    flags = parser.parse_args()
    line = json.dumps(compare(flags.device))
    print(line)
    if flags.output:
        with flags.output.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
