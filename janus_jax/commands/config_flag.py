"""The flags --config and --config.NAME=VALUE: finds a config, runs it and changes settings."""

import contextlib
import difflib
import re
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from janus_jax import configs
from janus_jax.checks import error_text, shorten_text
from janus_jax.commands.terminal import one_line_errors

CONFIGS = Path(configs.__file__).parent  # the folder configs/ of a clone


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


def load_config(value: str | None, overrides: Sequence[str]) -> ConfigDict:
    """Runs a config file and applies the arguments --config.NAME=VALUE.

    Args:
        value: the value of --config, see find_config; None if it is missing.
        overrides: the arguments --config.NAME=VALUE, see check_overrides.
    Raises:
        FileNotFoundError: there is no such config.
        ValueError: --config is missing, an argument is wrong, an exception was raised in
            the config file, or it does not return a ConfigDict.
    """
    if value is None:
        rule = "--config is required, the path of a Python file or the name of a config"
        raise ValueError(f"{rule} ({', '.join(config_names())}); see --help")
    argv = ["", f"--config={find_config(value)}", *overrides]
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


def check_overrides(words: Sequence[str], flags_of_command: Sequence[str]) -> None:
    """Raises ValueError if a word is neither an override, --config.NAME=VALUE, nor its value.

    words: the arguments that the parser of the command does not know. flags_of_command: the flags
        that it knows, for a hint about a misspelled one.
    """
    for word in words:
        flag = word.partition("=")[0]
        if re.match("--?[A-Za-z]", word) and not re.match("--?(no)?config\\.", word):
            similar = difflib.get_close_matches(flag, flags_of_command, 1, cutoff=0.7)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise ValueError(f"unknown flag {shorten_text(flag)}{hint}")
