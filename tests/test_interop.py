"""Checkpoint folders of every form -> one parameter tree, and back bit for bit."""

import copy
import dataclasses
import json

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.torch
import torch
import transformers

from janus_jax import checkpoint
from janus_jax.interop import export, files
from janus_jax.interop.config import read_config, write_config
from janus_jax.interop.load import build_model, load_params, open_folder
from janus_jax.interop.readers import open_checkpoint
from janus_jax.models.janus import JanusConfig
from janus_jax.processing.chat import format_conversation


def anywhere(path, shape):
    return None


def load(folder, dtype=jnp.float32, sharding_for=anywhere):
    return load_params(folder, open_folder(folder).cfg, sharding_for, dtype)


def assert_same_params(params, expected):
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        assert params[path].dtype == value.dtype, path
        np.testing.assert_array_equal(params[path], value, err_msg=path)


def assert_same_files(folder, expected):
    """Every tensor equal bit for bit, by names read with safetensors itself."""
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= safetensors.torch.load_file(path)
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and state[name].shape == value.shape, name
        assert torch.equal(state[name].view(torch.uint8), value.view(torch.uint8)), name


def bf16_everywhere_but_vq(params):
    return {p: v if p.startswith("gen_vq.") else v.astype(jnp.bfloat16) for p, v in params.items()}


@pytest.fixture(scope="module")
def params(golden):
    return load(golden / "janus")


@pytest.fixture(scope="module")
def folders(golden, tmp_path_factory):
    """The golden checkpoint in every form, by name."""
    root = tmp_path_factory.mktemp("folders")
    made = {
        "single": checkpoints.make_single(golden, root / "single"),
        "sharded": checkpoints.make_sharded(golden, root / "sharded"),
        "bin": checkpoints.make_bin(golden, root / "bin"),
        "sharded_bin": checkpoints.make_sharded(golden, root / "sharded_bin", "bin"),
        "transformers": checkpoints.make_transformers(golden, root / "transformers"),
    }
    for name in ("single", "transformers"):
        export.import_folder(made[name], root / f"orbax_{name}", overwrite=False)
        made[f"orbax_{name}"] = root / f"orbax_{name}"
    return made


FORMS = (
    "single",
    "sharded",
    "bin",
    "sharded_bin",
    "transformers",
    "orbax_single",
    "orbax_transformers",
)


def test_the_small_checkpoint_is_part_of_the_golden_one(golden):
    whole, part = (
        safetensors.torch.load_file(golden / name / "model.safetensors")
        for name in ("janus", "janus_small")
    )
    assert 200 < len(part) < len(whole)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_parameters(folders, params, form):
    assert_same_params(load(folders[form]), params)


@pytest.mark.parametrize("form", ["single", "bin", "transformers", "orbax_single"])
def test_the_vq_model_stays_float32(folders, params, form):
    assert_same_params(load(folders[form], jnp.bfloat16), bf16_everywhere_but_vq(params))


@pytest.mark.parametrize("form", ["single", "bin", "orbax_single"])
def test_tensors_are_placed_with_their_own_sharding(folders, params, form):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def sharding_for(path, shape):
        spec = [None] * len(shape)
        if shape[-1] % 4 == 0:
            spec[-1] = "x"
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))

    loaded = load(folders[form], jnp.float32, sharding_for)
    assert_same_params(loaded, params)
    for path, value in loaded.items():
        assert value.sharding.is_equivalent_to(sharding_for(path, value.shape), value.ndim), path
    kernel = loaded["language_model.lm_head.kernel"]
    assert {part.data.shape for part in kernel.addressable_shards} == {(48, 112)}


def test_loaded_parameters_do_not_depend_on_the_files(golden, tmp_path, params):
    folder = checkpoints.make_single(golden, tmp_path / "m")
    loaded = load(folder, jnp.bfloat16)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * len(data))  # in place, as cp does
    assert_same_params(loaded, bf16_everywhere_but_vq(params))


def test_build_model_holds_exactly_the_parameters(golden, params):
    cfg = open_folder(golden / "janus").cfg
    model = build_model(cfg, params)
    recorded = np.load(golden / "janus_embeds.npz")
    embeds = model.embed_image_tokens(jnp.asarray(recorded["gen_ids"]))
    np.testing.assert_allclose(embeds, recorded["gen_img_embeds"], atol=1e-5)
    logits = model.gen_head(jnp.asarray(recorded["gen_head_in"]))
    np.testing.assert_allclose(logits, recorded["gen_head_out"], atol=1e-5)
    fewer = {path: value for path, value in params.items() if path != "gen_vq.codebook"}
    with pytest.raises(ValueError, match=r"do not match the model's: extra, gen_vq.codebook"):
        build_model(cfg, fewer | {"extra": params["gen_vq.codebook"]})


@pytest.mark.parametrize("form", ["single", "bin", "orbax_single"])
def test_deepseek_comes_back_bit_for_bit(golden, folders, tmp_path, form):
    export.export_folder(folders[form], tmp_path / "out", "deepseek", overwrite=False)
    assert_same_files(tmp_path / "out", checkpoints.tensors(golden))
    for path in (golden / "janus").glob("*.json"):
        assert json.loads((tmp_path / "out" / path.name).read_text()) == json.loads(
            path.read_text()
        )


@pytest.mark.parametrize("form", ["single", "transformers", "orbax_single", "orbax_transformers"])
def test_transformers_comes_out_bit_for_bit(golden, folders, tmp_path, form):
    export.export_folder(folders[form], tmp_path / "out", "transformers", overwrite=False)
    assert_same_files(tmp_path / "out", checkpoints.transformers_tensors(golden))


def test_there_and_back_keeps_all_but_the_unused(golden, folders, tmp_path):
    export.export_folder(folders["single"], tmp_path / "hf", "transformers", overwrite=False)
    said = export.export_folder(tmp_path / "hf", tmp_path / "back", "deepseek", overwrite=False)
    assert "wrote zeros for 14 tensors that nothing reads (attn_pool and codebook_used)" in said
    expected = {}
    for name, value in checkpoints.tensors(golden).items():
        unused = ".attn_pool." in name or name.endswith("codebook_used")
        expected[name] = torch.zeros_like(value) if unused else value
    name = "gen_vision_model.quantize.codebook_used"
    expected[name] = torch.zeros(65536, dtype=torch.bfloat16)  # the size in the original class
    assert_same_files(tmp_path / "back", expected)
    back, source = open_folder(tmp_path / "back").cfg, open_folder(golden / "janus").cfg
    assert back == source
    processor = json.loads((tmp_path / "back" / "processor_config.json").read_text())
    assert processor == json.loads((golden / "janus" / "processor_config.json").read_text())


def test_large_exports_are_sharded(golden, tmp_path):
    source = open_checkpoint(golden / "janus")
    kinds = {name: (source.dtype(name), source.shape(name)) for name in source.names}
    files.write_safetensors(tmp_path, kinds, source.read, shard_bytes=500_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    assert_same_files(tmp_path, checkpoints.tensors(golden))
    assert set(open_checkpoint(tmp_path).names) == set(source.names)


def test_transformers_loads_an_export_and_gives_the_recorded_logits(golden, folders, tmp_path):
    export.export_folder(folders["orbax_single"], tmp_path / "hf", "transformers", overwrite=False)
    model, info = transformers.JanusForConditionalGeneration.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    recorded = np.load(golden / "janus_llm.npz")
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(recorded["plain_input_ids"]).long())
    np.testing.assert_allclose(out.logits.numpy(), recorded["plain_logits"], atol=1e-4)
    embeds = np.load(golden / "janus_embeds.npz")
    with torch.no_grad():
        logits = model.model.generation_head(torch.from_numpy(embeds["gen_head_in"]))
    np.testing.assert_allclose(logits.numpy(), embeds["gen_head_out"], atol=1e-4)
    assert model.config.image_token_id == 387


def test_transformers_reads_the_exported_processor_files(golden, folders, tmp_path):
    export.export_folder(folders["single"], tmp_path / "hf", "transformers", overwrite=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    recorded = json.loads((golden / "chat_templates.json").read_text())
    sample = next(s for s in recorded["sft"] if s["name"] == "pro_single_image/deepseek/none")
    content = [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == sample["prompt"]
    messages = [{"role": "system", "content": "Rhyme."}, {"role": "user", "content": "Hi"}]
    said = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    waiting = [*messages, {"role": "assistant", "content": ""}]
    assert said == format_conversation(waiting, "deepseek")
    tokens = tokenizer("a" + tokenizer.image_token).input_ids
    assert tokens.count(tokenizer.bos_token_id) == 1 and tokens[0] == tokenizer.bos_token_id
    assert tokens[-1] == 387 and tokenizer.boi_token == "<begin_of_image>"


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
    with pytest.raises(ValueError, match="n_embed must be 4096, got 2048"):
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
    with pytest.raises(ValueError, match=r"the transformers layout needs 32 groups .*8 is not 32"):
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
        ("model_type", "llama", "model_type 'llama', not 'multi_modality' or 'janus'"),
        ("vision_gen_enc_config", {}, "JanusFlow model .it has vision_gen_enc_config"),
        ("language_config.tie_word_embeddings", True, "tie_word_embeddings must be False"),
        ("language_config.rope_scaling", {"type": "linear"}, "rope scaling 'linear'"),
        ("language_config.hidden_act", "gelu", "hidden_act must be 'silu', got 'gelu'"),
        ("language_config.attention_bias", True, "attention_bias must be False, got True"),
        ("language_config.head_dim", 16, "head_dim must be 12, got 16"),
        ("language_config.num_attention_heads", 5, "hidden_size by heads is not whole: 48 / 5"),
        ("vision_config.cls", "HybridVisionTower", "cls must be .*, got 'HybridVisionTower'"),
        ("vision_config.params.select_feature", "patch", "select_feature is 'patch'"),
        ("vision_config.params.select_layer", -4, "select_layer -4 leaves no layer of 2"),
        ("aligner_config.params.projector_type", "linear", "projector_type must be .* 'linear'"),
        ("gen_vision_config.cls", "VQ-8", "cls must be 'VQ-16', got 'VQ-8'"),
        ("gen_aligner_config", {}, "gen_aligner_config.params is missing"),
        ("language_config", [], r"language_config must be an object, got \[\]"),
        ("vision_config", None, "vision_config must be an object, got None"),
        ("aligner_config.params", [], r"aligner_config.params must be an object, got \[\]"),
        ("model_type", [], r"model_type \[\], not"),
        ("vision_config.params.width", 1e400, "wrong type: cannot convert float infinity"),
        ("language_config.vocab_size", None, "vocab_size of LlamaConfig must be whole .* got None"),
        ("language_config.num_hidden_layers", 1.5, "num_hidden_layers .* got 1.5"),
        ("language_config.rms_norm_eps", "x", "rms_norm_eps .* must be a number above 0, got 'x'"),
        ("gen_vision_config.params.ch", 0, "ch of VQConfig must be whole and at least 1, got 0"),
        ("gen_vision_config.params.ch_mult", [], r"ch_mult of VQConfig must be whole .* got \(\)"),
        ("gen_head_config.params.image_token_embed", -1, "gen_head_width of JanusConfig .* got -1"),
        ("gen_vision_config.params.norm_num_groups", 7, "VQ channels by norm_num_groups is not"),
        ("language_config.num_attention_heads", 16, "head_dim by 2 is not whole: 3 / 2"),
        ("language_config.rope_theta", "x", "rope_theta .* must be a number above 0, got 'x'"),
        ("language_config.num_key_value_heads", 0, "num_key_value_heads .* at least 1, got 0"),
        ("language_config.rope_parameters", [], "config.json has a value of a wrong type"),
        ("vision_config.params.select_layer", 1.5, "select_layer must be whole, got 1.5"),
        ("vision_config.params.select_layer", True, "select_layer must be whole, got True"),
        ("aligner_config.cls", "zzz", "aligner_config.cls must be 'MlpProjector', got 'zzz'"),
        ("gen_head_config.cls", 5, "gen_head_config.cls must be 'vision_head', got 5"),
    ],
)
def test_what_is_not_supported_is_refused(golden, where, value, says):
    config = json.loads((golden / "janus" / "config.json").read_text())
    with pytest.raises(ValueError, match=says):
        read_config(edited(config, where, value))


@pytest.mark.parametrize(
    ("where", "value", "says"),
    [
        ("text_config.rope_parameters", {"rope_type": "yarn"}, "rope scaling 'yarn'"),
        ("text_config.num_attention_heads", 0, "num_attention_heads .* at least 1, got 0"),
        ("tie_word_embeddings", True, "tie_word_embeddings must be False"),
        ("vision_config.use_qk_norm", True, "use_qk_norm must be False"),
        ("vision_config.projection_dim", 2048, "projection_dim must be 48, got 2048"),
        ("vq_config.double_latent", True, "double_latent must be False"),
    ],
)
def test_what_is_not_supported_in_transformers_is_refused(where, value, says):
    with pytest.raises(ValueError, match=says):
        read_config(edited(checkpoints.TRANSFORMERS_CONFIG, where, value))


def test_sections_of_the_other_layout_are_not_looked_at(golden):
    config = json.loads((golden / "janus" / "config.json").read_text())
    assert read_config(edited(config, "text_config", None)) == read_config(config)


def test_rope_theta_is_read_wherever_it_stands():
    config = checkpoints.TRANSFORMERS_CONFIG
    new = edited(config, "text_config.rope_parameters.rope_theta", 5e4)
    assert read_config(new).language_model.rope_theta == 5e4
    old = edited(edited(config, "text_config.rope_parameters", None), "text_config.rope_theta", 6e4)
    assert read_config(old).language_model.rope_theta == 6e4


@pytest.mark.parametrize(("layer", "select"), [(-1, -1), (-2, -2), (2, -1), (1, -2), (9, -1)])
def test_select_layer_counts_from_either_end(golden, layer, select):
    config = json.loads((golden / "janus" / "config.json").read_text())
    config = edited(config, "vision_config.params.select_layer", layer)
    assert read_config(config).und_encoder.select_layer == select


def test_an_orbax_folder_that_does_not_fit_lists_all(golden, folders, tmp_path):
    config = json.loads((golden / "janus" / "config.json").read_text())
    stored = {p: np.zeros(leaf.shape, np.float32) for p, leaf in sizes(folders).items()}
    stored["stranger"] = stored.pop("gen_vq.codebook")
    stored["und_encoder.pos_embed"] = np.zeros((3, 3), np.float32)
    checkpoint.save(tmp_path / "o", stored, config=config, files_from=golden / "janus")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "o")
    for part in ("1 missing: gen_vq.codebook", "1 unknown: stranger", "(3, 3), expected (16, 24)"):
        assert part in str(caught.value)


def sizes(folders):
    return checkpoint.stored_params(folders["orbax_single"])


def test_orbax_is_read_in_groups(folders, monkeypatch):
    """So that loading takes little more memory than the parameters do."""
    whole = load(folders["orbax_single"])
    groups, restore = [], ocp.Checkpointer.restore

    def recorded(self, directory, args):
        groups.append([leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args.item)])
        return restore(self, directory, args=args)

    monkeypatch.setattr(ocp.Checkpointer, "restore", recorded)
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 200_000)
    assert_same_params(load(folders["orbax_single"]), whole)
    assert sum(map(sum, groups)) == 2 * 1_109_891 and len(groups) > 5
    assert all(sum(sizes) <= 200_000 or len(sizes) == 1 for sizes in groups)


@pytest.mark.parametrize("form", ["single", "orbax_single"])
def test_parameters_go_to_the_default_device(folders, form):
    with jax.default_device(jax.devices()[3]):
        params = load(folders[form])
    assert {d for value in params.values() for d in value.devices()} == {jax.devices()[3]}


def test_orbax_keeps_the_dtype_of_the_source(folders):
    assert {leaf.dtype for leaf in sizes(folders).values()} == {np.dtype(jnp.bfloat16)}
