"""Quantised checkpoints, which are refused by the key or the tensor that says so."""

import re
from collections.abc import Mapping

from janus_jax.checks import shorten, shorten_text
from janus_jax.interop.tensors import TensorSource

# of config.json: transformers', MLX's, and that of older compressed-tensors
KEYS = ("quantization_config", "quantization", "compression_config")
SECTIONS = ("language_config", "text_config")
QUANTISED_DTYPES = ("F8_", "F6_", "F4", "U16", "U32")  # of safetensors; MLX packs bits in U32
# Names of the tensors that each method stores with, or instead of, a weight.
MARKS = {
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
ADVICE = (
    "only float32, float16 and bfloat16 weights are supported: use the checkpoint that this one "
    "was made from, such as deepseek-ai/Janus-Pro-7B, or dequantise it and save it as bfloat16"
)

GGUF = "GGUF files are not supported; use a checkpoint folder such as deepseek-ai/Janus-Pro-1B"


def check_not_quantised(config: Mapping, source: TensorSource) -> None:
    """Raises ValueError for quantised weights; a config may say so of weights that are floats."""
    named = _stated(config)
    tensor = _marked(source) or (named and _not_float(source))
    if tensor:
        why = f"{named}; {tensor}" if named else tensor
        raise ValueError(f"{source.folder} holds quantised weights ({why}); {ADVICE}")


def _stated(config: Mapping) -> str:
    sections = {"": config} | {f"{key}.": config.get(key) for key in SECTIONS}
    for where, section in sections.items():
        for key in KEYS:
            stated = section.get(key) if isinstance(section, Mapping) else None
            if stated is not None:
                method = stated.get("quant_method") if isinstance(stated, Mapping) else None
                said = "" if method is None else f" of method {shorten(method)}"
                return f"config.json has {where}{key}{said}"
    return ""


def _marked(source: TensorSource) -> str:
    for method, pattern in MARKS.items():
        for name in source.names:
            if pattern.fullmatch(name):
                return f"tensor {shorten_text(name)}, as {method} names it"
    return ""


def _not_float(source: TensorSource) -> str:
    for name in source.names:
        if source.dtype(name).kind not in "fV" and name.endswith(".weight"):
            return f"tensor {shorten_text(name)} is {source.dtype(name)}"
    return ""
