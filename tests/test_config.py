"""config.json in both layouts: reading, defaults, writing, and unsupported values."""

import copy
import dataclasses
import json

import checkpoints
import pytest

from janus_jax.families.registry import read_config, write_config
from janus_jax.models.janus import JanusConfig


def test_released_configs_fill_in_the_constants(golden):
    sizes = json.loads((golden / "janus" / "config.json").read_text())
    for key in ("width", "layers", "heads", "patch_size", "mlp_ratio"):
        del sizes["vision_config"]["params"][key]
    tower = {"image_size": 384, "model_name": "siglip_large_patch16_384"}
    sizes["vision_config"]["params"] |= tower
    sizes["gen_vision_config"]["params"] = {"image_token_size": 16384, "n_embed": 8}
    sizes["language_config"] = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "vocab_size": 102400,
        "max_position_embeddings": 16384,
    }
    sizes["aligner_config"]["params"] |= {"input_dim": 1024, "n_embed": 4096}
    sizes["gen_aligner_config"]["params"]["n_embed"] = 4096
    head = {"image_token_embed": 4096, "n_embed": 4096, "image_token_size": 16384}
    sizes["gen_head_config"]["params"] = head
    assert read_config(sizes) == JanusConfig.janus_pro_7b()
    head["n_embed"] = 2048
    with pytest.raises(ValueError, match=r"n_embed.*4096.*2048"):
        read_config(sizes)


@pytest.mark.parametrize("layout", ["deepseek", "transformers"])
@pytest.mark.parametrize("name", ["janus_pro_1b", "janus_pro_7b"])
def test_written_configs_read_back(layout, name):
    cfg = getattr(JanusConfig, name)()
    assert read_config(write_config(cfg, None, layout, image_token_id=7)) == cfg


def test_every_size_survives_both_layouts(golden):
    cfg = read_config(json.loads((golden / "janus" / "config.json").read_text()))
    decoder = dataclasses.replace(
        cfg.language_model, num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-5
    )
    vision = dataclasses.replace(cfg.und_encoder, mlp_dim=101, num_heads=3)
    cfg = dataclasses.replace(
        cfg, language_model=decoder, und_encoder=vision, und_aligner_depth=3, gen_aligner_depth=1
    )
    for layout in ("deepseek", "transformers"):
        assert read_config(write_config(cfg, None, layout, image_token_id=7)) == cfg
    vision = dataclasses.replace(vision, select_layer=-2)
    gen_vq = dataclasses.replace(cfg.gen_vq, norm_num_groups=8)
    ours = dataclasses.replace(cfg, und_encoder=vision, gen_vq=gen_vq, gen_head_width=20)
    assert read_config(write_config(ours, None, "deepseek")) == ours
    with pytest.raises(ValueError, match=r"norm_num_groups.*\b32\b.*\b8\b"):
        write_config(ours, None, "transformers", image_token_id=7)


def edited(config, where, value):
    config = copy.deepcopy(config)
    *path, last = where.split(".")
    section = config
    for key in path:
        section = section[key]
    section[last] = value
    return config


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("model_type", "llama", "model_type.*'multi_modality'.*'janus'.*'llama'"),
        ("vision_gen_enc_config", {}, "JanusFlow.*vision_gen_enc_config"),
        ("language_config.tie_word_embeddings", True, "tie_word_embeddings.*False"),
        ("language_config.rope_scaling", {"type": "linear"}, "rope_type.*'linear'"),
        ("language_config.hidden_act", "gelu", "hidden_act.*'silu'.*'gelu'"),
        ("language_config.attention_bias", True, "attention_bias.*False.*True"),
        ("language_config.head_dim", 16, r"head_dim.*\b12\b.*\b16\b"),
        ("language_config.num_attention_heads", 5, r"hidden_size.*\b48\b.*heads.*\b5\b"),
        ("vision_config.cls", "HybridVisionTower", "cls.*'HybridVisionTower'"),
        ("vision_config.params.select_feature", "patch", "select_feature.*'patch'"),
        ("vision_config.params.select_layer", -4, r"select_layer.*-4\b"),
        ("aligner_config.params.projector_type", "linear", "projector_type.*'linear'"),
        ("gen_vision_config.cls", "VQ-8", "cls.*'VQ-16'.*'VQ-8'"),
        ("gen_aligner_config", {}, "gen_aligner_config.params.*missing"),
        ("language_config", [], r"language_config.*\[\]"),
        ("vision_config", None, "vision_config.*None"),
        ("aligner_config.params", [], r"aligner_config.params.*\[\]"),
        ("model_type", [], r"model_type.*\[\]"),
        ("vision_config.params.width", 1e400, "width.*inf"),
        ("language_config.vocab_size", None, "vocab_size.*None"),
        ("language_config.num_hidden_layers", 1.5, r"num_hidden_layers.*\b1\.5"),
        ("language_config.rms_norm_eps", "x", "rms_norm_eps.*'x'"),
        ("gen_vision_config.params.ch", 0, r"\bch\b.*\b0\b"),
        ("gen_vision_config.params.ch_mult", [], r"ch_mult.*\b1 to 7\b"),
        ("gen_head_config.params.image_token_embed", -1, r"gen_head_width.*-1\b"),
        ("gen_vision_config.params.norm_num_groups", 7, "norm_num_groups"),
        ("language_config.num_attention_heads", 16, r"head_dim.*\b3\b.*\b2\b"),
        ("language_config.rope_theta", "x", "rope_theta.*'x'"),
        ("language_config.num_key_value_heads", 0, r"num_key_value_heads.*\b0\b"),
        ("language_config.rope_parameters", [], r"rope_parameters.*\[\]"),
        ("vision_config.params.select_layer", 1.5, r"select_layer.*\b1\.5"),
        ("vision_config.params.select_layer", True, "select_layer.*True"),
        ("aligner_config.cls", "zzz", "aligner_config.cls.*'MlpProjector'.*'zzz'"),
        ("gen_head_config.cls", 5, r"gen_head_config.cls.*'vision_head'.*\b5\b"),
    ],
)
def test_what_is_not_supported_is_refused(golden, where, value, says):
    config = json.loads((golden / "janus" / "config.json").read_text())
    with pytest.raises(ValueError, match=says):
        read_config(edited(config, where, value))


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("text_config.rope_parameters", {"rope_type": "yarn"}, "rope_type.*'yarn'"),
        ("text_config.num_attention_heads", 0, r"num_attention_heads.*\b0\b"),
        ("text_config.tie_word_embeddings", True, "tie_word_embeddings.*False"),
        ("vision_config.use_qk_norm", True, "use_qk_norm.*False"),
        ("vision_config.projection_dim", 2048, r"projection_dim.*\b48\b.*\b2048\b"),
        ("vq_config.double_latent", True, "double_latent.*False"),
    ],
)
def test_what_is_not_supported_in_transformers_is_refused(where, value, says):
    with pytest.raises(ValueError, match=says):
        read_config(edited(checkpoints.TRANSFORMERS_CONFIG, where, value))


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}, "rope_type.*'linear'"),
        ("text_config.rope_scaling", "linear", "rope_scaling.*'linear'"),
        ("text_config.is_causal", False, "is_causal.*True.*False"),
        ("text_config.sliding_window", 0, r"sliding_window.*\b0\b"),
        ("text_config.layer_types", ["sliding_attention"] * 3, "layer_types.*'full_attention'"),
        ("text_config.per_layer_config", {"0": {}}, "per_layer_config.*null"),
        ("text_config.hidden_size", 10**9, r"hidden_size.*\b131072\b.*\b1000000000\b"),
        ("text_config.num_hidden_layers", 20_000, r"num_hidden_layers.*\b512\b.*\b20000\b"),
        ("text_config.rms_norm_eps", 1e300, r"text_config.rms_norm_eps.*1e\+300"),
        ("text_config.rms_norm_eps", 1e-300, "rms_norm_eps.*1e-300"),
        ("text_config.rms_norm_eps", 2**33, "rms_norm_eps.*8589934592"),
        ("text_config.rope_theta", 10**400, "rope_theta.*1329 bits"),
        ("text_config.rope_theta", 1e-300, "rope_theta.*1e-300"),
        ("vision_config.mlp_ratio", 5e8, "mlp_ratio.*500000000.0"),
        ("vision_config.mlp_ratio", "ab", "mlp_ratio.*'ab'"),
        ("vision_config.patch_size", 8, r"patch_size.*\b16\b.*\b8\b"),
        ("vision_config.num_image_tokens", 576, r"num_image_tokens.*\b16\b.*\b576\b"),
        ("vq_config.channel_multiplier", None, "channel_multiplier.*None"),
        ("vq_config.channel_multiplier", [1] * 5000, r"ch_mult.*\b1 to 7\b"),
        ("vision_config", [1] * 10**6, r"vision_config.*\[1, 1.*\.\.\."),
    ],
)  # fmt: skip
def test_what_transformers_reads_in_another_way_is_refused(where, value, says):
    config = checkpoints.TRANSFORMERS_CONFIG
    if where == "text_config.rope_theta":
        config = edited(config, "text_config.rope_parameters", None)
    with pytest.raises(ValueError, match=says) as caught:
        read_config(edited(config, where, value))
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("vision_config.params.pixel_mean", [0.5] * 3, "pixel_mean.*null"),
        ("vision_config.params.ignore_head", False, "ignore_head.*True.*False"),
        ("vision_config.params.model_name", "siglip_large_patch16_384", r"width.*\b1024\b"),
        ("vision_config.params.layers", 10**5, r"num_layers.*\b512\b.*\b100000\b"),
        ("language_config.rope_scaling", {"rope_type": "yarn"}, "rope_type.*'yarn'"),
        ("gen_vision_config.params.num_res_blocks", 99, r"num_res_blocks.*\b99\b"),
    ],
)
def test_what_the_original_reads_in_another_way_is_refused(golden, where, value, says):
    config = json.loads((golden / "janus" / "config.json").read_text())
    with pytest.raises(ValueError, match=says):
        read_config(edited(config, where, value))


def test_a_deepseek_vl_model_is_named(golden):
    config = json.loads((golden / "janus" / "config.json").read_text())
    for part in ("gen_vision", "gen_aligner", "gen_head"):
        del config[f"{part}_config"]
    with pytest.raises(ValueError, match="DeepSeek-VL"):
        read_config(config)


def test_the_decoder_s_own_tie_word_embeddings_decides(golden):
    """transformers writes this for an untied model whose config did not have the key."""
    for config in (
        checkpoints.TRANSFORMERS_CONFIG,
        json.loads((golden / "janus" / "config.json").read_text()),
    ):
        assert read_config(edited(config, "tie_word_embeddings", True)) == read_config(config)


def test_real_numbers_may_be_written_as_integers():
    config = edited(checkpoints.TRANSFORMERS_CONFIG, "text_config.rms_norm_eps", 1)
    config = edited(config, "text_config.rope_parameters.rope_theta", 10**10)
    decoder = read_config(config).language_model
    assert (decoder.rms_norm_eps, decoder.rope_theta) == (1.0, 1e10)
    assert {type(decoder.rms_norm_eps), type(decoder.rope_theta)} == {float}


def test_sections_of_the_other_layout_are_not_looked_at(golden):
    config = json.loads((golden / "janus" / "config.json").read_text())
    assert read_config(edited(config, "text_config", None)) == read_config(config)


def test_rope_theta_is_read_where_transformers_reads_it():
    config = checkpoints.TRANSFORMERS_CONFIG
    new = edited(config, "text_config.rope_parameters.rope_theta", 5e4)
    assert read_config(new).language_model.rope_theta == 5e4
    old = edited(edited(config, "text_config.rope_parameters", None), "text_config.rope_theta", 6e4)
    assert read_config(old).language_model.rope_theta == 6e4
    both = edited(new, "text_config.rope_scaling", {"type": "default"})
    assert read_config(both).language_model.rope_theta == 1e4  # rope_parameters is ignored


@pytest.mark.parametrize(("layer", "select"), [(-1, -1), (-2, -2), (2, -1), (1, -2), (9, -1)])
def test_select_layer_counts_from_either_end(golden, layer, select):
    config = json.loads((golden / "janus" / "config.json").read_text())
    config = edited(config, "vision_config.params.select_layer", layer)
    assert read_config(config).und_encoder.select_layer == select
