"""Tests the conversion of records to examples: targets, masks, images, and bad records."""

import io

import numpy as np
import pytest
from PIL import Image
from png_files import RGB, png_file

from janus_jax.data import examples
from janus_jax.data.examples import ExampleMaker, conversation_tokens
from janus_jax.data.records import BadRecord, Record
from janus_jax.processing import chat
from janus_jax.processing.images import load_image, preprocess, preprocess_generation
from janus_jax.processing.processor import Processor
from janus_jax.processing.tokenizer import Tokenizer
from janus_jax.shapes import scenes, text_tokenizer

SIDE, NUM_TOKENS = 96, 36
LONG = png_file(np.zeros((1, 1, 3), int), 8, RGB, size=(60_000, 1))
TURNS = (("<image>\nWhat is it?", "a circle"), ("What color?", "red"))


def png(seed: int, size=(40, 25)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    text_tokenizer.build(folder)
    return Processor.from_dir(folder)


@pytest.fixture(scope="module")
def make(processor):
    """Makes an example from a record; the seed decides whether a caption is dropped."""

    def make(record, tokenized=False, seed=0, max_length=200, max_generated_images=1):
        limits = (max_length, 2, max_generated_images)
        maker = ExampleMaker(processor, SIDE, NUM_TOKENS, 1024, *limits, tokenized)
        return maker(record, np.random.default_rng(seed))

    return make


def words(processor, tokens) -> str:
    return processor.tokenizer.decode(tokens, skip_special=False)


def test_answers_are_predicted_and_nothing_else(processor, make):
    example = make(Record("understanding", TURNS, images=(png(0),)))
    tokens, loss_mask = example["tokens"], example["loss_mask"]
    eos = processor.tokenizer.decode([processor.tokenizer.eos_id], skip_special=False)
    assert words(processor, tokens[loss_mask]) == f" a circle{eos} red{eos}"
    messages = [
        {"role": "user", "content": "<image_placeholder>\nWhat is it?"},
        {"role": "assistant", "content": "a circle"},
        {"role": "user", "content": "What color?"},
        {"role": "assistant", "content": "red"},
    ]
    expected, pixels = processor.conversation(messages, [load_image(png(0))])
    assert tokens.tolist() == expected
    assert example["image_mask"].sum() == 36 and not example["gen_mask"].any()
    scaled = example["pixels"].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(scaled, pixels, atol=1e-6)
    assert example["generated"].shape == (0, SIDE, SIDE, 3)


def test_images_without_a_place_come_first(processor, make):
    turns = (("What is it?", "a circle"),)
    example = make(Record("understanding", turns, images=(png(0), png(1))))
    text = "<image_placeholder>\n<image_placeholder>\nWhat is it?"
    expected, _ = conversation_tokens(processor, ((text, "a circle"),), 2, 200)
    assert example["tokens"].tolist() == expected
    first = preprocess(load_image(png(0)), processor.image_config)
    np.testing.assert_allclose(example["pixels"][0] / 127.5 - 1, first, atol=1e-6)


def test_all_of_a_text_is_predicted(processor, make):
    example = make(Record("text", text="a red circle"))
    assert example["loss_mask"].tolist() == [False, *[True] * (len(example["tokens"]) - 1)]
    assert example["tokens"][-1] == processor.tokenizer.eos_id
    assert words(processor, example["tokens"][1:-1]) == "a red circle"
    assert len(example["pixels"]) == len(example["generated"]) == 0


@pytest.mark.parametrize("tokenized", [False, True])
def test_a_generated_image_follows_its_caption(processor, make, tokenized):
    indices = np.arange(NUM_TOKENS, dtype=np.int32)
    record = Record("generation", text="a red circle", images=(png(3),), indices=indices)
    seed = next(s for s in range(9) if np.random.default_rng(s).random() > 0.1)
    example = make(record, tokenized, seed)
    prompt = processor.image_prompt("a red circle")
    assert example["tokens"].tolist() == prompt + [processor.tokenizer.pad_id] * NUM_TOKENS
    assert example["gen_mask"].tolist() == [False] * len(prompt) + [True] * NUM_TOKENS
    assert not example["loss_mask"].any() and not example["image_mask"].any()
    if tokenized:
        np.testing.assert_array_equal(example["generated"], [indices])
    else:
        want = preprocess_generation(load_image(png(3)), SIDE)
        np.testing.assert_array_equal(example["generated"][0].astype(np.float32) / 127.5 - 1, want)


def test_one_caption_in_ten_is_dropped(processor, make):
    record = Record("generation", text="a red circle", indices=np.zeros(NUM_TOKENS, np.int32))
    prompt = processor.image_prompt("a red circle")
    dropped = processor.unconditional(prompt)
    tokenizer = processor.tokenizer
    assert (dropped[0], dropped[-1]) == (tokenizer.bos_id, tokenizer.image_start_id)
    assert set(dropped[1:-1]) == {tokenizer.pad_id}
    found = [make(record, True, seed)["tokens"][: len(prompt)].tolist() for seed in range(400)]
    assert all(tokens in (prompt, dropped) for tokens in found)
    assert 20 < found.count(dropped) < 65


@pytest.mark.parametrize(
    ("record", "tokenized", "reason"),
    [
        (Record("generation", text="a", images=(b"no image",)), False, "unreadable image"),
        (Record("generation", text="a", images=(png(0)[:60],)), False, "unreadable image"),
        (Record("generation", text="a", images=(LONG,)), False, "unreadable image"),
        (Record("understanding", TURNS, images=(LONG,)), False, "unreadable image"),
        (Record("generation", text="a", indices=np.zeros(36, int)), False, "no image"),
        (Record("generation", text="a", images=(png(0),)), True, "no indices"),
        (Record("generation", text="a", indices=np.zeros(35, int)), True, "malformed"),
        (Record("generation", text="a", indices=np.full(36, 1024)), True, "malformed"),
        (
            Record("understanding", (("Hi", "a <image_placeholder>"),), images=(png(0),)),
            False,
            "malformed",
        ),
        (
            Record("understanding", (("\ud800", "a"),)),
            False,
            "malformed",
        ),
        (Record("generation", text="<image_placeholder>", images=(png(0),)), False, "malformed"),
        (Record("text", text="a <image_placeholder>"), False, "malformed"),
        (Record("text", text="red " * 300), False, "too long"),
        (Record("understanding", TURNS), False, "malformed"),
        (Record("understanding", TURNS, images=(png(0), png(1))), False, "malformed"),
        (
            Record("understanding", TURNS[1:], images=(png(0),) * 3),
            False,
            "too many images",
        ),
        (BadRecord("missing file", "a.jpg"), False, "missing file"),
    ],
)
def test_what_cannot_be_trained_on_is_named(make, record, tokenized, reason):
    bad = make(record, tokenized)
    assert isinstance(bad, BadRecord) and bad.reason == reason


def test_rows_without_generated_positions_take_no_generated_image(make):
    bad = make(Record("generation", text="a", images=(png(0),)), max_generated_images=0)
    assert bad.reason == "too many images"


def test_whatever_a_record_does_is_its_own_fault(make, processor, monkeypatch):
    def exhausted(*_, **__):
        raise MemoryError

    monkeypatch.setattr(examples, "crop_square", exhausted)
    bad = make(Record("generation", text="a", images=(png(0),), where="a.tar:7"))
    assert str(bad) == "a.tar:7: unreadable image: MemoryError"
    monkeypatch.setattr(type(processor), "image_prompt", exhausted)
    bad = make(Record("generation", text="a", images=(png(0),), where="a.tar:7"))
    assert str(bad) == "a.tar:7: malformed: MemoryError"


def test_too_many_images_are_not_decoded(make, monkeypatch):
    monkeypatch.setattr(examples, "prepare_image", lambda *_: pytest.fail("one was decoded"))
    assert make(Record("understanding", TURNS, images=(b"",) * 99)).reason == "malformed"
    turns = (("<image>" * 3, "a"),)
    assert make(Record("understanding", turns, images=(b"",) * 3)).reason == "too many images"


def test_a_bad_record_says_where_it_is(make):
    assert make(Record("text", text="red " * 300, where="a.jsonl:7")).where == "a.jsonl:7"


def test_captions_of_scenes_are_as_the_processor_writes_prompts(processor, make):
    rng = np.random.default_rng(0)
    _, prompt = scenes.sample_scene(rng, "position")
    record = Record("generation", text=prompt.text, indices=np.zeros(NUM_TOKENS, np.int32))
    seed = next(s for s in range(9) if np.random.default_rng(s).random() > 0.1)
    tokens = make(record, True, seed)["tokens"]
    assert tokens[:-NUM_TOKENS].tolist() == processor.image_prompt(prompt.text)


@pytest.fixture
def encoded(monkeypatch):
    """Returns a list to which the lengths of all tokenized texts are added."""
    lengths, encode = [], Tokenizer.encode

    def counted(self, text):
        lengths.append(len(text))
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", counted)
    return lengths


def dialogue(number: int) -> Record:
    return Record("understanding", (("What is it?", "A circle."),) * number)


def test_a_long_dialogue_that_fits_takes_linear_time(processor, make, encoded):
    example = make(dialogue(100), max_length=10_000)
    turns = [dict(role="user", content="What is it?"), dict(role="assistant", content="A circle.")]
    expected, _ = processor.conversation(turns * 100)
    assert example["tokens"].tolist() == expected
    short = sum(encoded)
    encoded.clear()
    make(dialogue(200), max_length=10_000)
    assert sum(encoded) < 2.1 * short


def test_a_dialogue_is_tokenized_until_it_is_too_long(make, encoded):
    found = []
    for number in (300, 30_000):
        encoded.clear()
        found.append((make(dialogue(number)).reason, sum(encoded)))
    assert found[0] == found[1] and found[0][0] == "too long" and found[0][1] < 10_000


@pytest.mark.parametrize("long", ["red " * 1_000_000, "r" * 4_000_000, " " * 4_000_000 + "r"])
def test_a_long_text_is_not_tokenized_whole(make, encoded, long):
    records = [
        Record("text", text=long),
        Record("generation", text=long, images=(png(0),)),
        Record("understanding", ((long, "a"),)),
        Record("understanding", (("Hi", "Ho"), ("a", long), ("b", "c"))),
    ]
    bad = [make(record) for record in records]
    assert [one.reason for one in bad] == ["too long"] * 4
    assert "the row and the model hold at most 200 tokens, got more than 200" in bad[0].detail
    assert sum(encoded) < 100_000


def test_a_conversation_that_reads_differently_in_a_later_turn_is_refused(processor, monkeypatch):
    def joined(messages, sft_format, system_prompt):  # words may merge across the turns
        return "".join(message["content"] for message in messages)

    monkeypatch.setattr(chat, "format_conversation", joined)
    with pytest.raises(BadRecord, match="tokenize differently once a turn is added"):
        conversation_tokens(processor, TURNS[1:] * 2, 0, 200)
