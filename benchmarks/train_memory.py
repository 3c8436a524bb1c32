"""Measures the memory that a training step needs, by compiling it for a TPU. No TPU is needed.

    pip install "libtpu==0.0.42.*"     # the version that jax[tpu] requires
    python -m benchmarks.train_memory --init checkpoints/Janus-Pro-1B --config finetune_lora \\
        --device v5e --output benchmarks/results/train_memory.jsonl

Reports, for one chip of the given kind (v5e: 16 GB, v5p: 95 GB), the size of the arrays that are on
the device during a step, and the additional memory that XLA plans for temporaries and results of
the compiled step. Only the small files of the checkpoint folder are read, not the weights.
"""

import argparse
import dataclasses
import importlib
import json
import os
import time
from pathlib import Path

# keeps the TPU compiler from querying the metadata of the machine
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.experimental import topologies

from janus_jax.sharding import make_mesh
from janus_jax.training.program import Program, array_bytes, step_bytes
from janus_jax.training.settings import Inputs

SETTINGS = ("batch_size", "accumulate", "seq_len", "remat", "lora_rank")


def measure(config: str, device: str, changed: dict) -> dict:
    """Returns the record of one config.

    It contains the seconds to compile, and three sizes on one chip in gigabytes: the resident
    arrays, the additional memory of the step, and the sum of both.

    config: name of a module in configs/. device: kind of TPU. changed: config values to override.
    """
    cfg = importlib.import_module(f"configs.{config}").get_config()
    cfg.update(changed | dict(mesh="data=1"))
    chips = topologies.get_topology_desc(platform="tpu", topology_name=f"{device}:2x2").devices
    mesh = make_mesh(devices=chips[:1])
    program = Program(dataclasses.replace(Inputs.from_settings(cfg), mesh=mesh))
    sizes, start = array_bytes(program), time.monotonic()
    step = step_bytes(program)
    return dict(
        config=config,
        model=Path(cfg.init).name,
        device=device,
        jax=jax.__version__,
        **{name: cfg[name] for name in SETTINGS},
        arrays_gb={name: round(size / 1e9, 3) for name, size in sizes.items()},
        step_gb=round(step / 1e9, 3),
        total_gb=round((sum(sizes.values()) + step) / 1e9, 3),
        compile_s=round(time.monotonic() - start, 1),
    )


def main() -> None:
    """Runs the command: prints the record and appends it to the file given by --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, help="checkpoint folder; weights are not read")
    parser.add_argument("--config", required=True, help="name of a file in configs/, without .py")
    parser.add_argument("--device", default="v5e", help="kind of TPU: v5e (default), v5p, ...")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=JSON values for the config")
    parser.add_argument("--output", type=Path, help="JSON Lines file to append to")
    args = parser.parse_args()
    changed = {name: json.loads(value) for name, _, value in (s.partition("=") for s in args.set)}
    record = measure(args.config, args.device, changed | dict(init=args.init))
    print(json.dumps(record))
    if args.output:
        with args.output.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
