"""config.json -> JanusConfig, in DeepSeek's layout and in that of `transformers`.

Released files leave most sizes to constants behind a class name and to LlamaConfig's defaults;
both are filled in here. Whatever the networks do not implement is refused, never ignored. The
way back is in `config_writing.py`.
"""

import functools
from collections.abc import Mapping

from janus_jax.checks import shorten
from janus_jax.interop.config_values import (
    check_sizes,
    get,
    mlp_dim,
    multipliers,
    real,
    refusal,
    require,
    require_null,
    size,
)
from janus_jax.models.janus import JanusConfig
from janus_jax.models.llama import LlamaConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig

DEEPSEEK, TRANSFORMERS = "deepseek", "transformers"
FLOW_KEYS = ("vision_gen_enc_config", "vision_gen_dec_config", "vision_und_enc_config")
GEN_KEYS = ("gen_vision_config", "gen_aligner_config", "gen_head_config")
# config.json's objects, and the objects in them; DeepSeek's parts are a class and its params
CLASSES = {
    "vision_config": "CLIPVisionTower",
    "aligner_config": "MlpProjector",
    "gen_vision_config": "VQ-16",
    "gen_aligner_config": "MlpProjector",
    "gen_head_config": "vision_head",
}
OBJECTS = {
    DEEPSEEK: ("language_config", *CLASSES, *(f"{part}.params" for part in CLASSES)),
    TRANSFORMERS: ("text_config", "vision_config", "vq_config"),
}
SIGLIP, VQ16 = SiglipConfig.siglip_large_patch16_384(), VQConfig.vq_16()
SIGLIP_NAME = "siglip_large_patch16_384"
# keys of SigLIP's sizes, which the original code takes from the model's name
SIGLIP_SIZES = {
    "width": SIGLIP.width,
    "layers": SIGLIP.num_layers,
    "heads": SIGLIP.num_heads,
    "patch_size": SIGLIP.patch_size,
    "mlp_ratio": SIGLIP.mlp_dim / SIGLIP.width,
}
# transformers reads these into any config, and they change Llama's masks, cache or layers
LLAMA_CHANGES = (
    "sliding_window",
    "attention_chunk_size",
    "kv_sharing_modes",
    "num_kv_shared_layers",
    "per_layer_config",
)
# transformers.LlamaConfig
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
}
RMS_NORM_EPS, ROPE_THETA = 1e-6, 10000.0


def layout_of(config: Mapping) -> str:
    """`deepseek` or `transformers`, told by a config.json's model_type.

    Raises:
      ValueError: JanusFlow, DeepSeek-VL, or another model.
    """
    flow = [key for key in FLOW_KEYS if key in config]
    if flow:
        raise ValueError(f"config.json is of a JanusFlow model (it has {flow[0]}), not of a Janus")
    kind = config.get("model_type")
    layouts = {"multi_modality": DEEPSEEK, "janus": TRANSFORMERS}
    if not isinstance(kind, str) or kind not in layouts:
        got = f"model_type {shorten(kind)}, not 'multi_modality' or 'janus'"
        raise ValueError(f"config.json has {got}")
    if kind == "multi_modality" and not any(key in config for key in GEN_KEYS):
        raise ValueError(
            f"config.json is of a DeepSeek-VL model (it has no {GEN_KEYS[0]}), which cannot "
            "generate images; only Janus models are supported"
        )
    return layouts[kind]


def read_config(config: Mapping) -> JanusConfig:
    """Sizes from the contents of a config.json; dtype fields keep their float32 defaults.

    Raises:
      ValueError: another model, a missing size, or a value that is not supported.
    """
    layout = layout_of(config)
    read = {DEEPSEEK: _read_deepseek, TRANSFORMERS: _read_transformers}[layout]
    _check_objects(config, layout)
    try:
        cfg = read(config)
        check_sizes(cfg)
        _check(cfg)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json has a value of a wrong type: {error}") from None
    return cfg


def _check_objects(config: Mapping, layout: str) -> None:
    for path in OBJECTS[layout]:
        value = functools.reduce(lambda found, key: found.get(key, {}), path.split("."), config)
        null = layout == TRANSFORMERS and value is None  # null means the defaults there
        if not null and not isinstance(value, Mapping):
            raise refusal(path, "an object", value)


def _check(cfg: JanusConfig) -> None:
    vision, decoder = cfg.und_encoder, cfg.language_model
    divisions = (
        ("image_size by patch_size", vision.image_size, vision.patch_size),
        ("image_size by the VQ model's downsampling", vision.image_size, cfg.gen_vq.downsample),
        ("vision width by heads", vision.width, vision.num_heads),
        ("hidden_size by heads", decoder.hidden_size, decoder.num_attention_heads),
        ("heads by key/value heads", decoder.num_attention_heads, decoder.num_key_value_heads),
        ("head_dim by 2", decoder.head_dim, 2),
        *(("VQ channels by norm_num_groups", cfg.gen_vq.ch * mult, cfg.gen_vq.norm_num_groups)
          for mult in (1, *cfg.gen_vq.ch_mult)),
    )
    for what, whole, part in divisions:
        if part < 1 or whole % part:
            raise ValueError(f"config.json: {what} is not whole: {whole} / {part}")


def _llama(section: Mapping, where: str) -> LlamaConfig:
    inside = f"{where}."
    require(section, inside, model_type="llama", attention_bias=False, mlp_bias=False)
    require(section, inside, tie_word_embeddings=False, is_causal=True)
    require_null(section, inside, *LLAMA_CHANGES)
    if section.get("hidden_act") != "swish":  # transformers' other name of the same function
        require(section, inside, hidden_act="silu")
    sizes = {key: section.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    heads = section.get("num_key_value_heads")
    if heads is None:
        heads = sizes["num_attention_heads"]
    eps = real("rms_norm_eps", section.get("rms_norm_eps", RMS_NORM_EPS), inside)
    theta = _rope_theta(section, inside)
    cfg = LlamaConfig(**sizes, num_key_value_heads=heads, rms_norm_eps=eps, rope_theta=theta)
    check_sizes(cfg)  # before one is divided by another
    if section.get("head_dim") is not None:
        require(section, inside, head_dim=cfg.head_dim)
    layers = section.get("layer_types")
    if layers is not None and layers != ["full_attention"] * cfg.num_hidden_layers:
        raise refusal(f"{inside}layer_types", "'full_attention' for each layer", layers)
    return cfg


def _rope_theta(section: Mapping, where: str) -> float:
    """The rotary base, as transformers 5 reads it: where there is a `rope_scaling`, the older key,
    nothing of `rope_parameters` counts."""
    keys = ("rope_scaling", "rope_parameters")
    for key in keys:
        if not isinstance(section.get(key, {}), (Mapping, type(None))):
            raise refusal(f"{where}{key}", "an object", section[key])
    key = next((key for key in keys if section.get(key)), keys[-1])
    rope = section.get(key) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        got = f"{where}{key} has rope scaling {shorten(kind)}"
        raise ValueError(f"config.json: {got}, supported: 'default'")
    return real("rope_theta", rope.get("rope_theta", section.get("rope_theta", ROPE_THETA)), where)


def _read_deepseek(config: Mapping) -> JanusConfig:
    sections = {}
    for key in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head"):
        section = config.get(f"{key}_config", {})
        sections[key] = get(section, "params", f"{key}_config")
    for part, cls in CLASSES.items():
        require(config[part], f"{part}.", cls=cls)
    decoder = _llama(get(config, "language_config", "config"), "language_config")
    cfg = JanusConfig(
        und_encoder=_deepseek_vision(sections["vision"]),
        und_aligner_depth=_deepseek_aligner(sections["aligner"], "aligner_config.params."),
        gen_vq=_deepseek_vq(sections["gen_vision"]),
        gen_aligner_depth=_deepseek_aligner(sections["gen_aligner"], "gen_aligner_config.params."),
        gen_head_width=get(sections["gen_head"], "image_token_embed", "gen_head_config.params"),
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


def _deepseek_aligner(params: Mapping, where: str) -> int:
    require(params, where, projector_type="mlp_gelu")
    return params.get("depth", 1)


def _deepseek_vision(params: Mapping) -> SiglipConfig:
    where = "vision_config.params."
    named = params.get("model_name", SIGLIP_NAME) == SIGLIP_NAME
    if named:
        require(params, where, **SIGLIP_SIZES)
    elif "width" not in params:
        require(params, where, model_name=SIGLIP_NAME)
    # what CLIPVisionTower and create_siglip_vit of the original take beside the sizes
    require_null(params, where, "pixel_mean", "pixel_std", "select_layers")
    require(params, where, ignore_head=True)
    feature = get(params, "select_feature", where[:-1])
    if feature not in ("same", "cls_patch"):  # both keep every patch; SigLIP has no class token
        got = f"{where}select_feature is {shorten(feature)}"
        raise ValueError(f"config.json: {got}, supported: 'same'")
    sizes = {key: params.get(key, default) for key, default in SIGLIP_SIZES.items()}
    layers = size("layers", sizes["layers"], where)  # select_layer is counted from it
    return SiglipConfig(
        image_size=get(params, "image_size", where[:-1]),
        patch_size=sizes["patch_size"],
        width=sizes["width"],
        num_layers=layers,
        num_heads=sizes["heads"],
        mlp_dim=mlp_dim(sizes["width"], sizes["mlp_ratio"], where),
        select_layer=_select_layer(get(params, "select_layer", where[:-1]), layers),
    )


def _select_layer(layer, layers: int) -> int:
    """DeepSeek's select_layer, which counts from either end, counted from the last layer."""
    if type(layer) is not int:
        raise refusal("vision_config.params.select_layer", "an integer", layer)
    kept = min(layers, layers + layer + 1 if layer <= 0 else layer)
    if kept < 1:
        got = f"vision_config.params.select_layer {shorten(layer)}"
        raise ValueError(f"config.json: {got} leaves no layer of {layers}")
    return kept - layers - 1


def _deepseek_vq(params: Mapping) -> VQConfig:
    return VQConfig(
        codebook_size=params.get("image_token_size", VQ16.codebook_size),
        codebook_dim=params.get("n_embed", VQ16.codebook_dim),
        ch=params.get("ch", VQ16.ch),
        ch_mult=multipliers("ch_mult", params.get("ch_mult", VQ16.ch_mult), "gen_vision_config."),
        num_res_blocks=params.get("num_res_blocks", VQ16.num_res_blocks),
        z_channels=params.get("z_channels", VQ16.z_channels),
        norm_num_groups=params.get("norm_num_groups", VQ16.norm_num_groups),
    )


def _read_transformers(config: Mapping) -> JanusConfig:
    """As transformers 5 reads it. Its top-level tie_word_embeddings does not count: it is true
    where it is absent, and the heads that are stored apart are loaded apart whatever it says."""
    text, vision, vq = (config.get(key) or {} for key in OBJECTS[TRANSFORMERS])
    require_null(config, "", "per_layer_config")
    decoder = _llama(text, "text_config")
    # Absent, these are 2048 (JanusVisionConfig, JanusVQVAEConfig) and must fit the decoder.
    for where, section, key in (
        ("vision_config", vision, "projection_dim"),
        ("vq_config", vq, "projection_dim"),
        ("vq_config", vq, "image_token_embed_dim"),
    ):
        require({key: section.get(key, 2048)}, f"{where}.", **{key: decoder.hidden_size})
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
    where = "vision_config."
    require(vision, where, hidden_act="gelu", attention_bias=True, use_qk_norm=False)
    require(vision, where, num_channels=3, layer_norm_eps=1e-6)
    require_null(vision, where, "per_layer_config")
    width = vision.get("hidden_size", SIGLIP.width)
    return SiglipConfig(
        image_size=vision.get("image_size", SIGLIP.image_size),
        patch_size=vision.get("patch_size", SIGLIP.patch_size),
        width=width,
        num_layers=vision.get("num_hidden_layers", SIGLIP.num_layers),
        num_heads=vision.get("num_attention_heads", SIGLIP.num_heads),
        mlp_dim=mlp_dim(width, vision.get("mlp_ratio", 4.0), where),
    )


def _transformers_vq(vq: Mapping) -> VQConfig:
    where = "vq_config."
    require(vq, where, hidden_act="gelu", double_latent=False, in_channels=3, out_channels=3)
    require_null(vq, where, "per_layer_config")
    levels = vq.get("channel_multiplier", VQ16.ch_mult)
    return VQConfig(
        codebook_size=vq.get("num_embeddings", VQ16.codebook_size),
        codebook_dim=vq.get("embed_dim", VQ16.codebook_dim),
        ch=vq.get("base_channels", VQ16.ch),
        ch_mult=multipliers("channel_multiplier", levels, where),
        num_res_blocks=vq.get("num_res_blocks", VQ16.num_res_blocks),
        z_channels=vq.get("latent_channels", VQ16.z_channels),
    )


def _check_grid(cfg: JanusConfig, vision: Mapping) -> None:
    """transformers takes the sides of the generated grid from SigLIP's patches, and the number of
    generated tokens from num_image_tokens; here both follow from the VQ model."""
    check_sizes(cfg)  # before one is divided by another
    patch, pixels = cfg.und_encoder.patch_size, cfg.gen_vq.downsample
    if patch != pixels:
        wanted = f"{pixels}, the pixels of a generated token (vq_config.channel_multiplier)"
        raise refusal("vision_config.patch_size", wanted, patch)
    stated, tokens = vision.get("num_image_tokens", 576), cfg.und_encoder.num_tokens
    if stated != tokens:
        wanted = f"{tokens}, the number of patches (576 where absent)"
        raise refusal("vision_config.num_image_tokens", wanted, stated)
