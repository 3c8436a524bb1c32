"""The command line of `train.py` and `janus-train`."""

import argparse
import faulthandler
import functools
import sys
import textwrap
from collections.abc import Callable, Sequence
from logging import INFO, LogRecord

from absl import flags, logging
from ml_collections import ConfigDict

from janus_jax.commands.config_flag import (
    check_overrides,
    config_names,
    load_config,
    settings_errors,
)
from janus_jax.commands.terminal import (
    OneLineParser,
    Progress,
    device_memory_errors,
    program_name,
)

COMMAND = "python train.py"

_MEMORY_ADVICE = (
    "while training; reduce batch_size or raise accumulate, or see the sections on devices and "
    "memory in docs/training.md"
)


def make_parser(command: str = COMMAND) -> OneLineParser:
    """Returns the parser of all flags except --config.NAME=VALUE. command: as the user calls it."""
    config = "configs/{}.py" if command == COMMAND else "{}"
    lora, stage3 = map(config.format, ("finetune_lora", "janus_tiny_stage3"))
    names = textwrap.fill(", ".join(config_names()), 80)
    parser = OneLineParser(
        program_name(command),
        usage=f"{command} --config=CONFIG [--config.NAME=VALUE ...] [FLAGS]",
        description="Train a Janus model: one of the stages of the Janus-Pro report, fine-tuning "
        "of all\nweights, or LoRA. See docs/training.md in the repository.",
        epilog="examples:\n"
        f"  {command} --config={stage3} --config.steps=20\n"
        f"  {command} --config={lora} --config.mixture.mine.path=data/mine.jsonl\n\n"
        f"configs:\n{textwrap.indent(names, '  ')}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = (
        "config of the run: the name of a config that ships with janus_jax, or the path of a "
        "Python file that defines get_config(). Text after a colon is passed to get_config: "
        "--config=janus_tiny_stage3:stage2. --config.NAME=VALUE overrides one setting"
    )
    add("--config", metavar="CONFIG", help=text)
    text = (
        "do not train; print parameter counts and memory, and write the first rows of data as text "
        "and images"
    )
    add("--dry_run", action="store_true", help=text)
    text = (
        "run as one of several processes whose addresses JAX detects: on Cloud TPU, Slurm, Open "
        "MPI or Kubernetes"
    )
    add("--distributed", action="store_true", help=text)
    text = "run as one of several processes on other clusters: address at which process 0 listens"
    add("--coordinator", metavar="HOST:PORT", help=text)
    text = "number of processes; requires --coordinator"
    add("--num_processes", type=int, metavar="N", help=text)
    text = "index of this process, from 0; requires --coordinator"
    add("--process_id", type=int, metavar="N", help=text)
    return parser


def parse(argv: Sequence[str], command: str = COMMAND) -> argparse.Namespace:
    """Parses the flags and loads the config, which becomes the attribute `config`.

    Args:
        argv: arguments after the command.
        command: how the user calls this program, for --help and error messages.
    """
    parser = make_parser(command)
    args, others = parser.parse_known_args(argv)
    with settings_errors(program_name(command)):
        check_overrides(others, parser.flag_names())
        args.config = load_config(args.config, others)
    return args


def _set_up_logging() -> None:
    """Prints log records of absl's logger at level INFO and above, if they are relevant."""
    flags.FLAGS.mark_as_parsed()  # absl's handler warns about its flags otherwise
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    logging.get_absl_logger().addFilter(_is_relevant)


def _is_relevant(record: LogRecord) -> bool:
    """Keeps all log records of this package, and warnings and errors of other packages.

    At level INFO, Orbax logs every file and Optax every schedule.
    """
    return record.levelno > INFO or "janus_jax" in record.pathname


def train(args: argparse.Namespace, command: str = COMMAND) -> None:
    """Runs the training that the flags describe.

    Args:
        args: what parse returned.
        command: how the user calls this program, for error messages.
    """
    with settings_errors(program_name(command)):
        task = args.config.task
        if (args.distributed or args.coordinator is not None) and task != "stage":
            raise ValueError(f"several processes need a config whose task is stage, got {task!r}")
        if args.dry_run and task != "stage":
            raise ValueError(f"--dry_run needs a config whose task is stage, got {task!r}")
        _set_up_logging()
        from janus_jax import sharding  # imported late, because JAX takes a second to import
        from janus_jax.generation.loading import enable_compile_cache
        from janus_jax.training import distributed

        enable_compile_cache()
        distributed.initialize(
            args.coordinator, args.num_processes, args.process_id, args.distributed
        )
        sharding.check_devices()
        run = _task(task, args.dry_run)
        # the inner settings_errors prints its line before exit_without_waiting ends the process
        with (
            distributed.exit_without_waiting(),
            settings_errors(program_name(command)),
            device_memory_errors(_MEMORY_ADVICE),
        ):
            run(args.config)


def _task(name: str, dry_run: bool) -> Callable[[ConfigDict], None]:
    """Returns the function that runs a task.

    Raises:
        ValueError: there is no task of this name.
    """
    from janus_jax.shapes.source import ALL_FORMATS

    if name == "vq":
        from janus_jax.shapes.train_vq import train_vq

        return train_vq
    if name == "encoder":
        from janus_jax.shapes.train_encoder import train_encoder

        return train_encoder
    if name != "stage":
        raise ValueError(f"task must be vq, encoder or stage, got {name!r}")
    if dry_run:
        from janus_jax.commands.dry_run import print_dry_run

        return functools.partial(print_dry_run, formats=ALL_FORMATS)
    from janus_jax.training.run import train_stage

    progress = functools.partial(Progress, unit="B")
    return functools.partial(train_stage, formats=ALL_FORMATS, progress=progress)


def main(argv: Sequence[str] | None = None, command: str = COMMAND) -> None:
    """Parses the flags and trains.

    Args:
        argv: arguments after the command; None means those of the process.
        command: how the user calls this program, for --help and error messages.
    """
    faulthandler.enable(sys.__stderr__)  # a crash of native code prints the Python stack
    train(parse(sys.argv[1:] if argv is None else argv, command), command)
