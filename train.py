"""Trains a Janus: python train.py --config=configs/janus_tiny_stage3.py --config.steps=100."""

import contextlib
import itertools
from collections.abc import Iterator
from logging import INFO, LogRecord
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from janus_jax.flags import device_memory_errors, one_line_errors

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Experiment, a file of configs/; --config.NAME=VALUE changes one of its settings.",
    lock_config=True,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Train nothing; print parameters and memory, write out the first rows."
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes: on Cloud TPU, Slurm, Open MPI or Kubernetes."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "One of several processes elsewhere: HOST:PORT where process 0 is found."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "With --coordinator: how many.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "With --coordinator: which one, from 0.")
flags.mark_flag_as_required("config")

_NEEDS = "while training; fewer rows need less, or what docs/training.md has on devices and memory"


@contextlib.contextmanager
def settings_errors() -> Iterator[None]:
    """Tells of a setting that the config lacks, and of what the flags and the run complain of."""
    with one_line_errors("train.py", flags.Error, FloatingPointError):
        try:
            yield
        except AttributeError as error:
            if not error.args or not isinstance(error.args[0], KeyError):  # as a ConfigDict's is
                raise
            raise ValueError(f"the config has no {error.args[0].args[0]}") from error


def is_news(line: LogRecord) -> bool:
    """Ours, or a warning: Orbax tells of every file, Optax of every schedule."""
    return line.levelno > INFO or "janus_jax" in line.pathname


@settings_errors()
def parse(argv: list[str]) -> list[str]:
    """Reads the flags and the config file, which must be there."""
    for word, after in itertools.pairwise([*argv, ""]):
        path = after if word in ("-config", "--config") else word.partition("-config=")[2]
        if path and not Path(path.partition(":")[0]).is_file():
            raise FileNotFoundError(f"no config file at {path}")
    try:
        return flags.FLAGS(argv)
    except SyntaxError as error:
        raise ValueError(f"the config file must be Python, got {error}") from None
    except KeyError as error:  # a wrong name below a mapping, or below what is none
        raise ValueError(f"the config has no such setting: {error.args[0]}") from None
    except flags.IllegalFlagValueError as error:  # one in the config file has all its traceback
        before, trace, _ = str(error).partition("Traceback")
        last = str(error).splitlines()[-1] if trace else ""
        raise ValueError(f"{before}{last}") from None


@settings_errors()
def main(argv: list[str]) -> None:
    """Trains as the config says."""
    if len(argv) > 1:
        raise ValueError(f"arguments must be flags, got {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().addFilter(is_news)
    cfg, several = _CONFIG.value, _DISTRIBUTED.value or _COORDINATOR.value is not None
    if several and cfg.task != "stage":
        raise ValueError(f"several processes need a config whose task is stage, got {cfg.task!r}")
    if _DRY_RUN.value and cfg.task != "stage":
        raise ValueError(f"--dry_run needs a config whose task is stage, got {cfg.task!r}")
    from janus_jax import sharding  # JAX takes a second to import
    from janus_jax.generation import compile_cache
    from janus_jax.training import distributed

    compile_cache.enable()
    others = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    distributed.initialize(*others, _DISTRIBUTED.value)
    sharding.check_devices()
    if cfg.task == "tokenizer":
        from janus_jax.training.tokenizer import train_tokenizer as train
    elif cfg.task == "encoder":
        from janus_jax.training.encoder import train_encoder as train
    elif _DRY_RUN.value:
        from janus_jax.training.dry_run import print_dry_run as train
    elif cfg.task == "stage":
        from janus_jax.training.run import train_stage as train
    else:
        raise ValueError(f"task must be tokenizer, encoder or stage, got {cfg.task!r}")
    # one line first, and then it leaves
    with distributed.leaves_at_once(), settings_errors(), device_memory_errors(_NEEDS):
        train(cfg)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
