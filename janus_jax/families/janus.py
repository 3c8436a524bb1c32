"""The family of Janus-1.3B, Janus-Pro-1B, Janus-Pro-7B and janus_tiny."""

from jax.sharding import PartitionSpec as P

from janus_jax.families import janus_deepseek, janus_transformers
from janus_jax.families.family import (
    DEEPSEEK,
    TRANSFORMERS,
    AttentionFlops,
    Family,
    Layout,
    ParameterGroup,
    ParameterRow,
    ParameterTable,
    Precision,
    Sizes,
)
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.processing.processor import Processor

_COLUMN, _ROW, _REPLICATED = P("fsdp", "tensor"), P("tensor", "fsdp"), P()
_COLUMN_BIAS = P("tensor")

# Of two successive projections, the first is sharded by columns and the second by rows, so that the
# activations between them stay on one device.
_ALIGNER_ROWS = (
    ParameterRow(r"layers\.(\d*[02468])\.kernel", _COLUMN),
    ParameterRow(r"layers\.(\d*[02468])\.bias", _COLUMN_BIAS),
    ParameterRow(r"layers\.(\d*[13579])\.kernel", _ROW),
    ParameterRow(r"layers\.(\d*[13579])\.bias", _REPLICATED),
)
_PARTS = (
    # The image tokenizer is small, and its convolutions are fastest when replicated. Images decoded
    # in bfloat16 show color banding.
    ParameterGroup("gen_vq", None, (ParameterRow(".*", _REPLICATED),), Precision.FLOAT32),
    ParameterGroup(
        "und_encoder",
        "patch",
        (
            ParameterRow(r"patch_embed\.(?:kernel|bias)", _REPLICATED),
            ParameterRow("pos_embed", _REPLICATED, is_matrix=False),
        ),
    ),
    ParameterGroup(
        "und_encoder.blocks.{i}",
        "patch",
        (
            ParameterRow(r"attn\.[qkv]_proj\.kernel", _COLUMN),
            ParameterRow(r"attn\.[qkv]_proj\.bias", _COLUMN_BIAS),
            ParameterRow(r"attn\.out_proj\.kernel", _ROW),
            ParameterRow(r"mlp\.fc1\.kernel", _COLUMN),
            ParameterRow(r"mlp\.fc1\.bias", _COLUMN_BIAS),
            ParameterRow(r"mlp\.fc2\.kernel", _ROW),
            ParameterRow(r"(?:attn\.out_proj|mlp\.fc2)\.bias", _REPLICATED),
            ParameterRow(r"norm[12]\.(?:scale|bias)", _REPLICATED),
        ),
    ),
    ParameterGroup("und_encoder.norm", "patch", (ParameterRow("scale|bias", _REPLICATED),)),
    ParameterGroup("und_aligner", "patch", _ALIGNER_ROWS),
    ParameterGroup(
        "gen_embed",
        "generated",
        (ParameterRow("embedding", _REPLICATED, is_matrix=False),),
        Precision.FLOAT32_GRADIENT,
    ),
    ParameterGroup("gen_aligner", "generated", _ALIGNER_ROWS),
    ParameterGroup(
        "language_model.embed_tokens",
        "token",
        (ParameterRow("embedding", P("tensor", "fsdp"), is_matrix=False),),
        Precision.FLOAT32_GRADIENT,
    ),
    ParameterGroup(
        "language_model.layers.{i}",
        "token",
        (
            ParameterRow(r"self_attn\.[qkv]_proj\.kernel", _COLUMN),
            ParameterRow(r"self_attn\.o_proj\.kernel", _ROW),
            ParameterRow(r"mlp\.(?:gate|up)_proj\.kernel", _COLUMN),
            ParameterRow(r"mlp\.down_proj\.kernel", _ROW),
            ParameterRow(r"(?:input|post_attention)_layernorm\.scale", _REPLICATED),
        ),
    ),
    ParameterGroup("language_model.norm", "token", (ParameterRow("scale", _REPLICATED),)),
    ParameterGroup(
        "language_model.lm_head",
        "text_target",
        (ParameterRow("kernel", _COLUMN),),
        Precision.FLOAT32_GRADIENT,
    ),
    ParameterGroup(
        "gen_head.proj",
        "image_target",
        (ParameterRow("kernel", _COLUMN), ParameterRow("bias", _COLUMN_BIAS)),
        Precision.FLOAT32_GRADIENT,
    ),
    ParameterGroup(
        "gen_head.out",
        "image_target",
        (ParameterRow("kernel", _ROW), ParameterRow("bias", _REPLICATED)),
        Precision.FLOAT32_GRADIENT,
    ),
)


def check(cfg: JanusConfig) -> None:
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


def sizes(cfg: JanusConfig) -> Sizes:
    """Returns the sizes that matter outside of the networks."""
    decoder = cfg.language_model
    return Sizes(
        image_size=cfg.image_size,
        input_image_tokens=cfg.und_encoder.num_tokens,
        generated_image_tokens=cfg.num_image_tokens,
        codebook_size=cfg.gen_vq.codebook_size,
        vocab_size=decoder.vocab_size,
        max_positions=decoder.max_position_embeddings,
        heads={
            "attention heads of the decoder": decoder.num_attention_heads,
            "key/value heads of the decoder": decoder.num_key_value_heads,
            "heads of the vision encoder": cfg.und_encoder.num_heads,
        },
    )


def attention_flops(cfg: JanusConfig) -> tuple[AttentionFlops, ...]:
    """Returns the FLOPs of attention, by stack."""
    encoder, decoder = cfg.und_encoder, cfg.language_model
    blocks = encoder.num_layers + encoder.select_layer + 1
    per_patch = 4.0 * encoder.width * encoder.num_tokens
    per_pair = 4.0 * decoder.num_attention_heads * decoder.head_dim
    return (
        AttentionFlops("und_encoder.blocks.{i}", blocks, "patch", per_patch),
        AttentionFlops("language_model.layers.{i}", decoder.num_hidden_layers, "pair", per_pair),
    )


JANUS = Family(
    config_class=JanusConfig,
    released={
        name: getattr(JanusConfig, name)
        for name in ("janus_1_3b", "janus_pro_1b", "janus_pro_7b", "janus_tiny")
    },
    build=Janus,
    parameter_table=ParameterTable(_PARTS),
    stacks={
        "und_encoder.blocks": "und_encoder.num_layers",
        "language_model.layers": "language_model.num_hidden_layers",
    },
    image_codec="gen_vq",
    layouts={
        DEEPSEEK: Layout(
            janus_deepseek.read,
            janus_deepseek.write,
            janus_deepseek.table,
            janus_deepseek.unused,
            # the decoder with and without its head
            adapter_prefixes=("", "language_model.", "language_model.model."),
        ),
        TRANSFORMERS: Layout(
            janus_transformers.read,
            janus_transformers.write,
            janus_transformers.table,
            adapter_prefixes=("", "model."),  # the model without its head
        ),
    },
    check=check,
    sizes=sizes,
    attention_flops=attention_flops,
    processor=Processor.from_dir,
)
