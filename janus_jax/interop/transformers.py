"""Conversion table of the `transformers` layout (`JanusForConditionalGeneration`)."""

from janus_jax.interop.deepseek import (
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
from janus_jax.interop.rules import Rule, Skip, Table
from janus_jax.models.janus import JanusConfig

BLOCKS = "model.vision_model.encoder.layers.{i}"
VQ = "model.vqmodel"


def table(cfg: JanusConfig) -> Table:
    """Returns the table for a model config; only the aligners' depths matter."""
    rules = (
        *_vision_rules(),
        *_aligner_rules("model.aligner", "und_aligner", cfg.und_aligner_depth),
        *_aligner_rules("model.generation_aligner", "gen_aligner", cfg.gen_aligner_depth),
        *affine("model.generation_head.proj_out", "gen_head.proj", "linear"),
        *affine("model.generation_head.vision_head", "gen_head.out", "linear"),
        Rule("model.generation_embeddings.weight", ("gen_embed.embedding",), "same"),
        *vq_outer_rules(VQ),
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
    return Table(rules, skips)


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
    torch, path = f"{VQ}.{coder}.{levels}.{{i}}", f"gen_vq.{coder}.levels.{{i}}"
    return (
        *resnet_rules(f"{torch}.block.{{j}}", f"{path}.res.{{j}}"),
        *attention_rules(f"{torch}.attn.{{j}}", f"{path}.attn.{{j}}"),
        *affine(f"{torch}.{scaling}.conv", f"{path}.{scaling}", "conv2d"),
    )


def _middle_rules() -> tuple[Rule, ...]:
    torch, path = f"{VQ}.{{c:encoder|decoder}}.mid", f"{VQ_PATH}.mid"
    return (
        *resnet_rules(f"{torch}.block_1", f"{path}.0"),
        *attention_rules(f"{torch}.attn_1", f"{path}.1"),
        *resnet_rules(f"{torch}.block_2", f"{path}.2"),
    )
