"""Messages for paths that are not checkpoint folders, and for weights with other names."""

import dataclasses
import json
import re

import checkpoints
import numpy as np
import pytest
import torch

from janus_jax.interop import load
from janus_jax.interop.folders import check_folder, find_folder
from janus_jax.interop.load import check_weights, open_folder, param_shapes, plan_folder
from janus_jax.interop.tensors import abbreviate, wrapper_prefix

FILES = "config.json, tokenizer.json, .* model.safetensors or pytorch_model.bin"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Janus-Pro-1B", "deepseek-ai/Janus-Pro-1B?"),
        ("models/janus_pro_7b/", "deepseek-ai/Janus-Pro-7B?"),
        ("Janus-Pro-1", "deepseek-ai/Janus-Pro-1B?"),
        ("janus-pr-7B", "deepseek-ai/Janus-Pro-7B?"),
        ("Janus-1.3b", "deepseek-ai/Janus-1.3B?"),
        ("janus-pro", "deepseek-ai/Janus-Pro-1B or deepseek-ai/Janus-Pro-7B?"),
        ("JanusFlow-1.3B", "JanusFlow is not"),
        ("nowhere", "nowhere is not a folder"),
        ("x" * 5000, "...xxxxxxxxxxxxxxxxxxxxxxxx is not"),
        ("a\0b", "is not a folder"),
        ("a.gguf", "GGUF"),
        ("a.gguf", "/Janus-Pro-1B, which needs config.json, tokenizer.json, tokenizer_config.json"),
    ],
)
def test_what_is_no_folder(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        find_folder(name)
    assert says in str(caught.value) and "Download" not in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:  # convert and train do not download
        open_folder(name)
    assert says in str(caught.value)
    download = "hf download deepseek-ai/"
    assert (download in str(caught.value)) == ("deepseek-ai" in says and "GGUF" not in says)
    assert len(str(caught.value)) < 320


def test_a_hub_id_where_only_folders_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = "hf download deepseek-ai/Janus-Pro-1B"
    with pytest.raises(FileNotFoundError, match=message):
        open_folder("deepseek-ai/Janus-Pro-1B")


def test_the_shipped_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("janus_tiny") == find_folder(None) == open_folder("janus_tiny").path
    for find in (find_folder, open_folder):
        with pytest.raises(FileNotFoundError, match=r"janus-tiny.*janus_tiny"):
            find("janus-tiny")
    (tmp_path / "janus_tiny").mkdir()  # a folder of that name goes before
    with pytest.raises(FileNotFoundError, match=r"janus_tiny .*config\.json"):
        find_folder("janus_tiny")


def test_a_hub_id_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub

    def offline(*_, **__):
        raise OSError("no such repository.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match=r"no such repository.*deepseek-ai/Janus-Pro-1B"):
        find_folder("deepseek/Janus-Pro-1b")
    with pytest.raises(FileNotFoundError, match=r"no such repository$"):
        find_folder("deepseek-ai/Janus-Pro-1B")


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_a_file_is_not_a_folder(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    kind = "a file" if name == "config.json" else "a weights file"
    says = rf"{name} is {kind}.*\({tmp_path}\).*{FILES}"
    for check in (check_folder, find_folder, open_folder):
        with pytest.raises(FileNotFoundError, match=says if len(str(tmp_path)) < 80 else kind):
            check(tmp_path / name)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("a.gguf", "GGUF"),
        ("snapshots/0a1b/config.json", "cache.*/snapshots/0a1b$"),
        ("model/config.json", ".*/model$"),
        ("model.safetensors", f".*{FILES}"),
    ],
)
def test_a_folder_without_a_config(tmp_path, file, says):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(FileNotFoundError, match=f"no config.json.*{says}"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model-q4_k.gguf", "model-q4_k.gguf.*GGUF"),
        ("model-00001-of-00002.safetensors", "shards.*index"),
        ("consolidated.pth", "model.safetensors.*consolidated.pth$"),
    ],
)
def test_weights_of_other_names_are_named(golden, tmp_path, file, says):
    checkpoints.copy_small_files(golden, tmp_path / "f")
    (tmp_path / "f" / file).touch()
    with pytest.raises(FileNotFoundError, match=f"no weights.*{says}"):
        check_weights(open_folder(tmp_path / "f"))


def test_lists_of_names_are_bounded():
    assert abbreviate(["a.b", "a.c", "a.d"]) == "a.b, a.c, a.d"
    names = ["a.b.c", "a.b", "a.bc", "a.b.f"]
    assert abbreviate(names) == "a.b.c, a.b, a.bc, ... (all begin with 'a.')"
    assert abbreviate(["ab", "ac", "ad", "ae"]) == "ab, ac, ad, ..."
    assert wrapper_prefix([]) == wrapper_prefix(["module.a", "b"]) == ""
    assert wrapper_prefix(["modules.a"]) == ""
    assert wrapper_prefix(["module._orig_mod.a.b", "module._orig_mod.a.c"]) == "module._orig_mod."


@pytest.fixture(scope="module")
def cfg(golden):
    return open_folder(golden / "janus").cfg


def named(golden, folder, rename, **changes):
    """The golden checkpoint with renamed tensors; changes: keys of its config.json."""
    state = {rename(name): value for name, value in checkpoints.tensors(golden).items()}
    checkpoints.make_single(golden, folder, state)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return open_folder(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.module."])
def test_the_prefixes_of_wrappers_are_not_part_of_names(golden, tmp_path, prefix):
    wanted, plan = plan_folder(open_folder(golden / "janus"))
    source, wrapped = plan_folder(named(golden, tmp_path / "w", lambda name: prefix + name))
    assert [step.paths for step in plan.steps] == [step.paths for step in wrapped.steps]
    assert set(plan.skipped) == set(wrapped.skipped)
    name = plan.steps[5].torch
    np.testing.assert_array_equal(source.read(name), wanted.read(name))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_lose_the_prefix_of_all(golden, tmp_path, kind, monkeypatch):
    state = {f"module.{name}": value for name, value in checkpoints.tensors(golden).items()}
    monkeypatch.setattr(checkpoints, "tensors", lambda golden: state)
    check_weights(open_folder(checkpoints.make_sharded(golden, tmp_path / "s", kind)))


def test_other_prefixes_are_named_once(golden, tmp_path):
    folder = named(golden, tmp_path / "p", lambda name: f"base_model.model.{name}")
    with pytest.raises(ValueError) as caught:
        check_weights(folder)
    text = str(caught.value)
    assert re.search(r"\d+ unknown: .*, \.\.\. \(all begin with 'base_model.model.'\); ", text)
    assert text.endswith("merge its adapters (merge_and_unload) and save the model again")
    assert len(text) < 1000


def test_one_name_without_the_prefix_is_a_fault(golden, tmp_path):
    def rename(name):
        return name if name == "gen_embed.weight" else f"module.{name}"

    with pytest.raises(ValueError, match=r"unknown: .*'module.'.*missing: "):
        check_weights(named(golden, tmp_path / "p", rename))


QUANTIZED = {
    "bitsandbytes, 4 bits": ("mlp.up_proj.weight.quant_map", torch.float32),
    "bitsandbytes, 8 bits": ("mlp.up_proj.SCB", torch.float32),
    "GPTQ or AWQ": ("mlp.up_proj.qweight", torch.int32),
    "fp8 or compressed-tensors": ("mlp.up_proj.weight_scale_inv", torch.float32),
    "MLX": ("mlp.up_proj.scales", torch.float16),
}


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_are_named(golden, tmp_path, method):
    name, dtype = QUANTIZED[method]
    state = {f"language_model.model.layers.0.{name}": torch.ones(3, dtype=dtype)}
    folder = open_folder(checkpoints.make_single(golden, tmp_path / "q", state))
    message = f"quantized.*{name}.*{method}"
    with pytest.raises(ValueError, match=message):
        check_weights(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.uint32])
def test_quantized_dtypes_are_named(golden, tmp_path, dtype):
    state = {"language_model.lm_head.weight": torch.zeros(3).to(dtype)}
    folder = open_folder(checkpoints.make_single(golden, tmp_path / "q", state))
    with pytest.raises(ValueError, match=r"quantized.*language_model.lm_head.weight"):
        check_weights(folder)


def test_a_quantization_config_counts_only_for_quantized_weights(golden, tmp_path):
    stated = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    check_weights(named(golden, tmp_path / "floats", str, **stated))
    state = {"language_model.lm_head.weight": torch.ones((448, 48), dtype=torch.int8)}
    folder = open_folder(checkpoints.make_single(golden, tmp_path / "q", state))
    folder = dataclasses.replace(folder, config=folder.config | stated)
    with pytest.raises(ValueError) as caught:
        check_weights(folder)
    for part in ("quantization_config", "'bitsandbytes'", "int8", "bfloat"):
        assert part in str(caught.value)


def test_shapes_are_those_of_a_whole_model(cfg):
    _, state = load.abstract(cfg)
    whole = {load._path(keys): leaf.shape for keys, leaf in load.nnx.to_flat_state(state)}
    assert list(param_shapes(cfg).items()) == list(whole.items())


@pytest.mark.parametrize("part", ["language_model.num_hidden_layers", "und_encoder.num_layers"])
def test_many_layers_are_not_built_before_tensors_are_compared(golden, cfg, monkeypatch, part):
    built, abstract = [], load.abstract

    def recorded(cfg):
        built.append((cfg.language_model.num_hidden_layers, cfg.und_encoder.num_layers))
        return abstract(cfg)

    monkeypatch.setattr(load, "abstract", recorded)
    section, field = part.split(".")
    deep = dataclasses.replace(getattr(cfg, section), **{field: 512})
    folder = open_folder(golden / "janus")
    folder = dataclasses.replace(folder, cfg=dataclasses.replace(cfg, **{section: deep}))
    with pytest.raises(ValueError, match=r"\d{4} missing") as caught:
        check_weights(folder)
    assert built == [(1, 1)] and len(str(caught.value)) < 500
