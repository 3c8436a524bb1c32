"""Conversion table of DeepSeek's layout (`MultiModalityCausalLM`): Janus-1.3B and Janus-Pro.

Constants and arguments named *PATH, `path` or `paths` are parameter paths of janus_jax; the others
are PyTorch names.
"""

from janus_jax.interop.rules import Rule, Skip, Table
from janus_jax.models.janus import JanusConfig

BLOCKS = "vision_model.vision_tower.blocks.{i}"
BLOCKS_PATH = "und_encoder.blocks.{i}"
VQ = "gen_vision_model.{c:encoder|decoder}"
VQ_PATH = "gen_vq.{c:encoder|decoder}"
LAYERS_PATH = "language_model.layers.{i}"

ATTN_POOL = "SigLIP's pooling head; Janus uses the patch features before it"
CODEBOOK_USED = "a training statistic, not a parameter"
INV_FREQ = "rotary frequencies, which are computed from rope_theta"


def table(cfg: JanusConfig) -> Table:
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
    return Table(rules, skips)


def unused_shapes(cfg: JanusConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes, by name, of tensors that the original class stores but never uses."""
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
    return shapes


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
    level, path = f"{VQ}.conv_blocks.{{i}}", f"{VQ_PATH}.levels.{{i}}"
    scaling = "{s:downsample|upsample}"
    return (
        *vq_outer_rules("gen_vision_model"),
        *resnet_rules(f"{level}.res.{{j}}", f"{path}.res.{{j}}"),
        *attention_rules(f"{level}.attn.{{j}}", f"{path}.attn.{{j}}"),
        *affine(f"{level}.{scaling}.conv", f"{path}.{scaling}", "conv2d"),
        *resnet_rules(f"{VQ}.mid.{{m:0|2}}", f"{VQ_PATH}.mid.{{m:0|2}}"),
        *attention_rules(f"{VQ}.mid.1", f"{VQ_PATH}.mid.1"),
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
