"""LoRA adapters on the small checkpoint: merged while it is read, or refused by name."""

import json
import math
import shutil
import weakref

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from stage_configs import SMALL

from convert.__main__ import main as convert
from janus_jax import load
from janus_jax.commands import sample as cli
from janus_jax.families.janus import JANUS
from janus_jax.interop.adapter import Adapter
from janus_jax.interop.adapter_config import read_adapter_config
from janus_jax.interop.adapter_writing import write_adapter
from janus_jax.interop.files import write_safetensors_file
from janus_jax.interop.folders import find_adapter
from janus_jax.interop.load import load_params, open_adapter, open_folder, param_shapes, table_for
from janus_jax.interop.stored import stored_params
from janus_jax.sharding import make_mesh, sharding_for

LAYERS = ("language_model.layers.0.self_attn.q_proj", "und_encoder.blocks.0.attn.v_proj")
MODULES = ("language_model.model.layers.0.self_attn.q_proj", "attn.qkv")
Q_PROJ = f"base_model.model.{MODULES[0]}"
SCALE = 5 / 2


@pytest.fixture(scope="module")
def factors():
    rng, shapes = np.random.default_rng(0), param_shapes(open_folder(SMALL).cfg)
    found = {}
    for path in (f"{layer}.kernel" for layer in LAYERS):
        sizes = ((shapes[path][0], 2), (2, shapes[path][1]))
        found[path] = tuple(rng.normal(size=size).astype(np.float32) for size in sizes)
    return found


@pytest.fixture(scope="module")
def written(factors, tmp_path_factory):
    """A LoRA adapter folder with DeepSeek's module names."""
    folder, cfg = tmp_path_factory.mktemp("written") / "adapter", open_folder(SMALL).cfg
    write_adapter(folder, table_for("deepseek", cfg), param_shapes(cfg), factors, 5.0, "the/base")
    return folder


@pytest.fixture
def adapter(written, tmp_path):
    """A copy of the LoRA adapter that a test can change."""
    return shutil.copytree(written, tmp_path / "adapter")


@pytest.fixture(scope="module")
def expected(factors):
    """Stored parameters by path in float32, with the updates of LAYERS added."""
    stored = stored_params(open_folder(SMALL))
    params = {path: stored.read(path).astype(np.float32) for path in stored.metadata}
    return params | {p: params[p] + np.float32(SCALE) * (a @ b) for p, (a, b) in factors.items()}


def stated(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def state(folder, **changed) -> None:
    text = json.dumps(stated(folder) | changed)
    (folder / "adapter_config.json").write_text(text)


def tensors(folder) -> dict[str, np.ndarray]:
    return safetensors.numpy.load_file(folder / "adapter_model.safetensors")


def store(folder, found: dict[str, np.ndarray]) -> None:
    safetensors.numpy.save_file(found, folder / "adapter_model.safetensors")


def merged(folder, adapter, dtype=jnp.float32, sharding=lambda path, shape: None, progress=None):
    opened = open_folder(folder, adapter)
    return load_params(opened, dtype, sharding, progress=progress)


def assert_same(found, expected, dtype=np.float32) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        wanted = np.float32 if path.startswith("gen_vq.") else dtype
        assert found[path].dtype == wanted
        np.testing.assert_array_equal(found[path], value.astype(wanted), err_msg=path)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_the_sum_is_rounded_once(written, expected, dtype):
    assert_same(merged(SMALL, written, dtype), expected, dtype)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_factors_of_other_types_are_summed_in_float32(adapter, factors, dtype):
    found = {name: x.astype(dtype) for name, x in tensors(adapter).items()}
    kinds = {name: (x.dtype, x.shape) for name, x in found.items()}
    write_safetensors_file(adapter / "adapter_model.safetensors", kinds, found.__getitem__)
    path = f"{LAYERS[0]}.kernel"
    before = stored_params(open_folder(SMALL)).read(path).astype(np.float32)
    a, b = (x.astype(dtype).astype(np.float32) for x in factors[path])
    got = stored_params(open_folder(SMALL, adapter)).read(path)
    want = (before + np.float32(SCALE) * (a @ b)).astype(got.dtype)
    np.testing.assert_array_equal(got, want)


def test_a_sharded_load_holds_one_merged_tensor_at_a_time(written, expected, monkeypatch):
    mesh, alive, whole = make_mesh(fsdp=2), [], Adapter.merged

    def watched(self, path, array):
        assert not any(earlier() is not None for earlier in alive)
        found = whole(self, path, array)
        if path in self.updates:
            alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(Adapter, "merged", watched)
    found = merged(SMALL, written, sharding=sharding_for(mesh, JANUS.parameter_table))
    assert len(alive) == 1 + 3  # the tensor of the second layer holds two other layers
    assert_same(found, expected)
    assert len(found[f"{LAYERS[0]}.kernel"].sharding.device_set) == 2


def test_converting_merges_and_an_orbax_folder_takes_an_adapter(
    written, expected, tmp_path, capsys
):
    convert([str(SMALL), str(tmp_path / "plain")])
    one = {p: x.astype(ml_dtypes.bfloat16) for p, x in expected.items()}
    reports = []
    found = merged(
        tmp_path / "plain", written, jnp.bfloat16, progress=lambda *now: reports.append(now)
    )
    assert_same(found, one, ml_dtypes.bfloat16)
    assert reports == sorted(reports) and reports[-1][0] == reports[-1][1] == reports[0][1]
    convert(["export", str(tmp_path / "plain"), str(tmp_path / "a"), "--layout", "deepseek",
             "--adapter", str(written)])  # fmt: skip
    convert([str(SMALL), str(tmp_path / "b"), "--adapter", str(written)])
    assert capsys.readouterr().out.count(f"\nmerged the LoRA adapter {written}\n") == 2
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = stored_params(open_folder(folder))
        for path, value in one.items():
            assert found.metadata[path][0] == value.dtype
            np.testing.assert_array_equal(found.read(path), value, err_msg=path)
    with pytest.raises(SystemExit):
        convert([str(SMALL), str(written), "--adapter", str(written), "--overwrite"])
    assert "inside DST" in capsys.readouterr().err


def test_the_pipeline_merges_and_names_the_adapter(written, small, expected):
    pipeline = load(SMALL, dtype="float32", adapter=written)
    assert pipeline.name == f"{SMALL} with adapter {written}"
    q_proj = pipeline.model.language_model.layers[0].self_attn.q_proj.kernel
    np.testing.assert_array_equal(q_proj, expected[f"{LAYERS[0]}.kernel"])
    assert not np.array_equal(q_proj, small.model.language_model.layers[0].self_attn.q_proj.kernel)


def test_an_adapter_of_the_hub(written, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(tmp_path / name))
    assert find_adapter("org/adapter") == tmp_path / "org/adapter"
    assert find_adapter(written) == written
    assert find_adapter(None) is None
    with pytest.raises(ValueError, match=r"adapter.*''"):
        find_adapter("")


def test_an_adapter_in_place_of_a_model(written, adapter, capsys):
    message = "'the/base'.*--model"
    with pytest.raises(ValueError, match=message) as caught:
        load(written)
    assert f"--model BASE --adapter {written}" in str(caught.value)
    shutil.copy(SMALL / "config.json", adapter)  # some trainers write it
    with pytest.raises(ValueError, match=f"{adapter}.*--adapter"):
        open_folder(adapter)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--model", str(adapter), "--prompt", "a cat", "--output_dir", str(adapter / "x")])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and "--model BASE --adapter" in err


def test_an_adapter_beside_full_weights(written, expected, tmp_path):
    both = shutil.copytree(SMALL, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(written / name, both)
    rule = f"adapter_config.json.*--adapter {both}"
    for other in (None, written):
        with pytest.raises(ValueError, match=rule):
            open_folder(both, other)
    assert_same(merged(both, both), expected)
    target = tmp_path / "merged"
    convert(["export", str(both), str(target), "--layout", "deepseek", "--adapter", str(both)])
    assert not (target / "adapter_config.json").exists()
    open_folder(target)
    (both / "adapter_config.json").unlink()
    (both / "adapter_config.json").symlink_to("missing")  # like a hub cache with a missing file
    with pytest.raises(ValueError, match=rule):
        open_folder(both)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(use_dora=True), "use_dora.*True"),
        (dict(modules_to_save=["lm_head"]), r"modules_to_save.*\['lm_head'\]"),
        (dict(lora_bias=True), "lora_bias.*True"),
        (dict(bias="all"), "bias.*'all'"),
        (dict(layer_replication=[[0, 1]]), r"layer_replication.*\[\[0, 1\]\]"),
        (dict(trainable_token_indices=[1]), r"trainable_token_indices.*\[1\]"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights.*'pissa_niter_4'"),
        (dict(init_lora_weights="olora"), "init_lora_weights.*'olora'"),
        (dict(init_lora_weights="corda"), "init_lora_weights.*'corda'"),
        (dict(target_parameters=["a"] * 99), r"target_parameters.*\['a', 'a'"),
        (dict(peft_type="LOHA"), "peft_type.*'LORA'.*'LOHA'"),
        (dict(peft_type=None), "peft_type.*'LORA'.*None"),
        (dict(r=0), r": r\b.*\b0\b"),
        (dict(r="8"), r": r\b.*'8'"),
        (dict(lora_alpha=math.nan), "lora_alpha.*nan"),
        (dict(rank_pattern={"q": 1.5}), "rank_pattern.*'q'.*1.5"),
        (dict(rank_pattern=[1]), r"rank_pattern.*\[1\]"),
        (dict(alpha_pattern={"q(": 1}), r"alpha_pattern.*\bq\("),
        (dict(target_modules=None), "target_modules.*none"),
        (dict(target_modules=[1]), r"target_modules.*\[1\]"),
        (dict(target_modules="*q"), r"target_modules.*'\*q'"),
        (dict(use_rslora="no"), "use_rslora.*'no'"),
        (dict(layers_to_transform=["1"]), r"layers_to_transform.*\['1'\]"),
    ],
)
def test_settings_that_are_not_supported(adapter, changed, message):
    state(adapter, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        open_adapter(open_folder(SMALL, adapter))
    assert str(caught.value).startswith(f"{adapter / 'adapter_config.json'}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(adapter)) + 300


@pytest.mark.parametrize(
    "changed",
    [
        dict(lora_dropout=0.5, task_type="CAUSAL_LM", base_model_name_or_path="another/model"),
        dict(init_lora_weights="gaussian", peft_version="0.99", revision="main", use_dora=False),
        dict(init_lora_weights=True, modules_to_save=[], loftq_config={}, rank_pattern=None),
        dict(target_modules=r".*\.(q_proj|qkv)", layers_to_transform=None),
    ],
)
def test_settings_that_change_nothing(adapter, expected, changed):
    if "rank_pattern" in changed:  # so that the fused qkv has the same rank as the others
        changed |= dict(alpha_pattern={}, target_modules=[*MODULES])
    if "target_modules" in changed and isinstance(changed["target_modules"], str):
        changed["target_modules"] = rf"{'|'.join(MODULES)}|vision_model\..*qkv"
    state(adapter, **changed)
    assert_same(merged(SMALL, adapter), expected)


def edited(kind: str, found: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    a, b = f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"
    if kind == "half":
        del found[b]
    elif kind == "module":
        del found[a], found[b]
    elif kind == "unknown":
        names = [name.replace("layers.0", "layers.99") for name in (a, b)]
        found |= dict.fromkeys(names, np.zeros((2, 2), np.float32))
    elif kind == "untargeted":
        names = [name.replace("q_proj", "k_proj") for name in (a, b)]
        found |= dict(zip(names, (found[a], found[b]), strict=True))
    elif kind == "prefixed":
        found = {f"base_model.model.module.{name[17:]}": x for name, x in found.items()}
    elif kind == "dora":
        found[f"{Q_PROJ}.lora_magnitude_vector"] = np.ones(48, np.float32)
    elif kind == "whole":
        found["base_model.model.aligner.layers.0.weight"] = np.ones((48, 24), np.float32)
    elif kind == "shape":
        found[a] = found[a][:, :-1].copy()
    elif kind == "rank":
        found |= {a: found[a][:1].copy(), b: found[b][:, :1].copy()}
    elif kind == "nan":
        found[b][3, 1] = np.nan
    elif kind == "integer":
        found[a] = found[a].astype(np.int32)
    elif kind == "embedding":
        found[f"{Q_PROJ}.lora_embedding_A"] = found.pop(a)
    elif kind == "twice":
        found[a.removeprefix("base_model.model.")] = found[a]
    elif kind == "empty":
        found = {}
    return found


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half", f"1 missing.*{Q_PROJ}.lora_B.weight$"),
        ("module", f"2 missing.*{Q_PROJ}.lora_A.weight, {Q_PROJ}.lora_B.weight$"),
        ("unknown", r"\b2\b.*unknown.*layers.99"),
        ("untargeted", r"\b2\b.*target_modules.*k_proj.lora_A.weight"),
        ("prefixed", r"\b4\b.*unknown.*'base_model.model.module.*missing"),
        ("dora", r"\b1 not part.*lora_magnitude_vector$"),
        ("whole", r"\b1 not part.*aligner.layers.0.weight$"),
        ("shape", r"\b1\b.*shape.*\(2, 47\).*\(2, 48\)$"),
        ("rank", r"\b2\b.*shape.*\(1, 48\).*\(2, 48\).*\(48, 1\)"),
        ("nan", f"1 with NaN.*{Q_PROJ}.lora_B.weight$"),
        ("integer", f"1 .*dtype.*{Q_PROJ}.lora_A.weight.*int32"),
        ("embedding", r"\b1\b.*kind.*lora_embedding_A"),
        ("twice", r"\b1\b.*twice"),
        ("empty", r"\b4 missing"),
    ],
)
def test_tensors_that_do_not_fit(adapter, kind, message):
    store(adapter, edited(kind, tensors(adapter)))
    with pytest.raises(ValueError, match=message) as caught:
        open_adapter(open_folder(SMALL, adapter))
    assert str(adapter) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(adapter)) + 900


def test_an_adapter_of_another_model_updates_nothing(adapter):
    state(adapter, target_modules=["c_attn"])
    store(adapter, {})
    with pytest.raises(ValueError, match="no module"):
        open_adapter(open_folder(SMALL, adapter))


def test_an_update_too_large_for_float32(adapter):
    found = tensors(adapter)
    store(adapter, {name: x * np.float32(1e30) for name, x in found.items()})
    with pytest.raises(ValueError, match=r"q_proj.*NaN"):
        merged(SMALL, adapter)


def test_folders_that_are_no_adapter(adapter, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is not a folder"):
        merged(SMALL, tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=f"{SMALL}.*adapter_config.json"):
        merged(SMALL, SMALL)
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{weights}.*truncated"):
        merged(SMALL, adapter)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=f"{adapter}.*one of adapter_model.safetensors"):
        merged(SMALL, adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json.*JSON"):
        merged(SMALL, adapter)


def test_only_an_adapter_folder_is_replaced(written, factors, tmp_path):
    cfg = open_folder(SMALL).cfg
    table, shapes = table_for("deepseek", cfg), param_shapes(cfg)
    first = shutil.copytree(written, tmp_path / "first")
    (first / "stale").touch()
    write_adapter(first, table, shapes, factors, 1.5, "")
    assert stated(first)["lora_alpha"] == 1.5 and not (first / "stale").exists()
    other = shutil.copytree(SMALL, tmp_path / "other")
    with pytest.raises(ValueError, match=f"{other} exists"):
        write_adapter(other, table, shapes, factors, 1.5, "")
    assert (other / "model.safetensors").is_file()


def test_a_file_in_place_of_an_adapter_folder_is_refused_with_what_to_give(tmp_path):
    path = tmp_path / ("a" * 200) / "adapter_model.safetensors"
    with pytest.raises(FileNotFoundError, match="folder that holds adapter_") as caught:
        read_adapter_config(path)
    assert len(str(caught.value)) < 200
