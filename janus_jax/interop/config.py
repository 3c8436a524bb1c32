"""Converts config.json, in DeepSeek's layout or that of `transformers`, to a JanusConfig.

Released files omit most sizes: they name a class or model whose code has them as constants, or rely
on LlamaConfig's defaults. Both are filled in here. A setting that the networks do not implement is
refused, never ignored. The inverse is `config_writing.py`.
"""

import functools
from collections.abc import Mapping

from janus_jax.interop.config_values import (
    check_float,
    check_multipliers,
    check_size,
    check_sizes,
    config_error,
    get_required,
    mlp_dim,
    require,
    require_null,
)
from janus_jax.models.janus import JanusConfig
from janus_jax.models.llama import LlamaConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig

DEEPSEEK, TRANSFORMERS = "deepseek", "transformers"
FLOW_KEYS = ("vision_gen_enc_config", "vision_gen_dec_config", "vision_und_enc_config")
GEN_KEYS = ("gen_vision_config", "gen_aligner_config", "gen_head_config")
# DeepSeek's config.json has one object per component, with a class name (`cls`) and `params`.
CLASSES = {
    "vision_config": "CLIPVisionTower",
    "aligner_config": "MlpProjector",
    "gen_vision_config": "VQ-16",
    "gen_aligner_config": "MlpProjector",
    "gen_head_config": "vision_head",
}
OBJECT_KEYS = {  # keys of config.json that must be objects
    DEEPSEEK: ("language_config", *CLASSES, *(f"{part}.params" for part in CLASSES)),
    TRANSFORMERS: ("text_config", "vision_config", "vq_config"),
}
SIGLIP, VQ16 = SiglipConfig.siglip_large_patch16_384(), VQConfig.vq_16()
SIGLIP_NAME = "siglip_large_patch16_384"
# Keys of SigLIP's sizes, which the original code derives from the model name.
SIGLIP_SIZES = {
    "width": SIGLIP.width,
    "layers": SIGLIP.num_layers,
    "heads": SIGLIP.num_heads,
    "patch_size": SIGLIP.patch_size,
    "mlp_ratio": SIGLIP.mlp_dim / SIGLIP.width,
}
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


def layout_of(config: Mapping) -> str:
    """Returns the layout of a config.json, DEEPSEEK or TRANSFORMERS, from its model_type.

    Raises:
      ValueError: the config is that of JanusFlow, DeepSeek-VL or another model.
    """
    flow = [key for key in FLOW_KEYS if key in config]
    if flow:
        raise ValueError(
            f"config.json is of a JanusFlow model (it has {flow[0]}); only Janus models are "
            "supported"
        )
    model_type = config.get("model_type")
    layouts = {"multi_modality": DEEPSEEK, "janus": TRANSFORMERS}
    if not isinstance(model_type, str) or model_type not in layouts:
        raise config_error("model_type", "'multi_modality' or 'janus'", model_type)
    if model_type == "multi_modality" and not any(key in config for key in GEN_KEYS):
        raise ValueError(
            f"config.json is of a DeepSeek-VL model (it has no {GEN_KEYS[0]}), which cannot "
            "generate images; only Janus models are supported"
        )
    return layouts[model_type]


def read_config(config: Mapping) -> JanusConfig:
    """Reads a model's sizes from the contents of a config.json.

    The dtype fields of the result keep their default, float32.

    Raises:
      ValueError: the config is that of another model, or a value is missing or not supported.
    """
    layout = layout_of(config)
    read = {DEEPSEEK: _read_deepseek, TRANSFORMERS: _read_transformers}[layout]
    _check_objects(config, layout)
    try:
        cfg = read(config)
        check_sizes(cfg)
        _check_divisibility(cfg)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json has a value of a wrong type: {error}") from None
    return cfg


def _check_objects(config: Mapping, layout: str) -> None:
    for path in OBJECT_KEYS[layout]:
        value = functools.reduce(lambda section, key: section.get(key, {}), path.split("."), config)
        null = layout == TRANSFORMERS and value is None  # transformers then uses its defaults
        if not null and not isinstance(value, Mapping):
            raise config_error(path, "an object", value)


def _check_divisibility(cfg: JanusConfig) -> None:
    """Raises ValueError if a size is not divisible by another that must divide it."""
    vision, decoder, vq = cfg.und_encoder, cfg.language_model, cfg.gen_vq
    heads, kv_heads = decoder.num_attention_heads, decoder.num_key_value_heads
    divisions = (
        ("image_size", vision.image_size, "patch_size", vision.patch_size),
        ("image_size", vision.image_size, "the VQ model's downsampling factor", vq.downsample),
        ("the vision width", vision.width, "the number of vision heads", vision.num_heads),
        ("hidden_size", decoder.hidden_size, "the number of heads", heads),
        ("the number of heads", heads, "the number of key/value heads", kv_heads),
        ("head_dim", decoder.head_dim, "2", 2),
        *(
            ("the VQ channels", vq.ch * mult, "norm_num_groups", vq.norm_num_groups)
            for mult in (1, *vq.ch_mult)
        ),
    )
    for name, size, divisor_name, divisor in divisions:
        if divisor < 1 or size % divisor:
            by = divisor_name if divisor_name == str(divisor) else f"{divisor_name} ({divisor})"
            raise ValueError(f"config.json: {name} ({size}) must be divisible by {by}")


def _llama(section: Mapping, prefix: str) -> LlamaConfig:
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


def _read_deepseek(config: Mapping) -> JanusConfig:
    sections = {}
    for key in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head"):
        section = config.get(f"{key}_config", {})
        sections[key] = get_required(section, "params", f"{key}_config.")
    for part, cls in CLASSES.items():
        require(config[part], f"{part}.", cls=cls)
    decoder = _llama(get_required(config, "language_config", ""), "language_config.")
    cfg = JanusConfig(
        und_encoder=_deepseek_vision(sections["vision"]),
        und_aligner_depth=_deepseek_aligner(sections["aligner"], "aligner_config.params."),
        gen_vq=_deepseek_vq(sections["gen_vision"]),
        gen_aligner_depth=_deepseek_aligner(sections["gen_aligner"], "gen_aligner_config.params."),
        gen_head_width=get_required(
            sections["gen_head"], "image_token_embed", "gen_head_config.params."
        ),
        language_model=decoder,
    )
    width, codes = decoder.hidden_size, cfg.gen_vq.codebook_size
    require(sections["aligner"], "aligner_config.params.", input_dim=cfg.und_encoder.width)
    require(sections["aligner"], "aligner_config.params.", n_embed=width)
    require(sections["gen_aligner"], "gen_aligner_config.params.", n_embed=width)
    require(
        sections["gen_aligner"], "gen_aligner_config.params.", input_dim=cfg.gen_vq.codebook_dim
    )
    require(sections["gen_head"], "gen_head_config.params.", n_embed=width, image_token_size=codes)
    return cfg


def _deepseek_aligner(params: Mapping, prefix: str) -> int:
    require(params, prefix, projector_type="mlp_gelu")
    return params.get("depth", 1)


def _deepseek_vision(params: Mapping) -> SiglipConfig:
    prefix = "vision_config.params."
    if params.get("model_name", SIGLIP_NAME) == SIGLIP_NAME:
        require(params, prefix, **SIGLIP_SIZES)
    elif "width" not in params:
        require(params, prefix, model_name=SIGLIP_NAME)
    # Further arguments of CLIPVisionTower and create_siglip_vit in the original code.
    require_null(params, prefix, "pixel_mean", "pixel_std", "select_layers")
    require(params, prefix, ignore_head=True)
    feature = get_required(params, "select_feature", prefix)
    if feature not in ("same", "cls_patch"):  # both keep every patch; SigLIP has no class token
        raise config_error(f"{prefix}select_feature", "'same' or 'cls_patch'", feature)
    sizes = {key: params.get(key, default) for key, default in SIGLIP_SIZES.items()}
    layers = check_size("layers", sizes["layers"], prefix)  # select_layer is relative to it
    return SiglipConfig(
        image_size=get_required(params, "image_size", prefix),
        patch_size=sizes["patch_size"],
        width=sizes["width"],
        num_layers=layers,
        num_heads=sizes["heads"],
        mlp_dim=mlp_dim(sizes["width"], sizes["mlp_ratio"], prefix),
        select_layer=_select_layer(get_required(params, "select_layer", prefix), layers),
    )


def _select_layer(layer, layers: int) -> int:
    """Converts DeepSeek's select_layer, which may count from either end, to a negative index."""
    key = "vision_config.params.select_layer"
    if type(layer) is not int:
        raise config_error(key, "an integer", layer)
    num_used = min(layers, layers + layer + 1 if layer <= 0 else layer)
    if num_used < 1:
        raise config_error(key, f"an index into the {layers} layers", layer)
    return num_used - layers - 1


def _deepseek_vq(params: Mapping) -> VQConfig:
    levels = params.get("ch_mult", VQ16.ch_mult)
    return VQConfig(
        codebook_size=params.get("image_token_size", VQ16.codebook_size),
        codebook_dim=params.get("n_embed", VQ16.codebook_dim),
        ch=params.get("ch", VQ16.ch),
        ch_mult=check_multipliers("ch_mult", levels, "gen_vision_config.params."),
        num_res_blocks=params.get("num_res_blocks", VQ16.num_res_blocks),
        z_channels=params.get("z_channels", VQ16.z_channels),
        norm_num_groups=params.get("norm_num_groups", VQ16.norm_num_groups),
    )


def _read_transformers(config: Mapping) -> JanusConfig:
    """Reads a config like transformers 5.

    The top-level tie_word_embeddings is ignored: transformers takes an absent key as true, but
    loads embeddings and heads that are stored separately as separate tensors in any case.
    """
    text, vision, vq = (config.get(key) or {} for key in OBJECT_KEYS[TRANSFORMERS])
    require_null(config, "", "per_layer_config")
    decoder = _llama(text, "text_config.")
    # These default to 2048 (JanusVisionConfig, JanusVQVAEConfig) and must equal the hidden size.
    for prefix, section, key in (
        ("vision_config.", vision, "projection_dim"),
        ("vq_config.", vq, "projection_dim"),
        ("vq_config.", vq, "image_token_embed_dim"),
    ):
        require({key: section.get(key, 2048)}, prefix, **{key: decoder.hidden_size})
    cfg = JanusConfig(
        und_encoder=_transformers_vision(vision),
        und_aligner_depth=vision.get("depth", 2),
        gen_vq=_transformers_vq(vq),
        gen_aligner_depth=vq.get("num_hidden_layers", 2),
        gen_head_width=decoder.hidden_size,
        language_model=decoder,
    )
    _check_grid(cfg, vision)
    return cfg


def _transformers_vision(vision: Mapping) -> SiglipConfig:
    prefix = "vision_config."
    require(vision, prefix, hidden_act="gelu", attention_bias=True, use_qk_norm=False)
    require(vision, prefix, num_channels=3, layer_norm_eps=1e-6)
    require_null(vision, prefix, "per_layer_config")
    width = vision.get("hidden_size", SIGLIP.width)
    return SiglipConfig(
        image_size=vision.get("image_size", SIGLIP.image_size),
        patch_size=vision.get("patch_size", SIGLIP.patch_size),
        width=width,
        num_layers=vision.get("num_hidden_layers", SIGLIP.num_layers),
        num_heads=vision.get("num_attention_heads", SIGLIP.num_heads),
        mlp_dim=mlp_dim(width, vision.get("mlp_ratio", 4.0), prefix),
    )


def _transformers_vq(vq: Mapping) -> VQConfig:
    prefix = "vq_config."
    require(vq, prefix, hidden_act="gelu", double_latent=False, in_channels=3, out_channels=3)
    require_null(vq, prefix, "per_layer_config")
    levels = vq.get("channel_multiplier", VQ16.ch_mult)
    return VQConfig(
        codebook_size=vq.get("num_embeddings", VQ16.codebook_size),
        codebook_dim=vq.get("embed_dim", VQ16.codebook_dim),
        ch=vq.get("base_channels", VQ16.ch),
        ch_mult=check_multipliers("channel_multiplier", levels, prefix),
        num_res_blocks=vq.get("num_res_blocks", VQ16.num_res_blocks),
        z_channels=vq.get("latent_channels", VQ16.z_channels),
    )


def _check_grid(cfg: JanusConfig, vision: Mapping) -> None:
    """Raises ValueError if transformers and janus_jax would generate token grids of other sizes.

    transformers derives the sides of the grid from SigLIP's patches and the number of generated
    tokens from num_image_tokens; janus_jax derives both from the VQ model.
    """
    check_sizes(cfg)  # before num_tokens divides one size by another
    patch_size, downsample = cfg.und_encoder.patch_size, cfg.gen_vq.downsample
    if patch_size != downsample:
        expected = (
            f"{downsample} (pixels along the side of an image token, from "
            "vq_config.channel_multiplier)"
        )
        raise config_error("vision_config.patch_size", expected, patch_size)
    num_image_tokens, num_patches = vision.get("num_image_tokens", 576), cfg.und_encoder.num_tokens
    if num_image_tokens != num_patches:
        expected = f"{num_patches}, the number of patches (default 576)"
        raise config_error("vision_config.num_image_tokens", expected, num_image_tokens)
