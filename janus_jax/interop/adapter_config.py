"""Reads adapter_config.json of a LoRA adapter in PEFT's format: ranks, scales and target modules.

Keys have the names and meanings of PEFT's LoraConfig. A setting that changes the result of an
adapter and is not implemented raises an error with its name.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from janus_jax.checks import check_count, check_number, shorten, shorten_text
from janus_jax.interop.files import ADAPTER_CONFIG
from janus_jax.paths import read_json, value_errors_of

# Initializations that do not change the base weights. Others, such as pissa, olora, corda, loftq
# and lora_ga, subtract the initial update from the base weights.
SUPPORTED_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_SUPPORTED = (
    "peft_type r lora_alpha rank_pattern alpha_pattern use_rslora bias init_lora_weights"
    " target_modules exclude_modules layers_to_transform layers_pattern"
)
# fan_in_fan_out affects only layer types that the PyTorch model does not have; for others PEFT
# resets it.
_WITHOUT_EFFECT = (
    "auto_mapping base_model_name_or_path ensure_weight_tying eva_config fan_in_fan_out"
    " inference_mode lora_dropout megatron_core peft_version qalora_group_size revision task_type"
)
_KNOWN = frozenset(f"{_SUPPORTED} {_WITHOUT_EFFECT}".split())
_MERGE_HINT = "merge the adapter with PEFT (merge_and_unload) and load the merged model instead"

# A regular expression for the whole module name, or a list of names or suffixes ("q_proj").
Names = str | tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Targets:
    """The modules that an adapter updates; `module in targets` follows PEFT's rules.

    modules, excluded: target_modules and exclude_modules. layers: layers_to_transform; empty means
    all. patterns: layers_pattern.
    """

    modules: Names
    excluded: Names
    layers: tuple[int, ...]
    patterns: tuple[str, ...]

    def __contains__(self, module: str) -> bool:
        if _matches(self.excluded, module) or not _matches(self.modules, module):
            return False
        exact = isinstance(self.modules, str) or module in self.modules
        return exact or not self.layers or self._layer(module) in self.layers

    def _layer(self, module: str) -> int | None:
        """Returns the layer index in a module name, or None if it has none."""
        for pattern in self.patterns or (r"[^.]*",):
            start = r"(?:^|.*?\.)" if self.patterns else r".*?\."
            if match := re.match(rf"{start}{pattern}\.(\d+)\.", module):
                return int(match[match.re.groups])  # the last group; the pattern may have others
        return None


def _matches(names: Names, module: str) -> bool:
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The settings in adapter_config.json that determine the update of each module."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    targets: Targets

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module's update."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the factor by which the product B A of a module is multiplied."""
        rank = self.rank_of(module)
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def _by_pattern(patterns: Mapping, module: str, default):
    """Returns the value of the first pattern that matches the module, or the default."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_adapter_config(folder: Path) -> AdapterConfig:
    """Reads a folder's adapter_config.json.

    Raises:
      FileNotFoundError: the folder or the file is missing.
      ValueError: the file is damaged, or has a setting that is not supported.
    """
    path = folder / ADAPTER_CONFIG
    if not folder.is_dir():
        name = shorten_text(str(folder))
        raise FileNotFoundError(
            f"the LoRA adapter {name} is not a folder; pass the folder that holds {ADAPTER_CONFIG}"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"the LoRA adapter folder {folder} must hold {ADAPTER_CONFIG}, as written by PEFT"
        )
    config = read_json(path)
    with value_errors_of(path):
        _check_supported(config)
        return _parse(config)


def _check_supported(config: Mapping) -> None:
    """Raises ValueError for settings that are not implemented."""
    if config.get("peft_type") != "LORA":
        peft_type = shorten(config.get("peft_type"))
        raise ValueError(f"peft_type must be 'LORA', got {peft_type}; {_MERGE_HINT}")
    unsupported = [key for key, value in config.items() if key not in _KNOWN and value]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if config.get("init_lora_weights", True) not in SUPPORTED_INITS:
        unsupported.append("init_lora_weights")
    if unsupported:
        settings = ", ".join(f"{shorten(key)} = {shorten(config[key])}" for key in unsupported[:3])
        raise ValueError(f"{settings} is not supported; {_MERGE_HINT}")


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
        raise ValueError("target_modules must name at least one module, got none")
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
        raise ValueError(
            f"{key} must be a list of names or a regular expression, got {shorten(value)}"
        )
    return tuple(value)


def _object(config: Mapping, key: str) -> Mapping:
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, got {shorten(value)}")
    return value


def _check_regex(key: str, text: str) -> None:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{key} must be a valid regular expression, got {shorten(text)}: {error}"
        ) from None
