"""What a value of config.json must be; refused by its key, and before it costs time or memory."""

import dataclasses
from collections.abc import Mapping

from janus_jax.checks import shorten

# Largest sizes that are accepted, several times those of any Janus. A larger one means a damaged
# file, which must be refused before it costs minutes and gigabytes.
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
MOST_LEVELS = 7  # of the VQ model: each halves the resolution
# Beyond these, a value vanishes or overflows in float32, or leaves nothing of what it is added to.
RANGES = {"rms_norm_eps": (1e-12, 1.0), "rope_theta": (1.0, 1e12), "mlp_ratio": (1e-6, 1e6)}


def refusal(where: str, wanted: str, value) -> ValueError:
    """The error for a value of config.json; where: its key, with the keys it is in."""
    return ValueError(f"config.json: {where} must be {wanted}, got {shorten(value)}")


def get(section: Mapping, key: str, where: str):
    """A value that has no default."""
    if key not in section:
        raise ValueError(f"config.json: {where}.{key} is missing")
    return section[key]


def require(section: Mapping, where: str, **wanted) -> None:
    """Refuses a stated value that the networks do not implement; absent means the only one."""
    for key, value in wanted.items():
        if section.get(key, value) != value:
            raise refusal(f"{where}{key}", repr(value), section[key])


def require_null(section: Mapping, where: str, *keys: str) -> None:
    """Refuses keys that change the network and have a value."""
    for key in keys:
        if section.get(key) is not None:
            raise refusal(f"{where}{key}", "null or absent", section[key])


def real(name: str, value, where: str) -> float:
    """A real number in its range (RANGES), as a float; JSON may have it as an integer."""
    low, high = RANGES[name]
    if type(value) not in (int, float) or not low <= value <= high:  # an int of any length, too
        raise refusal(f"{where}{name}", f"a number from {low:g} to {high:g}", value)
    return float(value)


def size(name: str, value, where: str, largest: int = LARGEST_SIZE) -> int:
    """An integer from 1 to `largest`."""
    if type(value) is not int or not 0 < value <= largest:
        raise refusal(f"{where}{name}", f"an integer from 1 to {largest}", value)
    return value


def check_sizes(cfg) -> None:
    """Every size of a model config and of those in it; select_layer is counted from the end."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        name = f"{field.name} of {type(cfg).__name__}"
        largest = LARGEST_SIZES.get(field.name, LARGEST_SIZE)
        if dataclasses.is_dataclass(value):
            check_sizes(value)
        elif field.type is int and field.name != "select_layer":
            size(name, value, "", largest)
        elif field.type == tuple[int, ...]:
            if not 0 < len(value) <= MOST_LEVELS:
                raise refusal(name, f"1 to {MOST_LEVELS} integers", value)
            for each in value:
                size(name, each, "", largest)


def mlp_dim(width, ratio, where: str) -> int:
    """Hidden width of SigLIP's MLP, as both layouts compute it."""
    return int(size("width", width, where) * real("mlp_ratio", ratio, where))


def multipliers(name: str, value, where: str) -> tuple:
    """A list of the VQ model's channel multipliers."""
    if not isinstance(value, (list, tuple)):
        raise refusal(f"{where}{name}", "a list of integers", value)
    return tuple(value)
