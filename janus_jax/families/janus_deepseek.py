"""DeepSeek's layout (`MultiModalityCausalLM`) of Janus-1.3B and Janus-Pro: config.json and tensors.

In the conversion table, constants and arguments named *PATH, `path` or `paths` are parameter paths
of janus_jax; the others are PyTorch names.
"""

from collections.abc import Mapping

from janus_jax.families.config import (
    check_multipliers,
    check_objects,
    check_size,
    config_error,
    get_required,
    mlp_dim,
    mlp_ratio,
    read_llama,
    require,
    require_null,
    write_llama,
)
from janus_jax.families.family import ConversionTable, Rule, Shape, Skip
from janus_jax.models.janus import JanusConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig

# DeepSeek's config.json has one object per component, with a class name (`cls`) and `params`.
CLASSES = {
    "vision_config": "CLIPVisionTower",
    "aligner_config": "MlpProjector",
    "gen_vision_config": "VQ-16",
    "gen_aligner_config": "MlpProjector",
    "gen_head_config": "vision_head",
}
OBJECT_KEYS = ("language_config", *CLASSES, *(f"{part}.params" for part in CLASSES))
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
BLOCKS = "vision_model.vision_tower.blocks.{i}"
BLOCKS_PATH = "und_encoder.blocks.{i}"
VQ_NAMES = "gen_vision_model.{c:encoder|decoder}"
VQ_PATH = "gen_vq.{c:encoder|decoder}"
LAYERS_PATH = "language_model.layers.{i}"

ATTN_POOL = "SigLIP's pooling head; Janus uses the patch features before it"
CODEBOOK_USED = "a training statistic, not a parameter"
INV_FREQ = "rotary frequencies, which are computed from rope_theta"


def read(config: Mapping) -> JanusConfig:
    """Reads the sizes of a model from the contents of a config.json."""
    check_objects(config, OBJECT_KEYS, null=False)
    sections = {}
    for key in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head"):
        section = config.get(f"{key}_config", {})
        sections[key] = get_required(section, "params", f"{key}_config.")
    for part, cls in CLASSES.items():
        require(config[part], f"{part}.", cls=cls)
    decoder = read_llama(get_required(config, "language_config", ""), "language_config.")
    cfg = JanusConfig(
        und_encoder=_read_vision(sections["vision"]),
        und_aligner_depth=_read_aligner(sections["aligner"], "aligner_config.params."),
        gen_vq=_read_vq(sections["gen_vision"]),
        gen_aligner_depth=_read_aligner(sections["gen_aligner"], "gen_aligner_config.params."),
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


def _read_aligner(params: Mapping, prefix: str) -> int:
    require(params, prefix, projector_type="mlp_gelu")
    return params.get("depth", 1)


def _read_vision(params: Mapping) -> SiglipConfig:
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


def _read_vq(params: Mapping) -> VQConfig:
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


def _write_vision(vision: SiglipConfig) -> dict:
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
        "mlp_ratio": mlp_ratio(vision.width, vision.mlp_dim),
    }


def _write_vq(vq: VQConfig) -> dict:
    return {
        "image_token_size": vq.codebook_size,
        "n_embed": vq.codebook_dim,
        "ch": vq.ch,
        "ch_mult": list(vq.ch_mult),
        "num_res_blocks": vq.num_res_blocks,
        "z_channels": vq.z_channels,
        "norm_num_groups": vq.norm_num_groups,
    }


def write(cfg: JanusConfig, dtype: str, image_token_id: int | None) -> dict:
    """Returns the contents of a config.json; image_token_id is not needed."""
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
        "vision_config": _section("vision", _write_vision(vision)),
        "aligner_config": _section("aligner", und),
        "gen_vision_config": _section("gen_vision", _write_vq(vq)),
        "gen_aligner_config": _section("gen_aligner", gen),
        "gen_head_config": _section("gen_head", head),
        "language_config": write_llama(cfg.language_model) | {"torch_dtype": dtype},
    }


def _section(kind: str, params: dict) -> dict:
    return {"cls": CLASSES[f"{kind}_config"], "model_type": kind, "params": params}


def table(cfg: JanusConfig) -> ConversionTable:
    """Returns the table for a model config; only the aligners' depths matter."""
    rules = (
        *_vision_rules(),
        *_aligner_rules("aligner", "und_aligner", cfg.und_aligner_depth),
        *_aligner_rules("gen_aligner", "gen_aligner", cfg.gen_aligner_depth),
        *affine("gen_head.output_mlp_projector", "gen_head.proj", "linear"),
        *affine("gen_head.vision_head", "gen_head.out", "linear"),
        Rule("gen_embed.weight", ("gen_embed.embedding",), "same"),
        *_vq_rules(),
        *llama_rules("language_model.model", "language_model.lm_head"),
    )
    skips = (
        Skip(r"vision_model\.vision_tower\.attn_pool\..*", ATTN_POOL),
        Skip(r"gen_vision_model\.quantize\.codebook_used", CODEBOOK_USED),
        Skip(r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", INV_FREQ),
        Skip(r"language_model\.model\.rotary_emb\.inv_freq", INV_FREQ),
    )
    return ConversionTable(rules, skips)


def unused(cfg: JanusConfig) -> dict[str, tuple[str, Shape]]:
    """Returns the tensors, by name, that the original class stores but never uses.

    Each with the path of a parameter of the same dtype, and its shape.
    """
    vision = cfg.und_encoder
    pool, width, hidden = "vision_model.vision_tower.attn_pool", vision.width, vision.mlp_dim
    linears = {
        "q": (width, width),
        "kv": (2 * width, width),
        "proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    shapes = {f"{pool}.latent": (1, 1, width), f"{pool}.norm.weight": (width,)}
    shapes[f"{pool}.norm.bias"] = (width,)
    for name, shape in linears.items():
        shapes[f"{pool}.{name}.weight"] = shape
        shapes[f"{pool}.{name}.bias"] = shape[:1]
    shapes["gen_vision_model.quantize.codebook_used"] = (65536,)
    return {name: ("und_encoder.pos_embed", shape) for name, shape in shapes.items()}


def affine(torch: str, path: str, transform: str) -> tuple[Rule, Rule]:
    """Returns the rows of a layer with a kernel and a bias."""
    return (
        Rule(f"{torch}.weight", (f"{path}.kernel",), transform),
        Rule(f"{torch}.bias", (f"{path}.bias",), "same"),
    )


def norm(torch: str, path: str) -> tuple[Rule, Rule]:
    """Returns the rows of a normalization layer with a scale and a bias."""
    return (
        Rule(f"{torch}.weight", (f"{path}.scale",), "same"),
        Rule(f"{torch}.bias", (f"{path}.bias",), "same"),
    )


def llama_rules(model: str, head: str) -> tuple[Rule, ...]:
    """Returns the rows of the decoder, whose layers have the same names in both layouts."""
    torch = f"{model}.layers.{{i}}"
    attn, mlp = "self_attn.{p:q_proj|k_proj|v_proj|o_proj}", "mlp.{p:gate_proj|up_proj|down_proj}"
    norms = "{n:input_layernorm|post_attention_layernorm}"
    return (
        Rule(f"{model}.embed_tokens.weight", ("language_model.embed_tokens.embedding",), "same"),
        Rule(f"{torch}.{attn}.weight", (f"{LAYERS_PATH}.{attn}.kernel",), "linear"),
        Rule(f"{torch}.{mlp}.weight", (f"{LAYERS_PATH}.{mlp}.kernel",), "linear"),
        Rule(f"{torch}.{norms}.weight", (f"{LAYERS_PATH}.{norms}.scale",), "same"),
        Rule(f"{model}.norm.weight", ("language_model.norm.scale",), "same"),
        Rule(f"{head}.weight", ("language_model.lm_head.kernel",), "linear"),
    )


def resnet_rules(torch: str, path: str, shortcut: str = "nin_shortcut") -> tuple[Rule, ...]:
    """Returns the rows of a VQ residual block."""
    return (
        *norm(f"{torch}.{{n:norm1|norm2}}", f"{path}.{{n:norm1|norm2}}"),
        *affine(f"{torch}.{{n:conv1|conv2}}", f"{path}.{{n:conv1|conv2}}", "conv2d"),
        *affine(f"{torch}.{shortcut}", f"{path}.shortcut", "pointwise"),
    )


def attention_rules(torch: str, path: str) -> tuple[Rule, ...]:
    """Returns the rows of a VQ attention block."""
    names = "{n:q|k|v|proj_out}"
    return (
        *norm(f"{torch}.norm", f"{path}.norm"),
        *affine(f"{torch}.{names}", f"{path}.{names}", "pointwise"),
    )


def vq_outer_rules(torch: str) -> tuple[Rule, ...]:
    """Returns the rows of the VQ model outside its levels and middle blocks.

    These layers have the same names in both layouts.
    """
    coder = f"{torch}.{{c:encoder|decoder}}"
    quant = "{c:quant_conv|post_quant_conv}"
    return (
        *affine(f"{coder}.{{n:conv_in|conv_out}}", f"{VQ_PATH}.{{n:conv_in|conv_out}}", "conv2d"),
        *norm(f"{coder}.norm_out", f"{VQ_PATH}.norm_out"),
        *affine(f"{torch}.{quant}", f"gen_vq.{quant}", "pointwise"),
        Rule(f"{torch}.quantize.embedding.weight", ("gen_vq.codebook",), "same"),
    )


def _vq_rules() -> tuple[Rule, ...]:
    level, path = f"{VQ_NAMES}.conv_blocks.{{i}}", f"{VQ_PATH}.levels.{{i}}"
    scaling = "{s:downsample|upsample}"
    return (
        *vq_outer_rules("gen_vision_model"),
        *resnet_rules(f"{level}.res.{{j}}", f"{path}.res.{{j}}"),
        *attention_rules(f"{level}.attn.{{j}}", f"{path}.attn.{{j}}"),
        *affine(f"{level}.{scaling}.conv", f"{path}.{scaling}", "conv2d"),
        *resnet_rules(f"{VQ_NAMES}.mid.{{m:0|2}}", f"{VQ_PATH}.mid.{{m:0|2}}"),
        *attention_rules(f"{VQ_NAMES}.mid.1", f"{VQ_PATH}.mid.1"),
    )


def _vision_rules() -> tuple[Rule, ...]:
    tower = "vision_model.vision_tower"
    qkv = [f"{BLOCKS_PATH}.attn.{name}_proj" for name in "qkv"]
    fused = f"{BLOCKS}.attn.qkv"
    return (
        *affine(f"{tower}.patch_embed.proj", "und_encoder.patch_embed", "conv2d"),
        Rule(f"{tower}.pos_embed", ("und_encoder.pos_embed",), "squeeze_leading"),
        Rule(f"{fused}.weight", tuple(f"{path}.kernel" for path in qkv), "split_qkv"),
        Rule(f"{fused}.bias", tuple(f"{path}.bias" for path in qkv), "split_qkv_bias"),
        *affine(f"{BLOCKS}.attn.proj", f"{BLOCKS_PATH}.attn.out_proj", "linear"),
        *affine(f"{BLOCKS}.mlp.{{p:fc1|fc2}}", f"{BLOCKS_PATH}.mlp.{{p:fc1|fc2}}", "linear"),
        *norm(f"{BLOCKS}.{{n:norm1|norm2}}", f"{BLOCKS_PATH}.{{n:norm1|norm2}}"),
        *norm(f"{tower}.norm", "und_encoder.norm"),
    )


def _aligner_rules(torch: str, path: str, depth: int) -> tuple[Rule, ...]:
    """In the original's Sequential the linear layers have even indices, with GELUs between them."""
    rows = [affine(f"{torch}.layers.{2 * i}", f"{path}.layers.{i}", "linear") for i in range(depth)]
    return tuple(rule for row in rows for rule in row)
