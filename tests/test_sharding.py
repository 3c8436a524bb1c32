"""The sharding table, and that eight devices give the same results as one."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from damage import damaged
from flax import nnx
from jax.sharding import PartitionSpec as P

from janus_jax import load, sharding
from janus_jax.families.family import ParameterGroup, ParameterRow, ParameterTable, Precision
from janus_jax.families.janus import JANUS
from janus_jax.families.registry import sizes_of
from janus_jax.generation import codec, image, samplers
from janus_jax.interop.load import ConstantRngs
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.training.lora import LoRAConfig, add_adapters

pytestmark = pytest.mark.usefixtures("quick_compiles")

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 4)]
PROMPTS = ["A close-up photo of a red cat, studio light.", "a dog"]


def _params(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


def test_every_parameter_has_one_row_that_fits_its_shape(pipeline):
    mesh = sharding.make_mesh(2, 2, 2)
    place = sharding.sharding_for(mesh, JANUS.parameter_table)
    params = _params(pipeline.model)
    assert len(params) > 200
    sharded_paths = {path for path, x in params.items() if place(path, x.shape).spec != P()}
    replicated = [p for p in params if p not in sharded_paths and not p.startswith("gen_vq")]
    # all large parameters are sharded
    assert max(params[path].size for path in replicated) <= 16 * 16 * 3 * 24
    assert "language_model.layers.0.self_attn.q_proj.kernel" in sharded_paths


@pytest.fixture(scope="module")
def adapted_paths(pipeline):
    """Parameter paths of the golden model with a LoRA adapter on every layer that may have one."""

    def build():
        model = Janus(pipeline.model.cfg, rngs=ConstantRngs())
        add_adapters(model, LoRAConfig(4, 8.0, r"(?!gen_vq\.).*"), rngs=ConstantRngs())
        return model

    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(build)))
    return [".".join(map(str, path)) for path, _ in flat]


def test_aligners_lie_as_their_kernels_do(adapted_paths):
    adapters = [path for path in adapted_paths if ".dot_general." in path]
    assert len(adapters) > 40
    for path in adapters:
        layer, _, factor = path.partition(".dot_general.")
        kernel, found = (JANUS.parameter_table.find(p) for p in (f"{layer}.kernel", path))
        inputs, outputs = kernel.spec
        expected = P(inputs, None) if factor == "a" else P(None, outputs)
        assert found == dataclasses.replace(kernel, spec=expected), path


def test_every_row_is_used(adapted_paths):
    for part in JANUS.parameter_table.parts:
        for row in part.rows:
            pattern = part.pattern(row)
            assert any(pattern.fullmatch(path) for path in adapted_paths), pattern


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("gen_vq.encoder.conv_in.kernel", ("gen_vq", None, Precision.FLOAT32)),
        ("gen_embed.embedding", ("gen_embed", "generated", Precision.FLOAT32_GRADIENT)),
        ("gen_head.proj.dot_general.a", ("gen_head", "image_target", Precision.FLOAT32_GRADIENT)),
        ("und_aligner.layers.1.bias", ("und_aligner", "patch", Precision.COMPUTE)),
        ("language_model.lm_head.kernel",
         ("language_model", "text_target", Precision.FLOAT32_GRADIENT)),
        ("language_model.norm.scale", ("language_model", "token", Precision.COMPUTE)),
    ],
)
def test_the_table_says_where_a_parameter_belongs(path, expected):
    found = JANUS.parameter_table.find(path)
    assert (found.component, found.counted_by, found.precision) == expected


def test_depths_follow_the_data_flow():
    paths = [
        "und_encoder.pos_embed",
        "und_encoder.blocks.0.norm1.scale",
        "und_encoder.blocks.10.norm1.scale",
        "und_aligner.layers.0.kernel",
        "und_aligner.layers.1.kernel",
        "und_aligner.layers.2.kernel",
        "gen_aligner.layers.0.bias",
        "language_model.layers.2.mlp.up_proj.dot_general.a",
        "language_model.lm_head.kernel",
        "gen_head.out.kernel",
    ]
    depths = [JANUS.parameter_table.find(path).depth for path in paths]
    assert depths == sorted(set(depths))
    assert depths[2][1] == 10


@pytest.mark.parametrize(
    "path", ["language_model.layers.0.self_attn.k_norm.scale", "xlanguage_model.norm.scale", ""]
)
def test_a_parameter_without_a_row_is_named(path):
    with pytest.raises(ValueError, match=rf"parameter {path}\W.*\b0 match"):
        JANUS.parameter_table.find(path)


def test_a_parameter_with_two_rows_is_named():
    extra = ParameterGroup("language_model", None, (ParameterRow(".*", P()),))
    table = ParameterTable((*JANUS.parameter_table.parts, extra))
    with pytest.raises(ValueError, match=r"parameter language_model.norm.scale\b.*\b2 match"):
        table.find("language_model.norm.scale")


def test_an_axis_that_does_not_divide_leaves_the_dimension_whole():
    mesh = sharding.make_mesh(1, 4, 2)
    assert sharding.fit_spec(mesh, P("tensor", "fsdp"), (6, 8)) == P("tensor", "fsdp")
    assert sharding.fit_spec(mesh, P("tensor", "fsdp"), (6, 6)) == P("tensor", None)
    assert sharding.fit_spec(mesh, P(("data", "fsdp"),), (6, 6)) == P(None)
    with pytest.raises(ValueError, match="entries"):
        sharding.fit_spec(mesh, P("tensor", "fsdp"), (8,))


def test_a_parameter_that_cannot_be_sharded_is_logged_once_for_all_layers(caplog):
    rows = (ParameterRow("kernel", P("tensor", "fsdp")),)
    table = ParameterTable((ParameterGroup("net.{i}", None, rows),))
    place = sharding.sharding_for(sharding.make_mesh(1, 4, 2), table)
    with caplog.at_level("INFO", logger="absl"):
        assert place("net.0.kernel", (6, 6)).spec == P("tensor", None)
        assert place("net.12.kernel", (6, 6)).spec == P("tensor", None)
        assert place("net.1.kernel", (6, 8)).spec == P("tensor", "fsdp")
    (message,) = caplog.messages
    assert "net.*.kernel" in message
    assert re.findall(r"fsdp|tensor|\d+", message) == ["fsdp", "4", "6"]


def test_a_dimension_that_several_axes_do_not_divide_is_logged(caplog):
    rows = (ParameterRow("bias", P(("fsdp", "tensor"))),)
    table = ParameterTable((ParameterGroup("net", None, rows),))
    with caplog.at_level("INFO", logger="absl"):
        place = sharding.sharding_for(sharding.make_mesh(1, 4, 2), table)
        assert place("net.bias", (12,)).spec == P(None)
    assert re.findall(r"fsdp|tensor|\d+", caplog.text.split("net.bias")[1]) == [
        "fsdp",
        "tensor",
        "8",
        "12",
    ]


def test_meshes_are_read_from_text():
    mesh = sharding.parse_mesh("tensor=4, data=2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.devices.size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "mesh.*data=1,fsdp=1,tensor=1.*'model=2'"),
        ("data=2,data=2", "once.*'data=2,data=2'"),
        ("data=-1", "mesh.*'data=-1'"),
        ("data=1.5", "mesh.*'data=1.5'"),
        ("", "mesh.*''"),
        ("data=0", r"axis data\b.* 0\b"),
        ("data=3,tensor=3", r"data=3,fsdp=1,tensor=3 .*\b9 devices.*\b8\b"),
    ],
)
def test_meshes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(text)


def test_the_tensor_axis_must_divide_the_heads():
    mesh = sharding.make_mesh(tensor=3)
    with pytest.raises(ValueError, match=r"tensor=3\b.*\b16 attention heads"):
        sharding.check_mesh(mesh, sizes_of(JanusConfig.janus_pro_1b()).heads)
    sharding.check_mesh(
        sharding.make_mesh(tensor=8), sizes_of(JanusConfig.janus_pro_1b()).heads
    )


def test_a_mesh_that_does_not_fit_is_refused_before_loading(golden):
    with pytest.raises(ValueError, match=r"tensor=8\b.*\b4 attention heads"):
        load(golden / "janus", mesh=sharding.make_mesh(tensor=8))


@pytest.mark.parametrize("mesh", ["tensor=2", jax.sharding.Mesh(jax.devices()[:2], ("x",))])
def test_a_mesh_of_other_axes_is_refused(golden, mesh):
    with pytest.raises(ValueError, match=r"mesh.*data, fsdp, tensor"):
        load(golden / "janus", mesh=mesh)


@pytest.fixture(scope="module")
def one_device(small):
    return small.generate_images(PROMPTS, num_images=4, seed=11)


def test_a_mesh_with_explicit_axes_is_as_good(golden, one_device):
    """jax.make_mesh creates such a mesh by default."""
    explicit = (jax.sharding.AxisType.Explicit,) * 3
    mesh = jax.make_mesh((1, 1, 2), sharding.AXES, axis_types=explicit)
    pipeline = load(golden / "janus_small", dtype="float32", mesh=mesh)
    generated = pipeline.generate_images(PROMPTS, num_images=4, seed=11)
    np.testing.assert_array_equal(generated.indices, one_device.indices)


@pytest.mark.parametrize("shape", MESHES)
def test_eight_devices_generate_what_one_generates(golden, one_device, shape):
    mesh = sharding.make_mesh(*shape)
    pipeline = load(golden / "janus_small", dtype="float32", mesh=mesh)
    generated = pipeline.generate_images(PROMPTS, num_images=4, seed=11)
    np.testing.assert_array_equal(generated.indices, one_device.indices)
    np.testing.assert_array_equal(generated.pixels, one_device.pixels)


@pytest.fixture(scope="module")
def sharded(golden):
    return load(golden / "janus_small", dtype="float32", mesh=sharding.make_mesh(2, 2, 2))


def test_parameters_are_born_sharded(sharded):
    kernel = sharded.model.language_model.layers[0].mlp.up_proj.kernel[...]
    assert kernel.sharding.spec == P("fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (24, 56)


def test_the_cache_is_sharded_by_rows_and_heads(sharded):
    tokens = list(range(5, 25))
    sampling = samplers.make_sampling(1.0, None, None, 128)
    requests = image.make_requests([(tokens, tokens)], 4, 0, 5.0, sampling, 0)
    seen = []

    def shapes(state):
        keys = state.cache.keys[0]
        return keys.shape, keys.addressable_shards[0].data.shape

    requests = sharding.put_batch(requests, sharded.mesh)
    state, indices = image.begin_batch(sharded.model, requests, sharded.mesh)
    seen.append(shapes(state))
    state, _ = image.advance_batch(sharded.model, (state, indices), 1, 4)
    seen.append(shapes(state))
    assert seen == [((8, 47, 4, 12), (2, 47, 2, 12))] * 2


def test_images_fill_up_the_devices(sharded, one_device):
    generated = sharded.generate_images(PROMPTS[0], num_images=7, seed=11)
    assert generated.pixels.shape == (7, 64, 64, 3)
    np.testing.assert_array_equal(generated.indices[:4], one_device.indices[:4])
    np.testing.assert_array_equal(sharded.decode_indices(generated.indices), generated.pixels)
    assert sharded.encode_images(list(generated.pixels)).shape == (7, 16)


def test_tokens_and_pixels_are_whole_on_every_device(golden, sharded, small, monkeypatch):
    """Every process must be able to read them."""
    seen = []

    def recorded(function):
        def call(*args):
            result = function(*args)
            seen.extend(x.sharding for x in jax.tree.leaves(result))
            return result

        return call

    monkeypatch.setattr(codec, "decode_batch", recorded(codec.decode_batch))
    monkeypatch.setattr(codec, "encode_pixels", recorded(codec.encode_pixels))
    codes = np.load(golden / "janus_vq.npz")["codes"]
    codes = np.resize(codes, (5, codes.shape[1]))
    pixels = sharded.decode_indices(codes)
    encoded = sharded.encode_images(pixels[0])
    assert len(seen) == 2 * 3 + 1  # four images at once, then one
    assert all(len(s.device_set) == 8 and s.is_fully_replicated for s in seen)
    np.testing.assert_array_equal(encoded, small.encode_images(pixels[0]))


def test_eight_devices_answer_what_one_answers(golden, sharded, small):
    image = golden / "preprocess" / "img0_50x120.png"
    args = (["What is it?", "Hello"], [[image], []])
    expected = small.answer(*args, max_new_tokens=6)
    assert sharded.answer(*args, max_new_tokens=6) == expected
    assert "".join(sharded.stream("What is it?", image, max_new_tokens=6)) == expected[0]


def test_eight_devices_find_what_is_not_finite(golden, sharded):
    image = golden / "preprocess" / "img0_50x120.png"
    args = (["What is it?", "Hello"], [[image], []])
    with damaged(sharded.model, "und_encoder.norm.scale"):
        with pytest.raises(ValueError, match="SigLIP features"):
            sharded.answer(*args, max_new_tokens=6)
    with damaged(sharded.model, "language_model.norm.scale"):
        with pytest.raises(ValueError, match="text logits"):
            next(sharded.stream("What is it?", image, max_new_tokens=6))
        with pytest.raises(ValueError, match="image-token logits"):
            sharded.generate_images(PROMPTS, num_images=4, seed=11)
    with damaged(sharded.model, "gen_vq.codebook"):
        with pytest.raises(ValueError, match="VQ encoder latents"):
            sharded.encode_images(image)
        with pytest.raises(ValueError, match="decoded pixels"):
            sharded.decode_indices(np.zeros((5, 16), int))
