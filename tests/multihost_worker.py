"""train.py for tests/test_multihost.py, which also writes the records of every step to a file.

python tests/multihost_worker.py --config=tests/multihost_worker.py:OUTPUT --coordinator=...
With FAILS=N in the environment, process N fails at its second step.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict
from stage_configs import small_config

from janus_jax.training.metrics import Log


def get_config(output: str) -> ConfigDict:
    """Returns a config with eight rows from two streams."""
    config = small_config(Path(output), batch_size=8, streams=2)
    config.eval_mixture = config.mixture
    return config


def noting(output: Path) -> Callable:
    """Returns a Log.step that also appends [step, records] to OUTPUT/records-PROCESS.jsonl."""
    report = Log.step

    def step(log: Log, number: int, metrics: dict, records: list, flops: float) -> None:
        process = jax.process_index()
        if number == 2 and os.environ.get("FAILS") == str(process):
            raise ValueError(f"records must be good, got bad ones in process {process}")
        report(log, number, metrics, records, flops)
        with (output / f"records-{process}.jsonl").open("a") as file:
            file.write(json.dumps([number, records]) + "\n")

    return step


if __name__ == "__main__":
    import sys

    from janus_jax.commands import train as cli

    (config,) = [word for word in sys.argv if word.startswith("--config=")]
    Log.step = noting(Path(config.rpartition(":")[2]))
    cli.main()
