"""What a step of training takes of a device's memory, as XLA plans it for a TPU that is not there.

    pip install "libtpu==0.0.42.*"     # the one that jax[tpu] asks for
    python -m benchmarks.train_memory --init checkpoints/Janus-Pro-1B --config finetune_lora \\
        --device v5e --output benchmarks/results/train_memory.jsonl

Only the small files of the checkpoint folder are read. For one chip of the named kind (v5e: 16 GB,
v5p: 95 GB): the size of what lies there during a step, and what XLA plans for the compiled step
beside it, temporaries and results.
"""

import argparse
import dataclasses
import importlib
import json
import os
import time
from pathlib import Path

# jax's TPU compiler would look for the machine that it is on
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.experimental import topologies

from janus_jax.sharding import make_mesh
from janus_jax.training.memory import array_bytes, step_bytes
from janus_jax.training.setup import Setup

SETTINGS = ("batch_size", "accumulate", "seq_len", "remat", "lora_rank")


def measure(config: str, device: str, changed: dict) -> dict:
    """Gigabytes on one chip: held, taken by a step, and both; and the seconds of compiling."""
    cfg = importlib.import_module(f"configs.{config}").get_config()
    cfg.update(changed | dict(mesh="data=1"))
    chips = topologies.get_topology_desc(platform="tpu", topology_name=f"{device}:2x2").devices
    setup = dataclasses.replace(Setup.from_config(cfg), mesh=make_mesh(devices=chips[:1]))
    sizes, began = array_bytes(setup), time.monotonic()
    step = step_bytes(setup)
    return dict(
        config=config,
        model=Path(cfg.init).name,
        device=device,
        jax=jax.__version__,
        **{name: cfg[name] for name in SETTINGS},
        arrays_gb={name: round(size / 1e9, 3) for name, size in sizes.items()},
        step_gb=round(step / 1e9, 3),
        total_gb=round((sum(sizes.values()) + step) / 1e9, 3),
        compile_s=round(time.monotonic() - began, 1),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--init", required=True, help="checkpoint folder; weights are not needed")
    parser.add_argument("--config", required=True, help="name of a file of configs/")
    parser.add_argument("--device", default="v5e", help="kind of TPU, as v5e or v5p")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=NUMBER of the config")
    parser.add_argument("--output", type=Path, help="JSON lines; a line is added")
    args = parser.parse_args()
    changed = {name: json.loads(value) for name, _, value in (s.partition("=") for s in args.set)}
    found = measure(args.config, args.device, changed | dict(init=args.init))
    print(json.dumps(found))
    if args.output:
        with args.output.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
