"""Checks values of config.json before they are used; an error names the key and the value."""

import dataclasses
from collections.abc import Mapping

from janus_jax.checks import shorten

# The largest sizes accepted, several times those of any Janus model. A larger size means that the
# file is damaged, and would take minutes and gigabytes to detect later.
LARGEST_SIZE = 2**17
LARGEST_SIZES = {
    "num_layers": 512,
    "num_hidden_layers": 512,
    "num_res_blocks": 6,
    "und_aligner_depth": 16,
    "gen_aligner_depth": 16,
    "image_size": 4096,
    "ch_mult": 64,
    "intermediate_size": 2**20,
    "mlp_dim": 2**20,
    "vocab_size": 2**22,
    "codebook_size": 2**22,
    "max_position_embeddings": 2**31 - 1,
}
MAX_LEVELS = 7  # levels of the VQ model; each halves the resolution
# Outside these ranges, a value vanishes or overflows in float32, or absorbs what it is added to.
RANGES = {"rms_norm_eps": (1e-12, 1.0), "rope_theta": (1.0, 1e12), "mlp_ratio": (1e-6, 1e6)}


def config_error(key: str, expected: str, value) -> ValueError:
    """Returns the error for a value of config.json. key: with the keys of its parent objects."""
    return ValueError(f"config.json: {key} must be {expected}, got {shorten(value)}")


def get_required(section: Mapping, key: str, prefix: str):
    """Returns the value of a key that has no default.

    prefix: here and below, the keys of the parent objects, such as "vision_config.params.".
    """
    if key not in section:
        raise ValueError(f"config.json: {prefix}{key} is missing")
    return section[key]


def require(section: Mapping, prefix: str, **supported) -> None:
    """Raises ValueError for a value other than the supported one; an absent key is accepted."""
    for key, value in supported.items():
        if section.get(key, value) != value:
            raise config_error(f"{prefix}{key}", repr(value), section[key])


def require_null(section: Mapping, prefix: str, *keys: str) -> None:
    """Raises ValueError if an unsupported key, which would change the network, has a value."""
    for key in keys:
        if section.get(key) is not None:
            raise config_error(f"{prefix}{key}", "null or absent", section[key])


def check_float(name: str, value, prefix: str) -> float:
    """Returns a number as a float after checking its range (RANGES); accepts JSON integers."""
    low, high = RANGES[name]
    if type(value) not in (int, float) or not low <= value <= high:  # an int may have any length
        raise config_error(f"{prefix}{name}", f"a number from {low:g} to {high:g}", value)
    return float(value)


def check_size(name: str, value, prefix: str, largest: int = LARGEST_SIZE) -> int:
    """Returns the value if it is an integer from 1 to `largest`."""
    if type(value) is not int or not 0 < value <= largest:
        raise config_error(f"{prefix}{name}", f"an integer from 1 to {largest}", value)
    return value


def check_sizes(cfg) -> None:
    """Checks all sizes of a model config and its nested configs.

    select_layer is not a size: it is negative.
    """
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        name = f"{field.name} of {type(cfg).__name__}"
        largest = LARGEST_SIZES.get(field.name, LARGEST_SIZE)
        if dataclasses.is_dataclass(value):
            check_sizes(value)
        elif field.type is int and field.name != "select_layer":
            check_size(name, value, "", largest)
        elif field.type == tuple[int, ...]:
            if not 0 < len(value) <= MAX_LEVELS:
                raise config_error(name, f"1 to {MAX_LEVELS} integers", value)
            for each in value:
                check_size(name, each, "", largest)


def mlp_dim(width, ratio, prefix: str) -> int:
    """Returns the hidden width of SigLIP's MLP, as both layouts compute it."""
    return int(check_size("width", width, prefix) * check_float("mlp_ratio", ratio, prefix))


def check_multipliers(name: str, value, prefix: str) -> tuple:
    """Returns the VQ model's channel multipliers as a tuple if they are a list."""
    if not isinstance(value, (list, tuple)):
        raise config_error(f"{prefix}{name}", "a list of integers", value)
    return tuple(value)
