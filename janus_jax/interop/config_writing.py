"""Converts a JanusConfig to config.json, in DeepSeek's layout or that of `transformers`.

The inverse of `config.py`; every size is written explicitly.
"""

import math
from collections.abc import Mapping

from janus_jax.interop.config import (
    CLASSES,
    DEEPSEEK,
    LLAMA_DEFAULTS,
    SIGLIP,
    SIGLIP_NAME,
    layout_of,
)
from janus_jax.models.janus import JanusConfig
from janus_jax.models.llama import LlamaConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig


def write_config(
    cfg: JanusConfig, source: Mapping | None, layout: str, image_token_id: int | None = None
) -> dict:
    """Returns the contents of a config.json in the given layout.

    Args:
      cfg: the model's sizes.
      source: contents of the original config.json, or None; returned unchanged if it already has
        the layout.
      layout: DEEPSEEK or TRANSFORMERS.
      image_token_id: id of `<image_placeholder>`; only the `transformers` layout needs it.

    Raises:
      ValueError: the layout cannot express this model.
    """
    if source is not None and layout_of(source) == layout:
        return dict(source)
    dtype = _source_dtype(source)
    if layout == DEEPSEEK:
        return _write_deepseek(cfg, dtype)
    _check_transformers(cfg)
    if image_token_id is None:
        raise ValueError(
            "the transformers layout needs the token <image_placeholder> in tokenizer.json"
        )
    return _write_transformers(cfg, dtype, image_token_id)


def _source_dtype(source: Mapping | None) -> str:
    source = source or {}
    decoder = source.get("text_config") or source.get("language_config") or {}
    for section in (source, decoder):
        for key in ("torch_dtype", "dtype"):
            if isinstance(section.get(key), str):
                return section[key]
    return "bfloat16"


def _ratio(width: int, mlp_dim: int) -> float:
    """Returns a ratio r with int(width * r) == mlp_dim, which is how both layouts compute it."""
    ratio = mlp_dim / width
    return ratio if int(width * ratio) == mlp_dim else math.nextafter(ratio, math.inf)


def _write_llama(decoder: LlamaConfig) -> dict:
    sizes = {key: getattr(decoder, key) for key in LLAMA_DEFAULTS}
    return sizes | {
        "model_type": "llama",
        "num_key_value_heads": decoder.num_key_value_heads,
        "rms_norm_eps": decoder.rms_norm_eps,
        "rope_theta": decoder.rope_theta,
        "tie_word_embeddings": False,
    }


def _write_deepseek_vision(vision: SiglipConfig) -> dict:
    released = vision == SIGLIP
    name = SIGLIP_NAME if released else f"siglip_patch{vision.patch_size}_{vision.image_size}"
    return {
        "image_size": vision.image_size,
        "model_name": name,
        "select_feature": "same",
        "select_layer": vision.select_layer,
        "width": vision.width,
        "layers": vision.num_layers,
        "heads": vision.num_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": _ratio(vision.width, vision.mlp_dim),
    }


def _write_deepseek_vq(vq: VQConfig) -> dict:
    return {
        "image_token_size": vq.codebook_size,
        "n_embed": vq.codebook_dim,
        "ch": vq.ch,
        "ch_mult": list(vq.ch_mult),
        "num_res_blocks": vq.num_res_blocks,
        "z_channels": vq.z_channels,
        "norm_num_groups": vq.norm_num_groups,
    }


def _write_deepseek(cfg: JanusConfig, dtype: str) -> dict:
    vision, vq, width = cfg.und_encoder, cfg.gen_vq, cfg.language_model.hidden_size
    aligner = {"n_embed": width, "projector_type": "mlp_gelu"}
    und = aligner | {"depth": cfg.und_aligner_depth, "input_dim": vision.width}
    gen = aligner | {"depth": cfg.gen_aligner_depth, "input_dim": vq.codebook_dim}
    head = {
        "image_token_embed": cfg.gen_head_width,
        "image_token_size": vq.codebook_size,
        "n_embed": width,
    }
    return {
        "architectures": ["MultiModalityCausalLM"],
        "model_type": "multi_modality",
        "torch_dtype": dtype,
        "vision_config": _section("vision", _write_deepseek_vision(vision)),
        "aligner_config": _section("aligner", und),
        "gen_vision_config": _section("gen_vision", _write_deepseek_vq(vq)),
        "gen_aligner_config": _section("gen_aligner", gen),
        "gen_head_config": _section("gen_head", head),
        "language_config": _write_llama(cfg.language_model) | {"torch_dtype": dtype},
    }


def _section(kind: str, params: dict) -> dict:
    return {"cls": CLASSES[f"{kind}_config"], "model_type": kind, "params": params}


def _check_transformers(cfg: JanusConfig) -> None:
    """Raises ValueError if JanusForConditionalGeneration cannot represent the model."""
    vision, vq, width = cfg.und_encoder, cfg.gen_vq, cfg.language_model.hidden_size
    constraints = (
        ("norm_num_groups of the VQ model", vq.norm_num_groups, 32),
        ("the width of gen_head (the decoder's hidden size)", cfg.gen_head_width, width),
        ("select_layer (the last vision layer)", vision.select_layer, -1),
        ("the vision patch_size (pixels of an image token)", vision.patch_size, vq.downsample),
    )
    for what, value, expected in constraints:
        if value != expected:
            raise ValueError(
                f"the transformers layout cannot express this model: {what} must be {expected}, "
                f"got {value}"
            )


def _write_transformers(cfg: JanusConfig, dtype: str, image_token_id: int) -> dict:
    vision, vq, width = cfg.und_encoder, cfg.gen_vq, cfg.language_model.hidden_size
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "torch_dtype": dtype,
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        "text_config": _write_llama(cfg.language_model),
        "vision_config": {
            "model_type": "janus_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "num_image_tokens": vision.num_tokens,
            "mlp_ratio": _ratio(vision.width, vision.mlp_dim),
            "depth": cfg.und_aligner_depth,
            "projection_dim": width,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "num_embeddings": vq.codebook_size,
            "embed_dim": vq.codebook_dim,
            "base_channels": vq.ch,
            "channel_multiplier": list(vq.ch_mult),
            "num_res_blocks": vq.num_res_blocks,
            "latent_channels": vq.z_channels,
            "num_hidden_layers": cfg.gen_aligner_depth,
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
    }
