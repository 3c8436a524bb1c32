"""Pipeline and load: argument checks, encoding, decoding, and finding a checkpoint."""

import dataclasses
import io
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import janus_jax
from janus_jax import sharding
from janus_jax.generation import chunks, codec, loading
from janus_jax.generation import pipeline as pipelines
from janus_jax.interop.folders import check_processor, find_folder
from janus_jax.interop.load import check_dtype
from janus_jax.models.janus import JanusConfig
from janus_jax.processing import images
from janus_jax.processing.processor import Processor

ANSWERED = [{"role": "user", "content": "a"}, {"role": "Assistant", "content": " It is red"}]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "prompts.*empty"),
        ({"prompts": " "}, "prompt.*' '"),
        ({"prompts": ["a", 3]}, "prompt 2 of 2, 3:"),
        ({"prompts": [{"content": "b" * 40}, "a"]}, "prompt 1 of 2, {'content': 'b{40}'}:"),
        ({"prompts": ["a", "b " * 999]}, r"prompt 2 of 2, '(b ){15,}.*\.\.\..*': .*\b512\b"),
        ({"prompts": None}, "prompt.*None"),
        ({"prompts": b"red"}, "prompt.*b'red'"),
        ({"prompts": {"role": "user"}}, "prompt.*{'role'"),
        ({"prompts": "\udcff"}, "Unicode"),
        ({"temperature": 1e39}, r"temperature.*1e\+39"),
        ({"prompts": "a " * 5000}, r"\b512 tokens.*\b\d+ \+ 16\b"),
        ({"num_images": 0}, r"num_images.*\b0\b"),
        ({"num_images": 10**30}, r"num_images.*2\*\*31.*\b10{30}$"),
        ({"num_images": 1.5}, r"num_images.*\b1\.5\b"),
        ({"max_batch": 0}, r"max_batch.*\b0\b"),
        ({"seed": 0.5}, r"seed.*\[0, 2\*\*64\).*\b0\.5"),
        ({"guidance_weight": float("inf")}, "guidance_weight.*inf"),
        ({"temperature": -1}, r"temperature.* -1\b"),
        ({"top_k": 129}, r"top_k.*\b128\b.*\b129\b"),
        ({"top_p": 0}, r"top_p.*\(0, 1\].*\b0\b"),
    ],
)
def test_generation_refuses_arguments_out_of_range(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline.generate_images(**{"prompts": "a cat", **settings})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conversation": []}, "conversations.*empty"),
        ({"conversation": None}, "messages.*NoneType"),
        ({"conversation": {"role": "user"}}, "messages.*dict"),
        ({"conversation": [None]}, "messages.*NoneType"),
        ({"conversation": [{"role": "user", "content": "a"}, "b"]}, "message.*dict.*str"),
        ({"conversation": " "}, "user message.*' '"),
        ({"conversation": [{"role": [], "content": "a"}]}, r"role.*\[\]"),
        ({"conversation": [{"role": "bot", "content": "a"}]}, "role.*'bot'"),
        ({"conversation": ANSWERED}, "user.*'It is red'"),
        ({"max_batch": 0}, r"max_batch.*\b0\b"),
        ({"images": [[1]]}, "image array.*uint8"),
        ({"images": io.BytesIO()}, "image.*path.*array.*BytesIO"),
        ({"conversation": ["a", "b"], "images": [[]]}, r"images?\b.*\b2\b.*\b1\b"),
        ({"conversation": "<image_placeholder> a"}, r"\b0 images.*\b1 placeholder"),
        ({"max_new_tokens": 0}, r"max_new_tokens.*\b0\b"),
        ({"max_new_tokens": 4096}, r"\b512 tokens.*\b\d+ \+ 4096\b"),
        ({"temperature": -1}, r"temperature.* -1\b"),
        ({"top_k": 449}, r"top_k.*\b448\b.*\b449\b"),
        ({"seed": "1"}, "seed.*'1'"),
    ],
)
def test_answering_refuses_arguments_out_of_range(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        pipeline.answer(**{"conversation": "a", **settings})


def test_scalars_of_numpy_and_jax_are_taken_as_numbers(small):
    expected = small.generate_images("a cat", 5, 7, 2.5, 0.75)
    settings = dict(num_images=np.array(5), seed=jnp.array(7), max_batch=np.int8(5))
    settings |= dict(guidance_weight=np.float32(2.5), temperature=jnp.float32(0.75))
    generated = small.generate_images("a cat", **settings)
    np.testing.assert_array_equal(generated.indices, expected.indices)
    plain = dict(max_new_tokens=12, temperature=1.5, seed=3)
    scalars = dict(max_new_tokens=np.int64(12), temperature=np.array(1.5), seed=jnp.uint32(3))
    answer = small.answer("Hello", **plain)
    assert small.answer("Hello", max_batch=jnp.array(1), **scalars) == answer
    assert "".join(small.stream("Hello", **scalars)) == answer


@pytest.mark.parametrize(
    "name", ["num_images", "seed", "max_batch", "temperature", "guidance_weight", "top_k", "top_p"]
)
def test_arrays_of_several_numbers_are_refused_by_name(pipeline, name):
    with pytest.raises(ValueError, match=rf"^{name} .*\(2,\)$"):
        pipeline.generate_images("a cat", **{name: np.ones(2)})


def test_images_come_chunk_by_chunk(small):
    parts = list(small.stream_images("a cat", num_images=5, max_batch=2))
    assert [len(part.pixels) for part in parts] == [2, 2, 1]
    whole = small.generate_images("a cat", num_images=5)
    np.testing.assert_array_equal(np.concatenate([part.indices for part in parts]), whole.indices)
    with pytest.raises(ValueError, match=r"num_images.*\b0\b"):  # before iterating
        small.stream_images("a cat", num_images=0)


def test_a_prompt_may_fill_the_context_of_config_json_and_no_more(pipeline):
    number = len(pipeline.processor.conversation("a")[0])
    pipeline.stream("a", max_new_tokens=512 - number)
    message = rf"\b512 tokens.*\b{number} . {513 - number} = 513\b"
    with pytest.raises(ValueError, match=message):
        pipeline.stream("a", max_new_tokens=513 - number)


def test_no_config_json_lengthens_the_trained_context(golden):
    model = type("Model", (), {"cfg": JanusConfig.janus_pro_1b()})()
    assert model.cfg.language_model.max_position_embeddings == 16384
    processor = Processor.from_dir(golden / "janus")
    loaded = pipelines.Pipeline(model, processor, "name", loading.ImageDefaults())
    assert loaded.processor.trained_context == 4096


def test_streaming_checks_its_arguments_when_called(pipeline):
    with pytest.raises(ValueError, match=r"one conversation.*list"):
        pipeline.stream(["a", "b"])
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        pipeline.stream("a", "nowhere.png")


def test_an_image_survives_decoding_and_encoding_as_the_tokenizer_has_it(pipeline, golden):
    recorded = np.load(golden / "janus_vq.npz")
    pixels = pipeline.decode_indices(recorded["codes"])
    assert np.abs(pixels.astype(int) - recorded["decoded_uint8"]).max() <= 1
    prepared = np.stack([images.preprocess_generation(Image.fromarray(x), 64) for x in pixels])
    expected = jax.jit(pipeline.model.gen_vq.encode)(prepared)
    np.testing.assert_array_equal(pipeline.encode_images(list(pixels)), expected)


def test_images_of_any_kind_are_encoded(small, golden):
    path = golden / "preprocess" / "img0_50x120.png"
    expected = small.encode_images(path)
    assert expected.shape == (1, 16) and expected.dtype == np.int32
    for source in (str(path), path.read_bytes(), Image.open(path), np.asarray(Image.open(path))):
        np.testing.assert_array_equal(small.encode_images([source]), expected)
    pixels = np.asarray(Image.open(path))
    np.testing.assert_array_equal(
        small.encode_images(np.stack([pixels, pixels])), np.repeat(expected, 2, axis=0)
    )
    with pytest.raises(ValueError, match=r"images.*empty"):
        small.encode_images([])


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (np.zeros((1, 15), int), r"indices.*\[N, 16\].*\[1, 15\]"),
        (np.zeros((0, 16), int), r"indices.*\[N, 16\].*\[0, 16\]"),
        (np.full((1, 16), 128), r"indices.*\[0, 128\).*\b128 to 128\b"),
        (np.full((1, 16), -1), r"indices.*\[0, 128\).* -1 to -1\b"),
        (np.zeros((1, 16)), "indices.*float64"),
        (np.full((1, 16), None), "indices.*object"),
    ],
)
def test_indices_that_cannot_be_decoded_are_refused(pipeline, indices, message):
    with pytest.raises(ValueError, match=message):
        pipeline.decode_indices(indices)


def test_bad_pixels_do_not_wrap_around(pipeline):
    """Decoded values far outside [-1, 1] are clipped before they become uint8."""

    def decode(self, indices):
        return jnp.full((len(indices), 2, 2, 3), indices[0, 0].astype(jnp.float32) - 4)

    vq = type("VQ", (), {"decode": decode})()
    pixels, finite = codec.decode_pixels(vq, jnp.array([[0], [9]]))
    assert finite.all()
    assert np.unique(pixels[0]) == 0 and np.unique(pixels[1]) == 255


@pytest.mark.parametrize(
    ("length", "bucket"),
    [(1, 32), (32, 32), (33, 64), (65, 128), (129, 256), (257, 384), (640, 640)],
)
def test_prompts_are_padded_to_few_lengths(length, bucket):
    assert chunks.bucket_length(length) == bucket


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)])
def test_dtypes_are_names_or_types(dtype):
    assert check_dtype(dtype) == jnp.bfloat16


def test_the_default_dtype_on_cpu_is_float32():
    assert check_dtype(None) == jnp.float32
    assert check_dtype(None, sharding.make_mesh()) == jnp.float32


def test_the_default_dtype_is_that_of_the_mesh_s_devices():
    chip = types.SimpleNamespace(platform="tpu")
    mesh = types.SimpleNamespace(devices=np.array([[chip]]))
    assert check_dtype(None, mesh) == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["float16", jnp.float16, "int8", 3])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype.*float32, bfloat16"):
        pipelines.load("nowhere", dtype=dtype)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}/nowhere"):
        pipelines.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        pipelines.load(tmp_path)


def test_processor_files_of_another_model_are_refused(golden, tmp_path):
    for path in (golden / "janus").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path = tmp_path / "processor_config.json"
    path.write_text(path.read_text().replace('"num_image_tokens": 16', '"num_image_tokens": 576'))
    with pytest.raises(ValueError, match=r"\b64 pixels.*\b576 tokens.*config"):
        pipelines.load(tmp_path)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(pipeline, golden):
    decoder = dataclasses.replace(pipeline.model.cfg.language_model, vocab_size=100)
    cfg = dataclasses.replace(pipeline.model.cfg, language_model=decoder)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*\b100\b"):
        check_processor(golden / "janus", pipeline.processor, cfg)


def test_the_default_is_the_model_that_ships():
    assert find_folder(None) == Path(janus_jax.__file__).parent / "assets" / "janus_tiny"


def test_a_hub_id_is_fetched_only_if_there_is_no_such_folder(tmp_path, monkeypatch):
    import huggingface_hub

    downloaded = []

    def snapshot_download(name, allow_patterns):
        downloaded.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "there").mkdir(parents=True)
    (tmp_path / "org" / "there" / "config.json").touch()
    assert find_folder("org/there") == Path("org/there")
    with pytest.raises(FileNotFoundError, match=r"^a/b/c "):
        find_folder("a/b/c")
    with pytest.raises(ValueError, match=r"folder.*''"):
        find_folder("")
    assert downloaded == []
    assert find_folder("org/Name-1.3B") == tmp_path
    assert downloaded == ["org/Name-1.3B"]


def test_a_hub_that_cannot_be_reached_takes_one_line(monkeypatch):
    import huggingface_hub

    def snapshot_download(*_, **__):
        raise OSError("no network\nand a long story")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError) as raised:
        pipelines.load("org/name")
    assert str(raised.value).endswith("from the Hugging Face hub: no network")


@pytest.fixture
def no_cache(monkeypatch):
    """JAX without a compilation cache; the settings are restored afterwards."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    saved = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.delenv(loading.CACHE_SWITCH)
    yield
    for name, value in saved.items():
        jax.config.update(name, value)


def test_programs_are_kept_on_disk_unless_switched_off(no_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(loading.CACHE_SWITCH, "0")
    loading.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    monkeypatch.delenv(loading.CACHE_SWITCH)
    loading.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "janus_jax" / "xla")


def test_a_users_own_cache_is_left_alone(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    loading.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_a_cache_that_cannot_be_written_is_no_error(no_cache, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    loading.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None


def test_importing_the_package_imports_nothing_heavy():
    code = "import janus_jax, sys; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_public_names_are_there():
    for name in janus_jax.__all__:
        assert callable(getattr(janus_jax, name))
        assert name in dir(janus_jax)
    with pytest.raises(AttributeError, match="'nothing'"):
        _ = janus_jax.nothing


def test_the_checkpoint_states_its_image_settings(small, golden, tmp_path):
    assert small.image_defaults == (5.0, 1.0)  # the folder sets no defaults
    shutil.copytree(golden / "janus_small", tmp_path / "janus_small")
    stated = tmp_path / "janus_small" / "generation_config.json"
    stated.write_text('{"guidance_scale": 2, "temperature": 0}')
    own = janus_jax.load(tmp_path / "janus_small", dtype="float32")
    assert own.image_defaults == (2.0, 0.0)
    generated = own.generate_images("a red cat")
    expected = small.generate_images("a red cat", temperature=0, guidance_weight=2.0)
    np.testing.assert_array_equal(generated.indices, expected.indices)
    stated.write_text('{"guidance_scale": "much"}')
    with pytest.raises(ValueError, match=r"guidance_scale.*'much'"):
        janus_jax.load(tmp_path / "janus_small", dtype="float32")
    stated.write_text('{"temperature": -1}')
    with pytest.raises(ValueError, match=r"temperature.*generation_config.json.* -1\b"):
        janus_jax.load(tmp_path / "janus_small", dtype="float32")


def test_a_platform_without_devices_is_refused(golden, monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", devices)
    with pytest.raises(ValueError, match="JAX_PLATFORMS"):
        janus_jax.load(golden / "janus_small")
