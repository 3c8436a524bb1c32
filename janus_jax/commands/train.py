"""The command line of `train.py` and `janus-train`."""

import contextlib
import difflib
import functools
import re
import textwrap
import traceback
from collections.abc import Iterator, Sequence
from logging import INFO, LogRecord
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from janus_jax import configs
from janus_jax.checks import error_text, shorten_text
from janus_jax.commands.flags import device_memory_errors, one_line_errors, program_name
from janus_jax.commands.progress import Progress

CONFIGS = Path(configs.__file__).parent  # the folder configs/ of a clone
COMMAND = "python train.py"

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Config of the run: the name of a config that ships with janus_jax, or the path of a Python "
    "file that defines get_config(). Text after a colon is passed to get_config: "
    "--config=janus_tiny_stage3:stage2. --config.NAME=VALUE overrides one setting.",
    lock_config=True,
)
_DRY_RUN = flags.DEFINE_bool(
    "dry_run",
    False,
    "Do not train; print parameter counts and memory, and write the first rows of data as text "
    "and images.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Run as one of several processes whose addresses JAX detects: on Cloud TPU, Slurm, Open MPI or "
    "Kubernetes.",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "Run as one of several processes on other clusters: HOST:PORT at which process 0 listens.",
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Number of processes; requires --coordinator."
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Index of this process, from 0; requires --coordinator."
)
flags.mark_flag_as_required("config")

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
            name = str(error.args[0].args[0]).replace("\nDid you", "; did you")
            raise ValueError(f"the config has no {name}") from error


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


def _with_config_paths(argv: Sequence[str]) -> list[str]:
    """Replaces the values of --config, as `--config=VALUE` or as two words, by find_config."""
    words = list(argv)
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in ("-config", "--config"):
            continue
        if equals:
            words[number] = f"{flag}={find_config(value)}"
        elif not equals and number + 1 < len(words):
            words[number + 1] = find_config(words[number + 1])
    return words


def _is_relevant(record: LogRecord) -> bool:
    """Keeps all log records of this package, and warnings and errors of other packages.

    At level INFO, Orbax logs every file and Optax every schedule.
    """
    return record.levelno > INFO or "janus_jax" in record.pathname


def help_text(command: str = COMMAND) -> str:
    """Returns what --help prints. command: how the user calls this program."""
    config = "configs/{}.py" if command == COMMAND else "{}"
    lora, stage3 = map(config.format, ("finetune_lora", "janus_tiny_stage3"))
    flag_lines = flags.FLAGS.module_help(__name__).strip().splitlines()[1:]
    names = textwrap.wrap(
        ", ".join(config_names()), 80, initial_indent="  ", subsequent_indent="  "
    )
    return "\n".join(
        [
            f"usage: {command} --config=CONFIG [--config.NAME=VALUE ...] [FLAGS]",
            "",
            "Train a Janus model: one of the stages of the Janus-Pro report, fine-tuning of all",
            "weights, or LoRA. See docs/training.md in the repository.",
            "",
            "examples:",
            f"  {command} --config={stage3} --config.steps=20",
            f"  {command} --config={lora} --config.mixture.mine.path=data/mine.jsonl",
            "",
            "flags:",
            *flag_lines,
            "",
            "configs:",
            *names,
        ]
    )


def parse(argv: Sequence[str], command: str = COMMAND) -> list[str]:
    """Parses the flags and loads the config; returns the words that are not flags.

    Args:
        argv: the name of the program and its arguments.
        command: how the user calls this program, for --help and error messages.
    """
    if any(re.fullmatch("-h|--?(help|helpshort)", word) for word in argv[1:]):
        print(help_text(command))
        raise SystemExit(0)
    with settings_errors(program_name(command)):
        words = _parse_flags(_with_config_paths(argv))
        if not isinstance(_CONFIG.value, ConfigDict):
            got = type(_CONFIG.value).__name__
            raise ValueError(f"get_config() must return an ml_collections.ConfigDict, got {got}")
        return words


def _parse_flags(argv: Sequence[str]) -> list[str]:
    """Parses the flags and runs the config file.

    Raises:
        ValueError: a flag is wrong, or an exception was raised in the config file.
    """
    try:
        return flags.FLAGS(argv)
    except SyntaxError as error:
        raise ValueError(f"the config file must be Python, got {error}") from None
    except KeyError as error:  # an unknown name inside a mapping, or inside a plain value
        raise ValueError(f"the config has no such setting: {error.args[0]}") from None
    except flags.IllegalFlagValueError as error:
        if str(error).startswith("flag --config=None"):
            raise ValueError("--config is required; run --help for the list of configs") from None
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


def train(argv: Sequence[str], command: str = COMMAND) -> None:
    """Runs the training that the parsed flags describe.

    Args:
        argv: the name of the program, and the words that are not flags (none are allowed).
        command: how the user calls this program, for error messages.
    """
    with settings_errors(program_name(command)):
        if len(argv) > 1:
            raise ValueError(f"arguments must be flags, got {argv[1:]}")
        logging.set_verbosity(logging.INFO)
        logging.get_absl_logger().addFilter(_is_relevant)
        cfg, multiprocess = _CONFIG.value, _DISTRIBUTED.value or _COORDINATOR.value is not None
        if multiprocess and cfg.task != "stage":
            raise ValueError(
                f"several processes need a config whose task is stage, got {cfg.task!r}"
            )
        if _DRY_RUN.value and cfg.task != "stage":
            raise ValueError(f"--dry_run needs a config whose task is stage, got {cfg.task!r}")
        from janus_jax import sharding  # imported late, because JAX takes a second to import
        from janus_jax.generation import compile_cache
        from janus_jax.shapes.source import ALL_FORMATS
        from janus_jax.training import distributed

        compile_cache.enable()
        distributed.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _DISTRIBUTED.value
        )
        sharding.check_devices()
        if cfg.task == "vq":
            from janus_jax.shapes.train_vq import train_vq as run
        elif cfg.task == "encoder":
            from janus_jax.shapes.train_encoder import train_encoder as run
        elif _DRY_RUN.value:
            from janus_jax.commands.dry_run import print_dry_run

            run = functools.partial(print_dry_run, formats=ALL_FORMATS)
        elif cfg.task == "stage":
            from janus_jax.training.run import train_stage

            run = functools.partial(train_stage, formats=ALL_FORMATS, progress=_progress)
        else:
            raise ValueError(f"task must be vq, encoder or stage, got {cfg.task!r}")
        # the inner settings_errors prints its line before exit_without_waiting ends the process
        with (
            distributed.exit_without_waiting(),
            settings_errors(program_name(command)),
            device_memory_errors(_MEMORY_ADVICE),
        ):
            run(cfg)


def _progress(description: str) -> Progress:
    """Returns a bar for the bytes of a task."""
    return Progress(description, "B")


def main(command: str = COMMAND) -> None:
    """Parses the flags of the process and trains. command: how the user calls this program."""
    app.run(
        functools.partial(train, command=command),
        flags_parser=functools.partial(parse, command=command),
    )
