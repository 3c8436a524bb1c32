"""Compares unrolled decoder layers, as in the model, with `lax.scan` over stacked layers.

    python -m benchmarks.scan_layers --output benchmarks/results/scan_layers.jsonl
    pip install "libtpu==0.0.42.*"     # to compile for a TPU; no TPU is needed:
    python -m benchmarks.scan_layers --device v5p --output benchmarks/results/scan_layers.jsonl

Measures a forward and backward pass through the decoder layers alone, with the gradients of all
their weights. For a TPU the program is compiled but not run, with the layers of Janus-Pro-1B. On
this machine the layers have a twelfth of that width.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# keeps the TPU compiler from querying the metadata of the machine
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from janus_jax.models.janus import JanusConfig
from janus_jax.models.layers import block_call
from janus_jax.models.llama import Block, LlamaConfig, rope_angles

ROWS, LENGTH, RUNS = 1, 2048, 5


def block_state(cfg: LlamaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Returns the graph definition and the abstract state of one block."""
    return nnx.split(nnx.eval_shape(lambda: Block(cfg, rngs=nnx.Rngs(0))))


def unrolled(cfg: LlamaConfig) -> tuple[Callable, list]:
    """Returns a function (weights, x, angles, segment_ids) -> x, and the shapes of the weights."""
    graph, state = block_state(cfg)
    run = block_call(Block, cfg.remat)

    def layers(weights, x, angles, segment_ids):
        for layer in weights:
            x, _, _ = run(nnx.merge(graph, layer), x, angles, segment_ids)
        return x

    return layers, [state] * cfg.num_hidden_layers


def scanned(cfg: LlamaConfig) -> tuple[Callable, nnx.State]:
    """Returns the same with stacked weights, float[layers, ...], and `lax.scan`."""
    graph, state = block_state(cfg)
    run = block_call(Block, cfg.remat)

    def layers(weights, x, angles, segment_ids):
        def body(x, layer):
            return run(nnx.merge(graph, layer), x, angles, segment_ids)[0], None

        return jax.lax.scan(body, x, weights)[0]

    shape = (cfg.num_hidden_layers,)
    return layers, jax.tree.map(lambda w: jax.ShapeDtypeStruct(shape + w.shape, w.dtype), state)


VARIANTS = dict(written_out=unrolled, scanned=scanned)  # by their names in the results file


def gradients(layers: Callable, cfg: LlamaConfig) -> Callable:
    """Returns the jitted (weights, x, segments) -> gradient of the summed output by the weights."""

    def total(weights, x, segments):
        positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))
        angles = rope_angles(positions, cfg.head_dim, cfg.rope_theta)
        return jnp.sum(layers(weights, x, angles, segments).astype(jnp.float32))

    return jax.jit(jax.grad(total))


def measure(make: Callable, cfg: LlamaConfig, chip: jax.Device | None) -> dict:
    """Compiles one variant and measures it.

    Returns the seconds to trace and to compile, the gigabytes of temporaries and, on this machine,
    the seconds per step.

    make: `unrolled` or `scanned`. chip: a device to compile for, or None to use this machine.
    """
    layers, weights = make(cfg)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, cfg.hidden_size), cfg.dtype)
    shapes = weights, x, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    if chip:
        sharding = SingleDeviceSharding(chip)
        shapes = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes
        )
    start = time.monotonic()
    lowered = gradients(layers, cfg).lower(*shapes)
    traced = time.monotonic()
    compiled = lowered.compile()
    figures = dict(
        trace_s=round(traced - start, 2),
        compile_s=round(time.monotonic() - traced, 2),
        temporaries_gb=round(compiled.memory_analysis().temp_size_in_bytes / 1e9, 3),
    )
    return figures if chip else figures | dict(step_s=step_seconds(compiled, shapes))


def step_seconds(compiled: Callable, shapes: tuple) -> float:
    """Returns the median time of RUNS runs, after one warm-up run."""
    weights, x, segments = shapes
    weights, x = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), (weights, x))
    inputs = weights, x, jnp.ones(segments.shape, segments.dtype)
    times = []
    for _ in range(RUNS + 1):
        start = time.monotonic()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.monotonic() - start)
    return round(statistics.median(times[1:]), 3)


def compare(device: str) -> dict:
    """Measures all variants for one kind of device and returns the record; "" is this machine."""
    cfg, chip = JanusConfig.janus_pro_1b().language_model, None
    if device:
        chips = topologies.get_topology_desc(platform="tpu", topology_name=f"{device}:2x2")
        cfg, chip = dataclasses.replace(cfg, dtype=jnp.bfloat16), chips.devices[0]
    else:
        small = dict(hidden_size=160, intermediate_size=448, num_attention_heads=4)
        cfg = dataclasses.replace(cfg, **small, num_key_value_heads=4)
    cfg = dataclasses.replace(cfg, param_dtype=cfg.dtype)
    results = {
        f"{name}, remat {remat}": measure(
            make, dataclasses.replace(cfg, remat=remat), chip
        )
        for remat in ("none", "full")
        for name, make in VARIANTS.items()
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
        ways=results,
    )


def main() -> None:
    """Runs the command: prints the record and appends it to the file given by --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device_help = "kind of TPU, such as v5p (default: this machine)"
    parser.add_argument("--device", default="", help=device_help)
    parser.add_argument("--output", type=Path, help="JSON Lines file to append to")
    flags = parser.parse_args()
    line = json.dumps(compare(flags.device))
    print(line)
    if flags.output:
        with flags.output.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
