"""Tests with damaged processor files: the folder works, or one line names the damaged file."""

import copy
import json
import random

import numpy as np
import pytest

from janus_jax.generation.loading import ImageDefaults
from janus_jax.interop.folders import check_processor
from janus_jax.interop.load import open_folder
from janus_jax.processing.processor import Processor
from janus_jax.processing.prompt_settings import janus_template

VALUES = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**64, 10**400, 0.5, -0.0, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "é" * 1000, "\ud800", "\0", "3", [], [1], ["x"] * 1000, {},
    {"type": "x"}, {"content": 5}, [[]], {"default": "x"}, [{"name": "default", "template": "x"}],
)  # fmt: skip
CONTENTS = (b"", b"{", b"[]", b"null", b"5", b"{}", b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 10**5)
GENERATION = {"guidance_scale": 5, "temperature": 1.0}
IMAGE = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def deepseek_files(golden):
    names = (
        "preprocessor_config", "processor_config", "special_tokens_map", "tokenizer",
        "tokenizer_config",
    )  # fmt: skip
    folder = golden / "janus_small"
    files = {f"{name}.json": json.loads((folder / f"{name}.json").read_text()) for name in names}
    return files | {"generation_config.json": GENERATION}


def transformers_files(golden):
    """Files as transformers 5 saves them, but with the template where older versions save it."""
    files = deepseek_files(golden)
    images = files.pop("preprocessor_config.json")
    side = images.pop("image_size")
    images |= {
        "size": {"height": side, "width": side},
        "image_processor_type": "JanusImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_pad": True,
        "resample": 3,
    }
    files["processor_config.json"] = {
        "image_processor": images,
        "num_image_tokens": 16,
        "processor_class": "JanusProcessor",
        "use_default_system_prompt": True,
    }
    files["tokenizer_config.json"] |= {"image_token": "<image_placeholder>"}
    template = janus_template("deepseek_old")
    return files | {"chat_template.json": {"chat_template": template}}


def mutate(value, rng):
    """Returns a copy of a JSON tree with one value replaced or removed."""
    value = copy.copy(value)
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = mutate(value[key], rng)
        return value
    return rng.choice(VALUES)


def damaged(data, rng):
    """Returns other contents for a file, its truncated bytes, or its bytes with one bit flipped."""
    kind = rng.randrange(3)
    if kind == 0:
        return rng.choice(CONTENTS)
    if kind == 1:
        return data[: rng.randrange(len(data))]
    data = bytearray(data)
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def use(folder, cfg):
    """Loads the processor and uses it."""
    processor = Processor.from_dir(folder)
    check_processor(folder, processor, cfg)
    defaults = ImageDefaults.from_dir(folder)
    tokens, pixels = processor.conversation("É  🦙?", [IMAGE])
    assert np.isfinite(pixels).all() and np.isfinite(np.float32(defaults)).all()
    assert max(tokens) < cfg.language_model.vocab_size
    assert processor.tokenizer.decode(tokens).find("É  🦙?") > 0
    processor.image_prompt("a cat")


def sweep(folder, files, cfg, seed, number):
    """Returns how many of `number` mutated folders raise an error; the others must work."""
    folder.mkdir()
    (folder / "config.json").write_text('{"vision_config": {"patch_size": 16}}')
    raw = {name: json.dumps(content).encode() for name, content in files.items()}
    for name, data in raw.items():
        (folder / name).write_bytes(data)
    use(folder, cfg)
    rng, refused = random.Random(seed), 0
    for i in range(number):
        name = rng.choice(list(files))
        if rng.random() < 0.25:
            data = damaged(raw[name], rng)
        else:
            data = json.dumps(mutate(files[name], rng)).encode()
        (folder / name).write_bytes(data)
        try:
            use(folder, cfg)
        except (ValueError, FileNotFoundError) as error:
            message, refused = str(error), refused + 1
            fits = len(message) < 500 + 4 * len(str(folder)) and "\n" not in message
            names_file = str(folder) in message and name in message
            assert names_file and fits, (i, name, data[:300], message)
        except BaseException as error:
            raise AssertionError((i, name, data[:300])) from error
        (folder / name).write_bytes(raw[name])
    return refused


@pytest.fixture(scope="module")
def cfg(golden):
    return open_folder(golden / "janus_small").cfg


LAYOUTS = {"deepseek": deepseek_files, "transformers": transformers_files}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_damaged_files_are_refused_by_name_or_work(golden, tmp_path, cfg, layout):
    assert sweep(tmp_path / "s", LAYOUTS[layout](golden), cfg, seed=0, number=60) > 12


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_damaged_files_are_refused_by_name_or_work(golden, tmp_path, cfg, layout, seed):
    assert sweep(tmp_path / "s", LAYOUTS[layout](golden), cfg, seed, number=1000) > 200


@pytest.mark.parametrize("layout", LAYOUTS)
def test_missing_files_are_refused_by_name_or_not_needed(golden, tmp_path, cfg, layout):
    files = LAYOUTS[layout](golden)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    for name, content in files.items():
        (tmp_path / name).unlink()
        try:
            use(tmp_path, cfg)
        except FileNotFoundError as error:
            assert str(tmp_path) in str(error)
            assert name in ("tokenizer.json", "preprocessor_config.json", "processor_config.json")
        except ValueError as error:
            assert f"{tmp_path} has no chat template in " in str(error)
            assert name == "chat_template.json"
        (tmp_path / name).write_text(json.dumps(content))
