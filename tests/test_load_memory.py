"""Tests of the benchmark of loading memory on a tiny checkpoint, and of its synthetic folders."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from one_line import assert_one_line

from benchmarks import load_memory, synthetic
from janus_jax.families.registry import read_config
from janus_jax.interop.load import param_shapes, table_for
from janus_jax.interop.readers import TORCH_BIN, open_checkpoint
from janus_jax.interop.rules import make_plan
from janus_jax.interop.tensors import BFLOAT16, Tensor, TensorSource
from janus_jax.models.janus import JanusConfig

NAMES = (  # one of each kind of shape, all small
    "vision_model.vision_tower.blocks.3.attn.qkv.bias",
    "vision_model.vision_tower.norm.weight",
    "gen_vision_model.quant_conv.weight",
    "gen_aligner.layers.0.weight",
    "gen_vision_model.decoder.conv_in.weight",
)


def run(capsys, *args) -> tuple[int, str, str]:
    status = 0
    try:
        load_memory.main([str(arg) for arg in args])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def test_a_load_is_measured_in_its_own_process(golden, tmp_path, capsys):
    ballast = np.ones(10**9, np.uint8)  # in this process, so it must not be part of any figure
    target = tmp_path / "figures.json"
    args = ("--folder", golden / "janus", "--dtype", "float32", "--output", target)
    status, out, _ = run(capsys, *args)
    assert (status, json.loads(out)) == (0, json.loads(target.read_text()))
    found = json.loads(out)
    assert found["model"] == "janus" and found["versions"]["jax"]
    (figures,) = found["measurements"]
    assert figures["parameters_gb"] == pytest.approx(4 * 1_109_891 / 1e9, abs=6e-4)
    assert 0.05 < figures["before_gb"] < figures["peak_gb"] < 0.9 * ballast.nbytes / 1e9
    above = figures["peak_gb"] - figures["parameters_gb"]
    assert figures["above_gb"] == pytest.approx(above, abs=2e-3)


def test_resident_memory_counts_what_is_touched():
    before = load_memory.resident_bytes("VmRSS")
    ballast = np.ones(2 * 10**8, np.uint8)
    grown = load_memory.resident_bytes("VmRSS") - before
    assert 1.9e8 < grown < 3e8
    del ballast
    assert load_memory.resident_bytes("VmHWM") >= before + grown


def test_a_folder_that_does_not_load_is_reported_in_one_line(golden, capsys):
    status, out, err = run(capsys, "--folder", golden / "listings", "--dtype", "float32")
    assert (status, out) == (2, "")
    assert_one_line(err, "load_memory", "config.json")
    status, _, err = run(capsys, "--folder", golden / "janus", "--layers", 1)
    assert status == 2
    assert_one_line(err, "load_memory", "--layers", "--folder")
    status, _, err = run(capsys, "--layers", 25)
    assert status == 2
    assert_one_line(err, "load_memory", "layers", "Janus-Pro-1B", 1, 24, 25)


def test_the_torch_file_is_one(tmp_path):
    shapes = {name: synthetic.listing()["tensors"][name] for name in NAMES}
    path = tmp_path / TORCH_BIN
    synthetic.write_torch_file(path, shapes)
    stored = torch.load(path, weights_only=True)
    read = open_checkpoint(tmp_path)
    assert list(stored) == list(NAMES) == list(read.names)
    for name in NAMES:
        want = synthetic.values(name, shapes[name])
        assert stored[name].is_contiguous() and want.dtype == BFLOAT16
        np.testing.assert_array_equal(stored[name].view(torch.int16), want.view(np.int16))
        np.testing.assert_array_equal(read.read(name), want)


def test_values_are_random_and_no_rows_are_equal():
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    values = synthetic.values(name, (2048, 2048)).astype(np.float32)
    assert values.std() == pytest.approx(synthetic.STD, rel=0.01)
    assert len(np.unique(values[:, :4], axis=0)) == len(values)
    scales = synthetic.values("language_model.model.norm.weight", (2048,)).astype(np.float32)
    assert scales.mean() == pytest.approx(1, rel=0.01) and scales.std() > 0


def test_a_released_model_can_be_made_with_fewer_layers():
    config, tensors = synthetic.listing("Janus-Pro-7B", 1).values()
    cfg, whole = read_config(config), JanusConfig.janus_pro_7b()
    decoder = dataclasses.replace(whole.language_model, num_hidden_layers=1)
    assert cfg == dataclasses.replace(whole, language_model=decoder)
    file = TensorSource(None, {n: Tensor(None, 0, BFLOAT16, tuple(s)) for n, s in tensors.items()})
    make_plan(table_for("deepseek", cfg), file, param_shapes(cfg))
