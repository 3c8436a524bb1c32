"""A LoRA run of a stage: trainable parameters, adapter in PEFT's format, merged model."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stage_configs import SMALL, make_program, small_config, train_stage

from janus_jax.interop.convert import export_folder
from janus_jax.interop.load import build_model, load_params, open_folder
from janus_jax.interop.readers import read_safetensors
from janus_jax.interop.stored import stored_params
from janus_jax.training.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("quick_compiles")

TARGETS = (
    r"language_model\.(layers\.\d+\.self_attn\.[qv]_proj|lm_head)"
    r"|und_encoder\.blocks\.0\.mlp\.fc1"
)


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory):
    """Settings and output of a run of two steps from a folder in transformers' layout."""
    folder = tmp_path_factory.mktemp("lora")
    export_folder(SMALL, folder / "base", "transformers", overwrite=False)
    changed = dict(init=str(folder / "base"), lora_rank=2, lora_alpha=3.0, lora_targets=TARGETS)
    changed |= dict(learning_rate=0.05, end_learning_rate=0.05)
    config = small_config(folder / "run", steps=2, **changed)
    train_stage(config)
    return config, folder / "run"


def weights(folder, adapter=None):
    stored = stored_params(open_folder(folder, adapter))
    return {path: stored.read(path) for path in stored.metadata}


def test_lora_trains_and_keeps_adapters_alone_and_is_merged_in_the_model(lora_run):
    config, output = lora_run
    program = make_program(config)
    with Checkpoints(output / "checkpoints", 3) as checkpoints:
        state, _ = checkpoints.restore(program.abstract_state)
    layers = {path.rpartition(".dot_general")[0] for path in state.params}
    assert len(state.params) == 2 * len(layers) and all(re.fullmatch(TARGETS, p) for p in layers)
    before, after = weights(SMALL), weights(output / "model")
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {f"{layer}.kernel" for layer in layers}
    for layer in layers:
        a, b = (np.asarray(state.params[f"{layer}.dot_general.{name}"]) for name in "ab")
        want = before[f"{layer}.kernel"].astype(np.float32) + config.lora_alpha / 2 * a @ b
        np.testing.assert_allclose(after[f"{layer}.kernel"], want, rtol=1e-6, atol=1e-7)
    kinds = {path.split(".")[0]: array.dtype for path, array in after.items()}
    for part in ("language_model", "und_encoder"):
        assert kinds.pop(part) == np.float32  # model_dtype, and the rest as it was
    assert {str(kind) for kind in kinds.values()} == {"bfloat16"}


def test_the_adapter_on_the_base_is_the_model_to_the_bit(lora_run):
    config, output = lora_run
    opened = open_folder(config.init, output / "adapter")
    merged = load_params(opened, jnp.float32)
    for path, array in weights(output / "model").items():
        np.testing.assert_array_equal(merged[path], array.astype(np.float32), err_msg=path)


def test_the_adapter_has_peft_s_names(lora_run):
    config, output = lora_run
    assert sorted(path.name for path in (output / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    stated = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert (stated["r"], stated["lora_alpha"], stated["peft_type"]) == (2, 3, "LORA")
    assert stated["base_model_name_or_path"] == config.init
    tensors, _ = read_safetensors(output / "adapter" / "adapter_model.safetensors")
    modules = [*stated["target_modules"]]
    assert "model.vision_model.encoder.layers.0.mlp.fc1" in modules
    assert "model.language_model.layers.0.self_attn.q_proj" in modules
    assert "lm_head" in modules
    names = {f"base_model.model.{module}.lora_{x}.weight" for module in modules for x in "AB"}
    assert tensors.keys() == names


def test_peft_loads_the_adapter_and_gives_the_model_s_logits(lora_run):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, output = lora_run
    kind = transformers.JanusForConditionalGeneration
    base = kind.from_pretrained(config.init, dtype=torch.float32)
    tokens = np.arange(3, 23)[None]
    with torch.no_grad():
        before = base(torch.tensor(tokens)).logits
        adapted = peft.PeftModel.from_pretrained(base, output / "adapter")
        expected = adapted(input_ids=torch.tensor(tokens)).logits.numpy()
    merged = open_folder(output / "model")
    model = build_model(merged.cfg, load_params(merged, jnp.float32))
    got = text_logits(model.language_model, tokens)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert np.abs(expected - before.numpy()).max() > 0.1


@jax.jit
def text_logits(decoder, tokens):
    return decoder.lm_head(decoder(decoder.embed(tokens))[0])
