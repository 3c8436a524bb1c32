"""Tests of the tokenizer against recorded ids, for both released layouts of tokenizer.json."""

import copy
import json
import lzma
import shutil

import pytest

from janus_jax.processing.tokenizer import BOS, TextStream, Tokenizer

EXTRA = "øöúÿõ÷ûýÀùÁþü"  # added tokens that only Janus-Pro-7B and Janus-1.3B have


def write(folder, spec):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def spec_7b(golden):
    """tokenizer.json of Janus-Pro-7B, whose post-processor adds BOS."""
    return json.loads(lzma.open(golden / "tokenizer_7b.json.xz").read())


@pytest.fixture(scope="module")
def pro_7b(spec_7b, tmp_path_factory):
    return Tokenizer.from_dir(write(tmp_path_factory.mktemp("t") / "7b", spec_7b))


@pytest.fixture(scope="module")
def pro_1b(spec_7b, tmp_path_factory):
    """The layout of Janus-Pro-1B: no extra tokens, and no post-processor for BOS."""
    spec = copy.deepcopy(spec_7b)
    kept = [token for token in spec["added_tokens"] if token["content"] not in EXTRA]
    for i, token in enumerate(kept):
        token["id"] = spec["added_tokens"][0]["id"] + i
    spec["added_tokens"] = kept
    spec["post_processor"] = None
    return Tokenizer.from_dir(write(tmp_path_factory.mktemp("t") / "1b", spec))


@pytest.fixture(scope="module")
def spec(golden):
    return json.loads((golden / "janus" / "tokenizer.json").read_text(encoding="utf-8"))


@pytest.fixture
def tokenizer(golden):
    return Tokenizer.from_dir(golden / "janus")


def test_ids_equal_the_recorded_ones(golden, tokenizer):
    expected = json.loads((golden / "processor.json").read_text(encoding="utf-8"))["token_ids"]
    for name in ("bos", "eos", "pad", "image", "image_start", "image_end"):
        assert getattr(tokenizer, f"{name}_id") == expected[name]


def test_samples_equal_the_recorded_ones(golden, tokenizer):
    samples = json.loads((golden / "processor.json").read_text(encoding="utf-8"))["tokenizer"]
    for sample in samples:
        assert tokenizer.encode(sample["text"]) == sample["ids"]
        assert tokenizer.decode(sample["ids"]) == sample["decoded_skip_special"]
        assert tokenizer.decode(sample["ids"], skip_special=False) == sample["decoded"]
    assert len(samples) == 6


def test_vectors_of_the_7b_tokenizer(golden, pro_7b):
    vectors = json.loads((golden / "vectors_7b.json").read_text(encoding="utf-8"))["vectors"]
    for vector in vectors:
        assert pro_7b.encode(vector["text"]) == [pro_7b.bos_id, *vector["ids"]]
        assert pro_7b.decode(vector["ids"]) == vector["text"]
    assert len(vectors) == 47


def test_ids_of_the_released_layouts(pro_1b, pro_7b):
    def ids(t):
        return t.bos_id, t.eos_id, t.pad_id, t.image_start_id, t.image_end_id, t.image_id

    assert ids(pro_1b) == (100000, 100001, 100002, 100003, 100580, 100581)
    assert ids(pro_7b) == (100000, 100001, 100015, 100016, 100593, 100594)


def test_extra_tokens_of_the_7b_layout(pro_1b, pro_7b):
    assert pro_1b.encode("Führer")[1:] == [37, 2874, 71, 6245]
    assert pro_7b.encode("Führer")[1:] == [37, 100014, 71, 6245]
    for tokenizer in (pro_1b, pro_7b):
        assert tokenizer.decode(tokenizer.encode(f"Führer {EXTRA}")) == f"Führer {EXTRA}"


def test_one_bos_whether_or_not_the_file_adds_it(pro_1b, pro_7b):
    for tokenizer in (pro_1b, pro_7b):
        assert tokenizer.encode("Hello") == [tokenizer.bos_id, 17464]
    assert pro_7b.backend.encode("Hello").ids == [pro_7b.bos_id, 17464]
    assert pro_1b.backend.encode("Hello").ids == [17464]


def test_a_special_tokens_text_is_that_token(tokenizer):
    ids = tokenizer.encode(f"a{BOS}<image_placeholder>")
    assert ids[2:] == [tokenizer.bos_id, tokenizer.image_id]


def test_truncation_and_padding_saved_in_the_file_are_skipped(tmp_path, spec, tokenizer):
    spec = copy.deepcopy(spec)
    spec["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }
    spec["padding"] = {
        "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "!",
    }
    text = "a longer text than that"
    assert Tokenizer.from_dir(write(tmp_path / "t", spec)).encode(text) == tokenizer.encode(text)


def test_stated_bos_and_eos_in_both_forms(tmp_path, golden, tokenizer):
    folder = tmp_path / "t"
    shutil.copytree(golden / "janus", folder, ignore=shutil.ignore_patterns("model*"))
    stated = {"bos_token": "<|User|>", "eos_token": {"content": "<|Assistant|>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(stated))
    changed = Tokenizer.from_dir(folder)
    assert tokenizer.backend.id_to_token(changed.bos_id) == "<|User|>"
    assert tokenizer.backend.id_to_token(changed.eos_id) == "<|Assistant|>"
    assert changed.pad_id == tokenizer.pad_id


def without(spec, text):
    """Returns the tokenizer with another text for one of its tokens."""
    spec = copy.deepcopy(spec)
    for token in spec["added_tokens"]:
        if token["content"] == text:
            token["content"] = "<gone>"
    return spec


def test_pad_falls_back_to_eos(tmp_path, spec):
    tokenizer = Tokenizer.from_dir(write(tmp_path / "t", without(spec, "<｜▁pad▁｜>")))
    assert tokenizer.pad_id == tokenizer.eos_id


@pytest.mark.parametrize("text", ["<image_placeholder>", "<begin_of_image>", "<end_of_image>", BOS])
def test_a_missing_token_is_named(tmp_path, spec, text):
    folder = write(tmp_path / "t", without(spec, text))
    with pytest.raises(ValueError) as error:
        Tokenizer.from_dir(folder)
    path = folder / "tokenizer.json"
    assert str(path) in str(error.value) and repr(text) in str(error.value)


def test_missing_and_broken_files(tmp_path, spec):
    with pytest.raises(FileNotFoundError, match=r"tokenizer.json.*nowhere"):
        Tokenizer.from_dir(tmp_path / "nowhere")
    folder = write(tmp_path / "t", {**spec, "decoder": {"type": "Metaspace"}})
    with pytest.raises(ValueError, match=r"decoder.*Metaspace"):
        Tokenizer.from_dir(folder)
    for broken in ("{", "[" * 100_000):
        (folder / "tokenizer.json").write_text(broken)
        with pytest.raises(ValueError, match=f"{folder}/tokenizer.json.*JSON") as error:
            Tokenizer.from_dir(folder)
        assert "\n" not in str(error.value)
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ValueError, match=r"object.*list"):
        Tokenizer.from_dir(folder)
    (folder / "tokenizer.json").write_text('{"decoder": {"type": "ByteLevel"}}')
    with pytest.raises(ValueError, match=f"{folder}/tokenizer.json.*tokenizer"):
        Tokenizer.from_dir(folder)


def test_stream_never_splits_a_character(tokenizer):
    text = "é 你好 🦙😶‍🌫️ plain"
    ids = tokenizer.encode(text)
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert len(ids) > len(text)
    assert all("�" not in piece for piece in pieces)
    assert "" in pieces and "你" in pieces and "🦙" in pieces
    assert "".join(pieces) + stream.finish() == text


def test_stream_of_the_7b_vectors(golden, pro_7b):
    vectors = json.loads((golden / "vectors_7b.json").read_text(encoding="utf-8"))["vectors"]
    for vector in vectors:
        stream = TextStream(pro_7b)
        pieces = [stream.push(token) for token in vector["ids"]]
        assert "".join(pieces) + stream.finish() == vector["text"]


def test_an_incomplete_character_ends_as_the_replacement_character(tokenizer):
    ids = tokenizer.encode("a你")[1:-1]
    stream = TextStream(tokenizer)
    assert [stream.push(token) for token in ids] == ["a", "", ""]
    assert stream.finish() == "�"
    assert tokenizer.decode(ids) == "a�"


def test_a_real_replacement_character_streams_at_once(tokenizer):
    ids = tokenizer.encode("�")[1:]
    stream = TextStream(tokenizer)
    assert "".join(stream.push(token) for token in ids) == "�"
    assert stream.finish() == ""


def test_ids_without_a_token_and_special_ids_say_nothing(tokenizer):
    stream = TextStream(tokenizer)
    assert [stream.push(i) for i in (447, tokenizer.eos_id, tokenizer.image_id)] == ["", "", ""]
    assert tokenizer.decode([447]) == ""


def test_decode_equals_the_librarys_decoder(tokenizer):
    ids = list(range(400))
    for skip in (True, False):
        expected = tokenizer.backend.decode(ids, skip_special_tokens=skip)
        assert tokenizer.decode(ids, skip_special=skip) == expected


@pytest.mark.parametrize("name", ["pro_7b", "tokenizer"])
def test_is_longer_is_never_wrong(name, request):
    tokenizer = request.getfixturevalue(name)
    texts = ["a", "ab cd ", " ", "\n", "é😀", "1", "!?", "<image_placeholder>", "a  \n 12", "日本"]
    for part in texts:
        text = part * (2000 // len(part)) + "end"
        number = len(tokenizer.encode(text)) - 1
        limits = [0, *range(1, number, 50), number, number + 1]
        longer = [tokenizer.is_longer(text, limit) for limit in limits]
        assert longer[0] and not any(longer[-2:])
        assert longer == sorted(longer, reverse=True)
    with pytest.raises(ValueError, match="Unicode"):
        tokenizer.encode("a\udcff")
