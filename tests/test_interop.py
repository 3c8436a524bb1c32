"""Checkpoint folders of every form load the same parameters and export bit for bit."""

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
from flax import traverse_util

from janus_jax.interop import convert, files, orbax
from janus_jax.interop.load import build_model, load_component, load_params, open_folder
from janus_jax.interop.readers import open_checkpoint
from janus_jax.processing.chat import format_conversation


def load(folder, dtype=jnp.float32, **options):
    return load_params(open_folder(folder), dtype, **options)


def assert_same_params(params, expected):
    assert params.keys() == expected.keys()
    for path, value in expected.items():
        assert params[path].dtype == value.dtype, path
        np.testing.assert_array_equal(params[path], value, err_msg=path)


def assert_same_files(folder, expected):
    """All tensors are equal bit for bit; the safetensors library reads the result."""
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
    """The golden checkpoint in every form, by the name of the form."""
    root = tmp_path_factory.mktemp("folders")
    made = {
        "single": checkpoints.make_single(golden, root / "single"),
        "sharded": checkpoints.make_sharded(golden, root / "sharded"),
        "bin": checkpoints.make_bin(golden, root / "bin"),
        "sharded_bin": checkpoints.make_sharded(golden, root / "sharded_bin", "bin"),
        "transformers": checkpoints.make_transformers(golden, root / "transformers"),
    }
    for name in ("single", "transformers"):
        convert.import_folder(made[name], root / f"orbax_{name}", overwrite=False)
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

    loaded = load(folders[form], sharding_for=sharding_for)
    assert_same_params(loaded, params)
    for path, value in loaded.items():
        assert value.sharding.is_equivalent_to(sharding_for(path, value.shape), value.ndim), path
    kernel = loaded["language_model.lm_head.kernel"]
    assert {part.data.shape for part in kernel.addressable_shards} == {(48, 112)}


def test_loaded_parameters_do_not_depend_on_the_files(golden, tmp_path, params):
    folder = checkpoints.make_single(golden, tmp_path / "m")
    loaded = load(folder, jnp.bfloat16)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(b"\xff" * len(data))  # in place, like cp
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
    with pytest.raises(ValueError, match=r"extra, gen_vq.codebook"):
        build_model(cfg, fewer | {"extra": params["gen_vq.codebook"]})


@pytest.mark.parametrize("form", ["single", "bin", "orbax_single"])
def test_deepseek_comes_back_bit_for_bit(golden, folders, tmp_path, form):
    convert.export_folder(folders[form], tmp_path / "out", "deepseek", overwrite=False)
    assert_same_files(tmp_path / "out", checkpoints.tensors(golden))
    for path in (golden / "janus").glob("*.json"):
        assert json.loads((tmp_path / "out" / path.name).read_text()) == json.loads(
            path.read_text()
        )


@pytest.mark.parametrize("form", ["single", "transformers", "orbax_single", "orbax_transformers"])
def test_transformers_comes_out_bit_for_bit(golden, folders, tmp_path, form):
    convert.export_folder(folders[form], tmp_path / "out", "transformers", overwrite=False)
    assert_same_files(tmp_path / "out", checkpoints.transformers_tensors(golden))


def test_there_and_back_keeps_all_but_the_unused(golden, folders, tmp_path):
    convert.export_folder(folders["single"], tmp_path / "hf", "transformers", overwrite=False)
    said = convert.export_folder(tmp_path / "hf", tmp_path / "back", "deepseek", overwrite=False)
    assert "wrote zeros for 14 unused tensors (attn_pool and codebook_used)" in said
    expected = {}
    for name, value in checkpoints.tensors(golden).items():
        unused = ".attn_pool." in name or name.endswith("codebook_used")
        expected[name] = torch.zeros_like(value) if unused else value
    name = "gen_vision_model.quantize.codebook_used"
    expected[name] = torch.zeros(65536, dtype=torch.bfloat16)  # its size in the original class
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
    convert.export_folder(folders["orbax_single"], tmp_path / "hf", "transformers", overwrite=False)
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
    convert.export_folder(folders["single"], tmp_path / "hf", "transformers", overwrite=False)
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


def test_an_orbax_folder_that_does_not_fit_lists_all(golden, folders, tmp_path):
    config = json.loads((golden / "janus" / "config.json").read_text())
    stored = {p: np.zeros(leaf.shape, np.float32) for p, leaf in sizes(folders).items()}
    stored["stranger"] = stored.pop("gen_vq.codebook")
    stored["und_encoder.pos_embed"] = np.zeros((3, 3), np.float32)
    orbax.save(tmp_path / "o", stored, config=config, files_from=golden / "janus")
    with pytest.raises(ValueError) as caught:
        load(tmp_path / "o")
    for part in ("1 missing: gen_vq.codebook", "1 unknown: stranger", "(3, 3), expected (16, 24)"):
        assert part in str(caught.value)


def sizes(folders):
    return orbax.stored_shapes(folders["orbax_single"])


def test_orbax_is_read_in_groups(folders, monkeypatch):
    """Otherwise loading would need much more memory than the parameters."""
    whole = load(folders["orbax_single"])
    groups, restore = [], ocp.Checkpointer.restore

    def recorded(self, directory, args):
        groups.append([leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(args.item)])
        return restore(self, directory, args=args)

    monkeypatch.setattr(ocp.Checkpointer, "restore", recorded)
    monkeypatch.setattr(orbax, "GROUP_BYTES", 200_000)
    assert_same_params(load(folders["orbax_single"]), whole)
    assert sum(map(sum, groups)) == 2 * 1_109_891 and len(groups) > 5
    assert all(sum(sizes) <= 200_000 or len(sizes) == 1 for sizes in groups)


def test_one_component_of_an_orbax_folder_is_read_alone(folders, params, monkeypatch):
    read, restore = [], ocp.Checkpointer.restore

    def recorded(self, directory, args):
        read.extend(traverse_util.flatten_dict(args.item, sep="."))
        return restore(self, directory, args=args)

    monkeypatch.setattr(ocp.Checkpointer, "restore", recorded)
    encoder = load_component(open_folder(folders["orbax_single"]), "und_encoder")
    assert set(read) == {path for path in params if path.startswith("und_encoder.")}
    for i, block in enumerate(encoder.blocks):
        expected = params[f"und_encoder.blocks.{i}.mlp.fc1.kernel"]
        np.testing.assert_array_equal(block.mlp.fc1.kernel[...], expected)
    assert len(encoder.blocks) > 1


@pytest.mark.parametrize("form", ["sharded", "transformers", "orbax_single"])
def test_loading_reports_the_bytes_read(folders, params, form, monkeypatch):
    monkeypatch.setattr(orbax, "GROUP_BYTES", 1e5)
    reports = []
    load(folders[form], jnp.bfloat16, progress=lambda *now: reports.append(now))
    total = sum(2 * value.size for value in params.values())  # they are stored in bfloat16
    done = [done for done, _ in reports]
    assert len(done) > 10 and done == sorted(done)
    assert reports[-1] == (total, total) and {whole for _, whole in reports} == {total}


def test_conversion_reports_the_bytes_written(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(orbax, "_REPORT_SECONDS", 1e-3)
    reports = {"orbax": [], "torch": []}
    for name, seen in reports.items():
        options = dict(overwrite=False, progress=lambda *now, seen=seen: seen.append(now))
        if name == "orbax":
            convert.import_folder(golden / "janus", tmp_path / name, **options)
        else:
            convert.export_folder(tmp_path / "orbax", tmp_path / name, "deepseek", **options)
    total = sum(path.stat().st_size for path in (tmp_path / "torch").glob("*.safetensors"))
    for seen in reports.values():
        done = [done for done, _ in seen]
        assert len(done) > 10 and done == sorted(done) and done[0] < 1e6 < done[-1]
        assert all(0.9 * total < whole < total for _, whole in seen)


@pytest.mark.parametrize("form", ["single", "orbax_single"])
def test_parameters_go_to_the_default_device(folders, form):
    with jax.default_device(jax.devices()[3]):
        params = load(folders[form])
    assert {d for value in params.values() for d in value.devices()} == {jax.devices()[3]}


def test_orbax_keeps_the_dtype_of_the_source(folders):
    assert {leaf.dtype for leaf in sizes(folders).values()} == {np.dtype(jnp.bfloat16)}
