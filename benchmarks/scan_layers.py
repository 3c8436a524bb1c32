"""Compiles a training step with its layers in a loop and one after the other, and compares both.

    pip install -e ".[compile-tpu]"
    python -m benchmarks.scan_layers --config janus_pro_1b_stage2 --device v5p \\
        --set batch_size=4 streams=1 'remat="full"' --output benchmarks/results/scan_layers.jsonl

The device need not be there. For each program of the step, it reports the seconds to compile, the
CPU seconds of all threads meanwhile, which depend less on what else the machine does, and the
gigabytes that the program adds to the arrays on a device. Nothing is run.
"""

import argparse
import importlib
import json
import os
import time
from pathlib import Path

# keeps the TPU compiler from querying the metadata of the machine
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

from janus_jax.aot.topology import described_devices
from janus_jax.aot.training import abstract_program, compile_step
from janus_jax.devices import known_devices
from janus_jax.models.janus import JanusConfig

SETTINGS = ("batch_size", "accumulate", "seq_len", "remat", "scan", "lora_rank", "tokenized")


def measure(settings, cfg: JanusConfig, devices: list) -> dict[str, dict[str, float]]:
    """Compiles the programs of a step, and returns the figures of each by its name."""
    figures, parts = {}, compile_step(abstract_program(settings, cfg, devices))
    while True:
        start = time.process_time()
        part = next(parts, None)
        if part is None:
            return figures
        figures[part.name] = dict(
            compile_s=round(part.compile_s, 1),
            cpu_s=round(time.process_time() - start, 1),
            added_gb=round(part.added / 1e9, 3),
        )


def main() -> None:
    """Runs the command: prints a record per way and appends it to the file given by --output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, help="name of a file in configs/, without .py")
    parser.add_argument("--model", default="janus_pro_1b", help="or janus_pro_7b")
    parser.add_argument("--device", default="v5p", help="kind of device: v5p (default), v5e, ...")
    parser.add_argument("--count", type=int, default=1, help="number of devices, all on fsdp")
    parser.add_argument("--scan", nargs="*", default=["on", "off"], help="ways (default: on off)")
    parser.add_argument("--set", nargs="*", default=[], help="NAME=JSON values for the config")
    parser.add_argument("--output", type=Path, help="JSON Lines file to append to")
    args = parser.parse_args()
    changed = {name: json.loads(value) for name, _, value in (s.partition("=") for s in args.set)}
    cfg = getattr(JanusConfig, args.model)()
    devices = described_devices(known_devices()[args.device], args.count, "")
    for scan in args.scan:
        settings = importlib.import_module(f"configs.{args.config}").get_config()
        settings.update(changed | dict(scan=scan, mesh=""))
        record = dict(
            config=args.config,
            model=args.model,
            device=args.device,
            devices=args.count,
            jax=jax.__version__,
            cores=os.cpu_count(),
            **{name: settings[name] for name in SETTINGS},
            parts=measure(settings, cfg, devices),
        )
        print(json.dumps(record), flush=True)
        if args.output:
            with args.output.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
