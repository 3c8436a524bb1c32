"""The command line of `train.py` and `janus-train`."""

import argparse
import contextlib
import difflib
import faulthandler
import functools
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from logging import INFO, LogRecord
from pathlib import Path

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from janus_jax import configs
from janus_jax.checks import error_text, shorten_text
from janus_jax.commands.terminal import (
    OneLineParser,
    Progress,
    device_memory_errors,
    one_line_errors,
    program_name,
)

CONFIGS = Path(configs.__file__).parent  # the folder configs/ of a clone
COMMAND = "python train.py"

_MEMORY_ADVICE = (
    "while training; reduce batch_size or raise accumulate, or see the sections on devices and "
    "memory in docs/training.md"
)


@contextlib.contextmanager
def settings_errors(name: str = "train.py") -> Iterator[None]:
    """Ends the program with one line and status 2 after an error in the flags or the config.

    name: the name of the program, which the line starts with.
    """
    with one_line_errors(name, flags.Error, FloatingPointError):
        try:
            yield
        except AttributeError as error:
            # a ConfigDict raises AttributeError with a KeyError as its argument
            if not error.args or not isinstance(error.args[0], KeyError):
                raise
            missing = str(error.args[0].args[0]).replace("\nDid you", "; did you")
            raise ValueError(f"the config has no {missing}") from error


def config_names() -> list[str]:
    """Returns the names of the configs that ship with the package."""
    return sorted(path.stem for path in CONFIGS.glob("[!_]*.py"))


def find_config(value: str) -> str:
    """Returns the value of --config with the name of a config replaced by its path.

    value: PATH, PATH:ARGUMENT, NAME or NAME:ARGUMENT. If a file has the name of a config, the
        file is used.

    Raises:
        FileNotFoundError: there is neither such a file nor such a config. ValueError: the name is
            empty.
    """
    name, colon, argument = value.partition(":")
    if not name:
        raise ValueError("--config must be the path or the name of a config, got ''")
    if Path(name).is_file():
        return value
    names = config_names()
    if name not in names:
        similar = difflib.get_close_matches(Path(name).stem, names, 1)
        hint = f"did you mean {similar[0]}? " if similar else ""
        raise FileNotFoundError(
            f"no config file at {shorten_text(name)}, and no config of that name; {hint}give the "
            f"path of a Python file, or one of: {', '.join(names)}"
        )
    return f"{CONFIGS / name}.py{colon}{argument}"


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


def _check_known(words: Sequence[str]) -> None:
    """Raises ValueError if a word is neither an override, --config.NAME=VALUE, nor its value."""
    for word in words:
        flag = word.partition("=")[0]
        if re.match("--?[A-Za-z]", word) and not re.match("--?(no)?config\\.", word):
            known = ("--config", "--dry_run", "--distributed", "--coordinator", "--num_processes")
            similar = difflib.get_close_matches(flag, (*known, "--process_id"), 1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ValueError(f"unknown flag {shorten_text(flag)}{hint}")


def parse(argv: Sequence[str], command: str = COMMAND) -> argparse.Namespace:
    """Parses the flags and loads the config, which becomes the attribute `config`.

    Args:
        argv: arguments after the command.
        command: how the user calls this program, for --help and error messages.
    """
    args, others = make_parser(command).parse_known_args(argv)
    with settings_errors(program_name(command)):
        _check_known(others)
        if args.config is None:
            raise ValueError("--config is required; run --help for the list of configs")
        args.config = _load_config(find_config(args.config), others)
    return args


def _load_config(path: str, overrides: Sequence[str]) -> ConfigDict:
    """Runs a config file and applies the arguments --config.NAME=VALUE.

    Raises:
        ValueError: an argument is wrong, an exception was raised in the config file, or it does
            not return a ConfigDict.
    """
    argv = ["", f"--config={path}", *overrides]
    values = flags.FlagValues()
    flag = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    try:
        _, *words = values(argv)
    except SyntaxError as error:
        raise ValueError(f"the config file must be Python, got {error}") from None
    except KeyError as error:  # an unknown name inside a mapping, or inside a plain value
        raise ValueError(f"the config has no such setting: {error.args[0]}") from None
    except flags.IllegalFlagValueError as error:
        # a ValueError raised in the config file comes with its whole traceback
        before, trace, _ = str(error).partition("Traceback")
        last = str(error).splitlines()[-1] if trace else ""
        raise ValueError(f"{before}{last}") from None
    except flags.Error:
        raise
    except Exception as error:
        if error.args and isinstance(error.args[0], KeyError):  # see settings_errors
            raise
        if "no attribute 'get_config'" in str(error):
            raise ValueError("the config file must define get_config()") from None
        where = traceback.extract_tb(error.__traceback__)[-1]
        kind, place = type(error).__name__, f"{where.filename}, line {where.lineno}"
        reason = f"{kind}: {error_text(error)} ({place})"
        raise ValueError(f"the config file failed: {reason}") from error
    if words:
        raise ValueError(f"arguments must be flags, got {words}")
    if not isinstance(flag.value, ConfigDict):
        got = type(flag.value).__name__
        raise ValueError(f"get_config() must return an ml_collections.ConfigDict, got {got}")
    return flag.value


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
