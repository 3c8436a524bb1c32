"""Tests that tokenizers which change texts or contradict their files are refused."""

import copy
import json
import re
from pathlib import Path

import pytest
import tokenizers

import janus_jax
from janus_jax.processing.tokenizer import Tokenizer

BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}


@pytest.fixture(scope="module")
def spec(golden):
    return json.loads((golden / "janus" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def refused(tmp_path):
    """Loads a changed tokenizer.json, and other small files; returns the error message."""

    def load(spec, **files):
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        for name, value in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        with pytest.raises(ValueError) as error:
            Tokenizer.from_dir(tmp_path)
        text = str(error.value)
        assert text.startswith(str(tmp_path)) and "\n" not in text and len(text) < 600
        return text

    return load


def with_parts(spec, **parts):
    return copy.deepcopy(spec) | parts


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": METASPACE},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}},
    ],
    ids=lambda parts: json.dumps(parts)[:60],
)
def test_parts_that_change_texts_are_refused(spec, refused, parts):
    message = refused(with_parts(spec, **parts))
    assert re.search("tokenizer.json .*texts: '", message), message


def test_spaces_that_vanish_are_shown(spec, refused):
    message = refused(with_parts(spec, pre_tokenizer=METASPACE))
    assert re.search("' Two wor' .*'Twowords'", message)


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Lowercase"},
        {"type": "NFC"},
        {"type": "NFKD"},
        {"type": "StripAccents"},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": "  "}, "content": " "},
    ],
    ids=lambda normalizer: normalizer["type"],
)
def test_normalizers_are_refused(spec, refused, normalizer):
    for one in (normalizer, {"type": "Sequence", "normalizers": [normalizer]}):
        message = refused(with_parts(spec, normalizer=one))
        assert re.search(rf"normalizer.*\b{normalizer['type']}\b", message), message


def test_parts_that_double_a_text_again_and_again_take_no_time(spec, refused):
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    normalizer = {"type": "Sequence", "normalizers": [double] * 60}
    message = refused(with_parts(spec, normalizer=normalizer))
    assert re.search(r"normalizer.*\bReplace\b", message)
    letters = {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 60}
    for one in (letters, {"type": "Sequence", "pretokenizers": [letters]}):
        message = refused(with_parts(spec, pre_tokenizer=one))
        assert re.search("one ByteLevel pre_tokenizer.*several", message)


def test_an_expression_that_takes_too_long_is_refused(spec, refused):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": "(\\w|.)*Q"}
    parts = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    message = refused(with_parts(spec, pre_tokenizer=parts))
    assert "Onig: Regex search" in message


def test_random_tokens_are_refused(spec, refused):
    """The tokenizers library applies BPE dropout to every text."""
    changed = with_parts(spec, model=spec["model"] | {"dropout": 0.5})
    assert re.search(r"tokenizer.json: model.dropout.* 0\.5\b", refused(changed))


def test_a_vocabulary_without_some_bytes_is_refused(spec, refused):
    changed = copy.deepcopy(spec)
    vocab = changed["model"]["vocab"]
    vocab["nothing"] = vocab.pop("ð")  # the first byte of every emoji
    changed["model"]["merges"] = []
    assert " decodes to " in refused(changed)


def test_ids_of_added_tokens_must_be_those_that_are_given(spec, refused):
    changed = copy.deepcopy(spec)
    changed["added_tokens"][3]["id"] = 500
    message = refused(changed)
    assert "tokenizer.json: " in message and "'<image_placeholder>'" in message
    assert re.search(r"\b387\b.*\b500\b", message)
    swapped = copy.deepcopy(spec)
    one, two = swapped["added_tokens"][5:7]
    one["id"], two["id"] = two["id"], one["id"]
    assert re.search("'<begin_of_image>'.*id", refused(swapped))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"added_tokens_decoder": {"9": {"content": "<end_of_image>"}}}, r"\b390\b.*'9'"),
        ({"added_tokens_decoder": {"447": {"content": "<new>"}}}, "'<new>'.*447"),
        ({"added_tokens_decoder": {"384": 5}}, "added token 5 "),
        ({"added_tokens_decoder": [5]}, r"added_tokens_decoder.*\[5\]"),
        ({"boi_token": "<|User|>"}, "boi_token.*<begin_of_image>.*'<|User|>'"),
        ({"image_token": 3}, r"image_token.* 3\b"),
        ({"bos_token": 7}, r"bos_token.* 7\b"),
        ({"eos_token": {"content": []}}, r"eos_token.*{'content': \[\]}$"),
        ({"bos_token": "<s>"}, "'<s>'.*tokenizer_config.json"),
    ],
)
def test_tokenizer_config_must_agree(spec, refused, config, expected):
    message = refused(spec, tokenizer_config=config)
    assert re.search(expected.replace("|", r"\|"), message) and "tokenizer_config.json" in message


def test_special_tokens_map_is_named(spec, refused):
    message = refused(spec, special_tokens_map={"eos_token": ["</s>"]})
    assert re.search(r"special_tokens_map.json: eos_token.*\['</s>'\]", message)


def test_real_tokenizers_load_and_say_the_same(golden):
    shipped = Path(janus_jax.__file__).parent / "assets" / "janus_tiny"
    for folder in (golden / "janus", golden / "janus_small", shipped):
        tokenizer = Tokenizer.from_dir(folder)
        library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        ids = library.encode("É  🦙\n", add_special_tokens=False).ids
        assert tokenizer.encode("É  🦙\n")[1:] == ids and library.decode(ids) == "É  🦙\n"


def test_stated_ids_that_are_right_are_accepted(spec, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    decoder = {str(token["id"]): token for token in spec["added_tokens"]}
    config = {"added_tokens_decoder": decoder, "boi_token": {"content": "<begin_of_image>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert Tokenizer.from_dir(tmp_path).image_id == 387
