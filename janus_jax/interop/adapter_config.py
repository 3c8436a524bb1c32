"""adapter_config.json of a LoRA adapter in PEFT's format: ranks, scales and target modules.

Names and meanings are those of PEFT's LoraConfig. Settings that change what an adapter computes
and are not implemented are refused by name.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path

from janus_jax.checks import check_count, check_number, shorten, shorten_text
from janus_jax.interop.files import ADAPTER_CONFIG, CONFIG, PARAMS
from janus_jax.interop.readers import SAFETENSORS, TORCH_BIN
from janus_jax.paths import value_errors_of
from janus_jax.processing.json_files import read_json

# Initial values of the factors that leave the base weights as they are; others, such as pissa,
# olora, corda, loftq and lora_ga, subtract their first update from the base weights.
INITIAL = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_READ = (
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora bias init_lora_weights"
    " target_modules exclude_modules layers_to_transform layers_pattern"
)
# fan_in_fan_out concerns layers that PyTorch's Janus does not have: PEFT resets it for the others.
_WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config fan_in_fan_out"
    " inference_mode lora_dropout megatron_core peft_version qalora_group_size revision task_type"
)
_KNOWN = frozenset(f"{_READ} {_WITHOUT_EFFECT}".split())
_INSTEAD = "merge the adapter with PEFT (merge_and_unload) and load the merged model instead"

Names = str | tuple[str, ...]  # a regular expression, or names that end as the module's name does


@dataclasses.dataclass(frozen=True)
class Targets:
    """The modules that an adapter adapts, by name: `module in targets`, as PEFT decides it."""

    modules: Names
    excluded: Names
    layers: tuple[int, ...]
    patterns: tuple[str, ...]

    def __contains__(self, module: str) -> bool:
        if _named(self.excluded, module) or not _named(self.modules, module):
            return False
        direct = isinstance(self.modules, str) or module in self.modules
        return direct or not self.layers or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        for pattern in self.patterns or (r"[^.]*",):
            start = r"(?:^|.*?\.)" if self.patterns else r".*?\."
            if found := re.match(rf"{start}{pattern}\.(\d+)\.", module):
                return int(found[found.re.groups])  # the last group, whatever the pattern has
        return None


def _named(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """What adapter_config.json states of the update of each module."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    targets: Targets

    def rank_of(self, module: str) -> int:
        """Rank of a module's update."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """What the product of a module's two factors is multiplied by."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _by_pattern(pattern: Mapping, module: str, default):
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads a folder's adapter_config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is damaged, or states what is not supported.
    """
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        shown = shorten_text(str(folder))
        raise FileNotFoundError(
            f"the adapter {shown} is not a folder; give the one that holds {ADAPTER_CONFIG}"
        )
    if not path.is_file():
        rule = f"an adapter folder must hold {ADAPTER_CONFIG}, as PEFT writes it"
        raise FileNotFoundError(f"{rule}; {folder} holds none")
    config = read_json(path)
    with value_errors_of(path):
        _check_supported(config)
        return _parse(config)


def _check_supported(config: Mapping) -> None:
    if config.get("peft_type") != "LORA":
        got = _got(config.get("peft_type"))
        raise ValueError(f"peft_type must be 'LORA', {got}: {_INSTEAD}")
    wrong = [key for key, value in config.items() if key not in _KNOWN and value]
    if config.get("bias", "none") != "none":
        wrong.append("bias")
    initial = config.get("init_lora_weights", True)
    if initial not in INITIAL:
        wrong.append("init_lora_weights")
    if wrong:
        stated = ", ".join(f"{shorten(key)} = {shorten(config[key])}" for key in wrong[:3])
        raise ValueError(f"{stated} is not supported: {_INSTEAD}")


def _parse(config: Mapping) -> AdapterConfig:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    check_count("r", rank)
    check_number("lora_alpha", alpha)
    patterns = {}
    for name, check in (("rank_pattern", check_count), ("alpha_pattern", check_number)):
        patterns[name] = _object(config, name)
        for key, value in patterns[name].items():
            _check_regex(name, f"({key})")
            check(f"{name} of {shorten(key)}", value)
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise ValueError(f"use_rslora must be true or false, got {shorten(rslora)}")
    return AdapterConfig(rank, alpha, **patterns, rslora=rslora, targets=_targets(config))


def _targets(config: Mapping) -> Targets:
    modules, excluded = (_names(config, f"{kind}_modules") for kind in ("target", "exclude"))
    if not modules:
        raise ValueError("target_modules must name the adapted modules, got none")
    layers = config.get("layers_to_transform")
    layers = [] if layers is None else layers if isinstance(layers, list) else [layers]
    if not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers_to_transform must be integers, got {shorten(layers)}")
    patterns = _names(config, "layers_pattern")
    patterns = (patterns,) if isinstance(patterns, str) and patterns else tuple(patterns)
    for pattern in patterns:
        _check_regex("layers_pattern", f"({pattern})")
    return Targets(modules, excluded, tuple(layers), patterns)


def _names(config: Mapping, key: str) -> Names:
    value = config.get(key) or ()
    if isinstance(value, str):
        _check_regex(key, value)
        return value
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} must be a list of names or a regular expression, {_got(value)}")
    return tuple(value)


def _object(config: Mapping, key: str) -> Mapping:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, {_got(value)}")
    return value


def _check_regex(key: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{key} must hold regular expressions, {_got(text)}: {error}") from None


def _got(value) -> str:
    return f"got {shorten(value)}"


def check_no_adapter(folder: Path) -> None:
    """Raises ValueError where a folder that is given as a model is an adapter."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() or ((folder / CONFIG).is_file() and _has_weights(folder)):
        return
    base = read_json(path).get("base_model_name_or_path")
    base = f" ({shorten(base)})" if base else ""
    shown = str(folder)  # whole: it is part of a command to copy
    raise ValueError(
        f"{shown} is a LoRA adapter ({ADAPTER_CONFIG}), not a model: use it with the model it was "
        f"trained on{base}, --model BASE --adapter {shown}, or merge it first, python -m convert "
        f"BASE DST --adapter {shown}"
    )


def check_adapter_beside(folder: Path, adapter: Path | None) -> None:
    """Raises ValueError where an adapter lies beside full weights and is not the one to merge.

    adapter: the folder of the one to merge, which may be the model's own.
    """
    path = folder / ADAPTER_CONFIG
    # as a link, too, that leads to a missing file
    if not os.path.lexists(path) or (adapter is not None and _same(adapter, folder)):
        return
    shown = str(folder)  # whole: it is part of a command to copy
    raise ValueError(
        f"{path} lies beside full weights: pass --adapter {shown} to sample.py "
        "or python -m convert to merge that adapter into them, or remove the file if it is merged "
        "already"
    )


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _has_weights(folder: Path) -> bool:
    ends = ("", ".index.json")
    files = [f"{name}{end}" for name in (SAFETENSORS, TORCH_BIN) for end in ends]
    return any((folder / name).exists() for name in (*files, PARAMS))
