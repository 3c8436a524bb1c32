"""config.json -> JanusConfig, in DeepSeek's layout and in that of `transformers`.

Released files leave most sizes to constants behind a class name and to LlamaConfig's defaults;
both are filled in here. Whatever the networks do not implement is refused, never ignored. The
way back is in `config_writing.py`.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

from janus_jax.models.janus import JanusConfig
from janus_jax.models.llama import LlamaConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig

DEEPSEEK, TRANSFORMERS = "deepseek", "transformers"
FLOW_KEYS = ("vision_gen_enc_config", "vision_gen_dec_config", "vision_und_enc_config")
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
# transformers.LlamaConfig
LLAMA_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
}


def layout_of(config: Mapping) -> str:
    """`deepseek` or `transformers`, told by a config.json's model_type.

    Raises:
      ValueError: JanusFlow, or another model.
    """
    flow = [key for key in FLOW_KEYS if key in config]
    if flow:
        raise ValueError(f"config.json is of a JanusFlow model (it has {flow[0]}), not of a Janus")
    kind = config.get("model_type")
    layouts = {"multi_modality": DEEPSEEK, "janus": TRANSFORMERS}
    if not isinstance(kind, str) or kind not in layouts:
        raise ValueError(f"config.json has model_type {kind!r}, not 'multi_modality' or 'janus'")
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
        _check_sizes(cfg)
        _check(cfg)
    except (TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.json has a value of a wrong type: {error}") from None
    return cfg


def _check_objects(config: Mapping, layout: str) -> None:
    for path in OBJECTS[layout]:
        value = functools.reduce(lambda found, key: found.get(key, {}), path.split("."), config)
        if not isinstance(value, Mapping):
            raise ValueError(f"config.json: {path} must be an object, got {value!r}")


def _require(section: Mapping, where: str, **wanted) -> None:
    """Refuses a stated value that the networks do not implement; absent means the only one."""
    for key, value in wanted.items():
        if section.get(key, value) != value:
            raise ValueError(f"config.json: {where}{key} must be {value!r}, got {section[key]!r}")


def _get(section: Mapping, key: str, where: str):
    if key not in section:
        raise ValueError(f"config.json: {where}.{key} is missing")
    return section[key]


def _check_sizes(cfg) -> None:
    """Every number of a config and of those in it; select_layer is counted from the end."""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        where = f"config.json: {field.name} of {type(cfg).__name__} must be"
        if dataclasses.is_dataclass(value):
            _check_sizes(value)
        elif field.type is float and not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{where} a number above 0, got {value!r}")
        elif field.type in (int, tuple[int, ...]) and field.name != "select_layer":
            sizes = value if isinstance(value, tuple) and value else (value,)
            if not all(type(size) is int and 0 < size < 2**31 for size in sizes):
                raise ValueError(f"{where} whole and at least 1, got {value!r}")


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
    _require(section, f"{where}.", model_type="llama", hidden_act="silu", attention_bias=False)
    _require(section, f"{where}.", mlp_bias=False, tie_word_embeddings=False)
    rope = {}
    for key in ("rope_scaling", "rope_parameters"):  # the second is what transformers 5 writes
        if section.get(key) is not None:
            rope = {**rope, **section[key]}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"config.json: {where} has rope scaling {kind!r}, supported: 'default'")
    sizes = {key: section.get(key, default) for key, default in LLAMA_DEFAULTS.items()}
    heads = section.get("num_key_value_heads")
    if heads is None:
        heads = sizes["num_attention_heads"]
    theta = rope.get("rope_theta", section.get("rope_theta", 10000.0))
    cfg = LlamaConfig(**sizes, num_key_value_heads=heads, rope_theta=theta)
    _check_sizes(cfg)  # before one is divided by another
    if section.get("head_dim") is not None:
        _require(section, f"{where}.", head_dim=cfg.head_dim)
    return cfg


def _read_deepseek(config: Mapping) -> JanusConfig:
    sections = {}
    for key in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head"):
        section = config.get(f"{key}_config", {})
        sections[key] = _get(section, "params", f"{key}_config")
    _require(config, "", tie_word_embeddings=False)
    for part, cls in CLASSES.items():
        _require(config[part], f"{part}.", cls=cls)
    decoder = _llama(_get(config, "language_config", "config"), "language_config")
    cfg = JanusConfig(
        und_encoder=_deepseek_vision(sections["vision"]),
        und_aligner_depth=_deepseek_aligner(sections["aligner"], "aligner_config.params."),
        gen_vq=_deepseek_vq(sections["gen_vision"]),
        gen_aligner_depth=_deepseek_aligner(sections["gen_aligner"], "gen_aligner_config.params."),
        gen_head_width=_get(sections["gen_head"], "image_token_embed", "gen_head_config.params"),
        language_model=decoder,
    )
    width, codes = decoder.hidden_size, cfg.gen_vq.codebook_size
    _require(sections["aligner"], "aligner_config.params.", input_dim=cfg.und_encoder.width)
    _require(sections["aligner"], "aligner_config.params.", n_embed=width)
    _require(sections["gen_aligner"], "gen_aligner_config.params.", n_embed=width)
    _require(
        sections["gen_aligner"], "gen_aligner_config.params.", input_dim=cfg.gen_vq.codebook_dim
    )
    _require(sections["gen_head"], "gen_head_config.params.", n_embed=width, image_token_size=codes)
    return cfg


def _deepseek_aligner(params: Mapping, where: str) -> int:
    _require(params, where, projector_type="mlp_gelu")
    return params.get("depth", 1)


def _deepseek_vision(params: Mapping) -> SiglipConfig:
    where = "vision_config.params"
    if "width" not in params:
        _require(params, f"{where}.", model_name=SIGLIP_NAME)
    feature = _get(params, "select_feature", where)
    if feature not in ("same", "cls_patch"):  # both keep every patch; SigLIP has no class token
        raise ValueError(f"config.json: {where}.select_feature is {feature!r}, supported: 'same'")
    layers, width = params.get("layers", SIGLIP.num_layers), params.get("width", SIGLIP.width)
    layer = _get(params, "select_layer", where)
    if type(layer) is not int:
        raise ValueError(f"config.json: {where}.select_layer must be whole, got {layer!r}")
    kept = min(layers, layers + layer + 1 if layer <= 0 else layer)
    if kept < 1:
        raise ValueError(f"config.json: {where}.select_layer {layer} leaves no layer of {layers}")
    return SiglipConfig(
        image_size=_get(params, "image_size", where),
        patch_size=params.get("patch_size", SIGLIP.patch_size),
        width=width,
        num_layers=layers,
        num_heads=params.get("heads", SIGLIP.num_heads),
        mlp_dim=int(width * params.get("mlp_ratio", SIGLIP.mlp_dim / SIGLIP.width)),
        select_layer=kept - layers - 1,
    )


def _deepseek_vq(params: Mapping) -> VQConfig:
    return VQConfig(
        codebook_size=params.get("image_token_size", VQ16.codebook_size),
        codebook_dim=params.get("n_embed", VQ16.codebook_dim),
        ch=params.get("ch", VQ16.ch),
        ch_mult=tuple(params.get("ch_mult", VQ16.ch_mult)),
        num_res_blocks=params.get("num_res_blocks", VQ16.num_res_blocks),
        z_channels=params.get("z_channels", VQ16.z_channels),
        norm_num_groups=params.get("norm_num_groups", VQ16.norm_num_groups),
    )


def _read_transformers(config: Mapping) -> JanusConfig:
    vision, vq = config.get("vision_config", {}), config.get("vq_config", {})
    _require(config, "", tie_word_embeddings=False)
    decoder = _llama(config.get("text_config", {}), "text_config")
    _require(vision, "vision_config.", hidden_act="gelu", attention_bias=True, use_qk_norm=False)
    _require(vision, "vision_config.", num_channels=3, layer_norm_eps=1e-6)
    _require(vq, "vq_config.", hidden_act="gelu", double_latent=False, in_channels=3)
    _require(vq, "vq_config.", out_channels=3)
    # Absent, these are 2048 (JanusVisionConfig, JanusVQVAEConfig) and must fit the decoder.
    for where, section, key in (
        ("vision_config", vision, "projection_dim"),
        ("vq_config", vq, "projection_dim"),
        ("vq_config", vq, "image_token_embed_dim"),
    ):
        _require({key: section.get(key, 2048)}, f"{where}.", **{key: decoder.hidden_size})
    width = vision.get("hidden_size", SIGLIP.width)
    encoder = SiglipConfig(
        image_size=vision.get("image_size", SIGLIP.image_size),
        patch_size=vision.get("patch_size", SIGLIP.patch_size),
        width=width,
        num_layers=vision.get("num_hidden_layers", SIGLIP.num_layers),
        num_heads=vision.get("num_attention_heads", SIGLIP.num_heads),
        mlp_dim=int(width * vision.get("mlp_ratio", 4.0)),
    )
    gen_vq = VQConfig(
        codebook_size=vq.get("num_embeddings", VQ16.codebook_size),
        codebook_dim=vq.get("embed_dim", VQ16.codebook_dim),
        ch=vq.get("base_channels", VQ16.ch),
        ch_mult=tuple(vq.get("channel_multiplier", VQ16.ch_mult)),
        num_res_blocks=vq.get("num_res_blocks", VQ16.num_res_blocks),
        z_channels=vq.get("latent_channels", VQ16.z_channels),
    )
    return JanusConfig(
        und_encoder=encoder,
        und_aligner_depth=vision.get("depth", 2),
        gen_vq=gen_vq,
        gen_aligner_depth=vq.get("num_hidden_layers", 2),
        gen_head_width=decoder.hidden_size,
        language_model=decoder,
    )
