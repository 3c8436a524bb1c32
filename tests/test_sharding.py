"""The sharding table, and that eight devices give the same results as one."""

import jax
import numpy as np
import pytest
from damage import damaged
from flax import nnx
from jax.sharding import PartitionSpec as P

from janus_jax import load, sharding
from janus_jax.generation import codec, image, samplers
from janus_jax.interop.load import ConstantRngs
from janus_jax.models.janus import Janus, JanusConfig
from janus_jax.training.lora import LoRAConfig, add_adapters

MESHES = [(1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 4)]
PROMPTS = ["A close-up photo of a red cat, studio light.", "a dog"]


def _params(model):
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): leaf[...] for path, leaf in flat}


def test_every_parameter_has_one_row_that_fits_its_shape(pipeline):
    mesh = sharding.make_mesh(2, 2, 2)
    place = sharding.sharding_for(mesh)
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
        inputs, outputs = sharding.spec_for(f"{layer}.kernel")
        expected = P(inputs, None) if factor == "a" else P(None, outputs)
        assert sharding.spec_for(path) == expected, path


def test_every_row_is_used(adapted_paths):
    for rule, _ in sharding.PARAMETER_SPECS:
        assert any(sharding.re.fullmatch(rule, path) for path in adapted_paths), rule


@pytest.mark.parametrize(
    "path", ["language_model.layers.0.self_attn.k_norm.scale", "xlanguage_model.norm.scale", ""]
)
def test_a_parameter_without_a_row_is_named(path):
    with pytest.raises(ValueError, match=f"must match parameter {path}, but 0 match: none"):
        sharding.spec_for(path)


def test_a_parameter_with_two_rows_is_named(monkeypatch):
    extra = (*sharding.PARAMETER_SPECS, (r"language_model\..*", P()))
    monkeypatch.setattr(sharding, "PARAMETER_SPECS", extra)
    with pytest.raises(ValueError, match=r"parameter language_model.norm.scale, but 2 match: "):
        sharding.spec_for("language_model.norm.scale")


def test_an_axis_that_does_not_divide_leaves_the_dimension_whole():
    mesh = sharding.make_mesh(1, 4, 2)
    assert sharding.fit_spec(mesh, P("tensor", "fsdp"), (6, 8)) == P("tensor", "fsdp")
    assert sharding.fit_spec(mesh, P("tensor", "fsdp"), (6, 6)) == P("tensor", None)
    assert sharding.fit_spec(mesh, P(("data", "fsdp"),), (6, 6)) == P(None)
    with pytest.raises(ValueError, match="must have no more entries"):
        sharding.fit_spec(mesh, P("tensor", "fsdp"), (8,))


def test_meshes_are_read_from_text():
    mesh = sharding.parse_mesh("tensor=4, data=2")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.devices.size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model=2", "a mesh must be given as data=1,fsdp=1,tensor=1, .* got 'model=2'"),
        ("data=2,data=2", "each axis at most once, got 'data=2,data=2'"),
        ("data=-1", "got 'data=-1'"),
        ("data=1.5", "got 'data=1.5'"),
        ("", "got ''"),
        ("data=0", "mesh axis data must be an integer of at least 1, got 0"),
        ("data=3,tensor=3", "data=3,fsdp=1,tensor=3 needs 9 devices, but there are only 8"),
    ],
)
def test_meshes_that_cannot_be_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        sharding.parse_mesh(text)


def test_the_tensor_axis_must_divide_the_heads():
    mesh = sharding.make_mesh(tensor=3)
    with pytest.raises(ValueError, match="tensor=3 must divide the 16 attention heads of the dec"):
        sharding.check_mesh(mesh, JanusConfig.janus_pro_1b())
    sharding.check_mesh(sharding.make_mesh(tensor=8), JanusConfig.janus_pro_1b())


def test_a_mesh_that_does_not_fit_is_refused_before_loading(golden):
    with pytest.raises(ValueError, match="tensor=8 must divide the 4 attention heads"):
        load(golden / "janus", mesh=sharding.make_mesh(tensor=8))


@pytest.mark.parametrize("mesh", ["tensor=2", jax.sharding.Mesh(jax.devices()[:2], ("x",))])
def test_a_mesh_of_other_axes_is_refused(golden, mesh):
    with pytest.raises(ValueError, match="a mesh must have the axes data, fsdp, tensor, got"):
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
        with pytest.raises(ValueError, match="SigLIP features must be finite"):
            sharded.answer(*args, max_new_tokens=6)
    with damaged(sharded.model, "language_model.norm.scale"):
        with pytest.raises(ValueError, match="text logits must be finite"):
            next(sharded.stream("What is it?", image, max_new_tokens=6))
        with pytest.raises(ValueError, match="image-token logits must be finite"):
            sharded.generate_images(PROMPTS, num_images=4, seed=11)
    with damaged(sharded.model, "gen_vq.codebook"):
        with pytest.raises(ValueError, match="VQ encoder latents must be finite"):
            sharded.encode_images(image)
        with pytest.raises(ValueError, match="decoded pixels must be finite"):
            sharded.decode_indices(np.zeros((5, 16), int))
