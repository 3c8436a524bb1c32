"""Conversion rules, and the conversion tables with tensor listings of the released files."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from janus_jax.families.family import TRANSFORMS, ConversionTable, Rule, Skip
from janus_jax.families.registry import detect_layout, read_config
from janus_jax.interop import rules
from janus_jax.interop.load import param_shapes, table_for
from janus_jax.interop.rules import export_steps, make_plan
from janus_jax.interop.tensors import Tensor, TensorSource
from janus_jax.models.janus import JanusConfig

TABLE = ConversionTable(
    rules=(
        Rule("net.{i}.{p:q|k}.weight", ("ours.{i}.{p:q|k}.kernel",), "linear"),
        Rule("net.{i}.fused", ("ours.{i}.a", "ours.{i}.b", "ours.{i}.c"), "split_qkv_bias"),
        Rule("other.weight", ("ours.1.q.kernel",), "linear"),
    ),
    skips=(Skip(r"buffer\..*", "a statistic"),),
)
EXPECTED = {
    "ours.0.q.kernel": (2, 3),
    "ours.0.k.kernel": (2, 3),
    "ours.0.a": (4,),
    "ours.0.b": (4,),
    "ours.0.c": (4,),
}
STORED = {"net.0.q.weight": (3, 2), "net.0.k.weight": (3, 2), "net.0.fused": (12,)}


def source(shapes: dict, dtype=np.float32, problems=None) -> TensorSource:
    tensors = {n: Tensor(Path("x"), 0, np.dtype(dtype), tuple(s)) for n, s in shapes.items()}
    return TensorSource(Path("folder"), tensors, problems or {})


@pytest.mark.parametrize(
    ("name", "shape", "ours"),
    [
        ("same", (2, 3), [(2, 3)]),
        ("linear", (2, 3), [(3, 2)]),
        ("conv2d", (2, 3, 4, 5), [(4, 5, 3, 2)]),
        ("pointwise", (2, 3, 1, 1), [(3, 2)]),
        ("split_qkv", (6, 5), [(5, 2)] * 3),
        ("split_qkv_bias", (6,), [(2,)] * 3),
        ("squeeze_leading", (1, 4, 5), [(4, 5)]),
    ],
)
def test_every_transform_has_an_inverse(name, shape, ours):
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    parts = TRANSFORMS[name].from_torch(array)
    assert [part.shape for part in parts] == ours
    assert all(np.shares_memory(part, array) for part in parts)  # views: nothing is read
    np.testing.assert_array_equal(TRANSFORMS[name].to_torch(parts), array)


def test_conv_and_qkv_put_elements_where_they_belong():
    conv = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert TRANSFORMS["conv2d"].from_torch(conv)[0][3, 4, 2, 1] == conv[1, 2, 3, 4]
    qkv = np.arange(6 * 5).reshape(6, 5)
    assert TRANSFORMS["split_qkv"].from_torch(qkv)[1][4, 0] == qkv[2, 4]


def test_plan_matches_and_skips():
    plan = make_plan(TABLE, source(STORED | {"buffer.x": (1,)}), EXPECTED)
    assert {step.torch: step.paths for step in plan.steps} == {
        "net.0.q.weight": ("ours.0.q.kernel",),
        "net.0.k.weight": ("ours.0.k.kernel",),
        "net.0.fused": ("ours.0.a", "ours.0.b", "ours.0.c"),
    }
    assert plan.skipped == {"buffer.x": "a statistic"}


def test_names_match_whole_and_without_leading_zeros():
    for name in ("net.00.q.weight", "a.net.0.q.weight", "net.0.q.weights", "netx0.q.weight"):
        assert rules.find_steps(TABLE, name) == []


def test_all_faults_come_together_on_one_line():
    stored = {
        "net.0.q.weight": (2, 3),
        "net.0.fused": (12, 1),
        "net.1.q.weight": (3, 2),
        "other.weight": (3, 2),
        "stranger": (1,),
    }
    expected = EXPECTED | {"ours.1.q.kernel": (2, 3)}
    with pytest.raises(ValueError) as caught:
        problems = {"stored twice": ["net.0.k.bias"]}
        make_plan(TABLE, source(stored, problems=problems), expected)
    text = str(caught.value)
    assert "\n" not in text
    assert "1 stored twice: net.0.k.bias" in text
    assert "1 unknown: stranger" in text
    assert "1 set twice: ours.1.q.kernel by net.1.q.weight and other.weight" in text
    assert "1 missing: net.0.k.weight" in text
    assert "net.0.q.weight is (2, 3), expected (3, 2)" in text
    assert "net.0.fused is (12, 1), expected (12,)" in text


def test_a_tensor_matched_by_two_rows_is_refused():
    extra = Rule("net.{i}.q.weight", ("ours.{i}.a",), "same")
    table = ConversionTable((*TABLE.rules, extra), TABLE.skips)
    with pytest.raises(ValueError, match=r"two rows.*net.0.q.weight"):
        make_plan(table, source(STORED), EXPECTED)


def test_a_layer_beyond_the_config_is_unknown():
    with pytest.raises(ValueError, match=r"1 unknown: net.7.q.weight"):
        make_plan(TABLE, source(STORED | {"net.7.q.weight": (3, 2)}), EXPECTED)


def test_integers_are_not_weights():
    with pytest.raises(ValueError, match=r"\b3\b.*dtype.*net.0.q.weight.*int8"):
        make_plan(TABLE, source(STORED, np.int8), EXPECTED)


def test_long_lists_are_counted():
    strangers = {f"net.b.{i}.{'x' * 1000}": (1,) for i in range(50)}
    with pytest.raises(ValueError) as caught:
        make_plan(TABLE, source(STORED | strangers), EXPECTED)
    text = str(caught.value)
    assert "50 unknown: net.b.0.x" in text and text.endswith("... (all begin with 'net.b.')")
    assert len(text) < 400


def test_export_uses_the_same_rows():
    table = ConversionTable(TABLE.rules[:2], TABLE.skips)
    steps = export_steps(table, list(EXPECTED))
    assert {s.torch: rules.torch_shape(s, EXPECTED) for s in steps} == STORED
    with pytest.raises(ValueError, match=r"stray \(0 rows\), ours.0.c"):
        export_steps(table, [*(p for p in EXPECTED if p != "ours.0.c"), "stray"])


@pytest.mark.parametrize(
    ("name", "named", "skipped"),
    [
        ("Janus-1.3B", JanusConfig.janus_1_3b, 14),
        ("Janus-Pro-1B", JanusConfig.janus_pro_1b, 14),
        ("Janus-Pro-7B", JanusConfig.janus_pro_7b, 14),
        ("hf-Janus-Pro-1B", JanusConfig.janus_pro_1b, 0),
        ("hf-Janus-Pro-7B", JanusConfig.janus_pro_7b, 0),
    ],
)
def test_the_real_files_convert_both_ways(golden, name, named, skipped):
    listing = json.loads(gzip.decompress((golden / f"listings/{name}.json.gz").read_bytes()))
    cfg, stored = read_config(listing["config"]), listing["tensors"]
    assert cfg == named()
    table = table_for(detect_layout(listing["config"])[1], cfg)
    expected = param_shapes(cfg)
    plan = make_plan(table, source(stored), expected)
    assert len(plan.skipped) == skipped
    steps = export_steps(table, list(expected))
    written = {step.torch: rules.torch_shape(step, expected) for step in steps}
    assert written == {n: tuple(s) for n, s in stored.items() if n not in plan.skipped}
