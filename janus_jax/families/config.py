"""Reads, checks and writes values of config.json; an error names the key and the value.

Released files omit most sizes: they name a class or model whose code has them as constants, or rely
on LlamaConfig's defaults. Both are filled in by the readers of the layouts. A setting that the
networks do not implement is refused, never ignored. Writers write every size explicitly.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

from janus_jax.checks import shorten
from janus_jax.models.llama import LlamaConfig

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

# transformers accepts these keys in any config; they change Llama's masks, cache or layers.
UNSUPPORTED_LLAMA_KEYS = (
    "sliding_window",
    "attention_chunk_size",
    "kv_sharing_modes",
    "num_kv_shared_layers",
    "per_layer_config",
)
LLAMA_DEFAULTS = {  # the defaults of transformers.LlamaConfig
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
RMS_NORM_EPS, ROPE_THETA = 1e-6, 10000.0


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


def check_objects(config: Mapping, paths: Sequence[str], null: bool) -> None:
    """Raises ValueError if the value of a key is not an object.

    paths: keys with those of their parents, such as "vision_config.params". An absent key is
      accepted. null: whether null is, too.
    """
    for path in paths:
        value = functools.reduce(lambda section, key: section.get(key, {}), path.split("."), config)
        if not (null and value is None) and not isinstance(value, Mapping):
            raise config_error(path, "an object", value)


def read_llama(section: Mapping, prefix: str) -> LlamaConfig:
    """Reads the sizes of the decoder from an object with the keys of transformers.LlamaConfig.

    Raises:
      ValueError: a value is missing or not supported.
    """
    require(section, prefix, model_type="llama", attention_bias=False, mlp_bias=False)
    require(section, prefix, tie_word_embeddings=False, is_causal=True)
    require_null(section, prefix, *UNSUPPORTED_LLAMA_KEYS)
    if section.get("hidden_act") != "swish":  # a synonym of "silu" in transformers
        require(section, prefix, hidden_act="silu")
    sizes = {key: section.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    heads = section.get("num_key_value_heads")
    if heads is None:
        heads = sizes["num_attention_heads"]
    eps = check_float("rms_norm_eps", section.get("rms_norm_eps", RMS_NORM_EPS), prefix)
    theta = _rope_theta(section, prefix)
    cfg = LlamaConfig(**sizes, num_key_value_heads=heads, rms_norm_eps=eps, rope_theta=theta)
    check_sizes(cfg)  # before head_dim divides one size by another
    if section.get("head_dim") is not None:
        require(section, prefix, head_dim=cfg.head_dim)
    layers = section.get("layer_types")
    if layers is not None and layers != ["full_attention"] * cfg.num_hidden_layers:
        raise config_error(f"{prefix}layer_types", "'full_attention' for each layer", layers)
    return cfg


def _rope_theta(section: Mapping, prefix: str) -> float:
    """Reads the rotary base like transformers 5.

    If the older key `rope_scaling` is present, `rope_parameters` is ignored.
    """
    keys = ("rope_scaling", "rope_parameters")
    for key in keys:
        if not isinstance(section.get(key, {}), (Mapping, type(None))):
            raise config_error(f"{prefix}{key}", "an object", section[key])
    key = next((key for key in keys if section.get(key)), keys[-1])
    rope = section.get(key) or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise config_error(f"{prefix}{key}.rope_type", "'default'", rope_type)
    theta = rope.get("rope_theta", section.get("rope_theta", ROPE_THETA))
    return check_float("rope_theta", theta, prefix)


def write_llama(decoder: LlamaConfig) -> dict:
    """Returns the object that read_llama reads."""
    sizes = {key: getattr(decoder, key) for key in LLAMA_DEFAULTS}
    return sizes | {
        "model_type": "llama",
        "num_key_value_heads": decoder.num_key_value_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": False,
    }


def mlp_ratio(width: int, hidden: int) -> float:
    """Returns a ratio r with int(width * r) == hidden, which is how both layouts compute it."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
