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
    assert "tokenizer.json does not preserve texts: '" in message
    assert "do not match; use the tokenizer.json of the original checkpoint" in message


def test_spaces_that_vanish_are_shown(spec, refused):
    message = refused(with_parts(spec, pre_tokenizer=METASPACE))
    assert "' Two wor' decodes to 'Twowords'" in message


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
    rule = "must not have a normalizer, got"
    for one in (normalizer, {"type": "Sequence", "normalizers": [normalizer]}):
        assert f"{rule} {normalizer['type']}; use" in refused(with_parts(spec, normalizer=one))


def test_parts_that_double_a_text_again_and_again_take_no_time(spec, refused):
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    normalizer = {"type": "Sequence", "normalizers": [double] * 60}
    message = refused(with_parts(spec, normalizer=normalizer))
    assert "must not have a normalizer, got Replace" in message
    letters = {"type": "Sequence", "pretokenizers": [BYTE_LEVEL] * 60}
    for one in (letters, {"type": "Sequence", "pretokenizers": [letters]}):
        message = refused(with_parts(spec, pre_tokenizer=one))
        assert "must have at most one ByteLevel pre_tokenizer, got several; use the" in message


def test_an_expression_that_takes_too_long_is_refused(spec, refused):
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    split["pattern"] = {"Regex": "(\\w|.)*Q"}
    parts = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL]}
    message = refused(with_parts(spec, pre_tokenizer=parts))
    assert " cannot encode ' " in message and "library failed: Onig: Regex search" in message


def test_random_tokens_are_refused(spec, refused):
    """The tokenizers library applies BPE dropout to every text."""
    changed = with_parts(spec, model=spec["model"] | {"dropout": 0.5})
    assert "tokenizer.json: model.dropout must be null, got 0.5" in refused(changed)


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
    assert "tokenizer.json: the added token '<image_placeholder>' must have the id " in message
    assert "387 of the tokenizer, got 500" in message
    swapped = copy.deepcopy(spec)
    one, two = swapped["added_tokens"][5:7]
    one["id"], two["id"] = two["id"], one["id"]
    assert "the added token '<begin_of_image>' must have the id " in refused(swapped)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"added_tokens_decoder": {"9": {"content": "<end_of_image>"}}}, "390 of the .* got '9'"),
        ({"added_tokens_decoder": {"447": {"content": "<new>"}}}, "'<new>' .* known token, got"),
        ({"added_tokens_decoder": {"384": 5}}, "added token 5 must have the id"),
        ({"added_tokens_decoder": [5]}, r"added_tokens_decoder must be an object, got \[5\]"),
        ({"boi_token": "<|User|>"}, "boi_token must be <begin_of_image>, got '<|User|>'"),
        ({"image_token": 3}, "image_token must be a string, got 3"),
        ({"bos_token": 7}, "bos_token must be a string, got 7"),
        ({"eos_token": {"content": []}}, r"eos_token must be a string, got {'content': \[\]}"),
        ({"bos_token": "<s>"}, "has no token '<s>', which .*tokenizer_config.json requires"),
    ],
)
def test_tokenizer_config_must_agree(spec, refused, config, expected):
    message = refused(spec, tokenizer_config=config)
    assert re.search(expected.replace("|", r"\|"), message) and "tokenizer_config.json" in message


def test_special_tokens_map_is_named(spec, refused):
    message = refused(spec, special_tokens_map={"eos_token": ["</s>"]})
    assert "special_tokens_map.json: eos_token must be a string, got ['</s>']" in message


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
