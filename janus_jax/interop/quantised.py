"""Detects quantized checkpoints and raises an error that names the key or tensor found."""

import re
from collections.abc import Mapping

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop.tensors import TensorSource

# Keys of config.json: transformers, MLX, older versions of compressed-tensors.
KEYS = ("quantization_config", "quantization", "compression_config")
SECTIONS = ("language_config", "text_config")
QUANTISED_DTYPES = ("F8_", "F6_", "F4", "U16", "U32")  # of safetensors; MLX packs bits in U32
# Names of the tensors that each method stores in addition to a weight, or instead of it.
TENSOR_NAMES = {
    "bitsandbytes, 4 bits": re.compile(
        r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
    ),
    "bitsandbytes, 8 bits": re.compile(r".*\.(SCB|weight_format)"),
    "GPTQ or AWQ": re.compile(r".*\.(qweight|qzeros|g_idx)"),
    "fp8 or compressed-tensors": re.compile(
        r".*\.(weight_scale|weight_scale_inv|weight_packed|weight_zero_point|input_scale)"
    ),
    "MLX": re.compile(r".*\.(scales|biases)"),
}
FLOAT_WEIGHTS_ONLY = (
    "only float32, float16 and bfloat16 weights are supported: use the original checkpoint, such "
    "as deepseek-ai/Janus-Pro-7B, or dequantize this one and save it as bfloat16"
)

GGUF_UNSUPPORTED = (
    "GGUF files are not supported; use a checkpoint folder such as deepseek-ai/Janus-Pro-1B"
)


def check_not_quantised(config: Mapping, source: TensorSource) -> None:
    """Raises ValueError if the weights are quantized.

    A quantization key in config.json alone is not an error: the weights may be plain floats.
    """
    key = _quantization_key(config)
    tensor = _quantized_name(source) or (key and _non_float_weight(source))
    if tensor:
        reason = f"{key}; {tensor}" if key else tensor
        raise ValueError(
            f"{source.folder} holds quantized weights ({reason}); {FLOAT_WEIGHTS_ONLY}"
        )


def _quantization_key(config: Mapping) -> str:
    """Describes the first quantization key in config.json; '' if there is none."""
    sections = {"": config} | {f"{key}.": config.get(key) for key in SECTIONS}
    for prefix, section in sections.items():
        for key in KEYS:
            value = section.get(key) if isinstance(section, Mapping) else None
            if value is not None:
                method = value.get("quant_method") if isinstance(value, Mapping) else None
                suffix = "" if method is None else f" with quant_method {shorten(method)}"
                return f"config.json has {prefix}{key}{suffix}"
    return ""


def _quantized_name(source: TensorSource) -> str:
    """Describes the first tensor that has a name of a quantization method; '' if none has."""
    for method, pattern in TENSOR_NAMES.items():
        for name in source.names:
            if pattern.fullmatch(name):
                return f"tensor {shorten_text(name)} is a tensor of {method}"
    return ""


def _non_float_weight(source: TensorSource) -> str:
    """Describes the first weight that is not floating point; '' if there is none."""
    for name in source.names:
        if source.dtype(name).kind not in "fV" and name.endswith(".weight"):
            return f"tensor {shorten_text(name)} is {source.dtype(name)}"
    return ""
