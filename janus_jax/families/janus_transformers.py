"""The layout of `transformers` (`JanusForConditionalGeneration`): config.json and tensors."""

from collections.abc import Mapping

from janus_jax.families.config import (
    check_multipliers,
    check_objects,
    check_sizes,
    config_error,
    mlp_dim,
    mlp_ratio,
    read_llama,
    require,
    require_null,
    write_llama,
)
from janus_jax.families.family import ConversionTable, Rule, Skip
from janus_jax.families.janus_deepseek import (
    BLOCKS_PATH,
    CODEBOOK_USED,
    INV_FREQ,
    VQ_PATH,
    affine,
    attention_rules,
    llama_rules,
    norm,
    resnet_rules,
    vq_outer_rules,
)
from janus_jax.models.janus import JanusConfig
from janus_jax.models.siglip import SiglipConfig
from janus_jax.models.vq import VQConfig

SECTIONS = ("text_config", "vision_config", "vq_config")
SIGLIP, VQ16 = SiglipConfig.siglip_large_patch16_384(), VQConfig.vq_16()

BLOCKS = "model.vision_model.encoder.layers.{i}"
VQ_NAMES = "model.vqmodel"


def read(config: Mapping) -> JanusConfig:
    """Reads the sizes of a model from the contents of a config.json, like transformers 5.

    The top-level tie_word_embeddings is ignored: transformers takes an absent key as true, but
    loads embeddings and heads that are stored separately as separate tensors in any case.
    """
    check_objects(config, SECTIONS, null=True)  # transformers uses its default for null
    text, vision, vq = (config.get(key) or {} for key in SECTIONS)
    require_null(config, "", "per_layer_config")
    decoder = read_llama(text, "text_config.")
    # These default to 2048 (JanusVisionConfig, JanusVQVAEConfig) and must equal the hidden size.
    for prefix, section, key in (
        ("vision_config.", vision, "projection_dim"),
        ("vq_config.", vq, "projection_dim"),
        ("vq_config.", vq, "image_token_embed_dim"),
    ):
        require({key: section.get(key, 2048)}, prefix, **{key: decoder.hidden_size})
    cfg = JanusConfig(
        und_encoder=_read_vision(vision),
        und_aligner_depth=vision.get("depth", 2),
        gen_vq=_read_vq(vq),
        gen_aligner_depth=vq.get("num_hidden_layers", 2),
        gen_head_width=decoder.hidden_size,
        language_model=decoder,
    )
    _check_grid(cfg, vision)
    return cfg


def _read_vision(vision: Mapping) -> SiglipConfig:
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


def _read_vq(vq: Mapping) -> VQConfig:
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


def _check_expressible(cfg: JanusConfig) -> None:
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


def write(cfg: JanusConfig, dtype: str, image_token_id: int | None) -> dict:
    """Returns the contents of a config.json.

    Raises:
      ValueError: the layout cannot express the model, or image_token_id is None.
    """
    _check_expressible(cfg)
    if image_token_id is None:
        raise ValueError(
            "the transformers layout needs the token <image_placeholder> in tokenizer.json"
        )
    vision, vq, width = cfg.und_encoder, cfg.gen_vq, cfg.language_model.hidden_size
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "torch_dtype": dtype,
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        "text_config": write_llama(cfg.language_model),
        "vision_config": {
            "model_type": "janus_vision_model",
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_size": vision.width,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "num_image_tokens": vision.num_tokens,
            "mlp_ratio": mlp_ratio(vision.width, vision.mlp_dim),
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


def table(cfg: JanusConfig) -> ConversionTable:
    """Returns the table for a model config; only the aligners' depths matter."""
    rules = (
        *_vision_rules(),
        *_aligner_rules("model.aligner", "und_aligner", cfg.und_aligner_depth),
        *_aligner_rules("model.generation_aligner", "gen_aligner", cfg.gen_aligner_depth),
        *affine("model.generation_head.proj_out", "gen_head.proj", "linear"),
        *affine("model.generation_head.vision_head", "gen_head.out", "linear"),
        Rule("model.generation_embeddings.weight", ("gen_embed.embedding",), "same"),
        *vq_outer_rules(VQ_NAMES),
        *_level_rules("encoder", "down", "downsample"),
        *_level_rules("decoder", "up", "upsample"),
        *_middle_rules(),
        *llama_rules("model.language_model", "lm_head"),
    )
    positions = "the position indices 0 to T - 1"
    skips = (
        Skip(r"model\.vision_model\.embeddings\.position_ids", positions),
        Skip(r"model\.vqmodel\.quantize\.codebook_used", CODEBOOK_USED),
        Skip(r"model\.language_model\.rotary_emb\.inv_freq", INV_FREQ),
    )
    return ConversionTable(rules, skips)


def _vision_rules() -> tuple[Rule, ...]:
    tower = "model.vision_model"
    attn, mlp = "{p:q_proj|k_proj|v_proj}", "mlp.{p:fc1|fc2}"
    position = f"{tower}.embeddings.position_embedding.weight"
    return (
        *affine(f"{tower}.embeddings.patch_embedding", "und_encoder.patch_embed", "conv2d"),
        Rule(position, ("und_encoder.pos_embed",), "same"),
        *affine(f"{BLOCKS}.self_attn.{attn}", f"{BLOCKS_PATH}.attn.{attn}", "linear"),
        *affine(f"{BLOCKS}.self_attn.projection_layer", f"{BLOCKS_PATH}.attn.out_proj", "linear"),
        *affine(f"{BLOCKS}.{mlp}", f"{BLOCKS_PATH}.{mlp}", "linear"),
        *norm(f"{BLOCKS}.layer_norm{{n:1|2}}", f"{BLOCKS_PATH}.norm{{n:1|2}}"),
        *norm(f"{tower}.post_layernorm", "und_encoder.norm"),
    )


def _aligner_rules(torch: str, path: str, depth: int) -> tuple[Rule, ...]:
    names = ["fc1", *(f"hidden_layers.{i}" for i in range(depth - 1))]
    rows = [affine(f"{torch}.{n}", f"{path}.layers.{i}", "linear") for i, n in enumerate(names)]
    return tuple(rule for row in rows for rule in row)


def _level_rules(coder: str, levels: str, scaling: str) -> tuple[Rule, ...]:
    torch, path = f"{VQ_NAMES}.{coder}.{levels}.{{i}}", f"gen_vq.{coder}.levels.{{i}}"
    return (
        *resnet_rules(f"{torch}.block.{{j}}", f"{path}.res.{{j}}"),
        *attention_rules(f"{torch}.attn.{{j}}", f"{path}.attn.{{j}}"),
        *affine(f"{torch}.{scaling}.conv", f"{path}.{scaling}", "conv2d"),
    )


def _middle_rules() -> tuple[Rule, ...]:
    torch, path = f"{VQ_NAMES}.{{c:encoder|decoder}}.mid", f"{VQ_PATH}.mid"
    return (
        *resnet_rules(f"{torch}.block_1", f"{path}.0"),
        *attention_rules(f"{torch}.attn_1", f"{path}.1"),
        *resnet_rules(f"{torch}.block_2", f"{path}.2"),
    )
